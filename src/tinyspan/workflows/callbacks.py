"""Callbacks of the Trainer that show its progress."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tinyspan.workflows.resumable import ASIDE

if TYPE_CHECKING:
    from rich.progress import Progress

    from tinyspan.workflows.progress import Display

__all__ = ["TrainingProgress"]


class TrainingProgress(TrainerCallback):
    """Shows one training run on a display."""

    def __init__(self, display: "Display", progress: "Progress", name: str) -> None:
        self._display, self._progress, self._name = display, progress, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the run's bar, starting at the step from which a resumed run continues."""
        self._task = self._progress.add_task(self._name, total=state.max_steps, completed=state.global_step)
        if state.global_step > 0:
            self._display.advance(state.global_step)
            self._display.say(f"{self._name}: resumes at step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self._progress.update(self._task, completed=state.global_step)
        self._display.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print the held-out score of an epoch, or that of the set-aside rows."""
        prefix, rows = ("eval", "held-out") if "eval_score" in metrics else (ASIDE, "set-aside")
        self._display.say(
            f"{self._name}: epoch {state.epoch:.0f} of {state.num_train_epochs}, "
            f"{rows} score {metrics[f'{prefix}_score']:.3f}, loss {metrics[f'{prefix}_loss']:.3f}"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the run's bar."""
        self._progress.remove_task(self._task)

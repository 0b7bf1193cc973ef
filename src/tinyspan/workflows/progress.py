"""Progress of training: bars with the remaining time on a terminal, one line per epoch elsewhere."""

import gc
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["Display", "quieten"]

Item = TypeVar("Item")


def quieten() -> None:
    """Silence the progress bars and messages of the libraries, which need not be imported yet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # The loss that this warning recommends is the same as ours
    warnings.filterwarnings("ignore", "Version v4.12.0 introduces a better way", FutureWarning)
    if "transformers" in sys.modules:  # it has read the environment already
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _freeze_imports() -> None:
    """Exclude what is imported from garbage collection: each Trainer triggers one, which takes 0.4 s otherwise.

    Only the first call in a process does so. A later one would keep garbage alive, and with it mapped files.
    """
    if not gc.get_freeze_count():
        gc.freeze()


class Display:
    """Progress display. Use it as a context manager; it draws bars on a terminal, and prints lines elsewhere.

    Args:
        console: output; by default standard error, since standard output is for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._overall: TaskID | None = None
        self._began = time.perf_counter()

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def expect(self, name: str, steps: int | None) -> None:
        """Show a bar over all the training steps, or rows, to come; None if their number is unknown."""
        self._overall = self._progress.add_task(name, total=steps)

    def advance(self, steps: int = 1) -> None:
        """Count training steps, or rows."""
        if self._overall is not None:
            self._progress.advance(self._overall, steps)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        self.console.print(f"[dim]{time.perf_counter() - self._began:4.0f} s[/]  {escape(text)}", highlight=False)

    def each(self, items: Iterable[Item], name: str, total: int) -> Iterator[Item]:
        """Yield the items with their own bar."""
        task = self._progress.add_task(name, total=total)
        for item in items:
            yield item
            self._progress.advance(task)
        self._progress.remove_task(task)

    def generating(self, starts: Sequence[int]) -> Iterator[int]:
        """Yield the first rows of the batches of a generation, with a bar of the completed rows."""
        return self.each(starts, "generating", len(starts))

    def training(self, name: str, scored: str = "held-out") -> "TrainerCallback":
        """Return a callback that shows one training run.

        Args:
            name: name of the run.
            scored: which rows are scored as the held-out ones.
        """
        from tinyspan.workflows.callbacks import TrainingProgress

        _freeze_imports()
        return TrainingProgress(self, self._progress, name, scored)

"""Training that can be interrupted at any moment and resumed with bit-identical results.

The Trainer's checkpoints contain weights, optimizer, schedule and random generators. This module adds what else a run
needs: the generator's state at the start of the epoch, which determines the order of its rows, and the training loss
since it was last logged. A checkpoint is complete once its `whole.json` exists, which lists every file with its hash.

With early stopping, the best state is a checkpoint, too. Which one follows from the scores in the log, which every
checkpoint contains, so that a resumed run stops and chooses as one that was not interrupted.
"""

import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback

from tinyspan.errors import StorageError
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.interop.trainer import SubspaceTrainer
from tinyspan.io.manifests import FileEntry, damage, file_entry
from tinyspan.io.storage import read_json, reading, write_json, writing
from tinyspan.workflows.hardware import peak_memory

__all__ = ["ASIDE", "Checkpoints", "ResumableTrainer"]

WHOLE = "whole.json"
ASIDE = "aside"  # prefix of the scores on the set-aside rows in the log of the Trainer


@dataclass(frozen=True)
class Checkpoints:
    """Location and frequency of the checkpoints of a run.

    Attributes:
        folder: folder that contains only checkpoints; the newest two are kept, and the best one.
        every: number of steps between checkpoints; there is also one at the end of every epoch.
        run: everything that determines the run; checkpoints of other runs are deleted.
    """

    folder: Path
    every: int | Literal["epoch"]
    run: Mapping[str, Any]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest usable checkpoint of this run and its `whole.json`, and delete newer ones."""
        folders, newest = self.all(), None
        while folders and newest is None:
            newest = self._read(folders[-1])
            best = None if newest is None else newest["best"]
            if best is not None and self.at(best) != folders[-1] and self._read(self.at(best)) is None:
                newest = None  # the run could not end with its best state
            if newest is None:
                shutil.rmtree(folders.pop())
        return None if newest is None else (folders[-1], newest)

    def all(self) -> list[Path]:
        """Return the folders of all checkpoints, the oldest first."""
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))

    def at(self, step: int) -> Path:
        """Return the folder of the checkpoint after a step."""
        return self.folder / f"checkpoint-{step}"

    def rotate(self, best: int | None = None) -> None:
        """Delete all but the newest two and the one after the step `best`."""
        for folder in self.all()[:-2]:
            if best is not None and folder == self.at(best):
                continue
            (folder / WHOLE).unlink(missing_ok=True)  # first, so that a partly deleted checkpoint is not complete
            shutil.rmtree(folder)

    def _read(self, folder: Path) -> dict[str, Any] | None:
        if not (folder / WHOLE).is_file():  # the process was killed while writing it
            return None
        try:
            content = read_json(folder / WHOLE)
            with reading(folder / WHOLE):
                files = {name: FileEntry.model_validate(entry) for name, entry in content["files"].items()}
                ours = content["run"] == self.run and {"best", "stopped"} <= content.keys()
        except StorageError as error:
            warnings.warn(f"{error}; training resumes from an earlier state", stacklevel=3)
            return None
        if damaged := damage(folder, files):
            warnings.warn(f"{damaged[0]}; training resumes from an earlier state", stacklevel=3)
            return None
        if not ours:
            warnings.warn(f"{folder} belongs to other settings, rows, weights or versions; it is deleted", stacklevel=3)
        return content if ours else None


class ResumableTrainer(SubspaceTrainer):
    """A Trainer that saves states from which it resumes exactly; for one process, without gradient accumulation.

    Args:
        *args: as for `SubspaceTrainer`.
        checkpoints: location and frequency; None saves nothing. `TrainingArguments.output_dir` must be its folder.
        aside: rows that are scored in every evaluation besides the held-out ones, logged with the prefix `ASIDE`.
        patience: number of evaluations after which training stops if the score on these rows has not improved; it
            needs checkpoints, one of which is the best state.
        lower_is_better: whether a lower score is an improvement.
        score_held_out: whether evaluations during training score the held-out rows.
        **kwargs: as for `SubspaceTrainer`.

    Attributes:
        eval_order: positions of the rows in the order of the last evaluation.
        seconds: time spent in this run, including the time before an interruption.
        peak_memory_bytes: peak memory of this run, including that before an interruption.
    """

    def __init__(
        self,
        *args: Any,
        checkpoints: Checkpoints | None = None,
        aside: Dataset | None = None,
        patience: int | None = None,
        lower_is_better: bool = False,
        score_held_out: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoints = checkpoints
        self.aside, self.patience = aside, patience
        self.lower_is_better, self.score_held_out = lower_is_better, score_held_out
        self.eval_order: list[int] = []
        self._loss: Tensor | float = 0.0  # sum since the last log
        self._losses = 0
        self._epoch_start = torch.random.get_rng_state()
        self._seconds_before, self._peak_before, self._began = 0.0, 0, time.perf_counter()
        self.add_callback(_SaveSchedule(self))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return the Trainer's sampler, which orders rows by length, and keep its order in `eval_order`."""
        sampler = super()._get_eval_sampler(eval_dataset)
        return sampler if sampler is None else _Recorded(sampler, self.eval_order)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run."""
        return self._seconds_before + time.perf_counter() - self._began

    @property
    def peak_memory_bytes(self) -> int:
        """Peak memory of this run."""
        return max(self._peak_before, peak_memory())

    def train_or_resume(self) -> None:
        """Train, starting from the newest complete checkpoint if there is one."""
        checkpoint = None if self.checkpoints is None else self.checkpoints.newest()
        self._began = time.perf_counter()
        if checkpoint is None:
            self.train()
            return
        folder, state = checkpoint
        with reading(folder / WHOLE):
            self._loss = torch.tensor(state["loss"], dtype=torch.float32, device=self.args.device)
            self._losses = state["losses"]
            self._epoch_start = torch.frombuffer(bytearray.fromhex(state["epoch_start"]), dtype=torch.uint8).clone()
            self._seconds_before, self._peak_before = state["seconds"], state["peak_memory_bytes"]
            if state["stopped"]:
                self.args.max_steps = int(folder.name.rpartition("-")[2])
        self.train(resume_from_checkpoint=str(folder))

    def best_step(self) -> int | None:
        """Return the step with the best score on the set-aside rows so far, the first of several; None without any."""
        scores = {int(entry["step"]): entry[f"{ASIDE}_score"] for entry in self._aside_scores()}
        choose = min if self.lower_is_better else max
        return choose(scores, key=scores.__getitem__) if scores else None

    def restore_best(self) -> bool:
        """Load the weights of the best step, unless it is the last, and return whether they were loaded.

        The state's epoch is then that of the best step.
        """
        best = self.best_step()
        if best is None or best == self.state.global_step:
            return False
        assert self.checkpoints is not None
        self._load_from_checkpoint(str(self.checkpoints.at(best)))
        self.state.epoch = next(entry["epoch"] for entry in self._aside_scores() if entry["step"] == best)
        return True

    def _aside_scores(self) -> list[dict[str, float]]:
        return [entry for entry in self.state.log_history if f"{ASIDE}_score" in entry]

    def _stops(self) -> bool:
        """Whether the score on the set-aside rows has not improved for as many evaluations as `patience` says."""
        steps = [entry["step"] for entry in self._aside_scores()]
        best = self.best_step()
        return self.patience is not None and best is not None and len(steps) - 1 - steps.index(best) >= self.patience

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.aside is not None:
            with torch.random.fork_rng(devices=[]):  # an evaluation draws a number; training goes on as without it
                self.evaluate(self.aside, metric_key_prefix=ASIDE)
        metrics: dict[str, float] = super()._evaluate(*args, **kwargs) if self.score_held_out else {}
        self.control.should_training_stop |= self._stops()
        return metrics

    def ends_epoch(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return float(self.state.epoch or 0).is_integer()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sum the loss here, since the Trainer loses its own sum when a run is interrupted."""
        loss = super().training_step(*args, **kwargs)
        self._loss, self._losses = self._loss + loss, self._losses + 1
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss since the last log."""
        if "loss" in logs and self._losses:
            logs = {**logs, "loss": float(self._loss) / self._losses}
            self._loss, self._losses = 0.0, 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.checkpoints is not None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrajectoryCallback):
                callback.flush()  # a state must not be ahead of the points on disk
        folder = self.checkpoints.folder / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                self._complete(folder, self.checkpoints.run)
                self.checkpoints.rotate(self._best_to_keep())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _best_to_keep(self) -> int | None:
        return None if self.patience is None else self.best_step()

    def _complete(self, folder: Path, run: Mapping[str, Any]) -> None:
        start = torch.random.get_rng_state() if self.ends_epoch() else self._epoch_start
        files = sorted(path for path in folder.rglob("*") if path.is_file())  # also those of a basis in an adapter
        content = {
            "run": run,
            "files": {path.relative_to(folder).as_posix(): file_entry(path).model_dump() for path in files},
            "loss": float(self._loss),
            "losses": self._losses,
            "epoch_start": bytes(start.tolist()).hex(),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "best": self._best_to_keep(),
            "stopped": self._stops(),
        }
        write_json(folder / WHOLE, content)


class _Recorded(Sampler[int]):
    """A sampler that writes the order of its indices into a list."""

    def __init__(self, sampler: Sampler[int], order: list[int]) -> None:
        self.sampler, self.order = sampler, order

    def __iter__(self) -> Iterator[int]:
        self.order[:] = self.sampler
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class _SaveSchedule(TrainerCallback):
    """Requests a checkpoint after the given number of steps and after every epoch, when its evaluation is done."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._resumed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resumed = state.global_step > 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._resumed:  # restore the order of this epoch's rows
            torch.random.set_rng_state(self._trainer._epoch_start)
            self._resumed = False
        else:
            self._trainer._epoch_start = torch.random.get_rng_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoints = self._trainer.checkpoints
        if checkpoints is not None and checkpoints.every != "epoch" and not self._trainer.ends_epoch():
            control.should_save = state.global_step % checkpoints.every == 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = self._trainer.checkpoints is not None

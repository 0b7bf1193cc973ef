"""Record a trajectory inside the Hugging Face Trainer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from tinyspan.errors import InputError
from tinyspan.io.storage import MANIFEST
from tinyspan.model.processes import own_shard
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Partition, by_layer
from tinyspan.sharding import is_cut
from tinyspan.trajectories.recorder import TrajectoryRecorder, trajectory_bytes
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["TrajectoryCallback"]

logger = logging.getLogger(__name__)


class TrajectoryCallback(TrainerCallback):
    """Record a trajectory with any Trainer: `Trainer(..., callbacks=[TrajectoryCallback("runs/mrpc")])`.

    Points are written while training goes on, and are on disk before the Trainer saves a checkpoint. How much disk they
    will take is logged (level info) when training starts, which is refused where there is no room.

    Args:
        folder: output folder; as for `TrajectoryRecorder`.
        every: `"epoch"`, or a number of optimizer steps.
        partition: made from the model when training starts; the layers by default.
        overwrite: replace an earlier trajectory.
        resume: go on with a trajectory in the folder even if training starts from its beginning again. If it goes on
            from a checkpoint (`resume_from_checkpoint`), the trajectory goes on in any case.
        dtype: of the stored deltas, as for `TrajectoryRecorder`.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int | Literal["epoch"] = "epoch",
        partition: Callable[[torch.nn.Module], Partition] = by_layer,
        *,
        overwrite: bool = False,
        resume: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if every != "epoch" and every < 1:
            raise InputError(f"every must be 'epoch' or a number of steps of at least 1, got {every!r}")
        self.folder, self.every, self.partition = Path(folder), every, partition
        self.overwrite, self.resume, self.dtype = overwrite, resume, dtype
        self._place = self.folder  # output folder of this process
        self._recorder: TrajectoryRecorder | None = None  # for a replicated model, in the first process only
        self._rows = 0  # rows per batch
        self._end: tuple[int, dict[str, torch.Tensor] | None] = -1, None  # where training may have ended

    def trajectory(self) -> Trajectory:
        """Open what has been recorded."""
        return Trajectory(self._place)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write theta_0, or open the trajectory of the run that goes on.

        Among processes that hold the same model, the first one alone records. Of a model that `fully_shard` has cut,
        each process records its own rows, the process of rank i in `folder/shard-i`: `svd_basis(group=)` takes these.

        Raises:
            InputError: training resumes from a checkpoint and the folder holds no trajectory of it; the present weights
                are not theta_0; the model is a `SubspaceModel`, whose path lies in its basis already.
            MismatchError: the trajectory in the folder is of another partition, theta_0 or dtype.
            StorageError: there is no room for all points.
        """
        if isinstance(model, SubspaceModel):
            raise InputError("a SubspaceModel moves in its basis alone; record the training of a plain model")
        if is_cut(model):
            self._place = own_shard(self.folder)
        elif not state.is_world_process_zero:
            return
        rows = getattr(state, "train_batch_size", None) or 0
        smaller = 0 < rows < self._rows and args.auto_find_batch_size and not state.global_step
        self._rows, self._end = rows, (-1, None)
        if smaller and self._recorder is not None:  # the Trainer begins again from where the weights are: same theta_0
            self._recorder.restart()
            return
        every = 1 if self.every == "epoch" else self.every
        partition, started, points = self.partition(model), state.global_step > 0, self._points(state)
        if points is not None:
            needed = trajectory_bytes(partition, points, self.dtype) / 1e6
            logger.info(f"{self._place} will hold theta_0 and {points} points, {needed:,.1f} MB")
        if (started or self.resume) and (self._place / MANIFEST).is_file():
            within = self.every == "epoch" and not float(state.epoch or 0).is_integer()  # where no point is due
            done = None if within else state.global_step
            self._recorder = TrajectoryRecorder.resume(
                model, partition, self._place, every=every, done=done, dtype=self.dtype, points=points
            )
            return
        if started:
            raise InputError(
                f"training resumes at step {state.global_step}, whose weights are not theta_0; record a run from its "
                "start, give the folder that holds its trajectory, or use trajectory_from_checkpoints on the "
                "checkpoints it left"
            )
        self._recorder = TrajectoryRecorder(
            model,
            partition,
            self._place,
            every=every,
            overwrite=self.overwrite,
            dtype=self.dtype,
            points=points,
        )

    def _points(self, state: Any) -> int | None:
        """Return how many points the run will have, its end among them, if that is known."""
        if self.every != "epoch":
            return int(-(-state.max_steps // self.every))
        return int(state.num_train_epochs) if state.num_train_epochs <= state.max_steps else None  # rows without end

    def flush(self) -> None:
        """Wait until every point is on disk; what saves a state of training calls it first.

        Raises:
            StorageError: the last one could not be written.
        """
        if self._recorder is not None:
            self._recorder.flush()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a point if it is this step's turn."""
        if self.every != "epoch" and self._recorder is not None:
            self._recorder.record(state.global_step - 1)
        if control.should_save:
            self.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a point if it is an epoch's turn, or if training ends.

        The end is taken while its weights are there: `load_best_model_at_end` puts others in their place.
        """
        if self._recorder is not None:
            if self.every == "epoch":
                self._recorder.record(state.global_step - 1)
            elif control.should_training_stop or state.global_step >= state.max_steps:
                self._recorder.end(state.global_step - 1)
            elif args.load_best_model_at_end and state.global_step % self.every:  # who stops early decides after this
                self._end = state.global_step - 1, self._recorder.snapshot()
        if control.should_save:
            self.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See that points are on disk: a checkpoint may follow, if this model is the best so far."""
        self.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See that points are on disk, if another callback had the checkpoint made."""
        self.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the end of the run, if it is no point yet."""
        if self._recorder is None or state.global_step == 0:
            return
        step, copies = self._end
        if not args.load_best_model_at_end:
            self._recorder.end(state.global_step - 1)
        elif step == state.global_step - 1:
            self._recorder.end(step, copies)
        self._recorder.seal()
        self._end = -1, None

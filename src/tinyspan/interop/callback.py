"""Record a trajectory inside the Hugging Face Trainer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from tinyspan.errors import InputError
from tinyspan.io.manifests import MANIFEST
from tinyspan.model.processes import own_shard
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Partition
from tinyspan.partitioning import by_layer
from tinyspan.sharding import is_cut
from tinyspan.trajectories.points import trajectory_bytes
from tinyspan.trajectories.recorder import TrajectoryRecorder, check_interval
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["TrajectoryCallback"]

logger = logging.getLogger(__name__)


class TrajectoryCallback(TrainerCallback):
    """Record a trajectory with any Trainer: `Trainer(..., callbacks=[TrajectoryCallback("runs/mrpc")])`.

    Points are written while training continues, and are on disk before the Trainer saves a checkpoint. When training
    starts, the required disk space is checked and logged (level info). Steps are numbered from 0, as in
    `Trajectory.steps`.

    Args:
        folder: folder of the trajectory, as for `TrajectoryRecorder`.
        every: record a point after every epoch (`"epoch"`), or after every given number of optimizer steps.
        partition: parameters to record: a partition of the model, or a function that is called with the model when
            training starts.
        overwrite: replace an earlier trajectory.
        resume: continue a trajectory in the folder even if training starts from the beginning. If training resumes from
            a checkpoint (`resume_from_checkpoint`), the trajectory is continued in any case.
        dtype: dtype of the stored deltas, as for `TrajectoryRecorder`.

    Raises:
        InputError: `every` is neither `"epoch"` nor a number of steps of at least 1, or `partition` is neither a
            partition nor a function.

    Example:
        >>> import tempfile
        >>> from tinyspan import by_module
        >>> callback = TrajectoryCallback(tempfile.mkdtemp(), every=50, partition=by_module)
    """

    def __init__(
        self,
        folder: str | Path,
        every: int | Literal["epoch"] = "epoch",
        partition: Partition | Callable[[torch.nn.Module], Partition] = by_layer,
        *,
        overwrite: bool = False,
        resume: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if every != "epoch":
            check_interval(every, "'epoch', or ")
        if not isinstance(partition, Partition) and not callable(partition):
            raise InputError(
                f"expected partition to be a Partition or a function such as by_layer, got {type(partition).__name__}"
            )
        self.folder, self.every, self.partition = Path(folder), every, partition
        self.overwrite, self.resume, self.dtype = overwrite, resume, dtype
        self._place = self.folder  # folder into which this process records
        self._recorder: TrajectoryRecorder | None = None  # for a replicated model, in the first process only
        self._rows = 0  # rows per batch
        self._end: tuple[int, dict[str, torch.Tensor] | None] = -1, None  # where training may have ended

    def trajectory(self) -> Trajectory:
        """Open the trajectory of all points recorded so far; of a sharded model, the one of this process."""
        return Trajectory(self._place)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write theta_0, or open the trajectory of the run that is resumed.

        If several processes hold the same model, only the first one records. If `fully_shard` has sharded the model,
        each process records its own rows, the process of rank i in `folder/shard-i`; `svd_basis(group=)` reads these.

        Raises:
            InputError: training resumes from a checkpoint, and the folder does not hold the trajectory of this run; or
                the model is a `SubspaceModel`.
            MismatchError: the model lacks a parameter of the partition, or the trajectory in the folder has another
                partition, theta_0 or dtype.
            StorageError: the disk has too little space for all points.
        """
        if isinstance(model, SubspaceModel):
            raise InputError("a SubspaceModel changes only within its basis; record the training of a plain model")
        if is_cut(model):
            self._place = own_shard(self.folder)
        elif not state.is_world_process_zero:
            return
        rows = getattr(state, "train_batch_size", None) or 0
        smaller = 0 < rows < self._rows and args.auto_find_batch_size and not state.global_step
        self._rows, self._end = rows, (-1, None)
        if smaller and self._recorder is not None:  # the Trainer starts again from theta_0
            self._recorder.restart()
            return
        every = 1 if self.every == "epoch" else self.every
        partition = self.partition if isinstance(self.partition, Partition) else self.partition(model)
        started, points = state.global_step > 0, self.expected_points(state)
        if points is not None:
            needed = trajectory_bytes(partition, points, self.dtype) / 1e6
            logger.info(f"{self._place} will hold theta_0 and {points} points, {needed:,.1f} MB")
        if (started or self.resume) and (self._place / MANIFEST).is_file():
            within = self.every == "epoch" and not float(state.epoch or 0).is_integer()  # no point is due here
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

    def expected_points(self, state: Any) -> int | None:
        """Return the number of points of the whole run, including its end; None if it is unknown.

        A subclass that records at other steps overrides this method and `on_step_end`.

        Args:
            state: the Trainer's state when training starts.
        """
        if self.every != "epoch":
            return int(-(-state.max_steps // self.every))
        has_rows = state.num_train_epochs <= state.max_steps  # otherwise their number is unknown
        return int(state.num_train_epochs) if has_rows else None

    def flush(self) -> None:
        """Wait until every point is on disk; call it before you save a training state.

        Raises:
            StorageError: the last point could not be written.
        """
        if self._recorder is not None:
            self._recorder.flush()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record a point if one is due after this step."""
        if self.every != "epoch" and self._recorder is not None:
            self._recorder.record(state.global_step - 1)
        if control.should_save:
            self.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record a point if one is due after this epoch, or if training ends.

        The end is recorded here, because `load_best_model_at_end` replaces the weights afterwards.
        """
        if self._recorder is not None:
            if self.every == "epoch":
                self._recorder.record(state.global_step - 1)
            elif control.should_training_stop or state.global_step >= state.max_steps:
                self._recorder.end(state.global_step - 1)
            elif args.load_best_model_at_end and state.global_step % self.every:  # early stopping is decided later
                self._end = state.global_step - 1, self._recorder.snapshot()
        if control.should_save:
            self.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until every point is on disk, since a checkpoint may follow if this model is the best so far."""
        self.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until every point is on disk, if another callback has requested the checkpoint."""
        self.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the end of the run, unless it is a point already, and seal the trajectory."""
        if self._recorder is None or state.global_step == 0:
            return
        step, copies = self._end
        if not args.load_best_model_at_end:
            self._recorder.end(state.global_step - 1)
        elif step == state.global_step - 1:
            self._recorder.end(step, copies)
        self._recorder.seal()
        self._end = -1, None

"""Record and tune inside the Hugging Face Trainer."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

import torch
import transformers
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils.generic import can_return_loss, find_labels

from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.storage import MANIFEST
from tinyspan.model.processes import own_shard
from tinyspan.model.subspace import SubspaceModel, named_model
from tinyspan.partition import Partition, by_layer, is_cut, is_sharded, local
from tinyspan.trajectories.recorder import TrajectoryRecorder, trajectory_bytes
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["SubspaceTrainer", "TrajectoryCallback"]

logger = logging.getLogger(__name__)
LOOK = 16  # steps between looks at the losses that an accelerator has computed


class SubspaceTrainer(Trainer):
    """A Trainer whose `SubspaceModel` gets its own learning rate for z and no weight decay on it.

    Any other model is trained as by `Trainer`. Both rates follow the one schedule.

    Training ends with a `TinyspanError` at the first loss or gradient norm that is NaN or infinite, before the weights
    take it. An accelerator runs ahead of the program, which would have to wait for every number it looks at: there the
    numbers of 16 steps are looked at together, and whenever something is logged or saved. Under fp16 loss scaling,
    which meets infinite gradients by design, nothing is looked at.

    A model that FSDP2 has cut before it was wrapped (`from_pretrained(distributed_config=)`, or `fully_shard`) is
    trained as it is, and the process of rank i saves its adapter to `shard-i` in the folder of each checkpoint. As of
    any model that was cut before the Trainer saw it, the optimizer is not saved: training cannot resume, and `train`
    raises an `InputError` if the arguments ask for that.

    Args:
        *args: as for `Trainer`.
        z_learning_rate: of z; `TrainingArguments.learning_rate` is that of the ordinary parameters.
        module_learning_rates: of the ordinary parameters in some modules of the model, by the modules' names; of
            modules inside each other the inner one's counts.
        **kwargs: as for `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        z_learning_rate: float = 1e-2,
        module_learning_rates: Mapping[str, float] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        self.z_learning_rate, self.module_learning_rates = z_learning_rate, module_learning_rates
        super().__init__(*args, **kwargs)
        if isinstance(self.model, SubspaceModel) and self.args.n_gpu > 1:
            raise InputError("one process on several GPUs (DataParallel) would lose z; set CUDA_VISIBLE_DEVICES to one")
        if isinstance(self.model, SubspaceModel):
            _refuse_wrapping(self)
            if _is_over_shards(self.model):
                _require_own_shards(self)
                self.is_distributed_loading_by_transformers = True  # to be neither cut nor exchanged by the Trainer
            wrapped = type(named_model(self.model.model))
            self.label_names = find_labels(wrapped) if self.args.label_names is None else self.args.label_names
            self.can_return_loss = can_return_loss(wrapped)  # Trainer has asked the class of the wrapper for both
        self._look_every = 1 if self.args.device.type == "cpu" else LOOK
        self._looked_at_z = False
        self._unseen: list[tuple[str, int, torch.Tensor]] = []  # what, step, number
        self._clip, self.accelerator.clip_grad_norm_ = self.accelerator.clip_grad_norm_, self._clipped

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; over shards, after a look at what checkpoints will have to hold."""
        if _is_over_shards(self.model):
            _require_no_resuming(self.args, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the gradients of one batch, and watch its loss."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._watch("loss", loss)
        self._require_gradient()
        return loss

    def _require_gradient(self) -> None:
        """Refuse to go on if the first step has left z without a gradient."""
        subspace = self.accelerator.unwrap_model(self.model)
        if self._looked_at_z or not isinstance(subspace, SubspaceModel):
            return
        self._looked_at_z = True
        if len(subspace.z) and all(z.grad is None for z in subspace.z):
            raise TinyspanError(
                "no gradient has reached z in the first step, so that z would stand still: is part of the model "
                "detached, or checkpointed with use_reentrant=True without enable_input_require_grads()?"
            )

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log, after a look at what has been computed."""
        self._look()
        super().log(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save, after a look at what has been computed: no checkpoint is made of NaN."""
        self._look()
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save, of a model over shards an adapter for each process."""
        if not _is_over_shards(self.model):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.model.save_pretrained(own_shard(folder), overwrite=True)
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()  # the checkpoint is whole

    def _mixed_mesh_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Clip what lies in shards together with what does not, as the Trainer does, and watch the norm."""
        norm = super()._mixed_mesh_grad_norm(*args, **kwargs)
        self._watch("norm of the gradients", norm)
        return norm

    def _clipped(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._clip(*args, **kwargs)
        if norm is not None:
            norm = norm.full_tensor() if is_sharded(norm) else torch.as_tensor(norm)
            self._watch("norm of the gradients", norm)
        return norm

    def _watch(self, what: str, number: torch.Tensor) -> None:
        if self.accelerator.scaler is None:
            self._unseen.append((what, self.state.global_step + 1, number.detach()))
            if len({step for _, step, _ in self._unseen}) >= self._look_every:
                self._look()

    def _look(self) -> None:
        """Raise for the first number that is NaN or infinite, of those that nobody has looked at."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        finite = torch.isfinite(torch.stack([number.float() for *_, number in unseen])).tolist()
        for (what, step, _), sound in zip(unseen, finite, strict=True):
            if not sound:
                raise TinyspanError(
                    f"the {what} is NaN or infinite at step {step} of {self.state.max_steps}, so training ends. Points "
                    "and checkpoints written before it are kept, what was learned since is lost. Lower the learning "
                    "rates, or look for extreme labels"
                )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer over z and the ordinary parameters in separate groups.

        Raises:
            InputError: a module that is given a learning rate has no parameter that is trained in the ordinary way.
        """
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if self.optimizer is None and (isinstance(target, SubspaceModel) or self.module_learning_rates):
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            decayed = set(self.get_decay_parameter_names(target))
            names = {id(parameter): name for name, parameter in target.named_parameters()}
            groups, ordinary = [], [parameter for parameter in target.parameters() if parameter.requires_grad]
            prefix = ""
            if isinstance(target, SubspaceModel):
                in_z, outside = target.parameter_groups(self.z_learning_rate, self.args.learning_rate)
                groups, ordinary, prefix = [in_z], outside["params"], "model."  # what stands before a wrapped name
            modules = {id(one): self._module_of(names[id(one)].removeprefix(prefix)) for one in ordinary}
            if unknown := self.module_learning_rates.keys() - {*modules.values()}:
                raise InputError(f"a learning rate is given for {min(unknown)!r}, of which no parameter is trained")
            alike: dict[Any, list[Any]] = {}  # an optimizer takes no mixture of meshes
            for parameter in ordinary:
                decays, mesh = names[id(parameter)] in decayed, getattr(parameter, "device_mesh", None)
                rate = self.module_learning_rates.get(modules[id(parameter)], self.args.learning_rate)
                alike.setdefault((rate, decays, mesh), []).append(parameter)
            for (rate, decays, _), chosen in alike.items():
                groups.append({"params": chosen, "lr": rate, "weight_decay": self.args.weight_decay * decays})
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **arguments)
        return super().create_optimizer(model)

    def _module_of(self, name: str) -> str:
        """Return the innermost module with a learning rate of its own that a parameter lies in, or an empty name."""
        around = [module for module in self.module_learning_rates if name.startswith(f"{module}.")]
        return max(around, key=len, default="")


def _is_over_shards(model: Any) -> TypeGuard[SubspaceModel]:
    """Return whether a model is a SubspaceModel whose weights were cut before it was made."""
    return isinstance(model, SubspaceModel) and is_cut(model.model)


def _refuse_wrapping(trainer: Trainer) -> None:
    """Refuse to have a SubspaceModel cut into shards by the Trainer, which would do so after it has been wrapped.

    Raises:
        InputError: says what to do instead.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        name = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise InputError(
            f"{name} would replace the weights that follow z by shards that do not; launch without it (torchrun, or "
            "accelerate with neither), for replicas, or with a model that is cut before SubspaceModel(model, ...): by "
            "from_pretrained(distributed_config=DistributedConfig(fsdp_size=...)), or by fully_shard"
        )


def _require_own_shards(trainer: Trainer) -> None:
    """Refuse what does not work over shards.

    Raises:
        InputError: says what to do instead.
    """
    if not hasattr(trainer, "is_distributed_loading_by_transformers"):
        raise InputError(
            f"the Trainer of transformers {transformers.__version__} would exchange the gradients of shards; use a "
            "newer one, or a loop of your own"
        )
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError("torch.compile does not see where z is written into shards; train without it")
    if trainer.args.fp16 or trainer.args.push_to_hub:
        raise InputError("over shards neither fp16 nor push_to_hub works; use bf16, and upload what was saved yourself")


def _require_no_resuming(arguments: TrainingArguments, resume: str | bool | None) -> None:
    """Refuse what needs the state of an optimizer over shards.

    Raises:
        InputError: says what to do instead.
    """
    to_resume = arguments.save_strategy != "no" and not arguments.save_only_model
    if to_resume or arguments.load_best_model_at_end or resume:
        raise InputError(
            "over shards checkpoints hold adapters, not the optimizer: pass save_only_model=True or save_strategy='no' "
            "and neither load_best_model_at_end nor a checkpoint to resume; SubspaceModel.from_pretrained loads them"
        )


class TrajectoryCallback(TrainerCallback):
    """Record a trajectory inside anyone's Trainer: `Trainer(..., callbacks=[TrajectoryCallback("runs/mrpc")])`.

    Points are written while training goes on, and are on disk before the Trainer saves a checkpoint. How much disk they
    will take is logged (level info) when training starts, which is refused where there is no room.

    Args:
        folder: where to write; as for `TrajectoryRecorder`.
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
        self._place = self.folder  # of this process
        self._recorder: TrajectoryRecorder | None = None  # of a replicated model, in the first process alone
        self._rows = 0  # of a batch
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
            self._recorder.flush()
            self._recorder._forget(0)
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
                self._recorder._end(state.global_step - 1)
            elif args.load_best_model_at_end and state.global_step % self.every:  # who stops early decides after this
                weights = self._recorder._parameters.items()
                copies = {name: local(weight).detach().to("cpu", copy=True) for name, weight in weights}
                self._end = state.global_step - 1, copies
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
            self._recorder._end(state.global_step - 1)
        elif step == state.global_step - 1:
            self._recorder._end(step, copies)
        self._recorder.seal()
        self._end = -1, None

"""Train z inside the Hugging Face Trainer."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, Trainer
from transformers.utils.generic import can_return_loss, find_labels

from tinyspan.errors import InputError, TinyspanError
from tinyspan.interop.trainer_checks import (
    is_over_shards,
    require_no_resuming,
    require_no_wrapping,
    require_own_shards,
    require_steps_after_backward,
    warn_of_unsaved_basis,
)
from tinyspan.io.hub import anonymize, card
from tinyspan.io.manifests import MANIFEST
from tinyspan.model.files import is_public, restore_adapter, save_adapter
from tinyspan.model.forward import named_model
from tinyspan.model.processes import own_shard
from tinyspan.model.subspace import SubspaceModel
from tinyspan.sharding import is_sharded

__all__ = ["SubspaceTrainer"]

Z_RATE = 1e-2  # default learning rate of z
CHECK_INTERVAL = 16  # steps between checks of the losses on an accelerator


class SubspaceTrainer(Trainer):
    """A Trainer that trains the z of a `SubspaceModel` with its own learning rate and without weight decay.

    Any other model is trained as by `Trainer`. Both rates follow the same schedule.

    `save_model` and every `checkpoint-*` write an adapter that `SubspaceModel.from_pretrained` loads, next to the state
    of training. `train(resume_from_checkpoint=...)` refuses a checkpoint of another basis, theta_0 or ensemble. With
    `push_to_hub` the folders contain no local path; the basis must be on the hub, generated from a seed, or sparse, so
    that the adapter contains it.

    Training ends with a `TinyspanError` at the first loss or gradient norm that is NaN or infinite, before the weights
    are updated with it. An accelerator works asynchronously, and the program would have to wait for every number that
    it reads. There, the numbers of 16 steps are checked together, and whenever something is logged or saved. Under fp16
    loss scaling, where infinite gradients are expected, nothing is checked.

    A model that FSDP2 has sharded before it was wrapped (`from_pretrained(distributed_config=)`, or `fully_shard`) is
    trained as it is, and the process of rank i saves its adapter to `shard-i` in the folder of each checkpoint. As for
    any model that was sharded before it reached the Trainer, the optimizer is not saved: training cannot resume, and
    `train` raises an `InputError` if the arguments request that.

    Args:
        *args: as for `Trainer`.
        z_learning_rate: learning rate of z; `TrainingArguments.learning_rate` is that of the directly trained
            parameters. The default is 1e-2, or the `lr` in `optimizer_cls_and_kwargs`, which then applies to all
            parameters.
        module_learning_rates: module name -> learning rate of its directly trained parameters; for nested modules the
            innermost one applies. Models that are not SubspaceModels may have them, too.
        **kwargs: as for `Trainer`.

    Raises:
        InputError: the model cannot be trained as the arguments ask, or a learning rate is given beside `optimizers`.
    """

    def __init__(
        self,
        *args: Any,
        z_learning_rate: float | None = None,
        module_learning_rates: Mapping[str, float] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        self.z_learning_rate, self.module_learning_rates = z_learning_rate, module_learning_rates
        super().__init__(*args, **kwargs)
        if isinstance(getattr(self.model, "_orig_mod", None), SubspaceModel):
            raise InputError(
                "pass the SubspaceModel itself and TrainingArguments(torch_compile=True), not torch.compile(subspace)"
            )
        if isinstance(self.model, SubspaceModel) and self.args.n_gpu > 1:
            raise InputError("one process on several GPUs (DataParallel) would lose z; set CUDA_VISIBLE_DEVICES to one")
        if isinstance(self.model, SubspaceModel):
            require_no_wrapping(self)
            if is_over_shards(self.model):
                require_own_shards(self)
                self.is_distributed_loading_by_transformers = True  # so the Trainer neither shards nor replicates it
            wrapped = type(named_model(self.model.model))
            self.label_names = find_labels(wrapped) if self.args.label_names is None else self.args.label_names
            self.can_return_loss = can_return_loss(wrapped)  # the Trainer has read both from the wrapper's class
        if self.optimizer is not None:
            self._refuse_rates("optimizers=", self.model)
        self._check_every = 1 if self.args.device.type == "cpu" else CHECK_INTERVAL
        self._looked_at_z = False
        self._unchecked: list[tuple[str, int, torch.Tensor]] = []  # description, step, value

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator, also before every trial of a search, and record the norms of what it clips."""
        super().create_accelerator_and_postprocess()
        self._clip, self.accelerator.clip_grad_norm_ = self.accelerator.clip_grad_norm_, self._clip_and_record

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; over shards, first check that the arguments do not need the optimizer's state in checkpoints."""
        if is_over_shards(self.model):
            require_no_resuming(self.args, resume_from_checkpoint)
        if isinstance(self.model, SubspaceModel) and self.args.save_strategy != "no":
            warn_of_unsaved_basis(self.model.basis)
        if isinstance(self.model, SubspaceModel) and self.args.use_liger_kernel:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self.model.model, self.args.liger_kernel_config)  # the Trainer applies it to the wrapper
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the gradients of one batch, and record its loss for the check."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._record_value("loss", loss)
        if self.accelerator.sync_gradients:
            self._require_gradient()
        return loss

    def _require_gradient(self) -> None:
        """Check that the first step has given z a gradient, and warn if a part of it has none.

        Raises:
            TinyspanError: no gradient has reached z.
        """
        subspace = self.accelerator.unwrap_model(self.model)
        if self._looked_at_z or not isinstance(subspace, SubspaceModel):
            return
        self._looked_at_z = True
        trained = [(block, z) for block, z in zip(subspace.blocks, subspace.z, strict=True) if z.requires_grad]
        idle = [block.name for block, z in trained if z.grad is None]
        if 0 < len(idle) < len(trained):
            warnings.warn(
                f"no gradient has reached z of {len(idle)} of {len(trained)} blocks in the first step, "
                f"{idle[0]!r} among them, which do not change: is that part of the model detached or unused?",
                stacklevel=2,
            )
        if idle and len(idle) == len(trained):
            raise TinyspanError(
                "no gradient has reached z in the first step, so z would not change: is part of the model "
                "detached, or checkpointed with use_reentrant=True without enable_input_require_grads()?"
            )

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log, after a check of the recorded values."""
        self._check_finite()
        super().log(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save, after a check of the recorded values, so that no checkpoint contains NaN."""
        self._check_finite()
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a SubspaceModel as an adapter; over shards, one adapter for each process."""
        if not isinstance(self.model, SubspaceModel):
            super()._save(output_dir, state_dict)
            return
        folder, over_shards = Path(output_dir or str(self.args.output_dir)), is_over_shards(self.model)
        if over_shards:
            self.model.save_pretrained(own_shard(folder), overwrite=True)
        elif self.args.should_save:
            self._save_adapter(self.model, folder)
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        if over_shards:
            self.accelerator.wait_for_everyone()  # so that the checkpoint is complete

    def _save_adapter(self, subspace: SubspaceModel, folder: Path) -> None:
        """Write the adapter next to the Trainer's files; if it will be pushed, without local paths."""
        save_adapter(subspace, folder, shared=True)
        if self.hub_model_id is not None:
            anonymize(folder, subspace.basis.is_sparse)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapter of a checkpoint, to resume training.

        Raises:
            MismatchError: it was trained in another basis, with another theta_0 or with other arguments.
        """
        if isinstance(self.model, SubspaceModel) and Path(resume_from_checkpoint, MANIFEST).is_file():
            restore_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the adapter of the best checkpoint."""
        best = Path(self.state.best_model_checkpoint or "")
        if isinstance(self.model, SubspaceModel) and (best / MANIFEST).is_file():
            restore_adapter(self.model, best)
        else:
            super()._load_best_model()

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the hub, unless nobody could use an adapter there.

        Raises:
            InputError: users of the adapter could not get the basis.
        """
        subspace = self.model
        if isinstance(subspace, SubspaceModel) and not (subspace.basis.is_sparse or is_public(subspace.basis)):
            raise InputError(
                "the basis is not on the hub, so nobody could use the adapter that the Trainer would push: "
                "basis.push_to_hub() it first, or push the saved adapter yourself, with self_contained=True"
            )
        super().init_hf_repo(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, which for an adapter describes it and how to load it."""
        super().create_model_card(*args, **kwargs)
        folder = Path(str(self.args.output_dir))
        if isinstance(self.model, SubspaceModel) and self.is_world_process_zero() and (folder / MANIFEST).is_file():
            ours: Any = ModelCard(card(folder, self.hub_model_id))
            theirs: Any = ModelCard.load(folder / "README.md")
            theirs.data.library_name = "tinyspan"
            theirs.data.tags = [*(theirs.data.tags or []), *(ours.data.tags or [])]
            theirs.text = f"{ours.text}\n{theirs.text}"
            theirs.save(folder / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint, after copying its adapter to the folder from which the Trainer uploads."""
        if isinstance(self.model, SubspaceModel) and self.is_world_process_zero():
            idle = self.push_in_progress is None or self.push_in_progress.is_done()
            if idle or self.args.hub_always_push:
                self._save_adapter(self.model, Path(str(self.args.output_dir)))
        super()._push_from_checkpoint(checkpoint_folder)

    def _build_accelerator_args(self, **kwargs: Any) -> Any:
        """Set the options of DDP that the Trainer would set for the wrapped model."""
        subspace, given = self.model, self.args.ddp_find_unused_parameters
        if isinstance(subspace, SubspaceModel) and given is None and isinstance(subspace.model, PreTrainedModel):
            self.model = subspace.model
        try:
            return super()._build_accelerator_args(**kwargs)
        finally:
            self.model = subspace

    def _sync_replicated_trainable_parameters(self, model: torch.nn.Module) -> None:
        """Make parameters that are not sharded equal in all processes; z gets no hook, its gradients are summed."""
        if is_over_shards(model):
            for parameter in model.parameter_groups()[0]["params"]:
                parameter._replicated_grad_hook_registered = True  # by which the Trainer knows where it has hooked
        super()._sync_replicated_trainable_parameters(model)

    def _mixed_mesh_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Clip sharded and other gradients together, as the Trainer does, and record the norm for the check."""
        norm = super()._mixed_mesh_grad_norm(*args, **kwargs)
        self._record_value("norm of the gradients", norm)
        return norm

    def _clip_and_record(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._clip(*args, **kwargs)
        if norm is not None:
            norm = norm.full_tensor() if is_sharded(norm) else torch.as_tensor(norm)
            self._record_value("norm of the gradients", norm)
        return norm

    def _record_value(self, what: str, number: torch.Tensor) -> None:
        if self.accelerator.scaler is None:
            self._unchecked.append((what, self.state.global_step + 1, number.detach()))
            if len({step for _, step, _ in self._unchecked}) >= self._check_every:
                self._check_finite()

    def _check_finite(self) -> None:
        """Check all recorded values.

        Raises:
            TinyspanError: a value is NaN or infinite.
        """
        recorded, self._unchecked = self._unchecked, []
        if not recorded:
            return
        finite = torch.isfinite(torch.stack([number.float() for *_, number in recorded])).tolist()
        for (what, step, _), sound in zip(recorded, finite, strict=True):
            if not sound:
                raise TinyspanError(
                    f"the {what} is NaN or infinite at step {step} of {self.state.max_steps}, so training ends. Points "
                    "and checkpoints written before it are kept, later progress is lost. Lower the learning "
                    "rates, or look for extreme labels"
                )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer over z and the directly trained parameters in separate groups.

        Raises:
            InputError: a module with its own learning rate has no directly trained parameter, or a learning rate is
                given and the optimizer makes its own groups, or it steps inside the backward pass.
        """
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if self.optimizer is not None or not (isinstance(target, SubspaceModel) or self.module_learning_rates):
            return super().create_optimizer(model)
        given = self.optimizer_cls_and_kwargs
        kind, arguments = given or self.get_optimizer_cls_and_kwargs(self.args, target)
        require_steps_after_backward(kind, arguments)
        # A factory, unlike a class, creates its own groups
        is_class = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if is_class and not (given and "params" in arguments):
            rate, z_rate = arguments.get("lr", self.args.learning_rate), self.z_learning_rate
            if z_rate is None:
                z_rate = rate if given and "lr" in arguments else Z_RATE
            options = _options_of(arguments.get("params", ()))
            arguments = {**arguments, "params": self._groups(target, z_rate, rate, options)}
        else:
            self._refuse_rates("a factory or given groups of parameters", target)
        try:
            self.optimizer_cls_and_kwargs = kind, arguments
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    def _refuse_rates(self, source: str, model: Any) -> None:
        """Refuse learning rates that nothing would use.

        Args:
            source: what decides the groups of parameters, for the message.
            model: to be trained; z_learning_rate is of no effect on a plain model in any case.

        Raises:
            InputError: a rate is given.
        """
        given = {"z_learning_rate": isinstance(model, SubspaceModel) and self.z_learning_rate is not None}
        given["module_learning_rates"] = bool(self.module_learning_rates)
        if names := " and ".join(name for name, is_given in given.items() if is_given):
            raise InputError(
                f"{names} cannot be used with {source}: the rates need an optimizer class whose groups of parameters "
                "are not given (optimizer_cls_and_kwargs, or TrainingArguments.optim); or set them in your own groups"
            )

    def _groups(
        self, model: torch.nn.Module, z_rate: float, rate: float, options: Mapping[int, Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return groups of parameters with the same weight decay, mesh, rate and options."""
        decayed = set(self.get_decay_parameter_names(model))
        in_z: dict[str, Any] = {"params": []}
        direct, prefix = [parameter for parameter in model.parameters() if parameter.requires_grad], ""
        if isinstance(model, SubspaceModel):
            in_z, outside = model.parameter_groups(z_rate, rate)
            direct, prefix = outside["params"], "model."  # the name of the wrapped model
        # after `parameter_groups`, which drops the whole copies of shards: the names are those of what remains
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        rates = self._rates({id(one): names[id(one)].removeprefix(prefix) for one in direct}, rate)
        groups: dict[Any, dict[str, Any]] = {}
        for parameter in direct:
            decay = self.args.weight_decay if names[id(parameter)] in decayed else 0.0
            special = {"lr": rates[id(parameter)], **options.get(id(parameter), {}), "weight_decay": decay}
            key = getattr(parameter, "device_mesh", None), tuple(special.items())
            groups.setdefault(key, {**special, "params": []})["params"].append(parameter)
        return [group for group in (in_z, *groups.values()) if group["params"]]

    def _rates(self, names: Mapping[int, str], rate: float) -> dict[int, float]:
        """Return the learning rate of each directly trained parameter: that of the innermost module with a rate.

        Raises:
            InputError: a module with its own learning rate has no such parameter, or inner modules have their own
                rates for all of them.
        """
        own = self.module_learning_rates
        modules = {
            key: max((module for module in own if name.startswith(f"{module}.")), key=len, default="")
            for key, name in names.items()
        }
        if unused := own.keys() - modules.values():
            module = min(unused)
            if inner := {modules[key] for key, name in names.items() if name.startswith(f"{module}.")}:
                raise InputError(
                    f"a learning rate is given for {module!r}, but every directly trained parameter in it has that of "
                    f"an inner module ({', '.join(sorted(inner))}); leave one of them out"
                )
            raise InputError(f"a learning rate is given for {module!r}, of which no parameter is trained directly")
        return {key: own.get(module, rate) for key, module in modules.items()}


def _options_of(groups: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the options of each parameter in the groups of a low-rank optimizer, by its id."""
    return {
        id(parameter): {name: value for name, value in group.items() if name != "params"}
        for group in groups
        for parameter in group["params"]
    }

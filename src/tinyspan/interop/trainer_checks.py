"""Checks that the settings of a Trainer work with a SubspaceModel."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

import transformers
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError
from tinyspan.model.files import is_public
from tinyspan.model.subspace import SubspaceModel
from tinyspan.sharding import is_cut

__all__ = [
    "is_over_shards",
    "require_no_resuming",
    "require_no_wrapping",
    "require_own_shards",
    "require_steps_after_backward",
    "warn_of_unsaved_basis",
]


def require_steps_after_backward(kind: Any, arguments: Mapping[str, Any]) -> None:
    """Check that an optimizer does not step inside the backward pass.

    Raises:
        InputError: the optimizer steps inside the backward pass.
    """
    if {"model", "optimizer_dict"} & arguments.keys():
        name = getattr(kind, "__name__", kind)
        raise InputError(
            f"{name} steps while gradients are computed, in hooks that support neither z nor rates of modules; choose "
            "an optimizer that steps after the backward pass"
        )


def is_over_shards(model: Any) -> TypeGuard[SubspaceModel]:
    """Return whether a model is a SubspaceModel whose weights were sharded before it was wrapped."""
    return isinstance(model, SubspaceModel) and is_cut(model.model)


def require_no_wrapping(trainer: Trainer) -> None:
    """Check that the Trainer will not shard a SubspaceModel, which it would do after it has been wrapped.

    Raises:
        InputError: the Trainer would use FSDP or DeepSpeed.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        name = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise InputError(
            f"{name} would replace the weights that follow z by shards that do not; launch without it (torchrun, or "
            "accelerate with neither), for replicas, or with a model that is sharded before SubspaceModel(model, ...): "
            "by from_pretrained(distributed_config=DistributedConfig(fsdp_size=...)), or by fully_shard"
        )


def warn_of_unsaved_basis(basis: Basis) -> None:
    """Warn of a basis that adapters in checkpoints cannot name: it is in no folder, and neither drawn nor sparse."""
    if basis.location is None and not (basis.is_sparse or is_public(basis)):
        warnings.warn(
            "the basis is saved in no folder, so adapters and checkpoints of this run can only be loaded with basis=; "
            "call basis.save_pretrained() first",
            stacklevel=3,
        )


def require_own_shards(trainer: Trainer) -> None:
    """Check that the Trainer's settings work over shards.

    Raises:
        InputError: the version of transformers, torch.compile, fp16 or push_to_hub does not work over shards.
    """
    if not hasattr(trainer, "is_distributed_loading_by_transformers"):
        raise InputError(
            f"the Trainer of transformers {transformers.__version__} would exchange the gradients of shards; use a "
            "newer one, or a loop of your own"
        )
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError("torch.compile does not support writing z into shards; train without it")
    if trainer.args.fp16 or trainer.args.push_to_hub:
        raise InputError(
            "over shards neither fp16 nor push_to_hub works; use bf16, and upload the saved adapters yourself"
        )


def require_no_resuming(arguments: TrainingArguments, resume: str | bool | None) -> None:
    """Check that the arguments do not need the state of an optimizer over shards.

    Raises:
        InputError: the arguments save or load the state of an optimizer.
    """
    to_resume = arguments.save_strategy != "no" and not arguments.save_only_model
    if to_resume or arguments.load_best_model_at_end or resume:
        raise InputError(
            "over shards checkpoints hold adapters, not the optimizer: pass save_only_model=True or save_strategy='no' "
            "and neither load_best_model_at_end nor a checkpoint to resume; SubspaceModel.from_pretrained loads them"
        )

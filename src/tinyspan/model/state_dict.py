"""Hooks on `state_dict` and `load_state_dict` of a SubspaceModel."""

import warnings
from typing import TYPE_CHECKING, Any

from tinyspan.model.base import require_state
from tinyspan.weights import tied_names

if TYPE_CHECKING:
    from tinyspan.model.wrapper import ModelWrapper

__all__ = ["register_hooks"]


def register_hooks(subspace: "ModelWrapper") -> None:
    """Register hooks that check the identity of a loaded state and keep the weights that follow z out of loading."""
    subspace.register_state_dict_pre_hook(_before_saving)
    subspace.register_state_dict_post_hook(_after_saving)
    subspace.register_load_state_dict_pre_hook(_before_loading)
    subspace.register_load_state_dict_post_hook(_after_loading)


def _before_saving(subspace: "ModelWrapper", prefix: str, keep_vars: bool) -> None:
    subspace.engine.require_enabled()
    subspace.engine.refresh()


def _after_saving(subspace: "ModelWrapper", state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep a tied weight under its first name only, since safetensors, used for checkpoints, refuses duplicates."""
    for name in tied_names(subspace.model):
        state_dict.pop(f"{prefix}model.{name}", None)


def _before_loading(
    subspace: "ModelWrapper", state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    """Leave the blocks' weights unchanged, under any of their names: they are computed from theta_0 and z.

    Tied weights get their other names again.

    Raises:
        MismatchError: z was trained in another basis, or with another theta_0; nothing is loaded.
    """
    engine = subspace.engine
    engine.require_enabled()
    engine.require_following()
    _require_same(subspace, state_dict, prefix)
    if metadata.get("assign_to_params_buffers"):  # of `load_state_dict(assign=True)`: z becomes another parameter
        engine.release_weights()
    for name, weight in subspace.model.named_parameters(remove_duplicate=False):
        if engine.is_following(weight) and f"{prefix}model.{name}" in state_dict:
            state_dict[f"{prefix}model.{name}"] = weight
    for name, first in tied_names(subspace.model).items():
        if f"{prefix}model.{first}" in state_dict:
            state_dict.setdefault(f"{prefix}model.{name}", state_dict[f"{prefix}model.{first}"])


def _require_same(subspace: "ModelWrapper", state_dict: dict[str, Any], prefix: str) -> None:
    identity = subspace.get_extra_state()
    if (given := state_dict.setdefault(f"{prefix}_extra_state", identity)) is not identity:
        require_state(given, identity, subspace.fingerprint)
    elif any(name.startswith(f"{prefix}z.") for name in state_dict):
        warnings.warn(
            "the state does not identify the basis and base model that z was trained in, as states of earlier "
            "versions do not; make sure that they are those of this SubspaceModel",
            stacklevel=3,
        )


def _after_loading(subspace: "ModelWrapper", incompatible: Any) -> None:
    subspace.engine.invalidate()

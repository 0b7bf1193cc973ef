"""The output layer of a head: finding it, and changing the units of its outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tinyspan.errors import InputError
from tinyspan.model.subspace import SubspaceModel

__all__ = ["OutputLayer", "has_bias", "output_layer", "rescale_outputs"]

OutputLayer = tuple[str, nn.Linear]


def output_layer(model: nn.Module) -> OutputLayer | None:
    """Return the name and the linear layer that computes the logits of a classifier or regression; None without one.

    It is the last linear layer outside the encoder with one row per label. A layer in a block of a basis does not
    count, because its weights follow z.
    """
    inner: Any = model.model if isinstance(model, SubspaceModel) else model
    in_blocks = (
        {spec.name for spec in model.basis.partition.parameters()} if isinstance(model, SubspaceModel) else set()
    )
    encoder, size = f"{inner.base_model_prefix}.", inner.config.num_labels
    layers = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == size
        and not name.startswith(encoder)
        and f"{name}.weight" not in in_blocks
    ]
    return layers[-1] if layers else None


def has_bias(config: Any, head: Any) -> bool | None:
    """Return whether the output layer of a model with this config has a bias; no weights are loaded.

    Args:
        config: config of the model.
        head: class with `from_config`, such as `AutoModelForSequenceClassification`.

    Returns:
        None if the model has no output layer.

    Raises:
        InputError: transformers has no such head for models of this type.
    """
    try:
        with torch.device("meta"):
            layer = output_layer(head.from_config(config))
    except ValueError as error:
        raise InputError(f"models of the type {config.model_type} have no head of {head.__name__}") from error
    return None if layer is None else layer[1].bias is not None


def undo_temperature(model: nn.Module, result: Mapping[str, Any] | None) -> None:
    """Change the output layer back to that of training, if the run of a result has put a temperature into it."""
    if temperature := ((result or {}).get("calibration") or {}).get("temperature"):
        rescale_outputs(model, temperature)


@torch.no_grad()
def rescale_outputs(model: nn.Module, factor: float, shift: float = 0.0) -> bool:
    """Change the output layer in place, so that outputs y become factor * y + shift.

    Returns:
        False if nothing was changed, because there is no output layer, or no bias for the shift.
    """
    named = output_layer(model)
    if named is None or (shift and named[1].bias is None):
        return False
    _, layer = named
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor).add_(shift)
    return True

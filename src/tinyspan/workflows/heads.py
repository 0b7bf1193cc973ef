"""The output layer of a head: finding it, and changing the units of its outputs."""

from typing import Any

import torch
from torch import nn

from tinyspan.model.subspace import SubspaceModel

__all__ = ["has_bias", "output_layer", "rescale_outputs"]


def output_layer(model: nn.Module) -> nn.Linear | None:
    """Return the linear layer that computes the logits of a classifier or regression; None if there is none.

    It is the last linear layer outside the encoder with one row per label.
    """
    inner: Any = model.model if isinstance(model, SubspaceModel) else model
    encoder, size = f"{inner.base_model_prefix}.", inner.config.num_labels
    layers = [
        module
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == size and not name.startswith(encoder)
    ]
    return layers[-1] if layers else None


def has_bias(config: Any, head: Any) -> bool:
    """Return whether the output layer of a model with this config has a bias; no weights are loaded."""
    with torch.device("meta"):
        layer = output_layer(head.from_config(config))
    return layer is not None and layer.bias is not None


@torch.no_grad()
def rescale_outputs(model: nn.Module, factor: float, shift: float = 0.0) -> bool:
    """Change the output layer in place, so that outputs y become factor * y + shift.

    Returns:
        False if nothing was changed, because there is no output layer, or no bias for the shift.
    """
    layer = output_layer(model)
    if layer is None or (shift and layer.bias is None):
        return False
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor).add_(shift)
    return True

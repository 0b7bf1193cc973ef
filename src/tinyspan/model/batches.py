"""Batches of inputs and targets, as the functions on derivatives take them."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tinyspan.errors import InputError

__all__ = ["arguments_of", "by_row", "logits_of", "rows_of", "split_batch"]


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of a model for a batch of inputs."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def rows_of(inputs: Any) -> Iterator[Any]:
    """Yield one row after the other, each as a batch of one."""
    for index in range(_count(inputs)):
        if isinstance(inputs, Mapping):
            yield {
                name: value[index : index + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
        else:
            yield inputs[index : index + 1]


def _count(inputs: Any) -> int:
    """Return how many rows there are."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return len(next(value for value in tensors if isinstance(value, Tensor)))


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Return the inputs and the targets of a batch.

    Raises:
        InputError: the batch has no targets, or not one per row.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs, targets = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    else:
        raise InputError(
            "expected batches of inputs and targets: a pair, or arguments by name with `labels` among them"
        )
    if len(targets) != _count(inputs):
        raise InputError(f"expected one target per row, got {len(targets)} targets for {_count(inputs)} rows")
    return inputs, targets


def logits_of(values: Any) -> Tensor:
    """Return the `logits` of what a model returns, or the tensor itself."""
    logits: Tensor = values.logits if hasattr(values, "logits") else values
    return logits


def by_row(values: Tensor) -> Tensor:
    """Return outputs [rows, ...] as a matrix [rows, outputs]; a number per row is one output.

    Raises:
        InputError: there is one number for all rows.
    """
    if not values.dim():
        raise InputError("expected outputs of shape [rows, ...] with one row per example, got one number for all rows")
    return values.flatten(1) if values.dim() > 1 else values.unsqueeze(-1)

"""Properties of weights: finite, exact in a dtype, tied, and valid as theta_0."""

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError
from tinyspan.sharding import is_sharded, local

__all__ = [
    "WRITERS",
    "finite",
    "follows_subspace",
    "is_exact_in",
    "require_apart",
    "require_loaded",
    "require_plain",
    "require_sound",
    "tied_names",
    "wide_dtype",
    "writer_of",
]

WRITERS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # model -> weak reference to what writes its weights


def writer_of(model: nn.Module) -> Any:
    """Return what writes a model's weights at present, the engine of a SubspaceModel, or None."""
    reference = WRITERS.get(model)
    return None if reference is None else reference()


def follows_subspace(model: nn.Module) -> bool:
    """Return whether a SubspaceModel writes the weights of this model at present, so that they are not theta_0."""
    return writer_of(model) is not None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, else the same dtype."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def is_exact_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a dtype represents all values of a tensor exactly."""
    return tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite; one pass for minimum and maximum, which propagate NaN."""
    if tensor.is_complex():
        return finite(torch.view_as_real(tensor.detach()))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())


def require_plain(name: str, parameter: Tensor) -> None:
    """Check that a parameter is an ordinary floating-point tensor, to which an update can be added.

    Raises:
        InputError: the parameter is quantized, in float8, or no floating-point number.
    """
    kind = type(parameter.data)
    is_wide = parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1
    if not is_wide or not (kind is Tensor or is_sharded(parameter)):
        actual = parameter.dtype if kind is Tensor else f"a {kind.__name__}"
        raise InputError(
            f"parameter {name!r} is {actual}: a subspace needs floating-point weights; load the model without "
            "quantization, or train a LoRA on it and take trainable_by_layer"
        )


def require_loaded(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that weights are loaded.

    Raises:
        InputError: a weight is on the meta device.
    """
    for name, value in parameters:
        if value.is_meta:
            raise InputError(
                f"{name!r} is on the meta device and has no values: load all weights first, without offloading"
            )


def require_apart(parameters: Mapping[str, Tensor]) -> None:
    """Check that no two parameters share memory, where an update of one would overwrite that of the other.

    Raises:
        InputError: two do.
    """
    first_name: dict[tuple[torch.device, int], str] = {}
    for name, parameter in parameters.items():
        values = local(parameter).detach()
        if values.is_meta or not values.numel():
            continue
        if (first := first_name.setdefault((values.device, values.data_ptr()), name)) != name:
            raise InputError(
                f"{first!r} and {name!r} are two parameters in the same memory; assign one to both modules, which ties "
                "them, or clone() one"
            )


def require_sound(parameters: Mapping[str, Tensor]) -> None:
    """Check that weights can serve as theta_0.

    Raises:
        InputError: a weight is on the meta device, or is NaN or infinite.
    """
    require_loaded(parameters.items())
    for name, value in parameters.items():
        if not finite(local(value)):
            raise InputError(f"{name!r} is NaN or infinite before any training; load a base model with finite weights")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the additional names of tied parameters, mapped to the first name."""
    first_name: dict[int, str] = {}
    names = {
        name: first_name.setdefault(id(value), name) for name, value in model.named_parameters(remove_duplicate=False)
    }
    return {name: other for name, other in names.items() if name != other}

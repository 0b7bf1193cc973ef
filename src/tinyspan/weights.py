"""What weights hold: whether they are finite, of which dtype, tied, and fit to be theta_0."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError
from tinyspan.sharding import is_sharded, local

__all__ = ["finite", "is_exact_in", "require_loaded", "require_plain", "require_sound", "tied_names", "wide_dtype"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, else the same dtype."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def is_exact_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds all numbers of a tensor without rounding."""
    return tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite: one reading for the least and the greatest, which are NaN if any is."""
    if tensor.is_complex():
        return finite(torch.view_as_real(tensor.detach()))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())


def require_plain(name: str, parameter: Tensor) -> None:
    """Refuse a weight whose numbers are no plain floating-point numbers, so that nothing can be added to them.

    Raises:
        InputError: it is quantized.
    """
    kind = type(parameter.data)
    if not parameter.dtype.is_floating_point or not (kind is Tensor or is_sharded(parameter)):
        found = parameter.dtype if kind is Tensor else f"a {kind.__name__}"
        raise InputError(
            f"parameter {name!r} is {found}: a subspace needs floating-point weights; load the model without "
            "quantization, or train a LoRA on it and take trainable_by_layer"
        )


def require_loaded(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that have no numbers yet.

    Raises:
        InputError: one is on the meta device.
    """
    for name, value in parameters:
        if value.is_meta:
            raise InputError(
                f"{name!r} is on the meta device, where there are no numbers: load the weights first, all of them and "
                "without offloading"
            )


def require_sound(parameters: Mapping[str, Tensor]) -> None:
    """Refuse weights that cannot be theta_0.

    Raises:
        InputError: one is on the meta device, or is NaN or infinite.
    """
    require_loaded(parameters.items())
    for name, value in parameters.items():
        if not finite(local(value)):
            raise InputError(f"{name!r} is NaN or infinite before any training; load a sound base model")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the second and further names of tied parameters, each with the first one."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(value), name) for name, value in model.named_parameters(remove_duplicate=False)}
    return {name: other for name, other in names.items() if name != other}

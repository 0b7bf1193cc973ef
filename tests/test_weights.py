import re

import pytest
import torch
from torch import nn
from towers import Tower

from tinyspan import InputError
from tinyspan.weights import (
    finite,
    is_exact_in,
    require_loaded,
    require_plain,
    require_sound,
    tied_names,
    wide_dtype,
)


class Packed(torch.Tensor):
    """What packages for quantization make of a weight: its dtype is float32, and it holds something else."""


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float8_e5m2, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_widened_to_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert wide_dtype(dtype) == wide


def test_a_value_is_exact_in_a_dtype_that_has_it() -> None:
    exact, rounded = torch.tensor([0.5, 3.0]), torch.tensor([0.5, 0.1])
    assert is_exact_in(exact, torch.bfloat16)
    assert not is_exact_in(rounded, torch.bfloat16)
    assert is_exact_in(rounded, torch.float32)
    assert is_exact_in(rounded, torch.float64)
    assert is_exact_in(torch.tensor([torch.nan]), torch.float32)  # without a conversion, as of any number


@pytest.mark.parametrize(
    ("value", "actual"),
    [
        (torch.zeros(2, dtype=torch.int8), "torch.int8"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.zeros(2).as_subclass(Packed), "a Packed"),
    ],
)
def test_quantized_parameters_are_refused(value: torch.Tensor, actual: str) -> None:
    require_plain("w", nn.Parameter(torch.zeros(2)))
    message = (
        f"parameter 'w' is {actual}: a subspace needs floating-point weights; load the model without "
        "quantization, or train a LoRA on it and take trainable_by_layer"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        require_plain("w", nn.Parameter(value, requires_grad=False))


def test_weights_that_are_not_loaded_or_not_finite_are_refused() -> None:
    a, nan = torch.ones(2), torch.tensor([1, torch.nan])
    require_sound({"a": a})
    message = "^'b' is on the meta device and has no values: load all weights first, without offloading$"
    with pytest.raises(InputError, match=message):
        require_loaded([("a", a), ("b", torch.ones(2, device="meta"))])
    with pytest.raises(InputError, match=message):
        require_sound({"a": nan, "b": torch.ones(2, device="meta")})
    message = "^'b' is NaN or infinite before any training; load a base model with finite weights$"
    with pytest.raises(InputError, match=message):
        require_sound({"a": a, "b": nan})


def test_tied_names_lead_to_the_first(tower: Tower) -> None:
    assert tied_names(tower) == {}
    tower.layers[1].inner = tower.layers[0].inner
    assert tied_names(tower) == {
        "layers.1.inner.weight": "layers.0.inner.weight",
        "layers.1.inner.bias": "layers.0.inner.bias",
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (1000, 300)])
@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf"), float("-inf")])
def test_finite_is_what_looking_at_every_number_says(
    dtype: torch.dtype, shape: tuple[int, ...], wrong: float | None
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for place in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() and wrong is not None else {None}:
        sick = tensor.clone()
        if place is not None:
            sick.view(-1)[place] = wrong
        assert finite(sick.to(dtype)) == (place is None)
    assert finite(torch.arange(5))
    assert finite(torch.ones(2, 3, requires_grad=True).T)
    assert not finite(torch.tensor([[0, float("nan")], [1, 2]]).T)
    assert finite(torch.ones(3, dtype=torch.complex64))
    assert not finite(torch.full((3,), complex(0, float("inf"))))
    assert not finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))

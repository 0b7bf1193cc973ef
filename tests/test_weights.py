import pytest
import torch

from tinyspan.weights import finite


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

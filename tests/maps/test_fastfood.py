"""The map is compared with the product of five full matrices, in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor
from towers import Tower

from tinyspan import FastfoodMap, InputError, by_layer, by_module, fastfood_basis, whole_model
from tinyspan.maps.fastfood import walsh_hadamard


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written_out(v: FastfoodMap, seed: int) -> Tensor:
    """H G Pi H B for the numbers that the seed gives, cut to [D, k]."""
    n = next(2**bits for bits in range(99) if 2**bits >= v.size)
    numbers = generator(seed)
    gauss = torch.randn(n, generator=numbers)
    permutation = torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=numbers)]
    torch.testing.assert_close(v.gauss, gauss / (v.size**0.5 * gauss.norm()))
    h = torch.from_numpy(hadamard(n)).double()
    return (h @ v.gauss.double().diag() @ permutation @ h)[: v.size, : v.rank] * v.signs.double()


@given(size=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 10**6))
@example(size=1, share=0.0, seed=0)
@example(size=257, share=0.0, seed=0)
@example(size=257, share=1.0, seed=0)
@example(size=256, share=1.0, seed=0)
@settings(max_examples=60, deadline=None)
def test_the_map_is_the_product_of_the_matrices(size: int, share: float, seed: int) -> None:
    rank = 1 + int(share * (size - 1))
    v = FastfoodMap.draw(rank, size, generator(seed))
    dense = written_out(v, seed)
    z, g = (torch.randn(length, generator=generator(1), dtype=torch.float64) for length in (rank, size))
    torch.testing.assert_close(v.matvec(z), dense @ z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(v.rmatvec(g), g @ dense, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(v.matvec(z) @ g, z @ v.rmatvec(g), rtol=1e-11, atol=1e-11)
    expected = g + dense @ z
    v.displace(g, z, g)
    torch.testing.assert_close(g, expected, rtol=1e-11, atol=1e-11)


def test_float32_loses_no_more_than_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyspan.maps.fastfood.PIECE", 1000)
    v = FastfoodMap.draw(1, 50_000, generator(0))  # one coordinate: sums of 65,536 numbers
    g = torch.randn(v.size, generator=generator(1))
    torch.testing.assert_close(v.rmatvec(g).double(), v.rmatvec(g.double()), rtol=1e-5, atol=0)
    z = torch.randn(1, generator=generator(2))
    torch.testing.assert_close(v.matvec(z).double(), v.matvec(z.double()), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("rank", "size"), [(1, 20), (8, 100), (30, 33), (64, 64)])
def test_columns_have_unit_norm_and_are_orthogonal_in_expectation(rank: int, size: int) -> None:
    draws = 400
    gram = torch.zeros(rank, rank, dtype=torch.float64)
    for seed in range(draws):
        columns = written_out(FastfoodMap.draw(rank, size, generator(seed)), seed)
        if size == 64:  # a power of two: exact, since no row is cut off
            torch.testing.assert_close(columns.square().sum(0), torch.ones(rank).double(), rtol=0, atol=1e-6)
        gram += columns.T @ columns / draws
    torch.testing.assert_close(gram.diag().mean(), torch.ones(()).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(gram, torch.eye(rank).double(), rtol=0, atol=0.3)


@pytest.mark.parametrize("bits", range(13))
def test_walsh_hadamard_of_every_length(bits: int) -> None:
    x = torch.randn(2**bits, generator=generator(bits), dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), torch.from_numpy(hadamard(2**bits)).double() @ x)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), 2**bits * x)


def test_the_basis_is_seeded_per_block_and_touches_no_global_generator() -> None:
    partition, state = by_layer(Tower()), torch.random.get_rng_state()
    first, again, other = (fastfood_basis(partition, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.content_hash() == again.content_hash() != other.content_hash()
    assert first.content_hash() != fastfood_basis(partition, 6, seed=1).content_hash()
    torch.set_default_dtype(torch.float64)
    try:
        assert fastfood_basis(partition, 5, seed=1).content_hash() == first.content_hash()
    finally:
        torch.set_default_dtype(torch.float32)
    one, two = (first.maps[name].tensors() for name in ("layers.0", "layers.1"))
    assert not torch.equal(one["gauss"], two["gauss"])
    assert {name: tensor.nbytes for name, tensor in one.items()} == {"signs": 20, "slots": 512, "gauss": 512}
    for rank in (0, 9):
        with pytest.raises(InputError, match="between 1 and 8"):
            fastfood_basis(by_module(Tower()), rank)
    assert fastfood_basis(whole_model(Tower()), 9).ranks == {"model": 9}

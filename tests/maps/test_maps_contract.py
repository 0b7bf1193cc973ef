"""What holds for every kind of map, by its being registered; in float64 against the dense matrix."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyspan import Basis, DenseMap, InputError, LinearMap, SubspaceModel, by_pattern, register_map
from tinyspan.maps.base import MAPS, kind_of, metadata_of
from tinyspan.maps.kronecker import KroneckerMap


def cases() -> Iterator[object]:
    for kind, cls in MAPS.items():
        for index, v in enumerate(cls.examples(torch.Generator().manual_seed(0))):
            yield pytest.param(v, id=f"{kind}-{index}-{v.size}x{v.rank}")


every_map = pytest.mark.parametrize("v", list(cases()))


def close(one: Tensor, other: Tensor) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def numbers(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


@every_map
def test_products_are_those_of_the_matrix(v: LinearMap) -> None:
    matrix, (z, g, start) = v.dense(torch.float64), numbers(v.rank, v.size, v.size)
    assert v.shape == (v.size, v.rank) == tuple(matrix.T.shape)
    close(v.matvec(z), z @ matrix)
    close(v.rmatvec(g), matrix @ g)
    close(v.matvec(z) @ g, z @ v.rmatvec(g))
    close(torch.stack([v.matvec(unit) for unit in torch.eye(v.rank).double()] or [matrix]).view_as(matrix), matrix)
    out = torch.full_like(start, torch.nan)
    v.displace(start, z, out)
    close(out, start + z @ matrix)
    v.displace(out, z, out)
    close(out, start + 2 * (z @ matrix))
    if v.is_orthonormal:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(v.rank).double(), rtol=0, atol=0.05)


@every_map
@pytest.mark.parametrize("rank", [1, 3])
def test_a_product_of_two_factors_is_fitted_as_the_whole_update(v: LinearMap, rank: int) -> None:
    """z = V^T vec(L R), and what V z misses of vec(L R)."""
    rows = len(v.left) if isinstance(v, KroneckerMap) else 1
    of_left, of_right = numbers(rows * rank, rank * v.size // rows)
    left, right = of_left.view(rows, rank), of_right.view(rank, -1)
    update, matrix = (left @ right).reshape(-1), v.dense(torch.float64)
    z, missed = v.fit_product(left, right)
    close(z, matrix @ update)
    if not isinstance(v, KroneckerMap):  # whose residual needs orthonormal factors; see test_maps.py
        assert missed == pytest.approx(float((update - z @ matrix).square().sum()), rel=1e-11)


@every_map
def test_results_have_the_dtype_of_what_is_multiplied(v: LinearMap) -> None:
    z, g = numbers(v.rank, v.size)
    for dtype, error in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        products = v.matvec(z.to(dtype)), v.rmatvec(g.to(dtype))
        assert [product.dtype for product in products] == [v.dense(dtype).dtype] * 2 == [dtype] * 2
        for product, expected in zip(products, (v.matvec(z), v.rmatvec(g)), strict=True):
            torch.testing.assert_close(product.double(), expected, rtol=error, atol=error)


@every_map
def test_rows_are_the_rows_of_the_matrix(v: LinearMap) -> None:
    matrix, (z, g) = v.dense(torch.float64), numbers(v.rank, v.size)
    for a, b in ((0, v.size), (v.size // 3, v.size // 2), (v.size - 1, v.size), (0, 0)):
        rows = v.rows(a, b)
        if rows is None:
            continue
        assert rows.shape == (b - a, v.rank)
        close(rows.matvec(z), z @ matrix[:, a:b])
        close(rows.rmatvec(g[a:b]), matrix[:, a:b] @ g[a:b])
        if v.support is None:
            assert rows.support is None
        else:
            assert rows.support is not None
            assert torch.equal(rows.support, v.support[(v.support >= a) & (v.support < b)] - a)


@every_map
def test_the_matrix_is_zero_outside_of_the_support(v: LinearMap) -> None:
    if v.support is None:
        assert v.on_support is v
        return
    assert v.rows(0, v.size) is not None, "a map with a support has rows"
    matrix, outside = v.dense(torch.float64), torch.ones(v.size, dtype=torch.bool)
    assert (v.support[1:] > v.support[:-1]).all()
    outside[v.support] = False
    assert not matrix[:, outside].any()
    assert torch.equal(v.on_support.dense(torch.float64), matrix[:, v.support])


@every_map
def test_tensors_make_the_same_map_again(v: LinearMap, tmp_path: Path) -> None:
    tensors, (z, g) = v.tensors(), numbers(v.rank, v.size)
    assert tensors, "the first tensor tells the device"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "v", metadata_of(v.kind))
    with safe_open(tmp_path / "v", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        reads = kind_of(stored, file.metadata())
    assert reads is type(v) is MAPS[v.kind]
    assert reads.stored_rank(v.size, shapes_of(stored)) == v.rank
    reads.check_numbers(v.size, stored)
    for again in (reads.from_tensors(v.size, stored), v.converted(torch.clone)):
        assert type(again) is type(v)
        assert torch.equal(again.matvec(z), v.matvec(z))
        assert torch.equal(again.rmatvec(g), v.rmatvec(g))


@every_map
def test_tensors_of_no_map_are_refused(v: LinearMap) -> None:
    tensors = v.tensors()
    with pytest.raises(ValueError, match="do not belong to a linear map"):
        v.stored_rank(v.size, {**shapes_of(tensors), "more": [1]})
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=r"do not belong to a linear map|unpack"):
            v.stored_rank(v.size, {**shapes_of(tensors), name: [*tensor.shape, 1]})
        if tensor.dtype.is_floating_point and tensor.numel():
            with pytest.raises(ValueError, match=f"{name} holds NaN"):
                v.check_numbers(v.size, {**tensors, name: torch.full_like(tensor, torch.nan)})


class Pair(nn.Module):
    """Two weights, in one block."""

    def __init__(self, size: int) -> None:
        super().__init__()
        first, second = numbers(size // 3, size - size // 3)
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.cat([self.first, self.second]) * x).sin().sum()


@every_map
def test_a_model_trains_in_it_as_in_the_dense_matrix(v: LinearMap, tmp_path: Path) -> None:
    if not v.rank:
        return
    (x,), results = numbers(v.size), []
    partition = by_pattern(Pair(v.size), {"all": ".*"})
    Basis(partition, {"all": v}).save_pretrained(tmp_path / "basis")
    for own in (Basis.from_pretrained(tmp_path / "basis"), Basis(partition, {"all": DenseMap(v.dense(torch.float64))})):
        subspace = SubspaceModel(Pair(v.size), own, init_std=0.5)
        loss = subspace(x)
        loss.backward()
        (z,) = subspace.z
        assert z.grad is not None
        weights = torch.cat([subspace.merge().first, subspace.model.second]).detach().clone()
        subspace.unmerge()
        start = torch.cat([subspace.model.first, subspace.model.second]).detach().clone()
        results.append((loss.detach(), z.grad, weights, start))
        assert torch.equal(start, torch.cat(list(Pair(v.size).parameters())))
    for one, other in zip(*results, strict=True):
        close(one, other)


def test_a_kind_that_is_not_registered_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file of a map of one's own names its kind; ours are told by their tensors, as in the first format."""
    monkeypatch.setattr(MAPS, "_entries", dict(MAPS._entries))
    register: Callable[[type[DenseMap]], type[DenseMap]] = register_map("own")
    own = register(type("Own", (DenseMap,), {}))
    partition = by_pattern(Pair(5), {"all": ".*"})
    basis = Basis(partition, {"all": own(torch.eye(2, 5))})
    basis.save_pretrained(tmp_path / "basis")
    loaded = Basis.from_pretrained(tmp_path / "basis")
    assert loaded.kinds == basis.kinds == {"all": "own"}
    assert type(loaded.maps["all"]) is own
    dense = Basis(partition, {"all": DenseMap(torch.eye(2, 5))})
    assert loaded.content_hash() == Basis(partition, dict(basis.maps)).content_hash() != dense.content_hash()
    with pytest.raises(InputError, match="already"):
        register_map("own")(DenseMap)
    del MAPS._entries["own"]
    with pytest.raises(InputError, match=r"unknown kind of map 'own'; expected one of .* or import the module"):
        Basis.from_pretrained(tmp_path / "basis")

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from math import gcd

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config as inductor

from tinyspan import DenseMap, FastfoodMap, KroneckerMap, LinearMap, SparseMap
from tinyspan.maps.base import kind_of
from tinyspan.maps.dense import dense_map
from tinyspan.maps.kernels import _compiled

FORMATS = [torch.float64, torch.float32, torch.bfloat16, torch.int8]


def orthonormal(rank: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q.T.contiguous()


def made(rank: int, size: int, support: int | None, dtype: torch.dtype, seed: int = 0) -> LinearMap:
    """A map of orthonormal directions, on so many coordinates chosen at random."""
    dense = dense_map(orthonormal(rank, support or size, seed), dtype)
    if support is None:
        return dense
    indices = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:support].sort().values
    return SparseMap(size, indices, dense)


def matrix(v: LinearMap) -> Tensor:
    """V^T written out, [k, D] in float64: slow and obviously right."""
    if isinstance(v, SparseMap):
        whole = torch.zeros(v.rank, v.size, dtype=torch.float64)
        for column, index in enumerate(v.indices.tolist()):
            whole[:, index] = matrix(v.on_support)[:, column]
        return whole
    assert isinstance(v, DenseMap)
    scales = torch.ones(v.size) if v.scales is None else v.scales
    return v.directions.double() * scales.double()


@given(
    rank=st.integers(1, 6),
    size=st.integers(6, 90),
    share=st.sampled_from([None, 0.2, 1.0]),
    dtype=st.sampled_from(FORMATS),
    piece=st.sampled_from([1, 40, 1 << 21]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_every_map_is_its_matrix_and_the_adjoint_of_it(
    rank: int, size: int, share: float | None, dtype: torch.dtype, piece: int, seed: int
) -> None:
    """In float64, whatever the format of V: widening is exact, so 1e-12 is left for sums in another order."""
    support = None if share is None else max(rank, round(share * size))
    v = made(rank, size, support, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    z, g, start = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (rank, size, size))
    whole, out = matrix(v), torch.full((size,), 7.0, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyspan.maps.dense.PIECE", piece)
        v.displace(start, z, out)
        found = (v.matvec(z), v.rmatvec(g), out, v.matvec(z) @ g)
    for one, other in zip(found, (z @ whole, whole @ g, start + z @ whole, z @ v.rmatvec(g)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for a, b in ((0, size), (size // 3, size // 2), (size - 1, size), (2, 2)):
        narrowed = v.rows(a, b)  # type: ignore[attr-defined]
        assert narrowed.size == b - a
        torch.testing.assert_close(narrowed.matvec(z), found[0][a:b], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(narrowed.rmatvec(g[a:b]), whole[:, a:b] @ g[a:b], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v.dense(torch.float64), whole, rtol=0, atol=0)  # type: ignore[attr-defined]
    again = kind_of(v.tensors(), None).from_tensors(size, v.tensors())
    assert type(again) is type(v)
    assert torch.equal(again.matvec(z), v.matvec(z))
    assert type(v).stored_rank(size, {name: list(tensor.shape) for name, tensor in v.tensors().items()}) == rank
    type(v).check_numbers(size, v.tensors())


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_a_kronecker_map_is_its_matrix_and_the_adjoint_of_it(
    shape: tuple[int, int], ranks: tuple[int, int], seed: int
) -> None:
    """Against V written out, entry by entry, in float64."""
    (m, n), (p, q) = shape, (min(ranks[0], shape[0]), min(ranks[1], shape[1]))
    left, right = orthonormal(p, m, seed).T, orthonormal(q, n, seed + 1)
    v = KroneckerMap(left, right)
    whole = torch.stack([torch.outer(left[:, a], right[b]).reshape(-1) for a in range(p) for b in range(q)])
    generator = torch.Generator().manual_seed(seed + 2)
    z, g, start = (torch.randn(k, generator=generator, dtype=torch.float64) for k in (p * q, m * n, m * n))
    out = start.clone()
    v.displace(out, z, out)  # in place, as a model is moved
    expected = (z @ whole, whole @ g, start + z @ whole, z @ v.rmatvec(g))
    for one, other in zip((v.matvec(z), v.rmatvec(g), out, v.matvec(z) @ g), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v.dense(torch.float64), whole, rtol=0, atol=0)
    torch.testing.assert_close(whole @ whole.T, torch.eye(p * q, dtype=torch.float64), rtol=0, atol=1e-12)
    again = kind_of(v.tensors(), None).from_tensors(m * n, v.tensors())
    assert isinstance(again, KroneckerMap)
    assert torch.equal(again.matvec(z), v.matvec(z))
    assert (
        type(v).stored_rank(m * n, {name: list(tensor.shape) for name, tensor in v.tensors().items()})
        == v.rank
        == p * q
    )
    type(v).check_numbers(m * n, v.tensors())
    assert v.matvec(z.float()).dtype == v.rmatvec(g.float()).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "error", "bytes_each"), [(torch.bfloat16, 2**-8, 2.0), (torch.int8, 0.02, 1.0625)])
def test_reduced_formats_cost_what_they_say(dtype: torch.dtype, error: float, bytes_each: float) -> None:
    """Heavy tails over four orders of magnitude, as real directions have: the error of each direction stays small."""
    directions = orthonormal(32, 5000, 0) * torch.logspace(0, -4, 5000, dtype=torch.float64)
    directions = torch.linalg.qr(directions.T).Q.T
    stored = dense_map(directions.float(), dtype)
    assert sum(tensor.nbytes for tensor in stored.tensors().values()) == bytes_each * directions.numel()
    off = (stored.dense(torch.float64) - directions).norm(dim=1)
    assert off.max() < error
    assert dense_map(directions, torch.float64).dense(torch.float64) is not None
    largest = directions.abs().amax(0)
    if dtype == torch.int8:  # within half a step of each coordinate's own scale, and what cutting at 127 costs
        assert ((stored.dense(torch.float64) - directions).abs() <= (0.5 / 127 + 0.005) * largest).all()


def test_int8_of_coordinates_that_do_not_move() -> None:
    directions = torch.zeros(2, 3)
    directions[0, 1] = 1.0
    torch.testing.assert_close(dense_map(directions, torch.int8).dense(), directions, rtol=4e-3, atol=0)
    assert dense_map(torch.zeros(0, 3), torch.int8).rmatvec(torch.ones(3)).shape == (0,)


def test_indices_are_stored_in_four_bytes() -> None:
    v = SparseMap(9, torch.tensor([2, 5]), DenseMap(torch.eye(2)))
    assert v.indices.dtype == torch.int64
    assert v.tensors()["indices"].dtype == torch.int32
    assert v.converted(torch.Tensor.double).on_support.directions.dtype == torch.float64


@pytest.fixture
def small_maps_fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for small maps, which must not stay in torch's cache: large ones would get them, and one thread each."""
    monkeypatch.setattr("tinyspan.maps.dense.COMPILED", 1)
    monkeypatch.setattr("tinyspan.maps.dense.ENTERED", 1)
    monkeypatch.setattr("tinyspan.maps.kernels._failures", {})
    _compiled.cache_clear()
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
    _compiled.cache_clear()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 4, 6, 7, 12])
def test_products_in_threads_are_the_matrix_too(threads: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a map, of some of its rows, whose directions lie apart in memory, and in place."""
    monkeypatch.setattr("tinyspan.maps.dense.FUSED", 1)
    monkeypatch.setattr("tinyspan.maps.dense.ENTERED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(size)
    whole = DenseMap(torch.randn(3, size + 2, generator=generator, dtype=torch.float64))
    for v in (whole, whole.rows(1, size + 1)):
        assert (v._in_threads() is None) == (gcd(threads, v.size) == 1)
        z, g, start = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, v.size, v.size))
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        close(v.rmatvec(g), v.directions @ g)
        close(v.matvec(z), z @ v.directions)
        out = torch.empty(v.size, dtype=torch.float64)
        v.displace(start, z, out)
        close(out, start + z @ v.directions)
        v.displace(out, z, out)
        close(out, start + 2 * (z @ v.directions))


@pytest.mark.processes
@pytest.mark.usefixtures("small_maps_fused")
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.int8])
def test_compiled_kernels_are_the_matrix_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 1e-5 of the largest: the sums are 3,000 numbers long, of size 1, and only their order differs.

    Of the formats, int8 has scales as well; each kernel is compiled for each, 20 s of processor time.
    """
    monkeypatch.setattr(DenseMap, "_pieces", lambda self: pytest.fail("widened piece by piece"))
    kernels = set()

    def compiled(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kernels.add(kernel.__name__)
        return _compiled(kernel)

    monkeypatch.setattr("tinyspan.maps.kernels._compiled", compiled)
    directions = torch.randn(19, 3000, generator=torch.Generator().manual_seed(0))  # twice `ROWS`, and three more
    scales = torch.rand(3000).bfloat16() if dtype == torch.int8 else None
    v = DenseMap((directions * 30).to(dtype), scales)
    generator = torch.Generator().manual_seed(1)
    z, g, start = (torch.randn(n, generator=generator) for n in (19, 3000, 3000))
    whole, out = matrix(v), torch.empty(3000)
    v.displace(start, z, out)
    for found, expected in (
        (out, start.double() + z.double() @ whole),
        (v.rmatvec(g), whole @ g.double()),
        (v.rows(7, 2901).rmatvec(g[7:2901]), whole[:, 7:2901] @ g[7:2901].double()),
        (v.rows(1, 3).matvec(z), (z.double() @ whole)[1:3]),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    v.displace(out, z, out)  # in place, as `matvec` does
    torch.testing.assert_close(out.double(), start + 2 * (z.double() @ whole), rtol=1e-4, atol=1e-3)
    few = DenseMap(v.directions[:3], scales)
    torch.testing.assert_close(few.matvec(z[:3]).double(), z[:3].double() @ whole[:3], rtol=1e-4, atol=1e-3)
    assert kernels == {"_add_directions", "_sum_columns", "_sum_rows"}


@pytest.mark.parametrize("piece", [1, 19, 100, 10_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_products_piece_by_piece_are_the_matrix_too(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact to float64, in which the stored values are multiplied: no piece is left over from the one before."""
    monkeypatch.setattr("tinyspan.maps.dense.PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(19, 300, generator=generator, dtype=torch.float64)
    whole = dense_map(directions, dtype)
    for v, expected in ((whole, matrix(whole)), (whole.rows(7, 191), matrix(whole)[:, 7:191])):
        z, g, start = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (19, v.size, v.size))
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        close(v.matvec(z), z @ expected)
        close(v.rmatvec(g), expected @ g)
        out = torch.empty(v.size, dtype=torch.float64)
        v.displace(start, z, out)
        close(out, start + z @ expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_kernels_are_compiled_only_for_large_maps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyspan.maps.dense.COMPILED", 60)
    monkeypatch.setattr("tinyspan.maps.dense.ENTERED", 9)
    asked = []
    for name in ("fused_matvec", "fused_rmatvec"):
        monkeypatch.setattr(f"tinyspan.maps.dense.{name}", lambda v, *rest: asked.append(v.shape[1]))
    for size in (19, 20):
        v = dense_map(torch.ones(3, size), dtype)
        for part in (v, v.rows(2, 4), v.rows(2, 5)):
            torch.testing.assert_close(part.matvec(torch.ones(3)), torch.full((part.size,), 3.0), rtol=1e-2, atol=0)
            torch.testing.assert_close(
                part.rmatvec(torch.ones(part.size)).sum(), torch.tensor(3.0 * part.size), rtol=1e-2, atol=0
            )
    assert asked == [20, 20, 3, 3]


@pytest.mark.usefixtures("small_maps_fused")
def test_without_a_compiler_maps_are_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler found\nand much more")

    v = DenseMap(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16())
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match=r"does not work here \(no C\+\+ compiler found\)"):
        found = v.rmatvec(torch.ones(50))
    torch.testing.assert_close(found.double(), matrix(v).sum(1), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v.matvec(torch.ones(3))  # told once


SPARSE = {"indices": torch.tensor([1, 4], dtype=torch.int32), "directions": torch.eye(2)}
INT8 = {"directions": torch.ones(2, 5, dtype=torch.int8), "scales": torch.ones(5)}
FASTFOOD = FastfoodMap.draw(2, 5, torch.Generator().manual_seed(0)).tensors()


@pytest.mark.parametrize(
    "tensors",
    [
        SPARSE | {"indices": torch.tensor([4, 1], dtype=torch.int32)},
        SPARSE | {"indices": torch.tensor([1, 1], dtype=torch.int32)},
        SPARSE | {"indices": torch.tensor([1, 5], dtype=torch.int32)},
        SPARSE | {"indices": torch.tensor([-1, 4], dtype=torch.int32)},
        SPARSE | {"indices": torch.tensor([1.0, 4.0])},
        SPARSE | {"directions": torch.full((2, 2), torch.nan)},
        SPARSE | {"directions": torch.ones(2, 2, dtype=torch.int8)},
        INT8 | {"scales": torch.full((5,), torch.inf)},
        INT8 | {"directions": torch.ones(2, 5)},
        FASTFOOD | {"slots": torch.full((8,), 2, dtype=torch.int32)},
    ],
)
def test_numbers_of_no_map_are_refused(tensors: dict[str, Tensor]) -> None:
    for sound in (SPARSE, INT8, FASTFOOD):
        kind_of(sound, None).check_numbers(5, sound)
    with pytest.raises(ValueError, match="impossible"):
        kind_of(tensors, None).check_numbers(5, tensors)


@pytest.mark.parametrize(
    "shapes",
    [
        {"directions": [2, 4]},
        {"directions": [6, 5]},
        {"directions": [2, 5], "scales": [4]},
        {"directions": [2, 3], "indices": [2]},
        {"directions": [3, 2], "indices": [2]},  # more directions than coordinates
        {"directions": [2, 5, 1]},
        {"directions": [2, 5], "more": [1]},
        {"signs": [2], "slots": [8], "gauss": [4]},
        {"signs": [0], "slots": [8], "gauss": [8]},
        {"left": [2, 1], "right": [1, 3]},
        {"left": [1, 2], "right": [1, 5]},  # more directions than rows
        {"left": [5, 1], "right": [1, 1], "directions": [1, 5]},
    ],
)
def test_shapes_of_no_map_are_refused(shapes: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="do not belong to a linear map"):
        kind_of(shapes, None).stored_rank(5, shapes)


def test_the_repr_of_a_map_says_what_it_maps() -> None:
    assert repr(DenseMap(torch.eye(2, 1000))) == "DenseMap(2 directions of 1,000 numbers)"


@pytest.mark.parametrize("shape", [(5, 2, 3, 7), (4, 4, 1, 3), (2, 1, 6, 6)])
def test_what_a_kronecker_map_misses_of_a_product_is_computed_without_the_product(
    shape: tuple[int, int, int, int],
) -> None:
    m, p, q, n = shape
    generator = torch.Generator().manual_seed(0)
    own_left, own_right, left, right = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((m, p), (n, q), (m, 2), (2, n))
    )
    v = KroneckerMap(torch.linalg.qr(own_left).Q, torch.linalg.qr(own_right).Q.T)
    z, missed = v.fit_product(left, right)
    rest = (left @ right).reshape(-1) - z @ v.dense(torch.float64)
    assert missed == pytest.approx(float(rest.square().sum()), rel=1e-11, abs=1e-20)
    torch.testing.assert_close(v.dense(torch.float64) @ rest, torch.zeros(v.rank).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_number_of_a_column_does_not_overflow_in_int8(sign: float) -> None:
    """It becomes up to 127 (1 + 2^-8), since scales are rounded to bfloat16; of a subnormal scale it becomes more."""
    columns = sign * torch.linspace(0.5, 2.0, 4001, dtype=torch.float64)[None]
    v = dense_map(columns, torch.int8)
    assert (v.directions == sign * 127).all()
    torch.testing.assert_close(v.dense(torch.float64), columns, rtol=2**-8, atol=0)
    smallest = 2.0**-133  # the smallest subnormal number in bfloat16
    tiny = dense_map(sign * torch.tensor([[1.4, 2.4]], dtype=torch.float64) * 127 * smallest, torch.int8)
    assert (tiny.directions == sign * 127).all()

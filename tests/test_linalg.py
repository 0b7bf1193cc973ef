"""Tolerances: a Gram matrix in float64 leaves sigma_i / sigma_1 an error of about 1e-16 (sigma_1 / sigma_i)^2;
directions stored in float32 add 1e-7."""

import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyspan import InputError, linalg
from tinyspan.linalg import (
    CACHED,
    FEW,
    NARROW,
    TensorColumns,
    _fill,
    _gram,
    _parts,
    _square,
    as_array,
    everywhere,
    in_threads,
    orthonormalize,
    piecewise,
    right_singular_vectors,
    squared_norm,
)


class Threads:
    """A process group whose processes are threads, in place of `torch.distributed`; the first has global rank 7."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.barrier, self.local = threading.Barrier(size, timeout=10), threading.local()
        self.sent = [torch.empty(0)] * size
        for name in ("all_reduce", "broadcast", "get_global_rank"):
            monkeypatch.setattr(torch.distributed, name, getattr(self, name))

    def exchange(self, tensor: Tensor) -> Tensor:
        self.sent[self.local.rank] = tensor.clone()
        self.barrier.wait()
        every = torch.stack(self.sent)
        self.barrier.wait()
        return every

    def all_reduce(self, tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: object = None) -> None:
        assert group is self
        every = self.exchange(tensor)
        tensor.copy_(every.amin(0) if op == torch.distributed.ReduceOp.MIN else every.sum(0))

    def broadcast(self, tensor: Tensor, source: int, group: object) -> None:
        assert (source, group) == (7, self)
        assert tensor.is_contiguous()
        tensor.copy_(self.exchange(tensor)[0])

    def get_global_rank(self, group: object, rank: int) -> int:
        assert group is self
        return 7 + rank

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Call a function in every process, with its rank."""

        def call(rank: int) -> Any:
            self.local.rank = rank
            return function(rank)

        with ThreadPoolExecutor(len(self.sent)) as pool:
            return list(pool.map(call, range(len(self.sent))))


@given(exponent=st.floats(0, 5), t=st.integers(2, 12), extra=st.integers(0, 300), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_wide_spectra_stay_orthonormal_and_right(exponent: float, t: int, extra: int, seed: int) -> None:
    """Singular values over up to five orders of magnitude: angles to the dense SVD below 1e-5, orthonormal to 1e-12.

    Stored in float32, whose rounding is 6e-8 a number, to 1e-6: the Gram matrix is trusted down to 1e-4 of the largest.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(t, t, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(t + extra, t, generator=generator, dtype=torch.float64)).Q.T
    values = torch.logspace(0, -exponent, t, dtype=torch.float64)
    rows = left * values @ right
    found, directions = right_singular_vectors(TensorColumns(rows), lambda values: t, torch.float64, "block")
    torch.testing.assert_close(directions @ directions.T, torch.eye(t, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, values, rtol=1e-5, atol=0)
    narrow = right_singular_vectors(TensorColumns(rows), lambda values: t, torch.float32, "block")[1].double()
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(t, dtype=torch.float64), rtol=0, atol=1e-6)
    for k in range(1, t):  # the leading spans, since single vectors of near-equal values may mix
        if values[k] < 0.9 * values[k - 1]:
            outside = right[:k] - right[:k] @ directions[:k].T @ directions[:k]
            assert outside.norm(dim=1).max() < 1e-5


def test_orthonormalize_survives_near_dependence() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    rows[3] = rows[2] + 1e-6 * rows[3]
    found = orthonormalize(rows)
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(20))
def test_dependent_directions_are_refused_whatever_rounding_leaves(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 1020, generator=generator, dtype=dtype)
    rows[2] = 0.3 * rows[0] + 0.7 * rows[1]
    for dependent in (rows, torch.randn(3, 2, generator=generator, dtype=dtype)):
        with pytest.raises(RuntimeError, match=r"linearly dependent|not positive-definite"):
            orthonormalize(dependent)


@pytest.fixture
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("t", [1, 2, 3, 8, 9, 16, 33, FEW, FEW + 1])
@pytest.mark.parametrize("width", [1, 3, 10, 3000])
def test_a_square_of_strips_is_the_plain_product(t: int, width: int) -> None:
    """Where the small products have 1 to 2^18 / t columns, with a rest and without."""
    rows = torch.randn(t, 4000, generator=torch.Generator().manual_seed(t), dtype=torch.float64)[:, :width]
    expected = (rows @ rows.T).numpy()
    np.testing.assert_allclose(_square(rows.numpy()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [1, 2, 8, 33, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_product_by_pieces_is_the_plain_product(t: int, dtype: torch.dtype, three_threads: None) -> None:
    """Also in place, and in pieces that the three threads share unevenly; exact but for the rounding of the result."""
    generator = torch.Generator().manual_seed(t)
    factor = torch.randn(t, t, generator=generator, dtype=torch.float64).T
    rows = torch.randn(t, 3 * max(NARROW, CACHED // t) + 5, generator=generator, dtype=torch.float64).to(dtype)
    expected = (factor @ rows.double()).to(dtype)
    _fill(rows, factor, TensorColumns(rows))
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(rows, expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("size", [0, 1, NARROW, 5 * NARROW + 1])
def test_every_column_is_read_once_by_one_of_the_threads(
    size: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "CACHED", 1)
    rows = torch.arange(2.0 * size).view(2, size)

    def copied(pieces: Iterator[tuple[int, Any]]) -> dict[int, Any]:
        return {start: piece.copy() for start, piece in pieces}

    shares = piecewise(TensorColumns(rows), copied)
    assert len(shares) == max(1, min(3, math.ceil(size / NARROW)))
    joined = {start: piece for share in shares for start, piece in share.items()}
    assert sum(map(len, shares)) == len(joined)
    assert [*sorted(joined)] == [*range(0, size, NARROW)]
    found = [joined[start] for start in sorted(joined)]
    assert np.array_equal(np.concatenate([np.zeros((2, 0)), *found], axis=1), rows.numpy())


def test_an_error_in_a_thread_is_raised(three_threads: None) -> None:
    class Torn(TensorColumns):
        def read(self, start: int, out: Any) -> None:
            raise OSError(f"column {start}")

    with pytest.raises(OSError, match="column"):
        _gram(Torn(torch.zeros(1, 10 * CACHED)), None)


def test_the_gram_matrix_depends_only_on_the_matrix_and_the_number_of_threads(three_threads: None) -> None:
    rows = torch.randn(3, 20 * CACHED // 3, generator=torch.Generator().manual_seed(0))
    found = [_gram(TensorColumns(rows), None) for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(found[0], rows.double() @ rows.double().T, rtol=1e-12, atol=1e-9)


def test_many_rows_are_multiplied_in_one_thread_of_ours(three_threads: None) -> None:
    for rows, threads in ((FEW, 3), (FEW + 1, 1)):
        assert len(piecewise(TensorColumns(torch.zeros(rows, 9 * CACHED // FEW)), len_of)) == threads


def len_of(pieces: Iterator[tuple[int, Any]]) -> int:
    return sum(1 for _ in pieces)


def test_parts_are_views_of_all_columns() -> None:
    matrix = np.arange(14.0).reshape(2, 7)
    for width, shapes in ((3, [(2, 2, 3), (1, 2, 1)]), (7, [(1, 2, 7)]), (8, [(1, 2, 7)]), (1, [(7, 2, 1)])):
        parts = _parts(matrix, width)
        assert [part.shape for part in parts] == shapes
        assert all(np.shares_memory(part, matrix) for part in parts)
        assert np.array_equal(np.concatenate([batch for part in parts for batch in part], axis=1), matrix)


def test_a_matrix_is_split_into_equal_parts_for_the_threads(three_threads: None) -> None:
    rows = torch.arange(24.0).view(2, 12)
    assert torch.equal(torch.cat(list(in_threads(rows)), dim=1), rows)
    assert [in_threads(rows[:, :width]).shape[0] for width in (12, 3, 4, 1)] == [3, 3, 1, 1]


def test_a_gram_matrix_keeps_what_each_of_many_pieces_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each square of 1e-16 vanishes in a float64 next to 1."""
    monkeypatch.setattr(linalg, "NARROW", 1)
    monkeypatch.setattr(linalg, "CACHED", 1)
    numbers = [1, *[1e-8] * 1000]
    found = float(_gram(TensorColumns(torch.tensor([numbers], dtype=torch.float64)), None))
    assert found == pytest.approx(math.fsum(number**2 for number in numbers), rel=3e-16, abs=0)


def test_numbers_of_every_dtype_are_read_exactly() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        stored = rows.to(dtype)
        out = np.empty((3, 20))
        TensorColumns(stored.requires_grad_()).read(7, out)
        assert np.array_equal(out, stored.detach()[:, 7:27].double().numpy())
        assert np.shares_memory(as_array(stored.detach()), as_array(stored.detach())) == (dtype != torch.bfloat16)
    values, directions = right_singular_vectors(TensorColumns(stored), lambda _: 3, torch.float32, "block")
    _, expected, right = torch.linalg.svd(stored.detach().double(), full_matrices=False)
    torch.testing.assert_close(values, expected)
    signs = (directions * right).sum(1).sign()[:, None]
    torch.testing.assert_close(directions.double() * signs, right, rtol=0, atol=1e-6)


def vectors(rows: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return all singular values and as many vectors as there are rows."""
    return right_singular_vectors(TensorColumns(rows), len, dtype, "first")


def test_every_process_gets_its_columns_of_the_vectors_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """With singular values of 1 to 1e-5, so that the vectors are orthonormalised, over all columns."""
    left, _, right = torch.linalg.svd(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double(), False)
    rows = left * torch.tensor([1, 1e-2, 1e-5]).double() @ right
    parts, group = rows.split([10, 30], dim=1), Threads(2, monkeypatch)
    found = group.run(
        lambda rank: right_singular_vectors(
            TensorColumns(parts[rank]),
            len,
            torch.float64,
            "first",
            group=group,  # type: ignore[arg-type]
        )
    )
    values, directions = vectors(rows, torch.float64)
    for (own, part), width in zip(found, (10, 30), strict=True):
        torch.testing.assert_close(own, values, rtol=1e-6, atol=0)
        assert part.shape == (3, width)
    together = torch.cat([part for _, part in found], dim=1)
    torch.testing.assert_close(together @ together.T, torch.eye(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close((together * directions).sum(1).abs(), torch.ones(3).double(), rtol=0, atol=1e-6)


def test_the_factors_are_those_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors are unique up to their sign: processes whose libraries choose another one must not differ."""
    group, eigh, rows = Threads(2, monkeypatch), torch.linalg.eigh, torch.randn(2, 8, dtype=torch.float64)

    def other_signs(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, left = eigh(gram)
        return values, left * (1 - 2 * group.local.rank)

    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    first, second = group.run(
        lambda rank: right_singular_vectors(TensorColumns(rows), len, torch.float32, "first", group=group)  # type: ignore[arg-type]
    )
    assert torch.equal(first[1], second[1])


def test_a_condition_holds_everywhere_if_it_holds_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert everywhere(True, None) is True
    assert everywhere(False, None) is False
    group = Threads(2, monkeypatch)
    for holds in ((True, True), (True, False), (False, True), (False, False)):
        found = group.run(lambda rank, holds=holds: everywhere(holds[rank], group))  # type: ignore[arg-type, misc]
        assert found == [all(holds)] * 2


def test_infinite_numbers_are_refused() -> None:
    message = "^block 'first': the points hold NaN or infinite numbers; record them again$"
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(InputError, match=message):
            vectors(torch.tensor([[1.0, wrong]]).double())


def test_a_block_that_does_not_move_gets_no_directions() -> None:
    with pytest.warns(UserWarning, match="^block 'first' does not move, so it gets no directions$"):
        values, directions = vectors(torch.zeros(2, 5).double())
    assert torch.equal(values, torch.zeros(2).double())
    assert directions.shape == (0, 5)


def test_directions_below_the_cutoff_are_dropped_with_a_warning() -> None:
    rows = torch.diag(torch.tensor([100, 2e-4, 5e-5]).double())  # the cutoff is 1e-6 of the largest
    message = "block 'first': 1 of 3 directions dropped, their singular values are below 1e-06 of the largest"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        values, directions = vectors(rows)
    torch.testing.assert_close(values, rows.diag())
    torch.testing.assert_close(directions.abs(), torch.eye(2, 3))
    with pytest.warns(UserWarning, match="1 of 2 directions"):
        assert vectors(torch.diag(torch.tensor([1.0, 0]).double()))[1].shape == (1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors(rows[:2])


@pytest.mark.parametrize(
    ("dtype", "singular", "calls"),
    [
        (torch.bfloat16, [1.0, 1e-3], 0),
        (torch.bfloat16, [1.0, 1e-3, 5e-5], 1),
        (torch.float32, [1e-2, 1e-5], 0),
        (torch.float32, [1e2, 5e-3], 1),
        (torch.float64, [1.0, 0.5], 1),
    ],
)
def test_vectors_are_orthonormalised_where_one_product_is_too_inaccurate(
    dtype: torch.dtype, singular: list[float], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(linalg, "orthonormalize", lambda directions, **arguments: found.append(arguments))
    _, directions = vectors(torch.diag(torch.tensor(singular).double()), dtype)
    assert found == [{"passes": 1, "group": None}] * calls
    assert directions.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_pieces_have_as_many_columns_as_fit_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, width in ((0, CACHED), (1, CACHED), (4, CACHED // 4), (CACHED // NARROW + 1, NARROW)):
        found = piecewise(TensorColumns(torch.zeros(rows, width + 1)), lambda pieces: [p.shape[1] for _, p in pieces])
        assert found == [[width, 1]]
    monkeypatch.setattr(linalg, "NARROW", 3)
    monkeypatch.setattr(linalg, "CACHED", 1)
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double()
    found, right = orthonormalize(rows.clone()), torch.linalg.qr(rows.T).Q.T
    torch.testing.assert_close(found @ found.T, torch.eye(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.abs(), right.abs())


def test_the_norm_of_a_product_is_that_of_its_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (0.1 * torch.randn(*shape, generator=generator).double() for shape in ((5, 2), (2, 7)))
    assert squared_norm(left, right) == pytest.approx(float((left @ right).square().sum()), rel=1e-12)
    assert squared_norm(torch.ones(2, 1), torch.zeros(1, 3)) == 0

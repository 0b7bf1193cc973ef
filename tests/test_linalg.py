"""Tolerances: a Gram matrix in float64 leaves sigma_i / sigma_1 an error of about 1e-16 (sigma_1 / sigma_i)^2;
directions stored in float32 add 1e-7."""

import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyspan import InputError, linalg
from tinyspan.linalg import (
    CACHED,
    NARROW,
    _gram,
    _square,
    everywhere,
    in_float64,
    in_threads,
    orthonormalize,
    piece_width,
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
    found, directions = right_singular_vectors(
        lambda: iter(rows.split(37, dim=1)), t + extra, lambda values: t, torch.float64, "block"
    )
    torch.testing.assert_close(directions @ directions.T, torch.eye(t, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, values, rtol=1e-5, atol=0)
    narrow = right_singular_vectors(
        lambda: iter(rows.split(37, dim=1)), t + extra, lambda values: t, torch.float32, "block"
    )[1].double()
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


@pytest.fixture
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("t", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("width", [1, 3, 10, 300])
def test_a_square_by_threads_and_parts_is_the_plain_product(t: int, width: int, three_threads: None) -> None:
    rows = torch.randn(t, 400, generator=torch.Generator().manual_seed(t), dtype=torch.float64)[:, :width]
    torch.testing.assert_close(_square(rows), rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_a_matrix_is_split_into_equal_parts_for_the_threads(three_threads: None) -> None:
    rows = torch.arange(24.0).view(2, 12)
    assert torch.equal(torch.cat(list(in_threads(rows)), dim=1), rows)
    assert [in_threads(rows[:, :width]).shape[0] for width in (12, 3, 4, 1)] == [3, 3, 1, 1]


def test_a_gram_matrix_keeps_what_each_of_many_pieces_adds() -> None:
    """Each square of 1e-16 vanishes in a float64 next to 1."""
    pieces = [torch.tensor([[value]], dtype=torch.float64) for value in (1, *[1e-8] * 1000)]
    found = float(_gram(pieces, None))
    assert found == pytest.approx(math.fsum(float(piece) ** 2 for piece in pieces), rel=3e-16, abs=0)


def test_pieces_in_float64_are_the_numbers_they_were_made_of() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    pieces = rows.split([1, 4, 20, 25], dim=1)  # narrow ones before wide ones, as of a bias before a weight
    found = torch.cat([piece.clone() for piece in in_float64(pieces)], dim=1)
    assert found.dtype == torch.float64
    assert torch.equal(found, rows.double())
    values, directions = right_singular_vectors(lambda: in_float64(pieces), 50, lambda _: 3, torch.float32, "block")
    _, expected, right = torch.linalg.svd(rows.double(), full_matrices=False)
    torch.testing.assert_close(values, expected)
    signs = (directions * right).sum(1).sign()[:, None]
    torch.testing.assert_close(directions.double() * signs, right, rtol=0, atol=1e-6)


def vectors(rows: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return all singular values and as many vectors as there are rows."""
    return right_singular_vectors(lambda: iter([rows]), rows.shape[1], len, dtype, "first")


def test_every_process_gets_its_columns_of_the_vectors_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """With singular values of 1 to 1e-5, so that the vectors are orthonormalised, over all columns."""
    left, _, right = torch.linalg.svd(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double(), False)
    rows = left * torch.tensor([1, 1e-2, 1e-5]).double() @ right
    parts, group = rows.split([10, 30], dim=1), Threads(2, monkeypatch)
    found = group.run(
        lambda rank: right_singular_vectors(
            lambda: iter(parts[rank].split(7, dim=1)),
            parts[rank].shape[1],
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
        lambda rank: right_singular_vectors(lambda: iter([rows]), 8, len, torch.float32, "first", group=group)  # type: ignore[arg-type]
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
    assert [piece_width(rows) for rows in (0, 1, 4, CACHED)] == [CACHED, CACHED, CACHED // 4, NARROW]
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

"""Tolerances: a Gram matrix in float64 leaves sigma_i / sigma_1 an error of about 1e-16 (sigma_1 / sigma_i)^2;
directions stored in float32 add 1e-7."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyspan.linalg import _square, in_float64, orthonormalize, right_singular_vectors


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


def test_pieces_in_float64_are_the_numbers_they_were_made_of() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    pieces = rows.split([4, 20, 1, 25], dim=1)  # narrow ones before wide ones, as of a bias before a weight
    found = torch.cat([piece.clone() for piece in in_float64(pieces)], dim=1)
    assert found.dtype == torch.float64
    assert torch.equal(found, rows.double())
    values, directions = right_singular_vectors(lambda: in_float64(pieces), 50, lambda _: 3, torch.float32, "block")
    _, expected, right = torch.linalg.svd(rows.double(), full_matrices=False)
    torch.testing.assert_close(values, expected)
    signs = (directions * right).sum(1).sign()[:, None]
    torch.testing.assert_close(directions.double() * signs, right, rtol=0, atol=1e-6)

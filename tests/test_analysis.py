from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.stats import kurtosis
from towers import Tower

from tinyspan import (
    Basis,
    InputError,
    MismatchError,
    SubspaceModel,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    empty_basis,
    fastfood_basis,
    random_basis,
    svd_basis,
)
from tinyspan.analysis import (
    GAUSSIAN_SHARE,
    explained_variance,
    loss_surface,
    outliers,
    plane,
    principal_angles,
    span_share,
)


@given(
    a=st.integers(1, 5), b=st.integers(1, 5), extra=st.integers(0, 20), seed=st.integers(0, 999), tilt=st.floats(-9, 0)
)
@settings(max_examples=60, deadline=None)
def test_principal_angles_equal_scipys(a: int, b: int, extra: int, seed: int, tilt: float) -> None:
    """Also where the spaces nearly coincide: tilt 1e-9 must come out as 1e-9, which arccos cannot do."""
    rng = np.random.default_rng(seed)
    first = np.linalg.qr(rng.standard_normal((a + b + extra, a)))[0]
    mixed = first[:, : min(a, b)] + 10.0**tilt * rng.standard_normal((a + b + extra, min(a, b)))
    second = np.linalg.qr(np.hstack([mixed, rng.standard_normal((a + b + extra, b - min(a, b)))]))[0]
    found = principal_angles(torch.tensor(first.T), torch.tensor(second.T))
    np.testing.assert_allclose(found.numpy(), np.sort(subspace_angles(first, second)), rtol=1e-5, atol=1e-13)


def test_angles_need_one_space() -> None:
    with pytest.raises(MismatchError):
        principal_angles(torch.eye(3), torch.eye(4))


def test_outliers_of_a_gaussian_and_of_spikes() -> None:
    block = by_layer(Tower(1, width=60)).blocks[0]
    vector = torch.randn(block.numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = outliers(vector, block)
    assert plain.share == pytest.approx(GAUSSIAN_SHARE, rel=0.35)
    assert plain.kurtosis == pytest.approx(kurtosis(vector.numpy(), fisher=False))
    spec, start, _ = list(block.spans())[4]
    vector[start + 7] = 90.0
    spiked = outliers(vector, block, largest=1)
    assert spiked.largest[0][:2] == (spec.name, 7)
    distance = (vector - vector.mean()).abs() / vector.std(correction=0)
    assert spiked.count == int((distance > 3).sum()) == sum(spiked.by_parameter.values()) == len(spiked.indices)
    assert outliers(torch.zeros(block.numel), block).count == 0


def test_explained_variance_by_hand() -> None:
    torch.testing.assert_close(explained_variance(torch.tensor([3.0, 4.0, 0.0])), torch.tensor([9 / 25, 1.0, 1.0]))


def test_the_plane_holds_the_two_main_directions(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower), points=4)
    found = plane(trajectory)
    rows = torch.stack([torch.cat([trajectory.delta(block, i) for block in trajectory.partition]) for i in range(4)])
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    expected = (left * values)[:, :2]
    signs = (found.path[1:].double() * expected).sum(0).sign()
    torch.testing.assert_close(found.path[1:].double() * signs, expected, rtol=1e-4, atol=1e-5)
    assert not found.path[0].any()
    assert found.explained == pytest.approx(float(values[:2].square().sum() / values.square().sum()))
    with pytest.raises(InputError, match="at least 2 points"):
        plane(wander(tower, by_layer(tower), points=1, name="short"))


def test_loss_surface_is_the_loss_at_every_grid_point(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    found = plane(wander(tower, by_layer(tower), points=3))
    subspace = SubspaceModel(tower, found.basis)
    (block,), tokens = found.basis.partition, torch.arange(6).view(2, 3)

    def loss() -> float:
        return subspace(tokens).square().sum().item()

    surface = loss_surface(subspace, loss, [0.0, 0.5, 1.0], [0.0, -1.0])
    assert surface.shape == (2, 3)
    subspace.set_state({block.name: torch.tensor([0.5, -1.0])})
    assert surface[1, 1].item() == loss()
    subspace.set_state({block.name: torch.zeros(2)})
    assert surface[0, 0].item() == loss()


def test_what_does_not_move_is_defined_and_what_is_sick_is_refused(tower: Tower, tmp_path: Path) -> None:
    assert torch.equal(explained_variance(torch.zeros(3)), torch.ones(3))
    assert explained_variance(torch.zeros(0)).shape == (0,)
    block = by_layer(tower).blocks[0]
    still = outliers(torch.full((block.numel,), 0.1), block)
    assert (still.count, still.share, still.kurtosis, still.largest) == (0, 0.0, 0.0, [])
    assert principal_angles(torch.zeros(0, 5), torch.eye(2, 5)).shape == (0,)
    for sick in (torch.nan, torch.inf):
        vector = torch.zeros(block.numel)
        vector[3] = sick
        with pytest.raises(InputError, match="some are NaN or infinite"):
            outliers(vector, block)
        with pytest.raises(InputError, match="NaN or infinite"):
            principal_angles(vector[None], torch.eye(2, block.numel))
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "still")
    for step in range(3):
        recorder.record(step)
    with pytest.warns(UserWarning, match="does not move"), pytest.raises(InputError, match="no point differs"):
        plane(recorder.trajectory())
    with torch.no_grad():
        for parameter in tower.layers.parameters():
            parameter += 0.5
    recorder.record(3)
    with pytest.warns(UserWarning, match="directions dropped"), pytest.raises(InputError, match="is straight"):
        plane(recorder.trajectory())


def vectors(basis: Basis, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {b.name: torch.randn(b.numel, generator=generator, dtype=torch.float64) for b in basis.partition}


@pytest.mark.parametrize("cut", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_share_equals_that_of_the_dense_projection(
    tower: Tower, wander: Callable[..., Trajectory], cut: int | None, dtype: torch.dtype, density: float
) -> None:
    """|P g|^2 / |g|^2 with P = V V^+, in float64, of a g of which a part lies in the span."""
    walk = wander(tower, by_layer(tower), points=4)
    basis = svd_basis(walk, 3, dtype=dtype, density=density)
    noise = vectors(basis)
    vector = {b.name: noise[b.name] / noise[b.name].norm() + 5 * walk.delta(b).double() for b in basis.partition}
    within, random, whole = 0.0, 0.0, 0.0
    ranks = None if cut is None else dict.fromkeys(vector, cut)
    found = span_share(basis, vector, ranks)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-6}.get(dtype, 0.02)
    for block in basis.partition:
        g, v = vector[block.name], basis.maps[block.name].dense(torch.float64)[:cut].T  # type: ignore[attr-defined]
        projected = v @ torch.linalg.pinv(v) @ g
        assert found.by_block[block.name] == pytest.approx(float(projected @ projected / (g @ g)), rel=tolerance)
        within, whole = within + float(projected @ projected), whole + float(g @ g)
        random += float(g @ g) * v.shape[1] / v.shape[0]
    assert found.value == pytest.approx(within / whole, rel=tolerance)
    assert found.random == pytest.approx(random / whole, rel=1e-9)


def test_the_share_of_random_directions_is_what_is_expected(tower: Tower) -> None:
    vector = vectors(empty_basis(by_layer(tower)))
    found = [span_share(random_basis(by_layer(tower), 20, seed=seed), vector) for seed in range(30)]
    values = torch.tensor([share.value for share in found], dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(found[0].random, abs=3 * float(values.std()) / 30**0.5)


def test_shares_that_are_none(tower: Tower) -> None:
    partition = by_layer(tower)
    vector = vectors(empty_basis(partition))
    assert span_share(empty_basis(partition), vector).value == 0
    first = partition.blocks[0].name
    still = {**vector, first: torch.zeros_like(vector[first])}
    assert span_share(random_basis(partition, 2), still).by_block[first] == 0
    for bad in (0.0, torch.nan, torch.inf):
        with pytest.raises(InputError, match="other than zero"):
            span_share(random_basis(partition, 2), {name: torch.full_like(g, bad) for name, g in vector.items()})
    with pytest.raises(InputError, match="fastfood"):
        span_share(fastfood_basis(partition, 2), vector)

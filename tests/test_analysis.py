from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.stats import binomtest, kurtosis
from towers import Tower

from tinyspan import (
    Basis,
    DenseMap,
    InputError,
    MismatchError,
    Partition,
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
    Comparison,
    compare,
    component_norms,
    envelope,
    explained_variance,
    loss_surface,
    outliers,
    plane,
    principal_angles,
    score_interval,
    span_share,
    spectra,
    surface_around,
    updates,
    wilson_interval,
)
from tinyspan.model.opened_adapter import OpenedAdapter


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
    flat = outliers(torch.zeros(block.numel), block)
    assert (flat.count, flat.share, flat.kurtosis, flat.largest) == (0, 0.0, 0.0, [])
    assert (len(flat.indices), flat.indices.dtype) == (0, spiked.indices.dtype)
    assert flat.by_parameter == dict.fromkeys(spiked.by_parameter, 0)
    with pytest.raises(InputError, match=r"expected a Block, got 'layers\.0'; a partition has its blocks by name"):
        outliers(vector, block.name)  # type: ignore[arg-type]


def test_explained_variance_by_hand() -> None:
    torch.testing.assert_close(explained_variance(torch.tensor([3.0, 4.0, 0.0])), torch.tensor([9 / 25, 1.0, 1.0]))


def test_the_plane_holds_the_two_main_directions(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower), points=4)
    found = plane(trajectory)
    rows = torch.stack([torch.cat([trajectory.delta(block, i) for block in trajectory.partition]) for i in range(4)])
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    expected = (left * values)[:, :2]
    signs = (found.paths[0][1:].double() * expected).sum(0).sign()
    torch.testing.assert_close(found.paths[0][1:].double() * signs, expected, rtol=1e-4, atol=1e-5)
    assert not found.paths[0][0].any()
    assert found.explained == pytest.approx(float(values[:2].square().sum() / values.square().sum()))
    with pytest.raises(InputError, match="at least 2 points"):
        plane(wander(tower, by_layer(tower), points=1, name="short"))
    assert plane(wander(tower, by_layer(tower), points=2, name="two")).explained == pytest.approx(1.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])  # that of a singular vector is arbitrary
def test_the_directions_of_a_plane_are_flipped_with_its_paths(
    tower: Tower, wander: Callable[..., Trajectory], monkeypatch: pytest.MonkeyPatch, sign: float
) -> None:
    def signed(*arguments: Any, **options: Any) -> Basis:
        basis = svd_basis(*arguments, **options)
        basis.maps = {name: DenseMap(sign * v.dense()) for name, v in basis.maps.items()}
        return basis

    monkeypatch.setattr("tinyspan.analysis.planes.svd_basis", signed)
    trajectory = wander(tower, by_layer(tower), points=4)
    found = plane(trajectory)
    rows = torch.cat([trajectory.matrix(block) for block in trajectory.partition], dim=1)
    (v,) = found.basis.maps.values()
    torch.testing.assert_close(found.paths[0][1:].double(), rows @ v.dense(torch.float64).T, rtol=1e-4, atol=1e-5)
    assert (found.paths[0][-1] > 0).all()


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


def test_an_interrupted_loss_surface_leaves_z_as_it_was(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    found = plane(wander(tower, by_layer(tower), points=3))
    subspace, events = SubspaceModel(tower, found.basis), list[str]()
    before = [z.detach().clone() for z in subspace.z]

    def rows(values: Sequence[float]) -> Iterator[float]:
        for value in values:
            yield value
            events.append("row")

    def loss() -> float:
        events.append("loss")
        if len(events) == 4:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        surface_around(found, subspace, loss, (2, 2), progress=rows)
    assert events == ["loss", "loss", "row", "loss"]  # the progress is that of the evaluations
    assert all(torch.equal(z, then) for z, then in zip(subspace.z, before, strict=True))


def test_a_plane_is_that_of_the_blocks_of_the_trajectory(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    run = wander(tower, by_layer(tower))
    second = Partition((run.partition["layers.1"],))
    part = run.with_partition(second)
    assert plane(part).basis.partition.numel == second.numel
    _, values, _ = torch.linalg.svd(part.matrix("layers.1"), full_matrices=False)
    assert plane(part).explained == pytest.approx(float(values[:2].square().sum() / values.square().sum()))


def test_outliers_of_a_vector_of_another_length_are_refused(tower: Tower) -> None:
    block = by_layer(tower)["layers.0"]
    with pytest.raises(MismatchError, match=rf"expected a vector \[{block.numel}\], got shape \[11\]"):
        outliers(torch.arange(11.0), block)


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


def walk_of(model: torch.nn.Module, folder: Path, points: int, seed: int) -> Trajectory:
    """A random walk from the weights of the model, in all blocks of `by_layer`."""
    generator = torch.Generator().manual_seed(seed)
    recorder = TrajectoryRecorder(model, by_layer(model), folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for step in range(points):
            for value in recorder.partition.select(model).values():
                value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            recorder.record(step)
    model.load_state_dict(before)
    return recorder.trajectory()


def dense_comparison(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[np.ndarray, float, list[float], list[float]]:
    """Angles in degrees, cosine, shares and norms of the last rows, by projectors onto the leading right vectors."""
    v, w = (np.linalg.svd(x.numpy(), full_matrices=False)[2][:rank] for x in (a, b))
    one, other = a[-1].numpy(), b[-1].numpy()
    norms = [float(np.sqrt(x @ x)) for x in (one, other)]
    shares = [float(x @ (p.T @ p) @ x / (x @ x)) for x, p in ((one, w), (other, v))]
    return np.sort(np.degrees(subspace_angles(v.T, w.T))), float(one @ other) / (norms[0] * norms[1]), shares, norms


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_a_comparison_equals_the_dense_formulas(tower: Tower, tmp_path: Path, rank: int | None) -> None:
    a, b = walk_of(tower, tmp_path / "a", 3, 0), walk_of(tower, tmp_path / "b", 4, 1)
    for row, block in zip(compare(a, b, rank), a.partition, strict=True):
        angles, cosine, shares, norms = dense_comparison(a.matrix(block), b.matrix(block), rank or 4)
        np.testing.assert_allclose(row.angles.numpy(), angles, atol=1e-6)
        assert row.block == block.name
        assert row.cosine == pytest.approx(cosine, abs=1e-12)
        assert row.shares == pytest.approx(tuple(shares), abs=1e-9)
        assert row.norms == pytest.approx(tuple(norms))
        assert row.chance == (min(rank or 4, 4) / block.numel, min(rank or 3, 3) / block.numel)


def test_a_run_an_adapter_and_a_basis_are_compared(tower: Tower, tmp_path: Path) -> None:
    run = walk_of(tower, tmp_path / "run", 3, 0)
    basis = svd_basis(run, 2, dtype=torch.float64)
    basis.save_pretrained(tmp_path / "basis")
    subspace = SubspaceModel(tower, basis)
    subspace.set_state({block.name: torch.tensor([1.0, -2.0]) for block in basis.partition})
    subspace.save_pretrained(tmp_path / "adapter")
    adapter = OpenedAdapter(tmp_path / "adapter")
    of_model, of_folder = compare(run, subspace, 2), compare(run, adapter, 2)
    for row, same, block in zip(of_model, of_folder, run.partition, strict=True):
        v = basis.maps[block.name].dense(torch.float64)
        update, end = v.T @ torch.tensor([1.0, -2.0], dtype=torch.float64), run.delta(block)
        assert row.cosine == pytest.approx(float(update @ end / (update.norm() * end.norm())), abs=1e-9)
        assert same.cosine == pytest.approx(row.cosine, abs=1e-9)
        assert row.norms[1] == pytest.approx(5**0.5)
        assert row.shares[1] == pytest.approx(1.0)  # V z lies in the span of the run's first two directions
        assert float(row.angles.max()) < 1e-5
    alone = compare(basis, random_basis(by_layer(tower), 2))
    assert [(row.cosine, row.shares, row.norms) for row in alone] == [(None, (None, None), (None, None))] * 2
    assert [row.chance for row in alone] == [(2 / 84, 2 / 84)] * 2
    assert compare(run, empty_basis(by_layer(tower)))[0].angles.shape == (0,)


def test_what_stands_still_has_no_direction(tower: Tower, tmp_path: Path) -> None:
    run = walk_of(tower, tmp_path / "run", 2, 0)
    still = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "still")
    still.record(0)
    row: Comparison = compare(run, still.trajectory())[0]
    assert (row.cosine, row.shares, row.norms[1], len(row.angles)) == (None, (0.0, None), 0.0, 0)
    with pytest.raises(InputError, match="no points, so it has no update"):
        compare(run, run.with_points([]))


def test_runs_that_cannot_be_compared(tower: Tower, tmp_path: Path) -> None:
    run = walk_of(tower, tmp_path / "run", 2, 0)
    other = walk_of(Tower(seed=1), tmp_path / "other", 2, 0)
    with pytest.raises(MismatchError, match=r"different weights theta_0, first in block 'layers\.0'"):
        compare(run, other)
    with pytest.raises(MismatchError, match=r"one has no block where the other has layers\.2"):
        compare(run, random_basis(by_layer(Tower(3)), 1))
    with pytest.raises(MismatchError, match=r"block 'layers\.0' has other parameters in each"):
        compare(run, random_basis(by_layer(Tower(width=5)), 1))
    with pytest.raises(InputError, match="rank of at least 1"):
        compare(run, run, 0)


def test_two_runs_in_one_plane(tower: Tower, tmp_path: Path) -> None:
    runs = walk_of(tower, tmp_path / "a", 3, 0), walk_of(tower, tmp_path / "b", 4, 1)
    found = plane(*runs)
    rows = torch.cat([torch.cat([run.matrix(block) for block in run.partition], dim=1) for run in runs])
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    expected = (left * values)[:, :2]
    expected *= torch.where(expected[2] < 0, -1.0, 1.0)  # the end of the first run
    paths = torch.cat([path[1:].double() for path in found.paths])
    torch.testing.assert_close(paths, expected, rtol=1e-4, atol=1e-5)
    assert [tuple(path.shape) for path in found.paths] == [(4, 2), (5, 2)]
    assert found.explained == pytest.approx(float(values[:2].square().sum() / values.square().sum()))
    with pytest.raises(InputError, match="no trajectory has 0"):
        plane()
    with pytest.raises(MismatchError):
        plane(runs[0], walk_of(Tower(seed=1), tmp_path / "c", 2, 0))


def test_a_surface_surrounds_the_paths(tower: Tower, tmp_path: Path) -> None:
    found = plane(walk_of(tower, tmp_path / "a", 3, 0), walk_of(tower, tmp_path / "b", 3, 1))
    subspace, tokens = SubspaceModel(tower, found.basis), torch.arange(6).view(2, 3)
    surface = surface_around(found, subspace, lambda: subspace(tokens).square().sum().item(), (4, 3))
    assert surface.loss.shape == (3, 4)
    points = torch.cat(found.paths)
    for axis, values in enumerate((surface.first, surface.second)):
        low, high = float(points[:, axis].min()), float(points[:, axis].max())
        assert float(values[0]) == pytest.approx(low - 0.3 * (high - low))
        assert float(values[-1]) == pytest.approx(high + 0.3 * (high - low))


def test_norms_by_component_are_those_of_each_parameter(tower: Tower, tmp_path: Path) -> None:
    run = walk_of(tower, tmp_path / "run", 2, 0)
    rows = iter(component_norms(run))
    for block in run.partition:
        for name, value in block.unflatten(run.delta(block)).items():
            row = next(rows)
            assert f"{row.block}.{row.component}" == name
            assert row.norm == pytest.approx(float(value.norm()))
            assert row.per_weight == pytest.approx(float(value.square().mean().sqrt()))
    assert next(rows, None) is None


def test_updates_of_an_ensemble_and_of_layer_scales(tower: Tower, tmp_path: Path) -> None:
    partition = by_layer(tower)
    basis = Basis(partition, {block.name: DenseMap(torch.eye(2, block.numel)) for block in partition})
    basis.save_pretrained(tmp_path / "basis")
    subspace = SubspaceModel(tower, basis, ensemble=3, init_std=1.0)
    subspace.save_pretrained(tmp_path / "adapter")
    means = {block.name: z.detach().mean(0) for block, z in zip(subspace.blocks, subspace.z, strict=True)}
    for source in (subspace, OpenedAdapter(tmp_path / "adapter")):
        for block, update in updates(source):
            torch.testing.assert_close(update[:2], means[block.name].to(update))
            assert not update[2:].any()
    scaled = SubspaceModel(Tower(), basis, layer_scales=by_layer(Tower()))
    scaled.save_pretrained(tmp_path / "scaled")
    with pytest.raises(InputError, match="has layer scales"):
        list(updates(OpenedAdapter(tmp_path / "scaled")))


def test_an_envelope_holds_the_largest_of_each_segment() -> None:
    vector = torch.randn(103, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = (vector - vector.mean()).abs() / vector.std(correction=0)
    expected = [float(distance[start : start + 11].max()) for start in range(0, 103, 11)]
    assert envelope(vector, 10).tolist() == pytest.approx(expected)


def test_the_spectra_of_a_run_are_its_singular_values(tower: Tower, tmp_path: Path) -> None:
    run = walk_of(tower, tmp_path / "run", 4, 0)
    for block in run.partition:
        values = torch.linalg.svdvals(run.matrix(block))
        torch.testing.assert_close(spectra(run)[block.name], values, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(spectra(svd_basis(run, 2))[block.name], values, rtol=1e-7, atol=1e-7)
    assert spectra(random_basis(run.partition, 2)) == {}


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (0, 7), (3, 7), (7, 7), (50, 100), (871, 998)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_interval_of_a_share_is_wilson_s(right: int, rows: int, level: float) -> None:
    expected = binomtest(right, rows).proportion_ci(level, method="wilson")
    assert wilson_interval(right / rows, rows, level) == pytest.approx(tuple(expected), abs=1e-12)


def test_the_interval_of_a_result_is_the_stored_one_or_wilson_s() -> None:
    result = {"metric": "accuracy", "score": 0.75, "rows": {"train": 9, "validation": 40}}
    assert score_interval(result) == wilson_interval(0.75, 40)
    assert score_interval(result | {"intervals": {"accuracy": [0.5, 0.8], "f1": [0.1, 0.2]}}) == (0.5, 0.8)
    assert score_interval(result | {"intervals": {"f1": [0.1, 0.2]}}) == wilson_interval(0.75, 40)
    assert score_interval(result | {"intervals": None}) == wilson_interval(0.75, 40)
    assert score_interval(result | {"metric": "pearson"}) is None
    assert score_interval({"metric": "accuracy", "score": 0.75}) is None
    assert score_interval({"metric": "accuracy", "score": 0.75, "rows": {"train": 9}}) is None


@pytest.mark.parametrize(("score", "rows"), [(-0.1, 10), (1.1, 10), (np.nan, 10), (0.5, 0)])
def test_a_score_that_is_no_share_has_no_interval(score: float, rows: int) -> None:
    with pytest.raises(InputError, match="expected a share"):
        wilson_interval(score, rows)


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

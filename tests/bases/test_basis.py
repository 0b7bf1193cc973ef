"""Tolerances: float64 data goes through a Gram matrix, so sigma_i / sigma_1 carries an error of about
1e-16 (sigma_1 / sigma_i)^2; float32 directions add 1e-7."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from towers import Tower

from tinyspan import (
    Basis,
    DenseMap,
    InputError,
    MismatchError,
    SparseMap,
    StorageError,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    by_module,
    by_pattern,
    empty_basis,
    random_basis,
    svd_basis,
)
from tinyspan.bases.point_matrix import PointMatrix, top_positions
from tinyspan.errors import Interrupted
from tinyspan.io.journals import append_line, cut_lines, read_lines
from tinyspan.io.manifests import file_entry
from tinyspan.io.tensors import save_tensors, write_tensors
from tinyspan.partition import Block


def dense_rows(trajectory: Trajectory, center: str, block: Any) -> Tensor:
    """W written out: raw weights, minus what the centring says."""
    start = trajectory.start(block)
    points = torch.stack([start + trajectory.delta(block, i) for i in range(len(trajectory))])
    return points - {"init": start, "mean": points.mean(0), "none": torch.zeros(())}[center]


@pytest.mark.parametrize("center", ["init", "mean", "none"])
def test_svd_equals_the_dense_svd(tower: Tower, wander: Callable[..., Trajectory], center: Any) -> None:
    trajectory = wander(tower, by_layer(tower), points=5)
    basis = svd_basis(trajectory, rank=3, center=center, dtype=torch.float64)
    for block in trajectory.partition:
        _, values, right = torch.linalg.svd(dense_rows(trajectory, center, block), full_matrices=False)
        found = basis.maps[block.name].directions
        signs = (found * right[:3]).sum(1).sign()
        torch.testing.assert_close(found * signs[:, None], right[:3], rtol=0, atol=1e-10)
        torch.testing.assert_close(basis.spectrum[block.name][:4], values[:4], rtol=1e-10, atol=0)


def test_init_centred_span_holds_the_whole_path(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower), points=4)
    basis = svd_basis(trajectory, rank=4, dtype=torch.float64)
    for block in trajectory.partition:
        for index in range(4):
            delta = trajectory.delta(block, index)
            rebuilt = basis.maps[block.name].matvec(basis.maps[block.name].rmatvec(delta))
            torch.testing.assert_close(rebuilt, delta, rtol=0, atol=1e-12)


@given(
    k=st.integers(1, 6),
    size=st.integers(6, 200),
    a=st.integers(0, 100),
    dtype=st.sampled_from(["float64", "float32", "bfloat16"]),
)
@settings(max_examples=60, deadline=None)
def test_expand_and_project_are_adjoint(k: int, size: int, a: int, dtype: str) -> None:
    """<V z, g> = <z, V^T g>, whatever V is stored in, and so for every range of its rows."""
    generator = torch.Generator().manual_seed(size)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    directions = draw(k, size).to(getattr(torch, dtype))
    dense, z, g = directions.double(), draw(k), draw(size)
    v = DenseMap(directions)
    torch.testing.assert_close(v.matvec(z), z @ dense)
    torch.testing.assert_close(v.rmatvec(g), dense @ g)
    torch.testing.assert_close(v.matvec(z) @ g, z @ v.rmatvec(g))
    start, stop = a % size, size
    torch.testing.assert_close(v.rows(start, stop).matvec(z), v.matvec(z)[start:stop])


def test_expand_of_several_chunks_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyspan.maps.dense.PIECE", 3 * 7)
    directions = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    v, z, g = DenseMap(directions), torch.ones(3), torch.ones(40)
    torch.testing.assert_close(v.matvec(z), directions.float().sum(0))
    torch.testing.assert_close(v.rmatvec(g), directions.float().sum(1))


@pytest.mark.parametrize("center", ["init", "mean", "none"])
def test_more_points_are_read_in_smaller_pieces(
    center: Any, tower: Tower, wander: Callable[..., Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece may begin or end in the middle of a parameter, and hold several."""
    runs = [wander(tower, by_layer(tower), 5), wander(tower, by_layer(tower), 3, "b")]
    read, columns = [], PointMatrix.read
    whole = svd_basis(runs, 2, center=center)

    def watched(matrix: PointMatrix, start: int, out: Any) -> None:
        columns(matrix, start, out)
        read.append((matrix.shape[1], start, out.shape))

    monkeypatch.setattr("tinyspan.linalg.CACHED", 8 * 7)
    monkeypatch.setattr("tinyspan.linalg.NARROW", 1)
    monkeypatch.setattr(PointMatrix, "read", watched)
    for name, found in svd_basis(runs, 2, center=center).maps.items():
        torch.testing.assert_close(found.directions, whole.maps[name].directions)
    sizes = {block.numel for block in by_layer(tower)}
    assert {(size, start, shape) for size, start, shape in read} == {
        (size, start, (8, min(7, size - start))) for size in sizes for start in range(0, size, 7)
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("center", ["init", "mean", "none"])
def test_the_matrix_of_the_points_is_the_dense_one_in_all_pieces(
    dtype: torch.dtype | None, center: Any, tower: Tower, tmp_path: Path
) -> None:
    runs = []
    for number in range(2):
        recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / str(number), dtype=dtype)
        with torch.no_grad():
            for step in range(3):
                for parameter in tower.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape)
                recorder.record(step)
        recorder.trajectory().load_into(tower, None)  # the next run starts from the same weights
        runs.append(recorder.trajectory())
    block = runs[0].partition.blocks[0]
    start = runs[0].start(block).double()
    points = torch.cat([run.matrix(block).double() for run in runs]) + start
    expected = points - {"init": start, "mean": points.mean(0), "none": torch.zeros(())}[center]
    matrix = PointMatrix(runs, block, center)
    assert matrix.shape == (6, block.numel)
    for first in range(0, block.numel, 5):
        for last in range(first + 1, block.numel + 1, 9):
            out = np.empty((6, last - first))
            matrix.read(first, out)
            np.testing.assert_allclose(out, expected[:, first:last].numpy(), rtol=0, atol=1e-14)


def test_cut_by_explained_variance(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower), points=6)
    basis = svd_basis(trajectory, explained_variance=0.9)
    for block in trajectory.partition:
        squares = basis.spectrum[block.name].square()
        k = basis.ranks[block.name]
        assert squares[:k].sum() >= 0.9 * squares.sum() > squares[: k - 1].sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either rank= or"),
        ({"rank": 2, "explained_variance": 0.5}, "either rank= or"),
        ({"rank": 4}, "not between 1 and 3"),
        ({"rank": 3, "center": "mean"}, "not between 1 and 2"),
        ({"rank": 0}, "not between"),
        ({"explained_variance": 1.5}, "at most 1"),
    ],
)
def test_impossible_cuts(
    tower: Tower, wander: Callable[..., Trajectory], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        svd_basis(wander(tower, by_layer(tower)), **arguments)


def test_repeated_points_lose_directions_with_a_warning(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower), points=2)
    with pytest.warns(UserWarning, match="2 of 4 directions dropped"):
        basis = svd_basis([trajectory, trajectory], rank=4)
    assert basis.ranks == {"layers.0": 2, "layers.1": 2}


def test_a_trajectory_that_stands_still_is_refused(tower: Tower, wander: Callable[..., Trajectory]) -> None:

    trajectory = wander(tower, by_layer(tower), points=0)
    with pytest.raises(InputError, match="at least one point"):
        svd_basis(trajectory, rank=1)
    recorder = TrajectoryRecorder(tower, by_layer(tower), trajectory.folder.parent / "still")
    recorder.record(0)
    with pytest.warns(UserWarning, match="does not move"), pytest.raises(InputError, match="no point differs"):
        svd_basis(recorder.trajectory(), rank=1)


@pytest.mark.parametrize("center", ["init", "mean"])
def test_a_layer_that_stands_still_gets_no_directions(tower: Tower, tmp_path: Path, center: Any) -> None:
    """And repeated points are no directions either: rounding is not mistaken for movement."""
    from tinyspan import SubspaceModel

    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    with torch.no_grad():
        for parameter in tower.layers[1].parameters():
            parameter += 0.1
    for step in range(3):
        with torch.no_grad():
            tower.layers[0].inner.weight[0, step] += 1.0
        recorder.record(step)
    with pytest.warns(UserWarning, match="does not move|directions dropped"):
        basis = svd_basis(recorder.trajectory(), rank=2, center=center)
    assert basis.ranks == {"layers.0": 2, "layers.1": 1 if center == "init" else 0}
    assert len(SubspaceModel(Tower(), random_basis(basis.partition, 1)).z) == 2
    basis.save_pretrained(tmp_path / "b")
    assert Basis.from_pretrained(tmp_path / "b").ranks == basis.ranks


def test_several_trajectories_must_share_theta_0(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    one = wander(tower, by_layer(tower), points=2, name="one")
    two = wander(tower, by_layer(tower), points=2, name="two", seed=9)
    assert svd_basis([one, two], rank=4).rank == 4
    other = wander(Tower(seed=5), by_layer(tower), points=2, name="three")
    with pytest.raises(MismatchError, match="another theta_0"):
        svd_basis([one, other], rank=2)
    modules = wander(tower, by_module(tower), points=2, name="four")
    with pytest.raises(MismatchError, match="another partition"):
        svd_basis([one, modules], rank=2)


def test_random_basis_is_orthonormal_and_seeded(tower: Tower) -> None:
    partition, state = by_layer(tower), torch.random.get_rng_state()
    first, again, other = (random_basis(partition, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.content_hash() == again.content_hash() != other.content_hash()
    for block in partition:
        directions = first.maps[block.name].directions.double()
        torch.testing.assert_close(directions @ directions.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not torch.equal(first.maps["layers.0"].directions, first.maps["layers.1"].directions)
    with pytest.raises(InputError, match="between 1 and 8"):
        random_basis(by_module(tower), 9)


def test_given_directions_are_orthonormalised_in_their_order(tower: Tower) -> None:
    partition = by_layer(tower)
    raw = {block.name: torch.randn(3, block.numel, dtype=torch.float64) for block in partition}
    basis = Basis.from_directions(partition, raw)
    for block in partition:
        reference = torch.linalg.qr(raw[block.name].T).Q.T
        found = basis.maps[block.name].directions
        torch.testing.assert_close((found * reference).sum(1).abs(), torch.ones(3, dtype=torch.float64))
    with pytest.raises(InputError, match="linearly dependent"):
        Basis.from_directions(partition, {name: torch.ones_like(value) for name, value in raw.items()})
    trained = {name: nn.Parameter(value) for name, value in raw.items()}
    assert Basis.from_directions(partition, trained).content_hash() == basis.content_hash()
    with pytest.raises(MismatchError, match="expected directions"):
        Basis.from_directions(partition, {"layers.0": raw["layers.0"]})
    size = partition.blocks[0].numel
    with pytest.raises(MismatchError, match=rf"expected directions \[k, {size}\], got shape \[3, 4\]"):
        Basis.from_directions(partition, {"layers.0": raw["layers.0"][:, :4]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_then_load_is_the_identity(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path, dtype: torch.dtype
) -> None:
    basis = svd_basis(wander(tower, by_layer(tower)), rank=2, dtype=dtype)
    unsaved_hash = basis.content_hash()
    basis.save_pretrained(tmp_path / "b")
    loaded = Basis.from_pretrained(tmp_path / "b")
    assert loaded.content_hash() == basis.content_hash() == unsaved_hash
    assert (loaded.partition, loaded.ranks, loaded.fingerprint) == (basis.partition, basis.ranks, basis.fingerprint)
    assert (loaded.construction, loaded.parents) == (basis.construction, basis.parents)
    for block in basis.partition:
        assert loaded.maps[block.name].directions.dtype == dtype
        assert torch.equal(loaded.maps[block.name].directions, basis.maps[block.name].directions)
        assert torch.equal(loaded.spectrum[block.name], basis.spectrum[block.name])
    with pytest.raises(InputError, match="is where this basis is read from"):
        loaded.save_pretrained(tmp_path / "b", overwrite=True)
    with pytest.raises(InputError, match="earlier output"):
        random_basis(basis.partition, 2).save_pretrained(tmp_path / "b")


def test_a_basis_saved_elsewhere_is_still_read_from_its_first_folder(tower: Tower, tmp_path: Path) -> None:
    in_memory = random_basis(by_layer(tower), 2)
    in_memory.save_pretrained(tmp_path / "a")
    in_memory.save_pretrained(tmp_path / "a", overwrite=True)  # nothing is read from there
    loaded = Basis.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match="a is where this basis is read from"):
        loaded.save_pretrained(tmp_path / "a", overwrite=True)
    loaded.save_pretrained(tmp_path / "b", overwrite=True)
    for name in ("a", "b"):
        assert torch.equal(
            Basis.from_pretrained(tmp_path / name).maps["layers.0"].dense(), loaded.maps["layers.0"].dense()
        )


@pytest.mark.parametrize("center", ["init", "mean", "none"])
def test_written_as_it_is_found_it_is_the_same_basis(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, center: Any
) -> None:
    trajectory = wander(tower, by_layer(tower), 5)
    in_memory = svd_basis(trajectory, rank=3, center=center)
    on_disk = svd_basis(trajectory, rank=3, center=center, folder=tmp_path / "basis")
    assert on_disk.location == tmp_path / "basis"
    assert (
        on_disk.content_hash() == in_memory.content_hash() == Basis.from_pretrained(tmp_path / "basis").content_hash()
    )
    in_memory.save_pretrained(tmp_path / "saved")
    for name in ("manifest.json", "block-000.safetensors", "block-001.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "basis" / name).read_bytes()
    with pytest.raises(InputError, match="overwrite"):
        svd_basis(trajectory, rank=3, folder=tmp_path / "basis")
    monkeypatch.setattr("tinyspan.linalg.CACHED", 5 * 7)  # several pieces a block
    monkeypatch.setattr("tinyspan.linalg.NARROW", 1)
    svd_basis(trajectory, rank=3, center=center, folder=tmp_path / "basis", overwrite=True)
    for block in trajectory.partition:
        pieced, whole = (
            basis.maps[block.name].tensors()["directions"]
            for basis in (Basis.from_pretrained(tmp_path / "basis"), in_memory)
        )
        torch.testing.assert_close(pieced, whole, rtol=0, atol=1e-6)


def test_a_flipped_bit_is_noticed_when_the_block_is_read(tower: Tower, tmp_path: Path) -> None:
    random_basis(by_layer(tower), 2).save_pretrained(tmp_path / "b")
    file = tmp_path / "b/block-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    loaded = Basis.from_pretrained(tmp_path / "b")
    loaded.maps["layers.0"]
    with pytest.raises(StorageError, match=r"block-001\.safetensors is damaged"):
        loaded.maps["layers.1"]


def test_empty_basis_has_no_directions(tower: Tower) -> None:
    basis = empty_basis(by_layer(tower))
    assert basis.rank == 0
    assert not basis.matvec({block.name: torch.zeros(0) for block in basis.partition})["layers.0"].any()


def test_an_interrupted_discovery_keeps_its_blocks(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path
) -> None:
    trajectory = wander(tower, by_module(tower), points=4)
    whole = svd_basis(trajectory, 3, folder=tmp_path / "whole")
    found: list[str] = []

    def interrupted(blocks: Iterable[Block], after: int | None = None) -> Iterator[Block]:
        for index, block in enumerate(blocks):
            if index == after:
                raise KeyboardInterrupt
            found.append(block.name)
            yield block

    with pytest.raises(Interrupted, match=r"keeps 2 blocks; the same command goes on"):
        svd_basis(trajectory, 3, folder=tmp_path / "b", progress=partial(interrupted, after=2))
    with pytest.raises(InputError, match=r"unfinished work with construction\.rank 3, where this has 2"):
        svd_basis(trajectory, 2, folder=tmp_path / "b")
    with pytest.raises(InputError, match="is not a basis"):
        Basis.from_pretrained(tmp_path / "b")
    kept = (tmp_path / "b/block-001.safetensors").stat().st_mtime_ns
    (tmp_path / "b/block-000.safetensors").write_bytes(b"damaged")  # noticed, and made again
    assert svd_basis(trajectory, 3, folder=tmp_path / "b").content_hash() == whole.content_hash()
    assert (tmp_path / "b/block-001.safetensors").stat().st_mtime_ns == kept
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_an_interrupted_sparse_discovery_does_not_go_on_dense(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path
) -> None:
    def interrupted(blocks: Iterable[Block]) -> Iterator[Block]:
        yield next(iter(blocks))
        raise KeyboardInterrupt

    trajectory = wander(tower, by_layer(tower), points=4)
    with pytest.raises(Interrupted, match="keeps 1 block;"):
        svd_basis(trajectory, 2, density=0.5, folder=tmp_path / "b", progress=interrupted)
    with pytest.raises(InputError, match=r"unfinished work with construction\.density 0\.5, where this has None"):
        svd_basis(trajectory, 2, folder=tmp_path / "b")


def test_a_block_is_written_before_its_memory_is_used_again(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are copied and hashed so slowly that the next block, of the same shape, could be computed meanwhile."""
    trajectory = wander(tower, by_layer(tower), points=4)
    in_memory = svd_basis(trajectory, 2)

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*arguments: Any) -> Any:
            time.sleep(0.2)
            return function(*arguments)

        return slowly

    monkeypatch.setattr("tinyspan.bases.discovery.save_tensors", slow(save_tensors))
    monkeypatch.setattr("tinyspan.bases.discovery.file_entry", slow(file_entry))
    on_disk = svd_basis(trajectory, 2, folder=tmp_path / "b")
    for block in trajectory.partition:
        found, expected = (basis.maps[block.name].tensors() for basis in (on_disk, in_memory))
        assert torch.equal(found["directions"], expected["directions"])


def test_other_points_are_another_basis(tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path) -> None:
    trajectory = wander(tower, by_layer(tower), points=4)
    for run in (trajectory, *map(trajectory.with_points, ([0, 1, 2, 2], [0, 1], [2, 3]))):
        found, expected = svd_basis(run, 2, folder=tmp_path / "b", overwrite=True), svd_basis(run, 2)
        assert found.parents == expected.parents
        for block in trajectory.partition:
            assert torch.equal(found.maps[block.name].tensors()["directions"], expected.maps[block.name].directions)
    links = [run.content_hash() for run in (trajectory, trajectory.with_points([0, 1]), trajectory.with_points([1, 0]))]
    assert len({*links}) == 3


def test_a_complete_basis_is_read_instead_of_computed_and_another_one_is_not(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path
) -> None:
    run, folder = wander(tower, by_layer(tower), points=4), tmp_path / "b"

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}

    svd_basis(run, 2, folder=folder)
    first = written()
    for other, options in (
        (run, {"rank": 3}),
        (run, {"rank": 2, "center": "none"}),
        (run, {"rank": 2, "dtype": torch.bfloat16}),
        (run.with_partition(run.recorded.as_one_block()), {"rank": 2}),
    ):
        made = svd_basis(run, 2, folder=folder, overwrite=True)
        assert written() == first
        assert made.partition == run.partition
        changed = svd_basis(other, folder=folder, overwrite=True, **options)
        assert changed.partition == other.partition
        assert changed.content_hash() != made.content_hash()
        assert (changed.rank, changed.construction["center"]) == (options["rank"], options.get("center", "init"))
        svd_basis(run, 2, folder=folder, overwrite=True)
        first = written()


def test_a_still_run_leaves_no_half_basis(tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path) -> None:

    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "still")
    for step in range(3):
        recorder.record(step)
    for center in ("init", "mean"):
        with pytest.warns(UserWarning, match="does not move"), pytest.raises(InputError, match="was the model trained"):
            svd_basis(recorder.trajectory(), rank=2, center=center, folder=tmp_path / "b")  # type: ignore[arg-type]
        assert not (tmp_path / "b").exists()
    with pytest.warns(UserWarning, match="'layers.[01]' does not move, so its one direction is theta_0 itself"):
        basis = svd_basis(recorder.trajectory(), rank=1, center="none", folder=tmp_path / "b")
    assert basis.rank == 1


@pytest.mark.parametrize("sick", [torch.nan, torch.inf])
def test_sick_points_and_directions_are_refused(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path, sick: float
) -> None:
    partition = by_layer(tower)
    directions = {block.name: torch.eye(2, block.numel) for block in partition}
    directions["layers.1"][1, 3] = sick
    with pytest.raises(InputError, match=r"block 'layers\.1': expected directions of finite .* got NaN or infinite"):
        Basis.from_directions(partition, directions)
    with pytest.raises(InputError, match=r"got torch\.int64"):
        Basis.from_directions(
            partition, {block.name: torch.eye(2, block.numel, dtype=torch.int64) for block in partition}
        )

    trajectory = wander(tower, partition)  # a point that some other program wrote
    point = trajectory.folder / "points/000002.safetensors"
    tensors = load_file(point)
    tensors["layers.1.norm.bias"][2] = sick
    journal = trajectory.folder / "points.jsonl"
    cut_lines(journal, 2)
    link = read_lines(journal, trajectory.manifest.content_hash())[1]
    for step, path in ((1, point), (2, trajectory.folder / "points/000003.safetensors")):
        entry = write_tensors(path, tensors if path == point else load_file(path))
        link = append_line(journal, link, {"step": step, **entry.model_dump()})
    with pytest.raises(InputError, match=r"block 'layers\.1': the points hold NaN or infinite numbers"):
        svd_basis(Trajectory(trajectory.folder), rank=2)


def test_what_cannot_be_stacked_is_named(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    one = wander(tower, by_layer(tower), points=2, name="one")
    modules = wander(tower, by_module(tower), points=2, name="modules")
    with pytest.raises(
        MismatchError, match=r"expected .*in block 'layers\.0', found .*in block 'layers\.0\.inner'; group it"
    ):
        svd_basis([one, modules], rank=2)
    assert svd_basis([one, modules.with_partition(one.partition)], rank=2).rank == 2
    short = wander(Tower(1), by_layer(Tower(1)), points=2, name="short")
    with pytest.raises(MismatchError, match=r"expected 'layers\.1\.inner\.weight' .* found nothing"):
        svd_basis([one, short], rank=2)
    half = wander(Tower().float(), by_layer(Tower().float()), points=2, name="half")
    with pytest.raises(MismatchError, match=r"torch\.float64 in block .* found .* torch\.float32"):
        svd_basis([one, half], rank=2)
    none = wander(tower, by_layer(tower), points=0, name="none")
    with pytest.raises(InputError, match=r"at least one point each, got none in .*none"):
        svd_basis([one, none], rank=2)


@pytest.mark.parametrize("center", ["init", "mean", "none"])
@pytest.mark.parametrize("density", [0.5, 0.1])
def test_a_sparse_basis_is_the_dense_svd_of_the_coordinates_that_move_most(
    wander: Callable[..., Trajectory], center: Any, density: float
) -> None:
    trajectory = wander(Tower(), by_layer(Tower()), points=6)
    basis = svd_basis(trajectory, 3, center=center, density=density, dtype=torch.float64)
    for block in trajectory.partition:
        deltas = torch.stack([trajectory.delta(block, index) for index in range(6)])
        order = deltas.square().sum(0).argsort(descending=True)[: round(density * block.numel)].sort().values
        points = deltas + (trajectory.start(block) if center == "none" else 0)
        points = points - (points.mean(0) if center == "mean" else 0)
        v = basis.maps[block.name]
        assert isinstance(v, SparseMap)
        assert torch.equal(v.indices, order)
        _, values, expected = torch.linalg.svd(points[:, order], full_matrices=False)
        torch.testing.assert_close(basis.spectrum[block.name][:3], values[:3], rtol=1e-9, atol=1e-12)
        directions = v.on_support.directions
        torch.testing.assert_close((directions @ expected[:3].T).abs(), torch.eye(3).double(), rtol=0, atol=1e-8)
        assert not v.matvec(torch.ones(3).double())[[i for i in range(block.numel) if i not in order]].any()


def test_given_coordinates_get_the_directions(wander: Callable[..., Trajectory], tmp_path: Path) -> None:
    trajectory = wander(Tower(), by_layer(Tower()))
    places = {block.name: torch.arange(1, block.numel, 7) for block in trajectory.partition}
    basis = svd_basis(trajectory, 2, coordinates=places, folder=tmp_path / "basis")
    assert basis.is_sparse
    for block in trajectory.partition:
        v = basis.maps[block.name]
        assert isinstance(v, SparseMap)
        assert torch.equal(v.indices, places[block.name])
    others = {name: where + 1 for name, where in places.items()}
    assert svd_basis(trajectory, 2, coordinates=others).content_hash() != basis.content_hash()
    assert svd_basis(trajectory, 2, coordinates=places).content_hash() == basis.content_hash()


def test_density_is_in_the_construction_and_one_is_the_dense_basis(wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(Tower(), by_layer(Tower()))
    dense, one, half = (svd_basis(trajectory, 2, **kw) for kw in ({}, {"density": 1.0}, {"density": 0.5}))
    assert dense.content_hash() == one.content_hash() != half.content_hash()
    assert not dense.is_sparse
    assert half.is_sparse
    assert half.construction["density"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_every_format_round_trips(
    wander: Callable[..., Trajectory], tmp_path: Path, dtype: torch.dtype, density: float
) -> None:
    trajectory = wander(Tower(), by_layer(Tower()))
    basis = svd_basis(trajectory, 3, dtype=dtype, density=density)
    written = svd_basis(trajectory, 3, dtype=dtype, density=density, folder=tmp_path / "written")
    basis.save_pretrained(tmp_path / "saved")
    loaded = Basis.from_pretrained(tmp_path / "saved")
    assert loaded.content_hash() == basis.content_hash() == written.content_hash()
    z = {block.name: torch.tensor([1.0, -2.0, 3.0]) for block in basis.partition}
    for name, moved in basis.matvec(z).items():
        assert torch.equal(loaded.matvec(z)[name], moved)
    assert loaded.ranks == basis.ranks


def test_a_sparse_basis_of_a_block_of_which_little_or_nothing_moves(tmp_path: Path) -> None:
    """Only coordinates that move are kept, fewer than the density asks for; a block that rests gets none."""
    tower = Tower()
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "run")
    with torch.no_grad():
        for step in range(3):
            tower.layers[0].inner.bias[step] += 1.0 + step
            recorder.record(step)
    with pytest.warns(UserWarning, match="does not move"):
        basis = svd_basis(recorder.trajectory(), 2, density=0.5, folder=tmp_path / "basis")
    first, second = (basis.maps[block.name] for block in basis.partition)
    assert isinstance(first, SparseMap)
    assert len(first.indices) == 3
    assert second.rank == 0
    assert second.matvec(torch.zeros(0)).shape == (second.size,)
    assert basis.ranks == {"layers.0": 2, "layers.1": 0}


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_random_bases_of_every_format(dtype: torch.dtype, density: float) -> None:
    partition = by_layer(Tower())
    basis = random_basis(partition, 3, density=density, dtype=dtype)
    for block in partition:
        directions = torch.stack([basis.maps[block.name].matvec(e) for e in torch.eye(3)])
        off = 1e-6 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(directions @ directions.T, torch.eye(3), rtol=0, atol=off)
        assert int(directions.any(0).sum()) == round(density * block.numel)
    assert basis.content_hash() == random_basis(partition, 3, density=density, dtype=dtype).content_hash()
    assert basis.content_hash() != random_basis(partition, 3, seed=1, density=density, dtype=dtype).content_hash()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "is not above 0"),
        ({"density": 1.5}, "is not above 0"),
        ({"density": float("nan")}, "is not above 0"),
        ({"density": 0.02}, "raise the density"),
        ({"dtype": torch.int32}, "not in torch.int32"),
        ({"density": 0.5, "coordinates": {}}, "either"),
        ({"coordinates": {}}, "expected integers"),
        ({"coordinates": {"layers.0": torch.tensor([0.5]), "layers.1": torch.tensor([1])}}, "expected integers"),
        ({"coordinates": dict.fromkeys(("layers.0", "layers.1"), torch.tensor([2, 1, 3]))}, "ascending"),
        ({"coordinates": dict.fromkeys(("layers.0", "layers.1"), torch.tensor([1, 2, 84]))}, "from 0 to 83"),
        ({"coordinates": dict.fromkeys(("layers.0", "layers.1"), torch.tensor([1, 2]))}, "rank=3 is above 2"),
    ],
)
def test_impossible_coordinates_are_refused(
    wander: Callable[..., Trajectory], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        svd_basis(wander(Tower(), by_layer(Tower())), 3, **arguments)
    if "coordinates" not in arguments:
        with pytest.raises(InputError, match=message):
            random_basis(by_layer(Tower()), 3, **arguments)


def test_the_repr_of_a_basis_says_what_it_holds(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    blocks = "each of 2 blocks with 168 numbers)"
    assert repr(svd_basis(wander(tower, by_layer(tower)), rank=2)) == f"Basis(svd: 2 directions in {blocks}"
    mixed = {"layers.0": DenseMap(torch.eye(1, 84)), "layers.1": DenseMap(torch.eye(3, 84))}
    assert repr(Basis(by_layer(tower), mixed)) == f"Basis(unnamed: 1 to 3 directions in {blocks}"


def test_an_empty_basis_of_given_directions() -> None:
    basis = Basis.from_directions(
        by_pattern(torch.nn.Linear(4, 1, bias=False), {"all": ".*"}), {"all": torch.zeros(0, 4)}
    )
    assert basis.ranks == {"all": 0}


@pytest.mark.parametrize("center", [None, "means", "Init"])
def test_a_center_that_does_not_exist_is_refused(tower: Tower, wander: Callable[..., Trajectory], center: Any) -> None:
    with pytest.raises(InputError, match=f"expected center to be one of init, mean, none, got {center!r}"):
        svd_basis(wander(tower, by_layer(tower)), 2, center=center)


def test_arguments_may_be_numbers_of_numpy_and_torch(
    tower: Tower, wander: Callable[..., Trajectory], tmp_path: Path
) -> None:
    trajectory = wander(tower, by_layer(tower))
    for name, basis, plain in (
        ("a", random_basis(by_layer(tower), np.int64(2)), random_basis(by_layer(tower), 2)),
        ("b", svd_basis(trajectory, np.int64(2)), svd_basis(trajectory, 2)),
        ("c", *(svd_basis(trajectory, explained_variance=share) for share in (torch.tensor(0.5), 0.5))),
    ):
        basis.save_pretrained(tmp_path / name)
        assert Basis.from_pretrained(tmp_path / name).content_hash() == plain.content_hash()
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "run")
    recorder.record(np.int64(0))
    recorder.finish(np.int64(1))
    assert recorder.trajectory().steps == [0, 1]


def test_random_directions_are_orthonormal_in_the_stored_format(tower: Tower) -> None:
    for map_ in random_basis(by_layer(tower), 5, dtype=torch.float64).maps.values():
        v = map_.dense(torch.float64)
        torch.testing.assert_close(v @ v.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_coordinate_without_a_number_is_among_the_selected_ones() -> None:
    """So that the decomposition refuses it, and no sparse basis leaves it out in silence."""
    scores = torch.tensor([0.5, torch.nan, 2.0, 0.0, 2.0])
    assert top_positions(scores, 1).tolist() == [1]
    assert top_positions(scores, 2).tolist() == [1, 2]
    assert top_positions(scores.nan_to_num(0.0), 2).tolist() == [2, 4]

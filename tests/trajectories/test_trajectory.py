from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from towers import Tower, nudge

from tinyspan import (
    InputError,
    MismatchError,
    StorageError,
    SubspaceModel,
    TinyspanError,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    by_pattern,
    random_basis,
    whole_model,
)
from tinyspan.io.journals import append_line
from tinyspan.io.manifests import file_entry, read_manifest, write_manifest


def test_points_are_deltas_in_order(tower: Tower, tmp_path: Path) -> None:
    partition = by_layer(tower)
    start = {block.name: block.flatten(partition.select(tower)) for block in partition}
    recorder = TrajectoryRecorder(tower, partition, tmp_path / "t")
    for step in range(3):
        nudge(tower, 0.25)
        recorder.record(step)
    trajectory = Trajectory(tmp_path / "t")
    assert (len(trajectory), trajectory.steps) == (3, [0, 1, 2])
    for block in trajectory.partition:
        assert torch.equal(trajectory.start(block), start[block.name])
        for index in range(3):
            expected = torch.full_like(start[block.name], 0.25 * (index + 1))
            torch.testing.assert_close(trajectory.delta(block, index), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_chunks_join_to_the_whole(tower: Tower, wander: Callable[..., Trajectory], size: int) -> None:
    trajectory = wander(tower, by_layer(tower))
    for block in trajectory.partition:
        pieces = list(trajectory.chunks(block, size))
        assert all(deltas.shape[1] <= size for _, deltas in pieces)
        assert torch.equal(torch.cat([start for start, _ in pieces]), trajectory.start(block))
        joined = torch.cat([deltas for _, deltas in pieces], dim=1)
        assert torch.equal(joined, torch.stack([trajectory.delta(block, i) for i in range(3)]))


def test_a_trajectory_without_points_has_empty_chunks(tower: Tower, tmp_path: Path) -> None:
    trajectory = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t").trajectory()
    for block in trajectory.partition:
        pieces = list(trajectory.chunks(block, 7))
        assert torch.equal(torch.cat([start for start, _ in pieces]), trajectory.start(block))
        assert torch.cat([deltas for _, deltas in pieces], dim=1).shape == (0, block.numel)


def test_regrouping_reads_the_same_numbers(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower))
    whole = trajectory.with_partition(whole_model(tower))
    joined = torch.cat([trajectory.delta(block) for block in trajectory.partition])
    assert torch.equal(whole.delta(whole.partition["model"]), joined)
    assert whole.fingerprint() == whole_model(tower).fingerprint(whole_model(tower).select(tower))
    with pytest.raises(InputError, match="holds no points of"):
        trajectory.with_partition(by_layer(Tower(3)))


def test_half_precision_deltas_keep_their_digits(tmp_path: Path) -> None:
    model = Tower().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="half precision"):
        recorder = TrajectoryRecorder(model, by_layer(model), tmp_path / "t")
    nudge(model, 0.5)
    recorder.record(0)
    trajectory = recorder.trajectory()
    assert trajectory.delta(trajectory.partition["layers.0"]).dtype == torch.float32


def test_damage_is_noticed_on_opening(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower))
    point = trajectory.folder / "points/000002.safetensors"
    data = point.read_bytes()
    point.write_bytes(data[:-1])
    with pytest.raises(StorageError, match=r"000002\.safetensors: expected \d+ bytes"):
        Trajectory(trajectory.folder)
    point.unlink()
    with pytest.raises(StorageError, match="is missing"):
        Trajectory(trajectory.folder)


def test_float16_points_beyond_its_range_are_deltas_in_float32(tmp_path: Path) -> None:
    model = Tower().half()
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.fill_(-60000.0)
    with pytest.warns(UserWarning, match="half precision"):
        recorder = TrajectoryRecorder(model, by_layer(model), tmp_path / "t")
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.fill_(60000.0)
    recorder.record(0)
    delta = recorder.trajectory().delta(recorder.partition.blocks[0])
    assert delta.dtype == torch.float32
    assert (delta == 120000.0).all()  # float16 ends at 65504: the end minus theta_0 would be infinite in it
    with torch.no_grad():
        model.layers[0].inner.weight.mul_(2.0)
    with pytest.raises(
        TinyspanError, match=r"step 1: parameter 'layers\.0\.inner\.weight' is NaN or infinite; the 1 points"
    ):
        recorder.record(1)


def test_a_trajectory_without_a_dtype_hashes_as_it_always_did(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(-1.0)
    recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tmp_path / "t")
    for step in range(2):
        with torch.no_grad():
            model.weight += 0.25
        recorder.record(step)
    trajectory = recorder.trajectory()
    assert trajectory.manifest.content_hash() == "4dcbf85be74de0b39bb4dccbaee9d686144330cff975b052113852a8d2136039"
    assert trajectory.content_hash() == "d2ab31c544f2d1b2e3ebffdd41b39b0d69060a5acb2244a7b4f5e34010320123"


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_points_in_another_dtype_than_the_manifest_tells_are_refused(
    tower: Tower, tmp_path: Path, stored: torch.dtype | None
) -> None:
    other = torch.bfloat16 if stored is None else None
    for name, dtype in (("t", stored), ("other", other)):
        TrajectoryRecorder(tower, by_layer(tower), tmp_path / name, dtype=dtype).record(0)
    (tmp_path / "other/points/000001.safetensors").replace(tmp_path / "t/points/000001.safetensors")
    entry = file_entry(tmp_path / "t/points/000001.safetensors")
    (tmp_path / "t/points.jsonl").unlink()
    link = read_manifest(tmp_path / "t").content_hash()
    append_line(tmp_path / "t/points.jsonl", link, {"step": 0, **entry.model_dump()})
    wanted = stored or torch.float64
    with pytest.raises(StorageError, match=f"000001.safetensors is damaged: expected 32 numbers of {wanted}"):
        Trajectory(tmp_path / "t").delta(by_layer(tower).blocks[0])


@pytest.mark.parametrize("dtype", ["float32", "int8", 16, ["bfloat16"], {}, True])
def test_a_manifest_with_a_weird_dtype_is_refused(tower: Tower, tmp_path: Path, dtype: object) -> None:
    TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", dtype=torch.bfloat16).record(0)
    manifest = read_manifest(tmp_path / "t")
    manifest.construction["dtype"] = dtype
    (tmp_path / "t/points.jsonl").unlink()
    write_manifest(tmp_path / "t", manifest)
    for read in (Trajectory, lambda folder: TrajectoryRecorder.resume(tower, by_layer(tower), folder)):
        with pytest.raises(StorageError, match=r"manifest\.json is damaged: expected deltas in bfloat16 or no dtype"):
            read(tmp_path / "t")


def test_blocks_are_taken_by_name_and_a_matrix_has_a_row_per_point(
    tower: Tower, wander: Callable[..., Trajectory]
) -> None:
    trajectory = wander(tower, by_layer(tower))
    for block in trajectory.partition:
        assert torch.equal(trajectory.start(block.name), trajectory.start(block))
        assert torch.equal(trajectory.delta(block.name, 1), trajectory.delta(block, 1))
        assert torch.equal(next(trajectory.chunks(block.name, 3))[1], next(trajectory.chunks(block, 3))[1])
        rows = torch.cat([deltas for _, deltas in trajectory.chunks(block)], dim=1)
        assert torch.equal(trajectory.matrix(block.name), rows)
        assert torch.equal(trajectory.with_points([2]).matrix(block), rows[2:])
        assert trajectory.with_points([]).matrix(block).shape == (0, block.numel)
    selected = trajectory.with_points([0, -1])
    for points in (torch.tensor([0, -1]), np.array([0, -1]), (point for point in (0, -1))):
        other = trajectory.with_points(points)  # type: ignore[arg-type]
        assert (other.steps, other.content_hash()) == (selected.steps, selected.content_hash())
    for mask in (torch.tensor([True, False]), np.array([True, False]), [True, False]):
        with pytest.raises(InputError, match="expected the positions of points, got a mask"):
            trajectory.with_points(mask)  # type: ignore[arg-type]
    for call in (trajectory.start, trajectory.delta, trajectory.matrix):
        with pytest.raises(InputError, match=r"no block 'layers\.9'; the blocks are \['layers\.0', 'layers\.1'\]"):
            call("layers.9")
    with pytest.raises(InputError, match=r"has 3 points, not all of \[0, 3\]"):
        trajectory.with_points([0, 3])
    with pytest.raises(InputError, match="has 3 points, and no point 3"):
        trajectory.delta("layers.0", 3)


def test_a_point_is_loaded_into_a_model(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower))
    other = Tower(seed=1)
    head = other.head.weight.clone()
    weights = trajectory.partition.select(other)
    for index in (None, 0, -1):
        trajectory.load_into(other, index)
        for block in trajectory.partition:
            moved = 0 if index is None else trajectory.delta(block, index)
            assert torch.equal(block.flatten(weights), trajectory.start(block) + moved)
    assert torch.equal(other.head.weight, head)
    with pytest.raises(InputError, match="no point 7"):
        trajectory.load_into(other, 7)
    before = other.layers[0].inner.weight.clone()
    with pytest.raises(MismatchError, match=r"layers\.0\.inner\.weight"):
        trajectory.load_into(Tower(width=5))
    with pytest.raises(MismatchError, match=r"torch\.float64"):
        trajectory.load_into(other.float())
    assert torch.equal(other.layers[0].inner.weight, before.float())


def test_no_point_is_loaded_under_a_subspace_model(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower))
    subspace = SubspaceModel(tower, random_basis(by_layer(tower), 2))
    with pytest.raises(InputError, match="a SubspaceModel writes this model's weights: merge"):
        trajectory.load_into(tower)
    trajectory.load_into(subspace.merge())


def test_points_of_half_precision_are_loaded_into_either_dtype(tmp_path: Path) -> None:
    model = Tower().bfloat16()
    with pytest.warns(UserWarning, match="half precision"):
        recorder = TrajectoryRecorder(model, by_layer(model), tmp_path / "t")
    nudge(model, 0.5)
    recorder.record(0)
    for target in (Tower(seed=1).bfloat16(), Tower(seed=1).float()):
        recorder.trajectory().load_into(target)
        weight = target.layers[1].outer.weight
        torch.testing.assert_close(weight.float(), model.layers[1].outer.weight.float(), rtol=0.01, atol=0)


def test_the_repr_of_a_trajectory_says_what_it_holds(tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower))
    assert repr(trajectory) == f"Trajectory('{trajectory.folder}': 3 points of 2 blocks with 168 numbers)"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from towers import Tower

from tinyspan import (
    InputError,
    MismatchError,
    StorageError,
    TinyspanError,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    trajectory_from_checkpoints,
    whole_model,
)
from tinyspan.storage import write_tensors


def nudge(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


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


def test_every_counts_steps_as_enumerate_does(tower: Tower, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", every=3)
    for step in range(10):
        recorder.record(step)
    assert recorder.trajectory().steps == [2, 5, 8]
    with pytest.raises(InputError, match="at least 1"):
        TrajectoryRecorder(tower, by_layer(tower), tmp_path / "u", every=0)


def test_steps_must_ascend_and_folders_are_not_overwritten(tower: Tower, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    recorder.record(5)
    with pytest.raises(InputError, match="does not come after step 5"):
        recorder.record(5)
    with pytest.raises(InputError, match="earlier output"):
        TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    assert len(TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", overwrite=True).trajectory()) == 0


def test_nan_is_refused_and_the_points_before_it_stay(tower: Tower, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    recorder.record(0)
    with torch.no_grad():
        tower.layers[1].norm.bias[0] = torch.nan
    with pytest.raises(TinyspanError, match=r"step 1: parameter 'layers\.1\.norm\.bias' is NaN"):
        recorder.record(1)
    assert len(Trajectory(tmp_path / "t")) == 1


def test_a_run_goes_on_after_a_line_that_was_interrupted(tower: Tower, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    recorder.record(0)
    del recorder
    with (tmp_path / "t/points.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "byt')
    recorder = TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t")
    recorder.record(1)
    assert Trajectory(tmp_path / "t").steps == [0, 1]


def test_half_precision_deltas_keep_their_digits(tmp_path: Path) -> None:
    model = Tower().to(torch.bfloat16)
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


@pytest.mark.parametrize("prefix", ["", "base.", "-"])
def test_checkpoints_become_points(tmp_path: Path, prefix: str) -> None:
    """Names may have the base model's prefix in excess, or lack the one the model has."""
    inner = Tower()
    model = nn.ModuleDict({"base": inner}) if prefix == "-" else inner
    partition = by_layer(model)
    folders = []
    for index in range(2):
        nudge(inner, 0.5)
        named = {f"{prefix.strip('-')}{name}": value for name, value in inner.named_parameters()}
        write_tensors(tmp_path / f"c{index}/model.safetensors", named)
        folders.append(tmp_path / f"c{index}")
    nudge(inner, -1.0)
    trajectory = trajectory_from_checkpoints(model, partition, folders, tmp_path / "t")
    for index in range(2):
        delta = trajectory.delta(trajectory.partition.blocks[0], index)
        torch.testing.assert_close(delta, torch.full_like(delta, 0.5 * (index + 1)), rtol=0, atol=1e-14)


def test_foreign_checkpoints_are_refused_before_anything_is_written(tower: Tower, tmp_path: Path) -> None:
    partition = by_layer(tower)
    write_tensors(tmp_path / "c/model.safetensors", {"other": torch.ones(1)})
    with pytest.raises(MismatchError, match="no tensor for the parameter"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "c"], tmp_path / "t")
    write_tensors(tmp_path / "d/model.safetensors", dict(Tower(2, width=5).named_parameters()))
    with pytest.raises(MismatchError, match="has shape"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "d"], tmp_path / "t")
    write_tensors(tmp_path / "good/model.safetensors", dict(tower.named_parameters()))
    with pytest.raises(MismatchError, match="no tensor for the parameter"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "good", tmp_path / "c"], tmp_path / "t")
    write_tensors(tmp_path / "half/model.safetensors", dict(Tower().bfloat16().named_parameters()))
    with pytest.raises(MismatchError, match="bfloat16"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "half"], tmp_path / "t")
    two = nn.ModuleDict({"encoder": Tower(), "decoder": Tower()})
    with pytest.raises(MismatchError, match="would serve as"):
        trajectory_from_checkpoints(two, by_layer(two), [tmp_path / "good"], tmp_path / "t")
    full = trajectory_from_checkpoints(tower, partition, [tmp_path / "good"], tmp_path / "full")
    (tmp_path / "good").rename(full.folder / "model")
    with pytest.raises(InputError, match="is read and lies in"):
        trajectory_from_checkpoints(tower, partition, [full.folder / "model"], full.folder, overwrite=True)
    with pytest.raises(InputError, match="at least one checkpoint"):
        trajectory_from_checkpoints(tower, partition, [], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_tied_weights_are_found_under_either_name(tower: Tower, tmp_path: Path) -> None:
    tower.layers[1].inner.weight = tower.layers[0].inner.weight
    named = dict(tower.named_parameters(remove_duplicate=False))
    del named["layers.0.inner.weight"]
    write_tensors(tmp_path / "c/model.safetensors", named)
    trajectory = trajectory_from_checkpoints(tower, by_layer(tower), [tmp_path / "c"], tmp_path / "t")
    assert all(not trajectory.delta(block).any() for block in trajectory.partition)


def recorded(model: nn.Module, folder: Path, steps: int, every: int = 1) -> TrajectoryRecorder:
    recorder = TrajectoryRecorder(model, by_layer(model), folder, every=every)
    for step in range(steps):
        nudge(model, 0.25)
        recorder.record(step)
    return recorder


def test_an_interrupted_trajectory_goes_on(tower: Tower, tmp_path: Path) -> None:
    whole = recorded(Tower(), tmp_path / "whole", 5).trajectory()
    recorded(tower, tmp_path / "t", 3)
    (tmp_path / "t/points/000004.safetensors").write_bytes(b"killed before its line was written")
    with (tmp_path / "t/points.jsonl").open("ab") as journal:
        journal.write(b'{"step": 3, "byt')
    recorder = TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t")
    assert recorder.steps == [0, 1, 2]
    for step in (3, 4):
        nudge(tower, 0.25)
        recorder.record(step)
    assert recorder.trajectory().content_hash() == whole.content_hash()
    assert (tmp_path / "t/points.jsonl").read_bytes() == (tmp_path / "whole/points.jsonl").read_bytes()


def test_points_made_again_stay_and_others_are_replaced(tower: Tower, tmp_path: Path) -> None:
    first, second = Tower(), Tower()
    recorded(tower, tmp_path / "t", 4).seal()
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "t/points").iterdir())]
    nudge(first, 0.25)
    recorder = TrajectoryRecorder.resume(first, by_layer(first), tmp_path / "t")
    for step in (1, 2, 3):  # the run goes on after step 0 and takes the same way
        nudge(first, 0.25)
        recorder.record(step)
    assert [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "t/points").iterdir())] == before
    nudge(second, 0.25)
    other = TrajectoryRecorder.resume(second, by_layer(second), tmp_path / "t")
    nudge(second, 0.125)
    other.record(1)  # another way: what comes after it is gone
    trajectory = other.trajectory()
    assert trajectory.steps == [0, 1]
    values = [trajectory.delta(trajectory.partition.blocks[0], index)[0].item() for index in range(2)]
    assert values == pytest.approx([0.25, 0.375])


def test_a_resumed_trajectory_must_be_of_the_same_model(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "t", 1).seal()
    TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t")  # in the middle of a run theta_0 is not there
    with pytest.raises(MismatchError, match="another theta_0"):
        TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t", done=0)
    with pytest.raises(MismatchError, match="another partition"):
        TrajectoryRecorder.resume(tower, whole_model(tower), tmp_path / "t")
    with pytest.raises(InputError, match="is no trajectory"):
        TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "nothing")


def test_lost_points_are_noticed(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "open", 3)
    recorded(Tower(), tmp_path / "sealed", 3).seal()
    for name in ("open", "sealed"):
        journal = tmp_path / name / "points.jsonl"
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[: 1 if name == "open" else 2]))
        with pytest.raises(StorageError, match=r"points\.jsonl is damaged"):
            Trajectory(tmp_path / name)


def test_float16_points_beyond_its_range_are_deltas_in_float32(tmp_path: Path) -> None:
    model = Tower().half()
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.fill_(-60000.0)
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


def test_a_sick_theta_0_is_refused_before_anything_is_written(tower: Tower, tmp_path: Path) -> None:
    with torch.no_grad():
        tower.layers[0].norm.weight[1] = torch.nan
    with pytest.raises(InputError, match=r"'layers\.0\.norm\.weight' is NaN or infinite before any training"):
        TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_end_of_a_resumed_run_is_a_point_even_if_the_earlier_one_ended_there(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "t", 5, every=3).finish(4)
    other = Tower()
    for _ in range(3):
        nudge(other, 0.25)
    recorder = TrajectoryRecorder.resume(other, by_layer(other), tmp_path / "t", every=3, done=3)
    for step in (3, 4):
        nudge(other, 1.0)
        recorder.record(step)
    recorder.finish(4)
    trajectory = Trajectory(tmp_path / "t")
    assert trajectory.steps == [2, 4]
    assert trajectory.delta(trajectory.partition.blocks[0])[0].item() == pytest.approx(2.75)


def test_another_runs_points_are_not_taken_for_ones_own(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "t", 3)
    other = Tower()
    nudge(other, 0.5)
    before = (tmp_path / "t/points.jsonl").read_bytes()
    with pytest.raises(MismatchError, match="is of another run: its point after step 1"):
        TrajectoryRecorder.resume(other, by_layer(other), tmp_path / "t", done=1)
    TrajectoryRecorder.resume(other, by_layer(other), tmp_path / "t", done=2)
    assert (tmp_path / "t/points.jsonl").read_bytes() == before

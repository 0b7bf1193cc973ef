import copy
import errno
import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from towers import Tower, nudge

import tinyspan.trajectories.points
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
from tinyspan.io.manifests import FileEntry
from tinyspan.io.tensors import write_tensors
from tinyspan.trajectories.points import bytes_of, trajectory_bytes


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


def test_weights_may_be_given(tower: Tower, tmp_path: Path) -> None:
    partition = by_layer(tower.float())
    recorder = TrajectoryRecorder(tower, partition, tmp_path / "given")
    moved = {name: parameter.detach() + 1 for name, parameter in tower.named_parameters()}
    name = next(iter(partition.parameters())).name
    flat = moved | {name: moved[name].reshape(1, -1)}
    whole = moved | {name: moved[name].long()}
    for wrong, reason in (({}, "got none"), (flat, r"of shape .*, got .* \(1, "), (whole, "got torch.int64")):
        with pytest.raises(MismatchError, match=f"step 4: .*{name}.* {reason}"):
            recorder.append(4, wrong)
    recorder.append(4, {name: value.double() for name, value in moved.items()})
    recorder.seal()
    found = recorder.trajectory()
    assert list(found.steps) == [4]
    for block in partition:
        torch.testing.assert_close(found.delta(block), torch.ones(block.numel))  # theta_0 + 1 is rounded


def test_the_end_is_recorded_once_from_a_snapshot_and_a_run_may_restart(tower: Tower, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", every=2)
    recorder.record(1)
    nudge(tower, 0.5)
    copies = recorder.snapshot()
    nudge(tower, 1.0)
    for _ in range(2):
        recorder.end(2, copies)
        assert recorder.steps == [1, 2]
    block = recorder.partition.blocks[0]
    delta = recorder.trajectory().delta(block, 1)
    torch.testing.assert_close(delta, torch.full_like(delta, 0.5), rtol=0, atol=1e-14)
    recorder.restart()
    assert recorder.steps == []
    recorder.finish(0)
    trajectory = recorder.trajectory()
    assert trajectory.steps == [0]
    torch.testing.assert_close(trajectory.delta(block), torch.full_like(delta, 1.5), rtol=0, atol=1e-14)


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


def test_parameters_that_others_take_the_place_of_are_followed(tower: Tower, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    tower.load_state_dict({name: value.clone() for name, value in tower.state_dict().items()}, assign=True)
    for step in range(2):
        nudge(tower, 1.0)
        recorder.record(step)
    for layer in tower.layers:  # PEFT wraps linear layers so: the names are others then
        layer.inner = nn.Sequential(layer.inner)
    nudge(tower, 1.0)
    recorder.finish(2)
    trajectory = recorder.trajectory()
    block = trajectory.partition.blocks[0]
    assert [float(trajectory.delta(block, index).mean()) for index in range(3)] == pytest.approx([1, 2, 3])


@pytest.mark.parametrize(("every", "end", "steps"), [(8, 15, [3, 7, 15]), (4, 15, [3, 7, 11, 15]), (4, 9, [3, 7, 9])])
def test_points_that_the_resumed_run_passes_by_are_not_kept(
    tower: Tower, tmp_path: Path, every: int, end: int, steps: list[int]
) -> None:
    """The first run was killed after step 11 and the second goes on from step 7, another way."""
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", every=4)
    for step in range(12):
        nudge(tower, 1.0)
        recorder.record(step)
    recorder.flush()
    del recorder
    nudge(tower, -4.0)
    again = TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t", every=every, done=8)
    for step in range(8, end + 1):
        nudge(tower, -1.0)
        again.record(step)
    again.finish(end)
    trajectory = Trajectory(tmp_path / "t")
    assert trajectory.steps == steps
    block = trajectory.partition.blocks[0]
    found = [float(trajectory.delta(block, index).mean()) for index in range(len(steps))]
    assert found == pytest.approx([step + 1 if step < 8 else 15 - step for step in steps])


def test_a_resumed_trajectory_must_be_of_the_same_model(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "t", 1).seal()
    TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t")  # in the middle of a run theta_0 is not there
    with pytest.raises(MismatchError, match="another theta_0"):
        TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t", done=0)
    with pytest.raises(MismatchError, match="another partition"):
        TrajectoryRecorder.resume(tower, whole_model(tower), tmp_path / "t")
    with pytest.raises(InputError, match="is not a trajectory"):
        TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "nothing")


def test_a_folder_that_is_no_trajectory_is_not_created(tower: Tower, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a trajectory"):
        TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "mistyped")
    assert not (tmp_path / "mistyped").exists()


def test_lost_points_are_noticed(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "open", 3)
    recorded(Tower(), tmp_path / "sealed", 3).seal()
    for name in ("open", "sealed"):
        journal = tmp_path / name / "points.jsonl"
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[: 1 if name == "open" else 2]))
        with pytest.raises(StorageError, match=r"points\.jsonl is damaged"):
            Trajectory(tmp_path / name)


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


def test_no_point_comes_after_the_end_of_a_resumed_run(tower: Tower, tmp_path: Path) -> None:
    """It is unknown how far the model was trained, and the interrupted run was to be longer."""
    partition, start = by_layer(tower), copy.deepcopy(tower)
    recorder = TrajectoryRecorder(tower, partition, tmp_path)
    for step in range(4):
        nudge(tower, 0.25)
        recorder.record(step)
    recorder.flush()
    del recorder
    resumed = TrajectoryRecorder.resume(start, partition, tmp_path)
    for step in range(2):
        nudge(start, 0.25)
        resumed.record(step)
    resumed.finish(1)
    assert Trajectory(tmp_path).steps == [0, 1]


def test_another_runs_points_are_not_taken_for_ones_own(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "t", 3)
    other = Tower()
    nudge(other, 0.5)
    before = (tmp_path / "t/points.jsonl").read_bytes()
    with pytest.raises(MismatchError, match="is of another run: its point at step 0"):
        TrajectoryRecorder.resume(other, by_layer(other), tmp_path / "t", done=1)
    TrajectoryRecorder.resume(other, by_layer(other), tmp_path / "t", done=2)
    assert (tmp_path / "t/points.jsonl").read_bytes() == before


class Gate:
    """Holds the write of a point until it is opened; `seen` counts the points that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.seen, self.busy, self.most = threading.Event(), 0, 0, 0
        monkeypatch.setattr(tinyspan.trajectories.points, "write_tensors", self._write)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> FileEntry:
        if path.parent.name == "points":
            self.seen, self.busy = self.seen + 1, self.busy + 1
            self.most = max(self.most, self.busy)
            assert self.open.wait(10)
            self.busy -= 1
        return write_tensors(path, tensors)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def content(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".holder"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_same_bits_as_one_after_the_other(tmp_path: Path, dtype: torch.dtype | None) -> None:
    for name in ("behind", "flushed"):
        tower, generator = Tower(), torch.Generator().manual_seed(0)
        recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / name, dtype=dtype)
        for step in range(8):
            with torch.no_grad():
                for parameter in tower.parameters():
                    parameter += torch.randn(parameter.shape, generator=generator)
            recorder.record(step)
            if name == "flushed":
                recorder.flush()
                assert len((tmp_path / "flushed/points.jsonl").read_bytes().splitlines()) == step + 1
        recorder.finish(7)
    assert content(tmp_path / "behind") == content(tmp_path / "flushed")
    assert len(content(tmp_path / "behind")) == 12


@pytest.mark.parametrize("how", ["record", "flush", "finish", "trajectory"])
def test_one_point_is_written_at_a_time_and_the_next_waits(tower: Tower, tmp_path: Path, gate: Gate, how: str) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    nudge(tower, 0.25)
    recorder.record(0)  # returns, though nothing can be written
    nudge(tower, 0.25)
    arguments = [1] if how in ("record", "finish") else []
    waiting = threading.Thread(target=getattr(recorder, how), args=arguments)
    waiting.start()
    waiting.join(0.2)
    assert (waiting.is_alive(), gate.seen) == (True, 1)
    assert not (tmp_path / "t/points.jsonl").exists()
    nudge(tower, 0.25)
    gate.open.set()
    waiting.join(10)
    recorder.flush()
    assert (gate.seen, gate.most) == (1 + len(arguments), 1)
    trajectory = recorder.trajectory()
    values = [trajectory.delta(trajectory.partition.blocks[0], index)[0].item() for index in range(len(trajectory))]
    # as the weights were when the first was recorded; the next is taken after the wait, so there are never two copies
    assert values == pytest.approx([0.25, 0.75][: 1 + len(arguments)])


def test_whoever_opens_a_trajectory_in_this_process_sees_every_point(tower: Tower, tmp_path: Path, gate: Gate) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    (tmp_path / "link").symlink_to("t")
    recorder.record(0)
    threading.Timer(0.1, gate.open.set).start()
    assert Trajectory(tmp_path / "link").steps == [0]
    gate.open.clear()
    recorder.record(1)
    threading.Timer(0.1, gate.open.set).start()
    again = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", overwrite=True)
    recorder.flush()
    assert again.trajectory().steps == []


@pytest.mark.parametrize("tells", ["record", "other step", "flush", "finish", "seal", "trajectory"])
def test_a_failed_write_is_told_at_the_next_call_and_the_folder_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tells: str
) -> None:
    whole = recorded(Tower(), tmp_path / "whole", 8, every=2).trajectory()
    tower = Tower()
    recorder = recorded(tower, tmp_path / "t", 4, every=2)
    recorder.flush()
    calls: dict[str, Callable[[], object]] = {
        "record": lambda: recorder.record(7),
        "other step": lambda: recorder.record(6),
        "flush": recorder.flush,
        "finish": lambda: recorder.finish(7),
        "seal": recorder.seal,
        "trajectory": recorder.trajectory,
    }

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tinyspan.io.tensors.save_file", full)
    for step in (4, 5):
        nudge(tower, 0.25)
        recorder.record(step)
    assert recorder.steps == [1, 3]  # waits
    monkeypatch.undo()
    nudge(tower, 0.25)
    nudge(tower, 0.25)
    with pytest.raises(StorageError, match=r"000003\.safetensors could not be written: the disk or quota is full"):
        calls[tells]()
    assert Trajectory(tmp_path / "t").steps == [1, 3]  # nothing after the one that failed
    recorder.flush()  # it is told once
    del recorder, calls
    other = Tower()
    for _ in range(4):
        nudge(other, 0.25)
    recorder = TrajectoryRecorder.resume(other, by_layer(other), tmp_path / "t", every=2, done=4)
    for step in range(4, 8):
        nudge(other, 0.25)
        recorder.record(step)
    assert recorder.trajectory().content_hash() == whole.content_hash()


def test_points_after_a_failed_journal_line_have_their_own_names(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise StorageError("the journal is gone")

    recorder = recorded(tower, tmp_path / "t", 1)
    recorder.flush()
    monkeypatch.setattr(tinyspan.trajectories.points, "append_line", fail)
    nudge(tower, 0.25)
    recorder.record(1)
    assert recorder.steps == [0]
    monkeypatch.undo()
    with pytest.raises(StorageError, match="the journal is gone"):
        recorder.record(2)
    for step in (2, 3):
        nudge(tower, 0.25)
        recorder.record(step)
    trajectory = recorder.trajectory()
    assert trajectory.steps == [0, 2, 3]
    assert [path.name[:6] for path in sorted((tmp_path / "t/points").iterdir())] == ["000001", "000002", "000003"]
    for index, moved in enumerate((0.25, 0.75, 1.0)):
        delta = trajectory.delta("layers.0", index)
        torch.testing.assert_close(delta, torch.full_like(delta, moved))


def test_a_write_that_fails_while_the_next_point_waits_is_told(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        time.sleep(0.1)
        raise StorageError("the disk is gone")

    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    monkeypatch.setattr(tinyspan.trajectories.points, "write_tensors", fail)
    recorder.record(0)
    monkeypatch.undo()
    with pytest.raises(StorageError, match="the disk is gone"):
        recorder.record(1)
    assert recorder.trajectory().steps == []


def test_a_failed_write_that_nobody_asks_for_is_warned_of(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    monkeypatch.setattr(tinyspan.trajectories.points, "write_tensors", lambda *_: 1 / 0)
    recorder.record(0)
    with pytest.warns(UserWarning, match="the last point was not recorded: division by zero"):
        del recorder
    assert not (tmp_path / "t/.holder").exists()


def test_a_system_without_threads_writes_at_once(tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
        recorder.record(0)
        assert (tmp_path / "t/points.jsonl").is_file()
        patch.setattr(tinyspan.trajectories.points, "write_tensors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recorder.record(1)
    recorder.record(1)
    assert recorder.trajectory().steps == [0, 1]


def test_a_write_keeps_neither_model_nor_recorder_and_the_collector_may_come_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder, in a ring that only the collector frees, is found by it in the thread that writes its point."""
    tower, dropped, found = Tower(), threading.Event(), list[object]()
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    recorder.ring = recorder  # type: ignore[attr-defined]
    alive = weakref.ref(tower), weakref.ref(recorder)

    def write(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
        assert dropped.wait(10)
        gc.collect()
        found.extend(reference() for reference in alive)
        found.append((tmp_path / "t/.holder").exists())
        return write_tensors(path, tensors)

    monkeypatch.setattr(tinyspan.trajectories.points, "write_tensors", write)
    gc.disable()
    try:
        recorder.record(0)
        del tower, recorder
        dropped.set()
        assert Trajectory(tmp_path / "t").steps == [0]
    finally:
        gc.enable()
    assert found == [None, None, True]
    assert not (tmp_path / "t/.holder").exists()  # it was let go of, after the write
    assert not [thread for thread in threading.enumerate() if thread.name == "tinyspan point"]


LAST = """
import json, os, sys, time
import tinyspan.trajectories.points
from towers import Tower, nudge
from tinyspan import TrajectoryRecorder, by_layer

write = tinyspan.trajectories.points.write_tensors
def slowly(path, tensors):
    if path.parent.name == "points":
        time.sleep(0.3)
    return write(path, tensors)
tinyspan.trajectories.points.write_tensors = slowly

codes = {}
for name, ending in json.loads(sys.argv[2]).items():
    if (process := os.fork()) == 0:
        folder, tower = f"{sys.argv[1]}/{name}", Tower()
        recorder = TrajectoryRecorder(tower, by_layer(tower), folder)
        recorder.record(0)
        exec(ending)
        sys.exit()
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(json.dumps(codes))
"""


ENDS = {
    "end": "",
    "error": "1 / 0",
    "dropped": "del recorder",
    "daemon": "import threading\nthread = threading.Thread(target=recorder.record, args=(1,), daemon=True)\n"
    "thread.start()\nthread.join()",
    "at exit": "import atexit\natexit.register(recorder.record, 1)",
    "fork": "child = os.fork()\nif child == 0:\n    recorder.flush()\n    del recorder\n    os._exit(7)\n"
    "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    "assert not os.path.exists(folder + '/points.jsonl')",
}


@pytest.mark.processes
def test_a_process_that_ends_by_itself_writes_its_last_point(tmp_path: Path) -> None:
    """However it ends. A forked child, as of a DataLoader, neither waits for its parent's thread nor ends the write."""
    words = [sys.executable, "-c", LAST, str(tmp_path), json.dumps(ENDS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert json.loads(done.stdout) == {name: int(name == "error") for name in ENDS}, done.stderr
    for name in ENDS:
        assert Trajectory(tmp_path / name).steps == ([0, 1] if name in ("daemon", "at exit") else [0]), name


def test_bfloat16_deltas_take_half_the_bytes_and_are_rounded_once(tmp_path: Path) -> None:
    for name, dtype in (("whole", None), ("half", torch.bfloat16)):
        tower, generator = Tower(width=64).float(), torch.Generator().manual_seed(0)
        recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / name, dtype=dtype)
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
        recorder.record(0)
        recorder.seal()
    whole, half = Trajectory(tmp_path / "whole"), Trajectory(tmp_path / "half")
    for block in whole.partition:
        assert torch.equal(whole.start(block), half.start(block))
        exact, rounded = whole.delta(block), half.delta(block)
        assert torch.equal(rounded, exact.bfloat16().float())
        assert rounded.dtype == torch.float32
        assert ((rounded - exact).abs() <= 2**-8 * exact.abs()).all()
        assert not torch.equal(rounded, exact)
        assert torch.equal(torch.cat([deltas[0] for _, deltas in half.chunks(block, 77)]), rounded)
    a, b = ((tmp_path / name / "points/000001.safetensors").stat().st_size for name in ("whole", "half"))
    assert 0.49 < b / a < 0.52
    assert half.manifest.content_hash() != whole.manifest.content_hash()
    assert half.manifest.construction == {"dtype": "bfloat16"}


def test_a_trajectory_goes_on_with_its_dtype_alone(tower: Tower, tmp_path: Path) -> None:
    partition = by_layer(tower)
    for name, dtype, other in (("whole", None, torch.bfloat16), ("half", torch.bfloat16, None)):
        TrajectoryRecorder(tower, partition, tmp_path / name, dtype=dtype).record(0)
        with pytest.raises(MismatchError, match=f"recorded with dtype={dtype}, now dtype={other}"):
            TrajectoryRecorder.resume(tower, partition, tmp_path / name, dtype=other)
        recorder = TrajectoryRecorder.resume(tower, partition, tmp_path / name, dtype=dtype, done=1)
        recorder.record(1)
        assert recorder.trajectory().steps == [0, 1]
    for dtype in (torch.float16, torch.float64, torch.int8):
        with pytest.raises(InputError, match=f"torch.bfloat16, got {dtype}"):
            TrajectoryRecorder(tower, partition, tmp_path / "t", dtype=dtype)
        with pytest.raises(InputError, match=f"torch.bfloat16, got {dtype}"):
            TrajectoryRecorder.resume(tower, partition, tmp_path / "half", dtype=dtype)
    assert not (tmp_path / "t").exists()


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**12, used=0, free=free))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("points", [0, 1, 7])
def test_the_bytes_told_are_those_taken(tmp_path: Path, dtype: torch.dtype | None, points: int) -> None:
    tower = Tower(width=256).float()
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", dtype=dtype)
    for step in range(points):
        recorder.record(step)
    recorder.seal()
    taken, told = bytes_of(tmp_path / "t"), trajectory_bytes(by_layer(tower), points, dtype)
    assert taken <= told <= 1.02 * taken + 16_384


def test_a_run_that_does_not_fit_is_refused_before_it_begins(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition, points = by_layer(tower), 10
    needed = trajectory_bytes(partition, points)
    disk_of(monkeypatch, needed - 1)
    told = r"t has no room: it needs another .* MB, and .* MB are free there\. .*`every`.*`dtype`.*layers"
    with pytest.raises(StorageError, match=told):
        TrajectoryRecorder(tower, partition, tmp_path / "t", points=points)
    checkpoints = [tmp_path / f"c{index}" for index in range(points)]
    for checkpoint in checkpoints:
        write_tensors(checkpoint / "model.safetensors", dict(tower.named_parameters()))
    with pytest.raises(StorageError, match=told):
        trajectory_from_checkpoints(tower, partition, checkpoints, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    TrajectoryRecorder(tower, partition, tmp_path / "half", points=points, dtype=torch.bfloat16)
    TrajectoryRecorder(tower, partition, tmp_path / "unknown")
    disk_of(monkeypatch, needed)
    TrajectoryRecorder(tower, partition, tmp_path / "t", points=points)


def test_what_is_there_or_is_replaced_needs_no_room(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = by_layer(tower)
    recorded(tower, tmp_path / "t", 8).flush()
    kept, needed = bytes_of(tmp_path / "t"), trajectory_bytes(partition, 10)
    disk_of(monkeypatch, needed - kept + 10_000)  # of which the journal takes some
    TrajectoryRecorder.resume(tower, partition, tmp_path / "t", points=10)
    with pytest.raises(StorageError, match="has no room"):
        TrajectoryRecorder.resume(tower, partition, tmp_path / "t", points=20)
    with pytest.raises(StorageError, match="has no room"):
        TrajectoryRecorder(tower, partition, tmp_path / "u", points=10)
    with pytest.raises(StorageError, match="has no room"):
        TrajectoryRecorder(tower, partition, tmp_path / "t", points=20, overwrite=True)
    assert Trajectory(tmp_path / "t").steps == list(range(8))  # refused before it was emptied
    assert TrajectoryRecorder(tower, partition, tmp_path / "t", points=10, overwrite=True).steps == []


def test_a_point_that_was_due_and_is_not_on_disk_is_written_when_the_run_goes_on(tmp_path: Path) -> None:
    whole = recorded(Tower(), tmp_path / "whole", 8, every=2).trajectory()
    recorded(Tower(), tmp_path / "t", 2, every=2)
    tower = Tower()
    for _ in range(4):
        nudge(tower, 0.25)
    recorder = TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t", every=2, done=4)
    assert len((tmp_path / "t/points.jsonl").read_bytes().splitlines()) == 2  # at once
    for step in range(4, 8):
        nudge(tower, 0.25)
        recorder.record(step)
    assert recorder.trajectory().content_hash() == whole.content_hash()


@pytest.mark.parametrize(
    ("recorded_steps", "every", "done"), [(0, 2, 0), (3, 2, 3), (3, 2, None), (8, 2, 4), (8, 4, 6)]
)
def test_no_other_point_is_written_when_the_run_goes_on(
    tmp_path: Path, recorded_steps: int, every: int, done: int | None
) -> None:
    """At theta_0, between points, at an unknown step, or where the point or a later one is there."""
    recorded(Tower(), tmp_path / "t", recorded_steps, every=every).flush()
    before, tower = content(tmp_path / "t"), Tower()
    for _ in range(done or 0):
        nudge(tower, 0.25)
    TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t", every=2, done=done)
    assert content(tmp_path / "t") == before


def test_a_sealed_run_that_goes_on_beyond_its_end_is_whole_at_every_moment(tower: Tower, tmp_path: Path) -> None:
    recorded(tower, tmp_path / "t", 2).seal()
    recorder = TrajectoryRecorder.resume(tower, by_layer(tower), tmp_path / "t", done=2)
    recorder.record(2)
    assert Trajectory(tmp_path / "t").steps == [0, 1, 2]
    recorder.seal()
    assert Trajectory(tmp_path / "t").steps == [0, 1, 2]


@pytest.mark.parametrize("every", [0, "epoch", 2.0])
def test_an_interval_that_is_no_number_of_steps_is_refused(tower: Tower, tmp_path: Path, every: Any) -> None:
    with pytest.raises(InputError, match="expected every to be a number of steps of at least 1, got"):
        TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t", every=every)


def test_a_function_in_place_of_a_partition_is_refused(tower: Tower, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a Partition, got by_layer; call it with the model, by_layer\(model"):
        TrajectoryRecorder(tower, by_layer, tmp_path / "t")  # type: ignore[arg-type]
    assert not (tmp_path / "t").exists()

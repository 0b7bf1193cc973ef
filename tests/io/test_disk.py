"""Full disks and quotas: a clear error, nothing half-visible, everything earlier whole, and the work goes on."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import PAGE, fill, run_again, small_disk
from tokenizers import Tokenizer, models
from towers import Tower

from tinyspan import (
    Basis,
    Partition,
    StorageError,
    SubspaceModel,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    random_basis,
    svd_basis,
)
from tinyspan.bases import discovery
from tinyspan.io import journals, storage, tensors
from tinyspan.trajectories.trajectory import point_name

resource = pytest.importorskip("resource")
FULL = (
    r"\S+ could not be written: the disk or quota is full \([\d,]+ bytes are free there\)\. "
    r"No partial file is left; make room and repeat the command"
)
OURS = {".tinyspan", ".lock", ".holder"}


def halves(folder: Path) -> list[str]:
    """The temporary files in a folder."""
    return [str(path) for path in folder.rglob(".*") if path.name not in OURS]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def until_it_fits(disk: Path, write: Callable[[], object], kept: Callable[[], object] = lambda: None) -> int:
    """Write on a full disk, then with one more free page each time; return how often it failed."""
    fill(disk)
    filler = disk / "filler"
    for failures in range(filler.stat().st_size // PAGE + 1):
        try:
            write()
        except StorageError as error:
            told = str(error)
        else:
            filler.unlink()
            return failures
        assert re.match(FULL, told), told
        assert halves(disk) == []
        kept()
        os.truncate(filler, max(0, filler.stat().st_size - PAGE))
    raise AssertionError("it never fitted")


@pytest.mark.parametrize("free", [0, 1, 40, 90])
def test_a_journal_on_a_full_disk_stays_as_it_was(tmp_path: Path, free: int) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        path, link = disk / "journal", "whose"
        link = journals.append_line(path, link, {"text": ""})
        rest = PAGE - free - 2 * path.stat().st_size
        link = journals.append_line(path, link, {"text": "x" * rest})
        assert path.stat().st_size == PAGE - free
        fill(disk)
        before = path.read_bytes()
        with pytest.raises(StorageError, match=FULL):
            journals.append_line(path, link, {"text": ""})
        assert path.read_bytes() == before
        (disk / "filler").unlink()
        journals.append_line(path, link, {"text": ""})
        assert [len(line["text"]) for line in journals.read_lines(path, "whose")[0]] == [0, rest, 0]


def test_json_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 3) as disk:
        storage.write_json(disk / "a.json", {"good": 1})
        fill(disk)
        with pytest.raises(StorageError, match=FULL):
            storage.write_json(disk / "a.json", {"good": 2})
        assert storage.read_json(disk / "a.json") == {"good": 1}
        assert sorted(path.name for path in disk.iterdir()) == ["a.json", "filler"]


def move(tower: Tower, partition: Partition, step: int) -> None:
    """Put the weights that step `step` leaves into a tower."""
    fresh = partition.select(Tower())
    with torch.no_grad():
        for name, value in partition.select(tower).items():
            value.copy_(fresh[name] + 0.1 * torch.cos((step + 1) * torch.arange(value.numel())).view(value.shape))


def record_on(folder: Path, points: int) -> Trajectory:
    """Record a run, or go on with it."""
    tower = Tower()
    partition = by_layer(tower)
    begun = (folder / "manifest.json").is_file()
    recorder = (TrajectoryRecorder.resume if begun else TrajectoryRecorder)(tower, partition, folder)
    for step in range(len(recorder.steps), points):
        move(tower, partition, step)
        recorder.record(step)
    recorder.seal()
    return recorder.trajectory()


def test_a_recorder_on_a_full_disk_keeps_every_point_and_goes_on(tmp_path: Path) -> None:
    """The disk fills up at theta_0, the manifest, each point and the journal, however many pages each of them takes."""
    points = 26  # the journal has more than a page
    whole = record_on(tmp_path / "whole", points)
    points_of_whole = [(whole.folder / point_name(index)).read_bytes() for index in range(points)]

    def kept() -> None:
        if not (disk / "run/manifest.json").is_file():
            return
        found = Trajectory(disk / "run")
        assert found.steps == whole.steps[: len(found)]
        seen.append(len(found))
        for index in range(len(found)):
            assert (disk / "run" / point_name(index)).read_bytes() == points_of_whole[index]
        for block in found.partition if len(found) else ():
            assert torch.equal(found.delta(block), whole.delta(block, len(found) - 1))

    seen: list[int] = []
    with small_disk(tmp_path / "disk", 300) as disk:
        for count in range(points + 1):
            assert until_it_fits(disk, partial(record_on, disk / "run", count), kept) > 0
        assert set(range(points)) <= set(seen)
        assert Trajectory(disk / "run").content_hash() == whole.content_hash()


def test_a_recorder_that_lives_on_records_when_there_is_room(tmp_path: Path) -> None:
    tower = Tower()
    partition = by_layer(tower)
    with small_disk(tmp_path / "disk", 16) as disk:
        recorder = TrajectoryRecorder(tower, partition, disk / "run")
        recorder.record(0)
        recorder.flush()
        fill(disk)
        recorder.record(1)
        with pytest.raises(StorageError, match=FULL):
            recorder.flush()
        assert recorder.steps == Trajectory(disk / "run").steps == [0]
        (disk / "filler").unlink()
        recorder.record(1)
        recorder.seal()
        assert Trajectory(disk / "run").steps == [0, 1]


def test_a_basis_that_does_not_fit_leaves_no_basis(tmp_path: Path) -> None:
    whole = random_basis(by_layer(Tower(width=32)), 3)
    with small_disk(tmp_path / "disk", 300) as disk:

        def kept() -> None:
            assert not (disk / "basis/manifest.json").exists()

        assert until_it_fits(disk, lambda: whole.save_pretrained(disk / "basis"), kept) > 3
        assert Basis.from_pretrained(disk / "basis").content_hash() == whole.content_hash()
        fill(disk)
        with pytest.raises(StorageError, match=FULL):
            random_basis(whole.partition, 2).save_pretrained(disk / "other")
        assert Basis.from_pretrained(disk / "basis").rmatvec({b.name: torch.ones(b.numel) for b in whole.partition})


def test_a_discovery_goes_on_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = record_on(tmp_path / "run", 4)
    written: list[str] = []
    finish = discovery._BlockWriter._finish

    def count(writer: discovery._BlockWriter, name: str, *rest: Any) -> None:
        finish(writer, name, *rest)
        written.append(name)

    monkeypatch.setattr(discovery._BlockWriter, "_finish", count)
    with small_disk(tmp_path / "disk", 300) as disk:
        failures = until_it_fits(disk, lambda: svd_basis(trajectory, 2, folder=disk / "basis"))
        assert failures > 4
        assert len(written) == len(trajectory.partition)  # no block was made twice
        assert Basis.from_pretrained(disk / "basis").content_hash() == svd_basis(trajectory, 2).content_hash()


def test_an_adapter_that_does_not_fit_leaves_no_adapter(tmp_path: Path) -> None:
    tower = Tower(width=32)
    subspace = SubspaceModel(tower, random_basis(by_layer(tower), 3), modules_to_save=["embedding"])
    with small_disk(tmp_path / "disk", 300) as disk:

        def kept() -> None:
            assert not (disk / "adapter/manifest.json").exists()

        assert until_it_fits(disk, lambda: subspace.save_pretrained(disk / "adapter"), kept) > 1
        assert SubspaceModel.from_pretrained(Tower(width=32), disk / "adapter")


def test_a_limit_on_files_is_told(tmp_path: Path) -> None:
    tower = Tower(width=32)
    partition = by_layer(tower)
    recorder = TrajectoryRecorder(tower, partition, tmp_path / "run")
    recorder.record(0)
    recorder.flush()
    told = r"could not be written: the file would exceed the size limit \(see `ulimit -f`\)"
    with files_of_at_most(1000):
        recorder.record(1)
        with pytest.raises(StorageError, match=rf"000002\.safetensors {told}"):
            recorder.record(2)
        with pytest.raises(StorageError, match=rf"block-000\.safetensors {told}"):
            random_basis(partition, 2).save_pretrained(tmp_path / "basis")
        with pytest.raises(StorageError, match=rf"a\.json {told}"):
            storage.write_json(tmp_path / "a.json", {"long": "x" * 1000})
        with pytest.raises(StorageError, match=rf"a\.jsonl {told}"):
            journals.append_line(tmp_path / "a.jsonl", "", {"long": "x" * 1000})
    assert halves(tmp_path) == []
    recorder.record(1)
    assert Trajectory(tmp_path / "run").steps == [0, 1]


@pytest.mark.parametrize("writer", ["safetensors", "tokenizers", "torch", "python"])
def test_what_other_libraries_raise_on_a_full_disk_is_told_alike(tmp_path: Path, writer: str) -> None:
    big = {f"w{number}": number for number in range(2000)}
    write: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda path: tensors.save_file({"a": torch.zeros(9999)}, path),
        "tokenizers": lambda path: Tokenizer(models.WordLevel(big, "w0")).save(str(path)),
        "torch": lambda path: torch.save(torch.zeros(9999), path),
        "python": lambda path: path.write_text("x" * 40_000),
    }
    with (
        small_disk(tmp_path / "disk", 2) as disk,
        pytest.raises(StorageError, match=FULL),
        storage.writing(disk / "a"),
    ):
        write[writer](disk / "a")
    with pytest.raises(RuntimeError, match="ours"), storage.writing(tmp_path / "a"):
        raise RuntimeError("ours")


@pytest.mark.skipif(os.getuid() == 0, reason="root mounts the small disks itself")
def test_the_small_disks_in_a_name_space_of_ones_own(tmp_path: Path) -> None:
    assert "no small disk" not in run_again(["unshare", "--map-root-user", "--mount"], __file__, tmp_path)

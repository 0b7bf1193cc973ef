"""Where outputs go: odd names, links, relative paths, permissions, and who holds a folder under which name."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from disks import mount, run_again, small_disk
from towers import Tower

from tinyspan import Basis, InputError, SubspaceModel, Trajectory, TrajectoryRecorder, by_layer, svd_basis
from tinyspan.io.folders import Busy, check_folder, claimed

NAMES = [
    "with space",
    "naïve 文字 🎉",
    'it\'s "quoted"',
    "two\nlines\tand a tab",
    "-o",
    "--",
    "100%d %j %s",
    "#1 & more; $(x) `y` | > z",
    "*",
    "[a-z]?{b}",
    "back\\slash",
    "~",
    ".hidden",
    "é" * 127 + "x",  # 255 bytes
    "trailing/",
    "absent/../here",
    "./././deep/er",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the temporary folder the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recorded(folder: str | Path, points: int = 2) -> Trajectory:
    tower = Tower()
    recorder = TrajectoryRecorder(tower, by_layer(tower), folder)
    for step in range(points):
        with torch.no_grad():
            for index, parameter in enumerate(tower.layers.parameters()):
                parameter += torch.cos((step + 1.0) * torch.arange(parameter.numel()) + index).view(parameter.shape)
        recorder.record(step)
    return recorder.trajectory()


def whole_way(place: str | Path) -> SubspaceModel:
    """Record, discover, save an adapter and load it, in three folders at a place."""
    svd_basis(recorded(Path(place, "full")), 2, folder=Path(place, "basis"))
    subspace = SubspaceModel(Tower(), Basis.from_pretrained(Path(place, "basis")))
    with torch.no_grad():
        subspace.z[0].fill_(0.5)
    subspace.save_pretrained(Path(place, "adapter"))
    return SubspaceModel.from_pretrained(Tower(), Path(place, "adapter"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [False, True])
def test_odd_names(here: Path, name: str, relative: bool) -> None:
    place = name if relative else here / name
    assert whole_way(place).z[0].unique().tolist() == [0.5]
    again = Path(place, "full")
    with pytest.raises(InputError, match="overwrite=True"):
        check_folder(again, "trajectory")
    TrajectoryRecorder(Tower(), by_layer(Tower()), again, overwrite=True)
    assert len(Trajectory(again)) == 0


def writers(trajectory: Trajectory) -> dict[str, Callable[[Path], object]]:
    basis = svd_basis(trajectory, 1)
    return {
        "recorder": lambda path: TrajectoryRecorder(Tower(), by_layer(Tower()), path),
        "basis": lambda path: basis.save_pretrained(path),
        "discovery": lambda path: svd_basis(trajectory, 1, folder=path),
        "adapter": lambda path: SubspaceModel(Tower(), basis).save_pretrained(path),
    }


BAD = {
    "file": "is a file",
    "file/below": "is a file",
    "dangling": "is a link that does not lead to a folder",
    "dangling/below": "is a link that does not lead to a folder",
    "filelink": "is a link that does not lead to a folder",
    "loop": "is a link that does not lead to a folder",
    "loop/below": "Too many levels of symbolic links",
    "x" * 256: "File name too long",
    "/".join(["x" * 200] * 30): "File name too long",
    "null\0byte": "its name is not valid text",
    "no\udcfftext": "its name is not valid text",
}


def bad_places(place: Path) -> None:
    (place / "file").write_text("mine")
    (place / "dangling").symlink_to(place / "nowhere")
    (place / "filelink").symlink_to(place / "file")
    (place / "loop").symlink_to(place / "loop")


@pytest.mark.parametrize("writer", ["recorder", "basis", "discovery", "adapter"])
def test_places_that_cannot_be_folders(tmp_path: Path, writer: str) -> None:
    write = writers(recorded(tmp_path / "run"))[writer]
    (tmp_path / "place").mkdir()
    bad_places(tmp_path / "place")
    before = sorted(tmp_path.rglob("*"))
    for name, reason in BAD.items():
        with pytest.raises(InputError, match=reason) as caught:
            write(tmp_path / "place" / name)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_to_folders_are_followed(here: Path) -> None:
    (here / "real").mkdir()
    (here / "link").symlink_to("real", target_is_directory=True)
    whole_way(here / "link")
    assert len(Trajectory(here / "real/full")) == 2
    shutil.rmtree(here / "real/basis")
    (here / "elsewhere").mkdir()
    (here / "real/basis").symlink_to(here / "elsewhere")  # the output itself is a link
    svd_basis(Trajectory(here / "real/full"), 2, folder=here / "link/basis")
    svd_basis(Trajectory(here / "real/full"), 2, folder=here / "real/basis", overwrite=True)
    assert (here / "real/basis").is_symlink()
    assert Basis.from_pretrained(here / "elsewhere").rank == 2


def test_an_output_in_or_over_its_input(tmp_path: Path) -> None:
    trajectory = recorded(tmp_path / "run")
    with pytest.raises(InputError, match=r"holds something else \(trajectory: "):
        svd_basis(trajectory, 1, folder=tmp_path / "run", overwrite=True)
    with pytest.raises(InputError, match="no tinyspan output"):
        svd_basis(trajectory, 1, folder=tmp_path / "run/points", overwrite=True)
    basis = svd_basis(trajectory, 1, folder=tmp_path / "run/basis")
    with pytest.raises(InputError, match="is where this basis is read from"):
        basis.save_pretrained(tmp_path / "run/../run/basis", overwrite=True)
    with pytest.raises(InputError, match=r"holds something else \(basis\)"):
        TrajectoryRecorder(Tower(), by_layer(Tower()), tmp_path / "run", overwrite=True)
    assert Trajectory(tmp_path / "run").delta(trajectory.partition.blocks[0]).any()
    for path in (tmp_path / "run", tmp_path / "run/points", tmp_path / "run/basis/.."):
        with pytest.raises(InputError, match="is read and lies in the output folder"):
            check_folder(tmp_path / "run", "basis", inputs=[path])


def test_the_current_folder_as_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(".")
    assert len(Trajectory(".")) == 2
    TrajectoryRecorder(Tower(), by_layer(Tower()), ".", overwrite=True)
    (here / "mine").mkdir()
    monkeypatch.chdir(here / "mine")
    (here / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds something else \(no tinyspan output: thesis\.tex\)"):
        recorded(".")
    (here / "mine/thesis.tex").unlink()
    (here / "mine").rmdir()
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        recorded("out")


def test_a_change_of_the_current_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Tower()
    recorder = TrajectoryRecorder(tower, by_layer(tower), "run")
    trajectory, basis = recorded("other"), svd_basis(recorded("third"), 2)
    basis.save_pretrained("basis")
    basis = Basis.from_pretrained("basis")
    subspace = SubspaceModel(Tower(), basis)
    (here / "away").mkdir()
    monkeypatch.chdir(here / "away")
    recorder.record(0)
    assert Trajectory(here / "run").steps == [0]
    assert trajectory.delta(trajectory.partition.blocks[0]).any()
    assert all(basis.maps[block.name].rank == 2 for block in basis.partition)
    subspace.save_pretrained("adapter")
    monkeypatch.chdir(here)
    assert SubspaceModel.from_pretrained(Tower(), "away/adapter").basis.content_hash() == basis.content_hash()


def test_an_adapter_finds_its_basis_after_a_move(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_way("study")
    (here / "study").rename(here / "moved study")
    shutil.copytree("moved study", "copied")
    (here / "link").symlink_to("copied/adapter")
    for place in ("moved study/adapter", "copied/adapter", "link", here / "copied/../copied/adapter"):
        loaded = SubspaceModel.from_pretrained(Tower(), place).basis.location
        assert loaded is not None
        assert loaded.resolve() == Path(place).resolve().parent / "basis"
    monkeypatch.chdir("copied/adapter")
    assert SubspaceModel.from_pretrained(Tower(), ".")
    monkeypatch.chdir(here)
    shutil.move("copied/adapter", "alone")
    with pytest.raises(InputError, match=r"is not at .* any more"):
        SubspaceModel.from_pretrained(Tower(), "alone")
    assert SubspaceModel.from_pretrained(Tower(), "alone", Basis.from_pretrained("copied/basis"))


HOLD = "import sys; from pathlib import Path; from tinyspan.io.folders import claimed\n"
HOLD += "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def held_elsewhere(folder: Path, code: str = HOLD) -> "subprocess.Popen[bytes]":
    """Let another process hold a folder."""
    command = [sys.executable, "-c", code, str(folder), "a word\nand another"]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


@pytest.mark.processes
def test_a_folder_is_held_under_all_its_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = recorded("run")
    (here / "basis").mkdir()
    (here / "link").symlink_to("basis")
    with held_elsewhere(here / "link") as holder:
        told = rf"being written by process {holder.pid} on \S+ since 20.* \(-c .*a word.*\); wait for it, stop it, or"
        for name in ("basis", "./basis", "link", here / "basis"):
            for write in writers(trajectory).values():
                with pytest.raises(Busy, match=f"(?s){told}"):
                    write(Path(name))
        holder.kill()
    with claimed(Path("basis")), claimed(here / "basis"), claimed(here / "link"):
        for write in list(writers(trajectory).values())[1:2]:
            write(Path("link"))
        (here / "away/basis").mkdir(parents=True)
        monkeypatch.chdir("away")
        with held_elsewhere(here / "away/basis") as holder:
            with pytest.raises(Busy), claimed(Path("basis")):  # another folder of the same relative name
                pass
            holder.kill()
    assert not (here / "basis/.holder").exists()


FORK = """
import os, sys
from towers import Tower
from tinyspan import TrajectoryRecorder, by_layer
recorder = TrajectoryRecorder(Tower(), by_layer(Tower()), sys.argv[1])
child = os.fork()
if child == 0:
    try:
        del recorder
    finally:
        os._exit(0)
os.waitpid(child, 0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.processes
def test_a_forked_child_does_not_let_go(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "run", FORK) as holder:
        with pytest.raises(Busy, match=f"by process {holder.pid} "), claimed(tmp_path / "run"):
            pass
        holder.kill()


@pytest.mark.processes
def test_threads_of_one_process_share_a_hold(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with claimed(tmp_path):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with claimed(tmp_path):
        leave.set()
        thread.join()
        done = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 1
    with held_elsewhere(tmp_path) as holder:
        holder.kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=rf"has no locks \({os.strerror(number)}\); choose another folder"):
        recorded(tmp_path / "run")


def test_a_read_only_file_system(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 99) as disk:
        whole_way(disk)
        (disk / "empty").mkdir()
        assert mount("-t", "tmpfs", "-o", "remount,ro", "tmpfs", disk) is None
        for write in writers(Trajectory(disk / "full")).values():  # reading needs no lock
            for name in ("new", "new/er", "empty"):
                with pytest.raises(InputError, match=r"cannot be written: no permission to write in \S+/disk"):
                    write(disk / name)
        assert SubspaceModel.from_pretrained(Tower(), disk / "adapter")


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that its owner made read-only."""
    if os.access(tmp_path, os.W_OK) and os.geteuid() == 0 and _overrides():
        pytest.skip("root may write everywhere; this runs again without that right")
    (tmp_path / "locked").mkdir()
    yield tmp_path / "locked"
    (tmp_path / "locked").chmod(0o755)


def _overrides() -> bool:
    """Whether this process may write where the permissions say no."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) & 0b110)


@pytest.mark.parametrize("mode", [0o555, 0o666, 0o000])
def test_missing_permissions(locked: Path, tmp_path: Path, mode: int) -> None:
    write = writers(recorded(tmp_path / "run"))
    locked.chmod(mode)
    for one in write.values():
        for place in (locked, locked / "new"):
            with pytest.raises(InputError, match=r"cannot be written: ([Nn]o p|P)ermission") as caught:
                one(place)
            assert "\n" not in str(caught.value)
    locked.chmod(0o755)
    assert list(locked.iterdir()) == []


def test_a_lock_of_somebody_else(locked: Path, tmp_path: Path) -> None:
    write = writers(recorded(tmp_path / "run"))
    (locked / ".lock").touch()
    (locked / ".lock").chmod(0o444)
    for one in write.values():
        with pytest.raises(InputError, match="cannot be written: Permission denied; choose another folder"):
            one(locked)


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0 or not _overrides(), reason="the permissions hold for this user")
def test_permissions_without_the_rights_of_root(tmp_path: Path) -> None:
    without = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"]
    out = run_again(prefix, __file__, tmp_path, "-k", "missing_permissions or somebody")
    assert "4 passed" in out

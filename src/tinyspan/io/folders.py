"""Output folders: which may be written into, by whom, and how interrupted work goes on.

`.tinyspan` marks a folder as an output of ours, which alone may be overwritten. One process at a time writes into a
folder. Work that can be interrupted keeps its recipe, and all it needs to go on, in `unfinished/` until it is done.
"""

import errno
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tinyspan.errors import InputError, Interrupted, StorageError, TinyspanError
from tinyspan.io.storage import (
    MANIFEST,
    OF_SAFETENSORS,
    check_attached,
    read_json,
    reading,
    sweep,
    write_json,
    writing,
)

__all__ = [
    "HOLDER",
    "LOCK",
    "UNFINISHED",
    "Busy",
    "Output",
    "begin",
    "check_folder",
    "check_part",
    "check_place",
    "claimed",
    "end",
    "is_unfinished",
    "prepare_folder",
    "resumable",
]

MARKER, LOCK, HOLDER = ".tinyspan", ".lock", ".holder"
UNFINISHED, RECIPE = "unfinished", "recipe.json"
SPARED = (MARKER, LOCK, HOLDER, UNFINISHED)  # names that stay when an output is overwritten
Output = Literal["trajectory", "basis", "adapter", "result", "demo", "unified"]
REMAINS = (".*", UNFINISHED, "start.safetensors", "block-*.safetensors", "adapter.safetensors")  # of no use alone
OUTPUTS: dict[Output, tuple[str, ...]] = {  # the names each kind of output consists of
    "trajectory": (MANIFEST, "start.safetensors", "points.jsonl", "points", "model", "result.json"),
    "basis": (MANIFEST, "block-*.safetensors", "README.md"),
    "adapter": (MANIFEST, "adapter.safetensors", "result.json", "basis", "README.md"),
    "result": ("result.json",),
    "unified": ("unified.json", "basis", "adapters", "mean"),
    "demo": ("results.json", "report.html", "figures", "full", "basis", "freeze", "random", "intrinsic"),
}


class Busy(TinyspanError):
    """Another process writes into the folder now."""


def check_folder(
    folder: Path,
    kind: Output,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    *,
    resumable: bool = False,
) -> None:
    """Refuse an output folder that cannot be used, changing nothing: ask before long work starts.

    Only a folder that `prepare_folder` made for the same kind of output, and that holds no other names than such an
    output has at its top level, is ever emptied.

    Args:
        folder: may be absent or empty, or hold what a write that failed before its manifest left.
        kind: of the output.
        overwrite: accept an earlier output.
        inputs: what the work will read; it must not lie in a folder that is going to be emptied.
        resumable: accept unfinished work, which `begin` will compare with what is to be done.

    Raises:
        InputError: the path is a file or cannot be written, or the folder holds something else, or an earlier output
            without `overwrite`, or an input lies in it.
    """
    check_place(folder)
    for path in inputs:
        if os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{path} is read and lies in the output folder {folder}; choose another output folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if set(names) <= {LOCK, HOLDER}:
        return
    mark = "no tinyspan output"
    if MARKER in names:
        with reading(folder / MARKER):
            mark = (folder / MARKER).read_bytes()[:100].decode("utf-8", "replace").strip()
    if set(names) <= set(SPARED) and not is_unfinished(folder) and (UNFINISHED not in names or mark == kind):
        return  # nothing, or killed before anything was begun
    known = (*SPARED, *OUTPUTS[kind], OF_SAFETENSORS)
    # a leading dot: a temporary file that a killed run left
    foreign = [name for name in names if not any(fnmatch(name, p) or fnmatch(name, f".{p}.*") for p in known)]
    if mark != kind or foreign:
        found = foreign[0] if mark == kind else f"{mark}: {names[-1]}"
        raise InputError(f"{folder} holds something else ({found}); choose another output folder")
    if is_unfinished(folder) and resumable:
        return
    useless = (*REMAINS, "basis") if kind == "adapter" else REMAINS
    remains = not is_unfinished(folder) and all(any(fnmatch(name, p) for p in useless) for name in names)
    if not overwrite and not remains:
        what = "unfinished work" if is_unfinished(folder) else "an earlier output"
        raise InputError(f"{folder} holds {what}; choose another folder or pass --overwrite")


def check_place(folder: Path) -> None:
    """Refuse a path that is no folder and cannot become one, or that may not be written.

    Raises:
        InputError: says why.
    """
    try:
        str(folder).encode()
        near = next(path for path in (folder.absolute(), *folder.absolute().parents) if _is_there(path))
        free = os.access(near, os.R_OK | os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # too long, not to be looked into, a loop of links; no text, a null byte
        reason = error.strerror if isinstance(error, OSError) else "its name is no text"
        raise InputError(f"{str(folder)!r} cannot be written: {reason}; choose another folder") from error
    if not os.path.isdir(near):
        what = "a link that leads to no folder" if near.is_symlink() else "a file"
        raise InputError(f"{near} is {what}; expected a folder to write into")
    if not free:
        raise InputError(f"{folder} cannot be written: no permission to write in {near}; choose another folder")


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def prepare_folder(folder: Path, kind: Output, overwrite: bool = False) -> None:
    """Make an output folder and mark it as ours, emptying an earlier output of ours if told to `overwrite`.

    Raises:
        InputError: as `check_folder`.
        StorageError: the folder cannot be written.
    """
    check_folder(folder, kind, overwrite)
    marker = folder / MARKER
    with writing(marker):
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST):  # the manifest goes first
            if path.name in SPARED:  # the marker too, so that a killed overwrite can be repeated
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not marker.is_file() or marker.is_symlink() or marker.read_bytes() != f"{kind}\n".encode():
            if marker.is_symlink():  # to a file that is not ours
                marker.unlink()
            marker.write_bytes(f"{kind}\n".encode())  # in place: an empty folder with half a marker is still accepted


def check_part(path: Path) -> None:
    """Compare a folder inside an output of ours, such as the `model` that `record` leaves, with that output's manifest.

    Raises:
        StorageError: a file of it is missing or altered.
    """
    folder = path.resolve().parent
    if (folder / MANIFEST).is_file() and (folder / "start.safetensors").is_file():
        check_attached(folder, f"{path.resolve().name}/")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the hold falls when the process ends, however it ends.

    A process may claim a folder again while it holds it, under any of the folder's names. Its threads share the hold:
    to keep two of them from writing one output is the caller's part.

    Raises:
        Busy: another process holds it; the message names it.
        InputError: the folder cannot be written, or its file system knows no locks.
        StorageError: the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    lock = _lock(folder)
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # of a disk that has become read-only; what failed before is to be told
                (folder / HOLDER).unlink()
        lock.release()


def _lock(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False, is_singleton=True)
        lock.acquire()
    except Timeout as error:
        holder = "another process"
        with suppress(OSError):
            holder = (folder / HOLDER).read_bytes()[:1000].decode("utf-8", "replace").strip() or holder
        raise Busy(f"{folder} is being written by {holder}; wait for it, stop it, or choose another folder") from error
    except (OSError, NotImplementedError) as error:
        number, reason = getattr(error, "errno", errno.ENOSYS), getattr(error, "strerror", None) or error
        if number in (errno.ENOSPC, errno.EDQUOT):
            with writing(folder / LOCK):
                raise
        if number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            reason = f"its file system has no locks ({reason})"
        raise InputError(f"{folder} cannot be written: {reason}; choose another folder") from error
    program = Path(sys.argv[0]) if sys.argv else Path()
    name = program.parent.name if program.name == "__main__.py" else program.name  # what `python -m` runs
    command = shlex.join([name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})\n"
    with suppress(OSError):  # for people; the lock holds without it
        (folder / HOLDER).unlink(missing_ok=True)  # it may be a link to a file that is not ours
        (folder / HOLDER).write_bytes(text.encode(errors="backslashreplace"))
    return lock


@contextmanager
def resumable(folder: Path, kind: Output, recipe: Mapping[str, Any], overwrite: bool = False) -> Iterator[bool]:
    """Hold a folder for work that may be interrupted: `begin` before, `end` after; yields whether earlier work goes on.

    If the work fails before it left anything to go on from, it leaves no folder.

    Raises:
        Interrupted: by the user; the message says what is kept.
        Busy, InputError, StorageError: the folder cannot be used; see `claimed` and `begin`.
    """
    check_folder(folder, kind, overwrite, resumable=True)
    made = not folder.exists()
    with claimed(folder):
        resumed = begin(folder, kind, recipe, overwrite)
        try:
            yield resumed
        except KeyboardInterrupt as error:
            if isinstance(error, Interrupted):
                raise
            raise Interrupted(f"{folder} keeps {_kept(folder)}; the same command goes on from there") from error
        except TinyspanError as error:
            left = {path.name for path in (*folder.iterdir(), *(folder / UNFINISHED).iterdir())}
            if not isinstance(error, StorageError) and left <= {*SPARED, RECIPE}:
                end(folder)
                if made:
                    shutil.rmtree(folder)
            raise
        end(folder)


def _kept(folder: Path) -> str:
    """Say what an interrupted work has left."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in (folder / UNFINISHED).glob("checkpoint-*/whole.json")]
    counts = {
        "point": len(list((folder / "points").glob("[0-9]*"))),
        "block": len(list((folder / UNFINISHED).glob("block-*.json"))),
    }
    found = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
    found += [f"the training up to step {max(steps)}"] if steps else []
    return " and ".join(found) or "what it was begun with"


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds work that was begun and not ended."""
    return (folder / UNFINISHED / RECIPE).is_file()


def begin(folder: Path, kind: Output, recipe: Mapping[str, Any], overwrite: bool = False) -> bool:
    """Open an output folder for work that may be interrupted, and return whether interrupted work goes on.

    Call `end` when all is done. In between, the folder's `unfinished/` keeps what is needed to go on.

    Args:
        folder: may be absent, empty, or hold unfinished work of the same recipe.
        kind: of the output.
        recipe: everything that decides the result, in JSON's types.
        overwrite: replace an earlier output, and unfinished work of another recipe.

    Raises:
        InputError: the folder holds something else, an earlier output, or unfinished work of another recipe; the
            message names the first difference.
        StorageError: the folder cannot be written.
    """
    check_folder(folder, kind, overwrite, resumable=True)
    path = folder / UNFINISHED / RECIPE
    if path.is_file():
        try:
            different = _difference(read_json(path), recipe)
        except StorageError as error:
            different = f"a damaged recipe ({error})"
        if different is None:
            for place in (folder, folder / "points", folder / "model", folder / "figures", folder / UNFINISHED):
                sweep(place)
            return True
        if not overwrite:
            raise InputError(
                f"{folder} holds unfinished work with {different}; repeat the command that it was begun with, "
                "choose another folder, or pass --overwrite to start again"
            )
    prepare_folder(folder, kind, overwrite)
    with writing(path):
        if path.parent.exists():
            path.unlink(missing_ok=True)
            shutil.rmtree(path.parent)
    write_json(path, recipe)
    return False


def end(folder: Path) -> None:
    """Declare the work in a folder done: take away what was kept to go on, the recipe last."""
    for path in (folder / UNFINISHED).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != RECIPE:
            path.unlink()
    (folder / UNFINISHED / RECIPE).unlink()
    (folder / UNFINISHED).rmdir()


def _difference(kept: Any, wanted: Any, name: str = "") -> str | None:
    """Say where two recipes first differ, or None."""
    if isinstance(kept, Mapping) and isinstance(wanted, Mapping):
        for key in {**wanted, **kept}:
            different = _difference(kept.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
            if different is not None:
                return different
        return None
    kept, wanted = (list(value) if isinstance(value, tuple) else value for value in (kept, wanted))
    return None if kept == wanted else f"{name} {kept}, where this has {wanted}"

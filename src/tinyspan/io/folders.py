"""Output folders: the checks before one is written, its lock, and how interrupted work is resumed.

The file `.tinyspan` marks a folder as an output of this library; only marked folders are ever overwritten. One process
at a time writes into a folder. Work that can be interrupted keeps its settings and its state in `unfinished/` until it
is done.
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
from tinyspan.io.manifests import MANIFEST, check_attached
from tinyspan.io.storage import OF_SAFETENSORS, read_json, reading, sweep, write_json, writing

__all__ = [
    "Busy",
    "COMBINED",
    "CURVATURE",
    "HOLDER",
    "LOCK",
    "MODEL",
    "MODELS",
    "Output",
    "PREDICTIONS",
    "RESULT",
    "UNFINISHED",
    "begin",
    "check_folder",
    "check_part",
    "check_place",
    "claimed",
    "end",
    "first_difference",
    "is_unfinished",
    "prepare_folder",
    "resumable",
]

MARKER, LOCK, HOLDER = ".tinyspan", ".lock", ".holder"
UNFINISHED, SETTINGS = "unfinished", "recipe.json"
DESKTOP = ".DS_Store"  # macOS writes it into every folder that somebody looks at
SPARED = (MARKER, LOCK, HOLDER, UNFINISHED)  # names that overwriting an output leaves in place
Output = Literal["trajectory", "basis", "adapter", "result", "curvature", "demo", "unified", "combined"]
REMAINS = (".*", UNFINISHED, "start.safetensors", "block-*.safetensors", "adapter.safetensors")  # useless alone
RESULT, PREDICTIONS = "result.json", "predictions.jsonl"  # attached to what `record`, `tune` and `evaluate` write
CURVATURE = "curvature.json"
MODEL, MODELS = "model", "models"  # folder of a model in a recorded run or combination; of those of several tasks
COMBINED = "combine"  # method in the result of a combination
OUTPUTS: dict[Output, tuple[str, ...]] = {  # file names of each kind of output
    "trajectory": (
        MANIFEST,
        "start.safetensors",
        "points.jsonl",
        "points",
        "model",
        RESULT,
        PREDICTIONS,
    ),
    "basis": (MANIFEST, "block-*.safetensors", "README.md"),
    "adapter": (MANIFEST, "adapter.safetensors", RESULT, PREDICTIONS, "basis", "README.md"),
    "result": (RESULT, PREDICTIONS),
    "curvature": (CURVATURE,),
    "unified": ("unified.json", "basis", "adapters", "mean"),
    "combined": (RESULT, MODEL, MODELS),
    "demo": ("results.json", "report.html", "figures", "full", "basis", "freeze", "random", "intrinsic"),
}


class Busy(TinyspanError):
    """Another process is writing into the folder."""


def check_folder(
    folder: Path,
    kind: Output,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    *,
    resumable: bool = False,
) -> None:
    """Raise an error if an output folder cannot be used, without changing it: call this before long work starts.

    A folder is only ever emptied if `prepare_folder` created it for the same kind of output and its top level holds no
    names other than those of such an output.

    Args:
        folder: the output folder; it may be absent or empty, or hold the remains of a write that failed before the
            manifest was written.
        kind: kind of the output.
        overwrite: accept an earlier output.
        inputs: paths that the work will read; they must not lie in a folder that will be emptied.
        resumable: accept unfinished work; `begin` will compare its settings.

    Raises:
        InputError: the path is a file or cannot be written, the folder holds something else or (without `overwrite`)
            an earlier output, or an input lies in the folder.
    """
    check_place(folder)
    for path in inputs:
        if os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{path} is read and lies in the output folder {folder}; choose another output folder")
    names = sorted(path.name for path in folder.iterdir() if path.name != DESKTOP) if folder.is_dir() else []
    if set(names) <= {LOCK, HOLDER}:
        return
    mark = "no tinyspan output"
    if MARKER in names:
        with reading(folder / MARKER):
            mark = (folder / MARKER).read_bytes()[:100].decode("utf-8", "replace").strip()
    if set(names) <= set(SPARED) and not is_unfinished(folder) and (UNFINISHED not in names or mark == kind):
        return  # an empty folder, or one whose process was killed before it wrote anything
    patterns = (*SPARED, *OUTPUTS[kind], OF_SAFETENSORS)
    # a leading dot: a temporary file that a killed run left behind
    foreign = [name for name in names if not any(fnmatch(name, p) or fnmatch(name, f".{p}.*") for p in patterns)]
    if mark != kind or foreign:
        content = foreign[0] if mark == kind else f"{mark}: {names[-1]}"
        raise InputError(f"{folder} holds something else ({content}); choose another output folder")
    if is_unfinished(folder) and resumable:
        return
    useless = (*REMAINS, "basis") if kind == "adapter" else REMAINS
    remains = not is_unfinished(folder) and all(any(fnmatch(name, p) for p in useless) for name in names)
    if not overwrite and not remains:
        what = "unfinished work" if is_unfinished(folder) else "an earlier output"
        raise InputError(f"{folder} holds {what}; choose another folder or pass overwrite=True")


def check_place(folder: Path) -> None:
    """Raise an error if a path is not a writable folder and cannot become one.

    Raises:
        InputError: the path or one of its parents is a file, cannot be accessed, or may not be written.
    """
    try:
        str(folder).encode()
        near = next(path for path in (folder.absolute(), *folder.absolute().parents) if _exists(path))
        free = os.access(near, os.R_OK | os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # too long, no permission, a loop of links; invalid text, a null byte
        reason = error.strerror if isinstance(error, OSError) else "its name is not valid text"
        raise InputError(f"{str(folder)!r} cannot be written: {reason}; choose another folder") from error
    if not os.path.isdir(near):
        what = "a link that does not lead to a folder" if near.is_symlink() else "a file"
        raise InputError(f"{near} is {what}; expected a folder to write into")
    if not free:
        raise InputError(f"{folder} cannot be written: no permission to write in {near}; choose another folder")


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def prepare_folder(folder: Path, kind: Output, overwrite: bool = False) -> None:
    """Create and mark an output folder; with `overwrite`, empty an earlier output in it.

    Raises:
        InputError: as for `check_folder`.
        StorageError: the folder cannot be written.
    """
    check_folder(folder, kind, overwrite)
    marker = folder / MARKER
    with writing(marker):
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST):  # the manifest is deleted first
            if path.name in SPARED:  # including the marker, so that a killed overwrite can be repeated
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not marker.is_file() or marker.is_symlink() or marker.read_bytes() != f"{kind}\n".encode():
            if marker.is_symlink():  # it may point to a file of someone else
                marker.unlink()
            marker.write_bytes(f"{kind}\n".encode())  # in place: an empty folder with half a marker is still accepted


def check_part(path: Path) -> None:
    """Compare a folder inside an output, such as the `model` that `record` writes, with that output's manifest.

    Raises:
        StorageError: a file in it is missing or altered.
    """
    folder = path.resolve().parent
    if (folder / MANIFEST).is_file() and (folder / "start.safetensors").is_file():
        check_attached(folder, f"{path.resolve().name}/")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes; the lock is released when the process ends, even if it is killed.

    The lock is reentrant within a process, under any of the folder's names. Threads of a process share it; the caller
    must keep two threads from writing one output.

    Raises:
        Busy: another process holds the lock; the message names the process.
        InputError: the folder cannot be written, or its file system does not support locks.
        StorageError: the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    lock = _lock(folder)
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # the disk may have become read-only; do not hide the first error
                (folder / HOLDER).unlink()
        lock.release()


def _lock(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False)
        lock.acquire()
    except Timeout as error:
        holder = "another process"
        with suppress(OSError):
            holder = (folder / HOLDER).read_bytes()[:1000].decode("utf-8", "replace").strip() or holder
        raise Busy(f"{folder} is being written by {holder}; wait for it, stop it, or choose another folder") from error
    except OSError as error:
        number, reason = error.errno, error.strerror or error
        if number in (errno.ENOSPC, errno.EDQUOT):
            with writing(folder / LOCK):
                raise
        if number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            reason = f"its file system has no locks ({reason})"
        raise InputError(f"{folder} cannot be written: {reason}; choose another folder") from error
    program = Path(sys.argv[0]) if sys.argv else Path()
    name = program.parent.name if program.name == "__main__.py" else program.name  # `python -m` runs __main__.py
    command = shlex.join([name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})\n"
    with suppress(OSError):  # the text is only for people; the lock works without it
        (folder / HOLDER).unlink(missing_ok=True)  # it may be a link to a file of someone else
        (folder / HOLDER).write_bytes(text.encode(errors="backslashreplace"))
    return lock


@contextmanager
def resumable(folder: Path, kind: Output, settings: Mapping[str, Any], overwrite: bool = False) -> Iterator[bool]:
    """Lock a folder for work that may be interrupted: calls `begin` and `end`, and yields whether the work is resumed.

    If the work fails before it has saved any state, the folder is removed.

    Raises:
        Interrupted: the user interrupted the work; the message names the saved state.
        Busy, InputError, StorageError: the folder cannot be used; see `claimed` and `begin`.
    """
    check_folder(folder, kind, overwrite, resumable=True)
    is_new = not folder.exists()
    with claimed(folder):
        resumed = begin(folder, kind, settings, overwrite)
        try:
            yield resumed
        except KeyboardInterrupt as error:
            if isinstance(error, Interrupted):
                raise
            raise Interrupted(f"{folder} keeps {_saved_state(folder)}; the same command goes on from there") from error
        except TinyspanError as error:
            names = {path.name for path in (*folder.iterdir(), *(folder / UNFINISHED).iterdir())}
            if not isinstance(error, StorageError) and names <= {*SPARED, SETTINGS}:
                end(folder)
                if is_new:
                    shutil.rmtree(folder)
            raise
        end(folder)


def _saved_state(folder: Path) -> str:
    """Return a phrase that describes the saved state of interrupted work."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in (folder / UNFINISHED).glob("checkpoint-*/whole.json")]
    counts = {
        "point": len([*(folder / "points").glob("[0-9]*"), *(folder / UNFINISHED).glob("point-*.json")]),
        "block": len(list((folder / UNFINISHED).glob("block-*.json"))),
    }
    parts = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
    parts += [f"the training up to step {max(steps)}"] if steps else []
    return " and ".join(parts) or "the settings"


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds work that was begun and not completed."""
    return (folder / UNFINISHED / SETTINGS).is_file()


def begin(folder: Path, kind: Output, settings: Mapping[str, Any], overwrite: bool = False) -> bool:
    """Open an output folder for work that may be interrupted, and return whether interrupted work is resumed.

    Call `end` when the work is done. Until then, the state that is needed to resume lies in `unfinished/`.

    Args:
        folder: the output folder; it may be absent, empty, or hold unfinished work with the same settings.
        kind: kind of the output.
        settings: everything that determines the result, as JSON types.
        overwrite: replace an earlier output, or unfinished work with other settings.

    Raises:
        InputError: the folder holds something else, an earlier output, or unfinished work with other settings; the
            message names the first difference.
        StorageError: the folder cannot be written.
    """
    check_folder(folder, kind, overwrite, resumable=True)
    path = folder / UNFINISHED / SETTINGS
    if path.is_file():
        try:
            difference = first_difference(read_json(path), settings)
        except StorageError as error:
            difference = f"damaged settings ({error})"
        if difference is None:
            for place in (folder, folder / "points", folder / "model", folder / "figures", folder / UNFINISHED):
                sweep(place)
            return True
        if not overwrite:
            raise InputError(
                f"{folder} holds unfinished work with {difference}; repeat the command that started it, "
                "choose another folder, or pass overwrite=True to start again"
            )
    prepare_folder(folder, kind, overwrite)
    with writing(path):
        if path.parent.exists():
            path.unlink(missing_ok=True)
            shutil.rmtree(path.parent)
    write_json(path, settings)
    return False


def end(folder: Path) -> None:
    """Delete the saved state of completed work from a folder, its settings last."""
    for path in (folder / UNFINISHED).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != SETTINGS:
            path.unlink()
    (folder / UNFINISHED / SETTINGS).unlink()
    (folder / UNFINISHED).rmdir()


def first_difference(stored: Any, current: Any, name: str = "") -> str | None:
    """Return a phrase for the first difference between two settings, or None if they are equal."""
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        for key in {**current, **stored}:
            difference = first_difference(stored.get(key), current.get(key), f"{name}.{key}".lstrip("."))
            if difference is not None:
                return difference
        return None
    stored, current = (list(value) if isinstance(value, tuple) else value for value in (stored, current))
    return None if stored == current else f"{name} {stored}, where this has {current}"

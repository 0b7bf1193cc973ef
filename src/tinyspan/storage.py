"""Files on disk: JSON that carries its own checksum, manifests, journals and safetensors.

A file is written under a temporary name, flushed and renamed, so that it is there whole or not at all. A manifest lists
the other files of its folder with their sizes and SHA-256. A journal grows by whole lines, each of which carries a hash
of all lines before it.
"""

import errno
import hashlib
import json
import mmap
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinyspan.errors import InputError, StorageError, TinyspanError

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Kind",
    "Manifest",
    "Reader",
    "append_line",
    "attach",
    "check_file",
    "cut_lines",
    "damage",
    "file_entry",
    "open_tensors",
    "package_versions",
    "read_checkpoint",
    "read_json",
    "read_lines",
    "read_manifest",
    "reading",
    "sweep",
    "write_json",
    "write_manifest",
    "write_tensors",
    "writing",
]

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
CHECKSUM = "checksum"
Kind = Literal["trajectory", "basis", "adapter"]


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a folder holds, of which model, and how it was made.

    Attributes:
        kind: `trajectory`, `basis` or `adapter`.
        partition: blocks with the names, shapes and dtypes of their parameters.
        fingerprint: SHA-256 of theta_0 per block; empty where the content fits any model with this partition.
        parents: content hashes of what this was made from.
        construction: the constructor and its arguments.
        details: what describes it and does not define it; not part of the content hash.
        files: the files that make up the content.
        attached: every other file that belongs to the folder, such as `result.json`; not part of the content hash.
        versions: of the packages that wrote it; for people, not part of the content hash.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    partition: list[dict[str, Any]]
    fingerprint: dict[str, str]
    parents: list[str] = []
    construction: dict[str, Any] = {}
    details: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}
    attached: dict[str, FileEntry] = {}
    versions: dict[str, str] = {}

    @field_validator("files", "attached")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise ValueError(f"the file name {name!r} leaves the folder")
        return files

    def content_hash(self) -> str:
        """Return the SHA-256 of all that defines the content, as hexadecimal digits."""
        return _digest(self.model_dump(exclude={"versions", "details", "attached"}))


Reader = Any  # safetensors.safe_open has no public type


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("tinyspan", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a malformed file raises while it is taken apart into a `StorageError` that names it."""
    try:
        yield
    except TinyspanError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError, OSError, SafetensorError) as error:
        raise StorageError(f"{path} is damaged: {_brief(error)}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of its own under a temporary name, flush it to disk, and rename.

    Raises:
        StorageError: it cannot be written; an earlier file is as it was.
        TinyspanError: a number in it is NaN or infinite.
    """
    try:
        plain = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: no tuples, no keys but strings
    except ValueError as error:
        raise TinyspanError(f"{path} would hold a number that is NaN or infinite; it is not written") from error
    text = json.dumps({**plain, CHECKSUM: _digest(plain)}, indent=2)
    with _replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, *, sealed: bool = True) -> dict[str, Any]:
    """Read what `write_json` wrote, without its checksum.

    Args:
        path: of the file.
        sealed: refuse a file without a checksum; else such a file, from elsewhere, is taken as it is.

    Raises:
        StorageError: it cannot be read, is no JSON object, or differs from what was written.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: {_brief(error)}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} is damaged: expected a JSON object, found a {type(content).__name__}")
    expected = content.pop(CHECKSUM, None)
    if expected is None and not sealed:
        return content
    if (found := _digest(content)) != expected:
        raise StorageError(f"{path} is damaged: expected the checksum {_short(expected)}, found {_short(found)}")
    return content


def append_line(path: Path, before: str, content: Mapping[str, Any]) -> str:
    """Add a line to a journal, flush it to disk, and return the hash that the next line continues.

    Args:
        path: of the journal; made if absent.
        before: the hash that the last line returned; for the first line, one that says what the journal belongs to.
        content: of the line.

    Raises:
        StorageError: it cannot be written; the journal is as it was.
    """
    link = _digest([before, content])
    length = path.stat().st_size if path.exists() else 0
    with writing(path), path.open("ab") as file:
        try:
            file.write(json.dumps({**content, CHECKSUM: link}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.truncate(path, length)
            raise
    return link


def read_lines(path: Path, before: str) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of a journal and the hash that the next line continues.

    What follows the last line break is of a write that was interrupted, and is left out.

    Raises:
        StorageError: a line differs from what was written.
    """
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines, before
    with reading(path):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            content = json.loads(line)
            expected = content.pop(CHECKSUM)
            if (found := _digest([before, content])) != expected:
                raise StorageError(
                    f"{path} is damaged in line {number}: expected the checksum {_short(expected)}, "
                    f"found {_short(found)}"
                )
            lines.append(content)
            before = found
    return lines, before


def cut_lines(path: Path, last: int) -> None:
    """Take the last so many lines of a journal away, and what an interrupted write left behind them; reads no others.

    Raises:
        StorageError: it cannot be written.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with writing(path), path.open("rb+") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            end = view.rfind(b"\n") + 1
            for _ in range(last):
                end = view.rfind(b"\n", 0, max(end - 1, 0)) + 1
        file.truncate(end)
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """Write a safetensors file under a temporary name, flush it to disk, rename it, and return its size and hash."""
    with _replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        entry = file_entry(temporary)
    return entry


def read_manifest(folder: Path, kind: Kind | None = None) -> Manifest:
    """Read and validate `manifest.json`.

    Raises:
        InputError: there is none, or it describes another kind of thing.
        StorageError: it is damaged, or was written by a version with another schema.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        wanted = kind or "trajectory, basis or adapter"
        raise InputError(f"{folder} is no {wanted}: it has no {MANIFEST}")
    raw = read_json(path, sealed=False)  # the schema comes first: an older or newer one may be sealed otherwise
    if (schema := raw.get("schema_version")) != SCHEMA_VERSION:
        what = "upgrade tinyspan" if isinstance(schema, int) and schema > SCHEMA_VERSION else "make it again"
        raise StorageError(f"{path} has schema {schema}, this version reads {SCHEMA_VERSION}: {what}")
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{folder}: expected a {kind}, found a {manifest.kind}")
    return manifest


def check_file(folder: Path, name: str, entry: FileEntry, *, content: bool = True) -> None:
    """Compare one file's size, and with `content` its hash, with the manifest.

    Raises:
        StorageError: it is missing, shorter, longer or altered.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise StorageError(f"{path} is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise StorageError(f"{path}: expected {entry.bytes} bytes, found {size}")
    if content and (found := file_entry(path).sha256) != entry.sha256:
        raise StorageError(f"{path} is damaged: expected SHA-256 {_short(entry.sha256)}, found {_short(found)}")


def attach(folder: Path, names: Iterable[str]) -> None:
    """Let a folder's manifest cover more files that belong to it, or cover them as they are now."""
    manifest = read_manifest(folder)
    manifest.attached |= {name: file_entry(folder / name) for name in names}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    write_json(folder / MANIFEST, manifest.model_dump())


def damage(folder: Path, files: Mapping[str, FileEntry], *, content: bool = True) -> list[str]:
    """Return one sentence for every file that is missing or altered; see `check_file`."""
    found = []
    for name, entry in files.items():
        try:
            check_file(folder, name, entry, content=content)
        except StorageError as error:
            found.append(str(error))
    return found


def open_tensors(path: Path) -> Reader:
    """Open a safetensors file for lazy, memory-mapped reading.

    Raises:
        StorageError: it is missing or no safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def read_checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of a checkpoint folder as Hugging Face writes it, one after the other.

    Reads `model.safetensors` or `pytorch_model.bin`, whole or sharded by an index file. Pickled files are read with
    `weights_only=True`, so they cannot run code.

    Raises:
        InputError: the folder holds none of these.
        StorageError: a file is damaged.
    """
    folder = Path(folder)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            with reading(index):
                shards = sorted(set(read_json(index, sealed=False)["weight_map"].values()))
                files = [folder / Path(shard).name for shard in shards]
        elif single.is_file():
            files = [single]
        else:
            continue
        for file in files:
            yield from _named_tensors(file)
        return
    raise InputError(f"{folder} holds no model.safetensors or pytorch_model.bin, whole or sharded")


def _named_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        reader = open_tensors(file)
        for name in reader.keys():  # noqa: SIM118 - the reader is no mapping
            yield name, reader.get_tensor(name)
    else:
        try:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        except Exception as error:
            raise StorageError(f"{file} cannot be read safely: {error}") from error


def file_entry(path: Path) -> FileEntry:
    """Return a file's size and hash.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system raises while a file is written into a `StorageError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) or "os error 122" in str(error):
            free = shutil.disk_usage(path.parent).free
            raise StorageError(
                f"{path} could not be written: the disk or quota is full ({free:,} bytes are free there); nothing of "
                "it is left. Make room and repeat the command"
            ) from error
        raise StorageError(f"{path} could not be written: {_brief(error)}; nothing of it is left") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it and rename it, on failure remove it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def sweep(folder: Path) -> None:
    """Take away the temporary files that a killed process left in a folder that nobody else writes into."""
    for path in folder.glob(f".*.{'?' * 8}"):  # as `_replacing` names them
        path.unlink()


def _digest(content: Any) -> str:
    """Return the SHA-256 of JSON content, whatever the order of its keys and its spacing."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:300]


def _short(digest: Any) -> str:
    return f"{str(digest)[:12]}..."

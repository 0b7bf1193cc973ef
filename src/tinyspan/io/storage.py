"""Files on disk: JSON that carries its own checksum, manifests, journals and safetensors.

A file is written under a temporary name, flushed and renamed, so that it is there whole or not at all. A manifest lists
the other files of its folder with their sizes and SHA-256. A journal grows by whole lines, each of which carries a hash
of all lines before it.

What is read may be damaged or hostile. It ends in what was written or in a `StorageError`, never runs code, and takes
memory for what a file holds, not for what its header says.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import platform
import re
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
    "check_attached",
    "check_file",
    "cut_lines",
    "damage",
    "file_entry",
    "first_error",
    "open_tensors",
    "package_versions",
    "read_checkpoint",
    "read_json",
    "read_lines",
    "read_manifest",
    "reading",
    "replacing",
    "sweep",
    "write_json",
    "write_manifest",
    "write_tensors",
    "writing",
]

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
CHECKSUM = "checksum"
TEMPORARY = ".tinyspan-tmp"  # how the names of files end that are being written
OF_SAFETENSORS = ".tmp??????"  # what safetensors names the file that it will rename
LARGEST = 1 << 24  # bytes of a JSON file, or of a safetensors header, that are taken apart
DEPTH = 64  # of lists and objects inside each other
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
            if str(path) != name or not name.isprintable() or len(name) > 1000:
                raise ValueError(f"{name[:100]!r} is no plain file name")
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
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise StorageError(f"{path} is damaged: {_brief(error)}") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read: {_brief(error)}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of its own under a temporary name, flush it to disk, and rename.

    Raises:
        StorageError: it cannot be written; an earlier file is as it was.
        TinyspanError: a number in it is NaN or infinite, or something in it could not be read again.
    """
    try:
        plain = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: no tuples, no keys but strings
    except ValueError as error:
        raise TinyspanError(f"{path} would hold a number that is NaN or infinite; it is not written") from error
    data = json.dumps({**plain, CHECKSUM: _digest(plain)}, indent=2).encode() + b"\n"
    try:
        _parsed(data)
        if len(data) > LARGEST:
            raise ValueError(f"it would have {len(data):,} bytes, at most {LARGEST:,} are read")
    except ValueError as error:
        raise TinyspanError(f"{path} is not written, since it could not be read again: {_brief(error)}") from error
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_json(path: Path, *, sealed: bool = True) -> dict[str, Any]:
    """Read what `write_json` wrote, without its checksum.

    Args:
        path: of the file.
        sealed: refuse a file without a checksum; else such a file, from elsewhere, is taken as it is.

    Raises:
        StorageError: it cannot be read, is larger than 16 MiB or no JSON object, or differs from what was written.
    """
    _require_file(path)
    if (size := path.stat().st_size) > LARGEST:
        raise StorageError(f"{path} is damaged: expected at most {LARGEST:,} bytes of JSON, found {size:,}")
    with reading(path):
        content = _parsed(path.read_bytes())
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
    line = json.dumps({**content, CHECKSUM: link}).encode() + b"\n"
    with writing(path), path.open("ab", buffering=0) as file:  # a buffer would be written again when it is closed
        length = file.tell()
        try:
            while line:
                line = line[file.write(line) :]  # a disk that fills up takes the beginning, and then refuses
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(length)
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
    _require_file(path)
    with reading(path):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            content = _parsed(line)
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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> FileEntry:
    """Write a safetensors file under a temporary name, flush it to disk, rename it, and return its size and hash."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
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
        raise StorageError(f"{path} is damaged: {first_error(error)}") from error
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{folder}: expected a {kind}, found a {manifest.kind}")
    return manifest


def check_file(folder: Path, name: str, entry: FileEntry, *, content: bool = True) -> None:
    """Compare one file's size, and with `content` its hash, with the manifest.

    Raises:
        StorageError: it is missing, shorter, longer or altered, or a link to a place outside of the folder.
    """
    path = Path(folder) / name
    _require_file(path)
    with reading(path):
        size, target = path.stat().st_size, path.resolve()
        inside = any(target.is_relative_to(home.resolve()) for home in (Path(folder), *_blobs(Path(folder))))
    if not inside:
        raise StorageError(f"{path} is a link that leaves the folder; put a copy of the file in its place")
    if size != entry.bytes:
        raise StorageError(f"{path}: expected {entry.bytes} bytes, found {size}")
    if content and (found := file_entry(path).sha256) != entry.sha256:
        raise StorageError(f"{path} is damaged: expected SHA-256 {_short(entry.sha256)}, found {_short(found)}")


def _blobs(folder: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot, which holds links to them: <repo>/snapshots/<commit>/..."""
    above = [folder.absolute(), *folder.absolute().parents][:2]
    found = [path.parents[1] / "blobs" for path in above if path.parent.name == "snapshots"]
    return [blobs for blobs in found if not blobs.is_symlink()]


def attach(folder: Path, names: Iterable[str]) -> None:
    """Let a folder's manifest cover more files that belong to it, or cover them as they are now."""
    manifest = read_manifest(folder)
    manifest.attached |= {name: file_entry(folder / name) for name in names}
    write_manifest(folder, manifest)


def check_attached(folder: Path, names: str = "") -> None:
    """Compare the attached files of a folder whose names begin so with its manifest.

    Raises:
        InputError: the folder has no manifest.
        StorageError: a file is missing or altered.
    """
    for name, entry in read_manifest(folder).attached.items():
        if name.startswith(names):
            check_file(folder, name, entry)


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
    _require_file(path)
    with reading(path):
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST:  # taken apart, a header takes many times its size
            raise StorageError(f"{path} is damaged: expected a header of at most {LARGEST:,} bytes, found {header:,}")
        return safe_open(path, framework="pt")


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
                if outside := [shard for shard in shards if Path(shard).name != shard or shard == ".."]:
                    raise StorageError(f"{index}: expected names of files beside it, found {outside[0]!r}")
                files = [folder / shard for shard in shards]
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
            with reading(file):
                tensor = reader.get_tensor(name)
            yield name, tensor
    else:
        _require_file(file)
        try:
            named = torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        except Exception as error:
            raise StorageError(f"{file} cannot be read safely: {_brief(error)}") from error
        for name, tensor in named:
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise StorageError(f"{file}: expected named tensors, found {type(name).__name__} {str(name)[:50]!r}")
            yield name, tensor


def file_entry(path: Path) -> FileEntry:
    """Return a file's size and hash.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    _require_file(path)
    with reading(path), path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
        return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system raises while a file is written into a `StorageError` that says what to do."""
    try:
        yield
    except TinyspanError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise StorageError(f"{path} could not be written: {_remedy(path, number)}") from error


def _system_error(error: Exception) -> int | None:
    """Return the number of the system's error behind an exception, if that is what it tells of."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors and tokenizers, which are in Rust
        return int(found[1])
    if isinstance(error, SafetensorError):
        return errno.EIO
    no_room = ("inline_container", "iostream error")  # of torch.save, which gives no number
    return errno.ENOSPC if any(words in str(error) for words in no_room) else None


def _remedy(path: Path, number: int) -> str:
    """Say what a system error means for who wanted to write a file."""
    kept = "Nothing half-written is left"
    if number in (errno.ENOSPC, errno.EDQUOT):
        there = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(there).free
        return f"the disk or quota is full ({free:,} bytes are free there). {kept}; make room and repeat the command"
    if number == errno.EFBIG:
        return f"it would be larger than files may be (see `ulimit -f`). {kept}"
    return f"{os.strerror(number)}. {kept}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it and rename it, on failure remove it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
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
    for pattern in (f".*{TEMPORARY}", OF_SAFETENSORS):
        for path in folder.glob(pattern):
            if path.is_file() and not path.is_symlink():
                path.unlink()


def _digest(content: Any) -> str:
    """Return the SHA-256 of JSON content, whatever the order of its keys and its spacing."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def first_error(error: ValidationError) -> str:
    """Return where the first of many errors lies and what it is, in a line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:100] for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _require_file(path: Path) -> None:
    """Refuse what is not there, and what a read could wait on for ever, such as a pipe."""
    with reading(path):
        if not path.is_file():
            raise StorageError(f"{path} is {'no regular file' if path.exists() else 'missing'}")


def _parsed(data: bytes) -> dict[str, Any]:
    """Return the JSON object in UTF-8 text, refusing all that `write_json` does not write and readers disagree on."""
    content = json.loads(
        data.decode("utf-8"),
        parse_constant=_refuse_constant,
        parse_float=_finite_number,
        parse_int=_short_integer,
        object_pairs_hook=_without_repeats,
    )
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found a {type(content).__name__}")
    if b"\\u" in data:
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # halves of a character are no text
    level: list[Any] = [content]
    for _ in range(DEPTH):
        level = [
            value
            for outer in level
            if isinstance(outer, dict | list)
            for value in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"lists and objects lie more than {DEPTH} deep in each other")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is beyond the largest number")
    return number


def _short_integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}... is beyond the largest integer")
    return int(text)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name is given twice")
    return content


def _brief(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:300]


def _short(digest: Any) -> str:
    return f"{str(digest)[:12]}..."

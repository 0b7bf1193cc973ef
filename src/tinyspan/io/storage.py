"""Files on disk: JSON with a checksum, manifests, journals and safetensors.

A file is written under a temporary name, flushed and renamed, so that it is either complete or absent. A manifest lists
the other files of its folder with their sizes and SHA-256. A journal grows by complete lines, each of which contains a
hash of all lines before it.

Input files may be damaged or hostile. Reading one returns what was written or raises a `StorageError`. It never runs
code, and memory is allocated for the data that a file contains, not for the sizes that its header states.
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
from functools import cache
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
TEMPORARY = ".tinyspan-tmp"  # suffix of files that are being written
OF_SAFETENSORS = ".tmp??????"  # pattern of the temporary files of safetensors
LARGEST = 1 << 24  # bytes of a JSON file, or of a safetensors header
MAX_JSON_DEPTH = 64  # nesting of lists and objects
Kind = Literal["trajectory", "basis", "adapter"]


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Content of a folder, the model it belongs to, and how it was created.

    Attributes:
        kind: `trajectory`, `basis` or `adapter`.
        partition: blocks with the names, shapes and dtypes of their parameters.
        fingerprint: SHA-256 of theta_0 per block; empty where the content fits any model with this partition.
        parents: content hashes of the trajectories or the basis that this was computed from.
        construction: the constructor and its arguments.
        details: descriptive information; not part of the content hash.
        files: size and hash of each file of the content.
        attached: size and hash of each other file of the folder, such as `result.json`; not part of the content hash.
        versions: versions of the packages that wrote the folder; informational, not part of the content hash.
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
                raise ValueError(f"{name[:100]!r} is not a plain file name")
        return files

    def content_hash(self) -> str:
        """Return the SHA-256 of the fields that define the content, as hexadecimal digits."""
        return _digest(self.model_dump(exclude={"versions", "details", "attached"}))


Reader = Any  # safetensors.safe_open has no public type


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a result."""
    return dict(_versions())


@cache  # each version is read from a file
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("tinyspan", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert the errors of reading and parsing a file into a `StorageError` that names the file."""
    try:
        yield
    except TinyspanError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise StorageError(f"{path} is damaged: {_summary(error)}") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read: {_summary(error)}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum under a temporary name, flush it to disk, and rename it.

    Raises:
        StorageError: the file cannot be written; an earlier file is unchanged.
        TinyspanError: a number is NaN or infinite, or `read_json` could not read the content.
    """
    try:
        plain = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: no tuples, string keys
    except ValueError as error:
        raise TinyspanError(f"{path} would hold a number that is NaN or infinite; it is not written") from error
    data = json.dumps({**plain, CHECKSUM: _digest(plain)}, indent=2).encode() + b"\n"
    try:
        _parse(data)
        if len(data) > LARGEST:
            raise ValueError(f"it would have {len(data):,} bytes, at most {LARGEST:,} are read")
    except ValueError as error:
        raise TinyspanError(f"{path} is not written, since it could not be read again: {_summary(error)}") from error
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_json(path: Path, *, sealed: bool = True) -> dict[str, Any]:
    """Read a file of `write_json`, and return its content without the checksum.

    Args:
        path: path of the file.
        sealed: raise an error if the file has no checksum; with False, accept a file written by another program.

    Raises:
        StorageError: the file cannot be read, is larger than 16 MiB, is not a JSON object, or does not match its
            checksum.
    """
    _require_file(path)
    if (size := path.stat().st_size) > LARGEST:
        raise StorageError(f"{path} is damaged: expected at most {LARGEST:,} bytes of JSON, found {size:,}")
    with reading(path):
        content = _parse(path.read_bytes())
    expected = content.pop(CHECKSUM, None)
    if expected is None and not sealed:
        return content
    if (digest := _digest(content)) != expected:
        raise StorageError(f"{path} is damaged: expected the checksum {_prefix(expected)}, found {_prefix(digest)}")
    return content


def append_line(path: Path, before: str, content: Mapping[str, Any]) -> str:
    """Append a line to a journal, flush it to disk, and return the hash of the journal so far.

    Args:
        path: path of the journal; it is created if absent.
        before: hash returned for the previous line; for the first line, a hash of the object the journal belongs to.
        content: content of the line.

    Raises:
        StorageError: the line cannot be written; the journal is unchanged.
    """
    link = _digest([before, content])
    line = json.dumps({**content, CHECKSUM: link}).encode() + b"\n"
    with writing(path), path.open("ab", buffering=0) as file:  # unbuffered: closing would write a failed buffer again
        length = file.tell()
        try:
            while line:
                line = line[file.write(line) :]  # a disk that fills up writes only the beginning
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(length)
            raise
    return link


def read_lines(path: Path, before: str) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of a journal and the hash of all of them.

    Text after the last line break comes from an interrupted write and is ignored.

    Args:
        path: path of the journal.
        before: hash with which the first line was appended.

    Raises:
        StorageError: a line does not match its checksum.
    """
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines, before
    _require_file(path)
    with reading(path):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            content = _parse(line)
            expected = content.pop(CHECKSUM)
            if (digest := _digest([before, content])) != expected:
                raise StorageError(
                    f"{path} is damaged in line {number}: expected the checksum {_prefix(expected)}, "
                    f"found {_prefix(digest)}"
                )
            lines.append(content)
            before = digest
    return lines, before


def cut_lines(path: Path, last: int) -> None:
    """Delete the last lines of a journal, and any incomplete line after them, without reading the rest.

    Args:
        path: path of the journal.
        last: number of complete lines to delete.

    Raises:
        StorageError: the journal cannot be written.
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
        InputError: the folder has no manifest, or its manifest is of another kind.
        StorageError: the manifest is damaged, or was written by a version with another schema.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        wanted = _with_article(kind) if kind else "a trajectory, basis or adapter"
        raise InputError(f"{folder} is not {wanted}: it has no {MANIFEST}")
    raw = read_json(path, sealed=False)  # check the schema first: another one may use another checksum
    if (schema := raw.get("schema_version")) != SCHEMA_VERSION:
        what = "upgrade tinyspan" if isinstance(schema, int) and schema > SCHEMA_VERSION else "create it again"
        raise StorageError(f"{path} has schema {schema}, this version reads {SCHEMA_VERSION}: {what}")
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError as error:
        raise StorageError(f"{path} is damaged: {first_error(error)}") from error
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{folder} is not {_with_article(kind)}, but {_with_article(manifest.kind)}")
    return manifest


def _with_article(kind: Kind) -> str:
    return f"an {kind}" if kind == "adapter" else f"a {kind}"


def check_file(folder: Path, name: str, entry: FileEntry, *, content: bool = True) -> None:
    """Compare one file's size, and with `content` its hash, with the manifest.

    Raises:
        StorageError: the file is missing or altered, has another size, or is a link to a place outside the folder.
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
    if content and (digest := file_entry(path).sha256) != entry.sha256:
        raise StorageError(f"{path} is damaged: expected SHA-256 {_prefix(entry.sha256)}, found {_prefix(digest)}")


def _blobs(folder: Path) -> list[Path]:
    """Return the folder in the hub's cache that the links of a snapshot, <repo>/snapshots/<commit>/..., point to."""
    ancestors = [folder.absolute(), *folder.absolute().parents][:2]
    candidates = [path.parents[1] / "blobs" for path in ancestors if path.parent.name == "snapshots"]
    return [blobs for blobs in candidates if not blobs.is_symlink()]


def attach(folder: Path, names: Iterable[str]) -> None:
    """Add files to the attached files of a folder's manifest, or update their entries."""
    manifest = read_manifest(folder)
    manifest.attached |= {name: file_entry(folder / name) for name in names}
    write_manifest(folder, manifest)


def check_attached(folder: Path, names: str = "") -> None:
    """Compare the attached files of a folder with its manifest.

    Args:
        folder: the folder with the manifest.
        names: prefix of the names of the files to compare.

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
    problems = []
    for name, entry in files.items():
        try:
            check_file(folder, name, entry, content=content)
        except StorageError as error:
            problems.append(str(error))
    return problems


def open_tensors(path: Path) -> Reader:
    """Open a safetensors file for lazy, memory-mapped reading.

    Raises:
        StorageError: the file is missing or is not a safetensors file.
    """
    _require_file(path)
    with reading(path):
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST:  # a parsed header takes many times its size in memory
            raise StorageError(f"{path} is damaged: expected a header of at most {LARGEST:,} bytes, found {header:,}")
        return safe_open(path, framework="pt")


def read_checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of a Hugging Face checkpoint folder, one at a time.

    Reads `model.safetensors` or `pytorch_model.bin`, as one file or as shards with an index file. Pickled files are
    read with `weights_only=True`, so they cannot run code.

    Raises:
        InputError: the folder contains none of these files.
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
    raise InputError(f"{folder} holds no model.safetensors or pytorch_model.bin, as one file or as shards")


def _named_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        reader = open_tensors(file)
        for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
            with reading(file):
                tensor = reader.get_tensor(name)
            yield name, tensor
    else:
        _require_file(file)
        try:
            items = torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        except Exception as error:
            raise StorageError(f"{file} cannot be read safely: {_summary(error)}") from error
        for name, tensor in items:
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise StorageError(f"{file}: expected named tensors, found {type(name).__name__} {str(name)[:50]!r}")
            yield name, tensor


def file_entry(path: Path) -> FileEntry:
    """Return a file's size and hash.

    Raises:
        StorageError: the file cannot be read.
    """
    digest = hashlib.sha256()
    _require_file(path)
    with reading(path), path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
        return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert system errors of writing a file into a `StorageError` that says what to do."""
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
    """Return the system error number behind an exception, or None if a system error did not cause it."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # the format of Rust, for safetensors and tokenizers
        return int(match[1])
    if isinstance(error, SafetensorError):
        return errno.EIO
    disk_full = ("inline_container", "iostream error")  # messages of torch.save, which give no error number
    return errno.ENOSPC if any(text in str(error) for text in disk_full) else None


def _remedy(path: Path, number: int) -> str:
    """Return the reason and the remedy for a system error of writing a file."""
    state = "No partial file is left"
    if number in (errno.ENOSPC, errno.EDQUOT):
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(folder).free
        return f"the disk or quota is full ({free:,} bytes are free there). {state}; make room and repeat the command"
    if number == errno.EFBIG:
        return f"the file would exceed the size limit (see `ulimit -f`). {state}"
    return f"{os.strerror(number)}. {state}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success flush and rename the file, on failure remove it."""
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
    """Delete the temporary files that a killed process left in a folder; no other process may be writing into it."""
    for pattern in (f".*{TEMPORARY}", OF_SAFETENSORS):
        for path in folder.glob(pattern):
            if path.is_file() and not path.is_symlink():
                path.unlink()


def _digest(content: Any) -> str:
    """Return the SHA-256 of JSON content, independent of the order of keys and of whitespace."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def first_error(error: ValidationError) -> str:
    """Return the location and the message of the first validation error, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:100] for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _require_file(path: Path) -> None:
    """Raise an error if a path is missing or is not a regular file: reading a pipe could wait forever."""
    with reading(path):
        if not path.is_file():
            raise StorageError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")


def _parse(data: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, and raise an error for constructs that JSON parsers treat differently."""
    content = json.loads(
        data.decode("utf-8"),
        parse_constant=_refuse_constant,
        parse_float=_finite_number,
        parse_int=_short_integer,
        object_pairs_hook=_unique_names,
    )
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found a {type(content).__name__}")
    if b"\\u" in data:
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # raises for lone surrogates
    level: list[Any] = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            value
            for outer in level
            if isinstance(outer, dict | list)
            for value in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"lists and objects are nested more than {MAX_JSON_DEPTH} levels deep")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large for a float")
    return number


def _short_integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}... has more than 20 digits")
    return int(text)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has the same name twice")
    return content


def _summary(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:300]


def _prefix(digest: Any) -> str:
    return f"{str(digest)[:12]}..."

"""Folders on disk: one `manifest.json` and safetensors files, written to a temporary name and then renamed.

The manifest lists every file with its size and SHA-256 and is replaced after the file it newly lists is in place.
`.tinyspan` marks a folder as an output of ours, which alone may be overwritten.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinyspan.errors import InputError, StorageError

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "Reader",
    "check_file",
    "check_folder",
    "damage",
    "open_tensors",
    "package_versions",
    "prepare_folder",
    "read_checkpoint",
    "read_manifest",
    "reading",
    "write_json",
    "write_tensors",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MARKER = ".tinyspan"
Kind = Literal["trajectory", "basis", "adapter"]
Output = Literal["trajectory", "basis", "adapter", "result", "demo"]
OUTPUTS: dict[Output, tuple[str, ...]] = {  # the names each kind of output consists of
    "trajectory": (MARKER, MANIFEST, "start.safetensors", "points", "model", "result.json"),
    "basis": (MARKER, MANIFEST, "block-*.safetensors"),
    "adapter": (MARKER, MANIFEST, "adapter.safetensors", "result.json"),
    "result": (MARKER, "result.json"),
    "demo": (MARKER, "results.json", "report.html", "figures", "full", "basis", "freeze", "random", "intrinsic"),
}


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
        details: what only this kind has.
        files: every other file of the folder.
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
    versions: dict[str, str] = {}

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise ValueError(f"the file name {name!r} leaves the folder")
        return files

    def content_hash(self) -> str:
        """Return the SHA-256 of everything but the package versions and the details, as hexadecimal digits.

        `details` is left out because it describes (steps, places) rather than defines.
        """
        content = self.model_dump(exclude={"versions", "details"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def check_folder(folder: Path, kind: Output, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output folder that `prepare_folder` would refuse, changing nothing: ask before long work starts.

    Only a folder that `prepare_folder` made for the same kind of output, and that holds no other names than such an
    output has at its top level, is ever emptied.

    Args:
        folder: may be absent or empty.
        kind: of the output.
        overwrite: accept an earlier output.
        inputs: what the work will read; it must not lie in a folder that is going to be emptied.

    Raises:
        InputError: the path is a file, or the folder holds something else, or an earlier output without `overwrite`,
            or an input lies in it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder to write into")
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path} is read and lies in the output folder {folder}; choose another output folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not set(names) - {MARKER}:
        return
    mark = (folder / MARKER).read_text(encoding="utf-8").strip() if MARKER in names else "no tinyspan output"
    # a leading dot: a temporary file that a killed run left
    foreign = [name for name in names if not any(fnmatch(name, p) or fnmatch(name, f".{p}.*") for p in OUTPUTS[kind])]
    if mark != kind or foreign:
        found = foreign[0] if mark == kind else f"{mark}: {names[-1]}"
        raise InputError(f"{folder} holds something else ({found}); choose another output folder")
    if not overwrite:
        raise InputError(f"{folder} holds an earlier output; choose another folder or pass --overwrite")


def prepare_folder(folder: Path, kind: Output, overwrite: bool = False) -> None:
    """Make an output folder and mark it as ours, emptying an earlier output of ours if told to `overwrite`.

    Raises:
        InputError: as `check_folder`.
    """
    check_folder(folder, kind, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST):  # the manifest goes first
        if path.name == MARKER:  # stays, so that a killed overwrite can be repeated
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / MARKER).write_text(f"{kind}\n", encoding="utf-8")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a malformed file raises while it is taken apart into a `StorageError` that names it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, SafetensorError, json.JSONDecodeError) as error:
        raise StorageError(f"{path} is damaged: {type(error).__name__} {error}") from error


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON under a temporary name, flush it to disk, and rename."""
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """Write a safetensors file under a temporary name, flush it to disk, rename it, and return its size and hash."""
    with _replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        entry = _entry(temporary)
    return entry


def read_manifest(folder: Path, kind: Kind | None = None) -> Manifest:
    """Read and validate `manifest.json`.

    Raises:
        InputError: there is none, or it describes another kind of thing.
        StorageError: it is not valid, or was written by a newer version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        wanted = kind or "trajectory, basis or adapter"
        raise InputError(f"{folder} is no {wanted}: it has no {MANIFEST}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        schema = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(schema, int) and schema > SCHEMA_VERSION:
            raise StorageError(
                f"{path} has schema {schema}, this version reads up to {SCHEMA_VERSION}: upgrade tinyspan"
            )
        manifest = Manifest.model_validate(raw)
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
    if content and (found := _entry(path).sha256) != entry.sha256:
        raise StorageError(f"{path} is damaged: expected SHA-256 {entry.sha256[:12]}..., found {found[:12]}...")


def damage(folder: Path, manifest: Manifest) -> list[str]:
    """Return one sentence for every file of the manifest that is missing or altered; none if all is whole."""
    found = []
    for name, entry in manifest.files.items():
        try:
            check_file(folder, name, entry)
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
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
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


def _entry(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it and rename it, on failure remove it."""
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
        temporary.unlink(missing_ok=True)
        raise

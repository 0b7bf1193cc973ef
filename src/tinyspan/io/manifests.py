"""Manifests: the content of a folder, the model it belongs to, and the size and SHA-256 of each of its files."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tinyspan.errors import InputError, StorageError
from tinyspan.io.storage import digest_prefix, json_digest, read_json, reading, require_file, write_json

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Kind",
    "Manifest",
    "attach",
    "check_attached",
    "check_file",
    "damage",
    "file_entry",
    "first_error",
    "package_versions",
    "read_manifest",
    "write_manifest",
]

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
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

    @field_validator("construction", "details", mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Replace numbers of numpy and torch, such as a rank out of `np.arange`, by those of Python."""
        return json.loads(json.dumps(values, default=lambda number: number.item()))

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
        return json_digest(self.model_dump(exclude={"versions", "details", "attached"}))


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
    require_file(path)
    with reading(path):
        size, target = path.stat().st_size, path.resolve()
        inside = any(target.is_relative_to(home.resolve()) for home in (Path(folder), *_blobs(Path(folder))))
    if not inside:
        raise StorageError(f"{path} is a link that leaves the folder; put a copy of the file in its place")
    if size != entry.bytes:
        raise StorageError(f"{path}: expected {entry.bytes} bytes, found {size}")
    if content and (digest := file_entry(path).sha256) != entry.sha256:
        raise StorageError(
            f"{path} is damaged: expected SHA-256 {digest_prefix(entry.sha256)}, found {digest_prefix(digest)}"
        )


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


def file_entry(path: Path) -> FileEntry:
    """Return a file's size and hash.

    Raises:
        StorageError: the file cannot be read.
    """
    digest = hashlib.sha256()
    require_file(path)
    with reading(path), path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
        return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


def first_error(error: ValidationError) -> str:
    """Return the location and the message of the first validation error, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:100] for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]

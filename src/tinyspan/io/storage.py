"""Files on disk: atomic writes, JSON with a checksum, and the errors of reading and writing.

A file is written under a temporary name, flushed and renamed, so that it is either complete or absent. `manifests`,
`journals` and `tensors` write and read the other kinds of files by these functions.

Input files may be damaged or hostile. Reading one returns what was written or raises a `StorageError`. It never runs
code, and memory is allocated for the data that a file contains, not for the sizes that its header states.
"""

import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from tinyspan.errors import StorageError, TinyspanError

__all__ = [
    "CHECKSUM",
    "LARGEST",
    "OF_SAFETENSORS",
    "digest_prefix",
    "json_digest",
    "parse_json",
    "read_json",
    "reading",
    "replacing",
    "replacing_folder",
    "require_file",
    "summary",
    "sweep",
    "write_json",
    "writing",
]

CHECKSUM = "checksum"
UMASK = os.umask(0o077)  # permissions that new files do not get; the call that reads it also sets it
os.umask(UMASK)
TEMPORARY = ".tinyspan-tmp"  # suffix of files that are being written
ABANDONED = 3600  # seconds after which a folder that is being written belongs to no process
OF_SAFETENSORS = ".tmp??????"  # pattern of the temporary files of safetensors
LARGEST = 1 << 24  # bytes of a JSON file, or of a safetensors header
MAX_JSON_DEPTH = 64  # nesting of lists and objects


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert the errors of reading and parsing a file into a `StorageError` that names the file."""
    try:
        yield
    except TinyspanError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise StorageError(f"{path} is damaged: {summary(error)}") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read: {summary(error)}") from error


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
    plain.pop(CHECKSUM, None)  # of a file that was read without `read_json`
    data = json.dumps({**plain, CHECKSUM: json_digest(plain)}, indent=2).encode() + b"\n"
    try:
        parse_json(data)
        if len(data) > LARGEST:
            raise ValueError(f"it would have {len(data):,} bytes, at most {LARGEST:,} are read")
    except ValueError as error:
        raise TinyspanError(f"{path} is not written, since it could not be read again: {summary(error)}") from error
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
    require_file(path)
    if (size := path.stat().st_size) > LARGEST:
        raise StorageError(f"{path} is damaged: expected at most {LARGEST:,} bytes of JSON, found {size:,}")
    with reading(path):
        content = parse_json(path.read_bytes())
    expected = content.pop(CHECKSUM, None)
    if expected is None and not sealed:
        return content
    if (digest := json_digest(content)) != expected:
        raise StorageError(
            f"{path} is damaged: expected the checksum {digest_prefix(expected)}, found {digest_prefix(digest)}"
        )
    return content


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
            temporary.chmod(0o666 & ~UMASK)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`; on success flush and rename it, on failure remove it.

    `folder` must be absent or empty; an empty one, which may be a mount or the current folder, gets the files. What a
    process that was killed an hour ago or more left of it is deleted.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, and what it leads to is replaced
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{TEMPORARY}"):
            if left.is_dir() and not left.is_symlink() and time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)
        fixed = folder.is_dir()
        place = folder if fixed and not os.access(folder.parent, os.W_OK) else folder.parent
        temporary = place / f".{folder.name}.{secrets.token_hex(4)}{TEMPORARY}"
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
            if not fixed:
                temporary.replace(folder)
            elif others := [path for path in folder.iterdir() if path != temporary]:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(others[0]))
            else:
                for path in temporary.iterdir():
                    shutil.move(path, folder / path.name)
                temporary.rmdir()
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sweep(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder; no other process may be writing into it."""
    for pattern in (f".*{TEMPORARY}", OF_SAFETENSORS):
        for path in folder.glob(pattern):
            if path.is_file() and not path.is_symlink():
                path.unlink()


def json_digest(content: Any) -> str:
    """Return the SHA-256 of JSON content, independent of the order of keys and of whitespace."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def require_file(path: Path) -> None:
    """Raise an error if a path is missing or is not a regular file: reading a pipe could wait forever."""
    with reading(path):
        if not path.is_file():
            raise StorageError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")


def parse_json(data: bytes) -> dict[str, Any]:
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


def summary(error: Exception) -> str:
    """Return the type and the message of an error, in at most 300 characters."""
    return f"{type(error).__name__} {error}"[:300]


def digest_prefix(digest: Any) -> str:
    """Return the first characters of a hash, for messages."""
    return f"{str(digest)[:12]}..."

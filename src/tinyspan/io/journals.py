"""Journals: files of JSON lines that grow. Each line contains a hash of all lines before it."""

import json
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyspan.errors import StorageError
from tinyspan.io.storage import CHECKSUM, digest_prefix, json_digest, parse_json, reading, require_file, writing

__all__ = ["append_line", "cut_lines", "read_lines"]


def append_line(path: Path, before: str, content: Mapping[str, Any]) -> str:
    """Append a line to a journal, flush it to disk, and return the hash of the journal so far.

    Args:
        path: path of the journal; it is created if absent.
        before: hash returned for the previous line; for the first line, a hash of the object the journal belongs to.
        content: content of the line.

    Raises:
        StorageError: the line cannot be written; the journal is unchanged.
    """
    link = json_digest([before, content])
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
    require_file(path)
    with reading(path):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            content = parse_json(line)
            expected = content.pop(CHECKSUM)
            if (digest := json_digest([before, content])) != expected:
                raise StorageError(
                    f"{path} is damaged in line {number}: expected the checksum {digest_prefix(expected)}, "
                    f"found {digest_prefix(digest)}"
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

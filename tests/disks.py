"""Disks that fill up in a test: a small tmpfs, which root may mount, or anyone in a user namespace."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PAGE = 4096  # bytes that a file takes at least


def mount(*words: object) -> str | None:
    """Mount, and return why that is not possible here."""
    try:
        done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    except OSError as error:
        return f"cannot mount: {error}"
    return done.stderr.strip() if done.returncode else None


@contextmanager
def small_disk(place: Path, pages: int) -> Iterator[Path]:
    """Give an empty disk of so many pages at a path; the test is skipped where nobody may mount one."""
    place.mkdir(exist_ok=True)
    if reason := mount("-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", place):
        pytest.skip(f"no small disk here: {reason}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def resize(place: Path, pages: int) -> None:
    """Make a small disk larger or smaller."""
    reason = mount("-t", "tmpfs", "-o", f"remount,size={pages * PAGE}", "tmpfs", place)
    assert reason is None, reason


def run_again(prefix: list[str], file: str, place: Path, *options: str) -> str:
    """Run a file of tests, which needs no conftest, as another kind of user; skipped where one cannot become that."""
    if shutil.which(prefix[0]) is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip(f"`{' '.join(prefix)}` does not work here")
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--noconftest"]
    again = [*pytest_again, f"--basetemp={place / 'again'}", file, *options]
    done = subprocess.run([*prefix, *again], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def fill(disk: Path) -> None:
    """Take all that is left of a disk."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))

"""Registries: names that files and commands use, and the classes or functions that they stand for.

Code outside of tinyspan joins a registry by importing it and using its decorator. A package can have its module
imported when a name is looked up that is not registered yet, by an entry point in its `pyproject.toml`:

    [project.entry-points."tinyspan"]
    my_bases = "my_package.bases"
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from tinyspan.errors import InputError

__all__ = ["ENTRY_POINTS", "Registry"]

ENTRY_POINTS = "tinyspan"  # the group of entry points whose modules register something
Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Entries by name.

    Args:
        what: an entry is, for messages.

    Example:
        >>> shapes = Registry[int]("shape")
        >>> shapes.add("triangle", 3)
        >>> shapes["triangle"], sorted(shapes)
        (3, ['triangle'])
        >>> shapes["circle"]
        Traceback (most recent call last):
        tinyspan.errors.InputError: unknown shape 'circle'; expected one of triangle, or import the module that ...
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry.

        Raises:
            InputError: the name is taken by another entry, or holds more than letters, digits, `.`, `_` and `-`.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"{name!r} cannot name a {self._what}: expected letters, digits, '.', '_' and '-'")
        if name in self._entries and self._entries[name] is not entry:
            raise InputError(f"there is a {self._what} of the name {name!r} already; choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        """Return an entry.

        Raises:
            InputError: nothing is registered under this name.
        """
        if name not in self:
            raise InputError(
                f"unknown {self._what} {str(name)!r:.100}; expected one of {', '.join(sorted(self._entries))}, "
                "or import the module that registers it"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Whether a name is registered, by now or by the entry points of installed packages."""
        if not isinstance(name, str):
            return False
        if name not in self._entries:
            _load_entry_points()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        _load_entry_points()
        return iter(dict(self._entries))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _load_entry_points() -> None:
    """Import the modules of installed packages that register something, once."""
    for point in entry_points(group=ENTRY_POINTS):
        point.load()

"""Registries of names in files and commands, and of the classes or functions that they denote.

Other packages register entries with the decorator of a registry. An entry point in the `pyproject.toml` of a package
makes tinyspan import its module when a name is looked up that is not registered yet:

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

ENTRY_POINTS = "tinyspan"  # group of the entry points of modules that register entries
Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Entries by name.

    Args:
        what: noun for an entry in messages, such as `kind of map`.

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
            InputError: the name belongs to another entry, or has characters besides letters, digits, `.`, `_` and `-`.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"{name!r} cannot name a {self._what}: expected letters, digits, '.', '_' and '-'")
        if name in self._entries and self._entries[name] is not entry:
            raise InputError(f"a {self._what} with the name {name!r} is already registered; choose another name")
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
        """Return whether a name is registered, if necessary after importing the entry points of installed packages."""
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
    """Import the modules of the entry points of installed packages, once."""
    for point in entry_points(group=ENTRY_POINTS):
        point.load()

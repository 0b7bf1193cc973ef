"""Registries of names in files and commands, and of the classes or functions that they denote.

Other packages register entries with the decorator of a registry. An entry point in the `pyproject.toml` of a package
makes tinyspan import its module when a name is looked up that is not registered yet:

    [project.entry-points."tinyspan"]
    my_bases = "my_package.bases"
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar, overload

from tinyspan.errors import InputError

__all__ = ["ENTRY_POINTS", "Registry"]

ENTRY_POINTS = "tinyspan"  # group of the entry points of modules that register entries
Entry = TypeVar("Entry")
Default = TypeVar("Default")


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

    def add(self, name: str, entry: Entry, aliases: tuple[str, ...] = ()) -> None:
        """Register an entry under a name and its aliases, or under none of them if one is refused.

        Raises:
            InputError: a name belongs to another entry, or has characters besides letters, digits, `.`, `_` and `-`.
        """
        for one in (name, *aliases):
            if not re.fullmatch(r"\w[\w.-]*", one):
                raise InputError(f"{one!r} cannot name a {self._what}: expected letters, digits, '.', '_' and '-'")
            if self.is_taken(one) and self._entries[one] is not entry and self._entries[one] != entry:
                raise InputError(f"a {self._what} with the name {one!r} is already registered; choose another name")
        self._entries |= dict.fromkeys((name, *aliases), entry)

    def is_taken(self, name: str) -> bool:
        """Return whether a name is registered so far, without importing entry points."""
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        """Return an entry.

        Raises:
            InputError: nothing is registered under this name.
        """
        if name not in self:
            failed = "".join(f"; {failure}" for failure in _load_entry_points())
            raise InputError(
                f"unknown {self._what} {str(name)!r:.100}; expected one of {', '.join(sorted(self._entries))}, "
                f"or import the module that registers it{failed}"
            )
        return self._entries[name]

    @overload
    def get(self, name: str, /) -> Entry | None: ...
    @overload
    def get(self, name: str, /, default: Entry | Default) -> Entry | Default: ...
    def get(self, name: str, /, default: Any = None) -> Any:
        """Return an entry, or the default if nothing is registered under this name."""
        return self._entries[name] if name in self else default

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
def _load_entry_points() -> tuple[str, ...]:
    """Import the modules of the entry points of installed packages, once.

    An entry point that fails is skipped with a warning, so that a broken package disables its own names alone.

    Returns:
        A sentence for each entry point that failed, with its package and the error.
    """
    failures = []
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            package = "an unknown package" if point.dist is None else point.dist.name
            failure = (
                f"the entry point {point.name!r} ({point.value}) of {package} could not be imported: "
                f"{type(error).__name__}: {error}"
            )
            failures.append(failure)
            warnings.warn(failure, stacklevel=4)
    return tuple(failures)

"""Cells of a user's label columns: their values as names of labels, lists of names, or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyspan.errors import InputError
from tinyspan.labels import matched
from tinyspan.workflows.tasks.base import Split

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "as_flags",
    "as_lists",
    "as_names",
    "as_numbers",
    "first_row",
    "in_natural_order",
    "is_list",
    "is_missing",
    "listed",
    "number_of",
    "require_lists",
]

SEPARATORS = ("|", ";", ",")  # between several labels in a cell
TRUE, FALSE = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no", ""}
PRINTED = re.compile(r"""\[(?:\s*(?:['"]|None|True|False).*|[\d\s.,+-]*)\]""", re.DOTALL)  # a list as text


def is_missing(value: Any) -> bool:
    """Return whether a cell is a missing value of pandas."""
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def is_list(value: Any) -> bool:
    """Return whether a cell contains several values."""
    return isinstance(value, list | tuple | np.ndarray)


def number_of(value: Any) -> float | None:
    """Return a cell as a finite number; None if it is something else.

    Example:
        >>> number_of("1.5"), number_of(True), number_of("1_5")
        (1.5, None, None)
    """
    if isinstance(value, bool | np.bool_) or is_list(value) or (isinstance(value, str) and "_" in value):
        return None  # Python reads `1_000` as 1000
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def in_natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return different names in alphabetical order, or in the order of their values if all of them are numbers.

    Example:
        >>> in_natural_order(["10", "9", "10"]), in_natural_order(["bug", "billing"])
        (('9', '10'), ('billing', 'bug'))
    """
    different = set(names)
    if all(number_of(name) is not None for name in different):
        return tuple(sorted(different, key=lambda name: (float(name), name)))
    return tuple(sorted(different))


def first_row(chosen: pd.Series) -> Any:
    """Return the index of the first true value."""
    return chosen.index[chosen][0]


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return names in one line, the first of them if there are many.

    Example:
        >>> listed(["billing", "bug", "question"], most=2)
        'billing, bug and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def as_names(cells: pd.Series, what: str) -> pd.Series:
    """Return cells as names of labels: `billing`, `true` for a boolean, `3` for 3 and 3.0.

    Args:
        cells: cells of a label column.
        what: name of the rows, for messages.

    Raises:
        InputError: a cell is empty or a list, or there are cells of several types.
    """
    kinds: dict[str, tuple[Any, Any]] = {}
    for row, value in cells.items():
        if is_list(value):
            raise InputError(
                f"{what}: expected one label per row, but row {row} (counted from 0) has the list {value!r:.60}"
            )
        if is_missing(value) or not str(value).strip():
            raise InputError(f"{what}: row {row} (counted from 0) has no label in {cells.name!r}")
        kinds.setdefault(_kind(value), (row, value))
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.values())[:2]
        raise InputError(
            f"{what}: the labels in {cells.name!r} are of mixed types: row {one} (counted from 0) has {first!r:.50}, "
            f"row {other} has {second!r:.50}"
        )
    return cells.map(_name)


def as_numbers(cells: pd.Series, what: str) -> pd.Series:
    """Return cells as real numbers.

    Raises:
        InputError: a cell is not a finite number of float32.
    """
    import pandas as pd

    numbers = cells.map(number_of).astype(float)
    with np.errstate(over="ignore"):
        wrong = pd.Series(~np.isfinite(numbers.to_numpy("float32")), index=cells.index)
    if wrong.any():
        row = first_row(wrong)
        raise InputError(
            f"{what}: expected a real number in {cells.name!r}, but row {row} (counted from 0) has "
            f"{cells.loc[row]!r:.50}, and {int(wrong.sum()) - 1} more rows have none"
        )
    return numbers


def as_lists(cells: Mapping[Split, pd.Series], name: str, names: Sequence[str] | None = None) -> dict[Split, pd.Series]:
    """Return cells with several labels as lists of names: lists, or text with `|`, `;` or `,` between labels.

    The first of these marks that occurs in a cell of any split is the separator in all of them.

    Args:
        cells: cells of a label column, by split.
        name: name of the table, for messages.
        names: names of the labels, if they are known; such a name is not split, whatever marks are in it.

    Raises:
        InputError: a cell is missing, or a list as text, or a list has a missing value.
    """
    for split, one in cells.items():
        require_lists(one, f"{split} rows of {name}")
        for row, value in one.items():
            if is_missing(value) and not is_list(value):
                raise InputError(
                    f"{split} rows of {name}: row {row} (counted from 0) has nothing in {one.name!r}; write no labels "
                    "as an empty list or an empty text"
                )
    texts = {value.strip() for one in cells.values() for value in one if isinstance(value, str)}
    single = matched(texts, names or ())
    separator = next(
        (mark for mark in SEPARATORS if any(mark in text for text in texts - single.keys())), SEPARATORS[0]
    )

    def split_cell(value: Any) -> list[str]:
        if is_list(value):
            return [_name(one) for one in value]
        text = _name(value)
        parts = [text] if text in single else text.split(separator)
        return [part for part in map(str.strip, parts) if part]

    return {split: one.map(split_cell) for split, one in cells.items()}


def require_lists(cells: pd.Series, what: str) -> None:
    """Check that no cell is a list that was written as text, as pandas does in CSV, or has a missing value.

    Raises:
        InputError: a cell is.
    """
    for row, value in cells.items():
        if isinstance(value, str) and PRINTED.fullmatch(value.strip()):
            raise InputError(
                f"{what}: row {row} (counted from 0) has the text {value!r:.60} in {cells.name!r}, a printed list; "
                "save lists as JSON lines or parquet"
            )
        if is_list(value) and any(one is None or (isinstance(one, float) and math.isnan(one)) for one in value):
            raise InputError(f"{what}: row {row} (counted from 0) has a list with a missing value in {cells.name!r}")


def as_flags(rows: pd.DataFrame, what: str) -> pd.Series:
    """Return columns of 0 and 1, one per label, as lists of the names of the columns with 1.

    Raises:
        InputError: a cell is neither 0 nor 1, true nor false, yes nor no.
    """
    import pandas as pd

    for column in rows:
        words = rows[column].map(lambda value: _name(value).casefold())
        wrong = ~words.isin(TRUE | FALSE)
        if wrong.any():
            row = first_row(wrong)
            raise InputError(
                f"{what}: expected 0 or 1 in each of several label columns, but row {row} (counted from 0) has "
                f"{rows[column].loc[row]!r:.50} in {column!r}"
            )
    columns = [str(column) for column in rows]
    return pd.Series(
        [
            [name for name, value in zip(columns, values, strict=True) if _name(value).casefold() in TRUE]
            for values in rows.itertuples(index=False)
        ],
        index=rows.index,
        dtype=object,
    )


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "boolean"
    return "number" if isinstance(value, int | float | np.number) else "text"


def _name(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()

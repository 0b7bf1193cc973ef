"""Tables on disk: CSV, JSON, parquet and plain text, with the same fields in every row."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import pyarrow.parquet as pq

from tinyspan.errors import InputError

__all__ = ["LABEL_NAMES", "read_csv", "read_split"]

LABEL_NAMES = "label_names"  # key in `attrs` of the rows for the names of their labels, if the file has them

OTHER_DELIMITERS = {"\t": "a tab", ";": "';'", "|": "'|'"}


def read_split(
    folder: Path, names: Sequence[str], columns: Sequence[str], *, running_text: bool = False
) -> pd.DataFrame:
    """Read the first file in a folder that has one of these names and a supported suffix.

    Args:
        folder: folder of the file.
        names: file names without suffix, in order of preference.
        columns: the text columns.
        running_text: whether a plain text file is accepted, too, as a table of one row.

    Raises:
        InputError: there is no such file, it cannot be read, or its rows do not have the same fields.
    """
    if not folder.is_dir():
        wrong = "is a file; expected the folder it lies in" if folder.exists() else "does not exist"
        raise InputError(f"the data folder {folder} {wrong}")
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": _read_parquet,
        ".csv": lambda path: _read_users_csv(path, columns),
        ".jsonl": lambda path: _read_json(path, columns),
        ".json": lambda path: _read_json(path, columns),
    }
    if running_text:
        readers[".txt"] = lambda path: pd.DataFrame({"text": [path.read_text(encoding="utf-8-sig")]})
    for name in names:
        for suffix, reader in readers.items():
            path = folder / f"{name}{suffix}"
            if path.is_file():
                try:
                    return reader(path)
                except InputError:
                    raise
                except (ValueError, OSError, csv.Error) as error:
                    raise InputError(f"{path} cannot be read: {error}") from error
    others = sorted(path.name for name in names for path in folder.glob(f"{name}.*"))
    hint = f"; found {', '.join(others)}" if others else ""
    raise InputError(f"{folder} has no {' or '.join(names)} file; expected one of {', '.join(readers)}{hint}")


def read_csv(file: TextIO, columns: Sequence[str]) -> pd.DataFrame:
    """Read a well-formed CSV file in which `NA`, `null` and `007` are text; only an empty label is missing.

    Args:
        file: opened with `newline=""`.
        columns: the text columns.
    """
    return pd.read_csv(
        file,
        index_col=False,
        keep_default_na=False,
        na_values={"label": [""]},
        dtype=dict.fromkeys(columns, str),
    )


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read a parquet file, and the names of its labels if the library datasets wrote them."""
    rows = pd.read_parquet(path)
    stored = (pq.read_schema(path).metadata or {}).get(b"huggingface")
    feature = json.loads(stored).get("info", {}).get("features", {}).get("label") if stored else None
    if isinstance(feature, dict):
        rows.attrs[LABEL_NAMES] = feature.get("names")
    return rows


def _read_users_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    with path.open(encoding="utf-8-sig", newline="") as file:
        _check_fields(file, columns, str(path))
        file.seek(0)
        return read_csv(file, columns)


def _check_fields(file: TextIO, columns: Sequence[str], name: str) -> None:
    """Check that pandas will not read a field as an index, cut it off or fill it with missing values.

    Raises:
        InputError: the fields are not separated by commas, a column name occurs twice, or a row has more or fewer
            fields than the header.
    """
    with _unlimited_fields():
        rows = _csv_rows(file)
        _, header = next(rows, ("", []))
        if len(header) == 1:
            for delimiter, spelled in OTHER_DELIMITERS.items():
                if delimiter in header[0]:
                    raise InputError(f"{name}: expected fields separated by commas, but the header has {spelled}")
        for column, count in Counter(header).items():
            if count > 1 and column in (*columns, "label"):
                raise InputError(f"{name}: the header names the column {column!r} {count} times")
        for where, fields in rows:
            if len(fields) != len(header):
                raise InputError(
                    f"{name}, {where}: expected as many fields as in the header ({len(header)}), found {len(fields)}; "
                    f"{_remedy(fields, len(header))}"
                )


def _csv_rows(file: TextIO) -> Iterator[tuple[str, list[str]]]:
    """Yield the line numbers and the fields of each row, without blank lines."""
    reader, first = csv.reader(file), 1
    for fields in reader:
        last = reader.line_num
        if len(fields) > 1 or any(field.strip() for field in fields):
            yield f"line {first}" if first == last else f"lines {first} to {last}", fields
        first = last + 1


def _remedy(fields: Sequence[str], expected: int) -> str:
    if len(fields) < expected:
        return "write empty fields too, and put text with line breaks in quotation marks that are closed"
    if not any(fields[expected:]):
        return "remove the commas at the end of the line"
    return 'put text with commas in quotation marks ("Good, but long",1)'


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Return a context in which `csv` reads texts of more than 131,072 characters."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read JSON, with one row per line or a list of rows."""
    with path.open(encoding="utf-8-sig") as file:
        rows = dict(_json_rows(file))
    wanted = [column for column in (*columns, "label") if any(column in row for row in rows.values())]
    for where, row in rows.items():
        for column in wanted:
            if column not in row:
                raise InputError(
                    f"{path}, {where}: no {column!r}, which other rows have; found {', '.join(row) or 'no keys'}"
                )
    return pd.DataFrame(list(rows.values()))


def _json_rows(file: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the line number or index, and the content, of each row.

    Raises:
        ValueError: the file is not JSON, or a row is not an object.
    """
    lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip()[0] == "[":
        rest = "".join(line for _, line in lines)
        places = ((f"row {index}, counted from 0", row) for index, row in enumerate(json.loads(first[1] + rest)))
    else:
        places = ((where, _parse(line, where)) for where, line in (first, *lines))
    for where, row in places:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object of columns and values, got {row!r:.50}")
        yield where, row


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

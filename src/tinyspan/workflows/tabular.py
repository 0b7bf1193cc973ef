"""Tables on disk: CSV, JSON, parquet and plain text, with the same fields in every row."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinyspan.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LABEL_NAMES",
    "SUFFIXES",
    "Labels",
    "csv_rows",
    "json_rows",
    "read_csv",
    "read_hub",
    "read_split",
    "read_table",
    "require_column",
]

LABEL_NAMES = "label_names"  # key in `attrs` of the rows for the names of their labels, if the file has them
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".conll")  # of tables
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
TOKENS, TAGS = "tokens", "tags"  # columns of a CoNLL file
COMMENT = re.compile(r"# (?:id |newdoc\b|newpar\b|[\w.:]+ ?= ?)")  # of CoNLL-U and MultiCoNER
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character in JSON


@dataclass(frozen=True)
class Labels:
    """The label columns of a table, and how their cells are read from text files.

    Attributes:
        columns: names of the columns.
        text: whether their cells are kept as text, such as `1` or `billing`; otherwise they are numbers.
    """

    columns: tuple[str, ...] = ("label",)
    text: bool = False


def read_split(
    folder: Path,
    names: Sequence[str],
    columns: Sequence[str],
    labels: Labels = Labels(),
    *,
    running_text: bool = False,
) -> pd.DataFrame:
    """Read the first file in a folder that has one of these names and a supported suffix.

    Args:
        folder: folder of the file.
        names: file names without suffix, in order of preference.
        columns: the text columns.
        labels: the label columns.
        running_text: whether a plain text file is accepted, too, as a table of one row.

    Raises:
        InputError: there is no such file, it cannot be read, or its rows do not have the same fields.
    """
    if not folder.is_dir():
        wrong = "is a file; expected the folder it lies in" if folder.exists() else "does not exist"
        raise InputError(f"the data folder {folder} {wrong}")
    suffixes = (*SUFFIXES, ".txt") if running_text else SUFFIXES
    for name in names:
        for suffix in suffixes:
            for path in sorted(folder.glob(f"{name}.*")):
                if path.name.removeprefix(name).lower() == suffix and path.is_file():
                    return read_table(path, columns, labels)
    others = sorted(path.name for name in names for path in folder.glob(f"{name}.*"))
    hint = f"; found {', '.join(others)}" if others else ""
    raise InputError(f"{folder} has no {' or '.join(names)} file; expected one of {', '.join(suffixes)}{hint}")


def read_table(path: Path, columns: Sequence[str], labels: Labels = Labels()) -> pd.DataFrame:
    """Read a table from a file; its suffix determines the format.

    A `.conll` file has one token and its tag per line and a blank line between rows; the columns of the table are
    `tokens` and `tags`. A `.txt` file is one text.

    Args:
        path: the file.
        columns: the text columns.
        labels: the label columns.

    Raises:
        InputError: the file does not exist, its suffix is unknown, it cannot be read, or its rows do not have the same
            fields.
    """
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[], pd.DataFrame]] = {
        ".parquet": lambda: _read_parquet(path, labels),
        ".csv": lambda: _read_users_csv(path, columns, labels),
        ".tsv": lambda: _read_users_csv(path, columns, labels),
        ".jsonl": lambda: _read_json(path, columns, labels),
        ".json": lambda: _read_json(path, columns, labels),
        ".conll": lambda: _read_conll(path),
        ".txt": lambda: _read_text(path),
    }
    if not path.is_file():
        raise InputError(f"the data file {path} does not exist")
    if suffix not in readers:
        advice = "; save the sheet as CSV" if suffix in (".xlsx", ".xls", ".ods") else ""
        raise InputError(f"{path} has an unknown suffix; expected one of {', '.join(readers)}{advice}")
    try:
        return readers[suffix]()
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); save it with this encoding") from error
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_hub(name: str) -> dict[str, pd.DataFrame]:
    """Return the splits of a data set on the hub, `owner/name` or `owner/name:configuration`.

    Raises:
        InputError: the hub cannot be reached, or there is no such data set.
    """
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        loaded = load_dataset(repository, configuration or None)
        tables = {str(split): rows.to_pandas() for split, rows in loaded.items()}
    except Exception as error:
        raise InputError(
            f"{name} is neither a file nor a folder, and could not be loaded as a data set from the hub: {error}; "
            "expected a file, a folder with train.* and validation.*, owner/name or owner/name:configuration"
        ) from error
    for split, rows in loaded.items():
        features = {
            column: getattr(feature, "feature", feature) for column, feature in rows.features.items()
        }  # of lists
        names = {column: getattr(feature, "names", None) for column, feature in features.items()}
        tables[str(split)].attrs[LABEL_NAMES] = {column: value for column, value in names.items() if value}
    return tables


def read_csv(file: TextIO, columns: Sequence[str], labels: Labels = Labels(), delimiter: str = ",") -> pd.DataFrame:
    """Read a well-formed CSV file in which `NA`, `null` and `007` are text; only an empty number is missing.

    Args:
        file: opened with `newline=""`.
        columns: the text columns.
        labels: the label columns.
        delimiter: the character between fields.
    """
    import pandas as pd

    return pd.read_csv(
        file,
        sep=delimiter,
        index_col=False,
        keep_default_na=False,
        na_values={} if labels.text else {column: [""] for column in labels.columns},
        dtype=dict.fromkeys((*columns, *labels.columns) if labels.text else columns, str),
    )


def _read_parquet(path: Path, labels: Labels) -> pd.DataFrame:
    """Read a parquet file, and the names of its labels if the library datasets wrote them.

    An index that pandas stored is a column like any other, since rows are numbered by their place in the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        table = file.read()
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # categories, some of which may have no row
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    rows: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    stored = (table.schema.metadata or {}).get(b"huggingface")
    features = json.loads(stored).get("info", {}).get("features", {}) if stored else {}
    names = {}
    for column in labels.columns:
        feature = features.get(column)
        feature = feature.get("feature", feature) if isinstance(feature, dict) else feature  # of a list
        if isinstance(feature, dict) and feature.get("names"):
            names[column] = feature["names"]
    rows.attrs[LABEL_NAMES] = names
    return rows


def _read_text(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({"text": [path.read_text(encoding="utf-8-sig")]})


def _read_users_csv(path: Path, columns: Sequence[str], labels: Labels) -> pd.DataFrame:
    wanted = (*columns, *labels.columns)
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = _delimiter_of(file.readline(), wanted)
        file.seek(0)
        for _ in _checked_rows(file, wanted, str(path), delimiter):
            pass
        file.seek(0)
        return read_csv(file, columns, labels, delimiter)


def csv_rows(file: TextIO, wanted: Sequence[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the line numbers and the fields of the header and of each row of a CSV file; the delimiter is inferred.

    Args:
        file: opened with `newline=""`.
        wanted: names of columns, by which the delimiter is recognized.
        name: name of the file, for messages.

    Raises:
        InputError: a column name occurs twice, or a row has more or fewer fields than the header.
    """
    header = file.readline()
    yield from _checked_rows(chain([header], file), None, name, _delimiter_of(header, wanted))


def require_column(column: str, found: Sequence[str], what: str) -> None:
    """Check that a table has a column.

    Raises:
        InputError: it has not; the message lists the columns, those with similar names first.
    """
    if column not in found:
        near = get_close_matches(column, found, n=len(found) or 1, cutoff=0.3)
        ordered = [*near, *(name for name in found if name not in near)]
        raise InputError(f"{what}: no column {column!r}; found {', '.join(ordered) or 'none'}")


def _delimiter_of(header: str, columns: Sequence[str]) -> str:
    """Return the delimiter that finds the most of the wanted columns in the header; among those, the most fields."""

    def found(delimiter: str) -> tuple[int, int]:
        fields = next(csv.reader([header], delimiter=delimiter), [])
        return len({*columns} & {*fields}), len(fields)

    with _unlimited_fields():
        return max(DELIMITERS, key=found)  # a comma if none finds more


def _checked_rows(
    lines: Iterable[str], columns: Sequence[str] | None, name: str, delimiter: str
) -> Iterator[tuple[str, list[str]]]:
    """Yield the line numbers and the fields of each row, without blank lines; no field is cut off or filled in.

    Args:
        lines: lines of the file.
        columns: names that may occur only once in the header; None for all.
        name: name of the file, for messages.
        delimiter: the character between fields.

    Raises:
        InputError: a column name occurs twice, or a row has more or fewer fields than the header.
    """
    with _unlimited_fields():
        reader, first, header = csv.reader(lines, delimiter=delimiter), 1, None
        for fields in reader:
            last = reader.line_num
            where = f"line {first}" if first == last else f"lines {first} to {last}"
            first = last + 1
            if not fields or (fields[0].strip() == "" and len(fields) == 1 and (header is None or len(header) > 1)):
                continue  # in a table of one column, "" is an empty text
            if header is None:
                header = fields
                for column, count in Counter(header).items():
                    if count > 1 and (columns is None or column in columns):
                        raise InputError(f"{name}: the header names the column {column!r} {count} times")
            if len(fields) != len(header):
                raise InputError(
                    f"{name}, {where}: expected as many fields as in the header ({len(header)}), found {len(fields)}; "
                    f"{_remedy(fields, len(header), delimiter)}"
                )
            yield where, fields


def _remedy(fields: Sequence[str], expected: int, delimiter: str) -> str:
    if len(fields) < expected:
        return "write empty fields too, and put text with line breaks in quotation marks that are closed"
    if not any(fields[expected:]):
        return f"remove the {DELIMITERS[delimiter]} at the end of the line"
    text = f'("Good{delimiter} but long"{delimiter}1)'
    return f"put text with {DELIMITERS[delimiter]} in quotation marks {text}"


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Return a context in which `csv` reads texts of more than 131,072 characters."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path, columns: Sequence[str], labels: Labels) -> pd.DataFrame:
    """Read JSON, with one row per line or a list of rows."""
    import pandas as pd

    with path.open(encoding="utf-8-sig") as file:
        rows = dict(json_rows(file))
    wanted = [column for column in (*columns, *labels.columns) if any(column in row for row in rows.values())]
    for where, row in rows.items():
        for column in wanted:
            if column not in row:
                raise InputError(
                    f"{path}, {where}: no {column!r}, which other rows have; found {', '.join(row) or 'no keys'}"
                )
    return pd.DataFrame(list(rows.values()))


def json_rows(file: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the line number or index, and the content, of each row of JSON lines or of a list of rows.

    Raises:
        ValueError: the file is not JSON, or a row is not an object.
    """
    lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip()[0] == "[":
        text = first[1] + "".join(line for _, line in lines)
        places = ((f"row {index} (counted from 0)", row) for index, row in enumerate(json.loads(text)))
        if SURROGATE.search(text):
            places = ((where, _in_characters(row, where)) for where, row in places)
    else:
        places = ((where, _parse(line, where)) for where, line in chain([first], lines))
    for where, row in places:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object of columns and values, got {row!r:.50}")
        yield where, row


def _parse(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return _in_characters(row, where) if SURROGATE.search(line) else row


def _in_characters(row: Any, where: str) -> Any:
    """Return a row, after a check that its text can be encoded.

    Raises:
        ValueError: it has half of a surrogate pair.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: {half!r} is half of a surrogate pair, such as of an emoji that was cut") from error
    return row


def _read_conll(path: Path) -> pd.DataFrame:
    """Read lines of a token and its tag, with blank lines between rows; other fields in between are skipped.

    Comments are skipped, too: lines at the start of a row that begin with `# ` and have the form of CoNLL-U's or
    another number of fields.

    Raises:
        ValueError: a line has no tag, or there is no row.
    """
    import pandas as pd

    rows: list[tuple[list[str], list[str]]] = []
    lines: list[tuple[int, str, list[str]]] = []  # of the present row, with their numbers and fields
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(chain(file, [""]), 1):  # no splitlines: a token may contain U+2028
            fields = _conll_fields(line)
            if line.strip() and fields[0] != "-DOCSTART-":
                lines.append((number, line, fields))
                continue
            while (
                lines
                and lines[0][1].startswith("# ")
                and (COMMENT.match(lines[0][1]) or len(lines[0][2]) != len(lines[-1][2]))
            ):
                del lines[0]
            for place, content, found in lines:
                if len(found) < 2:
                    raise ValueError(f"line {place}: expected a token and its tag, got {content.rstrip()!r:.50}")
            if lines:
                rows.append(([found[0] for *_, found in lines], [found[-1] for *_, found in lines]))
            lines = []
    if not rows:
        raise ValueError("there is no row")
    return pd.DataFrame(rows, columns=[TOKENS, TAGS])


def _conll_fields(line: str) -> list[str]:
    """Return the fields of a line, which tabs separate if there are some, and otherwise spaces."""
    return line.rstrip("\n\t ").split("\t") if "\t" in line else re.split(" +", line.strip("\n "))

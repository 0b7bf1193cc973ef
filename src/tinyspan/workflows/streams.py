"""Tables that are read and written a chunk of rows at a time: CSV, JSON lines, parquet, and the standard streams."""

from __future__ import annotations

import csv
import io
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from tinyspan.errors import InputError
from tinyspan.io.folders import check_place
from tinyspan.io.storage import replacing
from tinyspan.workflows.tabular import csv_rows, json_rows, read_table, require_column

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = [
    "CHUNK",
    "FORMATS",
    "INPUTS",
    "Chunk",
    "Columns",
    "Place",
    "Writer",
    "check_output",
    "check_places",
    "columns_of",
    "open_output",
    "read_chunks",
]

CHUNK = 4096  # rows in memory at a time
STANDARD = "-"  # name of standard input or output
TOO_LARGE = "{}: the input has an integer of more than 64 bits, which a parquet file cannot have; write JSON lines"
Format = Literal["csv", "tsv", "jsonl", "parquet", "json", "conll"]
FORMATS: tuple[Format, ...] = ("csv", "tsv", "jsonl", "parquet")
INPUTS: tuple[Format, ...] = (*FORMATS, "json", "conll")  # formats that can be read; the last two are read whole
STREAMED: tuple[Format, ...] = ("csv", "tsv", "jsonl")  # formats that need no seeking


@dataclass(frozen=True)
class Place:
    """A file, or standard input or output, and its format.

    Attributes:
        path: path of the file; None for standard input or output.
        format: `csv`, `tsv`, `jsonl` or `parquet`; for input also `json` or `conll`.
    """

    path: Path | None
    format: Format

    @classmethod
    def of(cls, name: str | Path, stream_format: str = "csv", formats: Sequence[Format] = FORMATS) -> Place:
        """Return a place by the path of a file, whose suffix is its format, or by `-` for standard input or output.

        Args:
            name: the path, or `-`.
            stream_format: format of standard input or output.
            formats: formats of a file.

        Raises:
            InputError: the suffix or the format is unknown.
        """
        if str(name) == STANDARD:
            chosen = [form for form in STREAMED if form == stream_format]
            if not chosen:
                raise InputError(
                    f"unknown format {stream_format!r} of a standard stream; expected {' or '.join(STREAMED)}"
                )
            return cls(None, chosen[0])
        path = Path(name)
        chosen = [form for form in formats if path.suffix.lower() == f".{form}"]
        if not chosen:
            expected = ", ".join(f".{form}" for form in formats)
            advice = "; save the sheet as CSV" if path.suffix.lower() in (".xlsx", ".xls", ".ods") else ""
            raise InputError(
                f"{path} has an unknown suffix; expected one of {expected}, or `-` for a standard stream{advice}"
            )
        return cls(path, chosen[0])

    def require_input(self) -> None:
        """Check that there is a file to read.

        Raises:
            InputError: the file does not exist.
        """
        if self.path is not None and not self.path.is_file():
            raise InputError(f"the input file {self.path} does not exist")

    def __str__(self) -> str:
        """Return the path, for messages."""
        return "the standard stream" if self.path is None else str(self.path)


class Chunk(NamedTuple):
    """Consecutive rows of a table.

    Attributes:
        first: number of the first row, counted from 0.
        columns: names of the columns; of JSON lines, those that a row in the chunk has.
        rows: the rows, with the values of the columns.
        places: where each row is in the file, for messages.
        batch: the rows as stored, if the table is a parquet file.
    """

    first: int
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    places: list[str]
    batch: pa.RecordBatch | None = None


def read_chunks(source: Place, wanted: Sequence[str], size: int = CHUNK) -> Iterator[Chunk]:
    """Yield the rows of a table in chunks; a table without rows is one chunk without rows.

    The cells of a CSV file are text; `NA` and an empty cell are no missing values.

    Args:
        source: the table.
        wanted: names of columns that it must have.
        size: number of rows per chunk.

    Raises:
        InputError: the file does not exist or cannot be read, a column is missing, or rows do not have the same fields.
    """
    import pyarrow as pa

    source.require_input()
    readers = {"parquet": _parquet_chunks, "jsonl": _json_chunks, "json": _json_chunks, "conll": _whole_chunks}
    chunks = readers.get(source.format, _csv_chunks)
    try:
        yield from chunks(source, wanted, size)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 ({error}); save it with this encoding") from error
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        form = f" as {source.format}, the format of both standard streams" if source.path is None else ""
        raise InputError(f"{source} cannot be read{form}: {error}") from error


def _csv_chunks(source: Place, wanted: Sequence[str], size: int) -> Iterator[Chunk]:
    with _opened(source) as file:
        rows = csv_rows(file, wanted, str(source))
        _, header = next(rows, ("", []))
        for column in wanted:
            require_column(column, header, str(source))
        records = ((where, dict(zip(header, fields, strict=True))) for where, fields in rows)
        yield from _grouped(records, size, header)


def _json_chunks(source: Place, wanted: Sequence[str], size: int) -> Iterator[Chunk]:
    with _opened(source) as file:
        for chunk in _grouped(json_rows(file), size):
            for place, row in zip(chunk.places, chunk.rows, strict=True):
                for column in wanted:
                    if column not in row:
                        require_column(column, [*row], f"{source}, {place}")
            yield chunk


def _whole_chunks(source: Place, wanted: Sequence[str], size: int) -> Iterator[Chunk]:
    """Yield the rows of a file that can only be read whole."""
    assert source.path is not None
    table = read_table(source.path, wanted)
    columns = [str(name) for name in table.columns]
    for column in wanted:
        require_column(column, columns, str(source))
    rows = zip(*(table[name] for name in table.columns), strict=True)
    records = (
        (f"row {number} (counted from 0)", dict(zip(columns, row, strict=True))) for number, row in enumerate(rows)
    )
    yield from _grouped(records, size, columns)


def _parquet_chunks(source: Place, wanted: Sequence[str], size: int) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
        names, first = tuple(file.schema_arrow.names), 0
        for column in wanted:
            require_column(column, names, str(source))
        if len({*names}) < len(names):
            raise InputError(f"{source} has two columns of one name; found {', '.join(names)}")
        for batch in file.iter_batches(size):
            yield _parquet_chunk(first, batch)
            first += len(batch)
        if first == 0:
            yield _parquet_chunk(0, pa.RecordBatch.from_pylist([], schema=file.schema_arrow))


def _parquet_chunk(first: int, batch: pa.RecordBatch) -> Chunk:
    places = [f"row {row} (counted from 0)" for row in range(first, first + len(batch))]
    return Chunk(first, tuple(batch.schema.names), batch.to_pylist(), places, batch)


def _grouped(
    records: Iterator[tuple[str, dict[str, Any]]], size: int, header: Sequence[str] | None = None
) -> Iterator[Chunk]:
    """Yield rows with their places in chunks, at least one."""
    first = 0
    while (group := list(islice(records, size))) or first == 0:
        places, rows = [place for place, _ in group], [row for _, row in group]
        columns = header if header is not None else dict.fromkeys(name for row in rows for name in row)
        yield Chunk(first, tuple(columns), rows, places)
        if not group:
            return
        first += len(group)


@contextmanager
def _opened(source: Place) -> Iterator[TextIO]:
    if source.path is not None:
        with source.path.open(encoding="utf-8-sig", newline="") as file:
            yield file
        return
    stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
    try:
        yield stream
    finally:
        stream.detach()


# -- output -----------------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """The columns of an input, for an output.

    Attributes:
        names: names of the columns.
        schema: their types in a parquet file; None if the output is another file.
    """

    names: tuple[str, ...]
    schema: pa.Schema | None = None


def columns_of(chunks: Iterable[Chunk], target: Place) -> Columns:
    """Return the columns of all chunks of a table.

    Args:
        chunks: the chunks, at least one.
        target: the output, whose format decides whether the columns need types.

    Raises:
        InputError: a column has values of several types, which a parquet file cannot have.
    """
    import pyarrow as pa

    names: dict[str, None] = {}
    schemas: list[pa.Schema] = []  # one at most: that of the chunks so far, with the metadata of the first
    for chunk in chunks:
        names.update(dict.fromkeys(chunk.columns))
        if target.format == "parquet":
            try:
                schemas = [pa.unify_schemas([*schemas, _schema_of(chunk)], promote_options="permissive")]
            except OverflowError as error:
                raise InputError(TOO_LARGE.format(target)) from error
            except pa.ArrowException as error:
                raise InputError(
                    f"{target}: a column of the input has values of several types, which a parquet file cannot have "
                    f"({error}); write JSON lines"
                ) from error
    return Columns(tuple(names), schemas[0] if schemas else None)


def _schema_of(chunk: Chunk) -> pa.Schema:
    import pyarrow as pa

    if chunk.batch is not None:
        return chunk.batch.schema
    cells = {name: [_flat(row.get(name)) for row in chunk.rows] for name in chunk.columns}
    return pa.schema([(name, pa.array(values).type if values else pa.string()) for name, values in cells.items()])


def check_places(source: str | Path, target: str | Path, stream_format: str, overwrite: bool) -> tuple[Place, Place]:
    """Return the input and the output of a table, which are checked before any work.

    Args:
        source: path of the input, or `-` for standard input.
        target: path of the output, or `-` for standard output.
        stream_format: format of standard input and output.
        overwrite: replace an earlier output.

    Raises:
        InputError: a suffix or the format is unknown, the input does not exist, or as for `check_output`.
    """
    places = Place.of(source, stream_format, INPUTS), Place.of(target, stream_format)
    check_output(places[1], places[0], overwrite)
    places[0].require_input()
    return places


def check_output(target: Place, source: Place, overwrite: bool) -> None:
    """Check that an output file can be written, without changing it.

    Raises:
        InputError: it is the input, it exists already and `overwrite` is not set, or it cannot be written.
    """
    path = target.path
    if path is None:
        return
    if source.path is not None and path.exists() and source.path.exists() and path.samefile(source.path):
        raise InputError(f"{path} is the input and the output; choose another output file")
    if path.is_dir():
        raise InputError(f"the output {path} is a folder; expected a file")
    check_place(path.parent)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another output file or pass overwrite=True")


class Writer(ABC):
    """Writes the rows of an input with further columns; see `open_output`.

    Args:
        file: the opened output.
        target: the output.
        added: names and types of the further columns.
        columns: columns of the input; by default those of the first chunk.
    """

    def __init__(
        self, file: IO[bytes], target: Place, added: Mapping[str, pa.DataType], columns: Columns | None
    ) -> None:
        self._file, self._target, self._added = file, target, added
        self._columns, self._begun = columns, False

    def write(self, chunk: Chunk, values: Mapping[str, Sequence[Any]]) -> None:
        """Write the rows of a chunk.

        Args:
            chunk: the rows.
            values: values of the further columns, one per row.

        Raises:
            InputError: a row has a column that the rows before, which determine the columns, do not have.
        """
        columns = self._columns or columns_of([chunk], self._target)
        if not self._begun:
            self._columns, self._begun = columns, True
            self._begin(columns)
        self._write(chunk, [values[name] for name in self._added], columns)

    def _begin(self, columns: Columns) -> None:  # noqa: B027 - only some formats have a header
        """Write what precedes the rows; by default nothing."""

    @abstractmethod
    def _write(self, chunk: Chunk, values: Sequence[Sequence[Any]], columns: Columns) -> None:
        """Write the rows of a chunk."""

    def close(self) -> None:  # noqa: B027 - only some formats have an end
        """Write what follows the rows; by default nothing."""

    def _require_columns(self, chunk: Chunk, columns: Columns) -> None:
        known = {*columns.names}
        if unknown := [name for name in chunk.columns if name not in known]:
            place = next(place for place, row in zip(chunk.places, chunk.rows, strict=True) if unknown[0] in row)
            raise InputError(
                f"{self._target}: {place} of the input has {unknown[0]!r}, which the first rows do not have; write "
                "JSON lines, or read the input from a file"
            )


class _JsonWriter(Writer):
    def _write(self, chunk: Chunk, values: Sequence[Sequence[Any]], columns: Columns) -> None:
        for row, *cells in zip(chunk.rows, *values, strict=True):
            content = {**row, **dict(zip(self._added, cells, strict=True))}
            self._file.write(_json(content).encode() + b"\n")
        self._file.flush()


class _CsvWriter(Writer):
    def __init__(self, *arguments: Any, separator: str) -> None:
        super().__init__(*arguments)
        self._separator = separator

    def _begin(self, columns: Columns) -> None:
        self._write_lines([[*columns.names, *self._added]])

    def _write(self, chunk: Chunk, values: Sequence[Sequence[Any]], columns: Columns) -> None:
        self._require_columns(chunk, columns)
        self._write_lines(
            [*(_text(row.get(name)) for name in columns.names), *(_joined(cell, self._separator) for cell in cells)]
            for row, *cells in zip(chunk.rows, *values, strict=True)
        )

    def _write_lines(self, lines: Iterable[Sequence[str]]) -> None:
        text = io.StringIO(newline="")
        delimiter = "\t" if self._target.format == "tsv" else ","
        plain = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        quoted = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for line in lines:  # a lone carriage return, which readers take for the end of the row, is not quoted by itself
            (quoted if any("\r" in cell for cell in line) else plain).writerow(line)
        self._file.write(text.getvalue().encode())
        self._file.flush()


class _ParquetWriter(Writer):
    _writer: pq.ParquetWriter | None = None

    def _begin(self, columns: Columns) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert columns.schema is not None
        added = [pa.field(name, kind) for name, kind in self._added.items()]
        self._writer = pq.ParquetWriter(self._file, pa.schema([*columns.schema, *added], columns.schema.metadata))

    def _write(self, chunk: Chunk, values: Sequence[Sequence[Any]], columns: Columns) -> None:
        import pyarrow as pa

        assert self._writer is not None
        assert columns.schema is not None
        self._require_columns(chunk, columns)
        try:
            if chunk.batch is not None:
                stored = chunk.batch.columns
            else:
                cells = ([_flat(row.get(name)) for row in chunk.rows] for name in columns.names)
                stored = [pa.array(one, kind) for one, kind in zip(cells, columns.schema.types, strict=True)]
            added = [pa.array(one, kind) for one, kind in zip(values, self._added.values(), strict=True)]
            table = pa.Table.from_arrays([*stored, *added], schema=self._writer.schema)
        except OverflowError as error:
            raise InputError(TOO_LARGE.format(self._target)) from error
        except pa.ArrowException as error:
            raise InputError(
                f"{self._target}: {chunk.places[0]} to {chunk.places[-1]} of the input do not have the types of the "
                f"first rows ({error}); write JSON lines, or read the input from a file"
            ) from error
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextmanager
def open_output(
    target: Place, added: Mapping[str, pa.DataType], columns: Columns | None = None, *, separator: str = "|"
) -> Iterator[Writer]:
    """Open an output for the rows of an input with further columns.

    A file is written under a temporary name and renamed at the end, so that it is complete or absent.

    Args:
        target: the output.
        added: names and types of the further columns.
        columns: columns of the input, from `columns_of`; by default those of the first chunk.
        separator: text between the values of a further column with lists, in CSV.

    Raises:
        InputError: a row does not fit the columns, or the types in a parquet file.
        StorageError: the file cannot be written.
    """
    with _created(target) as file:
        arguments = (file, target, added, columns)
        writer: Writer
        if target.format == "parquet":
            writer = _ParquetWriter(*arguments)
        elif target.format == "jsonl":
            writer = _JsonWriter(*arguments)
        else:
            writer = _CsvWriter(*arguments, separator=separator)
        try:
            yield writer
        finally:
            writer.close()


@contextmanager
def _created(target: Place) -> Iterator[IO[bytes]]:
    if target.path is None:
        yield sys.stdout.buffer
        return
    with replacing(target.path) as temporary, temporary.open("wb") as file:
        yield file


def _flat(value: Any) -> Any:
    """Return a value for parquet: objects, and lists of objects or lists, as JSON text, as their fields may differ."""
    nested = isinstance(value, list) and any(isinstance(one, list | dict) for one in value)
    return _json(value) if nested or isinstance(value, dict) else value


def _text(value: Any) -> str:
    """Return a value for CSV: text as it is, nothing for a missing one, and everything that JSON has as JSON text."""
    if value is None or isinstance(value, str):
        return value or ""
    return _json(value) if isinstance(value, bool | int | float | list | dict) else str(value)  # dates, decimals


def _joined(value: Any, separator: str) -> str:
    return separator.join("_" if one is None else one for one in value) if isinstance(value, list) else _text(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)

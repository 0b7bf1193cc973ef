"""Predictions for the rows of a table, written with the rows, a chunk at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinyspan.errors import InputError, Interrupted
from tinyspan.workflows.language import IGNORED
from tinyspan.workflows.predictor import PREDICTION, PROBABILITY, Predictor
from tinyspan.workflows.results import trained_on
from tinyspan.workflows.streams import Chunk, Columns, Place, check_places, columns_of, open_output, read_chunks
from tinyspan.workflows.tasks.base import Array

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Report", "joined", "predict_table"]


class Report(NamedTuple):
    """What `predict_table` did.

    Attributes:
        rows: number of rows.
        metric: name of the main metric.
        scores: metrics by name, the main one first; empty if the rows were not scored.
        truncated: number of rows with words that were truncated and have no tag.
    """

    rows: int
    metric: str
    scores: dict[str, float]
    truncated: int


def predict_table(
    predictor: Predictor,
    source: str | Path,
    target: str | Path,
    *,
    label: Sequence[str] = (),
    stream_format: str = "csv",
    overwrite: bool = False,
    expect: Callable[[int | None], None] = lambda rows: None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Write the rows of a table with a column `prediction`, and for a classification `probability_LABEL` per label.

    A file is read twice: its rows are checked before the weights are loaded. Standard input is read once; rows are
    written as they come, so that an error may follow rows that are written. Memory does not grow with the number of
    rows, except for labels and what the metrics need of the predictions if the rows are scored.

    Args:
        predictor: the model.
        source: `.csv`, `.tsv`, `.jsonl` or `.parquet`, or `-` for standard input.
        target: the same, or `-` for standard output. A file is complete or absent.
        label: the label columns, for a score; by default those on which the model was trained, if the table has them.
        stream_format: format of standard input and output.
        overwrite: replace an earlier file.
        expect: function that gets the number of rows before the first prediction; None if it is not known.
        advance: function that gets a number of predicted rows.

    Raises:
        InputError: the input cannot be read, has no text column, or a row has no text or, if `label` is given, no
            label; or the output exists, is the input, or would have two columns of one name.
        StorageError: the output cannot be written.
    """
    places = check_places(source, target, stream_format, overwrite)
    try:
        return _predict(predictor, *places, tuple(label), expect, advance)
    except KeyboardInterrupt as error:
        state = "the output ends early" if places[1].path is None else f"{places[1]} is not written"
        raise Interrupted(f"{state}; repeat the command") from error


def _predict(
    predictor: Predictor,
    source: Place,
    target: Place,
    label: tuple[str, ...],
    expect: Callable[[int | None], None],
    advance: Callable[[int], None],
) -> Report:
    name, wanted = str(source), (*predictor.task.columns, *label)
    labels = _Labels(predictor, name, label)
    columns: Columns | None = None
    total: int | None = None

    def checked() -> Iterator[Chunk]:
        nonlocal total
        for chunk in read_chunks(source, wanted):
            predictor.texts(chunk, name)
            labels.add(chunk)
            total = chunk.first + len(chunk.rows)
            yield chunk

    if source.path is not None:
        columns = columns_of(checked(), target)
        _require_new(predictor.added, columns.names, name)
        labels.convert()
    expect(total)
    rows, truncated = 0, 0
    scored: list[tuple[Array, Array]] = []
    with open_output(target, predictor.added, columns, separator=predictor.separator) as writer:
        for chunk in read_chunks(source, wanted):
            if source.path is None:
                _require_new(predictor.added, chunk.columns, name)
                labels.add(chunk)
                labels.convert()
            texts = predictor.texts(chunk, name)
            answers = predictor.answers(texts, labels.of(texts.index), advance)
            writer.write(chunk, _values(answers.rows, predictor.added))
            rows, truncated = rows + len(chunk.rows), truncated + answers.truncated
            scored += answers.scored
        if total is not None and rows != total:
            raise InputError(f"{name} had {total:,} rows and has {rows:,} now: it was changed while it was read")
    if truncated:
        warnings.warn(
            f"{truncated:,} of {rows:,} rows have more than {predictor.max_length} tokens; their last words have no "
            "tag (max_length)",
            stacklevel=3,
        )
    scores = _scores(predictor, scored) if labels.columns else {}
    if scores and source.path is not None and trained_on(predictor.trained, source.path):
        warnings.warn(
            f"the model was trained on rows of {name}, so the score is too high; `evaluate` scores the held-out ones",
            stacklevel=3,
        )
    return Report(rows, predictor.task.metric, scores, truncated)


def _values(answers: Sequence[Mapping[str, Any]], added: Iterable[str]) -> dict[str, list[Any]]:
    """Return the values of the added columns."""
    labels = [name.removeprefix(PROBABILITY) for name in added if name != PREDICTION]
    probabilities = {
        f"{PROBABILITY}{label}": [answer["probabilities"][label] for answer in answers] for label in labels
    }
    return {PREDICTION: [answer[PREDICTION] for answer in answers], **probabilities}


def _require_new(added: Iterable[str], columns: Sequence[str], name: str) -> None:
    """Check that no column of the input has the name of an added one.

    Raises:
        InputError: a column has.
    """
    if shared := [column for column in added if column in columns]:
        raise InputError(f"{name} has a column {shared[0]!r}, which the output adds; rename it")


def _scores(predictor: Predictor, scored: Sequence[tuple[Array, Array]]) -> dict[str, float]:
    """Return the metrics of all rows, the main one first."""
    if not scored:
        return {}
    task = predictor.task
    predictions = joined([one for one, _ in scored], 0)
    labels = joined([one for _, one in scored], IGNORED)
    metrics = task.metrics(predictions, labels, predictor.labels)
    return {task.metric: metrics.pop(task.metric), **metrics}


def joined(arrays: Sequence[Array], padding: int) -> Array:
    """Return the rows of arrays, which are padded to the width of the widest, since tokens have it per batch."""
    if arrays[0].ndim < 2:
        return np.concatenate(arrays)
    width = max(one.shape[1] for one in arrays)
    return np.concatenate([np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=padding) for one in arrays])


class _Labels:
    """The labels of a table: their cells are added chunk by chunk, and then converted together.

    Attributes:
        columns: the label columns; empty if there are none, or if default columns do not contain the model's labels.
    """

    def __init__(self, predictor: Predictor, name: str, given: tuple[str, ...]) -> None:
        self._predictor, self._name, self._given = predictor, name, bool(given)
        self.columns = given or predictor.label_columns
        self._cells: dict[str, list[Any]] = {column: [] for column in self.columns}
        self._first = 0
        self._texts: dict[str, str] = {}
        self._numbered: pd.Series | None = None

    def add(self, chunk: Chunk) -> None:
        """Add the cells of a chunk; default columns that the table does not have are left out."""
        if not self._given and not {*self.columns} <= {*chunk.columns}:
            self.columns = ()
        for column in self.columns:
            cells = (row.get(column) for row in chunk.rows)
            self._cells[column] += [self._texts.setdefault(x, x) if isinstance(x, str) else x for x in cells]

    def convert(self) -> None:
        """Convert the cells that were added since the last call.

        Raises:
            InputError: the label columns were given, and a row has no label of the model's.
        """
        import pandas as pd

        if not self.columns or not (count := len(self._cells[self.columns[0]])):
            return
        index = range(self._first, self._first + count)
        frame = pd.DataFrame({column: self._cells[column] for column in self.columns}, index=index, dtype=object)
        self._first, self._cells = self._first + count, {column: [] for column in self.columns}
        try:
            self._numbered = self._predictor.numbered(frame, self._name)
        except InputError as error:
            if self._given:
                raise
            warnings.warn(f"the predictions are not scored: {error}", stacklevel=4)
            self.columns = ()

    def of(self, rows: pd.Index) -> pd.Series | None:
        """Return the labels of some rows, or None if the rows are not scored."""
        return self._numbered.loc[rows] if self.columns and self._numbered is not None and len(rows) else None

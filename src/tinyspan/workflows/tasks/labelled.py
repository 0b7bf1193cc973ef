"""Tasks whose rows are one or two texts and a label."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from tinyspan.errors import InputError
from tinyspan.workflows.tabular import LABEL_NAMES, read_split
from tinyspan.workflows.tasks.base import Array, Encoding, FromTransformers, Split, Task, require_finite
from tinyspan.workflows.tasks.cells import is_list, is_missing

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = ["Fit", "Labelled", "PredictionKind", "Source", "numeric", "positions_in_lists", "require_length"]

Source = Callable[["Labelled", Split], "pd.DataFrame"]
PredictionKind = Literal["label", "labels", "number", "tags"]


class Fit(NamedTuple):
    """What is fitted on rows that are not scored.

    Attributes:
        task: the task with its thresholds, if it has some.
        factor: number by which the logits are multiplied.
        note: why nothing was fitted, for the result.
    """

    task: Labelled
    factor: float = 1.0
    note: str | None = None


@dataclass(frozen=True)
class Labelled(Task):
    """A task with one label per row.

    Attributes:
        source: function that returns the rows if no folder is given; without it, a folder is required.
        origin: for a user's own table, `path`, `text`, `label` and `holdout` of `task_from_table`, for results.
        choices: names of the metrics that `scores` returns.
        prediction_kind: what `answers` predicts for a row: the name of a `label`, a list of names of `labels`, a
            `number`, or a list of `tags`, one per word of the only text column.
        has_probabilities: whether `answers` returns the probability of each label.
        fits_training_rows: whether `fitted` is called with training rows if none are set aside.
    """

    source: Source | None = field(default=None, compare=False)
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)

    head = FromTransformers("AutoModelForSequenceClassification")
    choices: ClassVar[tuple[str, ...]]
    prediction_kind: ClassVar[PredictionKind] = "label"
    has_probabilities: ClassVar[bool] = False
    fits_training_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.metric not in self.choices:
            raise InputError(f"{self.name}: unknown metric {self.metric!r}; expected one of {', '.join(self.choices)}")

    # -- implemented by each type ------------------------------------------------------------------------------------

    @abstractmethod
    def checked_labels(self, labels: pd.Series, what: str) -> pd.Series:
        """Return the labels of rows in the form of the task, after a check.

        Raises:
            InputError: a label is missing or out of range.
        """

    @abstractmethod
    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
        """Return labels in the form that the model needs, for outputs with these names."""

    @abstractmethod
    def scores(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, float]:
        """Return the metrics in `choices` for finite predictions and encoded labels."""

    @abstractmethod
    def details(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, Any]:
        """Return entries of the result that are computed once, at the end.

        Returns:
            `intervals`, metric -> lower and upper bound; `notes`, sentences on predictions that do not vary; and what
            the type adds.
        """

    def fitted(self, predictions: Array, labels: Array) -> Fit:
        """Return what makes predictions from logits, fitted on rows that are not scored; by default nothing.

        Args:
            predictions: results of `predictions`, for these rows.
            labels: their encoded labels.
        """
        return Fit(self)

    def with_thresholds(self, thresholds: Sequence[float]) -> Labelled:
        """Return the task with the `thresholds` of its result, in the order of the outputs; by default the task itself.

        They are stored if `details` returns them by label. They are read again with an adapter or a merged model.
        """
        return self

    @abstractmethod
    def answers(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> list[dict[str, Any]]:
        """Return the prediction for each row by the names of the labels.

        Args:
            predictions: results of `predictions`, for all rows.
            labels: encoded labels of all rows; of their values only -100 matters, which marks tokens without a tag.
            outputs: names of the head's outputs in their order.

        Returns:
            A dict per row with `prediction`, and with `has_probabilities` also `probabilities` by label.
        """

    @abstractmethod
    def truths(self, labels: Array, outputs: Sequence[str]) -> list[Any]:
        """Return the labels of each row in the form of `prediction` in `answers`.

        Args:
            labels: encoded labels of all rows.
            outputs: names of the head's outputs in their order.
        """

    @abstractmethod
    def blank_labels(self, rows: pd.DataFrame) -> pd.Series:
        """Return labels for rows that have none, so that they can be tokenized for prediction."""

    @classmethod
    def from_columns(
        cls,
        name: str,
        text: Sequence[str],
        label: Sequence[str],
        rows: Mapping[Split, pd.DataFrame],
        names: Sequence[str] | None = None,
    ) -> tuple[Labelled, dict[Split, pd.Series]]:
        """Return a task on a user's own columns, and the labels of each split in the form of the task.

        Args:
            name: name of the task.
            text: the text columns.
            label: the label columns.
            rows: rows of each split with these columns; the training rows, or else the held-out ones, determine the
                labels.
            names: names of the labels in their order, if they are known; by default they are taken from the rows. The
                rows may have other spellings of them.

        Raises:
            InputError: a label does not fit the type, or the type does not support own columns, as by default.
        """
        raise InputError(f"{cls.type} takes no label columns; register a task of this type instead (register_task)")

    def in_order(self, rows: pd.DataFrame, names: Sequence[str] | None) -> pd.DataFrame:
        """Return rows with the task's numbering of labels, if the file names its labels."""
        return rows

    # -- the protocol -------------------------------------------------------------------------------------------------

    def read(self, split: Split, data: Path | None = None) -> pd.DataFrame:
        """Return the rows of a split, with the task's columns and `label`; their index is the number of the row.

        Args:
            split: `train`, or `validation` for the held-out rows.
            data: a folder with `train.*` and `validation.*` (or `validation_matched.*`) as parquet, CSV or JSON (one
                row per line, or a list); by default the source of the data set.

        Raises:
            InputError: a file, package, column, text or label is missing, rows do not have the same fields, a label is
                out of range, or the hub cannot be reached.
        """
        if data is not None:
            files = ["train"] if split == "train" else ["validation", "validation_matched"]
            rows = read_split(data, files, self.columns)
        elif self.source is not None:
            rows = self.source(self, split)
        else:
            raise InputError(f"{self.name} needs rows: data=FOLDER")
        names = rows.attrs.get(LABEL_NAMES, {}).get("label")
        return self.in_order(self._checked(rows, f"{split} rows of {self.name}"), names)

    def inputs(self, rows: pd.DataFrame, encoding: Encoding) -> dict[str, list[Any]]:
        """Return the tokens of the texts, without labels.

        Raises:
            InputError: `max_length` leaves no room for text besides the special tokens.
        """
        texts = [rows[column].astype(str).tolist() for column in self.columns]
        require_length(encoding, len(texts))
        return {**encoding.tokenizer(*texts, truncation=True, max_length=encoding.max_length)}

    def tokenize(self, rows: pd.DataFrame, split: Split, encoding: Encoding) -> Dataset:
        """Return the tokens of the texts, and `labels`.

        Raises:
            InputError: `max_length` leaves no room for text besides the special tokens.
        """
        from datasets import Dataset

        labels = rows["label"].tolist()
        if len(labels) > 0 and all(label == labels[0] for label in labels):
            warnings.warn(f"{self.name}: all {len(labels)} {split} rows have the label {labels[0]}", stacklevel=4)
        return Dataset.from_dict({**self.inputs(rows, encoding), "labels": self.encode(labels, encoding.outputs)})

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads texts."""
        from transformers import DataCollatorWithPadding

        collator: Callable[[list[dict[str, Any]]], Any] = DataCollatorWithPadding(tokenizer)
        return collator

    def metrics(self, predictions: Array, labels: Array, outputs: Sequence[str] = ()) -> dict[str, float]:
        """Return the metrics of the type."""
        require_finite(self, predictions)
        return self.scores(predictions, labels, outputs or self.labels)

    def _checked(self, rows: pd.DataFrame, what: str) -> pd.DataFrame:
        columns = [*self.columns, "label"]
        if rows.empty:
            raise InputError(f"{what}: there are none")
        for column in columns:
            if column not in rows:
                raise InputError(f"{what}: no column {column!r}; found {', '.join(map(str, rows.columns))}")
        rows = rows[columns].astype(dict.fromkeys(self.columns, object))
        for column in self.columns:
            missing = [index for index, value in rows[column].items() if is_missing(value)]
            if missing:
                raise InputError(
                    f"{what}: row {missing[0]} (counted from 0) has nothing in {column!r}, and {len(missing) - 1} more "
                    "rows have nothing there; write an empty text as ''"
                )
        return rows.assign(label=self.checked_labels(rows["label"], what))


def require_length(encoding: Encoding, texts: int) -> None:
    """Check that there is room for text besides the special tokens.

    Args:
        encoding: tokenizer and maximum length.
        texts: number of texts in a row.

    Raises:
        InputError: there is none.
    """
    special = encoding.tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if encoding.max_length <= special:
        raise InputError(f"a row has {special} special tokens beside its text: max_length={special + 1} or more")


def positions_in_lists(labels: pd.Series, count: int, what: str) -> pd.Series:
    """Return lists of positions below a number.

    Raises:
        InputError: a cell is something else.
    """
    for row, value in labels.items():
        if not is_list(value) or not all(number in range(count) for number in value):
            raise InputError(
                f"{what}: expected a list of numbers from 0 to {count - 1}, but row {row} (counted from 0) has "
                f"{value!r:.60}"
            )
    return labels.map(lambda numbers: [int(number) for number in numbers])


def numeric(labels: pd.Series, what: str) -> pd.Series:
    """Return labels that are finite numbers.

    Raises:
        InputError: a label is not a number, missing, infinite, or beyond float32.
    """
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(labels):
        raise InputError(f"{what}: expected numeric labels, got {labels.iloc[0]!r}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(labels.astype("float32"))
    if not finite.all():
        raise InputError(f"{what}: {int((~finite).sum())} labels are missing, infinite, or beyond float32")
    return labels

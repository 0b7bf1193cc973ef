"""Tasks whose rows are one or two texts and a number in the column `label`."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from tinyspan.errors import InputError
from tinyspan.workflows.tabular import LABEL_NAMES, read_split
from tinyspan.workflows.tasks.base import Array, Encoding, Split, Task, require_finite
from tinyspan.workflows.tasks.metrics import METRICS, score_of

__all__ = ["Labelled", "Source"]

Source = Callable[["Labelled", Split], pd.DataFrame]


@dataclass(frozen=True)
class Labelled(Task):
    """A task with one label per row.

    Attributes:
        source: function that returns the rows if no folder is given; without it, a folder is required.
    """

    source: Source | None = None

    head: ClassVar[Any] = AutoModelForSequenceClassification

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"{self.name}: unknown metric {self.metric!r}; expected one of {', '.join(METRICS)}")

    # -- implemented by each type ------------------------------------------------------------------------------------

    @abstractmethod
    def check_labels(self, labels: pd.Series, what: str) -> None:
        """Check that finite numbers are labels of the task.

        Raises:
            InputError: a label is out of range.
        """

    @abstractmethod
    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
        """Return labels in the form that the model needs, for outputs with these names."""

    @abstractmethod
    def decode(self, predictions: Array) -> Array:
        """Return the label that is predicted for each row of finite logits."""

    def in_order(self, rows: pd.DataFrame, names: Sequence[str] | None) -> pd.DataFrame:
        """Return rows with the task's numbering of labels, if the file names its labels."""
        return rows

    # -- the protocol -------------------------------------------------------------------------------------------------

    def read(self, split: Split, data: Path | None = None) -> pd.DataFrame:
        """Return the rows of a split, with the task's columns and `label`.

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
            raise InputError(f"{self.name} needs rows: --data FOLDER")
        return self.in_order(self._check_rows(rows, f"{split} rows of {self.name}"), rows.attrs.get(LABEL_NAMES))

    def tokenize(self, rows: pd.DataFrame, split: Split, encoding: Encoding) -> Dataset:
        """Return the tokens of the texts, and `labels`.

        Raises:
            InputError: `max_length` leaves no room for text besides the special tokens.
        """
        texts = [rows[column].astype(str).tolist() for column in self.columns]
        special = encoding.tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
        if encoding.max_length <= special:
            raise InputError(f"a row has {special} special tokens beside its text: --max-length {special + 1} or more")
        encoded = encoding.tokenizer(*texts, truncation=True, max_length=encoding.max_length)
        labels = self.encode(rows["label"].tolist(), encoding.outputs)
        if len(set(labels)) == 1:
            warnings.warn(f"{self.name}: all {len(labels)} {split} rows have the label {labels[0]}", stacklevel=4)
        return Dataset.from_dict({**encoded, "labels": labels})

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads texts."""
        collator: Callable[[list[dict[str, Any]]], Any] = DataCollatorWithPadding(tokenizer)
        return collator

    def metrics(self, predictions: Array, labels: Array) -> dict[str, float]:
        """Return the task's metric."""
        require_finite(self, predictions)
        return {self.metric: score_of(self, labels, self.decode(predictions))}

    def _check_rows(self, rows: pd.DataFrame, what: str) -> pd.DataFrame:
        columns = [*self.columns, "label"]
        if rows.empty:
            raise InputError(f"{what}: there are none")
        for column in columns:
            if column not in rows:
                raise InputError(f"{what}: no column {column!r}; found {', '.join(map(str, rows.columns))}")
        rows = rows[columns].astype(dict.fromkeys(self.columns, object)).reset_index(drop=True)
        for column in self.columns:
            missing = [index for index, value in rows[column].items() if is_missing(value)]
            if missing:
                raise InputError(
                    f"{what}: row {missing[0]} (counted from 0) has nothing in {column!r}, and {len(missing) - 1} more "
                    "rows have nothing there; write an empty text as ''"
                )
        if not pd.api.types.is_numeric_dtype(rows["label"]):
            raise InputError(f"{what}: expected numeric labels, got {rows['label'].iloc[0]!r}")
        with np.errstate(over="ignore"):
            finite = np.isfinite(rows["label"].astype("float32"))
        if not finite.all():
            raise InputError(f"{what}: {int((~finite).sum())} labels are missing, infinite, or beyond float32")
        self.check_labels(rows["label"], what)
        return rows


def is_missing(value: Any) -> bool:
    """Return whether a cell is a missing value of pandas."""
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))

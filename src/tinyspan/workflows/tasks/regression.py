"""Regression: one real number per row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from tinyspan.errors import InputError
from tinyspan.workflows.heads import has_bias, rescale_outputs
from tinyspan.workflows.tasks.base import Array, Example, Split, register_type
from tinyspan.workflows.tasks.cells import as_numbers
from tinyspan.workflows.tasks.classification import only_column
from tinyspan.workflows.tasks.intervals import regression_intervals
from tinyspan.workflows.tasks.labelled import Labelled, PredictionKind, numeric
from tinyspan.workflows.tasks.metrics import REGRESSION, regression_scores

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = ["Regression"]

HARDLY = 0.1  # share of the labels' standard deviation below which predictions hardly vary


@register_type("regression")
@dataclass(frozen=True)
class Regression(Labelled):
    """One real number per row, in the column `label`; `labels` contains its name.

    Attributes:
        scale: mean m and standard deviation s of the training labels; the model is trained on (y - m) / s, and
            predictions and scores are in the units of y. None trains on y itself.

    Example:
        >>> Regression("reviews", ("text",), ("stars",)).metric
        'pearson'
    """

    metric: str = "pearson"
    scale: tuple[float, float] | None = None

    problem_type: ClassVar[str | None] = "regression"
    choices: ClassVar[tuple[str, ...]] = REGRESSION
    prediction_kind: ClassVar[PredictionKind] = "number"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) != 1:
            raise InputError(f"{self.name}: a regression has one label, the name of its number, got {self.labels!r}")

    @classmethod
    def from_columns(
        cls,
        name: str,
        text: Sequence[str],
        label: Sequence[str],
        rows: Mapping[Split, pd.DataFrame],
        names: Sequence[str] | None = None,
    ) -> tuple[Regression, dict[Split, pd.Series]]:
        """Return a regression of the numbers in a column, trained on standardized labels; see `Labelled`."""
        column = only_column(label, cls.type)
        numbers = {split: as_numbers(table[column], f"{split} rows of {name}") for split, table in rows.items()}
        scale = None
        if "train" in numbers:
            train = numbers["train"]
            if train.nunique() < 2:
                raise InputError(
                    f"{name}: all {len(train):,} training rows have the label {train.iloc[0]:g} in {column!r}"
                )
            scale = (float(train.mean()), float(train.std(ddof=0)))
        return cls(name, tuple(text), tuple(names or (column,)), scale=scale), numbers

    def checked_labels(self, labels: pd.Series, what: str) -> pd.Series:
        """Accept any finite number."""
        return numeric(labels, what)

    def details(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, Any]:
        """Return the intervals of the metrics, and a note if the predictions hardly vary."""
        predicted, right = self.in_units(predictions.squeeze(-1)), self.in_units(labels)
        notes, spread, wanted = [], float(np.std(predicted)), float(np.std(right))
        if spread < HARDLY * wanted:
            notes.append(
                f"the predictions hardly vary: their standard deviation is {spread:.3g}, the labels' is {wanted:.3g}"
            )
        return {"intervals": regression_intervals(predicted, right), "notes": notes}

    def answers(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> list[dict[str, Any]]:
        """Return the number predicted for each row, in the units of the labels."""
        return [{"prediction": float(number)} for number in self.in_units(predictions.squeeze(-1))]

    def truths(self, labels: Array, outputs: Sequence[str]) -> list[float]:
        """Return the labels in their units."""
        return [float(number) for number in self.in_units(labels)]

    def blank_labels(self, rows: pd.DataFrame) -> pd.Series:
        """Return 0 for each row."""
        import pandas as pd

        return pd.Series(0.0, index=rows.index)

    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[float]:
        """Return the labels as floats, standardized if there is a scale."""
        mean, deviation = self.scale or (0.0, 1.0)
        return [(float(label) - mean) / deviation for label in labels]

    def scores(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, float]:
        """Return the metrics in the units of the labels."""
        return regression_scores(self.name, self.metric, self.in_units(predictions.squeeze(-1)), self.in_units(labels))

    def model_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """Return the squared error, of encoded labels."""
        return (values.squeeze(-1) - target.to(values)).square()

    def in_units(self, encoded: Array) -> Array:
        """Return encoded labels in the units of the labels."""
        if self.scale is None:
            return encoded
        mean, deviation = self.scale
        numbers: Array = encoded.astype(float) * deviation + mean
        return numbers

    def configured(self, config: Any) -> Regression:
        """Return the task with a scale that the model's head can undo: without a bias there is no mean to add."""
        bias = self.scale and has_bias(config, self.head)
        if self.scale is None or bias:
            return self
        mean, deviation = self.scale
        return replace(self, scale=None if bias is None else (0.0, math.hypot(mean, deviation)))

    def initialize_head(self, model: nn.Module) -> None:
        """Scale the outputs of a new head to the units of the labels; the mean is `label_mean`."""
        if self.scale is not None:
            rescale_outputs(model, self.scale[1])

    @contextmanager
    def training_units(self, model: nn.Module) -> Iterator[None]:
        """Return a context in which the model's outputs are standardized, as the encoded labels are.

        Raises:
            InputError: the output layer is in a block of the basis, so that it cannot be changed.
        """
        if self.scale is None:
            yield
            return
        mean, deviation = self.scale
        if not rescale_outputs(model, 1 / deviation, -mean / deviation):
            raise InputError(
                f"{self.name}: the model's output layer is in a block of the basis, so standardized labels have no "
                "units to return to; use a task with scale=None"
            )
        try:
            yield
        finally:
            rescale_outputs(model, deviation, mean)

    def for_scoring(self) -> Regression:
        """Return the task without a scale, since the outputs of a trained model are in the units of the labels."""
        return replace(self, scale=None)

    def label_mean(self, rows: Dataset) -> float | None:
        """Return the mean of the training labels in their units."""
        return float(self.in_units(np.mean(rows["labels"])))

    @classmethod
    def example(cls) -> Example:
        """Return a task on star ratings of reviews."""
        import pandas as pd

        texts = ["the film is fine", "a dull story", "so and so", "lovely war", "flat again", "but the film"]
        rows = pd.DataFrame({"text": texts, "label": [4.5, 1.0, 2.5, 5.0, 0.5, 3.0]})
        task = cls("stars", ("text",), ("stars",))
        return Example(task, rows, lambda labels, outputs: labels.reshape(-1, outputs))

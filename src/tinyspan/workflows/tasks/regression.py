"""Regression: one real number per row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from datasets import Dataset

from tinyspan.errors import InputError
from tinyspan.workflows.tasks.base import Array, Example, register_type
from tinyspan.workflows.tasks.labelled import Labelled

__all__ = ["Regression"]


@register_type("regression")
@dataclass(frozen=True)
class Regression(Labelled):
    """One real number per row, in the column `label`; `labels` contains its name.

    Example:
        >>> Regression("reviews", ("text",), ("stars",)).metric
        'pearson'
    """

    metric: str = "pearson"

    problem_type: ClassVar[str | None] = "regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) != 1:
            raise InputError(f"{self.name}: a regression has one label, the name of its number, got {self.labels!r}")

    def check_labels(self, labels: pd.Series, what: str) -> None:
        """Accept any finite number."""

    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[float]:
        """Return the labels unchanged, as floats."""
        return [float(label) for label in labels]

    def decode(self, predictions: Array) -> Array:
        """Return the predicted numbers."""
        numbers: Array = predictions.squeeze(-1)
        return numbers

    def label_mean(self, rows: Dataset) -> float | None:
        """Return the mean of the training labels."""
        return float(np.mean(rows["labels"]))

    @classmethod
    def example(cls) -> Example:
        """Return a task on star ratings of reviews."""
        texts = ["the film is fine", "a dull story", "so and so", "lovely war", "flat again", "but the film"]
        rows = pd.DataFrame({"text": texts, "label": [4.5, 1.0, 2.5, 5.0, 0.5, 3.0]})
        task = cls("stars", ("text",), ("stars",))
        return Example(task, rows, lambda labels, outputs: labels.reshape(-1, outputs))

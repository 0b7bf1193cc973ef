"""Classification: one of several labels per row."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from torch.nn.functional import one_hot

from tinyspan.errors import InputError
from tinyspan.labels import is_generic, positions
from tinyspan.workflows.tasks.base import Array, Example, register_type
from tinyspan.workflows.tasks.labelled import Labelled

__all__ = ["Classification"]


@register_type("classification")
@dataclass(frozen=True)
class Classification(Labelled):
    """One of at least two labels per row; the column `label` contains its number, counted from 0.

    Example:
        >>> Classification("tickets", ("text",), ("billing", "bug", "question")).metric
        'accuracy'
    """

    metric: str = "accuracy"

    problem_type: ClassVar[str | None] = "single_label_classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise InputError(f"{self.name}: a classification has at least two labels, got {self.labels!r}")

    def check_labels(self, labels: pd.Series, what: str) -> None:
        """Check that the numbers are positions of labels."""
        count = len(self.labels)
        if not labels.isin(range(count)).all():
            others = sorted(labels.unique().tolist())[:5]
            raise InputError(f"{what}: expected labels 0 to {count - 1}, got {others}")

    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[int]:
        """Return the position of each row's label among the outputs."""
        order = positions(self.labels, outputs) or ()
        return [order[int(label)] for label in labels]

    def decode(self, predictions: Array) -> Array:
        """Return the position of the largest logit of each row."""
        largest: Array = predictions.argmax(-1)
        return largest

    def in_order(self, rows: pd.DataFrame, names: Sequence[str] | None) -> pd.DataFrame:
        """Return rows with the task's numbering of labels; other label names in the file cause a warning."""
        if not names or is_generic(names):
            return rows
        order = positions(names, self.labels)
        if order is None:
            warnings.warn(
                f"the file calls its labels {', '.join(names)}, {self.name} calls them {', '.join(self.labels)}: they "
                "are matched in this order, and outputs have the task's names",
                stacklevel=3,
            )
            return rows
        return rows.assign(label=[order[int(label)] for label in rows["label"]])

    @classmethod
    def example(cls) -> Example:
        """Three labels."""
        texts = ["the film is fine", "a dull story", "so and so", "lovely war", "flat again", "but the film"]
        rows = pd.DataFrame({"text": texts, "label": [0, 1, 2, 0, 1, 2]})
        task = cls("moods", ("text",), ("good", "bad", "neither"))
        return Example(task, rows, lambda labels, outputs: 9.0 * one_hot(labels, outputs))

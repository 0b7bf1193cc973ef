"""Multi-label classification: any number of labels per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tinyspan.errors import InputError
from tinyspan.labels import positions
from tinyspan.workflows.tasks.base import Array, Example, Split, register_type
from tinyspan.workflows.tasks.cells import as_flags, as_lists
from tinyspan.workflows.tasks.classification import number_labels
from tinyspan.workflows.tasks.intervals import multi_label_intervals
from tinyspan.workflows.tasks.labelled import Fit, Labelled, PredictionKind, positions_in_lists
from tinyspan.workflows.tasks.metrics import MULTI_LABEL, best_threshold, multi_label_scores, scores_per_label

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MultiLabel"]


@register_type("multi-label")
@dataclass(frozen=True)
class MultiLabel(Labelled):
    """Any number of labels per row; the column `label` contains the list of their numbers, counted from 0.

    Attributes:
        thresholds: smallest probability of each predicted label, in the order of the outputs; empty for 0.5.

    Example:
        >>> MultiLabel("tickets", ("text",), ("billing", "bug")).metric
        'f1_micro'
    """

    metric: str = "f1_micro"
    thresholds: tuple[float, ...] = ()

    problem_type: ClassVar[str | None] = "multi_label_classification"
    choices: ClassVar[tuple[str, ...]] = MULTI_LABEL
    prediction_kind: ClassVar[PredictionKind] = "labels"
    has_probabilities: ClassVar[bool] = True
    fits_training_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise InputError(f"{self.name}: multi-label classification has at least two labels, got {self.labels!r}")
        if self.thresholds and len(self.thresholds) != len(self.labels):
            raise InputError(
                f"{self.name}: expected one threshold per label ({len(self.labels)}), got {len(self.thresholds)}"
            )

    @classmethod
    def from_columns(
        cls,
        name: str,
        text: Sequence[str],
        label: Sequence[str],
        rows: Mapping[Split, pd.DataFrame],
        names: Sequence[str] | None = None,
    ) -> tuple[MultiLabel, dict[Split, pd.Series]]:
        """Return a task whose rows have several labels: in a column of lists, or in several columns of 0 and 1."""
        if len(label) == 1:
            lists = as_lists({split: table[label[0]] for split, table in rows.items()}, name, names)
        else:
            lists = {split: as_flags(table[list(label)], f"{split} rows of {name}") for split, table in rows.items()}
            names = names or tuple(label)
        outputs, numbers = number_labels(name, ", ".join(label), lists, names, lists=True)
        if len(outputs) < 2:
            raise InputError(
                f"{name}: {', '.join(label)!r} has {len(outputs)} different labels; expected at least two. Several "
                "labels are separated by '|', ';' or ',', or are a list"
            )
        numbered = {split: one.map(lambda row: sorted({*row})) for split, one in numbers.items()}
        return cls(name, tuple(text), outputs), numbered

    def checked_labels(self, labels: pd.Series, what: str) -> pd.Series:
        """Check that the labels are lists of positions."""
        return positions_in_lists(labels, len(self.labels), what)

    def fitted(self, predictions: Array, labels: Array) -> Fit:
        """Return the task with the threshold of each label that has the best F1."""
        from scipy.special import expit

        probabilities = expit(predictions.astype(float))
        return Fit(replace(self, thresholds=tuple(map(best_threshold, probabilities.T, labels.T))))

    def model_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """Return the mean over the labels of the binary cross-entropy."""
        return binary_cross_entropy_with_logits(values, target.to(values))

    def with_thresholds(self, thresholds: Sequence[float]) -> MultiLabel:
        """Return the task with the threshold of each output."""
        return replace(self, thresholds=tuple(thresholds))

    def details(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, Any]:
        """Return the intervals of the metrics, and `per_class`."""
        predicted, right = self.decode(predictions), labels.astype(int)
        notes = []
        if len(labels) > 1 and (predicted == predicted[0]).all():
            names = ", ".join(self.truths(predicted[:1], outputs)[0]) or "no label"
            notes.append(f"the model predicts {names} for all {len(labels):,} held-out rows")
        thresholds = dict(zip(outputs, self.thresholds, strict=True)) if self.thresholds else {}
        return {
            "intervals": multi_label_intervals(predicted, right),
            "per_class": scores_per_label(right, predicted, outputs),
            **({"thresholds": thresholds} if thresholds else {}),
            "notes": notes,
        }

    def answers(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> list[dict[str, Any]]:
        """Return the labels of each row whose probability reaches its threshold, and the probability of each label."""
        from scipy.special import expit

        names, probabilities = self.truths(self.decode(predictions), outputs), expit(predictions.astype(float))
        return [
            {"prediction": row_names, "probabilities": dict(zip(outputs, row.tolist(), strict=True))}
            for row_names, row in zip(names, probabilities, strict=True)
        ]

    def truths(self, labels: Array, outputs: Sequence[str]) -> list[list[str]]:
        """Return the names of the labels of each row."""
        return [[name for name, flag in zip(outputs, row, strict=True) if flag] for row in labels]

    def blank_labels(self, rows: pd.DataFrame) -> pd.Series:
        """Return no labels for each row."""
        import pandas as pd

        return pd.Series([[] for _ in rows.index], index=rows.index, dtype=object)

    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[list[float]]:
        """Return 1 for each output whose label the row has, and 0 for the others."""
        order = positions(self.labels, outputs) or ()
        hot = np.zeros((len(labels), len(order)))
        for row, numbers in zip(hot, labels, strict=True):
            row[[order[number] for number in numbers]] = 1
        encoded: list[list[float]] = hot.tolist()
        return encoded

    def scores(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, float]:
        """Return the metrics at the thresholds."""
        return multi_label_scores(self.decode(predictions), labels.astype(int))

    def decode(self, predictions: Array) -> Array:
        """Return 1 for each output whose probability reaches its threshold, and 0 for the others."""
        limits = np.array(self.thresholds or [0.5] * predictions.shape[-1])
        predicted: Array = (predictions >= np.log(limits / (1 - limits))).astype(int)
        return predicted

    @classmethod
    def example(cls) -> Example:
        """Return a task in which rows have up to two labels."""
        import pandas as pd

        texts = ["the film is fine", "a dull story", "so and so", "lovely war", "flat again", "but the film"]
        rows = pd.DataFrame({"text": texts, "label": [[0], [1], [0, 1], [2, 0], [], [2]]})
        task = cls("aspects", ("text",), ("story", "music", "acting"))
        return Example(task, rows, lambda labels, outputs: 18.0 * labels - 9.0)

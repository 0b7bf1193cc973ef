"""Classification: one of several labels per row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from tinyspan.errors import InputError
from tinyspan.labels import canonical, is_generic, matched, positions
from tinyspan.workflows.tasks.base import Array, Example, LossFunction, Split, register_type
from tinyspan.workflows.tasks.cells import as_names, first_row, in_natural_order, listed
from tinyspan.workflows.tasks.intervals import classification_intervals, confusion_of
from tinyspan.workflows.tasks.labelled import Fit, Labelled, numeric
from tinyspan.workflows.tasks.metrics import (
    CLASSIFICATION,
    calibration_error,
    classification_scores,
    confidence_bins,
    scores_per_label,
    temperature_of,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Classification", "number_labels", "only_column"]

MAX_SHARE = 0.5  # of different labels among the rows, above which the column probably contains text
CONFUSED = 500  # maximum number of labels of a confusion matrix: one of 1,400 takes 17 MB in a result
FEW_ROWS = 20  # minimum number of rows for a temperature
MIN_LABELS = 50  # number of labels from which this is checked


@register_type("classification")
@dataclass(frozen=True)
class Classification(Labelled):
    """One of at least two labels per row; the column `label` contains its number, counted from 0.

    Attributes:
        class_weights: weight of each label in the loss, in the order of `labels`; empty for equal weights.

    Example:
        >>> Classification("tickets", ("text",), ("billing", "bug", "question")).metric
        'accuracy'
    """

    metric: str = "accuracy"
    class_weights: tuple[float, ...] = ()

    problem_type: ClassVar[str | None] = "single_label_classification"
    choices: ClassVar[tuple[str, ...]] = CLASSIFICATION
    has_probabilities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise InputError(f"{self.name}: a classification has at least two labels, got {self.labels!r}")
        if self.class_weights and len(self.class_weights) != len(self.labels):
            raise InputError(
                f"{self.name}: expected one class weight per label ({len(self.labels)}), got {len(self.class_weights)}"
            )

    @classmethod
    def from_columns(
        cls,
        name: str,
        text: Sequence[str],
        label: Sequence[str],
        rows: Mapping[Split, pd.DataFrame],
        names: Sequence[str] | None = None,
    ) -> tuple[Classification, dict[Split, pd.Series]]:
        """Return a classification by the values of a column; see `Labelled`."""
        column = only_column(label, cls.type)
        words = {split: as_names(table[column], f"{split} rows of {name}") for split, table in rows.items()}
        first = next(iter(words.values()))
        different = first.nunique()
        if "train" in rows and different >= MIN_LABELS and different > MAX_SHARE * len(first):
            raise InputError(
                f"{name}: {column!r} has {different:,} different values in {len(first):,} rows, so it is probably "
                "a text column; for real numbers: task_type=regression"
            )
        outputs, numbers = number_labels(name, column, words, names)
        if names is None:
            _warn_of_spellings(name, outputs)
        if len(outputs) < 2:
            raise InputError(
                f"{name}: all {len(first):,} rows have the label {outputs[0]!r} in {column!r}; expected at least two "
                "labels"
            )
        return cls(name, tuple(text), outputs), {split: one.astype(int) for split, one in numbers.items()}

    def checked_labels(self, labels: pd.Series, what: str) -> pd.Series:
        """Check that the labels are positions."""
        labels, count = numeric(labels, what), len(self.labels)
        if not labels.isin(range(count)).all():
            others = sorted(labels.unique().tolist())[:5]
            raise InputError(f"{what}: expected labels 0 to {count - 1}, got {others}")
        return labels

    def fitted(self, predictions: Array, labels: Array) -> Fit:
        """Return the inverse of the temperature that fits best (Guo et al. 2017); see `temperature_of`.

        There is none if the rows do not determine it: fewer than 20, or all predicted right.
        """
        if len(labels) < FEW_ROWS:
            return Fit(self, note=f"no temperature is fitted: {len(labels)} rows are too few, expected {FEW_ROWS}")
        temperature = temperature_of(predictions, labels)
        if temperature is None:
            return Fit(self, note=f"no temperature is fitted: the {len(labels)} rows set aside do not determine it")
        return Fit(self, 1 / temperature)

    def details(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, Any]:
        """Return intervals, `confusion_matrix`, `per_class`, `calibration`, and `majority`, the share of one label.

        The rows of the confusion matrix are labels, its columns predictions, in the order of the outputs. The bins of
        `calibration` are mean confidence, accuracy and number of rows, without empty bins.
        """
        from scipy.special import log_softmax

        log_probabilities = log_softmax(predictions.astype(float), axis=-1)
        predicted, probabilities = predictions.argmax(-1), np.exp(log_probabilities)
        confusion = confusion_of(labels, predicted, len(outputs))
        confidence, right, bins = probabilities.max(-1), predicted == labels, confidence_bins(probabilities)
        occupied = [
            [float(confidence[chosen].mean()), float(right[chosen].mean()), int(chosen.sum())]
            for chosen in (bins == number for number in np.unique(bins))
        ]
        notes = []
        if len(labels) > 1 and len(set(predicted.tolist())) == 1:
            notes.append(f"the model predicts {outputs[predicted[0]]!r} for all {len(labels):,} held-out rows")
        return {
            "intervals": classification_intervals(log_probabilities, labels),
            "majority": float(np.bincount(labels).max() / len(labels)),
            "per_class": scores_per_label(labels, predicted, outputs),
            **({"confusion_matrix": confusion.tolist()} if len(outputs) <= CONFUSED else {}),
            "calibration": {"ece": calibration_error(probabilities, labels), "bins": occupied},
            "notes": notes,
        }

    def answers(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> list[dict[str, Any]]:
        """Return the most probable label of each row, and the probability of each label."""
        from scipy.special import softmax

        probabilities = softmax(predictions.astype(float), axis=-1)
        return [
            {"prediction": outputs[row.argmax()], "probabilities": dict(zip(outputs, row.tolist(), strict=True))}
            for row in probabilities
        ]

    def truths(self, labels: Array, outputs: Sequence[str]) -> list[str]:
        """Return the name of each label."""
        return [outputs[label] for label in labels]

    def blank_labels(self, rows: pd.DataFrame) -> pd.Series:
        """Return the first label for each row."""
        import pandas as pd

        return pd.Series(0, index=rows.index)

    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[int]:
        """Return the position of each row's label among the outputs."""
        order = positions(self.labels, outputs) or ()
        return [order[int(label)] for label in labels]

    def scores(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, float]:
        """Return the metrics of the logits."""
        return classification_scores(self.name, self.metric, predictions, labels)

    def weighted(self, weights: str, rows: pd.DataFrame | None) -> Classification:
        """Return the task with the class weights n / (K n_c), with which all labels have the same weight in the loss.

        Args:
            weights: `balanced`.
            rows: training rows; n is their number, n_c the number of those with label c, K the number of labels.

        Raises:
            InputError: other weights are asked for, or a label has no row.
        """
        if weights != "balanced":
            raise InputError(f"expected the class weights 'balanced', got {weights!r}")
        if rows is None:
            return self
        counts = np.bincount(rows["label"].astype(int), minlength=len(self.labels))
        if (counts == 0).any():
            raise InputError(
                f"{self.name}: no training row has the label {self.labels[int(counts.argmin())]!r}, so it has no "
                "balanced class weight"
            )
        return replace(self, class_weights=tuple(float(len(rows) / (len(counts) * count)) for count in counts))

    def loss_function(self, outputs: Sequence[str] = ()) -> LossFunction | None:
        """Return the cross-entropy with class weights, or None for the model's own loss if all weights are equal."""
        if not self.class_weights:
            return None
        by_output = self._weights_by_output(outputs)

        def weighted(result: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            logits = result.logits
            return cross_entropy(logits, labels, by_output.to(logits))

        return weighted

    def model_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return cross_entropy(values, target)

    def row_weight(self, target: Tensor, outputs: Sequence[str] = ()) -> Tensor:
        """Return the weight of the label."""
        return self._weights_by_output(outputs).to(target.device)[target]

    def _weights_by_output(self, outputs: Sequence[str]) -> Tensor:
        """Return the class weights in the order of the outputs, 1 without."""
        order = positions(self.labels, outputs or self.labels) or ()
        by_output = torch.ones(len(order))
        if self.class_weights:
            by_output[list(order)] = torch.tensor(self.class_weights, dtype=torch.float32)
        return by_output

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
        import pandas as pd

        texts = ["the film is fine", "a dull story", "so and so", "lovely war", "flat again", "but the film"]
        rows = pd.DataFrame({"text": texts, "label": [0, 1, 2, 0, 1, 2]})
        task = cls("moods", ("text",), ("good", "bad", "neither"))
        return Example(task, rows, lambda labels, outputs: 9.0 * one_hot(labels, outputs))


def only_column(label: Sequence[str], kind: str) -> str:
    """Return the name of the only label column.

    Raises:
        InputError: there are several.
    """
    if len(label) != 1:
        raise InputError(f"{kind} has one label column, got {', '.join(label)}")
    return label[0]


def number_labels(
    name: str, column: str, words: Mapping[Split, pd.Series], names: Sequence[str] | None, *, lists: bool = False
) -> tuple[tuple[str, ...], dict[Split, pd.Series]]:
    """Return the names of the labels, and the numbers of those in each row.

    Args:
        name: name of the task, for messages.
        column: name of the label column, for messages.
        words: the names in the rows of each split; the first split determines the labels.
        names: names of the labels, if they are known; the rows may have other spellings of them (see `matched`).
        lists: whether a row has a list of names.

    Raises:
        InputError: a row has another label than these.
    """
    each = {split: one.explode().dropna() if lists else one for split, one in words.items()}
    first = next(iter(each.values()))
    outputs = tuple(names) if names is not None else in_natural_order(first)
    index = {output: position for position, output in enumerate(outputs)}
    if names is not None:
        index = matched({word for one in each.values() for word in one.unique()}, outputs)
    for split, one in each.items():
        unknown = ~one.isin(index)
        if unknown.any():
            row = first_row(unknown)
            source = "the labels are" if names is not None else f"the labels of the {next(iter(each))} rows are"
            raise InputError(
                f"{split} rows of {name}: row {row} (counted from 0) has the label "
                f"{one[unknown].iloc[0]!r:.50} in {column!r}, and {source} {listed(outputs)}"
            )
    of_row = (lambda row: [index[word] for word in row]) if lists else index
    return outputs, {split: one.map(of_row) for split, one in words.items()}


def _warn_of_spellings(name: str, labels: Sequence[str]) -> None:
    """Warn of different labels that differ only in case, spaces or the like; a model is to tell them apart."""
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(canonical(label), []).append(label)
    for same in spellings.values():
        if len(same) > 1:
            warnings.warn(f"{name}: the labels {' and '.join(map(repr, same))} are different labels", stacklevel=4)

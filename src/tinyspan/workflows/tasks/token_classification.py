"""Token classification: one tag per word, such as the names of entities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from tinyspan.errors import InputError
from tinyspan.labels import positions
from tinyspan.workflows.language import IGNORED
from tinyspan.workflows.tasks.base import Array, Encoding, Example, FromTransformers, Split, register_type
from tinyspan.workflows.tasks.cells import is_list, is_missing, require_lists
from tinyspan.workflows.tasks.classification import number_labels, only_column
from tinyspan.workflows.tasks.intervals import entity_intervals
from tinyspan.workflows.tasks.labelled import Labelled, PredictionKind, positions_in_lists, require_length
from tinyspan.workflows.tasks.metrics import TOKENS, encoding_of, token_scores, token_statistics

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = ["TokenClassification", "encoded_words"]


@register_type("token-classification")
@dataclass(frozen=True)
class TokenClassification(Labelled):
    """One tag per word; the text column contains lists of words, the column `label` lists of the tags' numbers.

    A word may have several tokens; the first one has the word's tag, and the others have no loss. Words beyond
    `max_length` are truncated; they are not scored.

    Example:
        >>> TokenClassification("names", ("tokens",), ("O", "B-PER", "I-PER")).metric
        'entity_f1'
    """

    metric: str = "entity_f1"

    head = FromTransformers("AutoModelForTokenClassification")
    choices: ClassVar[tuple[str, ...]] = TOKENS
    prediction_kind: ClassVar[PredictionKind] = "tags"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.columns) != 1:
            raise InputError(f"{self.name}: token classification has one column of words, got {self.columns!r}")
        if len(self.labels) < 2:
            raise InputError(f"{self.name}: token classification has at least two tags, got {self.labels!r}")
        if self.metric != "token_accuracy" and encoding_of(self.labels) is None:
            raise InputError(
                f"{self.name}: the tags {', '.join(self.labels[:5])} are not entities such as B-PER and I-PER, which "
                f"{self.metric} needs: metric token_accuracy"
            )

    @classmethod
    def from_columns(
        cls,
        name: str,
        text: Sequence[str],
        label: Sequence[str],
        rows: Mapping[Split, pd.DataFrame],
        names: Sequence[str] | None = None,
    ) -> tuple[TokenClassification, dict[Split, pd.Series]]:
        """Return a task whose tags are the values in the lists of a column; text is split at white space."""
        column = only_column(label, cls.type)
        for split, table in rows.items():
            require_lists(table[column], f"{split} rows of {name}")
        lists = {split: table[column].map(_words) for split, table in rows.items()}
        outputs, numbers = number_labels(name, column, lists, names, lists=True)
        metric = "token_accuracy" if encoding_of(outputs) is None else cls.metric
        return cls(name, tuple(text), outputs, metric), numbers

    def _checked(self, rows: pd.DataFrame, what: str) -> pd.DataFrame:
        rows = super()._checked(rows, what)
        (column,) = self.columns
        rows = rows.assign(**{column: rows[column].map(_words)})
        for row, words, tags in zip(rows.index, rows[column], rows["label"], strict=True):
            if len(words) != len(tags):
                raise InputError(
                    f"{what}: row {row} (counted from 0) has {len(words)} words in {column!r} and {len(tags)} tags"
                )
            if not words:
                raise InputError(f"{what}: row {row} (counted from 0) has no words in {column!r}")
        return rows

    def checked_labels(self, labels: pd.Series, what: str) -> pd.Series:
        """Check that the labels are lists of positions."""
        return positions_in_lists(labels, len(self.labels), what)

    def answers(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> list[dict[str, Any]]:
        """Return the tags of the words of each row, without those of truncated words."""
        pairs = zip(predictions, labels, strict=True)
        return [{"prediction": [outputs[tag] for tag in tags[row != IGNORED]]} for tags, row in pairs]

    def truths(self, labels: Array, outputs: Sequence[str]) -> list[list[str]]:
        """Return the names of the tags of each row."""
        return [[outputs[tag] for tag in row[row != IGNORED]] for row in labels]

    def blank_labels(self, rows: pd.DataFrame) -> pd.Series:
        """Return the first tag for each word."""
        return rows[self.columns[0]].map(lambda cell: [0] * len(_words(cell)))

    def encode(self, labels: Sequence[Any], outputs: Sequence[str]) -> list[list[int]]:
        """Return the positions of the tags among the outputs, one list per row."""
        order = positions(self.labels, outputs) or ()
        return [[order[tag] for tag in tags] for tags in labels]

    def scores(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, float]:
        """Return the metrics of the tags; those of entities only if the tags are entities, such as B-PER."""
        return token_scores(self._statistics(predictions, labels, outputs), entities=encoding_of(outputs) is not None)

    def details(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> dict[str, Any]:
        """Return the intervals of the metrics."""
        statistics = self._statistics(predictions, labels, outputs)
        predicted = {tag for answer in self.answers(predictions, labels, outputs) for tag in answer["prediction"]}
        notes = [f"the model predicts {tag!r} for every word" for tag in predicted] if len(predicted) == 1 else []
        return {"intervals": entity_intervals(statistics), "notes": notes}

    def _statistics(self, predictions: Array, labels: Array, outputs: Sequence[str]) -> Array:
        predicted = [answer["prediction"] for answer in self.answers(predictions, labels, outputs)]
        return token_statistics(predicted, self.truths(labels, outputs), encoding_of(outputs))

    def inputs(self, rows: pd.DataFrame, encoding: Encoding) -> dict[str, list[Any]]:
        """Return the tokens of the words, without labels."""
        encoded = self._encoded(rows, encoding)
        return {name: encoded[name] for name in encoded}

    def _encoded(self, rows: pd.DataFrame, encoding: Encoding) -> Any:
        if not encoding.tokenizer.is_fast:
            raise InputError("token classification needs a fast tokenizer, which tells the word of a token")
        require_length(encoding, 1)
        return encoded_words(rows[self.columns[0]].tolist(), encoding)

    def tokenize(self, rows: pd.DataFrame, split: Split, encoding: Encoding) -> Dataset:
        """Return the tokens of the words, and `labels`: the tag at the first token of a word, -100 elsewhere."""
        from datasets import Dataset

        encoded, labels = self._encoded(rows, encoding), []
        for row, tags in enumerate(self.encode(rows["label"].tolist(), encoding.outputs)):
            before, own = None, []
            for word in encoded.word_ids(row):
                own.append(IGNORED if word is None or word == before else tags[word])
                before = word
            labels.append(own)
        return Dataset.from_dict({**encoded, "labels": labels})

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads tokens and labels."""
        from transformers import DataCollatorForTokenClassification

        collator: Callable[[list[dict[str, Any]]], Any] = DataCollatorForTokenClassification(tokenizer)
        return collator

    def row_loss(self, values: Tensor, target: Tensor, outputs: Sequence[str] = ()) -> Tensor:
        """Return the loss of the tokens with a tag; see `Task`."""
        return super().row_loss(values.view(len(target), -1), target, outputs)

    def model_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the cross-entropies of the tokens with a tag."""
        return cross_entropy(values, target, ignore_index=IGNORED, reduction="sum")

    def row_weight(self, target: Tensor, outputs: Sequence[str] = ()) -> Tensor:
        """Return the number of tokens with a tag."""
        return (target != IGNORED).sum()

    def predictions(self, logits: Any, labels: Tensor) -> Tensor:
        """Return the position of the largest logit of each token."""
        return super().predictions(logits, labels).argmax(-1)

    @classmethod
    def example(cls) -> Example:
        """Return a task on names of people."""
        import pandas as pd

        words = [["the", "film", "is", "fine"], ["a", "dull", "story"], ["so", "and", "so"]] * 2
        rows = pd.DataFrame({"tokens": words, "label": [[0, 1, 2, 0], [0, 1, 0], [1, 2, 2]] * 2})
        task = cls("names", ("tokens",), ("O", "B-PER", "I-PER"))
        return Example(task, rows, lambda labels, outputs: 9.0 * one_hot(labels.clamp(min=0), outputs))


def encoded_words(rows: Sequence[Sequence[str]], encoding: Encoding) -> Any:
    """Return the tokens of rows of words, as in a running text with spaces between the words.

    Byte-level tokenizers, such as RoBERTa's, have other tokens for a word behind a space. Without `add_prefix_space`
    they would take the words for one long word.
    """
    tokenizer = encoding.tokenizer
    options = {"is_split_into_words": True, "add_special_tokens": False}
    joined, spaced = (tokenizer(words, **options)["input_ids"] for words in (["a", "a"], ["a", " a"]))
    if joined != spaced == tokenizer("a a", add_special_tokens=False)["input_ids"]:
        rows = [[f" {word}" if place else word for place, word in enumerate(words)] for words in rows]
    return tokenizer(list(rows), is_split_into_words=True, truncation=True, max_length=encoding.max_length)


def _words(cell: Any) -> list[str]:
    if is_list(cell):
        return [str(word) for word in cell]
    return [] if is_missing(cell) else str(cell).split()

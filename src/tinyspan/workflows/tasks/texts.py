"""Language tasks: prediction of the tokens of a user's own texts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from tinyspan.errors import InputError
from tinyspan.workflows.language import (
    IGNORED,
    generate,
    generation_scores,
    perplexity,
    prompts_of,
    token_losses,
    tokenized_pairs,
    tokenized_text,
)
from tinyspan.workflows.tabular import read_hub, read_split
from tinyspan.workflows.tasks.base import Array, Encoding, Progress, Split, Task
from tinyspan.workflows.tasks.cells import is_missing

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = ["PAIR", "TEXT", "Language"]

TEXT, PAIR = ("text",), ("prompt", "completion")  # the columns of rows after reading
EXAMPLES = 5  # number of generated texts in a result


@dataclass(frozen=True)
class Language(Task):
    """Texts, or prompts and completions, whose tokens are predicted.

    Attributes:
        columns: columns of the text, or of prompt and completion, if they have other names in the data; after `as_read`
            they are `text`, or `prompt` and `completion`.
    """

    metric: str = "perplexity"

    pretrained_head: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True
    eval_batch_factor: ClassVar[int] = 1  # logits are large

    def __post_init__(self) -> None:
        if self.metric != "perplexity":
            raise InputError(f"{self.name}: unknown metric {self.metric!r}; expected perplexity")

    def read(self, split: Split, data: Path | None = None) -> pd.DataFrame:
        """Return the texts of a split: a column `text`, or `prompt` and `completion`.

        Args:
            split: `train`, or `validation` for the held-out texts.
            data: a folder with `train.*` and `validation.*` as plain text, JSON, parquet or CSV; or the id of a data
                set on the hub, `owner/name` or `owner/name:configuration`. A plain text file is one text.

        Empty rows of running text are left out, and their number is reported in a warning.

        Raises:
            InputError: no data is given, a column is missing, a prompt or completion is empty, a value is not text, or
                the hub cannot be reached.
        """
        what = f"{split} rows of {data}"
        if data is None:
            raise InputError(f"{self.name} needs texts: data=FOLDER, or the id of a data set on the hub")
        named = self.columns or (*TEXT, *PAIR)
        rows = read_split(data, [split], named, running_text=True) if data.exists() else _from_hub(str(data), split)
        columns = self._columns_of(rows, what)
        for column in columns:
            if column not in rows:
                raise InputError(f"{what}: no column {column!r}; found {', '.join(map(str, rows.columns))} (text=)")
        rows = rows[list(columns)].set_axis(PAIR if len(columns) > 1 else TEXT, axis=1).reset_index(drop=True)
        if len(columns) == 1:
            rows = _without_empty(rows, what)
        for name, values in rows.items():
            _require_text(values, str(name), what)
        if rows.empty:
            raise InputError(f"{what}: there are none")
        return rows.reset_index(drop=True)

    def _columns_of(self, rows: pd.DataFrame, what: str) -> tuple[str, ...]:
        """Return the columns to read: those of the task, or else `prompt` and `completion` if they exist, or `text`."""
        return self.columns or (PAIR if {*PAIR} <= {*rows} else TEXT)

    def with_columns(self, columns: Sequence[str]) -> Task:
        """Return the task with text from other columns.

        Raises:
            InputError: the number of names is not one or two.
        """
        if not (len(columns) in (1, 2) and all(columns) and len({*columns}) == len(columns)):
            raise InputError(
                f"expected the name of the text column, or of the prompt and completion columns, got {columns!r}"
            )
        return replace(self, columns=tuple(columns))

    def as_read(self, rows: Mapping[Split, pd.DataFrame]) -> Task:
        """Return the task with the columns of its rows.

        Raises:
            InputError: one split has running text and another one prompts.
        """
        columns = {split: tuple(map(str, table.columns)) for split, table in rows.items()}
        if len({*columns.values()}) > 1:
            listed = " and ".join(f"the {split} rows have {', '.join(names)}" for split, names in columns.items())
            raise InputError(f"{listed}; expected the same columns")
        return replace(self, columns=columns["validation"])

    def tokenize(self, rows: pd.DataFrame, split: Split, encoding: Encoding) -> Dataset:
        """Return the tokens, and the labels of those that are predicted."""
        if self.columns == TEXT:
            return tokenized_text(rows, encoding.tokenizer, encoding.max_length)
        return tokenized_pairs(
            rows,
            encoding.tokenizer,
            encoding.max_length,
            encoding.max_target_length,
            encoder_decoder=self.encoder_decoder,
        )

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads tokens and labels on the right."""
        from transformers import DataCollatorForSeq2Seq

        right = copy.deepcopy(tokenizer)
        right.padding_side = "right"  # not the tokenizer's own side, since positions are counted from the left
        collator: Callable[[list[dict[str, Any]]], Any] = DataCollatorForSeq2Seq(right)
        return collator

    def predictions(self, logits: Any, labels: Tensor) -> Tensor:
        """Return the loss of every token."""
        # A mixture of experts adds its own loss to the tuple
        outputs = logits if isinstance(logits, tuple) else (logits,)
        return token_losses(next(one for one in outputs if one.dim() == 3), labels, shifted=not self.encoder_decoder)

    def row_loss(self, values: Tensor, target: Tensor, outputs: Sequence[str] = ()) -> Tensor:
        """Return the loss of the predicted tokens; see `Task`."""
        return super().row_loss(values.view(len(target), -1), target, outputs)

    def model_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """Return the sum of -log p over the predicted tokens."""
        if not self.encoder_decoder:
            values, target = values[:-1], target[1:]
        return cross_entropy(values, target, ignore_index=IGNORED, reduction="sum")

    def row_weight(self, target: Tensor, outputs: Sequence[str] = ()) -> Tensor:
        """Return the number of predicted tokens."""
        return (target[0 if self.encoder_decoder else 1 :] != IGNORED).sum()

    def metrics(self, predictions: Array, labels: Array, outputs: Sequence[str] = ()) -> dict[str, float]:
        """Return the perplexity."""
        return {self.metric: perplexity(predictions, labels, shifted=not self.encoder_decoder)}

    def references(self, rows: pd.DataFrame) -> tuple[str, ...]:
        """Return the completions, if there are prompts."""
        return tuple(rows["completion"]) if self.columns == PAIR else ()

    def generated(
        self,
        model: nn.Module,
        rows: Dataset,
        references: Sequence[str],
        encoding: Encoding,
        batch_size: int,
        progress: Progress = iter,
    ) -> dict[str, Any]:
        """Complete the prompts greedily, and compare the results with the references.

        Returns:
            `exact_match`, `rouge_l`, and for the shortest rows `examples` with `prompt`, `expected` and `generated`.
        """
        tokenizer = encoding.tokenizer
        texts = generate(
            model,
            rows,
            tokenizer,
            batch_size=batch_size,
            max_new_tokens=encoding.max_target_length,
            encoder_decoder=self.encoder_decoder,
            progress=progress,
        )
        prompts = prompts_of(rows, self.encoder_decoder, EXAMPLES)
        shown = zip(tokenizer.batch_decode(prompts, skip_special_tokens=True), references, texts)  # noqa: B905
        examples = [{"prompt": a, "expected": b, "generated": c} for a, b, c in shown]
        return {**generation_scores(texts, references), "examples": examples}


def example_pairs() -> pd.DataFrame:
    """Return prompts and completions for examples."""
    import pandas as pd

    prompts = ["the film is fine", "a dull story", "lovely war", "flat again", "a moving film", "but stale"]
    return pd.DataFrame({"prompt": prompts, "completion": ["good", "bad"] * 3})


def perfect_logits(labels: Tensor, outputs: int) -> Tensor:
    """Return logits that predict every label; their values are arbitrary where there is no label."""
    return 99.0 * one_hot(labels.clamp(min=0), outputs)


def _without_empty(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """Drop empty rows of running text, and report their number in a warning."""
    empty = rows["text"].map(_is_empty).astype(bool)
    if empty.any():
        warnings.warn(f"{what}: {int(empty.sum())} of {len(rows)} have no text and are left out", stacklevel=3)
    return rows[~empty]


def _is_empty(value: Any) -> bool:
    """Return whether a cell is missing or contains only whitespace."""
    return not value.strip() if isinstance(value, str) else is_missing(value)


def _require_text(values: pd.Series, name: str, what: str) -> None:
    no_text = [(row, value) for row, value in values.items() if not isinstance(value, str) or not value.strip()]
    if no_text:
        row, value = no_text[0]
        raise InputError(
            f"{what}: expected text, but row {row} (counted from 0) has "
            f"{'nothing' if _is_empty(value) else f'{value!r:.50}'} in {name!r}, "
            f"and {len(no_text) - 1} more rows have no text there"
        )


def _from_hub(name: str, split: Split) -> pd.DataFrame:
    splits = read_hub(name)
    if split not in splits:
        raise InputError(f"the data set {name} has no split {split!r}; found {', '.join(splits)}")
    return splits[split]

"""Rows of a task, tokenized for a model."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinyspan.errors import InputError
from tinyspan.labels import positions
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.workflows.models import load_pretrained, output_names, tokenizer_of
from tinyspan.workflows.results import token_limit
from tinyspan.workflows.tasks import Labelled
from tinyspan.workflows.tasks.base import Encoding, Room, Split, Task, get_task

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = ["Prepared", "digest_of", "positions_of", "prepare", "require_room"]

SPLITS: tuple[Split, ...] = ("train", "validation")
# types of models whose positions are counted from the padding token's id on
AFTER_PADDING = {"camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"}
AFTER_PADDING |= {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
EXPECTED = "expected at least 1 and fewer than all"  # number of rows to set aside


@dataclass(frozen=True)
class Prepared:
    """A task's rows, tokenized for a model.

    Attributes:
        model: name or path of the pre-trained model, as the user gave it.
        labels: names of the head's outputs in their order, which numbers the labels of the rows; see `output_names`.
        train: the training rows; None for scoring only.
        completions: the held-out completions as text, in the order of the rows, if the task has prompts.
        row_numbers: number of each held-out row in the data, in the order of `validation`; empty if the rows have no
            numbers, see `Task.read`.
        shuffled: whether the training rows are in random order, as those that `prepare` has drawn.
        draw_seed: seed with which rows are set aside from rows in another order.
        aside: training rows that are set aside, without those of `train`; see `with_aside`.
        train_numbers: number of each training row in the data, in the order of `train`, likewise.
        aside_numbers: number of each row of `aside` in the data, likewise.
        drawn: number of rows of each split that were drawn, before tokenization; None if all are used.
    """

    model: str
    task: Task
    tokenizer: Any
    train: Dataset | None
    validation: Dataset
    completions: Sequence[str] = ()
    labels: tuple[str, ...] = ()
    row_numbers: tuple[int, ...] = ()
    shuffled: bool = False
    draw_seed: int = 0
    aside: Dataset | None = None
    train_numbers: tuple[int, ...] = ()
    aside_numbers: tuple[int, ...] = ()
    drawn: Mapping[Split, int | None] = field(default_factory=dict)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that collates rows to a padded batch."""
        return self.task.collator(self.tokenizer)

    def compute_metrics(self, output: Any) -> dict[str, float]:
        """Return the metrics of predictions, as `compute_metrics` of a Trainer.

        The Trainer also needs `preprocess_logits_for_metrics=prepared.task.predictions`.

        Args:
            output: `EvalPrediction`, with `predictions` and `label_ids`.
        """
        return self.task.metrics(output.predictions, output.label_ids, self.labels)

    @property
    def label_mean(self) -> float | None:
        """Mean label of the training rows; None without training rows, or if the task is not a regression."""
        return self.task.label_mean(self.train) if self.train else None

    def random_order(self) -> list[int]:
        """Return the training rows in a random order: as they are if they were drawn, else drawn with `draw_seed`."""
        total = len(self.train or ())
        if self.shuffled:
            return list(range(total))
        return torch.randperm(total, generator=torch.Generator().manual_seed(self.draw_seed)).tolist()

    def with_aside(self, rows: int) -> Prepared:
        """Return the task with training rows set aside, as a run with `Settings(set_aside=rows)` uses them.

        They are the last rows of a random order, or drawn with `draw_seed` from any other order, such as that of a file
        sorted by label. A warning is issued if labelled rows that are set aside are also among those that are left.

        Args:
            rows: number of rows, fewer than there are; 0 sets none aside. With as many rows as are set aside
                already, the task is returned unchanged.

        Raises:
            InputError: no training row would be left, or another number of rows is set aside already.
        """
        if rows == len(self.aside or ()):
            return self
        if self.aside is not None:
            raise InputError(f"{len(self.aside)} training rows are set aside already; expected {rows}")
        total = len(self.train or ())
        if self.train is None or not 0 < rows < total:
            raise InputError(f"cannot set {rows} of {total} training rows aside: {EXPECTED}")
        order = self.random_order()
        return self.divided(sorted(order[:-rows]), sorted(order[-rows:]))

    def divided(self, rest: Sequence[int], aside: Sequence[int]) -> Prepared:
        """Return the task with some of its training rows left and others set aside, by their positions.

        A warning is issued if labelled rows that are set aside are also among those that are left.
        """
        assert self.train is not None
        left, kept = self.train.select(rest), self.train.select(aside)
        self._warn_of_rows_in_both(left, kept)
        known = len(self.train_numbers) == len(self.train)
        numbers, aside_numbers = (tuple(self.train_numbers[row] for row in part if known) for part in (rest, aside))
        return replace(self, train=left, train_numbers=numbers, aside=kept, aside_numbers=aside_numbers)

    def _warn_of_rows_in_both(self, rest: Dataset, aside: Dataset) -> None:
        """Warn of labelled rows in both parts; texts with unknown words may differ although their tokens do not."""
        if not isinstance(self.task, Labelled):
            return
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        tokens = {tuple(ids) for ids in aside["input_ids"] if unknown not in ids}
        batches = rest.select_columns("input_ids").iter(batch_size=1000)  # all at once would take gigabytes
        twice = {row for batch in batches for row in map(tuple, batch["input_ids"]) if row in tokens}
        if count := sum(tuple(ids) in twice for ids in aside["input_ids"]):
            warnings.warn(
                f"{self.task.name}: {count:,} of {len(aside):,} rows that are set aside have the tokens of other "
                "training rows, so their scores are too high; remove duplicates, or pass a larger max_length= if the "
                "texts differ further on",
                stacklevel=4,
            )

    def with_last_aside(self, rows: int) -> Prepared:
        """Return the task with its last training rows set aside, in the order in which `prepare` drew them.

        A draw of more rows begins with the rows of a smaller draw, so the last ones are those that the smaller one
        lacks.
        """
        total = len(self.train or ())
        return self.divided(range(total - rows), range(total - rows, total))

    def set_aside(self, rows: int) -> tuple[Prepared, Prepared]:
        """Split off training rows, for choosing settings on rows that are neither trained on nor reported on.

        Args:
            rows: number of rows, at least one and fewer than there are; see `with_aside`.

        Returns:
            The task without these training rows, and the task with these as the held-out rows.

        Raises:
            InputError: no training row would be left, or none would be set aside.
        """
        if rows == 0:
            raise InputError(f"cannot set 0 of {len(self.train or ())} training rows aside: {EXPECTED}")
        split = self.with_aside(rows)
        assert split.aside is not None
        rest = replace(split, aside=None, aside_numbers=())
        return rest, replace(rest, validation=split.aside, completions=(), row_numbers=split.aside_numbers)

    def digests(self, parts: Iterable[str] = ("train", "validation", "aside")) -> dict[str, str]:
        """Return the SHA-256 of the tokens and labels of each part that has rows; `aside` are the rows set aside."""
        return {part: digest_of(rows) for part in parts if (rows := getattr(self, part))}

    def other_rows(self, expected: Mapping[str, str]) -> str | None:
        """Return, in words, the first rows that are not those of a result's `row_digests`; None if all are."""
        words = {"train": "training rows", "validation": "held-out rows", "aside": "rows that were set aside"}
        found = self.digests(expected)
        for part, digest in expected.items():
            if found.get(part) != digest:
                actual = f"{found.get(part)!s:.12}"
                return f"its result.json has the SHA-256 {digest[:12]} of the {words[part]}, and here it is {actual}"
        return None


def prepare(
    model: str,
    task: str | Task,
    *,
    data: Path | None = None,
    text: Sequence[str] = (),
    max_length: int = 128,
    max_target_length: int = 64,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    draw_seed: int = 0,
    train: bool = True,
    adapter: Path | OpenedAdapter | None = None,
    outputs: Sequence[str] = (),
) -> Prepared:
    """Load and tokenize a task for a model; labels are matched by name to the outputs of the model's head.

    Args:
        model: path, hub id or `minilm`.
        task: name of a task, or a task object.
        data: folder, or for a language task the id of a data set; see the task's `read`.
        text: for a language task, the columns of the text, or of prompt and completion, if they have other names.
        max_length: maximum number of tokens per row, or of a prompt.
        max_target_length: maximum number of tokens of a completion.
        train_rows: number of training rows to use, sampled with `draw_seed`.
        validation_rows: number of held-out rows to use, sampled likewise.
        draw_seed: seed of this sampling; it is separate from the seed of a run, so that all runs use the same rows.
        train: whether to read the training rows.
        adapter: the adapter that will be scored; its head replaces the model's.
        outputs: names of the outputs in their order, of a head that is neither the model's nor the adapter's.

    Raises:
        InputError: the model, the task or its data are not available.
    """
    chosen = get_task(task)
    if text:
        chosen = chosen.with_columns(text)
    loaded = {split: chosen.read(split, data) for split in SPLITS if train or split == "validation"}
    config = load_pretrained("AutoConfig", model)
    tokenizer = tokenizer_of(model, config)
    chosen = chosen.as_read(loaded)
    chosen.check_config(config, model)
    labels = tuple(outputs) or output_names(config, chosen, adapter)
    chosen.configure(config)
    chosen = chosen.configured(config)
    encoding = Encoding(tokenizer, max_length, max_target_length, labels)
    order = positions(chosen.labels, labels) or ()
    if list(order) != sorted(order):
        warnings.warn(
            f"the outputs of {model if adapter is None else adapter} are, in their order, {', '.join(labels)}; "
            f"the labels of {chosen.name}, {', '.join(chosen.labels)}, are matched to them by name",
            stacklevel=2,
        )

    drawn: dict[Split, int | None] = dict.fromkeys(SPLITS)

    def sample(split: Split, limit: int | None) -> pd.DataFrame:
        rows = loaded[split]
        if limit is None or limit >= len(rows):
            return rows
        drawn[split] = limit
        return rows.sample(limit, random_state=draw_seed)

    def tokenize(split: Split, rows: pd.DataFrame) -> Dataset:
        tokens = chosen.tokenize(rows, split, encoding)
        require_room(tokens, split, model, config, chosen, encoding)
        return tokens

    held_out = sample("validation", validation_rows)
    validation = tokenize("validation", held_out)
    to_train = sample("train", train_rows) if train else None
    tokenized = None if to_train is None else tokenize("train", to_train)
    by_length, references = _by_length(validation), chosen.references(held_out)
    return Prepared(
        model,
        chosen,
        tokenizer,
        tokenized,
        validation.select(by_length),
        tuple(references[index] for index in by_length) if references else (),
        labels,
        _numbers(held_out, by_length),
        shuffled=drawn["train"] is not None,
        draw_seed=draw_seed,
        train_numbers=() if to_train is None or tokenized is None else _numbers(to_train, range(len(tokenized))),
        drawn=drawn,
    )


def require_room(rows: Dataset, split: Split, model: str, config: Any, task: Task, encoding: Encoding) -> None:
    """Check that rows are not too long for a model, and that the model knows their tokens.

    Raises:
        InputError: a row is too long, has no token, or has a token that the model does not know.
    """
    tokenizer = encoding.tokenizer
    encoder, decoder = (getattr(config, part, config) for part in ("encoder", "decoder"))
    if min(map(len, rows["input_ids"])) == 0:
        raise InputError(f"a {split} row has no token: its text is empty, and the tokenizer of {model!r} adds none")
    largest = max(max(map(max, rows["input_ids"])), tokenizer.pad_token_id or 0)
    if largest >= (vocabulary := getattr(encoder, "vocab_size", None) or math.inf):
        raise InputError(
            f"the tokenizer of {model!r} made the token {largest}, and the model knows {vocabulary}: resize its "
            "embeddings (resize_token_embeddings), or use the tokenizer that belongs to it"
        )
    room = Room(model, min(positions_of(encoder), token_limit(config, tokenizer)), positions_of(decoder))
    task.require_room(rows, split, room, encoding)


def positions_of(config: Any) -> float:
    """Return the maximum number of tokens of a model; infinite if its config has none, or one below 1."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    if config.model_type in AFTER_PADDING and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1
    return positions if positions > 0 else math.inf


def digest_of(rows: Dataset) -> str:
    """Return the SHA-256 of the tokens and labels of rows."""
    import pyarrow as pa

    table = rows.with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    table = table.take(pa.array(range(len(table))))  # a slice may be written with the bytes of rows behind it
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _numbers(rows: pd.DataFrame, order: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of tokenized rows in an order; none if texts were joined, or the index is no numbering."""
    import pandas as pd

    numbering = pd.api.types.is_integer_dtype(rows.index.dtype) and rows.index.is_unique
    return tuple(int(rows.index[row]) for row in order) if numbering and len(rows) == len(order) else ()


def _by_length(rows: Dataset) -> list[int]:
    """Return an order of the rows in which batches have little padding; scores do not depend on it."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sorted(range(len(rows)), key=lengths.__getitem__)

"""A fine-tuned model with its task, which predicts rows a chunk at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import nn

from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.folders import RESULT, is_unfinished
from tinyspan.io.manifests import MANIFEST, check_attached, read_manifest
from tinyspan.io.storage import read_json, reading
from tinyspan.labels import positions
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.checks import check_adapted, check_evaluation
from tinyspan.workflows.hardware import default_device
from tinyspan.workflows.models import load_pretrained, output_names, tokenizer_of, type_of_config
from tinyspan.workflows.results import (
    Described,
    settings_of,
    stored_task,
    thresholds_of,
    token_limit,
    trained_length,
    with_thresholds,
)
from tinyspan.workflows.rows import positions_of, require_room
from tinyspan.workflows.streams import CHUNK, Chunk
from tinyspan.workflows.tasks import Labelled, get_task
from tinyspan.workflows.tasks.base import Array, Encoding, Split
from tinyspan.workflows.tasks.cells import is_list, is_missing, listed, number_of
from tinyspan.workflows.tasks.table import labelled_types, task_of_labels
from tinyspan.workflows.tasks.token_classification import encoded_words

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["PREDICTION", "PROBABILITY", "Answers", "Predictor"]

PREDICTION, PROBABILITY = "prediction", "probability_"  # added columns; the second is followed by a label


@dataclass(frozen=True)
class _Run:
    """A folder that `record` wrote."""

    folder: Path
    result: dict[str, Any] | None


class Answers(NamedTuple):
    """The predictions for some rows.

    Attributes:
        rows: the result of `predict` for each row.
        scored: predictions and encoded labels of each batch, for the metrics.
        truncated: number of rows with words that were truncated.
    """

    rows: list[dict[str, Any]]
    scored: list[tuple[Array, Array]]
    truncated: int


class Predictor:
    """A fine-tuned model with its task, for predictions on new rows.

    The task comes from the `result.json` of the adapter or of the recorded run. A plain fine-tuned model has no such
    file: then its config determines the type of task and the labels, and the text columns must be given. The weights
    are loaded at the first prediction.

    Args:
        model: a fine-tuned model (path or hub id), a folder that `record` wrote, or with `adapter` the base model.
        adapter: a folder that `tune` wrote.
        basis: folder of its basis, if that has moved.
        text: the text columns; by default those of the task.
        task: name of a registered task, instead of the stored one.
        task_type: type of labelled rows, instead of the one that the model's config suggests.
        max_length: maximum number of tokens per row; by default as the model was trained, else 128, and never more than
            the model takes. Longer rows are truncated.
        batch_size: rows per batch.
        precision: `bfloat16` computes under autocast; `auto` does so if the device supports it.

    Attributes:
        trained: the `result.json` of the adapter or of the recorded run, if there is one.
        task: the task.
        labels: names of the head's outputs in their order.
        label_columns: the label columns of the rows on which the model was trained, if they are known.
        max_length: maximum number of tokens per row.

    Raises:
        InputError: the model, the adapter or the task is not available, the model has no head for labelled rows, or the
            text columns are not known.

    Example:
        Predictions for rows in memory, from a run of `record` on a table with the text column `subject`::

            predictor = Predictor("runs/full")
            for answer in predictor.predict({"subject": line} for line in open("subjects.txt")):
                print(answer["prediction"], answer["probabilities"])
    """

    def __init__(
        self,
        model: str,
        adapter: str | Path | None = None,
        *,
        basis: str | Path | None = None,
        text: Sequence[str] = (),
        task: str | None = None,
        task_type: str | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        precision: Literal["auto", "float32", "bfloat16"] = "float32",
    ) -> None:
        if task is not None and task_type is not None:
            raise InputError("give task= or task_type=, and not both")
        if task is not None:
            get_task(task)  # raises an error if it is unknown, before the model's config is read
        self._adapter = check_evaluation(_path(adapter), _path(basis), None, False)
        run = _opened_run(model)
        self._model = model if run is None else str(run.folder / "model")
        source: Described | None = run if self._adapter is None else self._adapter
        config = load_pretrained("AutoConfig", self._model)
        self.trained = None if source is None else source.result
        self._registered = task is not None or _is_registered(source)
        self.task = _task_of(self._model, config, source, self._adapter, text, task, task_type)
        self.task.check_config(config, self._model)
        self.labels = output_names(config, self.task, self._adapter)
        self.task = cast(Labelled, with_thresholds(self.task, thresholds_of(config, self._adapter), self.labels))
        self.label_columns = _label_columns(source, self._registered)
        tokenizer = tokenizer_of(self._model, config)
        settings = settings_of(source)
        limit = min(positions_of(getattr(config, "encoder", config)), token_limit(config, tokenizer))
        trained = settings.max_length if source is not None else trained_length(config) or settings.max_length
        length = int(min(max_length or trained, limit))
        self.max_length = length
        self._settings = replace(settings, batch_size=batch_size, precision=precision, max_length=length)
        self._encoding = Encoding(tokenizer, length, settings.max_target_length, self.labels)
        self._config = config

    @cached_property
    def network(self) -> nn.Module:
        """The model with the adapter merged into its weights, for inference.

        Raises:
            InputError: neither the model nor the adapter has a trained head, or it was trained for other labels.
            MismatchError: the adapter was trained with another model, or in another basis.
        """
        base, fingerprint = check_adapted(self._model, self.task, self._adapter)
        loaded: nn.Module = base
        if self._adapter is not None:
            loaded = wrap_with_adapter(SubspaceModel, base, self._adapter, fingerprint=fingerprint).merge()
        return loaded.to(default_device()).eval()

    def predict(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the prediction for each row, in the order of the rows; 4096 rows are in memory at a time.

        Args:
            rows: rows with the text columns of the task.

        Yields:
            A dict with `prediction` (the name of a label, a list of names, a number, or a list with one tag per word)
            and, for a classification, `probabilities` by label. Words that were truncated have no tag, and a word
            without a token has None.

        Raises:
            InputError: a row has no text.
            TinyspanError: the model computes NaN or infinite numbers.
        """
        remaining, first = iter(rows), 0
        while group := list(islice(remaining, CHUNK)):
            for row in group:
                if not isinstance(row, Mapping):
                    raise InputError(f"expected rows as mappings of columns to values, got {row!r:.60}")
            places = [f"row {first + row} (counted from 0)" for row in range(len(group))]
            columns = tuple(dict.fromkeys(name for row in group for name in row))
            chunk = Chunk(first, columns, [{**row} for row in group], places)
            yield from self.answers(self.texts(chunk, "the rows")).rows
            first += len(group)

    def texts(self, chunk: Chunk, name: str) -> pd.DataFrame:
        """Return the text columns of rows, with the number of each row as the index.

        Args:
            chunk: the rows.
            name: name of the table, for messages.

        Raises:
            InputError: a row has no text, or for token classification no word.
        """
        import pandas as pd

        for column in self.task.columns:
            for place, row in zip(chunk.places, chunk.rows, strict=True):
                if column not in row:
                    raise InputError(f"{name}, {place}: no {column!r}; found {', '.join(map(str, row)) or 'nothing'}")
                if is_missing(row[column]):
                    raise InputError(f"{name}, {place}: nothing in {column!r}; remove the row")
        if not self._registered:  # rows of GLUE may have an empty text
            for place, row in zip(chunk.places, chunk.rows, strict=True):
                if not any(str(row[column]).strip() for column in self.task.columns):
                    raise InputError(f"{name}, {place}: no text in {listed(self.task.columns)}; remove the row")
        texts = pd.DataFrame(
            {column: [row[column] for row in chunk.rows] for column in self.task.columns},
            index=range(chunk.first, chunk.first + len(chunk.rows)),
            dtype=object,
        )
        if self.task.prediction_kind == "tags":
            (column,) = self.task.columns
            texts[column] = [
                [str(word) for word in cell] if is_list(cell) else str(cell).split() for cell in texts[column]
            ]
            for place, words in zip(chunk.places, texts[column], strict=True):
                if not words:
                    raise InputError(f"{name}, {place}: no words in {column!r}")
        return texts

    def numbered(self, labels: pd.DataFrame, name: str) -> pd.Series:
        """Return the labels of rows in the form of the task.

        Args:
            labels: the label columns. For a registered task, whose rows number the labels, they may be these numbers.
            name: name of the table, for messages.

        Raises:
            InputError: a label is missing, or is none of the model's.
        """
        columns = [str(column) for column in labels]
        if self._registered and self.task.prediction_kind != "number":
            order = positions(self.task.labels, self.labels) or ()
            names = [self.labels[number] for number in order]
            labels = labels.map(lambda cell: _named(cell, names))
        _, encoded = type(self.task).from_columns(name, self.task.columns, columns, {"validation": labels}, self.labels)
        return encoded["validation"]

    def answers(
        self,
        texts: pd.DataFrame,
        labels: pd.Series | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Answers:
        """Return the predictions for the rows of a chunk, in their order.

        Args:
            texts: the result of `texts`.
            labels: the result of `numbered`, if the rows are to be scored.
            advance: function that gets the number of rows after each batch.

        Raises:
            TinyspanError: the model computes NaN or infinite numbers.
        """
        count = len(texts)
        if count == 0:
            return Answers([], [], 0)
        task = replace(self.task, labels=self.labels)  # by whose order the labels are numbered
        rows = texts.assign(label=task.blank_labels(texts) if labels is None else labels)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* rows have the label")  # as the blank ones do
            tokens = task.tokenize(rows, "validation", self._encoding)
        require_room(tokens, cast(Split, "given"), self._model, self._config, task, self._encoding)
        cells, collate = tokens[:], task.collator(self._encoding.tokenizer)
        order = sorted(range(count), key=[len(ids) for ids in cells["input_ids"]].__getitem__)
        answers: list[dict[str, Any]] = [{}] * count
        scored: list[tuple[Array, Array]] = []
        device = default_device()
        network = self.network
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self._settings.autocast):
            for start in range(0, count, self._settings.batch_size):
                indices = order[start : start + self._settings.batch_size]
                batch = collate([{name: values[index] for name, values in cells.items()} for index in indices])
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                logits = network(**inputs).logits
                if not torch.isfinite(logits).all():
                    source = str(self._adapter or self._model)
                    raise TinyspanError(
                        f"{source!r} computes NaN or infinite numbers for a row: are its weights damaged?"
                    )
                predicted = task.predictions(logits, batch["labels"])
                predictions = (predicted.float() if predicted.is_floating_point() else predicted).cpu().numpy()
                truths = batch["labels"].numpy()
                for index, answer in zip(indices, task.answers(predictions, truths, self.labels), strict=True):
                    answers[index] = answer
                scored.extend([(predictions, truths)] if labels is not None else [])
                advance(len(indices))
        truncated = 0
        if task.prediction_kind == "tags":
            for row, words in enumerate(texts[task.columns[0]]):
                truncated += self._align(answers[row], words, len(cells["input_ids"][row]))
        return Answers(answers, scored, truncated)

    def _align(self, answer: dict[str, Any], words: list[str], tokens: int) -> bool:
        """Give None to the words of a row that have no token, and return whether words were truncated."""
        tags: list[str] = answer["prediction"]
        if len(tags) == len(words):
            return False
        encoding = self._encoding
        encoded = encoded_words([words], encoding)
        by_word = dict(zip(sorted({word for word in encoded.word_ids(0) if word is not None}), tags, strict=True))
        truncated = tokens == encoding.max_length
        last = max(by_word, default=-1) + 1 if truncated else len(words)
        answer["prediction"] = [by_word.get(word) for word in range(last)]
        return last < len(words)

    @property
    def added(self) -> dict[str, pa.DataType]:
        """Names and types of the columns that an output has besides those of the input."""
        import pyarrow as pa

        kinds = {
            "label": pa.string(),
            "labels": pa.list_(pa.string()),
            "number": pa.float64(),
            "tags": pa.list_(pa.string()),
        }
        names = [f"{PROBABILITY}{label}" for label in self.labels] if self.task.has_probabilities else []
        return {PREDICTION: kinds[self.task.prediction_kind], **dict.fromkeys(names, pa.float64())}

    @property
    def separator(self) -> str:
        """Text between the values of a prediction in CSV."""
        return " " if self.task.prediction_kind == "tags" else "|"


# -- the task ---------------------------------------------------------------------------------------------------------


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)


def _opened_run(model: str) -> _Run | None:
    """Return the folder that `record` wrote, or None if the model is something else.

    Raises:
        InputError: the run is unfinished, or was recorded without `record`.
        StorageError: its result is damaged.
    """
    folder = Path(model)
    if not (folder / MANIFEST).is_file() or (folder / "config.json").exists():
        return None
    if read_manifest(folder).kind != "trajectory":
        return None
    if is_unfinished(folder) or not (folder / "model").is_dir() or not (folder / RESULT).is_file():
        raise InputError(f"{model!r} is a trajectory without a fine-tuned model/ and {RESULT}: finish `record`")
    check_attached(folder, RESULT)
    return _Run(folder, read_json(folder / RESULT, sealed=False))


def _is_registered(source: Described | None) -> bool:
    """Return whether a stored task is a registered one, in contrast to one on a user's own table."""
    return source is not None and source.result is not None and "data" not in source.result


def _task_of(
    model: str,
    config: Any,
    source: Described | None,
    adapter: OpenedAdapter | None,
    text: Sequence[str],
    task: str | None,
    task_type: str | None,
) -> Labelled:
    """Return the task, with the text columns of the rows.

    Raises:
        InputError: it is not known, is none of labelled rows, or has another number of text columns.
    """
    if task is not None:
        chosen = get_task(task)
    elif task_type is None and source is not None:
        chosen = stored_task(source)
    else:
        labels = adapter.labels if adapter is not None else None
        chosen = _task_by_config(model, config, labels, text, task_type)
    if not isinstance(chosen, Labelled):
        raise InputError(f"{chosen.name} is {chosen.type}; predictions are for {', '.join(labelled_types())}")
    if text and len(text) != len(chosen.columns):
        raise InputError(
            f"{chosen.name} has the text columns {', '.join(chosen.columns)}, got {', '.join(text)}; expected as many"
        )
    return cast(Labelled, replace(chosen.for_scoring(), columns=tuple(text) or chosen.columns))


def _task_by_config(
    model: str, config: Any, labels: Sequence[str] | None, text: Sequence[str], task_type: str | None
) -> Labelled:
    """Return the task that a model's config describes: its type, by architecture and number of labels, and labels."""
    kind = task_type or type_of_config(config)
    if kind is None:
        architecture = (getattr(config, "architectures", None) or [""])[0]
        raise InputError(
            f"{model!r} is {architecture or 'a model without an architecture in its config'}, which has no head for "
            f"labelled rows; pass a fine-tuned model or a recorded run, or an adapter= of this base model"
        )
    if not text and kind in labelled_types():
        raise InputError(f"{model!r} does not tell which column has the text, or which two: give text=")
    names = tuple(labels or (str(config.id2label[index]) for index in sorted(config.id2label, key=int)))
    return task_of_labels(kind, Path(model).name, tuple(text), names)


def _label_columns(source: Described | None, registered: bool) -> tuple[str, ...]:
    """Return the label columns of the rows on which a model was trained, or none."""
    result = None if source is None else source.result
    if source is None or result is None:
        return ("label",) if registered else ()
    with reading(source.folder / RESULT):
        return ("label",) if registered else tuple(result["data"]["label"])


def _named(cell: Any, names: Sequence[str]) -> Any:
    """Return the name of a numbered label, or of each in a list; a name is returned unchanged."""
    if is_list(cell):
        return [_named(one, names) for one in cell]
    number = number_of(cell)
    return names[int(number)] if number is not None and number in range(len(names)) else cell

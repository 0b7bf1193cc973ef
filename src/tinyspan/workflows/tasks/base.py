"""What a task has to answer, and the registries: task types by name, and data sets by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from datasets import Dataset
from torch import Tensor, nn

from tinyspan.errors import InputError, TinyspanError
from tinyspan.registry import Registry

__all__ = [
    "TASKS",
    "TYPES",
    "Encoding",
    "Example",
    "Room",
    "Split",
    "Task",
    "get_task",
    "register_task",
    "register_type",
    "require_finite",
    "types_of_own_rows",
]

Split = Literal["train", "validation"]
Array = npt.NDArray[Any]
Progress = Callable[[Sequence[int]], Iterable[int]]
LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Encoding:
    """How rows become the tokens and labels of a model.

    Attributes:
        tokenizer: of the model.
        max_length: tokens per row, or of a prompt; longer ones are cut.
        max_target_length: tokens of a completion.
        outputs: names of the head's outputs in their order, by which labels are numbered.
    """

    tokenizer: Any
    max_length: int
    max_target_length: int
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Room:
    """How many tokens a model takes; infinite where it has no limit.

    Attributes:
        model: its name, for messages.
        tokens: of a row; of an encoder-decoder, of its encoder.
        target_tokens: of the decoder.
    """

    model: str
    tokens: float
    target_tokens: float


@dataclass(frozen=True)
class Task(ABC):
    """How rows become batches, a head and a score: the answers that every type of task gives.

    A type of task is a subclass with a name of its own, registered by `register_type`. A data set is an instance of it,
    registered by `register_task`. An instance that is not registered can be passed to `prepare` as it is.

    Attributes:
        name: of the data set, as in `--task` and in results.
        columns: the columns of text in the rows.
        labels: names of the head's outputs, in the order in which the rows number them; none if the outputs are tokens.
        metric: name of the score that is reported, one of those that `metrics` returns.
        embedded: whether an installed package carries the rows, so that studies do not look for them in a folder.
        type: name of the type of task.
        head: class with `from_pretrained` that loads a model with the head, such as `AutoModelForTokenClassification`.
        problem_type: what the config of a model with this head says, if it says anything.
        pretrained_head: whether the head is pre-trained too, and a model without it is refused.
        own_rows: whether `--task-type` alone describes a task of this type, whose rows `--data` holds.
        encoder_decoder: whether the labels go to a decoder of their own.
        eval_batch_factor: rows per batch when scored, as a multiple of those in training.
    """

    name: str
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    metric: str = ""
    embedded: bool = False

    type: ClassVar[str]
    head: ClassVar[Any]
    problem_type: ClassVar[str | None] = None
    pretrained_head: ClassVar[bool] = False
    own_rows: ClassVar[bool] = False
    encoder_decoder: ClassVar[bool] = False
    eval_batch_factor: ClassVar[int] = 4

    # -- read ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, split: Split, data: Path | None = None) -> pd.DataFrame:
        """Return the checked rows of a split.

        Args:
            split: `train`, or `validation` for the rows held out.
            data: folder of the rows; by default they come from where the data set is published.

        Raises:
            InputError: the rows cannot be had, or one of them does not serve the task.
        """

    def with_columns(self, columns: Sequence[str]) -> "Task":
        """Return the task with text from other columns.

        Raises:
            InputError: the columns of the task are fixed, as they are by default; or this is no list of columns.
        """
        own = ", ".join(self.columns)
        raise InputError(f"{self.name} has its own columns, {own}; --columns goes with --task-type")

    def as_read(self, rows: Mapping[Split, pd.DataFrame]) -> "Task":
        """Return the task as its rows turned out to be; by default that is known before.

        Raises:
            InputError: the splits do not have the same columns.
        """
        return self

    # -- tokenize -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def tokenize(self, rows: pd.DataFrame, split: Split, encoding: Encoding) -> Dataset:
        """Return `input_ids`, `attention_mask`, `labels` and what else the model takes, one row per example.

        Args:
            rows: what `read` returned, or a part.
            split: which one, for messages.
            encoding: tokenizer, lengths, and the order of the head's outputs.
        """

    def require_room(self, rows: Dataset, split: Split, room: Room, encoding: Encoding) -> None:
        """Refuse tokenized rows that are too long for a model.

        Raises:
            InputError: a row is longer than the model takes; the message has the option to lower.
        """
        tokens = max(map(len, rows["input_ids"]))
        if tokens > room.tokens:
            raise InputError(
                f"a {split} row has {tokens} tokens, {room.model!r} takes {room.tokens}: --max-length {room.tokens}"
            )

    # -- collate ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that makes a padded batch of tokenized rows."""

    # -- head ---------------------------------------------------------------------------------------------------------

    def check_config(self, config: Any, model: str) -> None:  # noqa: B027 - most types take any model
        """Refuse a model by its config, before its weights are read.

        Args:
            config: of the model.
            model: its name, for messages.

        Raises:
            InputError: the model has another architecture than the task needs.
        """

    def configure(self, config: Any) -> None:
        """Describe the head in a model's config: one output per label, or the head that the model has."""
        if self.labels:
            config.problem_type = None  # that of another task does not go with the number of labels
            config.num_labels = len(self.labels)
            config.problem_type = self.problem_type

    def check_model(self, loaded: nn.Module, model: str) -> None:  # noqa: B027 - most types take any model
        """Refuse a loaded model that computes something else than the task needs.

        Args:
            loaded: the model.
            model: its name, for messages.

        Raises:
            InputError: the model does not serve the task.
        """

    def label_mean(self, rows: Dataset) -> float | None:
        """Return what a new head can say first, its bias; by default None, as transformers leaves it.

        Args:
            rows: the tokenized training rows.
        """
        return None

    # -- loss ---------------------------------------------------------------------------------------------------------

    def loss_function(self) -> LossFunction | None:
        """Return `loss(outputs, labels, num_items_in_batch=None)`; by default None: the model's own loss is right."""
        return None

    def loss_of(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch."""
        function = self.loss_function()
        if function is None:
            own: Tensor = model(**batch).loss
            return own
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return function(model(**inputs), batch["labels"])

    # -- metrics ------------------------------------------------------------------------------------------------------

    def predictions(self, logits: Any, labels: Tensor) -> Tensor:
        """Return what the metrics need of a batch's logits; by default the logits themselves.

        Args:
            logits: of a batch; in a tuple if the model returns more than logits.
            labels: of the batch.
        """
        first: Tensor = logits[0] if isinstance(logits, tuple) else logits  # hidden states come besides
        return first

    @abstractmethod
    def metrics(self, predictions: Array, labels: Array) -> dict[str, float]:
        """Return metrics by name; one of them is `metric`.

        Args:
            predictions: what `predictions` returned, of all rows.
            labels: of all rows, -100 where a batch was padded.

        Raises:
            TinyspanError: a prediction is NaN or infinite.
        """

    def references(self, rows: pd.DataFrame) -> tuple[str, ...]:
        """Return the texts that generated ones are compared with, one per row; by default there are none.

        Args:
            rows: what `read` returned, or a part.
        """
        return ()

    def generated(
        self,
        model: nn.Module,
        rows: Dataset,
        references: Sequence[str],
        encoding: Encoding,
        batch_size: int,
        progress: Progress = iter,
    ) -> dict[str, Any]:
        """Generate a text for each row and return what the result says of them; called if there are references.

        Args:
            model: trained.
            rows: tokenized.
            references: of these rows.
            encoding: as for `tokenize`.
            batch_size: rows at a time.
            progress: is given the first row of each batch.
        """
        raise NotImplementedError(f"{self.type} generates no text")

    # -- contract -----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def example(cls) -> "Example":
        """Return a small task of this type, with which the contract of all types is tested."""


@dataclass(frozen=True)
class Example:
    """A small task, its rows, and what a perfect model would say of them.

    Attributes:
        task: of the type.
        rows: at least six, as a file has them.
        perfect: labels of a batch and number of outputs -> logits of a perfect model.
        best: value of the task's metric for these.
    """

    task: Task
    rows: pd.DataFrame
    perfect: Callable[[Tensor, int], Tensor]
    best: float = 1.0


TYPES: Registry[type[Task]] = Registry("task type")
TASKS: Registry[Task] = Registry("task")
AnyType = TypeVar("AnyType", bound=type[Task])


def register_type(name: str) -> Callable[[AnyType], AnyType]:
    """Register a type of task under a name.

    Raises:
        InputError: another type or a data set has this name.

    Example:
        >>> sorted(TYPES)
        ['causal-lm', 'classification', 'regression', 'seq2seq']
    """

    def register(cls: AnyType) -> AnyType:
        if TASKS.is_taken(name):
            raise InputError(f"{name!r} is the name of a task; choose another name")
        TYPES.add(name, cls)
        cls.type = name
        return cls

    return register


def register_task(task: Task) -> None:
    """Register a data set under its name, by which the commands and studies find it.

    Raises:
        InputError: another data set or a type of task has this name.
    """
    if TYPES.is_taken(task.name):
        raise InputError(f"{task.name!r} is the name of a task type; choose another name")
    TASKS.add(task.name, task)


def types_of_own_rows() -> list[str]:
    """Return the names that `--task-type` takes."""
    return [name for name, cls in TYPES.items() if cls.own_rows]


def get_task(task: str | Task) -> Task:
    """Return a task by name; those on a user's own rows are named as their type. A task is returned as it is.

    Raises:
        InputError: there is none of this name.
    """
    if isinstance(task, Task):
        return task
    if task in TASKS:
        return TASKS[task]
    own = types_of_own_rows()
    if task not in own:
        raise InputError(
            f"unknown task {task!r}; expected one of {', '.join(sorted(TASKS))}, or a --task-type, {' or '.join(own)}"
        )
    return TYPES[task](task)


def require_finite(task: Task, predictions: Array) -> None:
    """Refuse predictions that are NaN or infinite.

    Raises:
        TinyspanError: one is.
    """
    if not np.isfinite(predictions).all():
        raise TinyspanError(f"{task.name}: the predictions are NaN or infinite; lower the learning rates")

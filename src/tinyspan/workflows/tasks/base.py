"""The interface of a task, and the registries of task types and data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, TinyspanError
from tinyspan.registry import Registry
from tinyspan.workflows.tasks.metrics import LOWER_IS_BETTER

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = [
    "TASKS",
    "TYPES",
    "Encoding",
    "Example",
    "FromTransformers",
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


class _Logits(NamedTuple):
    """The part of what a model returns that a loss function reads."""

    logits: Tensor


@dataclass(frozen=True)
class Encoding:
    """How rows are converted to the tokens and labels of a model.

    Attributes:
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens per row, or of a prompt; longer ones are truncated.
        max_target_length: maximum number of tokens of a completion.
        outputs: names of the head's outputs in their order, which numbers the labels.
    """

    tokenizer: Any
    max_length: int
    max_target_length: int
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Room:
    """Maximum numbers of tokens of a model; infinite without a limit.

    Attributes:
        model: name of the model, for messages.
        tokens: limit of a row; for an encoder-decoder, of its encoder.
        target_tokens: limit of the decoder.
    """

    model: str
    tokens: float
    target_tokens: float


class FromTransformers:
    """A class attribute that is a class of transformers, which takes seconds to import, at its first use.

    Args:
        name: name of the class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: Any) -> Any:
        """Import transformers, and return the class."""
        import transformers

        return getattr(transformers, self._name)


@dataclass(frozen=True)
class Task(ABC):
    """The conversion of rows to batches, the head and the score of a task; each task type implements this interface.

    A task type is a subclass with its own name, registered by `register_type`. A data set is an instance of it,
    registered by `register_task`. An instance that is not registered can be passed to `prepare` directly.

    Attributes:
        name: name of the data set, as in `--task` and in results.
        columns: the text columns of the rows.
        labels: names of the head's outputs, in the order in which the rows number them; empty if the outputs are
            tokens.
        metric: name of the reported score, one of those that `metrics` returns.
        embedded: whether an installed package contains the rows, so that studies do not look for them in a folder.
        type: name of the task type.
        head: class with `from_pretrained` that loads a model with the head, such as `AutoModelForTokenClassification`;
            with `FromTransformers`, transformers is imported when it is needed.
        problem_type: `problem_type` in the config of a model with this head, if there is one.
        pretrained_head: whether the head is pre-trained, too; a model without it is refused.
        own_rows: whether `--task-type` alone describes a task of this type, with rows from `--data`.
        encoder_decoder: whether the labels are the input of a separate decoder.
        eval_batch_factor: rows per batch in evaluation, as a multiple of those in training.
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
            split: `train`, or `validation` for the held-out rows.
            data: folder of the rows; by default they are downloaded from where the data set is published.

        Returns:
            One row per example. If their index consists of different integers, as after `pandas.read_csv`, these are
            the numbers of the rows in results; rows with another index have no numbers there.

        Raises:
            InputError: the rows are not available, or a row does not fit the task.
        """

    def with_columns(self, columns: Sequence[str]) -> Task:
        """Return the task with text from other columns.

        Raises:
            InputError: the columns of the task are fixed, which is the default, or `columns` is not a list of columns.
        """
        own = ", ".join(self.columns)
        raise InputError(f"{self.name} has its own columns, {own}; text= goes with label= or task_type=")

    def weighted(self, weights: str, rows: pd.DataFrame | None) -> Task:
        """Return the task with class weights in its loss; see `Classification`.

        Raises:
            InputError: the type has no class weights, which is the default.
        """
        raise InputError(f"class weights apply to classification; {self.name} is {self.type}")

    def as_read(self, rows: Mapping[Split, pd.DataFrame]) -> Task:
        """Return the task adapted to the rows that were read; by default the task itself.

        Raises:
            InputError: the splits do not have the same columns.
        """
        return self

    # -- tokenize -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def tokenize(self, rows: pd.DataFrame, split: Split, encoding: Encoding) -> Dataset:
        """Return `input_ids`, `attention_mask`, `labels` and other inputs of the model, one row per example.

        Args:
            rows: rows that `read` returned, or some of them.
            split: name of the split, for messages.
            encoding: tokenizer, lengths, and the order of the head's outputs.
        """

    def require_room(self, rows: Dataset, split: Split, room: Room, encoding: Encoding) -> None:
        """Check that tokenized rows are not too long for a model.

        Raises:
            InputError: a row is longer than the model's limit; the message contains the option to lower.
        """
        tokens = max(map(len, rows["input_ids"]))
        if tokens > room.tokens:
            raise InputError(
                f"a {split} row has {tokens} tokens, {room.model!r} takes {room.tokens}: max_length={room.tokens}"
            )

    # -- collate ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that collates tokenized rows to a padded batch."""

    # -- head ---------------------------------------------------------------------------------------------------------

    def check_config(self, config: Any, model: str) -> None:  # noqa: B027 - most types accept any model
        """Check a model by its config, before its weights are read.

        Args:
            config: config of the model.
            model: name of the model, for messages.

        Raises:
            InputError: the model has another architecture than the task needs.
        """

    def configure(self, config: Any) -> None:
        """Describe the head in a model's config: one output per label, or the existing head."""
        if self.labels:
            config.problem_type = None  # that of another task may contradict the number of labels
            config.num_labels = len(self.labels)
            config.problem_type = self.problem_type

    def check_model(self, loaded: nn.Module, model: str) -> None:  # noqa: B027 - most types accept any model
        """Check that a loaded model computes what the task needs.

        Args:
            loaded: the model.
            model: name of the model, for messages.

        Raises:
            InputError: the model does not fit the task.
        """

    def label_mean(self, rows: Dataset) -> float | None:
        """Return the initial bias of a new head; by default None, which keeps the initialisation of transformers.

        Args:
            rows: the tokenized training rows.
        """
        return None

    def configured(self, config: Any) -> Task:
        """Return the task adapted to a model's config, before rows are tokenized; by default the task itself."""
        return self

    def initialize_head(self, model: nn.Module) -> None:  # noqa: B027 - most types keep it
        """Change the new head of a model after its initialisation by transformers; by default nothing changes."""

    @contextmanager
    def training_units(self, model: nn.Module) -> Iterator[None]:
        """Return a context in which a model computes encoded labels, for training and for losses of encoded rows.

        Outside of it, outputs are in the units of the labels. By default both are the same.

        Args:
            model: the model, which is changed in place and back.
        """
        yield

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values of the task's metric are better."""
        return self.metric in LOWER_IS_BETTER

    def for_scoring(self) -> Task:
        """Return the task for the outputs of a model outside of `training_units`; by default the task itself."""
        return self

    # -- loss ---------------------------------------------------------------------------------------------------------

    def loss_function(self, outputs: Sequence[str] = ()) -> LossFunction | None:
        """Return `loss(result, labels, num_items_in_batch=None)`; by default None, for the model's own loss.

        Args:
            outputs: names of the head's outputs in their order; by default `labels` of the task.
        """
        return None

    def loss_of(self, model: nn.Module, batch: Mapping[str, Any], outputs: Sequence[str] = ()) -> Tensor:
        """Return the loss of a batch."""
        function = self.loss_function(outputs)
        if function is None:
            own: Tensor = model(**batch).loss
            return own
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return function(model(**inputs), batch["labels"])

    def row_loss(self, values: Tensor, target: Tensor, outputs: Sequence[str] = ()) -> Tensor:
        """Return the loss of one row as a function of its outputs; `loss_of` a batch is sum(losses) / sum(weights).

        Args:
            values: what the model computes for the row, flattened.
            target: the row's entry of `labels`.
            outputs: names of the head's outputs in their order; by default `labels` of the task.
        """
        function = self.loss_function(outputs)
        if function is None:
            return self.model_loss(values, target)
        return self.row_weight(target, outputs).to(values) * function(_Logits(values[None]), target[None])

    def model_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one row if it is the model's own; the arguments are those of `row_loss`.

        Raises:
            InputError: the type does not say what the model's own loss is, which is the default.
        """
        raise InputError(f"{self.type} does not define the loss of one row: write model_loss and row_weight for it")

    def row_weight(self, target: Tensor, outputs: Sequence[str] = ()) -> Tensor:
        """Return the weight of a row in the loss of a batch, by default 1; see `row_loss`."""
        return torch.ones(())

    # -- metrics ------------------------------------------------------------------------------------------------------

    def predictions(self, logits: Any, labels: Tensor) -> Tensor:
        """Return the part of a batch's logits that the metrics need; by default the logits themselves.

        Args:
            logits: logits of a batch; a tuple if the model returns other tensors, too.
            labels: labels of the batch.
        """
        first: Tensor = logits[0] if isinstance(logits, tuple) else logits  # hidden states follow
        return first

    @abstractmethod
    def metrics(self, predictions: Array, labels: Array, outputs: Sequence[str] = ()) -> dict[str, float]:
        """Return metrics by name; one of them is `metric`.

        Args:
            predictions: results of `predictions`, for all rows.
            labels: labels of all rows, -100 for padding.
            outputs: names of the head's outputs in their order; by default `labels` of the task.

        Raises:
            TinyspanError: a prediction is NaN or infinite.
        """

    def references(self, rows: pd.DataFrame) -> tuple[str, ...]:
        """Return the reference texts for generated ones, one per row; by default there are none.

        Args:
            rows: rows that `read` returned, or some of them.
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
        """Generate a text for each row and return the entries of the result; called if there are references.

        Args:
            model: the trained model.
            rows: tokenized rows.
            references: reference texts of these rows.
            encoding: see `tokenize`.
            batch_size: rows per batch.
            progress: wraps the iteration over the first rows of the batches, for a progress bar.
        """
        raise NotImplementedError(f"{self.type} generates no text")

    # -- contract -----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def example(cls) -> Example:
        """Return a small task of this type, for the tests that every type must pass."""


@dataclass(frozen=True)
class Example:
    """A small task, its rows, and the logits of a perfect model.

    Attributes:
        task: a task of the type.
        rows: at least six rows, as in a file.
        perfect: labels of a batch and number of outputs -> logits of a perfect model.
        best: value of the task's metric for these logits.
    """

    task: Task
    rows: pd.DataFrame
    perfect: Callable[[Tensor, int], Tensor]
    best: float = 1.0


TYPES: Registry[type[Task]] = Registry("task type")
TASKS: Registry[Task] = Registry("task")
AnyType = TypeVar("AnyType", bound=type[Task])


def register_type(name: str) -> Callable[[AnyType], AnyType]:
    """Register a task type under a name.

    Raises:
        InputError: another type or a data set has this name.

    Example:
        >>> {"causal-lm", "classification", "regression"} <= {*TYPES}
        True
    """

    def register(cls: AnyType) -> AnyType:
        if TASKS.is_taken(name):
            raise InputError(f"{name!r} is the name of a task; choose another name")
        TYPES.add(name, cls)
        cls.type = name
        return cls

    return register


def register_task(task: Task) -> None:
    """Register a data set under its name, for the commands and studies.

    Raises:
        InputError: another data set or a type of task has this name.
    """
    if TYPES.is_taken(task.name):
        raise InputError(f"{task.name!r} is the name of a task type; choose another name")
    TASKS.add(task.name, task)


def types_of_own_rows() -> list[str]:
    """Return the accepted values of `--task-type`."""
    return [name for name, cls in TYPES.items() if cls.own_rows]


def get_task(task: str | Task) -> Task:
    """Return a task by name; a task on a user's own rows has the name of its type. A task object is returned unchanged.

    Raises:
        InputError: no task has this name.
    """
    if isinstance(task, Task):
        return task
    if task in TASKS:
        return TASKS[task]
    own = types_of_own_rows()
    if task not in own:
        raise InputError(
            f"unknown task {task!r}; expected one of {', '.join(sorted(TASKS))}; for a table of your own: data=, text= "
            f"and label=; for texts: task_type=, {' or '.join(own)}"
        )
    return TYPES[task](task)


def require_finite(task: Task, predictions: Array) -> None:
    """Check that predictions are finite.

    Raises:
        TinyspanError: a prediction is NaN or infinite.
    """
    if not np.isfinite(predictions).all():
        raise TinyspanError(f"{task.name}: the predictions are NaN or infinite; lower the learning rates")

"""What methods of combination see: the span of the models, the rows to learn from and to choose on, and scores."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.storage import read_json, replacing, write_json
from tinyspan.workflows.combine.span import Span
from tinyspan.workflows.language import IGNORED
from tinyspan.workflows.prediction import joined
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.tasks.base import Array, Task

__all__ = ["PARTS", "Candidate", "Evaluation", "Part", "Problem", "TaskRows", "divide"]

Part = Literal["learn", "choose", "test"]
PARTS: tuple[Part, ...] = ("learn", "choose", "test")
BACKWARD = 2  # a backward pass costs as much as this number of forward passes


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task in three disjoint parts, and how they are scored.

    Attributes:
        name: name of the task.
        task: the task.
        labels: names of the head's outputs in their order.
        collate: collates tokenized rows to a batch.
        parts: `learn`, from which coefficients are learned; `choose`, on which methods are compared; and `test`, the
            held-out rows, which are reported.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    collate: Callable[[list[dict[str, Any]]], Any]
    parts: Mapping[Part, Dataset]

    @property
    def loss_scale(self) -> float:
        """The loss is divided by this, the variance of the labels to learn from in a regression, and 1 otherwise."""
        if self.task.type != "regression":
            return 1.0
        return max(float(np.var(self.parts["learn"]["labels"])), 1e-12)

    def score(self, predictions: Array, labels: Array) -> float:
        """Return the task's metric."""
        return self.task.metrics(predictions, labels, self.labels)[self.task.metric]

    def signed(self, score: float) -> float:
        """Return a score of which more is better."""
        if self.task.metric == "perplexity":
            return -math.log(score)
        return -score if self.task.lower_is_better else score


def divide(prepared: Prepared, learn: int, choose: int, seed: int, name: str) -> TaskRows:
    """Divide the rows of a task: those to learn from and to choose on are drawn from the training rows set aside.

    Args:
        prepared: the rows; without rows that are set aside, all training rows are drawn from.
        learn: number of rows to learn from.
        choose: number of rows to choose on.
        seed: seed of the draw.
        name: name of the task in results.

    Raises:
        InputError: there are fewer rows.
    """
    pool = prepared.aside if prepared.aside is not None else prepared.train
    count = 0 if pool is None else len(pool)
    if pool is None or learn + choose > count or not len(prepared.validation):
        raise InputError(
            f"{name}: expected at least {learn + choose} rows that the models were not trained on, {learn} to learn "
            f"from and {choose} to choose on, besides the held-out rows; got {count}: pass fewer (learn_rows=, "
            "choose_rows=), or set more aside (set_aside=)"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    parts: dict[Part, Dataset] = {
        "learn": pool.select(order[:learn]),
        "choose": pool.select(order[learn : learn + choose]),
        "test": prepared.validation,
    }
    return TaskRows(name, prepared.task, prepared.labels, prepared.collate, parts)


@dataclass(frozen=True)
class Candidate:
    """A model in the span, or computed from the differences in another way.

    Attributes:
        name: name in tables.
        method: registered name of the method.
        coefficients: [B, M]; None if the weights are not a linear combination.
        update: name of a block and differences [M, D_b] -> change of theta_0 [D_b], instead of coefficients.
        learned: number of numbers that were learned, by which simplicity is judged.
        passes: forward passes over one row that were spent on learning; a backward pass counts as two.
    """

    name: str
    method: str
    coefficients: Tensor | None = None
    update: Callable[[str, Tensor], Tensor] | None = None
    learned: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a candidate on the rows of a part.

    Attributes:
        scores: the metric of each task.
        mean: mean over the tasks, of which more is better; see `Problem.mean`. -inf if a prediction is NaN or infinite.
        predictions: for each task, the predictions of all rows.
    """

    scores: tuple[float, ...]
    mean: float
    predictions: tuple[Array, ...]


class Problem:
    """Models to combine, with the rows of their tasks.

    Args:
        span: the models.
        tasks: one for each head.
        models: names of the models.
        orders: step of each model if they are checkpoints of one run, else None.
        store: folder for what must not be computed twice.
        seed: seed of random orders and draws.
        batch_size: rows per forward pass.
        autocast: whether to compute in bfloat16.
        units: closed when the models shall compute labels instead of encoded labels; see `Task.training_units`.
        say: function that gets a line about progress.

    Attributes:
        passes: forward passes over one row so far; a backward pass counts as two.
    """

    def __init__(
        self,
        span: Span,
        tasks: Sequence[TaskRows],
        models: Sequence[str],
        orders: Sequence[int | None],
        store: Path,
        *,
        seed: int = 0,
        batch_size: int = 32,
        autocast: bool = False,
        units: ExitStack | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.span, self.tasks, self.models, self.orders = span, tasks, models, orders
        self.seed, self.batch_size, self.passes, self._store, self.say = seed, batch_size, 0, store, say
        self._device, self._autocast = next(span.heads.parameters()).device, autocast
        self._batches: dict[tuple[int, Part], list[Any]] = {}
        self.own_bodies, self.units = len(tasks) > 1, units or ExitStack()

    # -- the models --------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(B, M), the numbers of blocks in which the models differ and of models."""
        return self.span.shape

    @property
    def is_run(self) -> bool:
        """Whether the models are checkpoints of one run, in their order."""
        return len(self.models) > 1 and None not in self.orders

    def uniform(self, total: float = 1.0) -> Tensor:
        """Return equal coefficients with a sum, [B, M]."""
        return torch.full(self.shape, total / self.shape[1])

    @contextmanager
    def at(self, candidate: Candidate) -> Iterator[nn.Module]:
        """Return a context with the model at the weights of a candidate."""
        if candidate.update is not None:
            with self.span.written(candidate.update) as heads:
                yield heads
            return
        assert candidate.coefficients is not None
        self.span.set(candidate.coefficients)
        yield self.span.subspace

    # -- rows --------------------------------------------------------------------------------------------------------

    def batches(self, index: int, part: Part) -> list[Any]:
        """Return the batches of a task's rows, those of similar length together."""
        if (index, part) not in self._batches:
            rows = self.tasks[index].parts[part]
            order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
            self._batches[index, part] = [
                self._collated(index, [rows[row] for row in order[start : start + self.batch_size]])
                for start in range(0, len(order), self.batch_size)
            ]
        return self._batches[index, part]

    def shuffled(self, generator: torch.Generator, batch_size: int) -> Iterator[list[tuple[int, Any]]]:
        """Yield the batches of one pass over the rows to learn from: for each step one batch of every task."""
        orders = [torch.randperm(len(task.parts["learn"]), generator=generator).tolist() for task in self.tasks]
        for start in range(0, max(map(len, orders)), batch_size):
            step = []
            for index, order in enumerate(orders):
                chosen = order[start : start + batch_size]
                if chosen:
                    rows = self.tasks[index].parts["learn"]
                    step.append((index, self._collated(index, [rows[row] for row in chosen])))
            yield step

    def _collated(self, index: int, rows: list[dict[str, Any]]) -> Any:
        return self.tasks[index].collate(rows).to(self._device)

    # -- scores ------------------------------------------------------------------------------------------------------

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which models are called: bfloat16 autocast, or none."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Return a context without autocast, for differences of logits."""
        before, self._autocast = self._autocast, False
        try:
            yield
        finally:
            self._autocast = before

    @torch.no_grad()
    def logits(self, model: nn.Module, index: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits in float32 and labels of the batches of a task's rows."""
        for batch in self.batches(index, part):
            self.passes += len(batch["labels"])
            with self.precision():
                logits = model(task=index, **self.inputs(index, batch)).logits
            yield logits.float(), batch["labels"]

    def inputs(self, index: int, batch: Any) -> dict[str, Any]:
        """Return the inputs of the model; an encoder-decoder makes those of its decoder from the labels."""
        needs_labels = self.tasks[index].task.encoder_decoder
        return {name: value for name, value in batch.items() if needs_labels or name != "labels"}

    def predictions(self, model: nn.Module, part: Part) -> tuple[Array, ...]:
        """Return the predictions of the model for the rows of every task."""
        model.eval()
        answers = []
        for index, rows in enumerate(self.tasks):
            kept = [
                rows.task.predictions(logits, labels).cpu().numpy()
                for logits, labels in self.logits(model, index, part)
            ]
            answers.append(joined(kept, 0))
        return tuple(answers)

    def labels(self, index: int, part: Part) -> Array:
        """Return the encoded labels of a task's rows, in the order of the predictions."""
        return joined([batch["labels"].cpu().numpy() for batch in self.batches(index, part)], IGNORED)

    def evaluation(self, predictions: tuple[Array, ...], part: Part) -> Evaluation:
        """Return the scores of predictions; the mean is -inf if a score is NaN or infinite."""
        scores = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of constant predictions, which a bad candidate may have
            for index, (rows, answer) in enumerate(zip(self.tasks, predictions, strict=True)):
                try:
                    scores.append(rows.score(answer, self.labels(index, part)))
                except TinyspanError:  # a prediction is NaN or infinite
                    scores.append(math.nan)
        return Evaluation(tuple(scores), self.mean(scores), predictions)

    def mean(self, scores: Iterable[float]) -> float:
        """Return the mean of the scores of the tasks, of which more is better.

        Of a metric that is better if lower, the negative counts, and of a perplexity its negative logarithm.
        """
        total = sum(rows.signed(one) for rows, one in zip(self.tasks, scores, strict=True)) / len(self.tasks)
        return total if math.isfinite(total) else -math.inf

    def evaluate(self, candidate: Candidate, part: Part) -> Evaluation:
        """Return the scores of a candidate; they are computed once and kept in the store."""
        path = self._path(f"{candidate.name} {part}", ".npz")
        if not path.is_file():
            before = self.passes
            with self.at(candidate) as model:
                predictions = self.predictions(model, part)
            self.passes = before  # only what is spent on learning counts
            evaluation = self.evaluation(predictions, part)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, *predictions)
            scores = ", ".join(f"{score:.3f}" for score in evaluation.scores)
            self.say(f"{candidate.name}, {part}: {scores}")
            return evaluation
        with np.load(path) as stored:
            return self.evaluation(tuple(stored[name] for name in stored.files), part)

    def stored_array(self, name: str, compute: Callable[[], Array]) -> Array:
        """Return an array that is computed once and kept in the store."""
        path = self._path(name, ".npy")
        if not path.is_file():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, compute())
        array: Array = np.load(path)
        return array

    def stored(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a result in JSON types, computed once and kept in the store."""
        path = self._path(name, ".json")
        if not path.is_file():
            write_json(path, compute())
        result: dict[str, Any] = read_json(path)
        return result

    def _path(self, name: str, ending: str) -> Path:
        """Return the file of something with a name, which may have characters that no file name has."""
        return self._store / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}{ending}"

    # -- losses ------------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, index: int, batch: Any) -> Tensor:
        """Return the loss of a batch of a task, divided by its scale."""
        rows = self.tasks[index]
        self.passes += (1 + BACKWARD * torch.is_grad_enabled()) * len(batch["labels"])
        with self.precision():
            return rows.task.loss_of(_OfTask(model, index), batch, rows.labels) / rows.loss_scale


class _OfTask(nn.Module):
    """The model with the head of one task, as `Task.loss_of` calls it."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self._call = partial(model, task=index)

    def forward(self, **batch: Any) -> Any:
        """Return the outputs of the model."""
        return self._call(**batch)

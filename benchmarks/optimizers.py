"""Which optimizer for z? L-BFGS and Gauss-Newton beside AdamW, and forward passes alone beside MeZO, at equal cost.

    python benchmarks/optimizers.py --run --data DIR --output runs/optimizers --json docs/results/optimizers.json
    python benchmarks/optimizers.py --render --json docs/results/optimizers.json

Full fine-tuning of `--train-rows` rows is recorded once per task and seed, and the first `--rank` singular directions
of each layer's path are the basis. Every method starts from theta_0 in the layers, below the head and the embeddings
of the recorded run, which stay as they are: only z is trained, or only the layers' weights (MeZO), or a LoRA on them,
on the first `--z-rows` of these rows. So the basis and the head come from the task's own run, and the scores compare
optimizers; they show no transfer.

Cost is the number of forward passes over one row; a backward pass counts as two. All methods may spend as much as
`--passes` epochs of AdamW, 3 `--passes` `--z-rows`, and stop before they would spend more.

* AdamW: as `tinyspan tune` trains, with dropout and a rate that falls to 0 linearly. The control in random directions
  has the same numbers in z.
* L-BFGS: `torch.optim.LBFGS` with the strong Wolfe line search, all rows in every evaluation. The point with the lowest
  loss that it evaluated is taken.
* Gauss-Newton: steps of Levenberg and Marquardt with the exact Jacobian of all rows (one backward pass per row and
  independent output: of logits under softmax, the differences to the first).
* Both stopped early: of the points that they go through, the one with the lowest loss on the rows by which rates are
  chosen is taken. AdamW sees these rows in the choice of its rate alone.
* Gauss-Newton, differences: the same without backward passes; central differences in every number of z, on as many
  rows as two steps can take, new ones in each step.
* CMA-ES: the loss of `--batch-size` rows, new ones in each generation; the mean of the last distribution is taken.
* SPSA: (L(z + e u) - L(z - e u)) / 2 e times u, of `--batch-size` rows; a constant rate.
* MeZO (Malladi et al. 2023): the same on all weights of the layers, with u drawn again from its seed, not stored; and
  on a LoRA of the queries and values.

All but AdamW compute without dropout. Learning rates (for CMA-ES the first standard deviation) are chosen by the loss
on `--choice-rows` training rows that no run trains on, of seed 0: three a factor of 3 apart, and if the best one is at
the end of the range the next one too, at most twice. Classification tasks take the rates that were chosen on SST-2.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, product
from pathlib import Path
from typing import Any

import cmaes
import study
import torch
from methods import DEVICE
from peft import LoraConfig, inject_adapter_in_model
from study import Run, rows_of, told_rate
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import TrainerCallback

from tinyspan import Basis, SubspaceModel, Trajectory, by_layer, random_basis, svd_basis
from tinyspan.errors import TinyspanError
from tinyspan.io.folders import RESULT
from tinyspan.lab.summary import Summary, markdown, summarize
from tinyspan.model.batches import logits_of, split_batch
from tinyspan.model.jacobian import Method, jacobian
from tinyspan.workflows.combine.problem import BACKWARD
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.models import base_model
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import method_of, record
from tinyspan.workflows.training import fine_tune

FULL, START = "full fine-tuning, recorded", "z = 0"
ADAMW, RANDOM, LBFGS, NEWTON = "AdamW", "AdamW, random directions", "L-BFGS", "Gauss-Newton"
EARLY = ", stopped early"
DIFFERENCES, EVOLUTION, SPSA = "Gauss-Newton, differences", "CMA-ES", "SPSA"
MEZO, MEZO_LORA = "MeZO, weights of the layers", "MeZO, LoRA r = 8"
CENTRES = {  # method -> the middle one of its first three learning rates
    ADAMW: 0.1,
    RANDOM: 0.3,
    EVOLUTION: 0.3,
    SPSA: 0.1,
    MEZO: 1e-4,
    MEZO_LORA: 1e-3,
}
SECOND_ORDER = (LBFGS, NEWTON, LBFGS + EARLY, NEWTON + EARLY)
FORWARD_ONLY = (EVOLUTION, SPSA, DIFFERENCES, MEZO, MEZO_LORA)
METHODS = (FULL, START, ADAMW, *SECOND_ORDER, RANDOM, *FORWARD_ONLY)
CHOICE = {"stsb": "stsb"}  # task -> the one on which its rates are chosen
CHOICE_TASK = "sst2"  # the task on which the rates of all other tasks are chosen
FULL_RATE = 1e-4  # the suite's
EPSILON = {SPSA: 1e-2, MEZO: 1e-3, MEZO_LORA: 1e-3}  # of MeZO the paper's; z has the larger one, as it has few numbers
STEPS_BY_DIFFERENCES = 2
DAMPING = 1e-2  # first lambda, as a multiple of the mean diagonal of the matrix
Batch = Mapping[str, Any]
Results = study.Results[Run]


@dataclass(frozen=True)
class Plan(study.Plan):
    """What all runs have in common."""

    train_rows: int = 512
    choice_rows: int = 128
    validation_rows: int = 300
    points: int = 16
    rank: int = 4
    autocast: bool = False
    epochs: int = 3
    z_rows: int = 64
    passes: int = 8

    @property
    def limit(self) -> int:
        """Forward passes over one row that a method may spend."""
        return (1 + BACKWARD) * self.passes * self.z_rows


class Spent(Exception):
    """A method would spend more passes than it may."""


class Passes:
    """Forward passes over one row so far; a backward pass counts as two.

    Args:
        limit: the most that may be spent.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.spent = limit, 0

    def spend(self, passes: int) -> None:
        """Count passes before they are made.

        Raises:
            Spent: there would be more than the limit.
        """
        if self.spent + passes > self.limit:
            raise Spent
        self.spent += passes


# -- rows and losses --------------------------------------------------------------------------------------------------


class Rows:
    """The rows on which a method trains, as batches on the device.

    Args:
        prepared: the task; its training rows are taken.
        batch_size: rows per batch.
        seed: seed of the order of batches.
    """

    def __init__(self, prepared: Prepared, batch_size: int, seed: int) -> None:
        self.prepared, self.batch_size, self.seed = prepared, batch_size, seed
        self.rows = prepared.train or []
        self.all = self.sorted(range(len(self.rows)))

    def sorted(self, numbers: Sequence[int]) -> list[Batch]:
        """Return the batches of some rows, those of similar length together."""
        order = sorted(numbers, key=lambda number: len(self.rows[number]["input_ids"]))
        return [self._batch(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)]

    def draws(self, size: int) -> Iterator[list[int]]:
        """Yield the numbers of so many rows at a time, in one random order after the other, without end."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.rows), generator=generator).tolist()
            yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))

    def small(self) -> Iterator[Batch]:
        """Yield one batch after the other, in random order, without end."""
        return map(self._batch, self.draws(min(self.batch_size, len(self.rows))))

    def _batch(self, numbers: Sequence[int]) -> Batch:
        batch: Batch = {**self.prepared.collate([self.rows[number] for number in numbers]).to(DEVICE)}
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        return self.prepared.task.loss_of(model, batch, self.prepared.labels)

    def row_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one row as a function of `independent` outputs."""
        if self.prepared.task.type == "classification":
            values = torch.cat([values.new_zeros(1), values])
        return self.prepared.task.row_loss(values, target, self.prepared.labels)

    def independent(self, result: Any) -> Tensor:
        """Return the outputs on which the loss depends, [rows, outputs]: of classes, differences to the first logit."""
        logits = logits_of(result)
        return logits[:, 1:] - logits[:, :1] if self.prepared.task.type == "classification" else logits.flatten(1)


def size_of(batches: Sequence[Batch]) -> int:
    return sum(len(batch["labels"]) for batch in batches)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows) -> float:
    return sum(float(rows.loss(model, batch)) * size_of([batch]) for batch in rows.all) / size_of(rows.all)


@torch.no_grad()
def held_out_score(model: nn.Module, rows: Rows) -> float:
    """Return the task's metric on rows."""
    task = rows.prepared.task
    predictions = [task.predictions(model(**split_batch(batch)[0]).logits, batch["labels"]) for batch in rows.all]
    labels = torch.cat([batch["labels"] for batch in rows.all])
    scores = task.metrics(torch.cat(predictions).cpu().numpy(), labels.cpu().numpy(), rows.prepared.labels)
    return float(scores[task.metric])


# -- optimizers -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def move(subspace: SubspaceModel, z: Tensor) -> None:
    vector_to_parameters(z.to(subspace.z[0]), list(subspace.z))


def position(subspace: SubspaceModel) -> Tensor:
    return parameters_to_vector(subspace.z).detach().clone()


class Visited:
    """Keeps the z at which it was called last, or that with the lowest loss on other rows.

    Args:
        subspace: the model.
        others: these rows.
    """

    def __init__(self, subspace: SubspaceModel, others: Rows | None) -> None:
        self.subspace, self.others, self.lowest = subspace, others, math.inf
        self()

    def __call__(self) -> None:
        """Visit the present z."""
        loss = -math.inf if self.others is None else mean_loss(self.subspace, self.others)
        if loss < self.lowest or self.others is None:
            self.lowest, self.z = loss, position(self.subspace)


def lbfgs(subspace: SubspaceModel, rows: Rows, passes: Passes, visited: Visited) -> None:
    """Minimise the mean loss on all rows."""
    z = [*subspace.z]
    optimizer = torch.optim.LBFGS(z, max_iter=passes.limit, max_eval=passes.limit, line_search_fn="strong_wolfe")
    total, lowest = size_of(rows.all), math.inf

    def closure() -> Tensor:
        nonlocal lowest
        passes.spend((1 + BACKWARD) * total)
        optimizer.zero_grad()
        value = torch.zeros(())
        for batch in rows.all:
            share = rows.loss(subspace, batch) * size_of([batch]) / total
            share.backward()
            value += share.detach().cpu()
        if value < lowest:
            lowest = float(value)
            visited()
        return value

    with suppress(Spent):
        optimizer.step(closure)  # type: ignore[no-untyped-call]


def levenberg_marquardt(
    subspace: SubspaceModel,
    rows: Rows,
    passes: Passes,
    visited: Visited,
    draws: Iterator[list[Batch]],
    method: Method,
) -> None:
    """Take a step on each of several lists of batches: (G + lambda m I) d = -gradient, m the mean diagonal of G.

    lambda is divided by 10 after a step that lowers the loss, and multiplied by 10 after one that does not.
    """
    z, damping, size, taken = position(subspace), DAMPING, sum(own.numel() for own in subspace.z), None
    with suppress(Spent):
        for batches in draws:
            if taken is not batches:  # otherwise the outputs at z are those of the step that was taken
                value, outputs = evaluated(subspace, rows, batches, z, passes)
            outputs_per_row = outputs[0].shape[1]
            passes.spend(size_of(batches) * (2 * size if method == "central" else 1 + BACKWARD * outputs_per_row))
            matrix, gradient = quadratic(subspace, rows, batches, outputs, method)
            while True:
                scale = damping * max(float(matrix.diagonal().mean()), 1e-12)
                step = torch.linalg.solve(matrix + scale * torch.eye(size, dtype=matrix.dtype), -gradient)
                trial, trial_outputs = evaluated(subspace, rows, batches, z + step.to(z), passes)
                if trial < value:
                    break
                damping *= 10
            z, damping, value, outputs, taken = z + step.to(z), damping / 10, trial, trial_outputs, batches
            visited()


@torch.no_grad()
def evaluated(
    subspace: SubspaceModel, rows: Rows, batches: Sequence[Batch], z: Tensor, passes: Passes
) -> tuple[float, list[Tensor]]:
    """Return the mean loss at z, and the outputs [rows, outputs] of each batch."""
    passes.spend(size_of(batches))
    move(subspace, z)
    outputs = [rows.independent(subspace(**split_batch(batch)[0])) for batch in batches]
    losses = [torch.func.vmap(rows.row_loss)(out, batch["labels"]) for out, batch in zip(outputs, batches, strict=True)]
    return float(torch.cat(losses).mean()), outputs


def quadratic(
    subspace: SubspaceModel, rows: Rows, batches: Sequence[Batch], outputs: Sequence[Tensor], method: Method
) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Newton matrix [K, K] and the gradient [K] of the mean loss, in float64, at the z of the outputs.

    It must be the present z of the model.
    """
    size, total = sum(own.numel() for own in subspace.z), size_of(batches)
    matrix, gradient = torch.zeros(size, size).double(), torch.zeros(size).double()
    for batch, values in zip(batches, outputs, strict=True):
        inputs, labels = split_batch(batch)
        columns = jacobian(subspace, inputs, method=method, outputs=rows.independent)  # [rows, outputs, K]
        slopes = torch.func.vmap(torch.func.grad(rows.row_loss))(values, labels)
        curvature = torch.func.vmap(torch.func.hessian(rows.row_loss))(values, labels)
        gradient += torch.einsum("no,nok->k", slopes, columns).double().cpu() / total
        matrix += torch.einsum("noi,nop,npj->ij", columns, curvature, columns).double().cpu() / total
    return matrix, gradient


def newton(subspace: SubspaceModel, rows: Rows, passes: Passes, visited: Visited) -> None:
    """Take steps with the exact Jacobian of all rows."""
    levenberg_marquardt(subspace, rows, passes, visited, (rows.all for _ in count()), "reverse")


def by_differences(subspace: SubspaceModel, rows: Rows, passes: Passes, visited: Visited) -> None:
    """Take steps with a Jacobian by central differences, each on rows of its own."""
    numbers = sum(own.numel() for own in subspace.z)
    size = passes.limit // (STEPS_BY_DIFFERENCES * (2 * numbers + 3))  # outputs at z, Jacobian, and two trials
    draws = (rows.sorted(numbers) for numbers in rows.draws(min(max(size, 1), len(rows.rows))))
    levenberg_marquardt(subspace, rows, passes, visited, draws, "central")


@torch.no_grad()
def evolution(subspace: SubspaceModel, rows: Rows, passes: Passes, spread: float) -> None:
    """Search by CMA-ES; the candidates of a generation are compared on the same rows."""
    start = position(subspace).double().cpu().numpy()
    search = cmaes.CMA(mean=start, sigma=spread, seed=rows.seed)
    with suppress(Spent):
        for batch in rows.small():
            passes.spend(search.population_size * size_of([batch]))
            told = []
            for _ in range(search.population_size):
                asked = search.ask()
                move(subspace, torch.tensor(asked))
                told.append((asked, float(rows.loss(subspace, batch))))
            search.tell(told)
    move(subspace, torch.tensor(search.mean))


@torch.no_grad()
def spsa(
    model: nn.Module, parameters: Sequence[Tensor], rows: Rows, passes: Passes, rate: float, epsilon: float
) -> None:
    """Descend along random directions u, by the slope that two forward passes give; MeZO's algorithm 1.

    u is not stored: a seed per step draws it again, three times to perturb the parameters and once to move them.
    """
    seeds = torch.Generator().manual_seed(rows.seed)

    def shift(seed: int, factor: float) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for parameter in parameters:
            u = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            parameter.add_(u, alpha=factor)

    with suppress(Spent):
        for batch in rows.small():
            passes.spend(2 * size_of([batch]))
            seed = int(torch.randint(2**31, (), generator=seeds))
            shift(seed, epsilon)
            above = float(rows.loss(model, batch))
            shift(seed, -2 * epsilon)
            below = float(rows.loss(model, batch))
            shift(seed, epsilon)
            shift(seed, -rate * (above - below) / (2 * epsilon))


# -- runs -------------------------------------------------------------------------------------------------------------


class Optimizers(study.Study[Run]):
    """The runs of all methods."""

    def cells(self) -> list[Run]:
        """Return all runs that are known so far, the first to make first."""
        return schedule(self.arguments, self.finished())

    def path_folder(self, run: Run) -> None:
        """Return None: the recorded run lies where `record` writes it."""

    def recorded(self, task: str, seed: int) -> Path:
        """Return the folder of a recorded run, which is trained if it is not there."""
        folder = self.folder / "recorded" / f"{task}-{seed}"
        if (folder / RESULT).is_file():
            return folder
        rows, _ = rows_of(self.plan, task, self.arguments.data)
        settings = self.plan.settings(seed, epochs=self.plan.epochs, learning_rate=FULL_RATE)
        every = settings.steps(len(rows.train or ())) // self.plan.points
        record(rows, settings, folder, every=max(every, 1), dtype=torch.bfloat16, score_every_epoch=False)
        return folder

    def fine_tuned(self, run: Run, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
        """Train by one method, and return its scores, its passes and its seconds.

        Raises:
            TinyspanError: the weights, the loss or a prediction are NaN or infinite.
        """
        rows, choice = rows_of(self.plan, run.task, self.arguments.data)
        assert rows.train is not None
        few = replace(rows, train=rows.train.select(range(self.plan.z_rows)))
        folder = self.recorded(run.task, run.seed)
        model: Any = base_model(str(folder / "model"), rows.task, run.seed, need_head=True).to(DEVICE)
        to_choose = replace(choice, train=choice.validation)
        passes, seconds, trained = Passes(self.plan.limit), 0.0, 0
        if run.method != FULL:
            Trajectory(folder).load_into(model, None)
            module = self.module(run, model, folder)
            began = time.perf_counter()
            trained = self.optimize(run, module, few, to_choose, passes)
            seconds = time.perf_counter() - began
            model = module
        model.eval()
        result = {
            name: mean_loss(model, Rows(part, self.plan.batch_size, 0))
            for name, part in (("loss", few), ("choice loss", to_choose))
        }
        if not all(math.isfinite(loss) for loss in result.values()):
            raise TinyspanError(f"the loss is {result['loss']}")
        score = held_out_score(model, Rows(replace(rows, train=rows.validation), self.plan.batch_size, 0))
        told = {"score": score, **result, "choice": math.exp(-result["choice loss"])}
        return {**told, "passes": passes.spent, "trained": trained, "seconds": seconds}

    def module(self, run: Run, model: Any, folder: Path) -> nn.Module:
        """Return the model as a method trains it."""
        if run.method == MEZO:
            return model.requires_grad_(False)  # type: ignore[no-any-return]
        if run.method == MEZO_LORA:
            with seeded(run.seed):
                config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
                return inject_adapter_in_model(config, model)
        basis = own_basis(folder, self.plan.rank)
        if run.method == RANDOM:
            basis = random_basis(basis.partition, self.plan.rank, seed=run.seed)
        return SubspaceModel(model, basis)

    def optimize(self, run: Run, module: Any, few: Prepared, to_choose: Prepared, passes: Passes) -> int:
        """Train, and return how many numbers."""
        if run.method == START:
            return 0
        rows = Rows(few, self.plan.batch_size, run.seed)
        if run.method in (ADAMW, RANDOM):
            settings = self.plan.settings(run.seed, epochs=self.plan.passes, z_learning_rate=run.rate)
            rows_to_train = replace(to_choose, train=few.train)  # which are scored on the rows to choose by
            fine_tune(module, rows_to_train, settings, method_of(module.basis), score_every_epoch=False)
            passes.spend((1 + BACKWARD) * self.plan.passes * len(rows.rows))
        module.eval()
        if (minimize := MINIMIZERS.get(run.method.removesuffix(EARLY))) is not None:
            others = Rows(to_choose, self.plan.batch_size, 0) if run.method.endswith(EARLY) else None
            visited = Visited(module, others)
            minimize(module, rows, passes, visited)
            move(module, visited.z)
        elif run.method == EVOLUTION:
            evolution(module, rows, passes, run.rate)
        elif run.method in EPSILON:
            parameters = perturbed(run.method, module)
            spsa(module, parameters, rows, passes, run.rate, EPSILON[run.method])
            return sum(parameter.numel() for parameter in parameters)
        return sum(own.numel() for own in module.z)

    def tell(self, content: dict[str, Any], results: Results) -> None:
        """Tell of the tasks that were asked for, and of what was chosen."""
        tasks, seeds = self.arguments.tasks, self.arguments.seeds
        content["plan"] |= {"tasks": tasks, "limit": self.plan.limit}
        content["runs"] = [run for run in content["runs"] if run["task"] in tasks and run["seed"] < seeds]
        content["learning rates"] = {
            task: {
                method: told_rate(rate, choice_scores(method, task, results))
                for method, rate in chosen(task, results).items()
            }
            for task in {choice_task(task): None for task in tasks}
        }
        content["claims"] = claims(content)


MINIMIZERS: dict[str, Callable[[SubspaceModel, Rows, Passes, Visited], None]] = {
    LBFGS: lbfgs,
    NEWTON: newton,
    DIFFERENCES: by_differences,
}


@lru_cache(maxsize=3)
def own_basis(folder: Path, rank: int) -> Basis:
    """Return the first directions of every layer of a recorded run."""
    return svd_basis(Trajectory(folder), rank)


def perturbed(method: str, module: nn.Module) -> list[Tensor]:
    """Return what a method of random directions perturbs: z, the weights of the layers, or the LoRA."""
    if isinstance(module, SubspaceModel):
        return [*module.z]
    if method == MEZO_LORA:
        return [parameter for name, parameter in module.named_parameters() if ".lora_" in name]
    names = {spec.name for spec in by_layer(module).parameters()}
    return [parameter for name, parameter in module.named_parameters() if name in names]


# -- which runs, and in which order -----------------------------------------------------------------------------------


def choice_task(task: str) -> str:
    return CHOICE.get(task, CHOICE_TASK)


def choice_scores(method: str, task: str, results: Results) -> dict[float, float | None]:
    """Return the rates of a method that are to be tried so far, with exp(-loss) on the rows to choose by."""
    return study.choice_scores(CENTRES[method], lambda rate: [Run(method, rate, choice_task(task), 0)], results)


def chosen(task: str, results: Results) -> dict[str, float]:
    """Return the rate of every method whose search for a task is finished."""
    return study.chosen(CENTRES, lambda method: choice_scores(method, task, results))


def rate_of(method: str, rates: Mapping[str, float]) -> float | None:
    """Return the rate of a method, 0 if it has none, None if it is not known yet."""
    return rates.get(method) if method in CENTRES else FULL_RATE if method == FULL else 0.0


def schedule(asked: argparse.Namespace, results: Results) -> list[Run]:
    """Return all runs that are known so far: task by task, method by method, first those by which a rate is chosen."""
    runs = []
    for task, method in product(asked.tasks, METHODS):
        if method in CENTRES:
            scores = choice_scores(method, task, results)
            runs += [Run(method, rate, choice_task(task), 0) for rate in scores]
        if (rate := rate_of(method, chosen(task, results))) is not None:
            runs += [Run(method, rate, task, seed) for seed in range(asked.seeds)]
    return list(dict.fromkeys(runs))


# -- what they say ----------------------------------------------------------------------------------------------------


def values(content: Mapping[str, Any], method: str, task: str = "", key: str = "score") -> list[float | None]:
    """Return what a method's run of every seed has, on one task or the mean over all; None where one is missing."""
    plan = content["plan"]
    rows = []
    for name in [task] if task else plan["tasks"]:
        rates = content["learning rates"].get(choice_task(name), {})
        rate = rate_of(method, {one: told["chosen"] for one, told in rates.items()})
        runs = [run for run in content["runs"] if (run["method"], run["rate"], run["task"]) == (method, rate, name)]
        by_seed = {run["seed"]: run.get(key) for run in runs}
        rows.append([by_seed.get(seed) for seed in range(plan["seeds"])])
    return [None if None in seeds else sum(seeds) / len(seeds) for seeds in zip(*rows, strict=True)]


def scores(content: Mapping[str, Any], method: str, task: str = "") -> Summary:
    """Return a method's score in points, on one task or the mean over all."""
    return summarize([None if value is None else 100 * value for value in values(content, method, task)])


def difference(content: Mapping[str, Any], one: str, other: str, task: str = "") -> Summary:
    """Return by how many points a method is above another, paired by seed, on one task or the mean over all."""
    pairs = zip(values(content, one, task), values(content, other, task), strict=True)
    return summarize([None if a is None or b is None else 100 * (a - b) for a, b in pairs])


def claims(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what holds on each task: one method is above another if the interval is above 0."""
    pairs = [*((method, ADAMW) for method in SECOND_ORDER), (ADAMW, RANDOM)]
    pairs += [(ours, theirs) for ours in (DIFFERENCES, EVOLUTION, SPSA) for theirs in (MEZO, MEZO_LORA)]
    pairs += [(ADAMW, method) for method in FORWARD_ONLY]
    claimed = []
    for task, (one, other) in product(content["plan"]["tasks"], pairs):
        gained = difference(content, one, other, task)
        if gained.mean is not None:
            holds = gained.half is not None and gained.mean - gained.half > 0
            entry = {"name": f"{task}: points that {one} is above {other}, surely more than", "value": gained.mean}
            claimed.append({**entry, "target": 0, "holds": holds, "interval": gained.half})
    return claimed


def tables(content: Mapping[str, Any]) -> str:
    """Return a Markdown table of all methods: scores, losses on the rows trained on, and seconds."""
    tasks = content["plan"]["tasks"]
    lines = []
    for method in METHODS:
        if all(value is None for task in tasks for value in values(content, method, task)):
            continue
        runs = [run for run in content["runs"] if run["method"] == method and "passes" in run]
        losses = [summarize(values(content, method, task, "loss")).shown("{:.3f}") for task in tasks]
        row = [method, *(str(scores(content, method, task)) for task in tasks), str(scores(content, method))]
        lines.append([*row, *losses, f"{max(run['passes'] for run in runs):,}", f"{runs[0]['trained']:,}"])
    names = [*tasks, "mean", *(f"loss, {task}" for task in tasks), "passes", "numbers"]
    return markdown(["method", *names], lines)


def main() -> None:
    parser = study.parser_of(__doc__, "optimizers", Plan)
    parser.add_argument("--tasks", default="sst2,stsb,mrpc", type=lambda text: text.split(","))
    arguments = parser.parse_args()
    study.quiet()
    plan = study.plan_of(arguments, Plan)
    if arguments.run:
        Optimizers(plan, arguments, Run).start()
    if arguments.render:
        study.render(arguments, tables)


if __name__ == "__main__":
    main()

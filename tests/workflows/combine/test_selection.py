"""The choice among candidates, on made-up predictions."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinyspan.workflows.combine.problem import Candidate, Evaluation, TaskRows
from tinyspan.workflows.combine.selection import _scores, difference, resample, simplest_of_best
from tinyspan.workflows.tasks import get_task

ROWS = 400


class Problem:
    """Two tasks with labels of their own, as far as `resample` looks."""

    def __init__(self, tasks: int = 1, task: str = "sst2") -> None:
        generator = np.random.default_rng(7)
        chosen = get_task(task)
        rows = TaskRows(task, chosen, chosen.labels, list, {})
        self.tasks = [rows] * tasks
        values = generator.normal(size=(tasks, ROWS)) if task == "stsb" else generator.integers(2, size=(tasks, ROWS))
        self._labels = values

    def labels(self, index: int, part: str) -> Any:
        return self._labels[index]

    def with_errors(self, *errors: int) -> Evaluation:
        """Return predictions with so many errors in each task, among its first rows."""
        logits = []
        for index, count in enumerate(errors):
            answers = self._labels[index].copy()
            answers[:count] = 1 - answers[:count]
            logits.append(np.eye(2)[answers])
        scores = tuple(1 - count / ROWS for count in errors)
        return Evaluation(scores, sum(scores) / len(scores), tuple(logits))


def chosen(problem: Any, *pairs: tuple[Candidate, Evaluation]) -> str:
    candidates, evaluations = [list(side) for side in zip(*pairs, strict=True)]
    samples = [resample(problem, one, "choose") for one in evaluations]
    return candidates[simplest_of_best(candidates, evaluations, samples)].name


AVERAGE = Candidate("average", "uniform-average")
LEARNED = Candidate("learned", "gradient", learned=24)
FEW = Candidate("few", "gradient", learned=4)
SINGLE = Candidate("single", "single")


def test_the_interval_is_that_of_paired_resamples() -> None:
    """The difference of paired accuracies is a mean of rows that are 0 or 1, so its interval is a binomial's."""
    problem: Any = Problem()
    one, other = problem.with_errors(10), problem.with_errors(50)
    gap = difference(resample(problem, one, "test"), resample(problem, other, "test"), one.mean - other.mean)
    assert gap.value == pytest.approx(0.1)
    deviation = (0.1 * 0.9 / ROWS) ** 0.5  # 40 of 400 rows differ, all in one direction
    assert gap.low == pytest.approx(0.1 - 1.96 * deviation, abs=0.004)
    assert gap.high == pytest.approx(0.1 + 1.96 * deviation, abs=0.004)


def test_unpaired_noise_does_not_widen_the_interval() -> None:
    problem: Any = Problem()
    one = problem.with_errors(120)
    gap = difference(resample(problem, one, "test"), resample(problem, one, "test"), 0.0)
    assert gap == (0.0, 0.0, 0.0)


def test_the_mean_over_tasks_is_resampled_within_each_task() -> None:
    problem: Any = Problem(tasks=2)
    samples = resample(problem, problem.with_errors(0, 100), "test")
    assert samples.mean() == pytest.approx(0.875, abs=0.002)
    assert samples.std() == pytest.approx(0.5 * (0.25 * 0.75 / ROWS) ** 0.5, rel=0.1)


def test_other_metrics_are_computed_on_each_resample() -> None:
    problem: Any = Problem(task="stsb")
    noise = np.random.default_rng(3).normal(size=ROWS)
    predictions = (problem.labels(0, "test") + noise)[:, None]
    samples = resample(problem, Evaluation((0.0,), 0.0, (predictions,)), "test")
    pearson = np.corrcoef(predictions[:, 0], problem.labels(0, "test"))[0, 1]
    assert samples.mean() == pytest.approx(pearson, abs=0.005)
    assert samples.std() == pytest.approx((1 - pearson**2) / ROWS**0.5, rel=0.15)  # of a normal distribution


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "matthews", "balanced_accuracy", "log_loss"])
def test_fast_forms_are_the_metrics_of_the_same_resamples(metric: str) -> None:
    task: Any = replace(get_task("sst2"), metric=metric)
    rows = TaskRows("sst2", task, task.labels, list, {})
    generator = np.random.default_rng(1)
    predictions, labels = generator.normal(size=(60, 2)), generator.integers(2, size=60)
    drawn = np.random.default_rng(0).integers(60, size=(1000, 60))
    expected = [rows.score(predictions[one], labels[one]) for one in drawn[:50]]
    np.testing.assert_allclose(_scores(rows, predictions, labels, 0)[:50], expected, rtol=1e-10)


@pytest.mark.parametrize(("count", "outputs"), [(60, 100), (6000, 2)])
def test_memory_grows_neither_with_all_rows_of_all_resamples_nor_with_all_confusions(count: int, outputs: int) -> None:
    names = tuple(f"label {index}" for index in range(outputs))
    task: Any = replace(get_task("sst2"), labels=names)
    rows = TaskRows("sst2", task, names, list, {})
    generator = np.random.default_rng(1)
    predictions, labels = generator.normal(size=(count, outputs)), generator.integers(outputs, size=count)
    tracemalloc.start()
    try:
        samples = _scores(rows, predictions, labels, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80e6  # 1,000 confusion matrices, or the rows of all resamples, are 80 MB and 48 MB, several times
    assert samples.shape == (1000,)
    assert samples.mean() == pytest.approx(rows.score(predictions, labels), abs=0.01)


def test_perplexities_are_those_of_the_same_resamples() -> None:
    task: Any = get_task("causal-lm")
    rows = TaskRows("texts", task, (), list, {})
    generator = np.random.default_rng(1)
    losses, labels = generator.random(size=(40, 7)), generator.integers(5, size=(40, 7))
    labels[::3, 4:] = -100
    drawn = np.random.default_rng(0).integers(40, size=(1000, 40))
    expected = [rows.score(losses[one], labels[one]) for one in drawn[:50]]
    np.testing.assert_allclose(_scores(rows, losses, labels, 0)[:50], expected, rtol=1e-10)
    problem = SimpleNamespace(tasks=[rows], labels=lambda index, part: labels)
    logs = resample(problem, Evaluation((0.0,), 0.0, (losses,)), "test")  # type: ignore[arg-type]
    np.testing.assert_allclose(logs[:50], -np.log(expected), rtol=1e-10)


def test_the_simplest_within_noise_is_chosen() -> None:
    problem: Any = Problem()
    pairs = [
        (LEARNED, problem.with_errors(40)),
        (FEW, problem.with_errors(42)),
        (AVERAGE, problem.with_errors(41)),
        (SINGLE, problem.with_errors(80)),
    ]
    assert chosen(problem, *pairs) == "average"
    assert chosen(problem, *reversed(pairs)) == "average"
    assert chosen(problem, pairs[0], pairs[1], pairs[3]) == "few"
    assert chosen(problem, *pairs, (Candidate("other", "single"), problem.with_errors(42))) == "other"


def test_a_clearly_better_one_is_chosen_although_it_is_complex() -> None:
    problem: Any = Problem()
    assert chosen(problem, (SINGLE, problem.with_errors(90)), (LEARNED, problem.with_errors(20))) == "learned"


def test_of_equally_simple_ones_the_better_is_chosen() -> None:
    problem: Any = Problem()
    worse, better = (Candidate(name, "task-arithmetic") for name in ("worse", "better"))
    assert chosen(problem, (worse, problem.with_errors(42)), (better, problem.with_errors(41))) == "better"

"""What every registered method yields, and the formulas of each, on miniature models."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyspan.workflows.combine.controls import CONTROLS, Control, _restored, run_control
from tinyspan.workflows.combine.methods import METHODS
from tinyspan.workflows.combine.methods.arithmetic import total_of
from tinyspan.workflows.combine.methods.average import exponential_weights
from tinyspan.workflows.combine.methods.base import along_scales
from tinyspan.workflows.combine.methods.gauss_newton import _quadratic
from tinyspan.workflows.combine.methods.gradient import learned_candidate
from tinyspan.workflows.combine.problem import Candidate, Problem, divide
from tinyspan.workflows.combine.span import NEW, Heads, Span, shared_blocks, stack_differences
from tinyspan.workflows.models import base_model
from tinyspan.workflows.rows import Prepared, prepare

Build = Callable[..., Problem]


@pytest.fixture
def build(model_folder: Path, data_folder: Path, glue_folder: Path, tmp_path: Path) -> Build:
    """Return a problem of three models with their own random differences: `build("sst2")`, `build("sst2", "mrpc")`."""

    def make(*names: str, run: bool = False, store: str = "store", seed: int = 0) -> Problem:
        prepared = [prepare(str(model_folder), name, data=glue_folder / name) for name in names]
        models: list[Any] = [base_model(str(model_folder), rows.task, 0) for rows in prepared]
        every = {name: value.detach().clone() for name, value in models[0].named_parameters()}
        shared = {name for name in every if len(names) == 1 or name.startswith("bert.e")}
        generator = torch.Generator().manual_seed(seed)
        states = [
            {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in every.items()}
            for _ in range(max(3, len(names)) if len(names) == 1 else len(names))
        ]
        folder = tmp_path / f"{store}-span"
        folder.mkdir(exist_ok=True)
        (tmp_path / store).mkdir(exist_ok=True)
        blocks = shared_blocks(models[0], shared)
        stack_differences(blocks, {name: every[name] for name in shared}, iter(states), len(states), folder)
        span = Span(Heads([model.eval() for model in models], shared), blocks, folder)
        tasks = [divide(rows, 16, 24, 0, rows.task.name) for rows in prepared]
        orders = list(range(len(states))) if run else [None] * len(states)
        return Problem(span, tasks, [f"m{index}" for index in range(len(states))], orders, tmp_path / store, seed=seed)

    return make


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS[request.param]


@pytest.mark.parametrize(("names", "run"), [(("sst2",), False), (("sst2",), True), (("sst2", "mrpc"), False)])
def test_candidates_are_complete_and_do_not_see_the_held_out_rows(
    method: Any, names: tuple[str, ...], run: bool, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyspan.workflows.combine.learning.STEPS", 3)
    monkeypatch.setattr("tinyspan.workflows.combine.learning.EPOCHS", 1)
    monkeypatch.setattr("tinyspan.workflows.combine.methods.evolution.CANDIDATES", 8)
    monkeypatch.setattr("tinyspan.workflows.combine.methods.gauss_newton.TRIALS", 5)
    problem = build(*names, run=run)
    if not method.applies(problem):
        pytest.skip(f"{method.name} does not apply")
    seen = []
    batches = Problem.batches
    monkeypatch.setattr(
        Problem, "batches", lambda self, index, part: (seen.append(part), batches(self, index, part))[1]
    )
    candidates = list(method.build(problem))
    assert "test" not in seen
    assert candidates
    assert len({candidate.name for candidate in candidates}) == len(candidates)
    for candidate in candidates:
        assert candidate.method == method.name
        assert (candidate.coefficients is None) != (candidate.update is None)
        if candidate.coefficients is not None:
            assert candidate.coefficients.shape == problem.shape
            assert candidate.coefficients.isfinite().all()
        assert (candidate.learned > 0) == (candidate.passes > 0)
    first = problem.evaluate(candidates[0], "test")
    again = build(*names, run=run, store="other")  # the same problem, computed anew
    repeated = next(iter(method.build(again)))
    np.testing.assert_array_equal(again.evaluate(repeated, "test").predictions[0], first.predictions[0])


@pytest.mark.parametrize("noticed", [True, False])
def test_coefficients_that_diverge_are_left_out(noticed: bool, build: Build) -> None:
    problem, said = build("sst2"), []
    problem.say = said.append  # type: ignore[method-assign]

    def learn(start: Tensor) -> Tensor:
        if noticed:
            problem.span.set(start * math.nan)
        return start * math.nan

    for _ in range(2):  # the second time from the store
        assert list(learned_candidate(problem, "x", "gradient", "model", learn)) == []
    assert [text.partition(": ")[0] for text in said] == ["left out"] * 2
    assert "NaN" in said[0]
    problem.span.set(torch.zeros(problem.shape))
    assert next(METHODS["single"].build(problem)).name == "m0"


def test_averages_have_the_weights_of_their_formulas(build: Build) -> None:
    problem = build("sst2", run=True)

    def rows(name: str) -> dict[str, list[float]]:
        return {
            one.name: one.coefficients[0].tolist()
            for one in METHODS[name].build(problem)
            if one.coefficients is not None
        }

    assert rows("uniform-average") == {"average of all": pytest.approx([1 / 3] * 3)}
    assert rows("tail-average") == {"average of the last 2": [0, 0.5, 0.5]}
    assert rows("single") == {"m0": [1, 0, 0], "m1": [0, 1, 0], "m2": [0, 0, 1]}
    for decay in (0.5, 0.9):
        average, points = torch.tensor(1.0), torch.tensor([1.0, 5.0, -2.0])
        for point in points[1:]:
            average = decay * average + (1 - decay) * point
        assert float(exponential_weights(3, decay) @ points) == pytest.approx(float(average))
    assert len(rows("exponential-average")) == 4


def test_scales_multiply_the_sum_of_tasks_and_the_average_of_one_task(build: Build) -> None:
    assert total_of(build("sst2"), 0.7) == pytest.approx(0.7)
    assert total_of(build("sst2", "mrpc"), 0.7) == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("scores", "count"),
    [([1, 2, 3, 2, 1, 9], 5), ([3, 2, 1], 3), ([1, 3, 2, 4, 3, 2], 6), ([5] * 10, 10), (range(10), 10)],
)
def test_the_grid_of_scales_ends_where_it_gets_worse(
    scores: list[float], count: int, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, values = build("sst2"), iter(scores)

    class Scored:
        @property
        def mean(self) -> float:
            return next(values)

    monkeypatch.setattr(problem, "evaluate", lambda candidate, part: Scored())
    assert len(list(along_scales(problem, lambda scale: Candidate(f"{scale}", "single")))) == count


def test_greedy_soup_adds_a_model_only_if_the_average_gets_no_worse(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = build("sst2")
    table = {(0,): 0.7, (1,): 0.8, (2,): 0.6, (0, 1): 0.75, (1, 2): 0.85, (0, 1, 2): 0.9}
    evaluated = []

    def evaluate(candidate: Candidate, part: str) -> Any:
        assert candidate.coefficients is not None
        evaluated.append(candidate.name)
        members = tuple(candidate.coefficients[0].nonzero().flatten().tolist())
        return type("Scored", (), {"mean": table[members]})

    monkeypatch.setattr(problem, "evaluate", evaluate)
    (soup,) = METHODS["greedy-soup"].build(problem)
    assert soup.coefficients is not None
    assert soup.coefficients[0].tolist() == [0, 0.5, 0.5]  # 1, not 0 (0.75), and 2 (0.85)
    assert evaluated[:3] == problem.models  # whose scores are kept under these names


def ties_by_hand(differences: Tensor, scale: float) -> Tensor:
    """TIES (Yadav et al. 2023, algorithm 1) number by number."""
    trimmed = torch.zeros_like(differences)
    for index, row in enumerate(differences):
        kept = row.abs().topk(int(0.2 * len(row))).indices
        trimmed[index, kept] = row[kept]
    merged = torch.zeros(differences.shape[1])
    for column in range(differences.shape[1]):
        values = trimmed[:, column]
        sign = 1 if values.sum() >= 0 else -1
        agreeing = values[(values * sign) > 0]
        merged[column] = scale * agreeing.mean() if len(agreeing) else 0.0
    return merged


def test_ties_is_the_published_algorithm(build: Build) -> None:
    problem = build("sst2", "mrpc")
    candidate = next(iter(METHODS["ties"].build(problem)))
    differences = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    assert candidate.update is not None
    torch.testing.assert_close(candidate.update("block", differences), ties_by_hand(differences, 0.3))


def test_dare_drops_nine_tenths_and_keeps_the_mean(build: Build) -> None:
    problem = build("sst2", "mrpc")
    candidate = next(iter(METHODS["dare"].build(problem)))
    assert candidate.update is not None
    ones = torch.ones(2, 20_000)
    merged = candidate.update("block", ones)
    assert sorted({round(value, 4) for value in merged.tolist()}) == pytest.approx([0, 3, 6])  # 0.3 x 10 x (0, 1, 2)
    assert float(merged.mean()) == pytest.approx(0.6, abs=0.05)
    assert torch.equal(candidate.update("block", ones), merged)
    assert not torch.equal(candidate.update("other", ones), merged)


def test_learning_lowers_the_loss_and_counts_its_passes(build: Build) -> None:
    problem = build("sst2")
    start = problem.uniform()

    def loss(coefficients: Tensor) -> float:
        problem.span.set(coefficients)
        with torch.no_grad():
            batches = problem.batches(0, "learn")
            return sum(float(problem.loss(problem.span.subspace, 0, batch)) * len(batch["labels"]) for batch in batches)

    of_start = loss(start)
    one, many = METHODS["gradient"].build(problem)
    assert one.coefficients is not None
    assert many.coefficients is not None
    assert loss(many.coefficients) < loss(one.coefficients) < of_start
    assert (one.learned, many.learned) == (3, 3 * problem.shape[0])
    assert one.passes == many.passes == 60 * 16 * 3  # 60 steps on all 16 rows, each one forward and backward pass
    assert torch.equal(one.coefficients, one.coefficients[:1].expand_as(one.coefficients))


def test_gauss_newton_matrix_and_gradient_are_those_of_the_loss(build: Build) -> None:
    problem = build("sst2", "mrpc")
    numbers = torch.tensor([0.4, 0.7])
    value, matrix, gradient = _quadratic(problem, numbers)

    def outputs(flat: Tensor, index: int) -> Tensor:
        z = flat.expand(problem.shape).reshape(-1)
        batches = problem.batches(index, "learn")
        return torch.cat(
            [
                problem.span.subspace.forward_at(
                    z, task=index, **{key: value for key, value in batch.items() if key != "labels"}
                ).logits
                for batch in batches
            ]
        )

    losses, expected, slope = 0.0, torch.zeros(2, 2).double(), torch.zeros(2).double()
    for index in range(2):
        labels = torch.cat([batch["labels"] for batch in problem.batches(index, "learn")])
        logits = outputs(numbers, index).detach().double()
        jacobian = torch.func.jacrev(lambda flat, index=index: outputs(flat, index))(numbers).detach().double()
        p = logits.softmax(-1)
        losses += float(torch.nn.functional.cross_entropy(logits, labels)) / 2
        for row in range(len(labels)):
            h = torch.diag(p[row]) - torch.outer(p[row], p[row])
            expected += jacobian[row].T @ h @ jacobian[row] / len(labels) / 2
            slope += jacobian[row].T @ (p[row] - torch.eye(2).double()[labels[row]]) / len(labels) / 2
    assert value == pytest.approx(losses, abs=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=2e-3, atol=1e-5)  # central differences of float32 logits
    torch.testing.assert_close(matrix, expected, rtol=2e-3, atol=1e-5)


def test_forward_passes_alone_lower_the_loss(build: Build) -> None:
    problem = build("sst2")
    by_hand: list[Any] = []
    for candidate in METHODS["gauss-newton"].build(problem):
        problem.span.set(candidate.coefficients)  # type: ignore[arg-type]
        with torch.no_grad():
            (batch,) = problem.batches(0, "learn")
            by_hand.append(float(problem.loss(problem.span.subspace, 0, batch)))
        assert candidate.passes % 16 == 0
    problem.span.set(problem.uniform())
    with torch.no_grad():
        start = float(problem.loss(problem.span.subspace, 0, problem.batches(0, "learn")[0]))
    assert by_hand[1] < by_hand[0] < start


def test_a_regression_is_scaled_by_the_variance_of_its_labels(glue_folder: Path, model_folder: Path) -> None:
    prepared = prepare(str(model_folder), "stsb", data=glue_folder / "stsb")
    rows = divide(prepared, 16, 24, 0, "stsb")
    assert rows.loss_scale == pytest.approx(np.var(rows.parts["learn"]["labels"]))
    assert divide(replace_labels(prepared), 16, 24, 0, "stsb").loss_scale > 0


def replace_labels(prepared: Prepared) -> Prepared:
    """Return the rows with equal labels, whose variance is 0."""
    assert prepared.train is not None
    same = prepared.train.map(lambda row: {"labels": 1.0})
    return replace(prepared, train=same)


@pytest.mark.parametrize("control", CONTROLS, ids=[control.name for control in CONTROLS])
def test_controls_train_and_leave_everything_as_it_was(control: Control, build: Build) -> None:
    problem = build("sst2", "mrpc")
    before = {name: value.detach().clone() for name, value in problem.span.heads.named_parameters()}
    types = {name: type(module) for name, module in problem.span.heads.named_modules()}
    start = Candidate("start", "task-arithmetic", problem.uniform())
    run = run_control(problem, start, control, 1e-2)
    first = problem.evaluate(start, "test").predictions
    assert all((one != other).any() for one, other in zip(run.predictions["test"], first, strict=True))
    assert run.passes == 60 * 2 * 16 * 3
    problem.span.set(torch.zeros(problem.shape))
    for name, value in problem.span.heads.named_parameters():
        assert torch.equal(value, before[name]), name
    assert {name: type(module) for name, module in problem.span.heads.named_modules()} == types
    own = [value for name, value in problem.span.heads.named_parameters() if "classifier" in name or "pooler" in name]
    assert len(own) == 8
    assert not any(value.requires_grad for value in own)


def test_statistics_of_batch_normalization_are_restored_after_training() -> None:
    heads = Heads([nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))], [])
    before = {name: value.clone() for name, value in heads.named_buffers()}
    with _restored(heads):
        heads.train()(task=0, input=torch.randn(8, 2))
    assert len(before) == 3
    assert all(torch.equal(value, before[name]) for name, value in heads.named_buffers())


def test_a_new_head_is_averaged_by_ties_and_dare(build: Build) -> None:
    problem = build("sst2")
    differences = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    for name in ("ties", "dare"):
        candidate = next(iter(METHODS[name].build(problem)))
        assert candidate.update is not None
        assert not candidate.update(NEW, differences).any()
        assert candidate.update("block", differences).any()


def test_a_candidate_with_infinite_weights_has_the_worst_score(build: Build) -> None:
    problem = build("sst2")
    sick = Candidate("sick", "single", update=lambda block, differences: differences[0] / 0)
    assert problem.evaluate(sick, "choose").mean == -math.inf
    assert problem.evaluate(sick, "choose").mean == -math.inf  # from the store
    assert math.isfinite(problem.evaluate(Candidate("average", "single", problem.uniform()), "choose").mean)


def test_what_is_computed_once_is_read_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build("sst2")
    candidate = Candidate("average", "uniform-average", problem.uniform())
    first = problem.evaluate(candidate, "choose")
    monkeypatch.setattr(Problem, "predictions", lambda *arguments: pytest.fail("computed again"))
    again = problem.evaluate(candidate, "choose")
    assert again.scores == first.scores
    np.testing.assert_array_equal(again.predictions[0], first.predictions[0])
    assert problem.stored("numbers", lambda: {"a": 1}) == problem.stored("numbers", lambda: pytest.fail("again"))


def test_the_parts_are_disjoint_and_their_size_is_checked(prepared: Prepared) -> None:
    rows = divide(prepared, 20, 30, 1, "sst2")
    assert prepared.train is not None
    assert {part: len(rows.parts[part]) for part in rows.parts} == {"learn": 20, "choose": 30, "test": 32}
    numbers = prepared.train.add_column("number", list(range(64)))
    drawn = divide(replace(prepared, train=numbers), 20, 30, 1, "sst2")
    assert not {*drawn.parts["learn"]["number"]} & {*drawn.parts["choose"]["number"]}
    assert (
        drawn.parts["learn"]["number"]
        != divide(replace(prepared, train=numbers), 20, 30, 2, "sst2").parts["learn"]["number"]
    )
    with pytest.raises(Exception, match=r"at least 70 rows that the models were not trained on.*got 64"):
        divide(prepared, 30, 40, 1, "sst2")

"""What every registered type of task answers, tested with the example that it brings; and tasks of a user's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from miniatures import model_of, tokenizer
from torch import Tensor
from towers import Tower

from tinyspan import InputError, SubspaceModel, by_layer, empty_basis, random_basis
from tinyspan.io.storage import read_json, write_json
from tinyspan.labels import label_names
from tinyspan.workflows.checks import check_adapted
from tinyspan.workflows.curvature import curvature, opened_source
from tinyspan.workflows.export import export
from tinyspan.workflows.loss_in_z import CurvatureOptions
from tinyspan.workflows.models import base_model, head_modules
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import evaluate, tune
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import TASKS, TYPES, Classification, Regression, get_task, register_task, register_type
from tinyspan.workflows.tasks.base import Array, Encoding, Example, LossFunction, Room, Split
from tinyspan.workflows.training import fine_tune

SETTINGS = Settings(epochs=1, batch_size=3, learning_rate=1e-3, precision="float32", max_length=16, max_target_length=3)
LENGTHS = {"max_length": SETTINGS.max_length, "max_target_length": SETTINGS.max_target_length}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[tuple[bool, bool], Path]:
    """Return the miniature for each pair of `pretrained_head` and `encoder_decoder`."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("causal-lm", "seq2seq"):
        model_of(kind).save_pretrained(folder / kind)
        tokenizer(encoder_decoder=kind == "seq2seq").save_pretrained(folder / kind)
    return {(False, False): model_folder, (True, False): folder / "causal-lm", (True, True): folder / "seq2seq"}


@pytest.fixture(params=sorted(TYPES))
def example(request: pytest.FixtureRequest) -> Example:
    return TYPES[request.param].example()


@pytest.fixture
def folder(example: Example, tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        example.rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
    return tmp_path


@pytest.fixture
def rows(example: Example, folder: Path, models: dict[tuple[bool, bool], Path]) -> Prepared:
    task = example.task
    return prepare(str(models[task.pretrained_head, task.encoder_decoder]), task, data=folder, **LENGTHS)


def batch_of(rows: Prepared) -> Any:
    assert rows.train is not None
    return rows.collate(list(rows.train))


def test_rows_are_read(example: Example, folder: Path) -> None:
    task = example.task
    read: dict[Split, pd.DataFrame] = {split: task.read(split, folder) for split in ("train", "validation")}
    assert len(read["train"]) == len(example.rows) >= 6
    assert type(task.as_read(read)) is type(task)
    (folder / "train.jsonl").write_text('{"something else": "a film"}\n')
    with pytest.raises(InputError, match=r"no column|needs the columns"):
        task.read("train", folder)
    with pytest.raises(InputError, match="data=FOLDER"):
        task.read("train")


def test_tokens_are_the_same_each_time(example: Example, folder: Path, rows: Prepared) -> None:
    assert rows.train is not None
    assert {"input_ids", "attention_mask", "labels"} <= {*rows.train.column_names}
    assert len(rows.train) == len(example.rows)
    again = prepare(rows.model, example.task, data=folder, **LENGTHS)
    assert again.digests() == rows.digests()
    with pytest.raises(InputError, match=r"max_length=|max_target_length="):
        rows.task.require_room(rows.train, "train", Room("m", 1, 1), Encoding(rows.tokenizer, 16, 3))


def test_batches_are_padded(rows: Prepared) -> None:
    assert rows.train is not None
    batch = batch_of(rows)
    longest = max(map(len, rows.train["input_ids"]))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows.train), longest)
    assert len(batch["labels"]) == len(rows.train)


def test_the_head_is_drawn_by_the_seed_and_named(rows: Prepared) -> None:
    one, same, other = (base_model(rows.model, rows.task, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one) == rows.task.pretrained_head
    model = base_model(rows.model, rows.task, 0)
    assert (label_names(model) or ()) == rows.labels == rows.task.labels
    assert model.config.problem_type == rows.task.problem_type


def test_the_loss_is_finite_and_has_its_derivative(rows: Prepared) -> None:
    model, batch = base_model(rows.model, rows.task, 0).double().eval(), batch_of(rows)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    loss = rows.task.loss_of(model, batch)
    assert loss.shape == ()
    assert loss.isfinite()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradient = torch.autograd.grad(loss, weights, allow_unused=True)
    squared = sum(float(one.square().sum()) for one in gradient if one is not None)
    step, losses = 1e-3 / squared**0.5, []  # losses of tokens are computed in float32
    for sign in (1, -2):
        with torch.no_grad():
            for weight, one in zip(weights, gradient, strict=True):
                if one is not None:
                    weight += sign * step * one
            losses.append(float(rows.task.loss_of(model, batch)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(squared, rel=1e-2)
    assert squared > 0


def test_the_losses_of_rows_make_the_loss_of_a_batch(rows: Prepared) -> None:
    model, batch = base_model(rows.model, rows.task, 0).eval(), batch_of(rows)
    tasks = [rows.task]
    if isinstance(rows.task, Classification):
        tasks.append(replace(rows.task, class_weights=(0.5, 2.0, 3.0)[: len(rows.labels)]))
    for task in tasks:
        with torch.no_grad():
            logits, expected = model(**batch).logits.flatten(1), task.loss_of(model, batch, rows.labels)
        pairs = [*zip(logits, batch["labels"], strict=True)]
        total = sum(task.row_loss(values, target, rows.labels) for values, target in pairs)
        weight = sum(task.row_weight(target, rows.labels) for _, target in pairs)
        torch.testing.assert_close(total / weight, expected)


def test_the_curvature_in_z(rows: Prepared, tmp_path: Path) -> None:
    model = base_model(rows.model, rows.task, 0)
    basis = random_basis(by_layer(model), 2)
    modules = head_modules(model, basis.partition)
    SubspaceModel(model, basis, modules_to_save=modules, init_std=0.3).save_pretrained(tmp_path / "a")
    source = opened_source(tmp_path / "a")
    options = CurvatureOptions(rows=4, batch_size=3, dtype="float64")
    result = curvature(source, rows, tmp_path / "c", options)
    (point,) = result["points"]
    assert np.isfinite(point["hessian"]).all()
    assert point["asymmetry"] < 1e-6  # decoders normalize in float32
    assert (point["gauss_newton"] is None) == rows.task.pretrained_head
    central = curvature(source, rows, tmp_path / "d", replace(options, method="central"))["points"][0]
    bound = (2e-2 if rows.task.pretrained_head else 1e-4) * max(map(abs, point["hessian"]))
    assert central["hessian"] == pytest.approx(point["hessian"], abs=bound)
    if point["gauss_newton"] is not None:
        assert central["gauss_newton"] == pytest.approx(point["gauss_newton"], abs=bound)
        assert min(point["gauss_newton"]) > -1e-9


def test_perfect_predictions_have_the_best_metric(example: Example, rows: Prepared) -> None:
    batch = batch_of(rows)
    outputs = base_model(rows.model, rows.task, 0).eval()(**batch).logits.shape[-1]
    labels = batch["labels"]

    def metric(logits: Tensor) -> float:
        return rows.task.metrics(rows.task.predictions(logits, labels).numpy(), labels.numpy())[rows.task.metric]

    perfect = example.perfect(labels, outputs)
    assert metric(perfect) == pytest.approx(example.best)
    assert metric(-perfect) != pytest.approx(example.best, rel=0.1)


def test_a_result_round_trips(rows: Prepared, tmp_path: Path) -> None:
    result = tune(rows, SETTINGS, "random", tmp_path / "a", rank=2)
    assert read_json(tmp_path / "a/result.json") == result
    assert (result["task"], result["metric"]) == (rows.task.name, rows.task.metric)
    assert ("generation" in result) == bool(rows.completions)
    again = evaluate(rows, SETTINGS, tmp_path / "a")
    assert [again[key] for key in ("score", "labels", "rows")] == [result[key] for key in ("score", "labels", "rows")]
    export(rows.model, rows.task, tmp_path / "a", tmp_path / "merged", "merged")
    merged = evaluate(replace(rows, model=str(tmp_path / "merged")), SETTINGS)
    assert merged["score"] == pytest.approx(result["score"], rel=1e-4)


# -- tasks of a user's own --------------------------------------------------------------------------------------------


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    table = Classification.example().rows
    for split in ("train", "validation"):
        table.to_csv(tmp_path / f"{split}.csv", index=False)
    return tmp_path


def test_a_registered_data_set_is_known_by_name(
    tickets: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    words = ["record", "--model", model_folder, "--task", "tickets", "--data", tickets, "--epochs", 1]
    assert run(*words, "--output", tickets / "out")[0] == 2
    task = Classification("tickets", ("text",), ("billing", "bug", "question"))
    monkeypatch.setattr(TASKS, "_entries", {**TASKS})
    register_task(task)
    assert get_task("tickets") is task
    code, out, err = run(*words, "--output", tickets / "out")
    assert code == 0, err
    assert "full on tickets, accuracy" in out
    assert read_json(tickets / "out/result.json")["labels"] == ["billing", "bug", "question"]


def test_an_adapter_of_a_task_that_is_not_registered(tmp_path: Path) -> None:
    """An earlier version's result has no type of task to compare."""
    SubspaceModel(Tower(), empty_basis(by_layer(Tower()))).save_pretrained(tmp_path / "a")
    for result, message in (
        ({"task": "tickets"}, "was trained for the task 'tickets', which is not registered here"),
        ({"task": "tickets", "type": "regression"}, r"was trained for tickets \(regression\), not for sst2"),
        ({"task": "stsb"}, r"was trained for stsb \(regression\), not for sst2"),
        ({"task": "tickets", "type": "classification"}, "no such model"),
    ):
        write_json(tmp_path / "a/result.json", result)
        with pytest.raises(InputError, match=message):
            check_adapted("no such model", "sst2", tmp_path / "a")


def test_names_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS, "_entries", {**TASKS})
    with pytest.raises(InputError, match="a task with the name 'sst2' is already registered"):
        register_task(Classification("sst2", ("text",), ("no", "yes")))
    with pytest.raises(InputError, match="'seq2seq' is the name of a task type"):
        register_task(Classification("seq2seq", ("text",), ("no", "yes")))
    with pytest.raises(InputError, match="a task type with the name 'regression' is already registered"):
        register_type("regression")(Classification)
    with pytest.raises(InputError, match="'sst2' is the name of a task; choose"):
        register_type("sst2")(Classification)
    assert Classification.type == "classification"


def test_built_in_names_are_registered_without_a_look_at_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point's module may import this package, whose import must not wait for that module."""
    monkeypatch.setattr(TASKS, "_entries", {**TASKS})
    monkeypatch.setattr(TYPES, "_entries", {**TYPES})
    monkeypatch.setattr("tinyspan.registry._load_entry_points", lambda: pytest.fail("entry points were imported"))
    register_task(Classification("tickets", ("text",), ("no", "yes")))
    register_type("labels")(type("Labels", (Classification,), {}))


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(InputError, match="at least two labels"):
        Classification("a", ("text",), ("only",))
    with pytest.raises(InputError, match="the name of its number"):
        Regression("a", ("text",), ("one", "two"))
    with pytest.raises(InputError, match="unknown metric 'f2'; expected one of accuracy"):
        Classification("a", ("text",), ("no", "yes"), metric="f2")


@dataclass(frozen=True)
class Robust(Regression):
    """A regression with a loss and a second metric of its own."""

    def loss_function(self, outputs: Sequence[str] = ()) -> LossFunction:
        def absolute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            return 1000 + (outputs.logits.squeeze(-1) - labels).abs().mean()

        return absolute

    def metrics(self, predictions: Array, labels: Array, outputs: Sequence[str] = ()) -> dict[str, float]:
        error = float(np.abs(predictions.squeeze(-1) - labels).mean())
        return {**super().metrics(predictions, labels), "error": error}


@pytest.mark.parametrize("start", [base_model, None])
def test_a_loss_and_metrics_of_ones_own(
    model_folder: Path, tmp_path: Path, start: Callable[..., Any] | None, recwarn: pytest.WarningsRecorder
) -> None:
    for split in ("train", "validation"):
        Regression.example().rows.to_csv(tmp_path / f"{split}.csv", index=False)
    rows = prepare(str(model_folder), Robust("stars", ("text",), ("stars",)), data=tmp_path)
    if start is None:
        result = tune(rows, SETTINGS, "random", tmp_path / "a", rank=2)
        assert evaluate(rows, SETTINGS, tmp_path / "a")["metrics"] == result["metrics"]
    else:
        result = fine_tune(start(rows.model, rows.task, 0), rows, SETTINGS, "full")
    (epoch,) = result["history"]
    assert result["metric"] == "pearson"
    assert [*result["metrics"]] == ["spearman", "rmse", "error"]
    assert 1000 < epoch["train_loss"] < 1010
    assert epoch["validation_loss"] == pytest.approx(1000 + result["metrics"]["error"], abs=1e-2)
    assert not [warning for warning in recwarn if "loss" in str(warning.message)]

"""A combination from recorded runs to a written model: results, resuming, several tasks, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature_tasks import sentences
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tinyspan import SubspaceModel
from tinyspan.errors import InputError
from tinyspan.workflows.combine import runner
from tinyspan.workflows.combine.opening import Options
from tinyspan.workflows.combine.output import save_combined
from tinyspan.workflows.combine.problem import Problem
from tinyspan.workflows.combine.runner import combine
from tinyspan.workflows.combine.sources import Division, Source, rows_of
from tinyspan.workflows.combine.span import Heads
from tinyspan.workflows.combine.specification import load_sources
from tinyspan.workflows.combine.table import candidate_rows, combined_facts
from tinyspan.workflows.report import write_report
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.runs import record
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task, task_from_table

pytestmark = pytest.mark.studies

DIVISION = Division(learn=8, choose=12)
FEW = ("single", "uniform-average", "task-arithmetic")
RATES = {"batch_size": 8, "learning_rate": 3e-3, "precision": "float32", "set_aside": 24}


def plain(methods: tuple[str, ...], **options: Any) -> Options:
    """Return options in float32, in which scores are those of the runs themselves."""
    return Options(methods, precision="float32", **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, glue_folder: Path) -> dict[str, Path]:
    """Recorded runs with 24 of 64 rows set aside: two seeds of sst2, one of mrpc and stsb."""
    folder = tmp_path_factory.mktemp("runs")
    places = {}
    for name, seed in (("sst2", 0), ("sst2", 1), ("mrpc", 0), ("stsb", 0)):
        settings = Settings(epochs=3, seed=seed, **RATES)  # type: ignore[arg-type]
        prepared = prepare(str(model_folder), name, data=glue_folder / name, max_length=settings.max_length)
        places[f"{name}-{seed}"] = folder / f"{name}-{seed}"
        record(prepared, settings, folder / f"{name}-{seed}")
    return places


@pytest.fixture
def source(runs: dict[str, Path], glue_folder: Path) -> Callable[..., Source]:
    def make(*names: str, part: str = "model", **options: Any) -> Source:
        task = names[0].partition("-")[0]
        return Source(get_task(task), [str(runs[name] / part) for name in names], data=glue_folder / task, **options)

    return make


def test_models_of_one_task_become_one_folder(source: Callable[..., Source], tmp_path: Path) -> None:
    result = combine(
        [source("sst2-0", "sst2-1")],
        tmp_path / "out",
        division=DIVISION,
        options=plain(FEW, geometry=True),
    )
    names = [entry["name"] for entry in result["candidates"]]
    assert names[:3] == ["sst2-0/model", "sst2-1/model", "average of all"]
    assert result["tasks"][0]["rows"] == {"learn": 8, "choose": 12, "test": 32}
    assert result["chosen"] in names
    assert result["verdict"]
    chosen = next(entry for entry in result["candidates"] if entry["name"] == result["chosen"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    parts = [AutoModelForSequenceClassification.from_pretrained(place) for place in source("sst2-0", "sst2-1").models]
    weights = torch.tensor(chosen["coefficients"])
    name = "bert.encoder.layer.1.output.dense.weight"
    block = result["blocks"].index("bert.encoder.layer.1")
    base = dict(AutoModelForSequenceClassification.from_pretrained(result["base"]).named_parameters())[name]
    deltas = [dict(part.named_parameters())[name] - base for part in parts]
    expected = base + sum(w * delta for w, delta in zip(weights[block], deltas, strict=True))
    torch.testing.assert_close(dict(model.named_parameters())[name], expected, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["chosen"] == result["chosen"]
    assert not (tmp_path / "out" / "unfinished").exists()
    assert len(result["geometry"]["plane"]["losses"]) == len(result["geometry"]["plane"]["coefficients"]) == 7
    assert model.config.trained_max_length == DIVISION.max_length
    told = dict(combined_facts(result))["settings"]
    assert "seed 0" in told
    assert "controls" not in told  # which are off


def test_the_weights_are_back_on_the_device_before_they_are_theta_0_again(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator z is there, and weights elsewhere would be refused."""
    calls: list[Any] = []
    move, unmerge = Heads.to, SubspaceModel.unmerge
    monkeypatch.setattr(Heads, "to", lambda self, device: (calls.append(device), move(self, device))[1])
    monkeypatch.setattr(SubspaceModel, "unmerge", lambda self: (calls.append("unmerge"), unmerge(self))[1])
    combine([source("sst2-0", "sst2-1")], tmp_path / "out", division=DIVISION, options=plain(FEW, geometry=False))
    assert calls[-3:] == ["cpu", torch.device("cpu"), "unmerge"]


def test_a_loss_that_is_not_finite_is_a_gap(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Problem.loss

    def diverging(self: Problem, subspace: SubspaceModel, index: int, batch: Any) -> torch.Tensor:
        z = torch.cat([one.detach().reshape(-1) for one in subspace.z])
        return loss(self, subspace, index, batch) * (math.inf if float(z.max()) > 1 else 1)

    monkeypatch.setattr(Problem, "loss", diverging)
    options = plain(FEW, geometry=True)
    result = combine([source("sst2-0", "sst2-1")], tmp_path / "out", division=DIVISION, options=options)
    losses = result["geometry"]["plane"]["losses"]
    assert losses[-1] == [None] * 7
    assert None not in losses[0][:-1]
    write_report(tmp_path / "page.html", [tmp_path / "out"])
    page = (tmp_path / "page.html").read_text()
    assert "Loss in the plane of" in page
    assert "nan" not in page.partition("Loss in the plane of")[2][:200]


def test_single_candidates_have_the_scores_of_the_models_themselves(
    source: Callable[..., Source], runs: dict[str, Path], tmp_path: Path
) -> None:
    result = combine(
        [source("sst2-0", "sst2-1")],
        tmp_path / "out",
        division=DIVISION,
        options=plain(FEW, geometry=False),
    )
    for name, entry in zip(("sst2-0", "sst2-1"), result["candidates"], strict=False):
        stored = json.loads((runs[name] / "result.json").read_text())
        assert entry["test"]["scores"] == [pytest.approx(stored["score"])]
    gap = result["candidates"][0]["test"]["difference_to_best_single"]
    assert gap[1] <= gap[0] <= gap[2]


def test_points_of_a_run_are_combined_with_tails_and_moving_averages(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Path] = []
    files = runner._files
    monkeypatch.setattr(runner, "_files", lambda folder: (listed.append(folder), files(folder))[1])
    result = combine(
        [source("sst2-0", part="")],
        tmp_path / "out",
        division=DIVISION,
        options=Options((*FEW, "tail-average", "exponential-average"), geometry=False),
    )
    assert [model["order"] for model in result["models"]] == [4, 9, 14]  # the first step is 0
    assert len(listed) == 2  # the base model and the run, once for all of its points
    methods = {entry["method"] for entry in result["candidates"]}
    assert methods == {*FEW, "tail-average", "exponential-average"}
    assert set(result["blocks"]) == {"bert.encoder.layer.0", "bert.encoder.layer.1"}  # the rest is not recorded


def test_several_tasks_keep_their_heads_on_one_encoder(
    source: Callable[..., Source], runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyspan.workflows.combine.learning.STEPS", 3)
    sources = [source(name) for name in ("sst2-0", "mrpc-0", "stsb-0")]
    result = combine(
        sources,
        tmp_path / "out",
        division=DIVISION,
        options=plain((*FEW, "gradient"), geometry=False),
    )
    own = result["own_models"]
    stored = [json.loads((runs[f"{task}-0"] / "result.json").read_text())["score"] for task in ("sst2", "mrpc", "stsb")]
    assert own["scores"] == [pytest.approx(score, abs=1e-6) for score in stored]
    assert own["mean"] == pytest.approx(sum(stored) / 3, abs=1e-6)
    folders = {task: tmp_path / "out" / "models" / task for task in ("sst2", "mrpc", "stsb")}
    models = {task: AutoModelForSequenceClassification.from_pretrained(place) for task, place in folders.items()}
    first = dict(models["sst2"].named_parameters())
    for task in ("mrpc", "stsb"):
        other = dict(models[task].named_parameters())
        assert all(torch.equal(first[name], other[name]) for name in other if name.startswith("bert.e"))
        head = load_file(runs[f"{task}-0"] / "model" / "model.safetensors")["classifier.weight"]
        assert torch.equal(other["classifier.weight"], head)
    learned = [entry for entry in result["candidates"] if entry["method"] == "gradient"]
    assert [entry["learned"] for entry in learned] == [3, 3 * len(result["blocks"])]


@pytest.mark.studies
def test_an_interrupted_combination_goes_on_with_the_same_result(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyspan.workflows.combine.learning.STEPS", 2)
    options, sources = plain(("single", "uniform-average", "gradient"), controls=True), [source("sst2-0", "sst2-1")]
    calls, end, predictions = 0, 0, Problem.predictions

    def interrupted(self: Problem, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == end:
            raise KeyboardInterrupt
        return predictions(self, *arguments)

    monkeypatch.setattr(Problem, "predictions", interrupted)
    whole = combine(sources, tmp_path / "whole", division=DIVISION, options=options)
    total = calls
    for end in (3, 6, 9):
        calls, cut = 0, tmp_path / f"cut-{end}"
        with pytest.raises(KeyboardInterrupt):
            combine(sources, cut, division=DIVISION, options=options)
        again = combine(sources, cut, division=DIVISION, options=options)
        assert {**again, "seconds": 0} == {**whole, "seconds": 0}
        assert calls - 1 == total  # nothing was computed again, but for the interrupted call
    with pytest.raises(InputError, match="holds an earlier output"):
        combine(sources, tmp_path / "cut-9", division=Division(9, 12), options=options)


def test_another_division_does_not_continue_an_interrupted_combination(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._Work, "scored", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        combine([source("sst2-0", "sst2-1")], tmp_path / "out", division=DIVISION)
    with pytest.raises(InputError, match="choose 12, where this has 11"):
        combine([source("sst2-0", "sst2-1")], tmp_path / "out", division=Division(8, 11))


@pytest.mark.parametrize("place", ["stack_differences", "save_combined", "written"])
def test_a_combination_goes_on_wherever_it_was_interrupted(
    place: str, source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, sources = plain(("single", "uniform-average"), geometry=False), [source("sst2-0", "sst2-1")]
    whole = combine(sources, tmp_path / "whole", division=DIVISION, options=options)

    def interrupt(*arguments: Any, **named: Any) -> None:
        if place == "written":
            save_combined(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        target = "opening.stack_differences" if place == "stack_differences" else "runner.save_combined"
        patched.setattr(f"tinyspan.workflows.combine.{target}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            combine(sources, tmp_path / "cut", division=DIVISION, options=options)
    again = combine(sources, tmp_path / "cut", division=DIVISION, options=options)
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_error_on_opening_does_not_delete_what_an_interrupted_combination_has_computed(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory is short while the base model is loaded again."""
    arguments: Any = {"division": DIVISION, "options": plain(("single", "uniform-average"), geometry=False)}

    def fail(error: BaseException) -> Any:
        return lambda *arguments, **named: (_ for _ in ()).throw(error)

    for place, error in (("save_combined", KeyboardInterrupt()), ("open_problem", InputError("no memory"))):
        with monkeypatch.context() as patched:
            patched.setattr(runner, place, fail(error))
            with pytest.raises(type(error)):
                combine([source("sst2-0", "sst2-1")], tmp_path / "out", **arguments)
    monkeypatch.setattr(Problem, "predictions", fail(AssertionError("computed again")))
    assert combine([source("sst2-0", "sst2-1")], tmp_path / "out", **arguments)["chosen"]


def test_a_base_model_in_the_output_folder_is_not_deleted(
    source: Callable[..., Source], model_folder: Path, tmp_path: Path
) -> None:
    """As a combination from which the models were fine-tuned, to be replaced by theirs."""
    out = tmp_path / "out"
    arguments: Any = {"division": DIVISION, "options": plain(("single",), geometry=False)}
    combine([source("sst2-0", "sst2-1")], out, **arguments)
    shutil.rmtree(out / "model")
    shutil.copytree(model_folder, out / "model")
    with pytest.raises(InputError, match="model is read and lies in the output folder"):
        combine([source("sst2-0", "sst2-1")], out, base=str(out / "model"), overwrite=True, **arguments)
    assert (out / "model" / "config.json").is_file()


@pytest.mark.studies
def test_a_regression_far_from_zero_has_the_scores_of_its_models(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 labels of 2000 +- 5 can only be told apart in the units in which the head was trained."""
    monkeypatch.setattr("tinyspan.workflows.combine.learning.STEPS", 3)
    rows = sentences(120, 3)
    rows["stars"] = [2005.0 if label else 1995.0 for label in rows["label"]]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    task = task_from_table(str(tmp_path / "rows.csv"), "sentence", "stars", holdout=0.25, task_type="regression")
    for seed in (0, 1):
        settings = Settings(epochs=12, seed=seed, **RATES)  # type: ignore[arg-type]
        record(prepare(str(model_folder), task), settings, tmp_path / f"{seed}")
    models = [str(tmp_path / f"{seed}" / "model") for seed in (0, 1)]
    scores = [json.loads((tmp_path / f"{seed}" / "result.json").read_text())["score"] for seed in (0, 1)]
    assert min(scores) > 0.5
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        options = Options(("single", "uniform-average", "gradient"), precision=precision, geometry=False)  # type: ignore[arg-type]
        result = combine([Source(task, models)], tmp_path / precision, division=DIVISION, options=options)
        for score, entry in zip(scores, result["candidates"], strict=False):
            assert entry["test"]["scores"][0] == pytest.approx(score, abs=tolerance), precision
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float32" / "model")
    assert 1900 < float(model.classifier.bias) < 2100  # in the units of the labels


def test_metrics_of_opposite_directions_have_no_mean(source: Callable[..., Source], tmp_path: Path) -> None:
    one, other = source("sst2-0"), source("mrpc-0")
    lower = Source(replace(other.task, metric="log_loss"), other.models, data=other.data)
    with pytest.raises(InputError, match=r"says nothing: sst2 \(accuracy\), mrpc \(log_loss\)"):
        combine([one, lower], tmp_path / "out", division=DIVISION, options=plain(FEW))


def test_training_on_the_rows_is_named_where_it_does_better() -> None:
    rows = [
        {"name": "a", "method": "single", "choose": {"mean": 0.7}, "test": {"mean": 0.7}},
        {
            "name": "average",
            "method": "uniform-average",
            "choose": {"mean": 0.8},
            "test": {"mean": 0.75, "difference_to_best_single": [0.05, 0.01, 0.09]},
        },
    ]
    control = {"name": "LoRA", "rate": 1e-3, "choose": 0.85, "test": {"mean": 0.8}}
    control["difference_to_chosen"] = [0.05, 0.02, 0.08]
    noisy = {**control, "difference_to_chosen": [0.05, -0.02, 0.12]}
    assert runner.verdict(rows, 1, "a", []) == (
        "average was chosen; on the held-out rows it differs from the best single model, a, by +0.050 (95 % interval "
        "+0.010 to +0.090)."
    )
    assert "Training on the same rows does better: LoRA at 0.001 has 0.800" in runner.verdict(rows, 1, "a", [control])
    assert runner.verdict(rows, 1, "a", [noisy]) == runner.verdict(rows, 1, "a", [])
    assert runner.verdict(rows, 0, "a", []).startswith("No combination beat the best single model, a")
    assert runner.verdict(rows, 0, "b", []).startswith("No combination beat the single model, a, beyond noise")


# -- rows -------------------------------------------------------------------------------------------------------------


def test_the_table_marks_the_chosen_candidate_and_ties_between_single_models() -> None:
    def entry(name: str, method: str, choose: float) -> dict[str, Any]:
        part = {"mean": choose, "scores": [choose]}
        return {"name": name, "method": method, "learned": 0, "passes": 0, "choose": part, "test": part}

    singles = [entry(name, "single", score) for name, score in (("a", 0.8), ("b", 0.9), ("c", 0.9))]
    result: dict[str, Any] = {
        "tasks": [{"name": "sst2", "metric": "accuracy"}],
        "candidates": [*singles, entry("average of all", "uniform-average", 0.9)],
        "best_single": "b",
        "chosen": "b",
        "own_models": None,
        "controls": [],
    }
    names = [row[0] for row in candidate_rows(result)[1]]
    assert names == ["a", "b (chosen, best single)", "c (tied with the best single)", "average of all"]
    result |= {"chosen": "average of all", "candidates": result["candidates"][3:], "best_single": None}
    assert [row[0] for row in candidate_rows(result)[1]] == ["average of all (chosen)"]


def test_rows_are_those_that_the_runs_set_aside(source: Callable[..., Source], model_folder: Path) -> None:
    one = source("sst2-0", "sst2-1")
    members = runner.open_sources([one], None)[0]
    rows = rows_of(one, members, DIVISION)
    trained = prepare(str(model_folder), "sst2", data=one.data).with_aside(24)
    assert trained.aside is not None
    aside = sorted(map(tuple, trained.aside["input_ids"]))
    drawn = [tuple(row) for part in ("learn", "choose") for row in rows.parts[part]["input_ids"]]
    assert len(drawn) == 20
    assert all(row in aside for row in drawn)
    with pytest.raises(InputError, match=r"at least 30 rows that the models were not trained on.*got 24"):
        rows_of(one, members, Division(15, 15))


def test_rows_that_were_not_drawn_in_training_are_taken(model_folder: Path, glue_folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        settings = Settings(epochs=1, batch_size=8, seed=seed, precision="float32")
        record(
            prepare(str(model_folder), "sst2", data=glue_folder / "sst2", train_rows=32), settings, tmp_path / f"{seed}"
        )
    one = Source(get_task("sst2"), [str(tmp_path / f"{seed}" / "model") for seed in (0, 1)], data=glue_folder / "sst2")
    members = runner.open_sources([one], None)[0]
    rows = rows_of(one, members, DIVISION)
    every = prepare(str(model_folder), "sst2", data=glue_folder / "sst2", train_rows=52)
    assert every.train is not None
    new = sorted(map(tuple, every.train.select(range(32, 52))["input_ids"]))
    drawn = sorted(tuple(row) for part in ("learn", "choose") for row in rows.parts[part]["input_ids"])
    assert drawn == new
    with pytest.raises(InputError, match="trained on 32 rows and set none aside, and there are no 33 others"):
        rows_of(one, members, Division(13, 20))


def test_a_table_of_a_users_own(source: Callable[..., Source], tmp_path: Path, runs: dict[str, Path]) -> None:
    lines = ["text,mood"] + [
        f"the film is {'fine' if i % 2 else 'dull'} {i},{'positive' if i % 2 else 'negative'}" for i in range(80)
    ]
    (tmp_path / "new.csv").write_text("\n".join(lines))
    task = task_from_table(str(tmp_path / "new.csv"), "text", "mood", holdout=0.5)
    models = [str(runs[name] / "model") for name in ("sst2-0", "sst2-1")]
    result = combine(
        [Source(task, models, train_rows=0)],
        tmp_path / "out",
        division=DIVISION,
        options=plain(FEW, geometry=False),
    )
    assert result["tasks"][0]["rows"] == {"learn": 8, "choose": 12, "test": 40}


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_combined_is_refused_and_nothing_is_written(
    source: Callable[..., Source], runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def refused(match: str, *sources: Source, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            combine(sources, out, division=DIVISION, **options)
        assert not out.exists()

    refused("at least two models", source("sst2-0"))
    refused("sst2 has 2 models, where several tasks have one", source("sst2-0", "sst2-1"), source("mrpc-0"))
    refused("a name of its own for every task, got sst2, sst2", source("sst2-0"), source("sst2-1"))
    for name in ("a/b", "..", "."):
        refused("names a folder of the output: expected one without", source("sst2-0", name=name), source("mrpc-0"))
    refused("unknown method of combination 'magic'", source("sst2-0", "sst2-1"), options=Options(("magic",)))
    refused(
        "none of the methods applies to these models and tasks: tail-average",
        source("sst2-0", "sst2-1"),
        options=Options(("tail-average",)),
    )
    with pytest.raises(InputError, match="at least 2 rows to learn from"):
        Division(1, 5)
    twin = tmp_path / "twin"
    copy_model(runs["sst2-0"] / "model", twin)
    refused(
        "are the same model: all parameters are equal",
        Source(get_task("sst2"), [str(runs["sst2-0"] / "model"), str(twin)], data=source("sst2-0").data, set_aside=24),
    )
    sick = tmp_path / "sick"
    copy_model(runs["sst2-1"] / "model", sick, poison=True)
    refused(
        "sick cannot be combined: its parameter .* holds NaN",
        Source(get_task("sst2"), [str(runs["sst2-0"] / "model"), str(sick)], data=source("sst2-0").data, set_aside=24),
    )


def copy_model(source: Path, target: Path, *, poison: bool = False) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if poison:
        tensors = load_file(target / "model.safetensors")
        tensors["bert.encoder.layer.0.output.dense.bias"][3] = float("nan")
        save_file(tensors, target / "model.safetensors", {"format": "pt"})


def test_a_page_of_tasks_is_checked(runs: dict[str, Path], glue_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "tasks.yaml"
    entry = f"- {{model: {runs['sst2-0']}/model, task: sst2, data: {glue_folder}/sst2, eval_rows: 20}}"
    other = f"- {{name: pairs, model: {runs['mrpc-0']}/model, task: mrpc, data: {glue_folder}/mrpc}}"
    page.write_text(f"base: somewhere\ntasks:\n{entry}\n{other}\n")
    sources, base = load_sources(page)
    assert (base, [one.title for one in sources], sources[0].eval_rows) == ("somewhere", ["sst2", "pairs"], 20)
    for text, match in (
        (f"tasks:\n{entry}\n", "tasks has 1 entry, where at least 2 tasks are combined"),
        (f"tasks:\n{entry}\n- {{model: x}}\n", "tasks.1: .*expected task, or data with text and label"),
        (
            f"tasks:\n{entry}\n- {{model: x, task: sst2, colour: red}}\n",
            "tasks.yaml: line 3: unknown key tasks.1.colour; expected model, name, task",
        ),
        (f"tasks:\n{entry}\n- {{model: x, label: y}}\n", "label goes with data and text"),
        ("tasks: [", "not YAML"),
        ("- one\n", "expected `name: value` lines"),
        (f"tasks:\n{entry}\n{entry.replace('- {', '- &a {')}\n- *a\n", "aliases are not read"),
        (f"base: a\nbase: b\ntasks:\n{entry}\n{other}\n", "'base' is given twice"),
        (f"tasks:\n{entry}\n{other}\nx: {'[' * 20}{']' * 20}\n", "nested more than 16 levels deep"),
    ):
        page.write_text(text)
        with pytest.raises(InputError, match=match):
            load_sources(page)
    with pytest.raises(InputError, match=r"absent.yaml: there is no such file"):
        load_sources(tmp_path / "absent.yaml")


def test_the_command(run: Any, runs: dict[str, Path], glue_folder: Path, tmp_path: Path) -> None:
    models = [runs[name] / "model" for name in ("sst2-0", "sst2-1")]
    rows = ["--task", "sst2", "--data", glue_folder / "sst2", "--learn-rows", 8, "--choose-rows", 12]
    code, out, err = run("combine", *models, *rows, "--methods", "single,uniform-average", "--output", tmp_path / "out")
    assert code == 0, err
    assert "| average of all |" in out or "| **average of all** |" in out
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    code, _, err = run("report", tmp_path / "out", "--output", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    for text in ("against the best single model", "Coefficients of", "Loss in the plane of", "Loss on the line from"):
        assert text in page
    assert "tinyspan combine" in page
    code, _, err = run("combine", *models, *rows, "--output", tmp_path / "out")
    assert (code, "--overwrite" in err) == (2, True)
    code, _, err = run("combine", "--output", tmp_path / "other")
    assert code == 2
    assert "give MODEL... with a task, or --tasks PAGE" in err
    code, _, err = run("combine", *models, *rows, "--learn-rows", 30, "--output", tmp_path / "other")
    assert code == 2
    assert "--learn-rows, --choose-rows" in err
    assert not (tmp_path / "other").exists()

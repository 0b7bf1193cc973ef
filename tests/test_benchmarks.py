"""Every benchmark runs in its smallest form and says what it claims; never how long it took."""

import importlib
import itertools
import re
import shutil
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from miniatures import model_of, reviews, tokenizer
from scipy.stats import spearmanr

from tinyspan import TrajectoryRecorder, by_pattern
from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.folders import Busy
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab import scheduler
from tinyspan.workflows.hardware import hardware
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.tasks import get_task

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts be imported as they import each other, and leave the number of threads to the tests."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def run(script: str, *words: object) -> str:
    """Run a benchmark in this process and return what it prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [str(ROOT / "benchmarks" / script), *map(str, words)])
        importlib.import_module(Path(script).stem).main()
    return printed.getvalue()


def check_claims(path: Path) -> list[dict[str, object]]:
    content = read_json(path)
    assert {"claims", "hardware", "versions"} <= content.keys()
    for claim in content["claims"]:
        assert {"name", "value", "target", "holds"} <= claim.keys()
        assert isinstance(claim["holds"], bool)
        assert isinstance(claim["value"], int | float)
    found: list[dict[str, object]] = content["claims"]
    return found


def test_discovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("discovery")
    monkeypatch.setattr(script, "COPIED", 1 << 10)
    monkeypatch.setattr(script, "MULTIPLIED", 16)
    run("discovery.py", "--size", 70_000, "--blocks", 1, "--runs", 1, "--json", tmp_path / "found.json")
    claims = {str(claim["name"]): claim for claim in check_claims(tmp_path / "found.json")}
    assert len(claims) >= 7
    assert claims["time of one block over its limit"]["target"] == 1.5
    assert claims["time from disk over reading and writing once"]["target"] == 2.5
    found = read_json(tmp_path / "found.json")
    of_copy, of_product, limit = (
        found["limit"][f"seconds{kind}"] for kind in (" at the speed of a copy", " at the speed of a product", "")
    )
    assert limit == of_copy + of_product
    seconds = {way: row["seconds"] for way, row in found["in memory"]["singular values over 1e3"].items()}
    assert claims["time of one block over its limit"]["value"] == seconds["in_used_memory"] / limit
    assert found["times as fast as torch.linalg.svd"] == seconds["dense_svd"] / seconds["tinyspan"]


@pytest.mark.slow
def test_recording(tmp_path: Path) -> None:
    run("recording.py", "--steps", 1, "--rounds", 1, "--points", 9, "--json", tmp_path / "found.json")
    assert [claim["target"] for claim in check_claims(tmp_path / "found.json")] == [0.03, 0.03, 0.51]


def test_step(tmp_path: Path, model_folder: Path, data_folder: Path) -> None:
    methods = "full;ours, sparse 1 %, float32"
    plan = ["--model", model_folder, "--task", "sst2", "--data", data_folder, "--max-length", 16, "--rank", 2]
    out = run("step.py", *plan, "--methods", methods, "--steps", 1, "--rounds", 1, "--json", tmp_path / "found.json")
    assert [claim["target"] for claim in check_claims(tmp_path / "found.json")] == [0.8, 0.6]
    found = read_json(tmp_path / "found.json")["methods"]
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:] == list(found)
    assert found["full"]["time over full"] == 1
    of_blocks = 2 * (4 * (16 * 16 + 16) + 16 * 32 + 32 + 32 * 16 + 16 + 4 * 16)
    assert found["ours, sparse 1 %, float32"]["basis"] == (4 * 2 + 4) * 2 * round(0.01 * of_blocks / 2)
    assert found["full"]["operations"] == 6 * 2 * (4 * 16 * 16 + 2 * 16 * 32) * 32 * 7  # tokens


@pytest.mark.slow
def test_the_overhead_of_a_step(tmp_path: Path) -> None:
    out = run("step.py", "--overhead", "--steps", 2, "--rounds", 2, "--json", tmp_path / "found.json")
    assert {claim["target"] for claim in check_claims(tmp_path / "found.json")} == {1}
    found = read_json(tmp_path / "found.json")["methods"]
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:] == list(found)
    assert (
        found["frozen encoder"]["operators"] < found["ours, dense, float32"]["operators"] < found["full"]["operators"]
    )


@pytest.mark.slow
def test_step_with_all_methods(tmp_path: Path, model_folder: Path, data_folder: Path) -> None:
    plan = ["--model", model_folder, "--task", "sst2", "--data", data_folder, "--max-length", 16, "--rank", 2]
    run("step.py", *plan, "--quick", "--autocast", "--json", tmp_path / "found.json")
    assert len(check_claims(tmp_path / "found.json")) == 12
    found = read_json(tmp_path / "found.json")["methods"]
    assert found["ours, dense, bfloat16"]["basis"] * 2 == found["ours, dense, float32"]["basis"]
    assert found["full"]["operations"] * 2 == found["VeRA"]["operations"] * 3
    assert found["full"]["weights"] == found["frozen encoder"]["weights"]


@pytest.fixture
def glue(glue_folder: Path, tmp_path: Path) -> Path:
    """The tasks of `glue_folder` and qnli, by which learning rates are chosen."""
    shutil.copytree(glue_folder, tmp_path / "glue")
    (tmp_path / "glue" / "qnli").mkdir()
    for split in ("train", "validation"):
        rows = pd.read_parquet(glue_folder / "mrpc" / f"{split}.parquet")
        renamed = rows.rename(columns={"sentence1": "question", "sentence2": "sentence"})
        renamed.to_parquet(tmp_path / "glue" / "qnli" / f"{split}.parquet")
    return tmp_path / "glue"


SMALL = ["--train-rows", 32, "--choice-rows", 16, "--epochs", 1, "--batch-size", 4, "--points", 4, "--rank", 2]


def test_what_waits_for_another_run_has_not_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL", 0.0)
    study = importlib.import_module("study")
    run = study.Run("freeze", 0.1, "sst2", 0)

    class OneRun(study.Study):  # type: ignore[name-defined,misc]
        def cells(self) -> list[Any]:
            return [run]

        def fine_tuned(self, run: Any, callbacks: Any = ()) -> dict[str, Any]:
            raise reasons.pop(0)

        def tell(self, content: Any, results: Any) -> None:
            reported.append(len(reasons))

    def one(name: str) -> Any:
        arguments = Namespace(output=tmp_path / name, workers=1, seeds=1, json=tmp_path / "found.json")
        return OneRun(study.Plan(model="tiny"), arguments, study.Run)

    reasons = [Busy("another process records it"), TinyspanError("the loss is NaN"), InputError("no data")]
    reported: list[int] = []
    one("first").start()
    told = {**asdict(run), "diverged": "the loss is NaN", "device": hardware()["device"]}
    found = read_json(tmp_path / "first" / run.folder / "result.json")
    assert found == {**told, "cell_seconds": found["cell_seconds"]}
    assert one("first").finished()[run]["diverged"] == "the loss is NaN"
    assert reported == [1, 1]  # after the run, and at the end
    with pytest.raises(TinyspanError, match=r"1 cells failed.*\n.*InputError: no data"):
        one("other").start()
    assert not (tmp_path / "other" / run.folder / "result.json").exists()


def density(folder: Path, *words: object) -> str:
    return run("density.py", "--output", folder / "runs", "--json", folder / "found.json", *words)


def made(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (folder / "runs" / "runs").glob("*/result.json")}


def runs_told(text: str) -> set[str]:
    """Return the names of the runs that a study says it has made."""
    return set(re.findall(r"runs/(\S+):", text.replace("\n", "")))


def test_density(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    plan = ["--run", *SMALL, "--model", model_folder, "--data", glue, "--max-length", 16]
    density(tmp_path, *plan, "--tasks", "mrpc", "--methods", "full", "--seeds", 1)
    found = read_json(tmp_path / "found.json")["learning rates"]["full"]
    scores = dict(map(tuple, found["choice scores"]))
    assert scores[found["chosen"]] == max(scores.values())
    assert len(made(tmp_path)) == 2 * len(scores) + 1
    assert list((tmp_path / "runs" / "trajectories").glob("*-*-*")) == []  # they are done with
    check_claims(tmp_path / "found.json")


@pytest.mark.slow
def test_density_goes_on(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    """Finished runs are not made again, and a trajectory that was taken away is recorded again when it is needed."""
    plan = ["--run", *SMALL, "--model", model_folder, "--data", glue, "--max-length", 16, "--tasks", "sst2"]
    density(tmp_path, *plan, "--methods", "full;freeze", "--seeds", 1)
    first = made(tmp_path)
    told = density(tmp_path, *plan, "--methods", "full;freeze;1 %", "--seeds", 2)
    assert runs_told(told) == made(tmp_path).keys() - first.keys()
    assert first.items() <= made(tmp_path).items()
    content = read_json(tmp_path / "found.json")
    rates = {method: found["chosen"] for method, found in content["learning rates"].items()}
    assert rates.keys() == {"full", "freeze", "1 %"}
    runs = [run for run in content["runs"] if run["task"] == "sst2"]
    final = {(run["method"], run["seed"], run["rate"]): run["score"] for run in runs}
    lost = [final["full", seed, rates["full"]] - final["1 %", seed, rates["1 %"]] for seed in (0, 1)]
    claim = next(claim for claim in check_claims(tmp_path / "found.json") if "full is above 1 %" in str(claim["name"]))
    assert claim["value"] == pytest.approx(100 * sum(lost) / 2)
    table = density(tmp_path, "--render", "--images", tmp_path)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == ["full", "freeze", "1 %"]
    assert (tmp_path / "density.png").stat().st_size > 10_000


@pytest.mark.slow
def test_density_with_all_methods(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    plan = ["--run", *SMALL, "--model", model_folder, "--data", glue, "--max-length", 16]
    density(tmp_path, *plan, "--workers", 2, "--tasks", "sst2,mrpc", "--seeds", 2)
    assert len(check_claims(tmp_path / "found.json")) == 21
    assert len(density(tmp_path, "--render").splitlines()) == 2 + 17 + 21


@pytest.mark.slow
def test_adapters(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    """Trained, compared with nothing lost, and told again from the file alone."""

    def adapters(*words: object) -> str:
        return run("adapters.py", "--output", tmp_path / "runs", "--json", tmp_path / "found.json", *words)

    plan = [*SMALL, "--model", model_folder, "--data", glue, "--max-length", 16, "--tasks", "sst2,qnli", "--seeds", 1]
    adapters("--run", *plan)
    found = read_json(tmp_path / "found.json")
    assert found["learning rates"].keys() == {"LoRA", "its own directions", "random directions"}
    adapters("--compare", *plan)
    entry = read_json(tmp_path / "found.json")["compared"][0]
    whole = next(way for way in entry["ways"] if (way["kind"], way["rank"]) == ("tinyspan", None))
    assert max(whole["errors"]) < 1e-6
    assert whole["scores"] == pytest.approx(list(entry["LoRA"].values()))
    mean = next(way for way in entry["ways"] if way["kind"] == "mean")
    assert mean["errors"] == pytest.approx(entry["error of the mean"], rel=1e-6)
    assert len(check_claims(tmp_path / "found.json")) >= 2
    adapters("--compare", *plan)
    assert read_json(tmp_path / "found.json")["compared"] == [entry]  # seconds too: not made again
    write_json(tmp_path / "found.json", {**found, "compared": [{**entry, "LoRA": {"sst2": 0.1, "qnli": 0.2}}]})
    adapters("--compare", *plan)
    assert read_json(tmp_path / "found.json")["compared"][0]["LoRA"] == entry["LoRA"]  # of other LoRAs: made again
    assert "its own directions" in adapters("--render")


FEW = [*SMALL[:4], "--steps", 4, "--batch-size", 4, "--points", 4, "--rank", 2, "--tasks", "sst2,mrpc,qnli"]
FEW += ["--shots", 16, "--suggest-rows", 24, "--max-length", 16]


def transfer(folder: Path, *words: object) -> str:
    return run("transfer.py", "--output", folder / "runs", "--json", folder / "found.json", *words)


def test_transfer(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    """The suggested source is the one of the largest share, and its score is that of training z there."""
    plan = ["--run", *FEW, "--model", model_folder, "--data", glue, "--seeds", 1, "--methods", "z, suggested"]
    transfer(tmp_path, *plan, "--shots", 32)  # all rows: one size alone
    content = read_json(tmp_path / "found.json")
    rates = {(told["method"], told["task"], told["rows"]): told["chosen"] for told in content["learning rates"]}
    for cell, rate in rates.items():
        tried = [run for run in content["runs"] if (run["method"], run["task"], run["rows"]) == cell]
        best = max(run["choice"] for run in tried)
        assert rate == min(run["rate"] for run in tried if run["choice"] == best)
    lost = []
    for task in ("sst2", "mrpc", "qnli"):
        others = {"sst2", "mrpc", "qnli"} - {task}
        runs = [run for run in content["runs"] if run["task"] == task]
        at = [run for run in runs if run["rate"] == rates.get((run["method"], task, 32)) and run["rows"] == 32]
        scores = {run["method"]: run["score"] for run in at if run["method"][:4] == "z of"}
        assert scores.keys() == {f"z of {source}" for source in {*others, task}}
        (ranking,) = (run for run in runs if run["method"] == "suggest" and run["rows"] == 24)
        shares = ranking["shares"]["fitted head, batches"]
        assert shares.keys() == others
        best = max(shares, key=shares.__getitem__)
        lost.append(100 * (scores[f"z of {best}"] - sum(scores[f"z of {source}"] for source in others) / 2))
    found = {str(claim["name"]): claim["value"] for claim in check_claims(tmp_path / "found.json")}
    (gained,) = (value for name, value in found.items() if "z, suggested is above z in another" in name)
    assert gained == pytest.approx(sum(lost) / 3)
    assert len(content["ranking"]) == 4
    assert list((tmp_path / "runs" / "trajectories").glob("*-*")) == []  # they are done with


def test_the_correlation_of_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spearman's within targets, averaged since there are no ties, and p by brute force over all names of the tasks."""
    script = importlib.import_module("transfer")
    names, rng = ["a", "b", "c", "d", "e"], np.random.default_rng(0)
    shares, scores = rng.random((2, 5, 5)), rng.random((2, 5, 5))  # [seed, target, source]

    def told(seeds: list[int], name: dict[str, str]) -> dict[str, Any]:
        """The runs of some seeds, with the scores of tasks under other names."""
        runs: list[dict[str, Any]] = []
        for (seed, (t, target)), (s, source) in itertools.product(
            itertools.product(seeds, enumerate(names)), enumerate(names)
        ):
            of_score = {"method": f"z of {name[source]}", "task": name[target], "score": scores[seed, t, s]}
            runs.append({**of_score, "rows": 9, "seed": seed, "rate": 0.5})
            runs.append({**runs[-1], "score": 7.0, "rate": 0.1})  # tried, not chosen
        for seed, (t, target) in itertools.product(seeds, enumerate(names)):
            share = {source: shares[seed, t, s] for s, source in enumerate(names) if s != t}
            ranking = {"method": "suggest", "rate": 0.0, "task": target, "rows": 4, "seed": seed}
            runs.append({**ranking, "shares": {script.DEFAULT: share}})
        plan = {"tasks": "a,b,c,d,e", "seeds": 2, "train_rows": 9, "suggest_rows": 4, "shots": "2"}
        cells = itertools.product(names, names)
        rates = [{"method": f"z of {source}", "task": task, "rows": 9, "chosen": 0.5} for source, task in cells]
        return {"plan": plan, "learning rates": rates, "runs": runs}

    def spearman(a: Any, b: Any) -> list[float]:
        pairs = [[[row[i, j] for j in range(5) if j != i] for row in (a, b)] for i in range(5)]
        return [float(spearmanr(*pair).statistic) for pair in pairs]

    same = dict(zip(names, names, strict=True))
    found = script.correlation(told([0, 1], same), script.DEFAULT)
    expected = spearman(shares.mean(0), scores.mean(0))
    assert list(found["by target"].values()) == pytest.approx(expected)
    assert found["pooled"] == pytest.approx(np.mean(expected))
    assert found["by seed"] == pytest.approx([np.mean(spearman(shares[seed], scores[seed])) for seed in (0, 1)])
    assert found["pairs"] == 20
    renamed = (dict(zip(names, order, strict=True)) for order in itertools.permutations(names))
    others = [script.ranks_within(told([0], name), script.DEFAULT, [0]) for name in renamed]
    values = [float((a * b).sum()) / 25 for a, b in others]  # five targets, each with a sum of squares of 5
    one = script.correlation(told([0], same), script.DEFAULT)
    assert one["pooled"] == pytest.approx(values[0])
    assert one["p"] == pytest.approx(np.mean(np.array(values) >= values[0] - 1e-9))

    scored = script.scores_of(told([0, 1], same))
    best = names[int(np.argmax([*shares[1, 4, :4]]))]
    assert scored[script.SUGGESTED, "e", 9, 1] == scored[f"z of {best}", "e", 9, 1] != 700.0


def test_what_a_target_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """No basis but the diagonal's has seen the target, and fewer rows are among more."""
    script = importlib.import_module("transfer")
    plan = script.Plan(tasks="sst2,mrpc,qnli,rte")
    ranking = {"shares": {script.DEFAULT: {"sst2": 0.1, "mrpc": 0.3, "rte": 0.2}}}
    results = {script.Run("suggest", 0.0, "qnli", rows, 1): ranking for rows in (100, 300)}
    cell = "z of mrpc", "qnli", 100
    known = list(script.cells(plan, script.METHODS, 1, results))
    assert cell in known
    assert known.count(None) == 3 * 3  # other targets have no ranking yet
    searched = script.runs_of(cell, 1, results)
    assert [(run.rate, run.seed) for run in searched] == [(0.013, 0), (0.04, 0), (0.12, 0)]
    results |= {run: {"choice": 0.5 - abs(run.rate - 0.04)} for run in searched}
    assert script.runs_of(cell, 1, results) == [script.Run("z of mrpc", 0.04, "qnli", 100, 1)]
    found = [script.Run(method, 0.1, task, rows, 1) for method, task, rows in filter(None, known) if task == "qnli"]
    for run in found:
        expected = {"suggest": 3, script.UNIFIED: 3}.get(run.method, int(run.method.startswith("z of")))
        assert len(set(script.sources(plan, run))) == expected
        assert ("qnli" in script.sources(plan, run)) == (run.method == "z of qnli")
    train = datasets.Dataset.from_dict({"id": list(range(1000))})
    rows = Prepared("a", get_task("qnli"), None, train, train)

    def seen(count: int, seed: int) -> set[int]:
        return set(script.drawn(rows, script.Run("full", 0.1, "qnli", count, seed)).train["id"])

    assert seen(100, 1) < seen(300, 1)
    assert seen(100, 1) != seen(100, 2)


def test_a_regression_starts_at_the_mean_of_the_rows_it_sees(
    model_folder: Path, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, transfer = importlib.import_module("study"), importlib.import_module("transfer")
    plan = study.Plan(model=str(model_folder), train_rows=40, choice_rows=20, max_length=16)
    rows, to_choose = study.rows_of(plan, "stsb", glue)
    train, choice = rows.train, to_choose.validation
    assert study.start_of(plan, rows, 0).classifier.bias.item() == pytest.approx(np.mean(train["labels"]))
    assert study.start_of(replace(plan, regression_start="zero"), rows, 0).classifier.bias.item() == 0
    few = transfer.drawn(rows, transfer.Run("full", 0.1, "stsb", 7, 0))
    means = [np.mean(part["labels"]) for part in (few.train, train, choice)]
    assert len(set(means)) == 3
    assert study.start_of(plan, few, 0).classifier.bias.item() == pytest.approx(means[0])


@pytest.mark.parametrize("name", ["adapters", "density", "language", "optimizers", "straightness", "transfer"])
def test_committed_results_are_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the script as it is now."""
    told = importlib.import_module(name).tables(read_json(ROOT / "docs" / "results" / f"{name}.json"))
    assert told.count("\n") > 5
    assert all(len(line.split("|")) > 3 for line in told.splitlines() if line.startswith("|"))


def test_transfer_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in any order, two seeds that suggest other sources: all is scheduled, and each run once."""
    script = importlib.import_module("transfer")
    plan, rng = script.Plan(tasks="sst2,mrpc,qnli", shots="100"), np.random.default_rng(0)
    results: dict[Any, dict[str, Any]] = {}
    while True:
        runs, complete = script.schedule(plan, script.METHODS, 2, results)
        left = [run for run in runs if run not in results]
        assert complete == (not left)
        if complete:
            break
        run = left[rng.integers(len(left))]
        others = [task for task in plan.names if task != run.task]
        shares = {script.DEFAULT: dict(zip(others, rng.random(2), strict=True))}
        results[run] = {"shares": shares} if run.method == "suggest" else {"choice": rng.random()}
    for seed, task, rows in itertools.product(range(2), plan.names, plan.sizes):
        ranking = results[script.Run("suggest", 0.0, task, min(rows, plan.suggest_rows), seed)]
        cell = f"z of {script.first(ranking)}", task, rows
        best = script.best_rate(script.choice_scores(cell, results))
        assert script.Run(cell[0], best, task, rows, seed) in results


def test_optimizers(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    """Every method spends no more than it may; the rates are those of the lowest loss on the rows to choose by."""
    script = importlib.import_module("optimizers")
    plan = ["--run", *SMALL, "--z-rows", 8, "--passes", 3, "--validation-rows", 16, "--max-length", 16, "--seeds", 1]
    paths = ["--model", model_folder, "--data", glue, "--output", tmp_path / "runs", "--json", tmp_path / "found.json"]
    run("optimizers.py", *plan, *paths, "--tasks", "sst2")
    content = read_json(tmp_path / "found.json")
    assert content["plan"]["limit"] == 3 * 3 * 8
    of = {method: [run for run in content["runs"] if run["method"] == method] for method in script.METHODS}
    (start,) = of[script.START]
    assert start["passes"] == start["trained"] == 0
    for method, runs in of.items():
        rates = content["learning rates"]["sst2"].get(method)
        best = min(runs, key=lambda run: (run["choice loss"], run["rate"]))
        assert rates is None or rates["chosen"] == best["rate"]
        for one in runs:
            assert 0 <= one["passes"] <= 72
            assert one["passes"] > 72 - 2 * 3 * 8 or method in (script.FULL, script.START)
    for method in (script.LBFGS, script.NEWTON):
        (one,), (early,) = of[method], of[method + script.EARLY]
        assert one["loss"] < start["loss"]
        assert early["choice loss"] <= min(one["choice loss"], start["choice loss"])
    assert of[script.MEZO][0]["trained"] == 2 * (4 * (16 * 16 + 16) + 16 * 32 + 32 + 32 * 16 + 16 + 4 * 16)
    assert len(check_claims(tmp_path / "found.json")) == 16
    assert run("optimizers.py", "--render", "--json", tmp_path / "found.json").count("| ") > 11


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Every method on a miniature; the network's directions and a layer's span the same where both have all points."""
    script = importlib.import_module("language")
    sizes = {"train_rows": 16, "validation_rows": 8, "steps": 4}
    spec = replace(script.SPECS[kind], **sizes, centres=dict.fromkeys(script.METHODS[1:], 0.01))
    monkeypatch.setattr(script, "SPECS", {kind: spec})
    folder = tmp_path / "models" / kind
    model_of(spec.type).save_pretrained(folder / "model")
    tokenizer(encoder_decoder=kind != "decoder").save_pretrained(folder / "model")
    (folder / "rows").mkdir()
    for split in ("train", "validation"):
        reviews(24, 1).to_json(folder / "rows" / f"{split}.jsonl", orient="records", lines=True)
    words = ["--run", "--tasks", kind, "--seeds", 1, "--points", 4, "--rank", 4, "--choice-rows", 8, "--max-length", 8]
    words += ["--max-target-length", 4]
    paths = ["--models", tmp_path / "models", "--output", tmp_path / "runs", "--json", tmp_path / "found.json"]
    monkeypatch.setattr(script, "RANKS", (1, 2, 4))
    monkeypatch.setattr(sys, "argv", ["language.py", *map(str, [*words, *paths])])
    script.main()
    content = read_json(tmp_path / "found.json")
    runs = {method: next(script.of_method(content, kind, method)) for method in script.METHODS}
    assert all(runs.values())
    blocks = 2 if kind == "decoder" else 4
    assert [runs[f"intrinsic{one}"]["trained"] for one in ("", script.GLOBAL)] == [4 * blocks, 4]
    assert 1 < runs["full"]["score"] < runs["theta_0"]["score"]
    whole = runs["intrinsic"]["whole"]
    assert whole["angles"][-1][1] < 0.1 < whole["angles"][-1][2]
    assert 0 < whole["share"] <= 1 + 1e-6
    assert "| full |" in script.tables(content)
    assert script.figure(content).axes[0].get_title() == kind


@pytest.mark.slow
def test_transfer_with_all_methods(
    tmp_path: Path, model_folder: Path, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, listed = importlib.import_module("transfer"), set[str]()
    cells = script.Transfer.cells

    def noted(study: Any) -> list[Any]:
        runs: list[Any] = cells(study)
        listed.update(run.name for run in runs)
        return runs

    monkeypatch.setattr(script.Transfer, "cells", noted)  # in this process, which tells; workers are others
    plan = ["--run", *FEW, "--model", model_folder, "--data", glue, "--workers", 2]
    transfer(tmp_path, *plan, "--seeds", 1)
    first = made(tmp_path)
    told, new = runs_told(transfer(tmp_path, *plan, "--seeds", 2)), made(tmp_path).keys() - first.keys()
    assert told == new & listed  # results may ask for a run and make it unnecessary between two looks at the folder
    assert first.items() <= made(tmp_path).items()
    assert not any(b"diverged" in held for held in made(tmp_path).values())
    assert len(check_claims(tmp_path / "found.json")) == 2 + 5 + 2 * 9
    lines = transfer(tmp_path, "--render", "--images", tmp_path).splitlines()
    methods = ["z, suggested", "z, unified", "z, random", "LoRA r = 8", "full", "freeze"]
    assert [line.split("|")[1].strip() for line in lines[2:8]] == methods
    assert (tmp_path / "transfer.png").stat().st_size > 10_000


def test_combined_decoders(tmp_path: Path, glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two LoRAs of a decoder are trained, combined and scored on both texts; what is there is not made again."""
    script = importlib.import_module("combine")
    texts = {"sst2": (0, "{sentence}", "sentence"), "mrpc": (1, "{sentence1} and {sentence2}", "sentence2")}
    monkeypatch.setattr(script, "TEXTS", texts)
    monkeypatch.setattr(script, "DECODER", {"train": 8, "learn": 4, "choose": 6, "test": 8})
    model_of("causal-lm").save_pretrained(tmp_path / "models/decoder/model")
    tokenizer(encoder_decoder=False).save_pretrained(tmp_path / "models/decoder/model")
    words = ["--part", "decoders", "--seeds", "0,1", "--decoder-methods", "once,uniform-average,task-arithmetic"]
    words += ["--data", glue, "--models", tmp_path / "models", "--output", tmp_path / "runs"]
    run("combine.py", *words, "--json", tmp_path / "result.json")
    content = read_json(tmp_path / "result.json")
    summary = {entry["name"]: entry for entry in content["decoders"]["summary"]}
    assert [*summary] == ["base", "sst2", "mrpc", "average of all", "task-arithmetic"]
    for entry in summary.values():
        for seed in (0, 1):
            one, other, both = (entry[key]["values"][seed] for key in ("sst2", "mrpc", "geometric mean"))
            assert both == pytest.approx((one * other) ** 0.5)
            assert min(one, other) > 1
    monkeypatch.setattr(script, "open_sources", None)
    run("combine.py", *words, "--json", tmp_path / "again.json")
    assert read_json(tmp_path / "again.json")["decoders"] == content["decoders"]


def test_combined_tasks_and_their_cost(
    tmp_path: Path, model_folder: Path, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("combine")
    for name, value in (("MODEL", str(model_folder)), ("TASKS", ("sst2", "mrpc")), ("SIZES", (4,)), ("CANDIDATES", 6)):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "GRIDS", ("uniform-average",))
    monkeypatch.setattr(script, "STEPS", [(4, "once"), (4, script.REWRITTEN)])
    monkeypatch.setattr(script, "STEP_NAMES", {f"{method}-{size}": (size, method) for size, method in script.STEPS})
    words = ["--seeds", 0, "--train-rows", 24, "--new-rows", 24, "--choose-rows", 6, "--eval-rows", 8, "--rounds", 2]
    words += ["--data", glue, "--output", tmp_path / "runs", "--models", tmp_path, "--json", tmp_path / "result.json"]
    run("combine.py", "--part", "tasks", *words)
    run("combine.py", "--part", "cost", *words)
    content = read_json(tmp_path / "result.json")
    entries = {entry["method"]: entry for entry in content["tasks"]["entries"]}
    assert {*entries} == {script.OWN, "single", "uniform-average", script.REWRITTEN}
    assert entries[script.REWRITTEN]["making"] > 0
    assert entries[script.REWRITTEN]["passes"] >= 6 * 2 * 4
    cost = content["cost"]["encoders"]
    assert (cost["models"], cost["in place"]["bytes"], cost["in place"]["rounds"]) == (2, 0, 2)
    assert cost["written and loaded"]["bytes"] > 4 * cost["weights"]


def test_combined_steps_with_other_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    script = importlib.import_module("combine")
    for _ in range(2):
        script.same_plan(tmp_path / "runs", {"eval_rows": 8})
    with pytest.raises(SystemExit, match="give another --output"):
        script.same_plan(tmp_path / "runs", {"eval_rows": 9})


def test_combined_models_need_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("combine.py", "--part", "cost", "--output", tmp_path / "runs")
    assert "required: --data" in capsys.readouterr().err


def test_combined_tasks_without_their_own_models_have_no_share() -> None:
    """As after `--steps gradient-128` alone."""
    script = importlib.import_module("combine")
    learned = {"name": "learned per model", "method": "gradient", "rows": 128, "seed": 0, "mean": 0.6}
    (row,) = script.table_of([learned])
    assert (row["mean"], row["share"]) == (0.6, {"mean": None, "half": None})
    own = {"name": script.OWN, "method": script.OWN, "rows": None, "seed": 0, "mean": 0.8}
    assert script.table_of([own, learned])[1]["share"]["mean"] == pytest.approx(0.75)


def test_combined_checkpoints_are_averaged_over_seeds() -> None:
    script = importlib.import_module("combine")
    runs = [
        {
            "task": "sst2",
            "seed": seed,
            "length": "whole",
            "decayed": 0.8 + 0.1 * seed,
            "chosen": "average of the last 2",
            "candidates": [
                {"name": "a", "method": "single", "learned": 0, "choose": 0.9, "test": 0.5},
                {"name": "b", "method": "single", "learned": 0, "choose": 0.7, "test": 0.6 + seed},
                {"name": "average of the last 2", "method": "tail-average", "learned": 0, "choose": 0.6, "test": 0.7},
                {"name": "average of the last 4", "method": "tail-average", "learned": 0, "choose": 0.8, "test": 0.4},
                {"name": "learned per model", "method": "gradient", "learned": 2, "choose": 0.8, "test": 0.3},
            ],
        }
        for seed in (0, 1)
    ]
    means = {entry["name"]: entry["values"] for entry in script.table_of_runs(runs)}
    assert means.pop("decayed run") == pytest.approx([0.8, 0.9])
    assert means == {
        "last point": [0.6, 1.6],
        "single": [0.5, 0.5],
        "chosen": [0.7, 0.7],
        "tail-average": [0.4, 0.4],
        "learned per model": [0.3, 0.3],
    }


def test_the_straightness_of_a_path(tmp_path: Path) -> None:
    """Of a path by hand: 3 to the right, 4 up, and back to the right, with distance 5 after a length of 7."""
    path = importlib.import_module("straightness")
    model = torch.nn.Linear(2, 1)
    recorder = TrajectoryRecorder(model, by_pattern(model, {"moves": "weight", "stays": "bias"}), tmp_path / "run")
    for step, move in enumerate(([3.0, 0.0], [0.0, 4.0])):
        with torch.no_grad():
            model.weight += torch.tensor([move])
        recorder.record(step)
    found = path.measured(recorder.trajectory())
    assert found["straightness"] == pytest.approx(5 / 7)
    first = torch.linalg.svdvals(torch.tensor([[3.0, 0.0], [3.0, 4.0]]).double()).square()
    assert found["explained"] == pytest.approx({"1": float(first[0] / first.sum()), "2": 1.0})
    runs = {f"hash {seed}": {"model": "minilm", "task": "sst2", "epochs": 3, "seed": seed, **found} for seed in (1, 0)}
    assert [run["seed"] for run in path.of(runs, "sst2", 3)] == [0, 1]
    assert "| sst2 | 3 | 2 | 0.71 ± 0.00 |" in path.tables({"runs": runs})
    runs["of another model"] = {"model": "base", "task": "sst2", "epochs": 3, "seed": 0, **found, "straightness": 0.5}
    both = path.tables({"runs": runs})
    assert "| sst2 | 3 | 2 | 0.71 ± 0.00 |" in both
    assert "| base: sst2 | 3 | 1 | 0.50 |" in both


def test_more_seeds_of_the_defaults_are_added_to_a_sound_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = importlib.import_module("defaults")
    monkeypatch.setattr(defaults, "rows_for_choosing", lambda: None)
    monkeypatch.setattr(defaults, "one_seed", lambda seed, prepared: {defaults.REFERENCE: 0.5, "freeze": 0.25 + seed})
    for seeds in (1, 2, 3):
        monkeypatch.setattr("sys.argv", ["defaults.py", "--seeds", str(seeds), "--json", str(tmp_path / "found.json")])
        defaults.main()
        assert [*read_json(tmp_path / "found.json")["seeds"]] == ["0", "1", "2"][:seeds]

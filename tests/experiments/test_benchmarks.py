"""Every benchmark runs in its smallest form and says what it claims; never how long it took."""

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pandas as pd
import pytest

from tinyspan.errors import InputError, TinyspanError
from tinyspan.folders import Busy
from tinyspan.storage import read_json

ROOT = Path(__file__).parents[2]


def run(script: str, *words: object) -> str:
    """Run a benchmark and return what it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_claims(path: Path) -> list[dict[str, object]]:
    content = read_json(path)
    assert {"claims", "hardware", "versions"} <= content.keys()
    for claim in content["claims"]:
        assert {"name", "value", "target", "holds"} <= claim.keys()
        assert isinstance(claim["holds"], bool)
        assert isinstance(claim["value"], int | float)
    found: list[dict[str, object]] = content["claims"]
    return found


def test_discovery(tmp_path: Path) -> None:
    run("discovery.py", "--size", 70_000, "--blocks", 1, "--runs", 1, "--json", tmp_path / "found.json")
    assert len(check_claims(tmp_path / "found.json")) >= 7


@pytest.mark.slow
def test_recording(tmp_path: Path) -> None:
    run("recording.py", "--steps", 1, "--rounds", 1, "--points", 9, "--json", tmp_path / "found.json")
    assert [claim["target"] for claim in check_claims(tmp_path / "found.json")] == [0.03, 0.03, 0.51]


def test_step(tmp_path: Path, model_folder: Path, data_folder: Path) -> None:
    methods = "full;ours, sparse 1 %, float32"
    plan = ["--model", model_folder, "--task", "sst2", "--data", data_folder, "--max-length", 16, "--rank", 2]
    out = run("step.py", *plan, "--methods", methods, "--steps", 1, "--rounds", 1, "--json", tmp_path / "found.json")
    assert [claim["target"] for claim in check_claims(tmp_path / "found.json")] == [0.9, 0.6]
    found = read_json(tmp_path / "found.json")["methods"]
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:] == list(found)
    assert found["full"]["time over full"] == 1
    of_blocks = 2 * (4 * (16 * 16 + 16) + 16 * 32 + 32 + 32 * 16 + 16 + 4 * 16)
    assert found["ours, sparse 1 %, float32"]["basis"] == (4 * 2 + 4) * 2 * round(0.01 * of_blocks / 2)
    assert found["full"]["operations"] == 6 * 2 * (4 * 16 * 16 + 2 * 16 * 32) * 32 * 7  # tokens


@pytest.mark.slow
def test_step_with_all_methods(tmp_path: Path, model_folder: Path, data_folder: Path) -> None:
    plan = ["--model", model_folder, "--task", "sst2", "--data", data_folder, "--max-length", 16, "--rank", 2]
    run("step.py", *plan, "--quick", "--autocast", "--json", tmp_path / "found.json")
    assert len(check_claims(tmp_path / "found.json")) == 10
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
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("study")
    monkeypatch.setattr(study, "POLL", 0.0)
    reasons = [Busy("another process records it"), TinyspanError("the loss is NaN"), InputError("no data")]

    def make(run: object) -> dict[str, object]:
        raise reasons.pop(0)

    run = make_dataclass("Run", ["name"], frozen=True)("one")
    study.work(tmp_path, lambda: ([run], True), make, lambda: None)
    assert read_json(tmp_path / "runs/one/run.json") == {"name": "one", "diverged": "the loss is NaN"}
    with pytest.raises(InputError):
        study.work(tmp_path / "other", lambda: ([run], True), make, lambda: None)


def density(folder: Path, *words: object) -> str:
    return run("density.py", "--output", folder / "runs", "--json", folder / "found.json", *words)


def made(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (folder / "runs" / "runs").glob("*/run.json")}


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
    assert {line.split(":")[0] for line in told.splitlines()} == made(tmp_path).keys() - first.keys()
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
    assert "its own directions" in adapters("--render")

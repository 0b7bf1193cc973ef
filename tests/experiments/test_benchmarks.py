"""Every benchmark runs in its smallest form and says what it claims; never how long it took."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

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


def test_step(tmp_path: Path, model_folder: Path, data_folder: Path) -> None:
    methods = "full;ours, dense, float32;ours, sparse 1 %, float32;VeRA"
    plan = ["--model", model_folder, "--task", "sst2", "--data", data_folder, "--max-length", 16, "--rank", 2]
    out = run("step.py", *plan, "--methods", methods, "--steps", 1, "--rounds", 1, "--json", tmp_path / "found.json")
    assert [claim["target"] for claim in check_claims(tmp_path / "found.json")] == [1.25, 0.9, 0.6, 0.6]
    found = read_json(tmp_path / "found.json")["methods"]
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:] == list(found)
    assert found["full"]["time over full"] == 1
    of_blocks = 2 * (4 * (16 * 16 + 16) + 16 * 32 + 32 + 32 * 16 + 16 + 4 * 16)
    assert found["ours, dense, float32"]["basis"] == 4 * 2 * of_blocks
    assert found["ours, sparse 1 %, float32"]["basis"] == (4 * 2 + 4) * 2 * round(0.01 * of_blocks / 2)
    assert found["full"]["operations"] * 2 == found["VeRA"]["operations"] * 3


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


def density(folder: Path, *words: object) -> str:
    return run("density.py", "--output", folder / "runs", "--json", folder / "found.json", *words)


def made(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "runs" / "runs").glob("*/run.json")}


def test_density(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    """Finished runs are not made again, and a trajectory that was taken away is recorded again when it is needed."""
    plan = ["--run", *SMALL, "--model", model_folder, "--data", glue, "--max-length", 16, "--tasks", "sst2"]
    density(tmp_path, *plan, "--methods", "full;freeze", "--seeds", 1)
    first = {name: (tmp_path / "runs" / "runs" / name / "run.json").read_bytes() for name in made(tmp_path)}
    assert len(first) in (12, 16, 20)  # three rates of two methods on two tasks, and up to two more rates
    assert list((tmp_path / "runs" / "trajectories").iterdir()) == []
    told = density(tmp_path, *plan, "--methods", "full;freeze;1 %", "--seeds", 2)
    assert {line.split(":")[0] for line in told.splitlines()} == made(tmp_path) - first.keys()
    for name, content in first.items():
        assert (tmp_path / "runs" / "runs" / name / "run.json").read_bytes() == content
    content = read_json(tmp_path / "found.json")
    assert content["learning rates"].keys() == {"full", "freeze", "1 %"}
    for method, found in content["learning rates"].items():
        scores = dict(map(tuple, found["choice scores"]))
        assert scores[found["chosen"]] == max(scores.values()), method
    claim = next(claim for claim in check_claims(tmp_path / "found.json") if "full is above 1 %" in str(claim["name"]))
    final = {(run["method"], run["seed"], run["rate"]): run for run in content["runs"] if run["task"] == "sst2"}
    scores = [
        [final[method, seed, content["learning rates"][method]["chosen"]]["score"] for seed in (0, 1)]
        for method in ("full", "1 %")
    ]
    assert claim["value"] == pytest.approx(50 * (sum(scores[0]) - sum(scores[1])))
    table = density(tmp_path, "--render", "--images", tmp_path)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == ["full", "freeze", "1 %"]
    assert (tmp_path / "density.png").stat().st_size > 10_000


@pytest.mark.slow
def test_density_with_all_methods(tmp_path: Path, model_folder: Path, glue: Path) -> None:
    plan = ["--run", *SMALL, "--model", model_folder, "--data", glue, "--max-length", 16]
    density(tmp_path, *plan, "--workers", 2, "--tasks", "sst2,mrpc", "--seeds", 2)
    assert len(check_claims(tmp_path / "found.json")) == 21
    assert len(density(tmp_path, "--render").splitlines()) == 2 + 17 + 21

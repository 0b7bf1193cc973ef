"""The command line on a full disk: exit code 1 and one clear sentence, whatever file it is that does not fit."""

import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from disks import PAGE, fill, resize, small_disk
from matplotlib.figure import Figure
from rich.console import Console

from tinyspan import Basis, StorageError, Trajectory
from tinyspan.io.storage import read_json
from tinyspan.lab import figures, scheduler
from tinyspan.lab.demo import Plan, run_demo
from tinyspan.trajectories import recorder as recording
from tinyspan.workflows import runs
from tinyspan.workflows.progress import Display

pytestmark = pytest.mark.studies

FULL = r"(\S+) could not be written: the disk or quota is full \([\d,]+ bytes are free there\)\. .*; make room .*"
Sizes = Callable[..., list[str]]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture
def until_it_fits(run: Any) -> Sizes:
    """Call a command on a disk of `start` pages, and of `step` more each time; return which files did not fit."""

    def call(disk: Path, *words: object, start: int = 1, step: int = 1) -> list[str]:
        failed: list[str] = []
        for pages in range(start, 1000, step):
            resize(disk, pages)
            code, out, err = run(*words)
            if code == 0:
                return failed
            told = re.fullmatch(f"tinyspan: {FULL}", last_line(err))
            assert (code, out, told is None) == (1, "", False), err
            assert "Traceback" not in err
            assert told is not None
            failed.append(str(Path(told[1]).relative_to(disk)))
        raise AssertionError(f"it never fitted: {failed}")

    return call


def test_every_command_that_writes(until_it_fits: Sizes, run: Any, quick: list[object], tmp_path: Path) -> None:
    full = tmp_path / "full"
    assert run("record", *quick, "--output", full)[0] == 0
    with small_disk(tmp_path / "disk", 1) as disk:
        failed = until_it_fits(disk, "discover", full, "--rank", 2, "--output", disk / "basis", step=2)
        assert {"basis/block-000.safetensors", "basis/block-001.safetensors"} <= set(failed)
        assert Basis.from_pretrained(disk / "basis").rank == 2
        words = ["tune", *quick, "--basis", disk / "basis", "--overwrite", "--output", disk / "adapter"]
        assert until_it_fits(disk, *words, start=shutil.disk_usage(disk).used // PAGE + 1, step=6)
        fill(disk)
        words = ["evaluate", *quick[:6], "--adapter", disk / "adapter", "--output", disk / "scored"]
        code, out, err = run(*words)
        assert (code, out, re.fullmatch(f"tinyspan: {FULL}", last_line(err)) is None) == (1, "", False)
        resize(disk, 999)
        assert run(*words)[0] == 0


def test_a_model_that_does_not_fit(
    run: Any, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trajectory fits, and what transformers and tokenizers write beside it does not; then the command goes on."""
    real = runs._save_model
    with small_disk(tmp_path / "disk", 999) as disk:

        def full(*arguments: Any) -> None:
            fill(disk)
            real(*arguments)

        words = ["record", *quick, "--every", 4, "--output", disk / "full"]
        monkeypatch.setattr(runs, "_save_model", full)
        code, out, err = run(*words)
        assert (code, out, re.fullmatch(f"tinyspan: {FULL}", last_line(err)) is None) == (1, "", False), err
        assert f"{disk}/full/model could not be written" in err
        assert not (disk / "full/model").exists()
        assert not (disk / "full/result.json").exists()
        assert len(Trajectory(disk / "full")) == 2
        (disk / "filler").unlink()
        monkeypatch.undo()
        code, _, err = run(*words)
        assert (code, "resumes at step 8 of 8" in err) == (0, True)


def test_figures_are_replaced_whole(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    with small_disk(tmp_path / "disk", 64) as disk:
        figures.save(figure, disk, "a")
        before = [(disk / name).read_bytes() for name in ("a.png", "a.svg")]
        fill(disk)
        with pytest.raises(StorageError, match=FULL):
            figures.save(Figure(), disk, "a")
        assert [(disk / name).read_bytes() for name in ("a.png", "a.svg")] == before
        assert sorted(path.name for path in disk.iterdir()) == ["a.png", "a.svg", "filler"]


def test_any_other_trouble_of_the_system_is_a_sentence(
    run: Any, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    code, out, err = run("tune", *quick, "--basis", "none", "--output", tmp_path / "a")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"tinyspan: {tmp_path}/nowhere/\S+: No such file or directory", last_line(err))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run begin though there is no room for it, as where a quota is full, which nobody can ask about."""
    monkeypatch.setattr(runs, "check_room", lambda *_: 0)
    monkeypatch.setattr(recording, "check_room", lambda *_: 0)


def suite_words(place: Path, model_folder: Path, glue_folder: Path, table: str) -> list[object]:
    suite = {"epochs": 1, "batch_size": 8, "points": 4, "rank": 3, "dimensions": [2, 3], "seeds": 1, "max_length": 16}
    suite |= {"models": {"tiny": str(model_folder)}, "tasks": ["sst2"]}
    (place / "suite.yaml").write_text(yaml.safe_dump(suite))
    return [table, "--suite", place / "suite.yaml", "--data", glue_folder]


def test_a_study_that_could_not_begin_begins_when_there_is_room(
    run: Any, model_folder: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        fill(disk)
        words = ["reproduce", *suite_words(tmp_path, model_folder, glue_folder, "table5"), "--output", disk / "study"]
        code, _, err = run(*words)
        assert (code, re.fullmatch(f"tinyspan: {FULL}", err.strip()) is None) == (1, False), err
        resize(disk, 9)
        monkeypatch.setattr(scheduler, "run_cells", lambda *_: None)  # it begins, and makes no cell
        code, _, err = run(*words)
        assert (code, "5 cells failed" in err) == (1, True), err
        assert (disk / "study/study.json").is_file()


def test_a_run_says_what_it_needs_and_does_not_begin_without(
    run: Any, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that has room for the half: refused in one sentence, and nothing is written."""
    words = ["record", *quick, "--every", 1, "--output"]
    code, _, err = run(*words, tmp_path / "whole")
    assert code == 0
    told = re.search(
        r"needs ([\d.]+) MB of disk, ([\d.]+) for 8 float32 points; [\d,]+ are free", " ".join(err.split())
    )
    assert told is not None, err
    names = ("manifest.json", "start.safetensors", "points.jsonl", "points/*")
    taken = sum(path.stat().st_size for name in names for path in (tmp_path / "whole").glob(name))
    assert 0.5 * float(told[2]) * 1e6 < taken <= float(told[2]) * 1e6 + 50_000 < float(told[1]) * 1e6
    with small_disk(tmp_path / "disk", 64) as disk:
        code, out, err = run(*words, disk / "run")
        assert (code, out) == (1, "")
        assert re.search(r"^tinyspan: \S+/disk/run has no room: it needs another [\d.]+ MB, and 0\.3 MB are", err, re.M)
        assert not (disk / "run").exists()
        resize(disk, 999)
        assert run(*words, disk / "run", "--dtype", "bfloat16")[0] == 0
        assert Trajectory(disk / "run").manifest.construction == {"dtype": "bfloat16"}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=400_000))
    assert run(*words, tmp_path / "other")[0] == 1
    assert run(*words, tmp_path / "whole", "--overwrite")[0] == 0  # what an earlier run takes becomes free
    assert Trajectory(tmp_path / "whole").steps == list(range(8))


@pytest.mark.slow
def test_record_at_every_size(until_it_fits: Sizes, quick: list[object], tmp_path: Path, blind: None) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        failed = until_it_fits(disk, "record", *quick, "--overwrite", "--output", disk / "full")
        parts = (
            "start.safetensors",
            "manifest.json",
            "points/000001.safetensors",
            "points.jsonl",
            "model",
        )
        assert {f"full/{part}" for part in parts} <= set(failed)
        # predictions are written twice before the result, which needs no more room than they do
        results = ("full/result.json", "full/predictions.jsonl", "full/unfinished/predictions.jsonl")
        assert any(name in failed for name in results)


@pytest.mark.slow
def test_the_demo(model_folder: Path, data_folder: Path, tmp_path: Path, blind: None) -> None:
    plan = Plan(str(model_folder), "sst2", data_folder, train_rows=64, rank=3, batch_size=16, learning_rate=3e-3)
    failed = []
    with small_disk(tmp_path / "disk", 1) as disk:
        for pages in range(1, 600, 60):
            resize(disk, pages)
            try:
                with Display(Console(file=io.StringIO())) as display:
                    results = run_demo(disk / "demo", display, overwrite=True, plan=plan)
            except StorageError as error:
                failed.append(str(error))
                assert not (disk / "demo/results.json").exists()
            else:
                assert read_json(disk / "demo/results.json")["results"] == json.loads(json.dumps(results))
                break
        assert len(failed) > 2
        assert all(re.fullmatch(FULL, told) for told in failed), failed


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_study(run: Any, model_folder: Path, glue_folder: Path, tmp_path: Path, workers: int, blind: None) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        words = ["reproduce", *suite_words(tmp_path, model_folder, glue_folder, "table5")]
        words += ["--output", disk / "study", "--workers", workers]
        for pages in range(1, 1000, 20 * workers**2):
            resize(disk, pages)
            code, _, err = run(*words)
            assert "Traceback" not in err
            if code == 0:
                break
            assert (code, "could not be written: the disk or quota is full" in err or workers > 1) == (1, True), err
        assert code == 0
        assert pages > 60
        assert len(list(disk.glob("study/tiny/sst2/*/seed-0/result.json"))) == 5
        assert "missing" not in (disk / "study/README.md").read_text()

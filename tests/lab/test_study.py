"""A miniature study through every table and figure: run, interrupt, resume, share, render."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyspan import InputError, StorageError, SubspaceModel, TinyspanError, Trajectory
from tinyspan.cli import app
from tinyspan.io.folders import HOLDER, Busy
from tinyspan.io.manifests import read_manifest, write_manifest
from tinyspan.io.storage import TEMPORARY, read_json, replacing, write_json
from tinyspan.lab import cells as cells_module
from tinyspan.lab import rendering, scheduler, tables
from tinyspan.lab.cells import Cell, Study
from tinyspan.lab.rendering import mean_cosine, render
from tinyspan.lab.reproduce import read_study, reproduce
from tinyspan.lab.suite import Suite
from tinyspan.lab.tables import TABLES, cells_of
from tinyspan.workflows.progress import Display
from tinyspan.workflows.runs import record

# the miniature predicts one number for every pair of STS-B, which is scored as 0 with a warning
pytestmark = [
    pytest.mark.studies,
    pytest.mark.filterwarnings("default:stsb. the 32 held-out predictions are all:UserWarning"),
]

TASKS = ("mrpc", "sst2", "stsb")
DISSECTIONS = ["table3", "table4", "figure4"]  # of one task: a dissection scores a model thirteen times
PAPERS = [table for table in TABLES if table not in ("dimension", *DISSECTIONS)]


def miniature(model_folder: Path, **changes: Any) -> Suite:
    content: dict[str, Any] = {
        "name": "miniature",
        "models": {"tiny": str(model_folder)},
        "tasks": TASKS,
        "seeds": 1,
        "train_rows": 48,
        "batch_size": 8,
        "max_length": 16,
        "epochs": 1,
        "points": 4,
        "rank": 3,
        "ensemble": 2,
        "init_std": 0.05,
        "learning_rate": 3e-3,
        "z_learning_rate": 3e-2,
        "dimensions": (2, 3),
    }
    return Suite.model_validate(content | changes)


def reproduce_all(folder: Path, model_folder: Path, glue_folder: Path) -> None:
    with Display() as display:
        reproduce(folder, PAPERS, miniature(model_folder), glue_folder, display)
        reproduce(folder, DISSECTIONS, miniature(model_folder, tasks=TASKS[:1]), glue_folder, display)


@pytest.fixture(scope="module")
def finished(model_folder: Path, glue_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every table of the paper; one trajectory a task is recorded for all of them, and no model outlives its cell."""
    folder, recorded = tmp_path_factory.mktemp("studies") / "whole", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells_module, "record", lambda *a, **k: recorded.append(a) or record(*a, **k))
        reproduce_all(folder, model_folder, glue_folder)
    assert len(recorded) == len(TASKS)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is SubspaceModel]
    return folder


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(path.parent.relative_to(folder)): json.loads(path.read_text())
        for path in sorted(folder.glob("*/*/*/seed-*/result.json"))
    }


def test_every_cell_of_every_table_has_its_result(finished: Path, model_folder: Path) -> None:
    found = results(finished)
    expected = cells_of(PAPERS, miniature(model_folder), lambda cell: None)
    expected |= cells_of(DISSECTIONS, miniature(model_folder, tasks=TASKS[:1]), lambda cell: None)
    assert set(found) == {str(cell.folder) for cell in expected}
    for cell, table in expected.items():
        result = found[str(cell.folder)]
        assert (result["suite"], result["table"], result["method"]) == ("miniature", table, cell.method)
        assert (result["model"], result["task"], result["seed"]) == ("tiny", cell.task, 0)
        assert str(model_folder) not in json.dumps(result)  # results are shared: no paths of a machine in them


def test_methods_are_what_they_say(finished: Path) -> None:
    found = results(finished)
    layers, ensemble = 2, 2
    numbers = {name.split("/")[2]: result["subspace_parameters"] for name, result in found.items() if "sst2" in name}
    assert numbers["freeze"] == numbers["full"] == 0
    assert numbers["intrinsic-k3-init"] == numbers["random-k3"] == numbers["flipped-k3-init"] == 3 * layers * ensemble
    assert numbers["inductive-of-mrpc-k3-init"] == 3 * layers * ensemble
    assert numbers["line-k1-init"] == layers * ensemble
    assert numbers["unified-of-mrpc+sst2+stsb-k3-init"] == 3 * layers * ensemble
    assert numbers["zero-shot-of-mrpc+stsb-k2-init"] == 2 * layers * ensemble
    full, freeze = (found[f"tiny/sst2/{method}/seed-0"] for method in ("full", "freeze"))
    assert full["ordinary_parameters"] > freeze["ordinary_parameters"] > 0
    basis = {name.split("/")[1] + " " + result["method"]: result["basis"] for name, result in found.items()}
    assert basis["sst2 inductive-of-mrpc-k3-init"] == basis["mrpc intrinsic-k3-init"]
    assert basis["sst2 flipped-k3-init"] not in (None, basis["sst2 intrinsic-k3-init"])
    assert basis["sst2 zero-shot-of-mrpc+stsb-k2-init"] != basis["mrpc zero-shot-of-sst2+stsb-k2-init"]
    # one basis serves all tasks of a unified cell, each task's own is another
    unified = {found[f"tiny/{task}/unified-of-mrpc+sst2+stsb-k3-init/seed-0"]["basis"] for task in TASKS}
    own = {found[f"tiny/{task}/intrinsic-k3-init/seed-0"]["basis"] for task in TASKS}
    assert len(unified) == 1
    assert len(own) == 3


@pytest.mark.usefixtures("own_constructor")
def test_a_constructor_of_ones_own_gets_a_row_in_table_1(model_folder: Path, glue_folder: Path, tmp_path: Path) -> None:
    suite, cell = miniature(model_folder, bases=("first",)), Cell("tiny", "sst2", "first", 0)
    assert (
        suite.settings_hash() == miniature(model_folder).settings_hash()
    )  # finished cells of other methods still belong to it
    assert cell in cells_of(["table1"], suite, lambda cell: None)
    with Display() as display:
        study = Study(tmp_path, suite, glue_folder, display, lambda known: {cell: "table1"})
        study.run(cell)
    assert study.results[cell].keys() == {"score", "metric"}  # of thousands of cells no more is kept in memory
    result = results(tmp_path)[str(cell.folder)]
    assert (result["method"], result["subspace_parameters"]) == (
        "first",
        4,
    )  # in each of two layers one number for each of two members
    assert "first" in tables.table1_methods(suite)
    with pytest.raises(ValueError, match="unknown basis 'nothing'; expected some of empty, fastfood"):
        miniature(model_folder, bases=("nothing",))


def test_the_dissected_model_is_the_tuned_one(finished: Path) -> None:
    found = results(finished)
    for update, method in (("intrinsic-init", "intrinsic-k3-init"), ("full", "full"), ("random", "random-k3")):
        dissected = found[f"tiny/mrpc/outliers-of-{update}/seed-0"]
        tuned = found[f"tiny/mrpc/{method}/seed-0"]["score"]
        assert dissected["score"] == pytest.approx(tuned, rel=1e-12)  # other threads may add up in another order
        assert dissected["outliers"]["scores"]["intact"] == dissected["score"]


def test_the_outliers_of_the_update_in_z_are_disabled_in_the_full_model_too(
    finished: Path, model_folder: Path, glue_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def dissect(model: Any, partition: Any, start: Any, update: Any, score: Any, **options: Any) -> dict[str, Any]:
        weights = {block.name: block.flatten(partition.select(model)) - start[block.name] for block in partition}
        calls.append({"weights": weights, "update": update, **options})
        return {"scores": {}}

    monkeypatch.setattr(cells_module, "dissect", dissect)
    cell = Cell("tiny", "mrpc", "outliers", 0, None, "init", "intrinsic")
    study = Study(finished, miniature(model_folder), glue_folder, Display(), lambda known: {})
    study._dissect(cell)
    tuned, full = calls
    trajectory = Trajectory(finished / "shared/tiny/mrpc/full/seed-0")
    for block in trajectory.partition:
        assert torch.equal(full["update"][block.name], trajectory.delta(block))
        assert torch.equal(full["judged"][block.name], tuned["update"][block.name])
        assert torch.equal(tuned["judged"][block.name], tuned["update"][block.name])
        assert not torch.equal(full["judged"][block.name], full["update"][block.name])
        for call in calls:
            torch.testing.assert_close(call["update"][block.name], call["weights"][block.name], rtol=0, atol=1e-6)


def test_d90(
    finished: Path, model_folder: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FAMILIES", {"intrinsic": (1, 0), "random": (1, 2), "did": (4, 8), "said": (4, 8)})
    monkeypatch.setattr(tables, "REACHED", 0.999)
    monkeypatch.setattr(rendering, "REACHED", 0.999)
    changes = {"epochs": 8, "batch_size": 16, "train_rows": None, "ensemble": 4, "learning_rate": 1e-2}
    folder, suite = tmp_path / "d90", miniature(model_folder, tasks=TASKS[1:2], **changes)
    with Display() as display:
        reproduce(folder, ["dimension"], suite, glue_folder, display)
    found = {name.split("/")[2]: result for name, result in results(folder).items()}
    full = found["full"]["score"]
    assert found["freeze-frozen-embeddings"]["score"] < full
    assert found["did-k4-frozen-embeddings"]["subspace_parameters"] == 4
    assert found["said-k4-frozen-embeddings"]["subspace_parameters"] == 4 + 2  # and a scale for each of two layers
    assert found["random-k1-frozen-embeddings"]["subspace_parameters"] == 2
    heads = {result["ordinary_parameters"] for name, result in found.items() if name != "full"}
    assert len(heads) == 1  # the head alone
    assert [path.name for path in (folder / "shared/tiny/sst2").glob("full*")] == ["full"]  # one run for all cells
    page = render(folder).read_text()
    for family, kind in (("intrinsic, layer", "intrinsic"), ("DID", "did"), ("SAID", "said")):
        numbers = {"intrinsic": 2, "did": 1, "said": 1}[kind], {"said": 2}.get(kind, 0)  # k L, k, k + L
        tried = {r["rank"] * numbers[0] + numbers[1]: r["score"] for r in found.values() if r["kind"] == kind}
        reaching = [number for number, score in tried.items() if score >= 0.999 * full]
        expected = str(min(reaching)) if reaching else f"above {max(tried)}"
        assert f"| {expected} |" in next(line for line in page.splitlines() if line.startswith(f"| {family}"))
    assert (folder / "figures/d90-tiny-sst2.png").is_file()
    # a search that has not come to its end says so
    shutil.rmtree(folder / "tiny/sst2/did-k4-frozen-embeddings")
    page = render(folder).read_text()
    assert "| missing |" in next(line for line in page.splitlines() if line.startswith("| DID"))


def test_nothing_is_made_twice(finished: Path, model_folder: Path, glue_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    reproduce_all(finished, model_folder, glue_folder)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")} == before


def test_rendering_needs_the_json_files_alone(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in [finished / "study.json", *finished.glob("*/*/*/seed-*/result.json")]:
        target = copy / path.relative_to(finished)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    page = render(copy).read_text()
    assert "missing" not in page
    assert "## d90" not in page  # it was not asked for
    for heading in ("Table 1", "Table 2", "Table 3", "Table 4", "Tables 5", "Figure 2", "Figure 3", "Figure 4"):
        assert f"## {heading}" in page
    for picture in page.split("](figures/")[1:]:
        assert (copy / "figures" / picture.split(")")[0]).stat().st_size > 1000
    scores = [result["score"] for name, result in results(copy).items() if "/full/" in name]
    assert f"{100 * sum(scores) / 3:.1f}" in page
    # a hand-computed share of full, drop, and change from intact
    found = {name.split("tiny/")[1][: -len("/seed-0")]: result for name, result in results(copy).items()}
    average = {kind: sum(found[f"{task}/{kind}"]["score"] for task in TASKS) for kind in ("full", "freeze")}
    row = next(line for line in page.splitlines() if line.startswith("| freeze"))
    assert row.endswith(f"| {100 * average['freeze'] / average['full']:.1f} |")
    drop = 100 * (found["mrpc/inductive-of-stsb-k3-init"]["score"] - found["mrpc/full"]["score"])
    figure2 = page[page.index("## Figure 2") :]
    assert next(line for line in figure2.splitlines() if line.startswith("| stsb")).split(" | ")[1] == f"{drop:+.1f}"
    scores3 = found["mrpc/outliers-of-full"]["outliers"]["scores"]
    assert "*Equal sum of squares*" in page
    assert page.count("| keep only equal sum of squares |") == 1
    row = next(line for line in page[page.index("### mrpc") :].splitlines() if line.startswith("| zero largest start"))
    assert row.split(" | ")[4] == f"{100 * (scores3['zero largest start'] - scores3['intact']):+.1f}"


def test_absent_cells_are_told_as_missing(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "tiny").mkdir(parents=True)
    shutil.copy(finished / "study.json", copy)
    page = render(copy).read_text()
    assert "0 of" in page
    assert page.count("missing") > 50
    shutil.copytree(finished / "tiny/mrpc/full", copy / "tiny/mrpc/full")
    row = next(line for line in render(copy).read_text().splitlines() if line.startswith("| full"))
    assert row.count("missing") == 4  # two tasks, the average and its share
    (copy / "tiny/mrpc/full/seed-0/result.json").write_text("{")
    with pytest.raises(StorageError, match=r"result\.json is damaged"):
        render(copy)


def test_an_interrupted_study_goes_on_to_the_same_results(
    finished: Path, model_folder: Path, glue_folder: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves is compared bit by bit in test_kill.py."""
    folder, recipe = tmp_path / "killed", tmp_path / "miniature.yaml"
    recipe.write_text(json.dumps(miniature(model_folder, tasks=TASKS[:2]).model_dump(mode="json")))
    command = ["reproduce", "table1", "--suite", recipe, "--data", glue_folder, "--output", folder]
    make = Study.make

    def three(study: Study, cell: Cell) -> dict[str, Any]:
        if len(results(folder)) == 3:
            raise KeyboardInterrupt
        return make(study, cell)

    monkeypatch.setattr(Study, "make", three)
    code, _, err = run(*command)
    assert (code, "keeps the finished cells" in err) == (128 + signal.SIGINT, True), err
    monkeypatch.undo()
    early = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/seed-*/result.json")}
    assert len(early) == 3
    code, out, err = run(*command)
    assert code == 0, err
    assert f"{len(early)} of them finished already" in err.replace("\n", " ")
    assert str(folder / "README.md") in out.replace("\n", "")
    assert {path: path.stat().st_mtime_ns for path in early} == early
    whole = results(finished)
    for name, result in results(folder).items():
        assert result["score"] == pytest.approx(whole[name]["score"], abs=1e-6), name
    assert len(results(folder)) == 12


def test_two_workers_share_the_cells(finished: Path, model_folder: Path, glue_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with Display() as display:
        reproduce(folder, ["table1"], miniature(model_folder, tasks=TASKS[:1]), glue_folder, display, workers=2)
    found, whole = results(folder), results(finished)
    assert len(found) == 6
    logs = [path.read_text() for path in (folder / "jobs").glob("*_log.err")]
    assert len([log for log in logs if "finished already" in log]) == 2
    for name, result in found.items():
        assert result["score"] == pytest.approx(whole[name]["score"], abs=1e-6)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are listed by Linux")
def test_workers_stop_with_a_study_that_was_started_in_the_background(
    model_folder: Path, glue_folder: Path, tmp_path: Path
) -> None:
    folder, recipe = tmp_path / "background", tmp_path / "miniature.yaml"
    recipe.write_text(json.dumps(miniature(model_folder, seeds=50).model_dump(mode="json")))
    command = [sys.executable, "-m", "tinyspan", "reproduce", "table1", "--suite", str(recipe), "--workers", "2"]
    command += ["--data", str(glue_folder), "--output", str(folder)]
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]  # as a shell starts `command &` in a script

    def workers() -> list[bytes]:
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                found.append(process.read_bytes())
        return [line for line in found if os.fsencode(folder / "jobs") in line]

    running = subprocess.Popen([*ignoring, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(results(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers()) >= 2
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM
    deadline = time.monotonic() + 30
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()


def test_a_cell_that_another_process_works_on_is_left_to_it(
    held: Callable[[Path], AbstractContextManager[Any]], finished: Path, model_folder: Path, glue_folder: Path
) -> None:
    cell = Cell("tiny", "mrpc", "freeze", 7)
    with Display() as display:
        study = Study(finished, miniature(model_folder), glue_folder, display, lambda known: {cell: "table1"})
    assert not study.running(cell)
    with held(finished / cell.folder):
        assert study.running(cell)
        with pytest.raises(Busy):
            study.run(cell)
    assert not study.running(cell)
    shutil.rmtree((finished / cell.folder).parent)


def test_a_failing_cell_is_told_and_the_others_are_made(
    model_folder: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(*_: Any) -> None:
        raise MemoryError("no signs [today]")

    held: list[bool] = []  # when the reason is written: another process, about to try the cell, sweeps before it begins

    def watched(path: Path) -> AbstractContextManager[Path]:
        held.append((path.parent / HOLDER).is_file())
        return replacing(path)

    monkeypatch.setattr(cells_module, "_flip_signs", flipped)
    monkeypatch.setattr(scheduler, "replacing", watched)
    suite = miniature(model_folder, tasks=TASKS[1:2])
    with Display() as display, pytest.raises(TinyspanError, match=r"1 cells failed(.|\n)*MemoryError: no signs .today"):
        reproduce(tmp_path / "s", ["table1"], suite, glue_folder, display)
    assert len(results(tmp_path / "s")) == 5
    assert held == [True]
    monkeypatch.undo()
    with Display() as display:
        reproduce(tmp_path / "s", ["table1"], suite, glue_folder, display)
    assert len(results(tmp_path / "s")) == 6


def test_a_study_from_before_regressions_started_at_their_mean_started_at_zero(finished: Path, tmp_path: Path) -> None:
    study = read_json(finished / "study.json", sealed=False)
    assert {suite.regression_start for suite in read_study(finished).values()} == {"mean"}
    for table in study["tables"].values():
        del table["regression_start"]
    write_json(tmp_path / "study.json", {"tables": study["tables"]})
    assert {suite.regression_start for suite in read_study(tmp_path).values()} == {"zero"}


def test_a_study_may_grow_but_not_change(finished: Path, model_folder: Path, glue_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    shutil.copy(finished / "study.json", folder)
    with Display() as display, pytest.raises(InputError, match="made with rank 3, this suite has 2"):
        reproduce(folder, ["table1"], miniature(model_folder, rank=2), glue_folder, display)
    assert read_study(folder)["table1"].rank == 3
    # another task and another seed are added to what is there
    grown = tmp_path / "grown"
    with Display() as display:
        reproduce(grown, ["table1"], miniature(model_folder, tasks=TASKS[:1]), glue_folder, display)
        reproduce(grown, ["table1"], miniature(model_folder, tasks=TASKS[1:2], seeds=2), glue_folder, display)
    known = read_study(grown)["table1"]
    assert (known.tasks, known.seeds) == (TASKS[:2], 2)
    assert "(1/2)" in render(grown).read_text()
    assert str(model_folder) not in (grown / "study.json").read_text()
    # each seed has its own head, rows and basis
    found = results(grown)
    for method in ("full", "freeze", "random-k3", "intrinsic-k3-init"):
        one, other = (found[f"tiny/sst2/{method}/seed-{seed}"] for seed in (0, 1))
        assert [result["settings"]["seed"] for result in (one, other)] == [0, 1]
        assert one["history"][0]["train_loss"] != other["history"][0]["train_loss"]
        assert (one["basis"] == other["basis"]) == (method in ("full", "freeze"))
    # the page has their mean and Student's interval of two scores 60 and 70
    for seed, score in enumerate((0.6, 0.7)):
        path = grown / f"tiny/sst2/freeze/seed-{seed}/result.json"
        write_json(path, {**read_json(path), "score": score})
    row = next(line for line in render(grown).read_text().splitlines() if line.startswith("| freeze"))
    assert row.split(" | ")[2] == f"65.0 ± {12.7062 * 50**0.5 / 2**0.5:.1f}"
    # a result of other settings that was copied in is noticed
    strange = grown / "tiny/mrpc/full/seed-0/result.json"
    write_json(strange, {**read_json(strange), "recipe": "x"})
    with Display() as display, pytest.raises(InputError, match="made with other settings"):
        reproduce(grown, ["table1"], miniature(model_folder, tasks=TASKS[:1]), glue_folder, display)


def test_a_folder_of_something_else_is_left_alone(model_folder: Path, glue_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with Display() as display, pytest.raises(InputError, match="something other than a study"):
        reproduce(tmp_path, ["table1"], miniature(model_folder), glue_folder, display)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_shared_parts_may_be_deleted_at_any_time(
    finished: Path, model_folder: Path, glue_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "shared/tiny/mrpc/intrinsic-k3-init/seed-0/basis")
    (copy / "tiny/mrpc/outliers-of-intrinsic-init/seed-0/result.json").unlink()
    with Display() as display:
        reproduce(copy, ["table3"], miniature(model_folder, tasks=TASKS[:1]), glue_folder, display)
    name = "tiny/mrpc/outliers-of-intrinsic-init/seed-0"
    assert results(copy)[name]["outliers"]["scores"] == results(finished)[name]["outliers"]["scores"]


def test_an_adapter_that_was_killed_before_its_last_write_is_made_again(
    finished: Path, model_folder: Path, glue_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    folder = copy / "shared/tiny/mrpc/intrinsic-k3-init/seed-0/adapter"
    whole, manifest = read_manifest(folder), read_manifest(folder)
    del manifest.attached["result.json"]
    write_manifest(folder, manifest)
    (folder / f".manifest.json.x{TEMPORARY}").write_text("{")
    (copy / "tiny/mrpc/outliers-of-intrinsic-init/seed-0/result.json").unlink()
    with Display() as display:
        reproduce(copy, ["table3"], miniature(model_folder), glue_folder, display)
    assert read_manifest(folder).attached.keys() == whole.attached.keys()
    assert not list(folder.glob(f".*{TEMPORARY}"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"points": 40, "epochs": 1}, "mrpc: 64 rows give 6 steps, too few for 40 points"),
        ({"tasks": ("rte",)}, "rte"),
        ({"models": {"tiny": "/nowhere"}}, "the model tiny could not be loaded"),
    ],
)
def test_bad_input_is_refused_before_any_training(
    model_folder: Path, glue_folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with Display() as display, pytest.raises(InputError, match=complaint):
        reproduce(tmp_path / "s", ["table1"], miniature(model_folder, **changes), glue_folder, display)
    assert not (tmp_path / "s").exists()
    with Display() as display, pytest.raises(InputError, match="unknown table 'table9'"):
        reproduce(tmp_path / "s", ["table9"], miniature(model_folder), glue_folder, display)


def test_mean_cosine_by_hand() -> None:
    first = {"a": [[1.0, 0.0], [0.0, 2.0]], "b": [[3.0, 4.0], [1.0, 1.0]]}
    second = {"a": [[1.0, 0.0], [1.0, 0.0]], "b": [[4.0, 3.0], [-1.0, -1.0]]}
    assert mean_cosine(first, second) == pytest.approx((1 + 0 + 24 / 25 - 1) / 4)


def test_the_command_line_lists_suites_and_refuses_what_is_no_study(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    runner = CliRunner()
    listed = runner.invoke(app, ["suites"])
    assert listed.exit_code == 0
    assert "small" in listed.stdout
    assert "rank: 32" in runner.invoke(app, ["suites", "small"]).stdout
    assert isinstance(runner.invoke(app, ["render", str(tmp_path)]).exception, InputError)


def test_the_cosine_of_a_z_that_did_not_move_is_zero() -> None:
    assert mean_cosine({"a": [[0.0, 0.0], [1.0, 0.0]]}, {"a": [[1.0, 0.0], [1.0, 0.0]]}) == 0.5


def test_no_table_holds_nan(finished: Path, tmp_path: Path) -> None:
    """A layer that stood still, a z that did not move, and a full run at chance: defined on the page, never NaN."""
    copy = shutil.copytree(finished, tmp_path / "s", ignore=shutil.ignore_patterns("shared"))

    def change(cell: str, **changes: Any) -> None:
        path = copy / "tiny" / cell / "seed-0/result.json"
        write_json(path, read_json(path) | changes)

    spectrum = results(copy)["tiny/sst2/intrinsic-k3-init/seed-0"]["spectrum"]
    still = dict.fromkeys(spectrum, [0.0] * 4) | {list(spectrum)[-1]: [2.0, 1.0, 0.0, 0.0]}
    change("sst2/intrinsic-k3-init", spectrum=still)
    unified = "unified-of-mrpc+sst2+stsb-k3-init"
    z = results(copy)[f"tiny/mrpc/{unified}/seed-0"]["z"]
    change(f"mrpc/{unified}", z={layer: [[0.0] * 3] for layer in z})
    for task in TASKS:
        change(f"{task}/full", score=0.0)
    with np.errstate(all="raise"):
        page = render(copy).read_text()
    assert "nan" not in page.lower()
    shares = page.split("Share of the sum of squares")[1]
    assert "| sst2 | 100.0 | 100.0 |" in shares  # of the layer that moves: 2^2 + 1^2 of 5 in two directions
    assert page.split("## Table 1")[1].split("\n\n")[1].count("undefined") == 6


def test_a_result_with_nan_in_it_is_damaged(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "s", ignore=shutil.ignore_patterns("shared"))
    path = copy / "tiny/sst2/full/seed-0/result.json"
    path.write_text(re.sub(r'"score": [\d.]+', '"score": NaN', path.read_text()))
    with pytest.raises(StorageError, match=r"seed-0/result\.json is damaged: ValueError NaN is not a number"):
        render(copy)

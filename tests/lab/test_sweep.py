"""Sweeps: the choice by rows that are set aside, resuming, settings that diverge, and several data sets."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tinyspan import InputError, StorageError, TinyspanError, by_layer, empty_basis, random_basis
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab import sweep as sweeps
from tinyspan.lab.scheduler import run_cells
from tinyspan.lab.sweep import Combination, Grid, SweepStudy, has_z, run_sweep, sweep_table, work
from tinyspan.workflows.progress import Display
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import evaluate
from tinyspan.workflows.settings import Settings, SubspaceOptions

pytestmark = pytest.mark.studies

SETTINGS = Settings(1, 16, precision="float32", set_aside=24)
GRID = Grid("random", SETTINGS, (1e-6, 3e-2), (1e-2,), ranks=(2,), seeds=2)


@pytest.fixture(scope="module")
def swept(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "out"
    run_sweep(folder, {"sst2": prepared}, GRID, Display())
    return folder


def scores_of(folder: Path, part: str = "set_aside") -> list[Any]:
    return [one.get(part, {}).get("scores") for one in read_json(folder / "result.json")["data"]["sst2"]["settings"]]


def test_the_best_setting_on_the_set_aside_rows_is_scored_on_the_others(swept: Path, prepared: Prepared) -> None:
    entry = read_json(swept / "result.json")["data"]["sst2"]
    chosen = [one for one in entry["settings"] if one["chosen"]]
    assert len(entry["settings"]) == 2
    assert [one["set_aside"]["mean"] for one in chosen] == [max(one["set_aside"]["mean"] for one in entry["settings"])]
    assert ["held_out" in one for one in entry["settings"]] == [one["chosen"] for one in entry["settings"]]
    for one in entry["settings"]:
        name = Combination(one["rank"], one["learning_rate"], one["z_learning_rate"]).name
        for seed in (0, 1):
            cell = read_json(swept / "sst2/set-aside" / name / f"seed-{seed}/result.json", sealed=False)
            assert cell["rows"] == {"train": 40, "validation": 24}
            assert cell["score"] == one["set_aside"]["scores"][seed]
            assert (cell["settings"]["learning_rate"], cell["seed"]) == (one["learning_rate"], seed)
            assert cell["settings"]["seed"] == seed
    for adapter, score in zip(entry["adapters"], chosen[0]["held_out"]["scores"], strict=True):
        assert read_json(swept / adapter / "result.json")["rows"] == {"train": 64, "validation": 32}
        assert evaluate(prepared, SETTINGS, swept / adapter)["score"] == score
    assert sorted(path.name for path in (swept / "sst2").iterdir()) == ["held-out", "set-aside"]
    assert len(list((swept / "sst2/held-out").iterdir())) == 1
    assert not list(swept.rglob("unfinished"))


def test_the_choice_by_hand(prepared: Prepared, tmp_path: Path) -> None:
    """The highest mean over the seeds, of a loss the lowest, and of equal ones the first."""
    scores = {1e-3: (0.25, 0.5), 1e-4: (0.5, 0.75), 1e-5: (0.625, 0.625), 1e-6: (0.0, 1.0)}
    grid = replace(GRID, settings=replace(SETTINGS, z_learning_rate=0.02), learning_rates=tuple(scores))
    losses = replace(prepared, task=replace(prepared.task, metric="log_loss"))
    for number, (rows, chosen) in enumerate(((prepared, 1e-4), (losses, 1e-3))):
        study = SweepStudy(tmp_path / str(number), {"sst2": rows}, grid, Display())
        for cell in study.cells():
            assert study.chosen("sst2") is None
            (study.folder / cell.folder).mkdir(parents=True)
            score = scores[cell.combination.learning_rate][cell.seed]
            write_json(study.folder / cell.folder / "result.json", {**cell.identity, "score": score})
        combination = study.chosen("sst2")
        assert combination is not None
        assert combination.learning_rate == chosen
        last = study.cells()[-2:]
        assert [(cell.combination, cell.part, cell.seed) for cell in last] == [
            (combination, "held-out", seed) for seed in (0, 1)
        ]
    settings = grid.run_settings(combination, 1)
    assert (settings.learning_rate, settings.seed, settings.set_aside) == (1e-3, 1, 0)
    assert settings.z_learning_rate == 1e-2 != grid.settings.z_learning_rate == 0.02


def test_a_folder_says_every_value_of_its_setting() -> None:
    assert Combination(4, 1e-3, 0.02).name == "rank-4-rate-0.001-z-rate-0.02"
    assert Combination(None, 1e-3, None).name == "rate-0.001"


def test_a_result_of_another_run_is_refused(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, {}, GRID, Display())
    cell, other = study.runs("sst2", GRID.combinations[0])
    (tmp_path / cell.folder).mkdir(parents=True)
    write_json(tmp_path / cell.folder / "result.json", {**other.identity, "score": 0.5})
    with pytest.raises(StorageError, match="belongs to another cell: seed 1, where this has 0"):
        study.results[cell]


def test_a_chosen_value_at_the_end_of_the_grid_is_told(tmp_path: Path) -> None:
    """Of a list with one value nothing is told."""
    grid = replace(GRID, learning_rates=(1e-5, 1e-4, 1e-3), z_learning_rates=(0.04, 0.01), ranks=(2,))
    study = SweepStudy(tmp_path, {}, grid, Display())
    for rate, z_rate, told in (
        (1e-4, 0.04, ["z_learning_rate, 0.04, is the largest"]),
        (1e-5, 0.01, ["learning_rate, 1e-05, is the smallest", "z_learning_rate, 0.01, is the smallest"]),
        (1e-3, 0.04, ["learning_rate, 0.001, is the largest", "z_learning_rate, 0.04, is the largest"]),
    ):
        notes = study._at_the_edge(Combination(2, rate, z_rate))
        assert [note.partition(" of the grid")[0] for note in notes] == [f"the chosen {words}" for words in told]


def test_a_basis_without_directions_has_no_z(tower: Any) -> None:
    partition = by_layer(tower)
    for basis, expected in (
        ("random", True),
        ("none", False),
        ("empty", False),
        (random_basis(partition, 1), True),
        (empty_basis(partition), False),
    ):
        assert has_z(basis) is expected


def test_only_a_loss_that_is_not_finite_is_a_divergence(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SweepStudy(tmp_path, {"sst2": prepared}, GRID, Display())
    cell = study.cells()[0]

    def make(error: Exception) -> dict[str, Any]:
        def fine_tune(*_: Any, **__: Any) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(sweeps, "fine_tune", fine_tune)
        return study.make(cell)

    assert make(TinyspanError("the loss is NaN"))["diverged"] == "the loss is NaN"
    with pytest.raises(StorageError, match="the disk is full"):
        make(StorageError("the disk is full"))


def test_every_run_has_the_options_of_the_grid(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "fine_tune", lambda model, *_, **__: {"score": 1.0, "found": model.ensemble})
    monkeypatch.setattr(sweeps, "tune", lambda *_, **given: {"score": 1.0, "found": (given["options"], given["rank"])})
    options = SubspaceOptions(ensemble=2)
    study = SweepStudy(tmp_path, {"sst2": prepared}, replace(GRID, options=options), Display())
    compared = study.cells()[0]
    assert study.make(compared)["found"] == 2
    assert study.make(replace(compared, part="held-out"))["found"] == (options, 2)


@pytest.mark.parametrize(
    ("changes", "metric", "difference"),
    [
        ({"options": SubspaceOptions(ensemble=2)}, "accuracy", r"options\.ensemble 1, where this has 2"),
        ({"settings": replace(SETTINGS, set_aside=8)}, "accuracy", "rows_set_aside 24, where this has 8"),
        ({}, "log_loss", r"sst2\.task_definition\.metric accuracy, where this has log_loss"),
    ],
)
def test_a_sweep_continues_with_its_own_settings_alone(
    prepared: Prepared, tmp_path: Path, changes: dict[str, Any], metric: str, difference: str
) -> None:
    sweeps._describe(tmp_path / "out", {"sst2": prepared}, GRID)
    rows = replace(prepared, task=replace(prepared.task, metric=metric))
    with pytest.raises(InputError, match=f"holds a sweep with {difference}"):
        sweeps._describe(tmp_path / "out", {"sst2": rows}, replace(GRID, **changes))


def test_held_out_labels_do_not_matter_for_the_choice(swept: Path, prepared: Prepared, tmp_path: Path) -> None:
    labels = [1 - label for label in prepared.validation["labels"]]
    flipped = replace(prepared, validation=prepared.validation.remove_columns("labels").add_column("labels", labels))
    run_sweep(tmp_path / "out", {"sst2": flipped}, GRID, Display())
    assert scores_of(tmp_path / "out") == scores_of(swept)
    for ours, theirs in zip(scores_of(tmp_path / "out", "held_out"), scores_of(swept, "held_out"), strict=True):
        assert ours == (None if theirs is None else pytest.approx([1 - score for score in theirs]))
    with pytest.raises(InputError, match=r"holds a sweep with sst2\.rows\.validation"):
        run_sweep(swept, {"sst2": flipped}, GRID, Display())


def test_an_interrupted_sweep_computes_what_is_missing(
    swept: Path, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = SweepStudy.make
    made: list[Any] = []

    def watched(study: SweepStudy, cell: Any) -> Any:
        if len(made) in (3, 6):  # in the middle of the comparison, and of the final runs
            made.append(None)
            raise KeyboardInterrupt
        made.append(cell)
        return make(study, cell)

    monkeypatch.setattr(SweepStudy, "make", watched)
    sweep = partial(run_sweep, tmp_path / "out", {"sst2": prepared}, GRID, Display())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sweep()
        assert not (tmp_path / "out/result.json").exists()
    sweep()
    cells = [cell for cell in made if cell is not None]
    assert len(cells) == len({*cells}) == 6
    for part in ("set_aside", "held_out"):
        assert scores_of(tmp_path / "out", part) == scores_of(swept, part)
    adapters = [path / "adapter.safetensors" for path in sorted(swept.rglob("adapter"))]
    assert len(adapters) == 2
    for path in adapters:
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(swept)).read_bytes()


def test_a_larger_grid_continues(swept: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    last = sorted(swept.glob("sst2/held-out/*/seed-1/result.json"))[0]
    last.unlink()  # as if the process was killed when the adapter was complete
    calls: list[Any] = []
    monkeypatch.setattr(sweeps, "tune", lambda *arguments, **options: calls.append(arguments))
    again = run_sweep(swept, {"sst2": prepared}, GRID, Display())
    assert (calls, last.exists()) == ([], True)
    monkeypatch.undo()
    compare = SweepStudy._compare

    def counted(study: SweepStudy, *arguments: Any) -> Any:
        calls.append(arguments)
        return compare(study, *arguments)

    monkeypatch.setattr(SweepStudy, "_compare", counted)
    more = run_sweep(swept, {"sst2": prepared}, replace(GRID, learning_rates=(1e-6, 1e-5, 3e-2)), Display())
    assert len(calls) == 2  # two seeds of the new rate
    settings = more["data"]["sst2"]["settings"]
    shared = [one for one in settings if one["learning_rate"] != 1e-5]
    assert [one["set_aside"] for one in shared] == [one["set_aside"] for one in again["data"]["sst2"]["settings"]]
    with pytest.raises(InputError, match=r"holds a sweep with settings\.epochs 1, where this has 2"):
        run_sweep(swept, {"sst2": prepared}, replace(GRID, settings=replace(SETTINGS, epochs=2)), Display())


def test_a_setting_that_diverges_is_not_chosen(prepared: Prepared, tmp_path: Path) -> None:
    grid = Grid("none", SETTINGS, (1e30, 1e-3), seeds=1)
    result = run_sweep(tmp_path / "out", {"sst2": prepared}, grid, Display())
    diverged, sound = result["data"]["sst2"]["settings"]
    assert (diverged["set_aside"], diverged["chosen"], sound["chosen"]) == ({"scores": [None]}, False, True)
    first, second = sweep_table(result).splitlines()[2:]
    assert first == "| 1e+30 | diverged |  |"
    assert second.startswith("| **0.001** | **0.")
    assert second.count("|") == 4
    with pytest.raises(TinyspanError, match="sst2: the loss became NaN or infinite in every setting"):
        run_sweep(tmp_path / "all", {"sst2": prepared}, replace(grid, learning_rates=(1e30,)), Display())


def test_of_a_loss_the_lowest_is_chosen(prepared: Prepared, tmp_path: Path) -> None:
    losses = replace(prepared, task=replace(prepared.task, metric="log_loss"))
    result = run_sweep(tmp_path / "out", {"sst2": losses}, Grid("none", SETTINGS, (1e-4, 1.0), seeds=1), Display())
    small, large = result["data"]["sst2"]["settings"]
    assert small["set_aside"]["mean"] < large["set_aside"]["mean"]
    assert (small["chosen"], large["chosen"]) == (True, False)
    assert result["data"]["sst2"]["notes"][0].startswith(
        "the chosen learning_rate, 0.0001, is the smallest of the grid"
    )


def test_a_worker_computes_the_cells(prepared: Prepared, tmp_path: Path) -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    grid = Grid("none", SETTINGS, (1e-3,), seeds=1)
    study = SweepStudy(tmp_path / "out", {"sst2": prepared}, grid, Display())
    cloudpickle.loads(cloudpickle.dumps(partial(work, tmp_path / "out", {"sst2": prepared}, grid, 1)))()
    assert [study.results[cell] is None for cell in study.cells()] == [False, False]
    run_cells(study)  # finds nothing to do


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": ()}, "expected at least one learning_rate"),
        ({"ranks": (2, 2)}, "expected at least one rank, and each only once"),
        ({"learning_rates": (0.0,)}, "learning_rate must be above 0"),
        ({"seeds": 0}, "expected at least one seed, got 0"),
        ({"settings": replace(SETTINGS, set_aside=0)}, "a choice by the held-out rows would raise their score"),
        ({"settings": replace(SETTINGS, patience=1)}, "a sweep has no early stopping"),
        ({"basis": "none", "z_learning_rates": (1.0,), "ranks": (None,)}, "the basis has no z: leave out"),
        ({"basis": "none", "z_learning_rates": (1.0, 2.0), "ranks": (None,)}, "the basis has no z: leave out"),
        ({"z_learning_rates": (None,)}, "the basis has a z: give z_learning_rates="),
        ({"basis": "none"}, "give rank= with"),
    ],
)
def test_grids_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(GRID, **changes)


def test_several_label_files_in_one_command(tmp_path: Path, model_folder: Path, run: Any) -> None:
    for name, words in (("mood", ["good", "bad"]), ("team", ["a", "b", "c"])):
        texts = [f"the film is {'fine' if row % 2 else 'dull'} {row}" for row in range(36)]
        labels = [words[row % len(words)] for row in range(36)]
        pd.DataFrame({"t": texts, "y": labels}).to_csv(tmp_path / f"{name}.csv", index=False)
    files: list[Any] = ["--data", tmp_path / "mood.csv", "--data", tmp_path / "team.csv"]
    columns: list[Any] = ["--text", "t", "--label", "y", "--holdout", 0.3]
    command: list[Any] = ["sweep", "--model", model_folder, *columns, "--epochs", 1, "--max-length", 16]
    command += ["--output", tmp_path / "out", "--learning-rates", "1e-3", "--seeds", 1, "--set-aside", 6]
    code, out, err = run(*command, *files, "--basis", "random", "--ranks", "2", "--no-train-embeddings")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "| data | rank | learning rate | z learning rate | set-aside accuracy | held-out accuracy |"
    assert [line.split("|")[1].strip(" *") for line in lines[2:6]] == ["mood", "mood", "team", "team"]
    assert sum("**" in line for line in lines[2:6]) == 2
    adapters = [tmp_path / "out" / place for place in lines[6].partition(": ")[2].split(", ")]
    assert [read_json(adapter / "result.json")["task"] for adapter in adapters] == ["mood", "team"]
    for more, message in (
        ([*files, "--basis", "random"], "--basis random needs --ranks"),
        ([*files, "--basis", "none", "--ranks", "2"], "give rank= with"),
        ([*files, *files[:2], "--basis", "none"], "two data sets are called 'mood'"),
        ([*files, "--basis", "none", "--learning-rates", "a"], "--learning-rates takes numbers separated by commas"),
        ([*files, "--basis", "none", "--set-aside", "500"], "cannot set 500 of 25 training rows aside"),
        ([*files, "--basis", "none", "--z-learning-rates", "1"], "the basis has no z: leave out --z-learning-rates"),
        ([*files, "--basis", "none"], "holds a sweep with basis random, where this has none"),
    ):
        code, _, err = run(*command, *more)
        assert (code, message in err) == (2, True), err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    code, _, err = run(*command, *files, "--basis", "none", "--output", tmp_path / "other")
    assert (code, "holds something other than a sweep" in err) == (2, True), err

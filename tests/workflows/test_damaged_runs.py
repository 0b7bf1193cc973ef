"""What `record`, `tune` and `reproduce` leave, damaged or exchanged: it is noticed by inspect and by what reads it."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyspan import InputError, StorageError, SubspaceModel, TinyspanError
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab.cells import Cell, Results
from tinyspan.lab.rendering import render
from tinyspan.lab.reproduce import read_study
from tinyspan.lab.suite import Suite
from tinyspan.workflows.inspect import describe
from tinyspan.workflows.models import base_model
from tinyspan.workflows.results import settings_of
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import record, tune
from tinyspan.workflows.settings import Settings

pytestmark = pytest.mark.hostile

SETTINGS = Settings(epochs=1, batch_size=32, learning_rate=3e-3, z_learning_rate=3e-2, precision="float32")


@pytest.fixture(scope="module")
def runs(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    record(prepared, SETTINGS, folder / "full")
    tune(prepared, SETTINGS, "random", folder / "adapter", rank=2)
    tune(prepared, Settings(epochs=1, batch_size=32, max_length=16), "random", folder / "other", rank=2)
    return folder


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_every_file_that_a_run_leaves_is_covered(runs: Path, prepared: Prepared, tmp_path: Path, kind: str) -> None:
    copy, whole = tmp_path / kind, runs / kind
    names = [str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file() and p.name[0] != "."]
    assert describe(whole, verify=True)[1] == []
    assert {"result.json", *(["model/model.safetensors", "model/config.json"] if kind == "full" else [])} <= {*names}

    def read(folder: Path, name: str) -> Any:
        if name.startswith("model/"):
            return [value.sum() for value in base_model(str(folder / "model"), prepared.task, 0).parameters()]
        if kind == "adapter" and name == "result.json":
            return settings_of(folder)
        if name == "predictions.jsonl":
            return None  # for people, and read by no command
        if kind == "adapter":
            return (
                SubspaceModel.from_pretrained(base_model(prepared.model, prepared.task, 0), folder)
                .state_dict()["z.0"]
                .sum()
            )
        return None  # the rest is tests/io/test_damage.py's

    for name in names:
        data, expected = (whole / name).read_bytes(), read(whole, name)
        place = random.Random(name).randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        for content in (flipped, data[:-3], None, json.dumps({"settings": {}, "checksum": None}).encode()):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
            try:
                problems = describe(copy, verify=True)[1]
            except TinyspanError as error:
                problems = [str(error)]
            assert any(name in problem for problem in problems), name
            if expected is not None and (content is not None or name != "result.json"):
                with pytest.raises(TinyspanError, match=Path(name).name.replace(".", r"\.")):
                    read(copy, name)


def test_the_settings_of_another_run_are_not_taken(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "adapter", tmp_path / "a")
    assert settings_of(tmp_path / "a") == SETTINGS
    shutil.copy(runs / "other/result.json", tmp_path / "a/result.json")
    with pytest.raises(StorageError, match=r"result\.json"):
        settings_of(tmp_path / "a")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two cells of a study, of different seeds."""
    suite = Suite(name="s", models={"tiny": "t"}, tasks=("rte",), seeds=2, epochs=2, rank=1, dimensions=(1,))
    write_json(tmp_path / "study.json", {"tables": {"table1": suite.model_dump(mode="json")}})
    for seed in (0, 1):
        cell = Cell("tiny", "rte", "full", seed)
        result = {
            **vars(cell),
            "method": cell.method,
            "recipe": suite.settings_hash(),
            "score": seed / 4,
            "cell_seconds": 1.0,
        }
        result |= {"versions": {"torch": "2", "transformers": "5"}, "settings": {"autocast": False}}
        result |= {"hardware": {"device": "d", "threads": 1, "cpus": 1, "machine": "m"}}
        write_json(tmp_path / cell.folder / "result.json", result)
    return tmp_path


def test_every_flipped_bit_of_a_study_is_noticed(study: Path) -> None:
    suites, page, noticed = read_study(study), render(study).read_text(), 0
    for path in study.rglob("*.json"):
        data, generator = path.read_bytes(), random.Random(path.name)
        for _ in range(40):
            place, bit = generator.randrange(len(data)), 1 << generator.randrange(8)
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            try:
                assert read_study(study) == suites
                assert render(study).read_text() == page, f"{path.name}: byte {place}, bit {bit}"
            except TinyspanError as error:
                noticed += path.name in str(error)
        path.write_bytes(data)
    assert noticed > 100


def test_the_results_of_two_cells_are_not_exchanged(study: Path) -> None:
    cells = [Cell("tiny", "rte", "full", seed) for seed in (0, 1)]
    results = Results(study, next(iter(read_study(study).values())).settings_hash())
    assert [results.score(cell) for cell in cells] == [0.0, 0.25]
    shutil.copy(study / cells[0].folder / "result.json", study / cells[1].folder / "result.json")
    with pytest.raises(StorageError, match=r"seed-1/result\.json belongs to another cell"):
        render(study)


@pytest.mark.parametrize(
    "change",
    [
        {"score": 7},
        {"score": "0.5"},
        {"score": None},
        {"hardware": {}},
        {"hardware": None},
        {"versions": []},
        {"settings": 3},
        {"cell_seconds": "x"},
        {"seed": [0]},
    ],
)
def test_a_result_of_another_form_is_refused(study: Path, change: dict[str, Any]) -> None:
    path = study / "tiny/rte/full/seed-0/result.json"
    write_json(path, read_json(path) | change)
    with pytest.raises(StorageError):
        render(study)


@pytest.mark.parametrize(
    "tables",
    [
        {},
        [],
        None,
        {"table1": None},
        {"table1": {"seeds": 10**12}},
        {"nothing": {}},
        {"table1": {"models": {"../x": "y"}}},
    ],
)
def test_a_study_of_another_form_is_refused(study: Path, tables: Any) -> None:
    content = read_json(study / "study.json")
    if isinstance(tables, dict) and isinstance(tables.get("table1"), dict):
        tables = {"table1": content["tables"]["table1"] | tables["table1"]}
    write_json(study / "study.json", {"tables": tables})
    with pytest.raises(StorageError, match=r"study\.json is damaged"):
        render(study)


def test_a_page_is_not_written_through_a_link(study: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A study from elsewhere may hold a README.md that points at somebody's shell profile."""
    profile = tmp_path_factory.mktemp("home") / "profile"
    profile.write_text("mine")
    (study / "README.md").symlink_to(profile)
    assert render(study).read_text().startswith("# Suite")
    assert profile.read_text() == "mine"
    with pytest.raises(InputError, match=r"has no study\.json"):
        render(profile.parent)


def test_a_basis_of_an_unknown_constructor_is_told(runs: Path) -> None:
    from tinyspan import Basis
    from tinyspan.partitioning import by_pattern
    from tinyspan.workflows.runs import method_of

    basis = Basis.from_directions(by_pattern(torch.nn.Linear(1, 1), {"all": ".*"}), {"all": torch.ones(1, 2)})
    for constructor in ("os.system", None, ["svd"]):
        basis.construction["constructor"] = constructor
        with pytest.raises(InputError, match="expected one of"):
            method_of(basis)
    with pytest.raises(InputError, match=r"the basis has no construction, .* use Basis\.from_directions"):
        method_of(Basis(basis.partition, basis.maps))

"""What a cell is computed from: its rows, the initial z, and the basis."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from tinyspan import Basis, InputError, SubspaceModel, by_layer, by_pattern, random_basis, svd_basis
from tinyspan.io.manifests import read_manifest
from tinyspan.lab import cells as cells_module
from tinyspan.lab import reproduce
from tinyspan.lab.cells import Cell, Study, _flip_signs, check_inputs
from tinyspan.lab.suite import Suite
from tinyspan.workflows.progress import Display
from tinyspan.workflows.tasks import TASKS


@pytest.fixture
def study(model_folder: Path, glue_folder: Path, tmp_path: Path) -> Study:
    content = {"name": "mine", "models": {"tiny": str(model_folder)}, "tasks": ["sst2"], "seeds": 1, "epochs": 1}
    content |= {"points": 4, "rank": 4, "dimensions": [2], "ensemble": 2, "init_std": 0.5}
    content |= {"train_rows": 24, "validation_rows": 7, "max_length": 4}
    return Study(tmp_path, Suite.model_validate(content), glue_folder, Display(), lambda known: {})


def test_rows_are_those_of_the_suite(study: Study) -> None:
    rows = study.prepared("tiny", "sst2")
    assert rows.train is not None
    assert (len(rows.train), len(rows.validation)) == (24, 7)
    assert max(map(len, rows.validation["input_ids"])) == 4


def test_cells_of_other_rows_are_refused(study: Study, tmp_path: Path) -> None:
    digests = study.prepared("tiny", "sst2").digests()
    result = tmp_path / "tiny/sst2/full/seed-0/result.json"
    result.parent.mkdir(parents=True)
    for stored in ({}, {"row_digests": digests}):  # results of earlier versions have none
        result.write_text(json.dumps(stored))
        study._prepare("tiny", "sst2")
    result.write_text(json.dumps({"row_digests": {**digests, "train": "0" * 64}}))
    with pytest.raises(InputError, match=r"result\.json was made with other rows: .*000000000000 of the training rows"):
        study._prepare("tiny", "sst2")


def test_a_study_needs_scores_of_which_more_is_better(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TASKS["sst2"]), "lower_is_better", property(lambda self: True))
    with pytest.raises(ValueError, match="sst2 is scored by accuracy, where lower is better"):
        Suite.model_validate(study.suite.model_dump())


def test_the_search_for_d90_starts_at_theta_0(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts the trained numbers: there is one z, whatever the ensemble of the suite is."""
    trained: list[SubspaceModel] = []

    def fine_tune(model: SubspaceModel, *_: Any, **__: Any) -> dict[str, Any]:
        trained.append(model)
        return {}

    monkeypatch.setattr(cells_module, "fine_tune", fine_tune)
    for embeddings in (True, False):
        cell = Cell("tiny", "sst2", "random", 0, 3, embeddings=embeddings)
        study._tune(cell, study._basis(cell))
    (one, d90) = ([z.detach() for z in model.z] for model in trained)
    assert [z.shape for z in one] == [(2, 3)] * 2
    assert 0.2 < float(torch.stack(one).std()) < 1
    assert [z.tolist() for z in d90] == [[[0.0] * 3]] * 2


def test_flipped_signs_are_random_by_coordinate_and_the_same_in_all_directions() -> None:
    basis = random_basis(by_pattern(nn.Linear(9, 10), {"weight": "weight", "bias": "bias"}), 3)
    before = {name: one.dense().clone() for name, one in basis.maps.items()}
    flipped, again, other = (_flip_signs(basis, seed) for seed in (1, 1, 2))
    for name, directions in before.items():
        signs = flipped.maps[name].dense() / directions
        assert torch.equal(signs, signs[:1].expand_as(signs))
        assert {*signs[0].tolist()} == {-1.0, 1.0}
        assert torch.equal(flipped.maps[name].dense(), again.maps[name].dense())
        assert torch.equal(basis.maps[name].dense(), directions)
    assert not torch.equal(flipped.maps["weight"].dense(), other.maps["weight"].dense())


def test_bases_of_recorded_runs(study: Study, tower: Any, wander: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made of the points that its method names, with the cell's own centering, or else the suite's."""
    walks = {task: wander(tower, by_layer(tower), 4, task, seed) for seed, task in enumerate(("sst2", "mrpc"))}
    monkeypatch.setattr(study, "_trajectory", lambda cell, task: walks[task])
    ends = [walks[task].with_points([-1]) for task in ("mrpc", "sst2")]

    def basis(kind: str, rank: int, center: Any = None, source: str | None = None) -> Basis:
        return study._basis(Cell("tiny", "sst2", kind, 0, rank, center, source))

    line = basis("line", 1)
    for block in line.partition:
        cosine = torch.cosine_similarity(line.maps[block.name].dense()[0], walks["sst2"].delta(block).float(), dim=0)
        assert abs(float(cosine)) == pytest.approx(1)
    for found, expected in (
        (basis("intrinsic", 2), svd_basis(walks["sst2"], 2, center="init")),
        (basis("intrinsic", 2, "none"), svd_basis(walks["sst2"], 2, center="none")),
        (basis("inductive", 2, source="mrpc"), svd_basis(walks["mrpc"], 2, center="init")),
        (basis("unified", 2, source="mrpc+sst2"), svd_basis(ends, 2, center="init")),
        (basis("zero-shot", 1, source="mrpc"), svd_basis(ends[:1], 1, center="init")),
    ):
        assert found.content_hash() == expected.content_hash()


def test_an_adapter_is_made_again_if_it_is_unfinished_or_of_another_basis(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[SubspaceModel] = []
    monkeypatch.setattr(cells_module, "fine_tune", lambda model, *_, **__: tuned.append(model) or {})  # type: ignore[func-returns-value]
    cell, other = (Cell("tiny", "sst2", "random", seed, 2) for seed in (0, 1))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "attach", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study._adapter(cell)
    for _ in range(2):
        folder, basis = study._adapter(cell)
        assert len(tuned) == 2  # the first was not finished
        manifest = read_manifest(folder, "adapter")
        assert (manifest.parents, [*manifest.attached]) == ([basis.content_hash()], ["result.json"])
    place, _ = study._adapter(other)
    shutil.rmtree(folder)
    shutil.copytree(place, folder)
    study._adapter(cell)
    assert len(tuned) == 4
    assert read_manifest(folder, "adapter").parents == [basis.content_hash()]


def test_another_model_of_the_same_name_is_refused(
    study: Study, model_folder: Path, glue_folder: Path, tmp_path: Path
) -> None:
    """Their cells would be in one table: `runs/a/model` and `runs/b/model` have one name."""
    model = AutoModel.from_pretrained(model_folder)
    model.encoder.layer[1].output.dense.bias.data += 1
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "other")

    def describe(models: dict[str, Path]) -> None:
        named = {name: str(folder) for name, folder in models.items()}
        suite = study.suite.model_copy(update={"models": named, "batch_size": 4})
        reproduce._describe(tmp_path / "study", ["table5"], suite, lambda: check_inputs(suite, glue_folder))

    for _ in range(2):
        describe({"tiny": model_folder})
    with pytest.raises(InputError, match="holds cells of another model of the name 'tiny', whose weights differ"):
        describe({"tiny": tmp_path / "other"})
    describe({"second": tmp_path / "other"})
    with pytest.raises(InputError, match="another model of the name 'second'"):
        describe({"second": model_folder})


def test_a_study_that_another_process_has_begun_in_the_meantime(study: Study, tmp_path: Path) -> None:
    other = study.suite.model_copy(update={"epochs": 2})

    def begun_elsewhere() -> dict[str, str]:
        reproduce._describe(tmp_path / "study", ["table5"], other, dict)
        return {}

    with pytest.raises(InputError, match="holds table5 made with epochs 2, this suite has 1"):
        reproduce._describe(tmp_path / "study", ["table5"], study.suite, begun_elsewhere)
    assert {table: suite.epochs for table, suite in reproduce.read_study(tmp_path / "study").items()} == {"table5": 2}


def test_the_update_of_the_cell_with_all_directions_is_dissected(study: Study) -> None:
    """A mean leaves three of four points."""
    cell = Cell("tiny", "sst2", "outliers", 3, None, "init", "intrinsic")
    assert study._source_cell(cell) == Cell("tiny", "sst2", "intrinsic", 3, 4, "init")
    assert study._source_cell(replace(cell, center="mean")) == Cell("tiny", "sst2", "intrinsic", 3, 3, "mean")
    assert study._source_cell(replace(cell, source="random")) == Cell("tiny", "sst2", "random", 3, 4)

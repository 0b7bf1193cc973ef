"""The curvature along runs and at adapters: against models that are put together by hand, and loss values alone."""

import base64
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from tinyspan import InputError, SubspaceModel, TinyspanError, Trajectory, by_layer, random_basis, svd_basis
from tinyspan.io.storage import read_json, write_json
from tinyspan.workflows.curvature import CurvatureSource, curvature, opened_source
from tinyspan.workflows.loss_in_z import CurvatureOptions, LossInZ
from tinyspan.workflows.models import base_model
from tinyspan.workflows.report import write_report
from tinyspan.workflows.report.items import opened_items
from tinyspan.workflows.report.repeat import commands
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.run_rows import rows_of_run
from tinyspan.workflows.runs import SubspaceOptions, record, tune
from tinyspan.workflows.settings import Settings

pytestmark = pytest.mark.studies  # of runs that are trained

SETTINGS = Settings(epochs=20, batch_size=16, learning_rate=1e-2, precision="float32", set_aside=8)
EXACT: dict[str, Any] = {"rank": 2, "partition": "layer", "rows": 7, "batch_size": 5, "dtype": "float64"}
OF_ADAPTER = {name: EXACT[name] for name in ("rows", "batch_size", "dtype")}


@pytest.fixture(scope="module")
def prepared_module(model_folder: Path, data_folder: Path) -> Prepared:
    return prepare(str(model_folder), "sst2", data=data_folder, train_rows=40)


@pytest.fixture(scope="module")
def full(prepared_module: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run of 32 rows with four points."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    record(prepared_module, SETTINGS, folder, every=10)
    return folder


@pytest.fixture(scope="module")
def exact(full: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The curvature of the run in float64."""
    folder = tmp_path_factory.mktemp("curvature") / "curved"
    source, rows = run_and_rows(full, data_folder)
    result = curvature(source, rows, folder, CurvatureOptions(**EXACT))
    assert read_json(folder / "curvature.json") == result
    return folder


def run_and_rows(full: Path, data_folder: Path) -> tuple[CurvatureSource, Prepared]:
    source = opened_source(full)
    return source, rows_of_run(source.model(), source, data_folder)


def by_hand(full: Path, rows: Prepared, options: CurvatureOptions) -> tuple[SubspaceModel, Tensor, Any]:
    """The model at theta_0 in the run's directions, z of theta_0 and all points, and one batch of the same rows."""
    run = Trajectory(full)
    basis = svd_basis(run, options.rank)
    model = base_model(str(full / "model"), rows.task, 0)
    run.load_into(model, None)
    parts = [run.matrix(block).double() @ basis.maps[block.name].dense(torch.float64).T for block in run.partition]
    z = torch.cat(parts, 1)
    subspace = SubspaceModel(model, basis).double().eval()
    assert rows.train is not None
    order = torch.randperm(len(rows.train), generator=torch.Generator().manual_seed(0))[: options.rows]
    return (
        subspace,
        torch.cat([torch.zeros(1, z.shape[1]).double(), z]),
        rows.collate([rows.train[i] for i in order.tolist()]),
    )


def test_a_run_against_values_of_its_loss(full: Path, exact: Path, data_folder: Path) -> None:
    options, result = CurvatureOptions(**EXACT), read_json(exact / "curvature.json")
    _, rows = run_and_rows(full, data_folder)
    assert len(rows.train or ()) == 32
    subspace, z, batch = by_hand(full, rows, options)
    assert (result["K"], result["rows"], len(result["points"])) == (4, 7, 5)
    assert result["blocks"] == dict.fromkeys((block.name for block in subspace.blocks), 2)
    assert [point["step"] for point in result["points"]] == [0, 10, 20, 30, 40]

    @torch.no_grad()
    def loss(at: Tensor) -> Tensor:
        subspace.set_state(dict(zip((block.name for block in subspace.blocks), at.split(2), strict=True)))
        value: Tensor = rows.task.loss_of(subspace, batch, rows.labels)
        return value

    step, unit = 1e-3, torch.eye(4).double()
    for point, at in zip(result["points"], z, strict=True):
        assert point["loss"] == pytest.approx(float(loss(at)), rel=1e-6)
        corners = [
            [sum(a * b * loss(at + step * (a * u + b * v)) for a in (1, -1) for b in (1, -1)) for v in unit]
            for u in unit
        ]
        values = torch.linalg.eigvalsh(torch.tensor(corners).double() / (4 * step**2)).flip(0)
        largest = float(values.abs().max())
        torch.testing.assert_close(torch.tensor(point["hessian"]).double(), values, rtol=0, atol=1e-4 * largest)
        slope = torch.stack([(loss(at + step * u) - loss(at - step * u)) / (2 * step) for u in unit])
        assert point["gradient_norm"] == pytest.approx(float(slope.norm()), rel=1e-4)
        assert point["sharpness"] == point["hessian"][0]
        assert point["trace"] == pytest.approx(sum(point["hessian"]))
        assert point["distance"] == pytest.approx(float(at.norm()), rel=1e-5)
        assert min(point["gauss_newton"]) > -1e-9
        assert point["row_gradients"]["max"] >= point["row_gradients"]["median"] > 0
        assert point["asymmetry"] < 1e-9
    assert result["points"][0]["share"] is None
    assert all(0.9 < point["share"] <= 1 + 1e-6 for point in result["points"][1:])
    for line in result["lines"]:
        assert line["loss"][6] == pytest.approx(result["points"][-1]["loss"], rel=1e-6)
        assert line["quadratic"][6] == line["loss"][6]
        assert sum(line["blocks"].values()) == pytest.approx(1)
        assert line["loss"][7] == pytest.approx(line["quadratic"][7], rel=0.02)
    assert "those of the end of the run at every point" in result["notes"][0]


def test_differences_give_the_same_in_float32(full: Path, exact: Path, data_folder: Path, tmp_path: Path) -> None:
    source, rows = run_and_rows(full, data_folder)
    points = read_json(exact / "curvature.json")["points"]
    options = CurvatureOptions(**{**EXACT, "dtype": "float32", "method": "central"}, every=3)
    central = curvature(source, rows, tmp_path / "central", options)
    assert [point["step"] for point in central["points"]] == [0, 30, 40]
    for one, point in zip(central["points"], (points[index] for index in (0, 3, 4)), strict=True):
        largest = max(map(abs, point["hessian"]))
        for name in ("hessian", "gauss_newton"):
            assert one[name] == pytest.approx(point[name], abs=0.01 * largest)
        assert 1e-9 < one["asymmetry"] < 0.01


def test_the_last_point_in_all_directions_is_the_fine_tuned_model(
    full: Path, data_folder: Path, tmp_path: Path
) -> None:
    source, rows = run_and_rows(full, data_folder)
    options = CurvatureOptions(rank=4, partition="model", rows=99, split="validation", every=9)
    result = curvature(source, rows, tmp_path / "out", options)
    assert (result["K"], result["rows"], [*result["blocks"]]) == (4, 32, ["model"])
    first, last = result["points"]
    assert last["share"] == pytest.approx(1, abs=1e-4)
    model = base_model(str(full / "model"), rows.task, 0).eval()
    with torch.no_grad():
        expected = rows.task.loss_of(model, rows.collate(list(rows.validation)), rows.labels)
    assert last["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert first["loss"] != pytest.approx(last["loss"], rel=1e-2)


def test_an_interrupted_computation_goes_on(full: Path, data_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    source, rows = run_and_rows(full, data_folder)
    options = CurvatureOptions(rank=1, rows=4, partition="layer")
    expected, point, computed = curvature(source, rows, tmp_path / "whole", options), LossInZ.point, []

    def interrupted(self: LossInZ, at: Any, **rest: Any) -> Any:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(at.step)
        return point(self, at, **rest)

    monkeypatch.setattr(LossInZ, "point", interrupted)
    with pytest.raises(KeyboardInterrupt, match="keeps 3 points; the same command goes on from there"):
        curvature(source, rows, tmp_path / "out", options)
    with pytest.raises(InputError, match=r"holds unfinished work with options.rows 4, where this has 5"):
        curvature(source, rows, tmp_path / "out", CurvatureOptions(rank=1, rows=5, partition="layer"))
    monkeypatch.setattr(
        LossInZ, "point", lambda *args, **rest: (computed.append(args[1].step), point(*args, **rest))[1]
    )
    said: list[str] = []
    found = curvature(source, rows, tmp_path / "out", options, say=said.append)
    assert computed == [0, 10, 20, 30, 40]
    assert said == ["2 points, matrices of 2 x 2, 4 rows"]
    for one, other in zip(found["points"], expected["points"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert found["lines"] == expected["lines"]
    assert not (tmp_path / "out/unfinished").exists()
    with pytest.raises(InputError, match="holds an earlier output"):
        curvature(source, rows, tmp_path / "out", options)


def test_an_ensemble_is_its_mean(prepared_module: Prepared, tmp_path: Path) -> None:
    options = SubspaceOptions(ensemble=3, init_std=0.3)
    tune(prepared_module, replace(SETTINGS, epochs=1), "random", tmp_path / "adapter", rank=2, options=options)
    result = curvature(
        opened_source(tmp_path / "adapter"), prepared_module, tmp_path / "out", CurvatureOptions(**OF_ADAPTER)
    )
    assert (result["K"], len(result["points"]), result["notes"]) == (4, 1, [])
    adapter = SubspaceModel.from_pretrained(
        base_model(prepared_module.model, prepared_module.task, 0), tmp_path / "adapter"
    )
    means = {name: z.detach().mean(0) for name, z in adapter.get_state().z.items()}
    assert result["points"][0]["distance"] == pytest.approx(float(torch.cat([*means.values()]).norm()), rel=1e-5)
    assert result["points"][0]["step"] is None
    model = adapter.double().eval()
    assert prepared_module.train is not None
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:7].tolist()
    batch = prepared_module.collate([prepared_module.train[index] for index in order])
    one, other = (block.name for block in model.blocks)

    def loss(z: Tensor) -> Tensor:
        out: Tensor = rows_loss(model, {one: z[:2], other: z[2:]}, batch, prepared_module)
        return out

    center = torch.cat([means[one], means[other]]).double()
    exact = torch.autograd.functional.hessian(loss, center)
    assert result["points"][0]["hessian"] == pytest.approx(torch.linalg.eigvalsh(exact).flip(0).tolist(), rel=1e-6)  # type: ignore[arg-type]


def rows_loss(model: SubspaceModel, z: dict[str, Tensor], batch: Any, rows: Prepared) -> Tensor:
    """The loss at z of every member alike, in eager attention, by a functional call."""
    model.model.set_attn_implementation("eager")
    vector = torch.cat([z[block.name].expand(model.ensemble, -1).reshape(-1) for block in model.blocks])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return torch.nn.functional.cross_entropy(model.forward_at(vector, **inputs).logits, batch["labels"])


def test_a_loss_that_is_nan_ends_with_the_point(
    full: Path, data_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    source, rows = run_and_rows(full, data_folder)
    monkeypatch.setattr(type(rows.task), "model_loss", lambda self, values, target: values.sum() * float("nan"))
    with pytest.raises(TinyspanError, match="the loss at the point after 0 steps is nan; was the run sound"):
        curvature(source, rows, tmp_path / "out", CurvatureOptions(rank=1, rows=4, partition="layer"))
    assert not (tmp_path / "out").exists()


def test_options_that_are_refused(full: Path, data_folder: Path, tmp_path: Path, prepared_module: Prepared) -> None:
    source, rows = run_and_rows(full, data_folder)
    for options, message in (
        ({"rank": 5}, r"rank=5 is not between 1 and 4, the number of directions that the points have"),
        ({"rank": 300, "partition": "layer"}, r"z has 600 coordinates \(300 in each of 2 blocks; lower rank="),
        ({"partition": "trainable"}, "cannot group a recorded trajectory"),
    ):
        with pytest.raises(InputError, match=message):
            curvature(source, rows, tmp_path / "out", CurvatureOptions(**options))  # type: ignore[arg-type]
    for options, message in (
        ({"rows": 0}, "expected rows to be at least 1, got rows=0"),
        ({"method": "forward"}, "expected method to be reverse or central, got 'forward'"),
    ):
        with pytest.raises(InputError, match=message):
            CurvatureOptions(**options)  # type: ignore[arg-type]
    model = base_model(prepared_module.model, prepared_module.task, 0)
    SubspaceModel(model, random_basis(by_layer(model), 257), modules_to_save=["classifier", "pooler"]).save_pretrained(
        tmp_path / "wide"
    )
    wide = opened_source(tmp_path / "wide")
    assert wide.model() == prepared_module.model
    with pytest.raises(InputError, match=r"z has 514 coordinates \(of an adapter; tune one of lower rank\)"):
        curvature(wide, prepared_module, tmp_path / "out", CurvatureOptions())
    for options in ({"rank": 2}, {"partition": "layer"}, {"every": 2}):
        with pytest.raises(InputError, match="are for a recorded run; an adapter has its own coordinates"):
            curvature(wide, prepared_module, tmp_path / "out", CurvatureOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"wide has no result\.json, which names the task"):
        rows_of_run(wide.model(), wide)
    assert not (tmp_path / "out").exists()


def test_other_rows_are_not_taken_for_those_of_the_run(full: Path, data_folder: Path, tmp_path: Path) -> None:
    """As many rows, with other labels."""
    source = opened_source(full)
    changed = shutil.copytree(data_folder, tmp_path / "changed")
    (path,) = changed.glob("train.*")
    table = pd.read_parquet(path)
    table["label"] = 1 - table["label"]
    table.to_parquet(path)
    with pytest.raises(
        InputError, match=r"not the rows of the run: its result\.json has the SHA-256 \w+ of the training"
    ):
        rows_of_run(source.model(), source, changed)
    with pytest.raises(InputError, match="of the training"):  # another length is no way around it
        rows_of_run(source.model(), source, changed, max_length=8)


def test_only_the_rows_that_are_used_must_be_those_of_the_run(full: Path, data_folder: Path, tmp_path: Path) -> None:
    source = opened_source(full)
    changed = shutil.copytree(data_folder, tmp_path / "changed")
    table = pd.read_csv(changed / "validation.csv")
    table.assign(label=1 - table["label"]).to_csv(changed / "validation.csv", index=False)
    kept, expected = (rows_of_run(source.model(), source, data).train for data in (changed, data_folder))
    assert kept is not None
    assert expected is not None
    assert [row["input_ids"] for row in kept] == [row["input_ids"] for row in expected]
    with pytest.raises(InputError, match="of the held-out rows"):
        rows_of_run(source.model(), source, changed, split="validation")
    shorter = rows_of_run(source.model(), source, data_folder, max_length=8)
    assert max(len(shorter.train[row]["input_ids"]) for row in range(8)) <= 8  # type: ignore[index]


# -- the page --


def test_a_page_about_a_curvature(full: Path, exact: Path, tmp_path: Path) -> None:
    result = read_json(exact / "curvature.json")
    write_report(tmp_path / "page.html", [exact])
    html = (tmp_path / "page.html").read_text()
    assert "<h1>Curvature curved</h1>" in html
    assert re.findall("<h2>(.*?)</h2>", html) == ["Curvature", "What was trained and what it cost", "How to repeat it"]
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', html)
    assert [base64.b64decode(source)[:5] for source, _ in pictures] == [b"<?xml"] * 2
    first, last = (f"{result['points'][index]['sharpness']:.4g}" for index in (0, -1))
    assert f"the largest goes from {first} to {last}" in pictures[0][1]
    assert f"Sharpness {last} at the end." in html
    assert "those of the end of the run at every point" in html
    (words,) = commands(opened_items([exact]))
    assert shlex.split(words.replace("\\\n", " "))[1:4] == ["curvature", str(full), "--rank"]
    assert words.endswith("--output curved-again")


def test_a_damaged_curvature_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "curvature.json", {"points": []})
    text = (tmp_path / "curvature.json").read_text()
    (tmp_path / "curvature.json").write_text(text.replace("[]", "[1]"))
    with pytest.raises(TinyspanError, match="is damaged: expected the checksum"):
        opened_items([tmp_path])

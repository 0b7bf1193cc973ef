"""Suggesting a basis: the shares are those of dense float64 projections, and bases that do not compare are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithPadding, Trainer

from tinyspan import (
    Basis,
    InputError,
    MismatchError,
    Trajectory,
    by_layer,
    by_module,
    empty_basis,
    fastfood_basis,
    random_basis,
    svd_basis,
)
from tinyspan.workflows import suggest
from tinyspan.workflows.models import base_model
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task

pytestmark = pytest.mark.studies

SETTINGS = Settings(batch_size=24, precision="float32")  # 64 rows: batches of 24, 24 and 16


@pytest.fixture(scope="module")
def path(model_folder: Path, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """Of full fine-tuning on the task itself."""
    from tinyspan.workflows.runs import record

    folder = tmp_path_factory.mktemp("path") / "full"
    record(prepared, Settings(2, 16, learning_rate=3e-3, precision="float32"), folder, every=2)
    return Trajectory(folder)


@pytest.fixture(scope="module")
def bases(path: Trajectory) -> dict[str, Basis]:
    return {
        "own": svd_basis(path, 3),
        "int8": svd_basis(path, 3, dtype=torch.int8),
        "sparse": svd_basis(path, 3, density=0.05),
        "random": random_basis(path.partition, 3),
    }


def test_weights_that_a_batch_does_not_use_have_no_gradient(model_folder: Path, prepared: Prepared) -> None:
    """Such as those of the global attention of a Longformer, or of an expert."""
    model: Any = base_model(str(model_folder), prepared.task, 0)
    model.bert.encoder.layer[0].unused = torch.nn.Linear(2, 3)
    partition = by_layer(model)
    gradient = next(suggest.first_gradients(model, partition, prepared, SETTINGS))
    block = partition.blocks[0]
    (unused,) = (gradient[block.name][a:b] for spec, a, b in block.spans() if spec.name.endswith("unused.weight"))
    assert not unused.any()
    assert all(gradient[block.name].any() for block in partition)


def test_shares_are_those_of_dense_projections(prepared: Prepared, bases: dict[str, Basis]) -> None:
    found = {row["name"]: row for row in suggest.suggest(prepared, SETTINGS, bases)["bases"]}
    frozen = suggest.frozen_encoder(prepared, SETTINGS)
    suggest.fit_head(frozen, prepared, SETTINGS)
    model = frozen.merge().cpu().double().eval()
    assert prepared.train is not None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(prepared.draw_seed)).tolist()
    for name, basis in bases.items():
        directions = {block.name: basis.maps[block.name].dense(torch.float64) for block in basis.partition}  # type: ignore[attr-defined]
        shares, random = [], []
        for start in (0, 24, 48):
            rows = [prepared.train[index] for index in order[start : start + 24]]
            model.zero_grad()
            model(**DataCollatorWithPadding(prepared.tokenizer)(rows)).loss.backward()
            within, expected, whole = 0.0, 0.0, 0.0
            for block in basis.partition:
                g = block.flatten({key: weight.grad for key, weight in model.named_parameters()})  # type: ignore[misc]
                v = directions[block.name]
                within += float((v @ g) @ torch.linalg.solve(v @ v.T, v @ g))
                expected, whole = expected + float(g @ g) * 3 / block.numel, whole + float(g @ g)
            shares.append(within / whole)
            random.append(expected / whole)
        tolerance = 0.02 if name == "int8" else 1e-3
        assert found[name]["share"] == found[name]["equal_share"] == pytest.approx(sum(shares) / 3, rel=tolerance)
        assert found[name]["random"] == pytest.approx(sum(random) / 3, rel=1e-3)
        assert found[name]["times_random"] == pytest.approx(sum(shares) / sum(random), rel=tolerance)


def test_the_task_s_own_path_holds_most(prepared: Prepared, bases: dict[str, Basis]) -> None:
    ranked = [row["name"] for row in suggest.suggest(prepared, SETTINGS, bases)["bases"]]
    assert set(ranked[:2]) == {"own", "int8"}
    assert ranked[2] == "sparse"


def test_ranks_are_made_equal(prepared: Prepared, path: Trajectory) -> None:
    """The first direction of a basis of one and the first of a basis of three are the same: neither is put ahead."""
    bases = {"one": svd_basis(path, 1), "three": svd_basis(path, 3)}
    found = {row["name"]: row for row in suggest.suggest(prepared, SETTINGS, bases)["bases"]}
    assert found["one"]["equal_share"] == pytest.approx(found["three"]["equal_share"])
    assert found["one"]["share"] == found["one"]["equal_share"] < found["three"]["share"]
    assert found["three"]["random"] == pytest.approx(3 * found["one"]["random"])
    assert [found[name]["equal_rank"] for name in bases] == [1, 1]


def test_only_the_head_is_fitted(prepared: Prepared) -> None:
    frozen = suggest.frozen_encoder(prepared, SETTINGS)
    start = base_model(prepared.model, prepared.task, 0).state_dict()
    score = suggest.fit_head(frozen, prepared, SETTINGS)
    moved = {name for name, value in frozen.merge().cpu().state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert 0.5 <= score <= 1


def test_a_regressions_head_is_fitted_from_zero(similarity: Prepared) -> None:
    """As it was where the ranking was held against real runs."""
    frozen = suggest.frozen_encoder(similarity, SETTINGS)
    assert frozen.model.classifier.bias.item() == 0
    basis = random_basis(by_layer(base_model(similarity.model, similarity.task, 0)), 2)
    found = suggest.suggest(similarity, SETTINGS, {"random": basis})
    assert found["settings"]["regression_start"] == "zero"


def test_no_training_before_bad_bases_are_refused(
    prepared: Prepared, path: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *arguments: pytest.fail("the head was trained first"))
    own, partition = svd_basis(path, 1), path.partition
    other = base_model(prepared.model, prepared.task, 0)
    with pytest.raises(InputError, match="at least one"):
        suggest.suggest(prepared, SETTINGS, {})
    with pytest.raises(MismatchError, match="x has other blocks than own"):
        suggest.suggest(prepared, SETTINGS, {"own": own, "x": random_basis(by_module(other), 1)})
    with pytest.raises(InputError, match="columns of x are not orthonormal"):
        suggest.suggest(prepared, SETTINGS, {"own": own, "x": fastfood_basis(partition, 1)})
    with pytest.raises(InputError, match="x has no directions"):
        suggest.suggest(prepared, SETTINGS, {"own": own, "x": empty_basis(by_layer(other))})
    own.fingerprint = dict.fromkeys(own.fingerprint, "0" * 64)
    with pytest.raises(MismatchError, match="another theta_0"):
        suggest.suggest(prepared, SETTINGS, {"own": own})


def test_the_command(
    run: Any, quick: list[object], path: Trajectory, bases: dict[str, Basis], model_folder: Path, tmp_path: Path
) -> None:
    for name in ("own", "random"):
        bases[name].write(tmp_path / name)
    where = ["suggest", *quick[:6], "--batch-size", 24, "--precision", "float32", "--rows", 50]
    folders = [tmp_path / "random", path.folder, tmp_path / "own"]
    code, out, _ = run(*where, *folders, "--rank", 3, "--output", tmp_path / "out")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["1", "2", "3"]
    assert lines[3][1] == str(tmp_path / "random")
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["rows"] == {"train": 50}
    assert (result["settings"]["epochs"], result["settings"]["learning_rate"]) == (10, 1e-3)  # of the head
    assert [row["name"] for row in result["bases"]] == [line[1] for line in lines[1:]]
    found = {row["name"]: row["share"] for row in result["bases"]}
    assert found[str(path.folder)] == pytest.approx(found[str(tmp_path / "own")])  # the same directions
    code, out, _ = run(*where, tmp_path / "own")
    assert (code, len(out.splitlines())) == (0, 2)

    code, _, err = run(*where, *folders, "--output", tmp_path / "out")
    assert (code, "--overwrite" in err) == (2, True)
    code, _, err = run(*where, tmp_path / "own", tmp_path / "own" / ".." / "own")
    assert (code, "given twice" in err) == (2, True)
    code, _, err = run(*where, tmp_path)
    assert (code, "no manifest.json" in err) == (2, True)
    code, _, err = run(*where, path.folder, "--rank", 5)
    assert (code, "not between 1 and 4" in err) == (2, True)

    model = base_model(str(model_folder), get_task("sst2"), 0)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight[0, 0] += 1.0
    model.bert.save_pretrained(tmp_path / "other")
    for file in model_folder.glob("*token*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    for folder in (tmp_path / "own", path.folder):
        code, _, err = run("suggest", "--model", tmp_path / "other", *quick[2:6], folder)
        assert (code, "another theta_0" in err, "layer.1" in err) == (2, True, True)

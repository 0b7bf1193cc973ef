"""Record, tune and evaluate end to end on the miniature model and language."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyspan import Basis, InputError, MismatchError, SubspaceModel, Trajectory, by_layer, svd_basis
from tinyspan.experiments.models import base_model, embedding_modules, head_modules
from tinyspan.experiments.runs import SubspaceOptions, evaluate, record, tune
from tinyspan.experiments.training import Prepared, Settings

SETTINGS = Settings(epochs=2, batch_size=16, learning_rate=3e-3, z_learning_rate=3e-2, precision="float32")
KEYS = {
    "method", "model", "task", "seed", "metric", "score", "epochs", "history", "subspace_parameters",
    "ordinary_parameters", "seconds", "peak_memory_bytes", "basis", "versions", "settings", "rows", "hardware",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "full"
    record(prepared, SETTINGS, folder, every=2)
    return folder


@pytest.fixture(scope="module")
def basis(recorded: Path) -> Basis:
    found = svd_basis(Trajectory(recorded), rank=3)
    found.save(recorded.parent / "basis")
    return found


def test_modules_outside_the_blocks(prepared: Prepared) -> None:
    model = base_model(prepared.model, prepared.task, 0)
    partition = by_layer(model)
    assert embedding_modules(model, partition) == ["bert.embeddings"]
    assert head_modules(model, partition) == ["bert.pooler", "classifier"]


def test_the_heads_first_weights_depend_on_the_seed_alone(prepared: Prepared) -> None:
    state = torch.random.get_rng_state()
    one, again, other = (base_model(prepared.model, prepared.task, seed).classifier.weight for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_record_leaves_trajectory_model_and_result(recorded: Path, prepared: Prepared) -> None:
    result = json.loads((recorded / "result.json").read_text())
    assert set(result) == KEYS
    assert (result["method"], result["epochs"], result["basis"]) == ("full", 2, None)
    assert [row["epoch"] for row in result["history"]] == [1.0, 2.0]
    assert result["history"][-1]["score"] == result["score"]
    assert result["ordinary_parameters"] == sum(
        p.numel() for p in base_model(prepared.model, prepared.task, 0).parameters()
    )
    trajectory = Trajectory(recorded)
    assert trajectory.steps == [1, 3, 5, 7]
    # the end of the path is the model that was saved, and that model scores what was reported
    final = base_model(str(recorded / "model"), prepared.task, 0, need_head=True)
    for block in trajectory.partition:
        torch.testing.assert_close(
            trajectory.start(block) + trajectory.delta(block), block.flatten(trajectory.partition.select(final))
        )
    assert evaluate(replace(prepared, model=str(recorded / "model")), SETTINGS)["score"] == result["score"]


@pytest.mark.parametrize("method", ["intrinsic", "random", "fastfood", "none"])
def test_tune_then_evaluate_gives_the_same_score(prepared: Prepared, basis: Basis, tmp_path: Path, method: str) -> None:
    chosen, rank = basis if method == "intrinsic" else method, {"random": 3, "fastfood": 6}.get(method)
    result = tune(prepared, SETTINGS, chosen, tmp_path / "a", rank=rank)  # type: ignore[arg-type]
    assert set(result) == KEYS
    assert result["method"] == {"none": "freeze"}.get(method, method)
    assert result["subspace_parameters"] == (0 if method == "none" else 6)
    assert (result["basis"] is None) == (method == "none")
    again = evaluate(prepared, SETTINGS, tmp_path / "a", output=tmp_path / "e")
    assert (again["score"], again["method"]) == (result["score"], result["method"])
    assert json.loads((tmp_path / "e/result.json").read_text())["score"] == result["score"]


def test_the_same_seed_gives_the_same_run(prepared: Prepared, basis: Basis, tmp_path: Path) -> None:
    first = tune(prepared, SETTINGS, basis, tmp_path / "a")
    torch.rand(3)  # the global generator's state must not matter
    again = tune(prepared, SETTINGS, basis, tmp_path / "b")
    other = tune(prepared, replace(SETTINGS, seed=5), basis, tmp_path / "c")
    assert first["history"] == again["history"] != other["history"]
    same = (tmp_path / "a/adapter.safetensors").read_bytes() == (tmp_path / "b/adapter.safetensors").read_bytes()
    assert same


def test_the_numbers_trained_are_the_numbers_told(prepared: Prepared, basis: Basis, tmp_path: Path) -> None:
    options = SubspaceOptions(ensemble=4, start_std=0.1, train_embeddings=False)
    result = tune(prepared, SETTINGS, basis, tmp_path / "a", options=options)
    head = 16 * 16 + 16 + 2 * 16 + 2
    assert (result["subspace_parameters"], result["ordinary_parameters"]) == (4 * 3 * 2, head)
    loaded = SubspaceModel.load(base_model(prepared.model, prepared.task, 9), tmp_path / "a")
    pretrained = base_model(prepared.model, prepared.task, 9)
    assert torch.equal(loaded.model.bert.embeddings.word_embeddings.weight,
                       pretrained.bert.embeddings.word_embeddings.weight)  # fmt: skip


def test_regression(prepared: Prepared, model_folder: Path, tmp_path: Path) -> None:
    import pandas as pd

    from tinyspan.experiments.training import prepare

    rows = pd.DataFrame(
        {"sentence1": ["fine film", "dull film"] * 8, "sentence2": ["a story"] * 16, "label": [4.5, 0.25] * 8}
    )
    for split in ("train", "validation"):
        rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
    pairs = prepare(str(model_folder), "stsb", data=tmp_path)
    result = record(pairs, replace(SETTINGS, epochs=80), tmp_path / "out")
    assert result["metric"] == "pearson"
    assert result["score"] > 0.9
    assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]


def test_refusals_come_before_any_work(
    prepared: Prepared, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr("tinyspan.experiments.runs.fine_tune", never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for call in (
        lambda: record(prepared, SETTINGS, tmp_path / "full"),
        lambda: tune(prepared, SETTINGS, basis, tmp_path / "full", overwrite=True),
        lambda: evaluate(prepared, SETTINGS, output=tmp_path / "full"),
    ):
        with pytest.raises(InputError, match="holds something else"):
            call()
    with pytest.raises(InputError, match="--rank"):
        tune(prepared, SETTINGS, "random", tmp_path / "a")
    with pytest.raises(InputError, match="--rank"):
        tune(prepared, SETTINGS, basis, tmp_path / "a", rank=2)
    with pytest.raises(InputError, match="has no trained head"):
        evaluate(prepared, SETTINGS)
    with pytest.raises(InputError, match="above 0"):
        Settings(epochs=0)
    with pytest.raises(InputError, match="could not be loaded"):
        base_model(str(tmp_path / "nothing"), prepared.task, 0)
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_without_its_encoder_is_no_pre_trained_model(prepared: Prepared, tmp_path: Path) -> None:
    from tinyspan.storage import write_tensors

    model = base_model(prepared.model, prepared.task, 0)
    model.save_pretrained(tmp_path / "m")
    renamed = {name.replace("encoder", "enkoder"): value for name, value in model.state_dict().items()}
    write_tensors(tmp_path / "m/model.safetensors", renamed)
    with pytest.raises(InputError, match="is not pre-trained: 32 weights"):
        base_model(str(tmp_path / "m"), prepared.task, 0)


def test_a_basis_of_another_base_model_is_refused(prepared: Prepared, basis: Basis, tmp_path: Path) -> None:
    other = base_model(prepared.model, prepared.task, 0)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.bias.add_(1e-6)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"differs in block 'bert\.encoder\.layer\.1'"):
        tune(replace(prepared, model=str(tmp_path / "other")), SETTINGS, basis, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_nan_is_an_error_not_a_number(prepared: Prepared, tmp_path: Path) -> None:
    from tinyspan import TinyspanError

    with pytest.raises(TinyspanError, match="NaN or infinite"):
        tune(prepared, replace(SETTINGS, learning_rate=1e30), "none", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_config_names_no_code_on_the_hub_nor_a_package_that_is_not_there(prepared: Prepared, tmp_path: Path) -> None:
    plain = base_model(prepared.model, prepared.task, 0)
    plain.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        (tmp_path / "m/config.json").write_text(json.dumps(config | {key: "kernels-community/flash-attn2"}))
        loaded = base_model(str(tmp_path / "m"), prepared.task, 0)
        assert loaded.config._attn_implementation == plain.config._attn_implementation
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "m/config.json").write_text(json.dumps(quantized))
    with pytest.raises(InputError, match="could not be loaded"):
        base_model(str(tmp_path / "m"), prepared.task, 0)

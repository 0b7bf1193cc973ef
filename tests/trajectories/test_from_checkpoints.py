import copy
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from towers import Tower, nudge

from tinyspan import (
    InputError,
    MismatchError,
    by_layer,
    trainable_by_layer,
    trajectory_from_checkpoints,
)
from tinyspan.io.tensors import write_tensors
from tinyspan.trajectories.from_checkpoints import numeric_order


@pytest.mark.parametrize("prefix", ["", "base.", "-"])
def test_checkpoints_become_points(tmp_path: Path, prefix: str) -> None:
    """Names may have the base model's prefix in excess, or lack the one the model has."""
    inner = Tower()
    model = nn.ModuleDict({"base": inner}) if prefix == "-" else inner
    partition = by_layer(model)
    folders = []
    for index in range(2):
        nudge(inner, 0.5)
        named = {f"{prefix.strip('-')}{name}": value for name, value in inner.named_parameters()}
        write_tensors(tmp_path / f"c{index}/model.safetensors", named)
        folders.append(tmp_path / f"c{index}")
    nudge(inner, -1.0)
    trajectory = trajectory_from_checkpoints(model, partition, folders, tmp_path / "t")
    for index in range(2):
        delta = trajectory.delta(trajectory.partition.blocks[0], index)
        torch.testing.assert_close(delta, torch.full_like(delta, 0.5 * (index + 1)), rtol=0, atol=1e-14)


def test_a_foreign_checkpoint_is_refused_without_transformers(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    write_tensors(tmp_path / "c/model.safetensors", {"other": torch.ones(1)})
    with pytest.raises(MismatchError, match="no tensor for the parameter"):
        trajectory_from_checkpoints(tower, by_layer(tower), [tmp_path / "c"], tmp_path / "t")


def test_foreign_checkpoints_are_refused_before_anything_is_written(tower: Tower, tmp_path: Path) -> None:
    partition = by_layer(tower)
    write_tensors(tmp_path / "c/model.safetensors", {"other": torch.ones(1)})
    with pytest.raises(MismatchError, match="no tensor for the parameter"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "c"], tmp_path / "t")
    write_tensors(tmp_path / "d/model.safetensors", dict(Tower(2, width=5).named_parameters()))
    with pytest.raises(MismatchError, match="has shape"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "d"], tmp_path / "t")
    write_tensors(tmp_path / "good/model.safetensors", dict(tower.named_parameters()))
    with pytest.raises(MismatchError, match="no tensor for the parameter"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "good", tmp_path / "c"], tmp_path / "t")
    write_tensors(tmp_path / "half/model.safetensors", dict(Tower().bfloat16().named_parameters()))
    with pytest.raises(MismatchError, match="bfloat16"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "half"], tmp_path / "t")
    two = nn.ModuleDict({"encoder": Tower(), "decoder": Tower()})
    with pytest.raises(MismatchError, match="would serve as"):
        trajectory_from_checkpoints(two, by_layer(two), [tmp_path / "good"], tmp_path / "t")
    full = trajectory_from_checkpoints(tower, partition, [tmp_path / "good"], tmp_path / "full")
    (tmp_path / "good").rename(full.folder / "model")
    with pytest.raises(InputError, match="is read and lies in"):
        trajectory_from_checkpoints(tower, partition, [full.folder / "model"], full.folder, overwrite=True)
    with pytest.raises(InputError, match="at least one checkpoint"):
        trajectory_from_checkpoints(tower, partition, [], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def checkpoints(tower: Tower, folder: Path, names: list[str]) -> list[Path]:
    for index, name in enumerate(names):
        write_tensors(folder / name / "model.safetensors", {k: v + index for k, v in tower.named_parameters()})
    return [folder / name for name in names]


@pytest.mark.parametrize(
    ("names", "descent"),
    [
        (["checkpoint-1000", "checkpoint-200"], "checkpoint-1000 comes before checkpoint-200"),
        (["checkpoint-200", "final", "checkpoint-100"], "checkpoint-200 comes before checkpoint-100"),
        (["epoch_10", "epoch_9"], "epoch_10 comes before epoch_9"),
        (["2000", "300"], "2000 comes before 300"),
        (["checkpoint-200", "checkpoint-1000", "final"], None),
        (["a/checkpoint-1000", "b/checkpoint-200"], None),  # the ends of two runs
    ],
)
def test_checkpoints_whose_steps_descend_are_warned_of(
    names: list[str], descent: str | None, tower: Tower, tmp_path: Path
) -> None:
    folders = checkpoints(tower, tmp_path, names)
    with pytest.warns(UserWarning, match=descent) if descent else nullcontext():
        trajectory = trajectory_from_checkpoints(tower, by_layer(tower), folders, tmp_path / "t")
    delta = trajectory.delta(trajectory.partition.blocks[0])
    assert torch.allclose(delta, torch.full_like(delta, len(names) - 1))  # the order given, all the same


def test_numeric_order_is_the_order_of_training(tower: Tower, tmp_path: Path) -> None:
    folders = checkpoints(tower, tmp_path, ["checkpoint-200", "checkpoint-1000", "checkpoint-30000"])
    assert sorted(folders) != folders
    assert numeric_order(sorted(folders)) == folders
    trajectory_from_checkpoints(tower, by_layer(tower), numeric_order(sorted(folders)), tmp_path / "t")


def test_a_checkpoint_given_twice_is_refused(tower: Tower, tmp_path: Path) -> None:
    one, two = checkpoints(tower, tmp_path, ["checkpoint-1", "checkpoint-2"])
    (tmp_path / "latest").symlink_to(two)
    for again in (two, f"{tmp_path}/./checkpoint-2", tmp_path / "latest"):
        with pytest.raises(InputError, match="a checkpoint is given twice, as"):
            trajectory_from_checkpoints(tower, by_layer(tower), [one, two, again], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_checkpoints_of_the_same_weights_are_warned_of(tower: Tower, tmp_path: Path) -> None:
    one, two = checkpoints(tower, tmp_path, ["checkpoint-1", "checkpoint-2"])
    shutil.copytree(two, tmp_path / "final")
    with pytest.warns(UserWarning, match="checkpoint-2 and .*final hold the same weights"):
        trajectory_from_checkpoints(tower, by_layer(tower), [one, two, tmp_path / "final"], tmp_path / "t")


def test_tied_weights_are_found_under_either_name(tower: Tower, tmp_path: Path) -> None:
    tower.layers[1].inner.weight = tower.layers[0].inner.weight
    named = dict(tower.named_parameters(remove_duplicate=False))
    del named["layers.0.inner.weight"]
    write_tensors(tmp_path / "c/model.safetensors", named)
    trajectory = trajectory_from_checkpoints(tower, by_layer(tower), [tmp_path / "c"], tmp_path / "t")
    assert all(not trajectory.delta(block).any() for block in trajectory.partition)


def test_checkpoints_become_points_in_bfloat16(tower: Tower, tmp_path: Path) -> None:
    write_tensors(tmp_path / "c/model.safetensors", {k: v + 1 / 3 for k, v in tower.named_parameters()})
    found = trajectory_from_checkpoints(tower, by_layer(tower), [tmp_path / "c"], tmp_path / "t", dtype=torch.bfloat16)
    delta = found.delta(found.partition.blocks[0])
    assert torch.equal(delta, torch.full_like(delta, torch.tensor(1 / 3).bfloat16().item()))


def test_checkpoints_in_another_format_need_a_theta_0_that_it_can_represent(tower: Tower, tmp_path: Path) -> None:
    partition, weights = by_layer(tower.float()), dict(tower.named_parameters())
    write_tensors(tmp_path / "half/model.safetensors", {name: value.bfloat16() for name, value in weights.items()})
    with pytest.raises(MismatchError, match=r"is torch\.bfloat16, and theta_0 is torch\.float32, with values that"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "half"], tmp_path / "t")
    write_tensors(tmp_path / "wide/model.safetensors", {name: value.double() for name, value in weights.items()})
    with pytest.raises(MismatchError, match=r"is torch\.float64, and theta_0 is torch\.float32; load theta_0 in the"):
        trajectory_from_checkpoints(tower, partition, [tmp_path / "wide"], tmp_path / "t")
    assert not (tmp_path / "t").exists()
    with torch.no_grad():
        for value in weights.values():
            value.copy_(value.bfloat16())
    moved = {name: (value + 1).bfloat16() for name, value in weights.items()}
    write_tensors(tmp_path / "moved/model.safetensors", moved)
    trajectory = trajectory_from_checkpoints(tower, partition, [tmp_path / "moved"], tmp_path / "t")
    for block in partition:
        expected = block.flatten({name: value.float() - weights[name] for name, value in moved.items()})
        assert torch.equal(trajectory.delta(block), expected)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
def test_experts_that_transformers_stores_otherwise(kind: str, tmp_path: Path) -> None:
    """In memory one tensor holds all experts, on disk each has its own; another model's folder is refused as ever."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"vocab_size": 50, "num_key_value_heads": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    count = {"Mixtral": "num_local_experts", "Qwen2Moe": "num_experts"}[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, **experts, **{count: 4})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    other = copy.deepcopy(model)
    nudge(other, 0.5)
    other.save_pretrained(tmp_path / "moe")
    trajectory = trajectory_from_checkpoints(model, by_layer(model), [tmp_path / "moe"], tmp_path / "t")
    for block in trajectory.partition:
        assert any("experts" in spec.name for spec in block.parameters)
        torch.testing.assert_close(trajectory.delta(block), torch.full((block.numel,), 0.5), rtol=0, atol=1e-6)
    fewer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=1))
    fewer.save_pretrained(tmp_path / "llama")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for one, partition in ((model, by_layer(model)), (wrapped, trainable_by_layer(wrapped))):
        with pytest.raises(MismatchError, match="no tensor for the parameter"):
            trajectory_from_checkpoints(one, partition, [tmp_path / "llama"], tmp_path / "other")

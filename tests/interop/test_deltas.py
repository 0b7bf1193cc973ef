"""Files of changed weights: bit for bit, for the right model alone."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from towers import Tower

from tinyspan import InputError, MismatchError, StorageError, SubspaceModel, by_layer, empty_basis, random_basis
from tinyspan.interop.deltas import apply_delta, export_delta

TOKENS = torch.arange(10).reshape(2, 5)


def trained(density: float) -> SubspaceModel:
    model = Tower()
    subspace = SubspaceModel(
        model, random_basis(by_layer(model), 2, density=density), modules_to_save=["head"], init_std=1.0
    )
    with torch.no_grad():
        model.head.weight[0] += 0.5
    return subspace


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_plain_model_becomes_the_trained_one_bit_for_bit(density: float, tmp_path: Path) -> None:
    subspace, other = trained(density), Tower()
    expected = subspace(TOKENS)
    assert not torch.equal(other(TOKENS), expected)
    with torch.no_grad():
        other.head.weight.add_(3)  # trained beside: a new head has other numbers every time
    size = export_delta(subspace, tmp_path / "delta.safetensors")
    assert size == (tmp_path / "delta.safetensors").stat().st_size
    apply_delta(other, tmp_path / "delta.safetensors")
    assert torch.equal(other(TOKENS), expected)
    for name, value in subspace.model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_what_was_trained_with_frozen_layers_is_a_delta_too(tmp_path: Path) -> None:
    model = Tower()
    subspace = SubspaceModel(model, empty_basis(by_layer(model)), modules_to_save=["head"])
    assert subspace.delta() == {}
    with torch.no_grad():
        model.head.weight[0] += 0.5
    export_delta(subspace, tmp_path / "delta.safetensors")
    other = Tower()
    apply_delta(other, tmp_path / "delta.safetensors")
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_sparse_basis_gives_a_small_file(tmp_path: Path) -> None:
    """So many coordinates as the basis has, in float64 and int32, whatever its rank."""
    subspace = trained(0.1)
    export_delta(subspace, tmp_path / "delta.safetensors")
    tensors = load_file(tmp_path / "delta.safetensors")
    moving = sum(len(v.indices) for v in subspace.basis.maps.values())  # type: ignore[attr-defined]
    in_blocks = {spec.name for block in subspace.blocks for spec in block.parameters}
    values = {key: value for key, value in tensors.items() if key.startswith("values/")}
    written = sum(
        len(value) for key, value in values.items() if key[7:] in in_blocks and f"indices/{key[7:]}" in tensors
    )
    whole = sum(
        value.numel() for key, value in values.items() if key[7:] in in_blocks and f"indices/{key[7:]}" not in tensors
    )
    assert 0 < written <= moving <= written + whole
    assert whole < 0.2 * sum(block.numel for block in subspace.blocks)


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    export_delta(trained(0.1), tmp_path / "delta.safetensors")
    other = Tower()
    with torch.no_grad():
        next(iter(by_layer(other).select(other).values())).add_(1e-3)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(MismatchError, match="another theta_0"):
        apply_delta(other, tmp_path / "delta.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    applied = Tower()
    apply_delta(applied, tmp_path / "delta.safetensors")
    with pytest.raises(MismatchError, match="another theta_0"):
        apply_delta(applied, tmp_path / "delta.safetensors")
    followed = trained(0.1)
    with pytest.raises(InputError, match="follows a SubspaceModel"):
        apply_delta(followed.model, tmp_path / "delta.safetensors")
    with pytest.raises(MismatchError, match="no parameter"):
        apply_delta(torch.nn.Linear(2, 2), tmp_path / "delta.safetensors")


def rewritten(path: Path, change: object) -> None:
    with safe_open(path, "pt") as reader:
        header = reader.metadata()
    tensors = load_file(path)
    change(tensors, header)  # type: ignore[operator]
    save_file(tensors, path, metadata=header)


def test_damage(tmp_path: Path) -> None:
    whole = tmp_path / "delta.safetensors"
    export_delta(trained(0.1), whole)
    with pytest.raises(InputError, match="exists"):
        export_delta(trained(0.1), whole)
    content = whole.read_bytes()
    key = next(key for key in load_file(whole) if key.startswith("indices/"))
    values = key.replace("indices/", "values/")

    def spoil(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        tensors[key] = tensors[key].flip(0)

    def beyond(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        tensors[key][-1] = 10**6

    def poison(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        tensors[values][0] = torch.nan

    def short(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        tensors[values] = tensors[values][1:]

    def partition(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        header["partition"] = "[1]"

    def removed(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        del tensors[key], tensors[values]

    def empty(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        tensors[key], tensors[values] = tensors[key][:0], tensors[values][:0]

    for change in (spoil, beyond, poison, short, partition, removed, empty):
        whole.write_bytes(content)
        rewritten(whole, change)
        other = Tower()
        with pytest.raises((StorageError, InputError)):
            apply_delta(other, whole)
        assert all(torch.equal(value, Tower().state_dict()[name]) for name, value in other.state_dict().items())
    whole.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match="cannot be read"):
        apply_delta(Tower(), whole)
    save_file({"a": torch.zeros(1)}, whole)
    with pytest.raises(InputError, match="is not a delta"):
        apply_delta(Tower(), whole)

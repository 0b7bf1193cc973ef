"""What holds for every partition, by its being registered, on models of several shapes."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from towers import Layer, Tower

from tinyspan import (
    Basis,
    InputError,
    Partition,
    SubspaceModel,
    by_layer,
    by_pattern,
    fastfood_basis,
    random_basis,
    register_basis,
    register_partition,
)
from tinyspan.bases.constructors import CONSTRUCTORS
from tinyspan.partitioning import PARTITIONS, build_partition, regrouped


class Both(nn.Module):
    """Two stacks, as an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Tower(2), Tower(1, seed=1)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.encoder(tokens) + self.decoder(tokens)
        return out


def tied() -> nn.Module:
    """Weights that two layers share, and one that the second layer shares with the head."""
    model = Tower(3)
    model.layers[1].inner.weight = model.layers[0].inner.weight
    model.layers[2].norm.weight = model.layers[0].norm.weight
    model.head.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    model.head.bias = model.layers[1].outer.bias
    return model


def repeated() -> nn.Module:
    """A layer that is used twice."""
    model = Tower(2)
    model.layers.append(model.layers[0])
    return model


def partly_frozen() -> nn.Module:
    model = Tower(3).requires_grad_(False)
    model.layers[0].outer.requires_grad_(True)
    model.layers[2].norm.requires_grad_(True)
    model.head.requires_grad_(True)
    return model


def sequential() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(Layer(3) for _ in range(2))).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tower": Tower,
    "both": Both,
    "tied": tied,
    "repeated": repeated,
    "partly frozen": partly_frozen,
    "sequential": sequential,
}


def cases() -> Iterator[object]:
    """Every registered partition, and by_pattern, which takes patterns beside the model."""
    functions: dict[str, Callable[[nn.Module], Partition]] = {name: entry.build for name, entry in PARTITIONS.items()}
    functions["pattern"] = partial(by_pattern, patterns={"rest": r"(?!.*norm).*", "norms": r".*norm.*"})
    for name, build in functions.items():
        for kind, model in MODELS.items():
            yield pytest.param(build, model, id=f"{name}-{kind}")


every_partition = pytest.mark.parametrize(("build", "model"), list(cases()))


def values_like(tensors: dict[str, nn.Parameter], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in tensors.items()}


@every_partition
def test_blocks_are_disjoint_and_hold_every_tied_parameter_once(build: Any, model: Any) -> None:
    owner = model()
    partition, parameters = build(owner), dict(owner.named_parameters())
    names = [spec.name for spec in partition.parameters()]
    assert len({block.name for block in partition}) == len(partition) > 0
    assert len(set(names)) == len(names)
    assert set(names) <= set(parameters), "a tied parameter has the first of its names"
    for spec in partition.parameters():
        assert (spec.shape, spec.dtype) == (tuple(parameters[spec.name].shape), parameters[spec.name].dtype)
    selected = partition.select(owner)
    assert list(selected) == names
    assert len(set(map(id, selected.values()))) == len(names)
    assert partition.numel == sum(value.numel() for value in selected.values())


@every_partition
def test_parameters_are_in_the_order_of_the_model(build: Any, model: Any) -> None:
    owner = model()
    position = {name: index for index, (name, _) in enumerate(owner.named_parameters())}
    places = [[position[spec.name] for spec in block.parameters] for block in build(owner)]
    assert all(own == sorted(own) for own in places)
    assert [own[0] for own in places] == sorted(own[0] for own in places)


@every_partition
def test_flatten_and_unflatten_are_exact_and_adjoint(build: Any, model: Any) -> None:
    owner = model()
    partition = build(owner)
    selected = partition.select(owner)
    for block in partition:
        vector = block.flatten(selected)
        assert vector.shape == (block.numel,)
        parts = block.unflatten(vector)
        assert list(parts) == [spec.name for spec in block.parameters]
        assert all(torch.equal(part, selected[name]) for name, part in parts.items())
        assert torch.equal(block.flatten(parts), vector)
        assert [(a, b) for _, a, b in block.spans()][-1][1] == block.numel
        tensors, direction = values_like(selected, 1), torch.linspace(-1, 1, block.numel, dtype=vector.dtype)
        inner = sum((tensors[name] * part).sum() for name, part in block.unflatten(direction).items())
        torch.testing.assert_close(block.flatten(tensors) @ direction, inner, rtol=1e-12, atol=1e-12)


@every_partition
def test_json_makes_the_same_partition_again(build: Any, model: Any) -> None:
    partition = build(model())
    assert Partition.from_json(json.loads(json.dumps(partition.to_json()))) == partition


@every_partition
def test_the_model_decides_the_partition_and_stays_as_it_is(build: Any, model: Any) -> None:
    owner = model()
    before = deepcopy(owner)
    partition = build(owner)
    assert partition == build(owner) == build(deepcopy(owner))
    for (name, value), (other, expected) in zip(owner.named_parameters(), before.named_parameters(), strict=True):
        assert (name, value.requires_grad) == (other, expected.requires_grad)
        assert torch.equal(value, expected)


@every_partition
def test_fingerprints_are_those_of_the_values(build: Any, model: Any) -> None:
    owner = model()
    partition = build(owner)
    selected = partition.select(owner)
    fingerprint = partition.fingerprint(selected)
    assert list(fingerprint) == [block.name for block in partition]
    assert fingerprint == build(again := model()).fingerprint(partition.select(again))
    changed = list(partition)[-1]
    with torch.no_grad():
        selected[changed.parameters[-1].name].view(-1)[-1] += 1
    other = partition.fingerprint(selected)
    assert {name for name in fingerprint if fingerprint[name] != other[name]} == {changed.name}


@every_partition
def test_a_model_moves_in_a_basis_of_it_and_back(build: Any, model: Any) -> None:
    owner = model()
    start = {name: value.detach().clone() for name, value in owner.named_parameters()}
    partition = build(owner)
    subspace = SubspaceModel(owner, random_basis(partition, 1, dtype=torch.float64), init_std=1.0)
    merged = dict(subspace.merge().named_parameters())
    moved = {name for name, value in merged.items() if not torch.equal(value, start[name])}
    assert moved == {spec.name for spec in partition.parameters()}
    subspace.unmerge()
    assert all(torch.equal(value, start[name]) for name, value in owner.named_parameters())


# -- what a registered partition says of itself --


def in_layers(model: nn.Module) -> set[str]:
    """Names of the parameters in the layers, as the models above are written."""
    sequential = isinstance(model, nn.Sequential)
    return {name for name, _ in model.named_parameters() if sequential or "layers." in name}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PARTITIONS)
def test_a_recorded_partition_is_regrouped_as_the_model_is_partitioned(name: str, kind: str) -> None:
    model, entry = MODELS[kind](), PARTITIONS[name]
    if entry.regroup is None:
        names = ", ".join(sorted(other for other in PARTITIONS if PARTITIONS[other].regroup is not None))
        with pytest.raises(InputError, match=f"cannot group a recorded trajectory; expected one of {names}$"):
            regrouped(by_layer(model), name)
        return
    partition = regrouped(by_layer(model), name)
    assert partition == entry.build(model)
    assert {spec.name for spec in partition.parameters()} == in_layers(model)


@pytest.mark.parametrize("change", ["lost", "other shape"])
def test_a_regrouping_to_other_parameters_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def regroup(layers: Partition) -> Partition:
        first, *rest = layers.blocks
        specs = first.parameters[1:]
        if change == "other shape":
            specs = (replace(first.parameters[0], shape=(1,)), *specs)
        return Partition((replace(first, parameters=specs), *rest))

    monkeypatch.setattr(PARTITIONS, "_entries", dict(PARTITIONS._entries))
    register_partition("partial", regroup=regroup)(by_layer)
    lost = next(by_layer(Tower()).parameters()).name
    with pytest.raises(InputError, match=f"regroup of the partition 'partial' must .* is '{lost}'"):
        regrouped(by_layer(Tower()), "partial")


def test_a_partition_is_built_from_pairs() -> None:
    model = Tower()
    pairs = [("rest", "head.weight"), ("rest", "head.bias")]
    assert build_partition(model, pairs) == by_pattern(model, {"rest": "head.*"})
    with pytest.raises(InputError, match="Tower has no parameter 'hed', which is assigned to block 'rest'"):
        build_partition(model, [*pairs, ("rest", "hed")])


def test_trainable_covers_what_is_trained_in_the_layers() -> None:
    model = partly_frozen()
    expected = {name for name, value in model.named_parameters() if value.requires_grad} & in_layers(model)
    assert {spec.name for spec in PARTITIONS["trainable"].build(model).parameters()} == expected


def test_a_registered_partition_is_what_a_named_constructor_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PARTITIONS, "_entries", dict(PARTITIONS._entries))
    monkeypatch.setattr(CONSTRUCTORS, "_entries", dict(CONSTRUCTORS._entries))

    @register_partition("norms")
    def by_norm(model: nn.Module) -> Partition:
        return by_pattern(model, {"norms": ".*norm.*"})

    def spread(partition: Partition, rank: int) -> Basis:
        return fastfood_basis(partition, rank)

    register_basis("spread", partition="norms")(spread)
    assert list(CONSTRUCTORS["spread"].draw(Tower(), 2, 0).ranks) == ["norms"]
    assert list(CONSTRUCTORS["fastfood"].draw(Tower(), 2, 0).ranks) == ["model"]
    assert list(CONSTRUCTORS["random"].draw(Tower(), 2, 0).ranks) == ["layers.0", "layers.1"]
    register_basis("lost", partition="no such")(spread)
    with pytest.raises(
        InputError, match=f"unknown partition 'no such'; expected one of {', '.join(sorted(PARTITIONS))}"
    ):
        CONSTRUCTORS["lost"].draw(Tower(), 2, 0)
    with pytest.raises(InputError, match="a partition with the name 'layer' is already registered"):
        register_partition("layer")(by_norm)

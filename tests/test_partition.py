import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from towers import Tower

from tinyspan import (
    InputError,
    MismatchError,
    Partition,
    SubspaceModel,
    by_layer,
    by_module,
    by_pattern,
    random_basis,
    whole_model,
)
from tinyspan.partition import Block, ParameterSpec
from tinyspan.weights import finite


def test_by_layer_is_the_stack_in_order(tower: Tower) -> None:
    partition = by_layer(tower)
    assert [block.name for block in partition] == ["layers.0", "layers.1"]
    expected = [name for name, _ in tower.named_parameters() if name.startswith("layers.")]
    assert [spec.name for spec in partition.parameters()] == expected


def test_all_groupings_cover_the_same_numbers(tower: Tower) -> None:
    layer, module, whole = by_layer(tower), by_module(tower), whole_model(tower)
    assert layer.numel == module.numel == whole.numel == sum(p.numel() for p in tower.layers.parameters())
    assert len(module) == 6
    assert [block.name for block in whole] == ["model"]
    assert layer.per_module() == module
    assert module.as_one_block() == whole


@given(layers=st.integers(1, 4), width=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_flatten_then_unflatten_is_the_identity(layers: int, width: int, seed: int) -> None:
    model = Tower(layers, width, seed)
    for partition in (by_layer(model), by_module(model), whole_model(model)):
        parameters = partition.select(model)
        for block in partition:
            vector = block.flatten(parameters)
            assert vector.shape == (block.numel,)
            for name, value in block.unflatten(vector).items():
                assert torch.equal(value, parameters[name])
            assert torch.equal(block.flatten(block.unflatten(vector)), vector)


def test_two_stacks_and_nested_stacks() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Tower(2), Tower(1)

    assert [block.name for block in by_layer(Both())] == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0"]

    class Expert(nn.Module):  # a layer that holds a list of modules itself: the outermost list counts
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Tower(1) for _ in range(3))

    model = nn.ModuleDict({"stack": nn.ModuleList([Expert(), Expert()])})
    assert [block.name for block in by_layer(model)] == ["stack.0", "stack.1"]


def test_a_layer_used_twice_is_one_block() -> None:
    tower = Tower(1)
    tower.layers.append(tower.layers[0])
    partition = by_layer(tower)
    assert [block.name for block in partition] == ["layers.0"]


def test_a_weight_tied_across_layers_belongs_to_the_first(tower: Tower) -> None:
    tower.layers[1].inner.weight = tower.layers[0].inner.weight
    names = [[spec.name for spec in block.parameters] for block in by_layer(tower)]
    assert "layers.0.inner.weight" in names[0]
    assert "layers.1.inner.weight" not in names[1]


def test_no_stack_says_what_to_do() -> None:
    with pytest.raises(InputError, match="by_pattern"):
        by_layer(nn.Linear(2, 2))


def test_patterns(tower: Tower) -> None:
    partition = by_pattern(tower, {"norms": r".*norm.*", "first": r"layers\.0\.(inner|outer).*"})
    assert [len(block.parameters) for block in partition] == [4, 4]
    with pytest.raises(InputError, match="matches no parameter"):
        by_pattern(tower, {"nothing": "encoder.*"})
    with pytest.raises(InputError, match=r"'norm' .* whole name, as it must; .* a part of .*; try '\.\*norm\.\*'"):
        by_pattern(tower, {"norms": "norm"})
    with pytest.raises(InputError, match=r"the pattern '\(' of block 'open' is not a regular expression"):
        by_pattern(tower, {"open": "("})
    with pytest.raises(InputError, match="lies in two blocks"):
        by_pattern(tower, {"all": ".*", "norms": r".*norm.*"})


def test_quantized_weights_are_refused() -> None:
    model = Tower(1)
    model.layers[0].inner.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="int8"):
        by_layer(model)


def test_json_round_trip_and_nonsense(tower: Tower) -> None:
    partition = by_layer(tower)
    assert Partition.from_json(partition.to_json()) == partition
    for nonsense in ([{}], [{"name": "a", "parameters": [["w", [1], "import os"]]}], [{"name": "a", "parameters": 3}]):
        with pytest.raises(InputError):
            Partition.from_json(nonsense)


def test_fingerprint_notices_one_flipped_bit(tower: Tower) -> None:
    partition = by_layer(tower)
    before = partition.fingerprint(partition.select(tower))
    weight = tower.layers[1].norm.weight
    with torch.no_grad():
        weight.view(torch.int64)[0] ^= 1
    after = partition.fingerprint(partition.select(tower))
    assert before["layers.0"] == after["layers.0"]
    assert before["layers.1"] != after["layers.1"]


def test_fingerprint_is_the_hash_of_names_and_bytes_in_order() -> None:
    values = {f"w{index}": torch.arange(6.0).reshape(2, 3) + index for index in range(20)}
    specs = [ParameterSpec(name, (2, 3), torch.float32) for name in values]
    partition = Partition(tuple(Block(f"block {index}", tuple(specs[index : index + 2])) for index in range(0, 20, 2)))
    found = partition.fingerprint(values)
    assert list(found) == [block.name for block in partition]
    for block in partition:
        told = b"".join(
            f"{spec.name} [2, 3] torch.float32\n".encode() + values[spec.name].numpy().tobytes()
            for spec in block.parameters
        )
        assert found[block.name] == hashlib.sha256(told).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (1000, 300)])
@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf"), float("-inf")])
def test_finite_is_what_looking_at_every_number_says(
    dtype: torch.dtype, shape: tuple[int, ...], wrong: float | None
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for place in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() and wrong is not None else {None}:
        sick = tensor.clone()
        if place is not None:
            sick.view(-1)[place] = wrong
        assert finite(sick.to(dtype)) == (place is None)
    assert finite(torch.arange(5))
    assert finite(torch.ones(2, 3, requires_grad=True).T)
    assert not finite(torch.tensor([[0, float("nan")], [1, 2]]).T)
    assert finite(torch.ones(3, dtype=torch.complex64))
    assert not finite(torch.full((3,), complex(0, float("inf"))))
    assert not finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))


def test_another_model_is_refused_by_its_first_difference(tower: Tower) -> None:
    partition = by_layer(tower)
    with pytest.raises(MismatchError, match=r"no parameter 'layers\.1"):
        partition.select(Tower(1))
    with pytest.raises(MismatchError, match=r"'layers\.0\.inner\.weight': expected shape \[8, 4\]"):
        partition.select(Tower(2, width=5))
    with pytest.raises(MismatchError, match="float32"):
        partition.select(Tower().float())


def test_a_renamed_parameter_is_told_with_its_nearest_name(tower: Tower) -> None:
    partition = by_layer(tower)
    other = Tower()
    other.layers[0].inner_map = other.layers[0]._modules.pop("inner")
    with pytest.raises(MismatchError, match=r"no parameter 'layers\.0\.inner\.weight'.*'layers\.0\.inner_map\.weight'"):
        partition.select(other)


class Packed(torch.Tensor):
    """What packages for quantization make of a weight: it says float32 and holds something else."""


def test_weights_that_only_look_like_floating_point_numbers_are_refused() -> None:
    model = Tower()
    model.layers[1].outer.weight = nn.Parameter(torch.zeros(4, 8).as_subclass(Packed))
    with pytest.raises(
        InputError, match=r"'layers.1.outer.weight' is a Packed: .* without quantization, or train a LoRA"
    ):
        by_layer(model)


def test_a_partition_that_names_a_tied_parameter_twice_is_refused(tower: Tower) -> None:
    partition = by_layer(tower)
    tower.layers[1].inner = tower.layers[0].inner
    with pytest.raises(
        MismatchError, match=r"ties 'layers.0.inner.weight' and 'layers.1.inner.weight': .* in the first"
    ):
        partition.select(tower)
    assert by_layer(tower).numel < partition.numel


def test_representations_tell_the_numbers() -> None:
    model = nn.Sequential(*(nn.Linear(2, 1) for _ in range(9)))
    partition = by_pattern(model, {f"layer {index}": f"{index}.*" for index in range(9)})
    assert repr(partition.blocks[0]) == "Block('layer 0': 2 parameters with 3 numbers)"
    names = "layer 0, layer 1, layer 2, ..., layer 8"
    assert repr(partition) == f"Partition(9 blocks, 18 parameters with 27 numbers: {names})"
    subspace = SubspaceModel(model, random_basis(partition, 2), modules_to_save=())
    first = "  blocks: 9, trainable: 18 in z, 0 directly || model: 27 parameters"
    assert repr(subspace).splitlines()[1] == first

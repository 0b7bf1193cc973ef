import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
    trainable_by_layer,
    whole_model,
)
from tinyspan import partition as module
from tinyspan.partition import MAX_BLOCK_NUMEL, Block, ParameterSpec, require_partition


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def two_numbers(count: int = 1, dtype: torch.dtype = torch.float32) -> Partition:
    """Return a partition with a number of blocks, each with one parameter of two numbers."""
    names = [chr(ord("a") + index) for index in range(count)]
    return Partition(tuple(Block(f"block {name}", (ParameterSpec(name, (2,), dtype),)) for name in names))


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


@pytest.mark.parametrize(
    "other",
    [
        nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),  # members without modules of their own, as of a head
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.ModuleList([nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())]),  # without parameters
        nn.ModuleList(),
    ],
)
def test_other_containers_are_no_stacks(other: nn.Module) -> None:
    model = nn.ModuleDict({"first": other, "encoder": Tower(2)})
    assert [block.name for block in by_layer(model)] == ["encoder.layers.0", "encoder.layers.1"]


def test_a_sequence_of_one_is_no_stack_but_may_hold_one() -> None:
    assert [block.name for block in by_layer(nn.Sequential(Tower(2)))] == ["0.layers.0", "0.layers.1"]


def test_a_layer_used_twice_is_one_block() -> None:
    tower = Tower(1)
    tower.layers.append(tower.layers[0])
    partition = by_layer(tower)
    assert [block.name for block in partition] == ["layers.0"]


def test_a_layer_that_the_model_has_under_another_name_too_is_trained(tower: Tower) -> None:
    model = nn.Module()
    model.first, model.layers = tower.layers[0].inner, tower.layers  # parameters are listed by their first names
    assert trainable_by_layer(model) == by_layer(model)


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
    for shape in ([0], [1] * 64):
        stored = [{"name": "a", "parameters": [["w", shape, "float32"]]}]
        assert Partition.from_json(stored).to_json() == stored


@pytest.mark.parametrize(
    ("nonsense", "reason"),
    [
        ([{}], "'name'"),
        ([{"name": "a", "parameters": 3}], "'int' object is not iterable"),
        ([{"name": 7, "parameters": []}], "expected a name, found 7"),
        ([{"name": "a", "parameters": [["w", [1], "import os"]]}], "'import os' is not a floating-point dtype"),
        ([{"name": "a", "parameters": [["w", [1], "int8"]]}], "'int8' is not a floating-point dtype"),
        ([{"name": "a", "parameters": [["w", (1,), "float32"]]}], "(1,) is not the shape of a tensor"),
        ([{"name": "a", "parameters": [["w", [-1], "float32"]]}], "[-1] is not the shape of a tensor"),
        ([{"name": "a", "parameters": [["w", [1.5], "float32"]]}], "[1.5] is not the shape of a tensor"),
        (
            [{"name": "a", "parameters": [["w", [1] * 65, "float32"]]}],
            f"{[1] * 65!r:.100} is not the shape of a tensor",
        ),
    ],
)
def test_json_of_no_partition_is_refused_with_the_reason(nonsense: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(InputError, match=exactly(f"not a partition: {reason}")):
        Partition.from_json(nonsense)


def test_overlapping_or_empty_blocks_are_refused() -> None:
    a, b = two_numbers(2).blocks
    for blocks, message in {
        (): "a partition needs at least one block",
        (a, Block("block a", b.parameters)): "two blocks have the same name",
        (a, Block("nothing", ())): "block 'nothing' is empty",
        (a, b, Block("c", a.parameters)): "parameter 'a' lies in two blocks, 'block a' and 'c'",
        (Block("large", (ParameterSpec("w", (MAX_BLOCK_NUMEL + 1,), torch.float32),)),): (
            "block 'large' has more than 2^48 numbers"
        ),
    }.items():
        with pytest.raises(InputError, match=exactly(message)):
            Partition(blocks)
    largest = Block("largest", (ParameterSpec("w", (MAX_BLOCK_NUMEL,), torch.float32),))
    assert Partition((largest,)).numel == MAX_BLOCK_NUMEL


def test_a_block_by_name() -> None:
    partition = two_numbers(2)
    assert partition["block b"] is partition.blocks[1]
    with pytest.raises(KeyError) as error:
        partition["block c"]
    assert error.value.args == ("no block 'block c'; the blocks are ['block a', 'block b']",)


def test_vectors_and_tensors_of_other_sizes_are_refused() -> None:
    (block,) = two_numbers()
    with pytest.raises(MismatchError, match=exactly("block 'block a' needs the parameter 'a', which is absent")):
        block.flatten({})
    with pytest.raises(MismatchError, match=exactly("parameter 'a': expected shape [2], got [1, 2]")):
        block.flatten({"a": torch.zeros(1, 2)})
    with pytest.raises(MismatchError, match=exactly("block 'block a': expected a vector of 2 numbers, got shape [3]")):
        block.unflatten(torch.zeros(3))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_widened_replaces_half_precision(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert two_numbers(2, dtype).widened() == two_numbers(2, wide)


def test_what_is_no_partition_is_refused_with_what_to_do(tower: Tower) -> None:
    require_partition(two_numbers())
    message = "expected a Partition, got by_layer; call it with the model, by_layer(model)"
    with pytest.raises(InputError, match=exactly(message)):
        require_partition(by_layer)
    with pytest.raises(InputError, match=exactly("expected a Partition, got list")):
        require_partition([])


def test_a_wider_tensor_has_the_fingerprint_of_the_narrower_one_with_its_values() -> None:
    partition, narrow = two_numbers(dtype=torch.bfloat16), torch.tensor([0.5, -3], dtype=torch.bfloat16)
    expected = partition.fingerprint({"a": narrow})
    assert partition.fingerprint({"a": narrow.double()}) == expected
    rounded = narrow.double() + 1e-6
    assert torch.equal(rounded.bfloat16(), narrow)
    assert partition.fingerprint({"a": rounded}) != expected


def test_fingerprints_are_computed_in_threads_or_where_none_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    partition, values = two_numbers(3), {name: torch.tensor([1.0, ord(name)]) for name in "abc"}
    started = []

    def pool(threads: int) -> ThreadPoolExecutor:
        started.append(threads)
        return ThreadPoolExecutor(threads)

    def refused(threads: int) -> ThreadPoolExecutor:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module, "ThreadPoolExecutor", pool)
    expected = partition.fingerprint(values)
    assert started == [module.HASH_THREADS]
    monkeypatch.setattr(module, "ThreadPoolExecutor", refused)
    assert partition.fingerprint(values) == expected
    assert list(expected) == ["block a", "block b", "block c"]
    assert len(set(expected.values())) == 3


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
    other.layers[0].inner_mapped = nn.Linear(4, 8)
    message = (
        "the model has no parameter 'layers.0.inner.weight', which the partition names; "
        "the nearest is 'layers.0.inner_map.weight'"
    )
    with pytest.raises(MismatchError, match=exactly(message)):
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


def test_two_parameters_in_one_memory_are_refused(tower: Tower) -> None:
    tower.layers[1].inner.weight = nn.Parameter(tower.layers[0].inner.weight.data)
    message = "'layers.0.inner.weight' and 'layers.1.inner.weight' are two parameters in the same memory"
    with pytest.raises(InputError, match=message):
        by_layer(tower)
    tower.layers[1].inner.weight = tower.layers[0].inner.weight  # tied
    assert by_layer(tower)["layers.1"].numel == by_layer(tower)["layers.0"].numel - 32


def test_a_partition_that_names_a_tied_parameter_twice_is_refused(tower: Tower) -> None:
    partition = by_layer(tower)
    tower.layers[1].inner = tower.layers[0].inner
    message = (
        "the model ties 'layers.0.inner.weight' and 'layers.1.inner.weight': the partition expects two parameters; "
        "create the partition from this model, where a tied parameter lies in the first block that has it"
    )
    with pytest.raises(MismatchError, match=exactly(message)):
        partition.select(tower)
    assert by_layer(tower).numel < partition.numel


def test_representations_tell_the_numbers() -> None:
    model = nn.Sequential(*(nn.Linear(2, 1) for _ in range(9)))
    partition = by_pattern(model, {f"layer {index}": f"{index}.*" for index in range(9)})
    assert repr(partition.blocks[0]) == "Block('layer 0': 2 parameters with 3 numbers)"
    names = "layer 0, layer 1, layer 2, ..., layer 8"
    assert repr(partition) == f"Partition(9 blocks, 18 parameters with 27 numbers: {names})"
    four = "Partition(4 blocks, 4 parameters with 8 numbers: block a, block b, block c, block d)"
    assert repr(two_numbers(4)) == four
    subspace = SubspaceModel(model, random_basis(partition, 2), modules_to_save=())
    first = "  blocks: 9, trainable: 18 in z, 0 directly || model: 27 parameters"
    assert repr(subspace).splitlines()[1] == first

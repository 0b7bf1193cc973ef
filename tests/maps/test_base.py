"""What is the same for every kind of map: names of kinds, shapes, positions."""

import re
from typing import Any

import pytest
import torch

from tinyspan import DenseMap, FastfoodMap, KroneckerMap, SparseMap
from tinyspan.maps.base import are_positions, kind_of, metadata_of, require_shapes


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["directions"], DenseMap),
        (["directions", "scales"], DenseMap),
        (["directions", "indices"], SparseMap),
        (["left", "right"], KroneckerMap),
        (["signs", "slots", "gauss"], FastfoodMap),
    ],
)
def test_files_without_metadata_are_of_one_of_the_first_kinds(names: list[str], kind: Any) -> None:
    assert kind_of(names, None) is kind_of(names, {}) is kind_of([], {"kind": kind.kind}) is kind
    assert metadata_of(kind.kind) is None
    assert metadata_of("own") == {"kind": "own"}


def test_tensors_of_no_kind_are_named() -> None:
    with pytest.raises(ValueError, match=r"^the tensors \['a', 'b'\] do not belong to a linear map$"):
        kind_of(["b", "a"], None)


def test_shapes_are_the_expected_ones() -> None:
    require_shapes(5, {"a": (2, 5)}, {"a": [2, 5]})
    message = re.escape("the shapes {'a': [2, 5]} do not belong to a linear map onto 5 numbers") + "$"
    for expected, sound in (({"a": [2, 4]}, True), ({"a": [2, 5], "b": [1]}, True), ({"a": [2, 5]}, False)):
        with pytest.raises(ValueError, match=message):
            require_shapes(5, {"a": [2, 5]}, expected, sound)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_are_integers_from_zero_to_below_the_end(dtype: torch.dtype) -> None:
    for values, found in (([], True), ([0, 4, 2], True), ([5], False), ([1, -1], False), ([-1, 1], False)):
        assert are_positions(torch.tensor(values, dtype=dtype), 5) is found
    assert not are_positions(torch.tensor([0, 1], dtype=torch.int16), 5)
    assert not are_positions(torch.tensor([0.0, 1.0]), 5)


def test_impossible_numbers_are_refused_by_the_name_of_their_tensor() -> None:
    DenseMap.check_numbers(2, {"directions": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"^directions holds NaN, infinite or impossible numbers$"):
        DenseMap.check_numbers(2, {"directions": torch.tensor([[1, torch.nan]])})
    with pytest.raises(ValueError, match=r"^directions holds"):
        DenseMap.check_numbers(2, {"directions": torch.ones(1, 2, dtype=torch.int32)})

"""What holds for every constructor of bases that can be called by name, by its being registered."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from conftest import first_coordinates
from torch import Tensor
from towers import Tower

from tinyspan import Basis, InputError, Partition, SubspaceModel, by_layer, register_basis
from tinyspan.bases.constructors import CONSTRUCTORS, Constructor, drawn_names
from tinyspan.errors import StorageError
from tinyspan.maps.dense import DenseMap
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.partitioning import PARTITIONS
from tinyspan.registry import _load_entry_points


def drawn() -> list[Constructor]:
    constructors = {CONSTRUCTORS[name].name: CONSTRUCTORS[name] for name in drawn_names()}
    return list(constructors.values())


def variants(constructor: Constructor) -> Iterator[dict[str, Any]]:
    """Arguments: a rank and a seed, and each number format and a density beside them, where it takes such."""
    plain = {name: value for name, value in (("rank", 2), ("seed", 1)) if constructor.takes(name)}
    yield plain
    for name, hint in get_type_hints(constructor.build).items():
        if hint is torch.dtype:
            yield from (plain | {name: dtype} for dtype in (torch.float64, torch.bfloat16, torch.int8))
    if constructor.takes("density"):
        yield plain | {"density": 0.5}


CASES = [
    pytest.param(one, arguments, id=f"{one.name}-{index}")
    for one in drawn()
    for index, arguments in enumerate(variants(one))
]
every_constructor = pytest.mark.parametrize(("constructor", "arguments"), CASES)


@pytest.mark.parametrize("grouping", PARTITIONS)
@every_constructor
def test_the_construction_makes_the_same_basis_again(
    constructor: Constructor, arguments: dict[str, Any], grouping: str, tmp_path: Path
) -> None:
    partition: Partition = PARTITIONS[grouping].build(Tower())
    basis = constructor.build(partition, **arguments)
    assert basis.construction["constructor"] == constructor.name
    construction = json.loads(json.dumps(basis.construction))
    again = constructor.build(partition, **constructor.read_arguments(construction))
    assert again.content_hash() == basis.content_hash()
    if constructor.takes("rank"):
        assert basis.ranks == {block.name: 2 for block in partition}
    if constructor.takes("seed"):
        other = constructor.build(partition, **arguments | {"seed": 2})
        assert other.content_hash() != basis.content_hash()
    basis.save_pretrained(tmp_path / "basis")
    loaded = Basis.from_pretrained(tmp_path / "basis")
    assert loaded.ranks == basis.ranks
    assert loaded.content_hash() == basis.content_hash()
    z = {name: torch.ones(rank) for name, rank in basis.ranks.items()}
    for name, moved in basis.matvec(z).items():
        assert torch.equal(loaded.matvec(z)[name], moved)


@every_constructor
def test_an_adapter_makes_its_basis_again(
    constructor: Constructor, arguments: dict[str, Any], tokens: Tensor, tmp_path: Path
) -> None:
    basis = constructor.build(PARTITIONS[constructor.partition].build(Tower()), **arguments)
    subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], init_std=0.3)
    subspace.save_pretrained(tmp_path / "adapter", self_contained=False)
    assert OpenedAdapter(tmp_path / "adapter").basis().content_hash() == basis.content_hash()
    loaded = SubspaceModel.from_pretrained(Tower(), tmp_path / "adapter")
    assert torch.equal(loaded(tokens), subspace(tokens))


@every_constructor
def test_a_model_trains_in_it_as_in_the_dense_matrix(
    constructor: Constructor, arguments: dict[str, Any], tokens: Tensor
) -> None:
    basis = constructor.build(PARTITIONS[constructor.partition].build(Tower()), **arguments)
    dense = {name: DenseMap(v.dense(torch.float64)) for name, v in basis.maps.items()}
    results = []
    for own in (basis, Basis(basis.partition, dense)):
        subspace = SubspaceModel(Tower(), own, modules_to_save=["head"], init_std=0.3)
        loss = subspace(tokens).square().sum()
        loss.backward()
        results.append([loss.detach(), *(z.grad for z in subspace.z if z.grad is not None)])
    assert len(results[0]) == 1 + sum(rank > 0 for rank in basis.ranks.values())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("constructor", drawn(), ids=lambda one: one.name)
def test_it_is_called_by_name_and_refuses_other_arguments(constructor: Constructor) -> None:
    basis = constructor.draw(Tower(), 2 if constructor.takes("rank") else None, 0)
    assert basis.partition == PARTITIONS[constructor.partition].build(Tower())
    for change in ({"colour": "blue"}, {name: [] for name in constructor.arguments} or {"rank": 2}):
        with pytest.raises(ValueError, match=r"."):
            constructor.read_arguments(basis.construction | change)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away afterwards what a test has registered."""
    monkeypatch.setattr(CONSTRUCTORS, "_entries", dict(CONSTRUCTORS._entries))


@pytest.mark.usefixtures("own_constructor")
def test_a_constructor_of_ones_own(tmp_path: Path, tokens: Tensor) -> None:
    assert CONSTRUCTORS["first"].method == "coordinates"
    basis = CONSTRUCTORS["first"].draw(Tower(), None, 0)
    subspace = SubspaceModel(Tower(), basis, init_std=0.3)
    subspace.save_pretrained(tmp_path / "adapter")
    loaded = SubspaceModel.from_pretrained(Tower(), tmp_path / "adapter")
    assert torch.equal(loaded(tokens), subspace(tokens))
    del CONSTRUCTORS._entries["first"]
    with pytest.raises(InputError, match="import the module that registers its constructor 'first'"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "adapter")


@pytest.mark.usefixtures("registry")
def test_what_cannot_be_registered() -> None:
    def needy(partition: Partition, colour: str) -> Basis:
        raise AssertionError

    def vague(partition: Partition, count=1) -> Basis:  # type: ignore[no-untyped-def]
        raise AssertionError

    def open_ended(partition: Partition, **rest: int) -> Basis:
        raise AssertionError

    def by_position(partition: Partition, rank: int, /) -> Basis:
        raise AssertionError

    def unreadable(partition: Partition, dtype: torch.dtype | None = None) -> Basis:
        raise AssertionError

    def unknown(partition: Partition, rank: int) -> Basis:
        raise AssertionError

    unknown.__annotations__["rank"] = "Nowhere"
    with pytest.raises(InputError, match=r"annotation torch\.dtype \| None for dtype: expected torch\.dtype"):
        register_basis("unreadable")(unreadable)
    with pytest.raises(InputError, match=r"cannot be evaluated \(name 'Nowhere' is not defined\)"):
        register_basis("unknown")(unknown)
    with pytest.raises(InputError, match="needs a default for colour"):
        register_basis("needy")(needy)
    with pytest.raises(InputError, match="needs an annotation for count"):
        register_basis("vague")(vague)
    with pytest.raises(InputError, match=r"parameter \*\*rest \(variadic keyword\): expected .* passed by name"):
        register_basis("open")(open_ended)
    with pytest.raises(InputError, match=r"parameter rank \(positional-only\)"):
        register_basis("position")(by_position)
    with pytest.raises(InputError, match="the partition as its first positional parameter"):
        register_basis("nothing")(lambda: first_coordinates(by_layer(Tower())))
    with pytest.raises(InputError, match="already"):
        register_basis("random")(first_coordinates)
    with pytest.raises(InputError, match="cannot name"):
        register_basis("a/b")(first_coordinates)


@pytest.mark.usefixtures("registry")
def test_a_taken_alias_leaves_nothing_registered() -> None:
    with pytest.raises(InputError, match="'random' is already registered"):
        register_basis("first", aliases=("initial", "random"))(first_coordinates)
    assert not {"first", "initial"} & CONSTRUCTORS.keys()


@pytest.mark.usefixtures("registry")
def test_the_same_function_is_registered_twice_as_the_same_class_of_map_is() -> None:
    for _ in range(2):
        register_basis("first", aliases=("initial",))(first_coordinates)
    assert CONSTRUCTORS["initial"].build is first_coordinates
    with pytest.raises(InputError, match="'first' is already registered"):
        register_basis("first", method="coordinates")(first_coordinates)


@pytest.mark.usefixtures("registry")
def test_a_construction_without_its_rank_is_read(tmp_path: Path, tokens: Tensor) -> None:
    def by_default(partition: Partition, rank: int = 2) -> Basis:
        basis = first_coordinates(partition, rank)
        return Basis(partition, basis.maps, construction={"constructor": "default"})

    register_basis("default")(by_default)
    subspace = SubspaceModel(Tower(), by_default(by_layer(Tower())), init_std=0.3)
    subspace.save_pretrained(tmp_path / "adapter", self_contained=False)
    loaded = SubspaceModel.from_pretrained(Tower(), tmp_path / "adapter")
    assert torch.equal(loaded(tokens), subspace(tokens))


@pytest.mark.usefixtures("registry")
def test_types_that_only_type_checkers_import_are_not_needed(tmp_path: Path, tokens: Tensor) -> None:
    def typed(partition: Partition, rank: int = 2) -> Basis:
        basis = first_coordinates(partition, rank)
        return Basis(partition, basis.maps, construction={"constructor": "typed", "rank": rank})

    typed.__annotations__ |= {"partition": "Nowhere", "return": "Nowhere"}
    register_basis("typed")(typed)
    SubspaceModel(Tower(), typed(by_layer(Tower()))).save_pretrained(tmp_path / "adapter")
    assert SubspaceModel.from_pretrained(Tower(), tmp_path / "adapter").basis.rank == 2


def test_get_returns_the_default_for_an_unknown_name() -> None:
    assert CONSTRUCTORS.get("nope") is None
    assert CONSTRUCTORS.get("nope", "default") == "default"
    assert CONSTRUCTORS.get("random") is CONSTRUCTORS["random"]


@pytest.mark.usefixtures("registry")
def test_an_entry_point_that_fails_is_named_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        value, dist = "broken_package.bases", SimpleNamespace(name="broken-package")

        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> None:
            if self.name == "broken":
                raise ModuleNotFoundError("No module named 'gone'")
            register_basis("first")(first_coordinates)

    monkeypatch.setattr("tinyspan.registry.entry_points", lambda group: [Point("broken"), Point("sound")])
    named = r"'broken' \(broken_package\.bases\) of broken-package could not be imported: ModuleNotFoundError: No mod"
    _load_entry_points.cache_clear()
    try:
        with pytest.warns(UserWarning, match=named):
            assert "nope" not in CONSTRUCTORS
        assert CONSTRUCTORS["first"].build is first_coordinates
        with pytest.raises(InputError, match=f"unknown constructor of bases 'nope'; .*{named}"):
            CONSTRUCTORS["nope"]
    finally:
        _load_entry_points.cache_clear()


@pytest.mark.usefixtures("registry")
def test_a_construction_that_its_constructor_refuses_is_damage(tmp_path: Path) -> None:
    def refusing(partition: Partition, count: int = 1) -> Basis:
        if count > 1:
            raise InputError("too many")
        return first_coordinates(partition, count)

    register_basis("first")(refusing)
    basis = first_coordinates(by_layer(Tower()), 2)
    SubspaceModel(Tower(), basis).save_pretrained(tmp_path / "adapter")
    with pytest.raises(StorageError, match=r"manifest\.json is damaged: too many"):
        OpenedAdapter(tmp_path / "adapter").basis()


@pytest.mark.usefixtures("registry")
def test_an_installed_package_registers_its_own_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> None:
            register_basis("first")(first_coordinates)

    monkeypatch.setattr("tinyspan.registry.entry_points", lambda group: [Point()] if group == "tinyspan" else [])
    _load_entry_points.cache_clear()
    try:
        assert "first" in drawn_names()
        assert CONSTRUCTORS["first"].build is first_coordinates
    finally:
        _load_entry_points.cache_clear()

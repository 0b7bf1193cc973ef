"""Files made to do harm: none runs code, leaves its folder, or makes us allocate what it does not hold."""

import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from towers import Tower

from tinyspan import (
    Basis,
    InputError,
    KroneckerMap,
    MismatchError,
    Partition,
    StorageError,
    SubspaceModel,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    fastfood_basis,
    random_basis,
)
from tinyspan.io.folders import check_folder, claimed, prepare_folder
from tinyspan.io.manifests import Manifest, check_file, file_entry, read_manifest
from tinyspan.io.storage import LARGEST, read_json, write_json
from tinyspan.io.tensors import open_tensors, read_checkpoint, write_tensors
from tinyspan.lab.suite import load_suite, suite_text
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.workflows.inspect import describe

pytestmark = pytest.mark.hostile

ENTRY = {"bytes": 1, "sha256": "0" * 64}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and seal it again, with the hashes of the files as they are now."""
    content = read_json(folder / "manifest.json")
    for name in content["files"]:
        content["files"][name] = file_entry(folder / name).model_dump()
    change(content)
    write_json(folder / "manifest.json", content)


def raw(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def tensor(shape: list[int], start: int = 0, stop: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# -- paths -------------------------------------------------------------------------------------------------------------

LEAVING = ["/etc/passwd", "../x", "a/../../x", "..", "", ".", "a\\b", "a//b", "./a", "a/", "a\x00b", "a\nb", "x" * 5000]


@pytest.mark.parametrize("listed", ["files", "attached"])
@pytest.mark.parametrize("name", LEAVING)
def test_no_file_name_leaves_the_folder(tmp_path: Path, name: str, listed: str) -> None:
    content = {"schema_version": 2, "kind": "basis", "partition": [], "fingerprint": {}, listed: {name: ENTRY}}
    write_json(tmp_path / "manifest.json", content)
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_no_link_leaves_the_folder(tmp_path: Path) -> None:
    write_tensors(tmp_path / "outside", {"x": torch.ones(2)})
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="is a link that leaves the folder"):
        check_file(tmp_path / "in", "x", file_entry(tmp_path / "outside"))
    (tmp_path / "in/y").write_bytes((tmp_path / "outside").read_bytes())
    (tmp_path / "in/z").symlink_to("y")
    (tmp_path / "link").symlink_to("in")
    check_file(tmp_path / "in", "z", file_entry(tmp_path / "outside"))
    check_file(tmp_path / "link", "y", file_entry(tmp_path / "outside"))
    (tmp_path / "in/loop").symlink_to("loop")
    with pytest.raises(StorageError, match="is missing"):
        check_file(tmp_path / "in", "loop", file_entry(tmp_path / "outside"))


def test_what_we_write_beside_the_content_follows_no_link(tmp_path: Path) -> None:
    """A folder from elsewhere may have `.holder` point at somebody's shell profile."""
    (tmp_path / "profile").write_text("mine")
    for name in (".tinyspan", ".holder"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(tmp_path / "profile")
        with claimed(tmp_path / "out"):
            prepare_folder(tmp_path / "out", "basis")
        assert (tmp_path / "profile").read_text() == "mine"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/.tinyspan").write_bytes(b"\xff\xfe")
    (tmp_path / "odd/x").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        check_folder(tmp_path / "odd", "basis")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, open_tensors, file_entry):
        with pytest.raises(StorageError, match="is not a regular file"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b", "..", 3, None, ["x"]])
def test_a_checkpoint_index_names_files_beside_it(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "c").mkdir()
    write_tensors(tmp_path / "model.safetensors", {"x": torch.ones(1)})
    (tmp_path / "c/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(StorageError, match=r"index\.json"):
        list(read_checkpoint(tmp_path / "c"))


@pytest.mark.parametrize("place", ["/etc", "absolute", 3, ["x"], "x" * 5000, "a\x00b"])
def test_an_adapter_names_its_basis_by_a_relative_path(tmp_path: Path, place: Any) -> None:
    basis = random_basis(by_layer(Tower()), 2)
    basis.save_pretrained(tmp_path / "b")
    SubspaceModel(Tower(), basis).save_pretrained(tmp_path / "a")
    place = str(tmp_path / "b") if place == "absolute" else place
    edit(tmp_path / "a", lambda content: content["details"].update(basis=place))
    with pytest.raises((StorageError, InputError), match=r"manifest\.json|is not at"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a")


# -- code --------------------------------------------------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["torch", "pickle", "legacy"])
def test_a_pickled_checkpoint_runs_no_code(tmp_path: Path, form: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "pytorch_model.bin"
    content = {"layers.0.inner.weight": torch.ones(2), "evil": Payload(f"touch {proof}")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(StorageError, match=r"pytorch_model\.bin cannot be read safely"):
        list(read_checkpoint(tmp_path))
    assert not proof.exists()
    if form == "torch":  # the payload works: what does not take care is caught
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize("content", [[1, 2], {"x": 3}, {3: torch.ones(1)}, torch.ones(3)])
def test_a_pickled_checkpoint_holds_named_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(StorageError, match=r"pytorch_model\.bin"):
        list(read_checkpoint(tmp_path))


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' * 900 + b"1" + b"}" * 900,
        b'{"a": ' + b"9" * 4000 + b"}",
        b'{"a": 1e999}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": "\xff\xfe"}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\\ud800"}',
        b'{"\\ud800": 1}',
        b"",
        b"{} {}",
        b'{"a": "' + b"x" * LARGEST + b'"}',
    ],
    ids=lambda text: repr(text[:20]),
)
def test_json_that_readers_disagree_on_or_that_is_endless(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(StorageError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json", sealed=False)


def test_our_own_json_is_still_read(tmp_path: Path) -> None:
    content = {
        "name": "é \U0001f600",
        "small": 5e-324,
        "large": 1.7e308,
        "whole": 2**62,
        "deep": [[[[{"a": [None, True]}]]]],
    }
    for again in ({}, {"checksum": "of earlier content"}):
        write_json(tmp_path / "a.json", content | again)
        assert read_json(tmp_path / "a.json") == content


# -- manifests ---------------------------------------------------------------------------------------------------------

W = "layers.0.inner.weight"
PARTITIONS: list[Any] = [
    [],
    [{"name": "a", "parameters": []}],
    [{"name": "a", "parameters": [[W, [10**15, 10**15], "float32"]]}],
    [{"name": "a", "parameters": [[W, [2**62, 4], "float32"]]}],
    [{"name": "a", "parameters": [[W, [-1], "float32"]]}],
    [{"name": "a", "parameters": [[W, [-2, -2], "float32"]]}],
    [{"name": "a", "parameters": [[W, [1.5], "float32"]]}],
    [{"name": "a", "parameters": [[W, ["3"], "float32"]]}],
    [{"name": "a", "parameters": [[W, [True], "float32"]]}],
    [{"name": "a", "parameters": [[W, [1] * 10_000, "float32"]]}],
    [{"name": "a", "parameters": [[W, "12", "float32"]]}],
    [{"name": "a", "parameters": [[W, [1], "int64"]]}],
    [{"name": "a", "parameters": [[W, [1], "save"]]}],
    [{"name": "a", "parameters": [[W, [1], "os.system"]]}],
    [{"name": "a", "parameters": [[W, [1], None]]}],
    [{"name": "a", "parameters": [[3, [1], "float32"]]}],
    [{"name": 3, "parameters": [[W, [1], "float32"]]}],
    [{"name": "a", "parameters": [[W, [1], "float32"], [W, [1], "float32"]]}],
    [{"name": "a", "parameters": [[W, [1], "float32"]]}, {"name": "b", "parameters": [[W, [1], "float32"]]}],
    [{"name": "a", "parameters": [[W, [1], "float32"]]}, {"name": "a", "parameters": [["b", [1], "float32"]]}],
]


@pytest.mark.parametrize("partition", PARTITIONS, ids=range(len(PARTITIONS)))
def test_a_partition_that_is_none(tmp_path: Path, partition: Any) -> None:
    with pytest.raises(InputError):
        Partition.from_json(partition)
    random_basis(by_layer(Tower()), 2).save_pretrained(tmp_path / "b")
    TrajectoryRecorder(Tower(), by_layer(Tower()), tmp_path / "t").record(0)
    SubspaceModel(Tower(), random_basis(by_layer(Tower()), 2)).save_pretrained(tmp_path / "a")
    for folder, load in (
        ("b", Basis.from_pretrained),
        ("t", Trajectory),
        ("a", lambda folder: SubspaceModel.from_pretrained(Tower(), folder)),
        ("a", lambda folder: OpenedAdapter(folder).basis()),
    ):
        edit(tmp_path / folder, lambda content: content.update(partition=partition))
        (tmp_path / "t/points.jsonl").unlink(missing_ok=True)
        for read in (load, describe):
            with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
                read(tmp_path / folder)


@pytest.mark.parametrize(
    "points", [0, {}, {"count": 1}, {"count": 10**15, "hash": "x"}, [], "1", {"count": True, "hash": 1}, [[[[]]]]]
)
def test_weird_points_in_a_manifest(tmp_path: Path, points: Any) -> None:
    recorder = TrajectoryRecorder(Tower(), by_layer(Tower()), tmp_path / "t")
    recorder.record(0)
    recorder.flush()
    edit(tmp_path / "t", lambda content: content["details"].update(points=points))
    with pytest.raises(StorageError, match=r"points\.jsonl is damaged"):
        Trajectory(tmp_path / "t")


@pytest.mark.parametrize("steps", [[1, 1], [2, 1], [0, "1"], [0, None], [True, 2], [0, 1.5], [-1, [1]]])
def test_steps_ascend(tmp_path: Path, steps: list[Any]) -> None:
    from tinyspan.io.journals import append_line

    recorder = TrajectoryRecorder(Tower(), by_layer(Tower()), tmp_path / "t")
    for step in (0, 1):
        recorder.record(step)
    recorder.flush()
    (tmp_path / "t/points.jsonl").unlink()
    link = read_manifest(tmp_path / "t").content_hash()
    for index, step in enumerate(steps, 1):
        entry = file_entry(tmp_path / f"t/points/{index:06d}.safetensors")
        link = append_line(tmp_path / "t/points.jsonl", link, {"step": step, **entry.model_dump()})
    with pytest.raises(StorageError, match="not ascending integers"):
        Trajectory(tmp_path / "t")


# -- what is drawn again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", [random_basis, fastfood_basis])
@pytest.mark.parametrize(
    "change",
    [
        {"rank": 10**9},
        {"rank": 3},
        {"rank": -1},
        {"rank": 0},
        {"rank": "2"},
        {"rank": None},
        {"seed": None},
        {"dtype": "save"},
        {"dtype": "int64"},
        {"dtype": 3},
    ],
    ids=str,
)
def test_nothing_is_drawn_that_the_adapter_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constructor: Any, change: dict[str, Any]
) -> None:
    SubspaceModel(Tower(), constructor(by_layer(Tower()), 2)).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", lambda content: content["construction"]["basis"].update(change))

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("drawn")

    if "seed" not in change:
        monkeypatch.setattr("tinyspan.bases.random.orthonormalize", never)
        monkeypatch.setattr("tinyspan.bases.fastfood.FastfoodMap.draw", never)
    with pytest.raises((StorageError, MismatchError), match=r"safetensors|manifest\.json|another one"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a")


@pytest.mark.parametrize("constructor", [random_basis, fastfood_basis])
def test_nothing_is_drawn_for_blocks_that_the_model_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constructor: Any
) -> None:
    SubspaceModel(Tower(), constructor(by_layer(Tower()), 2)).save_pretrained(tmp_path / "a")

    def grow(content: dict[str, Any]) -> None:
        content["partition"][0]["parameters"][0][1] = [10**7, 10**5]

    edit(tmp_path / "a", grow)
    monkeypatch.setattr("tinyspan.bases.random.orthonormalize", lambda *a, **k: pytest.fail("drawn"))
    monkeypatch.setattr("tinyspan.bases.fastfood.FastfoodMap.draw", lambda *a, **k: pytest.fail("drawn"))
    for load in (
        lambda model: SubspaceModel.from_pretrained(model, tmp_path / "a"),
        lambda model: OpenedAdapter(tmp_path / "a").basis(model),
    ):
        with pytest.raises(MismatchError, match="expected shape"):
            load(Tower())


@pytest.mark.parametrize("ensemble", [10**9, 10**12, 0, -1, True, "2", None, 1.5])
def test_an_ensemble_is_as_large_as_the_file_says(tmp_path: Path, ensemble: Any) -> None:
    basis = random_basis(by_layer(Tower()), 2)
    SubspaceModel(Tower(), basis).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", lambda content: content["construction"].update(ensemble=ensemble))
    with pytest.raises(StorageError, match=r"manifest\.json is damaged|of shape"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a", basis)


@pytest.mark.parametrize("modules", [None, "head", 3, [3], [["head"]], {"head": 1}])
def test_modules_to_save_are_names(tmp_path: Path, modules: Any) -> None:
    basis = random_basis(by_layer(Tower()), 2)
    SubspaceModel(Tower(), basis).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", lambda content: content["construction"].update(modules_to_save=modules))
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a", basis)


@pytest.mark.parametrize("lacking", ["ordinary/head.weight", "scales", "z/model"])
def test_an_adapter_that_lacks_a_part_is_refused(tmp_path: Path, lacking: str) -> None:
    """And does not quietly train on with the base model's numbers in its place."""
    from tinyspan import whole_model

    basis = fastfood_basis(whole_model(Tower()), 3)
    SubspaceModel(Tower(), basis, modules_to_save=["head"], layer_scales=by_layer(Tower())).save_pretrained(
        tmp_path / "a"
    )
    reader = open_tensors(tmp_path / "a/adapter.safetensors")
    held = {key: reader.get_tensor(key).clone() for key in reader.keys() if key != lacking}  # noqa: SIM118
    write_tensors(tmp_path / "a/adapter.safetensors", held)
    edit(tmp_path / "a", lambda content: None)
    with pytest.raises(StorageError, match=r"adapter\.safetensors is damaged"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a")


# -- directions --------------------------------------------------------------------------------------------------------


def spoiled(basis: Basis, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Basis:
    """Save a basis, change the tensors of its first block, and load it with all hashes right."""
    basis.save_pretrained(folder)
    reader = open_tensors(folder / "block-000.safetensors")
    tensors = {key: reader.get_tensor(key).clone() for key in reader.keys()}  # noqa: SIM118
    change(tensors)
    write_tensors(folder / "block-000.safetensors", tensors)
    edit(folder, lambda content: None)
    return Basis.from_pretrained(folder)


def set_at(name: str, index: int, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return change


def cut(name: str, size: int) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name][..., :size].clone()})


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def kronecker_basis(partition: Partition, rank: int) -> Basis:
    """Of blocks that are no matrices here: any two sides will do."""
    maps = {block.name: KroneckerMap(torch.eye(2, 1), torch.eye(rank, block.numel // 2)) for block in partition}
    return Basis(partition, maps)


@pytest.mark.parametrize(
    ("constructor", "change"),
    [
        (random_basis, set_at("directions", 5, float("nan"))),
        (random_basis, set_at("directions", 5, float("inf"))),
        (random_basis, cut("directions", 83)),
        (random_basis, cast("directions", torch.int32)),
        (random_basis, cast("directions", torch.complex64)),
        (random_basis, lambda tensors: tensors.update(directions=torch.zeros(85, 84))),
        (random_basis, lambda tensors: tensors.update(directions=torch.zeros(84))),
        (random_basis, lambda tensors: tensors.update(directions=torch.zeros(1, 2, 84))),
        (random_basis, lambda tensors: tensors.update(extra=torch.zeros(1))),
        (random_basis, lambda tensors: tensors.update(spectrum=torch.tensor([float("nan")]))),
        (random_basis, lambda tensors: tensors.update(spectrum=torch.zeros(2, 2))),
        (random_basis, lambda tensors: tensors.pop("spectrum")),
        (random_basis, lambda tensors: tensors.pop("directions")),
        (fastfood_basis, set_at("slots", 7, 4)),
        (fastfood_basis, set_at("slots", 7, -1)),
        (fastfood_basis, set_at("slots", 7, 2**31 - 1)),
        (fastfood_basis, cast("slots", torch.float32)),
        (fastfood_basis, cut("slots", 64)),
        (fastfood_basis, cut("gauss", 64)),
        (fastfood_basis, set_at("gauss", 3, float("nan"))),
        (fastfood_basis, set_at("signs", 0, float("inf"))),
        (fastfood_basis, lambda tensors: tensors.update(signs=torch.ones(85))),
        (fastfood_basis, lambda tensors: tensors.update(signs=torch.ones(0))),
        (fastfood_basis, lambda tensors: tensors.pop("gauss")),
        (kronecker_basis, set_at("left", 1, float("nan"))),
        (kronecker_basis, cast("right", torch.int32)),
        (kronecker_basis, cut("right", 1)),
        (kronecker_basis, lambda tensors: tensors.update(left=torch.zeros(1, 10**9, 0))),
        (kronecker_basis, lambda tensors: tensors.update(left=torch.zeros(10**9, 0))),
        (kronecker_basis, lambda tensors: tensors.update(left=torch.zeros(84, 85), right=torch.zeros(1, 1))),
        (kronecker_basis, lambda tensors: tensors.pop("right")),
    ],
    ids=lambda value: getattr(value, "__name__", "change"),
)
def test_a_map_that_is_none_is_refused_when_it_is_read(tmp_path: Path, constructor: Any, change: Any) -> None:
    with pytest.raises(StorageError, match=r"block-000\.safetensors is damaged"):
        spoiled(constructor(by_layer(Tower()), 3), tmp_path / "b", change).maps["layers.0"]


def test_a_rank_is_what_the_file_holds(tmp_path: Path) -> None:
    """A shape [10**12, 0] takes no byte, and would make z take terabytes."""
    model = nn.Sequential(nn.Linear(1, 1))
    basis = Basis.from_directions(
        Partition.from_json([{"name": "a", "parameters": [["0.bias", [1], "float32"]]}]), {"a": torch.ones(1, 1)}
    )
    basis.save_pretrained(tmp_path / "b")
    raw(tmp_path / "b/block-000.safetensors", {"directions": tensor([10**12, 0]), "spectrum": tensor([0], dtype="F64")})
    edit(tmp_path / "b", lambda content: content["partition"][0]["parameters"][0].__setitem__(1, [0]))
    with pytest.raises(StorageError, match="do not belong to a linear map onto 0 numbers"):
        SubspaceModel(model, Basis.from_pretrained(tmp_path / "b"))


def test_a_fingerprint_of_other_blocks(tmp_path: Path) -> None:
    Basis.from_directions(
        by_layer(Tower()), {b.name: torch.randn(1, b.numel) for b in by_layer(Tower())}
    ).save_pretrained(tmp_path / "b")
    for fingerprint in ({"x": "0"}, {"layers.0": "0"}, {"layers.0": "0", "layers.1": "0", "x": "0"}):
        edit(tmp_path / "b", lambda content, value=fingerprint: content.update(fingerprint=value))
        with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
            Basis.from_pretrained(tmp_path / "b")


@pytest.mark.parametrize("name", ["start.safetensors", "points/000001.safetensors"])
@pytest.mark.parametrize("value", [torch.ones(31), torch.ones(8, 4), torch.ones(32, dtype=torch.int64), torch.ones(0)])
def test_a_trajectory_holds_what_its_manifest_says(tmp_path: Path, name: str, value: torch.Tensor) -> None:
    recorder = TrajectoryRecorder(Tower(), by_layer(Tower()), tmp_path / "t")
    recorder.record(0)
    recorder.flush()
    reader = open_tensors(tmp_path / "t" / name)
    tensors = {key: reader.get_tensor(key).clone() for key in reader.keys()}  # noqa: SIM118
    write_tensors(tmp_path / "t" / name, {**tensors, W: value})
    from tinyspan.io.journals import append_line

    edit(tmp_path / "t", lambda content: None)
    (tmp_path / "t/points.jsonl").unlink()
    entry = file_entry(tmp_path / "t/points/000001.safetensors")
    link = read_manifest(tmp_path / "t").content_hash()
    append_line(tmp_path / "t/points.jsonl", link, {"step": 0, **entry.model_dump()})
    message = rf"{name} is damaged: expected 32 numbers of torch.float64 for '{W}'"
    with pytest.raises(StorageError, match=message):
        list(Trajectory(tmp_path / "t").chunks(by_layer(Tower()).blocks[0]))
    if name == "start.safetensors":
        with pytest.raises(StorageError, match=message):
            TrajectoryRecorder.resume(Tower(), by_layer(Tower()), tmp_path / "t")


@pytest.mark.parametrize("name", ["points.jsonl", "points"])
def test_points_are_not_written_through_a_link(tmp_path: Path, name: str) -> None:
    TrajectoryRecorder(Tower(), by_layer(Tower()), tmp_path / "t")
    (tmp_path / "t" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="is a link, through which points would be written"):
        TrajectoryRecorder.resume(Tower(), by_layer(Tower()), tmp_path / "t")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("change", [{"layers.0": None}, {"other": "0" * 64}])
def test_every_block_has_a_fingerprint_and_nothing_else(tmp_path: Path, change: dict[str, str | None]) -> None:
    TrajectoryRecorder(Tower(), by_layer(Tower()), tmp_path / "t")

    def other(content: dict[str, Any]) -> None:
        content["fingerprint"] = {k: v for k, v in (content["fingerprint"] | change).items() if v is not None}

    edit(tmp_path / "t", other)
    with pytest.raises(StorageError, match=r"manifest\.json is damaged: .* but not both"):
        Trajectory(tmp_path / "t")


# -- safetensors headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        ({}, b"", 2**63),
        ({}, b"", 2**64 - 1),
        ({}, b"", 10**8),
        ({}, b"", 3),
        ({"x": tensor([10**15], 0, 4)}, b"\0" * 4, None),
        ({"x": tensor([2**62, 2**62], 0, 4)}, b"\0" * 4, None),
        ({"x": tensor([2**64], 0, 4)}, b"\0" * 4, None),
        ({"x": tensor([-1], 0, 4)}, b"\0" * 4, None),
        ({"x": tensor([1], 0, 400)}, b"\0" * 4, None),
        ({"x": tensor([1], 4, 0)}, b"\0" * 4, None),
        ({"x": tensor([1], 2**63, 2**63 + 4)}, b"\0" * 4, None),
        ({"x": tensor([2], 0, 8), "y": tensor([2], 4, 12)}, b"\0" * 12, None),
        ({"x": tensor([1], 0, 4), "y": tensor([1], 0, 4)}, b"\0" * 4, None),
        ({"x": tensor([1], 0, 4)}, b"\0" * 8, None),
        ({"x": tensor([1], 4, 8)}, b"\0" * 8, None),
        ({"x": tensor([1], 0, 4, "F31")}, b"\0" * 4, None),
        (b"[" * 100_000, b"", None),
        (b'{"x": ' * 50_000, b"", None),
        (b"\xff" * 16, b"", None),
        (b"", b"", None),
    ],
    ids=range(20),
)
def test_headers_that_do_not_fit_their_file(tmp_path: Path, header: Any, body: bytes, length: int | None) -> None:
    path = raw(tmp_path / "x.safetensors", header, body, length)
    with pytest.raises(StorageError, match=r"x\.safetensors"):
        open_tensors(path).get_tensor("x")


def test_a_header_of_many_megabytes_is_not_taken_apart(tmp_path: Path) -> None:
    entry = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % number for number in range(300_000)) + b"}"
    assert LARGEST < len(text) < 1e8  # safetensors itself reads up to 100 MB
    raw(tmp_path / "x.safetensors", text)
    tracemalloc.start()
    with pytest.raises(StorageError, match="expected a header of at most"):
        open_tensors(tmp_path / "x.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


# -- recipes -----------------------------------------------------------------------------------------------------------

SMALL = suite_text("small")


@pytest.mark.parametrize("make", ["laughs", "merges"])
def test_a_recipe_has_no_aliases(tmp_path: Path, make: str) -> None:
    """Three levels here; a few more would fill any memory."""
    (tmp_path / "mine.yaml").write_text(SMALL + {"laughs": laughs, "merges": merges}[make](3))
    with pytest.raises(InputError, match=r"mine\.yaml: not YAML: aliases are not read"):
        load_suite(str(tmp_path / "mine.yaml"))


def test_a_recipe_is_not_deep(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SMALL.replace("dimensions: [", f"dimensions: [{'[' * 5_000}"))
    with pytest.raises(InputError, match=r"mine\.yaml: not YAML: nested more than 16 levels deep\n.*line \d+, column"):
        load_suite(str(tmp_path / "mine.yaml"))


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [lol, lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels))]
    return "\n".join(lines) + "\n"


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, levels))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        SMALL + "x: " + "[" * 14_000,
        SMALL + "x: " + "{a: " * 3_500,
        "- " * 8_000,
        SMALL + "x: 2026-13-45",
        SMALL + "x: 2026-02-30 99:99:99",
        SMALL + "x: !!timestamp x",
        SMALL + "x: !!python/object/apply:os.system [touch PROOF]",
        SMALL + "x: !!python/name:os.system",
        SMALL + "x: !!binary ä",
        SMALL + "x: !!int ''",
        SMALL + "x: !!bool maybe",
        SMALL + "x: !!float ''",
        SMALL + "rank: 5",
        SMALL.replace("rank: 32", "rank: " + "9" * 5000),
        SMALL.replace("rank: 32", "rank: 0x" + "f" * 5000),
        SMALL.replace("rank: 32", "rank: " + "1:" * 7_000 + "1"),
        SMALL.replace("epochs: 3", "epochs: 1" + "0" * 30),
        SMALL.replace("epochs: 3", "epochs: .inf"),
        SMALL.replace("learning_rate: 1.0e-4", "learning_rate: .inf"),
        SMALL.replace("learning_rate: 1.0e-4", "learning_rate: .nan"),
        SMALL.replace("learning_rate: 1.0e-4", "learning_rate: 1e400"),
        SMALL.replace("init_std: 0.0", "init_std: .inf"),
        SMALL.replace("seeds: 3", "seeds: 1000000000000"),
        SMALL.replace("seeds: 3", "seeds: 1000000"),
        SMALL.replace("[2, 4, 8, 16, 32]", str([1] * 5000)),
        SMALL.replace("[minilm]", "{1: a, [x]: b}"),
        SMALL.replace("[minilm]", "{'..': a}"),
        SMALL.replace("[minilm]", '{"a\\nb": a}'),
        SMALL.replace("[minilm]", '{"\\ud800": a}'),
        SMALL.replace("[minilm]", "{" + "x" * 500 + ": a}"),
        SMALL + "1: 2",
        SMALL + "? [a, b]\n: c",
        SMALL + "? {a: b}\n: c",
        SMALL + "~: 3",
        SMALL + 'note: "\\e[2J"',
        SMALL + "#" * 20_000,
        "\x00",
        "",
        "%YAML 9.9\n---\na: 1",
    ],
    ids=range(39),
)
def test_a_recipe_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.yaml"):
        load_suite("mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_our_limits_are_beyond_the_papers_study(tmp_path: Path) -> None:
    text = suite_text("paper").replace("seeds: 5", "seeds: 100")
    assert text != suite_text("paper")
    (tmp_path / "mine.yaml").write_text(text)
    assert load_suite(str(tmp_path / "mine.yaml")).seeds == 100


def test_the_manifest_of_a_newer_schema_is_told_first(tmp_path: Path) -> None:
    random_basis(by_layer(Tower()), 2).save_pretrained(tmp_path / "b")
    edit(tmp_path / "b", lambda content: content.update(schema_version=3, surprise=[1]))
    for read in (Basis.from_pretrained, describe):
        with pytest.raises(StorageError, match="schema 3, this version reads 2: upgrade tinyspan"):
            read(tmp_path / "b")
    assert Manifest.model_fields["schema_version"].default == 2

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from tinyspan import InputError, StorageError, TinyspanError
from tinyspan.io import storage


def manifest(**changes: object) -> dict[str, object]:
    return {"schema_version": 2, "kind": "basis", "partition": [], "fingerprint": {}, **changes}


def test_written_tensors_come_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    entry = storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).view(2, 3).T})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(storage.open_tensors(tmp_path / "a.safetensors").get_tensor("x"), torch.arange(6).view(2, 3).T)
    storage.check_file(tmp_path, "a.safetensors", entry)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"good": 1})
    with pytest.raises(TinyspanError, match="NaN or infinite"):
        storage.write_json(path, {"bad": float("nan")})
    assert storage.read_json(path) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_damage_is_named(tmp_path: Path) -> None:
    entry = storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    whole = storage.Manifest.model_validate(manifest(files={"a.safetensors": entry.model_dump()}))
    assert storage.damage(tmp_path, whole.files) == []
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    assert "expected SHA-256" in storage.damage(tmp_path, whole.files)[0]
    (tmp_path / "a.safetensors").write_bytes(data[:-2])
    assert "bytes, found" in storage.damage(tmp_path, whole.files)[0]
    (tmp_path / "a.safetensors").unlink()
    assert "is missing" in storage.damage(tmp_path, whole.files)[0]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (manifest(schema_version=99), StorageError, "schema 99, this version reads 2: upgrade tinyspan"),
        (manifest(schema_version=1), StorageError, "schema 1, this version reads 2: create it again"),
        (manifest(schema_version="2"), StorageError, "schema 2, this version reads"),
        (manifest(kind="pickle"), StorageError, "damaged"),
        (manifest(surprise=1), StorageError, "damaged"),
        (manifest(files={"../x": {"bytes": 1, "sha256": "0" * 64}}), StorageError, "leaves the folder"),
        (manifest(files={"/etc/x": {"bytes": 1, "sha256": "0" * 64}}), StorageError, "leaves the folder"),
        (manifest(kind="adapter"), InputError, "is not a basis, but an adapter"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: dict[str, object], error: type[Exception], message: str) -> None:
    storage.write_json(tmp_path / "manifest.json", content)
    with pytest.raises(error, match=message):
        storage.read_manifest(tmp_path, "basis")


@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', "[" * 100_000, "1" * 5_000, "\\ud800", '{"a": 1}'])
def test_bad_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(StorageError, match="damaged"):
        storage.read_json(tmp_path / "a.json")


def test_every_flipped_bit_of_a_json_file_is_noticed(tmp_path: Path) -> None:
    path, content = tmp_path / "a.json", {"score": 0.8125, "steps": [1, 23], "name": "sst2", "nested": {"b": None}}
    storage.write_json(path, content)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with suppress(StorageError):
                assert storage.read_json(path) == content  # one white space for another


def test_a_journal_tells_damage_from_an_interrupted_write(tmp_path: Path) -> None:
    path, link = tmp_path / "j.jsonl", "whose"
    for step in range(3):
        link = storage.append_line(path, link, {"step": step})
    whole = path.read_bytes()
    assert storage.read_lines(path, "whose") == ([{"step": 0}, {"step": 1}, {"step": 2}], link)
    for length in range(len(whole)):  # killed while it wrote: whole lines stay
        path.write_bytes(whole[:length])
        assert storage.read_lines(path, "whose")[0] == [{"step": i} for i in range(whole[:length].count(b"\n"))]
    for place in range(len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StorageError, match="damaged"):
            storage.read_lines(path, "whose")
    path.write_bytes(whole)
    with pytest.raises(StorageError, match="in line 1"):
        storage.read_lines(path, "somebody else's")
    path.write_bytes(whole + b'{"ste')
    storage.cut_lines(path, 0)
    assert path.read_bytes() == whole
    for last, left in ((1, 2), (2, 0), (1, 0)):
        storage.cut_lines(path, last)
        assert storage.read_lines(path, "whose")[0] == [{"step": i} for i in range(left)]
    storage.cut_lines(tmp_path / "none", 1)
    assert storage.read_lines(tmp_path / "none", "whose") == ([], "whose")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a basis"):
        storage.read_manifest(tmp_path, "basis")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        storage.read_manifest(tmp_path, "basis")


def test_content_hash_ignores_versions_and_details_alone() -> None:
    base = storage.Manifest.model_validate(manifest())
    entry = {"result.json": {"bytes": 1, "sha256": "0" * 64}}
    same = storage.Manifest.model_validate(manifest(versions={"torch": "1"}, details={"step": 3}, attached=entry))
    other = storage.Manifest.model_validate(manifest(construction={"rank": 3}))
    assert base.content_hash() == same.content_hash() != other.content_hash()


def test_checkpoints_in_every_form(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    for form in ("one", "bin", "shards", "binshards"):
        (tmp_path / form).mkdir()
    storage.write_tensors(tmp_path / "one/model.safetensors", tensors)
    torch.save(tensors, tmp_path / "bin/pytorch_model.bin")
    for name in tensors:
        storage.write_tensors(tmp_path / f"shards/{name}.safetensors", {name: tensors[name]})
        torch.save({name: tensors[name]}, tmp_path / f"binshards/{name}.bin")
    for form, stem, suffix in (("shards", "model", "safetensors"), ("binshards", "pytorch_model", "bin")):
        index = {"weight_map": {name: f"{name}.{suffix}" for name in tensors}}
        (tmp_path / form / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    for form in ("one", "bin", "shards", "binshards"):
        found = dict(storage.read_checkpoint(tmp_path / form))
        assert set(found) == set(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "pytorch_model.bin")
    with pytest.raises(StorageError, match="cannot be read safely"):
        list(storage.read_checkpoint(tmp_path))
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        list(storage.read_checkpoint(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [{"seed": 10**25}, {"name": "\ud800"}, {"long": "x" * (1 << 24)}])
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, content: dict[str, object]) -> None:
    with pytest.raises(TinyspanError, match="could not be read again"):
        storage.write_json(tmp_path / "a.json", content)
    assert not list(tmp_path.iterdir())

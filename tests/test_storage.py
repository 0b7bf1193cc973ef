import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tinyspan import InputError, StorageError, storage


def manifest(**changes: object) -> dict[str, object]:
    return {"schema_version": 1, "kind": "basis", "partition": [], "fingerprint": {}, **changes}


def test_written_tensors_come_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    entry = storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).view(2, 3).T})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(storage.open_tensors(tmp_path / "a.safetensors").get_tensor("x"), torch.arange(6).view(2, 3).T)
    storage.check_file(tmp_path, "a.safetensors", entry)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"good": 1})
    with pytest.raises(ValueError):
        storage.write_json(path, {"bad": float("nan")})
    assert json.loads(path.read_text()) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_damage_is_named(tmp_path: Path) -> None:
    entry = storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    whole = storage.Manifest.model_validate(manifest(files={"a.safetensors": entry.model_dump()}))
    assert storage.damage(tmp_path, whole) == []
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    assert "expected SHA-256" in storage.damage(tmp_path, whole)[0]
    (tmp_path / "a.safetensors").write_bytes(data[:-2])
    assert "bytes, found" in storage.damage(tmp_path, whole)[0]
    (tmp_path / "a.safetensors").unlink()
    assert "is missing" in storage.damage(tmp_path, whole)[0]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (manifest(schema_version=99), StorageError, "upgrade tinyspan"),
        (manifest(kind="pickle"), StorageError, "damaged"),
        (manifest(surprise=1), StorageError, "damaged"),
        (manifest(files={"../x": {"bytes": 1, "sha256": "0" * 64}}), StorageError, "leaves the folder"),
        (manifest(files={"/etc/x": {"bytes": 1, "sha256": "0" * 64}}), StorageError, "leaves the folder"),
        (manifest(kind="adapter"), InputError, "expected a basis, found a adapter"),
        ([], StorageError, "damaged"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: object, error: type[Exception], message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        storage.read_manifest(tmp_path, "basis")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no basis"):
        storage.read_manifest(tmp_path, "basis")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        storage.read_manifest(tmp_path, "basis")


def test_output_folders(tmp_path: Path) -> None:
    out, ours = tmp_path / "a" / "b", "trajectory"
    storage.prepare_folder(out, ours)
    storage.prepare_folder(out, ours)  # an empty one is fine
    (out / "points").mkdir()
    for name in ("manifest.json", "start.safetensors", ".manifest.json.x1", "points/1"):
        (out / name).write_text("{}")
    with pytest.raises(InputError, match="--overwrite"):
        storage.prepare_folder(out, ours)
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds something else \(thesis\.tex\)"):
            storage.prepare_folder(out, ours, overwrite)
    assert len(list(out.iterdir())) == 6
    (out / "thesis.tex").unlink()
    with pytest.raises(InputError, match="holds something else"):
        storage.prepare_folder(out, "adapter", overwrite=True)
    with pytest.raises(InputError, match="is read and lies in"):
        storage.check_folder(out, ours, True, inputs=[out / "points"])
    (tmp_path / "link").symlink_to(out)
    storage.prepare_folder(tmp_path / "link", ours, overwrite=True)
    assert [path.name for path in out.iterdir()] == [".tinyspan"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/model").mkdir()  # our names, but not our folder
    with pytest.raises(InputError, match="no tinyspan output"):
        storage.prepare_folder(tmp_path / "theirs", ours, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        storage.prepare_folder(tmp_path / "file", ours)


def test_content_hash_ignores_versions_and_details_alone() -> None:
    base = storage.Manifest.model_validate(manifest())
    same = storage.Manifest.model_validate(manifest(versions={"torch": "1"}, details={"step": 3}))
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

from pathlib import Path

import pytest
import torch

from tinyspan import InputError, StorageError
from tinyspan.io.manifests import Manifest, damage, read_manifest
from tinyspan.io.storage import write_json
from tinyspan.io.tensors import write_tensors


def manifest(**changes: object) -> dict[str, object]:
    return {"schema_version": 2, "kind": "basis", "partition": [], "fingerprint": {}, **changes}


def test_damage_is_named(tmp_path: Path) -> None:
    entry = write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    whole = Manifest.model_validate(manifest(files={"a.safetensors": entry.model_dump()}))
    assert damage(tmp_path, whole.files) == []
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    assert "expected SHA-256" in damage(tmp_path, whole.files)[0]
    (tmp_path / "a.safetensors").write_bytes(data[:-2])
    assert "bytes, found" in damage(tmp_path, whole.files)[0]
    (tmp_path / "a.safetensors").unlink()
    assert "is missing" in damage(tmp_path, whole.files)[0]


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
    write_json(tmp_path / "manifest.json", content)
    with pytest.raises(error, match=message):
        read_manifest(tmp_path, "basis")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a basis"):
        read_manifest(tmp_path, "basis")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        read_manifest(tmp_path, "basis")


def test_content_hash_ignores_versions_and_details_alone() -> None:
    base = Manifest.model_validate(manifest())
    entry = {"result.json": {"bytes": 1, "sha256": "0" * 64}}
    same = Manifest.model_validate(manifest(versions={"torch": "1"}, details={"step": 3}, attached=entry))
    other = Manifest.model_validate(manifest(construction={"rank": 3}))
    assert base.content_hash() == same.content_hash() != other.content_hash()

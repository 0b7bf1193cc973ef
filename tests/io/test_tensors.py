import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tinyspan import InputError, StorageError
from tinyspan.io.manifests import check_file
from tinyspan.io.tensors import open_tensors, read_checkpoint, write_tensors


def test_written_tensors_come_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    entry = write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).view(2, 3).T})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(open_tensors(tmp_path / "a.safetensors").get_tensor("x"), torch.arange(6).view(2, 3).T)
    check_file(tmp_path, "a.safetensors", entry)


def test_checkpoints_in_every_form(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    forms = ("one", "bin", "older", "shards", "binshards")
    for form in forms:
        (tmp_path / form).mkdir()
    write_tensors(tmp_path / "one/model.safetensors", tensors)
    torch.save(tensors, tmp_path / "bin/pytorch_model.bin")
    torch.save(tensors, tmp_path / "older/pytorch_model.bin", _use_new_zipfile_serialization=False)  # before torch 1.6
    for name in tensors:
        write_tensors(tmp_path / f"shards/{name}.safetensors", {name: tensors[name]})
        torch.save({name: tensors[name]}, tmp_path / f"binshards/{name}.bin")
    for form, stem, suffix in (("shards", "model", "safetensors"), ("binshards", "pytorch_model", "bin")):
        index = {"weight_map": {name: f"{name}.{suffix}" for name in tensors}}
        (tmp_path / form / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    for form in forms:
        found = dict(read_checkpoint(tmp_path / form))
        assert set(found) == set(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_one_file_comes_before_the_index_of_earlier_shards(tmp_path: Path) -> None:
    """As in transformers, which deletes the shards but not the index when it saves in one file again."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        folder = tmp_path / stem
        folder.mkdir()
        index = {"weight_map": {"a": f"{stem}-00001-of-00002.{suffix}"}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    write_tensors(tmp_path / "model/model.safetensors", {"a": torch.ones(2)})
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model/pytorch_model.bin")
    for folder in tmp_path.iterdir():
        assert dict(read_checkpoint(folder))["a"].tolist() == [1, 1]


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "pytorch_model.bin")
    with pytest.raises(StorageError, match="cannot be read safely"):
        list(read_checkpoint(tmp_path))
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        list(read_checkpoint(tmp_path / "nowhere"))

"""Tensors on disk: safetensors files, and the checkpoints of Hugging Face."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tinyspan.errors import InputError, StorageError
from tinyspan.io.manifests import FileEntry, file_entry
from tinyspan.io.storage import LARGEST, read_json, reading, replacing, require_file, summary

__all__ = ["Reader", "open_tensors", "read_checkpoint", "save_tensors", "write_tensors"]

Reader = Any  # safetensors.safe_open has no public type


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> FileEntry:
    """Write a safetensors file under a temporary name, flush it to disk, rename it, and return its size and hash."""
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, metadata)
        entry = file_entry(temporary)
    return entry


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file without flushing it."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def open_tensors(path: Path) -> Reader:
    """Open a safetensors file for lazy, memory-mapped reading.

    Raises:
        StorageError: the file is missing or is not a safetensors file.
    """
    require_file(path)
    with reading(path):
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST:  # a parsed header takes many times its size in memory
            raise StorageError(f"{path} is damaged: expected a header of at most {LARGEST:,} bytes, found {header:,}")
        return safe_open(path, framework="pt")


def read_checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of a Hugging Face checkpoint folder, one at a time.

    Reads `model.safetensors` or `pytorch_model.bin`, as one file or as shards with an index file, the first of these
    that exists, as transformers does: saving again in one file leaves an earlier index. Pickled files are read with
    `weights_only=True`, so they cannot run code.

    Raises:
        InputError: the folder contains none of these files.
        StorageError: a file is damaged.
    """
    folder = Path(folder)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if single.is_file():
            files = [single]
        elif index.is_file():
            with reading(index):
                shards = sorted(set(read_json(index, sealed=False)["weight_map"].values()))
                if outside := [shard for shard in shards if Path(shard).name != shard or shard == ".."]:
                    raise StorageError(f"{index}: expected names of files beside it, found {outside[0]!r}")
                files = [folder / shard for shard in shards]
        else:
            continue
        for file in files:
            yield from _named_tensors(file)
        return
    raise InputError(f"{folder} holds no model.safetensors or pytorch_model.bin, as one file or as shards")


def _named_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        reader = open_tensors(file)
        for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
            with reading(file):
                tensor = reader.get_tensor(name)
            yield name, tensor
    else:
        require_file(file)
        try:
            mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote another format, which cannot be mapped
            items = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped).items()
        except Exception as error:
            raise StorageError(f"{file} cannot be read safely: {summary(error)}") from error
        for name, tensor in items:
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise StorageError(f"{file}: expected named tensors, found {type(name).__name__} {str(name)[:50]!r}")
            yield name, tensor

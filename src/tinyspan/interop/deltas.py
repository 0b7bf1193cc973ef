"""Export of the changed weights to one file, for use without tinyspan.

The file is a safetensors file. For a parameter in which few values have changed, it contains `indices/NAME`, their
ascending positions in the flattened parameter (int32, or int64 for a large one), and `values/NAME`; for any other
parameter it contains `values/NAME` only, in the parameter's shape. Values are the new weights, bit for bit. The header
identifies the base model.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError, StorageError
from tinyspan.io.storage import reading, replacing
from tinyspan.io.tensors import open_tensors
from tinyspan.labels import label_names, set_label_names
from tinyspan.model.base import fingerprint_of, require_same, select_weights
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Partition
from tinyspan.weights import finite, follows_subspace

__all__ = ["apply_delta", "export_delta"]

FORMAT = "tinyspan delta 1"


@torch.no_grad()
def export_delta(subspace: SubspaceModel, file: str | Path, *, overwrite: bool = False) -> int:
    """Write every weight in the blocks that differs from the base model, and return the file's size in bytes.

    For a sparse basis the file is small: 8 bytes per coordinate that the basis changes, for any number of directions.
    Directly trained parameters, such as the head, are written completely.

    Raises:
        InputError: the file exists and `overwrite` is not set, or the adapter is disabled.
        TinyspanError: z is NaN or infinite.

    Example:
        >>> import tempfile
        >>> from tinyspan import by_pattern, random_basis
        >>> model, other = (torch.nn.Linear(10, 10, bias=False) for _ in range(2))
        >>> _ = other.load_state_dict(model.state_dict())
        >>> basis = random_basis(by_pattern(model, {"all": "weight"}), 2, density=0.1)
        >>> subspace = SubspaceModel(model, basis, init_std=1)
        >>> file = Path(tempfile.mkdtemp()) / "task.safetensors"
        >>> size = export_delta(subspace, file)
        >>> moved = other.weight.clone()
        >>> apply_delta(other, file)
        >>> torch.equal(other.weight, model.weight), int((other.weight != moved).sum())
        (True, 10)
    """
    file = Path(file)
    if file.exists() and not overwrite:
        raise InputError(f"{file} exists already; choose another name, or pass overwrite=True")
    trained = subspace.get_state().in_dtypes_of(subspace.base_state()).directly_trained
    subspace.refresh()
    state = dict(subspace.model.named_parameters(remove_duplicate=False))
    dtypes = {spec.name: spec.dtype for spec in subspace.basis.partition.widened().parameters()}  # the base model's
    tensors = {f"values/{name}": value.detach().cpu() for name, value in trained.items()}
    for name, delta in subspace.delta().items():
        where, value = delta != 0, state[name].detach().cpu().to(dtypes[name])
        count = int(where.sum())
        narrow = torch.int32 if value.numel() <= torch.iinfo(torch.int32).max else torch.int64
        if not count:
            continue
        if count * (narrow.itemsize + value.itemsize) >= value.numel() * value.itemsize:
            tensors[f"values/{name}"] = value
        else:
            indices = where.cpu().reshape(-1).nonzero()[:, 0]
            tensors[f"indices/{name}"] = indices.to(narrow)
            tensors[f"values/{name}"] = value.reshape(-1)[indices]
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    header = {
        "format": FORMAT,
        "sha256": _digest(tensors),
        "partition": json.dumps(subspace.basis.partition.to_json()),
        "ordinary": json.dumps(list(subspace.directly_trained())),
        "fingerprint": json.dumps(subspace.fingerprint),
        "labels": json.dumps(label_names(subspace.model)),
    }
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata=header)
    return file.stat().st_size


@torch.no_grad()
def apply_delta(model: nn.Module, file: str | Path) -> None:
    """Write the weights of a delta, and the names of its labels, into its base model.

    Raises:
        MismatchError: the model is not the base model of the delta, or the delta has already been applied to it.
        InputError: the file is not a delta, or the model follows a SubspaceModel.
        StorageError: the file is damaged.
    """
    file = Path(file)
    if follows_subspace(model):
        raise InputError("the model follows a SubspaceModel, which would overwrite the delta; merge() that one first")
    reader = open_tensors(file)
    with reading(file):
        header = reader.metadata() or {}
        if header.get("format") != FORMAT:
            raise InputError(f"{file} is not a delta of this version: its format is {header.get('format')!r:.100}")
        partition = Partition.from_json(json.loads(header["partition"]))
        names, fingerprint = json.loads(header["ordinary"]), json.loads(header["fingerprint"])
        labels = json.loads(header.get("labels", "null"))
        if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
            raise ValueError(f"labels is {labels!r:.100}, not a list of names")
        weights = select_weights(model, partition, f"the delta {file}", {})
        require_same(fingerprint, fingerprint_of(model, partition, weights, names), f"the delta {file}")
        own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        frozen = dict(model.named_parameters()).keys() - {*weights, *names}
        read = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 - the reader is not a mapping
        if _digest(read) != header["sha256"] or not frozen.isdisjoint(key.partition("/")[2] for key in read):
            raise ValueError("its tensors do not match its header")
    values = {key.removeprefix("values/"): value for key, value in read.items() if key.startswith("values/")}
    for name, value in values.items():
        indices = read.get(f"indices/{name}")
        if name not in own or own[name].dtype != value.dtype or (indices is None and own[name].shape != value.shape):
            raise MismatchError(
                f"the delta {file}: {name!r} has shape {list(value.shape)} and {value.dtype}, which differ in the "
                "model; was its head trained for another task?"
            )
        if not finite(value) or (indices is not None and not _are_indices(indices, value, own[name].numel())):
            raise StorageError(f"{file} is damaged: {name} holds NaN, infinite or impossible numbers")
    for name, value in values.items():
        indices = read.get(f"indices/{name}")
        if indices is not None:
            whole = own[name].detach().reshape(-1).clone()
            value = whole.index_copy_(0, indices.long().to(whole.device), value.to(whole.device)).view(own[name].shape)
        own[name].copy_(value)
    set_label_names(model, labels)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _are_indices(indices: Tensor, values: Tensor, size: int) -> bool:
    """Whether these are ascending indices, one per value, into a parameter of `size` numbers."""
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1 or indices.shape != values.shape:
        return False
    if not len(indices):
        return False
    return bool((indices[1:] > indices[:-1]).all()) and int(indices[0]) >= 0 and int(indices[-1]) < size

"""Adapters on disk: where their basis is, and which model they fit.

An adapter's folder holds z, and the directly trained parameters and buffers; its basis lies
elsewhere, or in the folder `basis` of an adapter that carries its own.
"""

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import CONSTRUCTORS, drawn_constructor
from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.io.folders import check_folder, check_place, claimed, prepare_folder
from tinyspan.io.hub import downloaded
from tinyspan.io.storage import (
    MANIFEST,
    Manifest,
    check_file,
    open_tensors,
    package_versions,
    read_manifest,
    reading,
    write_manifest,
    write_tensors,
    writing,
)
from tinyspan.model.base import directly_trained_names, fingerprint_of, require_same, select_weights
from tinyspan.model.state import AdapterState
from tinyspan.partition import Partition
from tinyspan.sharding import local
from tinyspan.trajectories.trajectory import stored_partition
from tinyspan.weights import finite

__all__ = [
    "ADAPTER",
    "CARRIED",
    "adapter_basis",
    "adapter_labels",
    "adapter_tensors",
    "carried_names",
    "check_adapter",
    "read_adapter",
    "read_another",
    "require_basis",
    "require_z",
    "stored_basis",
    "write_adapter",
]

ADAPTER = "adapter.safetensors"
CARRIED = "basis"  # where in an adapter's folder its own basis lies, if it carries one


def stored_basis(folder: str | Path, location: str | Path | None = None, token: str | None = None) -> Basis | None:
    """Open the basis that an adapter names, or return None if it is made again from its construction.

    Args:
        folder: the adapter.
        location: the basis folder, if it has moved since the adapter was saved.
        token: of a private repository on the hub, if the basis lies there.

    Raises:
        InputError: the basis is not where it was when the adapter was saved.
        MismatchError: what lies there is another basis.
        StorageError: a manifest is damaged.
    """
    manifest = read_manifest(Path(folder), "adapter")
    with reading(Path(folder) / MANIFEST):
        parent = manifest.parents[0]
    if location is not None:
        if not Path(location).is_dir():
            raise InputError(f"{location} is no basis: there is no such folder")
        basis = Basis.from_pretrained(location)
    elif (near := _basis_nearby(Path(folder), manifest)) is not None:
        basis = Basis.from_pretrained(near)
    elif (pushed := manifest.details.get("basis_on_hub")) is not None:
        with reading(Path(folder) / MANIFEST):
            repository, _, commit = pushed.partition("@")
        basis = Basis.from_pretrained(downloaded(repository, commit or None, token))
        basis.on_hub = pushed
    elif manifest.details.get("basis") is None:
        return None
    else:
        place = Path(folder).resolve() / manifest.details["basis"]
        raise InputError(
            f"the basis of {folder} is not at {place} any more; it has the hash {parent[:12]}..., "
            "say where it is (--basis DIR on the command line), or put it back"
        )
    require_basis(folder, parent, basis)
    return basis


def _basis_nearby(folder: Path, manifest: Manifest) -> Path | None:
    """Return where the basis lies relative to the adapter, if it still does."""
    with reading(folder / MANIFEST):
        if (place := manifest.details.get("basis")) is None:
            return None
        if Path(place).is_absolute():
            raise ValueError(f"the basis is said to lie at {place!r:.100}, expected a relative path")
        location = folder.resolve() / place
        return location if Path(location, MANIFEST).is_file() else None


def adapter_basis(
    folder: str | Path,
    location: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    token: str | None = None,
) -> Basis:
    """Return the basis that an adapter names: from a folder, made again from its seed, or an empty one.

    Args:
        folder: the adapter.
        location: the basis folder, if it has moved since the adapter was saved.
        model: what it is for, if known: blocks that it does not have are refused before directions are drawn for them.
        token: of a private repository on the hub, if the basis lies there.

    Raises:
        InputError: the basis is not where it was when the adapter was saved.
        MismatchError: what lies there is another basis, another version of torch draws other numbers from the seed, or
            the blocks are not the model's.
        StorageError: a file is damaged.
    """
    if (stored := stored_basis(folder, location, token)) is not None:
        return stored
    manifest = read_manifest(Path(folder), "adapter")
    with reading(Path(folder) / MANIFEST):
        construction, parent = dict(manifest.construction["basis"]), manifest.parents[0]
    partition = stored_partition(Path(folder), manifest)
    if model is not None:
        partition.widened().select(model)
    basis = _rebuilt(Path(folder), manifest, partition, construction)
    if basis.content_hash() != parent:
        drawn, present = manifest.versions.get("torch"), torch.__version__
        raise MismatchError(
            f"the basis of {folder}, drawn again from its seed, is another one: expected {parent[:12]}..., found "
            f"{basis.content_hash()[:12]}.... torch {drawn} drew it and this is torch {present}, whose generator may "
            "differ; save the basis to a folder where the adapter was made, and pass that folder"
        )
    return basis


def _rebuilt(folder: Path, manifest: Manifest, partition: Partition, construction: Mapping[str, Any]) -> Basis:
    """Make the basis of an adapter again, with no more directions than the adapter has numbers for.

    Raises:
        InputError: the basis cannot be made again, or its constructor is not registered.
        StorageError: a file is damaged.
    """
    name = construction.get("constructor")
    if (constructor := drawn_constructor(name)) is None:
        way = "pass it as an argument"
        if isinstance(name, str) and name not in CONSTRUCTORS:
            way += f", or import the module that registers its constructor {name!r:.100}"
        raise InputError(f"the basis of {folder} was never saved to a folder; {way}")
    with reading(folder / MANIFEST):
        arguments = constructor.read_arguments(construction)
        check_file(folder, ADAPTER, manifest.files[ADAPTER])
    if "rank" in arguments:
        require_z(folder, manifest, {block.name: arguments["rank"] for block in partition})
    try:
        return constructor.build(partition, **arguments)
    except InputError as error:
        raise StorageError(f"{folder / MANIFEST} is damaged: {error}") from error


def adapter_tensors(state: AdapterState) -> dict[str, Tensor]:
    """Return what an adapter's file holds, by the names in it.

    Raises:
        TinyspanError: a number is NaN or infinite.
    """
    tensors = {f"z/{block}": z for block, z in state.z.items()}
    tensors |= {f"ordinary/{name}": value for name, value in state.directly_trained.items()}
    if state.scales is not None:
        tensors["scales"] = state.scales
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise TinyspanError(f"{name} is NaN or infinite; nothing was saved. Lower the learning rate")
    return tensors


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    basis: Basis,
    *,
    carried: bool,
    fingerprint: Mapping[str, str],
    construction: Mapping[str, Any],
    model: str | None,
    labels: Sequence[str] | None,
    overwrite: bool = False,
    shared: bool = False,
) -> None:
    """Write an adapter's folder.

    Args:
        folder: must not exist, or be empty, or hold an earlier adapter and `overwrite` be given, or be `shared`.
        tensors: see `adapter_tensors`.
        basis: of the adapter.
        carried: whether it is written too.
        fingerprint: see `fingerprint_of`.
        construction: of the SubspaceModel: modules_to_save, ensemble, layer_scales.
        model: its name, for people.
        labels: names of the outputs of a classifier's head in their order, if it has names.
        overwrite: replace an earlier adapter.
        shared: replace an earlier adapter, and leave whatever else is in the folder, such as a Trainer's state.

    Raises:
        InputError: the folder holds something else, or an earlier adapter without `overwrite`, or the basis is read
            from inside it. If it is `shared`: it holds another kind of output, or another basis in the adapter's place.
    """
    location = basis.location
    if not shared:
        check_folder(folder, "adapter", overwrite, [location] if location is not None else [])
    with claimed(folder):
        if shared:
            _make_room(folder, basis if carried else None)
        else:
            prepare_folder(folder, "adapter", overwrite)
        if carried and not (folder / CARRIED / MANIFEST).is_file():
            basis.write(folder / CARRIED)
        if carried:
            location = folder / CARRIED
        manifest = Manifest(
            kind="adapter",
            partition=basis.partition.to_json(),
            fingerprint=dict(fingerprint),
            parents=[basis.content_hash()],
            construction={"basis": basis.construction, **construction},
            details={
                "basis": os.path.relpath(location.resolve(), folder.resolve()) if location else None,
                "basis_on_hub": None if carried else basis.on_hub,
                "model": model,
                "labels": None if labels is None else list(labels),
            },
            files={ADAPTER: write_tensors(folder / ADAPTER, tensors)},
            versions=package_versions(),
        )
        write_manifest(folder, manifest)


def adapter_labels(folder: Path) -> tuple[str, ...] | None:
    """Return the names of the outputs of the head that an adapter was trained with; None if they have no names.

    Raises:
        StorageError: the manifest is damaged.
    """
    manifest = read_manifest(folder, "adapter")
    with reading(folder / MANIFEST):
        labels = manifest.details.get("labels")
        if labels is None:
            return None
        if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
            raise TypeError(f"labels is {labels!r:.100}, no list of names")
        return tuple(labels)


def carried_names(folder: Path) -> set[str]:
    """Return the names of the parameters and buffers that an adapter holds whole, beside z.

    Raises:
        StorageError: a file is damaged.
    """
    manifest = read_manifest(folder, "adapter")
    with reading(folder / MANIFEST):
        check_file(folder, ADAPTER, manifest.files[ADAPTER])
    reader = open_tensors(folder / ADAPTER)
    with reading(folder / ADAPTER):
        return {key.removeprefix("ordinary/") for key in reader.keys() if key.startswith("ordinary/")}  # noqa: SIM118


def _make_room(folder: Path, carried: Basis | None) -> None:
    """Take an earlier adapter out of a folder that is shared with other files; a basis that is carried again stays.

    Raises:
        InputError: the folder holds another kind of output, or another basis in the place of the one that is carried.
    """
    check_place(folder)
    earlier = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if earlier is not None and earlier.kind != "adapter":
        raise InputError(f"{folder} holds a {earlier.kind}, whose manifest an adapter would replace; choose another")
    with writing(folder / MANIFEST):
        (folder / MANIFEST).unlink(missing_ok=True)
    place = folder / CARRIED
    if carried is None or not (place / MANIFEST).is_file():
        return
    if read_manifest(place, "basis").content_hash() == carried.content_hash():
        return
    if earlier is None or earlier.details.get("basis") != CARRIED:
        raise InputError(f"{place} is another basis than the one that the adapter carries; choose another folder")
    with writing(place):
        shutil.rmtree(place)


def read_adapter(folder: Path, manifest: Manifest, names: Collection[str]) -> AdapterState:
    """Return what an adapter's file holds, whose hash is known and which `require_z` has passed.

    Args:
        folder: of the adapter.
        manifest: its manifest.
        names: of the directly trained parameters that it must have values for.

    Raises:
        StorageError: the file is damaged.
    """
    path = folder / ADAPTER
    parts: dict[str, dict[str, Tensor]] = {"z": {}, "ordinary": {}, "scales": {}}
    reader = open_tensors(path)
    with reading(path):
        for key in reader.keys():  # noqa: SIM118 - the reader is no mapping
            part, _, name = key.partition("/")
            parts[part][name] = reader.get_tensor(key)
            if not finite(parts[part][name]):
                raise StorageError(f"{path} is damaged: {key} holds NaN or infinite numbers")
        scaled = "layer_scales" in manifest.construction
        lacking = set(names) - parts["ordinary"].keys()
        if lacking or bool(parts["scales"]) != scaled:
            raise StorageError(f"{path} is damaged: it lacks {min(lacking, default='the scales')}")
    return AdapterState(parts["z"], parts["ordinary"], parts["scales"].get(""))


def read_another(
    folder: Path,
    basis: Basis,
    fingerprint: Mapping[str, str],
    construction: Mapping[str, Any],
    names: Collection[str],
    *,
    same_ensemble: bool = False,
) -> AdapterState:
    """Read an adapter that is to take the place of another one in a SubspaceModel.

    Args:
        folder: of the adapter.
        basis: of the SubspaceModel, as all that follow.
        fingerprint: see `fingerprint_of`.
        construction: see `write_adapter`; of another ensemble z becomes the mean of its members.
        names: of the directly trained parameters that the adapter must have values for.
        same_ensemble: refuse another ensemble.

    Raises:
        InputError: the folder is no adapter.
        MismatchError: the adapter was trained in another basis, with another model, or with other modules beside.
        StorageError: a file is damaged.
    """
    manifest, what = read_manifest(folder, "adapter"), f"the adapter {folder}"
    with reading(folder / MANIFEST):
        require_basis(folder, manifest.parents[0], basis)
        check_file(folder, ADAPTER, manifest.files[ADAPTER])
        modules = sorted(manifest.construction["modules_to_save"])
    ours, layers = construction["modules_to_save"], construction.get("layer_scales")
    if modules != sorted(ours) or manifest.construction.get("layer_scales") != layers:
        raise MismatchError(
            f"{what} was trained with modules_to_save={modules}, this model with {ours} (and both "
            "need scales of the same layers, or none); load it with a model of its own"
        )
    require_same(manifest.fingerprint, fingerprint, what)
    require_z(folder, manifest, basis.ranks)
    if same_ensemble and (stored := manifest.construction["ensemble"]) != construction["ensemble"]:
        raise MismatchError(f"{what} was trained with ensemble={stored}, this model has {construction['ensemble']}")
    state = read_adapter(folder, manifest, names)
    alike = {name: z if len(z) == construction["ensemble"] else z.mean(0) for name, z in state.z.items()}
    return state._replace(z=alike)


def check_adapter(model: nn.Module, folder: str | Path) -> None:
    """Refuse a model that an adapter was not trained with, as `SubspaceModel.from_pretrained` would, without its basis.

    Raises:
        MismatchError: names the first parameter or block that differs.
        InputError: weights are half precision, NaN or infinite.
        StorageError: a file is damaged.
    """
    folder = Path(folder)
    manifest, what = read_manifest(folder, "adapter"), f"the adapter {folder}"
    partition = stored_partition(folder, manifest)
    weights = select_weights(model, partition, what, manifest.versions)
    with reading(folder / MANIFEST):
        names = directly_trained_names(model, manifest.construction["modules_to_save"])
        check_file(folder, ADAPTER, manifest.files[ADAPTER])
    require_same(manifest.fingerprint, fingerprint_of(model, partition, weights, names), what)
    named = {name: local(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    reader = open_tensors(folder / ADAPTER)
    with reading(folder / ADAPTER):
        for key in reader.keys():  # noqa: SIM118 - the reader is no mapping
            part, _, name = key.partition("/")
            if part != "ordinary":
                continue
            stored, own = reader.get_tensor(key), named.get(name)
            if own is None or (stored.shape, stored.dtype) != (own.shape, own.dtype):
                has = "none of this name" if own is None else f"{list(own.shape)} and {own.dtype}"
                raise MismatchError(
                    f"{what}: {name!r} has shape {list(stored.shape)} and {stored.dtype}, the model has {has}; "
                    "was it trained for another task, or in another dtype?"
                )


def require_basis(folder: str | Path, parent: str, basis: Basis) -> None:
    """Refuse a basis that an adapter was not trained in; `parent` is the hash of that one.

    Raises:
        MismatchError: it is another one.
    """
    if basis.content_hash() != parent:
        raise MismatchError(
            f"{folder} was trained in the basis {parent[:12]}..., the given one is {basis.content_hash()[:12]}...; "
            "give it the basis that it was tuned in"
        )


def require_z(folder: Path, manifest: Manifest, ranks: Mapping[str, int]) -> None:
    """Refuse an adapter whose file does not hold z [h, k] for every block with directions; its hash is known.

    Asked before directions are made, so that no more are than the file has numbers for.
    """
    path = folder / ADAPTER
    with reading(folder / MANIFEST):
        ensemble = manifest.construction["ensemble"]
        if type(ensemble) is not int or ensemble < 1:
            raise ValueError(f"the ensemble is {ensemble!r:.100}, no number of at least 1")
    reader = open_tensors(path)
    with reading(path):
        held = {key: reader.get_slice(key).get_shape() for key in reader.keys() if key.startswith("z/")}  # noqa: SIM118
    expected = {f"z/{block}": [ensemble, rank] for block, rank in ranks.items() if rank}
    if held != expected:
        key = min(key for key in {*held, *expected} if held.get(key) != expected.get(key))
        raise StorageError(f"{path} is damaged: expected {key} of shape {expected.get(key)}, found {held.get(key)}")

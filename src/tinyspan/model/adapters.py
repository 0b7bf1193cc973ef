"""Adapters on disk: where their basis is, and which model they fit.

An adapter's folder holds z, and the ordinary parameters and buffers that were trained beside it; its basis lies
elsewhere, or in the folder `basis` of an adapter that carries its own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
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
from tinyspan.model.state import Trained
from tinyspan.partition import Block, ParameterSpec, Partition
from tinyspan.sharding import local
from tinyspan.trajectories.trajectory import stored_partition
from tinyspan.weights import finite, require_loaded, require_plain, require_sound

__all__ = [
    "ADAPTER",
    "CARRIED",
    "adapter_basis",
    "adapter_labels",
    "adapter_tensors",
    "carried_names",
    "check_adapter",
    "check_disjoint",
    "check_model",
    "describe_basis",
    "fingerprint_of",
    "module_names",
    "ordinary_names",
    "read_adapter",
    "read_another",
    "require_basis",
    "require_same",
    "require_state",
    "require_z",
    "select_weights",
    "state_identity",
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


def adapter_tensors(trained: Trained) -> dict[str, Tensor]:
    """Return what an adapter's file holds, by the names in it.

    Raises:
        TinyspanError: a number is NaN or infinite.
    """
    tensors = {f"z/{block}": z for block, z in trained.z.items()}
    tensors |= {f"ordinary/{name}": value for name, value in trained.ordinary.items()}
    if trained.scales is not None:
        tensors["scales"] = trained.scales
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


def read_adapter(folder: Path, manifest: Manifest, ordinary: Collection[str]) -> Trained:
    """Return what an adapter's file holds, whose hash is known and which `require_z` has passed.

    Args:
        folder: of the adapter.
        manifest: its manifest.
        ordinary: names of the parameters that it must have values for.

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
        lacking = set(ordinary) - parts["ordinary"].keys()
        if lacking or bool(parts["scales"]) != scaled:
            raise StorageError(f"{path} is damaged: it lacks {min(lacking, default='the scales')}")
    return Trained(parts["z"], parts["ordinary"], parts["scales"].get(""))


def read_another(
    folder: Path,
    basis: Basis,
    fingerprint: Mapping[str, str],
    construction: Mapping[str, Any],
    ordinary: Collection[str],
    *,
    same_ensemble: bool = False,
) -> Trained:
    """Read an adapter that is to take the place of another one in a SubspaceModel.

    Args:
        folder: of the adapter.
        basis: of the SubspaceModel, as all that follow.
        fingerprint: see `fingerprint_of`.
        construction: see `write_adapter`; of another ensemble z becomes the mean of its members.
        ordinary: names of the parameters that the adapter must have values for.
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
    trained = read_adapter(folder, manifest, ordinary)
    alike = {name: z if len(z) == construction["ensemble"] else z.mean(0) for name, z in trained.z.items()}
    return trained._replace(z=alike)


def check_model(model: nn.Module, basis: Basis) -> None:
    """Refuse a model that a basis was not made for, as `SubspaceModel` would, without reading the basis's directions.

    Raises:
        MismatchError: names the first parameter or block that differs.
        InputError: weights are half precision, NaN or infinite.
    """
    weights = select_weights(model, basis.partition, describe_basis(basis), basis.versions)
    if basis.fingerprint:
        require_same(basis.fingerprint, basis.partition.fingerprint(weights), describe_basis(basis))


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
        ordinary = ordinary_names(model, manifest.construction["modules_to_save"])
        check_file(folder, ADAPTER, manifest.files[ADAPTER])
    require_same(manifest.fingerprint, fingerprint_of(model, partition, weights, ordinary), what)
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


def describe_basis(basis: Basis) -> str:
    """Name a basis in a message."""
    return "the basis" if basis.location is None else f"the basis {basis.location}"


def select_weights(
    model: nn.Module, partition: Partition, what: str, versions: Mapping[str, str]
) -> dict[str, nn.Parameter]:
    """Return the weights in the blocks, in float32 where the partition has half precision.

    Raises:
        MismatchError: a parameter is absent or differs; the message names the version of transformers that wrote it.
        InputError: weights are half precision, quantized, NaN, infinite or on the meta device.
    """
    _require_wide(model, partition)
    try:
        weights = partition.widened().select(model)
    except MismatchError as error:
        then, now = versions.get("transformers"), package_versions().get("transformers")
        advice = "load the base model it was made from, in the dtype expected here"
        if then is not None and then != now:
            advice += f"; it was written with transformers {then}, this is {now}, which may have renamed it"
        raise MismatchError(f"{what} was made for another model: {error}; {advice}") from error
    require_loaded(model.named_parameters())
    require_sound(weights)
    return weights


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


def _require_wide(model: nn.Module, partition: Partition) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in (spec.name for spec in partition.parameters() if spec.name in named):
        require_plain(name, named[name])
        if named[name].dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name!r} is {named[name].dtype}, in which steps inside a subspace round away; load the model in "
                "float32 (from_pretrained(..., dtype=torch.float32), or model.float()), and compute in bfloat16 with "
                "autocast"
            )


def fingerprint_of(
    model: nn.Module, partition: Partition, weights: Mapping[str, nn.Parameter], ordinary: Sequence[str]
) -> dict[str, str]:
    """Fingerprint everything an adapter builds on: theta_0 of every block, and the parameters that stay frozen.

    The frozen ones are taken by name, so that the order in which a model lists its parameters does not matter.
    """
    in_blocks, trained = {id(weight) for weight in weights.values()}, set(ordinary)
    frozen = {
        name: parameter
        for name, parameter in sorted(model.named_parameters())
        if id(parameter) not in in_blocks and name not in trained
    }
    blocks = list(partition)
    if frozen:
        specs = tuple(ParameterSpec(name, tuple(local(value).shape), value.dtype) for name, value in frozen.items())
        blocks.append(Block("frozen parameters", specs))
    return Partition(tuple(blocks)).fingerprint({**weights, **frozen})


def require_same(expected: Mapping[str, str], found: Mapping[str, str], what: str) -> None:
    """Refuse another theta_0 than `what` was made for; both are told by the fingerprints of their blocks.

    Raises:
        MismatchError: names the first block that differs.
    """
    for block in dict.fromkeys([*expected, *found]):
        if expected.get(block) != found.get(block):
            raise MismatchError(
                f"{what} was made for another theta_0: the model differs in block {block!r} "
                f"(expected {str(expected.get(block))[:12]}..., found {str(found.get(block))[:12]}...); "
                "load the base model it was made from, in the same dtype; if that was half precision, load it in that "
                "and then widen it, model.float()"
            )


def state_identity(basis: Basis, arguments: Mapping[str, Any], fingerprint: Mapping[str, str]) -> Tensor:
    """Return what the state of a SubspaceModel belongs to, as one SHA-256 in each row.

    Args:
        basis: its hash comes first.
        arguments: of the SubspaceModel, in JSON's types; their hash comes second.
        fingerprint: see `fingerprint_of`; one row for each block follows.

    Returns:
        [2 + number of blocks, 32] in uint8: a tensor, so that safetensors and distributed checkpoints save it.
    """
    of_arguments = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    digests = [basis.content_hash(), of_arguments, *fingerprint.values()]
    return torch.tensor([list(bytes.fromhex(digest)) for digest in digests], dtype=torch.uint8)


def require_state(identity: Tensor, own: Tensor, blocks: Collection[str]) -> None:
    """Refuse the state of another SubspaceModel; both are told by what `state_identity` returned.

    Args:
        identity: of the state.
        own: of the model that is to take it.
        blocks: of the model's fingerprint, in its order.

    Raises:
        MismatchError: names the first difference.
    """
    parts = ["another basis", "other modules_to_save, ensemble or layer_scales"]
    parts += [f"another theta_0, in block {block!r}" for block in blocks]
    for part, theirs, ours in zip_longest(parts, identity.tolist(), own.tolist()):
        if theirs != ours:
            raise MismatchError(
                f"the state was saved with {part or 'other blocks'}: build the SubspaceModel with the base model, the "
                "basis and the arguments that it was trained with, or begin another training in another output folder"
            )


def module_names(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """Return the full names of the modules whose names end in one of the given names.

    Raises:
        InputError: a given name fits no module.
    """
    chosen: list[str] = []
    for wanted in modules_to_save:
        modules = [name for name, _ in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not modules:
            raise InputError(f"modules_to_save: no module is called {wanted!r}")
        chosen += modules
    return chosen


def ordinary_names(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """Return the names of the parameters, each once, under the modules whose names end in one of the given names.

    Of a module that PEFT has wrapped, it is the copy of the adapter at work, not the original and those of others that
    PEFT keeps beside.
    """
    chosen = module_names(model, modules_to_save)
    idle = tuple(
        f"{name}.{inner}."
        for name, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
        for inner in ("original_module", *(f"modules_to_save.{adapter}" for adapter in module.modules_to_save))
        if inner.removeprefix("modules_to_save.") not in module.active_adapters
    )
    under = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(name.startswith(f"{module}.") for module in chosen) and not name.startswith(idle)
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in under]


def check_disjoint(model: nn.Module, ordinary: Sequence[str], weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse ordinary parameters that lie in the blocks too.

    Raises:
        InputError: names the first one.
    """
    named, blocks = dict(model.named_parameters()), {id(weight) for weight in weights.values()}
    for name in ordinary:
        if id(named[name]) in blocks:
            raise InputError(f"modules_to_save: {name!r} already lies in a block of the basis")

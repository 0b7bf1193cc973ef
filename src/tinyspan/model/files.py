"""Save a SubspaceModel to the folder of an adapter or the Hugging Face hub, and load it."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import drawn_constructor
from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.hub import fetched, push
from tinyspan.io.manifests import MANIFEST
from tinyspan.io.storage import reading
from tinyspan.labels import label_names, set_label_names
from tinyspan.model.adapters import adapter_tensors, write_adapter
from tinyspan.model.base import cached_fingerprint
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.partition import Partition
from tinyspan.trajectories.trajectory import model_name

if TYPE_CHECKING:
    from tinyspan.model.adapter_methods import AdapterMethods

Kind = TypeVar("Kind", bound="AdapterMethods")

__all__ = [
    "is_public",
    "load_pretrained",
    "push_adapter",
    "wrap_with_adapter",
    "restore_adapter",
    "save_adapter",
    "load_adapter",
]


def save_adapter(
    subspace: "AdapterMethods",
    folder: Path,
    *,
    self_contained: bool | None = None,
    overwrite: bool = False,
    shared: bool = False,
) -> None:
    """Write the active adapter; see `SubspaceModel.save_pretrained`.

    Args:
        subspace: the model that has the adapter.
        folder: see `write_adapter`.
        self_contained: whether the basis is written, too; by default if it is sparse.
        overwrite: replace an earlier adapter.
        shared: replace an earlier adapter, and keep all other files in the folder: a checkpoint of a run that has the
            basis.

    Raises:
        InputError: the folder holds something else, or an earlier adapter and `overwrite` is not set, or the basis is
            read from inside the folder, or the adapter is disabled.
        TinyspanError: a parameter is NaN or infinite.
    """
    carried = subspace.basis.is_sparse if self_contained is None else self_contained
    tensors = adapter_tensors(subspace.get_state().in_dtypes_of(subspace.base_state()))
    subspace.engine.refresh()
    write_adapter(
        folder,
        tensors,
        subspace.basis,
        carried=carried,
        fingerprint=subspace.fingerprint,
        construction=_construction(subspace),
        model=model_name(subspace.model),
        labels=label_names(subspace.model),
        overwrite=overwrite,
        shared=shared,
    )
    if subspace.engine.is_attached:
        own = {id(parameter) for parameter in subspace.directly_trained().values()}
        for name, parameter in subspace.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in own and not subspace.engine.is_following(parameter):
                warnings.warn(
                    f"{name!r} requires gradients and is not part of the adapter: name its module in modules_to_save, "
                    "or freeze it",
                    stacklevel=3,
                )
                break
    if not (carried or shared or subspace.basis.location is not None or is_public(subspace.basis)):
        warnings.warn(
            f"the basis of the adapter {folder} is not saved in a folder, so the adapter can only be loaded with the "
            "basis passed as basis=; call basis.save_pretrained() and save the adapter again, or pass "
            "self_contained=True",
            stacklevel=3,
        )


def restore_adapter(subspace: "AdapterMethods", folder: Path) -> None:
    """Load an adapter of the same basis, theta_0 and arguments as the active one.

    Raises:
        MismatchError: the adapter was trained in another basis, with another model or with other arguments.
        StorageError: a file is damaged.
    """
    names, construction = subspace.directly_trained(), _construction(subspace)
    adapter = OpenedAdapter(folder)
    subspace.set_state(*adapter.read_for(subspace.basis, subspace.fingerprint, construction, names, same_ensemble=True))


def load_adapter(subspace: "AdapterMethods", folder: Path, adapter_name: str) -> None:
    """Read another adapter into memory; see `SubspaceModel.load_adapter`.

    Raises:
        InputError: the folder is not an adapter.
        MismatchError: the adapter was trained in another basis, with another model, or with other `modules_to_save`.
        StorageError: a file is damaged.
    """
    names, construction = subspace.directly_trained(), _construction(subspace)
    adapter = OpenedAdapter(folder)
    state = adapter.read_for(subspace.basis, subspace.fingerprint, construction, names)
    subspace.bank.add(adapter_name, state, adapter.labels)


def push_adapter(
    subspace: "AdapterMethods",
    repository: str,
    *,
    self_contained: bool | None,
    private: bool | None,
    token: str | None,
    commit_message: str,
) -> str:
    """Upload the active adapter, and return the commit; see `SubspaceModel.push_to_hub`.

    Raises:
        InputError: users of the adapter could not get the basis, or the hub rejects the name or the token.
        TinyspanError: a parameter is NaN or infinite.
        StorageError: the hub cannot be reached.
    """
    carried = subspace.basis.is_sparse if self_contained is None else self_contained
    if not carried and not is_public(subspace.basis):
        raise InputError(
            "the basis is not on the hub, so nobody could use the adapter: basis.push_to_hub() it first, or pass "
            "self_contained=True"
        )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        save_adapter(subspace, folder, self_contained=carried)
        return push(folder, repository, carried=carried, private=private, token=token, message=commit_message)[1]


def is_public(basis: Basis) -> bool:
    """Return whether users of an adapter on the hub can get its basis: download it, or rebuild it from its seed."""
    return drawn_constructor(basis.construction.get("constructor")) is not None or basis.on_hub is not None


def load_pretrained(
    kind: Callable[..., Kind],
    model: nn.Module,
    name: str | Path,
    basis: Basis | None,
    *,
    revision: str | None,
    token: str | None,
) -> Kind:
    """Wrap the base model, and load a saved adapter into it; see `SubspaceModel.from_pretrained`.

    Raises:
        MismatchError: the adapter was trained with another model or another basis.
        InputError: the folder is not an adapter, or its basis is missing.
        StorageError: a file is damaged.
    """
    adapter = OpenedAdapter(fetched(name, revision, token), token=token)
    return wrap_with_adapter(kind, model, adapter, basis)


def wrap_with_adapter(
    kind: Callable[..., Kind],
    model: nn.Module,
    adapter: OpenedAdapter,
    basis: Basis | None = None,
    fingerprint: Mapping[str, str] | None = None,
) -> Kind:
    """Wrap the base model, and load an opened adapter into it.

    Args:
        kind: class of the result.
        model: the base model, with the theta_0 with which the adapter was trained.
        adapter: adapter; it is checked against the model and the basis.
        basis: basis of the adapter; by default the one to which it refers.
        fingerprint: see `OpenedAdapter.bind`.

    Raises:
        MismatchError: the adapter was trained with another model or another basis.
        InputError: the basis is missing.
        StorageError: a file is damaged.
    """
    manifest = adapter.manifest
    with reading(adapter.folder / MANIFEST):
        modules, ensemble = manifest.construction["modules_to_save"], manifest.construction["ensemble"]
        layers = manifest.construction.get("layer_scales")
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise TypeError(f"modules_to_save is {modules!r:.100}, not a list of names")
        scaled = None if layers is None else Partition.from_json(layers)
    fingerprint = adapter.bind(model, fingerprint)
    basis = basis or adapter.basis(model)
    adapter.require_basis(basis)
    adapter.require_z(basis.ranks)
    arguments: dict[str, Any] = {"modules_to_save": modules, "ensemble": ensemble, "layer_scales": scaled}
    same_blocks = adapter.partition == basis.partition
    with cached_fingerprint(model, fingerprint) if same_blocks else nullcontext():
        subspace = kind(model, basis, **arguments)
    try:
        subspace.set_state(*adapter.read(subspace.directly_trained()))
    except TinyspanError:
        subspace.engine.detach()  # z is zero, so the weights are theta_0
        raise
    set_label_names(model, adapter.labels)
    return subspace


def _construction(subspace: "AdapterMethods") -> dict[str, Any]:
    layers = {} if subspace.layer_scales is None else {"layer_scales": subspace.layer_scales.to_json()}
    return {"modules_to_save": subspace.modules_to_save, "ensemble": subspace.ensemble, **layers}

"""A SubspaceModel to and from the folder of an adapter, and to the Hugging Face hub."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import drawn_constructor
from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.hub import fetched, push
from tinyspan.io.storage import MANIFEST, read_manifest, reading
from tinyspan.labels import label_names, set_label_names
from tinyspan.model.adapters import (
    adapter_basis,
    adapter_labels,
    adapter_tensors,
    check_adapter,
    read_adapter,
    read_another,
    require_basis,
    require_z,
    write_adapter,
)
from tinyspan.partition import Partition
from tinyspan.trajectories.trajectory import model_name

if TYPE_CHECKING:
    from tinyspan.model.subspace import SubspaceModel

__all__ = ["is_public", "load_pretrained", "push_adapter", "restore_adapter", "save_adapter", "take_adapter"]


def save_adapter(
    subspace: "SubspaceModel",
    folder: Path,
    *,
    self_contained: bool | None = None,
    overwrite: bool = False,
    shared: bool = False,
) -> None:
    """Write the adapter at work; see `SubspaceModel.save_pretrained`.

    Args:
        subspace: has the adapter.
        folder: see `write_adapter`.
        self_contained: write the basis too; by default if it is sparse.
        overwrite: replace an earlier adapter.
        shared: replace an earlier adapter, and leave whatever else is in the folder.

    Raises:
        InputError: the folder holds something else, or an earlier adapter without `overwrite`, or the basis is read
            from inside it, or this is inside `disable_adapter`.
        TinyspanError: a parameter is NaN or infinite.
    """
    tensors = adapter_tensors(subspace.get_state().in_dtypes_of(subspace.base_state()))
    subspace.refresh()
    write_adapter(
        folder,
        tensors,
        subspace.basis,
        carried=subspace.basis.is_sparse if self_contained is None else self_contained,
        fingerprint=subspace.fingerprint,
        construction=_construction(subspace),
        model=model_name(subspace.model),
        labels=label_names(subspace.model),
        overwrite=overwrite,
        shared=shared,
    )


def restore_adapter(subspace: "SubspaceModel", folder: Path) -> None:
    """Put an adapter of the same basis, theta_0 and arguments to work, as it was when it was saved.

    Raises:
        MismatchError: it was trained in another basis, with another model or with other arguments.
        StorageError: a file is damaged.
    """
    names, construction = subspace.directly_trained(), _construction(subspace)
    state = read_another(folder, subspace.basis, subspace.fingerprint, construction, names, same_ensemble=True)
    subspace.set_state(*state)


def take_adapter(subspace: "SubspaceModel", folder: Path, adapter_name: str) -> None:
    """Read another adapter into memory; see `SubspaceModel.load_adapter`.

    Raises:
        InputError: the folder is no adapter.
        MismatchError: the adapter was trained in another basis, with another model, or with other modules beside.
        StorageError: a file is damaged.
    """
    names, construction = subspace.directly_trained(), _construction(subspace)
    state = read_another(folder, subspace.basis, subspace.fingerprint, construction, names)
    subspace.bank.add(adapter_name, state, adapter_labels(folder))


def push_adapter(
    subspace: "SubspaceModel",
    repository: str,
    *,
    self_contained: bool | None,
    private: bool | None,
    token: str | None,
    commit_message: str,
) -> str:
    """Upload the adapter at work, and return the commit; see `SubspaceModel.push_to_hub`.

    Raises:
        InputError: the basis could not be found by who fetches the adapter, or the hub refuses the name or token.
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
    """Return whether the basis of an adapter on the hub can be had: fetched, or drawn again from its seed."""
    return drawn_constructor(basis.construction.get("constructor")) is not None or basis.on_hub is not None


def load_pretrained(
    kind: "type[SubspaceModel]",
    model: nn.Module,
    name: str | Path,
    basis: Basis | None,
    *,
    revision: str | None,
    token: str | None,
) -> "SubspaceModel":
    """Wrap the base model, and put a saved adapter into it; see `SubspaceModel.from_pretrained`.

    Raises:
        MismatchError: the model or the basis is another one than the adapter was trained with.
        InputError: the folder is no adapter, or its basis is not found.
        StorageError: a file is damaged.
    """
    folder = fetched(name, revision, token)
    manifest = read_manifest(folder, "adapter")
    with reading(folder / MANIFEST):
        parent = manifest.parents[0]
        modules, ensemble = manifest.construction["modules_to_save"], manifest.construction["ensemble"]
        layers = manifest.construction.get("layer_scales")
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise TypeError(f"modules_to_save is {modules!r:.100}, no list of names")
        scaled = None if layers is None else Partition.from_json(layers)
    check_adapter(model, folder)
    basis = basis or adapter_basis(folder, model=model, token=token)
    require_basis(folder, parent, basis)
    require_z(folder, manifest, basis.ranks)
    subspace = kind(model, basis, modules_to_save=modules, ensemble=ensemble, layer_scales=scaled)
    try:
        subspace.set_state(*read_adapter(folder, manifest, subspace.directly_trained()))
    except TinyspanError:
        subspace.merge()  # z is zero: the caller's model goes back as it came
        raise
    set_label_names(model, adapter_labels(folder))
    return subspace


def _construction(subspace: "SubspaceModel") -> dict[str, Any]:
    layers = {} if subspace.layer_scales is None else {"layer_scales": subspace.layer_scales.to_json()}
    return {"modules_to_save": subspace.modules_to_save, "ensemble": subspace.ensemble, **layers}

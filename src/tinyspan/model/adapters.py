"""Writing the folder of an adapter.

An adapter's folder holds z, and the directly trained parameters and buffers; its basis lies
elsewhere, or in the folder `basis` of an adapter that carries its own.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.folders import check_folder, check_place, claimed, prepare_folder
from tinyspan.io.storage import (
    MANIFEST,
    Manifest,
    package_versions,
    read_manifest,
    write_manifest,
    write_tensors,
    writing,
)
from tinyspan.model.opened_adapter import ADAPTER
from tinyspan.model.state import AdapterState
from tinyspan.weights import finite

__all__ = ["CARRIED", "adapter_tensors", "write_adapter"]

CARRIED = "basis"  # where in an adapter's folder its own basis lies, if it carries one


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

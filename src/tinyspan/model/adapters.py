"""Writing the folder of an adapter.

The folder of an adapter contains z, the directly trained parameters and the buffers. The basis is stored elsewhere, or
in the subfolder `basis` of a self-contained adapter.
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
from tinyspan.io.manifests import MANIFEST, Manifest, package_versions, read_manifest, write_manifest
from tinyspan.io.storage import writing
from tinyspan.io.tensors import write_tensors
from tinyspan.model.opened_adapter import ADAPTER
from tinyspan.model.state import AdapterState
from tinyspan.weights import finite

__all__ = ["CARRIED", "adapter_tensors", "write_adapter"]

CARRIED = "basis"  # subfolder of a self-contained adapter that contains its basis


def adapter_tensors(state: AdapterState) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, by their names in the file.

    Raises:
        TinyspanError: a value is NaN or infinite.
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
        folder: must be absent or empty, unless `overwrite` or `shared` is set.
        tensors: see `adapter_tensors`.
        basis: basis of the adapter.
        carried: whether the basis is written to the folder, too.
        fingerprint: see `fingerprint_of`.
        construction: arguments of the SubspaceModel: modules_to_save, ensemble, layer_scales.
        model: name of the model; informational.
        labels: names of the outputs of a classifier's head in their order, if it has names.
        overwrite: replace an earlier adapter.
        shared: replace an earlier adapter, and keep all other files in the folder, such as the state of a Trainer.

    Raises:
        InputError: the folder holds something else, or an earlier adapter and `overwrite` is not set, or the basis is
            read from inside the folder. With `shared`: the folder holds another kind of output, or another basis in the
            subfolder of the adapter's basis.
    """
    location = basis.location
    if not shared:
        check_folder(folder, "adapter", overwrite, [place for place in (location, basis.source) if place is not None])
    with claimed(folder):
        if shared:
            _remove_earlier(folder, basis if carried else None)
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


def _remove_earlier(folder: Path, carried: Basis | None) -> None:
    """Remove an earlier adapter from a folder that is shared with other files; its basis stays if it is written again.

    Raises:
        InputError: the folder holds another kind of output, or its subfolder `basis` holds another basis.
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
        raise InputError(f"{place} is not the basis of the adapter to be saved; choose another folder")
    with writing(place):
        shutil.rmtree(place)

"""An opened adapter: its manifest is read once, and each file is compared with its hash once."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import CONSTRUCTORS, drawn_constructor
from tinyspan.errors import InputError, MismatchError, StorageError
from tinyspan.io.folders import RESULT
from tinyspan.io.hub import downloaded
from tinyspan.io.manifests import MANIFEST, check_file, read_manifest
from tinyspan.io.storage import read_json, reading
from tinyspan.io.tensors import open_tensors
from tinyspan.model.base import directly_trained_names, fingerprint_of, require_same, select_weights
from tinyspan.model.state import AdapterState
from tinyspan.partition import Partition
from tinyspan.sharding import local
from tinyspan.trajectories.trajectory import stored_partition
from tinyspan.weights import finite

__all__ = ["ADAPTER", "OpenedAdapter", "opened"]

ADAPTER = "adapter.safetensors"


class OpenedAdapter:
    """The folder of an adapter.

    Args:
        folder: folder of the adapter.
        location: the folder of its basis, if it has moved since the adapter was saved.
        token: access token, if the basis is in a private repository on the hub.

    Attributes:
        folder: see above.
        manifest: manifest of the adapter.
        parent: hash of the basis.

    Raises:
        InputError: the folder is not an adapter.
        StorageError: the manifest is damaged.
    """

    def __init__(self, folder: str | Path, location: str | Path | None = None, token: str | None = None) -> None:
        self.folder, self._location, self._token = Path(folder), location, token
        self.manifest = read_manifest(self.folder, "adapter")
        with reading(self.folder / MANIFEST):
            self.parent = self.manifest.parents[0]
        self._checked: set[str] = set()

    def __str__(self) -> str:
        """Return the path of the folder, for messages."""
        return str(self.folder)

    # -- the basis --------------------------------------------------------------------------------------------------

    @cached_property
    def stored_basis(self) -> Basis | None:
        """The stored basis, opened; None if the basis is rebuilt from its construction.

        Raises:
            InputError: the basis is not where it was when the adapter was saved.
            MismatchError: the folder contains another basis.
            StorageError: a manifest is damaged.
        """
        details = self.manifest.details
        if self._location is not None:
            if not Path(self._location).is_dir():
                raise InputError(f"{self._location} is not a basis: there is no such folder")
            basis = Basis.from_pretrained(self._location)
        elif (near := self._relative_location()) is not None:
            basis = Basis.from_pretrained(near)
        elif (pushed := details.get("basis_on_hub")) is not None:
            with reading(self.folder / MANIFEST):
                repository, _, commit = pushed.partition("@")
            basis = Basis.from_pretrained(downloaded(repository, commit or None, self._token))
            basis.on_hub = pushed
        elif details.get("basis") is None:
            return None
        else:
            place = self.folder.resolve() / details["basis"]
            raise InputError(
                f"the basis of {self} is not at {place} any more (hash {self.parent[:12]}...): "
                "pass its location as basis=, or restore it"
            )
        self.require_basis(basis)
        return basis

    def _relative_location(self) -> Path | None:
        """Return the location of the basis relative to the adapter, if it is still there."""
        with reading(self.folder / MANIFEST):
            if (place := self.manifest.details.get("basis")) is None:
                return None
            if Path(place).is_absolute():
                raise ValueError(f"the basis is said to lie at {place!r:.100}, expected a relative path")
            location = self.folder.resolve() / place
            return location if Path(location, MANIFEST).is_file() else None

    def basis(self, model: nn.Module | None = None) -> Basis:
        """Return the basis: read from a folder, rebuilt from its construction, or an empty one.

        Args:
            model: the model to be wrapped, if known; blocks that it does not have are refused before directions are
                generated.

        Raises:
            InputError: the basis is not where it was when the adapter was saved.
            MismatchError: the folder contains another basis, another version of torch generates other numbers from the
                seed, or the blocks do not match the model.
            StorageError: a file is damaged.
        """
        if self.stored_basis is not None:
            return self.stored_basis
        with reading(self.folder / MANIFEST):
            construction = dict(self.manifest.construction["basis"])
        if model is not None:
            self.partition.widened().select(model)
        basis = self._rebuild(construction)
        if basis.content_hash() != self.parent:
            saved_with, present = self.manifest.versions.get("torch"), torch.__version__
            raise MismatchError(
                f"the basis of {self}, drawn again from its seed, differs: expected {self.parent[:12]}..., "
                f"found {basis.content_hash()[:12]}.... torch {saved_with} drew it and this is torch {present}, whose "
                "generator may differ; save the basis to a folder where the adapter was made, and pass that folder"
            )
        return basis

    def _rebuild(self, construction: Mapping[str, Any]) -> Basis:
        """Rebuild the basis, with no more directions than the adapter has coordinates."""
        name = construction.get("constructor")
        if (constructor := drawn_constructor(name)) is None:
            way = "pass it as an argument"
            if isinstance(name, str) and name not in CONSTRUCTORS:
                way += f", or import the module that registers its constructor {name!r:.100}"
            raise InputError(f"the basis of {self} was never saved to a folder; {way}")
        with reading(self.folder / MANIFEST):
            arguments = constructor.read_arguments(construction)
        if arguments.get("rank") is not None:
            self.require_z({block.name: arguments["rank"] for block in self.partition})
        try:
            return constructor.build(self.partition, **arguments)
        except InputError as error:
            raise StorageError(f"{self.folder / MANIFEST} is damaged: {error}") from error

    def require_basis(self, basis: Basis) -> None:
        """Check that the adapter was trained in this basis.

        Raises:
            MismatchError: the adapter was trained in another basis.
        """
        if basis.content_hash() != self.parent:
            raise MismatchError(
                f"{self} was trained in the basis {self.parent[:12]}..., the given one is "
                f"{basis.content_hash()[:12]}...; pass the basis that it was tuned in"
            )

    # -- the model --------------------------------------------------------------------------------------------------

    @cached_property
    def partition(self) -> Partition:
        """The blocks that the adapter changes."""
        return stored_partition(self.folder, self.manifest)

    def bind(self, model: nn.Module, fingerprint: Mapping[str, str] | None = None) -> Mapping[str, str]:
        """Check that the adapter was trained with this model, and return the model's fingerprint.

        Args:
            model: the base model.
            fingerprint: the result of `bind` for the model, if its weights have not changed since; by default they are
                hashed.

        Raises:
            MismatchError: a parameter or block differs.
            InputError: weights are half precision, NaN or infinite.
            StorageError: a file is damaged.
        """
        what = f"the adapter {self}"
        weights = select_weights(model, self.partition, what, self.manifest.versions)
        with reading(self.folder / MANIFEST):
            names = directly_trained_names(model, self.manifest.construction["modules_to_save"])
        self._check(ADAPTER)
        if fingerprint is None:
            fingerprint = fingerprint_of(model, self.partition, weights, names)
        require_same(self.manifest.fingerprint, fingerprint, what)
        self._require_shapes(model)
        return fingerprint

    def _require_shapes(self, model: nn.Module) -> None:
        named = {name: local(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
        reader = open_tensors(self.folder / ADAPTER)
        with reading(self.folder / ADAPTER):
            for key in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                part, _, name = key.partition("/")
                if part != "ordinary":
                    continue
                stored, own = reader.get_tensor(key), named.get(name)
                if own is None or (stored.shape, stored.dtype) != (own.shape, own.dtype):
                    has = "none of this name" if own is None else f"{list(own.shape)} and {own.dtype}"
                    raise MismatchError(
                        f"the adapter {self}: {name!r} has shape {list(stored.shape)} and {stored.dtype}, the model "
                        f"has {has}; was it trained for another task, or in another dtype?"
                    )

    # -- what it holds ----------------------------------------------------------------------------------------------

    def _check(self, name: str) -> None:
        """Compare a file with its hash, once."""
        if name not in self._checked:
            with reading(self.folder / MANIFEST):
                entry = self.manifest.files[name] if name == ADAPTER else self.manifest.attached[name]
            check_file(self.folder, name, entry)
            self._checked.add(name)

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the outputs of the head with which it was trained; None if they have no names."""
        with reading(self.folder / MANIFEST):
            labels = self.manifest.details.get("labels")
            if labels is None:
                return None
            if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
                raise TypeError(f"labels is {labels!r:.100}, not a list of names")
            return tuple(labels)

    @cached_property
    def directly_trained(self) -> set[str]:
        """Names of the directly trained parameters and buffers."""
        self._check(ADAPTER)
        reader = open_tensors(self.folder / ADAPTER)
        with reading(self.folder / ADAPTER):
            return {key.removeprefix("ordinary/") for key in reader.keys() if key.startswith("ordinary/")}  # noqa: SIM118

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """The result that `tune` wrote, if there is one."""
        if not (self.folder / RESULT).is_file():
            return None
        if RESULT in self.manifest.attached:
            self._check(RESULT)
        return read_json(self.folder / RESULT, sealed=False)

    def require_z(self, ranks: Mapping[str, int]) -> None:
        """Check that the file contains z [h, k] for every block with directions.

        This is called before directions are generated, so that there are never more than the file has coordinates for.

        Raises:
            StorageError: the file is damaged.
        """
        self._check(ADAPTER)
        path = self.folder / ADAPTER
        with reading(self.folder / MANIFEST):
            ensemble = self.manifest.construction["ensemble"]
            if type(ensemble) is not int or ensemble < 1:
                raise ValueError(f"the ensemble is {ensemble!r:.100}, not an integer of at least 1")
        reader = open_tensors(path)
        with reading(path):
            shapes = {key: reader.get_slice(key).get_shape() for key in reader.keys() if key.startswith("z/")}  # noqa: SIM118
        expected = {f"z/{block}": [ensemble, rank] for block, rank in ranks.items() if rank}
        if shapes != expected:
            key = min(key for key in {*shapes, *expected} if shapes.get(key) != expected.get(key))
            raise StorageError(
                f"{path} is damaged: expected {key} of shape {expected.get(key)}, found {shapes.get(key)}"
            )

    def read(self, names: Collection[str]) -> AdapterState:
        """Return the state in the file, which `require_z` has checked.

        Args:
            names: names of the directly trained parameters that the file must contain.

        Raises:
            StorageError: the file is damaged.
        """
        path = self.folder / ADAPTER
        parts: dict[str, dict[str, Tensor]] = {"z": {}, "ordinary": {}, "scales": {}}
        reader = open_tensors(path)
        with reading(path):
            for key in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                part, _, name = key.partition("/")
                parts[part][name] = reader.get_tensor(key)
                if not finite(parts[part][name]):
                    raise StorageError(f"{path} is damaged: {key} holds NaN or infinite numbers")
            scaled = "layer_scales" in self.manifest.construction
            lacking = set(names) - parts["ordinary"].keys()
            if lacking or bool(parts["scales"]) != scaled:
                raise StorageError(f"{path} is damaged: it lacks {min(lacking, default='the scales')}")
        return AdapterState(parts["z"], parts["ordinary"], parts["scales"].get(""))

    def read_for(
        self,
        basis: Basis,
        fingerprint: Mapping[str, str],
        construction: Mapping[str, Any],
        names: Collection[str],
        *,
        same_ensemble: bool = False,
    ) -> AdapterState:
        """Read the adapter as a replacement of another one in a SubspaceModel.

        Args:
            basis: basis of the SubspaceModel, like the arguments below.
            fingerprint: see `fingerprint_of`.
            construction: see `write_adapter`; if the ensemble differs, z becomes the mean of its members.
            names: names of the directly trained parameters that the adapter must contain.
            same_ensemble: refuse another ensemble.

        Raises:
            MismatchError: the adapter was trained in another basis, with another model, or with other
                `modules_to_save`.
            StorageError: a file is damaged.
        """
        what, own = f"the adapter {self}", self.manifest.construction
        self.require_basis(basis)
        self._check(ADAPTER)
        with reading(self.folder / MANIFEST):
            modules = sorted(own["modules_to_save"])
        ours, layers = construction["modules_to_save"], construction.get("layer_scales")
        if modules != sorted(ours) or own.get("layer_scales") != layers:
            raise MismatchError(
                f"{what} was trained with modules_to_save={modules}, this model with {ours} (and both "
                "need scales of the same layers, or none); load it with a model of its own"
            )
        require_same(self.manifest.fingerprint, fingerprint, what)
        self.require_z(basis.ranks)
        if same_ensemble and (stored := own["ensemble"]) != construction["ensemble"]:
            raise MismatchError(f"{what} was trained with ensemble={stored}, this model has {construction['ensemble']}")
        state = self.read(names)
        alike = {name: z if len(z) == construction["ensemble"] else z.mean(0) for name, z in state.z.items()}
        return state._replace(z=alike)


@overload
def opened(adapter: str | Path | OpenedAdapter) -> OpenedAdapter: ...
@overload
def opened(adapter: None) -> None: ...
def opened(adapter: str | Path | OpenedAdapter | None) -> OpenedAdapter | None:
    """Open the folder of an adapter, unless it is open already or None."""
    return adapter if adapter is None or isinstance(adapter, OpenedAdapter) else OpenedAdapter(adapter)

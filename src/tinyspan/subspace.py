"""A model that is trained inside a subspace: every block is theta_0 + V mean_i z_i, and only z moves.

Mechanism: the wrapped model keeps its own class and its own weights. Before a forward pass the weights are rewritten
if z has changed; in the backward pass each weight's gradient g is projected, V^T g added to the gradient of z, and
freed at once, so that the blocks' gradients are never all alive together. Nothing else needs to know: optimizers,
clipping and schedules see z as an ordinary parameter, and the gradient is exact.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.basis import Basis, DenseMap, empty_basis, random_basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.partition import Partition
from tinyspan.storage import (
    MANIFEST,
    Manifest,
    check_file,
    open_tensors,
    package_versions,
    prepare_folder,
    read_manifest,
    write_json,
    write_tensors,
)

__all__ = ["SubspaceModel", "adapter_basis"]

ADAPTER = "adapter.safetensors"


class SubspaceModel(nn.Module):
    """Train a model in a basis: theta = theta_0 + V mean_i z^(i), i = 1 .. h (Zhang et al. 2023, equation 3).

    The model is taken over: parameters in a block follow z, those of `modules_to_save` train as usual, all others are
    frozen. `parameters()` lists z, the ordinary parameters and the frozen ones, but not the blocks' weights, which are
    a function of z.

    Args:
        model: any module; the blocks' weights must be float32 or float64 and are theta_0.
        basis: of the model's partition; if it has a fingerprint, theta_0 must match it.
        modules_to_save: modules to train in the ordinary way, by the last parts of their names, as in PEFT:
            `["classifier", "embeddings"]`.
        ensemble: h, how many vectors z^(i) are averaged.
        start_std: standard deviation of the normal numbers that z starts from; 0 starts at theta_0 itself.
        seed: of these numbers.

    Attributes:
        z: one parameter [h, k_b] per block.
        model: the wrapped model; its weights are up to date after a forward pass or `merge`.

    Raises:
        MismatchError: the basis belongs to another partition or to another theta_0.
        InputError: a name in `modules_to_save` fits no module or lies in a block, weights are half precision, the
            ensemble is below 1 or the standard deviation negative.

    Example:
        >>> from tinyspan import by_pattern, given_basis
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> partition = by_pattern(model, {"all": ".*"})
        >>> subspace = SubspaceModel(model, given_basis(partition, {"all": torch.tensor([[1.0, 0.0]])}))
        >>> subspace(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> subspace.z[0].grad
        tensor([[3.]])
    """

    def __init__(
        self,
        model: nn.Module,
        basis: Basis,
        *,
        modules_to_save: Sequence[str] = (),
        ensemble: int = 1,
        start_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ensemble < 1 or start_std < 0:
            raise InputError(f"expected ensemble >= 1 and start_std >= 0, got {ensemble} and {start_std}")
        weights = basis.partition.select(model)
        _check_weights(basis, weights)
        self.fingerprint = basis.partition.fingerprint(weights)
        _check_fingerprint(basis, self.fingerprint)
        ordinary = _ordinary_names(model, modules_to_save)
        _check_disjoint(ordinary, weights)

        self.model, self.basis = model, basis
        self.modules_to_save, self.ensemble = list(modules_to_save), ensemble
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._blocks = [block for block in basis.partition if basis.ranks[block.name] > 0]
        self._weight_names = {spec.name for block in self._blocks for spec in block.parameters}
        self._ordinary = ordinary
        generator = torch.Generator().manual_seed(seed)
        self.z = nn.ParameterList()
        for index, block in enumerate(self._blocks):
            first = weights[block.parameters[0].name]
            shape = (ensemble, basis.ranks[block.name])
            self.z.append(nn.Parameter((torch.randn(shape, generator=generator) * start_std).to(first)))
            directions = basis.maps[block.name].directions.to(first.device)
            self.register_buffer(f"_directions_{index}", directions, persistent=False)
            start = block.flatten(weights)
            self.register_buffer(f"_start_{index}", start, persistent=False)
        self._written: Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.forward = _Forward(self)
        self._attach()

    # -- using it ---------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Look an unknown name up in the wrapped model (`config`, `generate`, ...), as PEFT does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write theta_0 + V mean_i z_i into the wrapped model's weights, if z has changed since the last time.

        `forward` does this; call it yourself before reading the wrapped model's weights.
        """
        if not self._hooks or not self._blocks:
            return
        present = torch.cat([z.mean(0) for z in self.z])
        if self._written is not None and torch.equal(present, self._written):
            return
        weights = self._weights()
        for index, block in enumerate(self._blocks):
            mean, start = self.z[index].mean(0), getattr(self, f"_start_{index}")
            for spec, a, b in block.spans():
                self._map(index).rows(a, b).displace(start[a:b], mean, weights[spec.name].view(-1))
        self._written = present

    def merge(self) -> nn.Module:
        """Return the wrapped model as a plain one with weights theta_0 + V mean_i z_i, rid of every hook.

        It is the same object, not a copy; `unmerge` goes back.
        """
        self.refresh()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        return self.model

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put theta_0 back into the blocks' weights, bit for bit, and follow z again from the next forward pass on.

        Modules in `modules_to_save` keep what they have learned: there is no copy of their first weights.
        """
        weights = self._weights()
        for index, block in enumerate(self._blocks):
            for name, value in block.unflatten(getattr(self, f"_start_{index}")).items():
                weights[name].copy_(value)
        self._written = None
        self._attach()

    @torch.no_grad()
    def swap(self, z: Mapping[str, Tensor], ordinary: Mapping[str, Tensor] | None = None) -> None:
        """Replace z, and ordinary parameters if given, in place; the next forward pass uses them.

        Args:
            z: block name -> [k_b], given to every ensemble member, or [h, k_b].
            ordinary: parameter name -> value.

        Raises:
            MismatchError: a block is absent or unknown, or a shape does not fit. Nothing is changed then.
        """
        own = dict(zip((block.name for block in self._blocks), self.z, strict=True))
        if set(z) != set(own):
            raise MismatchError(f"expected z for the blocks {sorted(own)}, got {sorted(z)}")
        for name, value in z.items():
            if value.shape[-1:] != own[name].shape[-1:] or value.shape not in (own[name].shape, own[name].shape[1:]):
                raise MismatchError(
                    f"z of block {name!r}: expected {list(own[name].shape)} or {list(own[name].shape[1:])}, "
                    f"got {list(value.shape)}"
                )
        named = dict(self.model.named_parameters())
        for name, value in (ordinary or {}).items():
            if name not in self._ordinary or named[name].shape != value.shape:
                raise MismatchError(f"{name!r} is no ordinary parameter of shape {list(value.shape)} of this model")
        for name, value in z.items():
            own[name].copy_(value.expand_as(own[name]))
        for name, value in (ordinary or {}).items():
            named[name].copy_(value)

    # -- what is trained --------------------------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield z and the wrapped model's parameters, without the blocks' weights, which follow z."""
        lead = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if not self._hooks or name.removeprefix(f"{lead}model.") not in self._weight_names:
                yield name, parameter

    def parameter_groups(self, z_learning_rate: float = 1e-2, learning_rate: float = 2e-5) -> list[dict[str, Any]]:
        """Return the two optimizer groups of the paper: z with its own rate and never decayed, then the rest.

        Either may have no parameters.

        Example:
            >>> from tinyspan import by_pattern, random_basis
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
            >>> basis = random_basis(by_pattern(model, {"first": "0.*"}), rank=2)
            >>> subspace = SubspaceModel(model, basis, modules_to_save=["1"])
            >>> groups = subspace.parameter_groups(z_learning_rate=0.01, learning_rate=2e-5)
            >>> [(group["lr"], sum(p.numel() for p in group["params"])) for group in groups]
            [(0.01, 2), (2e-05, 4)]
        """
        named = dict(self.model.named_parameters())
        return [
            {"params": list(self.z), "lr": z_learning_rate, "weight_decay": 0.0},
            {"params": [named[name] for name in self._ordinary], "lr": learning_rate},
        ]

    def count_parameters(self) -> tuple[int, int]:
        """Return how many numbers are trained in z and how many in ordinary parameters."""
        named = dict(self.model.named_parameters())
        return sum(z.numel() for z in self.z), sum(named[name].numel() for name in self._ordinary)

    def print_trainable_parameters(self) -> None:
        """Print both counts beside the size of the whole model."""
        in_z, ordinary = self.count_parameters()
        total = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"trainable: {in_z:,} in z, {ordinary:,} ordinary || model: {total:,} parameters")

    # -- on disk ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write an adapter: z, the ordinary parameters, and the hash of the basis they belong to.

        The basis itself is not written. `load` finds it where it lies now, unless it is told another place.

        Raises:
            InputError: the folder holds something else, an earlier adapter without `overwrite`, or a parameter is NaN.
        """
        folder = Path(folder)
        named = dict(self.model.named_parameters())
        tensors = {f"z/{block.name}": z for block, z in zip(self._blocks, self.z, strict=True)}
        tensors |= {f"ordinary/{name}": named[name] for name in self._ordinary}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{name} is NaN or infinite; nothing was saved. Lower the learning rate")
        prepare_folder(folder, MANIFEST, overwrite)
        location = self.basis.location
        manifest = Manifest(
            kind="adapter",
            partition=self.basis.partition.to_json(),
            fingerprint=self.fingerprint,
            parents=[self.basis.content_hash()],
            construction=self.basis.construction,
            details={
                "basis": os.path.relpath(location.resolve(), folder.resolve()) if location else None,
                "modules_to_save": self.modules_to_save,
                "ensemble": self.ensemble,
            },
            files={ADAPTER: write_tensors(folder / ADAPTER, tensors)},
            versions=package_versions(),
        )
        write_json(folder / MANIFEST, manifest.model_dump())

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path, basis: Basis | None = None) -> "SubspaceModel":
        """Wrap the base model, and put a saved adapter into it.

        Args:
            model: holds the same theta_0 as when the adapter was trained.
            folder: what `save` wrote.
            basis: the adapter's basis; by default it is found by `adapter_basis`.

        Raises:
            MismatchError: the model or the basis is another one than the adapter was trained with.
            InputError: the folder is no adapter, or its basis is not found.
            StorageError: a file is damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "adapter")
        check_file(folder, ADAPTER, manifest.files[ADAPTER])
        basis = basis or adapter_basis(folder)
        if basis.content_hash() != manifest.parents[0]:
            raise MismatchError(
                f"{folder} was trained in the basis {manifest.parents[0][:12]}..., "
                f"the given one is {basis.content_hash()[:12]}..."
            )
        weights = basis.partition.select(model)
        _require_same(manifest.fingerprint, basis.partition.fingerprint(weights), f"the adapter {folder}")
        details = manifest.details
        subspace = cls(model, basis, modules_to_save=details["modules_to_save"], ensemble=details["ensemble"])
        reader = open_tensors(folder / ADAPTER)
        parts: dict[str, dict[str, Tensor]] = {"z": {}, "ordinary": {}}
        for key in reader.keys():  # noqa: SIM118 - the reader is no mapping
            part, _, name = key.partition("/")
            parts[part][name] = reader.get_tensor(key)
        subspace.swap(parts["z"], parts["ordinary"])
        return subspace

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hooks out of a copy or pickle; `__setstate__` puts new ones on the copied weights."""
        return {**self.__dict__, "_hooks": [], "_attached": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        super().__setstate__(state)
        if attached:
            self._attach()

    # -- the engine -------------------------------------------------------------------------------------------------

    def _map(self, index: int) -> DenseMap:
        return DenseMap(getattr(self, f"_directions_{index}"))

    def _weights(self) -> dict[str, nn.Parameter]:
        return self.basis.partition.select(self.model)

    def _attach(self) -> None:
        """Freeze what is not trained and project the gradients of the blocks' weights as they appear."""
        for hook in self._hooks:
            hook.remove()
        self.model.requires_grad_(False)
        named = dict(self.model.named_parameters())
        for name in self._ordinary:
            named[name].requires_grad_(True)
        weights = self._weights()
        self._hooks = []
        for index, block in enumerate(self._blocks):
            for spec, a, b in block.spans():
                weight = weights[spec.name].requires_grad_(True)
                projection = partial(self._project, index=index, rows=(a, b))
                self._hooks.append(weight.register_post_accumulate_grad_hook(projection))

    @torch.no_grad()
    def _project(self, weight: Tensor, *, index: int, rows: tuple[int, int]) -> None:
        """Add V^T g / h to every member's gradient, since z enters as a mean, and free g."""
        assert weight.grad is not None
        z = self.z[index]
        gradient = self._map(index).rows(*rows).project(weight.grad.reshape(-1)) / self.ensemble
        weight.grad = None
        if z.grad is None:
            z.grad = torch.zeros_like(z)
        z.grad += gradient


class _Forward:
    """Call the wrapped model at theta_0 + V mean_i z_i, under the wrapped model's own signature.

    Trainers read the signature of `forward` to learn which columns a model takes.
    """

    def __init__(self, subspace: SubspaceModel) -> None:
        self._subspace = subspace

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._subspace.refresh()
        return self._subspace.model(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._subspace.model.forward)


def adapter_basis(folder: str | Path, location: str | Path | None = None) -> Basis:
    """Return the basis that an adapter names: from a folder, made again from its seed, or an empty one.

    Args:
        folder: the adapter.
        location: the basis folder, if it has moved since the adapter was saved.

    Raises:
        InputError: the basis is not where it was when the adapter was saved.
    """
    manifest = read_manifest(Path(folder), "adapter")
    if location is None and manifest.details["basis"] is not None:
        location = Path(folder).resolve() / manifest.details["basis"]
        if not (Path(location) / MANIFEST).is_file():
            raise InputError(
                f"the basis of {folder} is not at {location} any more; it has the hash {manifest.parents[0][:12]}..., "
                "say where it is"
            )
    if location is not None:
        return Basis.load(location)
    partition, made = Partition.from_json(manifest.partition), manifest.construction
    if made.get("constructor") == "random":
        return random_basis(partition, made["rank"], seed=made["seed"], dtype=getattr(torch, made["dtype"]))
    if made.get("constructor") == "empty":
        return empty_basis(partition)
    raise InputError(f"the basis of {folder} was never saved to a folder; pass it as an argument")


def _check_weights(basis: Basis, weights: Mapping[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name!r} is {weight.dtype}, in which steps inside a subspace round away; "
                "load the model in float32 and compute in bfloat16 with autocast"
            )


def _check_fingerprint(basis: Basis, found: Mapping[str, str]) -> None:
    if basis.fingerprint:
        _require_same(basis.fingerprint, found, "the basis")


def _require_same(expected: Mapping[str, str], found: Mapping[str, str], what: str) -> None:
    for block, digest in found.items():
        if expected.get(block) != digest:
            raise MismatchError(
                f"{what} was made for another theta_0: the model differs in block {block!r} "
                f"(expected {str(expected.get(block))[:12]}..., found {digest[:12]}...); "
                "load the base model it was made from, in the same dtype"
            )


def _ordinary_names(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """Return the names of the parameters under the modules whose names end in one of the given names."""
    chosen: list[str] = []
    for wanted in modules_to_save:
        modules = [name for name, _ in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not modules:
            raise InputError(f"modules_to_save: no module is called {wanted!r}")
        chosen += modules
    return [name for name, _ in model.named_parameters() if any(name.startswith(f"{module}.") for module in chosen)]


def _check_disjoint(ordinary: Sequence[str], weights: Mapping[str, nn.Parameter]) -> None:
    for name in ordinary:
        if name in weights:
            raise InputError(f"modules_to_save: {name!r} already lies in a block of the basis")

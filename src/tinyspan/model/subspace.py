"""A model that is trained inside a subspace: every block is theta_0 + V mean_i z_i, and only z moves.

Mechanism: the wrapped model keeps its own class and its own weights. Before a forward pass the weights are rewritten in
place if z has changed, and made to depend on z for autograd (`autograd`). In the backward pass each weight's gradient g
is projected, V^T g added to the gradient of z, and freed at once, so that the blocks' gradients are never all alive
together. Of a sparse basis g is not even computed where V is zero (`sampled`). Everything that autograd offers works
with z as with any parameter: `torch.autograd.grad`, hooks, second derivatives.

Where other tensors take the place of z (`torch.func.functional_call`, `forward_at`), nothing is written: the wrapped
model is called at theta_0 + V mean_i z_i as a function of them (`functional`).

How one block moves is in `moving`, how gradients reach z among several processes in `processes`.
"""

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import drawn_constructor
from tinyspan.errors import InputError, MismatchError, TinyspanError
from tinyspan.io.hub import fetched, push
from tinyspan.io.storage import MANIFEST, read_manifest, reading
from tinyspan.labels import generic_names, label_names, set_label_names
from tinyspan.maps.base import LinearMap
from tinyspan.model.adapters import (
    adapter_basis,
    adapter_labels,
    adapter_tensors,
    check_adapter,
    check_disjoint,
    describe_basis,
    fingerprint_of,
    ordinary_names,
    read_adapter,
    read_another,
    require_basis,
    require_same,
    require_state,
    require_z,
    select_weights,
    state_identity,
    write_adapter,
)
from tinyspan.model.autograd import rmatvec, temporarily_outside_transforms
from tinyspan.model.blocks import MovingBlock, kept_start, layer_positions
from tinyspan.model.curvature import Method, jacobian
from tinyspan.model.functional import functional_call
from tinyspan.model.hooks import Attachments, weak_hook
from tinyspan.model.processes import GradientsOfZ, group_of, identity_of, identity_over, require_alike, under_ddp
from tinyspan.model.sampled import SampledLayer, is_plain_linear, pays
from tinyspan.model.state import Trained, require_fit, weighted_sum
from tinyspan.partition import Partition
from tinyspan.sharding import is_sharded, local, reshard
from tinyspan.trajectories.trajectory import model_name
from tinyspan.weights import tied_names

__all__ = ["SubspaceModel", "named_model"]

_owners: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # model -> the SubspaceModel that writes its weights


class _Forward:
    """Call the wrapped model at theta_0 + V mean_i z_i, under the wrapped model's own signature.

    Trainers read the signature of `forward` to learn which columns a model takes. This is made anew whenever it is
    asked for: kept in the SubspaceModel, it would keep that, and its copy of theta_0, until the garbage collector runs.
    """

    def __init__(self, subspace: "SubspaceModel | None" = None) -> None:
        self._subspace = subspace

    def __get__(self, subspace: "SubspaceModel | None", kind: type | None = None) -> "_Forward":
        return _Forward(subspace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        subspace = self._subspace
        assert subspace is not None
        if subspace._is_substituted():
            return subspace._call_functionally(subspace.z, subspace.scales, args, kwargs)
        subspace.refresh()
        if (gate := subspace._gate()) is None:
            return subspace.model(*args, **kwargs)
        return subspace._gradients.behind(subspace.model(*args, **kwargs), gate)

    @property
    def __signature__(self) -> inspect.Signature:
        """The wrapped model's; that of the class, which has none, names the `labels` that a plain Trainer looks for."""
        if self._subspace is not None:
            return inspect.signature(named_model(self._subspace.model).forward)
        anything = inspect.signature(self.__call__)
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        positional, keywords = anything.parameters.values()
        return anything.replace(parameters=[positional, labels, keywords])


class SubspaceModel(nn.Module):
    """Train a model in a basis: theta = theta_0 + V mean_i z^(i), i = 1 .. h (Zhang et al. 2023, equation 3).

    The model is taken over: parameters in a block follow z, those of `modules_to_save` train as usual, all others are
    frozen. `parameters()` lists z, the ordinary parameters and the frozen ones, but not the blocks' weights, which are
    a function of z. z can be differentiated like any parameter, also twice and under the transforms of `torch.func`;
    `forward_at` and `jacobian` are the common cases.

    Among processes, `DistributedDataParallel(subspace)` exchanges the gradients of z and of the ordinary parameters. A
    model that `fully_shard` has cut before it is wrapped moves in a basis of each process's rows.

    Args:
        model: any module; the blocks' weights must be float32 or float64 and are theta_0. For a basis recorded from
            half-precision weights it is the same model in float32.
        basis: of the model's partition; if it has a fingerprint, theta_0 must match it.
        modules_to_save: modules to train in the ordinary way, by the last parts of their names, as in PEFT:
            `["classifier", "embeddings"]`. A copy of them, as they are now, is kept for `disable_adapter`.
        ensemble: h, how many vectors z^(i) are averaged.
        start_std: standard deviation of the normal numbers that z starts from; 0 starts at theta_0 itself.
        seed: of these numbers.
        layer_scales: layers l, of the same parameters as the basis's blocks, that learn one more number each:
            theta_l = theta_0,l + lambda_l (V mean_i z_i)_l. In one global block, SAID of Aghajanyan et al. (2021).

    Attributes:
        z: one parameter [h, k_b] per block.
        scales: lambda, one parameter [number of layers] that starts from 1, or None without `layer_scales`.
        blocks: the blocks that have directions, in the order of `z`.
        model: the wrapped model; its weights are up to date after a forward pass, `refresh` or `merge`.

    Raises:
        MismatchError: the basis belongs to another partition or to another theta_0, or `layer_scales` holds other
            parameters than the basis; or the model is cut, and another process has another basis or other arguments.
        InputError: a name in `modules_to_save` fits no module or lies in a block, weights are half precision,
            quantized, NaN, infinite, on the meta device or cut in part, the ensemble is below 1 or the standard
            deviation negative, NaN or infinite.

    Example:
        >>> from tinyspan import Basis, by_pattern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> partition = by_pattern(model, {"all": ".*"})
        >>> subspace = SubspaceModel(model, Basis.from_directions(partition, {"all": torch.tensor([[1.0, 0.0]])}))
        >>> subspace(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> subspace.z[0].grad
        tensor([[3.]])
    """

    forward = _Forward()
    _hf_peft_config_loaded = True  # transformers trains over quantized weights only what says that it adds numbers

    def __init__(
        self,
        model: nn.Module,
        basis: Basis,
        *,
        modules_to_save: Sequence[str] = (),
        ensemble: int = 1,
        start_std: float = 0.0,
        seed: int = 0,
        layer_scales: Partition | None = None,
    ) -> None:
        super().__init__()
        if ensemble < 1 or not 0 <= start_std < math.inf:
            raise InputError(f"expected ensemble >= 1 and a finite start_std >= 0, got {ensemble} and {start_std}")
        if _owner(model) is not None:
            raise InputError("the model already follows a SubspaceModel; merge() that one, or swap() its z")
        reshard(model)
        cut = next(filter(is_sharded, model.parameters()), None)
        if cut is not None:
            arguments = {"modules_to_save": sorted(modules_to_save), "ensemble": ensemble, "start_std": start_std}
            construction = {name: value for name, value in basis.construction.items() if name != "shard"}
            made = {"the ranks of the basis": basis.ranks, "how the basis was made": construction}
            require_alike(group_of([cut]), {**arguments, "seed": seed, "layer_scales": len(layer_scales or ()), **made})
        weights = select_weights(model, basis.partition, describe_basis(basis), basis.versions)
        ordinary = ordinary_names(model, modules_to_save)
        check_disjoint(model, ordinary, weights)
        self.fingerprint = fingerprint_of(model, basis.partition, weights, ordinary)
        if basis.fingerprint:
            of_blocks = {block: self.fingerprint[block] for block in basis.fingerprint}
            require_same(basis.fingerprint, of_blocks, describe_basis(basis))
        layer_of = {} if layer_scales is None else layer_positions(layer_scales, basis.partition)

        self.model, self.basis, self.layer_scales = model, basis, layer_scales
        self.modules_to_save, self.ensemble = list(modules_to_save), ensemble
        self._sharded = cut is not None
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.blocks = [block for block in basis.partition if basis.ranks[block.name] > 0]
        group = group_of(weights[spec.name] for block in self.blocks for spec in block.parameters)
        if cut is not None and group is None:  # what moves is whole in each process, such as a LoRA over a cut model
            starts = {f"theta_0 of {block.name!r}": self.fingerprint[block.name] for block in self.blocks}
            require_alike(group_of([cut]), {**starts, "what the basis was made of": basis.parents})
        self._ordinary = ordinary
        self._first = {name: value.detach().to("cpu", copy=True) for name, value in self._ordinary_tensors().items()}
        self.active_adapter, self._disabled = "default", False
        self.scales: nn.Parameter | None = None
        if layer_scales is not None:
            self.scales = nn.Parameter(torch.ones(len(layer_scales)).to(local(next(iter(weights.values())))))
        generator = torch.Generator().manual_seed(seed)
        self.z = nn.ParameterList()
        self._moving: list[MovingBlock] = []
        for index, block in enumerate(self.blocks):
            first = local(weights[block.parameters[0].name])
            shape = (ensemble, basis.ranks[block.name])
            self.z.append(nn.Parameter((torch.randn(shape, generator=generator) * start_std).to(first)))
            v = basis.maps[block.name].converted(partial(torch.Tensor.to, device=first.device))
            start = kept_start(block, v, weights, scaled=self.scales is not None)
            self.register_buffer(f"_start_{index}", start, persistent=False)
            scales = None if self.scales is None else self.scales.detach()
            self._moving.append(MovingBlock(block, v, layer_of, scales, start))
        identity = identity_of(self.fingerprint, basis.construction, basis.parents, basis.ranks)
        self.register_buffer("_first_identity", identity.clone(), persistent=False)  # DDP sends the first process's
        self._gradients = GradientsOfZ(identity, group)
        # of a cut model it is made of all shards, which takes every process, so now
        self._identity = identity_over(group_of([cut]), self._new_identity()) if cut is not None else None
        self._written: Tensor | None = None
        self._versions: list[int] = []  # of z, when the weights were last up to date
        self._warned_of_old_weights = False
        self._attachments = Attachments()
        self._graph_of: Any = None  # what the graph from z to the weights was made for
        self._gate_to_z: Tensor | None = None
        self._own: set[int] = set()  # z and scales, by identity: anything else is a substitute
        self._following: set[int] = set()
        self._attached = False
        self.register_state_dict_pre_hook(_before_state_dict)
        self.register_state_dict_post_hook(_after_state_dict)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        self._attach()
        self._adapters: dict[str, Trained | None] = {self.active_adapter: None}  # the one at work is in z
        self._label_names: dict[str, Sequence[str] | None] = {}  # of the adapters that are not at work

    # -- using it ---------------------------------------------------------------------------------------------------

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuse: a replica's z would get no gradients."""
        raise InputError("a SubspaceModel cannot be replicated over devices; use one process per device")

    def __getattr__(self, name: str) -> Any:
        """Look an unknown name up in the wrapped model (`config`, `generate`, ...), with its weights up to date."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("_"):
                raise
            getattr(self.model, name)
            self.refresh()
            return getattr(self.model, name)

    def _get_name(self) -> str:
        """Return the wrapped model's class name, by which the Trainer decides whether labels are shifted."""
        name: str = named_model(self.model)._get_name()
        return name

    def __repr__(self) -> str:
        """Show this class's own name over the wrapped model."""
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    @property
    def generation_config(self) -> Any:
        """The wrapped model's, which its `generate` reads; `Seq2SeqTrainer` sets it here."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    @torch.no_grad()
    def refresh(self) -> None:
        """Write theta_0 + V mean_i z_i into the wrapped model's weights, if z has changed since the last time.

        A forward pass does this; call it before you use the wrapped model by itself. z is compared by value, not by
        version counter: some optimizers write through `.data`, which no counter sees.

        Raises:
            InputError: z has changed although the model is merged, so that it no longer follows z.
            TinyspanError: z is NaN or infinite; the weights stay as they were.
        """
        if torch._C._current_graph_task_id() == -1:  # outside of a backward pass; what is pending is of one that failed
            self._forget_gradients()
        if not self.blocks or self._is_substituted():
            return
        self._versions = [z._version for z in self.z]
        with torch.autocast(self.z[0].device.type, enabled=False):
            present = self._present()
            if self._written is not None and torch.equal(present, self._written):
                self._follow_again()
                return
            if not torch.isfinite(present).all():
                named = self._z_of_blocks().items()
                sick = next((name for name, z in named if not torch.isfinite(z).all()), "scales")
                raise TinyspanError(
                    f"z of block {sick!r} is NaN or infinite; the model's weights stay at the last z "
                    "that was not. Lower the learning rate of z, or look for NaN in the loss"
                )
            if self._attached:
                self._write(present)
            elif self._written is not None:
                raise InputError("z has changed while the model was merged; call unmerge() to follow z again")

    def _present(self) -> Tensor:
        """Return every block's mean_i z_i, then the scales: all that the weights depend on."""
        scales = [] if self.scales is None else [self.scales.detach()]
        return torch.cat([z.detach().mean(0) for z in self.z] + scales)

    def _write(self, present: Tensor) -> None:
        weights = self._local_weights()
        means, scales = self._split(present)
        for index, (moving, mean) in enumerate(zip(self._moving, means, strict=True)):
            moving.write(weights, self._start(index), mean, scales)
        torch.clear_autocast_cache()  # an outer autocast region may hold the old weights in half precision
        self._written = present
        self._follow()

    def _split(self, present: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Return every block's mean_i z_i, and the scales."""
        *means, scales = present.split([*(z.shape[1] for z in self.z), len(self.layer_scales or ())])
        return means, scales

    def _start(self, index: int) -> Tensor:
        """Return what is kept of a block's theta_0."""
        start: Tensor = getattr(self, f"_start_{index}")
        return start

    @torch.no_grad()
    def start(self) -> dict[str, Tensor]:
        """Return theta_0 of every parameter in the blocks, by name, in its shape."""
        weights = self._weights()
        found: dict[str, Tensor] = {}
        for index, moving in enumerate(self._moving):
            found |= moving.whole_start(weights, self._start(index))
        return found

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """Return theta - theta_0 = V mean_i z_i for every parameter in the blocks, by name, in its shape."""
        if not self._moving:
            return {}
        with torch.autocast(self.z[0].device.type, enabled=False):
            means, scales = self._split(self._present())
            found: dict[str, Tensor] = {}
            for moving, mean in zip(self._moving, means, strict=True):
                found |= moving.update(mean, scales)
            return found

    def merge(self) -> nn.Module:
        """Return the wrapped model as a plain one with weights theta_0 + V mean_i z_i, rid of every hook.

        It is the same object, not a copy; `unmerge` goes back. What was computed before cannot be differentiated after.

        Raises:
            InputError: inside `disable_adapter`.
        """
        self._require_enabled()
        self.refresh()
        self._detach()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        return self.model

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put theta_0 back into the blocks' weights, bit for bit, and follow z again from the next forward pass on.

        Modules in `modules_to_save` keep what they have learned. Of a sparse basis only the coordinates that move are
        put back, since only they are kept.

        Raises:
            MismatchError: the basis is sparse and other coordinates are not at theta_0 any more, since somebody has
                changed the merged model; load the base model anew.
        """
        if _owner(self.model) not in (None, self):
            raise InputError("another SubspaceModel follows this model now; merge() that one first")
        weights = self._local_weights()
        for index, moving in enumerate(self._moving):
            moving.restore(weights, self._start(index))
        if any(moving.v.support is not None for moving in self._moving):
            named, partition = self._named(remove_duplicate=False), self.basis.partition
            found = partition.fingerprint({spec.name: named[spec.name] for spec in partition.parameters()})
            require_same({name: self.fingerprint[name] for name in found}, found, describe_basis(self.basis))
        self._written = None
        torch.clear_autocast_cache()
        self._attach()

    @torch.no_grad()
    def swap(
        self, z: Mapping[str, Tensor], ordinary: Mapping[str, Tensor] | None = None, scales: Tensor | None = None
    ) -> None:
        """Replace z, and ordinary parameters and scales if given, in place; the next forward pass uses them.

        Args:
            z: block name -> [k_b], given to every ensemble member, or [h, k_b].
            ordinary: parameter name -> value.
            scales: one number per block of `layer_scales`.

        Raises:
            MismatchError: a block is absent or unknown, or a shape does not fit. Nothing is changed then.
            InputError: the model is merged, or inside `disable_adapter`.
        """
        self._require_enabled()
        self._put(z, ordinary, scales)

    def _put(
        self, z: Mapping[str, Tensor], ordinary: Mapping[str, Tensor] | None = None, scales: Tensor | None = None
    ) -> None:
        self._require_following()
        self._require_fit(Trained(dict(z), dict(ordinary or {}), scales))
        own, named = self._z_of_blocks(), self._ordinary_tensors() if ordinary else {}
        for name, value in z.items():
            own[name].copy_(value.expand_as(own[name]))
        if scales is not None and self.scales is not None:
            self.scales.copy_(scales)
        for name, value in (ordinary or {}).items():
            named[name].copy_(value)

    # -- many adapters ----------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters in memory; the one that was trained, or loaded with the model, is `default`."""
        return list(self._adapters)

    def load_adapter(
        self, folder: str | Path, adapter_name: str, *, revision: str | None = None, token: str | None = None
    ) -> None:
        """Read another adapter of the same basis and model into memory, under a name; `set_adapter` puts it to work.

        Kept are its z and its ordinary parameters alone. The names are those that PEFT gave these things.

        Args:
            folder: what `save_pretrained` wrote, or the id of a repository on the hub.
            adapter_name: no adapter in memory has it.
            revision: branch, tag or commit of a repository.
            token: of a private one.

        Raises:
            InputError: the name is taken, or the folder is no adapter.
            MismatchError: the adapter was trained in another basis, with another model, or with other modules beside.
            StorageError: a file is damaged.
        """
        self._require_new(adapter_name)
        ordinary = self._ordinary_tensors()
        read = fetched(folder, revision, token)
        trained = read_another(read, self.basis, self.fingerprint, self._construction(), ordinary)
        self._require_fit(trained)
        self._adapters[adapter_name], self._label_names[adapter_name] = trained, adapter_labels(read)

    @torch.no_grad()
    def set_adapter(self, adapter_name: str) -> None:
        """Put another adapter to work, in place; what the present one has learned is kept under its name.

        The next forward pass reads the basis once and writes the weights. All adapters share one z: to train on, make
        the optimizer anew, since its moments are of the other adapter. Gradients are dropped here.

        Raises:
            InputError: there is none of this name, or the model is merged or inside `disable_adapter`.
        """
        self._require_known(adapter_name)
        self._require_enabled()
        if (wanted := self._adapters[adapter_name]) is None:
            return
        present = self._trained()
        self.swap(*wanted)
        for parameter in (*self._in_z(), *self._ordinary_parameters().values()):
            parameter.grad = None  # it was the other adapter's
        self._adapters |= {self.active_adapter: present, adapter_name: None}
        self._label_names[self.active_adapter] = label_names(self.model)
        set_label_names(self.model, self._label_names.get(adapter_name) or generic_names(self.model))
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter from memory.

        Raises:
            InputError: there is none of this name, or it is at work.
        """
        self._require_known(adapter_name)
        if adapter_name == self.active_adapter:
            raise InputError(f"the adapter {adapter_name!r} is at work; set_adapter() another one first")
        del self._adapters[adapter_name]
        self._label_names.pop(adapter_name, None)

    @torch.no_grad()
    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Combine adapters into a new one: z = sum_i w_i mean_j z_i^(j), exactly, and likewise what is trained beside.

        An ordinary parameter becomes phi_0 + sum_i w_i (phi_i - phi_0), where phi_0 is what it was when the model was
        wrapped; buffers, such as running means, are those of the first adapter. Weights [-1] negate an adapter,
        [1 - a, a] lie on the way from one to another.

        Args:
            adapters: names of adapters in memory.
            weights: one number each.
            adapter_name: of the combination; no adapter in memory has it.

        Raises:
            InputError: a name is unknown or taken, the numbers differ, a weight is NaN or infinite, or the layers have
                scales, in which the weights of the model are not linear.
        """
        self._require_new(adapter_name)
        self._require_enabled()
        for name in adapters:
            self._require_known(name)
        if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
            raise InputError(f"expected one finite weight per adapter, got {list(adapters)} and {list(weights)}")
        if self.scales is not None:
            raise InputError("adapters with scales of the layers have no weighted sum: their product with z is learned")
        present = self._trained()
        chosen = [self._adapters[name] or present for name in adapters]
        self._adapters[adapter_name] = weighted_sum(chosen, weights, present, self._first, self._ordinary)
        named = label_names(self.model) if adapters[0] == self.active_adapter else self._label_names.get(adapters[0])
        self._label_names[adapter_name] = named

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the one that was wrapped: theta_0, and the ordinary parameters as they were then.

        For forward passes: adapters are not changed, saved or merged inside, and the backward pass of a forward pass
        from before comes before (the weights it needs are written over).

        Raises:
            InputError: the model is merged, or this is inside another `disable_adapter`.
        """
        self._require_enabled()
        present = self._trained()
        scales = None if self.scales is None else torch.ones_like(self.scales)
        self.swap({name: torch.zeros_like(z) for name, z in present.z.items()}, self._first, scales)
        self._disabled = True
        try:
            yield
        finally:
            self._disabled = False
            with torch.no_grad():
                self._put(*present)

    def _trained(self) -> Trained:
        """Return copies of what is trained now."""
        return Trained(self._z_of_blocks(), self._ordinary_tensors(), self.scales).clone()

    def _require_fit(self, trained: Trained) -> None:
        named = self._ordinary_tensors() if trained.ordinary else {}
        require_fit(trained, Trained(self._z_of_blocks(), named, self.scales))

    def _require_enabled(self) -> None:
        if self._disabled:
            raise InputError("inside disable_adapter() the adapter is out of work; leave the block first")

    def _require_following(self) -> None:
        if not self._attached:
            raise InputError("the model is merged, so it does not follow z; call unmerge() first")

    def _require_known(self, adapter_name: str) -> None:
        if adapter_name not in self._adapters:
            raise InputError(f"there is no adapter {adapter_name!r} in memory, only {self.adapters}")

    def _require_new(self, adapter_name: str) -> None:
        if adapter_name in self._adapters:
            raise InputError(f"there is an adapter {adapter_name!r} in memory; choose another name or delete that one")

    # -- what is trained --------------------------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield z and the wrapped model's parameters, without the blocks' weights, which follow z."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if id(parameter) not in self._following:
                yield name, parameter

    def parameter_groups(self, z_learning_rate: float = 1e-2, learning_rate: float = 2e-5) -> list[dict[str, Any]]:
        """Return the two optimizer groups of the paper: z and scales, at a rate of their own, never decayed; the rest.

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
        return [
            {"params": self._in_z(), "lr": z_learning_rate, "weight_decay": 0.0},
            {"params": list(self._ordinary_parameters().values()), "lr": learning_rate},
        ]

    def count_parameters(self) -> tuple[int, int]:
        """Return how many numbers are trained in z, scales included, and how many in ordinary parameters."""
        ordinary = self._ordinary_parameters().values()
        return sum(z.numel() for z in self._in_z()), sum(parameter.numel() for parameter in ordinary)

    def print_trainable_parameters(self) -> None:
        """Print both counts beside the size of the whole model."""
        in_z, ordinary = self.count_parameters()
        total = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"trainable: {in_z:,} in z, {ordinary:,} ordinary || model: {total:,} parameters")

    # -- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, self_contained: bool | None = None
    ) -> None:
        """Write an adapter: z, scales, the ordinary parameters, and the hash of the basis they belong to.

        A self-contained adapter carries its basis along, in the folder `basis`. Of another, `load` finds the basis
        where it lies now, unless it is told another place.

        Args:
            folder: must not exist, or be empty, or hold an earlier adapter and `overwrite` be given.
            overwrite: replace an earlier adapter.
            self_contained: write the basis too; by default if it is sparse.

        Raises:
            InputError: the folder holds something else, or an earlier adapter without `overwrite`, or the basis is read
                from inside it.
            TinyspanError: a parameter is NaN or infinite.
        """
        self._write_adapter(Path(folder), self_contained, overwrite=overwrite)

    def _write_adapter(
        self, folder: Path, self_contained: bool | None = None, *, overwrite: bool = False, shared: bool = False
    ) -> None:
        self._require_enabled()
        tensors = adapter_tensors(Trained(self._z_of_blocks(), self._ordinary_of_base(), self.scales))
        self.refresh()
        write_adapter(
            folder,
            tensors,
            self.basis,
            carried=self.basis.is_sparse if self_contained is None else self_contained,
            fingerprint=self.fingerprint,
            construction=self._construction(),
            model=model_name(self.model),
            labels=label_names(self.model),
            overwrite=overwrite,
            shared=shared,
        )

    def _read_adapter(self, folder: Path) -> None:
        """Put an adapter of the same basis, theta_0 and arguments to work, as it was when it was saved.

        Raises:
            MismatchError: it was trained in another basis, with another model or with other arguments.
            StorageError: a file is damaged.
        """
        trained = read_another(
            folder, self.basis, self.fingerprint, self._construction(), self._ordinary_tensors(), same_ensemble=True
        )
        self.swap(*trained)

    def _construction(self) -> dict[str, Any]:
        layers = {} if self.layer_scales is None else {"layer_scales": self.layer_scales.to_json()}
        return {"modules_to_save": self.modules_to_save, "ensemble": self.ensemble, **layers}

    def push_to_hub(
        self,
        repository: str,
        *,
        self_contained: bool | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Adapter of tinyspan",
    ) -> str:
        """Upload the adapter, with a model card, to the Hugging Face hub, and return the commit.

        Args:
            repository: its id, `user/name`; made if it does not exist.
            self_contained: carry the basis along; by default if it is sparse. Otherwise it must be on the hub already
                (`Basis.push_to_hub`), or drawn from a seed.
            private: whether the repository is made private.
            token: for writing, if it is not the one that is logged in.
            commit_message: of the upload.

        Raises:
            InputError: the basis could not be found by who fetches the adapter, or the hub refuses the name or token.
            TinyspanError: a parameter is NaN or infinite.
            StorageError: the hub cannot be reached.
        """
        carried = self.basis.is_sparse if self_contained is None else self_contained
        if not carried and not self._basis_is_public():
            raise InputError(
                "the basis is not on the hub, so nobody could use the adapter: basis.push_to_hub() it first, or pass "
                "self_contained=True"
            )
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            self.save_pretrained(folder, self_contained=carried)
            return push(folder, repository, carried=carried, private=private, token=token, message=commit_message)[1]

    def get_extra_state(self) -> Tensor:
        """Return hashes of the basis, the arguments and theta_0, which `load_state_dict` compares with its own."""
        if self._identity is None:
            self._identity = self._new_identity()
        return self._identity.clone()  # distributed checkpoints are read into it

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the state is compared before anything is loaded."""

    def _new_identity(self) -> Tensor:
        layers = [[spec.name for spec in layer.parameters] for layer in self.layer_scales or ()]
        arguments = {"ordinary": sorted(self._ordinary), "ensemble": self.ensemble, "layer_scales": layers}
        return state_identity(self.basis, arguments, self.fingerprint)

    def _basis_is_public(self) -> bool:
        """Return whether the basis of an adapter on the hub can be had: fetched, or drawn again from its seed."""
        return (
            drawn_constructor(self.basis.construction.get("constructor")) is not None or self.basis.on_hub is not None
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        name: str | Path,
        basis: Basis | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> "SubspaceModel":
        """Wrap the base model, and put a saved adapter into it.

        Args:
            model: holds the same theta_0 as when the adapter was trained.
            name: a folder that `save_pretrained` wrote, or the id of a repository on the Hugging Face hub.
            basis: the adapter's basis; by default it is found by `adapter_basis`.
            revision: branch, tag or commit of a repository.
            token: of a private one, and of its basis.

        Raises:
            MismatchError: the model or the basis is another one than the adapter was trained with. The model is as it
                came then.
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
        subspace = cls(model, basis, modules_to_save=modules, ensemble=ensemble, layer_scales=scaled)
        try:
            subspace.swap(*read_adapter(folder, manifest, subspace._ordinary_parameters()))
        except TinyspanError:
            subspace.merge()  # z is zero: the caller's model goes back as it came
            raise
        set_label_names(model, adapter_labels(folder))
        return subspace

    def _apply(self, fn: Any, recurse: bool = True) -> "SubspaceModel":
        """Move or convert everything; unless merged, the weights are written anew at the next forward pass."""
        if fn(torch.zeros(())).dtype not in (torch.float32, torch.float64):
            raise InputError("in half precision steps inside a subspace round away; compute under autocast instead")
        follows = self._attached or self._written is None or torch.equal(self._present(), self._written)
        self._attachments.release()
        super()._apply(fn, recurse)
        for moving in self._moving:
            moving.convert(fn)
        self._own = set(map(id, self._in_z()))
        if self._attached:
            self._written = None
            self._graph_of = None
        elif self._written is not None:
            self._written = self._present() if follows else fn(self._written)
        return self

    def __copy__(self) -> "SubspaceModel":
        """Refuse: a shallow copy would write into the same weights."""
        raise InputError("two SubspaceModels cannot share one model; use copy.deepcopy")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what belongs to the graph of autograd."""
        return {**self.__dict__, "_graph_of": None, "_gate_to_z": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let the copied weights depend on the copied z."""
        super().__setstate__(state)
        self._own = set(map(id, self._in_z()))
        if self._attached:
            self._attach()

    # -- the engine -------------------------------------------------------------------------------------------------

    def _in_z(self) -> list[nn.Parameter]:
        return [*self.z, *([] if self.scales is None else [self.scales])]

    def _z_of_blocks(self) -> dict[str, Tensor]:
        return dict(zip((block.name for block in self.blocks), self.z, strict=True))

    def _weights(self) -> dict[str, nn.Parameter]:
        own = self._named(remove_duplicate=False)
        return {spec.name: own[spec.name] for block in self.blocks for spec in block.parameters}

    def _local_weights(self) -> dict[str, Tensor]:
        """Return where the blocks' weights are written.

        Raises:
            InputError: they are others than those whose gradients are projected, or on another device than z.
        """
        weights = self._weights()
        apart = {weight.device for weight in weights.values()} - {z.device for z in self.z}
        if apart:
            raise InputError(
                f"the wrapped model's weights are on {apart.pop()}, z on {self.z[0].device}: move the SubspaceModel, "
                "subspace.to(...), not the model inside it alone"
            )
        if self._attached and {id(weight) for weight in weights.values()} != self._following:
            raise InputError(
                "the wrapped model's weights have been replaced by others, which do not follow z: call fully_shard, or "
                "whatever replaced them, before SubspaceModel(model, ...)"
            )
        return {name: local(weight) for name, weight in weights.items()}

    def _ordinary_parameters(self) -> dict[str, nn.Parameter]:
        named = self._named()
        return {name: named[name] for name in self._ordinary}

    def _named(self, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
        """Return the wrapped model's parameters; whole copies that a forward pass over shards has left are dropped."""
        if self._sharded:
            reshard(self.model)
        return dict(self.model.named_parameters(remove_duplicate=remove_duplicate))

    def _ordinary_tensors(self) -> dict[str, Tensor]:
        """The ordinary parameters, and every persistent buffer (running means, ...), which training may move."""
        kept = self.model.state_dict().keys()
        buffers = {name: value for name, value in self.model.named_buffers() if name in kept}
        return {name: local(value) for name, value in (self._ordinary_parameters() | buffers).items()}

    def _ordinary_of_base(self) -> dict[str, Tensor]:
        """The same in the dtypes that they had when the model was wrapped."""
        return {name: value.to(self._first.get(name, value).dtype) for name, value in self._ordinary_tensors().items()}

    def _attach(self) -> None:
        """Freeze what is not trained and let the blocks' weights depend on z."""
        self._detach()
        weights = self._weights()
        hooked = next((name for name, weight in weights.items() if weight._post_accumulate_grad_hooks), None)
        if hooked is not None and not self._gradients.are_summed:
            raise InputError(
                f"{hooked!r} has a post-accumulate-gradient hook, which would never be called, since gradients of "
                "weights that follow z are not accumulated; remove the hook, or use register_hook"
            )
        self.model.requires_grad_(False)
        for parameter in self._ordinary_parameters().values():
            parameter.requires_grad_(True)
        for weight in weights.values():
            weight.grad = None  # of what the model was before: it would be taken for part of the first one
        self._following = {id(weight) for weight in weights.values()}
        named = self.model.named_parameters(remove_duplicate=False)
        following = [f"model.{name}" for name, weight in named if id(weight) in self._following]
        starts = [f"_start_{index}" for index in range(len(self.blocks))]
        self._ddp_params_and_buffers_to_ignore = under_ddp([*following, *starts])  # each process computes these from z
        self._attached = True
        self._own = set(map(id, self._in_z()))
        _owners[self.model] = ref(self)
        if self._gradients.are_summed:
            self._hook_gradients(weights)
            return
        moved = {name for moving in self._moving for name in moving.names}
        self._attachments.add_following(weights[name] for name in moved)
        layers = self._linear_layers()
        for index, moving in enumerate(self._moving):
            for number, part in enumerate(moving.parts or ()):
                weight = weights[part.spec.name]
                if part.support is not None and pays(len(part.support), weight):
                    sampled = [SampledLayer(layer, part.support) for layer in layers[id(weight)]]
                    self._attachments.sampled[index][number] = sampled
        self._follow()

    def _hook_gradients(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Project the gradients of shards as they appear: the graph is of whole weights, which `fully_shard` makes."""
        for index, moving in enumerate(self._moving):
            for number, part in enumerate(moving.parts or ()):
                self._attachments.add_hook(weights[part.spec.name], self._project, index, number)
            if moving.parts is None:
                for spec, a, b in moving.block.spans():
                    self._attachments.add_hook(weights[spec.name], self._gather, index, slice(a, b))

    def _linear_layers(self) -> Mapping[int, list[nn.Module]]:
        """Return the plain linear layers by the identities of their weights, if these are whole."""
        layers: dict[int, list[nn.Module]] = defaultdict(list)
        for layer in () if self._sharded else self.model.modules():
            if is_plain_linear(layer):
                layers[id(layer.weight)].append(layer)
        return layers

    def _detach(self) -> None:
        self._attachments.clear()
        self._following = set()
        self._graph_of = self._gate_to_z = None
        self._forget_gradients()
        self._attached = False
        if _owner(self.model) is self:
            del _owners[self.model]

    # -- the graph from z to the weights ----------------------------------------------------------------------------

    def _follow_again(self) -> None:
        """Renew the graph from z to the weights if it was made for something else than there is now."""
        if self._attached and self._graph_of != self._wanted_graph():
            self._follow()

    def _wanted_graph(self) -> Any:
        return [z.requires_grad for z in self._in_z()], self._gradients.are_exchanged()

    def _follow(self) -> None:
        """Let the weights, which have been written, depend on z: directly, or through stand-ins for a gate."""
        self._graph_of = self._wanted_graph()
        weights, in_z = self._weights(), self._in_z()
        sources: list[Tensor] = [*in_z]
        with temporarily_outside_transforms(), torch.inference_mode(False), torch.enable_grad():
            if self._gradients.are_gated():
                self._gate_to_z = self._gradients.gate(in_z)
            if self._gradients.are_summed:
                return
            self._attachments.release()
            if self._gradients.are_exchanged():
                sources = [self._stand_in(index, z) for index, z in enumerate(in_z)]
            scales = None if self.scales is None else sources[-1]
            for index, moving in enumerate(self._moving):
                sampled = self._attachments.sampled[index]
                stand_ins = moving.follow(weights, sources[index], scales, sampled)
                for number, layers in sampled.items():
                    for layer in layers:
                        layer.stand_in = stand_ins[number]
            self._attachments.restore_hooks()

    def _stand_in(self, index: int, z: nn.Parameter) -> Tensor:
        """Return a leaf in the place of z, or of the scales, whose gradients are kept for the gate."""
        stand_in = z.detach().requires_grad_(z.requires_grad)
        if z.requires_grad:
            stand_in.register_post_accumulate_grad_hook(weak_hook(self._keep, index))
        return stand_in

    def _keep(self, stand_in: Tensor, index: int) -> None:
        gradient, stand_in.grad = stand_in.grad, None
        assert gradient is not None
        self._gradients.add(self._in_z()[index], index, gradient, self._in_z)

    def _gate(self) -> Tensor | None:
        """Return what the outputs must depend on, if gradients of z need more than autograd."""
        if not self._attached or not self.blocks or not torch.is_grad_enabled() or not self._gradients.are_gated():
            return None
        self._gradients.check(self._first_identity)
        return self._gate_to_z

    # -- gradients of shards ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _project(self, weight: Tensor, index: int, number: int) -> None:
        """Free the gradient of a weight, which is the block's part of this number, and project it at once."""
        parts = self._moving[index].parts
        assert parts is not None
        part, gradient = parts[number], _taken(weight)  # looked up now: it is another one after a move to a device
        self._pass_on(gradient if part.support is None else gradient[part.support], index, part.v)

    @torch.no_grad()
    def _gather(self, weight: Tensor, index: int, rows: slice) -> None:
        """Free the gradient of a weight, and project it with the rest of the block."""
        if self._moving[index].gather(_taken(weight), rows, self._start(index)):
            self._project_gathered(index)
        else:  # and should the rest not come: the projection is linear, so it may happen at any time, in any pieces
            Variable._execution_engine.queue_callback(self._project_rest)

    @torch.no_grad()
    def _project_rest(self) -> None:
        """End a backward pass in which some weights had no part."""
        for index, moving in enumerate(self._moving):
            if moving.is_waiting:
                self._project_gathered(index)

    def _project_gathered(self, index: int) -> None:
        gradient, of_scales = self._moving[index].take_gathered()
        if of_scales is not None:
            assert self.scales is not None
            self._gradients.add(self.scales, len(self.blocks), of_scales, self._in_z)
        self._pass_on(gradient, index, self._moving[index].v)

    def _forget_gradients(self) -> None:
        """Drop what a backward pass that failed has left behind."""
        for moving in self._moving:
            moving.drop_gathered()
        self._gradients.forget()

    def _pass_on(self, gradient: Tensor, index: int, v: LinearMap) -> None:
        """Add V^T g / h to every member's gradient, since z enters as a mean."""
        z = self.z[index]
        if self._versions and z._version != self._versions[index]:
            self._warn_of_old_weights()
        of_z = rmatvec(v, gradient)
        of_z = of_z if self.ensemble == 1 else of_z / self.ensemble
        self._gradients.add(z, index, of_z.expand_as(z), self._in_z)

    def _warn_of_old_weights(self) -> None:
        """Warn, once, that a loss was computed before z moved, so that training would stand still."""
        if not self._warned_of_old_weights:
            self._warned_of_old_weights = True
            warnings.warn(
                "z has changed since the weights were last written, so the gradient that has come is that of an "
                "earlier z: the loss does not call the SubspaceModel, but the model inside it, which does not follow z "
                "by itself. Build loss objects on the SubspaceModel, or call refresh() before each forward pass",
                stacklevel=2,
            )

    # -- as a function of z -----------------------------------------------------------------------------------------

    def forward_at(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the model computes at another z, as a function of it: theta_0 + V mean_i z_i, nothing is written.

        Every transform of `torch.func` applies, and they nest. It takes the memory of a second set of the blocks'
        weights. For z by name, together with other parameters, use `torch.func.functional_call(subspace, ...)`.

        Args:
            z: all of z as one vector [K], in the order of `torch.nn.utils.parameters_to_vector(subspace.z)`.
            *args: of the model.
            **kwargs: of the model.

        Raises:
            MismatchError: z has another shape.
            InputError: the model is merged, or cut by `fully_shard`, or inside `disable_adapter`, or it checkpoints
                activations and z is differentiated.

        Example:
            >>> from tinyspan import Basis, by_pattern
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> basis = Basis.from_directions(by_pattern(model, {"all": ".*"}), {"all": torch.eye(2)})
            >>> subspace = SubspaceModel(model, basis)
            >>> x = torch.tensor([3.0, 4.0])
            >>> torch.func.hessian(lambda z: subspace.forward_at(z, x).square().sum())(torch.zeros(2))
            tensor([[18., 24.],
                    [24., 32.]])
        """
        sizes = [own.numel() for own in self.z]
        if z.shape != (sum(sizes),):
            raise MismatchError(f"expected z of shape [{sum(sizes)}], got {list(z.shape)}")
        parts = [part.view_as(own) for part, own in zip(z.split(sizes), self.z, strict=True)]
        return self._call_functionally(parts, self.scales, args, kwargs)

    def jacobian(
        self, batch: Any, *, method: Method = "reverse", outputs: Callable[[Any], Tensor] | None = None
    ) -> Tensor:
        """Return the derivatives of the outputs with respect to all of z, [rows, outputs, K]; see `curvature`."""
        return jacobian(self, batch, method=method, outputs=outputs)

    def _is_substituted(self) -> bool:
        """Whether other tensors stand in the place of z or the scales, as inside `torch.func.functional_call`."""
        return any(id(z) not in self._own for z in self._in_z())

    def _call_functionally(
        self, z: Iterable[Tensor], scales: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._require_enabled()
        self._require_following()
        if self._sharded:
            raise InputError(
                "a model that fully_shard has cut cannot be called as a function of z: shards are no tensors"
            )
        return functional_call(self.model, self._theta(z, scales), args, kwargs)

    def _theta(self, z: Iterable[Tensor], scales: Tensor | None) -> dict[str, Tensor]:
        weights = self._weights()
        theta: dict[str, Tensor] = {}
        with torch.autocast(self.z[0].device.type, enabled=False) if self.blocks else nullcontext():
            for index, (moving, own) in enumerate(zip(self._moving, z, strict=True)):
                theta |= moving.theta(weights, self._start(index), own.mean(0), scales)
        return theta


def named_model(model: nn.Module) -> Any:
    """Return the model whose class names the columns and the labels: the one that PEFT has wrapped, or itself."""
    if type(model).__name__ == "PeftMixedModel":  # which has no get_base_model
        return model.base_model.model  # type: ignore[union-attr]
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _owner(model: nn.Module) -> SubspaceModel | None:
    """Return the SubspaceModel that writes a model's weights now."""
    found = _owners.get(model)
    return None if found is None else found()


def _taken(weight: Tensor) -> Tensor:
    """Return the gradient of a weight, as far as this process holds it, as one vector, and free it."""
    assert weight.grad is not None
    gradient, weight.grad = local(weight.grad), None
    return (gradient if gradient.layout == torch.strided else gradient.to_dense()).reshape(-1)


def _before_loading(subspace: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Keep the blocks' weights, under any of their names: they are written anew from theta_0 and z.

    Tied weights get their other names back.

    Raises:
        MismatchError: z was trained in another basis, or over another theta_0. Nothing is loaded then.
    """
    assert isinstance(subspace, SubspaceModel)
    subspace._require_enabled()
    subspace._require_following()
    identity = subspace.get_extra_state()
    if (given := state_dict.setdefault(f"{prefix}_extra_state", identity)) is not identity:
        require_state(given, identity, subspace.fingerprint)
    elif any(name.startswith(f"{prefix}z.") for name in state_dict):
        warnings.warn(
            "the state does not tell which basis and base model z was trained in, as states of earlier versions do "
            "not; make sure that they are those of this SubspaceModel",
            stacklevel=2,
        )
    following = {id(weight) for weight in subspace._weights().values()}
    for name, weight in subspace.model.named_parameters(remove_duplicate=False):
        if id(weight) in following and f"{prefix}model.{name}" in state_dict:
            state_dict[f"{prefix}model.{name}"] = weight
    for name, first in tied_names(subspace.model).items():
        if f"{prefix}model.{first}" in state_dict:
            state_dict.setdefault(f"{prefix}model.{name}", state_dict[f"{prefix}model.{first}"])


def _after_loading(subspace: nn.Module, incompatible: Any) -> None:
    assert isinstance(subspace, SubspaceModel)
    subspace._own = set(map(id, subspace._in_z()))
    subspace._written = None


def _before_state_dict(subspace: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(subspace, SubspaceModel)
    subspace._require_enabled()
    subspace.refresh()


def _after_state_dict(subspace: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave a tied weight under its first name alone: safetensors, in which checkpoints are saved, refuses two."""
    assert isinstance(subspace, SubspaceModel)
    for name in tied_names(subspace.model):
        state_dict.pop(f"{prefix}model.{name}", None)

"""The weights of a model as a function of z, in place.

Before a forward pass, the weights are rewritten if z has changed. For autograd they depend on z (`autograd`); this
graph is linear in z and contains no values, so it is built once and stays. In the backward pass the gradient g of a
block is projected as soon as it is complete, V^T g is added to the gradient of z, and g is freed, so the blocks'
gradients are never all in memory together. For a sparse basis, g is not computed where V is zero (`sampled`). `blocks`
describes one block as a function of z, `processes` how gradients reach z in several processes, and `shards` how the
gradients of the rows that `fully_shard` assigns to each process are projected.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, TinyspanError
from tinyspan.model.autograd import temporarily_outside_transforms, without_autocast
from tinyspan.model.blocks import MovingBlock
from tinyspan.model.functional import functional_call
from tinyspan.model.hooks import Attachments, weak_hook
from tinyspan.model.processes import GradientsOfZ, under_ddp
from tinyspan.model.sampled import SampledLayer, is_plain_linear, pays
from tinyspan.model.shards import ShardGradients
from tinyspan.model.variables import Variables
from tinyspan.model.versions import WrittenVersions
from tinyspan.sharding import local
from tinyspan.weights import WRITERS, writer_of

__all__ = ["Engine"]


class Engine:
    """Writes theta_0 + V mean_i z_i into the weights of a model, and makes them depend on z for autograd.

    Args:
        variables: tensors of the SubspaceModel.
        moving: one per block, in the order of z.
        gradients: accumulates the gradients of z in `.grad`.

    Attributes:
        moving: see above.
        is_attached: whether the weights follow z; False if the model is merged.
        is_disabled: whether the code runs inside `disable_adapter`.
    """

    def __init__(self, variables: Variables, moving: list[MovingBlock], gradients: GradientsOfZ) -> None:
        self.variables, self.moving = variables, moving
        self.is_attached = self.is_disabled = False
        self._gradients, self._versions = gradients, WrittenVersions(variables)
        self._shards = ShardGradients(variables, moving, gradients, self._versions)
        self._requires_grad = {name: weight.requires_grad for name, weight in variables.model.named_parameters()}
        self._written: Tensor | None = None  # means of z at which the weights were last written
        self._buffer: Tensor | None = None
        self._attachments = Attachments()
        self._nodes: list[tuple[nn.Parameter, Any]] = []  # weights, and the nodes of the graph whose results they are
        self._present_graph: Any = None  # description of the present graph from z to the weights
        self._gate_to_z: Tensor | None = None
        self._own: set[int] = set()  # ids of z and the scales; other tensors in their place are substitutes
        self._following: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the graph of autograd, and the buffer.

        Raises:
            InputError: the adapter is disabled, which a copy would remain.
        """
        self.require_enabled()
        return {**self.__dict__, "_present_graph": None, "_gate_to_z": None, "_buffer": None, "_nodes": []}

    # -- weights ----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Write the weights if z has changed by value since they were written.

        Raises:
            InputError: z has changed although the model is merged, z was replaced by other tensors, or the weights were
                replaced or are on another device.
            TinyspanError: z is NaN or infinite; the weights stay as they were.
        """
        if self.is_substituted():
            raise InputError(
                "z or the scales were replaced by other tensors, which the weights do not follow; change their values "
                "instead: set_state(), or z.copy_() without gradients"
            )
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        # Outside of a backward pass; pending gradients are those of a failed one
        if torch._C._current_graph_task_id() == -1:
            self._discard_gradients()
        if not self.moving:
            return
        self._versions.remember()
        with without_autocast(self.variables.z[0]):
            means = self.variables.means()
            if self._written is not None and torch.equal(means, self._written):
                self._renew_graph()
                return
            if not torch.isfinite(means).all():
                named = self.variables.z_by_block().items()
                sick = next((name for name, z in named if not torch.isfinite(z).all()), "scales")
                raise TinyspanError(
                    f"z of block {sick!r} is NaN or infinite; the model's weights stay at the last z "
                    "that was not. Lower the learning rate of z, or look for NaN in the loss"
                )
            if self.is_attached:
                self._write(means)
            elif self._written is not None:
                raise InputError("z has changed while the model was merged; call unmerge() to follow z again")

    def _write(self, means: Tensor) -> None:
        weights = self._local_weights()
        of_blocks, scales = self.variables.split_means(means)
        starts = [self.variables.start(index) for index in range(len(self.moving))]
        buffer = self._buffer_for(starts)
        self._written = None  # until all weights are written: an error would leave some of them
        for moving, start, mean in zip(self.moving, starts, of_blocks, strict=True):
            moving.write(weights, start, mean, scales, buffer)
        torch.clear_autocast_cache()  # an outer autocast region may hold the old weights in half precision
        self._written = means
        if not self._is_graph_kept():
            self._present_graph = None
        self._renew_graph()

    def _buffer_for(self, starts: list[Tensor]) -> Tensor:
        """Return the buffer in which the weights of one block after the other are computed."""
        like, longest = starts[0], max(map(len, starts))
        if self._buffer is None or (self._buffer.device, self._buffer.dtype) != (like.device, like.dtype):
            with temporarily_outside_transforms(), torch.inference_mode(False):  # it is written outside of them, too
                self._buffer = like.new_empty(longest)
        return self._buffer

    def _release_buffer(self) -> None:
        self._buffer = None
        for moving in self.moving:
            moving.release_buffer()

    def release_weights(self) -> None:
        """Make the weights leaves of autograd, which a module may be given, until the next refresh."""
        self._attachments.release()
        self._present_graph = None

    def invalidate(self) -> None:
        """Rewrite the weights at the next refresh, even if the values of z, or of its substitutes, are the same."""
        self._own = set(map(id, self.variables.in_z()))
        self._written = None

    @torch.no_grad()
    def base_weights(self) -> dict[str, Tensor]:
        """Return theta_0 of every parameter in the blocks, by name, in its shape."""
        weights = self.variables.weights()
        theta_0: dict[str, Tensor] = {}
        for index, moving in enumerate(self.moving):
            theta_0 |= moving.base_weights(weights, self.variables.start(index))
        return theta_0

    @torch.no_grad()
    def delta(self) -> dict[str, Tensor]:
        """Return theta - theta_0 of every parameter in the blocks, by name, in its shape."""
        deltas: dict[str, Tensor] = {}
        if not self.moving:
            return deltas
        with without_autocast(self.variables.z[0]):
            means, scales = self.variables.split_means(self.variables.means())
            for moving, mean in zip(self.moving, means, strict=True):
                deltas |= moving.delta(mean, scales)
        return deltas

    @torch.no_grad()
    def restore(self) -> None:
        """Write theta_0 into the weights; for a sparse map, into the coordinates that it changes.

        Raises:
            InputError: the model now follows another SubspaceModel.
        """
        self.require_writer()
        weights = self._local_weights()
        for index, moving in enumerate(self.moving):
            moving.restore(weights, self.variables.start(index))

    def require_writer(self) -> None:
        """Check that no other SubspaceModel writes the weights.

        Raises:
            InputError: one does.
        """
        if writer_of(self.variables.model) not in (None, self):
            raise InputError("another SubspaceModel follows this model now; merge() that one first")

    def _local_weights(self) -> Mapping[str, Tensor]:
        """Return the tensors into which the blocks' weights are written.

        Raises:
            InputError: the weights have been replaced by others, or are on another device than z.
        """
        weights, z = self.variables.weights(), self.variables.z
        apart = {weight.device for weight in weights.values()} - {z[0].device}
        if apart:
            raise InputError(
                f"the wrapped model's weights are on {apart.pop()}, z on {z[0].device}: move the SubspaceModel, "
                "subspace.to(...), not the model inside it alone"
            )
        if self.is_attached and set(map(id, weights.values())) != self._following:
            raise InputError(
                "the wrapped model's weights have been replaced by others, which do not follow z: call fully_shard, or "
                "whatever replaced them, before SubspaceModel(model, ...)"
            )
        return {name: local(weight) for name, weight in weights.items()} if self.variables.is_sharded else weights

    # -- calls ------------------------------------------------------------------------------------------------------

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the wrapped model at the present z, or as a function of the substitutes of `functional_call`."""
        if self.is_substituted():
            return self.call_at(self.variables.z, self.variables.scales, args, kwargs)
        self._refresh()
        if (gate := self._gate()) is None:
            return self.variables.model(*args, **kwargs)
        return self._gradients.depend_on_gate(self.variables.model(*args, **kwargs), gate)

    def call_at(
        self, z: Iterable[Tensor], scales: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call the wrapped model at another z as a function of it; nothing is written.

        Raises:
            InputError: the model is merged or sharded, the adapter is disabled, or z is differentiated and the model
                checkpoints activations.
        """
        self.require_enabled()
        self.require_following()
        if self.variables.is_sharded:
            raise InputError(
                "a model sharded by fully_shard cannot be called as a function of z: its shards are not plain tensors"
            )
        weights = self.variables.weights()
        theta: dict[str, Tensor] = {}
        with without_autocast(self.variables.z[0]) if self.moving else nullcontext():
            for index, (moving, own) in enumerate(zip(self.moving, z, strict=True)):
                theta |= moving.theta(weights, self.variables.start(index), own.mean(0), scales)
        return functional_call(self.variables.model, theta, args, kwargs)

    def is_substituted(self) -> bool:
        """Return whether other tensors are in place of z or the scales, as in `torch.func.functional_call`."""
        return any(id(z) not in self._own for z in self.variables.in_z())

    def is_following(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter is a weight that follows z at present."""
        return id(parameter) in self._following

    def require_following(self) -> None:
        """Check that the weights follow z.

        Raises:
            InputError: the model is merged.
        """
        if not self.is_attached:
            raise InputError("the model is merged, so it does not follow z; call unmerge() first")

    def require_enabled(self) -> None:
        """Check that the adapter is enabled.

        Raises:
            InputError: the code runs inside `disable_adapter`.
        """
        if self.is_disabled:
            raise InputError("inside disable_adapter() the adapter is disabled; leave the block first")

    # -- attaching --------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Make the weights, which are theta_0, follow z from the next forward pass on."""
        self._written = None
        torch.clear_autocast_cache()
        self._attach()

    def reattach(self) -> None:
        """Make the weights of a copy follow the z of the copy, if those of the original followed theirs."""
        self._own = set(map(id, self.variables.in_z()))
        if self.is_attached:
            self._attach()

    def _attach(self) -> None:
        """Freeze what is not trained and make the blocks' weights depend on z."""
        self._remove_attachments()
        weights = self.variables.weights()
        self._require_no_hooks(weights)
        self.variables.model.requires_grad_(False)
        for parameter in self.variables.directly_trained().values():
            parameter.requires_grad_(True)
        for weight in weights.values():
            weight.grad = None  # an older gradient would be added to the first one of z
        self._following = {id(weight) for weight in weights.values()}
        self.is_attached = True
        self._own = set(map(id, self.variables.in_z()))
        WRITERS[self.variables.model] = ref(self)
        if self._gradients.are_summed:
            self._shards.hook(weights, self._attachments)
            return
        self._attachments.add_following(weights[name] for name in {name for m in self.moving for name in m.names})
        self._sample(weights)
        self._follow()

    def _require_no_hooks(self, weights: Mapping[str, nn.Parameter]) -> None:
        hooked = next((name for name, weight in weights.items() if weight._post_accumulate_grad_hooks), None)
        if hooked is not None and not self._gradients.are_summed:
            raise InputError(
                f"{hooked!r} has a post-accumulate-gradient hook, which would never be called, since gradients of "
                "weights that follow z are not accumulated; remove the hook, or use register_hook"
            )

    def _sample(self, weights: Mapping[str, nn.Parameter]) -> None:
        """For weights with few changed coordinates, compute only the gradients of these where that is faster."""
        layers: dict[int, list[nn.Module]] = defaultdict(list)  # plain linear layers by the identities of their weights
        for layer in () if self.variables.is_sharded else self.variables.model.modules():
            if is_plain_linear(layer):
                layers[id(layer.weight)].append(layer)
        for index, moving in enumerate(self.moving):
            for number, part in enumerate(moving.parts):
                weight = weights[part.spec.name]
                if part.support is not None and pays(len(part.support), weight):
                    sampled = [SampledLayer(layer, part.support) for layer in layers[id(weight)]]
                    self._attachments.sampled[index][number] = sampled

    def detach(self) -> None:
        """Remove every hook, leave the weights as they are, and restore `requires_grad`."""
        self._remove_attachments()
        for name, parameter in self.variables.model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))

    def _remove_attachments(self) -> None:
        self._attachments.clear()
        self._following = set()
        self._present_graph = self._gate_to_z = None
        self._nodes.clear()
        self._release_buffer()
        self._discard_gradients()
        self.is_attached = False
        if writer_of(self.variables.model) is self:
            del WRITERS[self.variables.model]

    def _discard_gradients(self) -> None:
        """Discard what a failed backward pass has left behind."""
        for moving in self.moving:
            moving.discard_gathered()
        self._gradients.discard()

    def ignored_by_ddp(self) -> list[str]:
        """Return the names of parameters and buffers that DDP must ignore: each process computes them from z."""
        named = self.variables.model.named_parameters(remove_duplicate=False)
        following = [f"model.{name}" for name, weight in named if id(weight) in self._following]
        return under_ddp([*following, *self.variables.start_names()])

    @contextmanager
    def conversion(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Return a context in which this function moves or converts the tensors of the module and the maps."""
        written = self._written
        is_current = self.is_attached or written is None or torch.equal(self.variables.means(), written)
        self.release_weights()
        self._release_buffer()
        yield
        for moving in self.moving:
            moving.convert(fn)
        self._own = set(map(id, self.variables.in_z()))
        if self.is_attached:
            self._written = self._present_graph = None
        elif written is not None:
            self._written = self.variables.means() if is_current else fn(written)

    # -- the graph from z to the weights ----------------------------------------------------------------------------

    def _renew_graph(self) -> None:
        """Build the graph from z to the weights if there is none, or it does not match the present state."""
        if self.is_attached and self._present_graph != self._graph_key():
            self._follow()

    def _is_graph_kept(self) -> bool:
        """Whether the graph stays when other values of z are written: it is linear in z and contains no values.

        A layer that changes its weight in place adds to the graph.
        """
        is_kept = self.variables.scales is None and not self._gradients.are_gated()
        return is_kept and all(weight.grad_fn is node for weight, node in self._nodes)

    def _graph_key(self) -> Any:
        return [z.requires_grad for z in self.variables.in_z()], self._gradients.are_exchanged()

    def _follow(self) -> None:
        """Make the weights, which have been written, depend on z."""
        self._present_graph = None  # until it is complete, in case of an interruption
        self._build_graph()
        self._present_graph = self._graph_key()

    def _build_graph(self) -> None:
        """Build the graph from z, or from stand-ins that pass gradients to a gate, to the weights."""
        weights = self.variables.weights()
        in_z: list[Tensor] = [*self.variables.in_z()]
        with temporarily_outside_transforms(), torch.inference_mode(False), torch.enable_grad():
            if self.moving and self._gradients.are_gated():
                self._gate_to_z = self._gradients.gate(self.variables.in_z())
            if self._gradients.are_summed:
                return
            self._attachments.release()
            if self._gradients.are_exchanged():
                in_z = [self._stand_in(index, z) for index, z in enumerate(self.variables.in_z())]
            else:
                in_z[: len(self.moving)] = [self._watched(index, z) for index, z in enumerate(self.variables.z)]
            scales = None if self.variables.scales is None else in_z[-1]
            for index, moving in enumerate(self.moving):
                sampled = self._attachments.sampled[index]
                stand_ins = moving.follow(weights, in_z[index], scales, sampled)
                for number, layers in sampled.items():
                    for layer in layers:
                        layer.stand_in = stand_ins[number]
            self._attachments.restore_hooks()
            names = (name for moving in self.moving for name in moving.names)
            self._nodes = [(weights[name], weights[name].grad_fn) for name in names]

    def _stand_in(self, index: int, z: nn.Parameter) -> Tensor:
        """Return a leaf in place of z, or of the scales, whose gradients are collected for the gate."""
        stand_in = z.detach().requires_grad_(z.requires_grad)
        if z.requires_grad:
            stand_in.register_post_accumulate_grad_hook(weak_hook(self._collect_gradient, index))
        return stand_in

    def _watched(self, index: int, z: nn.Parameter) -> Tensor:
        """Return a view of z through which gradients of weights that z has left behind are noticed."""
        view, warn_if_stale = z.view_as(z), WeakMethod(self._versions.warn_if_stale)

        def hook(gradient: Tensor) -> None:
            if (warn := warn_if_stale()) is not None:
                warn(index)

        if view.requires_grad:
            view.register_hook(hook)
        return view

    def _collect_gradient(self, stand_in: Tensor, index: int) -> None:
        if index < len(self.moving):
            self._versions.warn_if_stale(index)
        gradient, stand_in.grad = stand_in.grad, None
        assert gradient is not None
        self._gradients.add(self.variables.in_z()[index], index, gradient, self.variables.in_z)

    def _gate(self) -> Tensor | None:
        """Return the tensor on which the outputs must depend, if the gradients of z need more than autograd."""
        is_gated = self.is_attached and self.moving and self._gradients.are_gated()
        if not is_gated or not torch.is_grad_enabled():
            return None
        self._gradients.check(self.variables.first_identity())
        return self._gate_to_z

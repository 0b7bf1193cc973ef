"""The gradients of z on their way to `.grad`, in one process or many.

In one process, gradients are added to `.grad` at once. In several, the gradient of z is passed to autograd, so that
DistributedDataParallel treats z like any parameter: the outputs are made to depend on a gate, which depends on z. The
gate is the first node of the graph and therefore the last to run, after all projections. Where `fully_shard` has
sharded the weights, each process projects its own rows; the gradient is the sum over the processes, and is added at the
end of the backward pass. In both cases only a plain `.backward()` computes the gradients of z; other uses of the gate,
such as `torch.autograd.grad`, are refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_map

from tinyspan.errors import InputError, MismatchError, TinyspanError
from tinyspan.sharding import is_sharded

__all__ = [
    "GradientsOfZ",
    "group_of",
    "identity_of",
    "identity_over",
    "own_shard",
    "processes",
    "require_alike",
    "under_ddp",
]


class GradientsOfZ:
    """Gradients that have been projected in a backward pass, by the position of their parameter.

    Args:
        identity: hash of everything that must be equal in all processes; see `identity_of`.
        group: the processes that each hold rows of the weights; None if these are not sharded.
    """

    def __init__(self, identity: Tensor, group: Any) -> None:
        self._identity, self._group = identity, group
        self._gated = False  # whether a gate has ever been created
        self._pending: dict[int, Tensor] = {}  # for the gate, or for the sum over the group
        self._reaches_gate = False  # whether the current backward pass will reach a gate

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a backward pass."""
        return {**self.__dict__, "_pending": {}, "_reaches_gate": False}

    @property
    def are_summed(self) -> bool:
        """Whether each process holds rows of the weights, so that the gradient is the sum over the processes."""
        return self._group is not None

    def are_exchanged(self) -> bool:
        """Whether the gradients may be exchanged with other processes, which needs a gate."""
        return self._group is None and processes() > 1

    def are_gated(self) -> bool:
        """Whether the outputs must depend on a gate: to exchange gradients, or to refuse what shards do not support."""
        return self.are_summed or self.are_exchanged()

    def discard(self) -> None:
        """Discard what a failed backward pass has left behind."""
        self._pending.clear()
        self._reaches_gate = False

    def add(
        self, parameter: nn.Parameter, index: int, gradient: Tensor, everyone: Callable[[], Sequence[nn.Parameter]]
    ) -> None:
        """Add to the gradient of a parameter, or to the pending ones for the gate or the end of the backward pass.

        Args:
            parameter: z of a block, or the scales.
            index: position of the parameter.
            gradient: gradient to add.
            everyone: function that returns the parameters of all positions.

        Raises:
            InputError: a gate exists, and this backward pass does not reach it.
        """
        if not parameter.requires_grad:
            return
        if gradient.requires_grad:
            raise InputError(self._unavailable("second derivatives of z"))
        if self._group is not None:
            if not self._pending:
                Variable._execution_engine.queue_callback(partial(self._sum_over_group, everyone))
        elif not self._gated or processes() == 1:
            torch.autograd.backward(parameter, gradient)  # calls the hooks on z
            return
        elif not self._reaches_gate:
            raise InputError(
                "gradients of z would be lost, since the loss was not computed from the tensors that forward returned "
                "in tuples, lists, dicts or a transformers ModelOutput"
            )
        self._pending[index] = self._pending.get(index, 0) + gradient

    @torch.no_grad()
    def _sum_over_group(self, everyone: Callable[[], Sequence[nn.Parameter]]) -> None:
        """Complete a backward pass over shards: V^T g is the sum of the projections of all processes."""
        parameters = everyone()
        total = torch.cat(
            [self._pending.get(index, torch.zeros_like(z)).reshape(-1) for index, z in enumerate(parameters)]
        )
        torch.distributed.all_reduce(total, group=self._group)
        self._pending.clear()
        for z, gradient in zip(parameters, total.split([z.numel() for z in parameters]), strict=True):
            if z.requires_grad:
                z.grad = gradient.view_as(z).clone() if z.grad is None else z.grad.add_(gradient.view_as(z))

    # -- the gate ---------------------------------------------------------------------------------------------------

    def check(self, first: Tensor) -> None:
        """Compare the identity with that of the first process, if DDP has sent it, before the first forward pass.

        Raises:
            MismatchError: the first process has another theta_0 or basis.
        """
        if not self._gated and not torch.equal(first.cpu(), self._identity):
            raise MismatchError(
                "theta_0 or the basis differs from that of the first process: build the same model (from one "
                "checkpoint, or one seed) and the same basis in every process"
            )
        self._gated = True

    def gate(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return a scalar that depends on the parameters, whose backward pass gives them the gradients."""
        gate: Tensor = _Gate.apply(partial(self._collect, len(parameters)), *parameters)
        return gate

    def depend_on_gate(self, outputs: Any, gate: Tensor) -> Any:
        """Return the outputs of a model, of which tensors that require gradients depend on the gate."""

        def depend(output: Any) -> Any:
            takes_part = isinstance(output, Tensor) and output.requires_grad
            return _DependOnGate.apply(self._begin, output, gate) if takes_part else output

        return tree_map(depend, outputs)

    @torch.no_grad()
    def _collect(self, count: int) -> list[Tensor | None]:
        """Return the projected gradients; None where no weight had a gradient, and for sums, which follow later."""
        if self.are_summed:
            return [None] * count
        gradients = [self._pending.get(index) for index in range(count)]
        self._pending.clear()
        return gradients

    def _begin(self, gate: Any) -> None:
        """Begin a backward pass that may reach the gate, a node of the graph, or None if z is not trained.

        Raises:
            InputError: the gradients of z are not accumulated, as in `torch.autograd.grad`, or second derivatives are
                required, or z has hooks, which could not be called with the sum over the processes.
        """
        if gate is None or not torch._C._will_engine_execute_node(gate):
            return
        if torch.is_grad_enabled():
            raise InputError(self._unavailable("second derivatives of z"))
        if not torch.autograd._is_checkpoint_valid():
            raise InputError(self._unavailable("torch.autograd.grad and backward(inputs=...) with respect to z"))
        if self.are_summed:
            if any(z._backward_hooks or z._post_accumulate_grad_hooks for z in gate.z):
                raise InputError(self._unavailable("hooks on z"))
        elif not self._reaches_gate:
            self._reaches_gate = True
            Variable._execution_engine.queue_callback(self._end)

    def _unavailable(self, what: str) -> str:
        if self.are_summed:
            return (
                f"{what} are not available over shards of fully_shard, whose gradients are summed over the processes "
                "at the end of a backward pass; call loss.backward() and read z.grad, or do not shard the model"
            )
        return (
            f"{what} are not available through the forward pass among several processes; call loss.backward() and "
            "read z.grad, or differentiate SubspaceModel.forward_at, which each process computes by itself"
        )

    def _end(self) -> None:
        self._reaches_gate = False
        if self._pending:
            self._pending.clear()
            raise TinyspanError(
                "gradients of z came too late to be exchanged with other processes: is the model spread over several "
                "devices, or were its weights used outside of forward()? Use one device per process"
            )


class _Gate(torch.autograd.Function):
    """A zero that depends on z; its backward pass gives z the projected gradients."""

    @staticmethod
    def forward(ctx: Any, collect: Callable[[], list[Tensor | None]], *z: Tensor) -> Tensor:
        ctx.collect, ctx.z = collect, z
        return z[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *zeros: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.collect())


class _DependOnGate(torch.autograd.Function):
    """The same tensor, which also depends on a gate."""

    @staticmethod
    def forward(ctx: Any, begin: Callable[[Any], None], tensor: Tensor, gate: Tensor) -> Tensor:
        ctx.begin, ctx.zero = begin, gate.detach()
        return tensor.detach()  # not a view, since the caller may write into it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _, (gate, _) = ctx.next_functions
        ctx.begin(gate)
        return None, gradients[0], ctx.zero


def group_of(weights: Iterable[Tensor]) -> Any:
    """Return the processes that each hold rows of the weights; None if one holds all, or there are no weights.

    Raises:
        InputError: some weights are sharded and some are not, or over other processes.
    """
    meshes = {weight.device_mesh if is_sharded(weight) else None for weight in weights}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise InputError(
            "some of the weights that the basis changes are sharded and others are not, or over other processes, so "
            "their gradients do not add up; fully_shard all of them, or leave the others out of the partition"
        )
    mesh = next(iter(meshes), None)
    return None if mesh is None else mesh.get_group()


def require_alike(group: Any, values: Mapping[str, Any]) -> None:
    """Check that values are equal in all processes of a group; every process calls this.

    Raises:
        MismatchError: another process has another value.
    """
    mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, mine, group)
    for process, theirs in enumerate(gathered):
        for name, value in mine.items():
            if theirs[name] != value:
                raise MismatchError(
                    f"expected {name} to be the same in all processes, got {value:.200} here (process "
                    f"{torch.distributed.get_rank(group)}) and {theirs[name]:.200} in process {process}"
                )


def processes() -> int:
    """Return the number of processes in the default group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def own_shard(folder: Path) -> Path:
    """Return the subfolder in which this process stores its part of an output."""
    return folder / f"shard-{torch.distributed.get_rank()}"


def identity_of(*values: Any) -> Tensor:
    """Return a hash of values that must be equal in all processes, as 32 numbers."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def identity_over(group: Any, identity: Tensor) -> Tensor:
    """Return one identity for all processes of a group, computed from those of their shards; every process calls this.

    Args:
        group: the processes.
        identity: identity of this process's shard, one SHA-256 in each row.
    """
    shards: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(shards, identity.tolist(), group)
    digests = [hashlib.sha256(b"".join(map(bytes, rows))).digest() for rows in zip(*shards, strict=True)]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)


def under_ddp(names: Sequence[str]) -> list[str]:
    """Return the names of parameters and buffers in DDP, also those inside a module from torch.compile."""
    return [f"{outer}{name}" for outer in ("", "_orig_mod.") for name in names]

"""The gradients of z on their way to `.grad`, in one process or many.

In one process they are added there at once. Among several, the gradient of z is handed to autograd, so that whoever
exchanges gradients (DistributedDataParallel) meets z like any parameter: the outputs are made to depend on a gate,
which depends on z. Being the first node of the graph, it is the last to run, when all projections are done. Where
`fully_shard` has cut the weights, each process projects its own rows, and the sum over the processes is the gradient.
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
    """What has been projected in a backward pass, by the position of the parameter that it is the gradient of.

    Args:
        identity: a hash of what has to be alike in all processes; see `identity_of`.
        group: the processes that each hold rows of the weights, if these are cut.
    """

    def __init__(self, identity: Tensor, group: Any) -> None:
        self._identity, self._group = identity, group
        self._gated = False  # whether there ever was a gate
        self._kept: dict[int, Tensor] = {}  # for the gate, or for the sum over the group
        self._handing = False  # whether a backward pass is on its way to a gate

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what belongs to a backward pass."""
        return {**self.__dict__, "_kept": {}, "_handing": False}

    @property
    def are_summed(self) -> bool:
        """Whether each process holds rows of the weights, so that the gradient is the sum over the processes."""
        return self._group is not None

    def are_exchanged(self) -> bool:
        """Whether somebody may want to exchange them with other processes, so that they need a gate."""
        return self._group is None and processes() > 1

    def forget(self) -> None:
        """Drop what a backward pass that failed has left behind."""
        self._kept.clear()
        self._handing = False

    def add(
        self, parameter: nn.Parameter, index: int, gradient: Tensor, everyone: Callable[[], Sequence[nn.Parameter]]
    ) -> None:
        """Add to the gradient of a parameter, or to what the gate, or the end of the backward pass, will hand out.

        Args:
            parameter: z of a block, or the scales.
            index: its position.
            gradient: what is added.
            everyone: returns the parameters of all positions.

        Raises:
            InputError: there was a gate, and this backward pass does not come to it.
        """
        if not parameter.requires_grad:
            return
        if gradient.requires_grad:
            raise InputError(
                "second derivatives of z are not available through the forward pass among several processes; call "
                "SubspaceModel.forward_at, which each process computes by itself"
            )
        if self._group is not None:
            if not self._kept:
                Variable._execution_engine.queue_callback(partial(self._add_up, everyone))
        elif not self._gated or processes() == 1:
            _accumulate(parameter, gradient)
            return
        elif not self._handing:
            raise InputError(
                "gradients of z would be lost, since the loss was not computed from the tensors that forward returned "
                "in tuples, lists, dicts or a transformers ModelOutput"
            )
        self._kept[index] = self._kept.get(index, 0) + gradient

    @torch.no_grad()
    def _add_up(self, everyone: Callable[[], Sequence[nn.Parameter]]) -> None:
        """End a backward pass over shards: V^T g is the sum of what the processes have projected."""
        parameters = everyone()
        found = torch.cat(
            [self._kept.get(index, torch.zeros_like(z)).reshape(-1) for index, z in enumerate(parameters)]
        )
        torch.distributed.all_reduce(found, group=self._group)
        self._kept.clear()
        for z, gradient in zip(parameters, found.split([z.numel() for z in parameters]), strict=True):
            _accumulate(z, gradient.view_as(z))

    # -- the gate ---------------------------------------------------------------------------------------------------

    def check(self, first: Tensor) -> None:
        """Compare the identity of the process that DDP heard first, if DDP has sent it, before the first forward pass.

        Raises:
            MismatchError: that process has another theta_0 or basis.
        """
        if not self._gated and not torch.equal(first.cpu(), self._identity):
            raise MismatchError(
                "theta_0 or the basis is another one in the first process, which has sent its own: build the same "
                "model (from one checkpoint, or one seed) and the same basis in every process"
            )
        self._gated = True

    def gate(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Open a graph with a number that depends on the parameters, which get the gradients."""
        gate: Tensor = _Gate.apply(partial(self._collect, len(parameters)), *parameters)
        return gate

    def behind(self, outputs: Any, gate: Tensor) -> Any:
        """Return outputs of a model whose tensors depend on a gate, if they take part in autograd."""

        def behind(found: Any) -> Any:
            takes_part = isinstance(found, Tensor) and found.requires_grad
            return _Behind.apply(self._begin, found, gate) if takes_part else found

        return tree_map(behind, outputs)

    @torch.no_grad()
    def _collect(self, count: int) -> list[Tensor | None]:
        """Return what has been projected; None where no weight had any gradient."""
        found = [self._kept.get(index) for index in range(count)]
        self._kept.clear()
        return found

    def _begin(self) -> None:
        """Begin a backward pass that will come to the gate."""
        if not self._handing:
            self._handing = True
            Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._handing = False
        if self._kept:
            self._kept.clear()
            raise TinyspanError(
                "gradients of z came too late to be exchanged with other processes: is the model spread over several "
                "devices, or were its weights used outside of forward()? Use one device per process"
            )


class _Gate(torch.autograd.Function):
    """A zero that depends on z; its backward gives z the gradients that have been projected."""

    @staticmethod
    def forward(ctx: Any, collect: Callable[[], list[Tensor | None]], *z: Tensor) -> Tensor:
        ctx.collect = collect
        return z[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *zeros: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.collect())


class _Behind(torch.autograd.Function):
    """The same tensor, which depends on a gate as well."""

    @staticmethod
    def forward(ctx: Any, begin: Callable[[], None], tensor: Tensor, gate: Tensor) -> Tensor:
        ctx.begin, ctx.zero = begin, gate.detach()
        return tensor.detach()  # no view: whoever gets it may write into it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.begin()
        return None, gradients[0], ctx.zero


def group_of(weights: Iterable[Tensor]) -> Any:
    """Return the processes that each hold rows of the weights; None where one holds all, or there are no weights.

    Raises:
        InputError: some weights are cut and some are not, or over other processes.
    """
    meshes = {weight.device_mesh if is_sharded(weight) else None for weight in weights}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise InputError(
            "some of the weights that are to move are cut over processes and others are not, or over other ones, so "
            "that their gradients do not add up; fully_shard all of them, or leave the others out of the partition"
        )
    mesh = next(iter(meshes), None)
    return None if mesh is None else mesh.get_group()


def require_alike(group: Any, told: Mapping[str, Any]) -> None:
    """Refuse what has to be the same in all processes of a group and is not; every one of them calls this.

    Raises:
        MismatchError: another process was told something else.
    """
    mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in told.items()}
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, mine, group)
    for process, theirs in enumerate(found):
        for name, value in mine.items():
            if theirs[name] != value:
                raise MismatchError(
                    f"expected {name} to be the same in all processes, got {value:.200} here (process "
                    f"{torch.distributed.get_rank(group)}) and {theirs[name]:.200} in process {process}"
                )


def processes() -> int:
    """Return how many processes there are; 1 if they do not know of each other."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def own_shard(folder: Path) -> Path:
    """Return where this process keeps its part of something that lies in a folder."""
    return folder / f"shard-{torch.distributed.get_rank()}"


def identity_of(*told: Any) -> Tensor:
    """Return a hash of what has to be alike in all processes, as 32 numbers."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def identity_over(group: Any, identity: Tensor) -> Tensor:
    """Return one identity for all processes of a group, made of those of their shards; every one of them calls this.

    Args:
        group: the processes.
        identity: of this process's shard, one SHA-256 in each row.
    """
    shards: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(shards, identity.tolist(), group)
    digests = [hashlib.sha256(b"".join(map(bytes, rows))).digest() for rows in zip(*shards, strict=True)]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)


def under_ddp(names: Sequence[str]) -> list[str]:
    """Return the names by which DDP knows parameters and buffers, also those of what torch.compile returns."""
    return [f"{outer}{name}" for outer in ("", "_orig_mod.") for name in names]


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)

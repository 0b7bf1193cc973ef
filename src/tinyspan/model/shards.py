"""Projection of the gradients of the rows that `fully_shard` assigns to this process.

The graph of autograd contains whole weights, which `fully_shard` gathers for a forward pass, so the rows cannot depend
on z in the graph. Hooks on their gradients project them instead.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from tinyspan.model.autograd import flat, of_members
from tinyspan.model.blocks import MovingBlock
from tinyspan.model.hooks import Attachments
from tinyspan.model.processes import GradientsOfZ
from tinyspan.model.variables import Variables
from tinyspan.model.versions import WrittenVersions
from tinyspan.sharding import local

__all__ = ["ShardGradients"]


class ShardGradients:
    """Projects the gradients of shards.

    Args:
        variables: tensors of the SubspaceModel.
        moving: one per block, in the order of z.
        gradients: accumulates the projected gradients.
        versions: warns of gradients of an earlier z.
    """

    def __init__(
        self, variables: Variables, moving: list[MovingBlock], gradients: GradientsOfZ, versions: WrittenVersions
    ) -> None:
        self._variables, self._moving, self._gradients, self._versions = variables, moving, gradients, versions

    def hook(self, weights: Mapping[str, nn.Parameter], attachments: Attachments) -> None:
        """Project the gradients of these weights from now on, until the attachments are cleared."""
        for index, moving in enumerate(self._moving):
            for number, part in enumerate(moving.parts):
                attachments.add_hook(weights[part.spec.name], self._gather, index, number)

    @torch.no_grad()
    def _gather(self, weight: Tensor, index: int, number: int) -> None:
        """Free the gradient of a weight, that of the block's part of this number, and gather it with the others."""
        if not any(moving.is_waiting for moving in self._moving):
            # If the rest never comes: the projection is linear, so pieces may be projected at any time. It is queued
            # before the sum over the processes, which must contain all blocks.
            Variable._execution_engine.queue_callback(self._project_rest)
        if self._moving[index].gather(_pop_gradient(weight), number, self._variables.start(index)):
            self._project_gathered(index)

    @torch.no_grad()
    def _project_rest(self) -> None:
        """Complete a backward pass in which some weights took no part."""
        for index, moving in enumerate(self._moving):
            if moving.is_waiting:
                self._project_gathered(index)

    def _project_gathered(self, index: int) -> None:
        """Add what has been gathered to every member's gradient; it is divided by h, since z enters as a mean."""
        z = self._variables.z[index]
        self._versions.warn_if_stale(index)
        of_mean, of_scales = self._moving[index].pop_gathered()
        if of_scales is not None:
            assert self._variables.scales is not None
            self._gradients.add(self._variables.scales, len(self._moving), of_scales, self._variables.in_z)
        self._gradients.add(z, index, of_members(of_mean, len(z)), self._variables.in_z)


def _pop_gradient(weight: Tensor) -> Tensor:
    """Return the gradient of a weight, as far as this process holds it, as one vector, and free it."""
    assert weight.grad is not None
    gradient, weight.grad = local(weight.grad), None
    return flat(gradient)

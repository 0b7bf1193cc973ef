"""The tensors of a SubspaceModel by role: z, scales, theta_0, weights, directly trained parameters."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from tinyspan.model.state import AdapterState, require_fit
from tinyspan.partition import Block
from tinyspan.sharding import local, reshard

__all__ = ["Variables"]

FIRST_IDENTITY = "_first_identity"  # name of a buffer


class Places:
    """Where a model holds some of its parameters, so that they are found again without a walk over all modules.

    Args:
        model: the model.
        parameters: parameters by their names in the model.

    Attributes:
        parameters: see above.

    Raises:
        KeyError: the model names its parameters otherwise than by its modules.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters, self._model = parameters, ref(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        held: dict[str, tuple[dict[str, Any], str, Any]] = {}
        for name, parameter in self.parameters.items():
            *path, last = name.split(".")
            held[name] = modules[".".join(path)]._parameters, last, parameter
            for depth, key in enumerate(path):
                outer, inner = ".".join(path[:depth]), ".".join(path[: depth + 1])
                held[inner] = modules[outer]._modules, key, modules[inner]
        self._holders = [holder for holder, _, _ in held.values()]
        self._keys = [key for _, key, _ in held.values()]
        self._held = [value for _, _, value in held.values()]

    def are_current(self, model: nn.Module) -> bool:
        """Whether this model holds these parameters, in these places."""
        return self._model() is model and all(map(is_, map(dict.get, self._holders, self._keys), self._held))


class Variables:
    """The tensors of a SubspaceModel.

    They are looked up in the module at each use, since `to`, `fully_shard` and `torch.func.functional_call` replace
    them there. The reference to the module is weak: a cycle would keep theta_0 alive until the garbage collector runs.
    The module gets buffers for the stored part of theta_0 and for the identity.

    Args:
        module: the SubspaceModel, which has `model`, `z` and `scales`.
        blocks: the blocks that have directions, in the order of `z`.
        names: names of the directly trained parameters.
        identity: hash of theta_0 and basis; DistributedDataParallel replaces it by that of the first process.
        is_sharded: whether `fully_shard` has sharded the wrapped model.

    Attributes:
        base_values: copies of the initial directly trained parameters and persistent buffers, on the CPU.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[Block], names: Sequence[str], identity: Tensor, *, is_sharded: bool
    ) -> None:
        self.blocks, self.names, self.is_sharded = list(blocks), list(names), is_sharded
        self._ranks = [z.shape[1] for z in module.z]  # type: ignore[union-attr]
        self.bind(module)
        module.register_buffer(FIRST_IDENTITY, identity.clone(), persistent=False)
        self.base_values = {name: value.detach().to("cpu", copy=True) for name, value in self.trained_values().items()}

    def bind(self, module: nn.Module) -> None:
        """Look the tensors up in this module from now on, for example a copy of the first one."""
        self._module = ref(module)
        self._places: Places | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the module and places in it; those of its copy are set by `bind`."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_module", "_places")}

    @property
    def module(self) -> Any:
        """The SubspaceModel."""
        module = self._module()
        assert module is not None
        return module

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        model: nn.Module = self.module.model
        return model

    @property
    def z(self) -> Sequence[nn.Parameter]:
        """One parameter [h, k_b] per block."""
        return [*self.module.z._parameters.values()]  # iterating over a ParameterList takes ten times as long

    @property
    def scales(self) -> nn.Parameter | None:
        """One number per layer, if the layers have scales."""
        scales: nn.Parameter | None = self.module.scales
        return scales

    def in_z(self) -> list[nn.Parameter]:
        """Return z of every block, then the scales if there are any."""
        scales = self.scales
        return [*self.z, *([] if scales is None else [scales])]

    def z_by_block(self) -> dict[str, Tensor]:
        """Return z by the names of the blocks."""
        return dict(zip((block.name for block in self.blocks), self.z, strict=True))

    def means(self) -> Tensor:
        """Return every block's mean_i z_i, then the scales, as one vector: all that the weights depend on."""
        scales = self.scales
        means = torch.cat([*self.z], 1).detach().mean(0)
        return means if scales is None else torch.cat([means, scales.detach()])

    def split_means(self, means: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Return mean_i z_i of every block, and the scales, from the vector that `means` has returned."""
        *of_blocks, of_layers = means.split([*self._ranks, len(means) - sum(self._ranks)])
        return of_blocks, of_layers

    def store_start(self, index: int, start: Tensor) -> None:
        """Store the needed part of a block's theta_0."""
        self.module.register_buffer(_start_name(index), start, persistent=False)

    def start(self, index: int) -> Tensor:
        """Return the stored part of a block's theta_0."""
        start: Tensor = getattr(self.module, _start_name(index))
        return start

    def start_names(self) -> list[str]:
        """Return the names of the buffers that store theta_0."""
        return [_start_name(index) for index in range(len(self.blocks))]

    def first_identity(self) -> Tensor:
        """Return the identity of theta_0 and basis in the first process, if DDP has sent it; otherwise our own."""
        identity: Tensor = getattr(self.module, FIRST_IDENTITY)
        return identity

    # -- in the wrapped model ---------------------------------------------------------------------------------------

    def named_parameters(self, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
        """Return the wrapped model's parameters; whole copies that a forward pass over shards has left are freed."""
        if self.is_sharded:
            reshard(self.model)
        return dict(self.model.named_parameters(remove_duplicate=remove_duplicate))

    def weights(self) -> Mapping[str, nn.Parameter]:
        """Return the weights in the blocks by name; the same object as long as they are the same."""
        if self._places is not None and self._places.are_current(self.model):
            return self._places.parameters
        named = self.named_parameters(remove_duplicate=False)
        weights = {spec.name: named[spec.name] for block in self.blocks for spec in block.parameters}
        with suppress(KeyError):
            self._places = None if self.is_sharded else Places(self.model, weights)
        return weights

    def directly_trained(self) -> dict[str, nn.Parameter]:
        """Return the directly trained parameters by name."""
        named = self.named_parameters()
        return {name: named[name] for name in self.names}

    def trained_values(self) -> dict[str, Tensor]:
        """Return the directly trained parameters, and every persistent buffer, which training may change."""
        persistent = self.model.state_dict().keys()
        buffers = {name: value for name, value in self.model.named_buffers() if name in persistent}
        return {name: local(value) for name, value in (self.directly_trained() | buffers).items()}

    # -- as the state of an adapter ---------------------------------------------------------------------------------

    def state(self) -> AdapterState:
        """Return the present state, without copying."""
        return AdapterState(self.z_by_block(), self.trained_values(), self.scales)

    def base_state(self) -> AdapterState:
        """Return the state of the base model: z = 0, scales of 1, and the values from before training."""
        scales = self.scales
        return AdapterState(
            {name: torch.zeros_like(z) for name, z in self.z_by_block().items()},
            dict(self.base_values),
            None if scales is None else torch.ones_like(scales),
        )

    def require_fit(self, state: AdapterState) -> None:
        """Check that a state fits.

        Raises:
            MismatchError: a block is absent or unknown, a parameter is unknown, or a shape differs.
        """
        values = self.trained_values() if state.directly_trained else {}
        require_fit(state, AdapterState(self.z_by_block(), values, self.scales))

    @torch.no_grad()
    def assign(self, state: AdapterState) -> None:
        """Replace the values of the trained parameters in place.

        Raises:
            MismatchError: the state does not fit; nothing is changed.
        """
        self.require_fit(state)
        own = self.z_by_block()
        for name, value in state.z.items():
            own[name].copy_(value.expand_as(own[name]))
        if state.scales is not None and (scales := self.scales) is not None:
            scales.copy_(state.scales)
        named = self.trained_values() if state.directly_trained else {}
        for name, value in state.directly_trained.items():
            named[name].copy_(value)
        torch.clear_autocast_cache()  # an outer autocast region may hold the old values in half precision


def _start_name(index: int) -> str:
    return f"_start_{index}"

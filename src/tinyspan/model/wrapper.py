"""A torch module around a model whose blocks follow z: its parameters and buffers, and what torch and trainers call.

Trainers look at the class name, the signature and the config of a model, so the module answers as the model inside it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tinyspan.errors import InputError
from tinyspan.model.adapter_bank import AdapterBank
from tinyspan.model.base import state_identity
from tinyspan.model.blocks import MovingBlock, stored_start
from tinyspan.model.engine import Engine
from tinyspan.model.forward import Forward, named_model
from tinyspan.model.preparation import Preparation
from tinyspan.model.processes import GradientsOfZ, identity_of, identity_over
from tinyspan.model.state_dict import register_hooks
from tinyspan.model.variables import Variables
from tinyspan.sharding import local

__all__ = ["ModelWrapper"]


class ModelWrapper(nn.Module):
    """The module beneath a SubspaceModel; its attributes are documented there.

    Args:
        own: the model, the basis and the other arguments, which have been checked.
    """

    forward = Forward()
    _hf_peft_config_loaded = True  # transformers trains a quantized model only if it has this attribute

    def __init__(self, own: Preparation) -> None:
        super().__init__()
        self.training = own.model.training
        self.model, self.basis, self.blocks, self.fingerprint = own.model, own.basis, own.blocks, own.fingerprint
        self.modules_to_save, self.ensemble, self.layer_scales = own.modules_to_save, own.ensemble, own.layer_scales
        self.scales: nn.Parameter | None = None
        if own.layer_scales is not None:
            self.scales = nn.Parameter(torch.ones(len(own.layer_scales)).to(local(next(iter(own.weights.values())))))
        self.z, generator = nn.ParameterList(), torch.Generator().manual_seed(own.seed)
        for block in self.blocks:
            values = torch.randn((own.ensemble, own.basis.ranks[block.name]), generator=generator) * own.init_std
            self.z.append(nn.Parameter(values.to(local(own.weights[block.parameters[0].name]))))
        identity = identity_of(self.fingerprint, own.basis.construction, own.basis.parents, own.basis.ranks)
        self._variables = Variables(self, self.blocks, own.names, identity, is_sharded=own.everyone is not None)
        moving = [self._moving(index, own) for index in range(len(self.blocks))]
        self.engine = Engine(self._variables, moving, GradientsOfZ(identity, own.group))
        self.bank = AdapterBank(self.engine)
        self._identity: Tensor | None = None
        if own.everyone is not None:  # the identity depends on all shards, so all processes compute it here
            self._identity = identity_over(own.everyone, self._new_identity())
        register_hooks(self)
        self._attach()

    def _moving(self, index: int, own: Preparation) -> MovingBlock:
        """Return the block as a function of z, and store the needed part of its theta_0 in a buffer."""
        block = self.blocks[index]
        v = self.basis.maps[block.name].converted(partial(torch.Tensor.to, device=self.z[index].device))
        start = stored_start(block, v, own.weights, scaled=self.scales is not None)
        self._variables.store_start(index, start)
        return MovingBlock(block, v, own.layer_of, None if self.scales is None else self.scales.detach(), start)

    def _attach(self) -> None:
        """Make the weights, which are theta_0, follow z from the next forward pass on."""
        self.engine.attach()
        self._ddp_params_and_buffers_to_ignore = self.engine.ignored_by_ddp()

    # -- as the wrapped model -----------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Look an unknown name up in the wrapped model (`config`, `generate`, ...), with its weights up to date."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("_"):
                raise
            getattr(self.model, name)
            self.engine.refresh()
            return getattr(self.model, name)

    def _get_name(self) -> str:
        """Return the wrapped model's class name, by which the Trainer decides whether labels are shifted."""
        name: str = named_model(self.model)._get_name()
        return name

    def __repr__(self) -> str:
        """Return the representation of the wrapped model inside this class's name."""
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    @property
    def generation_config(self) -> Any:
        """The generation config of the wrapped model, which its `generate` reads; `Seq2SeqTrainer` sets it here."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    # -- as a module of torch -----------------------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield z and the wrapped model's parameters, without the blocks' weights, which follow z."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if not self.engine.is_following(parameter):
                yield name, parameter

    def get_extra_state(self) -> Tensor:
        """Return hashes of the basis, the arguments and theta_0, which `load_state_dict` compares with its own."""
        if self._identity is None:
            self._identity = self._new_identity()
        return self._identity.clone()  # distributed checkpoints are read into it, in place

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the state is checked before anything is loaded."""

    def _new_identity(self) -> Tensor:
        layers = [[spec.name for spec in layer.parameters] for layer in self.layer_scales or ()]
        arguments = {"ordinary": sorted(self._variables.names), "ensemble": self.ensemble, "layer_scales": layers}
        return state_identity(self.basis, arguments, self.fingerprint)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or convert everything; unless merged, the weights are rewritten at the next forward pass."""
        if fn(torch.zeros(())).dtype not in (torch.float32, torch.float64):
            raise InputError(
                "in half precision, steps inside a subspace are rounded away; compute under autocast instead"
            )
        with self.engine.conversion(fn):
            super()._apply(fn, recurse)
        return self

    def __copy__(self) -> NoReturn:
        """Raise an error, since a shallow copy would write into the same weights."""
        raise InputError("two SubspaceModels cannot share one model; use copy.deepcopy")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the copied weights depend on the copied z."""
        closures = ("forward", "_original_forward")  # set by accelerate; in a copy they call the original
        super().__setstate__({name: value for name, value in state.items() if name not in closures})
        self._variables.bind(self)
        self.engine.reattach()

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Raise an error, since the z of a replica would get no gradients."""
        raise InputError("a SubspaceModel cannot be replicated over devices; use one process per device")

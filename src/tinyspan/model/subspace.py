"""A model that is trained inside a subspace: every block is theta_0 + V mean_i z_i, and only z changes.

The wrapped model keeps its class and its weights, which `engine` makes follow z. `bank` stores the adapters in memory,
and `files` reads and writes them. Where other tensors take the place of z (`torch.func.functional_call`, `forward_at`),
nothing is written: the wrapped model is called as a function of them (`functional`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.io.hub import fetched
from tinyspan.model.bank import AdapterBank
from tinyspan.model.base import describe_basis, require_same, state_identity
from tinyspan.model.blocks import MovingBlock, stored_start
from tinyspan.model.curvature import Method, jacobian
from tinyspan.model.engine import Engine
from tinyspan.model.files import load_adapter, load_pretrained, push_adapter, save_adapter
from tinyspan.model.forward import Forward, named_model
from tinyspan.model.preparation import Preparation, prepare
from tinyspan.model.processes import GradientsOfZ, identity_of, identity_over
from tinyspan.model.state import AdapterState
from tinyspan.model.state_dict import register_hooks
from tinyspan.model.variables import Variables
from tinyspan.partition import Partition
from tinyspan.sharding import local

__all__ = ["SubspaceModel"]


class SubspaceModel(nn.Module):
    """Train a model in a basis: theta = theta_0 + V mean_i z^(i), i = 1 .. h (Zhang et al. 2023, equation 3).

    The model is modified in place: parameters in a block follow z, those of `modules_to_save` are trained directly, and
    all others are frozen. `parameters()` lists z, the directly trained parameters and the frozen ones, but not the
    blocks' weights, which are a function of z. z can be differentiated like any parameter, also twice and under the
    transforms of `torch.func`; `forward_at` and `jacobian` are the common cases.

    In several processes, `DistributedDataParallel(subspace)` exchanges the gradients of z and of the directly trained
    parameters. A model that `fully_shard` has sharded before it is wrapped is trained in a basis of each process's
    rows.

    Args:
        model: any module; the blocks' weights must be float32 or float64 and are theta_0. For a basis that was recorded
            from half-precision weights, pass the same model in float32.
        basis: of the model's partition; if it has a fingerprint, theta_0 must match it.
        modules_to_save: modules to train directly, not through z, by the last parts of their names, as in PEFT:
            `["classifier", "embeddings"]`. A copy of their initial values is stored for `disable_adapter`.
        ensemble: h, the number of vectors z^(i) that are averaged.
        init_std: standard deviation of the normally distributed initial z; with 0, training starts at theta_0.
        seed: seed of the initial values of z.
        layer_scales: layers l, over the same parameters as the basis's blocks, each with one more trained number:
            theta_l = theta_0,l + lambda_l (V mean_i z_i)_l. With one global block, this is SAID of Aghajanyan et al.
            (2021).

    Attributes:
        z: one parameter [h, k_b] per block.
        scales: lambda, one parameter [number of layers] that starts from 1, or None without `layer_scales`.
        blocks: the blocks that have directions, in the order of `z`.
        model: the wrapped model; its weights are up to date after a forward pass, `refresh` or `merge`.
        fingerprint: hashes of theta_0 by block, and of the parameters that stay frozen.
        engine: writes the weights of the wrapped model.
        bank: the adapters in memory.

    Raises:
        MismatchError: the basis belongs to another partition or another theta_0, `layer_scales` contains other
            parameters than the basis, or the model is sharded and another process has another basis or other arguments.
        InputError: a name in `modules_to_save` matches no module or lies in a block; weights are half precision,
            quantized, NaN, infinite, on the meta device or partly sharded; `ensemble` is below 1; or `init_std` is
            negative, NaN or infinite.

    Example:
        >>> from tinyspan import Basis, by_pattern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> partition = by_pattern(model, {"all": ".*"})
        >>> subspace = SubspaceModel(model, Basis.from_directions(partition, {"all": torch.tensor([[1.0, 0.0]])}))
        >>> subspace(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> subspace.z[0].grad
        tensor([[3.]])
    """

    forward = Forward()
    _hf_peft_config_loaded = True  # transformers trains a quantized model only if it has this attribute

    def __init__(
        self,
        model: nn.Module,
        basis: Basis,
        *,
        modules_to_save: Sequence[str] = (),
        ensemble: int = 1,
        init_std: float = 0.0,
        seed: int = 0,
        layer_scales: Partition | None = None,
    ) -> None:
        super().__init__()
        own = prepare(
            model,
            basis,
            modules_to_save=modules_to_save,
            ensemble=ensemble,
            init_std=init_std,
            seed=seed,
            layer_scales=layer_scales,
        )
        self.model, self.basis, self.blocks, self.fingerprint = model, basis, own.blocks, own.fingerprint
        self.modules_to_save, self.ensemble, self.layer_scales = list(modules_to_save), ensemble, layer_scales
        self.scales: nn.Parameter | None = None
        if layer_scales is not None:
            self.scales = nn.Parameter(torch.ones(len(layer_scales)).to(local(next(iter(own.weights.values())))))
        self.z, generator = nn.ParameterList(), torch.Generator().manual_seed(seed)
        for block in self.blocks:
            values = torch.randn((ensemble, basis.ranks[block.name]), generator=generator) * init_std
            self.z.append(nn.Parameter(values.to(local(own.weights[block.parameters[0].name]))))
        moving = [self._moving(index, own) for index in range(len(self.blocks))]
        identity = identity_of(self.fingerprint, basis.construction, basis.parents, basis.ranks)
        self.register_buffer(
            "_first_identity", identity.clone(), persistent=False
        )  # DDP sends that of the first process
        self._variables = Variables(self, self.blocks, own.names, is_sharded=own.everyone is not None)
        self.engine = Engine(self._variables, moving, GradientsOfZ(identity, own.group))
        self.bank = AdapterBank(self.engine)
        self._identity: Tensor | None = None
        if own.everyone is not None:  # the identity depends on all shards, so all processes compute it here
            self._identity = identity_over(own.everyone, self._new_identity())
        register_hooks(self)
        self.engine.attach()
        self._ddp_params_and_buffers_to_ignore = self.engine.ignored_by_ddp()

    def _moving(self, index: int, own: Preparation) -> MovingBlock:
        """Return the block as a function of z, and store the needed part of its theta_0 in a buffer."""
        block = self.blocks[index]
        v = self.basis.maps[block.name].converted(partial(torch.Tensor.to, device=self.z[index].device))
        start = stored_start(block, v, own.weights, scaled=self.scales is not None)
        self.register_buffer(f"_start_{index}", start, persistent=False)
        return MovingBlock(block, v, own.layer_of, None if self.scales is None else self.scales.detach(), start)

    # -- using it ---------------------------------------------------------------------------------------------------

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Raise an error, since the z of a replica would get no gradients."""
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
        """Return the representation of the wrapped model inside this class's name."""
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    @property
    def generation_config(self) -> Any:
        """The generation config of the wrapped model, which its `generate` reads; `Seq2SeqTrainer` sets it here."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    def refresh(self) -> None:
        """Write theta_0 + V mean_i z_i into the wrapped model's weights if z has changed since the last call.

        A forward pass does this; call it before you use the wrapped model by itself. z is compared by value, not by
        version counter: some optimizers write through `.data`, which no counter sees.

        Raises:
            InputError: z has changed although the model is merged, so that it no longer follows z.
            TinyspanError: z is NaN or infinite; the weights stay as they were.
        """
        self.engine.refresh()

    def base_weights(self) -> dict[str, Tensor]:
        """Return theta_0 of every parameter in the blocks, by name, in its shape."""
        return self.engine.base_weights()

    def delta(self) -> dict[str, Tensor]:
        """Return theta - theta_0 = V mean_i z_i for every parameter in the blocks, by name, in its shape."""
        return self.engine.delta()

    def merge(self) -> nn.Module:
        """Return the wrapped model as a plain one with the weights theta_0 + V mean_i z_i, without any hook.

        It is the same object, not a copy; `unmerge` reverses this. Earlier results cannot be differentiated afterwards.

        Raises:
            InputError: the adapter is disabled.
        """
        self.engine.require_enabled()
        self.refresh()
        self.engine.detach()
        return self.model

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore theta_0 in the blocks' weights, bit for bit, and follow z again from the next forward pass on.

        Modules in `modules_to_save` keep their trained values. For a sparse basis only the coordinates that it changes
        are restored, since only these are stored.

        Raises:
            MismatchError: the basis is sparse and the merged model has been changed at other coordinates; load the base
                model anew.
        """
        self.engine.restore()
        if any(moving.v.support is not None for moving in self.engine.moving):
            named, partition = self._variables.named_parameters(remove_duplicate=False), self.basis.partition
            present = partition.fingerprint({spec.name: named[spec.name] for spec in partition.parameters()})
            expected = {name: self.fingerprint[name] for name in present}
            require_same(expected, present, describe_basis(self.basis))
        self.engine.attach()
        self._ddp_params_and_buffers_to_ignore = self.engine.ignored_by_ddp()

    def get_state(self) -> AdapterState:
        """Return the trained state: z, the directly trained parameters and persistent buffers, and the scales.

        The tensors are detached but not copied, as those of `state_dict` are.

        Raises:
            InputError: the adapter is disabled.
        """
        self.engine.require_enabled()
        return self._variables.state()

    def base_state(self) -> AdapterState:
        """Return the state of the base model: z = 0, scales of 1, and the other values from before training."""
        return self._variables.base_state()

    def set_state(
        self,
        z: Mapping[str, Tensor],
        directly_trained: Mapping[str, Tensor] | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """Replace z, and directly trained values and scales if given, in place; the next forward pass uses them.

        Args:
            z: block name -> [k_b], copied to every ensemble member, or [h, k_b].
            directly_trained: name of a parameter or buffer -> value.
            scales: one number per block of `layer_scales`.

        Raises:
            MismatchError: a block is absent or unknown, or a shape does not fit; nothing is changed.
            InputError: the model is merged, or the adapter is disabled.
        """
        self.bank.assign(AdapterState(dict(z), dict(directly_trained or {}), scales))

    # -- many adapters ----------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters in memory; the one that was trained, or loaded with the model, is `default`."""
        return self.bank.names

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""
        return self.bank.active

    def load_adapter(
        self, folder: str | Path, adapter_name: str, *, revision: str | None = None, token: str | None = None
    ) -> None:
        """Read another adapter of the same basis and model into memory; `set_adapter` activates it.

        Only its z, scales and directly trained parameters are stored. The method names are those of PEFT.

        Args:
            folder: a folder that `save_pretrained` wrote, or the id of a repository on the hub.
            adapter_name: a name that no adapter in memory has.
            revision: branch, tag or commit of the repository.
            token: access token for a private repository.

        Raises:
            InputError: an adapter in memory has this name, or the folder is not an adapter.
            MismatchError: the adapter was trained in another basis, with another model, or with other
                `modules_to_save`.
            StorageError: a file is damaged.
        """
        self.bank.require_new(adapter_name)
        load_adapter(self, fetched(folder, revision, token), adapter_name)

    def set_adapter(self, adapter_name: str) -> None:
        """Activate another adapter in place; the state of the present one is stored under its name.

        The next forward pass reads the basis once and writes the weights. All adapters share one z: to continue
        training, create a new optimizer, since the old moments belong to the other adapter. Gradients are reset.

        Raises:
            InputError: no adapter has this name, the model is merged, or the adapter is disabled.
        """
        self.bank.activate(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from memory.

        Raises:
            InputError: no adapter has this name, or it is active.
        """
        self.bank.delete(adapter_name)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Combine adapters into a new one: z = sum_i w_i mean_j z_i^(j), and likewise the directly trained parameters.

        A directly trained parameter becomes phi_0 + sum_i w_i (phi_i - phi_0), where phi_0 is its value when the model
        was wrapped. Buffers, such as running means, are those of the first adapter. The weights [-1] negate an adapter,
        and [1 - a, a] interpolate between two.

        Args:
            adapters: names of adapters in memory.
            weights: one weight per adapter.
            adapter_name: name of the combination, which no adapter in memory has.

        Raises:
            InputError: a name is unknown or already used, the numbers of adapters and weights differ, a weight is NaN
                or infinite, the layers have scales, in which the weights of the model are not linear, or the outputs
                of the trained heads have other names or another order.
        """
        self.bank.add_weighted(adapters, weights, adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the base model, with its own head and label names.

        It is meant for forward passes: inside, adapters cannot be changed, saved or merged. A backward pass of an
        earlier forward pass must run before, since the weights it needs are overwritten.

        Raises:
            InputError: the model is merged, or the adapter is disabled already.
        """
        return self.bank.disabled()

    # -- what is trained --------------------------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield z and the wrapped model's parameters, without the blocks' weights, which follow z."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if not self.engine.is_following(parameter):
                yield name, parameter

    def directly_trained(self) -> dict[str, nn.Parameter]:
        """Return the directly trained parameters, those under `modules_to_save`, by name."""
        return self._variables.directly_trained()

    def parameter_groups(self, z_learning_rate: float = 1e-2, learning_rate: float = 2e-5) -> list[dict[str, Any]]:
        """Return the paper's two optimizer groups: z and scales with their own rate and no weight decay, and the rest.

        Either group may be empty.

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
            {"params": self._variables.in_z(), "lr": z_learning_rate, "weight_decay": 0.0},
            {"params": list(self.directly_trained().values()), "lr": learning_rate},
        ]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters, in z and trained directly, and of all parameters, as PEFT does."""
        in_z, directly = (_count(group["params"]) for group in self.parameter_groups())
        return in_z + directly, in_z + _count(self.model.parameters())

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable parameters and the size of the whole model."""
        in_z, directly = (_count(group["params"]) for group in self.parameter_groups())
        total = _count(self.model.parameters())
        print(f"trainable: {in_z:,} in z, {directly:,} directly || model: {total:,} parameters")

    # -- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, self_contained: bool | None = None
    ) -> None:
        """Write an adapter: z, scales, the directly trained parameters, and the hash of the basis.

        A self-contained adapter contains its basis, in the subfolder `basis`. For any other adapter, `from_pretrained`
        looks for the basis in its present location, unless it gets another one.

        Args:
            folder: must be absent or empty, unless `overwrite` is set.
            overwrite: replace an earlier adapter.
            self_contained: whether the basis is written, too; by default if it is sparse.

        Raises:
            InputError: the folder holds something else, or an earlier adapter and `overwrite` is not set, or the basis
                is read from inside the folder.
            TinyspanError: a parameter is NaN or infinite.
        """
        save_adapter(self, Path(folder), self_contained=self_contained, overwrite=overwrite)

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
            repository: id of the repository, `user/name`; it is created if it does not exist.
            self_contained: whether the basis is uploaded, too; by default if it is sparse. Otherwise it must be on the
                hub already (`Basis.push_to_hub`), or generated from a seed.
            private: whether a new repository is private.
            token: access token with write permission; by default the token of the logged-in user.
            commit_message: message of the commit.

        Raises:
            InputError: users of the adapter could not get the basis, or the hub rejects the name or the token.
            TinyspanError: a parameter is NaN or infinite.
            StorageError: the hub cannot be reached.
        """
        return push_adapter(
            self,
            repository,
            self_contained=self_contained,
            private=private,
            token=token,
            commit_message=commit_message,
        )

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
        """Wrap the base model, and load a saved adapter into it.

        Args:
            model: the base model, with the theta_0 with which the adapter was trained.
            name: a folder that `save_pretrained` wrote, or the id of a repository on the Hugging Face hub.
            basis: the adapter's basis; by default the one to which it refers.
            revision: branch, tag or commit of the repository.
            token: access token for a private repository, and for that of its basis.

        Raises:
            MismatchError: the adapter was trained with another model or another basis; the model is restored.
            InputError: the folder is not an adapter, or its basis is missing.
            StorageError: a file is damaged.
        """
        return load_pretrained(cls, model, name, basis, revision=revision, token=token)

    def _apply(self, fn: Any, recurse: bool = True) -> "SubspaceModel":
        """Move or convert everything; unless merged, the weights are rewritten at the next forward pass."""
        if fn(torch.zeros(())).dtype not in (torch.float32, torch.float64):
            raise InputError(
                "in half precision, steps inside a subspace are rounded away; compute under autocast instead"
            )
        with self.engine.conversion(fn):
            super()._apply(fn, recurse)
        return self

    def __copy__(self) -> "SubspaceModel":
        """Raise an error, since a shallow copy would write into the same weights."""
        raise InputError("two SubspaceModels cannot share one model; use copy.deepcopy")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the copied weights depend on the copied z."""
        super().__setstate__(state)
        self._variables.bind(self)
        self.engine.reattach()
        self._ddp_params_and_buffers_to_ignore = self.engine.ignored_by_ddp()

    # -- as a function of z -----------------------------------------------------------------------------------------

    def forward_at(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs at another z as a function of it, at theta_0 + V mean_i z_i; nothing is written.

        Every transform of `torch.func` applies, and transforms nest. The call needs memory for a second set of the
        blocks' weights. For z by name, together with other parameters, use `torch.func.functional_call(subspace, ...)`.

        Args:
            z: all of z as one vector [K], in the order of `torch.nn.utils.parameters_to_vector(subspace.z)`.
            *args: positional arguments of the model.
            **kwargs: keyword arguments of the model.

        Raises:
            MismatchError: z has another shape.
            InputError: the model is merged or sharded by `fully_shard`, the adapter is disabled, or the model
                checkpoints activations and z is differentiated.

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
        return self.engine.call_at(parts, self.scales, args, kwargs)

    def jacobian(
        self, batch: Any, *, method: Method = "reverse", outputs: Callable[[Any], Tensor] | None = None
    ) -> Tensor:
        """Return the derivatives of the outputs with respect to all of z, [rows, outputs, K]; see `curvature`."""
        return jacobian(self, batch, method=method, outputs=outputs)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)

"""A model that is trained inside a subspace: every block is theta_0 + V mean_i z_i, and only z changes.

The wrapped model keeps its class and its weights, which `engine` makes follow z. `wrapper` is the module of torch
around it, and `adapter_methods` has the methods for adapters in memory and on disk. Where other tensors take the place
of z (`torch.func.functional_call`, `forward_at`), nothing is written: the wrapped model is called as a function of them
(`functional`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.bases.basis import Basis
from tinyspan.errors import MismatchError
from tinyspan.model.adapter_methods import AdapterMethods
from tinyspan.model.base import describe_basis, require_same
from tinyspan.model.jacobian import Method, jacobian
from tinyspan.model.preparation import prepare
from tinyspan.partition import Partition

__all__ = ["SubspaceModel"]


class SubspaceModel(AdapterMethods):
    """Train a model in a basis: theta = theta_0 + V mean_i z^(i), i = 1 .. h (Zhang et al. 2023, equation 3).

    The model is modified in place: parameters in a block follow z, those of `modules_to_save` are trained directly, and
    all others are frozen. `parameters()` lists z, the directly trained parameters and the frozen ones, but not the
    blocks' weights, which are a function of z. z can be differentiated like any parameter, also twice and under the
    transforms of `torch.func`; `forward_at` and `jacobian` are the common cases. The methods that save, load and switch
    adapters are those of `adapter_methods.AdapterMethods`, with the names of PEFT.

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
        super().__init__(
            prepare(
                model,
                basis,
                modules_to_save=modules_to_save,
                ensemble=ensemble,
                init_std=init_std,
                seed=seed,
                layer_scales=layer_scales,
            )
        )

    # -- the weights as a function of z -------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Write theta_0 + V mean_i z_i into the wrapped model's weights if z has changed since the last call.

        A forward pass does this; call it before you use the wrapped model by itself. z is compared by value, not by
        version counter: some optimizers write through `.data`, which no counter sees.

        Raises:
            InputError: z has changed although the model is merged, so that it no longer follows z; z was replaced by
                other tensors; or the weights were replaced or are on another device than z.
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
            InputError: the adapter is disabled, or `refresh` raises one.
            TinyspanError: z is NaN or infinite.
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
            InputError: the model follows another SubspaceModel.
            MismatchError: the basis is sparse and the merged model has been changed at other coordinates; load the base
                model anew. The weights stay as they are.
        """
        self.engine.require_writer()
        if any(moving.v.support is not None for moving in self.engine.moving):
            theta_0 = {**self._variables.named_parameters(remove_duplicate=False), **self.base_weights()}
            partition = self.basis.partition
            present = partition.fingerprint({spec.name: theta_0[spec.name] for spec in partition.parameters()})
            expected = {name: self.fingerprint[name] for name in present}
            require_same(expected, present, describe_basis(self.basis))
        self.engine.restore()
        self._attach()

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
        """Return the derivatives of the outputs with respect to all of z, [rows, outputs, K]; see `model.jacobian`."""
        return jacobian(self, batch, method=method, outputs=outputs)

    # -- what is trained ----------------------------------------------------------------------------------------------

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
        print(self._sizes())

    def extra_repr(self) -> str:
        """Return the numbers of blocks and parameters, which `repr` lists above the modules."""
        return f"blocks: {len(self.blocks)}, {self._sizes()}"

    def _sizes(self) -> str:
        in_z, directly = (_count(group["params"]) for group in self.parameter_groups())
        total = _count(self.model.parameters())
        return f"trainable: {in_z:,} in z, {directly:,} directly || model: {total:,} parameters"


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)

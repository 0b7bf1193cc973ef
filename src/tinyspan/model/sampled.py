"""The gradients of a few weights of a linear layer, without those of the others.

Over t tokens the gradient of y = x W^T is G^T X, with G [t, m] and X [t, n]: 2 t m n operations, a third of a training
step. A sparse basis needs few of its m n entries, and each is the product of two columns. On a CPU, computing these
products only (a sampled dense-dense matrix product, SDDMM) takes a fraction of the time, even though both matrices must
be transposed for it. A GPU multiplies whole matrices in less time than it takes to gather columns, so there, and
wherever a weight is used outside its layer, the gradient is left to autograd.
"""

import warnings
from functools import cache, wraps
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # torch.jit.script reads the source of a linear layer's forward, which uses F

__all__ = ["SampledLayer", "SampledProduct", "is_plain_linear", "pays"]

PIECE = 512  # rows of A and B that are transposed at once
WANTED = 5  # cost of a sampled entry, in entries of the whole product; measured with two threads
TRANSPOSED = 100  # cost of a column of A or B, which must be transposed, in the same unit


class SampledProduct:
    """Some entries of A^T B: those with the indices `support` in the flattened product.

    Args:
        support: indices, ascending, [n'].
        shape: m and n, the columns of A and of B.

    Example:
        >>> product = SampledProduct(torch.tensor([1, 2]), (2, 2))
        >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))  # of [[3, 4], [6, 8]]
        tensor([4., 6.])
    """

    def __init__(self, support: Tensor, shape: tuple[int, int]) -> None:
        self._support = support
        place = support.device
        starts = torch.searchsorted(support, torch.arange(shape[0] + 1, device=place) * shape[1])  # of the rows
        columns, zeros = support % shape[1], torch.zeros(len(support), device=place)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self._zeros = torch.sparse_csr_tensor(starts.int(), columns.int(), zeros, shape, check_invariants=False)

    def __len__(self) -> int:
        """Return n'."""
        return len(self._support)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the entries, [n'], for A [t, m] and B [t, n]; from the whole product if gradients are required."""
        if _is_transformed(a, b) or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
            return (a.T @ b).reshape(-1)[self._support]
        if self._zeros.dtype != a.dtype:
            self._zeros = self._zeros.to(a.dtype)
        product = self._zeros
        for left, right in zip(a.split(PIECE), b.split(PIECE), strict=True):
            product = torch.sparse.sampled_addmm(product, left.T.contiguous(), right.T.contiguous().T)
        return product.values()


def _is_transformed(*tensors: Tensor) -> bool:
    """Whether tensors are batched, traced or dual tensors, which `sampled_addmm` does not support."""
    return (
        any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def pays(wanted: int, weight: Tensor) -> bool:
    """Whether so few gradients of a weight are needed that sampling them is faster."""
    cost = wanted * WANTED + sum(weight.shape) * TRANSPOSED
    return weight.device.type == "cpu" and weight.ndim == 2 and cost < weight.numel()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a module computes x W^T + b, or x W + b (the Conv1D of GPT-2), from its `weight`, and nothing else."""
    kind = type(layer)
    plain = kind is nn.Linear or (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    plain = plain and not {"forward", "_sampled"} & layer.__dict__.keys()
    return plain and isinstance(layer._parameters.get("weight"), nn.Parameter)


class SampledLayer:
    """A linear layer of which only selected weights get gradients.

    Until `remove`, the layer's class is replaced by one in whose forward pass the weight is a constant, and the output
    depends on a stand-in tensor for the selected weights. Other uses of the weight are not affected. Copies and pickles
    of the layer have its original class.

    Args:
        layer: see `is_plain_linear`.
        support: indices of the selected weights, ascending.

    Attributes:
        stand_in: a tensor [n'] that gets the gradients of the selected weights; without one, the layer is a plain one.
    """

    def __init__(self, layer: nn.Module, support: Tensor) -> None:
        weight = layer._parameters["weight"]
        assert weight is not None
        self._class = cast(Any, type(layer))
        self._layer, self._weight = ref(layer), id(weight)
        self.stand_in: Tensor | None = None
        self._product = SampledProduct(support, (weight.shape[0], weight.shape[1]))
        self._outputs_first = isinstance(layer, nn.Linear)
        layer.__dict__["_sampled"] = self
        layer.__class__ = _sampling(self._class)

    def __deepcopy__(self, memo: Any) -> None:
        """Return None, so that copies do not contain it."""

    def remove(self) -> None:
        """Restore the layer's original class."""
        layer = self._layer()
        if layer is not None:
            layer.__dict__.pop("_sampled", None)
            if type(layer) is _sampling(self._class):  # and not a subclass that somebody else created
                layer.__class__ = self._class

    def serves(self, layer: nn.Module, inputs: Any) -> bool:
        """Whether this call of the layer can be sampled."""
        weight = layer._parameters.get("weight")
        return (
            weight is not None
            and self.stand_in is not None
            and id(weight) == self._weight
            and weight.device.type == "cpu"
            and weight.requires_grad
            and not weight._backward_hooks  # hooks of others need the whole gradient
            and torch.is_grad_enabled()
            and isinstance(inputs, Tensor)
            and inputs.layout == torch.strided
            and not inputs.is_nested
            and not torch._C._is_tracing()
            and not torch._C._are_functorch_transforms_active()
        )

    def __call__(self, layer: Any, inputs: Tensor) -> Tensor:
        """Return the layer's outputs."""
        weight, bias = layer.weight, layer.bias
        of_linear = weight if self._outputs_first else weight.T
        outputs = F.linear(inputs, of_linear.detach(), bias)
        constants = (of_linear,)  # in a tuple, so that autograd does not ask for its gradient
        sampled: Tensor = _Sampled.apply(outputs, inputs, self.stand_in, self, constants)
        return sampled

    def values(self, of_outputs: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradients of the selected weights."""
        a, b = (tensor.reshape(-1, tensor.shape[-1]).to(dtype) for tensor in (of_outputs, inputs))
        return self._product(a, b) if self._outputs_first else self._product(b, a)


@cache
def _sampling(plain: Any) -> Any:
    """Return the subclass of a linear layer's class that may have a `SampledLayer`."""

    @wraps(plain.forward)
    def forward(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
        if not torch.compiler.is_compiling() and len(arguments) == 1 and not named:
            sampled = layer.__dict__.get("_sampled")
            if sampled is not None and sampled.serves(layer, *arguments):
                return sampled(layer, *arguments)
        return plain.forward(layer, *arguments, **named)

    def reduced(layer: nn.Module, protocol: Any) -> Any:
        state = {name: value for name, value in layer.__dict__.items() if name != "_sampled"}
        return object.__new__, (plain,), state

    return type(
        plain.__name__, (plain,), {"forward": forward, "__reduce_ex__": reduced, "__module__": plain.__module__}
    )


class _Sampled(torch.autograd.Function):
    """The outputs of a layer, unchanged; the backward pass also computes the gradients of the selected weights."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, inputs: Tensor, stand_in: Tensor, sampled: SampledLayer, weights: tuple[Tensor, ...]
    ) -> Tensor:
        ctx.save_for_backward(inputs.to(outputs.dtype))
        ctx.sampled, ctx.dtype, ctx.weights = sampled, stand_in.dtype, weights
        ctx.is_cast = inputs.dtype != outputs.dtype
        return outputs.detach()  # not a view, since the caller may write into it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (inputs,), (of_outputs,) = ctx.saved_tensors, gradients
        of_inputs = None
        if torch.is_grad_enabled():  # G W, the gradient of the inputs, may be differentiated, with W as a constant
            if ctx.is_cast:
                raise RuntimeError(
                    "second derivatives through a sparse basis are not available under autocast: leave autocast, or "
                    "call SubspaceModel.forward_at"
                )
            (weight,) = ctx.weights
            of_inputs = of_outputs @ (weight - weight.detach()).to(of_outputs.dtype)
        return of_outputs, of_inputs, ctx.sampled.values(of_outputs, inputs, ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]

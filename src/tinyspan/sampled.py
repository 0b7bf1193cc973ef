"""The gradient of a few of a linear layer's weights, without that of all the others.

Over t tokens the gradient of y = x W^T is G^T X, of G [t, m] and X [t, n]: 2 t m n operations, a third of a step of
training. A sparse basis wants few of its m n numbers, and each is the product of two columns. On a processor these
products alone (a sampled product of dense matrices, SDDMM) take a fraction of the time, even though both matrices have
to be transposed for them. An accelerator multiplies whole matrices in less time than it takes to gather columns, so
there, as wherever a layer is not used in the plain way, the gradient is left to autograd.
"""

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = ["SampledLayer", "SampledProduct", "is_plain_linear", "pays"]

PIECE = 512  # rows of A and B transposed at once
WANTED, TRANSPOSED = 5, 100  # what a wanted number, and a column that is transposed, cost, over a number of the whole


class SampledProduct:
    """Some of the numbers of A^T B: those at the coordinates `support` of the product as one vector.

    Args:
        support: which, ascending, [n'].
        shape: m and n, the columns of A and of B.

    Example:
        >>> product = SampledProduct(torch.tensor([1, 2]), (2, 2))
        >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))  # of [[3, 4], [6, 8]]
        tensor([4., 6.])
    """

    def __init__(self, support: Tensor, shape: tuple[int, int]) -> None:
        self.shape = shape
        firsts = torch.arange(shape[0] + 1) * shape[1]
        self._starts = torch.searchsorted(support.cpu(), firsts).int()  # of the rows, as in compressed sparse rows
        self._columns = (support.cpu() % shape[1]).int()

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return them, [n'], of A [t, m] and B [t, n]."""
        values = a.new_zeros(len(self._columns))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            wanted = torch.sparse_csr_tensor(
                self._starts, self._columns, values, size=self.shape, check_invariants=False
            )
        for left, right in zip(a.split(PIECE), b.split(PIECE), strict=True):
            wanted = torch.sparse.sampled_addmm(wanted, left.T.contiguous(), right.T.contiguous().T)
        return wanted.values()


def pays(wanted: int, weight: Tensor) -> bool:
    """Whether so few gradients of a matrix of weights are wanted that the others should not be computed."""
    return wanted * WANTED + sum(weight.shape) * TRANSPOSED < weight.numel()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a module does x W^T + b, or x W + b (the Conv1D of GPT-2), with its `weight`, and nothing else."""
    plain = type(layer).forward is nn.Linear.forward or type(layer).__module__ == "transformers.pytorch_utils"
    return plain and "forward" not in layer.__dict__ and getattr(layer._parameters.get("weight"), "ndim", 0) == 2


class SampledLayer:
    """Hooks by which a plain linear layer's weight gets the gradients that are wanted, and no others.

    In a forward pass the weight is a constant, and the output depends on a tensor that stands for the wanted ones.
    Whatever else uses the weight meets it as it always was.

    Args:
        layer: see `is_plain_linear`.
        support: which of the weight's coordinates, ascending.
        take: is called with a tensor [n'] when its `grad` has come.
    """

    _constant = False  # whether the weight is one now
    _weight: Callable[[], nn.Parameter | None] = staticmethod(lambda: None)

    def __init__(self, layer: nn.Module, support: Tensor, take: Callable[[Tensor], None]) -> None:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        self._layer, self._weight, self._support, self._take = ref(layer), ref(weight), support, take
        self._inputs_first = not isinstance(layer, nn.Linear)
        self._handles = (
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after, prepend=True, always_call=True),
        )

    def __reduce__(self) -> Any:
        """Give copies of the layer hooks that do nothing."""
        return SampledLayer.__new__, (SampledLayer,)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    @cached_property
    def _product(self) -> SampledProduct:
        weight = self._weight()
        assert weight is not None
        return SampledProduct(self._support, (weight.shape[0], weight.shape[1]))

    def _before(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or torch._C._is_tracing() or not torch.is_grad_enabled():
            return
        weight = self._weight()
        if (
            weight is not None
            and layer is self._layer()
            and layer._parameters["weight"] is weight
            and weight.requires_grad
            and weight.device.type == "cpu"
            and len(arguments) == 1
            and isinstance(arguments[0], Tensor)
            and next(iter(layer._forward_hooks.values())) == self._after  # nobody has changed the output before
            and not torch._C._are_functorch_transforms_active()
        ):
            weight.requires_grad_(False)
            self._constant = True

    def _after(self, layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
        if torch.compiler.is_compiling() or not self._constant or (weight := self._weight()) is None:
            return None
        self._constant = False
        weight.requires_grad_(True)
        if output is None:  # it failed
            return None
        wanted = weight.new_zeros(1).expand(len(self._support)).requires_grad_(True)
        wanted.register_post_accumulate_grad_hook(self._take)
        found: Tensor = _Sampled.apply(output, arguments[0].detach(), wanted, self._values)
        return found

    def _values(self, of_output: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        rows = of_output.reshape(-1, of_output.shape[-1]).to(dtype), inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        return self._product(*(reversed(rows) if self._inputs_first else rows))


class _Sampled(torch.autograd.Function):
    """The output of a layer as it is; its backward also gives the gradient of the wanted weights."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, wanted: Tensor, values: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.values, ctx.dtype = values, wanted.dtype
        return output.detach()  # no view: whoever gets it may write into it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (inputs,) = ctx.saved_tensors
        with torch.no_grad():
            of_wanted = ctx.values(gradients[0], inputs, ctx.dtype)
        return gradients[0], None, of_wanted, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]

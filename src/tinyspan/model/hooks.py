"""Hooks on the gradients of weights, which keep nobody alive and end with their owner."""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyspan.model.sampled import SampledLayer

__all__ = ["GradientHooks"]


class GradientHooks:
    """What is called when the gradient of a weight has come.

    Taken along when this is dropped: a model that is wrapped again and again would keep dead hooks of each time. Left
    out of a copy or pickle.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle | SampledLayer] = []

    def __del__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type["GradientHooks"], tuple[()]]:
        return GradientHooks, ()

    def add(self, weight: nn.Parameter, method: Callable[..., None], *arguments: Any) -> None:
        """Let the weight have gradients, and call a method with the weight and the arguments when one has come.

        The object of the method is not kept alive: the garbage collector does not see torch's hooks.
        """
        hook = _weak(method, arguments)
        self._handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(hook))

    def add_sampled(self, layer: nn.Module, support: Tensor, method: Callable[..., None], *arguments: Any) -> None:
        """Let some coordinates of a linear layer's weight alone have gradients; see `SampledLayer`.

        The method is called with what stands for them, and the arguments.
        """
        self._handles.append(SampledLayer(layer, support, _weak(method, arguments)))

    def clear(self) -> None:
        """Take all of them away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _weak(method: Callable[..., None], arguments: tuple[Any, ...]) -> Callable[[Tensor], None]:
    weak = WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        if (alive := weak()) is not None and tensor.grad is not None:
            alive(tensor, *arguments)

    return hook

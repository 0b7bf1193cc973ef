"""The hooks and parameter classes that a SubspaceModel adds to a model, removed when their owner is deleted."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NoReturn
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyspan.errors import InputError
from tinyspan.model.autograd import temporarily_outside_transforms
from tinyspan.model.sampled import SampledLayer

__all__ = ["Attachments", "weak_hook"]


class FollowingParameter(nn.Parameter):
    """A parameter that depends on z, and that modules and optimizers treat as a plain parameter.

    For autograd it is the result of an operation: its gradient is never accumulated, and it cannot be frozen. An
    optimizer over all parameters of a larger module would refuse it for that, and reading its gradient would warn.
    """

    retains_grad = True  # optimizers check this

    @property
    def grad(self) -> None:
        """None, since the gradient is passed on to z."""

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise InputError("the gradient of a weight that follows z cannot be set; set that of z, or merge() first")

    def register_post_accumulate_grad_hook(self, hook: Any) -> NoReturn:
        """Raise an error, since the hook would never be called."""
        raise InputError(
            "gradients of weights that follow z are not accumulated, so a post-accumulate-gradient hook would never be "
            "called; put it on z, or use register_hook"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return a plain parameter."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied


class Attachments:
    """Weights that depend on z, layers whose gradients are sampled, and hooks on gradients.

    They are removed when this object is deleted: otherwise a model that is wrapped repeatedly would keep the basis of
    each time alive. Copies and pickles are empty.

    Attributes:
        sampled: block's position -> number of its part -> layers.
    """

    def __init__(self) -> None:
        self.sampled: dict[int, dict[int, list[SampledLayer]]] = defaultdict(dict)
        self._handles: list[RemovableHandle] = []
        self._weights: list[nn.Parameter] = []
        self._others: dict[int, Any] = {}

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # at exit, the names in this module may be None, `sys` among them
            with temporarily_outside_transforms():  # the garbage collector may run inside one
                self.clear()

    def __reduce__(self) -> tuple[type["Attachments"], tuple[()]]:
        return Attachments, ()

    def add_hook(self, weight: nn.Parameter, method: Callable[..., None], *arguments: Any) -> None:
        """Enable gradients of the weight, and call a method with the weight and the arguments after accumulation."""
        hook = weak_hook(method, *arguments)
        self._handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(hook))

    def add_following(self, weights: Iterable[nn.Parameter]) -> None:
        """Register weights that depend on z, or will."""
        for weight in weights:
            self._weights.append(weight)
            if type(weight) is nn.Parameter:
                weight.__class__ = FollowingParameter

    def release(self) -> None:
        """Make the weights leaves of autograd again, in place, without gradients."""
        for weight in self._weights:
            hooks = weight._backward_hooks
            weight.detach_()
            if hooks:  # registered by others; autograd has kept them on the old graph
                self._others[id(weight)] = hooks

    def restore_hooks(self) -> None:
        """Restore the hooks of others on the weights, which require gradients again."""
        for weight in self._weights:
            if (hooks := self._others.pop(id(weight), None)) is not None:
                weight._backward_hooks = hooks
                if weight.grad_fn is not None:
                    weight.grad_fn._register_hook_dict(weight)  # as Tensor.register_hook does

    def clear(self) -> None:
        """Remove everything."""
        for handle in self._handles:
            handle.remove()
        for parts in self.sampled.values():
            for layer in chain.from_iterable(parts.values()):
                layer.remove()
        self.release()
        for weight in self._weights:
            weight.requires_grad_(True)
            if type(weight) is FollowingParameter:
                weight.__class__ = nn.Parameter  # type: ignore[assignment]
        self.restore_hooks()
        self._handles.clear()
        self._weights.clear()
        self.sampled.clear()


def weak_hook(method: Callable[..., None], *arguments: Any) -> Callable[[Tensor], None]:
    """Return a hook that calls a method without keeping its object alive: torch's hooks are not garbage-collected."""
    weak = WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        if (alive := weak()) is not None and tensor.grad is not None:
            alive(tensor, *arguments)

    return hook

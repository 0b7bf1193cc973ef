"""What a SubspaceModel leaves at the weights of a model: it keeps nobody alive, and ends with its owner."""

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
from tinyspan.model.sampled import SampledLayer

__all__ = ["Attachments", "weak_hook"]


class FollowingParameter(nn.Parameter):
    """A parameter that depends on z, and that modules and optimizers take for what it was.

    Autograd knows it as the result of an operation, never accumulates its gradient, and cannot freeze it. An optimizer
    that lists all parameters of a larger module would refuse it for that, and everyone who looks for its gradient would
    be warned.
    """

    retains_grad = True  # what optimizers look at

    @property
    def grad(self) -> None:
        """None: the gradient is passed on to z."""

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise InputError("the gradient of a weight that follows z cannot be set; set that of z, or merge() first")

    def register_post_accumulate_grad_hook(self, hook: Any) -> NoReturn:
        """Refuse a hook that would never be called."""
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
    """Weights that were made to depend on z, layers whose gradients are sampled, and hooks on gradients.

    Taken back when this is dropped: a model that is wrapped again and again would keep the basis of each time. Left
    out of a copy or pickle.

    Attributes:
        sampled: block's position -> number of its part -> layers.
    """

    def __init__(self) -> None:
        self.sampled: dict[int, dict[int, list[SampledLayer]]] = defaultdict(dict)
        self._handles: list[RemovableHandle] = []
        self._weights: list[nn.Parameter] = []
        self._others: dict[int, Any] = {}

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then the classes below may be gone already
            self.clear()

    def __reduce__(self) -> tuple[type["Attachments"], tuple[()]]:
        return Attachments, ()

    def add_hook(self, weight: nn.Parameter, method: Callable[..., None], *arguments: Any) -> None:
        """Let the weight have gradients, and call a method with the weight and the arguments when one has come."""
        hook = weak_hook(method, *arguments)
        self._handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(hook))

    def add_following(self, weights: Iterable[nn.Parameter]) -> None:
        """Keep track of weights that depend on z, or will."""
        for weight in weights:
            self._weights.append(weight)
            if type(weight) is nn.Parameter:
                weight.__class__ = FollowingParameter

    def release(self) -> None:
        """Make the weights leaves of autograd again, in place, that require no gradient."""
        for weight in self._weights:
            hooks = weight._backward_hooks
            weight.detach_()
            if hooks:  # of others; autograd has left them behind
                self._others[id(weight)] = hooks

    def restore_hooks(self) -> None:
        """Put hooks of others on the weights, which require gradients again."""
        for weight in self._weights:
            if (hooks := self._others.pop(id(weight), None)) is not None:
                weight._backward_hooks = hooks
                if weight.grad_fn is not None:
                    weight.grad_fn._register_hook_dict(weight)  # as Tensor.register_hook does

    def clear(self) -> None:
        """Take everything back."""
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
    """Return a hook that calls a method, whose object it does not keep alive: nobody collects torch's hooks."""
    weak = WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        if (alive := weak()) is not None and tensor.grad is not None:
            alive(tensor, *arguments)

    return hook

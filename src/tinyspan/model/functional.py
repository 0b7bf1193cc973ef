"""Call a model with other weights than its own; derivatives that would be wrong are refused.

`torch.func.functional_call` puts the weights into the model for the duration of the call. Activation checkpointing
recomputes layers after the call, in the backward pass, and would use the model's own weights. It is therefore refused,
also where `torch.utils.checkpoint` is called directly, reentrant or not.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from tinyspan.errors import InputError

__all__ = ["functional_call"]

CHECKPOINTING = (
    "activation checkpointing recomputes layers with the weights that are in the model, not with those of a "
    "functional call: switch it off, model.gradient_checkpointing_disable(), or call the SubspaceModel itself"
)
NO_FORWARD_MODE = (
    "forward mode (jvp, jacfwd, hessian) needs a derivative that torch does not have for this operation: load the "
    "model "
    'with attn_implementation="eager" if it is a fused attention, use reverse mode (vjp, jacrev), or '
    'SubspaceModel.jacobian(batch, method="central")'
)


def functional_call(
    model: nn.Module, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return the outputs of a model in which some weights, and those tied to them, are replaced.

    Args:
        model: is not changed.
        weights: parameter name -> its values.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.

    Raises:
        InputError: the weights are differentiated, and the model checkpoints activations.
        NotImplementedError: torch has no forward-mode derivative for an operation in the model.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    differentiated = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights.values())
    if differentiated and any(_is_checkpointed(module) for module in model.modules()):
        raise InputError(CHECKPOINTING)
    mode = _Differentiable() if transformed or differentiated else nullcontext()
    with _no_saved_tensor_hooks(differentiated), _forward_mode_errors(), mode:
        return torch.func.functional_call(
            model, _under_all_names(model, weights), args, dict(kwargs), tie_weights=False
        )


def _under_all_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of all modules that have them, each module once.

    torch's own tying of weights leaves the replaced weights in the model where two layers are the same module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    named = dict(model.named_parameters(remove_duplicate=False))
    values = {id(named[name]): value for name, value in weights.items()}
    places: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for name, parameter in named.items():
        owner, _, attribute = name.rpartition(".")
        if id(parameter) in values:
            places.setdefault((id(modules[owner]), attribute), (name, values[id(parameter)]))
    return dict(places.values())


class _Differentiable(TorchFunctionMode):
    """Computes layer normalization by elementary operations, and refuses operations whose derivatives are wrong.

    Second derivatives of torch's own normalization are wrong under vmap, as in `torch.func.hessian` (torch 2.13),
    without an error. Those of batch normalization in training mode are wrong, too, and are refused. Reentrant
    checkpointing is refused as well: it first computes without gradients, and no hook sees the tensors that it saves.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() and _is_in_reentrant_checkpoint():
            raise InputError(CHECKPOINTING)
        if func in (F.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **kwargs)
        if func in (F.batch_norm, torch.batch_norm) and _trains_batch_norm(*args, **kwargs):
            raise InputError(
                "torch's derivatives of batch normalization in training mode are wrong under transforms: call eval() "
                "first"
            )
        return func(*args, **kwargs)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normalized = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = normalized if weight is None else normalized * weight
    return scaled if bias is None else scaled + bias


def _trains_batch_norm(
    x: Any, mean: Any, variance: Any, weight: Any = None, bias: Any = None, *rest: Any, **named: Any
) -> bool:
    return bool(rest[0] if rest else named.get("training", False))


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether a module of transformers checkpoints its layers."""
    return module.training and bool(getattr(module, "gradient_checkpointing", False))


def _is_in_reentrant_checkpoint() -> bool:
    """Whether an operation of a functional call is run by `checkpoint(..., use_reentrant=True)`."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not functional_call.__code__:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _no_saved_tensor_hooks(active: bool) -> Iterator[None]:
    """Refuse hooks on saved tensors, which checkpointing uses; a transform of torch.func refuses them itself."""
    if not active or torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTING):
        yield


@contextmanager
def _forward_mode_errors() -> Iterator[None]:
    """Add advice to torch's error about a missing forward-mode derivative."""
    try:
        yield
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        raise NotImplementedError(f"{error}\n{NO_FORWARD_MODE}") from error

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
TRAINING_STATISTICS = (
    "torch's derivatives of batch normalization in training mode, and of instance normalization that updates running "
    "statistics, are wrong under transforms: call eval() first"
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
    """Computes normalization by elementary operations, and refuses operations whose derivatives are wrong.

    Second derivatives of torch's own layer and instance normalization are wrong under vmap, as in `torch.func.hessian`,
    or in nested forward mode (torch 2.13), without an error. Those of batch normalization in training mode are wrong,
    too, and are refused. Reentrant checkpointing is refused as well: it first computes without gradients, and no hook
    sees the tensors that it saves.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() and _is_in_reentrant_checkpoint():
            raise InputError(CHECKPOINTING)
        if func in (F.layer_norm, torch.layer_norm):
            return _native_layer_norm(*args, **kwargs)[0]
        if func is torch.native_layer_norm:
            return _native_layer_norm(*args, **kwargs)
        if func is F.instance_norm:
            return _instance_norm(*args, **kwargs)
        if func is torch.instance_norm:
            return _torch_instance_norm(*args, **kwargs)
        if func in (F.batch_norm, torch.batch_norm, torch.native_batch_norm) and _trains_batch_norm(*args, **kwargs):
            raise InputError(TRAINING_STATISTICS)
        return func(*args, **kwargs)


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized input, the means and the reciprocal standard deviations."""
    normalized, mean, scale = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    probe = torch.zeros(1, dtype=input.dtype, device=input.device)
    dtype = F.layer_norm(probe, (1,)).dtype  # float32 under autocast on accelerators
    return _affine(normalized, weight, bias).to(dtype), mean, scale


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise InputError(TRAINING_STATISTICS)
    normalized, _, _ = _standardized(input, tuple(range(2, input.dim())), eps)
    per_channel = [None if one is None else one.view(-1, *(1,) * (input.dim() - 2)) for one in (weight, bias)]
    return _affine(normalized, *per_channel).to(input.dtype)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - mean) / std, the means and 1 / std; of half precision in float32, where squares do not overflow."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * scale, mean, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = x if weight is None else x * weight
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

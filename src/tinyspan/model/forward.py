"""The `forward` of a SubspaceModel, which has the signature of the wrapped model's."""

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from tinyspan.model.wrapper import ModelWrapper

__all__ = ["Forward", "named_model"]


class Forward:
    """Call the wrapped model at theta_0 + V mean_i z_i, under the wrapped model's own signature.

    Trainers read the signature of `forward` to determine the columns of a model. A new object is returned on each
    access: stored in the SubspaceModel, it would keep that, and its copy of theta_0, alive until the garbage collector
    runs.
    """

    def __init__(self, subspace: "ModelWrapper | None" = None) -> None:
        self._subspace = subspace

    def __get__(self, subspace: "ModelWrapper | None", kind: type | None = None) -> "Forward":
        return Forward(subspace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model."""
        assert self._subspace is not None
        if args and args[0] is self._subspace:  # bound once more, as accelerate's unwrap_model does
            args = args[1:]
        return self._subspace.engine.call(args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the wrapped model; that of the class has the `labels` for which a plain Trainer looks."""
        if self._subspace is not None:
            return inspect.signature(named_model(self._subspace.model).forward)
        anything = inspect.signature(self.__call__)
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        positional, keywords = anything.parameters.values()
        return anything.replace(parameters=[positional, labels, keywords])


def named_model(model: nn.Module) -> Any:
    """Return the model whose class determines columns and labels: the base model inside PEFT's, or the model itself."""
    if type(model).__name__ == "PeftMixedModel":  # which has no get_base_model
        return model.base_model.model  # type: ignore[union-attr]
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]

"""The versions of z at which the weights were written, by which the gradient of an earlier z is noticed."""

import warnings

from tinyspan.model.variables import Variables

__all__ = ["WrittenVersions"]


class WrittenVersions:
    """The version counters of z when the weights were last compared with it.

    Args:
        variables: tensors of the SubspaceModel.
    """

    def __init__(self, variables: Variables) -> None:
        self._variables = variables
        self._versions: list[int] = []
        self._has_warned = False

    def remember(self) -> None:
        """Record that the weights match the present z."""
        self._versions = [z._version for z in self._variables.z]

    def warn_if_stale(self, index: int) -> None:
        """Warn once if z of a block has changed since the weights were written, so that training makes no progress."""
        if self._versions and self._variables.z[index]._version != self._versions[index] and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "z has changed since the weights were last written, so the gradient that has come is that of an "
                "earlier z: the loss does not call the SubspaceModel, but the model inside it, which does not follow z "
                "by itself. Build loss objects on the SubspaceModel, or call refresh() before each forward pass",
                stacklevel=2,
            )

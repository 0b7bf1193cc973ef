"""Adapters in memory, by name: the active one is in z; the states of the others are stored."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tinyspan.errors import InputError
from tinyspan.labels import are_same, generic_names, label_names, may_hold_head, set_label_names
from tinyspan.model.engine import Engine
from tinyspan.model.state import AdapterState, weighted_sum

__all__ = ["AdapterBank"]


class AdapterBank:
    """The adapters of a SubspaceModel in memory.

    Args:
        engine: engine of the SubspaceModel.

    Attributes:
        active: name of the active adapter.
        base_labels: names of the outputs of the base model's head when it was wrapped; None if they have no names.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._variables = engine, engine.variables
        self.active = "default"
        self._states: dict[str, AdapterState | None] = {self.active: None}  # the state of the active one is in z
        self._labels: dict[str, Sequence[str] | None] = {}  # labels of the inactive adapters
        self.base_labels = label_names(self._variables.model)

    @property
    def names(self) -> list[str]:
        """Names of all adapters."""
        return list(self._states)

    def state_of(self, adapter_name: str) -> AdapterState:
        """Return the state of an adapter, not copied.

        Raises:
            InputError: no adapter has this name.
        """
        self.require_name(adapter_name)
        return self._states[adapter_name] or self._variables.state()

    def assign(self, state: AdapterState) -> None:
        """Replace the values of the trained parameters in place.

        Raises:
            MismatchError: the state does not fit; nothing is changed.
            InputError: the model is merged, or the adapter is disabled.
        """
        self._engine.require_enabled()
        self._engine.require_following()
        self._variables.assign(state)

    def add(self, adapter_name: str, state: AdapterState, labels: Sequence[str] | None) -> None:
        """Store another adapter.

        Args:
            adapter_name: a name that no adapter in memory has.
            state: state of the adapter.
            labels: names of the outputs of its head, if they are named.

        Raises:
            InputError: an adapter in memory has this name.
            MismatchError: the state does not fit.
        """
        self.require_new(adapter_name)
        self._variables.require_fit(state)
        self._states[adapter_name], self._labels[adapter_name] = state, labels

    def activate(self, adapter_name: str) -> None:
        """Activate another adapter in place, and store the state of the present one; gradients are reset.

        Raises:
            InputError: no adapter has this name, the model is merged, or the adapter is disabled.
        """
        self.require_name(adapter_name)
        self._engine.require_enabled()
        if (wanted := self._states[adapter_name]) is None:
            return
        present = self._variables.state().clone()
        self.assign(wanted)
        for parameter in (*self._variables.in_z(), *self._variables.directly_trained().values()):
            parameter.grad = None  # it belongs to the other adapter
        self._states |= {self.active: present, adapter_name: None}
        self._labels[self.active] = label_names(self._variables.model)
        self._rename_outputs(self._labels.get(adapter_name))
        self.active = adapter_name

    def delete(self, adapter_name: str) -> None:
        """Delete an adapter.

        Raises:
            InputError: no adapter has this name, or it is active.
        """
        self.require_name(adapter_name)
        if adapter_name == self.active:
            raise InputError(f"the adapter {adapter_name!r} is active; set_adapter() another one first")
        del self._states[adapter_name]
        self._labels.pop(adapter_name, None)

    @torch.no_grad()
    def add_weighted(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add the weighted sum of adapters; see `SubspaceModel.add_weighted_adapter`.

        Raises:
            InputError: a name is unknown or already used, the numbers of adapters and weights differ, a weight is NaN
                or infinite, the layers have scales, or the outputs of the trained heads have other names or another
                order.
        """
        self.require_new(adapter_name)
        self._engine.require_enabled()
        for name in adapters:
            self.require_name(name)
        if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
            raise InputError(f"expected one finite weight per adapter, got {list(adapters)} and {list(weights)}")
        if self._variables.scales is not None:
            raise InputError(
                "adapters with layer scales have no weighted sum: the weights depend on the product of scale and z"
            )
        self._require_same_labels(adapters)
        present = self._variables.state()
        chosen = [self.state_of(name) for name in adapters]
        combined = weighted_sum(chosen, weights, present, self._variables.base_values, self._variables.names)
        self.add(adapter_name, combined, self._labels_of(adapters[0]))

    def _labels_of(self, adapter_name: str) -> Sequence[str] | None:
        """Return the names of the outputs of an adapter's head; None if they have no names."""
        return label_names(self._variables.model) if adapter_name == self.active else self._labels.get(adapter_name)

    def _rename_outputs(self, labels: Sequence[str] | None) -> None:
        """Name the outputs of the model's head; without one name for each output they are numbered."""
        model = self._variables.model
        if labels != label_names(model):
            generic = generic_names(model)
            set_label_names(model, labels if labels and len(labels) == len(generic) else generic)

    def _require_same_labels(self, adapters: Sequence[str]) -> None:
        """Refuse to combine trained heads whose outputs have other names or another order.

        Raises:
            InputError: names two adapters and their labels.
        """
        in_blocks = [spec.name for block in self._variables.blocks for spec in block.parameters]
        if not may_hold_head(self._variables.model, [*self._variables.names, *in_blocks]):
            return
        named = [(name, labels) for name in adapters if (labels := self._labels_of(name))]
        for name, labels in named[1:]:
            first, expected = named[0]
            if not are_same(expected, labels):
                raise InputError(
                    f"the head of {first!r} has the outputs {', '.join(expected)}, that of {name!r} has "
                    f"{', '.join(labels)}: a weighted sum would combine outputs of different labels; train the "
                    "adapters with one order of the labels"
                )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Return a context in which the model is the base model, and its outputs have the base model's names.

        Raises:
            InputError: the model is merged, or the adapter is disabled already.
        """
        self._engine.require_enabled()
        present, labels = self._variables.state().clone(), label_names(self._variables.model)
        self.assign(self._variables.base_state())
        self._rename_outputs(self.base_labels)
        self._engine.is_disabled = True
        try:
            yield
        finally:
            self._engine.is_disabled = False
            self.assign(present)
            self._rename_outputs(labels)
            self._engine.refresh()  # for a backward pass that computes checkpointed activations again

    def require_name(self, adapter_name: str) -> None:
        """Check that an adapter has this name.

        Raises:
            InputError: no adapter has this name.
        """
        if adapter_name not in self._states:
            raise InputError(f"there is no adapter {adapter_name!r} in memory, only {self.names}")

    def require_new(self, adapter_name: str) -> None:
        """Check that no adapter has this name.

        Raises:
            InputError: an adapter has this name.
        """
        if adapter_name in self._states:
            raise InputError(f"there is an adapter {adapter_name!r} in memory; choose another name or delete that one")

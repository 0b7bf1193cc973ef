"""The adapters of a SubspaceModel in memory, on disk and on the hub, under the method names of PEFT.

The adapters in memory are in a `bank`; `files` reads and writes those on disk.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn
from typing_extensions import Self

from tinyspan.bases.basis import Basis
from tinyspan.io.hub import fetched
from tinyspan.model.files import load_adapter, load_pretrained, push_adapter, save_adapter
from tinyspan.model.state import AdapterState
from tinyspan.model.wrapper import ModelWrapper

__all__ = ["AdapterMethods"]


class AdapterMethods(ModelWrapper):
    """The methods of a SubspaceModel that concern whole adapters: their state, those in memory, and their files."""

    # -- the state of the active adapter ------------------------------------------------------------------------------

    def get_state(self) -> AdapterState:
        """Return the trained state: z, the directly trained parameters and persistent buffers, and the scales.

        The tensors are detached but not copied, as those of `state_dict` are.

        Raises:
            InputError: the adapter is disabled.
        """
        self.engine.require_enabled()
        return self._variables.state().detached()

    def base_state(self) -> AdapterState:
        """Return the state of the base model: z = 0, scales of 1, and the other values from before training."""
        return self._variables.base_state()

    def set_state(
        self,
        z: Mapping[str, Tensor],
        directly_trained: Mapping[str, Tensor] | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """Replace z, and directly trained values and scales if given, in place; the next forward pass uses them.

        Args:
            z: block name -> [k_b], copied to every ensemble member, or [h, k_b].
            directly_trained: name of a parameter or buffer -> value.
            scales: one number per block of `layer_scales`.

        Raises:
            MismatchError: a block is absent or unknown, or a shape does not fit; nothing is changed.
            InputError: the model is merged, or the adapter is disabled.
        """
        self.bank.assign(AdapterState(dict(z), dict(directly_trained or {}), scales))

    def directly_trained(self) -> dict[str, nn.Parameter]:
        """Return the directly trained parameters, those under `modules_to_save`, by name."""
        return self._variables.directly_trained()

    # -- in memory ----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters in memory; the one that was trained, or loaded with the model, is `default`."""
        return self.bank.names

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""
        return self.bank.active

    def load_adapter(
        self, folder: str | Path, adapter_name: str, *, revision: str | None = None, token: str | None = None
    ) -> None:
        """Read another adapter of the same basis and model into memory; `set_adapter` activates it.

        Only its z, scales and directly trained parameters are stored. The method names are those of PEFT.

        Args:
            folder: a folder that `save_pretrained` wrote, or the id of a repository on the hub.
            adapter_name: a name that no adapter in memory has.
            revision: branch, tag or commit of the repository.
            token: access token for a private repository.

        Raises:
            InputError: an adapter in memory has this name, or the folder is not an adapter.
            MismatchError: the adapter was trained in another basis, with another model, or with other
                `modules_to_save`.
            StorageError: a file is damaged.
        """
        self.bank.require_new(adapter_name)
        load_adapter(self, fetched(folder, revision, token), adapter_name)

    def set_adapter(self, adapter_name: str) -> None:
        """Activate another adapter in place; the state of the present one is stored under its name.

        The next forward pass reads the basis once and writes the weights. All adapters share one z: to continue
        training, create a new optimizer, since the old moments belong to the other adapter. Gradients are reset.

        Raises:
            InputError: no adapter has this name, the model is merged, or the adapter is disabled.
        """
        self.bank.activate(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from memory.

        Raises:
            InputError: no adapter has this name, or it is active.
        """
        self.bank.delete(adapter_name)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Combine adapters into a new one: z = sum_i w_i mean_j z_i^(j), and likewise the directly trained parameters.

        A directly trained parameter becomes phi_0 + sum_i w_i (phi_i - phi_0), where phi_0 is its value when the model
        was wrapped. Buffers, such as running means, are those of the first adapter. The weights [-1] negate an adapter,
        and [1 - a, a] interpolate between two.

        Args:
            adapters: names of adapters in memory.
            weights: one weight per adapter.
            adapter_name: name of the combination, which no adapter in memory has.

        Raises:
            InputError: a name is unknown or already used, the numbers of adapters and weights differ, a weight is NaN
                or infinite, the layers have scales, in which the weights of the model are not linear, or the outputs
                of the trained heads have other names or another order.
        """
        self.bank.add_weighted(adapters, weights, adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the base model, with its own head and label names.

        It is meant for forward passes: inside, adapters cannot be changed, saved or merged. A backward pass of an
        earlier forward pass must run before, since the weights that it needs are overwritten, which autograd reports;
        or after the context, if activations are checkpointed.

        Raises:
            InputError: the model is merged, or the adapter is disabled already.
        """
        return self.bank.disabled()

    # -- on disk and on the hub ---------------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, self_contained: bool | None = None
    ) -> None:
        """Write the active adapter: z, scales, the directly trained parameters, and the hash of the basis.

        PEFT writes all adapters; here each is written on its own, after `set_adapter`.

        A self-contained adapter contains its basis, in the subfolder `basis`. For any other adapter, `from_pretrained`
        looks for the basis in its present location, unless it gets another one. A warning is issued if the basis has
        none, because it is not saved and cannot be drawn again from a seed.

        Args:
            folder: must be absent or empty, unless `overwrite` is set.
            overwrite: replace an earlier adapter.
            self_contained: whether the basis is written, too; by default if it is sparse.

        Raises:
            InputError: the folder holds something else, or an earlier adapter and `overwrite` is not set, or the basis
                is read from inside the folder.
            TinyspanError: a parameter is NaN or infinite.
        """
        save_adapter(self, Path(folder), self_contained=self_contained, overwrite=overwrite)

    def push_to_hub(
        self,
        repository: str,
        *,
        self_contained: bool | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Adapter of tinyspan",
    ) -> str:
        """Upload the adapter, with a model card, to the Hugging Face hub, and return the commit.

        Args:
            repository: id of the repository, `user/name`; it is created if it does not exist.
            self_contained: whether the basis is uploaded, too; by default if it is sparse. Otherwise it must be on the
                hub already (`Basis.push_to_hub`), or generated from a seed.
            private: whether a new repository is private.
            token: access token with write permission; by default the token of the logged-in user.
            commit_message: message of the commit.

        Raises:
            InputError: users of the adapter could not get the basis, or the hub rejects the name or the token.
            TinyspanError: a parameter is NaN or infinite.
            StorageError: the hub cannot be reached.
        """
        return push_adapter(
            self,
            repository,
            self_contained=self_contained,
            private=private,
            token=token,
            commit_message=commit_message,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        name: str | Path,
        basis: Basis | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Wrap the base model, and load a saved adapter into it.

        Args:
            model: the base model, with the theta_0 with which the adapter was trained.
            name: a folder that `save_pretrained` wrote, or the id of a repository on the Hugging Face hub.
            basis: the adapter's basis; by default the one to which it refers.
            revision: branch, tag or commit of the repository.
            token: access token for a private repository, and for that of its basis.

        Raises:
            MismatchError: the adapter was trained with another model or another basis; the model is restored.
            InputError: the folder is not an adapter, or its basis is missing.
            StorageError: a file is damaged.
        """
        return load_pretrained(cls, model, name, basis, revision=revision, token=token)

"""The base model that a SubspaceModel wraps: theta_0, its weights in the blocks, and the names of its parameters.

Fingerprints distinguish one theta_0 from another.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.io.manifests import package_versions
from tinyspan.partition import Block, ParameterSpec, Partition
from tinyspan.sharding import local
from tinyspan.weights import require_loaded, require_plain, require_sound

__all__ = [
    "check_disjoint",
    "check_model",
    "describe_basis",
    "directly_trained_names",
    "fingerprint_of",
    "cached_fingerprint",
    "module_names",
    "require_same",
    "require_state",
    "select_weights",
    "state_identity",
]


def check_model(model: nn.Module, basis: Basis) -> None:
    """Check that a basis fits a model, as `SubspaceModel` would, without reading the basis's directions.

    Raises:
        MismatchError: a parameter or block differs.
        InputError: weights are half precision, NaN or infinite.
    """
    weights = select_weights(model, basis.partition, describe_basis(basis), basis.versions)
    if basis.fingerprint:
        require_same(basis.fingerprint, basis.partition.fingerprint(weights), describe_basis(basis))


def describe_basis(basis: Basis) -> str:
    """Return the description of a basis for messages."""
    return "the basis" if basis.location is None else f"the basis {basis.location}"


def select_weights(
    model: nn.Module, partition: Partition, what: str, versions: Mapping[str, str]
) -> dict[str, nn.Parameter]:
    """Return the weights in the blocks, in float32 where the partition has half precision.

    Raises:
        MismatchError: a parameter is absent or differs; the message contains the version of transformers that wrote it.
        InputError: weights are half precision, quantized, NaN, infinite or on the meta device.
    """
    _require_full_precision(model, partition)
    try:
        weights = partition.widened().select(model)
    except MismatchError as error:
        then, now = versions.get("transformers"), package_versions().get("transformers")
        advice = "load the base model it was made from, in the dtype expected here"
        if then is not None and then != now:
            advice += f"; it was written with transformers {then}, this is {now}, which may have renamed it"
        raise MismatchError(f"{what} was made for another model: {error}; {advice}") from error
    require_loaded(model.named_parameters())
    require_sound(weights)
    return weights


def _require_full_precision(model: nn.Module, partition: Partition) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in (spec.name for spec in partition.parameters() if spec.name in named):
        require_plain(name, named[name])
        if named[name].dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name!r} is {named[name].dtype}, in which steps inside a subspace round away; load the model in "
                "float32 (from_pretrained(..., dtype=torch.float32), or model.float()), and compute in bfloat16 with "
                "autocast"
            )


_cached: ContextVar[tuple[nn.Module, Mapping[str, str]] | None] = ContextVar("cached", default=None)


@contextmanager
def cached_fingerprint(model: nn.Module, fingerprint: Mapping[str, str]) -> Iterator[None]:
    """Return a context in which `fingerprint_of` returns this fingerprint for the model, so nothing is hashed twice."""
    token = _cached.set((model, fingerprint))
    try:
        yield
    finally:
        _cached.reset(token)


def fingerprint_of(
    model: nn.Module, partition: Partition, weights: Mapping[str, nn.Parameter], names: Sequence[str]
) -> dict[str, str]:
    """Compute the fingerprint of all that an adapter depends on: theta_0 of every block, and the frozen parameters.

    The frozen parameters are sorted by name, so the order in which a model lists its parameters does not matter.
    """
    if (cached := _cached.get()) is not None and cached[0] is model:
        return dict(cached[1])
    in_blocks, trained = {id(weight) for weight in weights.values()}, set(names)
    frozen = {
        name: parameter
        for name, parameter in sorted(model.named_parameters())
        if id(parameter) not in in_blocks and name not in trained
    }
    blocks = list(partition)
    if frozen:
        specs = tuple(ParameterSpec(name, tuple(local(value).shape), value.dtype) for name, value in frozen.items())
        blocks.append(Block("frozen parameters", specs))
    return Partition(tuple(blocks)).fingerprint({**weights, **frozen})


def require_same(expected: Mapping[str, str], actual: Mapping[str, str], what: str) -> None:
    """Check that the model has the theta_0 for which `what` was made, by the fingerprints of the blocks.

    Raises:
        MismatchError: the fingerprint of a block differs.
    """
    for block in dict.fromkeys([*expected, *actual]):
        if expected.get(block) != actual.get(block):
            raise MismatchError(
                f"{what} was made for another theta_0: the model differs in block {block!r} "
                f"(expected {str(expected.get(block))[:12]}..., found {str(actual.get(block))[:12]}...); "
                "load the base model it was made from, in the same dtype; if that was half precision, load it in half "
                "precision and convert it with model.float()"
            )


def state_identity(basis: Basis, arguments: Mapping[str, Any], fingerprint: Mapping[str, str]) -> Tensor:
    """Return the identity of the state of a SubspaceModel, one SHA-256 in each row.

    Args:
        basis: its hash is the first row.
        arguments: arguments of the SubspaceModel, in JSON types; their hash is the second row.
        fingerprint: see `fingerprint_of`; one row for each block.

    Returns:
        A tensor `[2 + number of blocks, 32]` of uint8, which safetensors and distributed checkpoints can save.
    """
    of_arguments = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    digests = [basis.content_hash(), of_arguments, *fingerprint.values()]
    return torch.tensor([list(bytes.fromhex(digest)) for digest in digests], dtype=torch.uint8)


def require_state(identity: Tensor, own: Tensor, blocks: Collection[str]) -> None:
    """Check that a state belongs to this SubspaceModel; both identities were returned by `state_identity`.

    Args:
        identity: identity of the state.
        own: identity of the model that loads the state.
        blocks: names of the blocks in the model's fingerprint, in its order.

    Raises:
        MismatchError: the identities differ.
    """
    parts = ["another basis", "other modules_to_save, ensemble or layer_scales"]
    parts += [f"another theta_0, in block {block!r}" for block in blocks]
    for part, theirs, ours in zip_longest(parts, identity.tolist(), own.tolist()):
        if theirs != ours:
            raise MismatchError(
                f"the state was saved with {part or 'other blocks'}: build the SubspaceModel with the base model, the "
                "basis and the arguments that it was trained with, or start a new training in another output folder"
            )


def module_names(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """Return the full names of the modules whose names end in one of the given names.

    Raises:
        InputError: a given name matches no module.
    """
    chosen: list[str] = []
    for wanted in modules_to_save:
        modules = [name for name, _ in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not modules:
            raise InputError(f"modules_to_save: no module is called {wanted!r}")
        chosen += modules
    return chosen


def directly_trained_names(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """Return the names of the parameters, without duplicates, in the modules whose names end in one of the given names.

    For a module that PEFT has wrapped, these are the parameters of the active adapter's copy; the original and the
    copies of other adapters are left out.
    """
    chosen = module_names(model, modules_to_save)
    idle = tuple(
        f"{name}.{inner}."
        for name, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
        for inner in ("original_module", *(f"modules_to_save.{adapter}" for adapter in module.modules_to_save))
        if inner.removeprefix("modules_to_save.") not in module.active_adapters
    )
    under = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(name.startswith(f"{module}.") for module in chosen) and not name.startswith(idle)
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in under]


def check_disjoint(model: nn.Module, names: Sequence[str], weights: Mapping[str, nn.Parameter]) -> None:
    """Check that no directly trained parameter lies in a block.

    Raises:
        InputError: a parameter is trained directly and lies in a block, too.
    """
    named, blocks = dict(model.named_parameters()), {id(weight) for weight in weights.values()}
    for name in names:
        if id(named[name]) in blocks:
            raise InputError(f"modules_to_save: {name!r} already lies in a block of the basis")

"""Import of LoRA adapters: reading them, and projecting them into a subspace."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError
from tinyspan.interop.lora.common import (
    PEFT_FILES,
    PREFIX,
    is_linear,
    peft_config,
    peft_labels,
    peft_package,
    peft_tensors,
    second_names,
)
from tinyspan.io.storage import reading
from tinyspan.labels import may_hold_head
from tinyspan.linalg import squared_norm
from tinyspan.maps.base import LinearMap
from tinyspan.model.state import AdapterState
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Block
from tinyspan.weights import tied_names

__all__ = ["Lora", "import_lora", "read_lora", "whole_updates"]

OWN_START = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base weights


@dataclass(frozen=True)
class Lora:
    """The weight updates of a LoRA adapter.

    Attributes:
        name: folder or repository of the adapter.
        factors: parameter name -> (L [m, r], R [r, n]) in float64: its update is dW = L R, in the weight's own shape.
            Weights that the adapter does not change are left out.
        directly_trained: parameter name -> value of a directly trained parameter: `modules_to_save`, and biases.
        modules: names of the modules of these parameters, except biases of linear layers.
        content_hash: SHA-256 of the tensors in the adapter's file, and of the scaling factors of B A.
        labels: names of the outputs of its head in their order, from `labels.json`; None if the folder has none.
    """

    name: str
    factors: dict[str, tuple[Tensor, Tensor]]
    directly_trained: dict[str, Tensor]
    modules: list[str]
    content_hash: str
    labels: tuple[str, ...] | None = None


def read_lora(model: nn.Module, name: str | Path, *, revision: str | None = None, token: str | None = None) -> Lora:
    """Read a LoRA adapter that PEFT saved, without modifying the model.

    Args:
        model: the base model, which determines the names and shapes of the weights.
        name: a folder, or the id of a repository on the Hugging Face hub.
        revision: branch, tag or commit of the repository.
        token: access token for a private repository.

    Raises:
        InputError: there is no such adapter, it changes nothing, or it does not only add B A to the weights of linear
            layers (DoRA, embeddings, an initialisation that changed the base weights, ...), or its shards were not
            gathered when it was saved.
        MismatchError: it was trained for another model.
        StorageError: a file is damaged, or the hub cannot be reached.
    """
    config, tensors = peft_config(name, revision, token), peft_tensors(name, revision, token)
    _require_lora(config, str(name))
    own = dict(model.named_modules())
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    directly_trained: dict[str, Tensor] = {}
    scalings: dict[str, float] = {}
    for key, value in tensors.items():
        owner, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not owner:
            directly_trained[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = value
        elif part not in ("A.weight", "B.weight") or owner not in own or not is_linear(own[owner]):
            what = "is in no linear layer of the model" if part in ("A.weight", "B.weight") else "is not part of B A"
            raise InputError(f"{name} cannot be read as an update of weights: {key!r} {what}")
        elif value.dim() != 2 or not value.numel():
            raise InputError(
                f"{name}: {key!r} has the shape {list(value.shape)}, expected a matrix; was it saved under DeepSpeed "
                "ZeRO-3 or FSDP without gathering its shards?"
            )
        elif part == "A.weight":
            scalings[owner] = _scaling(config, owner, len(value), str(name))
            b = tensors.get(f"{key.removesuffix('A.weight')}B.weight", value[:0, :0])
            left, right = b.double() * scalings[owner], value.double()
            if not isinstance(own[owner], nn.Linear) and not _is_parameter(config, f"{owner}.weight"):
                # the weight of a Conv1D is transposed
                left, right = right.T, left.T
            shape = tuple(own[owner].weight.shape)
            if (left.shape[0], right.shape[-1]) != shape or left.shape[1:] != right.shape[:1]:
                raise MismatchError(
                    f"{name} has no B A of shape {list(shape)} for {owner!r}; was it trained for another model?"
                )
            if left.any() and right.any():
                factors[f"{owner}.weight"] = (left, right)
    if not factors:
        raise InputError(f"{name} changes no weight of a linear layer: B or A is zero everywhere; was it trained?")
    second = second_names(model)
    for key in [key for key in directly_trained if {"original_module", "modules_to_save"} & set(key.split("."))]:
        del directly_trained[key]  # PEFT writes the biases inside its wrappers a second and third time
    held = model.state_dict() if second else {}
    of_two = [key for key in directly_trained if key in second and key in held]
    moved = {key for key in of_two if not torch.equal(directly_trained[key], held[key].cpu().to(directly_trained[key]))}
    alike = {
        key
        for key in moved
        if second[key] in moved and torch.equal(directly_trained[key], directly_trained[second[key]])
    }
    if tied := second.keys() & (factors.keys() | moved - alike):
        raise InputError(
            f"{name} changes {min(tied)!r}, which is tied to {second[min(tied)]!r}: PEFT changes one of the "
            "two, but an update of the weight would change both"
        )
    for key in tied_names(model).keys() & directly_trained.keys():
        del directly_trained[key]  # the same value is stored under its first name
    digest = hashlib.sha256(repr(sorted(scalings.items())).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    owners = dict.fromkeys(key.rpartition(".")[0] for key in directly_trained)
    modules = [owner for owner in owners if not _is_bias_only(own.get(owner), owner, directly_trained)]
    labels = peft_labels(name, revision, token)
    return Lora(str(name), factors, directly_trained, modules, digest.hexdigest(), labels)


def _is_parameter(config: Any, name: str) -> bool:
    """Whether PEFT treated this weight as a parameter (`target_parameters`), not as that of a linear layer."""
    wanted = getattr(config, "target_parameters", None) or ()
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def _require_lora(config: Any, name: str) -> None:
    """Check that the adapter is an update B A of weights, since the tensors of other kinds may look the same."""
    if not isinstance(config, peft_package().LoraConfig):
        raise InputError(f"{name} is an adapter of type {config.peft_type}, expected a LoRA")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(OWN_START):
        raise InputError(f"{name} started from {start!r}, which changed the base weights; convert it to a plain LoRA")
    for option, what in (
        ("alora_invocation_tokens", "is switched on by tokens of the text (aLoRA)"),
        ("layer_replication", "is of a model whose layers PEFT repeats"),
        ("trainable_token_indices", "trains rows of the embedding"),
    ):
        if getattr(config, option, None):
            raise InputError(f"{name} {what}, so it is not an update of the model's linear layers: {option} is set")


def _scaling(config: Any, owner: str, rank: int, name: str) -> float:
    """Return PEFT's scaling factor for B A of a module."""
    with reading(Path(name) / PEFT_FILES[0]):
        patterns = config.alpha_pattern or {}
        key = peft_package().utils.other.get_pattern_key(patterns.keys(), owner)
        return float(patterns.get(key, config.lora_alpha) / (rank**0.5 if config.use_rslora else rank))


def _is_bias_only(module: nn.Module | None, owner: str, directly_trained: Mapping[str, Tensor]) -> bool:
    """Whether only the bias of a module with a weight was saved, as with PEFT's option `bias`."""
    return f"{owner}.weight" not in directly_trained and getattr(module, "weight", None) is not None


@torch.no_grad()
def import_lora(subspace: SubspaceModel, lora: Lora, adapter_name: str) -> float:
    """Import a LoRA adapter under a name, as the nearest point in the subspace: z = V^T dtheta.

    `set_adapter` activates it; it can then be trained, saved, combined and exported like any other adapter. The
    adapter's directly trained parameters are part of dtheta if they lie in a block, and stay directly trained
    otherwise. The outputs of a head that it contains have the names in its `labels`; without names they are numbered.

    Args:
        subspace: any SubspaceModel whose basis is orthonormal. Directions in bfloat16 or int8 are orthonormal to about
            1 %, and z has an error of the same size.
        lora: see `read_lora`.
        adapter_name: a name that no adapter in memory has.

    Returns:
        The relative error `||dtheta - V z|| / ||dtheta||`, over all blocks.

    Raises:
        InputError: an adapter in memory has this name, the basis is not orthonormal, or a directly trained parameter of
            the adapter lies neither in a block nor in the subspace's `modules_to_save`.
        MismatchError: the adapter changes a weight outside the blocks, or a parameter has another shape.
    """
    subspace.bank.require_new(adapter_name)
    blocks = {spec.name for block in subspace.blocks for spec in block.parameters}
    if outside := lora.factors.keys() - blocks:
        raise MismatchError(f"{lora.name} changes {min(outside)!r}, which lies in no block of the basis")
    maps = [subspace.basis.maps[block.name] for block in subspace.blocks]
    if (kind := next((v.kind for v in maps if v.is_orthonormal is False), None)) is not None:
        raise InputError(f"the directions of a {kind} basis are not orthonormal; choose another basis")
    state, base = subspace.model.state_dict(), subspace.base_state()
    for name, value in lora.directly_trained.items():
        if name not in state:
            raise MismatchError(f"{lora.name} was trained for another model: this one has no {name!r}")
        is_stored = name in base.directly_trained or name in blocks
        if not is_stored and not torch.equal(value, state[name].cpu().to(value)):
            owner = name.rpartition(".")[0]
            way = (
                f"wrap the model with modules_to_save={lora.modules}"
                if owner in lora.modules
                else "use a basis that contains it"
            )
            raise InputError(f"{lora.name} trained {name!r} directly, which lies in no block; {way}")
    first = {} if blocks.isdisjoint(lora.directly_trained) else subspace.base_weights()
    factors = {
        **lora.factors,
        **whole_updates(
            {name: lora.directly_trained[name] for name in first.keys() & lora.directly_trained.keys()}, first
        ),
    }
    z, lost, total = {}, 0.0, 0.0
    for block, v, own in zip(subspace.blocks, maps, subspace.z, strict=True):
        nearest, missed, norm = _nearest(block, v, factors)
        z[block.name], lost, total = nearest.to(own).expand(own.shape).clone(), lost + missed, total + norm
    trained = {name: lora.directly_trained.get(name, value).to(value) for name, value in base.directly_trained.items()}
    subspace.bank.add(adapter_name, AdapterState(z, trained, base.scales), _labels(subspace, lora))
    return float((lost / total) ** 0.5) if total else 0.0


def _labels(subspace: SubspaceModel, lora: Lora) -> tuple[str, ...] | None:
    """Return the names of the outputs with a LoRA adapter: its own, or the base model's if it leaves the head alone."""
    has_head = may_hold_head(subspace.model, [*lora.directly_trained, *lora.factors])
    return lora.labels if has_head else subspace.bank.base_labels


def _nearest(block: Block, v: LinearMap, factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, float, float]:
    """Return z = V^T dtheta of a block in float64, and the squared norms of dtheta - V z and of dtheta."""
    v = v.converted(lambda tensor: tensor.cpu())
    spec = block.parameters[0]
    pair = factors.get(spec.name) if len(block.parameters) == 1 else None
    if pair is not None and len(pair[0]) == (*spec.shape, 1)[0]:  # factors of a matrix saved as a whole are flat
        z, missed = v.fit_product(*pair)
        return z, missed, squared_norm(*pair)
    update = torch.zeros(block.numel, dtype=torch.float64)
    for spec, start, stop in block.spans():
        if spec.name in factors:
            b, a = factors[spec.name]
            update[start:stop] = (b @ a).reshape(-1)
    z = v.rmatvec(update)
    return z, float((update - v.matvec(z)).square().sum()), float(update.square().sum())


def whole_updates(values: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the updates of directly trained parameters, without zero ones, as factors [D, 1] and [1, 1].

    Raises:
        MismatchError: a parameter has another shape.
    """
    updates = {}
    for name, value in values.items():
        if name in first and value.shape != first[name].shape:
            raise MismatchError(
                f"{name!r} has the shape {list(value.shape)} in the adapter and {list(first[name].shape)} in the "
                "model; was it trained for another model or task?"
            )
        moved = value.double() - first[name].detach().cpu().double() if name in first else value.double()
        if moved.any():
            updates[name] = (moved.reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64))
    return updates

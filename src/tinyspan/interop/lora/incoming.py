"""LoRA folders read, and taken into a subspace."""

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

OWN_START = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to initialise that change the base weights


@dataclass(frozen=True)
class Lora:
    """What a LoRA adapter does to the weights of a model.

    Attributes:
        name: the folder or repository it was read from.
        factors: parameter name -> (L [m, r], R [r, n]) in float64: its update is dW = L R, in the weight's own shape.
            Weights that it does not move are left out.
        ordinary: parameter name -> value of what was trained whole: `modules_to_save`, and biases.
        modules: names of the modules that hold these, biases of linear layers left out.
        content_hash: SHA-256 of its file's tensors, and of the numbers they are scaled by.
        labels: names of the outputs of its head in their order, from `labels.json`; None if the folder holds none.
    """

    name: str
    factors: dict[str, tuple[Tensor, Tensor]]
    ordinary: dict[str, Tensor]
    modules: list[str]
    content_hash: str
    labels: tuple[str, ...] | None = None


def read_lora(model: nn.Module, name: str | Path, *, revision: str | None = None, token: str | None = None) -> Lora:
    """Read a LoRA adapter that PEFT saved, without putting it into the model.

    Args:
        model: the base model, which gives the names and shapes of the weights.
        name: a folder, or the id of a repository on the Hugging Face hub.
        revision: branch, tag or commit of a repository.
        token: of a private one.

    Raises:
        InputError: there is no such adapter, it moves nothing, or it is none that adds B A to weights of linear layers
            (DoRA, embeddings, an initialisation that changed the base weights, ...).
        MismatchError: it was trained for another model.
        StorageError: a file is damaged, or the hub cannot be reached.
    """
    config, tensors = peft_config(name, revision, token), peft_tensors(name, revision, token)
    _refuse_kinds(config, str(name))
    own = dict(model.named_modules())
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    ordinary: dict[str, Tensor] = {}
    scalings: dict[str, float] = {}
    for key, value in tensors.items():
        owner, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not owner:
            ordinary[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = value
        elif part not in ("A.weight", "B.weight") or owner not in own or not is_linear(own[owner]):
            what = "is in no linear layer of the model" if part in ("A.weight", "B.weight") else "is none of B A"
            raise InputError(f"{name} cannot be read as an update of weights: {key!r} {what}")
        elif part == "A.weight":
            scalings[owner] = _scaling(config, owner, len(value), str(name))
            b = tensors.get(f"{key.removesuffix('A.weight')}B.weight", value[:0, :0])
            left, right = b.double() * scalings[owner], value.double()
            if not isinstance(own[owner], nn.Linear) and not _is_parameter(config, f"{owner}.weight"):
                # a Conv1D holds its weight the other way round
                left, right = right.T, left.T
            shape = tuple(own[owner].weight.shape)
            if (left.shape[0], right.shape[-1]) != shape or left.shape[1:] != right.shape[:1]:
                raise MismatchError(f"{name} has no B A of shape {list(shape)} for {owner!r}; is it of another model?")
            if left.any() and right.any():
                factors[f"{owner}.weight"] = (left, right)
    if not factors:
        raise InputError(f"{name} changes no weight of a linear layer: B or A is zero everywhere; was it trained?")
    second = second_names(model)
    for key in [key for key in ordinary if {"original_module", "modules_to_save"} & set(key.split("."))]:
        del ordinary[key]  # PEFT writes what `bias` finds inside its wrappers a second and third time
    held = model.state_dict() if second else {}
    of_two = [key for key in ordinary if key in second and key in held]
    moved = {key for key in of_two if not torch.equal(ordinary[key], held[key].cpu().to(ordinary[key]))}
    alike = {key for key in moved if second[key] in moved and torch.equal(ordinary[key], ordinary[second[key]])}
    if tied := second.keys() & (factors.keys() | moved - alike):
        raise InputError(
            f"{name} changes {min(tied)!r}, which is {second[min(tied)]!r} too: PEFT changes one of the "
            "two, an update of the weight would change both"
        )
    for key in tied_names(model).keys() & ordinary.keys():
        del ordinary[key]  # its first name has the same value
    digest = hashlib.sha256(repr(sorted(scalings.items())).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    owners = dict.fromkeys(key.rpartition(".")[0] for key in ordinary)
    modules = [owner for owner in owners if not _only_biased(own.get(owner), owner, ordinary)]
    labels = peft_labels(name, revision, token)
    return Lora(str(name), factors, ordinary, modules, digest.hexdigest(), labels)


def _is_parameter(config: Any, name: str) -> bool:
    """Whether PEFT took this weight for a parameter of its own, not for that of a linear layer."""
    wanted = getattr(config, "target_parameters", None) or ()
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def _refuse_kinds(config: Any, name: str) -> None:
    """Refuse what is no update B A of weights, though its tensors may look so."""
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
            raise InputError(f"{name} {what}, so it is no update of the model's linear layers: {option} is set")


def _scaling(config: Any, owner: str, rank: int, name: str) -> float:
    """Return what PEFT multiplies B A of a module by."""
    with reading(Path(name) / PEFT_FILES[0]):
        patterns = config.alpha_pattern or {}
        key = peft_package().utils.other.get_pattern_key(patterns.keys(), owner)
        return float(patterns.get(key, config.lora_alpha) / (rank**0.5 if config.use_rslora else rank))


def _only_biased(module: nn.Module | None, owner: str, ordinary: Mapping[str, Tensor]) -> bool:
    """Whether of a module only the bias was saved, and it has a weight too: PEFT's option `bias`."""
    return f"{owner}.weight" not in ordinary and getattr(module, "weight", None) is not None


@torch.no_grad()
def import_lora(subspace: SubspaceModel, lora: Lora, adapter_name: str) -> float:
    """Take a LoRA adapter into a subspace, under a name: z = V^T dtheta, the nearest point to it.

    `set_adapter` puts it to work; it can then be trained on, saved, combined and exported as any other. What the
    adapter holds whole is part of dtheta where it lies in a block, and else a directly trained parameter. The outputs
    of a head that it brings have the names in its `labels`, or else are numbered.

    Args:
        subspace: any, of a basis with orthonormal directions; in bfloat16 or int8 they are so to about 1 %, and z is
            off by as much.
        lora: see `read_lora`.
        adapter_name: no adapter in memory has it.

    Returns:
        What is lost, `||dtheta - V z|| / ||dtheta||`, over all blocks.

    Raises:
        InputError: the name is taken, the basis is not orthonormal, or the adapter holds something whole that lies
            neither in a block nor in the subspace's `modules_to_save`.
        MismatchError: the adapter changes a weight that lies in no block.
    """
    subspace.bank.require_new(adapter_name)
    blocks = {spec.name for block in subspace.blocks for spec in block.parameters}
    if outside := lora.factors.keys() - blocks:
        raise MismatchError(f"{lora.name} changes {min(outside)!r}, which lies in no block of the basis")
    maps = [subspace.basis.maps[block.name] for block in subspace.blocks]
    if (kind := next((v.kind for v in maps if v.is_orthonormal is False), None)) is not None:
        raise InputError(f"the directions of a {kind} basis are not orthonormal; choose another basis")
    state, base = subspace.model.state_dict(), subspace.base_state()
    for name, value in lora.ordinary.items():
        if name not in state:
            raise MismatchError(f"{lora.name} was trained for another model: this one has no {name!r}")
        kept = name in base.directly_trained or name in blocks
        if not kept and not torch.equal(value, state[name].cpu().to(value)):
            owner = name.rpartition(".")[0]
            way = (
                f"wrap the model with modules_to_save={lora.modules}" if owner in lora.modules else "take a basis of it"
            )
            raise InputError(f"{lora.name} holds {name!r}, trained whole, which lies in no block; {way}")
    first = {} if blocks.isdisjoint(lora.ordinary) else subspace.base_weights()
    factors = {
        **lora.factors,
        **whole_updates({name: lora.ordinary[name] for name in first.keys() & lora.ordinary.keys()}, first),
    }
    z, lost, total = {}, 0.0, 0.0
    for block, v, own in zip(subspace.blocks, maps, subspace.z, strict=True):
        nearest, missed, norm = _nearest(block, v, factors)
        z[block.name], lost, total = nearest.to(own).expand(own.shape).clone(), lost + missed, total + norm
    trained = {name: lora.ordinary.get(name, value).to(value) for name, value in base.directly_trained.items()}
    subspace.bank.add(adapter_name, AdapterState(z, trained, base.scales), _labels(subspace, lora))
    return float((lost / total) ** 0.5) if total else 0.0


def _labels(subspace: SubspaceModel, lora: Lora) -> tuple[str, ...] | None:
    """Return the names of the outputs with a LoRA adapter: its own, or the base model's if it leaves the head alone."""
    has_head = may_hold_head(subspace.model, [*lora.ordinary, *lora.factors])
    return lora.labels if has_head else subspace.bank.base_labels


def _nearest(block: Block, v: LinearMap, factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, float, float]:
    """Return z = V^T dtheta of a block in float64, and the squared norms of dtheta - V z and of dtheta."""
    v = v.converted(lambda tensor: tensor.cpu())
    if len(block.parameters) == 1 and (pair := factors.get(block.parameters[0].name)) is not None:
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
    """Return the updates of what was trained whole, where there is one, as matrices of one column, times 1."""
    found = {}
    for name, value in values.items():
        moved = value.double() - first[name].detach().cpu().double() if name in first else value.double()
        if moved.any():
            found[name] = (moved.reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64))
    return found

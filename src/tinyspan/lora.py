"""LoRA adapters in PEFT's format: out of a subspace, into one, and the basis that many of them share."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.adapters import module_names, select_weights
from tinyspan.basis import Basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.fastfood import FastfoodMap
from tinyspan.hub import fetched
from tinyspan.maps import KroneckerMap, LinearMap
from tinyspan.partition import Block, ParameterSpec, Partition
from tinyspan.storage import finite, reading, write_tensors, writing
from tinyspan.subspace import SubspaceModel, _owner
from tinyspan.svd import CUTOFF, right_singular_vectors
from tinyspan.trained import Trained
from tinyspan.trajectory import model_name

__all__ = [
    "Exported",
    "Lora",
    "Sharing",
    "export_lora",
    "import_lora",
    "lora_basis",
    "peft_config",
    "peft_tensors",
    "read_lora",
    "sharing",
]

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of every name in PEFT's files
OWN_START = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to initialise that change the base weights


@dataclass(frozen=True)
class Exported:
    """What an export kept.

    Attributes:
        error: `|dW - B A| / |dW|`, Frobenius norms over all linear layers together.
        ranks: module -> rank of its B A.
        numbers: how many the folder holds.
    """

    error: float
    ranks: dict[str, int]
    numbers: int


@torch.no_grad()
def export_lora(
    subspace: SubspaceModel, folder: str | Path, *, rank: int | None = None, error: float | None = None
) -> Exported:
    """Write the adapter at work as a LoRA folder, which `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    The update dW = (V z) of each linear layer's weight becomes B A, its singular value decomposition cut to a rank, the
    best one of this rank (Eckart and Young). Biases travel as PEFT's `bias="all"`; norms, and what was trained in the
    ordinary way, as its `modules_to_save`: they are whole, whatever the rank.

    Args:
        subspace: with its z.
        folder: new or empty.
        rank: of every B A; this, or `error`, or neither for the whole rank.
        error: instead of a rank: the smallest ranks with `|dW - B A| <= error |dW|` in every layer (Frobenius norm).

    Returns:
        What was kept; a cut costs accuracy, so score the result.

    Raises:
        InputError: both cuts are given or one is out of range, the folder is not empty, or PEFT cannot take over what
            has moved: a parameter that is neither of a linear layer nor of a module without children, one that is tied,
            or those of an adapter of PEFT.
    """
    peft = _peft()
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something already; choose another folder for the export")
    _check_cut(rank, error)
    if isinstance(subspace.model, peft.PeftModel):
        raise InputError("this is a subspace of a PEFT adapter already: subspace.merge().save_pretrained(folder)")
    subspace.refresh()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    saved: list[str] = []
    missed, total = 0.0, 0.0
    named = dict(subspace.model.named_modules())
    updates = subspace.update()
    for name, update in updates.items():
        owner, _, kind = name.rpartition(".")
        module = named[owner]
        if _is_linear(module) and kind == "weight":
            if not update.any():
                continue
            transposed = not isinstance(module, nn.Linear)
            b, a, lost = _factors(update.T if transposed else update, rank, error)
            tensors[f"{PREFIX}{owner}.lora_A.weight"], tensors[f"{PREFIX}{owner}.lora_B.weight"] = a, b
            ranks[owner], missed, total = len(a), missed + lost, total + float(update.double().square().sum())
        elif not _is_linear(module) and not any(module.children()):
            saved.append(owner)
        elif not (_is_linear(module) and kind == "bias"):
            raise InputError(f"{name!r} is no weight that a LoRA can carry; export a merged model: subspace.merge()")
    if not ranks:
        raise InputError("no linear layer has moved, so there is no LoRA of the update; was z trained?")
    for name, value in subspace._ordinary_tensors().items():  # running means and the like, wherever they are
        if name not in subspace._ordinary and not torch.equal(value, subspace._first[name].to(value)):
            saved.append(name.rpartition(".")[0])
    saved = [*dict.fromkeys(saved), *module_names(subspace.model, subspace.modules_to_save)]
    second, inside = _second_names(subspace.model), tuple(f"{module}." for module in saved)
    if tied := [name for name in second if name in updates or name.startswith(inside)]:
        raise InputError(
            f"{tied[0]!r} is {second[tied[0]]!r} too, and PEFT would change one of them alone: export a merged model, "
            "subspace.merge(), or a delta, tinyspan.deltas.export_delta"
        )
    state = subspace.model.state_dict()
    tensors |= {f"{PREFIX}{name}": value for name, value in state.items() if name.startswith(inside)}
    for owner in ranks:
        if getattr(named[owner], "bias", None) is not None:
            tensors[f"{PREFIX}{owner}.base_layer.bias"] = state[f"{owner}.bias"]
    for name in updates:  # biases of linear layers whose weights rest
        owner, _, kind = name.rpartition(".")
        if kind == "bias" and _is_linear(named[owner]) and owner not in ranks:
            tensors[f"{PREFIX}{name}"] = state[name]
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern={f"^{re.escape(owner)}": r for owner, r in ranks.items()},  # from its start: no suffix of another
        alpha_pattern={f"^{re.escape(owner)}": r for owner, r in ranks.items()},
        target_modules="|".join(re.escape(owner) for owner in ranks),
        modules_to_save=saved or None,
        bias="all",
        fan_in_fan_out=any(not isinstance(named[owner], nn.Linear) for owner in ranks),
        base_model_name_or_path=model_name(subspace.model),
        inference_mode=True,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "adapter_model.safetensors", tensors)
        config.save_pretrained(str(folder))
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return Exported((missed / total) ** 0.5, ranks, numbers)


def _factors(update: Tensor, rank: int | None, error: float | None) -> tuple[Tensor, Tensor, float]:
    """Return B [out, r], A [r, in], and the squared norm of what the cut leaves out."""
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    tail = values.square().flip(0).cumsum(0).flip(0)  # what is lost by keeping the first i, at i
    if error is not None:
        r = max(1, int((tail > error**2 * tail[0]).sum()))
    else:
        r = min(rank or len(values), max(1, int((values > values[0] * 1e-7).sum())))  # float32 has no more digits
    lost = float(tail[r]) if r < len(values) else 0.0
    root = values[:r].sqrt()
    b, a = (left[:, :r] * root).to(update.dtype), (root[:, None] * right[:r]).to(update.dtype)
    return b.contiguous(), a.contiguous(), lost


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


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
    """

    name: str
    factors: dict[str, tuple[Tensor, Tensor]]
    ordinary: dict[str, Tensor]
    modules: list[str]
    content_hash: str


def peft_config(name: str | Path, revision: str | None = None, token: str | None = None) -> Any:
    """Return the configuration of an adapter that PEFT saved; see `read_lora`."""
    peft = _peft()
    config, _ = _peft_files(name, revision, token)
    with reading(config):
        return peft.PeftConfig.from_pretrained(str(config.parent))


def peft_tensors(name: str | Path, revision: str | None = None, token: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of an adapter that PEFT saved, by the names in its file; see `read_lora`."""
    peft = _peft()
    _, weights = _peft_files(name, revision, token)
    with reading(weights):
        try:
            tensors: dict[str, Tensor] = peft.utils.load_peft_weights(str(weights.parent), device="cpu")
        except UnpicklingError as error:
            raise ValueError(str(error)) from error
        sick = next((key for key, value in tensors.items() if not finite(value)), None)
        if sick is not None:
            raise ValueError(f"{sick} holds NaN or infinite numbers")
    return tensors


def _peft_files(name: str | Path, revision: str | None, token: str | None) -> tuple[Path, Path]:
    """Return where an adapter's configuration and its weights lie."""
    folder = fetched(name, revision, token, PEFT_FILES)
    files = [folder / file for file in PEFT_FILES if (folder / file).is_file()]
    if len(files) < 2 or files[0].name != PEFT_FILES[0]:
        raise InputError(f"{name} is no adapter of PEFT: it needs {PEFT_FILES[0]} and {PEFT_FILES[1]}")
    return files[0], files[1]


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
        elif part not in ("A.weight", "B.weight") or owner not in own or not _is_linear(own[owner]):
            what = "is in no linear layer of the model" if part in ("A.weight", "B.weight") else "is none of B A"
            raise InputError(f"{name} cannot be read as an update of weights: {key!r} {what}")
        elif part == "A.weight":
            scalings[owner] = _scaling(config, owner, len(value), str(name))
            b = tensors.get(f"{key.removesuffix('A.weight')}B.weight", value[:0, :0])
            left, right = b.double() * scalings[owner], value.double()
            if not isinstance(own[owner], nn.Linear):  # a Conv1D holds its weight the other way round
                left, right = right.T, left.T
            shape = tuple(own[owner].weight.shape)
            if (left.shape[0], right.shape[-1]) != shape or left.shape[1:] != right.shape[:1]:
                raise MismatchError(f"{name} has no B A of shape {list(shape)} for {owner!r}; is it of another model?")
            if left.any() and right.any():
                factors[f"{owner}.weight"] = (left, right)
    if not factors:
        raise InputError(f"{name} changes no weight of a linear layer: B or A is zero everywhere; was it trained?")
    second = _second_names(model)
    if tied := second.keys() & factors.keys():
        raise InputError(
            f"{name} changes {min(tied)!r}, which is {second[min(tied)]!r} too: PEFT changes one of the "
            "two, an update of the weight would change both"
        )
    for key in [key for key in ordinary if {"original_module", "modules_to_save"} & set(key.split("."))]:
        del ordinary[key]  # PEFT writes what `bias` finds inside its wrappers a second and third time
    digest = hashlib.sha256(repr(sorted(scalings.items())).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    owners = dict.fromkeys(key.rpartition(".")[0] for key in ordinary)
    modules = [owner for owner in owners if not _only_biased(own.get(owner), owner, ordinary)]
    return Lora(str(name), factors, ordinary, modules, digest.hexdigest())


def lora_basis(
    model: nn.Module, loras: Sequence[Lora], *, rank: int | None = None, error: float | None = None
) -> Basis:
    """Return the basis that LoRA adapters of one model share: one block per weight, V = L (x) R^T.

    For each weight, L [m, p] holds the leading left singular vectors of the updates side by side, [u_1 .. u_T], where
    u_i = dW_i / ||dW_i||, and R [q, n] the leading right ones of the updates one below the other (the higher-order
    singular value decomposition, De Lathauwer et al. 2000). What an adapter needs in this basis is Z = L^T dW R^T, p q
    numbers a weight: see `import_lora`. No dW is made: LoRA's factors are enough.

    With neither `rank` nor `error` nothing is lost but singular values below 1e-6 of the largest; p and q are then the
    sum of the adapters' ranks, or the whole side. The basis does not depend on how an adapter splits dW into B and A,
    nor on how large one is beside another. Biases that were trained are weights [m, 1].

    Args:
        model: the base model, which becomes theta_0.
        loras: see `read_lora`.
        rank: the most columns of L, and rows of R; this, or `error`.
        error: instead: as few as keep ||dW_i - V Z_i||^2 / ||dW_i||^2, in the mean over the adapters, below the square
            of this in every weight.

    Raises:
        InputError: there is no adapter, both cuts are given, or one is out of range, or the model follows a subspace.
        MismatchError: a weight is not in the model.

    Example:
        >>> import tempfile, peft
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
        >>> config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> folder = tempfile.mkdtemp()
        >>> peft.get_peft_model(model, config).save_pretrained(folder)
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
        >>> basis = lora_basis(base, [read_lora(base, folder)])
        >>> basis.ranks
        {'0.weight': 4}
    """
    if not loras:
        raise InputError("a basis of LoRA adapters needs at least one of them")
    _check_cut(rank, error)
    if _owner(model) is not None:
        raise InputError("the model follows a SubspaceModel, so its weights are not theta_0; load the base model anew")
    own = dict(model.named_parameters())
    by_weight: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for lora in loras:
        biases = {key: value for key, value in lora.ordinary.items() if key.rpartition(".")[0] not in lora.modules}
        for name, pair in {**lora.factors, **_whole(biases, own)}.items():
            by_weight.setdefault(name, []).append(_normalized(*pair))
    if absent := by_weight.keys() - own.keys():
        raise MismatchError(f"the adapters were read for another model: this one has no parameter {min(absent)!r}")
    maps: dict[str, LinearMap] = {}
    spectrum = {}
    for name, factors in by_weight.items():
        columns, spectrum[name] = _span([_balanced(left, right) for left, right in factors], rank, error, name)
        rows, _ = _span([_balanced(right.T, left.T) for left, right in factors], rank, error, name)
        maps[name] = KroneckerMap(columns.T.contiguous(), rows)
    specs = [ParameterSpec(name, tuple(own[name].shape), own[name].dtype) for name in own if name in maps]
    partition = Partition(tuple(Block(spec.name, (spec,)) for spec in specs))
    weights = select_weights(model, partition, "the basis", {})
    return Basis(
        partition,
        maps,
        spectrum=spectrum,
        fingerprint=partition.fingerprint(weights),
        construction={"constructor": "lora", "rank": rank, "error": error},
        parents=[lora.content_hash for lora in loras],
        model_name=model_name(model),
    )


@torch.no_grad()
def import_lora(subspace: SubspaceModel, lora: Lora, adapter_name: str) -> float:
    """Take a LoRA adapter into a subspace, under a name: z = V^T dtheta, the nearest point to it.

    `set_adapter` puts it to work; it can then be trained on, saved, combined and exported as any other. What the
    adapter holds whole is part of dtheta where it lies in a block, and else an ordinary parameter.

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
    subspace._require_new(adapter_name)
    blocks = {spec.name for block in subspace.blocks for spec in block.parameters}
    if outside := lora.factors.keys() - blocks:
        raise MismatchError(f"{lora.name} changes {min(outside)!r}, which lies in no block of the basis")
    if any(isinstance(moving.v, FastfoodMap) for moving in subspace._moving):
        raise InputError("the directions of a fastfood basis are not orthonormal; choose another basis")
    state, trained_beside = subspace.model.state_dict(), subspace._first.keys()
    for name, value in lora.ordinary.items():
        if name not in state:
            raise MismatchError(f"{lora.name} was trained for another model: this one has no {name!r}")
        kept = name in trained_beside or name in blocks
        if not kept and not torch.equal(value, state[name].cpu().to(value)):
            owner = name.rpartition(".")[0]
            way = (
                f"wrap the model with modules_to_save={lora.modules}" if owner in lora.modules else "take a basis of it"
            )
            raise InputError(f"{lora.name} holds {name!r}, trained whole, which lies in no block; {way}")
    first = {} if blocks.isdisjoint(lora.ordinary) else subspace.start()
    factors = {
        **lora.factors,
        **_whole({name: lora.ordinary[name] for name in first.keys() & lora.ordinary.keys()}, first),
    }
    z, lost, total = {}, 0.0, 0.0
    for moving, own in zip(subspace._moving, subspace.z, strict=True):
        found, missed, norm = _nearest(moving.block, moving.v, factors)
        z[moving.block.name], lost, total = found.to(own).expand(own.shape).clone(), lost + missed, total + norm
    ordinary = {name: lora.ordinary.get(name, value).to(value) for name, value in subspace._first.items()}
    scales = None if subspace.scales is None else torch.ones_like(subspace.scales)
    trained = Trained(z, ordinary, scales)
    subspace._require_fit(trained)
    subspace._adapters[adapter_name] = trained
    return float((lost / total) ** 0.5) if total else 0.0


@dataclass(frozen=True)
class Sharing:
    """What the updates of linear layers have in common, over LoRA adapters.

    Attributes:
        mean_share: ||mean_i u_i||^2 with u_i = dW_i / ||dW_i|| over all weights, the mean of all cosines between two
            adapters, or one and itself: 1 / T if no two have anything in common, 1 if they are all alike.
        without: per adapter, ||dW_i - mean_j dW_j|| / ||dW_i||: the error of the mean in its place.
        unseen: per adapter, ||dW_i - V V^T dW_i|| / ||dW_i||, where V is the whole basis of the others; nearly 1 if
            they say nothing about it.
        chance: what `unseen` would be for a random update: sqrt(1 - p q / (m n)), in the mean square over weights.
    """

    mean_share: float
    without: list[float]
    unseen: list[float]
    chance: float


def sharing(loras: Sequence[Lora]) -> Sharing:
    """Measure how much LoRA adapters have in common: their mean, and whether the others' basis holds each of them.

    A basis of T adapters always holds those T. Whether it holds another one is the question.

    Raises:
        InputError: there are fewer than two.
    """
    if len(loras) < 2:
        raise InputError("what adapters share can only be told of two or more")
    products = torch.tensor([[_inner(one, other) for other in loras] for one in loras], dtype=torch.float64)
    squares = products.diagonal()
    off = (squares - 2 * products.mean(1) + products.mean()).clamp(min=0)
    held, expected = torch.zeros(len(loras)).double(), torch.zeros(len(loras)).double()
    for name in dict.fromkeys(name for lora in loras for name in lora.factors):
        whose = [index for index, lora in enumerate(loras) if name in lora.factors]
        factors = [loras[index].factors[name] for index in whose]
        lefts = _seen_by_others([left for left, _ in factors])
        rights = _seen_by_others([right.T for _, right in factors])
        for index, (left, right), inside, beside in zip(whose, factors, lefts, rights, strict=True):
            held[index] += (inside * beside).sum()
            ranks = sum(other.shape[1] for other, _ in factors) - left.shape[1]
            share = min(ranks, len(left)) * min(ranks, right.shape[1]) / (len(left) * right.shape[1])
            expected[index] += share * _squared(left, right)
    return Sharing(
        mean_share=float((products / (squares[:, None] * squares).sqrt()).mean()),
        without=(off / squares).sqrt().tolist(),
        unseen=(1 - held / squares).clamp(min=0).sqrt().tolist(),
        chance=float((1 - expected / squares).mean().clamp(min=0).sqrt()),
    )


def _seen_by_others(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return X_i^T P_i X_i for every part X_i [m, r], where P_i projects onto the columns of all other parts.

    With X_i = Q_i S_i, and G the Gram matrix of all Q side by side, what the others do not see is the Schur complement
    ((G + d)^-1)_ii^-1 - d: one inverse for all i. The ridge d keeps it defined where the parts depend on each other.
    """
    ridge = 1e-10
    bases, triangles = zip(*(torch.linalg.qr(part) for part in parts), strict=True)
    stacked = torch.cat(bases, 1)
    inverse = torch.linalg.inv(stacked.T @ stacked + ridge * torch.eye(stacked.shape[1], dtype=stacked.dtype))
    found, start = [], 0
    for basis, triangle in zip(bases, triangles, strict=True):
        one = torch.eye(basis.shape[1], dtype=stacked.dtype)
        own = slice(start, start := start + basis.shape[1])
        found.append(triangle.T @ (one - torch.linalg.inv(inverse[own, own]) + ridge * one) @ triangle)
    return found


def _nearest(block: Block, v: LinearMap, factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, float, float]:
    """Return z = V^T dtheta of a block in float64, and the squared norms of dtheta - V z and of dtheta."""
    if isinstance(v, KroneckerMap):
        left, right = (tensor.double().cpu() for tensor in (v.left, v.right))
        if block.name not in factors:
            return torch.zeros(v.rank, dtype=torch.float64), 0.0, 0.0
        b, a = factors[block.name]
        inner, outer = left.T @ b, a @ right.T
        off, beside = b - left @ inner, a - outer @ right  # b a - left z right = off a + left inner beside, orthogonal
        return (inner @ outer).reshape(-1), _squared(off, a) + _squared(inner, beside), _squared(b, a)
    update = torch.zeros(block.numel, dtype=torch.float64)
    for spec, start, stop in block.spans():
        if spec.name in factors:
            b, a = factors[spec.name]
            update[start:stop] = (b @ a).reshape(-1)
    v = v.converted(lambda tensor: tensor.cpu())
    z = v.project(update)
    return z, float((update - v.expand(z)).square().sum()), float(update.square().sum())


def _whole(values: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the updates of what was trained whole, where there is one, as matrices of one column, times 1."""
    found = {}
    for name, value in values.items():
        moved = value.double() - first[name].detach().cpu().double() if name in first else value.double()
        if moved.any():
            found[name] = (moved.reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64))
    return found


def _normalized(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of L R / ||L R||."""
    left = left / left.norm()
    right = right / right.norm()
    return left / max(_squared(left, right) ** 0.5, torch.finfo(torch.float64).tiny), right


def _balanced(left: Tensor, right: Tensor) -> Tensor:
    """Return [m, r] with the left singular vectors and values of L R."""
    triangle: Tensor = torch.linalg.qr(right.T, mode="r").R
    return left @ triangle.T


def _span(parts: Sequence[Tensor], rank: int | None, error: float | None, name: str) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors of the parts side by side, as rows [p, m], and all singular values.

    An error bound is shared with the other side of the weight: half of its square for each.
    """
    rows = torch.cat(list(parts), 1).T
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R  # the same singular values and right singular vectors

    def keep(values: Tensor) -> int:
        sound = int((values > CUTOFF * values[0]).sum())
        if error is not None:
            tail = values.square().flip(0).cumsum(0).flip(0)  # what is lost by keeping the first i, at i
            sound = min(sound, int((tail > error**2 / 2 * tail[0]).sum()))
        return max(1, min(sound, rank or sound))

    values, vectors = right_singular_vectors(lambda: iter([rows]), rows.shape[1], keep, torch.float32, name)
    return vectors, values


def _inner(one: Lora, other: Lora) -> float:
    """Return the sum over all weights of <dW, dW'> = <L^T L', R R'^T>."""
    total = 0.0
    for name in one.factors.keys() & other.factors.keys():
        (left, right), (second, turned) = one.factors[name], other.factors[name]
        total += float(((left.T @ second) * (right @ turned.T)).sum())
    return total


def _squared(left: Tensor, right: Tensor) -> float:
    """Return ||L R||^2 = <L^T L, R R^T>."""
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def _refuse_kinds(config: Any, name: str) -> None:
    """Refuse what is no update B A of weights, though its tensors may look so."""
    if not isinstance(config, _peft().LoraConfig):
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
        key = _peft().utils.other.get_pattern_key(patterns.keys(), owner)
        return float(patterns.get(key, config.lora_alpha) / (rank**0.5 if config.use_rslora else rank))


def _only_biased(module: nn.Module | None, owner: str, ordinary: Mapping[str, Tensor]) -> bool:
    """Whether of a module only the bias was saved, and it has a weight too: PEFT's option `bias`."""
    return f"{owner}.weight" not in ordinary and getattr(module, "weight", None) is not None


def _second_names(model: nn.Module) -> dict[str, str]:
    """Return for every name of a parameter that has several, another one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: next(n for n in alike if n != name) for alike in names.values() if len(alike) > 1 for name in alike}


def _check_cut(rank: int | None, error: float | None) -> None:
    if None not in (rank, error) or (rank is not None and rank < 1) or not 0 <= (error or 0.0) < 1:
        raise InputError(f"give a rank of at least 1, or an error from 0 to below 1; got {rank} and {error}")


def _peft() -> Any:
    """Import PEFT, which only this module needs."""
    try:
        import peft
    except ImportError as error:
        raise InputError("adapters of PEFT need the package peft: pip install 'tinyspan[peft]'") from error
    return peft

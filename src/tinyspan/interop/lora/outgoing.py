"""Export of an adapter to a LoRA folder."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError
from tinyspan.interop.lora.common import LABELS, PREFIX, check_cut, is_linear, peft_package, second_names
from tinyspan.io.storage import replacing_folder
from tinyspan.io.tensors import write_tensors
from tinyspan.labels import label_names
from tinyspan.model.base import module_names
from tinyspan.model.subspace import SubspaceModel
from tinyspan.trajectories.trajectory import model_name

__all__ = ["Exported", "export_lora"]


@dataclass(frozen=True)
class Exported:
    """Report of an export.

    Attributes:
        error: `|dW - B A| / |dW|`, Frobenius norms over all linear layers together.
        ranks: module -> rank of its B A.
        numbers: number of values in the folder.
    """

    error: float
    ranks: dict[str, int]
    numbers: int


@torch.no_grad()
def export_lora(
    subspace: SubspaceModel, folder: str | Path, *, rank: int | None = None, error: float | None = None
) -> Exported:
    """Write the active adapter as a LoRA folder, which `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    The update dW = (V z) of each linear layer's weight becomes B A, its truncated singular value decomposition, which
    is the best approximation of this rank (Eckart and Young). Biases are stored as with PEFT's `bias="all"`; norms and
    directly trained parameters are stored completely, whatever the rank, as its `modules_to_save`. PEFT's files do not
    contain label names, so the names of a classifier's labels are written as a list to `labels.json`. With
    `id2label=dict(enumerate(names))`, transformers loads the base model with a head of this size and these names.

    Args:
        subspace: the model with the adapter.
        folder: new or empty.
        rank: rank of every B A; give this, or `error`, or neither for the full rank.
        error: instead of a rank: the smallest ranks with `|dW - B A| <= error |dW|` in every layer (Frobenius norm).

    Returns:
        Errors, ranks and size. A truncation costs accuracy, so score the result.

    Raises:
        InputError: both rank and error are given or one is out of range, the folder is not empty, the adapter is
            disabled, or PEFT cannot represent the changes: a parameter that belongs neither to a linear layer nor to a
            module without children, a model that is a single linear layer, a tied parameter, the output projection of
            torch's MultiheadAttention, parameters of a PEFT adapter, or a module whose name PEFT would match with
            another's.
    """
    peft = peft_package()
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose another folder for the export")
    check_cut(rank, error)
    if isinstance(subspace.model, peft.PeftModel):
        raise InputError("the wrapped model is already a PEFT adapter: subspace.merge().save_pretrained(folder)")
    trained, base = subspace.get_state().directly_trained, subspace.base_state().directly_trained
    subspace.refresh()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    saved: list[str] = []
    missed, total = 0.0, 0.0
    named = dict(subspace.model.named_modules())
    updates = subspace.delta()
    # Checked here, before the decompositions, and again below with all modules that PEFT would save
    _require_untied(subspace.model, updates, module_names(subspace.model, subspace.modules_to_save))
    for name, update in updates.items():
        owner, _, kind = name.rpartition(".")
        module = named[owner]
        if is_linear(module) and kind == "weight" and owner:
            if not update.any():
                continue
            if isinstance(named[owner.rpartition(".")[0]], nn.MultiheadAttention):
                raise InputError(
                    f"{owner!r} is part of torch's MultiheadAttention, which bypasses a LoRA there; export a merged "
                    "model: subspace.merge()"
                )
            transposed = not isinstance(module, nn.Linear)
            b, a, lost = _factors(update.T if transposed else update, rank, error)
            tensors[f"{PREFIX}{owner}.lora_A.weight"], tensors[f"{PREFIX}{owner}.lora_B.weight"] = a, b
            ranks[owner], missed, total = len(a), missed + lost, total + float(update.double().square().sum())
        elif not is_linear(module) and not any(module.children()):
            saved.append(owner)
        elif not (is_linear(module) and kind == "bias"):
            raise InputError(f"a LoRA cannot represent {name!r}; export a merged model: subspace.merge()")
    if not ranks:
        raise InputError("no linear layer has changed, so there is no LoRA of the update; was z trained?")
    directly = subspace.directly_trained()
    for name, value in trained.items():  # buffers, such as running means, in any module
        if name not in directly and not torch.equal(value, base[name].to(value)):
            saved.append(name.rpartition(".")[0])
    saved = _outermost([*saved, *module_names(subspace.model, subspace.modules_to_save)])
    wrapped = _saved_by_peft(subspace.model, saved, ranks)
    _require_untied(subspace.model, updates, wrapped)
    inside = tuple(f"{module}." for module in wrapped)
    state = subspace.model.state_dict()
    tensors |= {f"{PREFIX}{name}": value for name, value in state.items() if name.startswith(inside)}
    for owner in ranks:
        if getattr(named[owner], "bias", None) is not None:
            tensors[f"{PREFIX}{owner}.base_layer.bias"] = state[f"{owner}.bias"]
    for name in updates:  # biases of linear layers whose weights have not changed
        owner, _, kind = name.rpartition(".")
        if kind == "bias" and is_linear(named[owner]) and owner not in ranks:
            tensors[f"{PREFIX}{name}"] = state[name]
    kind_of_model = type(subspace.model)
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern={f"^{re.escape(owner)}": r for owner, r in ranks.items()},  # "^": not the end of another name
        alpha_pattern={f"^{re.escape(owner)}": r for owner, r in ranks.items()},
        target_modules="|".join(re.escape(owner) for owner in ranks),
        modules_to_save=saved or None,
        bias="all",
        fan_in_fan_out=any(not isinstance(named[owner], nn.Linear) for owner in ranks),
        base_model_name_or_path=model_name(subspace.model),
        inference_mode=True,
        auto_mapping={"base_model_class": kind_of_model.__name__, "parent_library": kind_of_model.__module__},
    )
    with replacing_folder(folder) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", tensors)
        config.save_pretrained(str(temporary))
        if names := label_names(subspace.model):
            (temporary / LABELS).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return Exported((missed / total) ** 0.5, ranks, numbers)


def _outermost(modules: Sequence[str]) -> list[str]:
    """Return the modules that lie in no other one of them."""
    return [name for name in dict.fromkeys(modules) if not any(name.startswith(f"{other}.") for other in modules)]


def _saved_by_peft(model: nn.Module, saved: Sequence[str], ranks: Collection[str]) -> list[str]:
    """Return all modules that PEFT saves for these names: it compares only the ends of module names.

    Raises:
        InputError: one of them is the model itself, lies in another one, or contains or lies in a layer with a LoRA.
    """
    if "" in saved:
        raise InputError("a buffer of the model itself has changed, which PEFT cannot save; export a merged model")
    matches = [name for name, _ in model.named_modules() if name.endswith(tuple(saved))] if saved else []
    meeting = [(one, other) for one in matches for other in (*matches, *ranks) if other.startswith(f"{one}.")]
    meeting += [(one, other) for one in matches for other in ranks if one == other or one.startswith(f"{other}.")]
    if meeting:
        raise InputError(
            f"PEFT, which identifies the modules to save by the ends of their names, {list(saved)}, would save "
            f"{meeting[0][0]!r} completely, and {meeting[0][1]!r} too; export a merged model: subspace.merge()"
        )
    return matches


def _require_untied(model: nn.Module, updates: Collection[str], saved: Sequence[str]) -> None:
    """Check that no weight that changes is tied under a second name.

    Raises:
        InputError: a weight that changes has a second name.
    """
    second, inside = second_names(model), tuple(f"{module}." for module in saved)
    if tied := [name for name in second if name in updates or name.startswith(inside)]:
        raise InputError(
            f"{tied[0]!r} is {second[tied[0]]!r} too, and PEFT would change only one of them: export a merged model, "
            'subspace.merge() (to="merged"), or a delta, tinyspan.interop.deltas.export_delta (to="delta")'
        )


def _factors(update: Tensor, rank: int | None, error: float | None) -> tuple[Tensor, Tensor, float]:
    """Return B [out, r], A [r, in], and the squared norm of the truncation error."""
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    tail = values.square().flip(0).cumsum(0).flip(0)  # entry i: squared error of keeping the first i values
    if error is not None:
        r = max(1, int((tail > error**2 * tail[0]).sum()))
    else:
        r = min(rank or len(values), max(1, int((values > values[0] * 1e-7).sum())))  # the precision of float32
    lost = float(tail[r]) if r < len(values) else 0.0
    root = values[:r].sqrt()
    b, a = (left[:, :r] * root).to(update.dtype), (root[:, None] * right[:r]).to(update.dtype)
    return b.contiguous(), a.contiguous(), lost

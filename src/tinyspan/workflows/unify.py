"""Conversion of many LoRA adapters to one basis and one adapter for each, on disk."""

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyspan.errors import InputError
from tinyspan.interop.lora import (
    PEFT_FILES,
    Lora,
    import_lora,
    lora_basis,
    peft_config,
    peft_labels,
    peft_tensors,
    read_lora,
    sharing,
)
from tinyspan.io.folders import check_folder, claimed, prepare_folder
from tinyspan.io.hub import fetched
from tinyspan.io.storage import write_json
from tinyspan.labels import generic_names, label_names, set_label_names
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.models import load_pretrained

__all__ = ["base_models", "unify"]

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
CLASS_KINDS = {  # part of a model class's name in transformers -> kind of task in PEFT
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADS = (".score", ".classifier", ".classifier.out_proj", ".classification_head.out_proj")  # rows are the classes


@dataclass(frozen=True, eq=False)
class BaseModel:
    """The base model of LoRA adapters whose heads have the same size and names.

    Attributes:
        model: the model in float32.
        untrained: names of the weights that are missing from its file, so that they are random.
    """

    model: Any
    untrained: frozenset[str]


def base_models(names: Sequence[str], model: str | None = None) -> list[BaseModel]:
    """Load the base model of LoRA adapters in float32, once for every size and label names of their heads.

    Args:
        names: folders, or ids of repositories on the hub.
        model: the base model, if it is not the one in the adapters' configs.

    Returns:
        For each adapter, the model whose head has its size and label names; adapters with the same size and names share
        a model.

    Raises:
        InputError: an adapter or the model cannot be read, or the adapters differ in base model or kind of task.
        StorageError: a file is damaged, or the hub cannot be reached.
    """
    configs = [peft_config(name) for name in names]
    kinds = {_kind(config) for config in configs}
    bases = {config.base_model_name_or_path for config in configs}
    if len(kinds) > 1:
        raise InputError(f"expected adapters for one kind of task, got {sorted(map(str, kinds))}")
    if model is None and (len(bases) > 1 or None in bases):
        raise InputError(f"the adapters have the base models {sorted(map(str, bases))}; choose one, model=")
    kind = kinds.pop()
    options: dict[str, Any] = {}
    if model is None and not Path(min(bases)).is_dir():
        revisions = {config.revision or "main" for config in configs}
        if len(revisions) > 1:
            raise InputError(f"the adapters have the revisions {sorted(revisions)} of {min(bases)}; choose one, model=")
        options["revision"] = revisions.pop()
    auto, place = AUTO.get(str(kind), "AutoModel"), model or bases.pop()
    if kind in ("SEQ_CLS", "TOKEN_CLS"):
        heads = _heads(names, label_names(load_pretrained("AutoConfig", place, **options)))
    else:
        heads = [Head(None, None)] * len(names)
    loaded = {head: _load(auto, place, head, options) for head in dict.fromkeys(heads)}
    return [loaded[head] for head in heads]


class Head(NamedTuple):
    """Size and label names of a head; None if they are unknown."""

    size: int | None
    labels: tuple[str, ...] | None


def _heads(names: Sequence[str], of_base: tuple[str, ...] | None) -> list[Head]:
    """Return the head of each adapter; an adapter without one gets the base model's, in the size of another adapter's.

    The base model's names do not apply to an adapter's own head, which may have been trained for other labels.
    """
    sizes = [_head_size(name) for name in names]
    common = next(filter(None, sizes), None)
    heads = []
    for name, size in zip(names, sizes, strict=True):
        labels = of_base if size is None else peft_labels(name)
        size = size or common
        heads.append(Head(size, labels if labels and size in (None, len(labels)) else None))
    return heads


def _load(auto: str, place: str, head: Head, options: dict[str, Any]) -> BaseModel:
    """Load a base model with a head; the checkpoint's head may have another size, since the adapter's replaces it."""
    of_head = {} if head.size is None else {"num_labels": head.size, "ignore_mismatched_sizes": True}
    with seeded(0):  # new weights, if any, are those of `tinyspan evaluate`
        model, info = load_pretrained(auto, place, dtype=torch.float32, output_loading_info=True, **options, **of_head)
    if head.size is not None:
        set_label_names(model, head.labels or generic_names(model))
    return BaseModel(model, frozenset([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]))


def _kind(config: Any) -> str | None:
    """Return the kind of task of an adapter, from its config or from the name of its model class."""
    if config.task_type is not None:
        return str(getattr(config.task_type, "value", config.task_type))
    called = str((config.auto_mapping or {}).get("base_model_class"))
    return next((kind for end, kind in CLASS_KINDS.items() if called.endswith(end)), None)


def _head_size(name: str) -> int | None:
    """Return the number of classes, or numbers, of the head that an adapter contains or changes; None without one."""
    ends = tuple(f"{head}{part}.weight" for head in HEADS for part in ("", ".lora_B"))
    rows = [len(value) for key, value in peft_tensors(name).items() if key.endswith(ends)]
    return rows[-1] if rows else None


def unify(
    names: Sequence[str],
    output: Path,
    model: str | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the basis of LoRA adapters, each adapter in it, and for each a control with the mean of all updates.

    `output` gets the folders `basis`, `adapters` with one per LoRA, and `mean` with the controls: z of the mean dW,
    with the adapter's own head. The report is also written to `unified.json`. A warning names each adapter whose head
    is neither in its own file nor in the base model's; the report lists its `untrained` weights.

    Raises:
        InputError: an adapter cannot be read, or does not fit the others.
        StorageError: a file is damaged, or the hub cannot be reached.
    """
    check_folder(output, "unified", overwrite, [Path(name) for name in names])
    for name in names:
        if output.resolve().is_relative_to(fetched(name, files=PEFT_FILES).resolve()):
            raise InputError(f"{output} lies in the adapter {name}; choose another output folder")
    bases = base_models(names, model)
    loras = [read_lora(base.model, name) for base, name in zip(bases, names, strict=True)]
    untrained = [base.untrained.difference(lora.directly_trained) for base, lora in zip(bases, loras, strict=True)]
    models = _model_per_adapter(bases, untrained)
    _require_alike(loras, models)
    shared = sharing(loras) if len(loras) > 1 else None
    basis = lora_basis(models[0], loras, rank=rank, error=error)
    called = _names(names)
    for name, absent in zip(names, untrained, strict=True):
        if absent:
            warnings.warn(
                f"{name}: neither the adapter nor the base model holds a trained {min(absent)!r}, so predictions with "
                "this adapter are chance, and `evaluate` refuses it; was its head saved (modules_to_save)?",
                stacklevel=2,
            )
    subspaces = {}
    for base in dict.fromkeys(models):  # one for every size and names of heads
        theirs = [lora.modules for lora, other in zip(loras, models, strict=True) if other is base]
        subspaces[base] = SubspaceModel(base, basis, modules_to_save=list(dict.fromkeys(chain(*theirs))))
    lost = [import_lora(subspaces[base], lora, name) for base, lora, name in zip(models, loras, called, strict=True)]
    result = {
        "rank": rank,
        "bound": error,
        "numbers": sum(basis.ranks.values()),
        "basis_bytes": sum(_bytes(v.tensors()) for v in basis.maps.values()),
        "mean_share": shared.mean_share if shared else 1.0,
        "chance": shared.chance if shared else None,
        "adapters": [
            {
                "name": name.removeprefix(OWN),
                "source": lora.name,
                "numbers": sum(left.numel() + right.numel() for left, right in lora.factors.values()),
                "error": lost[index],
                "error_of_mean": shared.without[index] if shared else 0.0,
                "error_unseen": shared.unseen[index] if shared else None,
                "untrained": sorted(untrained[index]),
            }
            for index, (name, lora) in enumerate(zip(called, loras, strict=True))
        ],
    }
    with claimed(output):
        prepare_folder(output, "unified", overwrite)
        basis.save_pretrained(output / "basis")
        z = [subspaces[base].bank.state_of(name).z for base, name in zip(models, called, strict=True)]
        mean = {block: torch.stack([one[block] for one in z]).mean(0) for block in z[0]}
        for base, name in zip(models, called, strict=True):
            subspace = subspaces[base]
            subspace.set_adapter(name)
            subspace.save_pretrained(output / "adapters" / name.removeprefix(OWN))
            subspace.set_state(mean)
            subspace.save_pretrained(output / "mean" / name.removeprefix(OWN))
        write_json(output / "unified.json", result)
    return result


def _model_per_adapter(bases: Sequence[BaseModel], untrained: Sequence[frozenset[str]]) -> list[Any]:
    """Return a model for each adapter; adapters with other untrained weights get a copy.

    A subspace saves the same modules for all its adapters. With a shared model, an adapter without a head would be
    saved with a random one.
    """
    models: dict[tuple[int, frozenset[str]], Any] = {}
    for base, absent in zip(bases, untrained, strict=True):
        if (id(base), absent) not in models:
            in_use = any(model is base.model for model in models.values())
            models[id(base), absent] = copy.deepcopy(base.model) if in_use else base.model
    return [models[id(base), absent] for base, absent in zip(bases, untrained, strict=True)]


def _require_alike(loras: Sequence[Lora], models: Sequence[Any]) -> None:
    """Check that every updated weight has the same size in all models: heads may have other numbers of classes."""
    of_sizes = [dict(model.named_parameters()) for model in dict.fromkeys(models)]
    for lora in loras:
        for name in lora.factors:
            if len({weights[name].shape for weights in of_sizes}) > 1:
                raise InputError(
                    f"{lora.name} changes {name!r}, which has another size in the model of another adapter; unify "
                    "only adapters whose heads have the same size"
                )


OWN = "lora/"  # prefix of the names in memory, since `default` is already used


def _names(names: Sequence[str]) -> list[str]:
    """Return a name for each adapter: the last part of its path, with the part before it if two are the same."""
    parts = [(Path(name).resolve() if Path(name).is_dir() else Path(name)).parts for name in names]
    short = [part[-1] for part in parts]
    adapters = [
        own if Counter(short)[own] == 1 else "-".join(part[-2:]) for own, part in zip(short, parts, strict=True)
    ]
    if len(set(adapters)) < len(adapters):
        raise InputError(f"two of the adapters would have the same name: {', '.join(sorted(adapters))}")
    return [f"{OWN}{name}" for name in adapters]


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())

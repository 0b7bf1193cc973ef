"""Many LoRA adapters into one basis and a z for each, on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tinyspan.errors import InputError
from tinyspan.experiments.models import load_pretrained
from tinyspan.folders import check_folder
from tinyspan.lora import import_lora, lora_basis, read_lora, sharing
from tinyspan.storage import write_json
from tinyspan.subspace import SubspaceModel

__all__ = ["base_of_loras", "unify"]

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
MEAN = "mean"  # where the controls are


def base_of_loras(names: Sequence[str], model: str | None = None) -> Any:
    """Load the base model of LoRA adapters in float32, with a head as large as theirs.

    Args:
        names: folders, or ids of repositories on the hub.
        model: the base model, if it is not where the adapters say.

    Raises:
        InputError: an adapter cannot be read, or they have no base model or kind of task in common.
    """
    try:
        from peft import PeftConfig
        from peft.utils import load_peft_weights

        configs = [PeftConfig.from_pretrained(name) for name in names]
        whole = [value for key, value in load_peft_weights(names[0], device="cpu").items() if ".lora_" not in key]
    except ImportError as error:
        raise InputError("adapters of PEFT need the package peft: pip install 'tinyspan[peft]'") from error
    except (OSError, ValueError) as error:
        raise InputError(f"not an adapter of PEFT: {error}") from error
    kinds, bases = {str(config.task_type) for config in configs}, {config.base_model_name_or_path for config in configs}
    kind = configs[0].task_type
    if len(kinds) > 1 or (model is None and len(bases) > 1):
        raise InputError(
            f"the adapters are of {sorted(map(str, bases))} for {sorted(kinds)}: one model and task expected"
        )
    base = model or configs[0].base_model_name_or_path
    if base is None:
        raise InputError("the adapters do not name their base model; pass --model")
    heads = [len(value) for value in whole if value.dim() == 2]
    options = {"num_labels": min(heads)} if heads and kind in ("SEQ_CLS", "TOKEN_CLS") else {}
    auto = getattr(transformers, AUTO.get(str(getattr(kind, "value", kind)), "AutoModel"))
    return load_pretrained(auto, base, dtype=torch.float32, **options)


def unify(
    names: Sequence[str],
    output: Path,
    model: str | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the basis of LoRA adapters, each adapter in it, and for each the control that has the mean of all instead.

    `output` gets the folders `basis`, one per adapter with its name, and `mean` with the controls: z of the mean dW,
    beside the adapter's own head. What is told of them is in `unified.json` too.

    Raises:
        InputError: an adapter is none that can be read, or two have the same name.
    """
    called = [Path(name).name for name in names]
    if len(set(called)) < len(called) or {MEAN, "basis"} & set(called):
        raise InputError(f"the adapters' folders need names of their own, other than basis and {MEAN}; got {called}")
    for folder, kind in ((output / "basis", "basis"), *((output / name, "adapter") for name in called)):
        check_folder(folder, kind, overwrite, [Path(name) for name in names])  # type: ignore[arg-type]
    base = base_of_loras(names, model)
    loras = [read_lora(base, name) for name in names]
    basis = lora_basis(base, loras, rank=rank, error=error)
    basis.save_pretrained(output / "basis", overwrite=overwrite)
    modules = list(dict.fromkeys(module for lora in loras for module in lora.modules))
    subspace = SubspaceModel(base, basis, modules_to_save=modules)
    lost = [import_lora(subspace, lora, name) for lora, name in zip(loras, called, strict=True)]
    subspace.add_weighted_adapter(called, [1 / len(called)] * len(called), MEAN)
    subspace.set_adapter(MEAN)
    mean = {block.name: z.detach().clone() for block, z in zip(subspace.blocks, subspace.z, strict=True)}
    for name in called:
        subspace.set_adapter(name)
        subspace.save_pretrained(output / name, overwrite=overwrite)
        subspace.swap(mean)
        subspace.save_pretrained(output / MEAN / name, overwrite=overwrite)
    shared = sharing(loras) if len(loras) > 1 else None
    result = {
        "rank": rank,
        "bound": error,
        "numbers": sum(basis.ranks.values()),
        "basis_bytes": sum(file.stat().st_size for file in (output / "basis").glob("*.safetensors")),
        "mean_share": shared.mean_share if shared else 1.0,
        "chance": shared.chance if shared else None,
        "adapters": [
            {
                "name": name,
                "source": lora.name,
                "numbers": sum(left.numel() + right.numel() for left, right in lora.factors.values()),
                "error": lost[index],
                "error_of_mean": shared.without[index] if shared else 0.0,
                "error_unseen": shared.unseen[index] if shared else None,
            }
            for index, (name, lora) in enumerate(zip(called, loras, strict=True))
        ],
    }
    write_json(output / "unified.json", result)
    return result

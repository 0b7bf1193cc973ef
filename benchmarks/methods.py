"""Ways to fine-tune that the benchmarks compare: each makes a module of a model, to be trained by any loop."""

import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, TinyLoraConfig, UniLoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from tinyspan import Basis, Partition, SubspaceModel, by_layer
from tinyspan.workflows.hardware import default_device
from tinyspan.workflows.models import head_modules

DEVICE = default_device()
PEFT = ("LoRA r = 1", "LoRA r = 8", "VeRA", "Uni-LoRA", "TinyLoRA")
CARD = "README.md"  # for people; nothing that loads an adapter reads it


def heads(model: nn.Module, partition: Partition) -> list[str]:
    """Return the last parts of the names of the modules that every method trains directly."""
    return [name.rpartition(".")[2] for name in head_modules(model, partition)]


def in_basis(model: nn.Module, basis: Basis) -> SubspaceModel:
    """Return the model in a basis, embeddings frozen."""
    return SubspaceModel(model, basis, modules_to_save=heads(model, basis.partition))


def with_peft(model: Any, name: str) -> nn.Module:
    """Return the model with PEFT's adapters on all linear layers of the blocks, at the sizes that PEFT or papers name.

    Random projections are not saved: they are drawn again from their seed, as the papers count.
    """
    partition = by_layer(model)
    common = {"target_modules": linear_layers(model, partition), "modules_to_save": heads(model, partition)}
    configs: dict[str, PeftConfig] = {
        "LoRA r = 1": LoraConfig(r=1, lora_alpha=1, **common),
        "LoRA r = 8": LoraConfig(r=8, lora_alpha=8, **common),
        "VeRA": VeraConfig(r=256, save_projection=False, **common),
        "Uni-LoRA": UniLoraConfig(r=4, theta_d_length=23_040, **common),  # the paper's, for a base-size encoder
        "TinyLoRA": TinyLoraConfig(r=2, u=64, save_projection=False, **common),
    }
    return get_peft_model(model, configs[name])


def linear_layers(model: nn.Module, partition: Partition) -> str:
    """Return a regular expression of the names of all linear layers inside the blocks."""
    owners = {spec.name.rpartition(".")[0] for spec in partition.parameters()}
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} & owners
    stacks = sorted({re.escape(block.name.rpartition(".")[0]) for block in partition})
    return rf"({'|'.join(stacks)})\..*\.({'|'.join(sorted({name.rpartition('.')[2] for name in found}))})"


def trained(module: nn.Module, head: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that train: the method's own, and those of the head."""
    own: list[Tensor] = []
    in_head: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (own if set(head).isdisjoint(name.split(".")) else in_head).append(parameter)
    return own, in_head


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files of a folder but cards."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    return sum(path.stat().st_size for path in files)

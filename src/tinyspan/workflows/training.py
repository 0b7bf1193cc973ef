"""Fine-tune a model on a task and score it on the rows held out, through the Hugging Face Trainer."""

import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, PrinterCallback, TrainerCallback, TrainingArguments

from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.storage import package_versions
from tinyspan.labels import positions
from tinyspan.model.opened import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.hardware import (
    default_device,
    hardware,
    has_bfloat16,
    peak_memory,
    reset_peak_memory,
    seeded,
)
from tinyspan.workflows.models import load_pretrained, output_names, tokenizer_of
from tinyspan.workflows.resumable import Checkpoints, ResumableTrainer
from tinyspan.workflows.tasks.base import Encoding, Progress, Room, Split, Task, get_task

__all__ = ["Prepared", "Settings", "fine_tune", "prepare", "run_of", "score"]

SPLITS: tuple[Split, ...] = ("train", "validation")
# types of models whose positions are counted from the padding token's number on
AFTER_PADDING = {"camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"}
AFTER_PADDING |= {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
OTHER = "metric_"  # before the names of metrics but the score, in the log of the Trainer


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the paper's (section 4.1 and appendix), but for the last.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step.
        max_length: tokens per row, or of a prompt; longer ones are cut.
        learning_rate: of directly trained parameters, decayed linearly to 0.
        z_learning_rate: of z, decayed likewise.
        precision: `bfloat16` computes under autocast; `auto` does so where the processor has it. Weights stay float32.
        seed: of the head's first weights, the order of rows and dropout.
        max_target_length: tokens per completion, of language tasks, in training and when generated.
        max_steps: optimizer steps to train for instead of whole `epochs`.
        module_learning_rates: of the ordinary parameters in some modules, by name, in place of `learning_rate`: a new
            head often wants a larger one than pre-trained weights.
        regression_start: what a new regression head says first: the `mean` of the training labels, or about `zero`, as
            transformers leaves it. From zero, a model whose labels are far from it learns their mean first, and the
            rest much later: a bias moves by about the learning rate a step.

    Raises:
        InputError: a number is not above 0, or infinite, or there is no such start.
    """

    epochs: int = 32
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 2e-5
    z_learning_rate: float = 1e-2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    max_target_length: int = 64
    regression_start: Literal["mean", "zero"] = "mean"
    max_steps: int | None = None
    module_learning_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "max_length", "learning_rate", "z_learning_rate", "max_target_length")
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {f"the learning rate of {module}": rate for module, rate in self.module_learning_rates.items()}
        numbers |= {} if self.max_steps is None else {"max_steps": self.max_steps}
        for name, number in numbers.items():
            if not 0 < number < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {number}")
        if self.regression_start not in ("mean", "zero"):
            raise InputError(f"regression_start must be 'mean' or 'zero', got {self.regression_start!r}")

    def steps(self, rows: int) -> int:
        """Return how many optimizer steps so many training rows make."""
        return self.max_steps or self.steps_per_epoch(rows) * self.epochs

    def steps_per_epoch(self, rows: int) -> int:
        """Return how many optimizer steps one pass over so many training rows makes."""
        return -(-rows // self.batch_size)

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16."""
        return has_bfloat16() if self.precision == "auto" else self.precision == "bfloat16"


@dataclass(frozen=True)
class Prepared:
    """A task's rows, tokenized for a model.

    Attributes:
        model: name or path of the pre-trained model, as the user gave it.
        labels: names of the head's outputs in their order, by which the rows' labels are numbered; see `output_names`.
        train: None where only scoring is wanted.
        completions: the held-out ones as text, in the order of the rows, if the task has prompts.
        shuffled: whether the training rows are in random order, as those that `prepare` has drawn.
        draw_seed: of the draw that `set_aside` makes from rows in another order.
    """

    model: str
    task: Task
    tokenizer: Any
    train: Dataset | None
    validation: Dataset
    completions: Sequence[str] = ()
    labels: tuple[str, ...] = ()
    shuffled: bool = False
    draw_seed: int = 0

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        """Make a batch of rows, padded."""
        return self.task.collator(self.tokenizer)

    @property
    def label_mean(self) -> float | None:
        """Mean label of the training rows; None if there are none, or the task is no regression."""
        return self.task.label_mean(self.train) if self.train else None

    def set_aside(self, rows: int) -> tuple["Prepared", "Prepared"]:
        """Set training rows aside, to choose settings by rows that are neither trained on nor reported on.

        The last rows of a random order are set aside, or rows drawn by `draw_seed` from any other order, such as that
        of a file sorted by label.

        Args:
            rows: how many, at least one and fewer than there are.

        Returns:
            The task without these training rows, and the same with these to be scored on in place of the held-out ones.

        Raises:
            InputError: no training row would be left, or none would be set aside.
        """
        total = len(self.train or ())
        if self.train is None or not 0 < rows < total:
            raise InputError(
                f"cannot set {rows} of {total} training rows aside: expected at least 1 and fewer than all"
            )
        order = list(range(total))
        if not self.shuffled:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.draw_seed)).tolist()
        rest, aside = (self.train.select(sorted(part)) for part in (order[:-rows], order[-rows:]))
        return replace(self, train=rest), replace(self, train=rest, validation=aside, completions=())

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the tokens and labels of each split."""
        return {name: _digest(rows) for name, rows in (("train", self.train), ("validation", self.validation)) if rows}


def prepare(
    model: str,
    task: str | Task,
    *,
    data: Path | None = None,
    columns: Sequence[str] = (),
    max_length: int = 128,
    max_target_length: int = 64,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    draw_seed: int = 0,
    train: bool = True,
    adapter: Path | OpenedAdapter | None = None,
) -> Prepared:
    """Load and tokenize a task for a model; labels are numbered as the outputs of its head are, matched by name.

    Args:
        model: path, hub id or `minilm`.
        task: name of a task, or a task of your own.
        data: folder, or for a language task the id of a data set; see the task's `read`.
        columns: of a language task's text, or of its prompt and completion, if they are named otherwise.
        max_length: tokens per row, or of a prompt.
        max_target_length: tokens of a completion.
        train_rows: use only so many training rows, drawn by `draw_seed`.
        validation_rows: use only so many held-out rows, drawn likewise.
        draw_seed: of these draws; apart from the seed of a run, so that all runs see the same rows.
        train: whether to read the training rows at all.
        adapter: the adapter that will be scored, whose head counts instead of the model's.

    Raises:
        InputError: the model, the task or its data cannot be had.
    """
    chosen = get_task(task)
    if columns:
        chosen = chosen.with_columns(columns)
    loaded = {split: chosen.read(split, data) for split in SPLITS if train or split == "validation"}
    config = load_pretrained(AutoConfig, model)
    tokenizer = tokenizer_of(model, config)
    chosen = chosen.as_read(loaded)
    chosen.check_config(config, model)

    labels = output_names(config, chosen, adapter)
    encoding = Encoding(tokenizer, max_length, max_target_length, labels)
    order = positions(chosen.labels, labels) or ()
    if list(order) != sorted(order):
        warnings.warn(
            f"the outputs of {model if adapter is None else adapter} are, in their order, {', '.join(labels)}; "
            f"the labels of {chosen.name}, {', '.join(chosen.labels)}, are matched to them by name",
            stacklevel=2,
        )

    def drawn(split: Split, limit: int | None) -> pd.DataFrame:
        rows = loaded[split]
        if limit is None or limit >= len(rows):
            return rows
        return rows.sample(limit, random_state=draw_seed)

    def tokenized(split: Split, rows: pd.DataFrame) -> Dataset:
        found = chosen.tokenize(rows, split, encoding)
        _require_room(found, split, model, config, chosen, encoding)
        return found

    held_out = drawn("validation", validation_rows)
    validation = tokenized("validation", held_out)
    by_length, references = _by_length(validation), chosen.references(held_out)
    return Prepared(
        model,
        chosen,
        tokenizer,
        tokenized("train", drawn("train", train_rows)) if train else None,
        validation.select(by_length),
        tuple(references[index] for index in by_length) if references else (),
        labels,
        shuffled=train and train_rows is not None and train_rows < len(loaded["train"]),
        draw_seed=draw_seed,
    )


def _require_room(rows: Dataset, split: Split, model: str, config: Any, task: Task, encoding: Encoding) -> None:
    """Refuse rows that are too long for a model, or that have tokens it does not know.

    Raises:
        InputError: a row is too long, has no token, or one that the model does not know.
    """
    tokenizer = encoding.tokenizer
    encoder, decoder = (getattr(config, part, config) for part in ("encoder", "decoder"))
    if min(map(len, rows["input_ids"])) == 0:
        raise InputError(f"a {split} row has no token: its text is empty, and the tokenizer of {model!r} adds none")
    largest = max(max(map(max, rows["input_ids"])), tokenizer.pad_token_id or 0)
    if largest >= (known := getattr(encoder, "vocab_size", None) or math.inf):
        raise InputError(
            f"the tokenizer of {model!r} made the token {largest}, and the model knows {known}: resize its embeddings "
            "(resize_token_embeddings), or take the tokenizer that belongs to it"
        )
    room = Room(model, min(_positions(encoder), tokenizer.model_max_length), _positions(decoder))
    task.require_room(rows, split, room, encoding)


def _positions(config: Any) -> float:
    """Return how many tokens a model takes; without limit if it does not say, or says less than one."""
    found = getattr(config, "max_position_embeddings", None) or 0
    if config.model_type in AFTER_PADDING and config.pad_token_id is not None:
        found -= config.pad_token_id + 1
    return found if found > 0 else math.inf


def _digest(rows: Dataset) -> str:
    table = rows.with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _by_length(rows: Dataset) -> list[int]:
    """Return an order of rows to be scored in which a batch has little padding; scores do not depend on it."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sorted(range(len(rows)), key=lengths.__getitem__)


def fine_tune(
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    method: str,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    score_every_epoch: bool = True,
    checkpoints: Path | None = None,
    save_every: int | Literal["epoch"] = "epoch",
    progress: Progress = iter,
) -> dict[str, Any]:
    """Train a model, or the z and directly trained parameters of a `SubspaceModel`, and score it on the held-out rows.

    Args:
        model: to be trained.
        prepared: the rows.
        settings: how to train.
        method: what the result calls it.
        callbacks: of the Trainer.
        score_every_epoch: or after the last epoch alone, which saves time.
        checkpoints: a folder to save the state of training in; the same call goes on from the newest one there, and
            ends with the same weights and scores as one that was not interrupted.
        save_every: how often: after every epoch, or besides after every so many steps.
        progress: of generation, which comes last and only if the task has prompts; see `generate`.

    Returns:
        What `result.json` holds: `method`, `model`, `task`, `seed`, `metric`, `labels` (names of the head's outputs in
        their order), `score` (of the held-out rows after the last epoch; a perplexity, else a fraction), `epochs`,
        `history`, `subspace_parameters`, `ordinary_parameters`, `seconds` (training and evaluation, wall clock),
        `peak_memory_bytes` (of the process, or of the accelerator), `basis`, `settings`, `rows`, `versions`,
        `hardware`, for a task with prompts `generation`, see `generated`, and for one with several metrics the others
        in `metrics`.

    Raises:
        TinyspanError: the loss, the gradients or the predictions become NaN or infinite.
    """
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed):
        saved = None
        if checkpoints is not None:
            run = {**run_of(prepared, settings), "score_every_epoch": score_every_epoch}
            run |= {"start": _weights_digest(model)}
            run |= {"basis": model.basis.content_hash()} if isinstance(model, SubspaceModel) else {}
            saved = Checkpoints(checkpoints, save_every, run)
        trainer = _trainer(model, prepared, settings, scratch, callbacks, score_every_epoch, saved)
        reset_peak_memory()
        trainer.train_or_resume()
        if not score_every_epoch:
            trainer.evaluate()
        seconds, peak = trainer.seconds, trainer.peak_memory_bytes
    history = _history(trainer.state.log_history)
    generation = generated(model, prepared, settings, progress)
    scores = {"score": history[-1]["score"], "metrics": history[-1].get("metrics"), "generation": generation}
    return _result(model, prepared, settings, method, scores, history, seconds, peak)


def run_of(prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """Return what decides a run but the weights it starts from, in JSON's types; runs in which it is equal agree."""
    versions = {name: package_versions().get(name) for name in ("tinyspan", "torch", "transformers")}
    return {
        "model": prepared.model,
        "task": prepared.task.name,
        "task_definition": _definition(prepared.task),
        "settings": {**asdict(settings), "autocast": settings.autocast},
        "rows": prepared.digests(),
        "versions": versions,
    }


def _definition(task: Task) -> dict[str, Any]:
    """Return what tells tasks of one name apart, in JSON's types: the class has the loss and the metrics."""
    cls = type(task)
    return {
        "type": getattr(task, "type", None),  # of a class that nobody registered
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "metric": task.metric,
        "labels": list(task.labels),
        "columns": list(task.columns),
    }


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def score(
    model: nn.Module, prepared: Prepared, settings: Settings, method: str, progress: Progress = iter
) -> dict[str, Any]:
    """Score a trained model on the held-out rows; returns the keys of `fine_tune`, with no epochs and no history."""
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed):
        trainer = _trainer(model, prepared, settings, scratch)
        reset_peak_memory()
        began = time.perf_counter()
        evaluation = trainer.evaluate()
        seconds = time.perf_counter() - began
    generation = generated(model, prepared, settings, progress)
    scores = {"score": evaluation["eval_score"], "metrics": _other_metrics(evaluation), "generation": generation}
    return _result(model, prepared, settings, method, scores, [], seconds, peak_memory())


def generated(
    model: nn.Module, prepared: Prepared, settings: Settings, progress: Progress = iter
) -> dict[str, Any] | None:
    """Complete the held-out prompts greedily and compare; None if the task has no prompts.

    Returns:
        `exact_match`, `rouge_l`, and of the shortest rows `examples` with `prompt`, `expected` and `generated`.
    """
    if not prepared.completions:
        return None
    encoding = Encoding(prepared.tokenizer, settings.max_length, settings.max_target_length)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=settings.autocast):
        return prepared.task.generated(
            model, prepared.validation, prepared.completions, encoding, settings.batch_size, progress
        )


def _trainer(
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    scratch: str,
    callbacks: Sequence[TrainerCallback] = (),
    score_every_epoch: bool = True,
    checkpoints: Checkpoints | None = None,
) -> ResumableTrainer:
    arguments = TrainingArguments(
        output_dir=scratch if checkpoints is None else str(checkpoints.folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size * prepared.task.eval_batch_factor,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",  # rows of similar length together: half the padding
        bf16=settings.autocast,
        use_cpu=default_device().type == "cpu",
        eval_strategy="epoch" if score_every_epoch else "no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no",  # the ResumableTrainer says when
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    task = prepared.task

    def compute_metrics(output: Any) -> dict[str, float]:
        values = task.metrics(output.predictions, output.label_ids)
        others = {f"{OTHER}{name}": value for name, value in values.items() if name != task.metric}
        return {"score": values[task.metric], **others}

    trainer = ResumableTrainer(
        model,
        arguments,
        data_collator=prepared.collate,
        preprocess_logits_for_metrics=task.predictions,
        compute_loss_func=task.loss_function(),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
        z_learning_rate=settings.z_learning_rate,
        module_learning_rates=settings.module_learning_rates,
        checkpoints=checkpoints,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _other_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics besides the score of one of the Trainer's evaluations."""
    prefix = f"eval_{OTHER}"
    return {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}


def _history(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the Trainer's training and evaluation entries of each epoch."""
    ours = {"loss": "train_loss", "eval_loss": "validation_loss", "eval_score": "score"}
    epochs: dict[float, dict[str, Any]] = {}
    for entry in log:
        for key in ours.keys() & entry.keys():
            if not math.isfinite(entry[key]):
                raise TinyspanError(
                    f"the loss is NaN or infinite at epoch {entry['epoch']:g}; lower the learning rates"
                )
            epochs.setdefault(entry["epoch"], {"epoch": entry["epoch"]})[ours[key]] = float(entry[key])
        if others := _other_metrics(entry):
            epochs[entry["epoch"]]["metrics"] = others
    return list(epochs.values())


def _counts(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained in z, and directly."""
    if isinstance(model, SubspaceModel):
        in_z, directly = (sum(value.numel() for value in group["params"]) for group in model.parameter_groups())
        return in_z, directly
    return 0, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _result(
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    method: str,
    scores: Mapping[str, Any],
    history: list[dict[str, Any]],
    seconds: float,
    peak: int,
) -> dict[str, Any]:
    in_z, ordinary = _counts(model)
    basis = model.basis.content_hash() if isinstance(model, SubspaceModel) and model.basis.rank > 0 else None
    return {
        "method": method,
        "model": prepared.model,
        "task": prepared.task.name,
        "seed": settings.seed,
        "metric": prepared.task.metric,
        "labels": list(prepared.labels),
        "basis": basis,
        "settings": {**asdict(settings), "autocast": settings.autocast},
        "rows": {"train": len(prepared.train or ()), "validation": len(prepared.validation)},
        "versions": package_versions(),
        "hardware": hardware(),
        **{name: value for name, value in scores.items() if name == "score" or value},
        "epochs": (history[-1]["epoch"] if settings.max_steps else settings.epochs) if history else 0,
        "history": history,
        "subspace_parameters": in_z,
        "ordinary_parameters": ordinary,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
    }

"""Fine-tuning of a model on a task with the Hugging Face Trainer, and scoring on the held-out rows."""

import hashlib
import json
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
from tinyspan.io.storage import package_versions, replacing
from tinyspan.labels import positions
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.hardware import (
    default_device,
    hardware,
    has_bfloat16,
    peak_memory,
    reset_peak_memory,
    seeded,
)
from tinyspan.workflows.heads import rescale_outputs
from tinyspan.workflows.models import load_pretrained, output_names, tokenizer_of
from tinyspan.workflows.resumable import ASIDE, Checkpoints, ResumableTrainer
from tinyspan.workflows.tasks import Labelled
from tinyspan.workflows.tasks.base import Encoding, Progress, Room, Split, Task, get_task
from tinyspan.workflows.tasks.metrics import LOWER_IS_BETTER

__all__ = ["Prepared", "Settings", "fine_tune", "prepare", "run_of", "score"]

SPLITS: tuple[Split, ...] = ("train", "validation")
# types of models whose positions are counted from the padding token's id on
AFTER_PADDING = {"camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"}
AFTER_PADDING |= {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
FITTED_ROWS = 2_000  # maximum number of training rows on which thresholds are chosen
EXPECTED = "expected at least 1 and fewer than all"  # number of rows to set aside
OTHER = "metric_"  # prefix of the metrics other than the score, in the log of the Trainer


@dataclass(frozen=True)
class Settings:
    """Settings of the training. The defaults are the paper's (section 4.1 and appendix), except `regression_start`.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step.
        max_length: maximum number of tokens per row, or of a prompt; longer ones are truncated.
        learning_rate: initial learning rate of the directly trained parameters, decayed linearly to 0.
        z_learning_rate: initial learning rate of z, decayed likewise.
        precision: `bfloat16` computes under autocast; `auto` does so if the device supports it. Weights stay float32.
        seed: seed of the head's initial weights, the order of rows, and dropout.
        max_target_length: maximum number of tokens per completion, for language tasks, in training and generation.
        max_steps: optimizer steps to train for instead of whole `epochs`.
        module_learning_rates: module name -> learning rate of its directly trained parameters, instead of
            `learning_rate`: a new head often needs a larger one than pre-trained weights.
        regression_start: initial prediction of a new regression head: the `mean` of the training labels, or about
            `zero`, which is the initialisation of transformers. From zero, a model whose labels are far from zero
            learns their mean first and the rest much later, since a bias changes by about the learning rate per step.
        set_aside: number of training rows that a run neither trains on nor reports on, for choices; see
            `Prepared.with_aside`. They are scored after every epoch.
        patience: number of epochs after which training stops if the score on the set-aside rows has not improved; the
            weights of the best epoch are kept. The learning rates decay as without it.

    Raises:
        InputError: a number is not above 0, or infinite, `set_aside` is below 0, `patience` is given without rows that
            are set aside, or `regression_start` is unknown.
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
    set_aside: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "max_length", "learning_rate", "z_learning_rate", "max_target_length")
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {f"the learning rate of {module}": rate for module, rate in self.module_learning_rates.items()}
        numbers |= {} if self.max_steps is None else {"max_steps": self.max_steps}
        numbers |= {} if self.patience is None else {"patience": self.patience}
        for name, number in numbers.items():
            if not 0 < number < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {number}")
        if self.set_aside < 0:
            raise InputError(f"set_aside must be at least 0, got {self.set_aside}")
        if self.patience is not None and self.set_aside == 0:
            raise InputError(
                "patience needs training rows that are set aside, such as set_aside=200 (--set-aside 200): a choice of "
                "the best epoch by the held-out rows would raise their score"
            )
        if self.regression_start not in ("mean", "zero"):
            raise InputError(f"regression_start must be 'mean' or 'zero', got {self.regression_start!r}")

    def steps(self, rows: int) -> int:
        """Return the number of optimizer steps for this number of training rows."""
        return self.max_steps or self.steps_per_epoch(rows) * self.epochs

    def steps_per_epoch(self, rows: int) -> int:
        """Return the number of optimizer steps in one pass over this number of training rows."""
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
        labels: names of the head's outputs in their order, which numbers the labels of the rows; see `output_names`.
        train: the training rows; None for scoring only.
        completions: the held-out completions as text, in the order of the rows, if the task has prompts.
        row_numbers: number of each held-out row in the data, in the order of `validation`.
        shuffled: whether the training rows are in random order, as those that `prepare` has drawn.
        draw_seed: seed with which rows are set aside from rows in another order.
        aside: training rows that are set aside, without those of `train`; see `with_aside`.
    """

    model: str
    task: Task
    tokenizer: Any
    train: Dataset | None
    validation: Dataset
    completions: Sequence[str] = ()
    labels: tuple[str, ...] = ()
    row_numbers: tuple[int, ...] = ()
    shuffled: bool = False
    draw_seed: int = 0
    aside: Dataset | None = None

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that collates rows to a padded batch."""
        return self.task.collator(self.tokenizer)

    def compute_metrics(self, output: Any) -> dict[str, float]:
        """Return the metrics of predictions, as `compute_metrics` of a Trainer.

        The Trainer also needs `preprocess_logits_for_metrics=prepared.task.predictions`.

        Args:
            output: `EvalPrediction`, with `predictions` and `label_ids`.
        """
        return self.task.metrics(output.predictions, output.label_ids, self.labels)

    @property
    def label_mean(self) -> float | None:
        """Mean label of the training rows; None without training rows, or if the task is not a regression."""
        return self.task.label_mean(self.train) if self.train else None

    def with_aside(self, rows: int) -> "Prepared":
        """Return the task with training rows set aside, as a run with `Settings(set_aside=rows)` uses them.

        They are the last rows of a random order, or drawn with `draw_seed` from any other order, such as that of a file
        sorted by label.

        Args:
            rows: number of rows, fewer than there are; 0 sets none aside. With as many rows as are set aside already,
                the task is returned unchanged.

        Raises:
            InputError: no training row would be left, or another number of rows is set aside already.
        """
        if rows == len(self.aside or ()):
            return self
        if self.aside is not None:
            raise InputError(f"{len(self.aside)} training rows are set aside already; expected {rows}")
        total = len(self.train or ())
        if self.train is None or not 0 < rows < total:
            raise InputError(f"cannot set {rows} of {total} training rows aside: {EXPECTED}")
        order = list(range(total))
        if not self.shuffled:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.draw_seed)).tolist()
        rest, aside = (self.train.select(sorted(part)) for part in (order[:-rows], order[-rows:]))
        return replace(self, train=rest, aside=aside)

    def set_aside(self, rows: int) -> tuple["Prepared", "Prepared"]:
        """Split off training rows, for choosing settings on rows that are neither trained on nor reported on.

        Args:
            rows: number of rows, at least one and fewer than there are; see `with_aside`.

        Returns:
            The task without these training rows, and the task with these as the held-out rows.

        Raises:
            InputError: no training row would be left, or none would be set aside.
        """
        if rows == 0:
            raise InputError(f"cannot set 0 of {len(self.train or ())} training rows aside: {EXPECTED}")
        split = self.with_aside(rows)
        assert split.aside is not None
        rest = replace(split, aside=None)
        return rest, replace(rest, validation=split.aside, completions=(), row_numbers=())

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the tokens and labels of each split, and of the rows that are set aside."""
        parts = {"train": self.train, "validation": self.validation, "aside": self.aside}
        return {name: _digest(rows) for name, rows in parts.items() if rows}


def prepare(
    model: str,
    task: str | Task,
    *,
    data: Path | None = None,
    text: Sequence[str] = (),
    max_length: int = 128,
    max_target_length: int = 64,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    draw_seed: int = 0,
    train: bool = True,
    adapter: Path | OpenedAdapter | None = None,
) -> Prepared:
    """Load and tokenize a task for a model; labels are matched by name to the outputs of the model's head.

    Args:
        model: path, hub id or `minilm`.
        task: name of a task, or a task object.
        data: folder, or for a language task the id of a data set; see the task's `read`.
        text: for a language task, the columns of the text, or of prompt and completion, if they have other names.
        max_length: maximum number of tokens per row, or of a prompt.
        max_target_length: maximum number of tokens of a completion.
        train_rows: number of training rows to use, sampled with `draw_seed`.
        validation_rows: number of held-out rows to use, sampled likewise.
        draw_seed: seed of this sampling; it is separate from the seed of a run, so that all runs use the same rows.
        train: whether to read the training rows.
        adapter: the adapter that will be scored; its head replaces the model's.

    Raises:
        InputError: the model, the task or its data are not available.
    """
    chosen = get_task(task)
    if text:
        chosen = chosen.with_columns(text)
    loaded = {split: chosen.read(split, data) for split in SPLITS if train or split == "validation"}
    config = load_pretrained(AutoConfig, model)
    tokenizer = tokenizer_of(model, config)
    chosen = chosen.as_read(loaded)
    chosen.check_config(config, model)
    labels = output_names(config, chosen, adapter)
    chosen.configure(config)
    chosen = chosen.configured(config)
    encoding = Encoding(tokenizer, max_length, max_target_length, labels)
    order = positions(chosen.labels, labels) or ()
    if list(order) != sorted(order):
        warnings.warn(
            f"the outputs of {model if adapter is None else adapter} are, in their order, {', '.join(labels)}; "
            f"the labels of {chosen.name}, {', '.join(chosen.labels)}, are matched to them by name",
            stacklevel=2,
        )

    def sample(split: Split, limit: int | None) -> pd.DataFrame:
        rows = loaded[split]
        if limit is None or limit >= len(rows):
            return rows
        return rows.sample(limit, random_state=draw_seed)

    def tokenize(split: Split, rows: pd.DataFrame) -> Dataset:
        tokens = chosen.tokenize(rows, split, encoding)
        _require_room(tokens, split, model, config, chosen, encoding)
        return tokens

    held_out = sample("validation", validation_rows)
    validation = tokenize("validation", held_out)
    by_length, references = _by_length(validation), chosen.references(held_out)
    return Prepared(
        model,
        chosen,
        tokenizer,
        tokenize("train", sample("train", train_rows)) if train else None,
        validation.select(by_length),
        tuple(references[index] for index in by_length) if references else (),
        labels,
        tuple(int(held_out.index[index]) for index in by_length) if len(held_out) == len(by_length) else (),
        shuffled=train and train_rows is not None and train_rows < len(loaded["train"]),
        draw_seed=draw_seed,
    )


def _require_room(rows: Dataset, split: Split, model: str, config: Any, task: Task, encoding: Encoding) -> None:
    """Check that rows are not too long for a model, and that the model knows their tokens.

    Raises:
        InputError: a row is too long, has no token, or has a token that the model does not know.
    """
    tokenizer = encoding.tokenizer
    encoder, decoder = (getattr(config, part, config) for part in ("encoder", "decoder"))
    if min(map(len, rows["input_ids"])) == 0:
        raise InputError(f"a {split} row has no token: its text is empty, and the tokenizer of {model!r} adds none")
    largest = max(max(map(max, rows["input_ids"])), tokenizer.pad_token_id or 0)
    if largest >= (vocabulary := getattr(encoder, "vocab_size", None) or math.inf):
        raise InputError(
            f"the tokenizer of {model!r} made the token {largest}, and the model knows {vocabulary}: resize its "
            "embeddings (resize_token_embeddings), or use the tokenizer that belongs to it"
        )
    room = Room(model, min(_positions(encoder), tokenizer.model_max_length), _positions(decoder))
    task.require_room(rows, split, room, encoding)


def _positions(config: Any) -> float:
    """Return the maximum number of tokens of a model; infinite if its config has none, or one below 1."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    if config.model_type in AFTER_PADDING and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1
    return positions if positions > 0 else math.inf


def _digest(rows: Dataset) -> str:
    table = rows.with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _by_length(rows: Dataset) -> list[int]:
    """Return an order of the rows in which batches have little padding; scores do not depend on it."""
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
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Train a model, or the z and directly trained parameters of a `SubspaceModel`, and score it on the held-out rows.

    Args:
        model: the model to train.
        prepared: the rows; `settings.set_aside` training rows are set aside, unless they are already.
        settings: settings of the training.
        method: name of the method in the result.
        callbacks: callbacks of the Trainer.
        score_every_epoch: whether to score after every epoch, or only after the last one, which saves time.
        checkpoints: a folder for the training state; the same call resumes from the newest state there, and gives the
            same weights and scores as without an interruption.
        save_every: number of steps between states, besides those after every epoch; or `epoch`.
        progress: progress bar of generation, which follows training if the task has prompts; see `generate`.
        predictions: file to write with the prediction for each held-out row, if the task has labels.

    Returns:
        The content of `result.json`: `method`, `model`, `task`, `seed`, `metric`, `labels` (names of the head's outputs
        in their order), `score` (of the held-out rows after the last epoch, or with `patience` of the weights of
        `best_epoch`; a perplexity, otherwise a fraction), `epochs`, `history` (per epoch, with the scores of the rows
        that are set aside), `subspace_parameters`, `ordinary_parameters` (the number of directly trained ones),
        `seconds` (training and evaluation, wall clock), `peak_memory_bytes` (of the process, or of the accelerator),
        `basis`, `settings`, `rows`, `data` (of a user's own table), `versions`, `hardware`,
        for a task with prompts `generation`, see `generated`, for a task with several metrics the others in `metrics`,
        and for a task with labels the `details` of its type, such as `intervals` and `confusion_matrix`.

    Raises:
        TinyspanError: the loss, the gradients or the predictions become NaN or infinite.
    """
    prepared = prepared.with_aside(settings.set_aside)
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed):
        saved, scored = None, Scored()
        if checkpoints is not None:
            run = {**run_of(prepared, settings), "score_every_epoch": score_every_epoch}
            run |= {"start": _weights_digest(model)}
            run |= {"basis": model.basis.content_hash()} if isinstance(model, SubspaceModel) else {}
            saved = Checkpoints(checkpoints, save_every, run)
        elif settings.patience is not None:
            saved = Checkpoints(Path(scratch), "epoch", {})
        prepared.task.before_training(model)
        trainer = _trainer(model, prepared, settings, scratch, callbacks, score_every_epoch, saved, scored)
        reset_peak_memory()
        trainer.train_or_resume()
        restored = settings.patience is not None and trainer.restore_best()
        # nothing is scored where only the end was resumed
        if restored or not score_every_epoch or scored.predictions is None:
            trainer.evaluate()
        seconds, peak = trainer.seconds, trainer.peak_memory_bytes
        prepared, fit = _fitted(trainer, model, prepared, scored)
        prepared.task.after_training(model)
    history = _history(trainer.state.log_history)
    generation = generated(model, prepared, settings, progress)
    chosen = next(row for row in history if row["epoch"] == trainer.state.epoch)
    scores = {"score": chosen["score"], "metrics": chosen.get("metrics"), "generation": generation}
    scores |= {} if settings.patience is None else {"best_epoch": chosen["epoch"]}
    scores |= fit | _details(prepared, scored, predictions)
    if temperature := scores.pop("temperature", None):
        scores["calibration"] |= temperature
    return _result(model, prepared, settings, method, scores, history, seconds, peak)


@dataclass
class Scored:
    """Predictions and labels of the last evaluation, and the positions of their rows among the held-out rows."""

    predictions: Any = None
    labels: Any = None
    order: Sequence[int] = ()


def _fitted(
    trainer: ResumableTrainer, model: nn.Module, prepared: Prepared, scored: Scored
) -> tuple[Prepared, dict[str, Any]]:
    """Fit what makes predictions from logits on rows that are not scored: a temperature, thresholds.

    A temperature is put into the head, so that every consumer of the model has calibrated probabilities.

    Returns:
        The task with its thresholds, and the new entries of the result.
    """
    task = prepared.task
    if not isinstance(task, Labelled):
        return prepared, {}
    training = prepared.train if task.fits_training_rows else None
    rows = prepared.aside or (training and training.select(range(min(len(training), FITTED_ROWS))))
    if not rows:
        return prepared, {}
    before = replace(scored)
    output: Any = trainer.predict(rows)  # which fills `scored` with its own predictions
    scored.predictions, scored.labels, scored.order = before.predictions, before.labels, before.order
    task, factor = task.fitted(output.predictions, output.label_ids)
    raw, fit = task.metrics(scored.predictions, scored.labels, prepared.labels), {}
    if factor != 1 and rescale_outputs(model, factor):
        scored.predictions = scored.predictions * factor
        kept = {name: raw[name] for name in ("log_loss", "ece") if name in raw}
        fit["temperature"] = {"temperature": 1 / factor, "fitted_rows": len(rows), "before": kept}
    values = task.metrics(scored.predictions, scored.labels, prepared.labels)
    others = {name: value for name, value in values.items() if name != task.metric}
    return replace(prepared, task=task), {"score": values[task.metric], "metrics": others, **fit}


def _details(prepared: Prepared, scored: Scored, file: Path | None) -> dict[str, Any]:
    """Return the entries of a result beside the metrics, and write the predictions of labelled rows to a file."""
    task = prepared.task
    if not isinstance(task, Labelled):
        return {}
    if file is not None:
        _write_predictions(task, prepared, scored, file)
    return task.details(scored.predictions, scored.labels, prepared.labels)


def _write_predictions(task: Labelled, prepared: Prepared, scored: Scored, file: Path) -> None:
    """Write a JSON object per held-out row, in the order of the data: `row`, `label`, `prediction`, `probabilities`."""
    answers = task.answers(scored.predictions, scored.labels, prepared.labels)
    truths = task.truths(scored.labels, prepared.labels)
    numbers = prepared.row_numbers or range(len(answers))
    lines = {}
    for position, truth, answer in zip(scored.order, truths, answers, strict=True):
        row = {"row": numbers[position], "label": truth, **answer}
        lines[numbers[position]] = json.dumps(row, ensure_ascii=False)
    with replacing(file) as path:
        path.write_text("".join(f"{lines[number]}\n" for number in sorted(lines)), encoding="utf-8")


def run_of(prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """Return everything that determines a run except the initial weights, in JSON types; equal runs have equal ones."""
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
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    method: str,
    progress: Progress = iter,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Score a trained model on the held-out rows; returns the keys of `fine_tune`, without epochs and history."""
    scored = Scored()
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed):
        trainer = _trainer(model, prepared, settings, scratch, scored=scored)
        reset_peak_memory()
        began = time.perf_counter()
        evaluation = trainer.evaluate()
        seconds = time.perf_counter() - began
    generation = generated(model, prepared, settings, progress)
    scores = {"score": evaluation["eval_score"], "metrics": _other_metrics(evaluation), "generation": generation}
    scores |= _details(prepared, scored, predictions)
    return _result(model, prepared, settings, method, scores, [], seconds, peak_memory())


def generated(
    model: nn.Module, prepared: Prepared, settings: Settings, progress: Progress = iter
) -> dict[str, Any] | None:
    """Complete the held-out prompts greedily, and compare them with the references; None if the task has no prompts.

    Returns:
        `exact_match`, `rouge_l`, and for the shortest rows `examples` with `prompt`, `expected` and `generated`.
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
    scored: Scored | None = None,
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
        train_sampling_strategy="group_by_length",  # rows of similar length in a batch halve the padding
        bf16=settings.autocast,
        use_cpu=default_device().type == "cpu",
        eval_strategy="epoch" if score_every_epoch or settings.patience else "no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no",  # the ResumableTrainer saves
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    task = prepared.task

    def compute_metrics(output: Any) -> dict[str, float]:
        if scored is not None:
            scored.predictions, scored.labels = output.predictions, output.label_ids
            scored.order = tuple(trainer.eval_order)
        values = prepared.compute_metrics(output)
        others = {f"{OTHER}{name}": value for name, value in values.items() if name != task.metric}
        return {"score": values[task.metric], **others}

    trainer = ResumableTrainer(
        model,
        arguments,
        data_collator=prepared.collate,
        preprocess_logits_for_metrics=task.predictions,
        compute_loss_func=task.loss_function(prepared.labels),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
        z_learning_rate=settings.z_learning_rate,
        module_learning_rates=settings.module_learning_rates,
        checkpoints=checkpoints,
        aside=prepared.aside,
        patience=settings.patience,
        lower_is_better=task.metric in LOWER_IS_BETTER,
        score_held_out=score_every_epoch,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _other_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics other than the score in an evaluation of the Trainer."""
    prefix = f"eval_{OTHER}"
    return {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}


def _history(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the Trainer's training and evaluation entries of each epoch."""
    ours = {"loss": "train_loss", "eval_loss": "validation_loss", "eval_score": "score"}
    ours |= {name: name for name in (f"{ASIDE}_loss", f"{ASIDE}_score")}
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
    """Return the numbers of parameters that are trained in z, and directly."""
    if isinstance(model, SubspaceModel):
        in_z, directly = (sum(value.numel() for value in group["params"]) for group in model.parameter_groups())
        return in_z, directly
    return 0, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _origin(prepared: Prepared) -> dict[str, Any]:
    """Return the source of a user's own rows, and the numbers of the held-out ones if they were drawn."""
    origin = dict(getattr(prepared.task, "origin", {}))
    if origin.get("holdout") is not None:
        origin["held_out_rows"] = sorted(prepared.row_numbers)
    return {"data": origin} if origin else {}


def _aside(prepared: Prepared) -> dict[str, int]:
    """Return the number of rows that are set aside, if there are any."""
    return {} if prepared.aside is None else {"aside": len(prepared.aside)}


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
    in_z, directly = _counts(model)
    whole = settings.max_steps is None and settings.patience is None
    basis = model.basis.content_hash() if isinstance(model, SubspaceModel) and model.basis.rank > 0 else None
    return {
        "method": method,
        "model": prepared.model,
        "task": prepared.task.name,
        "type": prepared.task.type,
        "seed": settings.seed,
        "metric": prepared.task.metric,
        "labels": list(prepared.labels),
        "basis": basis,
        "settings": {**asdict(settings), "autocast": settings.autocast},
        "rows": {"train": len(prepared.train or ()), "validation": len(prepared.validation), **_aside(prepared)},
        **_origin(prepared),
        "versions": package_versions(),
        "hardware": hardware(),
        **{name: value for name, value in scores.items() if name == "score" or value},
        "epochs": 0 if not history else settings.epochs if whole else history[-1]["epoch"],
        "history": history,
        "subspace_parameters": in_z,
        "ordinary_parameters": directly,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
    }

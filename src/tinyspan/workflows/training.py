"""Fine-tuning of a model on a task with the Hugging Face Trainer, and scoring on the held-out rows."""

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from tinyspan.errors import TinyspanError
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import replacing
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.hardware import (
    default_device,
    hardware,
    peak_memory,
    reset_peak_memory,
    seeded,
)
from tinyspan.workflows.heads import output_layer, rescale_outputs
from tinyspan.workflows.resumable import ASIDE, Checkpoints, ResumableTrainer
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import Labelled
from tinyspan.workflows.tasks.base import Encoding, Progress, Task

__all__ = ["definition_of", "fine_tune", "run_of", "score"]

NUMBERED_ROWS = 100_000  # maximum number of held-out rows whose numbers a result has
FITTED_ROWS = 2_000  # maximum number of training rows on which thresholds are chosen
OTHER = "metric_"  # prefix of the metrics other than the score, in the log of the Trainer


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
        prepared: the rows; `settings.set_aside` training rows are set aside, unless as many are already.
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
        `basis`, `settings`, `rows`, `draw` (numbers of rows before tokenization, and the seed), `row_digests` (see
        `Prepared.digests`), `data` (of a user's own table), `versions`, `hardware`,
        for a task with prompts `generation`, see `generated`, for a task with several metrics the others in `metrics`,
        and for a task with labels the `details` of its type, such as `intervals` and `confusion_matrix`. After a
        temperature was fitted, `score` and `metrics` are with it, and `history` is without.

    Raises:
        TinyspanError: the loss, the gradients or the predictions become NaN or infinite.
    """
    prepared = prepared.with_aside(settings.set_aside)
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed):
        saved, scored = None, Scored()
        if checkpoints is not None:
            run = {**run_of(prepared, settings), "score_every_epoch": score_every_epoch}
            run |= {"start": _weights_digest(model)}
            saved = Checkpoints(checkpoints, save_every, run)
        elif settings.patience is not None:
            saved = Checkpoints(Path(scratch), "epoch", {})
        with prepared.task.training_units(model):
            trainer = _trainer(model, prepared, settings, scratch, callbacks, score_every_epoch, saved, scored)
            reset_peak_memory()
            trainer.train_or_resume()
            restored = settings.patience is not None and trainer.restore_best()
            # nothing is scored where only the end was resumed
            if restored or not score_every_epoch or scored.predictions is None:
                trainer.evaluate()
            seconds, peak = trainer.seconds, trainer.peak_memory_bytes
            prepared, fit = _fitted(trainer, model, prepared, scored)
    history = _history(trainer.state.log_history)
    generation = generated(model, prepared, settings, progress)
    chosen = next(row for row in history if row["epoch"] == trainer.state.epoch)
    scores = {"score": chosen["score"], "metrics": chosen.get("metrics"), "generation": generation}
    scores |= {} if settings.patience is None else {"best_epoch": chosen["epoch"]}
    temperature, note = fit.pop("temperature", None), fit.pop("note", None)
    scores |= fit | _details(prepared, scored, predictions)
    if temperature is not None:
        scores["calibration"] = {**scores.get("calibration", {}), **temperature}
    if note is not None:
        scores["notes"] = [*scores.get("notes", ()), note]
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
    rows = prepared.aside
    if rows is None and task.fits_training_rows and prepared.train is not None:
        order = torch.randperm(len(prepared.train), generator=torch.Generator().manual_seed(prepared.draw_seed))
        rows = prepared.train.select(sorted(order[:FITTED_ROWS].tolist()))
    if rows is None:
        return prepared, {}
    before = replace(scored)
    output: Any = trainer.predict(rows)  # which fills `scored` with its own predictions
    scored.predictions, scored.labels, scored.order = before.predictions, before.labels, before.order
    task, factor, note = task.fitted(output.predictions, output.label_ids)
    fit: dict[str, Any] = {} if note is None else {"note": note}
    if factor != 1 and _saves_head(model) and rescale_outputs(model, factor):
        raw = task.metrics(scored.predictions, scored.labels, prepared.labels)
        scored.predictions = scored.predictions * factor
        kept = {name: raw[name] for name in ("log_loss", "ece") if name in raw}
        fit["temperature"] = {"temperature": 1 / factor, "fitted_rows": len(rows), "before": kept}
    values = task.metrics(scored.predictions, scored.labels, prepared.labels)
    others = {name: value for name, value in values.items() if name != task.metric}
    return replace(prepared, task=task), {"score": values[task.metric], "metrics": others, **fit}


def _saves_head(model: nn.Module) -> bool:
    """Return whether a change of the output layer is saved: with the model, or as a directly trained parameter."""
    layer = output_layer(model)
    return layer is not None and (not isinstance(model, SubspaceModel) or layer[1].weight.requires_grad)


def _details(prepared: Prepared, scored: Scored, file: Path | None) -> dict[str, Any]:
    """Return the entries of a result beside the metrics, and write the predictions of labelled rows to a file."""
    task = prepared.task
    if not isinstance(task, Labelled):
        return {}
    if file is not None:
        _write_predictions(task, prepared, scored, file)
    return task.details(scored.predictions, scored.labels, prepared.labels)


def _write_predictions(task: Labelled, prepared: Prepared, scored: Scored, file: Path) -> None:
    """Write a JSON object per held-out row: `row`, `label`, `prediction`, `probabilities`.

    They are in the order of the data, and `row` is the number of the row there. If the numbers are not known, there is
    no `row`, and rows are in the order of their lengths.
    """
    answers = task.answers(scored.predictions, scored.labels, prepared.labels)
    truths = task.truths(scored.labels, prepared.labels)
    numbers = prepared.row_numbers
    lines = []
    for position, truth, answer in zip(scored.order, truths, answers, strict=True):
        row = {"row": numbers[position]} if numbers else {}
        content = {**row, "label": truth, **answer}
        lines.append((numbers[position] if numbers else position, json.dumps(content, ensure_ascii=False)))
    lines.sort(key=lambda line: line[0])
    with replacing(file) as path:
        path.write_text("".join(f"{line}\n" for _, line in lines), encoding="utf-8")


def run_of(prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """Return everything that determines a run except the initial weights, in JSON types; equal runs have equal ones."""
    versions = {name: package_versions().get(name) for name in ("tinyspan", "torch", "transformers")}
    return {
        "model": prepared.model,
        "task": prepared.task.name,
        "task_definition": definition_of(prepared.task),
        "settings": {**asdict(settings), "autocast": settings.autocast},
        "rows": prepared.digests(),
        "versions": versions,
    }


def definition_of(task: Task) -> dict[str, Any]:
    """Return what tells tasks of one name apart, in JSON's types: the class has the loss and the metrics."""
    cls = type(task)
    return {
        "type": getattr(task, "type", None),  # of a class that nobody registered
        "class": f"{cls.__module__}.{cls.__qualname__}",
        **{field.name: _in_json(getattr(task, field.name)) for field in fields(task) if field.compare},
    }


def _in_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_in_json(one) for one in value]
    return value if value is None or isinstance(value, str | bool | int | float) else repr(value)


def _weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the weights, and of the basis of a `SubspaceModel`, whose identity is in its state."""
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
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed), prepared.task.training_units(model):
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
    if arguments.n_gpu > 1:  # the Trainer would put the model into DataParallel, which multiplies the batch
        arguments._n_gpu = 1
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
        lower_is_better=task.lower_is_better,
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
    """Return the source of a user's own rows, and the numbers of the held-out ones if they were drawn and have some."""
    origin = dict(getattr(prepared.task, "origin", {}))
    if origin.get("holdout") is not None and 0 < len(prepared.row_numbers) <= NUMBERED_ROWS:
        origin["held_out_rows"] = sorted(prepared.row_numbers)
    return {"data": origin} if origin else {}


def _weights(task: Task) -> dict[str, Any]:
    """Return the class weights, if there are some."""
    weights = getattr(task, "class_weights", ())
    return {"class_weights": list(weights)} if weights else {}


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
        "draw": {**prepared.drawn, "seed": prepared.draw_seed},
        "row_digests": prepared.digests(),
        **_origin(prepared),
        **_weights(prepared.task),
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

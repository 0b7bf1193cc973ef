"""Runs with an output folder: record a trajectory, tune in a basis, evaluate an adapter.

Invalid input is refused before any work starts; results are written only when they are complete.
"""

import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

import tinyspan.interop.lora  # noqa: F401 - registers the constructor of its bases, which names their method
from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import CONSTRUCTORS
from tinyspan.errors import InputError
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.io.folders import PREDICTIONS, RESULT, UNFINISHED, check_folder, claimed, prepare_folder, resumable
from tinyspan.io.manifests import attach
from tinyspan.io.storage import read_json, replacing, write_json, writing
from tinyspan.labels import positions
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partitioning import by_layer
from tinyspan.trajectories.points import bytes_of, check_room, trajectory_bytes
from tinyspan.trajectories.recorder import check_deltas
from tinyspan.workflows.checks import CheckedModel, check_evaluation, check_rank
from tinyspan.workflows.models import (
    LoadedModel,
    base_model,
    embedding_modules,
    head_modules,
    initialise_head,
    load_model,
    output_names,
    result_of_run,
)
from tinyspan.workflows.results import keep_reading, thresholds_of, trained_on, with_thresholds
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.settings import Settings, SubspaceOptions
from tinyspan.workflows.tasks.base import Progress
from tinyspan.workflows.training import fine_tune, run_of, score

__all__ = [
    "evaluate",
    "method_of",
    "record",
    "starting_model",
    "subspace_model",
    "tune",
]

STATES = 3  # maximum number of training states on disk: the newest two, and the one being written; the best is one more


def record(
    prepared: Prepared,
    settings: Settings,
    output: Path,
    *,
    every: int | Literal["epoch"] = "epoch",
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    score_every_epoch: bool = True,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = iter,
) -> dict[str, Any]:
    """Fine-tune all weights and write the trajectory, the fine-tuned `model/` and `result.json` to `output`.

    The training state is saved with every point. After an interruption, the same call resumes from the newest one. With
    `settings.patience` the trajectory ends where training stopped, and `model/` has the weights of the best epoch.

    Args:
        prepared: model and rows.
        settings: settings of the training.
        output: folder to write.
        every: record a point after every epoch, or every given number of steps.
        overwrite: replace an earlier trajectory.
        callbacks: callbacks of the Trainer.
        score_every_epoch: whether to score after every epoch, or only after the last one.
        dtype: dtype of the stored deltas; see `TrajectoryRecorder`.
        say: function that gets a message about the required disk space, before anything is written.
        progress: progress bar of generation, if the task has prompts.

    Raises:
        InputError: the output folder is in use, `every` exceeds the number of steps, or there are no training rows.
        StorageError: there is not enough disk space for the trajectory, the training states and the model.
    """
    check_folder(output, "trajectory", overwrite, [Path(prepared.model)], resumable=True)
    prepared, rows = _to_train(prepared, settings)
    steps = settings.steps(rows)
    if every != "epoch" and every > steps:
        raise InputError(f"every={every} records nothing: the run has {steps} steps")
    check_deltas(dtype)
    model = starting_model(prepared, settings)
    per_point = settings.steps_per_epoch(rows) if every == "epoch" else every
    _check_disk(model, output, -(-steps // per_point), dtype, say, STATES + (settings.patience is not None))
    job = {"command": "record", **run_of(prepared, settings), "every": every, "score_every_epoch": score_every_epoch}
    job |= {} if dtype is None else {"dtype": str(dtype)[6:]}
    with resumable(output, "trajectory", job, overwrite):
        if not (output / RESULT).is_file():
            result = fine_tune(
                model,
                prepared,
                settings,
                "full",
                [TrajectoryCallback(output, every, overwrite=True, resume=True, dtype=dtype), *callbacks],
                score_every_epoch=score_every_epoch,
                checkpoints=output / UNFINISHED,
                save_every=every,
                progress=progress,
                predictions=output / UNFINISHED / PREDICTIONS,
            )
            keep_reading(model.config, settings.max_length, result.get("thresholds"))
            _save_model(model, prepared, output / "model")
            _publish(result, output / UNFINISHED, output)
        attach(output, [*_results(output), *(f"model/{path.name}" for path in sorted((output / "model").iterdir()))])
    return read_json(output / RESULT)


def _to_train(prepared: Prepared, settings: Settings) -> tuple[Prepared, int]:
    """Return the rows, with those set aside that the settings ask for, and the number of training rows.

    Raises:
        InputError: there are no training rows.
    """
    if not prepared.train:
        raise InputError("there are no training rows: prepare the task with train=True")
    split = prepared.with_aside(settings.set_aside)
    return split, len(split.train or ())


def _check_disk(
    model: nn.Module, output: Path, points: int, dtype: torch.dtype | None, say: Callable[[str], None], states: int
) -> None:
    """Report the disk space that a recorded run needs, and check it; files of an interrupted run count as free."""
    trajectory = trajectory_bytes(by_layer(model), points, dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    beside = (3 * states + 1) * weights  # a state is the weights and two moments of AdamW; the model comes last
    free = check_room(output, trajectory + beside, bytes_of(output))
    say(
        f"needs {(trajectory + beside) / 1e6:,.1f} MB of disk, {trajectory / 1e6:,.1f} for {points} "
        f"{str(dtype or torch.float32)[6:]} points; {free / 1e6:,.0f} are free"
    )


def _publish(result: Mapping[str, Any], source: Path, output: Path) -> None:
    """Write a result, after the predictions in a temporary folder if there are any."""
    if (source / PREDICTIONS).is_file():
        with replacing(output / PREDICTIONS) as path:
            shutil.copyfile(source / PREDICTIONS, path)
    write_json(output / RESULT, result)


def _results(output: Path) -> list[str]:
    """Return the names of the files with results; a language task has no predictions of labels."""
    return [RESULT, *([PREDICTIONS] if (output / PREDICTIONS).is_file() else [])]


def _save_model(model: PreTrainedModel, prepared: Prepared, folder: Path) -> None:
    """Write model and tokenizer for `from_pretrained`; after a failure, incomplete files are deleted."""
    try:
        with writing(folder):
            model.save_pretrained(folder)
            prepared.tokenizer.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def tune(
    prepared: Prepared,
    settings: Settings,
    basis: Basis | str,
    output: Path,
    *,
    rank: int | None = None,
    options: SubspaceOptions = SubspaceOptions(),  # noqa: B008 - frozen
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress = iter,
    base: LoadedModel | None = None,
) -> dict[str, Any]:
    """Train z and the directly trained parameters in a basis, and write the adapter and `result.json` to `output`.

    The training state is saved after every epoch. After an interruption, the same call resumes from the newest one.

    Args:
        prepared: model and rows.
        settings: settings of the training.
        basis: a basis of the model's theta_0, or the name of a registered constructor, which is called with the run's
            seed: `random`; `fastfood` over all layers together, as in DID (Aghajanyan et al. 2021); `none`, the paper's
            freeze; or one of your own (see `register_basis`).
        output: output folder of the adapter.
        rank: rank of a basis that is constructed by name.
        options: see `SubspaceOptions`.
        overwrite: replace an earlier adapter.
        callbacks: callbacks of the Trainer.
        progress: progress bar of generation, if the task has prompts.
        base: the result of `check_tuned`, which is trained then; by default the model is loaded here.

    Raises:
        InputError: no constructor has the name, `rank` is missing for one that needs it or given for another basis,
            the output folder is in use, or there are no training rows.
        MismatchError: the basis was made for another model.
    """
    check_folder(output, "adapter", overwrite, [Path(prepared.model)], resumable=True)
    check_rank(basis, rank)
    prepared, _ = _to_train(prepared, settings)
    subspace = subspace_model(prepared, settings, basis, rank, options, base)
    job = {"command": "tune", **run_of(prepared, settings), "basis": subspace.basis.content_hash()}
    with resumable(output, "adapter", {**job, "options": asdict(options)}, overwrite):
        if not (output / RESULT).is_file():
            method, state = method_of(subspace.basis), output / UNFINISHED
            result = fine_tune(
                subspace,
                prepared,
                settings,
                method,
                callbacks,
                checkpoints=state,
                progress=progress,
                predictions=output / UNFINISHED / PREDICTIONS,
            )
            result["options"] = asdict(options)
            subspace.save_pretrained(output, overwrite=True)
            _publish(result, state, output)
        attach(output, _results(output))
    return read_json(output / RESULT)


def starting_model(prepared: Prepared, settings: Settings, base: LoadedModel | None = None) -> PreTrainedModel:
    """Return the model with a head for the task, before training; a new head is initialised as the settings say.

    Args:
        prepared: model and rows.
        settings: settings of the training.
        base: the result of `check_tuned`; by default the model is loaded here.
    """
    base = base or load_model(prepared.model, prepared.task, settings.seed, training=True)
    label_mean = prepared.label_mean if settings.regression_start == "mean" else None
    initialise_head(base, prepared.task, label_mean)
    return base.model


def subspace_model(
    prepared: Prepared,
    settings: Settings,
    basis: Basis | str,
    rank: int | None = None,
    options: SubspaceOptions = SubspaceOptions(),  # noqa: B008 - frozen
    base: LoadedModel | None = None,
) -> SubspaceModel:
    """Return the pre-trained model in a basis; the head, and the embeddings if selected, are trained directly."""
    model = starting_model(prepared, settings, base)
    if isinstance(basis, str):
        basis = CONSTRUCTORS[basis].draw(model, rank, settings.seed)
    modules = head_modules(model, basis.partition)
    if options.train_embeddings:
        modules += embedding_modules(model, basis.partition)
    return SubspaceModel(
        model,
        basis,
        modules_to_save=modules,
        ensemble=options.ensemble,
        init_std=options.init_std,
        seed=zlib.crc32(f"{prepared.task.name} {settings.seed}".encode()),  # each task has another initial z
        layer_scales=by_layer(model) if options.layer_scales else None,
    )


def evaluate(
    prepared: Prepared,
    settings: Settings,
    adapter: Path | OpenedAdapter | None = None,
    basis: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
    base: CheckedModel | None = None,
) -> dict[str, Any]:
    """Score a base model with an adapter, or a fine-tuned model without one, on the held-out rows.

    Args:
        prepared: model and rows.
        settings: settings of the computation; epochs and learning rates have no effect.
        adapter: a folder that `tune` wrote, or the result of `check_evaluation`.
        basis: folder of its basis, if that has moved.
        output: output folder of `result.json`.
        overwrite: replace an earlier result.
        progress: progress bar of generation, if the task has prompts.
        base: the result of `check_adapted`, if the weights have not changed since; by default the model is loaded
            here.

    Raises:
        InputError: neither the model nor the adapter has a trained head, the head was trained for other labels than the
            task's, the rows were prepared for another order of the labels, or the basis is missing.
        MismatchError: the adapter was trained with another model, or in another basis.
    """
    adapter = check_evaluation(adapter, basis, output, overwrite)
    if base is None:
        loaded = base_model(prepared.model, prepared.task, settings.seed, need_head=True, adapter=adapter)
        base = CheckedModel(loaded, None)
    _require_order(prepared, output_names(base.model.config, prepared.task, adapter))
    prepared = replace(
        prepared, task=with_thresholds(prepared.task, thresholds_of(base.model.config, adapter), prepared.labels)
    )
    _warn_of_trained_rows(prepared, result_of_run(prepared.model) if adapter is None else adapter.result)
    model: nn.Module = base.model
    method = "full"
    if adapter is not None:
        model = wrap_with_adapter(SubspaceModel, base.model, adapter, fingerprint=base.fingerprint)
        method = method_of(model.basis)
    with tempfile.TemporaryDirectory() as scratch:
        predictions = None if output is None else Path(scratch) / PREDICTIONS
        result = score(model, prepared, settings, method, progress, predictions)
        if output is not None:
            with claimed(output):
                prepare_folder(output, "result", overwrite)
                _publish(result, Path(scratch), output)
    return result


def _warn_of_trained_rows(prepared: Prepared, trained: Mapping[str, Any] | None) -> None:
    """Warn if rows that are scored are among those of the run of a result, and are not its held-out rows."""
    ours, theirs = getattr(prepared.task, "origin", {}), (trained or {}).get("data", {})
    if "path" not in ours or not trained_on(trained, Path(ours["path"])):
        return
    held_out = theirs.get("held_out_rows")
    if ours["holdout"] != theirs["holdout"] or (held_out and not {*prepared.row_numbers} <= {*held_out}):
        warnings.warn(
            f"the model was trained on {theirs['path']} with holdout={theirs['holdout']}, and these are not all its "
            "held-out rows: rows of training are scored, and the score is too high",
            stacklevel=3,
        )


def _require_order(prepared: Prepared, names: Sequence[str]) -> None:
    """Check that the labels of the rows are numbered in the order of a head's outputs.

    Raises:
        InputError: the orders differ.
    """
    labels = prepared.task.labels
    if positions(labels, prepared.labels) != positions(labels, names):
        raise InputError(
            f"the rows were prepared for the outputs {', '.join(prepared.labels)}, and the head has the outputs "
            f"{', '.join(names)}: call prepare() with the model and adapter that are to be scored"
        )


def method_of(basis: Basis) -> str:
    """Return the name of the method that trains in such a basis, from the paper or the registration of the constructor.

    Raises:
        InputError: the basis has no construction, or no constructor is registered under the name in it.
    """
    if "constructor" not in basis.construction:
        raise InputError("the basis has no construction, by which results name it; use Basis.from_directions")
    return CONSTRUCTORS[basis.construction["constructor"]].method

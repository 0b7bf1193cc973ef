"""Runs with an output folder: record a trajectory, tune in a basis, evaluate or export an adapter.

Invalid input is refused before any work starts; results are written only when they are complete.
"""

import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import CONSTRUCTORS, drawn_constructor, drawn_names
from tinyspan.errors import InputError
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.interop.deltas import export_delta
from tinyspan.interop.lora import export_lora
from tinyspan.io.folders import PREDICTIONS, RESULT, UNFINISHED, check_folder, claimed, prepare_folder, resumable
from tinyspan.io.storage import attach, read_json, reading, replacing, write_json, writing
from tinyspan.labels import positions
from tinyspan.model.base import check_model
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter, opened
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partitioning import by_layer
from tinyspan.trajectories.points import bytes_of, check_room, trajectory_bytes
from tinyspan.trajectories.recorder import check_deltas
from tinyspan.workflows.models import (
    LoadedModel,
    base_model,
    embedding_modules,
    head_modules,
    initialise_head,
    load_model,
    output_names,
    tokenizer_of,
)
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import TASKS, TYPES, Labelled, Task, get_task
from tinyspan.workflows.tasks.base import Progress
from tinyspan.workflows.training import fine_tune, run_of, score

__all__ = [
    "CheckedModel",
    "Described",
    "SubspaceOptions",
    "check_adapted",
    "check_evaluation",
    "check_rank",
    "check_tuned",
    "evaluate",
    "export",
    "method_of",
    "record",
    "settings_of",
    "starting_model",
    "stored_task",
    "subspace_model",
    "thresholds_of",
    "tune",
    "with_thresholds",
]

THRESHOLDS = "label_thresholds"  # key in the config of a model: threshold of each label, such as of multi-label ones
STATES = 3  # maximum number of training states on disk: the newest two, and the one being written; the best is one more


@dataclass(frozen=True)
class SubspaceOptions:
    """Initialisation of z, and what is trained besides z.

    Attributes:
        ensemble: h, the number of vectors that are averaged; the paper uses 16.
        init_std: standard deviation of the initial values of z; with 0, training starts at theta_0.
        train_embeddings: whether to train the embeddings directly, as the paper does, or freeze them.
        layer_scales: whether to learn one scale per layer besides z, as in SAID.

    Raises:
        InputError: `ensemble` is below 1, or `init_std` is negative, NaN or infinite.
    """

    ensemble: int = 1
    init_std: float = 0.0
    train_embeddings: bool = True
    layer_scales: bool = False

    def __post_init__(self) -> None:
        if self.ensemble < 1 or not 0 <= self.init_std < math.inf:
            raise InputError(
                f"expected ensemble >= 1 and a finite init_std >= 0, got {self.ensemble} and {self.init_std}"
            )


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
            if "thresholds" in result:
                setattr(model.config, THRESHOLDS, result["thresholds"])
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
    options: SubspaceOptions = SubspaceOptions(),
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
    options: SubspaceOptions = SubspaceOptions(),
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
    base: "CheckedModel | None" = None,
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


def export(
    model: str,
    task: str | Task | None,
    adapter: Path,
    output: Path,
    to: Literal["lora", "delta", "merged"],
    basis: Path | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
) -> str:
    """Write a base model with an adapter in another format, and return a message that describes it.

    Args:
        model: path, hub id or `minilm`.
        task: the task of the adapter; None for the one in its `result.json`.
        adapter: a folder that `tune` wrote.
        output: folder to write, or for a delta a file.
        to: the format.
        basis: folder of its basis, if that has moved.
        rank: rank of a LoRA; by default it is exact.
        error: relative error allowed in each weight of a LoRA, instead of `rank`.

    Raises:
        InputError: the output exists, a rank or error is given for a format without one, the task is of another type or
            has other labels, or neither the model nor the adapter has a trained head.
        MismatchError: the adapter was trained with another model, or in another basis.
    """
    source = OpenedAdapter(adapter, basis)
    task = stored_task(source) if task is None else get_task(task)
    _require_type(task, source)
    if to != "lora" and (rank, error) != (None, None):
        raise InputError(f"rank= and error= apply to a LoRA; a {to} export is exact")
    if output.exists() and (to == "delta" or not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists already; choose another output")
    _ = source.stored_basis  # opens the basis, or fails, before the model is loaded
    base = base_model(model, task, 0, need_head=True, adapter=source)
    subspace = wrap_with_adapter(SubspaceModel, base, source)
    if to == "lora":
        lora = export_lora(subspace, output, rank=rank, error=error)
        largest = max(lora.ranks.values())
        return f"a LoRA of rank up to {largest}, {lora.numbers:,} numbers, relative error {lora.error:.1e}: {output}"
    if to == "delta":
        return f"a delta of {export_delta(subspace, output) / 1e6:,.2f} MB: {output}"
    with writing(output):
        tokenizer = tokenizer_of(model, base.config)
        # so that a pipeline with truncation=True, and `predict`, cut rows where training did
        tokenizer.model_max_length = min(tokenizer.model_max_length, settings_of(source).max_length)
        merged: Any = subspace.merge()
        if thresholds := thresholds_of(merged.config, source):
            setattr(merged.config, THRESHOLDS, thresholds)
        merged.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return f"a merged model: {output}"


class Described(Protocol):
    """A folder that `result.json` describes: an adapter, or a recorded run."""

    @property
    def folder(self) -> Path:
        """The folder."""

    @property
    def result(self) -> Mapping[str, Any] | None:
        """The content of `result.json`, if there is one."""


def stored_task(source: Described) -> Task:
    """Return the task for which an adapter or a run was trained, from its `result.json`; its rows are not read.

    Raises:
        InputError: there is no `result.json`, it is of an earlier version, or its task or type is not registered.
    """
    if (result := source.result) is None:
        raise InputError(f"{source.folder} has no {RESULT} that names its task: give the task (--task or --task-type)")
    with reading(source.folder / RESULT):
        name, kind, labels = result["task"], result.get("type"), tuple(result.get("labels") or ())
        text, metric = tuple(result.get("data", {}).get("text", ("text",))), result["metric"]
    if not isinstance(kind, str) or kind not in TYPES or (name in TASKS and "data" not in result):
        return _registered(name, source.folder)
    cls = TYPES[kind]
    return cls(name, text, labels, metric) if issubclass(cls, Labelled) else cls(kind)


def thresholds_of(config: Any, adapter: OpenedAdapter | None) -> Mapping[str, float] | None:
    """Return the threshold of each label, from an adapter's result or else the model's config, if there are any."""
    if adapter is not None:
        return (adapter.result or {}).get("thresholds")
    thresholds: Mapping[str, float] | None = getattr(config, THRESHOLDS, None)
    return thresholds


def with_thresholds(task: Task, thresholds: Mapping[str, float] | None, outputs: Sequence[str]) -> Task:
    """Return a task with the thresholds of its outputs, if every output has one; see `Labelled.with_thresholds`."""
    if not isinstance(task, Labelled) or thresholds is None or not {*outputs} <= {*thresholds}:
        return task
    return task.with_thresholds([thresholds[name] for name in outputs])


def check_evaluation(
    adapter: Path | OpenedAdapter | None, basis: Path | None, output: Path | None, overwrite: bool
) -> OpenedAdapter | None:
    """Check the arguments of `evaluate` before any work; return the adapter, opened with its basis."""
    if output is not None:
        check_folder(output, "result", overwrite)
    if adapter is None and basis is not None:
        raise InputError("basis= needs adapter=: a basis alone does not determine z")
    if adapter is None:
        return None
    source = adapter if isinstance(adapter, OpenedAdapter) else OpenedAdapter(adapter, basis)
    _ = source.stored_basis  # opens the basis, or fails
    return source


def check_tuned(model: str, task: str | Task, basis: Basis, seed: int) -> LoadedModel:
    """Load a model to train, and check that a basis fits its weights, before rows are read and training starts.

    Args:
        model: path, hub id or `minilm`.
        task: task that determines the head.
        basis: basis to train in.
        seed: the seed in the settings of the training, with which a new head is initialised.

    Raises:
        MismatchError: the basis was made for another model.
        InputError: the model cannot be loaded, or its weights are half precision, NaN or infinite.
    """
    loaded = load_model(model, get_task(task), seed, training=True)
    check_model(loaded.model, basis)
    return loaded


class CheckedModel(NamedTuple):
    """A model that `check_adapted` loaded, and its fingerprint; None if it was not compared with an adapter."""

    model: PreTrainedModel
    fingerprint: Mapping[str, str] | None


def check_adapted(model: str, task: str | Task, adapter: Path | OpenedAdapter | None) -> CheckedModel:
    """Load a model to evaluate, with a trained head, and check that an adapter fits the model and the task."""
    source = opened(adapter)
    if source is not None:
        _require_type(task, source)
    loaded = base_model(model, get_task(task), 0, need_head=True, adapter=source)
    return CheckedModel(loaded, None if source is None else source.bind(loaded))


def settings_of(source: Path | Described | None) -> Settings:
    """Return the settings in the `result.json` of an adapter or a run, or the defaults."""
    described = OpenedAdapter(source) if isinstance(source, Path) else source
    if described is None or (result := described.result) is None:
        return Settings()
    names = {field.name for field in fields(Settings)}
    with reading(described.folder / RESULT):
        stored = {"regression_start": "zero", **result["settings"]}  # older results lack it and started at zero
        return Settings(**{name: value for name, value in stored.items() if name in names})


def _require_type(task: str | Task, adapter: OpenedAdapter) -> None:
    """Check that the task is of the type for which an adapter was trained, if its `result.json` contains that.

    Raises:
        InputError: the types differ, or the file is of an earlier version and its task is not registered.
    """
    wanted = get_task(task)
    if (result := adapter.result) is None:
        return
    with reading(adapter.folder / RESULT):
        trained, kind = result["task"], result.get("type")
    if kind is None:  # a file of an earlier version
        kind = wanted.type if trained == wanted.name else _registered(trained, adapter.folder).type
    if kind != wanted.type:
        raise InputError(f"{adapter} was trained for {trained} ({kind}), not for {wanted.name} ({wanted.type})")


def _registered(name: str, trained: Path) -> Task:
    """Return the task that an adapter or a run was trained for.

    Raises:
        InputError: there is none of this name.
    """
    try:
        return get_task(name)
    except InputError as error:
        raise InputError(
            f"{trained} was trained for the task {name!r:.100}, which is not registered here; import the module that "
            "registers it"
        ) from error


def check_rank(basis: Basis | str, rank: int | None) -> None:
    """Check that a rank is given if, and only if, the basis is a constructor that needs one."""
    constructor = drawn_constructor(basis)
    takes, needs = (constructor.takes("rank"), constructor.needs("rank")) if constructor else (False, False)
    if (rank is None and needs) or (rank is not None and not takes):
        names = " or ".join(drawn_names("rank"))
        raise InputError(f"give rank= with basis={names}, and only then: other bases have their own rank")


def method_of(basis: Basis) -> str:
    """Return the name of the method that trains in such a basis, from the paper or the registration of the constructor.

    Raises:
        InputError: the basis has no construction, or no constructor is registered under the name in it.
    """
    if "constructor" not in basis.construction:
        raise InputError("the basis has no construction, by which results name it; use Basis.from_directions")
    return CONSTRUCTORS[basis.construction["constructor"]].method

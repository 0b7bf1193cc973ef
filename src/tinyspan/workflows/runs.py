"""One run with its folder: record a trajectory, tune in a basis, evaluate or export an adapter.

Bad input is refused before any work starts; results appear when they are whole.
"""

import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import CONSTRUCTORS, drawn_constructor, drawn_names
from tinyspan.errors import InputError
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.interop.deltas import export_delta
from tinyspan.interop.lora import export_lora
from tinyspan.io.folders import UNFINISHED, check_folder, claimed, prepare_folder, resumable
from tinyspan.io.storage import attach, read_json, reading, write_json, writing
from tinyspan.labels import positions
from tinyspan.model.base import check_model
from tinyspan.model.files import put_adapter
from tinyspan.model.opened import OpenedAdapter, opened
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import by_layer
from tinyspan.trajectories.recorder import bytes_of, check_deltas, check_room, trajectory_bytes
from tinyspan.workflows.models import base_model, embedding_modules, head_modules, output_names, tokenizer_of
from tinyspan.workflows.tasks.base import Progress, Task, get_task
from tinyspan.workflows.training import Prepared, Settings, fine_tune, run_of, score

__all__ = [
    "RESULT",
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
    "subspace_model",
    "tune",
]

RESULT = "result.json"
STATES = 3  # of training, at most at once: the newest two, and the one that is being written


@dataclass(frozen=True)
class SubspaceOptions:
    """How z starts and what trains beside it.

    Attributes:
        ensemble: h, how many vectors are averaged; the paper has 16.
        init_std: standard deviation of the initial values of z; with 0, training starts at theta_0.
        train_embeddings: train the embeddings directly, as the paper does, or freeze them.
        layer_scales: learn one scale per layer besides z, as SAID does.

    Raises:
        InputError: the ensemble is below 1, or the standard deviation negative, NaN or infinite.
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
    """Fine-tune in the ordinary way and leave the trajectory, the fine-tuned `model/` and `result.json` in `output`.

    The state of training is saved with every point. After an interruption the same call goes on from the newest one.

    Args:
        prepared: model and rows.
        settings: how to train.
        output: folder to write.
        every: record a point after every epoch, or every so many steps.
        overwrite: replace an earlier trajectory.
        callbacks: of the Trainer.
        score_every_epoch: or after the last epoch alone.
        dtype: of the stored deltas; see `TrajectoryRecorder`.
        say: is told the disk that will be needed, before anything is written.
        progress: of generation, if the task has prompts.

    Raises:
        InputError: the output folder is in use, or `every` is more than all steps.
        StorageError: the disk has no room for the trajectory, the states of training and the model.
    """
    check_folder(output, "trajectory", overwrite, [Path(prepared.model)], resumable=True)
    assert prepared.train is not None
    steps = settings.steps(len(prepared.train))
    if every != "epoch" and every > steps:
        raise InputError(f"--every {every} records nothing: the run has {steps} steps")
    check_deltas(dtype)
    model = starting_model(prepared, settings)
    per_point = settings.steps_per_epoch(len(prepared.train)) if every == "epoch" else every
    _check_disk(model, output, -(-steps // per_point), dtype, say)
    recipe = {"command": "record", **run_of(prepared, settings), "every": every, "score_every_epoch": score_every_epoch}
    recipe |= {} if dtype is None else {"dtype": str(dtype)[6:]}
    with resumable(output, "trajectory", recipe, overwrite):
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
            )
            _save_model(model, prepared, output / "model")
            write_json(output / RESULT, result)
        attach(output, [RESULT, *(f"model/{path.name}" for path in sorted((output / "model").iterdir()))])
    return read_json(output / RESULT)


def _check_disk(
    model: nn.Module, output: Path, points: int, dtype: torch.dtype | None, say: Callable[[str], None]
) -> None:
    """Say what disk a recorded run needs, what it left when it was interrupted included; refuse if it is not there."""
    trajectory = trajectory_bytes(by_layer(model), points, dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    beside = (3 * STATES + 1) * weights  # a state is weights and AdamW's two moments; the model comes last
    free = check_room(output, trajectory + beside, bytes_of(output))
    say(
        f"needs {(trajectory + beside) / 1e6:,.1f} MB of disk, {trajectory / 1e6:,.1f} for {points} "
        f"{str(dtype or torch.float32)[6:]} points; {free / 1e6:,.0f} are free"
    )


def _save_model(model: PreTrainedModel, prepared: Prepared, folder: Path) -> None:
    """Write model and tokenizer for `from_pretrained`; on failure nothing is left of them."""
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
) -> dict[str, Any]:
    """Train z and the directly trained parameters in a basis and leave the adapter and `result.json` in `output`.

    The state of training is saved after every epoch. After an interruption the same call goes on from the newest one.

    Args:
        prepared: model and rows.
        settings: how to train.
        basis: a basis of the model's theta_0, or the name of a registered constructor that makes one with the run's
            seed: `random`; `fastfood` of all layers together, as in DID (Aghajanyan et al. 2021); `none` for the
            paper's freeze; or one of your own (see `register_basis`).
        output: folder for the adapter.
        rank: of a basis that is made by name.
        options: see `SubspaceOptions`.
        overwrite: replace an earlier adapter.
        callbacks: of the Trainer.
        progress: of generation, if the task has prompts.

    Raises:
        InputError: no constructor has the name, `rank` is missing for one that needs it or given for another basis, or
            the output folder is in use.
        MismatchError: the basis was made for another model.
    """
    check_folder(output, "adapter", overwrite, [Path(prepared.model)], resumable=True)
    check_rank(basis, rank)
    subspace = subspace_model(prepared, settings, basis, rank, options)
    recipe = {"command": "tune", **run_of(prepared, settings), "basis": subspace.basis.content_hash()}
    with resumable(output, "adapter", {**recipe, "options": asdict(options)}, overwrite):
        if not (output / RESULT).is_file():
            method, state = method_of(subspace.basis), output / UNFINISHED
            result = fine_tune(subspace, prepared, settings, method, callbacks, checkpoints=state, progress=progress)
            subspace.save_pretrained(output, overwrite=True)
            write_json(output / RESULT, result)
        attach(output, [RESULT])
    return read_json(output / RESULT)


def starting_model(prepared: Prepared, settings: Settings) -> PreTrainedModel:
    """Return the model with a head for the task, as training starts from it: a new head as the settings say."""
    label_mean = prepared.label_mean if settings.regression_start == "mean" else None
    return base_model(prepared.model, prepared.task, settings.seed, training=True, label_mean=label_mean)


def subspace_model(
    prepared: Prepared,
    settings: Settings,
    basis: Basis | str,
    rank: int | None = None,
    options: SubspaceOptions = SubspaceOptions(),
) -> SubspaceModel:
    """Return the pre-trained model in a basis, with its head, and its embeddings if wanted, trained as usual."""
    model = starting_model(prepared, settings)
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
        seed=zlib.crc32(f"{prepared.task.name} {settings.seed}".encode()),  # tasks must not share where z starts
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
    base: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Score a base model with an adapter, or without one a fine-tuned model, on the held-out rows.

    Args:
        prepared: model and rows.
        settings: how to compute; epochs and rates play no part.
        adapter: what `tune` wrote, or what `check_evaluation` opened.
        basis: its basis, if that has moved since.
        output: where to leave `result.json`.
        overwrite: replace an earlier one.
        progress: of generation, if the task has prompts.
        base: the model as `check_adapted` has loaded it; by default it is loaded here.

    Raises:
        InputError: neither the model nor the adapter has a trained head, the head was trained for other labels than the
            task's, the rows were prepared for another order of the labels, or the basis is not found.
        MismatchError: the adapter was made for another model, or in another basis.
    """
    adapter = check_evaluation(adapter, basis, output, overwrite)
    if base is None:
        base = base_model(prepared.model, prepared.task, settings.seed, need_head=True, adapter=adapter)
    _require_order(prepared, output_names(base.config, prepared.task, adapter))
    model: nn.Module = base
    method = "full"
    if adapter is not None:
        model = put_adapter(SubspaceModel, base, adapter)
        method = method_of(model.basis)
    result = score(model, prepared, settings, method, progress)
    if output is not None:
        with claimed(output):
            prepare_folder(output, "result", overwrite)
            write_json(output / RESULT, result)
    return result


def _require_order(prepared: Prepared, names: Sequence[str]) -> None:
    """Refuse rows whose labels are numbered in another order than the outputs of a head.

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
    task: str | Task,
    adapter: Path,
    output: Path,
    to: Literal["lora", "delta", "merged"],
    basis: Path | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
) -> str:
    """Write a base model with an adapter in another form, and return what to tell of it.

    Raises:
        InputError: the output is there already, a cut is given for what is not cut, the task is of another kind or has
            other labels, or neither the model nor the adapter has a trained head.
        MismatchError: the adapter was made for another model, or in another basis.
    """
    source = OpenedAdapter(adapter, basis)
    _require_type(task, source)
    if to != "lora" and (rank, error) != (None, None):
        raise InputError(f"--rank and --error are of a LoRA; a {to} export is exact")
    if output.exists() and (to == "delta" or not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already; choose another output")
    _ = source.stored_basis  # is opened, or refused, before the model is loaded
    base = base_model(model, get_task(task), 0, need_head=True, adapter=source)
    subspace = put_adapter(SubspaceModel, base, source)
    if to == "lora":
        found = export_lora(subspace, output, rank=rank, error=error)
        largest = max(found.ranks.values())
        return f"a LoRA of rank up to {largest}, {found.numbers:,} numbers, relative error {found.error:.1e}: {output}"
    if to == "delta":
        return f"a delta of {export_delta(subspace, output) / 1e6:,.2f} MB: {output}"
    with writing(output):
        tokenizer = tokenizer_of(model, base.config)
        subspace.merge().save_pretrained(output)  # type: ignore[operator]
        tokenizer.save_pretrained(output)
    return f"a merged model: {output}"


def check_evaluation(
    adapter: Path | OpenedAdapter | None, basis: Path | None, output: Path | None, overwrite: bool
) -> OpenedAdapter | None:
    """Refuse what `evaluate` cannot use, before any work; return the adapter, opened with its basis."""
    if output is not None:
        check_folder(output, "result", overwrite)
    if adapter is None and basis is not None:
        raise InputError("--basis goes with --adapter: a basis alone says nothing about z")
    if adapter is None:
        return None
    source = adapter if isinstance(adapter, OpenedAdapter) else OpenedAdapter(adapter, basis)
    _ = source.stored_basis  # is opened, or refused
    return source


def check_tuned(model: str, task: str | Task, basis: Basis) -> None:
    """Refuse to tune in a basis that was made for another model: the weights are read, before rows are and training."""
    check_model(base_model(model, get_task(task), 0), basis)


def check_adapted(model: str, task: str | Task, adapter: Path | OpenedAdapter | None) -> PreTrainedModel:
    """Load a model to evaluate, with a trained head; refuse one, or a task, that an adapter was not trained for."""
    source = opened(adapter)
    if source is not None:
        _require_type(task, source)
    loaded = base_model(model, get_task(task), 0, need_head=True, adapter=source)
    if source is not None:
        source.bind(loaded)
    return loaded


def settings_of(adapter: Path | OpenedAdapter | None) -> Settings:
    """Return the settings an adapter was tuned with, as its `result.json` tells, or the defaults."""
    source = opened(adapter)
    if source is None or (result := source.result) is None:
        return Settings()
    known = {field.name for field in fields(Settings)}
    with reading(source.folder / RESULT):
        told = {"regression_start": "zero", **result["settings"]}  # there was no other when it was not told
        return Settings(**{name: value for name, value in told.items() if name in known})


def _require_type(task: str | Task, adapter: OpenedAdapter) -> None:
    """Refuse another kind of task than the one that an adapter was trained for, as far as its `result.json` tells."""
    wanted = get_task(task)
    if (result := adapter.result) is not None:
        with reading(adapter.folder / RESULT):
            trained = wanted if result["task"] == wanted.name else get_task(result["task"])
        if trained.type != wanted.type:
            raise InputError(f"{adapter} was trained for {trained.name} ({trained.type}), not for {wanted.name}")


def check_rank(basis: Basis | str, rank: int | None) -> None:
    """Refuse a rank where the basis has its own, and a constructor that needs one without it."""
    constructor = drawn_constructor(basis)
    takes, needs = (constructor.takes("rank"), constructor.needs("rank")) if constructor else (False, False)
    if (rank is None and needs) or (rank is not None and not takes):
        names = " or ".join(drawn_names("rank"))
        raise InputError(f"give --rank with --basis {names}, and only then: others have a rank of their own")


def method_of(basis: Basis) -> str:
    """Return what the paper, or whoever registered the constructor, calls training in such a basis.

    Raises:
        InputError: no constructor is registered under the name that the basis has from its own.
    """
    return CONSTRUCTORS[basis.construction.get("constructor", "")].method

"""Commands from a model to an adapter: record, discover, tune, evaluate."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tinyspan.cli.application import command, open_display
from tinyspan.cli.options import (
    BasisName,
    BatchSize,
    ClassWeights,
    Data,
    Epochs,
    EvalRows,
    Holdout,
    Label,
    LearningRate,
    MaxLength,
    MaxTargetLength,
    Metric,
    Model,
    Output,
    Overwrite,
    Patience,
    Precision,
    PrecisionOption,
    RegressionStart,
    Seed,
    SetAside,
    TaskName,
    TaskOptions,
    TaskType,
    Text,
    TrainEmbeddings,
    TrainRows,
    open_basis,
)
from tinyspan.errors import InputError


@command
def record(
    model: Model,
    output: Output,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    holdout: Holdout = None,
    metric: Metric = None,
    class_weights: ClassWeights = None,
    epochs: Epochs = 32,
    every: Annotated[str, typer.Option(help="Record a point after every `epoch`, or every N steps.")] = "epoch",
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    max_target_length: MaxTargetLength = 64,
    learning_rate: LearningRate = 2e-5,
    regression_start: RegressionStart = "mean",
    precision: PrecisionOption = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Number format of the recorded deltas.")
    ] = "float32",
    train_rows: TrainRows = None,
    set_aside: SetAside = 0,
    patience: Patience = None,
    eval_rows: EvalRows = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune all weights and record the trajectory."""
    from tinyspan.io.folders import check_folder
    from tinyspan.workflows.settings import Settings

    points: Any = every if every == "epoch" else _steps(every)
    settings = Settings(
        epochs,
        batch_size,
        max_length,
        learning_rate,
        precision=precision,
        seed=seed,
        max_target_length=max_target_length,
        regression_start=regression_start,
        set_aside=set_aside,
        patience=patience,
    )
    chosen = TaskOptions(task, task_type, data, text, label, holdout, metric, class_weights)
    check_folder(output, "trajectory", overwrite, [Path(model)], resumable=True)
    with open_display() as display:
        prepared = chosen.prepare(model, chosen.chosen(display.say), settings, train_rows, eval_rows)
        import torch

        from tinyspan.workflows import runs

        result = runs.record(
            prepared,
            settings,
            output,
            every=points,
            overwrite=overwrite,
            callbacks=[display.training("full")],
            dtype=torch.bfloat16 if dtype == "bfloat16" else None,
            say=display.say,
            progress=display.generating,
        )
    print_result(result, output)


@command
def discover(
    trajectories: Annotated[list[Path], typer.Argument(help="Folders that `record` wrote; several are stacked.")],
    output: Output,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-k", min=1, help="Directions per block; this or --explained-variance is required."),
    ] = None,
    explained_variance: Annotated[
        float | None,
        typer.Option(help="Instead of --rank: keep as many as hold this share of the variance."),
    ] = None,
    center: Annotated[
        Literal["init", "mean", "none"],
        typer.Option(help="Subtract theta_0, the mean of the points, or nothing (the paper's formula)."),
    ] = "init",
    partition: Annotated[
        str,
        typer.Option(help="Blocks: one per `layer`, one per `module`, the whole `model`, or the name of a partition."),
    ] = "layer",
    density: Annotated[
        float, typer.Option(help="Share of the coordinates with directions: those that change most; 1: all.")
    ] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"], typer.Option(help="Number format of the stored directions.")
    ] = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Find the directions of recorded trajectories."""
    import torch

    from tinyspan.bases.discovery import svd_basis
    from tinyspan.io.folders import check_folder
    from tinyspan.partitioning import regrouped
    from tinyspan.trajectories.trajectory import Trajectory

    check_folder(output, "basis", overwrite, trajectories, resumable=True)
    runs = [Trajectory(folder) for folder in trajectories]
    if (chosen := regrouped(runs[0].recorded, partition)) != runs[0].recorded:
        runs = [run.with_partition(chosen) for run in runs]
    with open_display() as display:
        basis = svd_basis(
            runs,
            rank,
            explained_variance=explained_variance,
            center=center,
            density=density,
            dtype=getattr(torch, dtype),
            folder=output,
            overwrite=overwrite,
            progress=lambda blocks: display.each(blocks, "discovering", len(runs[0].partition)),
        )
    print(f"{len(basis.partition)} blocks, up to {basis.rank} directions each, {basis.content_hash()[:12]}: {output}")


@command
def tune(
    model: Model,
    output: Output,
    basis: BasisName,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    holdout: Holdout = None,
    metric: Metric = None,
    class_weights: ClassWeights = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-k", min=1, help="Directions per block of a random or fastfood basis.")
    ] = None,
    ensemble: Annotated[int, typer.Option(min=1, help="Number of vectors z that are averaged; the paper uses 16.")] = 1,
    init_std: Annotated[
        float, typer.Option(min=0, help="Standard deviation of the initial values of z; 0 starts at theta_0.")
    ] = 0.0,
    train_embeddings: TrainEmbeddings = True,
    epochs: Epochs = 32,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    max_target_length: MaxTargetLength = 64,
    learning_rate: LearningRate = 2e-5,
    z_learning_rate: Annotated[float, typer.Option(help="Learning rate of z.")] = 1e-2,
    regression_start: RegressionStart = "mean",
    precision: PrecisionOption = "auto",
    train_rows: TrainRows = None,
    set_aside: SetAside = 0,
    patience: Patience = None,
    eval_rows: EvalRows = None,
    overwrite: Overwrite = False,
) -> None:
    """Train z in a basis, together with embeddings and head."""
    from tinyspan.bases.basis import Basis
    from tinyspan.io.folders import check_folder
    from tinyspan.workflows.checks import check_rank, check_tuned
    from tinyspan.workflows.settings import Settings, SubspaceOptions

    settings = Settings(
        epochs,
        batch_size,
        max_length,
        learning_rate,
        z_learning_rate,
        precision=precision,
        seed=seed,
        max_target_length=max_target_length,
        regression_start=regression_start,
        set_aside=set_aside,
        patience=patience,
    )
    tasks = TaskOptions(task, task_type, data, text, label, holdout, metric, class_weights)
    options = SubspaceOptions(ensemble, init_std, train_embeddings)
    check_folder(output, "adapter", overwrite, [Path(model), Path(basis)], resumable=True)
    check_rank(basis, rank)
    chosen = open_basis(basis)
    with open_display() as display:
        wanted = tasks.chosen(display.say)
        base = check_tuned(model, wanted, chosen, seed) if isinstance(chosen, Basis) else None
        prepared = tasks.prepare(model, wanted, settings, train_rows, eval_rows)
        from tinyspan.workflows import runs

        result = runs.tune(
            prepared,
            settings,
            chosen,
            output,
            rank=rank,
            options=options,
            overwrite=overwrite,
            callbacks=[display.training("tune")],
            progress=display.generating,
            base=base,
        )
    print_result(result, output)


@command
def evaluate(
    model: Model,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    holdout: Holdout = None,
    metric: Metric = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder that `tune` wrote; without it the model itself is scored.")
    ] = None,
    basis: Annotated[Path | None, typer.Option(help="The adapter's basis, if it has moved.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for result.json.")] = None,
    batch_size: BatchSize = 32,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum number of tokens per row; default: as in training, else 128."),
    ] = None,
    max_target_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens per completion; default: as tuned, else 64.")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Default: as the adapter was tuned, else auto.")] = None,
    eval_rows: EvalRows = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a fine-tuned model, or a base model with an adapter, on the held-out rows."""
    from dataclasses import replace

    from tinyspan.workflows.checks import check_adapted, check_evaluation
    from tinyspan.workflows.models import load_pretrained, trained_labels, trained_type
    from tinyspan.workflows.results import settings_of, trained_length

    source = check_evaluation(adapter, basis, output, overwrite)
    settings = settings_of(source)
    if source is None and max_length is None:
        max_length = trained_length(load_pretrained("AutoConfig", model))
    settings = replace(
        settings,
        batch_size=batch_size,
        max_length=max_length or settings.max_length,
        max_target_length=max_target_length or settings.max_target_length,
        precision=precision or settings.precision,
    )
    tasks = TaskOptions(task, task_type, data, text, label, holdout, metric)
    with open_display() as display:
        wanted = tasks.chosen(display.say, trained_labels(model, source), trained_type(model, source), train=False)
        base = check_adapted(model, wanted, source)
        prepared = tasks.prepare(model, wanted, settings, None, eval_rows, train=False, adapter=source)
        from tinyspan.workflows import runs

        result = runs.evaluate(prepared, settings, source, basis, output, overwrite, display.generating, base)
    print_result(result, output)


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--every takes `epoch` or a number of steps of at least 1, got {text!r}")
    return int(text)


SHOWN = (
    "accuracy",
    "f1_macro",
    "log_loss",
    "pearson",
    "spearman",
    "rmse",
    "entity_f1",
    "token_accuracy",
    "exact_match",
)


def print_result(result: dict[str, Any], output: Path | None) -> None:
    """Print the score of a run and the location of its files."""
    where = f": {output}" if output else ""
    message = f"{result['metric']} {result['score']:.4f}"
    if interval := result.get("intervals", {}).get(result["metric"]):
        message += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    if "majority" in result:
        message += f", one label for all rows {result['majority']:.4f}"
    others = result.get("metrics") or {}
    shown = [name for name in SHOWN if name in others][:3]
    message += "".join(f", {name} {others[name]:.4f}" for name in shown)
    for note in result.get("notes", ()):
        print(f"tinyspan: warning: {note}", file=sys.stderr)
    if generation := result.get("generation"):
        message += f", exact match {generation['exact_match']:.4f}, ROUGE-L {generation['rouge_l']:.4f}"
    print(f"{result['method']} on {result['task']}, {message}{where}")

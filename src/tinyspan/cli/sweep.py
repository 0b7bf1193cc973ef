"""The command that compares learning rates, ranks and seeds: sweep."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyspan.cli.application import command, open_display
from tinyspan.cli.options import (
    BasisName,
    BatchSize,
    ClassWeights,
    Epochs,
    EvalRows,
    Holdout,
    Label,
    MaxLength,
    MaxTargetLength,
    Metric,
    Model,
    Output,
    PrecisionOption,
    RegressionStart,
    TaskName,
    TaskOptions,
    TaskType,
    Text,
    TrainEmbeddings,
    TrainRows,
    open_basis,
)
from tinyspan.cli.studies import ExecutorName, ExecutorOptions, Workers, executor_options
from tinyspan.errors import InputError


@command
def sweep(
    model: Model,
    basis: BasisName,
    output: Output,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="As for `tune`; may be repeated, for a setting and an adapter per data set in one basis."),
    ] = None,
    text: Text = None,
    label: Label = None,
    holdout: Holdout = None,
    metric: Metric = None,
    class_weights: ClassWeights = None,
    learning_rates: Annotated[
        str, typer.Option(help="Learning rates of the directly trained parameters: RATE,RATE,...")
    ] = "1e-4,1e-3",
    z_learning_rates: Annotated[
        str | None, typer.Option(help="Learning rates of z, if the basis has one: RATE,RATE,...; default: 1e-2,4e-2.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Ranks of a constructed basis: RANK,RANK,...; a folder has its own rank.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, ...")] = 3,
    set_aside: Annotated[
        int,
        typer.Option(
            min=1, help="Number of training rows that are set aside, to compare the settings on; 200 by default."
        ),
    ] = 200,
    train_embeddings: TrainEmbeddings = True,
    epochs: Epochs = 32,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    max_target_length: MaxTargetLength = 64,
    regression_start: RegressionStart = "mean",
    precision: PrecisionOption = "auto",
    train_rows: TrainRows = None,
    eval_rows: EvalRows = None,
    workers: Workers = 1,
    executor: ExecutorName = "local",
    executor_option: ExecutorOptions = None,
) -> None:
    """Compare learning rates, ranks and seeds on training rows set aside; report the best on the held-out rows."""
    from tinyspan.bases.basis import Basis
    from tinyspan.bases.constructors import drawn_names
    from tinyspan.workflows.checks import check_tuned
    from tinyspan.workflows.settings import Settings, SubspaceOptions

    settings = Settings(
        epochs,
        batch_size,
        max_length,
        precision=precision,
        max_target_length=max_target_length,
        regression_start=regression_start,
        set_aside=set_aside,
    )
    chosen = open_basis(basis)
    if ranks is None and chosen in drawn_names("rank"):
        raise InputError(f"--basis {chosen} needs --ranks RANK,RANK,...")
    places: list[Path | None] = [*data] if data else [None]
    every = [TaskOptions(task, task_type, one, text, label, holdout, metric, class_weights) for one in places]
    from tinyspan.lab.sweep import Grid, has_z, run_sweep, sweep_table

    z_rates = z_learning_rates or ("1e-2,4e-2" if has_z(chosen) else None)
    grid = Grid(
        chosen,
        settings,
        _numbers("--learning-rates", learning_rates, float),
        (None,) if z_rates is None else _numbers("--z-learning-rates", z_rates, float),
        (None,) if ranks is None else _numbers("--ranks", ranks, int),
        seeds,
        SubspaceOptions(train_embeddings=train_embeddings),
    )
    with open_display() as display:
        prepared: dict[str, Any] = {}
        for tasks in every:
            wanted = tasks.chosen(display.say)
            if wanted.name in prepared:
                raise InputError(
                    f"two data sets are called {wanted.name!r}: several --data need --text and --label, and other names"
                )
            if isinstance(chosen, Basis) and not prepared:
                check_tuned(model, wanted, chosen, 0)
            prepared[wanted.name] = tasks.prepare(model, wanted, settings, train_rows, eval_rows)
        display.say(f"{settings.set_aside} training rows are set aside to compare the settings (--set-aside)")
        result = run_sweep(
            output,
            prepared,
            grid,
            display,
            workers=workers,
            executor=executor,
            executor_options=executor_options(executor_option),
        )
        for name, entry in result["data"].items():
            for note in entry["notes"]:
                display.say(f"{name}: {note}")
    print(sweep_table(result))
    print(f"Adapters of the chosen settings are in {output}: {', '.join(_folders(result))}")


def _folders(result: dict[str, Any]) -> list[str]:
    return [folder for entry in result["data"].values() for folder in entry["adapters"]]


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Parse numbers that are separated by commas."""
    try:
        return tuple(kind(entry) for entry in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} takes numbers separated by commas, got {text!r}") from error

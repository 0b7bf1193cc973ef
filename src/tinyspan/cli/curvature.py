"""The command that computes the curvature of the loss in z: curvature."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tinyspan.cli.application import command, open_display
from tinyspan.cli.options import (
    Data,
    Holdout,
    Label,
    Output,
    Overwrite,
    TaskName,
    TaskOptions,
    TaskType,
    Text,
    column_names,
)


@command
def curvature(
    run: Annotated[Path, typer.Argument(help="Folder that `record` or `tune` wrote.")],
    output: Output,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-k", min=1, help="Directions per block of a recorded run; default: 4, or all."),
    ] = None,
    partition: Annotated[
        str, typer.Option(help="Blocks of a recorded run: the whole `model`, or one per `layer` or `module`.")
    ] = "model",
    every: Annotated[
        int, typer.Option(min=1, help="Use every N-th point of a recorded run, and theta_0 and the last one.")
    ] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Use at most this many rows, drawn with a fixed seed.")] = 128,
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Rows of the run: training rows, or held-out ones.")
    ] = "train",
    method: Annotated[
        Literal["reverse", "central"],
        typer.Option(help="reverse: exact; central: differences of gradients, with less memory and for any model."),
    ] = "reverse",
    dtype: Annotated[
        Literal["float32", "float64"], typer.Option(help="Number format of the model during the computation.")
    ] = "float32",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows per batch; memory grows with it, and the result does not depend on it.")
    ] = 16,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model of an adapter; default: as in its result.json.")
    ] = None,
    basis: Annotated[Path | None, typer.Option(help="The adapter's basis, if it has moved.")] = None,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    holdout: Holdout = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Maximum number of tokens per row; default: as in the run, else 128.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compute the Hessian of the loss in z along a recorded run, or at an adapter: eigenvalues, sharpness, pictures."""
    from dataclasses import replace

    from tinyspan.io.folders import check_folder
    from tinyspan.workflows import curvature as workflow
    from tinyspan.workflows.loss_in_z import CurvatureOptions
    from tinyspan.workflows.models import trained_labels, trained_type
    from tinyspan.workflows.results import settings_of
    from tinyspan.workflows.run_rows import rows_of_run

    options = CurvatureOptions(rank, partition, every, rows, split, method, dtype, batch_size)
    source = workflow.opened_source(run, basis)
    name = source.model(model)
    check_folder(output, "curvature", overwrite, [run, Path(name)], resumable=True)
    with open_display() as display:
        if any(option is not None for option in (task, task_type, label, holdout)):
            tasks, settings = TaskOptions(task, task_type, data, text, label, holdout), settings_of(source)
            settings = replace(settings, max_length=max_length or settings.max_length)
            labels, kind = trained_labels(name, source.adapter), trained_type(name, source.adapter)
            wanted = tasks.chosen(display.say, labels, kind)
            prepared = tasks.prepare(name, wanted, settings, None, None, adapter=source.adapter)
        else:
            columns = column_names(text)
            prepared = rows_of_run(
                name, source, data, columns, adapter=source.adapter, max_length=max_length, split=split
            )
        result = workflow.curvature(
            source,
            prepared,
            output,
            options,
            overwrite=overwrite,
            say=display.say,
            expect=lambda batches: display.expect("batches", batches),
            advance=display.advance,
        )
    print_points(result)
    print(f"K = {result['K']}, {result['rows']} {split} rows: {output}")


def print_points(result: dict[str, Any]) -> None:
    """Print a line for each point."""
    print(" step      loss  |gradient|  sharpness    lowest     trace  Gauss-Newton")
    for point in result["points"]:
        step = "" if point["step"] is None else point["step"]
        largest = "" if point["gauss_newton"] is None else f"{point['gauss_newton'][0]:.4g}"
        numbers = f"{point['loss']:>8.4f}  {point['gradient_norm']:>10.4g}  {point['sharpness']:>9.4g}"
        print(f"{step:>5}  {numbers}  {point['hessian'][-1]:>8.3g}  {point['trace']:>8.4g}  {largest:>12}")
    for note in result["notes"]:
        print(f"Note: {note}.")

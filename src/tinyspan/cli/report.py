"""The command that writes a page about recorded runs, bases and adapters."""

from pathlib import Path
from typing import Annotated

import typer

from tinyspan.cli.application import command, open_display
from tinyspan.cli.options import Data, Text, column_names
from tinyspan.errors import InputError


@command
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of trajectories, bases, adapters, or that `evaluate`, `curvature` or `combine` wrote."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write; it needs no other file.")],
    loss_surface: Annotated[
        bool,
        typer.Option(
            "--loss-surface",
            help="Compute the training loss around the path of each recorded run: 63 forward passes of 32 rows, about "
            "half a minute for a small encoder on one CPU core. It reads the rows of the run's task again.",
        ),
    ] = False,
    data: Data = None,
    text: Text = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page.")] = False,
) -> None:
    """Write one page about a run, a basis or an adapter, or about several side by side."""
    from tinyspan.workflows.report import write_report

    if not loss_surface and (data is not None or text is not None):
        raise InputError("--data and --text are the rows of --loss-surface; nothing else in a page needs rows")
    with open_display() as display:
        surface_of = None
        if loss_surface:
            from tinyspan.workflows.report.surface import RunSurface

            surface_of = RunSurface(
                data, column_names(text), lambda rows: display.each(rows, "loss around the path", len(rows))
            )
        write_report(output, folders, surface_of=surface_of, overwrite=overwrite, say=display.say)
    print(f"Open {output}")

"""Commands on bases and adapters: suggest, export, inspect, unify."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from tinyspan.cli.application import command, open_display, printable
from tinyspan.cli.options import (
    BatchSize,
    Data,
    Holdout,
    Label,
    MaxLength,
    MaxTargetLength,
    Model,
    Output,
    Overwrite,
    PrecisionOption,
    Seed,
    TaskName,
    TaskOptions,
    TaskType,
    Text,
)


@command
def suggest(
    model: Model,
    candidates: Annotated[
        list[Path], typer.Argument(help="Folders of bases, or of trajectories, from which bases are computed.")
    ],
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    holdout: Holdout = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of training rows of the new task to use.")] = 300,
    rank: Annotated[
        int | None, typer.Option("--rank", "-k", min=1, help="Directions of a trajectory's basis; default: all.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for result.json.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    max_target_length: MaxTargetLength = 64,
    precision: PrecisionOption = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Rank bases of other tasks by the share of a new task's first gradients that lies in each."""
    from tinyspan.io.folders import check_folder
    from tinyspan.workflows.settings import Settings

    settings = Settings(
        batch_size=batch_size,
        max_length=max_length,
        precision=precision,
        seed=seed,
        max_target_length=max_target_length,
    )
    tasks = TaskOptions(task, task_type, data, text, label, holdout)
    if output is not None:
        check_folder(output, "result", overwrite, [Path(model), *candidates])
    with open_display() as display:
        wanted = tasks.chosen(display.say)
        from tinyspan.workflows import suggest

        with suggest.opened(model, wanted, candidates, rank) as bases:
            suggest.common_ranks(bases)
            prepared = tasks.prepare(model, wanted, settings, rows, rows)
            fitting = "" if prepared.task.pretrained_head else "fitting the head with the encoder frozen, then "
            display.say(f"{fitting}comparing first gradients with the bases")
            result = suggest.suggest(prepared, settings, bases, output, overwrite)
    equal = f"of first {result['bases'][0]['equal_rank']}"
    width = max(len(row["name"]) for row in result["bases"])
    print(f"      {'basis':<{width}}     k      share  times random  {equal:>11}")
    for place, row in enumerate(result["bases"], 1):
        share, equal = (f"{100 * row[key]:.3g} %" for key in ("share", "equal_share"))
        numbers = f"{row['rank']:>4}  {share:>9}  {row['times_random']:>12,.1f}  {equal:>11}"
        print(f"{place:>4}  {row['name']:<{width}}  {numbers}")


@command
def export(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="Folder that `tune` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write; for a delta a new file.")],
    task: TaskName = None,
    task_type: Annotated[
        str | None, typer.Option(help="Type of the task of an adapter without result.json, such as classification.")
    ] = None,
    to: Annotated[
        Literal["lora", "delta", "merged"],
        typer.Option(help="A LoRA folder for PEFT, one file of the changed weights, or a plain model."),
    ] = "lora",
    basis: Annotated[Path | None, typer.Option(help="The adapter's basis, if it has moved.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-k", min=1, help="Rank of the LoRA; default: exact.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of --rank: relative error allowed in each weight.")
    ] = None,
) -> None:
    """Export an adapter in a format that needs no tinyspan: LoRA, delta or merged model."""
    from tinyspan.workflows.export import export as write

    with open_display():
        print(write(model, task, adapter, output, to, basis, rank=rank, error=error, task_type=task_type))


@command
def inspect(
    folder: Annotated[Path, typer.Argument(help="A trajectory, basis or adapter.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every file against its hash.")] = False,
) -> None:
    """Show what a folder contains, for which model, its size, and whether it is complete."""
    from tinyspan.workflows.inspect import describe

    rows, problems = describe(folder, verify)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {printable(value)}")
    for problem in problems:
        print(f"damaged: {printable(problem)}", file=sys.stderr)
    raise typer.Exit(1 if problems else 0)


@command
def unify(
    loras: Annotated[list[str], typer.Argument(help="LoRA adapters that PEFT saved: folders or hub ids.")],
    output: Output,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Their base model; default: the one in their configs.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-k", min=1, help="Directions on each side of a weight; default: all.")
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of --rank: relative error allowed, over all adapters.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Put LoRA adapters into one basis and report how much variance they share."""
    from tinyspan.workflows.unify import unify as put

    with open_display():
        report = put(loras, output, model, rank=rank, error=error, overwrite=overwrite)
    width = max(len("adapter"), *(len(row["name"]) for row in report["adapters"]))
    print(f"{'adapter':<{width}}  error    of the mean  of the others' basis")
    for row in report["adapters"]:
        unseen = "" if row["error_unseen"] is None else f"{row['error_unseen']:.3f}"
        print(f"{row['name']:<{width}}  {row['error']:.1e}  {row['error_of_mean']:<11.3f}  {unseen}")
    if report["chance"] is not None:
        print(
            f"The mean contains {report['mean_share']:.1%} of the updates' squared norm; for unrelated updates it is "
            f"{1 / len(loras):.1%}. A random update has an error of {report['chance']:.3f} in the others' basis."
        )
    largest = max(row["numbers"] for row in report["adapters"])
    print(
        f"{report['numbers']:,} numbers each, where a LoRA has {largest:,}, "
        f"and {report['basis_bytes'] / 1e6:,.1f} MB for all: {output}"
    )
    if report["numbers"] > largest:
        print("That is more than a LoRA has; reduce it with --rank or --error.")

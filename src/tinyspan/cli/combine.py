"""The command that combines models: combine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tinyspan.cli.application import command, open_display
from tinyspan.cli.options import (
    Data,
    EvalRows,
    Holdout,
    Label,
    MaxLength,
    Metric,
    Output,
    Overwrite,
    PrecisionOption,
    TaskName,
    TaskOptions,
    TaskType,
    Text,
    column_names,
)
from tinyspan.errors import InputError


@command
def combine(
    output: Output,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Models of one task: fine-tuned models, recorded runs (their points), folders of checkpoints, "
            "adapters or LoRAs.",
        ),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="YAML page with one model for each of several tasks, instead of MODEL... and a task."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Pre-trained model from which all were trained, if none of them names it."),
    ] = None,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    holdout: Holdout = None,
    metric: Metric = None,
    learn_rows: Annotated[int, typer.Option(min=2, help="Rows of each task to learn coefficients from.")] = 128,
    choose_rows: Annotated[int, typer.Option(min=2, help="Rows of each task to compare candidates on.")] = 256,
    train_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="0: all training rows are new to the models. By default their result.json says which are.",
        ),
    ] = None,
    set_aside: Annotated[
        int | None, typer.Option(min=0, help="Training rows that were set aside, if no result.json says.")
    ] = None,
    eval_rows: EvalRows = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to compare: NAME,NAME,...; default: all that apply.")
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also train heads, all weights and a LoRA on the same rows.")
    ] = False,
    geometry: Annotated[bool, typer.Option(help="Compute the loss on the line and plane between two models.")] = True,
    max_length: MaxLength = 128,
    max_target_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens per completion; default: 64.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 32,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"], typer.Option(help="Number format of the differences on disk.")
    ] = "float32",
    precision: PrecisionOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of rows and of random methods.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Combine models of one base: averages, task arithmetic, TIES, DARE, learned coefficients; choose on new rows."""
    from tinyspan.io.folders import check_folder

    names = models or []
    check_folder(output, "combined", overwrite, [Path(name) for name in names], resumable=True)
    if (tasks is None) == (not names):
        raise InputError("give MODEL... with a task, or --tasks PAGE for several tasks, and only one of them")
    options = None if tasks is not None else TaskOptions(task, task_type, data, text, label, holdout, metric)
    with open_display() as display:
        wanted: Any = None if options is None else options.chosen(display.say)
        from tinyspan.workflows.combine.opening import Options
        from tinyspan.workflows.combine.runner import combine
        from tinyspan.workflows.combine.sources import Division, Source

        if options is not None:
            own = options.label is not None
            sources = [
                Source(
                    wanted,
                    names,
                    data=None if own else data,
                    text=[] if own else column_names(text),
                    train_rows=train_rows,
                    set_aside=set_aside,
                    eval_rows=eval_rows,
                    max_target_length=max_target_length or Source.max_target_length,
                )
            ]
        elif tasks is not None:
            given: dict[str, Any] = {"--task": task, "--task-type": task_type, "--data": data, "--text": text}
            given |= {"--label": label, "--holdout": holdout, "--metric": metric, "--train-rows": train_rows}
            given |= {"--set-aside": set_aside, "--eval-rows": eval_rows, "--max-target-length": max_target_length}
            if both := [name for name, value in given.items() if value is not None]:
                raise InputError(f"{both[0]} is for models of one task; with --tasks the page says it for each task")
            from tinyspan.workflows.combine.specification import load_sources

            sources, of_page = load_sources(tasks)
            base = base or of_page
        result = combine(
            sources,
            output,
            base=base,
            division=Division(learn_rows, choose_rows, max_length, seed),
            options=Options(tuple(column_names(methods)), controls, geometry, batch_size, dtype, precision, seed),
            overwrite=overwrite,
            say=display.say,
        )
    print(_table(result))
    print(f"\n{result['verdict']}")
    where = "model" if (output / "model").is_dir() else "models"
    print(f"The chosen combination is in {output / where}. A page: tinyspan report {output} --output page.html")


def _table(result: Mapping[str, Any]) -> str:
    """Return the table of candidates, with the scores on the held-out rows."""
    from tinyspan.lab.summary import markdown
    from tinyspan.workflows.combine.table import candidate_rows

    return markdown(*candidate_rows(result))

"""Options that several commands share, and functions that interpret them."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tinyspan.errors import InputError

Model = Annotated[str, typer.Option("--model", "-m", help="Path or hub id of the pre-trained model, or `minilm`.")]
TaskName = Annotated[str | None, typer.Option("--task", "-t", help="GLUE task, rotten_tomatoes or imdb.")]
TaskType = Annotated[
    str | None,
    typer.Option(help="Instead of a task, for texts, or prompts and completions, of your own: causal-lm or seq2seq."),
]
Columns = Annotated[
    str | None,
    typer.Option(help="Columns of your own texts: NAME, or PROMPT,COMPLETION. Default: text, or prompt,completion."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with train.* and validation.* (parquet, CSV, JSON). With --task-type also .txt, or "
        "owner/name[:configuration] of a data set on the hub."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output; the folder is emptied first.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training rows.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of the head, the order of rows, dropout and random bases.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per step.")]
MaxLength = Annotated[
    int, typer.Option(min=2, help="Maximum number of tokens per row or prompt; longer ones are truncated.")
]
MaxTargetLength = Annotated[
    int, typer.Option(min=1, help="Maximum number of tokens per completion, in training and generation.")
]
LearningRate = Annotated[float, typer.Option(help="Learning rate of the directly trained parameters.")]
TrainRows = Annotated[int | None, typer.Option(min=1, help="Use at most this many training rows.")]
EvalRows = Annotated[int | None, typer.Option(min=1, help="Use at most this many held-out rows.")]
Precision = Literal["auto", "float32", "bfloat16"]
RegressionStart = Annotated[
    Literal["mean", "zero"],
    typer.Option(help="Initial prediction of a new regression head: the mean training label, or about 0."),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(help="Compute under bfloat16 autocast or in float32; auto: bfloat16 if the device supports it."),
]


def task_name(task: str | None, task_type: str | None) -> str:
    """Return the name of a task; a task on a user's own texts has the name of its type."""
    from tinyspan.workflows.tasks.base import types_of_own_rows

    if (task is None) == (task_type is None):
        raise InputError("give --task, or for texts of your own --task-type, and not both")
    types = types_of_own_rows()
    if task in types:
        raise InputError(f"{task} is a type of task, not a task: --task-type {task}")
    if task_type is not None and task_type not in types:
        raise InputError(f"unknown --task-type {task_type!r}; expected {' or '.join(types)}")
    return task or str(task_type)


def prepare_rows(
    model: str,
    task: str,
    data: Path | None,
    columns: str | None,
    settings: Any,
    train_rows: int | None,
    eval_rows: int | None,
    *,
    train: bool = True,
    adapter: Any = None,
) -> Any:
    """Load and tokenize a task's rows to the lengths in the settings."""
    from tinyspan.workflows.training import prepare

    return prepare(
        model,
        task,
        data=data,
        columns=[] if columns is None else [name.strip() for name in columns.split(",")],
        max_length=settings.max_length,
        max_target_length=settings.max_target_length,
        train_rows=train_rows,
        validation_rows=eval_rows,
        train=train,
        adapter=adapter,
    )

"""Options that several commands share, and functions that interpret them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tinyspan.cli.application import as_options
from tinyspan.errors import InputError

Model = Annotated[str, typer.Option("--model", "-m", help="Path or hub id of the pre-trained model, or `minilm`.")]
TaskName = Annotated[str | None, typer.Option("--task", "-t", help="GLUE task, rotten_tomatoes or imdb.")]
TaskType = Annotated[
    str | None,
    typer.Option(
        help="Type of a task of your own. With --label: classification, multi-label, regression or "
        "token-classification; by default it is inferred. Without: causal-lm or seq2seq."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="With --label: one file (parquet, CSV, TSV, JSON, JSON lines, CoNLL), a folder with train.* and "
        "validation.*, or owner/name[:configuration] of a data set on the hub. With --task-type causal-lm or seq2seq: "
        "a folder or a data set on the hub. With --task: the folder of this task, with train.* and validation.*."
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text column of your data, or two: NAME or NAME,NAME. For causal-lm and seq2seq the text, or "
        "PROMPT,COMPLETION."
    ),
]
Label = Annotated[
    str | None,
    typer.Option(help="Label column of your data; several columns of 0 and 1, NAME,NAME,..., are multi-label."),
]
Holdout = Annotated[
    float | None,
    typer.Option(help="Share of the rows of --data to hold out, if it has no validation rows, such as 0.2."),
]
Metric = Annotated[str | None, typer.Option(help="Metric that is compared; the result contains the others, too.")]
ClassWeights = Annotated[
    Literal["balanced"] | None, typer.Option(help="balanced: labels have the same weight in the loss.")
]
BasisName = Annotated[
    str,
    typer.Option(
        "--basis", "-b", help="Folder of a basis, or a constructor: random, fastfood, none (freeze), or your own."
    ),
]
TrainEmbeddings = Annotated[bool, typer.Option(help="Train the embeddings too, as the paper does.")]
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
SetAside = Annotated[
    int, typer.Option(min=0, help="Number of training rows to set aside for choices: not trained on, nor reported on.")
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Stop when the score on the rows of --set-aside has not improved for this many epochs; keep the best.",
    ),
]
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


def column_names(text: str | None) -> list[str]:
    """Parse `NAME,NAME,...`; without an option there are no names."""
    return [] if text is None else [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class TaskOptions:
    """The options that choose a task, as the user gave them.

    Raises:
        InputError: they contradict each other, one is missing, or the task is unknown.
    """

    task: str | None = None
    task_type: str | None = None
    data: Path | None = None
    text: str | None = None
    label: str | None = None
    holdout: float | None = None
    metric: str | None = None
    class_weights: str | None = None

    def __post_init__(self) -> None:
        from tinyspan.workflows.tasks import get_task
        from tinyspan.workflows.tasks.base import types_of_own_rows
        from tinyspan.workflows.tasks.table import labelled_types

        own, labelled = types_of_own_rows(), labelled_types()
        if self.task in (*own, *labelled):
            raise InputError(f"{self.task} is a type of task, not a task: --task-type {self.task}")
        if self.task_type is not None and self.task_type not in (*own, *labelled):
            raise InputError(f"unknown --task-type {self.task_type!r}; expected {' or '.join((*labelled, *own))}")
        if self.label is not None:
            if self.task is not None or self.task_type in own:
                other = f"--task {self.task}" if self.task else f"--task-type {self.task_type}"
                raise InputError(
                    f"--label is for labelled rows of your own, which --data names, and not for {other}; leave one "
                    "of them out"
                )
            missing = [name for name, value in (("--data", self.data), ("--text", self.text)) if value is None]
            if missing:
                raise InputError(f"--label also needs {' and '.join(missing)}")
        elif self.task_type in labelled:
            raise InputError(
                f"--task-type {self.task_type} needs the columns: --data FILE --text COLUMN --label COLUMN"
            )
        elif self.holdout is not None:
            given = {"--data": self.data, "--text": self.text, "--label": self.label}
            missing = [name for name, value in given.items() if value is None]
            raise InputError(f"--holdout goes with --data, --text and --label; {' and '.join(missing)} is missing")
        elif (self.task is None) == (self.task_type is None):
            raise InputError(
                "give --task, or for labelled rows of your own --data, --text and --label, or for texts --task-type, "
                "and only one of them"
            )
        elif self.class_weights is not None and self.task is None:
            raise InputError("--class-weights is for classification")
        if self.task is not None:
            get_task(self.task)  # raises an error if it is unknown

    def chosen(
        self, say: Callable[[str], None], labels: Any = None, trained: str | None = None, *, train: bool = True
    ) -> Any:
        """Return the task; rows of a user's own table are read.

        Args:
            say: function that gets a message about the table.
            labels: names of the labels, if a trained head determines them.
            trained: type of task for which the head was trained, if it is known.
            train: whether to read the training rows.
        """
        from tinyspan.workflows.tasks import get_task, task_from_table

        if self.label is None:
            task = get_task(self.task or str(self.task_type))
            task = task if self.metric is None else replace(task, metric=self.metric)
            return (
                task if self.class_weights is None else task.weighted(self.class_weights, task.read("train", self.data))
            )
        return task_from_table(
            str(self.data),
            str(self.text),
            self.label,
            task_type=self.task_type or trained,
            holdout=self.holdout,
            labels=labels,
            metric=self.metric,
            class_weights=self.class_weights,
            train=train,
            say=lambda message: say(as_options(message, {"task_type"})),
        )

    def prepare(
        self,
        model: str,
        task: Any,
        settings: Any,
        train_rows: int | None,
        eval_rows: int | None,
        *,
        train: bool = True,
        adapter: Any = None,
    ) -> Any:
        """Load and tokenize the rows to the lengths in the settings, and tell how many are cut."""
        from tinyspan.workflows.rows import prepare

        own = self.label is not None
        prepared = prepare(
            model,
            task,
            data=None if own else self.data,
            text=[] if own else column_names(self.text),
            max_length=settings.max_length,
            max_target_length=settings.max_target_length,
            train_rows=train_rows,
            validation_rows=eval_rows,
            train=train,
            adapter=adapter,
        )
        _tell_of_full_rows(prepared, settings.max_length)
        return prepared


def _tell_of_full_rows(prepared: Any, length: int) -> None:
    """Print how many rows have the maximum number of tokens, beyond which they are cut."""
    from tinyspan.workflows.tasks import Labelled

    if not isinstance(prepared.task, Labelled):
        return
    parts = {"training": prepared.train, "held-out": prepared.validation}
    full = {
        name: f"{count:,} of {len(rows):,} {name} rows"
        for name, rows in parts.items()
        if rows and (count := sum(len(ids) >= length for ids in rows["input_ids"]))
    }
    if full:
        rows = " and ".join(full.values())
        print(f"{rows} fill {length} tokens; longer ones are cut (--max-length)", file=sys.stderr)


def open_basis(name: str) -> Any:
    """Return the basis in a folder, or the name itself if it is that of a constructor.

    Raises:
        InputError: it is neither of them.
    """
    from tinyspan.bases.basis import Basis
    from tinyspan.bases.constructors import drawn_constructor, drawn_names

    if drawn_constructor(name) is not None:
        return name
    if not Path(name).is_dir():  # commands download no basis
        names = ", ".join(drawn_names())
        raise InputError(f"{name} is not a basis: there is no such folder, and the constructors are {names}")
    return Basis.from_pretrained(name)

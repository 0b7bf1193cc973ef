"""The command that predicts rows: predict."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from tinyspan.cli.application import command, open_display
from tinyspan.cli.options import BatchSize, Precision, TaskName, column_names


@command
def predict(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Fine-tuned model or folder that `record` wrote, or with --adapter the base model."
        ),
    ],
    input: Annotated[
        str,
        typer.Option(
            "--input", "-i", help="Rows as .csv, .tsv, .jsonl, .json, .parquet or .conll; `-`: standard input."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="File for the rows with predictions: .csv, .tsv, .jsonl or .parquet; `-`: standard output.",
        ),
    ],
    adapter: Annotated[Path | None, typer.Option(help="Folder that `tune` wrote.")] = None,
    basis: Annotated[Path | None, typer.Option(help="The adapter's basis, if it has moved.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Text column, or two: NAME or NAME,NAME; default: as in training.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Label column, or several, for a score; default: as in training, if the input has it."),
    ] = None,
    task: TaskName = None,
    task_type: Annotated[
        str | None,
        typer.Option(
            help="classification, multi-label, regression or token-classification, if the model's config says another."
        ),
    ] = None,
    format: Annotated[
        Literal["csv", "tsv", "jsonl"], typer.Option(help="Format of standard input and output.")
    ] = "csv",
    batch_size: BatchSize = 32,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum number of tokens per row; default: as the model was trained, else 128."),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="float32, or bfloat16 autocast, which is faster on some devices; auto: if supported."),
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output file.")] = False,
) -> None:
    """Predict the rows of a table with a fine-tuned model, or a base model with an adapter."""
    from tinyspan.workflows.prediction import predict_table
    from tinyspan.workflows.predictor import Predictor
    from tinyspan.workflows.streams import check_places

    check_places(input, output, format, overwrite)
    with open_display() as display:
        predictor = Predictor(
            model,
            adapter,
            basis=basis,
            text=column_names(text),
            task=task,
            task_type=task_type,
            max_length=max_length,
            batch_size=batch_size,
            precision=precision,
        )
        report = predict_table(
            predictor,
            input,
            output,
            label=column_names(label),
            stream_format=format,
            overwrite=overwrite,
            expect=lambda rows: display.expect("predicting", rows),
            advance=display.advance,
        )
    scores = ", ".join(f"{name} {value:.4f}" for name, value in report.scores.items())
    place = "" if output == "-" else f": {output}"
    print(f"{report.rows:,} rows{f', {scores}' if scores else ''}{place}", file=sys.stderr)

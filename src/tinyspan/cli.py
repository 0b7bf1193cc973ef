"""The command line: parse, call, print. Exit codes: 0 done, 1 failed, 2 misuse, 128 + signal where one stopped it."""

import io
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from tinyspan import __version__
from tinyspan.errors import InputError, Interrupted, TinyspanError
from tinyspan.extras import EXTRAS, missing_extra

__all__ = ["main"]

app = typer.Typer(
    help="Find the handful of directions along which a pre-trained model fine-tunes, and train in them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tinyspan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


class _Stopped(Exception):
    """A signal ended the work: typer would turn the KeyboardInterrupt into an exit without a word."""


def command(work: Callable[..., None]) -> Callable[..., None]:
    """Register a command of this name whose interruption `main` tells."""

    @app.command()
    @wraps(work)
    def told(*arguments: Any, **options: Any) -> None:
        try:
            work(*arguments, **options)
        except KeyboardInterrupt as error:
            kept = error if isinstance(error, Interrupted) else "repeat the command; what is finished is not made again"
            raise _Stopped(f"interrupted: {kept}") from error

    return told


Model = Annotated[str, typer.Option("--model", "-m", help="Path or hub id of the pre-trained model, or `minilm`.")]
TaskName = Annotated[str | None, typer.Option("--task", "-t", help="GLUE task, rotten_tomatoes or imdb.")]
TaskType = Annotated[
    str | None,
    typer.Option(help="Instead of a task, for texts, or prompts and completions, of your own: causal-lm or seq2seq."),
]
Columns = Annotated[
    str | None, typer.Option(help="Of your own texts: NAME, or PROMPT,COMPLETION. Default: text, or prompt,completion.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with train.* and validation.* (parquet, CSV, JSON; of your own texts also .txt, or "
        "owner/name[:configuration] of a data set on the hub)."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output, which is emptied first.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training rows.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the head, the order of rows, dropout, random bases.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per step.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens per row, or prompt; longer ones are cut.")]
MaxTargetLength = Annotated[int, typer.Option(min=1, help="Tokens per completion, learned or generated.")]
LearningRate = Annotated[float, typer.Option(help="Of directly trained parameters.")]
TrainRows = Annotated[int | None, typer.Option(min=1, help="Use only so many training rows.")]
EvalRows = Annotated[int | None, typer.Option(min=1, help="Use only so many held-out rows.")]


Precision = Literal["auto", "float32", "bfloat16"]
RegressionStart = Annotated[
    Literal["mean", "zero"], typer.Option(help="What a new regression head says first: the labels' mean, or about 0.")
]
PrecisionOption = Annotated[Precision, typer.Option(help="bfloat16 autocast, float32, or what the processor has.")]


SuiteName = Annotated[str, typer.Option(help="Name of a suite (see `tinyspan suites`), or a YAML file.")]
Models = Annotated[str | None, typer.Option(help="Instead of the suite's: A,B or NAME=FOLDER,...")]
Tasks = Annotated[str | None, typer.Option(help="Instead of the suite's: A,B,...")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Instead of the suite's: how many.")]
DataFolders = Annotated[Path | None, typer.Option(help="Holds one folder per GLUE task; by default from the hub.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes or jobs that share the work.")]
ExecutorName = Annotated[Literal["local", "slurm"], typer.Option(help="Where workers run, through submitit.")]
ExecutorOptions = Annotated[
    list[str] | None, typer.Option(help="Of submitit, such as slurm_partition=gpu; may be repeated.")
]


@command
def record(
    model: Model,
    output: Output,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    columns: Columns = None,
    epochs: Epochs = 32,
    every: Annotated[str, typer.Option(help="Record a point every `epoch` or every so many steps.")] = "epoch",
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
    eval_rows: EvalRows = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune in the ordinary way and record the trajectory."""
    import torch

    from tinyspan.io.folders import check_folder
    from tinyspan.workflows import runs, training

    points: Any = every if every == "epoch" else _steps(every)
    settings = training.Settings(
        epochs,
        batch_size,
        max_length,
        learning_rate,
        precision=precision,
        seed=seed,
        max_target_length=max_target_length,
        regression_start=regression_start,
    )
    name = _task(task, task_type)
    check_folder(output, "trajectory", overwrite, [Path(model)], resumable=True)
    with _display() as display:
        result = runs.record(
            _prepared(model, name, data, columns, settings, train_rows, eval_rows),
            settings,
            output,
            every=points,
            overwrite=overwrite,
            callbacks=[display.training("full")],
            dtype=torch.bfloat16 if dtype == "bfloat16" else None,
            say=display.say,
            progress=display.generating,
        )
    _print_result(result, output)


@command
def discover(
    trajectories: Annotated[list[Path], typer.Argument(help="What `record` wrote; several are stacked.")],
    output: Output,
    rank: Annotated[int | None, typer.Option("--rank", "-k", min=1, help="Directions per block.")] = None,
    explained_variance: Annotated[
        float | None, typer.Option(help="Instead of a rank: keep this share of the variance.")
    ] = None,
    center: Annotated[
        Literal["init", "mean", "none"],
        typer.Option(help="Subtract theta_0, the mean of the points, or nothing (the paper's formula)."),
    ] = "init",
    partition: Annotated[
        Literal["layer", "module", "model"], typer.Option(help="One subspace per layer, per module, or one.")
    ] = "layer",
    density: Annotated[
        float, typer.Option(help="Share of the coordinates, those that move most, that get directions; 1: all.")
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
    from tinyspan.trajectories.trajectory import Trajectory

    check_folder(output, "basis", overwrite, trajectories, resumable=True)
    runs = [Trajectory(folder) for folder in trajectories]
    if partition != "layer":
        whole = runs[0].recorded
        chosen = whole.per_module() if partition == "module" else whole.as_one_block()
        runs = [run.with_partition(chosen) for run in runs]
    with _display() as display:
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
    basis: Annotated[
        str,
        typer.Option(
            "--basis", "-b", help="Folder of a basis, or a constructor: random, fastfood, none (freeze), or your own."
        ),
    ],
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    columns: Columns = None,
    rank: Annotated[int | None, typer.Option("--rank", "-k", min=1, help="Of a random or fastfood basis.")] = None,
    ensemble: Annotated[int, typer.Option(min=1, help="Vectors z to average; the paper has 16.")] = 1,
    init_std: Annotated[
        float, typer.Option(min=0, help="Standard deviation of the initial values of z; 0: theta_0.")
    ] = 0.0,
    train_embeddings: Annotated[bool, typer.Option(help="Train the embeddings as usual, as the paper does.")] = True,
    epochs: Epochs = 32,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    max_target_length: MaxTargetLength = 64,
    learning_rate: LearningRate = 2e-5,
    z_learning_rate: Annotated[float, typer.Option(help="Of z.")] = 1e-2,
    regression_start: RegressionStart = "mean",
    precision: PrecisionOption = "auto",
    train_rows: TrainRows = None,
    eval_rows: EvalRows = None,
    overwrite: Overwrite = False,
) -> None:
    """Train z in a basis, beside embeddings and head."""
    from tinyspan.bases.basis import Basis
    from tinyspan.bases.constructors import drawn_constructor, drawn_names
    from tinyspan.io.folders import check_folder
    from tinyspan.workflows import runs, training

    settings = training.Settings(
        epochs,
        batch_size,
        max_length,
        learning_rate,
        z_learning_rate,
        precision=precision,
        seed=seed,
        max_target_length=max_target_length,
        regression_start=regression_start,
    )
    name = _task(task, task_type)
    options = runs.SubspaceOptions(ensemble, init_std, train_embeddings)
    check_folder(output, "adapter", overwrite, [Path(model), Path(basis)], resumable=True)
    runs.check_rank(basis, rank)
    chosen: Basis | str = basis
    if drawn_constructor(basis) is None:
        if not Path(basis).is_dir():  # commands ask no hub
            names = ", ".join(drawn_names())
            raise InputError(f"{basis} is no basis: there is no such folder, and it is none of {names}")
        chosen = Basis.from_pretrained(basis)
    with _display() as display:
        if isinstance(chosen, Basis):
            runs.check_tuned(model, name, chosen)
        result = runs.tune(
            _prepared(model, name, data, columns, settings, train_rows, eval_rows),
            settings,
            chosen,
            output,
            rank=rank,
            options=options,
            overwrite=overwrite,
            callbacks=[display.training("tune")],
            progress=display.generating,
        )
    _print_result(result, output)


@command
def evaluate(
    model: Model,
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    columns: Columns = None,
    adapter: Annotated[Path | None, typer.Option(help="What `tune` wrote; else the model is scored as it is.")] = None,
    basis: Annotated[Path | None, typer.Option(help="The adapter's basis, if it has moved.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for result.json.")] = None,
    batch_size: BatchSize = 32,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per row; by default what the adapter was tuned with, else 128.")
    ] = None,
    max_target_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per completion; by default likewise, else 64.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="By default what the adapter was tuned in, else auto.")
    ] = None,
    eval_rows: EvalRows = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a fine-tuned model, or a base model with an adapter, on the held-out rows."""
    from dataclasses import replace

    from tinyspan.workflows import runs

    runs.check_evaluation(adapter, basis, output, overwrite)
    known = runs.settings_of(adapter)
    settings = replace(
        known,
        batch_size=batch_size,
        max_length=max_length or known.max_length,
        max_target_length=max_target_length or known.max_target_length,
        precision=precision or known.precision,
    )
    name = _task(task, task_type)
    with _display() as display:
        runs.check_adapted(model, name, adapter)
        prepared = _prepared(model, name, data, columns, settings, None, eval_rows, train=False, adapter=adapter)
        result = runs.evaluate(prepared, settings, adapter, basis, output, overwrite, display.generating)
    _print_result(result, output)


@command
def suggest(
    model: Model,
    candidates: Annotated[list[Path], typer.Argument(help="Bases, or trajectories, of which bases are made.")],
    task: TaskName = None,
    task_type: TaskType = None,
    data: Data = None,
    columns: Columns = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows of the new task to look at.")] = 300,
    rank: Annotated[
        int | None, typer.Option("--rank", "-k", min=1, help="Of a trajectory's basis; by default all directions.")
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
    from tinyspan.workflows import suggest, training

    settings = training.Settings(
        batch_size=batch_size,
        max_length=max_length,
        precision=precision,
        seed=seed,
        max_target_length=max_target_length,
    )
    name = _task(task, task_type)
    if output is not None:
        check_folder(output, "result", overwrite, [Path(model), *candidates])
    with _display() as display, suggest.opened(model, name, candidates, rank) as bases:
        suggest.common_ranks(bases)
        prepared = _prepared(model, name, data, columns, settings, rows, rows)
        fitting = "" if prepared.task.pretrained_head else "fitting the head with the encoder frozen, then "
        display.say(f"{fitting}comparing first gradients with the bases")
        result = suggest.suggest(prepared, settings, bases, output, overwrite)
    equal = f"of first {result['bases'][0]['equal_rank']}"
    width = max(len(row["name"]) for row in result["bases"])
    print(f"      {'basis':<{width}}     k      share  times random  {equal:>11}")
    for place, row in enumerate(result["bases"], 1):
        share, equal = (f"{100 * row[key]:.3g} %" for key in ("share", "equal_share"))
        told = f"{row['rank']:>4}  {share:>9}  {row['times_random']:>12,.1f}  {equal:>11}"
        print(f"{place:>4}  {row['name']:<{width}}  {told}")


@command
def export(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="What `tune` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write; of a delta, a new file.")],
    task: TaskName = None,
    task_type: TaskType = None,
    to: Annotated[
        Literal["lora", "delta", "merged"],
        typer.Option(help="PEFT's LoRA, one file of the weights that changed, or a plain model."),
    ] = "lora",
    basis: Annotated[Path | None, typer.Option(help="The adapter's basis, if it has moved.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-k", min=1, help="Of the LoRA; by default the whole.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of a rank: the relative error allowed in each weight.")
    ] = None,
) -> None:
    """Turn an adapter into what those can load who have no tinyspan."""
    from tinyspan.workflows import runs

    with _display():
        print(runs.export(model, _task(task, task_type), adapter, output, to, basis, rank=rank, error=error))


@command
def inspect(
    folder: Annotated[Path, typer.Argument(help="A trajectory, basis or adapter.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its hash.")] = False,
) -> None:
    """Tell what a folder holds, of which model, how large, and whether it is whole."""
    from tinyspan.workflows.inspect import describe

    rows, problems = describe(folder, verify)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    raise typer.Exit(1 if problems else 0)


@command
def unify(
    loras: Annotated[list[str], typer.Argument(help="LoRA adapters that PEFT saved: folders or hub ids.")],
    output: Output,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Their base model, if it is not where they say.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-k", min=1, help="Directions on each side of a weight; by default all.")
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of a rank: the relative error allowed, over the adapters.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Put many LoRA adapters into one basis, and tell what they share."""
    from tinyspan.workflows.unify import unify as put

    with _display():
        found = put(loras, output, model, rank=rank, error=error, overwrite=overwrite)
    width = max(len("adapter"), *(len(row["name"]) for row in found["adapters"]))
    print(f"{'adapter':<{width}}  error    of the mean  of the others' basis")
    for row in found["adapters"]:
        unseen = "" if row["error_unseen"] is None else f"{row['error_unseen']:.3f}"
        print(f"{row['name']:<{width}}  {row['error']:.1e}  {row['error_of_mean']:<11.3f}  {unseen}")
    if found["chance"] is not None:
        print(
            f"The mean holds {found['mean_share']:.1%} of the updates' squared norm; with nothing in common it is "
            f"{1 / len(loras):.1%}. A random update has an error of {found['chance']:.3f} in the others' basis."
        )
    largest = max(row["numbers"] for row in found["adapters"])
    print(
        f"{found['numbers']:,} numbers each, where a LoRA has {largest:,}, "
        f"and {found['basis_bytes'] / 1e6:,.1f} MB for all: {output}"
    )
    if found["numbers"] > largest:
        print("That is more than a LoRA has: cut it with --rank or --error.")


@command
def reproduce(
    tables: Annotated[list[str], typer.Argument(help="table1 to table5, figure2 to figure4, dimension, or all.")],
    output: Output,
    suite: SuiteName = "small",
    models: Models = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    data: DataFolders = None,
    workers: Workers = 1,
    executor: ExecutorName = "local",
    executor_option: ExecutorOptions = None,
) -> None:
    """Make tables and figures of the paper; an interrupted study goes on, a finished part is never made again."""
    _study(tables, output, suite, models, tasks, seeds, data, workers, executor, executor_option)


@command
def dimension(
    output: Output,
    suite: SuiteName = "small",
    models: Models = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    data: DataFolders = None,
    workers: Workers = 1,
    executor: ExecutorName = "local",
    executor_option: ExecutorOptions = None,
) -> None:
    """Find d90, the fewest numbers that reach 90 % of full fine-tuning: intrinsic, random dense, DID and SAID."""
    _study(["dimension"], output, suite, models, tasks, seeds, data, workers, executor, executor_option)


@command
def render(folder: Annotated[Path, typer.Argument(help="What `reproduce` wrote, finished or not.")]) -> None:
    """Draw the tables and figures of a study from its result files alone."""
    from tinyspan.lab.rendering import render as draw

    with _display():
        print(f"Open {draw(folder)}")


@command
def suites(
    name: Annotated[str | None, typer.Argument(help="Print this suite's file, to copy and edit.")] = None,
) -> None:
    """List the suites that `reproduce` knows, or print one."""
    from tinyspan.lab.suite import load_suite, suite_names, suite_text

    if name is not None:
        print(suite_text(name), end="")
        return
    for known in suite_names():
        print(f"{known:<6}  {load_suite(known).note}")


@command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("runs/demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare full, freeze, random and intrinsic on real text, in a few minutes, and leave a page."""
    from tinyspan.lab.demo import run_demo

    with _display() as display:
        results = run_demo(output, display, seed=seed, overwrite=overwrite)
    for result in results:
        print(f"{result['method']:>10}  {result['score']:.3f}  {result['subspace_parameters']:>4} numbers in z")
    print(f"Open {output / 'report.html'}")


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    received: signal.Signals | None = None

    def stop(number: int, frame: Any) -> NoReturn:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as under nohup
        signal.signal(signal.SIGINT, stop)
    try:
        app()
    except _Stopped as stopped:
        _fail(stopped, 128 + (received or signal.SIGINT))
    except Exception as error:
        if received is not None:  # compiled code may turn the interrupt that it meets into an error of its own
            _fail("interrupted: repeat the command; what is finished is not made again", 128 + received)
        if isinstance(error, InputError):
            _fail(error, 2)
        if isinstance(error, TinyspanError):
            _fail(error, 1)
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            _fail(missing_extra(error.name), 2)
        if isinstance(error, OSError):  # of files that are not ours, such as the model's
            _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
        raise


def _warn(message: Warning | str, *details: Any) -> None:
    print(f"tinyspan: warning: {message}", file=sys.stderr)


def _fail(error: Exception | str, code: int) -> NoReturn:
    print(f"tinyspan: {error}", file=sys.stderr)
    sys.exit(code)


def _display() -> Any:
    """Quieten the libraries below and return the progress display."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    from tinyspan.workflows.progress import Display, quieten

    quieten()
    return Display()


def _task(task: str | None, task_type: str | None) -> str:
    """Return the name of a task; those on a user's own texts are named as their type."""
    from tinyspan.workflows.tasks.base import types_of_own_rows

    if (task is None) == (task_type is None):
        raise InputError("give --task, or for texts of your own --task-type, and not both")
    types = types_of_own_rows()
    if task in types:
        raise InputError(f"{task} is no task but a kind of one: --task-type {task}")
    if task_type is not None and task_type not in types:
        raise InputError(f"unknown --task-type {task_type!r}; expected {' or '.join(types)}")
    return task or str(task_type)


def _prepared(
    model: str,
    task: str,
    data: Path | None,
    columns: str | None,
    settings: Any,
    train_rows: int | None,
    eval_rows: int | None,
    *,
    train: bool = True,
    adapter: Path | None = None,
) -> Any:
    """Load and tokenize a task's rows, as long as the settings say."""
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


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--every takes `epoch` or a number of steps of at least 1, got {text!r}")
    return int(text)


def _study(
    tables: list[str],
    output: Path,
    suite: str,
    models: str | None,
    tasks: str | None,
    seeds: int | None,
    data: Path | None,
    workers: int,
    executor: Literal["local", "slurm"],
    executor_option: list[str] | None,
) -> None:
    """Make what is missing of tables, and draw them."""
    from tinyspan.lab.rendering import render
    from tinyspan.lab.reproduce import reproduce
    from tinyspan.lab.suite import load_suite
    from tinyspan.lab.tables import TABLES

    chosen = load_suite(suite, models=_models(models), tasks=tasks.split(",") if tasks else None, seeds=seeds)
    possible = [table for table in TABLES if len(chosen.tasks) > 2 or table not in ("table2", "figure3")]
    asked, options = possible if "all" in tables else tables, _pairs(executor_option or [])
    failed = None
    with _display() as display:
        try:
            reproduce(
                output, asked, chosen, data, display, workers=workers, executor=executor, executor_options=options
            )
        except InputError:
            raise
        except TinyspanError as error:  # what was made is drawn all the same
            failed = error
    try:
        print(f"Open {render(output)}")
    except TinyspanError:
        if failed is None:
            raise
    if failed is not None:
        raise failed


def _models(text: str | None) -> dict[str, str] | list[str] | None:
    """Read `A,B` or `NAME=FOLDER,...`."""
    if text is None:
        return None
    pairs = [(name, place or name) for name, _, place in (entry.partition("=") for entry in text.split(","))]
    if len(found := dict(pairs)) < len(pairs):
        raise InputError(f"--models names one of them twice: {text}")
    return found if "=" in text else list(found)


def _pairs(entries: list[str]) -> dict[str, Any]:
    """Read `name=value` with whole numbers as such."""
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"--executor-option takes name=value, got {entry!r}")
        found[name] = int(value) if value.removeprefix("-").isdecimal() else value
    return found


def _print_result(result: dict[str, Any], output: Path | None) -> None:
    where = f": {output}" if output else ""
    told = f"{result['metric']} {result['score']:.4f}"
    if found := result.get("generation"):
        told += f", exact match {found['exact_match']:.4f}, ROUGE-L {found['rouge_l']:.4f}"
    print(f"{result['method']} on {result['task']}, {told}{where}")


if __name__ == "__main__":
    main()

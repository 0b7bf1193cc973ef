"""Suites: the models, tasks, sizes and learning rates of tables, in one validated YAML file each."""

import hashlib
import importlib.resources
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tinyspan.bases.constructors import drawn_constructor, drawn_names
from tinyspan.bases.point_matrix import Center
from tinyspan.errors import InputError
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import TASKS
from tinyspan.workflows.yaml_text import line_of, parse_yaml, read_text

__all__ = ["FROM_RUNS", "MAY_DIFFER", "Exceptions", "Suite", "load_suite", "suite_names", "suite_text"]

MAY_DIFFER = ("name", "note", "models", "tasks", "seeds", "dimensions", "bases")  # among the tables of a study
MAX_BYTES = 1 << 14  # size of a suite file
FROM_RUNS = ("intrinsic", "line", "flipped", "inductive", "unified", "zero-shot")  # methods with bases from points
METHODS = (*FROM_RUNS, "full", "freeze", "did", "said", "outliers")
CELLS = 10_000  # maximum of seeds x models x tasks x dimensions in a study


def _check_text(text: str) -> str:
    if not text.isprintable() or len(text) > 1000:
        raise ValueError("expected at most 1,000 characters in one line")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _name_models(models: Any) -> Any:
    """Name the models of a list by the last parts of their folders or hub ids."""
    if isinstance(models, list) and all(isinstance(model, str) for model in models):
        names = [Path(model).name for model in models]
        if len(set(names)) < len(names):
            raise ValueError("two models end in the same name; write {name: folder or hub id}")
        return dict(zip(names, models, strict=True))
    return models


class Exceptions(BaseModel):
    """Settings of one task that differ from those of the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: Count | None = None
    rank: Count | None = None


INIT_STD = AliasChoices("init_std", "start_std")  # present name, and name in earlier suites


class Suite(BaseModel):
    """Everything that determines the results of a table except the data.

    Attributes:
        name: name of the suite's file.
        note: description and cost, in one line.
        models: name -> folder, hub id or `minilm`.
        tasks: names of tasks, in the order of the tables' columns.
        seeds: number of seeds; they are 0, 1, ...
        train_rows: maximum number of training rows, sampled once for all seeds; None for all.
        validation_rows: likewise, for the rows on which scores are reported.
        max_length: maximum number of tokens per row.
        batch_size: rows per step.
        epochs: passes over the training rows.
        points: number of points of the recorded trajectory, evenly spaced along the run; `epoch` for one after each
            epoch.
        rank: k, directions per layer.
        center: see `svd_basis`.
        ensemble: h, the number of vectors z to average.
        init_std: standard deviation of the initial values of z; earlier suites call it `start_std`.
        learning_rate: learning rate of the directly trained parameters.
        z_learning_rate: learning rate of z.
        regression_start: see `Settings`.
        dimensions: the ranks of Tables 5 and 6.
        bases: names of registered constructors, such as your own, each for a row of Table 1.
        precision: precision of the computations; `auto` is bfloat16 if the device supports it.
        exceptions: task -> settings that differ for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Text
    note: Text = ""
    models: Annotated[dict[Text, Text], BeforeValidator(_name_models), Field(min_length=1)]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Count
    train_rows: Count | None = None
    validation_rows: Count | None = None
    max_length: Annotated[int, Field(ge=2)] = 128
    batch_size: Count = 32
    epochs: Count
    points: Count | Literal["epoch"] = "epoch"
    rank: Count
    center: Center = "init"
    ensemble: Count = 1
    init_std: Annotated[float, Field(ge=0, allow_inf_nan=False, validation_alias=INIT_STD)] = 0.0
    learning_rate: Rate = 2e-5
    z_learning_rate: Rate = 1e-2
    regression_start: Literal["mean", "zero"] = "mean"
    dimensions: tuple[Count, ...] = (2, 4, 8, 16, 32)
    bases: tuple[str, ...] = ()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    exceptions: dict[str, Exceptions] = {}

    @field_validator("tasks", "exceptions")
    @classmethod
    def _check_tasks(cls, tasks: Any) -> Any:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"unknown task {task!r}; expected some of {', '.join(sorted(TASKS))}")
            if TASKS[task].lower_is_better:
                raise ValueError(
                    f"{task} is scored by {TASKS[task].metric}, where lower is better: a study compares shares of "
                    "scores"
                )
        if isinstance(tasks, tuple) and len(set(tasks)) < len(tasks):
            raise ValueError("a task is given twice")
        return tasks

    @field_validator("bases")
    @classmethod
    def _check_bases(cls, bases: tuple[str, ...]) -> tuple[str, ...]:
        for name in bases:
            if name in METHODS:
                raise ValueError(f"{name!r} is a method of every study; register the constructor under another name")
            if drawn_constructor(name) is None:
                raise ValueError(f"unknown basis {name!r}; expected some of {', '.join(drawn_names())}")
        return bases

    @field_validator("models")
    @classmethod
    def _check_model_names(cls, models: dict[str, str]) -> dict[str, str]:
        for name in models:
            reserved = name in ("shared", "jobs", "figures") or name.startswith(".") or len(name.encode()) > 200
            if not name or reserved or set(name) & set("/\\") or not name.isprintable():
                raise ValueError(f"the model name {name!r} cannot name a folder; write {{name: {models[name]}}}")
        return models

    @model_validator(mode="after")
    def _check_points(self) -> "Suite":
        for task in self.tasks:
            points = self.points_of(task)
            if self.rank_of(task) > points - (self.center == "mean"):
                raise ValueError(f"rank {self.rank_of(task)} is above what the {points} points of {task} span")
        spanned = min(self.points_of(task) for task in self.tasks) - (self.center == "mean")
        if max(self.dimensions, default=0) > spanned:
            raise ValueError(f"dimensions up to {max(self.dimensions)} need as many recorded points")
        return self

    @model_validator(mode="after")
    def _check_size(self) -> "Suite":
        cells = self.seeds * len(self.models) * len(self.tasks) * max(1, len(self.dimensions))
        if cells > CELLS:
            raise ValueError(f"seeds x models x tasks x dimensions are {cells:,}, a study takes {CELLS:,} at most")
        return self

    def rank_of(self, task: str) -> int:
        """Return the rank k for a task."""
        return (self.exceptions[task].rank if task in self.exceptions else None) or self.rank

    def epochs_of(self, task: str) -> int:
        """Return the number of epochs for a task."""
        return (self.exceptions[task].epochs if task in self.exceptions else None) or self.epochs

    def points_of(self, task: str) -> int:
        """Return the minimum number of points of a task's trajectories."""
        return self.epochs_of(task) if self.points == "epoch" else self.points

    def settings(self, task: str, seed: int) -> Settings:
        """Return the settings of the training."""
        return Settings(
            epochs=self.epochs_of(task),
            batch_size=self.batch_size,
            max_length=self.max_length,
            learning_rate=self.learning_rate,
            z_learning_rate=self.z_learning_rate,
            precision=self.precision,
            seed=seed,
            regression_start=self.regression_start,
        )

    def settings_hash(self) -> str:
        """Return a short hash of the settings that all cells of a study share; results with another are refused."""
        common = self.model_dump(mode="json", exclude=set(MAY_DIFFER))
        common["start_std"] = common.pop("init_std")  # the earlier name, so that hashes of earlier results stay valid
        if self.regression_start == "zero":  # earlier results do not contain this setting
            del common["regression_start"]
        return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:12]


def suite_names() -> list[str]:
    """Return the names of the suites that come with tinyspan."""
    folder = importlib.resources.files("tinyspan.lab") / "suites"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def suite_text(suite: str) -> str:
    """Return the YAML text of a suite: one that comes with tinyspan by name, or a file by path.

    Raises:
        InputError: there is no such suite.
    """
    if suite in suite_names():
        return (importlib.resources.files("tinyspan.lab") / "suites" / f"{suite}.yaml").read_text("utf-8")
    if not Path(suite).is_file():
        raise InputError(f"no suite {suite!r}: expected {', '.join(suite_names())} or a YAML file")
    return read_text(Path(suite), "a suite", MAX_BYTES)


def load_suite(suite: str, **overrides: Any) -> Suite:
    """Read and validate a suite.

    Args:
        suite: its name, or the path of a YAML file.
        overrides: values that replace those of the file, except None.

    Raises:
        InputError: there is no such suite, or it is malformed; the message contains file, line and reason.
    """
    content, root = parse_yaml(suite_text(suite), suite)
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Suite.model_validate({"name": Path(suite).stem, **content, **given})
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        name = ".".join(str(part) for part in first["loc"])
        place = first["loc"] or (reason.split()[0],)  # a message about several fields begins with the one to change
        line = None if place[0] in given else line_of(root, place)
        where = f"line {line}: " if line else ""
        raise InputError(f"{suite}: {where}{name}: {reason}" if name else f"{suite}: {where}{reason}") from error

"""The YAML page that names the models and rows of several tasks."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinyspan.errors import InputError
from tinyspan.workflows.combine.sources import Source
from tinyspan.workflows.tasks import get_task, task_from_table
from tinyspan.workflows.tasks.base import types_of_own_rows
from tinyspan.workflows.yaml_text import line_of, parse_yaml, read_text

__all__ = ["TaskEntry", "load_sources"]

MAX_BYTES = 1 << 16  # size of a page


class TaskEntry(BaseModel):
    """One task of a page.

    Attributes:
        model: the fine-tuned model, adapter or LoRA; see `open_members`.
        name: name in results; by default that of the task.
        task: name of a registered task, with `data` as its folder; or instead:
        data: file or folder of labelled rows, with the columns `text` and `label`.
        text: text column, or two separated by a comma; for a language task, too.
        label: label column, or several of 0 and 1.
        task_type: type of the labelled rows, by default inferred; or instead of a label, a type of texts, such as
            `causal-lm`, with `data` as the folder of the texts, or the id of a data set.
        holdout: share of the rows to hold out.
        metric: metric that is compared; by default that of the task.
        max_target_length: see `Source`.
        train_rows: see `Source`, as for the next two.
        set_aside: see `Source`.
        eval_rows: see `Source`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    name: str = ""
    task: str | None = None
    data: Path | None = None
    text: str | None = None
    label: str | None = None
    task_type: str | None = None
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    metric: str | None = None
    max_target_length: Annotated[int, Field(ge=1)] = Source.max_target_length
    train_rows: Annotated[int, Field(ge=0)] | None = None
    set_aside: Annotated[int, Field(ge=0)] | None = None
    eval_rows: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_task(self) -> "TaskEntry":
        texts, of_texts = types_of_own_rows(), self.task_type in types_of_own_rows()
        if self.label is not None and (self.task is not None or of_texts or self.data is None or self.text is None):
            raise ValueError(f"label goes with data and text, and without task and task_type {' or '.join(texts)}")
        if self.label is None and of_texts and (self.task is not None or self.data is None):
            raise ValueError(f"task_type {self.task_type} goes with data, and without task")
        if self.label is None and not of_texts and (self.task is None or self.task_type is not None):
            raise ValueError(f"expected task, or data with text and label, or data with task_type {' or '.join(texts)}")
        if self.task in texts:
            raise ValueError(f"{self.task} is a type of task: task_type")
        if self.label is None and self.holdout is not None:
            raise ValueError("holdout goes with data, text and label")
        return self

    def source(self) -> Source:
        """Return the models and rows of the task."""
        if self.label is None:
            task, data = get_task(self.task or str(self.task_type)), self.data
            task = task if self.metric is None else replace(task, metric=self.metric)
            text = [] if self.text is None else [name.strip() for name in self.text.split(",")]
        else:
            task = task_from_table(
                str(self.data),
                str(self.text),
                self.label,
                task_type=self.task_type,
                holdout=self.holdout,
                metric=self.metric,
            )
            data, text = None, []
        return Source(
            task,
            [self.model],
            self.name,
            data,
            text,
            train_rows=self.train_rows,
            set_aside=self.set_aside,
            eval_rows=self.eval_rows,
            max_target_length=self.max_target_length,
        )


class _Page(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = None
    tasks: Annotated[list[TaskEntry], Field(min_length=2)]


def load_sources(path: Path) -> tuple[list[Source], str | None]:
    """Read a page, and return the models and rows of its tasks, and the base model if it names one.

    Raises:
        InputError: the page cannot be read or is not valid, or a task or its rows are not available.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected a YAML page of tasks")
    content, root = parse_yaml(read_text(path, "a page of tasks", MAX_BYTES), str(path))
    try:
        page = _Page.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        line = line_of(root, first["loc"])
        where = f"line {line}: " if line else ""
        raise InputError(f"{path}: {where}{_reason(first)}") from error
    return [entry.source() for entry in page.tasks], page.base


def _reason(error: Any) -> str:
    """Return what is wrong with a page, with the keys that are expected."""
    kind, place = error["type"], ".".join(str(part) for part in error["loc"])
    keys = ", ".join(TaskEntry.model_fields if len(error["loc"]) > 1 else _Page.model_fields)
    if kind == "extra_forbidden":
        return f"unknown key {place}; expected {keys}"
    if kind == "missing":
        return f"the key {place} is missing; expected {keys}"
    if kind == "too_short":
        return f"{place} has {error['ctx']['actual_length']} entry, where at least 2 tasks are combined"
    return f"{place or 'the page'}: {error['msg'].removeprefix('Value error, ')}"

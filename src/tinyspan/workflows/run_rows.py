"""The rows of a run, read again as its `result.json` says."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tinyspan.errors import InputError
from tinyspan.io.folders import RESULT
from tinyspan.io.storage import reading
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.workflows.results import Described, settings_of
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.tasks import TYPES, Task, get_task, task_from_table
from tinyspan.workflows.tasks.texts import Language

__all__ = ["Draw", "draw_of", "rows_of_run"]


def rows_of_run(
    model: str,
    source: Described,
    data: Path | None = None,
    text: Sequence[str] = (),
    *,
    adapter: OpenedAdapter | None = None,
    max_length: int | None = None,
    split: Literal["train", "validation"] = "train",
) -> Prepared:
    """Read and tokenize the rows of a recorded run or an adapter, with the same rows set aside.

    Args:
        model: the model for which the rows are tokenized.
        source: the run.
        data: the rows, if they come from a file or folder that has moved, or that the result does not name.
        text: text columns of a language task, if they have other names.
        adapter: the adapter that the model gets; see `prepare`.
        max_length: maximum number of tokens per row; by default as in the run.
        split: the rows that will be used, which must be those of the run: the training rows with those set aside, or
            the held-out ones.

    Raises:
        InputError: the run has no result, or the rows are not available, or they are not those of the run.
        StorageError: the result is damaged.
    """
    if source.result is None:
        raise InputError(f"{source.folder} has no {RESULT}, which names the task and the rows; `record` writes one")
    settings = settings_of(source)
    with reading(source.folder / RESULT):
        task, own, draw = _task_of(source.result, data), "data" in source.result, draw_of(source.result)
        rows = sum(int(source.result["rows"].get(part, 0)) for part in ("train", "aside"))
        digests = dict(source.result.get("row_digests", {}))

    def read(length: int) -> Prepared:
        return prepare(
            model,
            task,
            data=None if own else data,
            text=text,
            max_length=length,
            max_target_length=settings.max_target_length,
            train_rows=draw.train,
            validation_rows=draw.validation,
            draw_seed=draw.seed,
            adapter=adapter,
        )

    prepared = read(settings.max_length)
    if draw.train is None and (found := len(prepared.train or ())) != rows:
        raise InputError(
            f"{source.folder} was trained on {rows} rows, and its data has {found} now: give the rows of the run, "
            "data=, or train again"
        )
    prepared = _with_aside(prepared, settings.set_aside)
    parts = ("validation",) if split == "validation" else ("train", "aside")
    if different := prepared.other_rows({part: digests[part] for part in parts if part in digests}):
        raise InputError(
            f"{source.folder}: these are not the rows of the run: {different}; give its rows, data=, or train again"
        )
    if max_length in (None, settings.max_length):
        return prepared
    return _with_aside(read(max_length), settings.set_aside)


def _with_aside(prepared: Prepared, rows: int) -> Prepared:
    """Return the task with the rows that a run set aside, without the warnings that the run gave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return prepared.with_aside(rows)


class Draw(NamedTuple):
    """Numbers of rows, before tokenization, that a run drew of its data; None if it used all.

    Attributes:
        train: number of training rows, with those that were set aside.
        validation: number of held-out rows.
        seed: seed of the draw.
    """

    train: int | None
    validation: int | None
    seed: int = 0


def draw_of(result: Mapping[str, Any]) -> Draw:
    """Return what the run of a result drew.

    A result of an earlier version has only the numbers of tokenized rows. Those of running text are pieces of texts,
    and all texts are taken to have been used.
    """
    if (draw := result.get("draw")) is not None:
        return Draw(draw.get("train"), draw.get("validation"), int(draw["seed"]))
    cls = TYPES[result["type"]] if result.get("type") in TYPES else Task
    if issubclass(cls, Language) and "generation" not in result:
        return Draw(None, None)
    rows = result["rows"]
    return Draw(int(rows["train"]) + int(rows.get("aside", 0)), int(rows["validation"]))


def _task_of(result: Mapping[str, Any], data: Path | None) -> Task:
    """Return the task of a result with its class weights, and on a user's own table with its rows."""
    if (origin := result.get("data")) is None:
        task = get_task(str(result["task"]))
    else:
        task = task_from_table(
            data or origin["path"],
            origin["text"],
            origin["label"],
            task_type=result["type"],
            holdout=origin["holdout"],
        )
    weights = result.get("class_weights")
    return replace(task, class_weights=tuple(map(float, weights))) if weights else task  # type: ignore[call-arg]

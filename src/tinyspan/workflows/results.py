"""What the `result.json` of an adapter or of a recorded run says: its task, settings and thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tinyspan.errors import InputError
from tinyspan.io.folders import RESULT
from tinyspan.io.storage import reading
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import TASKS, TYPES, Labelled, Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "THRESHOLDS",
    "TRAINED_LENGTH",
    "Described",
    "keep_reading",
    "require_type",
    "settings_of",
    "stored_task",
    "thresholds_of",
    "token_limit",
    "trained_length",
    "trained_on",
    "with_thresholds",
]

THRESHOLDS = "label_thresholds"  # key in the config of a model: threshold of each label, such as of multi-label ones
TRAINED_LENGTH = "trained_max_length"  # key in the config of a model: maximum number of tokens per row in training


class Described(Protocol):
    """A folder that `result.json` describes: an adapter, or a recorded run."""

    @property
    def folder(self) -> Path:
        """The folder."""

    @property
    def result(self) -> Mapping[str, Any] | None:
        """The content of `result.json`, if there is one."""


def stored_task(source: Described) -> Task:
    """Return the task for which an adapter or a run was trained, from its `result.json`; its rows are not read.

    Raises:
        InputError: there is no `result.json`, it is of an earlier version, or its task or type is not registered.
    """
    if (result := source.result) is None:
        raise InputError(f"{source.folder} has no {RESULT} that names its task: give task= or task_type=")
    with reading(source.folder / RESULT):
        name, kind, labels = result["task"], result.get("type"), tuple(result.get("labels") or ())
        text, metric = tuple(result.get("data", {}).get("text", ("text",))), result["metric"]
    if not isinstance(kind, str) or kind not in TYPES or (name in TASKS and "data" not in result):
        return _registered(name, source.folder)
    cls = TYPES[kind]
    return cls(name, text, labels, metric) if issubclass(cls, Labelled) else cls(kind)


def thresholds_of(config: Any, adapter: OpenedAdapter | None) -> Mapping[str, float] | None:
    """Return the threshold of each label, from an adapter's result or else the model's config, if there are any."""
    if adapter is not None:
        return (adapter.result or {}).get("thresholds")
    thresholds: Mapping[str, float] | None = getattr(config, THRESHOLDS, None)
    return thresholds


def keep_reading(
    config: Any,
    max_length: int | None,
    thresholds: Mapping[str, float] | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write into the config of a model how rows were read in training, for `predict` and for other programs.

    Args:
        config: config of the model, changed in place.
        max_length: maximum number of tokens per row in training; None if it is not known.
        thresholds: threshold of each label, if there are any.
        tokenizer: gets the length too, so that a pipeline with `truncation=True` cuts rows where training did.
    """
    if thresholds:
        setattr(config, THRESHOLDS, dict(thresholds))
    if max_length is None:
        return
    setattr(config, TRAINED_LENGTH, max_length)
    if tokenizer is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)


def trained_length(config: Any) -> int | None:
    """Return the maximum number of tokens per row with which a model was trained, if its config says."""
    length: int | None = getattr(config, TRAINED_LENGTH, None)
    return length


def token_limit(config: Any, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the maximum number of tokens that a tokenizer states for a model; that of training is none."""
    limit = tokenizer.model_max_length
    return math.inf if limit == trained_length(config) else limit


def trained_on(result: Mapping[str, Any] | None, path: Path) -> bool:
    """Return whether a file or folder of rows is the one on which the model of a result was trained."""
    own = ((result or {}).get("data") or {}).get("path")
    return own is not None and Path(own).resolve() == path.resolve()


def with_thresholds(task: Task, thresholds: Mapping[str, float] | None, outputs: Sequence[str]) -> Task:
    """Return a task with the thresholds of its outputs, if every output has one; see `Labelled.with_thresholds`."""
    if not isinstance(task, Labelled) or thresholds is None or not {*outputs} <= {*thresholds}:
        return task
    return task.with_thresholds([thresholds[name] for name in outputs])


def settings_of(source: Path | Described | None) -> Settings:
    """Return the settings in the `result.json` of an adapter or a run, or the defaults."""
    described = OpenedAdapter(source) if isinstance(source, Path) else source
    if described is None or (result := described.result) is None:
        return Settings()
    names = {field.name for field in fields(Settings)}
    with reading(described.folder / RESULT):
        stored = {"regression_start": "zero", **result["settings"]}  # older results lack it and started at zero
        return Settings(**{name: value for name, value in stored.items() if name in names})


def require_type(task: str | Task, adapter: OpenedAdapter) -> None:
    """Check that the task is of the type for which an adapter was trained, if its `result.json` contains that.

    Raises:
        InputError: the types differ, or the file is of an earlier version and its task is not registered.
    """
    wanted = get_task(task)
    if (result := adapter.result) is None:
        return
    with reading(adapter.folder / RESULT):
        trained, kind = result["task"], result.get("type")
    if kind is None:  # a file of an earlier version
        kind = wanted.type if trained == wanted.name else _registered(trained, adapter.folder).type
    if kind != wanted.type:
        raise InputError(f"{adapter} was trained for {trained} ({kind}), not for {wanted.name} ({wanted.type})")


def _registered(name: str, trained: Path) -> Task:
    """Return the task that an adapter or a run was trained for.

    Raises:
        InputError: there is none of this name.
    """
    try:
        return get_task(name)
    except InputError as error:
        raise InputError(
            f"{trained} was trained for the task {name!r:.100}, which is not registered here; import the module that "
            "registers it"
        ) from error

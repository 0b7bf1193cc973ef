"""Checks before any work: of arguments, of the outputs of a command, and that adapter, basis, model and task fit.

Nothing here imports transformers before a model has to be loaded, so that commands refuse wrong arguments at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import drawn_constructor, drawn_names
from tinyspan.errors import InputError
from tinyspan.io.folders import check_folder
from tinyspan.model.base import check_model
from tinyspan.model.opened_adapter import OpenedAdapter, opened
from tinyspan.workflows.models import LoadedModel, base_model, load_model
from tinyspan.workflows.results import require_type
from tinyspan.workflows.tasks import Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CheckedModel", "check_adapted", "check_evaluation", "check_rank", "check_tuned"]


def check_evaluation(
    adapter: Path | OpenedAdapter | None, basis: Path | None, output: Path | None, overwrite: bool
) -> OpenedAdapter | None:
    """Check the arguments of `evaluate` before any work; return the adapter, opened with its basis."""
    if output is not None:
        check_folder(output, "result", overwrite)
    if adapter is None and basis is not None:
        raise InputError("basis= needs adapter=: a basis alone does not determine z")
    if adapter is None:
        return None
    source = adapter if isinstance(adapter, OpenedAdapter) else OpenedAdapter(adapter, basis)
    _ = source.stored_basis  # opens the basis, or fails
    return source


def check_tuned(model: str, task: str | Task, basis: Basis, seed: int) -> LoadedModel:
    """Load a model to train, and check that a basis fits its weights, before rows are read and training starts.

    Args:
        model: path, hub id or `minilm`.
        task: task that determines the head.
        basis: basis to train in.
        seed: the seed in the settings of the training, with which a new head is initialised.

    Raises:
        MismatchError: the basis was made for another model.
        InputError: the model cannot be loaded, or its weights are half precision, NaN or infinite.
    """
    loaded = load_model(model, get_task(task), seed, training=True)
    check_model(loaded.model, basis)
    return loaded


class CheckedModel(NamedTuple):
    """A model that `check_adapted` loaded, and its fingerprint; None if it was not compared with an adapter."""

    model: PreTrainedModel
    fingerprint: Mapping[str, str] | None


def check_adapted(model: str, task: str | Task, adapter: Path | OpenedAdapter | None) -> CheckedModel:
    """Load a model to evaluate, with a trained head, and check that an adapter fits the model and the task."""
    source = opened(adapter)
    if source is not None:
        require_type(task, source)
    loaded = base_model(model, get_task(task), 0, need_head=True, adapter=source)
    return CheckedModel(loaded, None if source is None else source.bind(loaded))


def check_rank(basis: Basis | str, rank: int | None) -> None:
    """Check that a rank is given if, and only if, the basis is a constructor that needs one."""
    constructor = drawn_constructor(basis)
    takes, needs = (constructor.takes("rank"), constructor.needs("rank")) if constructor else (False, False)
    if (rank is None and needs) or (rank is not None and not takes):
        names = " or ".join(drawn_names("rank"))
        raise InputError(f"give rank= with basis={names}, and only then: other bases have their own rank")

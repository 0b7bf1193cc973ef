"""Export of an adapter in formats that need no tinyspan: a LoRA, a delta, or a merged model."""

from pathlib import Path
from typing import Any, Literal

from tinyspan.errors import InputError
from tinyspan.interop.deltas import export_delta
from tinyspan.interop.lora import export_lora
from tinyspan.io.storage import replacing_folder
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.models import base_model, tokenizer_of
from tinyspan.workflows.results import keep_reading, require_type, settings_of, stored_task, thresholds_of
from tinyspan.workflows.tasks import Task, get_task
from tinyspan.workflows.tasks.table import labelled_types, task_of_labels

__all__ = ["export"]


def export(
    model: str,
    task: str | None,
    adapter: Path,
    output: Path,
    to: Literal["lora", "delta", "merged"],
    basis: Path | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
    task_type: str | None = None,
) -> str:
    """Write a base model with an adapter in another format, and return a message that describes it.

    Args:
        model: path, hub id or `minilm`.
        task: the task of the adapter; None for the one in its `result.json`.
        adapter: a folder that `tune` wrote.
        output: folder to write, or for a delta a file.
        to: the format.
        basis: folder of its basis, if that has moved.
        rank: rank of a LoRA; by default it is exact.
        error: relative error allowed in each weight of a LoRA, instead of `rank`.
        task_type: type of the task of an adapter without `result.json`, instead of a task.

    Raises:
        InputError: the output exists, a rank or error is given for a format without one, the task is of another type or
            has other labels, or neither the model nor the adapter has a trained head.
        MismatchError: the adapter was trained with another model, or in another basis.
    """
    source = OpenedAdapter(adapter, basis)
    chosen = _task_of(source, task, task_type)
    require_type(chosen, source)
    if to != "lora" and (rank, error) != (None, None):
        raise InputError(f"rank= and error= apply to a LoRA; a {to} export is exact")
    if output.exists() and (to == "delta" or not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists already; choose another output")
    _ = source.stored_basis  # opens the basis, or fails, before the model is loaded
    base = base_model(model, chosen, 0, need_head=True, adapter=source)
    subspace = wrap_with_adapter(SubspaceModel, base, source)
    if to == "lora":
        lora = export_lora(subspace, output, rank=rank, error=error)
        largest = max(lora.ranks.values())
        return f"a LoRA of rank up to {largest}, {lora.numbers:,} numbers, relative error {lora.error:.1e}: {output}"
    if to == "delta":
        return f"a delta of {export_delta(subspace, output) / 1e6:,.2f} MB: {output}"
    with replacing_folder(output) as folder:
        tokenizer = tokenizer_of(model, base.config)
        merged: Any = subspace.merge()
        length = None if source.result is None else settings_of(source).max_length
        keep_reading(merged.config, length, thresholds_of(merged.config, source), tokenizer)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return f"a merged model: {output}"


def _task_of(adapter: OpenedAdapter, task: str | None, task_type: str | None) -> Task:
    """Return the task that was given, or one of a type with the adapter's labels, or the stored one."""
    if task is not None:
        return get_task(task)
    if task_type is None:
        return stored_task(adapter)
    if task_type not in labelled_types():
        return get_task(task_type)
    return task_of_labels(task_type, adapter.folder.name, ("text",), adapter.labels or ())

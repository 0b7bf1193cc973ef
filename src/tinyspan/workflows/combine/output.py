"""Writing combined models as ordinary folders of Hugging Face; heads on one encoder share its file."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinyspan.errors import InputError
from tinyspan.io.folders import MODEL, MODELS
from tinyspan.io.storage import writing
from tinyspan.io.tensors import open_tensors
from tinyspan.weights import tied_names

__all__ = ["save_combined"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARED, OWN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
STAGED = ".shared.safetensors"  # the file with the shared weights until it is linked into every folder


def save_combined(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, Any],
    folder: Path,
    shared: Collection[str] = (),
) -> dict[str, Path]:
    """Write combined models with their tokenizers, each as a folder that `from_pretrained` reads.

    One model becomes `folder/model`. Several become `folder/models/TASK`, each with two files of weights: one with the
    shared parameters, which is written once and hard-linked into the other folders (copied where the file system has no
    links), and one with the other weights of the model. A program that changes such a file in place changes it for all
    tasks; `save_pretrained` and `cp` write files of their own.

    Args:
        models: task -> model; the shared parameters may be the same objects in all models.
        tokenizers: task -> tokenizer.
        folder: output folder, which exists or is created; the folders of the models must not exist.
        shared: names of the parameters that are equal in all models; ignored for one model.

    Returns:
        Task -> folder of its model.

    Raises:
        InputError: no model is given, a name of a task is not a plain name of a folder, there is no tokenizer for a
            task, a shared parameter differs between the models or is missing in one, or a model of several has no
            other parameters.
        StorageError: the disk is full or the folder cannot be written; incomplete folders are deleted.
    """
    _check(models, tokenizers)
    if len(models) == 1:
        (task, model), place = next(iter(models.items())), folder / MODEL
        with _removed_on_failure(place):
            model.save_pretrained(place)
            tokenizers[task].save_pretrained(place)
        return {task: place}
    _require_equal(models, shared)
    parent = folder / MODELS
    places = {task: parent / task for task in models}
    with _removed_on_failure(parent):
        parent.mkdir(parents=True)
        for task, model in models.items():
            common, own = _split(model, shared)
            if not own:
                raise InputError(
                    f"the model of {task} has no weights beside the shared ones; save it once, as one model for all "
                    "tasks"
                )
            if not (parent / STAGED).exists():
                model.save_pretrained(places[task], state_dict=common)
                (places[task] / WEIGHTS).rename(parent / STAGED)
            model.save_pretrained(places[task], state_dict=own)
            (places[task] / WEIGHTS).rename(places[task] / OWN)
            _link(parent / STAGED, places[task] / SHARED)
            _write_index(places[task])
            tokenizers[task].save_pretrained(places[task])
        (parent / STAGED).unlink()
    return places


def _check(models: Mapping[str, PreTrainedModel], tokenizers: Mapping[str, Any]) -> None:
    """Check the arguments of `save_combined` that need no look at weights."""
    if not models:
        raise InputError("expected at least one model to save, got none")
    for task in models:
        if task not in tokenizers:
            raise InputError(f"expected a tokenizer for each task, got none for {task!r}; add it to tokenizers=")
        if task in ("", ".", "..") or Path(task).name != task:
            raise InputError(f"expected names of tasks that can be names of folders, got {task!r}; rename the task")


def _require_equal(models: Mapping[str, PreTrainedModel], shared: Collection[str]) -> None:
    """Check that the shared parameters are equal in all models, and that there are some."""
    if not shared:
        raise InputError("expected names of shared parameters, got none: models without any are saved one by one")
    named = {task: dict(model.named_parameters()) for task, model in models.items()}
    first, *others = named
    for name in shared:
        for task in (first, *others):
            if name not in named[task]:
                raise InputError(f"expected the shared parameter {name!r} in every model; that of {task} has none")
            one, other = named[first][name], named[task][name]
            if one is not other and not torch.equal(one, other):
                raise InputError(
                    f"expected equal values of the shared parameter {name!r} in all models, found different ones for "
                    f"{first} and {task}; leave it out of shared="
                )


def _split(model: PreTrainedModel, shared: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the shared part of a model's state, and the rest; a tied parameter stays together under all its names."""
    tied = tied_names(model)
    common: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        (common if tied.get(name, name) in shared else own)[name] = value
    return common, own


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_index(place: Path) -> None:
    """Write the file that tells transformers in which file each tensor is."""
    files: dict[str, str] = {}
    total = 0
    for name in (SHARED, OWN):
        path = place / name
        files |= dict.fromkeys(open_tensors(path).keys(), name)
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")  # without the header
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (place / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _removed_on_failure(place: Path) -> Iterator[None]:
    """Report errors of writing, and delete what was written before them."""
    if place.exists():
        raise InputError(f"{place} exists already; choose another output folder")
    try:
        with writing(place):
            yield
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise

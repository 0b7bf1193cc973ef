"""The base model of all models that are combined, and the checks that it is the one from which they were trained."""

import os
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig

from tinyspan.errors import InputError, MismatchError
from tinyspan.io.manifests import read_manifest
from tinyspan.model.base import require_same, select_weights
from tinyspan.trajectories.trajectory import stored_partition
from tinyspan.workflows.models import LoadedModel, load_model, load_pretrained, output_names, resolve_model
from tinyspan.workflows.tasks.base import Task

__all__ = ["CONFIG", "SharedBase", "real_place"]

CONFIG = "config.json"


class SharedBase:
    """The base model with a head for the task."""

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.task = name, task
        self.outputs = output_names(load_pretrained(AutoConfig, name), task)
        model = load_model(name, task, 0, values=False).model
        self.shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model with its weights, which nobody may change."""
        return load_model(self.name, self.task, 0)

    def release(self) -> None:
        """Free the model; it is loaded again when it is needed."""
        self.__dict__.pop("loaded", None)

    def require_parameters(self, model: nn.Module, place: str) -> None:
        """Check that a model has the parameters of the base model.

        Raises:
            MismatchError: a parameter is missing, additional, or has another shape.
        """
        own = {key: tuple(value.shape) for key, value in model.named_parameters()}
        advice = "combine models that were fine-tuned from one base model, and give that one, base="
        for key, shape in self.shapes.items():
            if own.get(key) != shape:
                actual = f"has it with the shape {list(own[key])}" if key in own else "has no such parameter"
                raise MismatchError(
                    f"{place} has another base model: {self.name} has the parameter {key!r} of shape {list(shape)}, "
                    f"and {place} {actual}; {advice}"
                )
        if additional := own.keys() - self.shapes.keys():
            raise MismatchError(
                f"{place} has another base model: it has the parameter {min(additional)!r}, which {self.name} lacks; "
                f"{advice}"
            )

    def require_start(self, run: Path, what: str) -> None:
        """Check that the model has the weights from which a run was recorded, by the fingerprint of its blocks.

        Raises:
            MismatchError: a block differs.
        """
        manifest = read_manifest(run, "trajectory")
        recorded = stored_partition(run, manifest)
        weights = select_weights(self.loaded.model, recorded, what, manifest.versions)
        require_same(manifest.fingerprint, recorded.fingerprint(weights), what)

    def require_weights_of(self, named: str, place: str) -> None:
        """Check that the model has the weights of another one, from which a member was trained, if that still exists.

        Raises:
            MismatchError: a weight differs.
        """
        if real_place(named) == real_place(self.name) or not _is_available(named):
            return
        try:
            other = load_model(named, self.task, 0)
        except InputError:  # what lies there now is not a model
            return
        own, drawn = dict(self.loaded.model.named_parameters()), {*other.drawn, *self.loaded.drawn}
        for key, value in other.model.named_parameters():
            if key not in drawn and (key not in own or not torch.equal(own[key], value)):
                raise MismatchError(
                    f"{place} was trained from {named!r}, and {self.name} has other weights: {key!r} differs; combine "
                    "models of one base model, and give that one, base="
                )


def real_place(model: str) -> str:
    """Return a form of a model's name that is the same for all spellings of one path."""
    return os.path.realpath(resolve_model(model)) if os.path.isdir(resolve_model(model)) else model


def _is_available(model: str) -> bool:
    """Return whether a model lies in a folder or in the cache of the hub."""
    try:
        place = resolve_model(model)
        return os.path.isdir(place) or isinstance(try_to_load_from_cache(place, CONFIG), str)
    except (InputError, ValueError):  # an extra is not installed, or a folder is gone, whose path is no id of the hub
        return False

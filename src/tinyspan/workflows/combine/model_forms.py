"""The forms in which models to combine are given: models, recorded runs, adapters and LoRAs, each as members."""

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError
from tinyspan.interop.lora import PEFT_FILES, peft_config, peft_labels, read_lora
from tinyspan.io.folders import COMBINED, MODEL, MODELS, RESULT, is_unfinished
from tinyspan.io.manifests import MANIFEST, read_manifest
from tinyspan.io.storage import read_json
from tinyspan.labels import positions
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.trajectories.from_checkpoints import numeric_order
from tinyspan.trajectories.trajectory import Trajectory, point_name
from tinyspan.weights import finite
from tinyspan.workflows.combine.shared_base import CONFIG, SharedBase
from tinyspan.workflows.models import load_model, output_names, resolve_model, result_of_run

__all__ = ["Form", "Member", "RecordedRun", "open_forms"]

CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # folder of a training state of the Trainer


@dataclass(frozen=True, eq=False)
class Member:
    """One model to combine.

    Attributes:
        name: unique short name: the last parts of the path, and for a point of a recorded run `name@step`.
        source: path or hub id, as the user gave it; for a folder of checkpoints the path of the checkpoint.
        order: the step at which the model was saved, if all members are points of one recorded run or checkpoints in
            one folder, in the order of their steps; otherwise None.
        result: content of the `result.json` that tinyspan wrote for the model, its run, or the combination that it is;
            None without one.
        release: frees the models that `load` keeps in memory for other members; a later `load` reads them again.
    """

    name: str
    source: str
    order: int | None
    result: Mapping[str, Any] | None
    _read: Callable[[], dict[str, Tensor]] = field(repr=False)
    release: Callable[[], None] = field(repr=False, default=lambda: None)

    def load(self) -> dict[str, Tensor]:
        """Return all parameters of the model with its head, in float32 on the CPU.

        The names are those of `named_parameters` of the base model with a head for the task. The tensors belong to the
        caller. Those of a point of a recorded run have the weights of the point in the blocks; outside of the blocks
        (head, embeddings, pooler), which trajectories do not contain, they are those of the run's final model.

        Raises:
            InputError: a parameter is NaN or infinite.
            StorageError: a file is damaged.
        """
        state = self._read()
        for parameter, value in state.items():
            if not finite(value):
                raise InputError(
                    f"{self.name} cannot be combined: its parameter {parameter!r} holds NaN or infinite numbers, where "
                    "finite ones are needed; leave this model out"
                )
        return state


class Form(Protocol):
    """An opened source of one or several members.

    Attributes:
        place: its path or hub id.
        base: name of the base model, if the source contains it.
    """

    place: str
    base: str | None

    @property
    def tokenizer(self) -> str:
        """Folder or hub id that may have a tokenizer."""

    def check(self, base: SharedBase) -> Sequence[str]:
        """Check all that is known without the values of weights, and return the names of the head's outputs."""

    def compare(self, base: SharedBase) -> None:
        """Check that the base model's weights are those from which the member was trained, if it names them."""

    def members(self, name: str, base: SharedBase) -> Iterator[Member]:
        """Yield the members, whose names start with `name`."""


class _FineTuned:
    """A fine-tuned model of Hugging Face."""

    def __init__(self, place: str) -> None:
        self.place = self.tokenizer = place
        self.is_recorded = (of_run := result_of_run(place)) is not None
        self.result = of_run if self.is_recorded else _result_of_combination(place)
        self.base = _named_base(self.result)

    def check(self, base: SharedBase) -> Sequence[str]:
        model = load_model(self.place, base.task, 0, need_head=True, values=False).model
        base.require_parameters(model, self.place)
        return output_names(model.config, base.task)

    def compare(self, base: SharedBase) -> None:
        """Compare the weights from which the model's run started, if it was recorded."""
        if self.is_recorded:
            run = Path(resolve_model(self.place)).resolve().parent
            base.require_start(run, f"the recorded run {run}")

    def members(self, name: str, base: SharedBase) -> Iterator[Member]:
        yield Member(name, self.place, _step(self.place), self.result, lambda: _state(self.load(base)), base.release)

    def load(self, base: SharedBase) -> nn.Module:
        """Return the model with its weights."""
        model = load_model(self.place, base.task, 0, need_head=True).model
        base.require_parameters(model, self.place)  # tied weights may have turned out to be different ones
        return model


class RecordedRun:
    """A recorded run: its points, with what they lack from the run's final model."""

    def __init__(self, place: str) -> None:
        self.place = place
        _require_finished(place)
        self.trajectory = Trajectory(place)
        final = Path(place, MODEL)
        if not (final / CONFIG).is_file() or not len(self.trajectory):
            lacks = f"no folder {MODEL} with its head" if len(self.trajectory) else "no points"
            raise InputError(
                f"{place} is a trajectory with {lacks}; expected a run that `tinyspan record` wrote, or models saved "
                "by save_pretrained"
            )
        self.final = _FineTuned(str(final))
        self.tokenizer = self.final.tokenizer
        self.base = self.final.base or _named_base(self.trajectory.manifest.details)
        self._final_model: nn.Module | None = None

    def check(self, base: SharedBase) -> Sequence[str]:
        """Check the final model without its values, and return the names of the head's outputs."""
        return self.final.check(base)

    def compare(self, base: SharedBase) -> None:
        """Check that the run started from the base model."""
        base.require_start(Path(self.place), f"the recorded run {self.place}")

    def members(self, name: str, base: SharedBase) -> Iterator[Member]:
        """Yield the points of the run, without those that equal an earlier one, such as after a skipped step."""
        seen: set[str] = set()
        for index, step in enumerate(self.trajectory.steps):
            content = self.trajectory.files[point_name(index)].sha256
            if content in seen:
                continue
            seen.add(content)
            read = partial(self._point, base, index)
            yield Member(f"{name}@{step}", self.place, step, self.final.result, read, partial(self._release, base))

    def _release(self, base: SharedBase) -> None:
        self._final_model = None
        base.release()

    def _point(self, base: SharedBase, index: int) -> dict[str, Tensor]:
        self.trajectory.load_into(self._model(base), index)
        return _state(self._model(base), copied=True)

    def _model(self, base: SharedBase) -> nn.Module:
        """Return the final model, which is loaded once, and into whose blocks the points are written."""
        if self._final_model is None:
            self._final_model = self.final.load(base)
        return self._final_model


class _SubspaceAdapter:
    """An adapter that `tune` wrote."""

    def __init__(self, place: str) -> None:
        self.place = self.tokenizer = place
        _require_finished(place)
        self.adapter = OpenedAdapter(place)
        self.base = _named_base(self.adapter.result) or _named_base(self.adapter.manifest.details)
        self.fingerprint: Mapping[str, str] | None = None

    def check(self, base: SharedBase) -> Sequence[str]:
        _ = self.adapter.stored_basis  # opens the basis, or fails
        kind = (self.adapter.result or {}).get("type", base.task.type)
        if kind != base.task.type:
            raise InputError(
                f"{self.place} was trained for a task of the type {kind}, and {base.task.name} is {base.task.type}; "
                "combine models of one type of task"
            )
        model = load_model(base.name, base.task, 0, need_head=True, adapter=self.adapter, values=False).model
        return output_names(model.config, base.task, self.adapter)

    def compare(self, base: SharedBase) -> None:
        self.fingerprint = self.adapter.bind(base.loaded.model)

    def members(self, name: str, base: SharedBase) -> Iterator[Member]:
        read = partial(self._merged, base)
        yield Member(name, self.place, _step(self.place), self.adapter.result, read, base.release)

    def _merged(self, base: SharedBase) -> dict[str, Tensor]:
        model = copy.deepcopy(base.loaded.model)
        return _state(wrap_with_adapter(SubspaceModel, model, self.adapter, fingerprint=self.fingerprint).merge())


class _LoraAdapter:
    """A LoRA that PEFT saved."""

    def __init__(self, place: str) -> None:
        self.place = self.tokenizer = place
        self.base: str | None = peft_config(place).base_model_name_or_path

    def check(self, base: SharedBase) -> Sequence[str]:
        own, labels = peft_labels(self.place), base.task.labels
        if own and labels and positions(labels, own) is None:
            raise InputError(
                f"the head of {self.place} was trained for the labels {', '.join(own)}, and {base.task.name} has the "
                f"labels {', '.join(labels)}; combine models of one task"
            )
        return own if own and labels else base.outputs

    def compare(self, base: SharedBase) -> None:
        trained = read_lora(base.loaded.model, self.place).directly_trained
        if untrained := set(base.loaded.drawn) - trained.keys():
            raise InputError(
                f"{self.place} has no trained head for {base.task.name}: neither it nor the base model {base.name!r} "
                f"has {min(untrained)!r}; train the LoRA again and save its head (modules_to_save of PEFT)"
            )
        for key, value in trained.items():
            if (shape := base.shapes.get(key, tuple(value.shape))) != tuple(value.shape):
                raise MismatchError(
                    f"{self.place} has {key!r} of shape {list(value.shape)}, expected {list(shape)}, as in {base.name} "
                    f"with a head for {base.task.name}; combine models of one task and one base model"
                )

    def members(self, name: str, base: SharedBase) -> Iterator[Member]:
        yield Member(name, self.place, _step(self.place), None, partial(self._merged, base), base.release)

    def _merged(self, base: SharedBase) -> dict[str, Tensor]:
        lora, state = read_lora(base.loaded.model, self.place), _state(base.loaded.model, copied=True)
        for key, (left, right) in lora.factors.items():
            state[key] = (state[key].double() + left @ right).float()
        return state | {key: value.float() for key, value in lora.directly_trained.items() if key in state}


def open_forms(source: str) -> list[Form]:
    """Return the models that a path or hub id stands for: one, or all checkpoints in a folder.

    Raises:
        InputError: it is not a model that can be combined.
    """
    folder = Path(source)
    if not folder.is_dir() and not folder.exists():
        return [_FineTuned(source)]  # a hub id, or `minilm`
    candidates = [path for path in folder.glob("checkpoint-*") if path.is_dir() and CHECKPOINT.fullmatch(path.name)]
    has_model = (folder / CONFIG).is_file()
    is_adapter = (folder / MANIFEST).is_file() or (folder / PEFT_FILES[0]).is_file()
    if len(candidates) > 1 or (candidates and not has_model and not is_adapter):
        return [one for path in numeric_order(candidates) for one in open_forms(str(path))]
    if (folder / PEFT_FILES[0]).is_file():
        return [_LoraAdapter(source)]
    if has_model:
        return [_FineTuned(source)]
    if (folder / MANIFEST).is_file():
        if (kind := read_manifest(folder).kind) == "basis":
            raise InputError(f"{source} is a basis, which holds no weights: give adapters that were trained in it")
        return [RecordedRun(source) if kind == "trajectory" else _SubspaceAdapter(source)]
    raise InputError(
        f"{source} is not a model to combine: expected the folder of a model ({CONFIG}), a LoRA ({PEFT_FILES[0]}), an "
        f"adapter or a recorded run ({MANIFEST}), or a folder of checkpoint-N folders"
    )


def _require_finished(place: str) -> None:
    """Check that a folder holds no interrupted work."""
    if is_unfinished(Path(place)):
        raise InputError(f"{place} holds unfinished work; repeat the command that started it, which goes on from there")


def _named_base(source: Mapping[str, Any] | None) -> str | None:
    """Return the model from which a run or a combination started, by its result or the details of its manifest."""
    name = (source or {}).get("base" if (source or {}).get("method") == COMBINED else "model")
    return name if isinstance(name, str) else None


def _result_of_combination(place: str) -> dict[str, Any] | None:
    """Return the content of `result.json` of the combination to which a model belongs; None if there is none."""
    folder = Path(resolve_model(place)).resolve()
    for parent, name in ((folder.parent, folder.name), (folder.parent.parent, folder.parent.name)):
        if name == (MODEL if parent == folder.parent else MODELS) and (parent / RESULT).is_file():
            result = read_json(parent / RESULT, sealed=False)
            return result if result.get("method") == COMBINED else None
    return None


def _step(place: str) -> int | None:
    """Return the step of a checkpoint, by the name of its folder."""
    match = CHECKPOINT.fullmatch(Path(os.path.abspath(place)).name) if os.path.isdir(place) else None
    return int(match[1]) if match else None


def _state(model: nn.Module, *, copied: bool = False) -> dict[str, Tensor]:
    """Return the parameters of a model."""
    values = {name: value.detach() for name, value in model.named_parameters()}
    return {name: value.clone() for name, value in values.items()} if copied else values

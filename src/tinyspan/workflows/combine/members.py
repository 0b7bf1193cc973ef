"""The models that are combined, in any form, and the checks that they have one base model and one task."""

import copy
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from tinyspan.errors import InputError, MismatchError
from tinyspan.interop.lora import PEFT_FILES, peft_config, peft_labels, read_lora
from tinyspan.io.folders import COMBINED, MODEL, MODELS, RESULT, is_unfinished
from tinyspan.io.manifests import MANIFEST, read_manifest
from tinyspan.io.storage import read_json, reading
from tinyspan.labels import are_same, positions
from tinyspan.model.base import require_same, select_weights
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.trajectories.from_checkpoints import numeric_order
from tinyspan.trajectories.trajectory import Trajectory, stored_partition
from tinyspan.weights import finite
from tinyspan.workflows.models import (
    LoadedModel,
    load_model,
    load_pretrained,
    output_names,
    resolve_model,
    result_of_run,
)
from tinyspan.workflows.tasks.base import Task

__all__ = ["Member", "Members", "digest", "open_members", "require_distinct", "require_several"]

CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # folder of a training state of the Trainer
CONFIG = "config.json"
VOCABULARY = "tokenizer.json"
TOKENIZER_FILES = (VOCABULARY, "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


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
    """

    name: str
    source: str
    order: int | None
    result: Mapping[str, Any] | None
    _read: Callable[[], dict[str, Tensor]] = field(repr=False)

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


class Members(NamedTuple):
    """Models of one base model.

    Attributes:
        base: path or hub id of the base model.
        members: the models, in the order of their sources; checkpoints and points of a run are in the order of steps.
        outputs: names of the outputs of all heads in their order; empty if the outputs are tokens.
    """

    base: str
    members: tuple[Member, ...]
    outputs: tuple[str, ...]


def open_members(sources: Sequence[str], task: Task, base: str | None = None) -> Members:
    """Open models to combine, and check that they have the same base model, tokenizer and labels.

    A source is one of these:

    * a model of Hugging Face: a fine-tuned model, or a checkpoint of the Trainer;
    * a folder with several `checkpoint-N` folders, which are all taken, in the order of N;
    * a recorded run: each of its points is a member (see `Member.load`). Its folder `model` alone is a model as above;
    * an adapter that `tune` wrote, or a LoRA of PEFT, which is merged into the base model.

    Files, configs, tokenizers, labels, and names and shapes of all weights are checked for all members before the
    values of any weights are read. The base model is then loaded if there is an adapter, a LoRA, a recorded run or the
    model of one, to compare it with the base model from which they were trained: by the fingerprint in their manifest,
    and by its weights if they name another base model that is still available. Values of the members are checked by
    `Member.load` and `require_distinct`.

    Args:
        sources: paths of folders, or hub ids of models.
        task: task of all members, which determines their head.
        base: path or hub id of the base model; by default the one that a recorded run, adapter or LoRA names. It may
            lie in another place than the one that they name, but must have the same weights.

    Raises:
        InputError: a source is not a model, has no trained head or one for other labels, is unfinished or given twice,
            no member names the base model, or a weight of the base model is NaN or infinite.
        MismatchError: the members have different base models or tokenizers, or one was trained from another base model.
        StorageError: a file is damaged.
    """
    opened = [one for source in sources for one in _open(source)]
    _require_different_folders(opened)
    start = _Base(_base_name(opened, base), task)
    outputs = _common_outputs({one.place: one.check(start) for one in opened})
    _require_one_vocabulary(start.name, opened)
    for one in opened:
        one.compare(start)
    for named, one in {one.base: one for one in reversed(opened) if one.base is not None}.items():
        start.require_weights_of(named, one.place)
    names = _short_names([one.place for one in opened])
    members = [member for name, one in zip(names, opened, strict=True) for member in one.members(name, start)]
    if not _is_one_run(opened, [member.order for member in members]):
        members = [replace(member, order=None) for member in members]
    return Members(start.name, tuple(members), outputs)


def require_several(members: Sequence[Member]) -> None:
    """Check that there are at least two members.

    Raises:
        InputError: there are fewer.
    """
    if len(members) < 2:
        given = f"only {members[0].source}" if members else "none"
        raise InputError(
            f"expected at least two models to combine, got {given}: give several models, a recorded run or a folder "
            "of checkpoints"
        )


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and values of parameters.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)})
        True
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(1, 2)})
        False
    """
    sha256 = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha256.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        sha256.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def require_distinct(digests: Mapping[str, str], base: str | None = None) -> None:
    """Check that all members differ from each other and from the base model.

    Args:
        digests: name of a member -> `digest` of its parameters.
        base: `digest` of the base model's parameters, if its head is trained.

    Raises:
        InputError: all parameters of two members, or of a member and the base model, are equal.
    """
    first: dict[str, str] = {}
    for name, value in digests.items():
        if value == base:
            raise InputError(
                f"{name} is equal to the base model in all parameters, so it adds nothing; leave it out, or give the "
                "model from which the members were fine-tuned, base="
            )
        if (other := first.setdefault(value, name)) != name:
            raise InputError(f"{other} and {name} are the same model: all parameters are equal; leave one of them out")


# -- the base model ---------------------------------------------------------------------------------------------------


class _Base:
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
        if _real_place(named) == _real_place(self.name) or not _is_available(named):
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


def _base_name(opened: Sequence["_Source"], base: str | None) -> str:
    """Return the name of the base model: the given one, or the one that the members name."""
    if base is not None:
        return base
    named: dict[str, _Source] = {}
    for one in opened:
        if one.base is not None:
            named.setdefault(_real_place(one.base), one)
    if not named:
        absent = [one.place for one in opened if not Path(resolve_model(one.place)).is_dir()]
        if absent:
            raise InputError(
                f"there is no folder {absent[0]}: correct the path, or if it is a model of the hub, give the model "
                "from which all were fine-tuned, base="
            )
        raise InputError(
            "none of the models names its base model, since only recorded runs, adapters and LoRAs do: give the model "
            "from which they were fine-tuned, base="
        )
    first, *others = named.values()
    if others:
        raise MismatchError(
            f"the models have different base models: {first.place} was trained from {first.base!r}, and "
            f"{others[0].place} from {others[0].base!r}; combine models of one base model, or give it if both are the "
            "same, base="
        )
    name = str(first.base)
    try:
        load_pretrained(AutoConfig, name)
    except InputError as error:
        raise InputError(
            f"{first.place} names the base model {name!r}, which cannot be loaded; give its present location, base= "
            f"({error})"
        ) from error
    return name


def _real_place(model: str) -> str:
    """Return a form of a model's name that is the same for all spellings of one path."""
    return os.path.realpath(resolve_model(model)) if os.path.isdir(resolve_model(model)) else model


def _is_available(model: str) -> bool:
    """Return whether a model lies in a folder or in the cache of the hub."""
    try:
        place = resolve_model(model)
        return os.path.isdir(place) or isinstance(try_to_load_from_cache(place, CONFIG), str)
    except (InputError, ValueError):  # an extra is not installed, or a folder is gone, whose path is no id of the hub
        return False


# -- the sources ------------------------------------------------------------------------------------------------------


class _Source(Protocol):
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

    def check(self, base: _Base) -> Sequence[str]:
        """Check all that is known without the values of weights, and return the names of the head's outputs."""

    def compare(self, base: _Base) -> None:
        """Check that the base model's weights are those from which the member was trained, if it names them."""

    def members(self, name: str, base: _Base) -> Iterator[Member]:
        """Yield the members, whose names start with `name`."""


class _Model:
    """A fine-tuned model of Hugging Face."""

    def __init__(self, place: str) -> None:
        self.place = self.tokenizer = place
        self.is_recorded = (of_run := result_of_run(place)) is not None
        self.result = of_run if self.is_recorded else _result_of_combination(place)
        self.base = _named_base(self.result)

    def check(self, base: _Base) -> Sequence[str]:
        model = load_model(self.place, base.task, 0, need_head=True, values=False).model
        base.require_parameters(model, self.place)
        return output_names(model.config, base.task)

    def compare(self, base: _Base) -> None:
        """Compare the weights from which the model's run started, if it was recorded."""
        if self.is_recorded:
            run = Path(resolve_model(self.place)).resolve().parent
            base.require_start(run, f"the recorded run {run}")

    def members(self, name: str, base: _Base) -> Iterator[Member]:
        yield Member(name, self.place, _step(self.place), self.result, lambda: _state(self.load(base)))

    def load(self, base: _Base) -> nn.Module:
        """Return the model with its weights."""
        model = load_model(self.place, base.task, 0, need_head=True).model
        base.require_parameters(model, self.place)  # tied weights may have turned out to be different ones
        return model


class _Run:
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
        self.final = _Model(str(final))
        self.tokenizer = self.final.tokenizer
        self.base = self.final.base or _named_base(self.trajectory.manifest.details)
        self._final_model: nn.Module | None = None

    def check(self, base: _Base) -> Sequence[str]:
        return self.final.check(base)

    def compare(self, base: _Base) -> None:
        base.require_start(Path(self.place), f"the recorded run {self.place}")

    def members(self, name: str, base: _Base) -> Iterator[Member]:
        for index, step in enumerate(self.trajectory.steps):
            read = partial(self._point, base, index)
            yield Member(f"{name}@{step}", self.place, step, self.final.result, read)

    def _point(self, base: _Base, index: int) -> dict[str, Tensor]:
        self.trajectory.load_into(self._model(base), index)
        return _state(self._model(base), copied=True)

    def _model(self, base: _Base) -> nn.Module:
        """Return the final model, which is loaded once, and into whose blocks the points are written."""
        if self._final_model is None:
            self._final_model = self.final.load(base)
        return self._final_model


class _Adapter:
    """An adapter that `tune` wrote."""

    def __init__(self, place: str) -> None:
        self.place = self.tokenizer = place
        _require_finished(place)
        self.adapter = OpenedAdapter(place)
        self.base = _named_base(self.adapter.result) or _named_base(self.adapter.manifest.details)
        self.fingerprint: Mapping[str, str] | None = None

    def check(self, base: _Base) -> Sequence[str]:
        _ = self.adapter.stored_basis  # opens the basis, or fails
        kind = (self.adapter.result or {}).get("type", base.task.type)
        if kind != base.task.type:
            raise InputError(
                f"{self.place} was trained for a task of the type {kind}, and {base.task.name} is {base.task.type}; "
                "combine models of one type of task"
            )
        model = load_model(base.name, base.task, 0, need_head=True, adapter=self.adapter, values=False).model
        return output_names(model.config, base.task, self.adapter)

    def compare(self, base: _Base) -> None:
        self.fingerprint = self.adapter.bind(base.loaded.model)

    def members(self, name: str, base: _Base) -> Iterator[Member]:
        yield Member(name, self.place, _step(self.place), self.adapter.result, lambda: _state(self._merged(base)))

    def _merged(self, base: _Base) -> nn.Module:
        model = copy.deepcopy(base.loaded.model)
        return wrap_with_adapter(SubspaceModel, model, self.adapter, fingerprint=self.fingerprint).merge()


class _Lora:
    """A LoRA that PEFT saved."""

    def __init__(self, place: str) -> None:
        self.place = self.tokenizer = place
        self.base: str | None = peft_config(place).base_model_name_or_path

    def check(self, base: _Base) -> Sequence[str]:
        own, labels = peft_labels(self.place), base.task.labels
        if own and labels and positions(labels, own) is None:
            raise InputError(
                f"the head of {self.place} was trained for the labels {', '.join(own)}, and {base.task.name} has the "
                f"labels {', '.join(labels)}; combine models of one task"
            )
        return own if own and labels else base.outputs

    def compare(self, base: _Base) -> None:
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

    def members(self, name: str, base: _Base) -> Iterator[Member]:
        yield Member(name, self.place, _step(self.place), None, partial(self._merged, base))

    def _merged(self, base: _Base) -> dict[str, Tensor]:
        lora, state = read_lora(base.loaded.model, self.place), _state(base.loaded.model, copied=True)
        for key, (left, right) in lora.factors.items():
            state[key] = (state[key].double() + left @ right).float()
        return state | {key: value.float() for key, value in lora.directly_trained.items() if key in state}


def _open(source: str) -> list[_Source]:
    """Return the models in a source.

    Raises:
        InputError: the source is not a model that can be combined.
    """
    folder = Path(source)
    if not folder.is_dir() and not folder.exists():
        return [_Model(source)]  # a hub id, or `minilm`
    candidates = [path for path in folder.glob("checkpoint-*") if path.is_dir() and CHECKPOINT.fullmatch(path.name)]
    has_model = (folder / CONFIG).is_file()
    is_adapter = (folder / MANIFEST).is_file() or (folder / PEFT_FILES[0]).is_file()
    if len(candidates) > 1 or (candidates and not has_model and not is_adapter):
        return [one for path in numeric_order(candidates) for one in _open(str(path))]
    if (folder / PEFT_FILES[0]).is_file():
        return [_Lora(source)]
    if has_model:
        return [_Model(source)]
    if (folder / MANIFEST).is_file():
        if (kind := read_manifest(folder).kind) == "basis":
            raise InputError(f"{source} is a basis, which holds no weights: give adapters that were trained in it")
        return [_Run(source) if kind == "trajectory" else _Adapter(source)]
    raise InputError(
        f"{source} is not a model to combine: expected the folder of a model ({CONFIG}), a LoRA ({PEFT_FILES[0]}), an "
        f"adapter or a recorded run ({MANIFEST}), or a folder of checkpoint-N folders"
    )


def _require_finished(place: str) -> None:
    """Check that a folder holds no interrupted work."""
    if is_unfinished(Path(place)):
        raise InputError(f"{place} holds unfinished work; repeat the command that started it, which goes on from there")


def _require_different_folders(opened: Sequence[_Source]) -> None:
    """Check that no source is given twice."""
    places: dict[str, str] = {}
    for one in opened:
        real = _real_place(one.place)
        if real in places:
            raise InputError(f"a model is given twice, as {places[real]} and as {one.place}; leave one of them out")
        places[real] = one.place


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


def _is_one_run(opened: Sequence[_Source], steps: Sequence[int | None]) -> bool:
    """Return whether all members are points of one run, or checkpoints in one folder, and their steps increase."""
    places = [(os.path.realpath(one.place), isinstance(one, _Run)) for one in opened]
    folders = {place if is_run else os.path.dirname(place) for place, is_run in places}
    known = [step for step in steps if step is not None]
    return len(folders) == 1 and len(known) == len(steps) and all(a < b for a, b in pairwise(known))


def _state(model: nn.Module, *, copied: bool = False) -> dict[str, Tensor]:
    """Return the parameters of a model."""
    values = {name: value.detach() for name, value in model.named_parameters()}
    return {name: value.clone() for name, value in values.items()} if copied else values


# -- what all members share -------------------------------------------------------------------------------------------


def _require_one_vocabulary(base: str, opened: Sequence[_Source]) -> None:
    """Check that all tokenizers have the same tokens with the same ids."""
    first: tuple[str, dict[str, int]] | None = None
    for place in dict.fromkeys([base, *(one.tokenizer for one in opened)]):
        if (vocabulary := _vocabulary(place)) is None:
            continue
        if first is None:
            first = place, vocabulary
            continue
        other, expected = first
        advice = "the same text has other token ids in it; combine models with one tokenizer"
        if len(vocabulary) != len(expected):
            raise MismatchError(
                f"{place} has another tokenizer: expected the {len(expected):,} tokens of {other}, found "
                f"{len(vocabulary):,}; {advice}"
            )
        for token, index in sorted(expected.items(), key=lambda item: item[1]):
            if vocabulary.get(token) != index:
                actual = f"the id {vocabulary[token]}" if token in vocabulary else "no such token"
                raise MismatchError(
                    f"{place} has another tokenizer: expected the id {index} for the token {token!r}, as in {other}, "
                    f"found {actual}; {advice}"
                )


def _vocabulary(model: str) -> dict[str, int] | None:
    """Return the token ids of a model's tokenizer; None if its folder contains none."""
    folder = Path(resolve_model(model))
    if (path := folder / VOCABULARY).is_file():
        with reading(path):
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the package has no class of its own for errors
                raise ValueError(str(error)) from error
        return dict(tokenizer.get_vocab())
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return None  # an adapter
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return dict(load_pretrained(AutoTokenizer, model).get_vocab())


def _common_outputs(outputs: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the names of the outputs of all heads.

    Raises:
        MismatchError: two heads have them in different orders.
    """
    places = iter(outputs)
    first = next(places, None)
    if first is None:
        return ()
    for place in places:
        if not are_same(outputs[first], outputs[place]):
            raise MismatchError(
                f"the heads have their outputs in different orders: {', '.join(outputs[first])} in {first}, and "
                f"{', '.join(outputs[place])} in {place}; reorder the rows of one head and its id2label, or leave one "
                "out"
            )
    return tuple(outputs[first])


def _short_names(places: Sequence[str]) -> list[str]:
    """Return the shortest ends of paths that differ from each other; `model` alone is too short.

    Example:
        >>> _short_names(["runs/a/model", "runs/b/model", "runs/c"])
        ['a/model', 'b/model', 'c']
        >>> _short_names(["x/run/checkpoint-8", "y/run/checkpoint-8", "y/run/checkpoint-9"])
        ['x/run/checkpoint-8', 'y/run/checkpoint-8', 'checkpoint-9']
    """
    parts = [Path(os.path.abspath(place) if Path(place).is_dir() else place).parts for place in places]
    counts = [2 if part[-1:] == (MODEL,) else 1 for part in parts]
    while True:
        names = ["/".join(part[-count:]) for part, count in zip(parts, counts, strict=True)]
        times = Counter(names)
        longer = [
            count + (times[name] > 1 and count < len(part))
            for name, part, count in zip(names, parts, counts, strict=True)
        ]
        if longer == counts:
            return names
        counts = longer

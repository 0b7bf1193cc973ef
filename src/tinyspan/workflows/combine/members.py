"""The models that are combined, opened together, and the checks that they have one base model and one task."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinyspan.errors import InputError, MismatchError
from tinyspan.io.folders import MODEL
from tinyspan.labels import are_same
from tinyspan.workflows.combine.model_forms import Form, Member, RecordedRun, open_forms
from tinyspan.workflows.combine.shared_base import SharedBase, real_place
from tinyspan.workflows.combine.vocabularies import require_one_vocabulary
from tinyspan.workflows.models import load_pretrained, resolve_model
from tinyspan.workflows.tasks.base import Task

__all__ = ["Member", "Members", "digest", "open_members", "require_distinct", "require_several"]


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
    opened = [one for source in sources for one in open_forms(source)]
    _require_different_folders(opened)
    start = SharedBase(_base_name(opened, base), task)
    outputs = _common_outputs({one.place: one.check(start) for one in opened})
    require_one_vocabulary([start.name, *(one.tokenizer for one in opened)])
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


def _base_name(opened: Sequence[Form], base: str | None) -> str:
    """Return the name of the base model: the given one, or the one that the members name."""
    if base is not None:
        return base
    named: dict[str, Form] = {}
    for one in opened:
        if one.base is not None:
            named.setdefault(real_place(one.base), one)
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
        load_pretrained("AutoConfig", name)
    except InputError as error:
        raise InputError(
            f"{first.place} names the base model {name!r}, which cannot be loaded; give its present location, base= "
            f"({error})"
        ) from error
    return name


def _require_different_folders(opened: Sequence[Form]) -> None:
    """Check that no source is given twice."""
    places: dict[str, str] = {}
    for one in opened:
        real = real_place(one.place)
        if real in places:
            raise InputError(f"a model is given twice, as {places[real]} and as {one.place}; leave one of them out")
        places[real] = one.place


def _is_one_run(opened: Sequence[Form], steps: Sequence[int | None]) -> bool:
    """Return whether all members are points of one run, or checkpoints in one folder, and their steps increase."""
    places = [(os.path.realpath(one.place), isinstance(one, RecordedRun)) for one in opened]
    folders = {place if is_run else os.path.dirname(place) for place, is_run in places}
    known = [step for step in steps if step is not None]
    return len(folders) == 1 and len(known) == len(steps) and all(a < b for a, b in pairwise(known))


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

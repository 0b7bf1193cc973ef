"""From opened models to a problem: their differences on disk, and the models with their heads in one place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tinyspan.errors import InputError, MismatchError
from tinyspan.io.storage import write_json
from tinyspan.io.tensors import open_tensors, write_tensors
from tinyspan.labels import set_label_names
from tinyspan.workflows.combine.members import Member, Members, digest, require_distinct
from tinyspan.workflows.combine.problem import Problem, TaskRows
from tinyspan.workflows.combine.span import HEAD, Heads, Span, shared_blocks, stack_differences
from tinyspan.workflows.hardware import default_device
from tinyspan.workflows.models import LoadedModel, load_model
from tinyspan.workflows.settings import Settings

__all__ = ["Options", "open_problem"]

DIGESTS = "models.json"  # hashes of the models, written when all differences are


@dataclass(frozen=True)
class Options:
    """What a combination computes.

    Attributes:
        methods: names of the methods; empty for all that apply.
        controls: whether to train on the rows to learn from, too, for comparison.
        geometry: whether to compute the loss on the line and in the plane between two models.
        batch_size: rows per forward pass.
        dtype: dtype of the stored differences.
        precision: as `Settings.precision`.
        seed: seed of orders and of random methods; rows are drawn with `Division.seed`.
    """

    methods: tuple[str, ...] = ()
    controls: bool = False
    geometry: bool = True
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0


def open_problem(
    opened: Sequence[Members],
    tasks: Sequence[TaskRows],
    span: Path,
    scores: Path,
    options: Options,
    say: Callable[[str], None] = lambda text: None,
) -> Problem:
    """Return the models of one task, or one model for each of several tasks, as a problem of combination.

    Args:
        opened: the models, one entry per task; see `open_sources`.
        tasks: the rows of the tasks.
        span: folder for the differences, which are computed if they are not there.
        scores: folder for scores and learned coefficients.
        options: number formats, batch size and seed.
        say: function that gets a line about progress.

    Raises:
        InputError: a model has NaN or infinite numbers, two models are equal, or of some tasks more is better and of
            others less.
        MismatchError: the models of two tasks have other encoders.
    """
    if len({rows.task.lower_is_better for rows in tasks}) > 1:
        named = ", ".join(f"{rows.name} ({rows.task.metric})" for rows in tasks)
        raise InputError(f"a mean over metrics of which some are better if lower says nothing: {named}; choose metric=")
    loaded = [load_model(members.base, rows.task, 0) for members, rows in zip(opened, tasks, strict=True)]
    for (model, _), members in zip(loaded, opened, strict=True):
        set_label_names(model, members.outputs)
    shared = _shared(loaded, tasks)
    absent = {name for one in loaded for name in one.drawn}
    blocks = shared_blocks(loaded[0].model, shared, absent)
    every = [member for one in opened for member in one.members]
    if not (span / DIGESTS).is_file():
        base = {name: value.detach().clone() for name, value in loaded[0].model.named_parameters()}
        in_units = _encoded(loaded[0].model, tasks[0], base) if len(tasks) == 1 else base
        origin = {name: in_units[name] for name in shared if name not in absent}
        digests: dict[str, str] = {}
        several = len(tasks) > 1
        states = _states(every, span, digests, shared, say)
        if len(tasks) == 1:
            states = (_encoded(loaded[0].model, tasks[0], state) for state in states)
        stack_differences(blocks, origin, states, len(every), span, getattr(torch, options.dtype))
        require_distinct(digests, None if absent or several else digest(base))
        write_json(span / DIGESTS, digests)
    for member in every:
        member.release()
    units = ExitStack()
    for index, ((model, _), rows) in enumerate(zip(loaded, tasks, strict=True)):
        if (span / _own_file(index)).is_file():
            _load_own(model, span / _own_file(index))
        units.enter_context(rows.task.training_units(model))
    heads = Heads([model.eval() for model, _ in loaded], shared).to(default_device())
    return Problem(
        Span(heads, blocks, span),
        tasks,
        [member.name for member in every],
        [member.order for member in every],
        scores,
        seed=options.seed,
        batch_size=options.batch_size,
        units=units,
        autocast=Settings(precision=options.precision).autocast,
        say=say,
    )


def _shared(loaded: Sequence[LoadedModel], tasks: Sequence[TaskRows]) -> set[str]:
    """Return the names of the combined parameters: all of one task, layers and embeddings of several.

    Of several language tasks all parameters are combined, too, since their heads are pre-trained.

    Raises:
        MismatchError: the models of two tasks differ in one of these.
    """
    named = dict(loaded[0].model.named_parameters())
    if len(loaded) == 1:
        return set(named)
    blocks = shared_blocks(loaded[0].model, set(named))
    has_own = not all(rows.task.pretrained_head for rows in tasks)
    shared = {spec.name for block in blocks for spec in block.parameters if not (has_own and block.name == HEAD)}
    for (model, _), rows in zip(loaded[1:], tasks[1:], strict=True):
        other = dict(model.named_parameters())
        for name in sorted(shared):
            if name not in other or other[name].shape != named[name].shape:
                raise MismatchError(
                    f"the models of {tasks[0].name} and {rows.name} have different encoders: {name!r} is missing in "
                    "one of them or has another shape"
                )
    return shared


def _states(
    members: Sequence[Member],
    span: Path,
    digests: dict[str, str],
    shared: set[str],
    say: Callable[[str], None],
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the weights of every model, and write those that its task keeps."""
    for index, member in enumerate(members):
        say(f"reading {member.name}")
        state = member.load()
        digests[member.name] = digest(state)
        if own := {name: value for name, value in state.items() if name not in shared}:
            write_tensors(span / _own_file(index), own)
        yield state


@torch.no_grad()
def _encoded(model: torch.nn.Module, rows: TaskRows, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with which a model computes encoded labels, from weights with which it computes labels.

    Args:
        model: a model of the task, whose weights are overwritten.
        rows: the task.
        state: the weights.
    """
    named = dict(model.named_parameters())
    for name, value in state.items():
        named[name].copy_(value)
    with rows.task.training_units(model):
        return {name: named[name].detach().clone() for name in state}


@torch.no_grad()
def _load_own(model: torch.nn.Module, path: Path) -> None:
    """Put the head of a task into its model."""
    reader, named = open_tensors(path), dict(model.named_parameters())
    for name in reader.keys():  # noqa: SIM118 - not a mapping
        named[name].copy_(reader.get_tensor(name))


def _own_file(index: int) -> str:
    return f"own-{index:03d}.safetensors"

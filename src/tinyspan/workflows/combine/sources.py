"""What is combined and on which rows: the models of a task, their data, and the rows on which they were not trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyspan.errors import InputError
from tinyspan.workflows.combine.members import Member, Members, open_members, require_several
from tinyspan.workflows.combine.problem import TaskRows, divide
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.tasks import Task

__all__ = ["Division", "Source", "open_sources", "rows_of"]


@dataclass(frozen=True)
class Source:
    """The models of one task, and its rows.

    Attributes:
        task: the task.
        models: paths or hub ids; see `open_members`.
        name: name in results; by default that of the task.
        data: folder of the rows, if the task needs one.
        text: text columns of a language task, if they have other names.
        train_rows: number of training rows that were used in training, with those set aside; by default as the models'
            `result.json` say.
        set_aside: number of these that were set aside; likewise.
        eval_rows: maximum number of held-out rows.
    """

    task: Task
    models: Sequence[str]
    name: str = ""
    data: Path | None = None
    text: Sequence[str] = ()
    train_rows: int | None = None
    set_aside: int | None = None
    eval_rows: int | None = None

    @property
    def title(self) -> str:
        """Name in results."""
        return self.name or self.task.name


@dataclass(frozen=True)
class Division:
    """Numbers of rows.

    Attributes:
        learn: rows of each task to learn from.
        choose: rows of each task to choose on.
        max_length: maximum number of tokens per row.
        seed: seed with which the rows are drawn.
    """

    learn: int = 128
    choose: int = 256
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.learn, self.choose) < 2:
            raise InputError(
                f"expected at least 2 rows to learn from and to choose on, got learn_rows={self.learn} and "
                f"choose_rows={self.choose}"
            )


def open_sources(sources: Sequence[Source], base: str | None) -> list[Members]:
    """Open the models of one task, or one model for each of several tasks.

    Raises:
        InputError: there is only one model, several tasks have more than one model each, or two tasks one name.
        MismatchError: the models have different base models; see `open_members`.
    """
    opened: list[Members] = []
    for source in sources:
        members = open_members(source.models, source.task.for_scoring(), base)
        base = members.base
        opened.append(members)
    if len(sources) == 1:
        require_several(opened[0].members)
        return opened
    titles = [source.title for source in sources]
    if len({*titles}) < len(titles):
        raise InputError(f"expected a name of its own for every task, got {', '.join(titles)}")
    for source, members in zip(sources, opened, strict=True):
        if len(members.members) != 1:
            raise InputError(
                f"{source.title} has {len(members.members)} models, where several tasks have one each: combine those "
                "of one task first, and give the folder that this writes"
            )
    return opened


def rows_of(source: Source, members: Members, division: Division) -> TaskRows:
    """Return the rows of a task, divided into the three parts, without those on which the models were trained.

    Rows that the runs set aside come first. If they set none aside and drew some of the training rows, rows that were
    not drawn are taken. For models without a `result.json`, all training rows count as new, unless `train_rows` and
    `set_aside` of the source say otherwise.

    Raises:
        InputError: too few rows are left, or the models were trained on different rows.
    """
    count, aside = _trained_on(source, members.members)
    needed = division.learn + division.choose
    taken = None if count is None else count if aside else count + needed
    prepared = prepare(
        members.base,
        source.task,
        data=source.data,
        text=source.text,
        max_length=division.max_length,
        train_rows=taken,
        validation_rows=source.eval_rows,
        outputs=members.outputs,
    )
    if count is not None:
        prepared = _without_trained(prepared, source, count, aside, needed)
    return divide(prepared, division.learn, division.choose, division.seed, source.title)


def _trained_on(source: Source, members: Sequence[Member]) -> tuple[int | None, int]:
    """Return how many training rows the models used, with those set aside, and how many were set aside.

    The first is None if nothing is known, so that all training rows are new.

    Raises:
        InputError: the models used different rows.
    """
    if source.train_rows == 0:
        return None, 0
    if source.train_rows is not None or source.set_aside is not None:
        return source.train_rows, source.set_aside or 0
    known = {_rows_in(member.result): member.name for member in members if member.result is not None}
    if not known:
        return None, 0
    (first, name), *others = known.items()
    if others:
        raise InputError(
            f"the models were trained on different rows: {name} on {first[0]} of which {first[1]} were set aside, "
            f"{others[0][1]} on {others[0][0][0]} and {others[0][0][1]}; say which rows are new to all of them, "
            "train_rows= and set_aside="
        )
    return first


def _rows_in(result: Mapping[str, Any]) -> tuple[int, int]:
    rows = result["rows"]
    aside = int(rows.get("aside", 0))
    return int(rows["train"]) + aside, aside


def _without_trained(prepared: Prepared, source: Source, count: int, aside: int, needed: int) -> Prepared:
    """Return the task with the rows that were not trained on as those set aside.

    Raises:
        InputError: there are none.
    """
    if aside:
        return prepared.with_aside(aside)
    total = len(prepared.train or ())
    if not prepared.shuffled or total < count + needed:
        raise InputError(
            f"{source.title}: the models were trained on {count} rows and set none aside, and there are no {needed} "
            "others to learn from and to choose on; record with set_aside=, or pass data= with other rows and "
            "train_rows=0"
        )
    assert prepared.train is not None
    return prepared.with_last_aside(total - count)

"""What is combined and on which rows: the models of a task, their data, and the rows on which they were not trained."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from tinyspan.errors import InputError
from tinyspan.io.folders import COMBINED, MODELS
from tinyspan.io.storage import reading
from tinyspan.workflows.combine.members import Member, Members, open_members, require_several
from tinyspan.workflows.combine.problem import TaskRows, divide
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.run_rows import draw_of
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import Task
from tinyspan.workflows.tasks.texts import TEXT, Language

__all__ = ["Division", "Source", "open_sources", "rows_of", "trained_rows"]

NEW_ROWS = "data= with rows that are new to the models and train_rows=0"


@dataclass(frozen=True)
class Source:
    """The models of one task, and its rows.

    Attributes:
        task: the task.
        models: paths or hub ids; see `open_members`.
        name: name in results; by default that of the task.
        data: folder of the rows, if the task needs one.
        text: text columns of a language task, if they have other names.
        train_rows: 0 states that all training rows are new to the models. By default the models' `result.json` say
            which are; another number states that models without one were trained on the rows of those with one.
        set_aside: number of training rows that were set aside, as a run with `Settings(set_aside=...)` does; likewise.
            If no model has a `result.json`, the other training rows were all used.
        eval_rows: maximum number of held-out rows.
        max_target_length: maximum number of tokens of a completion.
    """

    task: Task
    models: Sequence[str]
    name: str = ""
    data: Path | None = None
    text: Sequence[str] = ()
    train_rows: int | None = None
    set_aside: int | None = None
    eval_rows: int | None = None
    max_target_length: int = Settings.max_target_length

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

    The names of all models differ: names that two tasks have in common begin with the name of the task. Models of
    several tasks have no `order`.

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
                "of one task first, and give the folder `model` that this writes"
            )
    times = Counter(members.members[0].name for members in opened)
    return [_renamed(members, source.title, times) for source, members in zip(sources, opened, strict=True)]


def _renamed(members: Members, title: str, times: Mapping[str, int]) -> Members:
    """Return the model of one of several tasks, with a name that no other model has."""
    (member,) = members.members
    name = member.name if times[member.name] == 1 else f"{title}: {member.name}"
    return members._replace(members=(replace(member, name=name, order=None),))


def rows_of(source: Source, members: Members, division: Division) -> TaskRows:
    """Return the rows of a task, divided into the three parts, without those on which the models were trained.

    Rows that the runs set aside come first. If they set none aside and drew some of the training rows, rows that were
    not drawn are taken. The training rows of every model with a `result.json` are read again as its run read them, and
    must be the same. Models without a `result.json` are taken not to have seen the rows, with a warning, unless
    `train_rows` or `set_aside` of the source state this.

    Raises:
        InputError: too few rows are left, the models were trained on different rows, or on others than those of the
            source; or `train_rows` and `set_aside` contradict the models' `result.json`.
    """
    trained, unknown = _trained_on(source, members.members)
    needed = division.learn + division.choose
    taken, seed = None, 0
    if trained is not None:
        taken, seed = trained.train_rows, trained.draw_seed
        taken = taken if taken is None or trained.set_aside else taken + needed
    if source.train_rows != 0:
        _warn_of_combinations(source, members.members)
    if unknown:
        warnings.warn(
            f"{source.title}: no result.json says on which rows {', '.join(unknown)} {_were(unknown)} trained; the "
            "rows to learn from and to choose on are taken to be new, and would favour a model that was trained on "
            "them: train_rows=0 states that all training rows are new",
            stacklevel=2,
        )
    read = _reader(source, members.base)
    prepared = read(
        max_length=division.max_length,
        max_target_length=source.max_target_length,
        train_rows=taken,
        validation_rows=source.eval_rows,
        draw_seed=seed,
        outputs=tuple(members.outputs),
    )
    if trained is not None:
        _require_same_rows(source, members, division, read)
        prepared = _without_trained(prepared, source, trained, needed)
    return divide(prepared, division.learn, division.choose, division.seed, source.title)


def _reader(source: Source, base: str) -> Callable[..., Prepared]:
    """Return `prepare` for the rows of a source, which reads and tokenizes them once for equal arguments."""
    return cache(partial(prepare, base, source.task, data=source.data, text=source.text))


def trained_rows(source: Source, members: Members) -> dict[str, Any]:
    """Return which training rows the models of a task used, for the result of their combination.

    Returns:
        `train_rows`, the number of rows that were drawn of the training rows, null for all and 0 if all are new to the
        models; `set_aside`, the number of those that were not trained on; and if it is known how they were read, what
        makes the same rows again, and their digests.
    """
    trained, _ = _trained_on(source, members.members)
    return {"train_rows": 0, "set_aside": 0} if trained is None else asdict(trained)


# -- the rows of the runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """Which training rows a model has used, and how they were read.

    Attributes:
        train_rows: number of rows, or texts, that were drawn of the training rows, with those set aside; None for all.
        set_aside: number of these that were set aside, after tokenization.
        draw_seed: seed of the draw.
        eval_rows: number of held-out rows, or texts, that were drawn; None for all.
        max_length: maximum number of tokens per row; None if it is not known how rows were read.
        max_target_length: maximum number of tokens of a completion.
        count: number of tokenized training rows, with those set aside.
        labels: names of the outputs of the model's head.
        digests: of the rows in the parts `train` and `aside`; see `Prepared.digests`.
        held_out: numbers of the held-out rows, if there are no digests.
    """

    train_rows: int | None
    set_aside: int
    draw_seed: int = 0
    eval_rows: int | None = None
    max_length: int | None = None
    max_target_length: int = Settings.max_target_length
    count: int = 0
    labels: Sequence[str] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    held_out: Sequence[int] = ()


def _trained_in(member: Member, title: str) -> _Trained | None:
    """Return what the result of a model says about its training rows; None if it has none, or says nothing."""
    if (result := member.result) is None:
        return None
    with reading(Path(member.source)):
        if result["method"] == COMBINED:
            entry = _task_in(result, member, title).get("trained") or {}
            names = {one.name for one in fields(_Trained)}
            known = {name: value for name, value in entry.items() if name in names}
            return _Trained(**known) if known.get("max_length") is not None else None
        rows, settings, draw = result["rows"], result["settings"], draw_of(result)
        digests = {part: value for part, value in result.get("row_digests", {}).items() if part != "validation"}
        aside = int(rows.get("aside", 0))
        return _Trained(
            draw.train,
            aside,
            draw.seed,
            draw.validation,
            int(settings["max_length"]),
            int(settings.get("max_target_length", Settings.max_target_length)),
            int(rows["train"]) + aside,
            list(result.get("labels") or ()),
            digests,
            [] if digests else list(result.get("data", {}).get("held_out_rows", ())),
        )


def _task_in(result: Mapping[str, Any], member: Member, title: str) -> Mapping[str, Any]:
    """Return the entry of a task in the result of the combination that a member is."""
    folder = Path(member.source).resolve()
    name = folder.name if folder.parent.name == MODELS else title
    entries: list[Mapping[str, Any]] = result["tasks"]
    return next((entry for entry in entries if entry["name"] == name), entries[0] if len(entries) == 1 else {})


def _trained_on(source: Source, members: Sequence[Member]) -> tuple[_Trained | None, list[str]]:
    """Return which training rows the models used, and the names of those of which it is neither known nor stated.

    The first is None if all training rows are new to the models.

    Raises:
        InputError: the numbers of the source contradict each other or a result, or say nothing about the rows of models
            without a result.
    """
    given = {"train_rows": source.train_rows, "set_aside": source.set_aside}
    if source.train_rows == 0:
        if source.set_aside:
            raise InputError(
                f"{source.title}: train_rows=0 states that all training rows are new to the models, and "
                f"set_aside={source.set_aside} that some are not; leave one of them out"
            )
        return None, []
    results = [(member.name, _trained_in(member, source.title)) for member in members]
    known = [(name, one) for name, one in results if one is not None]
    unknown = [name for name, one in results if one is None]
    if not known:
        if source.train_rows is not None:
            raise InputError(
                f"{source.title}: train_rows={source.train_rows} does not say which rows {', '.join(unknown)} "
                f"{_were(unknown)} trained on, and no result.json does; give {NEW_ROWS}"
            )
        return (None, unknown) if source.set_aside is None else (_Trained(None, source.set_aside), [])
    name, first = known[0]
    stored = {"train_rows": first.train_rows or first.count, "set_aside": first.set_aside}
    for key, value in given.items():
        if value not in (None, stored[key]):
            raise InputError(
                f"{source.title}: expected {key}={stored[key]}, as in the result.json of {name}, got {key}={value}; "
                f"leave it out, or give {NEW_ROWS}"
            )
    return first, unknown if [*given.values()] == [None, None] else []


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _warn_of_combinations(source: Source, members: Sequence[Member]) -> None:
    """Warn if coefficients of a member were learned and chosen on the rows that are drawn from again."""
    names = [member.name for member in members if (member.result or {}).get("method") == COMBINED]
    if names:
        warnings.warn(
            f"{source.title}: the coefficients of {', '.join(names)} were learned and chosen on rows that the runs set "
            "aside, and this combination draws from the same rows, with the same seed the same ones, so it favours "
            f"{'it' if len(names) == 1 else 'them'}; give {NEW_ROWS}",
            stacklevel=3,
        )


def _require_same_rows(source: Source, members: Members, division: Division, read: Callable[..., Prepared]) -> None:
    """Check that the models were trained on the same rows, and that these are the rows of the source.

    Raises:
        InputError: they are not.
    """
    first: tuple[str, _Trained, Any] | None = None
    compared: list[_Trained] = []
    for member in members.members:
        trained = _trained_in(member, source.title)
        if trained is None or trained in compared:
            continue
        compared.append(trained)
        prepared = _as_trained(source, member, trained, read)
        pieces = _joins_texts(prepared)
        if pieces and trained.max_length != division.max_length:
            raise InputError(
                f"{source.title}: {member.name} was trained on pieces of {trained.max_length} tokens, and pieces of "
                f"max_length={division.max_length} begin elsewhere, so that new ones would contain text of its "
                f"training rows; max_length={trained.max_length}"
            )
        drawn = prepared.drawn.get("train"), trained.draw_seed, trained.set_aside
        if first is None:
            first = member.name, trained, drawn
        elif drawn != first[2]:
            raise InputError(
                f"the models were trained on different rows: {first[0]} on {first[1].count} of which "
                f"{first[1].set_aside} were set aside, {member.name} on {trained.count} and {trained.set_aside} "
                f"(seeds of the draw {first[1].draw_seed} and {trained.draw_seed}); give {NEW_ROWS}"
            )


def _as_trained(source: Source, member: Member, trained: _Trained, read: Callable[..., Prepared]) -> Prepared:
    """Return the rows of a source, read as a model's run read them.

    Raises:
        InputError: they are not the rows of the run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # which the rows of the combination cause, too
        prepared = read(
            max_length=trained.max_length or 0,
            max_target_length=trained.max_target_length,
            train_rows=trained.train_rows,
            validation_rows=trained.eval_rows,
            draw_seed=trained.draw_seed,
            outputs=tuple(trained.labels),
        )
    found, different = len(prepared.train or ()), None
    if found != trained.count:
        different = f"its result.json has {trained.count} training rows, with those set aside, and here are {found}"
    elif trained.held_out and sorted(prepared.row_numbers) != list(trained.held_out):
        different = "its result.json names other held-out rows"
    else:
        prepared = prepared.with_aside(trained.set_aside)
        different = prepared.other_rows(trained.digests)
    if different is not None:
        raise InputError(
            f"{source.title}: the rows are not those on which {member.name} was trained: {different}; give the data, "
            f"columns and holdout= of that run, or {NEW_ROWS}"
        )
    return prepared


def _joins_texts(prepared: Prepared) -> bool:
    """Return whether rows are pieces of texts."""
    return isinstance(prepared.task, Language) and prepared.task.columns == TEXT


def _without_trained(prepared: Prepared, source: Source, trained: _Trained, needed: int) -> Prepared:
    """Return the task with the rows that were not trained on as those set aside.

    Raises:
        InputError: there are none.
    """
    if trained.set_aside:
        return prepared.with_aside(trained.set_aside)
    total = len(prepared.train or ())
    count = total if trained.train_rows is None else trained.train_rows
    if prepared.train is None or _joins_texts(prepared) or total < count + needed:
        others = "none of the others can be told apart" if _joins_texts(prepared) else f"there are no {needed} others"
        raise InputError(
            f"{source.title}: the models were trained on {count} {'texts' if _joins_texts(prepared) else 'rows'} and "
            f"set none aside, and {others} to learn from and to choose on; record with set_aside=, or give {NEW_ROWS}"
        )
    if prepared.shuffled:
        return prepared.with_last_aside(total - count)
    import pandas as pd

    # all rows are needed, which `prepare` leaves in their order
    drawn = {*pd.Series(range(total)).sample(count, random_state=trained.draw_seed)}
    new = [row for row in range(total) if row not in drawn]
    return prepared.divided(sorted(drawn), new)

"""The paper's tables and figures: which cells each is made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from tinyspan.basis import Center
from tinyspan.errors import InputError
from tinyspan.experiments.cells import Cell, Kind
from tinyspan.experiments.recipes import Suite

__all__ = [
    "FAMILIES",
    "REACHED",
    "TABLES",
    "Known",
    "cells_of",
    "family_cell",
    "intrinsic_cell",
    "outlier_cells",
    "random_cell",
]

Known = Callable[[Cell], float | None]
REACHED = 0.9  # of full fine-tuning's score: the 90 of d90
FAMILIES: dict[Kind, tuple[int, int]] = {  # the ranks that the search for d90 starts and ends with
    "intrinsic": (1, 0),  # 0: the suite's rank
    "random": (1, 32),
    "did": (16, 8192),
    "said": (16, 8192),
}
CENTERS: tuple[Center, ...] = ("none", "init", "mean")


def _table1(suite: Suite, known: Known) -> Iterator[Cell]:
    """Transductive: the basis comes from the task itself. The controls come last."""
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        yield intrinsic_cell(suite, model, task, seed)
        yield random_cell(suite, model, task, seed)
        yield Cell(model, task, "freeze", seed)
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "line", seed, 1, "init")
        yield Cell(model, task, "flipped", seed, suite.rank_of(task), suite.center)


def _figure2(suite: Suite, known: Known) -> Iterator[Cell]:
    """Inductive: the basis comes from another task."""
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        yield intrinsic_cell(suite, model, task, seed)
        yield random_cell(suite, model, task, seed)
        for source in suite.tasks:
            if source != task:
                yield Cell(model, task, "inductive", seed, suite.rank, suite.center, source)


def _table2(suite: Suite, known: Known) -> Iterator[Cell]:
    """Unified: one checkpoint of each task's run, stacked; zero-shot: without the target's."""
    tasks = len(suite.tasks)
    if tasks < 3:
        raise InputError(f"a unified basis needs at least 3 tasks, the suite has {tasks}")
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        others = [other for other in suite.tasks if other != task]
        yield Cell(model, task, "unified", seed, tasks, suite.center, "+".join(suite.tasks))
        yield Cell(model, task, "zero-shot", seed, tasks - 1, suite.center, "+".join(others))
        yield Cell(model, task, "random", seed, tasks)


def _table5(suite: Suite, known: Known) -> Iterator[Cell]:
    """The dimension of the subspace."""
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        for rank in suite.dimensions:
            yield Cell(model, task, "intrinsic", seed, rank, suite.center)
        for rank in suite.dimensions:
            yield Cell(model, task, "random", seed, rank)


def _dimension(suite: Suite, known: Known) -> Iterator[Cell]:
    """d90: in every family the smallest dimension that reaches 90 % of full, with the embeddings frozen."""
    for seed, model, task in _runs(suite):
        full, none = Cell(model, task, "full", seed), Cell(model, task, "freeze", seed, embeddings=False)
        yield full
        yield none
        reference, floor = known(full), known(none)
        if reference is not None and floor is not None and floor < REACHED * reference:
            for family in FAMILIES:
                yield from _search(suite, known, model, task, family, seed, REACHED * reference)


def _search(
    suite: Suite, known: Known, model: str, task: str, family: Kind, seed: int, target: float
) -> Iterator[Cell]:
    """Double the dimension until the target is reached, then halve the gap until it is a quarter of the dimension."""
    first, last = FAMILIES[family]
    last = last or suite.rank_of(task)
    below, rank = 0, first
    while rank <= last:
        cell = family_cell(suite, model, task, family, seed, rank)
        yield cell
        if (score := known(cell)) is None:
            return
        if score >= target:
            break
        below, rank = rank, 2 * rank
    else:
        return
    while rank - below > max(1, rank // 4):
        middle = (below + rank) // 2
        cell = family_cell(suite, model, task, family, seed, middle)
        yield cell
        if (score := known(cell)) is None:
            return
        below, rank = (below, middle) if score >= target else (middle, rank)


def family_cell(suite: Suite, model: str, task: str, family: Kind, seed: int, rank: int) -> Cell:
    """A dimension of a family in the search for d90."""
    center = suite.center if family == "intrinsic" else None
    return Cell(model, task, family, seed, rank, center, embeddings=False)


def _table3(suite: Suite, known: Known) -> Iterator[Cell]:
    """Outliers disabled, under the paper's formula and under centring, and in full fine-tuning."""
    for seed, model, task in _runs(suite):
        yield from outlier_cells(suite, model, task, seed)


TABLES: dict[str, Callable[[Suite, Known], Iterable[Cell]]] = {
    "table1": _table1,
    "figure2": _figure2,
    "table2": _table2,
    "figure3": _table2,
    "table3": _table3,
    "table4": _table3,
    "figure4": _table3,
    "table5": _table5,
    "dimension": _dimension,
}


def cells_of(tables: Sequence[str], suite: Suite, known: Known) -> dict[Cell, str]:
    """Return the cells that tables need, each once, in the order to run them, with the table that asks first.

    Args:
        tables: their names.
        suite: how they are made.
        known: the score of a finished cell, else None; the search for d90 asks for more as it learns.
    """
    found: dict[Cell, str] = {}
    for table in tables:
        for cell in TABLES[table](suite, known):
            found.setdefault(cell, table)
    return found


def _runs(suite: Suite) -> Iterator[tuple[int, str, str]]:
    return product(range(suite.seeds), suite.models, suite.tasks)


def outlier_cells(suite: Suite, model: str, task: str, seed: int) -> Iterator[Cell]:
    """The dissections of one run: of full fine-tuning, of the three ways to centre, and of a random basis."""
    yield Cell(model, task, "outliers", seed, None, None, "full")
    for center in CENTERS:
        yield Cell(model, task, "outliers", seed, None, center, "intrinsic")
    yield Cell(model, task, "outliers", seed, None, None, "random")


def intrinsic_cell(suite: Suite, model: str, task: str, seed: int) -> Cell:
    """The paper's method at the suite's rank."""
    return Cell(model, task, "intrinsic", seed, suite.rank_of(task), suite.center)


def random_cell(suite: Suite, model: str, task: str, seed: int) -> Cell:
    """A random basis of the same rank."""
    return Cell(model, task, "random", seed, suite.rank_of(task))

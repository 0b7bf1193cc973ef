"""The cells of each of the paper's tables and figures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product

from tinyspan.bases.constructors import CONSTRUCTORS
from tinyspan.bases.point_matrix import Center
from tinyspan.errors import InputError
from tinyspan.lab.cells import Cell, Kind, Known
from tinyspan.lab.suite import Suite

__all__ = [
    "FAMILIES",
    "REACHED",
    "TABLES",
    "MakeCell",
    "cells_of",
    "outlier_cells",
    "possible_tables",
    "search",
    "table1_methods",
    "table2_methods",
    "table5_methods",
    "transfer_cell",
    "unified_cell",
]

MakeCell = Callable[[str, str, int], Cell]  # model, task, seed -> cell
REACHED = 0.9  # share of full fine-tuning's score that defines d90
FAMILIES: dict[Kind, tuple[int, int]] = {  # first and last rank of the search for d90
    "intrinsic": (1, 0),  # 0: the suite's rank
    "random": (1, 32),
    "did": (16, 8192),
    "said": (16, 8192),
}
CENTERS: tuple[Center, ...] = ("none", "init", "mean")


def table1_methods(suite: Suite) -> dict[str, MakeCell]:
    """Transductive: the basis comes from the task itself; with baselines, controls and the suite's own bases."""
    return {
        "full": _plain("full"),
        "**intrinsic**": lambda m, t, s: intrinsic_cell(suite, m, t, s),
        "random": lambda m, t, s: random_cell(suite, m, t, s),
        "freeze": _plain("freeze"),
        "line (k = 1)": lambda m, t, s: Cell(m, t, "line", s, 1, "init"),
        "flipped": lambda m, t, s: Cell(m, t, "flipped", s, suite.rank_of(t), "init"),
        **{name: partial(_drawn_cell, suite, name) for name in suite.bases},
    }


def table2_methods(suite: Suite) -> dict[str, MakeCell]:
    """Unified: the basis of the ends of all tasks' runs; zero-shot: without the target's."""
    tasks = len(suite.tasks)
    if tasks < 3:
        raise InputError(f"a unified basis needs at least 3 tasks, the suite has {tasks}")
    if suite.center == "mean":
        raise InputError(f"the ends of {tasks} runs, centred on their mean, span fewer than {tasks} directions")

    def zero_shot(model: str, task: str, seed: int) -> Cell:
        others = [other for other in suite.tasks if other != task]
        return Cell(model, task, "zero-shot", seed, tasks - 1, suite.center, "+".join(others))

    return {
        "full": _plain("full"),
        "unified": lambda m, t, s: unified_cell(suite, m, t, s),
        "zero-shot": zero_shot,
        "random": lambda m, t, s: Cell(m, t, "random", s, tasks),
    }


def table5_methods(suite: Suite) -> dict[str, MakeCell]:
    """Dimension: the intrinsic basis and controls for several ranks."""
    if not suite.dimensions:
        raise InputError("the suite has no dimensions; table5 compares at least one rank")

    def at(kind: Kind, rank: int) -> MakeCell:
        center = suite.center if kind == "intrinsic" else None
        return lambda m, t, s: Cell(m, t, kind, s, rank, center)

    kinds: tuple[Kind, ...] = ("intrinsic", "random")
    of_ranks = {f"{kind}, k = {rank}": at(kind, rank) for kind in kinds for rank in suite.dimensions}
    return {"full": _plain("full"), **of_ranks}


def _rows(methods: Callable[[Suite], dict[str, MakeCell]]) -> Callable[[Suite, Known], Iterator[Cell]]:
    """Return the cells of a table of methods: seed by seed, the first four methods before the controls."""

    def cells(suite: Suite, known: Known) -> Iterator[Cell]:
        makers = list(methods(suite).values())
        for some in (makers[:4], makers[4:]):
            for seed, model, task in _runs(suite):
                for make in some:
                    yield make(model, task, seed)

    return cells


def _figure2(suite: Suite, known: Known) -> Iterator[Cell]:
    """Inductive: the basis comes from another task; all bases have the suite's rank."""
    for task in suite.tasks:
        if suite.rank > suite.points_of(task) - (suite.center == "mean"):
            raise InputError(f"figure2 uses {suite.rank} directions of every task, {task} has fewer points")
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        for source in (*suite.tasks, "random"):
            yield transfer_cell(suite, model, task, seed, source)


def _dimension(suite: Suite, known: Known) -> Iterator[Cell]:
    """d90: for every family, the smallest dimension that reaches 90 % of full, with frozen embeddings."""
    for seed, model, task in _runs(suite):
        full, none = Cell(model, task, "full", seed), Cell(model, task, "freeze", seed, embeddings=False)
        yield full
        yield none
        reference, floor = known(full), known(none)
        if reference is not None and floor is not None and floor < REACHED * reference:
            for family in FAMILIES:
                yield from search(suite, known, model, task, family, seed, REACHED * reference)


def search(suite: Suite, known: Known, model: str, task: str, family: Kind, seed: int, target: float) -> Iterator[Cell]:
    """Double the dimension until the target is reached, then bisect until the gap is a quarter of the dimension."""
    first, last = FAMILIES[family]
    last = last or suite.rank_of(task)
    below, rank = 0, first
    while True:
        cell = family_cell(suite, model, task, family, seed, rank)
        yield cell
        if (score := known(cell)) is None:
            return
        if score >= target:
            break
        if rank >= last:
            return
        below, rank = rank, min(2 * rank, last)
    while rank - below > max(1, rank // 4):
        middle = (below + rank) // 2
        cell = family_cell(suite, model, task, family, seed, middle)
        yield cell
        if (score := known(cell)) is None:
            return
        below, rank = (below, middle) if score >= target else (middle, rank)


def family_cell(suite: Suite, model: str, task: str, family: Kind, seed: int, rank: int) -> Cell:
    """Return the cell of a dimension of a family in the search for d90."""
    center = suite.center if family == "intrinsic" else None
    return Cell(model, task, family, seed, rank, center, embeddings=False)


def unified_cell(suite: Suite, model: str, task: str, seed: int) -> Cell:
    """Return the cell of a task in the basis of all tasks."""
    return Cell(model, task, "unified", seed, len(suite.tasks), suite.center, "+".join(suite.tasks))


def transfer_cell(suite: Suite, model: str, task: str, seed: int, source: str) -> Cell:
    """Return the cell of a task in the basis of another, in its own, or in a random one, with the suite's rank."""
    if source == "random":
        return Cell(model, task, "random", seed, suite.rank)
    kind: Kind = "intrinsic" if source == task else "inductive"
    return Cell(model, task, kind, seed, suite.rank, suite.center, None if source == task else source)


def _plain(kind: Kind) -> MakeCell:
    return lambda model, task, seed: Cell(model, task, kind, seed)


def _table3(suite: Suite, known: Known) -> Iterator[Cell]:
    """Outliers disabled, under the paper's formula and under centring, and in full fine-tuning."""
    for seed, model, task in _runs(suite):
        yield from outlier_cells(suite, model, task, seed)


TABLES: dict[str, Callable[[Suite, Known], Iterable[Cell]]] = {
    "table1": _rows(table1_methods),
    "figure2": _figure2,
    "table2": _rows(table2_methods),
    "figure3": _rows(table2_methods),
    "table3": _table3,
    "table4": _table3,
    "figure4": _table3,
    "table5": _rows(table5_methods),
    "dimension": _dimension,
}


def cells_of(tables: Sequence[str], suite: Suite, known: Known) -> dict[Cell, str]:
    """Return the cells that tables need, without duplicates, in the order of computation, each with its first table.

    Args:
        tables: names of the tables.
        suite: settings of the cells.
        known: function that returns the score of a finished cell, otherwise None; the search for d90 depends on it.
    """
    cells: dict[Cell, str] = {}
    for table in tables:
        for cell in TABLES[table](suite, known):
            cells.setdefault(cell, table)
    return cells


def possible_tables(suite: Suite) -> list[str]:
    """Return the names of the tables that a suite can have: a unified basis, for example, needs three tasks."""
    possible = []
    for table in TABLES:
        with suppress(InputError):
            cells_of([table], suite, lambda cell: None)
            possible.append(table)
    return possible


def _runs(suite: Suite) -> Iterator[tuple[int, str, str]]:
    return product(range(suite.seeds), suite.models, suite.tasks)


def outlier_cells(suite: Suite, model: str, task: str, seed: int) -> Iterator[Cell]:
    """Yield the dissections of one run: of full fine-tuning, of the three centerings, and of a random basis."""
    yield Cell(model, task, "outliers", seed, None, None, "full")
    for center in CENTERS:
        yield Cell(model, task, "outliers", seed, None, center, "intrinsic")
    yield Cell(model, task, "outliers", seed, None, None, "random")


def _drawn_cell(suite: Suite, name: str, model: str, task: str, seed: int) -> Cell:
    """Return the cell of a registered constructor, with the suite's rank if it takes one."""
    return Cell(model, task, name, seed, suite.rank_of(task) if CONSTRUCTORS[name].takes("rank") else None)


def intrinsic_cell(suite: Suite, model: str, task: str, seed: int) -> Cell:
    """Return the cell of the paper's method at the suite's rank."""
    return Cell(model, task, "intrinsic", seed, suite.rank_of(task), suite.center)


def random_cell(suite: Suite, model: str, task: str, seed: int) -> Cell:
    """Return the cell of a random basis of the same rank."""
    return Cell(model, task, "random", seed, suite.rank_of(task))

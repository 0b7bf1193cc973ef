"""The paper's tables and figures: which cells each is made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from tinyspan.basis import Center
from tinyspan.errors import InputError
from tinyspan.experiments.cells import Cell
from tinyspan.experiments.recipes import Suite

__all__ = ["TABLES", "cells_of", "intrinsic_cell", "outlier_cells", "random_cell"]

CENTERS: tuple[Center, ...] = ("none", "init", "mean")


def _table1(suite: Suite) -> Iterator[Cell]:
    """Transductive: the basis comes from the task itself. The controls come last."""
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        yield intrinsic_cell(suite, model, task, seed)
        yield random_cell(suite, model, task, seed)
        yield Cell(model, task, "freeze", seed)
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "line", seed, 1, "init")
        yield Cell(model, task, "flipped", seed, suite.rank_of(task), suite.center)


def _figure2(suite: Suite) -> Iterator[Cell]:
    """Inductive: the basis comes from another task."""
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        yield intrinsic_cell(suite, model, task, seed)
        yield random_cell(suite, model, task, seed)
        for source in suite.tasks:
            if source != task:
                yield Cell(model, task, "inductive", seed, suite.rank, suite.center, source)


def _table2(suite: Suite) -> Iterator[Cell]:
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


def _table5(suite: Suite) -> Iterator[Cell]:
    """The dimension of the subspace."""
    for seed, model, task in _runs(suite):
        yield Cell(model, task, "full", seed)
        for rank in suite.dimensions:
            yield Cell(model, task, "intrinsic", seed, rank, suite.center)
        for rank in suite.dimensions:
            yield Cell(model, task, "random", seed, rank)


def _table3(suite: Suite) -> Iterator[Cell]:
    """Outliers disabled, under the paper's formula and under centring, and in full fine-tuning."""
    for seed, model, task in _runs(suite):
        yield from outlier_cells(suite, model, task, seed)


TABLES: dict[str, Callable[[Suite], Iterable[Cell]]] = {
    "table1": _table1,
    "figure2": _figure2,
    "table2": _table2,
    "figure3": _table2,
    "table3": _table3,
    "table4": _table3,
    "figure4": _table3,
    "table5": _table5,
}


def cells_of(tables: Sequence[str], suite: Suite) -> dict[Cell, str]:
    """Return the cells that tables need, each once, in the order to run them, with the table that asks first."""
    found: dict[Cell, str] = {}
    for table in tables:
        for cell in TABLES[table](suite):
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

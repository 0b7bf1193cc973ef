"""Which cells a table is made of, and how the search for d90 narrows down."""

from collections.abc import Callable

import pytest

from tinyspan import InputError
from tinyspan.lab.cells import Cell
from tinyspan.lab.suite import Suite, load_suite
from tinyspan.lab.tables import TABLES, cells_of, possible_tables


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite("small", tasks=["mrpc", "sst2", "stsb"], seeds=2)


def unknown(cell: Cell) -> None:
    return None


def test_shared_cells_are_listed_once_and_seeds_come_one_after_the_other(suite: Suite) -> None:
    cells = cells_of([table for table in TABLES if table != "dimension"], suite, unknown)
    assert len({cell.folder for cell in cells}) == len(cells)
    main = [cell for cell in cells_of(["table1"], suite, unknown) if cell.kind in ("full", "intrinsic")]
    assert [cell.seed for cell in main] == sorted(cell.seed for cell in main)
    assert {cell.center for cell in main if cell.kind == "intrinsic"} == {"init"}


def test_counts_by_table(suite: Suite) -> None:
    counts = {table: len(cells_of([table], suite, unknown)) for table in TABLES}
    runs = 3 * 2
    assert counts == {
        "table1": 6 * runs,
        "figure2": 5 * runs,  # full, own, random, two others
        "table2": 4 * runs,
        "figure3": 4 * runs,
        "table3": 5 * runs,
        "table4": 5 * runs,
        "figure4": 5 * runs,
        "table5": 11 * runs,
        "dimension": 2 * runs,  # until full is known
    }


def test_a_basis_from_elsewhere_never_sees_its_target(suite: Suite) -> None:
    for cell in cells_of(["figure2", "table2"], suite, unknown):
        if cell.kind in ("inductive", "zero-shot"):
            assert cell.task not in (cell.source or "").split("+")
        if cell.kind == "unified":
            assert cell.source == "mrpc+sst2+stsb"


def test_a_unified_basis_needs_three_tasks(suite: Suite) -> None:
    with pytest.raises(InputError, match="at least 3 tasks, the suite has 2"):
        cells_of(["table2"], load_suite("small", tasks=["mrpc", "sst2"]), unknown)


def test_all_tables_are_those_that_a_suite_can_have(suite: Suite) -> None:
    assert possible_tables(suite) == [*TABLES]
    two = load_suite("small", tasks=["mrpc", "sst2"])
    assert {*TABLES} - {*possible_tables(two)} == {"table2", "figure3"}
    assert {*TABLES} - {*possible_tables(two.model_copy(update={"dimensions": ()}))} == {"table2", "figure3", "table5"}
    with pytest.raises(InputError, match="the suite has no dimensions"):
        cells_of(["table5"], suite.model_copy(update={"dimensions": ()}), unknown)


def searched(suite: Suite, score: Callable[[Cell], float]) -> dict[str, list[int]]:
    """Run the search to its end with a made-up score; return the ranks tried, family by family, in order."""
    one = suite.model_copy(update={"tasks": ("mrpc",), "seeds": 1})
    known: dict[Cell, float] = {}
    tried: dict[str, list[int]] = {}
    while pending := [cell for cell in cells_of(["dimension"], one, known.get) if cell not in known]:
        cell = pending[0]
        known[cell] = score(cell)
        if cell.rank:
            assert not cell.embeddings
            tried.setdefault(cell.kind, []).append(cell.rank)
    return tried


def test_the_search_doubles_and_then_narrows_down(suite: Suite) -> None:
    needed = {"intrinsic": 1, "random": 1000, "did": 700, "said": 20}

    def score(cell: Cell) -> float:
        return 0.8 if cell.kind == "full" else 0.75 if (cell.rank or 0) >= needed.get(cell.kind, 1) else 0.6

    tried = searched(suite, score)
    assert tried["intrinsic"] == [1]
    assert tried["random"] == [1, 2, 4, 8, 16, 32]  # does not get there
    assert tried["did"] == [16, 32, 64, 128, 256, 512, 1024, 768, 640]
    assert tried["said"] == [16, 32, 24, 20]


def test_the_search_tries_the_largest_rank_though_it_is_no_power_of_two(suite: Suite) -> None:
    odd = suite.model_copy(update={"rank": 30})
    tried = searched(odd, lambda cell: 0.8 if cell.kind == "full" else 0.79 if (cell.rank or 0) >= 20 else 0.6)
    assert tried["intrinsic"] == [1, 2, 4, 8, 16, 30, 23, 19]


def test_a_mean_leaves_a_unified_basis_one_direction_short(suite: Suite) -> None:
    with pytest.raises(InputError, match="span fewer than 3"):
        cells_of(["table2"], suite.model_copy(update={"center": "mean"}), unknown)


def test_figure2_compares_equal_dimensions() -> None:
    paper = load_suite("paper", tasks=["mrpc", "mnli", "rte"], seeds=1)
    ranks = {cell.rank for cell in cells_of(["figure2"], paper, unknown) if cell.kind != "full"}
    assert ranks == {32}  # though mnli has 64 in Table 1


def test_no_search_where_the_head_alone_gets_there(suite: Suite) -> None:
    assert searched(suite, lambda cell: 0.7) == {}

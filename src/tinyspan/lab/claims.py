"""What the paper's tables and figures state, as measures of its numbers and of those of studies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from tinyspan.io.storage import reading
from tinyspan.lab import paper
from tinyspan.lab.cells import Cell, Results
from tinyspan.lab.rendering import mean_cosine
from tinyspan.lab.reproduce import read_study
from tinyspan.lab.suite import Suite
from tinyspan.lab.summary import Summary, summarize
from tinyspan.lab.tables import (
    MakeCell,
    table1_methods,
    table2_methods,
    table5_methods,
    transfer_cell,
    unified_cell,
)

__all__ = [
    "COMPONENTS",
    "ITEMS",
    "Claim",
    "Item",
    "Measured",
    "Source",
    "evaluate",
    "measure",
    "open_sources",
    "verdict",
]

Row = dict[str, float]  # name of a number -> value, in per cent where it is a score
Numbers = Mapping[str, Mapping[str, float]]  # task -> its row
MPNET = {  # its names of parameters -> BERT's
    "attention.attn.q.": "attention.self.query.",
    "attention.attn.k.": "attention.self.key.",
    "attention.attn.v.": "attention.self.value.",
    "attention.attn.o.": "attention.output.dense.",
    "attention.LayerNorm.": "attention.output.LayerNorm.",
}


@dataclass(frozen=True)
class Source:
    """A study: its folder, the suite of each of its tables, and its results."""

    folder: Path
    suites: Mapping[str, Suite]
    results: Results


@dataclass(frozen=True)
class Claim:
    """A statement that a table or figure of the paper makes.

    Attributes:
        statement: the statement.
        measure: what is compared with the bound, and its unit.
        bound: the statement holds above it.
        value: function from the numbers of a model's tasks to the measure, None where it is undefined.
        below: whether the statement holds below the bound instead.
        words: what the paper reports, where it has no numbers.
        of_sizes: whether the statement is about the sizes of the tasks, so that a suite that cuts them is no test.
    """

    statement: str
    measure: str
    bound: float
    value: Callable[[Numbers], float | None]
    below: bool = False
    words: str = ""
    of_sizes: bool = False


@dataclass(frozen=True)
class Item:
    """A table or figure of the paper.

    Attributes:
        name: its name.
        table: the table of a study whose cells have its numbers.
        row: function that returns the numbers of one model, task and seed; those of missing cells are left out.
        paper: model of the paper -> its numbers.
        claims: what it states.
        shown: names of the numbers to show per task, for example rows of a table.
        picture: start of the names of its figures in a study.
    """

    name: str
    table: str
    row: Callable[[Results, Suite, str, str, int], Row]
    paper: Mapping[str, Numbers]
    claims: Sequence[Claim]
    shown: Sequence[str] = ()
    picture: str = ""


@dataclass(frozen=True)
class Measured:
    """The numbers of one model for an item, each task's from the study that has most of its cells.

    Attributes:
        model: name of the model.
        suites: task -> the suite that its numbers come from.
        seeds: the numbers of each seed.
    """

    model: str
    suites: Mapping[str, Suite]
    seeds: Sequence[Numbers] = field(repr=False)

    def summary(self, value: Callable[[Numbers], float | None]) -> Summary:
        """Return a measure, computed for each seed; it is missing for seeds that lack a number of a task."""
        return summarize([evaluate(value, numbers) for numbers in self.seeds])


def evaluate(value: Callable[[Numbers], float | None], numbers: Numbers) -> float | None:
    """Return a measure, None if a number that it needs is missing."""
    try:
        return value(numbers) if numbers else None
    except KeyError:
        return None


def open_sources(folders: Sequence[Path]) -> list[Source]:
    """Open studies.

    Raises:
        InputError: a folder is not a study.
        StorageError: a file in it is damaged.
    """
    sources = []
    for folder in folders:
        suites = read_study(folder)
        sources.append(Source(folder, suites, Results(folder, next(iter(suites.values())).settings_hash())))
    return sources


def measure(item: Item, sources: Sequence[Source]) -> list[Measured]:
    """Return what the studies have of an item, one entry per model with a finished cell.

    A task's numbers come from one study, the one that has most of them; of equal ones, the last.
    """
    fullest: dict[str, dict[str, tuple[int, Suite, list[Row]]]] = {}
    for source in sources:
        if (suite := source.suites.get(item.table)) is None:
            continue
        for model, task in product(suite.models, suite.tasks):
            with reading(source.folder):
                rows = [item.row(source.results, suite, model, task, seed) for seed in range(suite.seeds)]
            count = sum(map(len, rows))
            if count and count >= fullest.setdefault(model, {}).get(task, (0,))[0]:
                fullest[model][task] = count, suite, rows
    measured = []
    for model, tasks in fullest.items():
        if tasks:
            seeds = max(len(rows) for _, _, rows in tasks.values())
            numbers = [
                {task: rows[seed] if seed < len(rows) else {} for task, (_, _, rows) in tasks.items()}
                for seed in range(seeds)
            ]
            measured.append(Measured(model, {task: suite for task, (_, suite, _) in tasks.items()}, numbers))
    return measured


def verdict(claim: Claim, ours: Summary, papers: Sequence[float]) -> str:
    """Return `same`, `weaker`, `other`, or `open` with the reason.

    The effect is the distance from the claim's bound, positive where the statement holds. With the 95 % interval of our
    effect: `other` if it is negative, `weaker` if it is below half of the smaller effect in the paper, `same` if it is
    positive and our mean is at least that half, otherwise `open`.

    Example:
        >>> claim = Claim("a is better than b", "a - b", 0, lambda numbers: 0)
        >>> verdict(claim, summarize([3, 4, 5]), [6.0, 9.0])
        'same'
        >>> verdict(claim, summarize([0.5, 0, 1]), [6.0, 9.0])
        'weaker'
        >>> verdict(claim, summarize([2, 2.5, 3]), [6.0, 9.0])
        "open: same sign, our mean is less than half of the paper's effect"
    """
    if ours.mean is None:
        return "open: not computed"
    if ours.half is None:
        return "open: one seed"
    sign = -1 if claim.below else 1
    effect = sign * (ours.mean - claim.bound)
    smaller = min((sign * (value - claim.bound) for value in papers), default=0.0)
    if effect + ours.half < 0:
        return "other"
    if effect + ours.half < smaller / 2:
        return "weaker"
    if effect - ours.half <= 0:
        return "open: the interval reaches the bound"
    return "same" if effect >= smaller / 2 else "open: same sign, our mean is less than half of the paper's effect"


# -- the items -------------------------------------------------------------------------------------------------------


def _scores(methods: Callable[[Suite], dict[str, MakeCell]]) -> Callable[[Results, Suite, str, str, int], Row]:
    """Return a function that returns the score of every method of a table."""

    def row(results: Results, suite: Suite, model: str, task: str, seed: int) -> Row:
        scores = {name: results.score(make(model, task, seed)) for name, make in methods(suite).items()}
        return {name.strip("*"): 100 * score for name, score in scores.items() if score is not None}

    return row


def _transfer(results: Results, suite: Suite, model: str, task: str, seed: int) -> Row:
    """Return the score in the basis of every source, in a random one, and of full fine-tuning."""
    cells = {f"basis of {source}": transfer_cell(suite, model, task, seed, source) for source in suite.tasks}
    cells |= {"random": transfer_cell(suite, model, task, seed, "random"), "full": Cell(model, task, "full", seed)}
    scores = {name: results.score(cell) for name, cell in cells.items()}
    return {name: 100 * score for name, score in scores.items() if score is not None}


def _cosines(results: Results, suite: Suite, model: str, task: str, seed: int) -> Row:
    """Return the cosine of a task's z in the unified basis with that of every other task."""
    if (own := results[unified_cell(suite, model, task, seed)]) is None:
        return {}
    others = {other: results[unified_cell(suite, model, other, seed)] for other in suite.tasks if other != task}
    return {other: mean_cosine(own["z"], result["z"]) for other, result in others.items() if result is not None}


def _disabled(results: Results, suite: Suite, model: str, task: str, seed: int) -> Row:
    """Return the scores with the outliers of the paper's formula disabled."""
    result = results[Cell(model, task, "outliers", seed, None, "none", "intrinsic")]
    if result is None:
        return {}
    in_full = {f"in the full model: {name}": score for name, score in result["in_full"].items()}
    return {name: 100 * score for name, score in (result["outliers"]["scores"] | in_full).items()}


def _largest(results: Results, suite: Suite, model: str, task: str, seed: int) -> Row:
    """Return in how many per cent of the layers a component holds one of the ten largest outliers."""
    result = results[Cell(model, task, "outliers", seed, None, "none", "intrinsic")]
    if result is None:
        return {}
    blocks = result["outliers"]["blocks"].values()
    layers = [{_as_bert(name) for name, _, _ in block["largest"]} for block in blocks]
    names = sorted({_as_bert(name) for block in blocks for name in block["by_parameter"]})
    return {name: 100 * float(np.mean([name in layer for layer in layers])) for name in names}


def _as_bert(component: str) -> str:
    """Return the name that BERT has for a parameter of MPNet; other names are returned unchanged."""
    for name, other in MPNET.items():
        component = component.replace(name, other)
    return component


def _spikes(results: Results, suite: Suite, model: str, task: str, seed: int) -> Row:
    """Return the share of layers whose furthest coordinate is twice as far out as a random basis's, in per cent."""
    intrinsic = results[Cell(model, task, "outliers", seed, None, "none", "intrinsic")]
    random = results[Cell(model, task, "outliers", seed, None, None, "random")]
    if intrinsic is None or random is None:
        return {}
    furthest, usual = (
        np.array([max(block["profile"]) for block in result["outliers"]["blocks"].values()])
        for result in (intrinsic, random)
    )
    return {"layers with spikes": 100 * float(np.mean(furthest >= 2 * usual))}


def _average(numbers: Numbers, name: str) -> float:
    return float(np.mean([row[name] for row in numbers.values()]))


def _difference(one: str, other: str) -> Callable[[Numbers], float]:
    return lambda numbers: _average(numbers, one) - _average(numbers, other)


def _share(one: str) -> Callable[[Numbers], float | None]:
    def share(numbers: Numbers) -> float | None:
        full = _average(numbers, "full")
        return 100 * _average(numbers, one) / full if full > 0 else None

    return share


def _mean_of(name: str) -> Callable[[Numbers], float]:
    return lambda numbers: _average(numbers, name)


def _of_others(row: Mapping[str, float], task: str, sources: Sequence[str] = ()) -> float:
    """Return the mean score of a task in the bases of other tasks, or of some of them."""
    own = f"basis of {task}"
    chosen = [f"basis of {source}" for source in sources] or [name for name in row if name.startswith("basis of ")]
    if not (others := [row[name] for name in chosen if name != own and name in row]):
        raise KeyError(own)
    return float(np.mean(others))


def _transferred(numbers: Numbers) -> float:
    return float(np.mean([_of_others(row, task) - row["random"] for task, row in numbers.items()]))


def _small_minus_large(numbers: Numbers) -> float:
    small = ("cola", "mrpc", "stsb", "rte")
    large = tuple(task for task in paper.TASKS if task not in small)
    return float(
        np.mean([_of_others(row, task, small) - _of_others(row, task, large) for task, row in numbers.items()])
    )


def _mean_cosine(numbers: Numbers) -> float:
    if not (pairs := [cosine for row in numbers.values() for other, cosine in row.items() if other in numbers]):
        raise KeyError("cosines")
    return float(np.mean(pairs))


def _cost_of_undoing(numbers: Numbers) -> float | None:
    undone, zeroed = _difference("intact", "undo outliers"), _difference("intact", "zero outliers")
    return 100 * undone(numbers) / cost if (cost := zeroed(numbers)) > 0 else None


def _rows(model: str, rows: Mapping[str, Mapping[str, float]]) -> dict[str, Row]:
    """Return the paper's rows of a model by task, together with its full fine-tuning."""
    rows = {"full": paper.TRANSDUCTIVE[model]["full"], **rows}
    return {task: {name: values[task] for name, values in rows.items()} for task in paper.TASKS}


ALL = {model: _rows(model, rows) for model, rows in paper.TRANSDUCTIVE.items()}
RANKS = {
    model: _rows(model, {f"intrinsic, k = {rank}": row for rank, row in ranks.items()})
    for model, ranks in paper.DIMENSIONS.items()
}
OUTLIERS = {model: _rows(model, rows) for model, rows in paper.DISABLED.items()}
COMPONENTS = {name: 100 * layers / paper.LAYERS for name, layers in paper.LARGEST.items() if layers is not None}

ITEMS = (
    Item(
        "Table 1, transductive",
        "table1",
        _scores(table1_methods),
        ALL,
        (
            Claim("the task's own directions keep full fine-tuning", "intrinsic, % of full", 90, _share("intrinsic")),
            Claim(
                "the task's own directions beat random ones",
                "intrinsic - random, points",
                0,
                _difference("intrinsic", "random"),
            ),
            Claim("random directions beat none", "random - freeze, points", 0, _difference("random", "freeze")),
        ),
        ("full", "freeze", "random", "intrinsic"),
    ),
    Item(
        "Figure 2, inductive",
        "figure2",
        _transfer,
        {},
        (
            Claim(
                "directions of another task beat random ones",
                "mean of the other tasks' bases - random, points",
                0,
                _transferred,
                words="better",
            ),
            Claim(
                "small tasks give better directions than large ones",
                "bases of CoLA, MRPC, STS-B, RTE - those of the others, points",
                0,
                _small_minus_large,
                words="better",
                of_sizes=True,
            ),
        ),
        picture="figure2-{model}",
    ),
    Item(
        "Table 2, unified",
        "table2",
        _scores(table2_methods),
        {model: _rows(model, rows) for model, rows in paper.UNIFIED.items()},
        (
            Claim("one basis of all tasks keeps full fine-tuning", "unified, % of full", 90, _share("unified")),
            Claim(
                "without the target's run it beats random directions",
                "zero-shot - random, points",
                0,
                _difference("zero-shot", "random"),
            ),
        ),
        ("full", "random", "zero-shot", "unified"),
    ),
    Item(
        "Figure 3, z of tasks",
        "figure3",
        _cosines,
        {},
        (
            Claim(
                "different tasks have different z in the unified basis",
                "mean cosine between tasks",
                0.5,
                _mean_cosine,
                below=True,
                words="low",
            ),
        ),
        picture="figure3-{model}",
    ),
    Item(
        "Table 3, outliers disabled",
        "table3",
        _disabled,
        OUTLIERS,
        (
            Claim(
                "setting the outliers to zero costs more than as many random coordinates",
                "zero random - zero outliers, points",
                0,
                _difference("zero random", "zero outliers"),
            ),
            Claim(
                "fine-tuning needs these coordinates, not only the model (the paper's conclusion)",
                "cost of resetting them to theta_0, % of the cost of zero",
                50,
                _cost_of_undoing,
                words="not measured",
            ),
        ),
        ("full", "intact", "zero random", "zero outliers", "undo outliers", "in the full model: zero outliers"),
    ),
    Item(
        "Table 4, the ten largest outliers",
        "table3",
        _largest,
        {"bert-base-cased": {"mrpc": COMPONENTS}},
        tuple(
            Claim(f"{name} holds some of them in most layers", "layers where it does, %", 50, _mean_of(name))
            for name, share in COMPONENTS.items()
            if share > 50
        ),
    ),
    Item(
        "Figure 4, the update along each layer",
        "table3",
        _spikes,
        {},
        (
            Claim(
                "the update has spikes in most layers, that in a random basis has none",
                "layers whose furthest coordinate is at least twice as far out as in the random one, %",
                50,
                _mean_of("layers with spikes"),
                words="in every layer",
            ),
        ),
        picture="figure4-{model}-{task}",
    ),
    Item(
        "Tables 5 and 6, dimension",
        "table5",
        _scores(table5_methods),
        RANKS,
        (
            Claim("8 directions keep full fine-tuning", "k = 8, % of full", 90, _share("intrinsic, k = 8")),
            Claim(
                "more directions are better",
                "k = 32 - k = 8, points",
                0,
                _difference("intrinsic, k = 32", "intrinsic, k = 8"),
            ),
        ),
        ("full", "intrinsic, k = 8", "intrinsic, k = 16", "intrinsic, k = 32"),
    ),
)

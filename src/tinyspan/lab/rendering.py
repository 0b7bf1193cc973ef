"""Tables and figures of a study, computed from its result files; cells without results are shown as missing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from tinyspan.io.folders import LOCK
from tinyspan.io.storage import reading, replacing, writing
from tinyspan.lab import figures, paper
from tinyspan.lab.cells import Cell, Kind, Results
from tinyspan.lab.outlier_sections import figure4, table3, table4
from tinyspan.lab.reproduce import read_study
from tinyspan.lab.suite import Suite
from tinyspan.lab.summary import Summary, markdown, missing, summarize
from tinyspan.lab.tables import (
    REACHED,
    TABLES,
    MakeCell,
    cells_of,
    search,
    table1_methods,
    table2_methods,
    table5_methods,
    transfer_cell,
    unified_cell,
)

__all__ = ["PAGE", "render"]

PAGE = "README.md"
Section = Iterator[str]


def render(folder: Path) -> Path:
    """Write `README.md` and `figures/` into a study, and return the path of the page.

    Raises:
        InputError: the folder is not a study.
        StorageError: a file in it is damaged, or a file cannot be written.
    """
    studied = read_study(folder)
    results = Results(folder, next(iter(studied.values())).settings_hash())
    page = folder / PAGE
    with writing(page), FileLock(folder / LOCK, fallback_to_soft=False):  # a starting study deletes incomplete files
        with reading(folder):
            text = "\n\n".join("\n".join(section) for section in _sections(results, studied))
        with replacing(page) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return page


def _sections(results: Results, studied: Mapping[str, Suite]) -> Iterator[Section]:
    yield _head(results, studied)
    for table in TABLES:
        if table in studied:
            suite = studied[table]
            for model in suite.models:
                yield SECTIONS[table](results, replace_models(suite, model), model)


def replace_models(suite: Suite, model: str) -> Suite:
    """Return the suite with only one of its models."""
    return suite.model_copy(update={"models": {model: suite.models[model]}})


def _head(results: Results, studied: Mapping[str, Suite]) -> Section:
    cells = {cell for table, suite in studied.items() for cell in cells_of([table], suite, results.score)}
    finished = [result for cell in cells if (result := results[cell]) is not None]
    suite = next(iter(studied.values()))
    yield f"# Suite `{suite.name}`: {', '.join(studied)}\n"
    yield (
        f"{len(finished)} of {len(cells)} cells are finished. Scores are on held-out rows, in per cent: Matthews' phi "
        "for CoLA, Pearson's r for STS-B, accuracy elsewhere. `a ± b` is a mean over seeds with Student's 95 % "
        "interval; a value without `±` comes from one seed, and `(1/3)` means that one of three seeds is finished. "
        "This page was written by `tinyspan render` from the `result.json` files in this folder."
    )
    settings = suite.model_dump(
        exclude={"name", "note", "models", "tasks", "seeds", "exceptions", "dimensions", "bases"}
    )
    yield "\n" + ", ".join(f"{name} {value}" for name, value in settings.items()) + "."
    machines = sorted({_machine(result) for result in finished})
    if machines:
        yield f"\nMachines: {'; '.join(machines)}. {_hours(finished)}"


def _machine(result: Mapping[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    device = hardware["device"] or f"{hardware['threads']} of {hardware['cpus']} {hardware['machine']} CPU threads"
    precision = "bfloat16 autocast" if result["settings"]["autocast"] else "float32"
    return f"{device}, {precision}, torch {versions['torch']}, transformers {versions['transformers']}"


def _hours(finished: Sequence[Mapping[str, Any]]) -> str:
    hours = sum(result["cell_seconds"] for result in finished) / 3600
    return f"The cells took {hours:.1f} hours in all; times of cells that ran in parallel are added."


# -- scores ----------------------------------------------------------------------------------------------------------


def _scores(results: Results, suite: Suite, make: MakeCell) -> list[Summary]:
    """Return the summary of a method per task, and of its average over tasks."""
    (model,) = suite.models
    seeds = range(suite.seeds)
    by_task = [[_score(results, make(model, task, seed)) for seed in seeds] for task in suite.tasks]
    averages = [_mean(column) for column in zip(*by_task, strict=True)]
    return [*(summarize(values) for values in by_task), summarize(averages)]


def _score(results: Results, cell: Cell) -> float | None:
    """Return a cell's score in per cent."""
    score = results.score(cell)
    return None if score is None else 100 * score


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if a value is missing, since an average over other tasks is not comparable."""
    scores = list(values)
    return None if any(score is None for score in scores) else float(np.mean(np.array(scores, dtype=float)))


def _share_of_full(results: Results, suite: Suite, make: MakeCell) -> str:
    """Return the average as a share of full fine-tuning's, paired by seed; undefined if the latter is not positive."""
    (model,) = suite.models
    shares: list[float | None] = []
    for seed in range(suite.seeds):
        ours = _mean(_score(results, make(model, task, seed)) for task in suite.tasks)
        full = _mean(_score(results, Cell(model, task, "full", seed)) for task in suite.tasks)
        if full is not None and full <= 0:
            return "undefined"
        shares.append(None if ours is None or full is None else 100 * ours / full)
    return str(summarize(shares))


def _score_table(
    results: Results, suite: Suite, methods: Mapping[str, MakeCell], papers: Mapping[str, Mapping[str, float]]
) -> str:
    """Return a table of methods by tasks with the average, its share of full, and the paper's rows below."""
    rows = [
        [name, *map(str, _scores(results, suite, make)), _share_of_full(results, suite, make)]
        for name, make in methods.items()
    ]
    for name, values in papers.items():
        reported = [values.get(task) for task in suite.tasks]
        average = _mean(reported)
        full = _mean(papers["full"].get(task) for task in suite.tasks) if "full" in papers else None
        share = f"{100 * average / full:.1f}" if average is not None and full is not None else ""
        shown = ["" if value is None else f"{value:.1f}" for value in (*reported, average)]
        rows.append([f"*paper: {name}*", *shown, share])
    return markdown(["method", *suite.tasks, "average", "% of full"], rows)


def _table1(results: Results, suite: Suite, model: str) -> Section:
    yield f"## Table 1, transductive: {model}\n"
    yield _score_table(results, suite, table1_methods(suite), paper.TRANSDUCTIVE.get(model, {}))
    yield (
        f"\nAll methods except full train embeddings and head directly, and z with k = {suite.rank} numbers per layer "
        "unless stated otherwise. *freeze* trains only embeddings and head. *line*: the only direction is the straight "
        "line from theta_0 to the end of the full run. *flipped*: the intrinsic directions, centred on theta_0, with a "
        "random sign for every coordinate, which keeps their norms and angles."
    )


def _table2(results: Results, suite: Suite, model: str) -> Section:
    tasks = len(suite.tasks)
    yield f"## Table 2, unified: {model}\n"
    yield _score_table(results, suite, table2_methods(suite), paper.UNIFIED.get(model, {}))
    yield (
        f"\n*unified*: one basis for all tasks, from the ends of the {tasks} tasks' full runs (k = {tasks}). "
        f"*zero-shot*: the same without the run of the task itself (k = {tasks - 1}). *random*: k = {tasks}."
    )


def _table5(results: Results, suite: Suite, model: str) -> Section:
    methods = table5_methods(suite)
    papers = {f"intrinsic, k = {rank}": row for rank, row in paper.DIMENSIONS.get(model, {}).items()}
    yield f"## Tables 5 and 6, dimension: {model}\n"
    yield _score_table(results, suite, methods, papers)
    rows, largest = [], max(suite.dimensions)
    for task in suite.tasks:
        result = results[Cell(model, task, "intrinsic", 0, largest, suite.center)]
        if result is None:
            rows.append([task, *["missing"] * len(suite.dimensions)])
            continue
        squares = np.array([np.square(values) for values in result["spectrum"].values() if np.any(values)])
        shares = squares.cumsum(1) / squares.sum(1, keepdims=True)
        rows.append([task, *(f"{100 * shares[:, rank - 1].mean():.1f}" for rank in suite.dimensions)])
    stacked = {"init": "theta_i - theta_0", "mean": "theta_i - their mean", "none": "theta_i, of which most is theta_0"}
    yield (
        f"\nShare of the sum of squares of the stacked vectors, {stacked[suite.center]}, in k directions: "
        "mean over the layers that change, seed 0, in per cent.\n"
    )
    yield markdown(["task", *(f"k = {rank}" for rank in suite.dimensions)], rows)
    by_kind = {
        kind: [(rank, _scores(results, suite, methods[f"{kind}, k = {rank}"])[-1]) for rank in suite.dimensions]
        for kind in ("intrinsic", "random")
    }
    if not all(missing(score) for scores in by_kind.values() for _, score in scores):
        full = _scores(results, suite, methods["full"])[-1]
        name = f"dimension-{model}"
        yield "\n" + figures.picture(results, name, figures.dimension(by_kind, full), "average score by dimension")


NAMES: dict[Kind, str] = {
    "intrinsic": "intrinsic, layer by layer",
    "random": "random dense, layer by layer",
    "did": "DID: Fastfood, all layers together",
    "said": "SAID: the same, and a scale per layer",
}


def _dimension(results: Results, suite: Suite, model: str) -> Section:
    yield f"## d90, numbers trained to reach {100 * REACHED:.0f} % of full: {model}\n"
    yield (
        "Every method except full freezes the embeddings and trains the head; the table counts the numbers in z (and "
        "SAID's scales). *0*: the head alone reaches the target. The search doubles the dimension of a family until it "
        "reaches the target, then narrows it down to a quarter; if the score fluctuates around the target, d90 depends "
        "on chance, so look at the "
        "curves.\n"
    )
    rows = []
    for family, name in NAMES.items():
        row = [name]
        for task in suite.tasks:
            dimensions = [d90(results, suite, model, task, family, seed) for seed in range(suite.seeds)]
            row.append(", ".join(dimensions))
        rows.append(row)
    yield markdown(["d90, one per seed", *suite.tasks], rows)
    for task in suite.tasks:
        curves = {name: _search_results(results, suite, model, task, family, 0)[0] for family, name in NAMES.items()}
        full = results.score(Cell(model, task, "full", 0))
        if full is not None and any(curves.values()):
            name = f"d90-{model}-{task}"
            yield "\n" + figures.picture(results, name, figures.reaching(curves, full, REACHED), task)


def _search_results(
    results: Results, suite: Suite, model: str, task: str, family: Kind, seed: int
) -> tuple[list[tuple[int, float]], bool]:
    """Return the numbers in z and the scores of a family's finished cells, ascending, and whether the search ended."""
    full = results.score(Cell(model, task, "full", seed))
    if full is None:
        return [], False
    cells = list(search(suite, results.score, model, task, family, seed, REACHED * full))
    finished = [result for cell in cells if (result := results[cell]) is not None]
    tried = sorted((int(result["subspace_parameters"]), float(result["score"])) for result in finished)
    return tried, len(finished) == len(cells)


def d90(results: Results, suite: Suite, model: str, task: str, family: Kind, seed: int) -> str:
    """Return the smallest dimension that reaches the target, or that none does, or that the search is not done."""
    full = results.score(Cell(model, task, "full", seed))
    none = results.score(Cell(model, task, "freeze", seed, embeddings=False))
    if full is None or none is None:
        return "missing"
    if none >= REACHED * full:
        return "0"
    tried, finished = _search_results(results, suite, model, task, family, seed)
    if not finished:
        return "missing"
    reaching = [numbers for numbers, score in tried if score >= REACHED * full]
    return str(min(reaching)) if reaching else f"above {tried[-1][0]}"


def _figure2(results: Results, suite: Suite, model: str) -> Section:
    sources = [*suite.tasks, "random"]
    drops: dict[tuple[str, str], Summary] = {}
    for source in sources:
        for task in suite.tasks:
            values: list[float | None] = []
            for seed in range(suite.seeds):
                cell = transfer_cell(suite, model, task, seed, source)
                ours, full = _score(results, cell), _score(results, Cell(model, task, "full", seed))
                values.append(None if ours is None or full is None else ours - full)
            drops[source, task] = summarize(values)
    yield f"## Figure 2, inductive: {model}\n"
    yield "Score minus that of full fine-tuning on the target; rows: the task of the basis.\n"
    rows = [[source, *(drops[source, task].signed() for task in suite.tasks)] for source in sources]
    yield markdown(["basis of \\ target", *suite.tasks], rows)
    if not all(missing(drop) for drop in drops.values()):
        grid = np.array([[drops[source, task].mean for task in suite.tasks] for source in sources], dtype=float)
        name = f"figure2-{model}"
        figure = figures.heat(grid, sources, suite.tasks, "score minus full", "basis of", "trained and scored on")
        yield "\n" + figures.picture(results, name, figure, "heat map")


def _figure3(results: Results, suite: Suite, model: str) -> Section:
    yield f"## Figure 3, cosines of z between tasks in the unified basis: {model}\n"
    tasks = suite.tasks
    grid = np.full((len(tasks), len(tasks)), np.nan)
    for row, first in enumerate(tasks):
        for column, second in enumerate(tasks):
            values: list[float | None] = []
            for seed in range(suite.seeds):
                pair = [results[unified_cell(suite, model, task, seed)] for task in (first, second)]
                values.append(None if None in pair else mean_cosine(*(result["z"] for result in pair if result)))
            grid[row, column] = np.nan if (summary := summarize(values)).mean is None else summary.mean
    rows = [[task, *("missing" if np.isnan(x) else f"{x:.2f}" for x in grid[row])] for row, task in enumerate(tasks)]
    yield markdown(["", *tasks], rows)
    yield (
        "\nMean over layers, ensemble members and seeds. Two random vectors of this length have a cosine of 0 on "
        f"average, with a standard deviation of {1 / np.sqrt(len(tasks)):.2f} in one layer."
    )
    if not np.isnan(grid).all():
        name = f"figure3-{model}"
        yield "\n" + figures.picture(results, name, figures.heat(grid, tasks, tasks, "cosine"), "heat map")


def mean_cosine(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return the cosine between two tasks' z, averaged over layers and ensemble members; each is layer -> [h, k].

    A zero z has no direction; its cosine counts as 0.
    """
    cosines = []
    for layer in first:
        a, b = np.array(first[layer], dtype=float), np.array(second[layer], dtype=float)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append((a * b).sum(1) / np.where(norms == 0, 1.0, norms))
    return float(np.mean(cosines))


SECTIONS: dict[str, Callable[[Results, Suite, str], Section]] = {
    "table1": _table1,
    "figure2": _figure2,
    "table2": _table2,
    "figure3": _figure3,
    "table3": table3,
    "table4": table4,
    "figure4": figure4,
    "table5": _table5,
    "dimension": _dimension,
}

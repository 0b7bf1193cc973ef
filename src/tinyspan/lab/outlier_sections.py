"""Sections of a study's page about outliers: Tables 3 and 4, and Figure 4."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tinyspan.analysis import GAUSSIAN_SHARE
from tinyspan.lab import figures, paper
from tinyspan.lab.cells import Cell, Results
from tinyspan.lab.suite import Suite
from tinyspan.lab.summary import Summary, markdown, summarize
from tinyspan.lab.tables import outlier_cells

__all__ = ["MEASURES", "figure4", "table3", "table4"]

UPDATES = {
    "intrinsic-none": "paper's formula (no centring)",
    "intrinsic-init": "centred on theta_0",
    "intrinsic-mean": "centred on the mean",
    "full": "full fine-tuning, no basis",
    "random": "random basis",
}


def _updates(suite: Suite, model: str, task: str, seed: int) -> dict[str, Cell]:
    """Return the dissections of a run, by the name of the update."""
    return {
        "-".join(filter(None, [cell.source, cell.center])): cell for cell in outlier_cells(suite, model, task, seed)
    }


def table3(results: Results, suite: Suite, model: str) -> Iterator[str]:
    """Yield the lines of Table 3: scores with outlier dimensions disabled, per task and update."""
    yield f"## Table 3, outlier dimensions disabled: {model}\n"
    yield (
        "The first row is the held-out score of the model with the update. The other rows are the changes of this "
        "score when the weights are changed, paired by seed. *Outliers*: coordinates more than 3 sigma from the mean "
        "of their layer. *Matched*: the same number of random other coordinates in each parameter, if possible. *In "
        "the full model*: the same coordinates in the fully fine-tuned model.\n"
    )
    for task in suite.tasks:
        runs = [_updates(suite, model, task, seed) for seed in range(suite.seeds)]
        columns = {name: [results[run[name]] for run in runs] for name in UPDATES}
        finished = [result for column in columns.values() for result in column if result]
        yield f"### {task}\n"
        if not finished:
            yield "missing\n"
            continue
        conditions = max((list(result["outliers"]["scores"]) for result in finished), key=len)
        if "undo equal sum of squares" in conditions:
            yield "*Equal sum of squares*: random other coordinates that hold as much of each layer's sum of squares.\n"
        rows = [["intact", *(str(_condition_score(columns[name], "outliers", "intact")) for name in UPDATES)]]
        for condition in conditions:
            if condition != "intact":
                rows.append(
                    [condition, *(_condition_score(columns[name], "outliers", condition).signed() for name in UPDATES)]
                )
        for condition in IN_FULL:
            in_full = {
                name: _condition_score(columns[name], "in_full", condition) for name in UPDATES if name != "full"
            }
            cells = [in_full[name].signed() if name in in_full else "" for name in UPDATES]
            rows.append([f"in the full model: {condition}", *cells])
        for name, row in paper.DISABLED.get(model, {}).items():
            if task in row and task in (full := paper.TRANSDUCTIVE[model]["full"]):
                change = row[task] - full[task]
                rows.append([f"*paper: {name}, minus its full model*", f"{change:+.1f}", *[""] * (len(UPDATES) - 1)])
        yield markdown(["change of the weights", *UPDATES.values()], rows)
        yield "\nMeans over layers, then over seeds:\n"
        yield markdown(["the update's outliers", *UPDATES.values()], list(_outlier_rows(columns)))
        yield ""


IN_FULL = ("zero outliers", "zero random", "zero matched", "undo outliers")


def _condition_score(results: Sequence[Mapping[str, Any] | None], where: str, condition: str) -> Summary:
    """Return the score of a condition, or for conditions other than `intact` the change of the score, in per cent."""
    values: list[float | None] = []
    for result in results:
        scores = None if result is None else result["outliers"]["scores"] if where == "outliers" else result[where]
        if scores is None or condition not in scores:  # earlier results lack later conditions
            values.append(None)
        else:
            values.append(100 * (scores[condition] - (0.0 if condition == "intact" else scores["intact"])))
    return summarize(values)


MEASURES: tuple[tuple[str, Callable[[Mapping[str, Any]], float], str], ...] = (
    (f"share beyond 3 sigma, % (Gaussian: {100 * GAUSSIAN_SHARE:.2f})", lambda b: 100 * b["share"], "{:.2f}"),
    ("kurtosis (Gaussian: 3)", lambda b: b["kurtosis"], "{:.1f}"),
    ("furthest coordinate, sigma", lambda b: max(b["profile"]), "{:.0f}"),
    ("cosine of the update with theta_0", lambda b: b["cosine"], "{:.3f}"),
    ("outliers among as many largest theta_0, %", lambda b: 100 * b["largest_start"], "{:.1f}"),
    ("outliers that are LayerNorm gains, %", lambda b: 100 * b["norm_gains"], "{:.2f}"),
    ("LayerNorm gains that are outliers, %", lambda b: 100 * b["norm_gains_found"], "{:.1f}"),
    ("without theta_0's part: share, %", lambda b: 100 * b["without_start"]["share"], "{:.2f}"),
    ("without theta_0's part: kurtosis", lambda b: b["without_start"]["kurtosis"], "{:.1f}"),
    ("theta_0 itself: kurtosis", lambda b: b["start"]["kurtosis"], "{:.1f}"),
)


def _outlier_rows(columns: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> Iterator[list[str]]:
    """Yield one row per measure: mean over layers, then over seeds."""
    for label, measure, form in MEASURES:
        row = [label]
        for name in UPDATES:
            values = [
                None
                if result is None
                else float(np.mean([measure(block) for block in result["outliers"]["blocks"].values()]))
                for result in columns[name]
            ]
            row.append(summarize(values).shown(form))
        yield row


def table4(results: Results, suite: Suite, model: str) -> Iterator[str]:
    """Yield the lines of Table 4: parameters with the ten largest outliers of each layer."""
    yield f"## Table 4, where the ten largest outliers of each layer sit: {model}, seed 0\n"
    shown = ("intrinsic-none", "intrinsic-init")
    for task in suite.tasks:
        updates = _updates(suite, model, task, 0)
        dissections = {name: results[updates[name]] for name in shown}
        layers = next((len(result["outliers"]["blocks"]) for result in dissections.values() if result), 0)
        yield f"### {task}\n"
        if not layers:
            yield "missing\n"
            continue
        counts: dict[str, dict[str, list[int]]] = {}
        for name, result in dissections.items():
            blocks = [] if result is None else result["outliers"]["blocks"].values()
            for layer, block in enumerate(blocks):
                for component, _, _ in block["largest"]:
                    counts.setdefault(component, {}).setdefault(name, [0] * layers)[layer] += 1
        rows = [
            [component, *(" ".join(str(n) for n in by.get(name, [0] * layers)) for name in dissections)]
            for component, by in sorted(counts.items(), key=lambda item: -sum(map(sum, item[1].values())))
        ]
        yield markdown(["component", *(f"{UPDATES[name]}: layers 1 to {layers}" for name in dissections)], rows)
        yield ""


def figure4(results: Results, suite: Suite, model: str) -> Iterator[str]:
    """Yield the lines of Figure 4: the update along each layer."""
    yield f"## Figure 4, the update along each layer: {model}, seed 0\n"
    yield "The largest |update - mean| of 200 segments of each layer, in standard deviations; dots: 3 sigma.\n"
    for task in suite.tasks:
        updates = _updates(suite, model, task, 0)
        profiles = {
            UPDATES[name]: [np.array(block["profile"]) for block in result["outliers"]["blocks"].values()]
            for name in ("intrinsic-none", "intrinsic-init", "full", "random")
            if (result := results[updates[name]]) is not None
        }
        yield f"### {task}\n"
        if not profiles:
            yield "missing\n"
            continue
        name = f"figure4-{model}-{task}"
        yield figures.picture(results, name, figures.updates(profiles), f"updates of {task}") + "\n"

"""The figures that documents quote are those of the result files that they come from.

Below a paragraph, a list item or a table, a comment says where its figures come from:

    Random directions reach 71.9 ± 2.6 % of full fine-tuning.
    <!-- figures: share("random") -->

It is a Python expression of the functions of this file. Its values, alone or in nested sequences, must stand in the
text above in the same order. In these documents, every `a ± b` must have such a source.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyspan.io.storage import read_json
from tinyspan.lab import paper
from tinyspan.lab.claims import ITEMS, Measured, Source, measure, open_sources
from tinyspan.lab.outlier_sections import MEASURES
from tinyspan.lab.summary import Summary, summarize

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
DOCUMENTS = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "combine",
            "defaults",
            "findings",
            "optimizers",
            "outliers",
            "regression_start",
            "studies",
            "transfer",
        )
    ),
)
COMMENT = re.compile(r"\n\n?[ ]*<!-- figures: (.*?)\s*-->", re.DOTALL)
WITH_INTERVAL = re.compile(r"[-+]?\d[\d.,]* ± \d[\d.]*")
FIVE, FOUR = "mrpc sst2 stsb rte qnli", "mrpc sst2 rte qnli"


# -- the suites of `tinyspan reproduce` ------------------------------------------------------------------------------


@cache
def source(study: str) -> Source:
    return open_sources([RESULTS / study])[0]


@cache
def numbers(item: str, tasks: str) -> Measured:
    """Return the numbers of MiniLM for a table or figure, by its name, on some tasks.

    In Figure 2, `own` is the task's own basis and `other` the mean of those of the four others.
    """
    (chosen,) = (one for one in ITEMS if one.name.startswith(item + ","))
    (measured,) = measure(chosen, [source("small")])
    if item == "Figure 2":
        for task, row in ((task, row) for seed in measured.seeds for task, row in seed.items()):
            others = [row[f"basis of {other}"] for other in FIVE.split() if other != task]
            row |= {"own": row[f"basis of {task}"], "other": float(np.mean(others))}
    suites = {task: suite for task, suite in measured.suites.items() if task in tasks.split()}
    return Measured(measured.model, suites, [{task: seed[task] for task in suites} for seed in measured.seeds])


def average(rows: Mapping[str, Mapping[str, float]], name: str) -> float:
    return float(np.mean([row[name] for row in rows.values()]))


def share(method: str, item: str = "Table 1", tasks: str = FIVE) -> Summary:
    """Return a method's average score over tasks in per cent of full fine-tuning's."""
    return numbers(item, tasks).summary(lambda rows: 100 * average(rows, method) / average(rows, "full"))


def points(one: str, other: str, item: str = "Table 1", tasks: str = FIVE) -> Summary:
    """Return by how many points one method's average score is above another's."""
    return numbers(item, tasks).summary(lambda rows: average(rows, one) - average(rows, other))


def between(one: str, item: str, other: str, of_item: str) -> Summary:
    """Return by how many points a method of one item is above a method of another."""
    pairs = zip(numbers(item, FIVE).seeds, numbers(of_item, FIVE).seeds, strict=True)
    return summarize([average(rows, one) - average(others, other) for rows, others in pairs])


def in_paper(method: str, table: Any = paper.TRANSDUCTIVE, tasks: str = FIVE, minus: str = "") -> float:
    """Return BERT's average in per cent of its full fine-tuning, or in points above another method's."""
    rows, full = table["bert-base-cased"], paper.TRANSDUCTIVE["bert-base-cased"]["full"]
    one, other = (np.mean([row[task] for task in tasks.split()]) for row in (rows[method], rows.get(minus, full)))
    return float(one - other if minus else 100 * one / other)


@cache
def results(cell: str) -> list[dict[str, Any]]:
    """Return the results of the seeds of a cell, such as `small/minilm/stsb/full`."""
    return [read_json(path, sealed=False) for path in sorted((RESULTS / cell).glob("seed-*/result.json"))]


def seeds(cell: str) -> list[float]:
    """Return the score of each seed of a cell, in points."""
    return [100 * one["score"] for one in results(cell)]


def score(cell: str) -> Summary:
    return summarize(seeds(cell))


def above(cell: str, other: str) -> list[float]:
    """Return by how many points a cell is above another, seed by seed."""
    return [more - less for more, less in zip(seeds(cell), seeds(other), strict=True)]


def intact(cell: str) -> list[float]:
    """Return the score of each seed with the update, in points."""
    return [100 * one["outliers"]["scores"]["intact"] for one in results(cell)]


def changes(cell: str, condition: str, intact: str = "intact", in_full: bool = False) -> list[float]:
    """Return the change of the score of each seed when outliers are disabled, in points."""
    scores = [one["in_full"] if in_full else one["outliers"]["scores"] for one in results(cell)]
    return [100 * (one[condition] - one[intact]) for one in scores]


def change(cell: str, condition: str, intact: str = "intact", in_full: bool = False) -> Summary:
    return summarize(changes(cell, condition, intact, in_full))


def cost(cell: str, condition: str, in_full: bool = False) -> Summary:
    """Return by how many points the score falls when outliers are disabled."""
    return minus(change(cell, condition, in_full=in_full))


def of_worth(cell: str, condition: str, kept: bool = False) -> Summary:
    """Return the cost of a change, or what it keeps, in per cent of the points that the update is worth."""
    shares = [one / worth for one, worth in zip(changes(cell, condition), changes(cell, "undo all"), strict=True)]
    return summarize([100 * (1 - share if kept else share) for share in shares])


def layers(cell: str, measured: str) -> Summary:
    """Return a property of the update's outliers, the mean over layers, by the start of its name on a study's page."""
    (of_block,) = (function for name, function, _ in MEASURES if name.startswith(measured))
    means = [float(np.mean([*map(of_block, one["outliers"]["blocks"].values())])) for one in results(cell)]
    return summarize(means)


# -- the studies of `benchmarks/` ------------------------------------------------------------------------------------


def combined(name: str, rows: int | None = 128) -> Summary:
    """Return the mean over tasks of a candidate of `benchmarks/combine.py`, in points."""
    table = read_json(RESULTS / "combine.json")["tasks"]["summary"]
    (found,) = (entry for entry in table if (entry["name"], entry["rows"]) == (name, rows))
    return summarize([100 * value for value in found["values"]])


def combined_share(name: str, rows: int | None) -> Summary:
    """Return the mean over tasks of a combination in per cent of that of the tasks' own models."""
    table = read_json(RESULTS / "combine.json")["tasks"]["summary"]
    (found,) = (entry for entry in table if (entry["name"], entry["rows"]) == (name, rows))
    return Summary(100 * found["share"]["mean"], 100 * found["share"]["half"], len(found["values"]), 3)


def combined_above(one: str, other: str, rows: int | None = 128, of_rows: int | None = None) -> Summary:
    """Return by how many points a combination is above another, seed by seed."""
    table = read_json(RESULTS / "combine.json")["tasks"]["summary"]
    values = {(entry["name"], entry["rows"]): entry["values"] for entry in table}
    pairs = zip(values[one, rows], values[other, of_rows], strict=True)
    return summarize([100 * (more - less) for more, less in pairs])


def combined_texts(name: str) -> Any:
    """Return the perplexities of both texts, and their geometric mean, of a combination of decoders."""
    table = read_json(RESULTS / "combine.json")["decoders"]["summary"]
    (found,) = (entry for entry in table if entry["name"] == name)
    return [two(summarize(found[key]["values"])) for key in ("qnli", "mrpc", "geometric mean")]


def combined_cost(models: str, way: str) -> Any:
    """Return seconds, processor seconds and MB written per candidate, or millions of combined weights."""
    cost = read_json(RESULTS / "combine.json")["cost"][models]
    if way == "weights":
        return cost["weights"] / 1e6
    found = cost[way]
    return [two(found["seconds"]), two(found["processor seconds"]), whole(found["bytes"] / 1e6)]


def combined_times(models: str, way: str) -> list[float]:
    """Return how many times less seconds and processor seconds a candidate takes in place."""
    times = read_json(RESULTS / "combine.json")["cost"][models]["times"][way]
    return [times["seconds"], times["processor seconds"]]


def optimizers(task: str) -> Iterator[Any]:
    """Yield the score and the loss on the rows trained on of every method of the study of optimizers."""
    module = benchmark("optimizers")
    for method in module.METHODS:
        yield optimized(method, task)
        yield two(summarize(module.values(read("optimizers"), method, task, "loss")))


def optimized(method: str, task: str) -> Summary:
    """Return the score of a method of the study of optimizers on a task."""
    summary: Summary = benchmark("optimizers").scores(read("optimizers"), method, task)
    return summary


def tried(method: str, task: str, rate: float) -> float:
    """Return the score, in points, of a run of the study of optimizers by which a rate was chosen."""
    runs = read("optimizers")["runs"]
    wanted = (method, task, rate, 0)
    (found,) = (run for run in runs if (run["method"], run["task"], run["rate"], run["seed"]) == wanted)
    return 100 * float(found["score"])


def better(one: str, other: str, task: str) -> Summary:
    """Return by how many points a method of the study of optimizers is above another on a task."""
    summary: Summary = benchmark("optimizers").difference(read("optimizers"), one, other, task)
    return summary


@cache
def read(file: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{file}.json", sealed=False)


def benchmark(name: str) -> Any:
    """Return a module of `benchmarks/`."""
    return importlib.import_module(name)


def path(task: str, epochs: int, measure: str) -> Summary:
    """Return the straightness of recorded runs, or the share of the squared distances in so many directions, in %."""
    runs = benchmark("straightness").of(read("straightness")["runs"], task, epochs)
    if measure == "straightness":
        return summarize([run[measure] for run in runs])
    return summarize([100 * run["explained"][measure] for run in runs])


def claim(file: str, name: str) -> Summary:
    """Return the value and interval of the only claim of a study whose name contains a text."""
    (found,) = (one for one in read(file)["claims"] if name in one["name"])
    return Summary(found["value"], found["interval"], 3, 3)


def mean(file: str, method: str, task: str = "") -> Summary:
    """Return the mean score of a method of the study of densities or of LoRAs, over all tasks or on one."""
    content = read(file)
    plan = content["plan"] | ({"tasks": [task]} if task else {})
    return summarize(benchmark("study").means(content | {"plan": plan}, method))


def difference(file: str, one: str, other: str) -> Summary:
    """Return by how many points a method of the study of densities or of LoRAs is above another."""
    summary: Summary = benchmark("study").difference(read(file), one, other)
    return summary


def perplexity(method: str) -> str:
    """Return the decoder's perplexity."""
    runs = benchmark("language").of_method(read("language"), "decoder", method)
    return two(summarize([run["score"] for run in runs]))


def megabytes(method: str) -> float:
    """Return the size of a basis or adapter of the study of densities."""
    return float(benchmark("density").size_of(read("density"), method)) / 1e6


def defaults() -> Iterator[str]:
    """Yield the mean of every variant, and how much it is above the default."""
    found = list(read("defaults")["seeds"].values())
    for variant in found[0]:
        yield f"{np.mean([one[variant] for one in found]):.3f}"
        if any(more := [one[variant] - one["center init, h = 1 from 0"] for one in found]):
            yield summarize(more).shown("{:.3f}")


def transferred_seeds(method: str, task: str, rows: int = 1000, file: str = "transfer") -> list[float]:
    """Return the scores of the seeds of a method of the study of transfer."""
    scores = benchmark("transfer").scores_of(read(file))
    return [scores[method, task, rows, seed] for seed in range(3)]


def transferred(method: str, task: str = "", rows: int = 1000, file: str = "transfer") -> Summary:
    """Return the score of a method of the study of transfer, on one task or the mean over all."""
    if task:
        return summarize(transferred_seeds(method, task, rows, file))
    return summarize(benchmark("transfer").means(read(file), method, rows))


def transferred_above(one: str, other: str, rows: int) -> Summary:
    """Return by how many points the mean over all tasks of a method of the study of transfer is above another's."""
    means = [benchmark("transfer").means(read("transfer"), method, rows) for method in (one, other)]
    return summarize([more - less for more, less in zip(*means, strict=True)])


def gained(one: str, other: str, task: str) -> Summary:
    """Return by how many points a method of the study of transfer is above another on a task, with all rows."""
    pairs = zip(transferred_seeds(one, task), transferred_seeds(other, task), strict=True)
    return summarize([more - less for more, less in pairs])


def times_random(source: str, task: str) -> float:
    """Return the share of a task's gradients in a source's basis, over that in a random one."""
    module = benchmark("transfer")
    found = [module.rankings_of(read("transfer"))["suggest", task, 300, seed] for seed in range(3)]
    return float(np.mean([one["shares"][module.DEFAULT][source] / one["random"] for one in found]))


# -- what is checked -------------------------------------------------------------------------------------------------


def minus(summary: Summary) -> Summary:
    assert summary.mean is not None
    return Summary(-summary.mean, summary.half, summary.seeds, summary.wanted)


def two(value: Any) -> Any:
    """Return a value, or each of several, with two decimals; as it is, it has one."""
    if isinstance(value, Summary):
        return value.shown("{:.2f}")
    return f"{value:.2f}" if isinstance(value, float) else [two(one) for one in value]


def signed(value: float) -> str:
    return f"{value:+.1f}"


def whole(value: Any) -> Any:
    """Return a value, or each of several, without decimals."""
    if isinstance(value, Summary):
        return whole(value.mean)
    return f"{value:.0f}" if isinstance(value, float) else [whole(one) for one in value]


def shown(value: Any) -> Iterator[str]:
    """Yield the texts of nested values."""
    if isinstance(value, str | Summary):
        yield _line(str(value))
    elif isinstance(value, Sequence | Iterator):
        for one in value:
            yield from shown(one)
    else:
        yield f"{value:.1f}" if isinstance(value, float) else f"{value:,}"


def unmatched(text: str) -> Iterator[str]:
    """Yield the figures of a document that have no source, and the values of sources that it does not quote."""
    start = 0
    for comment in COMMENT.finditer(text):
        before, block = _split(text[start : comment.start()])
        yield from (f"{figure} has no source" for figure in WITH_INTERVAL.findall(before))
        position, others = 0, ""
        for value in shown(eval(_line(f"({comment[1]})"), globals())):
            found = re.compile(rf"(?<![\d.,-]){re.escape(value)}(?!\d|[.,]\d)").search(block, position)
            if found is None:
                yield f"line {text.count(chr(10), 0, comment.start()) + 1}: expected {value} in: {block[position:]}"
                break
            others += block[position : found.start()] + "|"
            position = found.end()
        else:
            others += block[position:]
            yield from (f"{figure} is not among its values" for figure in WITH_INTERVAL.findall(others))
        start = comment.end()
    yield from (f"{figure} has no source" for figure in WITH_INTERVAL.findall(_line(text[start:])))


def _split(text: str) -> tuple[str, str]:
    """Split off the last paragraph, list item or table of a text, each on one line."""
    place = max(text.rfind("\n\n"), text.rfind("\n* ")) + 1
    return _line(text[:place]), _line(text[place:])


def _line(text: str) -> str:
    """Return a text on one line; 0 has no sign."""
    return re.sub(r"[-+](0\.0+)(?!\d)", r"\1", re.sub(r"\s+", " ", text))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_quoted_figures_are_those_of_the_result_files(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    assert COMMENT.search(text)
    assert list(unmatched(text)) == []


def test_figures_that_part_from_the_files_are_found() -> None:
    quoted = (
        "They reach {} %.\n\n* random 71.9 ±\n  2.6 %, k = 32{}\n"
        "  <!-- figures: share('intrinsic'),\n  share('random') -->\n\n{}"
    )
    assert next(unmatched(quoted.format("90", "", ""))).startswith("line 4: expected 98.5 ± 2.0 in: * random 71.9")
    right = quoted.replace("* random", "* intrinsic 98.5 ± 2.0, random")
    assert list(unmatched(right.format("90", "", ""))) == []
    assert list(unmatched(right.format("90 ± 1", ", 1.5 ± 0.1", "-3 ± 2.5"))) == [
        "90 ± 1 has no source",
        "1.5 ± 0.1 is not among its values",
        "-3 ± 2.5 has no source",
    ]
    for wrong in ("198.5 ± 2.0", "98.5 ± 2.01", "-98.5 ± 2.0", "98.4 ± 2.0"):
        assert "expected 98.5 ± 2.0" in next(unmatched(right.replace("98.5 ± 2.0", wrong).format("90", "", "")))

"""A page with the paper's tables and figures beside those of studies, and a verdict on each of its statements."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tinyspan.errors import InputError
from tinyspan.io.storage import replacing, writing
from tinyspan.lab import paper
from tinyspan.lab.claims import (
    COMPONENTS,
    ITEMS,
    Claim,
    Item,
    Measured,
    Source,
    evaluate,
    measure,
    open_sources,
    verdict,
)
from tinyspan.lab.rendering import PAGE
from tinyspan.lab.suite import Suite
from tinyspan.lab.summary import markdown, missing, summarize
from tinyspan.workflows.tasks import TASKS

__all__ = ["compare", "page_text"]


def compare(folders: Sequence[Path], page: Path) -> Path:
    """Write a page with the paper's tables and figures beside those of studies, and return its path.

    The figures are those that `render` has drawn in the folders.

    Args:
        folders: folders of studies; where several have the same cells, the last one counts.
        page: the Markdown file to write.

    Raises:
        InputError: a folder is not a study, or the page is in none.
        StorageError: a file in it is damaged, or the page cannot be written.
    """
    if not page.parent.is_dir():
        raise InputError(f"{page.parent} is not a folder; expected a file in a folder that exists")
    sources = open_sources(folders)
    with writing(page):
        text = page_text(sources, page.parent)
        with replacing(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return page


def page_text(sources: Sequence[Source], folder: Path) -> str:
    """Return the Markdown text of the page, with links from a folder."""
    measured = [(item, measure(item, sources)) for item in ITEMS]
    sections = [_head(sources, folder), *(_section(item, models, sources, folder) for item, models in measured)]
    sections.insert(1, _verdicts(measured))
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _head(sources: Sequence[Source], folder: Path) -> Iterator[str]:
    yield "# The paper's tables and figures, and ours\n"
    yield (
        "This page is written by `tinyspan render` with `--paper` from the `result.json` files of studies. The paper "
        "([Zhang, Liu and Shao 2023](https://doi.org/10.18653/v1/2023.acl-long.95)) trains BERT-base-cased and "
        "RoBERTa-base on all rows of eight GLUE tasks, with five seeds. The studies:\n"
    )
    for source in sources:
        suite = next(iter(source.suites.values()))
        models = ", ".join(dict.fromkeys(model for one in source.suites.values() for model in one.models))
        link = _link(source.folder / PAGE, folder)
        tasks = [TASKS[task] for one in source.suites.values() for task in one.tasks]
        regression = any(task.problem_type == "regression" for task in tasks)
        start = "; the head of a regression starts at zero" if regression and suite.regression_start == "zero" else ""
        yield f"* [{suite.name}]({link}): {models}, {_rows_of(suite)}, {suite.epochs} epochs{start}"
    yield (
        "\nScores are on held-out rows, in per cent: Matthews' phi for CoLA, Pearson's r for STS-B, accuracy "
        "elsewhere. `a ± b` is a mean over seeds with Student's 95 % interval, and `(1/3)` means that one of three "
        "seeds is finished. Where several studies have the numbers of a model and task, those of the study with most "
        "of them count; of equal ones, the last."
    )


def _rows_of(suite: Suite) -> str:
    return f"{suite.train_rows:,} training rows" if suite.train_rows else "all training rows"


def _verdicts(measured: Sequence[tuple[Item, Sequence[Measured]]]) -> Iterator[str]:
    yield "## Verdicts\n"
    yield (
        "A statement of the paper is about a measure and a bound: its effect is the distance from the bound on the "
        "side where it holds. With our 95 % interval the verdict is **other** where the whole interval is negative, "
        "**weaker** where it is below half of the smaller effect in the paper (there may be none), and **same** "
        "where it is positive and our mean is at least this half. Otherwise, and with one seed, it is **open**. The "
        "measures are averages over the tasks that are named, the paper's over those of them that it has (over all "
        "of its own if it has none).\n"
    )
    header = ["paper", "statement", "measure", "holds", *paper.MODELS, "ours", "model, tasks, rows, seeds", "verdict"]
    yield markdown(header, [row for item, models in measured for row in _verdict_rows(item, models)])


def _verdict_rows(item: Item, models: Sequence[Measured]) -> Iterator[list[str]]:
    for claim in item.claims:
        holds = f"{'below' if claim.below else 'above'} {claim.bound:g}"
        start = [item.name.partition(",")[0], claim.statement, claim.measure, holds]
        form = "{:.2f}" if 0 < claim.bound < 1 else "{:.1f}"
        for model in models:
            summary, papers = model.summary(claim.value), _papers(item, claim, list(model.suites))
            cut = claim.of_sizes and any(suite.train_rows for suite in model.suites.values())
            judged = "open: the tasks are cut to the same size" if cut else verdict(claim, summary, [*papers.values()])
            yield [*start, *_reported(claim, papers, form), summary.shown(form), _setting(model), judged]
        if not models:
            yield [*start, *_reported(claim, _papers(item, claim, []), form), "", "", "open: not computed"]


def _reported(claim: Claim, papers: Mapping[str, float], form: str) -> list[str]:
    return [form.format(papers[name]) if name in papers else claim.words for name in paper.MODELS]


def _papers(item: Item, claim: Claim, tasks: Sequence[str]) -> dict[str, float]:
    """Return a claim's measure for each model of the paper, over the same tasks if the paper has any of them."""
    values = {}
    for model, numbers in item.paper.items():
        same = {task: row for task, row in numbers.items() if task in tasks}
        if (value := evaluate(claim.value, same or numbers)) is not None:
            values[model] = value
    return values


def _setting(measured: Measured) -> str:
    rows = dict.fromkeys(_rows_of(suite) for suite in measured.suites.values())
    seeds = f"{len(measured.seeds)} seed{'s' if len(measured.seeds) > 1 else ''}"
    return f"{measured.model}; {', '.join(measured.suites)}; {', '.join(rows)}; {seeds}"


def _section(item: Item, models: Sequence[Measured], sources: Sequence[Source], folder: Path) -> Iterator[str]:
    yield f"## {item.name}\n"
    if not models:
        yield "Not computed."
    elif item.shown:
        yield _score_table(item, models)
    elif item.paper:
        yield _component_table(item, models)
    for source in sources if item.picture else ():
        yield from _pictures(item, source, folder)


def _score_table(item: Item, models: Sequence[Measured]) -> str:
    """Return the scores, one row per model and method and one column per task."""
    tasks = list(dict.fromkeys([*paper.TASKS, *(task for model in models for task in model.suites)]))
    rows = []
    for name, numbers in item.paper.items():
        for shown in item.shown:
            values = [numbers.get(task, {}).get(shown) for task in tasks]
            rows.append([f"*paper, {name}: {shown}*", *("" if value is None else f"{value:.1f}" for value in values)])
    for model in models:
        rows += [[f"{model.model}: {shown}", *(_shown(model, task, shown) for task in tasks)] for shown in item.shown]
    return markdown(["model: method", *tasks], [row for row in rows if any(row[1:])])


def _component_table(item: Item, models: Sequence[Measured]) -> str:
    """Return in how many layers each component is, one row per component and one column per model and task."""
    columns = [(model, task) for model in models for task in model.suites]
    ours = {
        component: [_shown(model, task, component, "{:.0f}") for model, task in columns]
        for component in sorted({name for model, task in columns for row in model.seeds for name in row[task]})
    }
    named = dict.fromkeys(paper.LARGEST, "named")
    reported = named | {name: f"{share:.0f}" for name, share in COMPONENTS.items()}
    rows = [
        [name, reported.get(name, ""), *shares]
        for name, shares in ours.items()
        if name in reported or any(not share.startswith("0") for share in shares)
    ]
    titles = ["*paper, bert-base-cased: mrpc*", *(f"{model.model}: {task}" for model, task in columns)]
    told = "Per cent of the layers in which a component holds at least one of the ten largest outliers of the layer."
    return f"{told}\n\n{markdown(['component', *titles], rows)}"


def _shown(model: Measured, task: str, name: str, form: str = "{:.1f}") -> str:
    """Return a number of a task over the seeds, empty if no seed has it."""
    if task not in model.suites or missing(summary := summarize([numbers[task].get(name) for numbers in model.seeds])):
        return ""
    return summary.shown(form)


def _pictures(item: Item, source: Source, folder: Path) -> Iterator[str]:
    """Yield the figures of an item that are drawn in a study."""
    suites = source.suites.values()
    every = [
        (suite.name, item.picture.format(model=model, task=task))
        for suite in suites
        for model in suite.models
        for task in suite.tasks
    ]
    for suite, name in dict.fromkeys(every):
        if (path := source.folder / "figures" / f"{name}.png").is_file():
            yield f"\nSuite {suite}, {name.partition('-')[2]}:\n\n![{item.name}]({_link(path, folder)})"


def _link(path: Path, folder: Path) -> str:
    """Return the path of a file as a link from a page in a folder."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())

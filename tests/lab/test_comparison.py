"""The page with the paper beside studies: its measures and verdicts, and that `render` writes the committed pages."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tinyspan import InputError, StorageError
from tinyspan.cli.application import app
from tinyspan.io.storage import read_json
from tinyspan.lab import figures, paper, rendering
from tinyspan.lab.cells import Results
from tinyspan.lab.claims import ITEMS, Claim, Item, Measured, Source, measure, open_sources, verdict
from tinyspan.lab.comparison import compare, page_text
from tinyspan.lab.suite import load_suite
from tinyspan.lab.summary import Summary

DOCS = Path(__file__).parents[2] / "docs"
SMALL, FROM_ZERO, BASE = (DOCS / "results" / name for name in ("small", "from-zero", "base"))
TASKS = ("mrpc", "sst2", "stsb", "rte", "qnli")


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return open_sources([SMALL, BASE])


def of_minilm(sources: Sequence[Source], name: str) -> tuple[Measured, Sequence[Claim]]:
    (item,) = (item for item in ITEMS if item.name.startswith(name))
    (measured,) = (measured for measured in measure(item, sources) if measured.model == "minilm")
    return measured, item.claims


def result(study: str, cell: str, seed: int) -> dict[str, Any]:
    return read_json(DOCS / "results" / study / "minilm" / cell / f"seed-{seed}/result.json", sealed=False)


def score(study: str, cell: str, seed: int) -> float:
    return 100 * float(result(study, cell, seed)["score"])


@pytest.mark.parametrize(
    ("mean", "half", "papers", "below", "expected"),
    [
        (5, 2, [10, 6], False, "same"),
        (5, None, [10, 6], False, "open: one seed"),
        (None, None, [10, 6], False, "open: not computed"),
        (2, 2.5, [10, 6], False, "open: the interval reaches the bound"),
        (1, 1.9, [10, 6], False, "weaker"),  # less than 3, half of the smaller effect
        (-2, 2.5, [10, 6], False, "weaker"),
        (-2, 2.5, [], False, "open: the interval reaches the bound"),
        (-3, 2.5, [10, 6], False, "other"),
        (-3, 2.5, [], True, "same"),
        (3, 2.5, [], True, "other"),
        (-1, 0.5, [-10], True, "weaker"),
    ],
)
def test_the_verdict(mean: float | None, half: float | None, papers: list[float], below: bool, expected: str) -> None:
    for bound in (0.0, 90.0):
        claim = Claim("", "", bound, lambda numbers: None, below)
        ours = Summary(None if mean is None else bound + mean, half, 3, 3)
        assert verdict(claim, ours, [bound + value for value in papers]) == expected


def test_a_task_comes_from_the_last_study_that_has_most_of_it() -> None:
    measured, claims = of_minilm(open_sources([SMALL, FROM_ZERO]), "Table 1")
    assert {task: suite.name for task, suite in measured.suites.items()} == {
        task: "from-zero" if task == "stsb" else "small" for task in TASKS
    }
    places = [("from-zero" if task == "stsb" else "small", task) for task in TASKS]
    shares = [
        100
        * sum(score(study, f"{task}/intrinsic-k32-init", seed) for study, task in places)
        / sum(score(study, f"{task}/full", seed) for study, task in places)
        for seed in range(3)
    ]
    summary = measured.summary(claims[0].value)
    assert summary.mean == pytest.approx(np.mean(shares), rel=1e-12)
    assert summary.half == pytest.approx(4.302652729911275 * np.std(shares, ddof=1) / np.sqrt(3), rel=1e-9)


def test_a_seed_that_one_study_lacks_is_missing_in_measures_over_all_tasks(tmp_path: Path) -> None:
    """Three seeds of mrpc, and two of sst2 in another study."""
    sources = [
        Source(tmp_path, {"table": load_suite("small", tasks=[task], seeds=seeds)}, Results(tmp_path, ""))
        for task, seeds in (("mrpc", 3), ("sst2", 2))
    ]
    item = Item("one", "table", lambda results, suite, model, task, seed: {"score": 10.0 * seed}, {}, ())
    (measured,) = measure(item, sources)
    assert measured.seeds == [
        {"mrpc": {"score": 0.0}, "sst2": {"score": 0.0}},
        {"mrpc": {"score": 10.0}, "sst2": {"score": 10.0}},
        {"mrpc": {"score": 20.0}, "sst2": {}},
    ]
    summary = measured.summary(lambda numbers: sum(row["score"] for row in numbers.values()) / 2)
    assert (summary.mean, summary.seeds, summary.wanted) == (5.0, 2, 3)


def test_the_gain_of_more_directions(sources: list[Source]) -> None:
    measured, claims = of_minilm(sources, "Tables 5 and 6")
    gains = [
        np.mean(
            [
                score("small", f"{task}/intrinsic-k32-init", seed) - score("small", f"{task}/intrinsic-k8-init", seed)
                for task in TASKS
            ]
        )
        for seed in range(3)
    ]
    assert measured.summary(claims[1].value).mean == pytest.approx(np.mean(gains), rel=1e-12)


def test_the_cost_of_outliers(sources: list[Source]) -> None:
    measured, claims = of_minilm(sources, "Table 3")
    costs = []
    for task in ("sst2", "stsb"):
        for seed in range(3):
            scores = result("small", f"{task}/outliers-of-intrinsic-none", seed)["outliers"]["scores"]
            costs.append(100 * (scores["zero random"] - scores["zero outliers"]))
    assert measured.summary(claims[0].value).mean == pytest.approx(np.mean(costs), rel=1e-12)


def test_measures_of_the_paper_are_those_of_its_tables() -> None:
    (item,) = (item for item in ITEMS if item.name.startswith("Table 1"))
    bert, table = item.paper["bert-base-cased"], paper.TRANSDUCTIVE["bert-base-cased"]
    averages = {name: np.mean(list(row.values())) for name, row in table.items()}
    assert averages["full"] == pytest.approx(82.13, abs=0.006)  # as printed in the paper
    assert averages["intrinsic"] == pytest.approx(81.21, abs=0.006)
    assert item.claims[0].value(bert) == pytest.approx(100 * averages["intrinsic"] / averages["full"])
    assert item.claims[1].value(bert) == pytest.approx(averages["intrinsic"] - averages["random"])


def test_the_committed_pages_are_what_render_writes(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, folder, name: None)
    for source in [*sources, *open_sources([FROM_ZERO])]:
        text = "\n\n".join("\n".join(part) for part in rendering._sections(source.results, source.suites))
        assert text + "\n" == (source.folder / "README.md").read_text("utf-8"), f"render {source.folder} again"
    command = "tinyspan render docs/results/small docs/results/base --paper docs/paper.md"
    assert page_text(sources, DOCS) == (DOCS / "paper.md").read_text("utf-8"), f"run {command}"


def test_the_command_writes_every_page(tmp_path: Path) -> None:
    copy = shutil.copytree(FROM_ZERO, tmp_path / "zero", ignore=shutil.ignore_patterns("*.md"))
    result = CliRunner().invoke(app, ["render", str(copy), "--paper", str(tmp_path / "paper.md")])
    assert result.exit_code == 0, result.output
    assert (copy / "README.md").read_text("utf-8") == (FROM_ZERO / "README.md").read_text("utf-8")
    page = (tmp_path / "paper.md").read_text("utf-8")
    assert "(zero/README.md): minilm, 2,000 training rows, 3 epochs; the head of a regression starts at zero" in page
    assert page.count("open: not computed") == 5  # of Table 2 and Figures 2 and 3
    assert "| minilm; stsb; 2,000 training rows; 3 seeds | other |" in page


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no study\.json"):
        compare([tmp_path], tmp_path / "paper.md")
    with pytest.raises(InputError, match="absent is not a folder"):
        compare([FROM_ZERO], tmp_path / "absent/paper.md")
    copy = shutil.copytree(FROM_ZERO, tmp_path / "damaged")
    path = copy / "minilm/stsb/outliers-of-random/seed-1/result.json"
    path.write_text(path.read_text("utf-8").replace('"outliers":', '"other":'), "utf-8")
    with pytest.raises(StorageError, match="is damaged"):
        compare([copy], tmp_path / "paper.md")
    assert not (tmp_path / "paper.md").exists()

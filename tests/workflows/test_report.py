"""The page of runs, bases and adapters: what it shows, what it leaves out, and what it refuses."""

import base64
import re
import shlex
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_analysis import walk_of
from towers import Tower

from tinyspan import TrajectoryRecorder, by_layer, by_module, cli, random_basis, svd_basis, whole_model
from tinyspan.io.manifests import attach
from tinyspan.io.storage import read_json, write_json
from tinyspan.workflows.report import surface, write_report
from tinyspan.workflows.report.items import Item, opened_items
from tinyspan.workflows.report.page import _Page
from tinyspan.workflows.report.repeat import commands
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.tasks import task_from_table

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.studies  # of runs that are trained and drawn
SCORING: dict[str, Any] = {
    "intervals": {"accuracy": [0.31, 0.69]},
    "metrics": {"f1": 0.61},
    "per_class": {
        "negative": {"precision": 0.5, "recall": 0.625, "f1": 0.556, "rows": 16},
        "positive": {"precision": 0.75, "recall": 0.25, "f1": 0.375, "rows": 16},
    },
    "confusion_matrix": [[10, 6], [12, 4]],
    "majority": 0.5,
    "notes": ["the rows are few"],
    "calibration": {"ece": 0.123, "bins": [[0.55, 0.5, 20], [0.7, 0.6, 12]]},
}


def command(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tinyspan", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def runs(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recorded runs of one model, the basis of the first, and adapters in it and in a random basis."""
    home = tmp_path_factory.mktemp("runs")
    quick = ["--model", model_folder, "--task", "sst2", "--data", data_folder, "--epochs", 2]
    quick += ["--learning-rate", 3e-3, "--batch-size", 16, "--precision", "float32"]
    assert command("record", *quick, "--every", 2, "--output", home / "full") == 0
    assert command("record", *quick, "--seed", 1, "--output", home / "other") == 0
    assert command("discover", home / "full", "--rank", 2, "--output", home / "basis") == 0
    assert command("tune", *quick, "--basis", home / "basis", "--output", home / "intrinsic") == 0
    assert command("tune", *quick, "--basis", "random", "--rank", 2, "--output", home / "random") == 0
    write_json(home / "intrinsic/result.json", {**read_json(home / "intrinsic/result.json"), **SCORING})
    attach(home / "intrinsic", ["result.json"])
    return home


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their pictures, which take most of the time, for tests of everything else."""
    empty = {"source": "data:image/svg+xml;base64,", "wide": False}
    monkeypatch.setattr(
        "tinyspan.workflows.report.page.picture",
        lambda draw, alt, caption, **size: {**empty, "alt": alt, "caption": caption},
    )


def page(*folders: Path, output: Path, **options: Any) -> str:
    write_report(output, folders, **options)
    return output.read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.S)))


def require_whole(html: str) -> None:
    """Nothing is loaded from elsewhere, and every picture is an SVG that a sentence describes."""
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)|url\(|@import|<script|<link", html)
    for source, alt in re.findall(r'<img src="([^"]*)" alt="([^"]*)"', html):
        assert base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).startswith(b"<?xml")
        assert len(alt) > 20
        assert alt.endswith(".")
    assert html.count("<img") == len(re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="[^"]+"', html))


def headings(html: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", html)


def test_runs_and_adapters_side_by_side(runs: Path, tmp_path: Path) -> None:
    names = ["full", "other", "intrinsic"]
    html = page(*(runs / name for name in names), output=tmp_path / "page.html")
    require_whole(html)
    assert headings(html) == [
        "Results",
        "Learning curves",
        "Directions",
        "Path",
        "Runs compared",
        "Where the update sits",
        "Predictions",
        "What was trained and what it cost",
        "How to repeat it",
    ]
    assert "<h1>Side by side: full, other and intrinsic</h1>" in html
    for name in names:
        result = read_json(runs / name / "result.json")
        assert f"<td>{name}</td><td>{result['method']}</td><td>{result['score']:.4f}</td>" in html
        numbers = [result["subspace_parameters"], result["ordinary_parameters"]]
        assert "".join(f"<td>{number:,}</td>" for number in numbers) in html
    text = text_of(html)
    assert "0.310 to 0.690" in text  # the stored interval
    assert "intrinsic: predicting the most frequent label for every row has an accuracy of 0.500." in text
    assert "intrinsic: the rows are few." in text
    assert "Confusion matrix of intrinsic: 14 of 32 held-out rows on the diagonal" in html
    assert "expected calibration error 0.123" in html
    assert "negative 0.500 0.625 0.556 16" in text
    assert "Paths of full, other from the same theta_0 in one plane" in html
    for pair in ("full and other", "full and intrinsic", "other and intrinsic"):
        assert f"Principal angles between {pair}" in html
    for word in ("film", "review", "pre-trained", "chosen for"):
        assert word not in text.lower()


@pytest.mark.parametrize("name", ["full", "basis", "random"])
@pytest.mark.usefixtures("undrawn")
def test_one_folder_alone(runs: Path, tmp_path: Path, name: str) -> None:
    html = page(runs / name, output=tmp_path / "page.html")
    kind = {"full": "Recorded run", "basis": "Basis", "random": "Adapter"}[name]
    assert f"<h1>{kind} {name}</h1>" in html
    assert ("Path" in headings(html)) == (name == "full")
    assert ("Learning curves" in headings(html)) == (name != "basis")
    assert ("Directions" in headings(html)) == (name != "random")
    assert "What this page leaves out" not in html


@pytest.mark.usefixtures("undrawn")
def test_older_results_and_runs_without_a_result(tower: Tower, tmp_path: Path) -> None:
    cells = ROOT / "docs/results/small/minilm/mrpc"
    walk_of(tower, tmp_path / "walk", 3, 0)
    html = page(cells / "full/seed-0", cells / "freeze/seed-0", tmp_path / "walk", output=tmp_path / "page.html")
    assert "<h1>Side by side: full/seed-0, freeze/seed-0 and walk</h1>" in html
    text = text_of(html)
    assert "It has no result.json" in text
    assert "walk: without result.json, its settings are unknown" in text
    assert "Predictions" not in headings(html)


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_cannot_be_compared(tower: Tower, tmp_path: Path) -> None:
    walk_of(tower, tmp_path / "one", 2, 0)
    walk_of(Tower(seed=1), tmp_path / "two", 2, 0)
    random_basis(by_layer(Tower(3)), 2).save_pretrained(tmp_path / "wide")
    straight = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "straight")
    with torch.no_grad():
        tower.layers[0].inner.weight += 1
    straight.record(0)
    names = ("one", "two", "wide", "straight")
    text = text_of(page(*(tmp_path / name for name in names), output=tmp_path / "page.html"))
    omitted = text.partition("What this page leaves out")[2]
    for reason in (
        r"One plane for all runs: they start from different weights \(one, straight; two\)\.",
        r"one and two compared: the two cannot be compared: they start from different weights theta_0",
        r"one and wide compared: the two cannot be compared: one has no block where the other has layers\.2\.",
        r"The path of straight: a plane needs at least 2 points, \S+ has 1\.",
    ):
        assert re.search(reason, omitted), (reason, omitted)


def test_a_regression_has_a_scatter(runs: Path, tmp_path: Path) -> None:
    result = {**read_json(runs / "other/result.json"), "metric": "pearson", "type": "regression"}
    (tmp_path / "scored").mkdir()
    write_json(tmp_path / "scored/result.json", result)
    lines = '{"row": 0, "label": 1.5, "prediction": 2.0}\n{"row": 1, "label": 4, "prediction": 3.0}\n'
    (tmp_path / "scored/predictions.jsonl").write_text(lines)
    html = page(tmp_path / "scored", output=tmp_path / "page.html")
    require_whole(html)
    assert "against the labels of 2 held-out rows" in html
    (tmp_path / "scored/predictions.jsonl").write_text("[1]\n")
    assert command("report", tmp_path / "scored", "--output", tmp_path / "again.html") == 1
    assert not (tmp_path / "again.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_a_page_repeat_the_runs(
    runs: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("full", "other", "basis", "random", "intrinsic")
    html = page(*(runs / name for name in names), output=tmp_path / "page.html")
    (code,) = re.findall("<pre><code>(.*?)</code></pre>", html, flags=re.S)
    parts = unescape(code).replace("\\\n", " ").split("\n\n")
    commands = [shlex.split(part, comments=True) for part in parts]
    assert [words[1] for words in commands] == ["record", "record", "discover", "tune", "tune"]
    began = Path.cwd()
    monkeypatch.chdir(tmp_path)
    for index in (0, 2, 3):
        data = [] if commands[index][1] == "discover" else ["--data", data_folder]
        assert command(*commands[index][1:], *data) == 0
    for name in ("full", "random"):
        first, again = (read_json(folder / "result.json") for folder in (runs / name, tmp_path / f"{name}-again"))
        assert first["history"] == again["history"]
    first, again = (read_json(folder / "manifest.json") for folder in (runs / "basis", tmp_path / "basis-again"))
    assert first["files"] == again["files"]
    assert commands[1][commands[1].index("--every") + 1] == "epoch"
    stated = Path(commands[4][commands[4].index("--basis") + 1])  # from the folder in which the page was made
    assert (began / stated).resolve() == (runs / "basis").resolve()
    assert not stated.is_absolute()


def test_a_basis_is_made_again_in_its_own_blocks(tower: Tower, tmp_path: Path) -> None:
    """Also where its trajectory is not on the page."""
    run = walk_of(tower, tmp_path / "run", 3, 0)
    of_run = Item(run.folder, "trajectory", "run", source=run)
    for make, option in ((by_layer, ""), (by_module, "--partition module"), (whole_model, "--partition model")):
        basis = svd_basis(run.with_partition(make(tower)), 2)
        item = Item(tmp_path / "basis", "basis", "basis", source=basis)
        for items in ([item], [item, of_run]):
            text = " ".join(commands(items)[0].replace("\\\n", "").split())
            assert ("--partition" in text) is bool(option)
            assert option in text


def test_a_result_of_another_program_may_say_no_rows() -> None:
    result = {"method": "mine", "task": "sst2", "metric": "accuracy", "score": 0.5}
    for rows in ({}, {"rows": {"validation": 10}}, {"rows": None}):
        (text,) = commands([Item(Path("mine"), "result", "mine", result=result | rows)])
        assert text == "tinyspan evaluate --task sst2 --metric accuracy --adapter ADAPTER --output mine-again"


def test_paths_in_reasons_stay_as_they_are() -> None:
    page = _Page([], None)
    page.omitted += [
        "The path of a: a plane needs at least 2 points, ../runs/a has 1.",
        "The update of b: it is zero..",
    ]
    (part,) = page.omissions()
    assert part["lines"] == [page.omitted[0], "The update of b: it is zero."]


@pytest.fixture(scope="module")
def on_a_table(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and an adapter with every option that is not the default one."""
    home = tmp_path_factory.mktemp("table")
    texts = [f"the film is {'fine' if row % 3 else 'dull'} {row}" for row in range(40)]
    rows = {"t": texts, "y": ["positive" if row % 3 else "negative" for row in range(40)]}
    pd.DataFrame(rows).to_csv(home / "moods.csv", index=False)
    words = ["--model", model_folder, "--data", home / "moods.csv", "--text", "t", "--label", "y", "--holdout", 0.2]
    words += ["--class-weights", "balanced", "--metric", "f1_macro", "--epochs", 1, "--precision", "float32"]
    words += ["--train-rows", 30, "--set-aside", 10, "--learning-rate", 3e-3, "--max-length", 16]
    assert command("record", *words, "--dtype", "bfloat16", "--output", home / "full") == 0
    words += ["--basis", "random", "--rank", 2, "--init-std", 0.5, "--ensemble", 2, "--no-train-embeddings"]
    assert command("tune", *words, "--output", home / "adapter") == 0
    return home


def test_the_commands_of_runs_on_a_table(on_a_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = opened_items([on_a_table / "full", on_a_table / "adapter"])
    monkeypatch.chdir(tmp_path)
    for item, text in zip(items, commands(items), strict=True):
        assert command(*shlex.split(text.replace("\\\n", " "), comments=True)[1:]) == 0
        again = opened_items([Path(f"{item.folder.name}-again")])[0]
        first, second = dict(item.result or {}), dict(again.result or {})
        for name in ("history", "settings", "data", "class_weights", "options", "score"):
            assert first.get(name) == second.get(name)
        assert second["metric"] == "f1_macro"
        if item.kind == "trajectory":
            assert item.manifest is not None
            assert again.manifest is not None
            assert item.manifest.files == again.manifest.files


def test_what_no_command_repeats_has_a_comment(on_a_table: Path) -> None:
    (item,) = opened_items([on_a_table / "adapter"])
    result = dict(item.result or {})
    options = result.pop("options")
    for changes, comment in (
        ({}, "whether embeddings were trained, and the initial values of z, are not recorded"),
        ({"options": {**options, "layer_scales": True}}, "adapter has layer_scales, which has no option"),
        ({"class_weights": [1.0, 2.0]}, "adapter has the class weights [1.0, 2.0], which no option gives"),
    ):
        item.result = {**result, **changes}
        assert comment in commands([item])[0]
    registered = {**result, "task": "sst2", "options": options}
    del registered["data"]
    item.result = registered
    assert "--task sst2 --metric f1_macro" in " ".join(commands([item])[0].replace("\\\n", "").split())


def test_the_loss_of_a_run_is_that_of_its_rows_and_weights(
    on_a_table: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    (item,) = opened_items([on_a_table / "full"])
    seen: list[Any] = []
    monkeypatch.setattr(surface, "loss_around", lambda *arguments, **_: seen.extend(arguments))
    surface.RunSurface()(item, None)  # type: ignore[arg-type]
    prepared, settings = seen[2:]
    task = task_from_table(on_a_table / "moods.csv", "t", "y", holdout=0.2, class_weights="balanced")
    expected = prepare(str(model_folder), task, max_length=16, train_rows=30).with_aside(10)
    assert prepared.digests() == expected.digests()
    assert prepared.task.class_weights == task.class_weights
    assert settings.set_aside == 10


def test_the_loss_around_a_path_is_of_rows_of_all_labels(prepared: Prepared) -> None:
    """Also of a file that is sorted by label; rows that were drawn are in random order already."""
    assert prepared.train is not None
    in_order = replace(prepared, train=prepared.train.sort("labels"))
    rows = surface._chosen_rows(in_order)
    assert len(rows) == 32
    assert {row["labels"] for row in rows} == {0, 1}
    assert surface._chosen_rows(replace(in_order, shuffled=True)) == [in_order.train[index] for index in range(32)]  # type: ignore[index]


def test_the_loss_around_the_path(runs: Path, data_folder: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["report", runs / "full", "--output", tmp_path / "page.html", "--loss-surface"]
    assert command(*words, "--data", data_folder) == 0
    assert capsys.readouterr().out == f"Open {tmp_path / 'page.html'}\n"
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "over the training loss in this plane" in html
    assert "over the training loss" not in page(runs / "full", output=tmp_path / "without.html")
    assert command("report", runs / "full", "--data", data_folder, "--output", tmp_path / "x.html") == 2


def test_a_page_is_replaced_only_on_request(runs: Path, tmp_path: Path, run: Any) -> None:
    output = tmp_path / "deep" / "page.html"
    assert run("report", runs / "basis", "--output", output)[:2] == (0, f"Open {output}\n")
    before = output.read_bytes()
    code, _, err = run("report", runs / "basis", "--output", output)
    assert (code, err) == (
        2,
        f"tinyspan: {output} holds an earlier page; choose another name or pass --overwrite\n",
    )
    assert run("report", runs / "basis", "--output", output, "--overwrite")[0] == 0
    assert output.read_bytes() == before  # the same folders give the same page
    (tmp_path / "work.html").write_text("<p>mine</p>")
    for place, told in (
        (tmp_path / "work.html", "is a file of something else; choose another name for the page"),
        (tmp_path / "deep", f"is a folder; expected the name of a file, such as {tmp_path / 'deep/page.html'}"),
        (runs / "basis/page.html", f"lies in {runs / 'basis'}, which is read; write the page elsewhere"),
    ):
        code, _, err = run("report", runs / "basis", "--output", place, "--overwrite")
        assert (code, err) == (2, f"tinyspan: {place} {told}\n")
    assert (tmp_path / "work.html").read_text() == "<p>mine</p>"


def test_other_folders_are_named_in_one_sentence(runs: Path, model_folder: Path, tmp_path: Path, run: Any) -> None:
    for name, files in {
        "empty": [],
        "photos": ["a.png", "b.png", "c.png", "d.png"],
        "lora": ["adapter_config.json"],
        "study": ["study.json"],
        "begun/unfinished": ["recipe.json"],
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/.tinyspan").write_text("demo\n")
    (tmp_path / "suggested").mkdir()
    write_json(tmp_path / "suggested/result.json", {"bases": []})
    (tmp_path / "note.txt").write_text("text")
    none = "is no trajectory, basis, adapter or result:"
    for folder, told in {
        tmp_path / "absent": "is no folder: there is none of this name",
        tmp_path / "note.txt": "is a file",
        tmp_path / "empty": f"{none} it is empty",
        tmp_path / "photos": f"{none} it holds a.png, b.png, c.png ...",
        tmp_path / "lora": f"{none} it is an adapter of PEFT; convert it with `tinyspan unify`",
        tmp_path / "study": f"{none} it is a study, whose page `tinyspan render` writes",
        tmp_path
        / "demo": f"{none} it is the output of `tinyspan demo`; give its parts: full, intrinsic, random, freeze",
        tmp_path / "begun": "holds unfinished work; repeat the command that started it, then report on it",
        model_folder: f"{none} it is a model of transformers; report on the run that trained it",
        runs / "full": "is given twice",
    }.items():
        code, out, err = run("report", runs / "full", folder, "--output", tmp_path / "page.html")
        assert (code, out, err) == (2, "", f"tinyspan: {folder} {told}\n")
    code, _, err = run("report", tmp_path / "suggested", "--output", tmp_path / "page.html")
    assert code == 2
    assert "is no result of `record`, `tune` or `evaluate`" in err
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_result_is_refused(runs: Path, tmp_path: Path, run: Any) -> None:
    result = (runs / "random/result.json").read_text()
    try:
        (runs / "random/result.json").write_text(result.replace("sst2", "sst3"))
        code, _, err = run("report", runs / "random", "--output", tmp_path / "page.html")
        assert code == 1
        assert "is damaged: expected SHA-256" in err
    finally:
        (runs / "random/result.json").write_text(result)
    assert not (tmp_path / "page.html").exists()


def test_names_in_a_result_are_text_and_nothing_else(tmp_path: Path) -> None:
    """Not HTML in the page, no formula in a picture, and no command on a line of its own."""
    names = ["<script>alert(1)</script>", r"$\frac$"]
    method = "full\nrm -r work"
    history = [{"epoch": 1.0, "score": 0.5}]
    fixed = {"task": "<b>t</b>", "metric": r"$\x$", "score": 0.5, "labels": names, "history": history}
    (tmp_path / "odd").mkdir()
    write_json(tmp_path / "odd/result.json", {"method": method, **fixed, "confusion_matrix": [[1, 2], [3, 4]]})
    html = page(tmp_path / "odd", output=tmp_path / "page.html")
    require_whole(html)
    assert "<b>" not in html
    assert not re.findall("^rm -r", html.partition("<pre>")[2], flags=re.M)

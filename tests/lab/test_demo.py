"""The whole demo on the miniature model: every file it promises, and a page that says what the results say."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from tinyspan import InputError
from tinyspan.io.manifests import read_manifest
from tinyspan.io.storage import read_json
from tinyspan.lab.demo import Plan, run_demo
from tinyspan.workflows.progress import Display

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def plan(model_folder: Path, data_folder: Path) -> Plan:
    return Plan(str(model_folder), "sst2", data_folder, train_rows=64, rank=3, batch_size=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def shown(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output, text = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with Display(Console(file=text)) as display:
        run_demo(output, display, plan=plan)
    return output, text.getvalue()


def test_everything_is_there(shown: tuple[Path, str], plan: Plan) -> None:
    output, text = shown
    results = read_json(output / "results.json")["results"]
    assert [result["method"] for result in results] == ["full", "intrinsic", "random", "freeze"]
    assert [result["subspace_parameters"] for result in results] == [0, 6, 6, 0]
    assert len({result["ordinary_parameters"] for result in results[1:]}) == 1
    assert (output / "full/points/000003.safetensors").is_file()
    assert text.count("held-out score") == 4 * plan.epochs


def test_the_page_stands_alone_and_tells_the_scores(shown: tuple[Path, str]) -> None:
    output, _ = shown
    page = (output / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    described = " ".join(re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="([^"]+)"', page))
    for what in ("Bars of the", "Curves of the", "Singular values", "over the training loss", "outliers"):
        assert what in described
    assert "<h1>2 encoder layers, fine-tuned in 6 numbers</h1>" in page
    assert "These were chosen for full and intrinsic" in page
    for result in read_json(output / "results.json")["results"]:
        assert f"<td>{result['method']}</td><td>{result['score']:.4f}</td>" in page


def test_the_same_seed_gives_the_same_demo(
    shown: tuple[Path, str], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyspan.lab.demo.write_report", lambda *folders, **options: None)
    with Display(Console(file=io.StringIO())) as display:
        run_demo(tmp_path / "again", display, plan=plan)
    first, again = (read_json(folder / "results.json")["results"] for folder in (shown[0], tmp_path / "again"))
    assert [result["history"] for result in first] == [result["history"] for result in again]
    bases = [read_manifest(folder / "basis") for folder in (shown[0], tmp_path / "again")]
    assert bases[0].content_hash() == bases[1].content_hash()  # it covers the points of the trajectory


def test_an_interrupted_demo_can_be_overwritten_and_nothing_else(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "paper/figures").mkdir(parents=True)
    (tmp_path / "paper/figures/years.svg").write_text("work")
    display = Display(Console(file=io.StringIO()))
    with pytest.raises(InputError, match="holds something else"):
        run_demo(tmp_path / "paper", display, overwrite=True, plan=plan)
    assert (tmp_path / "paper/figures/years.svg").is_file()

"""The whole demo on the miniature model: every file it promises, and a page that says what the results say."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tinyspan import InputError
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
    for name in ("comparison", "curves", "spectrum", "path", "extremes"):
        assert (output / f"figures/{name}.png").stat().st_size > 5000
        assert (output / f"figures/{name}.svg").stat().st_size > 5000
    assert (output / "full/points/000003.safetensors").is_file()
    assert text.count("held-out score") == 4 * plan.epochs


def test_the_page_stands_alone_and_tells_the_scores(shown: tuple[Path, str]) -> None:
    output, _ = shown
    page = (output / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert page.count("data:image/svg+xml;base64,") == 5
    for result in read_json(output / "results.json")["results"]:
        row = re.search(rf"<td>{result['method']}</td>\s*<td>([\d.]+)</td>", page)
        assert row is not None
        assert float(row[1]) == round(result["score"], 3)


def test_the_same_seed_gives_the_same_demo(shown: tuple[Path, str], plan: Plan, tmp_path: Path) -> None:
    with Display(Console(file=io.StringIO())) as display:
        run_demo(tmp_path / "again", display, plan=plan)
    for name in ("path", "extremes", "spectrum"):
        file = f"figures/{name}.svg"
        assert (tmp_path / "again" / file).read_bytes() == (shown[0] / file).read_bytes()
    first, again = (read_json(folder / "results.json")["results"] for folder in (shown[0], tmp_path / "again"))
    assert [result["history"] for result in first] == [result["history"] for result in again]


def test_an_interrupted_demo_can_be_overwritten_and_nothing_else(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "paper/figures").mkdir(parents=True)
    (tmp_path / "paper/figures/years.svg").write_text("work")
    display = Display(Console(file=io.StringIO()))
    with pytest.raises(InputError, match="holds something else"):
        run_demo(tmp_path / "paper", display, overwrite=True, plan=plan)
    assert (tmp_path / "paper/figures/years.svg").is_file()


def test_extremes_count_what_is_there() -> None:
    from tinyspan.lab import figures

    drawn = figures.extremes({"layer 1": np.arange(4.0)}, np.array([[0.0027], [0.0054]]), ["a", "b"], 0.0027)
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert texts == ["1.0", "2.0"]

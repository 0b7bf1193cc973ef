"""The command `curvature`: what it prints and writes, and one clear sentence for every misuse."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tinyspan.io.storage import read_json

pytestmark = pytest.mark.studies  # of runs that are trained


@pytest.fixture
def full(run: Any, quick: list[object], tmp_path: Path) -> Path:
    """A recorded run with one point."""
    assert run("record", *quick, "--every", 8, "--output", tmp_path / "full")[0] == 0
    return tmp_path / "full"


def test_a_run_and_an_adapter(run: Any, quick: list[object], full: Path, data_folder: Path, tmp_path: Path) -> None:
    words = ["--data", data_folder, "--rows", 6]
    code, out, err = run("curvature", full, *words, "--output", tmp_path / "c")
    assert code == 0, err
    assert "2 points, matrices of 1 x 1, 6 rows" in err
    lines = out.splitlines()
    assert lines[0].split() == ["step", "loss", "|gradient|", "sharpness", "lowest", "trace", "Gauss-Newton"]
    result = read_json(tmp_path / "c/curvature.json")
    for line, point in zip(lines[1:3], result["points"], strict=True):
        assert line.split()[:2] == [str(point["step"]), f"{point['loss']:.4f}"]
    assert lines[3].startswith("Note: weights outside the blocks, such as the head")
    assert lines[4] == f"K = 1, 6 train rows: {tmp_path / 'c'}"
    assert result["options"] == {
        "rank": None,
        "partition": "model",
        "every": 1,
        "rows": 6,
        "split": "train",
        "method": "reverse",
        "dtype": "float32",
        "batch_size": 16,
    }
    code, _, err = run("curvature", full, *words, "--output", tmp_path / "c")
    assert (code, "holds an earlier output; choose another folder or pass --overwrite" in err) == (2, True)

    assert run("tune", *quick, "--basis", "random", "--rank", 2, "--output", tmp_path / "adapter")[0] == 0
    code, out, err = run("curvature", tmp_path / "adapter", *words, "--split", "validation", "--output", tmp_path / "d")
    assert code == 0, err
    assert out.splitlines()[-1] == f"K = 4, 6 validation rows: {tmp_path / 'd'}"
    code, _, err = run("report", tmp_path / "c", tmp_path / "d", "--output", tmp_path / "page.html")
    assert code == 0, err

    other = ["--task", "sst2", "--max-length", 8, "--overwrite", "--output", tmp_path / "d"]
    assert run("curvature", tmp_path / "adapter", *words, *other)[0] == 0
    assert read_json(tmp_path / "d/curvature.json")["options"]["split"] == "train"


def test_misuse(
    run: Any, quick: list[object], full: Path, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    assert run("discover", full, "--rank", 1, "--output", tmp_path / "basis")[0] == 0
    assert run("tune", *quick, "--basis", tmp_path / "basis", "--output", tmp_path / "adapter")[0] == 0
    shutil.copytree(full, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/model")
    (tmp_path / "begun/unfinished").mkdir(parents=True)
    (tmp_path / "begun/unfinished/recipe.json").write_text("{}")
    expected = "expected the folder of a recorded run or of an adapter"
    data = ["--data", data_folder]
    for words, message in (
        ([tmp_path / "absent"], f"{tmp_path / 'absent'} is no folder; {expected}"),
        ([model_folder], f"{model_folder} is a model, which has neither directions nor points; {expected}"),
        ([data_folder], f"{data_folder} has no manifest.json; {expected}"),
        ([tmp_path / "basis"], f"{tmp_path / 'basis'} is a basis, which has no points; {expected}"),
        ([tmp_path / "begun"], "holds unfinished work; repeat the command that started it first"),
        ([tmp_path / "bare"], "bare has no model/, from which the head comes; `record` writes one"),
        ([full, "--model", model_folder], f"whose model is {full / 'model'}: leave out --model"),
        ([full, "--basis", tmp_path / "basis"], "which has its own directions: leave out --basis"),
        ([full, "--rank", 2, *data], "--rank 2 is not between 1 and 1"),
        (
            [full, "--rank", 300, "--partition", "layer", *data],
            "z has 600 coordinates (300 in each of 2 blocks; lower --rank",
        ),
        ([full, "--partition", "nonsense", *data], "nonsense"),
        ([full, "--holdout", 0.5], "--holdout goes with --data, --text and --label"),
        ([tmp_path / "adapter", "--model", tmp_path / "gone", *data], "could not be loaded (no such folder"),
        ([tmp_path / "adapter", "--model", full / "model", *data], "the adapter"),
    ):
        code, out, err = run("curvature", *words, "--output", tmp_path / "out")
        assert (code, out) == (2, ""), err
        assert message in err
        assert err.startswith("tinyspan: ")
        assert not (tmp_path / "out").exists()
    code, _, err = run("curvature", full, *data, "--output", full)
    assert (code, "lies in the output folder" in err) == (2, True), err

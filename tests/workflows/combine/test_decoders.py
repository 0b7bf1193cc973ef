"""Decoders of two texts, as models, runs and LoRAs: one model for both texts, scored by the perplexity of each."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from miniature_tasks import sentences
from miniatures import model_of, tokenizer
from transformers import AutoModelForCausalLM

from tinyspan.workflows.combine.opening import Options
from tinyspan.workflows.combine.runner import combine
from tinyspan.workflows.combine.sources import Division, Source
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.runs import record
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task

pytestmark = pytest.mark.studies

LENGTH = 16
METHODS = ("single", "uniform-average", "gradient", "evolution")
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a decoder, and the texts of two tasks."""
    folder = tmp_path_factory.mktemp("decoders")
    model_of("causal-lm").save_pretrained(folder / "base")
    tokenizer(encoder_decoder=False).save_pretrained(folder / "base")
    for name, seed in zip(NAMES, (1, 2), strict=True):
        (folder / f"{name}-texts").mkdir()
        for split, rows in (("train", 160), ("validation", 30)):
            texts = sentences(rows, seed)["sentence"]
            pd.DataFrame({"text": texts}).to_json(
                folder / f"{name}-texts" / f"{split}.jsonl", orient="records", lines=True
            )
    return folder


@pytest.fixture(scope="module")
def runs(base: Path) -> dict[str, Path]:
    """Recorded runs on each of the texts, which set pieces aside."""
    settings = Settings(epochs=1, batch_size=8, max_length=LENGTH, learning_rate=1e-2, set_aside=14)
    for name in NAMES:
        prepared = prepare(str(base / "base"), "causal-lm", data=base / f"{name}-texts", max_length=LENGTH)
        record(prepared, settings, base / name)
    return {name: base / name for name in NAMES}


@pytest.fixture(scope="module")
def loras(base: Path) -> dict[str, Path]:
    """LoRAs of the queries and values, with random updates."""
    for seed, name in enumerate(NAMES):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = peft.LoraConfig(
                task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
            )
            model = AutoModelForCausalLM.from_pretrained(base / "base")
            peft.get_peft_model(model, config).save_pretrained(base / f"{name}-lora")
    return {name: base / f"{name}-lora" for name in NAMES}


def page_of(models: dict[str, Path], base: Path, path: Path, more: str = "") -> Path:
    """Write a page with one model for each text."""
    entries = [
        f"- {{name: {name}, model: {model}, task_type: causal-lm, data: {base / f'{name}-texts'}{more}}}"
        for name, model in models.items()
    ]
    path.write_text("\n".join(["tasks:", *entries, ""]))
    return path


def combined(run: Any, page: Path, output: Path, *more: Any) -> dict[str, Any]:
    """Return the result of the command for a page."""
    rows = ["--learn-rows", 4, "--choose-rows", 6, "--max-length", LENGTH, "--precision", "float32", "--no-geometry"]
    code, out, err = run("combine", "--tasks", page, *rows, "--methods", ",".join(METHODS), "--output", output, *more)
    assert code == 0, err
    assert "one, perplexity" in out
    assert "two, perplexity" in out
    result: dict[str, Any] = json.loads((output / "result.json").read_text())
    return result


def perplexity(model: Any, base: Path, name: str) -> float:
    """Return exp of the mean loss of all held-out tokens of a text."""
    pieces = prepare(str(base / "base"), "causal-lm", data=base / f"{name}-texts", max_length=LENGTH).validation
    total, count = 0.0, 0
    for piece in pieces:
        ids = torch.tensor([piece["input_ids"]])
        with torch.no_grad():
            total += float(model.eval()(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def check(result: dict[str, Any], output: Path, base: Path) -> None:
    """Check the scores, and that one model for both texts was written, with the scores of the chosen candidate."""
    assert [task["metric"] for task in result["tasks"]] == ["perplexity", "perplexity"]
    entries = {entry["name"]: entry for entry in result["candidates"]}
    for entry in entries.values():
        assert all(score > 1 for score in entry["test"]["scores"])
        assert entry["test"]["mean"] == pytest.approx(-sum(map(math.log, entry["test"]["scores"])) / 2)
    assert entries["learned per model"]["coefficients"] != entries["average of all"]["coefficients"]
    assert not (output / "models").exists()
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, score in zip(NAMES, entries[result["chosen"]]["test"]["scores"], strict=True):
        assert perplexity(model, base, name) == pytest.approx(score, rel=1e-4)


def test_models_of_two_texts(base: Path, tmp_path: Path) -> None:
    generator, sources = torch.Generator().manual_seed(0), []
    for name in NAMES:
        model = model_of("causal-lm")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
        tokenizer(encoder_decoder=False).save_pretrained(tmp_path / name)
        sources.append(Source(get_task("causal-lm"), [str(tmp_path / name)], name, base / f"{name}-texts", ["text"], 0))
    result = combine(
        sources,
        tmp_path / "out",
        base=str(base / "base"),
        division=Division(4, 6, LENGTH),
        options=Options(METHODS, precision="float32", geometry=False),
    )
    check(result, tmp_path / "out", base)
    two = next(entry for entry in result["candidates"] if entry["name"] == "two")
    assert result["own_models"]["scores"][1] == two["test"]["scores"][1]


def test_runs_on_two_texts(base: Path, runs: dict[str, Path], run: Any, tmp_path: Path) -> None:
    """The pieces to learn from and to choose on are those that each run set aside; the base is that of the runs."""
    page = page_of({name: folder / "model" for name, folder in runs.items()}, base, tmp_path / "page.yaml")
    result = combined(run, page, tmp_path / "out")
    check(result, tmp_path / "out", base)
    assert [task["trained"]["set_aside"] for task in result["tasks"]] == [14, 14]
    assert result["base"] == str(base / "base")


def test_loras_of_two_texts(base: Path, loras: dict[str, Path], run: Any, tmp_path: Path) -> None:
    page = page_of(loras, base, tmp_path / "page.yaml", ", train_rows: 0")
    result = combined(run, page, tmp_path / "out")
    check(result, tmp_path / "out", base)
    assert result["blocks"] == ["model.layers.0", "model.layers.1"]
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "base"), str(loras["two"]))
    alone = next(entry for entry in result["candidates"] if entry["name"] == "two-lora")
    assert perplexity(merged.merge_and_unload(), base, "two") == pytest.approx(alone["test"]["scores"][1], rel=1e-4)


def test_loras_of_one_text(base: Path, loras: dict[str, Path], run: Any, tmp_path: Path) -> None:
    """Two LoRAs on the same text are models of one task."""
    rows = ["--learn-rows", 4, "--choose-rows", 6, "--max-length", LENGTH, "--train-rows", 0, "--precision", "float32"]
    task = ["--task-type", "causal-lm", "--data", base / "one-texts", "--methods", "single,uniform-average,greedy-soup"]
    code, out, err = run("combine", *loras.values(), *task, *rows, "--output", tmp_path / "out")
    assert code == 0, err
    assert "causal-lm, perplexity" in out
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()

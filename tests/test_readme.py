"""The Python in the README runs as it stands, and does what the sentence after it says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from towers import Tower
from transformers import LlamaConfig, LlamaForCausalLM

from tinyspan import by_layer, trainable_by_layer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


class Task:
    """What the README calls `fresh_model` and `train`, on the small tower."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 11, (64, 5), generator=generator)
        self.labels = (self.tokens.sum(1) % 3 == 0).long()

    def fresh_model(self) -> nn.Module:
        return Tower(layers=2, width=8).float()

    def loss(self, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(self.tokens), self.labels)

    def train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, after_step: Callable[[int], None] = lambda step: None
    ) -> None:
        for step in range(40):
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()
            after_step(step)


def test_the_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    task = Task()
    names: dict[str, Any] = {"fresh_model": task.fresh_model, "train": task.train}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(blocks[0], names)

    start, full = task.loss(task.fresh_model()), task.loss(names["model"])
    assert full < start
    assert task.loss(names["merged"]) < start
    assert (tmp_path / "adapters/mytask/manifest.json").is_file()

    (tmp_path / "adapters/mytask").rename(tmp_path / "adapters/another")
    pushed: list[str] = []
    for module in ("bases.basis", "model.files"):
        monkeypatch.setattr(
            f"tinyspan.{module}.push", lambda folder, name, **rest: (pushed.append(name), (name, "abc"))[1]
        )
    exec(blocks[1], names)
    assert names["subspace"].adapters == ["default", "another", "between"]
    assert names["subspace"].active_adapter == "another"
    assert pushed == ["user/basis", "user/adapter"]
    assert (tmp_path / "lora/adapter_config.json").is_file()


def test_the_readme_names_real_files() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)|src=\"([^\"]+)\"", text):
        path = target[0] or target[1]
        assert (README.parent / path).exists(), path


def test_every_test_that_keeps_a_promise_is_there() -> None:
    page = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(), f"{file}::{test}"


def test_the_arithmetic_of_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The page prints what its code prints, of the sizes that the model has: it is built without its numbers."""
    page = (ROOT / "docs/processes.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "print" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    assert capsys.readouterr().out == re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        assert by_layer(model).numel == names["blocks"]
        assert sum(weight.numel() for weight in model.parameters()) == names["blocks"] + names["rest"]
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        assert trainable_by_layer(adapted).numel == names["lora"]

"""From LoRA folders on disk to one basis, and back, by the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyspan import InputError, SubspaceModel
from tinyspan.experiments.unifying import base_of_loras, unify

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with no head, and three LoRAs with heads of three classes."""
    folder = tmp_path_factory.mktemp("loras")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(folder / "base")
        for name in ("a", "b", "c"):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
            config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
            peft.get_peft_model(model, config).save_pretrained(folder / name)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(5, 17).view(2, 6)).logits
    return found


def test_the_command_leaves_adapters_that_are_the_loras(folder: Path, tmp_path: Path) -> None:
    names = [str(folder / name) for name in "abc"]
    command = [sys.executable, "-m", "tinyspan.cli", "unify", *names, "-o", str(tmp_path / "out")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads((tmp_path / "out/unified.json").read_text())
    assert [row["name"] for row in result["adapters"]] == ["a", "b", "c"]
    assert all(f"{row['error_of_mean']:.3f}" in told for row in result["adapters"])
    assert max(row["error"] for row in result["adapters"]) < 1e-6
    for name in "abc":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        expected = logits(peft.PeftModel.from_pretrained(base, str(folder / name)))
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        found = SubspaceModel.from_pretrained(again, tmp_path / "out" / name)
        torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)
        control = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        mean = SubspaceModel.from_pretrained(control, tmp_path / "out/mean" / name)
        assert torch.equal(mean.model.classifier.weight, found.model.classifier.weight)
        assert not torch.allclose(mean.z[0], found.z[0])
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2  # holds an earlier output
    assert subprocess.run([*command, "--overwrite"], capture_output=True, check=False).returncode == 0


def test_misuse(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names of their own"):
        unify([str(folder / "a"), str(folder / "a")], tmp_path / "out")
    with pytest.raises(InputError, match="not an adapter of PEFT"):
        unify([str(folder / "base")], tmp_path / "out")
    with pytest.raises(InputError, match="read and lies in the output"):
        unify([str(folder / "a")], folder)
    assert base_of_loras([str(folder / "a")]).config.num_labels == 3
    one = unify([str(folder / "a")], tmp_path / "one", rank=1)
    assert one["adapters"][0]["error"] > 0.1
    assert one["mean_share"] == 1.0

"""From LoRA folders on disk to one basis, and back, by the command line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyspan import InputError, SubspaceModel, by_layer, random_basis
from tinyspan.interop.lora import export_lora
from tinyspan.workflows import unify as unify_module
from tinyspan.workflows.unify import base_models, unify

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


def test_the_command_leaves_adapters_that_are_the_loras(folder: Path, tmp_path: Path, run: Any) -> None:
    command = ["unify", *(folder / name for name in "abc"), "-o", tmp_path / "out"]
    code, told, _ = run(*command)
    assert code == 0
    result = json.loads((tmp_path / "out/unified.json").read_text())
    assert [row["name"] for row in result["adapters"]] == ["a", "b", "c"]
    assert all(f"{row['error_of_mean']:.3f}" in told for row in result["adapters"])
    assert max(row["error"] for row in result["adapters"]) < 1e-6
    for name in "abc":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        expected = logits(peft.PeftModel.from_pretrained(base, str(folder / name)))
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        found = SubspaceModel.from_pretrained(again, tmp_path / "out/adapters" / name)
        torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)
        control = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        mean = SubspaceModel.from_pretrained(control, tmp_path / "out/mean" / name)
        assert torch.equal(mean.model.classifier.weight, found.model.classifier.weight)
        assert not torch.allclose(mean.z[0], found.z[0])
    assert run(*command)[0] == 2  # holds an earlier output
    assert run(*command, "--overwrite")[0] == 0


@pytest.mark.parametrize("head_of_base", [None, 2])
def test_heads_of_other_sizes_share_the_basis(folder: Path, tmp_path: Path, head_of_base: int | None) -> None:
    """Two adapters with three classes and one, as a regression has it, with a single number; the base may have two."""
    source = folder / "base"
    if head_of_base is not None:
        source = tmp_path / "base"
        classifier = transformers.AutoModelForSequenceClassification
        classifier.from_pretrained(folder / "base", num_labels=head_of_base).save_pretrained(source)

    def base(labels: int) -> Any:
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(source, num_labels=labels, ignore_mismatched_sizes=True)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
        peft.get_peft_model(base(1), config).save_pretrained(tmp_path / "one")
    places = {"a": folder / "a", "one": tmp_path / "one", "b": folder / "b"}
    result = unify([str(place) for place in places.values()], tmp_path / "out", model=str(source))
    assert max(row["error"] for row in result["adapters"]) < 1e-6
    found = {}
    for name, place in places.items():
        labels = 1 if name == "one" else 3
        expected = logits(peft.PeftModel.from_pretrained(base(labels), str(place)))
        found[name] = SubspaceModel.from_pretrained(base(labels), tmp_path / "out/adapters" / name)
        torch.testing.assert_close(logits(found[name]), expected, rtol=1e-4, atol=1e-5)
    for name in places:
        mean = SubspaceModel.from_pretrained(base(1 if name == "one" else 3), tmp_path / "out/mean" / name)
        assert torch.equal(mean.model.classifier.weight, found[name].model.classifier.weight)
        for index, z in enumerate(mean.z):
            right = sum(one.z[index].detach() for one in found.values()) / 3
            torch.testing.assert_close(z.detach(), right, rtol=1e-5, atol=1e-7)


def test_heads_that_are_adapted_or_absent(folder: Path, tmp_path: Path) -> None:
    """A LoRA of the head tells its size, and an adapter without a head goes into the model of one that has one."""
    auto = transformers.AutoModelForSequenceClassification
    for name, labels, targets in (("adapted", 4, ["query", "classifier"]), ("headless", 3, ["query"])):
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)  # no task: no head beside
        model = peft.get_peft_model(auto.from_pretrained(folder / "base", num_labels=labels), config)
        model.peft_config["default"].task_type = "SEQ_CLS"
        model.save_pretrained(tmp_path / name)
    names = [str(tmp_path / "headless"), str(folder / "a"), str(tmp_path / "adapted")]
    found = base_models(names)
    assert [base.model.config.num_labels for base in found] == [3, 3, 4]
    assert found[0] is found[1]
    assert unify(names[2:], tmp_path / "one")["adapters"][0]["error"] < 1e-6
    with pytest.raises(InputError, match=r"changes 'classifier.weight', .* another size"):
        unify(names, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_export_wrote_can_be_unified(folder: Path, tmp_path: Path) -> None:
    """It has no kind of task, since PEFT would then save heads that have not moved; the class of its model tells."""
    auto = transformers.AutoModelForSequenceClassification
    for name, labels in (("two", 2), ("one", 1)):
        model = auto.from_pretrained(folder / "base", num_labels=labels)
        model.config._name_or_path = str(folder / "base")
        kept = {"modules_to_save": ["classifier"]} if name == "one" else {}
        subspace = SubspaceModel(model, random_basis(by_layer(model), 3), init_std=1, **kept)
        export_lora(subspace, tmp_path / name, rank=4)
    result = unify([str(tmp_path / "two"), str(tmp_path / "one")], tmp_path / "out")
    assert max(row["error"] for row in result["adapters"]) < 1e-6


def test_misuse(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the same name"):
        unify([str(folder / "a"), str(folder / "a")], tmp_path / "out")
    with pytest.raises(InputError, match="not an adapter of PEFT"):
        unify([str(folder / "base")], tmp_path / "out")
    with pytest.raises(InputError, match="read and lies in the output"):
        unify([str(folder / "a")], folder)
    with pytest.raises(InputError, match="lies in the adapter"):
        unify([str(folder / "a")], folder / "a" / "out")
    assert not (tmp_path / "out").exists()
    assert [base.model.config.num_labels for base in base_models([str(folder / "a")])] == [3]
    one = unify([str(folder / "a")], tmp_path / "one", rank=1)
    assert one["adapters"][0]["error"] > 0.1
    assert one["mean_share"] == 1.0


def test_what_is_replaced_is_gone_and_what_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unify([str(folder / "a"), str(folder / "b")], out)
    unify([str(folder / "a"), str(folder / "c")], out, overwrite=True)
    assert sorted(path.name for path in (out / "adapters").iterdir()) == ["a", "c"]
    assert sorted(path.name for path in (out / "mean").iterdir()) == ["a", "c"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    untrained = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    peft.get_peft_model(base, untrained).save_pretrained(tmp_path / "new")
    with pytest.raises(InputError, match="was it trained"):
        unify([str(folder / "a"), str(tmp_path / "new")], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_folders_of_one_name_are_told_apart_by_those_above(folder: Path, tmp_path: Path) -> None:
    for run, name in (("r1", "a"), ("r2", "b")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "checkpoint-10").symlink_to(folder / name)
    names = [str(tmp_path / run / "checkpoint-10") for run in ("r1", "r2")]
    assert [row["name"] for row in unify(names, tmp_path / "out")["adapters"]] == ["a", "b"]  # what the links lead to
    for run, name in (("r1", "a"), ("r2", "b")):
        (tmp_path / run / "checkpoint-10").unlink()
        shutil.copytree(folder / name, tmp_path / run / "checkpoint-10")
    found = unify(names, tmp_path / "out", overwrite=True)
    assert [row["name"] for row in found["adapters"]] == ["r1-checkpoint-10", "r2-checkpoint-10"]


def test_one_revision_of_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> Any:
        return SimpleNamespace(base_model_name_or_path="user/base", revision=name, task_type="CAUSAL_LM")

    def load(auto: str, place: str, **options: Any) -> Any:
        loads.append((place, options["revision"]))
        return None, {"missing_keys": [], "mismatched_keys": []}

    loads: list[tuple[str, str]] = []
    monkeypatch.setattr(unify_module, "peft_config", lambda name: config({"a": None, "b": "main", "c": "v2"}[name]))
    monkeypatch.setattr(unify_module, "load_pretrained", load)
    base_models(["a", "b"])
    assert loads == [("user/base", "main")]
    with pytest.raises(InputError, match=r"the adapters have the revisions \['main', 'v2'\] of user/base"):
        base_models(["a", "c"])

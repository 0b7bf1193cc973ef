"""Labels are matched by name, what is saved carries the names of its outputs, and a random head is never scored."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tinyspan import InputError, SubspaceModel
from tinyspan.labels import set_label_names
from tinyspan.workflows.checks import check_adapted
from tinyspan.workflows.export import export
from tinyspan.workflows.models import base_model
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import evaluate, record, tune
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task
from tinyspan.workflows.unify import unify

SETTINGS = Settings(epochs=8, batch_size=16, learning_rate=1e-2, z_learning_rate=3e-2, precision="float32")
FLIPPED = ("POSITIVE", "NEGATIVE")
WORDS = ("negative", "positive")


def save_with_names(model: Any, tokenizer: Any, folder: Path, names: tuple[str, ...]) -> Path:
    set_label_names(model, names)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A sentiment model, and its score."""
    folder = tmp_path_factory.mktemp("trained") / "full"
    return folder / "model", record(prepared, SETTINGS, folder)["score"]


@pytest.fixture(scope="module")
def flipped(trained: tuple[Path, float], prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its two outputs, and their names, in the other order."""
    model = AutoModelForSequenceClassification.from_pretrained(trained[0])
    with torch.no_grad():
        for value in (model.classifier.weight, model.classifier.bias):
            value.copy_(value.flip(0))
    return save_with_names(model, prepared.tokenizer, tmp_path_factory.mktemp("flipped") / "m", FLIPPED)


def named_accuracy(model: Any, tokenizer: Any, data: Path) -> float:
    """Return the share of held-out rows whose predicted name, in lower case, is the word for their label."""
    rows = pd.read_csv(data / "validation.csv")
    batch = tokenizer(rows["sentence"].tolist(), padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model.eval()(**batch).logits.argmax(-1).tolist()
    names = [model.config.id2label[index].lower() for index in predicted]
    return sum(name == WORDS[label] for name, label in zip(names, rows["label"], strict=True)) / len(rows)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def test_what_is_saved_carries_the_names_of_the_task(trained: tuple[Path, float], data_folder: Path, run: Any) -> None:
    folder, score = trained
    model = load(folder)
    assert (model.config.id2label, model.config.label2id) == (dict(enumerate(WORDS)), {"negative": 0, "positive": 1})
    assert score > 0.7
    code, out, _ = run("evaluate", "--model", folder, "--task", "sst2", "--data", data_folder, "--precision", "float32")
    assert (code, f"accuracy {score:.4f}" in out) == (0, True)


def test_names_in_another_order_are_mapped(
    flipped: Path, trained: tuple[Path, float], data_folder: Path, tmp_path: Path, run: Any, prepared: Prepared
) -> None:
    where = ["--model", flipped, "--task", "sst2", "--data", data_folder, "--precision", "float32"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = run("evaluate", *where, "--output", tmp_path / "e")
    assert (code, f"accuracy {trained[1]:.4f}" in out) == (0, True)
    assert "in their order, POSITIVE, NEGATIVE; the labels of sst2, negative, positive, are matched to them" in err
    assert json.loads((tmp_path / "e/result.json").read_text())["labels"] == list(FLIPPED)
    with pytest.raises(InputError, match=r"prepared for the outputs negative, positive, .* POSITIVE, NEGATIVE"):
        evaluate(replace(prepared, model=str(flipped)), SETTINGS)


def test_rows_of_three_labels_are_mapped(model_folder: Path, tmp_path: Path) -> None:
    model = base_model(str(model_folder), get_task("mnli"), 0)
    rows = pd.DataFrame({"premise": ["film"] * 4, "hypothesis": ["love"] * 4, "label": [0, 1, 2, 0]})
    rows.to_json(tmp_path / "validation.jsonl", orient="records", lines=True)
    tokenizer = prepare(str(model_folder), "mnli", data=tmp_path, train=False).tokenizer
    names = ("CONTRADICTION", "ENTAILMENT", "NEUTRAL")
    folder = save_with_names(model, tokenizer, tmp_path / "nli", names)
    with pytest.warns(UserWarning, match="CONTRADICTION, ENTAILMENT, NEUTRAL"):
        found = prepare(str(folder), "mnli", data=tmp_path, train=False)
    assert (found.labels, found.validation["labels"][:]) == (names, [1, 2, 0, 1])


def test_training_on_from_another_order_saves_names_that_are_right(
    flipped: Path, data_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="matched to them by name"):
        prepared = prepare(str(flipped), "sst2", data=data_folder)
    score = record(prepared, SETTINGS, tmp_path / "full")["score"]
    saved = load(tmp_path / "full/model")
    assert tuple(saved.config.id2label.values()) == FLIPPED
    assert named_accuracy(saved, prepared.tokenizer, data_folder) == score > 0.7

    score = tune(prepared, SETTINGS, "random", tmp_path / "a", rank=2)["score"]
    export(str(flipped), "sst2", tmp_path / "a", tmp_path / "merged", "merged")
    merged = load(tmp_path / "merged")
    assert tuple(merged.config.id2label.values()) == FLIPPED
    assert named_accuracy(merged, prepared.tokenizer, data_folder) == score > 0.7
    assert evaluate(prepared, SETTINGS, tmp_path / "a")["score"] == score


def test_exports_bring_their_names_to_a_base_model_without(
    prepared: Prepared, data_folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    score = tune(prepared, SETTINGS, "random", tmp_path / "a", rank=2)["score"]
    export(prepared.model, "sst2", tmp_path / "a", tmp_path / "lora", "lora")
    names = json.loads((tmp_path / "lora/labels.json").read_text())
    base = load(Path(prepared.model), id2label=dict(enumerate(names)))
    lora = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert tuple(lora.config.id2label.values()) == WORDS
    assert named_accuracy(lora, prepared.tokenizer, data_folder) == score
    subspace = SubspaceModel.from_pretrained(base_model(prepared.model, prepared.task, 3), tmp_path / "a")
    assert tuple(subspace.config.id2label.values()) == WORDS


def test_a_head_of_other_labels_is_not_scored_and_renamed_by_training(
    trained: tuple[Path, float], prepared: Prepared, data_folder: Path, tmp_path: Path, run: Any
) -> None:
    folder = save_with_names(load(trained[0]), prepared.tokenizer, tmp_path / "m", ("ham", "spam"))
    code, out, err = run("evaluate", "--model", folder, "--task", "sst2", "--data", data_folder)
    assert (code, out) == (2, "")
    assert "trained for the labels ham, spam, and sst2 has the labels negative, positive" in err
    other = replace(prepared, model=str(folder))
    for work in (
        lambda: record(other, replace(SETTINGS, epochs=1), tmp_path / "full"),
        lambda: tune(other, replace(SETTINGS, epochs=1), "random", tmp_path / "a", rank=1),
    ):
        with pytest.warns(UserWarning, match="labels ham, spam, .* starts from the weights of this head"):
            assert work()["labels"] == list(WORDS)
    assert tuple(load(tmp_path / "full/model").config.id2label.values()) == WORDS
    export(str(folder), "sst2", tmp_path / "a", tmp_path / "merged", "merged")
    assert tuple(load(tmp_path / "merged").config.id2label.values()) == WORDS
    assert evaluate(other, SETTINGS, tmp_path / "a")["score"] > 0


def test_names_that_only_count_are_taken_in_the_tasks_order(
    trained: tuple[Path, float], prepared: Prepared, tmp_path: Path
) -> None:
    folder = save_with_names(load(trained[0]), prepared.tokenizer, tmp_path / "m", ("LABEL_0", "LABEL_1"))
    assert evaluate(replace(prepared, model=str(folder)), SETTINGS)["score"] == trained[1]


def test_heads_for_several_labels_a_row_and_for_other_numbers_are_not_scored(
    prepared: Prepared, similarity: Prepared, trained: tuple[Path, float], tmp_path: Path
) -> None:
    model = load(trained[0])
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "several")
    with pytest.raises(InputError, match="trained for multi_label_classification, and sst2 is single_label"):
        base_model(str(tmp_path / "several"), prepared.task, 0, need_head=True)
    record(similarity, replace(SETTINGS, epochs=1), tmp_path / "full")
    regression = load(tmp_path / "full/model")
    assert regression.config.id2label == {0: "similarity"}
    set_label_names(regression, ("toxicity",))
    regression.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="trained for the labels toxicity, and stsb has the labels similarity"):
        base_model(str(tmp_path / "other"), similarity.task, 0, need_head=True)
    renamed = base_model(str(tmp_path / "other"), similarity.task, 0)
    assert renamed.config.id2label == {0: "similarity"}


def test_an_adapter_is_not_scored_on_other_labels(prepared: Prepared, tmp_path: Path) -> None:
    tune(prepared, replace(SETTINGS, epochs=1), "random", tmp_path / "a", rank=1)
    with pytest.raises(InputError, match="another task, with the labels negative, positive, and qqp has the labels"):
        check_adapted(prepared.model, "qqp", tmp_path / "a")
    with pytest.raises(InputError, match="another task, with the labels negative, positive"):
        export(prepared.model, "cola", tmp_path / "a", tmp_path / "merged", "merged")
    assert not (tmp_path / "merged").exists()
    check_adapted(prepared.model, "rotten_tomatoes", tmp_path / "a")


@pytest.fixture
def loras(prepared: Prepared, tmp_path: Path) -> Path:
    """Two LoRAs of a base model without a head; PEFT has saved the head of one of them."""
    peft = pytest.importorskip("peft")
    for name, kind in (("headed", "SEQ_CLS"), ("headless", None)):  # without a kind of task PEFT saves no head
        torch.manual_seed(1)
        model = load(Path(prepared.model), num_labels=2)
        config = peft.LoraConfig(task_type=kind, r=2, target_modules=["query"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config)
        wrapped.peft_config["default"].task_type = "SEQ_CLS"
        wrapped.save_pretrained(tmp_path / name)
    return tmp_path


def test_a_random_head_is_not_scored(prepared: Prepared, loras: Path, data_folder: Path, run: Any) -> None:
    with pytest.warns(
        UserWarning, match="headless: neither the adapter nor the base model holds a trained 'classifier"
    ):
        result = unify([str(loras / name) for name in ("headed", "headless")], loras / "out")
    assert [row["untrained"] for row in result["adapters"]] == [[], ["classifier.bias", "classifier.weight"]]
    where = ["--model", prepared.model, "--task", "sst2", "--data", data_folder]
    for folder in ("adapters", "mean"):
        code, out, err = run("evaluate", *where, "--adapter", loras / "out" / folder / "headless")
        assert (code, out) == (2, "")
        assert "holds a trained 'classifier.bias': the head would be random" in err
        assert run("evaluate", *where, "--adapter", loras / "out" / folder / "headed")[0] == 0
    for form in ("lora", "delta", "merged"):
        with pytest.raises(InputError, match="the head would be random"):
            export(prepared.model, "sst2", loras / "out/adapters/headless", loras / form, form)  # type: ignore[arg-type]
        assert not (loras / form).exists()
    for name in ("headed", "headless"):  # transformers loads such a folder, and draws what it lacks without a word
        code, _, err = run("evaluate", "--model", loras / name, "--task", "sst2", "--data", data_folder)
        assert (code, "is an adapter of PEFT, not a model" in err) == (2, True)


def test_the_head_of_the_base_model_goes_with_an_adapter_without_one(
    prepared: Prepared, trained: tuple[Path, float], loras: Path
) -> None:
    result = unify([str(loras / "headless")], loras / "out", model=str(trained[0]))
    assert result["adapters"][0]["untrained"] == []
    other = replace(prepared, model=str(trained[0]))
    assert evaluate(other, SETTINGS, loras / "out/adapters/headless")["labels"] == list(WORDS)

"""Combined models on disk: ordinary folders, which share the file with the weights of their encoder."""

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature_tasks import sentences
from miniatures import model_of
from miniatures import tokenizer as tokenizer_of_words
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tinyspan import InputError, StorageError
from tinyspan.workflows.combine.output import INDEX, OWN, SHARED, save_combined
from tinyspan.workflows.models import load_model, tokenizer_of
from tinyspan.workflows.predictor import Predictor
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.runs import evaluate
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task

TASKS = ("sst2", "mnli", "stsb")  # two, three and one output


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(2, 14).view(2, 6)).logits
    return found


def assert_same(again: Any, model: Any) -> None:
    """Compare weights bit for bit; products round differently where a file places them differently in memory."""
    expected, found = dict(model.named_parameters()), dict(again.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-7)


def heads(model_folder: Path, *, tied: bool) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return models of the three tasks with one encoder, their tokenizers, and the names of the encoder's weights."""
    models = {task: load_model(str(model_folder), get_task(task), seed).model for seed, task in enumerate(TASKS)}
    encoder = models["sst2"].bert
    with torch.no_grad():
        for value in encoder.parameters():
            value.mul_(1.5)
    for model in models.values():
        model.bert = encoder if tied else copy.deepcopy(encoder)
    tokenizers = {task: tokenizer_of(str(model_folder), model.config) for task, model in models.items()}
    return models, tokenizers, [f"bert.{name}" for name, _ in encoder.named_parameters()]


def test_one_model(model_folder: Path, tmp_path: Path) -> None:
    models, tokenizers, _ = heads(model_folder, tied=False)
    places = save_combined({"sst2": models["sst2"]}, tokenizers, tmp_path / "out", [])
    assert places == {"sst2": tmp_path / "out/model"}
    again = AutoModelForSequenceClassification.from_pretrained(places["sst2"])
    assert_same(again, models["sst2"])
    assert AutoTokenizer.from_pretrained(places["sst2"]).get_vocab() == tokenizers["sst2"].get_vocab()
    assert not (tmp_path / "out/models").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_several_heads_share_the_file_of_their_encoder(tied: bool, model_folder: Path, tmp_path: Path) -> None:
    models, tokenizers, shared = heads(model_folder, tied=tied)
    places = save_combined(models, tokenizers, tmp_path / "out", shared)
    assert places == {task: tmp_path / "out/models" / task for task in TASKS}
    for task, place in places.items():
        again = AutoModelForSequenceClassification.from_pretrained(place)
        assert_same(again, models[task])
        assert again.config.id2label == models[task].config.id2label
        assert load_model(str(place), get_task(task), 0, need_head=True).drawn == []
        assert AutoTokenizer.from_pretrained(place).get_vocab() == tokenizers[task].get_vocab()
        index = json.loads((place / INDEX).read_text())
        assert {name for name, file in index["weight_map"].items() if file == SHARED} == {*shared}
        assert {name for name, file in index["weight_map"].items() if file == OWN} == {
            "classifier.weight",
            "classifier.bias",
        }
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in models[task].parameters())
        assert not list(place.glob("model.safetensors"))
    assert len({(place / SHARED).stat().st_ino for place in places.values()}) == 1
    assert len({(place / OWN).stat().st_ino for place in places.values()}) == len(TASKS)
    files = [path.stat() for path in (tmp_path / "out").rglob("*.safetensors")]
    on_disk = sum({stat.st_ino: stat.st_size for stat in files}.values())
    encoder = sum(value.nbytes for value in models["sst2"].bert.parameters())
    assert encoder < on_disk < encoder + 20_000  # and not three times as much: the rest is headers and heads
    assert sum(stat.st_size for stat in files) > 3 * encoder
    assert sorted(path.name for path in (tmp_path / "out/models").iterdir()) == sorted(TASKS)


def test_the_folders_are_used_like_any_model(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    models, tokenizers, shared = heads(model_folder, tied=True)
    place = save_combined(models, tokenizers, tmp_path / "out", shared)["sst2"]
    texts = sentences(6, 5)["sentence"].to_list()
    answers = pipeline("text-classification", model=str(place))(texts)
    assert [answer["label"] for answer in answers] == [
        row["prediction"]
        for row in Predictor(str(place), text=["sentence"]).predict([{"sentence": text} for text in texts])
    ]
    rows = prepare(str(place), "sst2", data=data_folder, train=False)
    result = evaluate(rows, Settings(precision="float32"))
    labels = sentences(32, 2)
    expected = pipeline("text-classification", model=str(place))(labels["sentence"].to_list())
    right = [
        answer["label"] == ("negative", "positive")[label]
        for answer, label in zip(expected, labels["label"], strict=True)
    ]
    assert result["score"] == pytest.approx(sum(right) / 32)


def test_copies_where_the_file_system_has_no_links(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    models, tokenizers, shared = heads(model_folder, tied=True)
    places = save_combined(models, tokenizers, tmp_path / "out", shared)
    assert len({(place / SHARED).stat().st_ino for place in places.values()}) == len(TASKS)
    for task, place in places.items():
        again = AutoModelForSequenceClassification.from_pretrained(place)
        assert_same(again, models[task])


def test_tied_weights_stay_in_one_file(tmp_path: Path) -> None:
    """The output matrix of this decoder is its table of embeddings."""
    models = {name: model_of("causal-lm") for name in ("a", "b")}
    torch.nn.init.constant_(models["b"].model.norm.weight, 2.0)
    shared = [name for name, _ in models["a"].named_parameters() if name != "model.norm.weight"]
    tokenizers = dict.fromkeys(models, tokenizer_of_words(encoder_decoder=False))
    for name, place in save_combined(models, tokenizers, tmp_path / "out", shared).items():
        again = AutoModelForCausalLM.from_pretrained(place)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert_same(again, models[name])
        index = json.loads((place / INDEX).read_text())["weight_map"]
        assert {name: file for name, file in index.items() if file == OWN} == {"model.norm.weight": OWN}


def test_what_is_refused(model_folder: Path, tmp_path: Path) -> None:
    models, tokenizers, shared = heads(model_folder, tied=False)
    with torch.no_grad():
        models["stsb"].bert.pooler.dense.bias[0] += 1
    cases: list[tuple[dict[str, Any], dict[str, Any], list[str], str]] = [
        ({}, tokenizers, shared, "at least one model to save, got none"),
        (models, {"sst2": None}, shared, "a tokenizer for each task, got none for 'mnli'"),
        ({"a/b": models["sst2"]}, {"a/b": None}, shared, "can be names of folders, got 'a/b'"),
        (models, tokenizers, [], "names of shared parameters, got none"),
        (models, tokenizers, ["bert.other"], "shared parameter 'bert.other' in every model; that of sst2 has none"),
        (models, tokenizers, ["classifier.weight"], "'classifier.weight' in all models, found different ones for sst2"),
        (models, tokenizers, shared, "'bert.pooler.dense.bias' in all models, found different ones for sst2 and stsb"),
    ]  # fmt: skip
    for given, with_tokenizers, names, message in cases:
        with pytest.raises(InputError, match=message):
            save_combined(given, with_tokenizers, tmp_path / "out", names)
        assert not (tmp_path / "out").exists()
    same = {"a": models["sst2"], "b": models["sst2"]}
    every = [name for name, _ in models["sst2"].named_parameters()]
    with pytest.raises(InputError, match="the model of a has no weights beside the shared ones; save it once"):
        save_combined(same, dict.fromkeys(same), tmp_path / "out", every)
    assert not (tmp_path / "out/models").exists()
    (tmp_path / "out/models").mkdir(parents=True)
    with pytest.raises(InputError, match=r"out/models exists already; choose another output folder"):
        save_combined(models, tokenizers, tmp_path / "out", ["bert.pooler.dense.weight"])


def test_nothing_is_left_of_a_failure(model_folder: Path, tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(errno.ENOSPC, "full")

    models, tokenizers, shared = heads(model_folder, tied=True)
    for given in (models, {"stsb": models["stsb"]}):
        with pytest.raises(StorageError, match="the disk or quota is full"):
            save_combined(given, {**tokenizers, "stsb": Full()}, tmp_path / "out", shared)
        assert not list((tmp_path / "out").rglob("*.safetensors"))
        assert not list((tmp_path / "out").glob("model*"))

"""Predictions for tables: the same as by transformers.pipeline, in every format, and what is refused."""

import csv
import io
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax
from sklearn.metrics import accuracy_score
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tinyspan import InputError, SubspaceModel, TinyspanError
from tinyspan.errors import Interrupted
from tinyspan.io.storage import read_json, write_json
from tinyspan.labels import set_label_names
from tinyspan.workflows import prediction, predictor, streams
from tinyspan.workflows.export import export
from tinyspan.workflows.models import base_model, tokenizer_of
from tinyspan.workflows.prediction import predict_table
from tinyspan.workflows.predictor import Predictor
from tinyspan.workflows.results import stored_task, trained_length
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.runs import record, tune
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.streams import INPUTS, Place, columns_of, open_output, read_chunks
from tinyspan.workflows.tasks import (
    TASKS,
    TYPES,
    Classification,
    MultiLabel,
    Regression,
    TokenClassification,
    get_task,
    register_task,
    register_type,
    task_from_table,
)

SETTINGS = Settings(
    epochs=2, batch_size=4, learning_rate=3e-2, z_learning_rate=3e-2, precision="float32", max_length=16
)
WORDS = ["the film is fine", "a dull story of war", "so", "lovely war again", "flat", "but the film is great love"]
NEW = [f"{WORDS[row % 6]} {WORDS[row * 5 % 6]}" for row in range(11)]  # in no order of length
NAMES = ["billing", "bug", "question"]


def tickets(kind: str, count: int = 12) -> dict[str, Any]:
    """Return a table of labelled rows; the texts differ."""
    texts = [f"{WORDS[row % 6]} {row}" for row in range(count)]
    cells = {
        "classification": [NAMES[row % 3] for row in range(count)],
        "regression": list(np.linspace(0, 100, count)),
        "multi-label": [[["bug", "urgent"], ["bug"], [], ["urgent"]][row % 4] for row in range(count)],
    }
    if kind == "token-classification":
        words = [text.split() for text in texts]
        return {"words": words, "tags": [["O" if len(word) > 3 else "B-A" for word in row] for row in words]}
    rows = {"subject": texts, "label": cells["classification" if kind == "pairs" else kind]}
    return {**rows, "body": [WORDS[row * 5 % 6] for row in range(count)]} if kind == "pairs" else rows


def text_of(kind: str) -> list[str]:
    return {"token-classification": ["words"], "pairs": ["subject", "body"]}.get(kind, ["subject"])


class Tuned:
    """An adapter of a kind, its base model and the exported merged model."""

    def __init__(self, kind: str, model: Path, folder: Path) -> None:
        path = folder / "tickets.parquet"
        pd.DataFrame(tickets(kind)).to_parquet(path)
        label = "tags" if kind == "token-classification" else "label"
        self.task = task_from_table(path, text_of(kind), label, holdout=0.5, labels=NAMES if kind == "pairs" else None)
        self.kind, self.model, self.adapter, self.merged = kind, str(model), folder / "adapter", folder / "merged"
        tune(prepare(self.model, self.task, max_length=16), SETTINGS, "random", self.adapter, rank=2)
        export(self.model, None, self.adapter, self.merged, "merged")

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.model, self.adapter)

    @property
    def rows(self) -> list[dict[str, Any]]:
        if self.kind == "token-classification":
            return [{"words": text.split()} for text in NEW]
        rows = [{"subject": text, "body": WORDS[number % 6]} for number, text in enumerate(NEW)]
        return rows if self.kind == "pairs" else [{"subject": row["subject"]} for row in rows]


@pytest.fixture(scope="module")
def tuned(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Adapters by kind, of a model with large weights, whose predictions differ from row to row."""
    made: dict[str, Tuned] = {}
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("large") / "model")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(10.0 if value.dim() == 2 else 1.0)
    model.save_pretrained(folder)

    def of(kind: str) -> Tuned:
        if kind not in made:
            made[kind] = Tuned(kind, folder, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def column_of(path: Path, name: str) -> list[Any]:
    read = {".csv": pd.read_csv, ".tsv": lambda p: pd.read_csv(p, sep="\t"), ".parquet": pd.read_parquet}
    rows = read[path.suffix](path) if path.suffix in read else pd.read_json(path, lines=True)  # type: ignore[operator]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in rows[name]]


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
def test_an_adapter_without_a_result_is_exported_by_its_type(tuned: Any, tmp_path: Path, kind: str) -> None:
    one = tuned(kind)
    base = base_model(one.model, one.task, 0)
    SubspaceModel.from_pretrained(base, one.adapter).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="give task= or task_type="):
        export(one.model, None, tmp_path / "bare", tmp_path / "out", "merged")
    export(one.model, None, tmp_path / "bare", tmp_path / "out", "merged", task_type=kind)
    merged, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", one.merged))
    assert merged.keys() == stored.keys()
    assert all(torch.equal(value, merged[name]) for name, value in stored.items())
    assert trained_length(AutoConfig.from_pretrained(tmp_path / "out")) is None  # which nothing tells
    sizes = {AutoTokenizer.from_pretrained(folder).model_max_length for folder in (tmp_path / "out", one.model)}
    assert len(sizes) == 1


# -- the same numbers as by transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression", "pairs"])
def test_predictions_are_those_of_the_pipeline_on_the_merged_model(tuned: Any, kind: str) -> None:
    one = tuned(kind)
    long = {"batch_size": 4, "max_length": 32}  # the pipeline does not truncate
    predicted = list(Predictor(one.model, one.adapter, **long).predict(one.rows))
    pipe = pipeline("text-classification", model=str(one.merged), device="cpu")
    inputs = [
        {"text": row["subject"], "text_pair": row["body"]} if kind == "pairs" else row["subject"] for row in one.rows
    ]
    if kind == "regression":
        expected = [answer["score"] for answer in pipe(inputs, function_to_apply="none")]
        assert [answer["prediction"] for answer in predicted] == pytest.approx(expected, rel=1e-5)
        assert 20 < np.mean(expected) < 80  # on the scale of the labels
        assert np.std(expected) > 0.1
        return
    thresholds = read_json(one.adapter / "result.json").get("thresholds", {})
    for answer, scores in zip(predicted, pipe(inputs, top_k=None), strict=True):
        probabilities = {score["label"]: score["score"] for score in scores}
        assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-5)
        best = [name for name in one.task.labels if probabilities[name] >= thresholds.get(name, 0.5)]
        assert answer["prediction"] == (best if kind == "multi-label" else max(probabilities, key=probabilities.get))


def test_tags_are_those_of_the_pipeline_on_the_merged_model(tuned: Any) -> None:
    one = tuned("token-classification")
    predicted = [answer["prediction"] for answer in one.predictor.predict(one.rows)]
    pipe = pipeline("token-classification", model=str(one.merged), device="cpu", ignore_labels=[])
    expected = [[token["entity"] for token in tokens] for tokens in pipe(NEW)]  # each word is one token
    assert predicted == expected
    assert {tag for tags in expected for tag in tags} == {"O", "B-A"}


def test_the_exported_model_predicts_the_same_labels(tuned: Any) -> None:
    """With the thresholds of the adapter, which its config contains."""
    one = tuned("multi-label")
    merged = Predictor(str(one.merged), text=["subject"], max_length=16)
    assert [answer["prediction"] for answer in merged.predict(one.rows)] == [
        answer["prediction"] for answer in one.predictor.predict(one.rows)
    ]
    assert merged.task.thresholds == one.predictor.task.thresholds != ()


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("given", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format(tuned: Any, tmp_path: Path, given: str, output: str) -> None:
    one, source, target = tuned("classification"), tmp_path / f"in.{given}", tmp_path / f"out.{output}"
    rows = pd.DataFrame(
        {"id": [f"00{row}" for row in range(11)], "subject": NEW, "note": ["a,b", 'c"d', "e\tf\ng", ""] * 2 + ["é"] * 3}
    )
    if given == "parquet":
        rows.to_parquet(source)
    elif given == "jsonl":
        rows.to_json(source, orient="records", lines=True)
    else:
        rows.to_csv(source, index=False, sep="\t" if given == "tsv" else ";")
    report = predict_table(one.predictor, source, target)
    assert (report.rows, report.scores) == (11, {})
    options: dict[str, Any] = {"dtype": {"id": str}, "keep_default_na": False, "sep": "\t" if output == "tsv" else ","}
    read = (
        pd.read_parquet(target)
        if output == "parquet"
        else pd.read_csv(target, **options)
        if output != "jsonl"
        else None
    )
    if read is None:
        read = pd.DataFrame(map(json.loads, target.read_text().splitlines()))
    assert [*read] == ["id", "subject", "note", "prediction", *(f"probability_{name}" for name in NAMES)]
    assert read[["id", "subject", "note"]].to_numpy().tolist() == rows.to_numpy().tolist()
    for answer, row in zip(one.predictor.predict(one.rows), read.to_dict("records"), strict=True):
        assert row["prediction"] == answer["prediction"]
        for name, probability in answer["probabilities"].items():
            assert row[f"probability_{name}"] == pytest.approx(probability, rel=1e-9)


def test_columns_that_rows_lack_leave_the_others_as_they_are(tuned: Any, tmp_path: Path) -> None:
    one, source = tuned("classification"), tmp_path / "in.json"
    rows = [{"subject": NEW[0], "id": 2**53 + 1, "note": "n"}, {"subject": NEW[1], "id": 2}, {"subject": NEW[2]}]
    source.write_text(json.dumps(rows))
    for suffix in ("jsonl", "csv"):
        predict_table(one.predictor, source, tmp_path / f"out.{suffix}")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[row.get("id"), row.get("note")] for row in written] == [[2**53 + 1, "n"], [2, None], [None, None]]
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert [line.split(",")[1:3] for line in lines[1:]] == [[str(2**53 + 1), "n"], ["2", ""], ["", ""]]


def test_dates_and_decimals_are_plain_text_in_csv(tuned: Any, tmp_path: Path) -> None:
    one = tuned("classification")
    cells = {
        "subject": NEW[:2],
        "at": pa.array([0, 1], pa.date32()),
        "price": [Decimal("1.50"), None],
        "ok": [True, None],
    }
    pq.write_table(pa.table(cells), tmp_path / "in.parquet")
    predict_table(one.predictor, tmp_path / "in.parquet", tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert [line.split(",")[1:4] for line in lines[1:]] == [["1970-01-01", "1.50", "true"], ["1970-01-02", "", ""]]


def test_an_integer_that_parquet_cannot_hold_is_named(tuned: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"subject": NEW[0], "id": 2**70}))
    with pytest.raises(InputError, match="an integer of more than 64 bits"):
        predict_table(tuned("classification").predictor, source, tmp_path / "out.parquet")


def test_a_model_is_cut_where_it_was_trained(tuned: Any, tmp_path: Path) -> None:
    """An exported model, and the model of a run, longer or shorter than the default of 128 tokens."""
    one = tuned("classification")
    assert AutoConfig.from_pretrained(one.merged).trained_max_length == 16
    assert Predictor(str(one.merged), text=["subject"]).max_length == 16
    longer = shutil.copytree(one.merged, tmp_path / "longer")
    for name, changes in (
        ("config.json", {"trained_max_length": 200, "max_position_embeddings": 256}),
        ("tokenizer_config.json", {"model_max_length": 256}),
    ):
        (longer / name).write_text(json.dumps(json.loads((longer / name).read_text()) | changes))
    assert Predictor(str(longer), text=["subject"]).max_length == 200
    assert Predictor(str(longer), text=["subject"], max_length=20).max_length == 20


@pytest.mark.parametrize(("kind", "separator"), [("multi-label", "|"), ("token-classification", " ")])
def test_several_values_are_lists_or_joined(tuned: Any, tmp_path: Path, kind: str, separator: str) -> None:
    one = tuned(kind)
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, one.rows)))
    answers = [answer["prediction"] for answer in one.predictor.predict(one.rows)]
    for suffix in ("csv", "jsonl", "parquet"):
        target = tmp_path / f"out.{suffix}"
        predict_table(one.predictor, source, target)
        values = column_of(target, "prediction")
        if suffix == "csv":
            values = [str(value).split(separator) if value == value else [] for value in values]
        assert values == answers
    assert pq.read_schema(tmp_path / "out.parquet").field("prediction").type == pa.list_(pa.string())


def test_parquet_columns_keep_their_types(tuned: Any, tmp_path: Path) -> None:
    one = tuned("regression")
    columns = {
        "subject": pa.array(NEW),
        "at": pa.array(range(11), pa.timestamp("ns")),
        "kind": pa.array(["x", "y"] * 5 + [None]).dictionary_encode(),
        "nested": pa.array([{"a": 1, "b": [1.5]}] * 11),
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    predict_table(one.predictor, tmp_path / "in.parquet", tmp_path / "out.parquet")
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.drop_columns(["prediction"]).equals(pa.table(columns))
    assert written.schema.field("prediction").type == pa.float64()


def test_json_lines_with_other_fields_keep_them(tuned: Any, tmp_path: Path) -> None:
    one, source = tuned("regression"), tmp_path / "in.jsonl"
    rows = [
        {"subject": "the film", "n": None},
        {"subject": "so", "n": 3, "more": {"a": [1]}},
        {"n": 2.5, "subject": "war"},
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    for suffix in ("jsonl", "csv", "parquet"):
        predict_table(one.predictor, source, tmp_path / f"out.{suffix}")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in row if name != "prediction"} for row in written] == rows
    assert [[*row][-1] for row in written] == ["prediction"] * 3
    read = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [(row["n"], row["more"]) for row in read] == [("", ""), ("3", '{"a": [1]}'), ("2.5", "")]
    parquet = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["n"], row["more"]) for row in parquet] == [(None, None), (3.0, '{"a": [1]}'), (2.5, None)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_no_rows_in_no_rows_out(tuned: Any, tmp_path: Path, suffix: str) -> None:
    one, source, target = tuned("classification"), tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"subject": pa.array([], pa.string())}), source)
    else:
        source.write_text("subject\n" if suffix == "csv" else "")
    assert predict_table(one.predictor, source, target).rows == 0
    expected = ["subject", "prediction", *(f"probability_{name}" for name in NAMES)]
    if suffix == "parquet":
        assert pq.read_table(target).num_rows == 0
        assert pq.read_schema(target).names == expected
    else:
        assert target.read_text() == (",".join(expected) + "\n" if suffix == "csv" else "")


class Pipe(io.TextIOWrapper):
    """Standard input with this content."""

    def __init__(self, text: str) -> None:
        super().__init__(io.BytesIO(text.encode()))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_standard_input_and_output(
    tuned: Any, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    one = tuned("classification")
    rows = pd.DataFrame(one.rows)
    text = rows.to_csv(index=False) if form == "csv" else rows.to_json(orient="records", lines=True)
    monkeypatch.setattr(sys, "stdin", Pipe(text))
    words = ["--model", one.model, "--adapter", one.adapter]
    code, out, err = run("predict", *words, "--input", "-", "--output", "-", "--format", form)
    assert (code, err) == (0, "11 rows\n")
    source, target = tmp_path / f"in.{form}", tmp_path / f"out.{form}"
    source.write_text(text)
    code, printed, _ = run("predict", *words, "--input", source, "--output", target)
    assert (code, printed, out) == (0, "", target.read_text())


# -- streaming --------------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_and_few_are_held(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of 8 rows and batches of 3, sorted by length, at most 8 rows are tokenized at a time."""
    one, source = tuned("classification"), tmp_path / "in.csv"
    texts = [f"{NEW[row % 11]} {WORDS[row % 5]}" for row in range(45)]
    pd.DataFrame({"n": range(45), "subject": texts}).to_csv(source, index=False)
    expected = [
        answer["probabilities"]["bug"]
        for answer in Predictor(str(one.merged), text=["subject"], max_length=16).predict({"subject": t} for t in texts)
    ]
    held: list[int] = []
    whole = Predictor.answers

    def counted(self: Predictor, rows: pd.DataFrame, *rest: Any) -> Any:
        held.append(len(rows))
        return whole(self, rows, *rest)

    monkeypatch.setattr(Predictor, "answers", counted)
    monkeypatch.setattr(streams.read_chunks, "__defaults__", (8,))
    told: list[int] = []
    predict_table(
        Predictor(one.model, one.adapter, batch_size=3),
        source,
        tmp_path / "out.csv",
        expect=told.append,
        advance=told.append,  # type: ignore[arg-type]
    )
    assert held == [8] * 5 + [5]
    assert (told[0], sum(told[1:])) == (45, 45)
    assert column_of(tmp_path / "out.csv", "n") == list(range(45))
    assert column_of(tmp_path / "out.csv", "probability_bug") == pytest.approx(expected, rel=1e-6)
    assert np.std(expected) > 1e-3


def test_rows_of_an_iterator_are_read_as_they_are_needed(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, read = tuned("classification"), 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal read
        while True:  # without an end
            read += 1
            yield {"subject": "the film"}

    monkeypatch.setattr(predictor, "CHUNK", 4)
    answers = one.predictor.predict(rows())
    assert [next(answers)["prediction"] for _ in range(3)] == [next(answers)["prediction"]] * 3
    assert read == 4


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression", "token-classification"])
def test_labels_are_scored_as_by_evaluate(tuned: Any, tmp_path: Path, kind: str) -> None:
    one = tuned(kind)
    held_out = read_json(one.adapter / "result.json")
    source = one.adapter.parent / "tickets.parquet"
    rows = pd.read_parquet(source).iloc[held_out["data"]["held_out_rows"]]
    rows.to_parquet(tmp_path / "in.parquet")
    report = predict_table(
        Predictor(one.model, one.adapter, batch_size=2), tmp_path / "in.parquet", tmp_path / "out.parquet"
    )
    assert report.metric == held_out["metric"]
    assert next(iter(report.scores)) == report.metric
    close = 5e-3 if kind == "regression" else 1e-5  # the predictions are about 50, and differ by little
    assert report.scores == pytest.approx({held_out["metric"]: held_out["score"], **held_out["metrics"]}, abs=close)


def test_a_score_on_the_command_line(tuned: Any, tmp_path: Path, run: Any) -> None:
    one, source, target = tuned("classification"), tmp_path / "in.csv", tmp_path / "out.csv"
    names = [NAMES[row % 2] for row in range(11)]
    pd.DataFrame({"subject": NEW, "team": names}).to_csv(source, index=False)
    words = ["predict", "--model", one.model, "--adapter", one.adapter, "-i", source, "-o", target]
    code, out, err = run(*words, "--label", "team")
    assert (code, out) == (0, ""), err
    assert err.startswith(f"11 rows, accuracy {accuracy_score(names, column_of(target, 'prediction')):.4f}, balanced_")
    target.unlink()
    pd.DataFrame({"subject": NEW, "label": ["praise", *names[1:]]}).to_csv(source, index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = run(*words)
    assert (code, "11 rows: " in err, target.is_file()) == (0, True, True)
    assert "warning: the predictions are not scored: validation rows of" in err
    assert "row 0 (counted from 0) has the label 'praise'" in err
    code, _, err = run(*words, "--label", "label", "--overwrite")
    assert (code, "row 0 (counted from 0) has the label 'praise'" in err) == (2, True)


def test_few_rows_with_many_labels_are_scored(model_folder: Path, tmp_path: Path) -> None:
    names = [f"intent {number:02}" for number in range(60)]
    save(model_folder, Classification("intents", ("t",), tuple(names)), tmp_path / "m")
    pd.DataFrame({"t": WORDS * 9, "y": names[:54]}).to_csv(tmp_path / "in.csv", index=False)
    report = predict_table(
        Predictor(str(tmp_path / "m"), text=["t"]), tmp_path / "in.csv", tmp_path / "out.csv", label=["y"]
    )
    assert 0 <= report.scores["accuracy"] < 0.2


def test_a_registered_task_has_numbered_labels(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """The outputs of the head have another order than the task's labels, and the rows have the task's numbers."""
    save(model_folder, get_task("sst2"), tmp_path / "m", ("POSITIVE", "NEGATIVE"))
    rows = pd.read_parquet(data_folder / "train.parquet").sort_values("label")[24:]  # 8 of them negative, 32 positive
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.to_parquet(tmp_path / "rows.parquet")
    one = Predictor(str(tmp_path / "m"), task="sst2")
    assert one.numbered(pd.DataFrame({"label": [0, 1, 1]}, dtype=object), "a").tolist() == [1, 0, 0]
    for path in (tmp_path / "rows.csv", tmp_path / "rows.parquet"):
        target = tmp_path / f"out{path.suffix}"
        report = predict_table(one, path, target)
        predicted = [int(name == "POSITIVE") for name in column_of(target, "prediction")]
        right = accuracy_score(column_of(target, "label"), predicted)
        assert report.scores["accuracy"] == pytest.approx(right) != 0.5


def test_rows_of_later_chunks_have_their_own_labels(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, texts = tuned("classification"), [f"{NEW[row % 11]} {WORDS[row % 5]}" for row in range(20)]
    predicted = [answer["prediction"] for answer in one.predictor.predict({"subject": text} for text in texts)]
    assert len({*predicted}) > 1
    wrong = [NAMES[(NAMES.index(name) + 1) % 3] for name in predicted]
    rows = pd.DataFrame({"subject": texts, "team": predicted[:13] + wrong[13:]})
    rows.to_csv(tmp_path / "in.csv", index=False)
    monkeypatch.setattr(streams.read_chunks, "__defaults__", (8,))
    report = predict_table(one.predictor, tmp_path / "in.csv", tmp_path / "out.csv", label=["team"])
    assert report.scores["accuracy"] == 13 / 20
    monkeypatch.setattr(sys, "stdin", Pipe(rows.to_csv(index=False)))
    report = predict_table(one.predictor, "-", tmp_path / "streamed.csv", label=["team"])
    assert report.scores["accuracy"] == 13 / 20


def test_a_table_may_spell_the_labels_otherwise(model_folder: Path, tmp_path: Path) -> None:
    save(model_folder, Classification("moods", ("t",), ("NEG", "POS")), tmp_path / "m")
    one = Predictor(str(tmp_path / "m"), text=["t"])
    assert one.numbered(pd.DataFrame({"y": ["positive", "neg"]}), "the rows").tolist() == [1, 0]


def test_a_registered_regression_predicts_in_the_units_of_its_labels(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained head has these units already, whatever scale the task is trained with."""
    monkeypatch.setattr(TASKS, "_entries", {**TASKS})
    register_task(Regression("stars", ("t",), ("stars",), scale=(50.0, 20.0)))
    save(model_folder, Regression("plain", ("t",), ("stars",)), tmp_path / "m")
    one, other = Predictor(str(tmp_path / "m"), text=["t"]), Predictor(str(tmp_path / "m"), task="stars")
    assert list(other.predict([{"t": "the film"}])) == list(one.predict([{"t": "the film"}]))
    scored = other.answers(pd.DataFrame({"t": ["the film"]}), pd.Series([55.0])).scored
    assert other.task.truths(scored[0][1], other.labels) == [55.0]


# -- where the task comes from ----------------------------------------------------------------------------------------


def save(model_folder: Path, task: Any, folder: Path, names: Sequence[str] = ()) -> None:
    """Save a model with a head that is not trained, for a task."""
    model = base_model(str(model_folder), task, 0)
    if names:
        set_label_names(model, names)
    model.save_pretrained(folder)
    tokenizer_of(str(model_folder), model.config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("task", "kind", "labels"),
    [
        (Classification("a", ("t",), ("no", "yes")), "classification", ("no", "yes")),
        (Classification("a", ("t",), ("LABEL_0", "LABEL_1")), "classification", ("LABEL_0", "LABEL_1")),
        (Regression("a", ("t",), ("stars",)), "regression", ("stars",)),
        (MultiLabel("a", ("t",), ("bug", "urgent")), "multi-label", ("bug", "urgent")),
        (TokenClassification("a", ("t",), ("DET", "NOUN"), "token_accuracy"), "token-classification", ("DET", "NOUN")),
    ],
)
def test_a_plain_model_describes_its_task(
    model_folder: Path, tmp_path: Path, task: Any, kind: str, labels: Any
) -> None:
    save(model_folder, task, tmp_path / "m")
    one = Predictor(str(tmp_path / "m"), text=["t"])
    assert (one.task.type, one.labels, one.task.columns) == (kind, labels, ("t",))
    assert len(list(one.predict([{"t": "the film"}]))) == 1
    with pytest.raises(InputError, match="does not tell which column has the text, or which two: give text="):
        Predictor(str(tmp_path / "m"))


def test_a_recorded_run_is_a_model(model_folder: Path, tmp_path: Path, run: Any) -> None:
    path = tmp_path / "tickets.parquet"
    pd.DataFrame(tickets("classification")).to_parquet(path)
    task = task_from_table(path, "subject", "label", holdout=0.5)
    record(prepare(str(model_folder), task, max_length=16), SETTINGS, tmp_path / "run")
    by_run = Predictor(str(tmp_path / "run"))
    assert (by_run.max_length, by_run.task.columns, by_run.label_columns) == (16, ("subject",), ("label",))
    rows = [{"subject": text} for text in NEW]
    by_model = Predictor(str(tmp_path / "run/model"), text=["subject"], max_length=16)
    assert list(by_run.predict(rows)) == list(by_model.predict(rows))
    (tmp_path / "run/model").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"is a trajectory without a fine-tuned model/ and result\.json"):
        Predictor(str(tmp_path / "run"))


def test_a_stored_task_is_the_one_of_the_table(tmp_path: Path) -> None:
    """Its name may be that of a registered task, and its tags may be no entities."""
    result = {"task": "cola", "type": "token-classification", "labels": ["DET", "NOUN"], "metric": "token_accuracy"}
    source = predictor._Run(tmp_path, {**result, "data": {"text": ["words"], "label": ["tags"]}})
    task = stored_task(source)
    assert (task.type, task.columns, task.metric) == ("token-classification", ("words",), "token_accuracy")
    assert stored_task(predictor._Run(tmp_path, result)).type == "classification"


def test_thresholds_of_a_multi_label_task(tuned: Any, tmp_path: Path) -> None:
    one = tuned("multi-label")
    folder = shutil.copytree(one.adapter, tmp_path / "adapter")
    manifest = read_json(folder / "manifest.json")
    result = {**read_json(folder / "result.json"), "thresholds": {"bug": 1 - 1e-6, "urgent": 1e-6}}
    write_json(folder / "result.json", result)
    manifest["attached"] = {}
    write_json(folder / "manifest.json", manifest)
    assert [answer["prediction"] for answer in Predictor(one.model, folder).predict(one.rows)] == [["urgent"]] * 11


def test_thresholds_in_the_config_of_a_model(model_folder: Path, tmp_path: Path) -> None:
    """The config is saved with sorted keys, and the outputs have another order."""
    task = MultiLabel("a", ("t",), ("urgent", "bug"))
    save(model_folder, task, tmp_path / "m")
    config = read_json(tmp_path / "m/config.json", sealed=False)
    for other, expected in (("urgent", ["urgent"]), ("bug", ["bug"])):
        thresholds = {name: 1e-6 if name == other else 1 - 1e-6 for name in ("bug", "urgent")}
        (tmp_path / "m/config.json").write_text(json.dumps({**config, "label_thresholds": thresholds}))
        (answer,) = Predictor(str(tmp_path / "m"), text=["t"]).predict([{"t": "the film"}])
        assert (answer["prediction"], [*answer["probabilities"]]) == (expected, ["urgent", "bug"])


@dataclass(frozen=True)
class Cautious(Classification):
    """A classification that predicts the first label whose probability reaches its threshold, without probabilities."""

    thresholds: tuple[float, ...] = ()

    has_probabilities: ClassVar[bool] = False

    def with_thresholds(self, thresholds: Sequence[float]) -> "Cautious":
        return replace(self, thresholds=tuple(thresholds))

    def answers(self, predictions: Any, labels: Any, outputs: Sequence[str]) -> list[dict[str, Any]]:
        likely = softmax(predictions, axis=-1) >= np.array(self.thresholds or [0.5] * len(outputs))
        return [{"prediction": outputs[row.argmax()]} for row in likely]


def test_a_type_of_ones_own_without_probabilities_keeps_its_thresholds(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for registry in (TASKS, TYPES):
        monkeypatch.setattr(registry, "_entries", {**registry})
    register_type("cautious")(Cautious)
    register_task(Cautious("teams", ("t",), ("billing", "bug")))
    save(model_folder, get_task("teams"), tmp_path / "m")
    (tmp_path / "in.csv").write_text("t\nthe film\n")
    config = read_json(tmp_path / "m/config.json", sealed=False)
    for expected, other in (("bug", "billing"), ("billing", "bug")):
        thresholds = {expected: 1e-6, other: 1 - 1e-6}
        (tmp_path / "m/config.json").write_text(json.dumps({**config, "label_thresholds": thresholds}))
        one = Predictor(str(tmp_path / "m"), task="teams")
        predict_table(one, tmp_path / "in.csv", tmp_path / "out.csv", overwrite=True)
        assert (tmp_path / "out.csv").read_text().splitlines() == ["t,prediction", f"the film,{expected}"]


def test_an_adapter_without_a_result_needs_the_task(tuned: Any, tmp_path: Path) -> None:
    one = tuned("classification")
    folder = shutil.copytree(one.adapter, tmp_path / "adapter")
    manifest = read_json(folder / "manifest.json")
    manifest["attached"] = {}
    write_json(folder / "manifest.json", manifest)
    (folder / "result.json").unlink()
    with pytest.raises(InputError, match=r"has no result\.json that names its task: give task= or task_type="):
        Predictor(one.model, folder)
    again = Predictor(one.model, folder, task_type="classification", text=["subject"])
    assert list(again.predict(one.rows)) == list(one.predictor.predict(one.rows))


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
def test_predictions_of_a_damaged_model_are_an_error(tuned: Any, kind: str) -> None:
    one = tuned(kind)
    damaged = Predictor(str(one.merged), text=text_of(kind))
    network: Any = damaged.network
    with torch.no_grad():
        network.classifier.bias[0] = float("nan")
    with pytest.raises(TinyspanError, match="computes NaN or infinite numbers for a row"):
        list(damaged.predict(one.rows))


# -- words and tokens -------------------------------------------------------------------------------------------------


def test_truncated_words_have_no_tag_and_words_without_a_token_none(tuned: Any, tmp_path: Path) -> None:
    one = tuned("token-classification")
    rows = [
        ["the", "film", "is", "fine"],
        ["so", "\u200d", "war"],
        ["a", "dull", "story", "of", "love"],
        ["war", "\u200d"],
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps({"words": words, "tags": ["O"] * len(words)}) for words in rows))
    limited = Predictor(one.model, one.adapter, max_length=5)  # three words between two special tokens
    with pytest.warns(UserWarning, match="2 of 4 rows have more than 5 tokens; their last words have no tag"):
        report = predict_table(limited, source, tmp_path / "out.csv")
    assert report.truncated == 2
    lines = [row.split(" ") for row in column_of(tmp_path / "out.csv", "prediction")]
    assert [len(tags) for tags in lines] == [3, 3, 3, 2]
    assert [tags.index("_") for tags in lines if "_" in tags] == [1, 1]
    whole = [answer["prediction"] for answer in one.predictor.predict({"words": row} for row in rows)]
    assert [len(tags) for tags in whole] == [4, 3, 5, 2]
    scored = [tag for tags in lines for tag in tags if tag != "_"]
    assert report.scores["token_accuracy"] == pytest.approx(scored.count("O") / 9)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "subjekt,n\nx,1\n", r"a\.csv: no column 'subject'; found subjekt, n"),
        ("a.csv", "", r"a\.csv: no column 'subject'; found none"),
        ("a.csv", "subject,n,n\nx,1,2\n", r"a\.csv: the header names the column 'n' 2 times"),
        ("a.csv", "subject,n\nx,1\ny\n", r"a\.csv, line 3: expected as many fields as in the header \(2\), found 1"),
        ("a.csv", "subject,prediction\nx,1\n", r"a\.csv has a column 'prediction', which the output adds; rename it"),
        ("a.csv", "subject,probability_bug\nx,1\n", "has a column 'probability_bug'"),
        ("a.jsonl", '{"subject": "x"}\n{"subject": null}\n', r"a\.jsonl, line 2: nothing in 'subject'"),
        ("a.csv", 'subject\nx\n"  "\n', r"a\.csv, line 3: no text in subject; remove the row"),
        ("a.jsonl", '{"subject": "x"}\n{"text": "y"}\n', r"a\.jsonl, line 2: no column 'subject'; found text"),
        ("a.jsonl", '{"subject": "x"}\n["y"]\n', r"a\.jsonl cannot be read: line 2: expected an object"),
        ("a.jsonl", '{"subject": "x"', r"a\.jsonl cannot be read: line 1: "),
        ("a.parquet", "subject", r"a\.parquet cannot be read: "),
        ("a.xlsx", "", r"a\.xlsx has an unknown suffix; expected one of \.csv, \.tsv, \.jsonl, \.parquet"),
        ("b.csv", None, r"the input file .*b\.csv does not exist"),
    ],
)
def test_wrong_inputs(tuned: Any, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    one, target = tuned("classification"), tmp_path / "out.csv"
    if content is not None:
        (tmp_path / name).write_text(content)
    before = {*tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        predict_table(one.predictor, tmp_path / name, target)
    assert {*tmp_path.iterdir()} == before


def test_a_missing_text_in_parquet(tuned: Any, tmp_path: Path, run: Any) -> None:
    one = tuned("classification")
    pd.DataFrame({"subject": ["x", "y", None]}).to_parquet(tmp_path / "in.parquet")
    words = ["--model", one.model, "--adapter", one.adapter, "--input", tmp_path / "in.parquet"]
    code, out, err = run("predict", *words, "--output", tmp_path / "out.csv")
    assert (code, out, (tmp_path / "out.csv").exists()) == (2, "", False)
    assert "in.parquet, row 2 (counted from 0): nothing in 'subject'" in err
    pd.DataFrame({"words": [["x"], []]}).to_parquet(tmp_path / "in.parquet")
    other = tuned("token-classification")
    with pytest.raises(InputError, match=r"in\.parquet, row 1 \(counted from 0\): no words in 'words'"):
        predict_table(other.predictor, tmp_path / "in.parquet", tmp_path / "out.csv")


def test_outputs_are_protected(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, source, target = tuned("classification"), tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("subject\nthe film\n")
    target.write_text("mine")
    once = one.predictor
    with pytest.raises(InputError, match=r"out\.csv exists already; choose another output file or pass overwrite=True"):
        predict_table(once, source, target)
    with pytest.raises(InputError, match=r"in\.csv is the input and the output"):
        predict_table(once, source, source, overwrite=True)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="is a folder; expected a file"):
        predict_table(once, source, tmp_path / "folder.csv", overwrite=True)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    names = {path.name for path in tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(prediction, "_values", stop)  # after the output is opened
        with pytest.raises(Interrupted, match="is not written; repeat the command"):
            predict_table(once, source, target, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert target.read_text() == "mine"
    predict_table(once, source, target, overwrite=True)
    assert target.read_text().startswith("subject,prediction,probability_billing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst2"}, "was trained for tickets|labels billing, bug, question, and sst2 has the labels"),
        ({"task": "sst2", "task_type": "regression"}, "and not both"),
        ({"text": ["a", "b"]}, "has the text columns subject, got a, b; expected as many"),
        ({"task_type": "seq2seq", "text": ["a"]}, "'seq2seq' is not a type of labelled rows"),
    ],
)
def test_tasks_that_do_not_fit(tuned: Any, options: dict[str, Any], message: str) -> None:
    one = tuned("classification")
    with pytest.raises(InputError, match=message):
        list(Predictor(one.model, one.adapter, **options).predict([{"sentence": "x", "a": "y", "b": "z"}]))


def test_models_without_a_head_are_refused(model_folder: Path, tuned: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is BertModel, which has no head for labelled rows"):
        Predictor(str(model_folder), text=["t"])
    with pytest.raises(InputError, match="has no trained head"):
        list(Predictor(str(model_folder), text=["t"], task_type="classification").predict([{"t": "x"}]))
    one = tuned("classification")
    with pytest.raises(InputError, match="unknown format 'xml' of a standard stream; expected csv or tsv or jsonl"):
        predict_table(one.predictor, "-", tmp_path / "out.csv", stream_format="xml")


def test_autocast(tuned: Any) -> None:
    one = tuned("regression")
    exact, rounded = (
        [answer["prediction"] for answer in Predictor(one.model, one.adapter, precision=precision).predict(one.rows)]
        for precision in ("float32", "bfloat16")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.1)


def test_the_merged_model_predicts_the_same_by_itself(tuned: Any) -> None:
    one = tuned("classification")
    model = AutoModelForSequenceClassification.from_pretrained(one.merged).eval()
    batch = Predictor(str(one.merged), text=["subject"])._encoding.tokenizer(NEW, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits.softmax(-1)
    found = [
        [*answer["probabilities"].values()] for answer in Predictor(str(one.merged), text=["subject"]).predict(one.rows)
    ]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.json",
            '[{"t": "a film", "n": 1}, {"t": "a story", "n": 2}]',
            [{"t": "a film", "n": 1}, {"t": "a story", "n": 2}],
        ),
        ("a.conll", "EU B-ORG\nrejects O\n\nPeter B-PER\n", [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}]),
    ],
)
def test_files_that_are_read_whole(tmp_path: Path, name: str, text: str, expected: list[dict[str, Any]]) -> None:
    (tmp_path / name).write_text(text)
    wanted = [next(iter(expected[0]))]
    (chunk,) = read_chunks(Place.of(tmp_path / name, formats=INPUTS), wanted)
    assert chunk.rows[: len(expected)] == expected
    assert chunk.places[0] == "row 0 (counted from 0)"
    with pytest.raises(InputError, match="no column 'x'"):
        list(read_chunks(Place.of(tmp_path / name, formats=INPUTS), ["x"]))
    with pytest.raises(InputError, match="has an unknown suffix"):
        Place.of(tmp_path / name)


def copied(source: Path, target: Path) -> Path:
    """Write the rows of a table with a further column."""
    columns = columns_of(read_chunks(Place.of(source), []), Place.of(target))
    with open_output(Place.of(target), {"n": pa.int64()}, columns) as writer:
        for chunk in read_chunks(Place.of(source), []):
            writer.write(chunk, {"n": range(len(chunk.rows))})
    return target


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_carriage_return_in_a_cell_ends_no_row(tmp_path: Path, suffix: str) -> None:
    rows = [{"t": "a\rb", "u": ""}, {"t": "c", "u": "\r"}, {"t": "d", "u": "e\r\nf"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (chunk,) = read_chunks(Place.of(copied(tmp_path / "in.jsonl", tmp_path / f"out.{suffix}")), ["t"])
    assert chunk.rows == [{**row, "n": str(number)} for number, row in enumerate(rows)]


def test_a_parquet_file_keeps_what_it_says_of_its_columns(tmp_path: Path) -> None:
    """Such as the index of pandas, and the names of labels of the library datasets."""
    rows = pd.DataFrame({"t": ["a", "b"]}, index=pd.Index([7, 9], name="id"))
    table = pa.Table.from_pandas(rows)
    metadata = {**table.schema.metadata, b"huggingface": b"{}"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "in.parquet")
    written = copied(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert pq.read_schema(written).metadata == metadata
    pd.testing.assert_frame_equal(pd.read_parquet(written), rows.assign(n=[0, 1]))

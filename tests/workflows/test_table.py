"""A user's own table: columns, inferred types, held-out rows, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tinyspan import InputError, SubspaceModel, by_pattern, random_basis
from tinyspan.io.storage import read_json
from tinyspan.workflows import training
from tinyspan.workflows.checks import check_adapted
from tinyspan.workflows.export import export
from tinyspan.workflows.heads import has_bias, output_layer, rescale_outputs
from tinyspan.workflows.models import base_model, tokenizer_of, trained_labels, trained_type
from tinyspan.workflows.results import stored_task
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.runs import evaluate, record, tune
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import Classification, MultiLabel, Regression, TokenClassification, task_from_table
from tinyspan.workflows.tasks.cells import as_flags, as_names
from tinyspan.workflows.tasks.table import infer_type
from tinyspan.workflows.training import fine_tune, run_of, score

SETTINGS = Settings(epochs=1, batch_size=4, learning_rate=1e-3, precision="float32", max_length=16)
WORDS = ["the film is fine", "a dull story", "so and so", "lovely war", "flat again", "but the film"]


def table(folder: Path, columns: dict[str, Any], name: str = "tickets.csv", **options: Any) -> Path:
    """Write a table, by default of ten rows per word, so that texts differ."""
    rows = pd.DataFrame(columns)
    path = folder / name
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_csv(path, index=False, **options)
    return path


def texts(count: int) -> list[str]:
    return [f"{WORDS[row % len(WORDS)]} {row}" for row in range(count)]


def labels_of(task: Any, split: Any) -> list[Any]:
    return task.read(split)["label"].tolist()


@pytest.mark.parametrize(
    ("cells", "kind", "labels"),
    [
        (["billing", "bug", "billing", "bug"], Classification, ("billing", "bug")),
        ([True, False, True, False], Classification, ("false", "true")),
        ([10, 20, 10, 20], Classification, ("10", "20")),
        ([2, 10, 2, 10], Classification, ("2", "10")),
        ([0.5, 30.25, 1.0, 4.0], Regression, ("category",)),
        ([["a", "b"], ["b"], [], ["a"]], MultiLabel, ("a", "b")),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_the_type_is_inferred_from_the_labels(tmp_path: Path, cells: Any, kind: Any, labels: Any, suffix: str) -> None:
    if suffix == "csv" and isinstance(cells[0], list):
        pytest.skip("a CSV file has no lists")
    path, told = table(tmp_path, {"t": texts(12), "category": cells * 3}, f"tickets.{suffix}"), []
    task = task_from_table(path, "t", "category", holdout=0.5, say=told.append)
    assert (type(task), task.labels, task.name) == (kind, labels if suffix != "csv" else task.labels, "tickets")
    assert {name.lower() for name in task.labels} == {*labels}
    assert len(task.read("train")) == len(task.read("validation")) == 6
    assert f"tickets: {task.type} (inferred from 'category'; task_type= decides)" in told[0]
    assert "6 train and 6 validation rows" in told[0]


def test_many_whole_numbers_are_a_regression() -> None:
    for count, different, kind in (
        (1000, 20, "classification"),
        (1000, 21, "regression"),
        (50, 10, "classification"),
        (49, 10, "regression"),
        (10, 5, "classification"),  # so few are classes whatever the number of rows
        (10, 6, "regression"),
    ):
        rows = pd.DataFrame({"t": texts(count), "label": [row % different for row in range(count)]})
        assert infer_type(rows, ["t"], ["label"]) == kind


def test_cells_as_names_and_as_flags() -> None:
    assert as_names(pd.Series([3.0, 1.0, 2.5]), "a").tolist() == ["3", "1", "2.5"]
    flags = pd.DataFrame(
        {"a": ["Yes", "no", "1"], "b": [True, False, False], "c": [1.0, 0.0, 0.0], "d": ["0.0", "1.0", "0"]}
    )
    assert as_flags(flags, "a").tolist() == [["a", "b", "c"], ["d"], ["a"]]


def test_one_of_two_texts_may_be_empty(tmp_path: Path) -> None:
    path = table(tmp_path, {"t": texts(4), "u": ["", *texts(3)], "y": ["a", "b"] * 2}, "a.jsonl")
    task = task_from_table(path, "t,u", "y", holdout=0.5)
    assert len(task.read("train")) + len(task.read("validation")) == 4


def test_a_regression_is_scaled_by_the_mean_and_standard_deviation_of_its_training_labels() -> None:
    rows: Any = {"train": pd.DataFrame({"t": ["a", "b"], "y": [1, 5]}), "validation": pd.DataFrame({"y": [9]})}
    assert Regression.from_columns("a", ("t",), ("y",), rows)[0].scale == (3.0, 2.0)


def test_the_labels_of_each_row_are_those_of_the_table(tmp_path: Path) -> None:
    cells = ["bug", "billing", "bug", "question"] * 5
    path = table(tmp_path, {"t": texts(20), "team": cells}, sep=";")
    task = task_from_table(path, "t", "team", holdout=0.4)
    for split in ("train", "validation"):
        rows = task.read(split)  # type: ignore[arg-type]
        assert [task.labels[number] for number in rows["label"]] == [cells[row] for row in rows.index]
        assert rows["t"].tolist() == [texts(20)[row] for row in rows.index]
    train, held_out = (set(task.read(split).index) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert train | held_out == set(range(20))
    assert not train & held_out
    counts = pd.Series(labels_of(task, "validation")).value_counts().to_dict()
    assert counts == {0: 2, 1: 4, 2: 2}  # stratified: two fifths of 5, 10 and 5
    again = task_from_table(path, "t", "team", holdout=0.4)
    assert set(again.read("validation").index) == held_out


def test_several_columns_are_several_labels(tmp_path: Path) -> None:
    path = table(tmp_path, {"t": texts(8), "bug": [1, 0] * 4, "urgent": ["true", "false", "false", "true"] * 2})
    task = task_from_table(path, "t", "bug,urgent", holdout=0.5)
    rows = pd.concat([task.read("train"), task.read("validation")]).sort_index()
    assert rows["label"].tolist() == [[0, 1], [], [0], [1]] * 2
    assert (task.type, task.labels) == ("multi-label", ("bug", "urgent"))
    assert task_from_table(path, "t", "urgent,bug", holdout=0.5).labels == ("urgent", "bug")  # in the order given
    separated = table(tmp_path, {"t": texts(8), "tags": ["bug|urgent", "", "bug", "urgent "] * 2}, "tags.csv")
    task = task_from_table(separated, "t", "tags", holdout=0.5, task_type="multi-label")
    rows = pd.concat([task.read("train"), task.read("validation")]).sort_index()
    assert rows["label"].tolist() == [[0, 1], [], [0], [1]] * 2


def test_tokens_and_tags(tmp_path: Path) -> None:
    lines = ["-DOCSTART- -X- O O", "", "EU NNP B-NP B-ORG", "rejects VBZ B-VP O", "", "Peter NNP B-NP B-PER"]
    (tmp_path / "names.conll").write_text("\n".join([*lines, "Blackburn NNP I-NP I-PER", "", *lines]) + "\n")
    task = task_from_table(tmp_path / "names.conll", "tokens", "tags", holdout=0.5)
    assert (type(task), task.labels) == (TokenClassification, ("B-ORG", "B-PER", "I-PER", "O"))
    rows = pd.concat([task.read("train"), task.read("validation")]).sort_index()
    assert rows["tokens"].tolist()[:2] == [["EU", "rejects"], ["Peter", "Blackburn"]]
    assert rows["label"].tolist()[:2] == [[0, 3], [1, 2]]
    path = table(tmp_path, {"w": [["a", "film"]] * 4, "t": [["DET", "NOUN"]] * 4}, "parts.jsonl")
    with pytest.warns(UserWarning, match="2 of 2 held-out rows have a text that is also in the training rows"):
        assert task_from_table(path, "w", "t", holdout=0.5).metric == "token_accuracy"


def test_first_tokens_of_words_have_the_tags(model_folder: Path, tmp_path: Path) -> None:
    rows = {"w": [["the", "film"], ["a", "unbelievable", "story"]] * 2, "t": [["O", "B-A"], ["O", "B-A", "I-A"]] * 2}
    task = task_from_table(table(tmp_path, rows, "parts.jsonl"), "w", "t", holdout=0.5)
    prepared = prepare(str(model_folder), task, max_length=16)
    for row in prepared.validation:
        words = prepared.tokenizer.convert_ids_to_tokens(row["input_ids"])
        tags = [task.labels[label] if label >= 0 else None for label in row["labels"]]
        assert (words[0], tags[0], words[-1], tags[-1]) == ("[CLS]", None, "[SEP]", None)
        assert [tag for tag in tags if tag] in (["O", "B-A"], ["O", "B-A", "I-A"])


def test_names_in_parquet_files_of_datasets(tmp_path: Path) -> None:
    features = datasets.Features({"t": datasets.Value("string"), "y": datasets.ClassLabel(names=["ham", "spam", "ad"])})
    rows = datasets.Dataset.from_dict({"t": texts(8), "y": [0, 1] * 4}, features=features)
    rows.to_parquet(tmp_path / "mail.parquet")
    task = task_from_table(tmp_path / "mail.parquet", "t", "y", holdout=0.5)
    assert task.labels == ("ham", "spam", "ad")  # the order of the file, with a label that no row has
    assert sorted(labels_of(task, "validation")) == [0, 0, 1, 1]


def test_a_number_without_a_name_is_no_label(tmp_path: Path) -> None:
    """The library datasets numbers rows without a label -1, which is not the last label."""
    features = datasets.Features({"t": datasets.Value("string"), "y": datasets.ClassLabel(names=["ham", "spam"])})
    rows = datasets.Dataset.from_dict({"t": texts(4), "y": [0, 1, -1, 0]}, features=features)
    rows.to_parquet(tmp_path / "mail.parquet")
    with pytest.raises(InputError, match=r"row 0 \(counted from 0\) has 'ham', row 2 has -1"):
        task_from_table(tmp_path / "mail.parquet", "t", "y", holdout=0.5)


def test_every_version_holds_out_the_same_rows(tmp_path: Path) -> None:
    task = task_from_table(table(tmp_path, {"t": texts(12), "y": ["a", "b"] * 6}), "t", "y", holdout=0.25)
    assert task.read("validation").index.tolist() == [1, 2, 11]


def test_a_folder_and_the_hub_have_their_own_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path, {"t": texts(8), "y": ["a", "b"] * 4}, "train.csv")
    rest = texts(12)[8:]
    table(tmp_path, {"t": rest, "y": ["a", "b"] * 2}, "validation.csv")
    task = task_from_table(tmp_path, "t", "y")
    assert (len(task.read("train")), task.read("validation")["t"].tolist()) == (8, rest)
    with pytest.raises(InputError, match="has validation rows; leave out the share of rows to hold out"):
        task_from_table(tmp_path, "t", "y", holdout=0.5)
    splits = {split: datasets.Dataset.from_csv(str(tmp_path / f"{split}.csv")) for split in ("train", "validation")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(splits))
    task = task_from_table("owner/mail", "t", "y")
    assert (task.name, len(task.read("train")), task.labels) == ("mail", 8, ("a", "b"))
    del splits["train"]
    assert len(task_from_table("owner/mail", "t", "y", train=False).read("validation")) == 4
    with pytest.raises(InputError, match="the data set owner/mail has no split 'train'; found validation"):
        task_from_table("owner/mail", "t", "y")
    (tmp_path / "validation.csv").unlink()
    assert len(task_from_table(tmp_path, "t", "y", holdout=0.25).read("validation")) == 2


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"] * 4, "y": ["a", "b"] * 2}, {}, r"tickets\.csv: no column 't'; found text, y"),
        ({"t": texts(4), "label_": ["a", "b"] * 2, "x": 1}, {"label": "label"}, r"no column 'label'; found label_, "),
        ({"t": texts(4), "y": ["a"] * 4}, {}, "all 4 rows have the label 'a' in 'y'"),
        ({"t": texts(5), "y": ["a", "b", "a", "b", "c"]}, {}, r"'c' has only row 4 \(counted from 0\)"),
        (
            {"t": ["a", " ", "b", ""], "y": ["a", "b"] * 2},
            {},
            r"row 1 \(.*\) has no text in 't' \(such rows: 2\); remove them",
        ),
        ({"t": texts(4), "y": ["a", None, "b", "a"]}, {}, r"row 1 \(counted from 0\) has no label in 'y'"),
        ({"t": texts(60), "y": texts(60)}, {"task_type": "classification"}, "probably a text column"),
        ({"t": texts(4), "y": ["1.5", "two", "3", "4"]}, {"task_type": "regression"}, "expected a real number in 'y'"),
        ({"t": texts(4), "y": [3.0] * 4}, {"task_type": "regression"}, "all 4 training rows have the label 3"),
        ({"t": texts(4), "y": ["a", "b"] * 2}, {"holdout": None}, "has no validation rows: holdout=0.2"),
        ({"t": texts(4), "y": ["a", "b"] * 2}, {"holdout": 1.5}, "above 0 and below 1, got 1.5"),
        ({"t": texts(4), "y": ["a", "b"] * 2}, {"label": "t"}, "the column 't' is given as text and as label"),
        ({"t": texts(4), "y": ["a", "b"] * 2}, {"text": "t,t"}, "the names of different text columns"),
        ({"t": texts(4), "y": ["a", "b"] * 2}, {"task_type": "seq2seq"}, "is not a type of labelled rows"),
        ({"t": texts(4), "y": [0, 1] * 2, "z": [2, 0] * 2}, {"label": "y,z"}, "expected 0 or 1 in each of several"),
        ({"t": texts(4), "y": ["a", "b"] * 2}, {"metric": "f9"}, "unknown metric 'f9'; expected one of accuracy"),
        ({"t": texts(4), "y": [1.5, 2, 3, 4]}, {"class_weights": "balanced"}, "class weights apply to classification"),
        ({"t": [], "y": []}, {}, "there are none"),
    ],
)
def test_what_is_refused(tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    path = table(tmp_path, columns)
    with pytest.raises(InputError, match=message):
        task_from_table(path, **{"text": "t", "label": "y", "holdout": 0.5, **options})


def test_a_text_column_is_no_label(tmp_path: Path) -> None:
    rows = {"t": texts(200), "y": [f"answer {row // 2}" for row in range(200)]}
    with pytest.raises(InputError, match="100 different values in 100 rows, so it is probably a text column"):
        task_from_table(table(tmp_path, rows), "t", "y", holdout=0.5)


def test_labels_of_several_types_are_refused(tmp_path: Path) -> None:
    lines = [{"t": "a film", "y": 1}, {"t": "a story", "y": "good"}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"mixed types: row 0 \(counted from 0\) has 1, row 1 has 'good'"):
        task_from_table(tmp_path / "mixed.jsonl", "t", "y", holdout=0.5)


def test_one_separator_for_all_rows(tmp_path: Path) -> None:
    table(tmp_path, {"t": texts(2), "y": ["food, drink|service", "service"]}, "train.csv")
    table(tmp_path, {"t": texts(4)[2:], "y": ["food, drink", "service"]}, "validation.csv")
    options: Any = {"text": "t", "label": "y", "task_type": "multi-label"}
    task = task_from_table(tmp_path, **options)
    assert (task.labels, labels_of(task, "validation")) == (("food, drink", "service"), [[0], [1]])
    held_out = task_from_table(tmp_path, **options, labels=task.labels, train=False)
    assert labels_of(held_out, "validation") == [[0], [1]]  # a known name is not split
    held_out = task_from_table(tmp_path, **options, labels=("drink", "food", "service"), train=False)
    assert labels_of(held_out, "validation") == [[0, 1], [2]]


@pytest.mark.parametrize("kind", ["classification", "multi-label", "token-classification"])
def test_the_rows_may_spell_the_labels_of_a_head_otherwise(tmp_path: Path, kind: str) -> None:
    columns = {
        "classification": {"t": texts(3), "y": ["negative", "positive", "Neg"]},
        "multi-label": {"t": texts(3), "y": [["negative", "neg"], ["positive", "negative"], []]},
        "token-classification": {"t": [["a"], ["a", "b"], ["c"]], "y": [["negative"], ["pos", "neg"], ["POS"]]},
    }[kind]
    path = table(tmp_path, columns, "new.jsonl")
    task = task_from_table(path, "t", "y", task_type=kind, labels=("POS", "NEG"), train=False)
    expected = {
        "classification": [1, 0, 1],
        "multi-label": [[1], [0, 1], []],
        "token-classification": [[1], [0, 1], [0]],
    }
    assert (task.labels, labels_of(task, "validation")) == (("POS", "NEG"), expected[kind])
    with pytest.raises(InputError, match=r"row 0 \(counted from 0\) has the label 'neg.*', and the labels are x, y"):
        task_from_table(path, "t", "y", task_type=kind, labels=("x", "y"), train=False)


def test_an_unseen_label_is_named_with_its_row(tmp_path: Path) -> None:
    table(tmp_path, {"t": texts(4), "y": ["a", "b"] * 2}, "train.csv")
    table(tmp_path, {"t": ["x", "y"], "y": ["a", "c"]}, "validation.csv")
    message = (
        r"validation rows of .*: row 1 \(counted from 0\) has the label 'c' in 'y', and the labels of the train rows"
    )
    with pytest.raises(InputError, match=message):
        task_from_table(tmp_path, "t", "y")


def test_words_and_tags_of_other_numbers_are_refused(tmp_path: Path) -> None:
    rows = {"w": [["a", "film"], ["a", "story", "x"]] * 2, "t": [["O", "B-A"], ["O", "B-A"]] * 2}
    task = task_from_table(table(tmp_path, rows, "a.jsonl"), "w", "t", holdout=0.5)
    with pytest.raises(InputError, match=r"row [13] \(counted from 0\) has 3 words in 'w' and 2 tags"):
        [task.read("train"), task.read("validation")]


def test_a_missing_file_and_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected a file, a folder, or owner/name of the hub"):
        task_from_table(tmp_path / "a.csv", "t", "y")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(InputError, match=r"a\.xlsx has an unknown suffix; expected one of \.parquet, \.csv"):
        task_from_table(tmp_path / "a.xlsx", "t", "y")


# -- training ---------------------------------------------------------------------------------------------------------


def test_from_a_table_to_a_scored_adapter(tmp_path: Path, model_folder: Path, run: Any) -> None:
    cells = ["billing", "bug", "question"] * 6
    path = table(tmp_path, {"ticket_text": texts(18), "category": cells})
    words = ["--data", path, "--text", "ticket_text", "--label", "category", "--holdout", 0.3, "--max-length", 16]
    base = ["--model", model_folder, *words, "--epochs", 1]
    code, out, err = run("record", *base, "--output", tmp_path / "run")
    assert code == 0, err
    assert "full on tickets, accuracy" in out
    result = read_json(tmp_path / "run/result.json")
    assert result["labels"] == ["billing", "bug", "question"]
    assert result["data"]["held_out_rows"] == sorted({*result["data"]["held_out_rows"]})
    assert len(result["data"]["held_out_rows"]) == result["rows"]["validation"] == 6
    assert {"f1_macro", "log_loss", "ece"} <= {*result["metrics"]}
    tuned = [*base, "--output", tmp_path / "a", "--basis", "random", "--rank", 2, "--metric", "f1_macro"]
    code, out, err = run("tune", *tuned, "--class-weights", "balanced")
    assert code == 0, err
    assert "random on tickets, f1_macro" in out
    scored = ["evaluate", "--model", model_folder, "--adapter", tmp_path / "a", *words, "--metric", "f1_macro"]
    code, out, err = run(*scored)
    assert (code, f"f1_macro {read_json(tmp_path / 'a/result.json')['score']:.4f}" in out) == (0, True), err
    some = table(tmp_path, {"ticket_text": ["a", "b"], "category": ["bug", "question"]}, "new.csv")
    code, out, err = run("evaluate", "--model", tmp_path / "run/model", "--data", some, *words[2:6], "--max-length", 16)
    assert code == 0, err  # a file with some of the labels, which have the numbers of the head's outputs
    wrong = table(tmp_path, {"ticket_text": ["a", "b"], "category": ["bug", "praise"]}, "wrong.csv")
    code, _, err = run("evaluate", "--model", tmp_path / "run/model", "--data", wrong, *words[2:6])
    assert (code, "row 1 (counted from 0) has the label 'praise'" in err) == (2, True), err
    code, out, err = run(
        "export", "--model", model_folder, "--adapter", tmp_path / "a", "--output", tmp_path / "m", "--to", "merged"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "m/config.json").read_text())["id2label"] == {
        "0": "billing",
        "1": "bug",
        "2": "question",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label", "y"], "--label also needs --data and --text"),
        (["--task", "sst2", "--label", "y"], "which --data names, and not for --task sst2; leave one"),
        (["--task-type", "regression"], "needs the columns: --data FILE --text COLUMN --label COLUMN"),
        (["--task-type", "causal-lm", "--holdout", 0.2], "--holdout goes with --data, --text and --label"),
        (["--task-type", "causal-lm", "--metric", "f1"], "unknown metric 'f1'; expected perplexity"),
        (["--task-type", "images"], "unknown --task-type 'images'; expected classification or multi-label or"),
    ],
)
def test_options_that_contradict_each_other(
    words: list[Any], message: str, tmp_path: Path, model_folder: Path, run: Any
) -> None:
    code, _, err = run("record", "--model", model_folder, *words, "--output", tmp_path / "out")
    assert (code, message in " ".join(err.split())) == (2, True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mean", [50.0, -3000.0])
def test_a_regression_is_trained_on_standardized_labels(tmp_path: Path, model_folder: Path, mean: float) -> None:
    """Labels on another scale give the same run, and a model whose predictions are in the units of the labels."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=16)
    results, predictions = [], []
    for factor, shift in ((1.0, 0.0), (20.0, mean)):
        path = table(tmp_path, {"t": texts(16), "y": factor * scores + shift}, f"a{shift}.csv")
        task = task_from_table(path, "t", "y", holdout=0.25)
        prepared = prepare(str(model_folder), task, max_length=16)
        model = base_model(prepared.model, prepared.task, 0, label_mean=prepared.label_mean)
        results.append(fine_tune(model, prepared, SETTINGS, "full"))
        batch = prepared.collate([{**row, "labels": 0.0} for row in prepared.validation])
        batch.pop("labels")
        with torch.no_grad():
            predictions.append(model.eval()(**batch).logits.squeeze(-1).double())
    one, other = results
    assert other["history"][0]["train_loss"] == pytest.approx(one["history"][0]["train_loss"], rel=1e-3)
    assert other["score"] == pytest.approx(one["score"], abs=1e-3)
    assert other["metrics"]["rmse"] == pytest.approx(20 * one["metrics"]["rmse"], rel=1e-3)
    torch.testing.assert_close(predictions[1], 20 * predictions[0] + mean, rtol=1e-3, atol=1e-2)


def test_the_score_of_a_regression_is_that_of_its_saved_model(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(16), "y": np.linspace(0, 100, 16)})
    task = task_from_table(path, "t", "y", holdout=0.25)
    prepared = prepare(str(model_folder), task, max_length=16)
    recorded = record(prepared, SETTINGS, tmp_path / "run")
    tuned = tune(prepared, SETTINGS, "random", tmp_path / "a", rank=2)
    types = trained_type(str(tmp_path / "run/model")), trained_type(str(model_folder), tmp_path / "a")
    assert (*types, trained_type(str(model_folder))) == ("regression", "regression", None)
    for model, adapter, expected in ((tmp_path / "run/model", None, recorded), (model_folder, tmp_path / "a", tuned)):
        rows = task_from_table(path, "t", "y", holdout=0.25, train=False, labels=("y",))
        scored = evaluate(prepare(str(model), rows, max_length=16, train=False), SETTINGS, adapter)
        assert scored["score"] == pytest.approx(expected["score"], abs=1e-3)  # float32, about 50
        assert scored["metrics"]["rmse"] == pytest.approx(expected["metrics"]["rmse"], rel=1e-4)


def test_a_standardized_task_scores_a_saved_model_in_its_units(tmp_path: Path, model_folder: Path) -> None:
    """The model is in the units of the labels outside of training, also after an interruption."""
    path = table(tmp_path, {"t": texts(16), "y": np.linspace(1000, 1400, 16)})
    task = task_from_table(path, "t", "y", holdout=0.25)
    prepared = prepare(str(model_folder), task, max_length=16)
    recorded = record(prepared, SETTINGS, tmp_path / "run")
    rows = prepare(str(tmp_path / "run/model"), task, max_length=16)
    assert evaluate(rows, SETTINGS)["metrics"]["rmse"] == pytest.approx(recorded["metrics"]["rmse"], rel=1e-4)
    model = base_model(prepared.model, prepared.task, 0, label_mean=prepared.label_mean)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Stop(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, prepared, SETTINGS, "full", [Stop()])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_the_units_of_a_layer_that_follows_z_are_refused(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(16), "y": np.linspace(1000, 1400, 16)})
    prepared = prepare(str(model_folder), task_from_table(path, "t", "y", holdout=0.25), max_length=16)
    model = base_model(prepared.model, prepared.task, 0)
    basis = random_basis(by_pattern(model, {"head": "classifier.*"}), 2)
    with pytest.raises(InputError, match="the model's output layer is in a block of the basis"):
        fine_tune(SubspaceModel(model, basis), prepared, SETTINGS, "random")


def test_class_weights_are_part_of_a_run(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(20), "y": ["a"] * 16 + ["b"] * 4})
    runs = []
    for weights in (None, "balanced"):
        task = task_from_table(path, "t", "y", holdout=0.5, class_weights=weights)
        runs.append(run_of(prepare(str(model_folder), task, max_length=16), SETTINGS))
    assert runs[0] != runs[1]
    assert runs[1]["task_definition"]["class_weights"] == [10 / 16, 10 / 4]


def test_thresholds_do_not_depend_on_the_order_of_the_table(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are sorted by label, and only some are used."""
    monkeypatch.setattr(training, "FITTED_ROWS", 20)
    path = table(tmp_path, {"t": texts(80), "y": [["a"]] * 40 + [["b"]] * 40}, "sorted.jsonl")
    prepared = prepare(str(model_folder), task_from_table(path, "t", "y", holdout=0.25), max_length=16)
    result = tune(prepared, SETTINGS, "random", tmp_path / "a", rank=2)
    assert all(threshold != 0.5 for threshold in result["thresholds"].values())


def test_output_layers(model_folder: Path) -> None:
    task = Regression("a", ("t",), ("y",))
    model = base_model(str(model_folder), task, 0).eval()
    tokens = torch.tensor([[1, 5, 7, 2]])
    before = model(tokens).logits
    found = output_layer(model)
    assert found is not None
    assert found[0] == "classifier"
    assert has_bias(model.config, task.head) is (found[1].bias is not None) is True
    assert rescale_outputs(model, 3.0, -7.0)
    torch.testing.assert_close(model(tokens).logits, 3 * before - 7)


def test_class_weights_are_those_of_the_formula(tmp_path: Path) -> None:
    path = table(tmp_path, {"t": texts(20), "y": ["a"] * 16 + ["b"] * 4})
    task = task_from_table(path, "t", "y", holdout=0.5, class_weights="balanced")
    assert isinstance(task, Classification)
    assert task.class_weights == (10 / (2 * 8), 10 / (2 * 2))
    logits, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 0])
    loss = task.loss_function(("b", "a"))
    assert loss is not None
    weights = torch.tensor([2.5, 0.625], dtype=torch.float64)  # of the outputs b, a
    each = -logits.log_softmax(-1)[range(6), labels]
    expected = (weights[labels] * each).sum() / weights[labels].sum()
    torch.testing.assert_close(loss(type("Result", (), {"logits": logits}), labels), expected)


def test_an_adapter_knows_its_task(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(12), "y": ["a", "b"] * 6})
    task = task_from_table(path, "t", "y", holdout=0.5)
    tune(prepare(str(model_folder), task, max_length=16), SETTINGS, "random", tmp_path / "a", rank=2)
    from tinyspan.model.opened_adapter import OpenedAdapter

    stored = stored_task(OpenedAdapter(tmp_path / "a"))
    assert (stored.type, stored.labels, stored.columns, stored.name) == (
        "classification",
        ("a", "b"),
        ("t",),
        "tickets",
    )
    check_adapted(str(model_folder), stored, tmp_path / "a")
    assert trained_type(str(model_folder), tmp_path / "a") == "classification"
    other = Regression("tickets", ("t",), ("y",))
    message = r"was trained for tickets \(classification\), not for tickets \(regression\)"
    with pytest.raises(InputError, match=message):
        check_adapted(str(model_folder), other, tmp_path / "a")


def test_the_type_is_that_of_the_trained_head(tmp_path: Path, model_folder: Path, run: Any) -> None:
    """Few rows with several whole numbers would be a regression."""
    names = [str(number) for number in range(8)]
    model = base_model(str(model_folder), Classification("st", ("t",), tuple(names)), 0)
    model.save_pretrained(tmp_path / "m")
    tokenizer_of(str(model_folder), model.config).save_pretrained(tmp_path / "m")
    path = table(tmp_path, {"t": texts(24), "y": list(range(8)) * 3}, "st.csv")
    words = ["evaluate", "--model", tmp_path / "m", "--data", path, "--text", "t", "--label", "y", "--max-length", 16]
    code, out, err = run(*words)
    assert (code, "full on st, accuracy" in out) == (0, True), err


def test_rows_without_numbers_have_none_in_the_result(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(18), "y": ["a", "b", "c"] * 6})
    prepared = prepare(str(model_folder), task_from_table(path, "t", "y", holdout=0.34), max_length=16)
    model = base_model(str(model_folder), prepared.task, 0)
    for numbers in (prepared.row_numbers, ()):
        file = tmp_path / "predictions.jsonl"
        result = score(model, replace(prepared, row_numbers=numbers), SETTINGS, "full", predictions=file)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == len(prepared.row_numbers) == 7
        assert result["data"].get("held_out_rows") == (sorted(numbers) or None)
        assert all(("row" in line) is bool(numbers) for line in lines)


def test_predictions_are_written_by_row(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(18), "y": ["a", "b", "c"] * 6})
    task = task_from_table(path, "t", "y", holdout=0.34)
    prepared = prepare(str(model_folder), task, max_length=16)
    result = tune(prepared, SETTINGS, "random", tmp_path / "a", rank=2)
    lines = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == result["data"]["held_out_rows"]
    assert [line["label"] for line in lines] == ["abc"[line["row"] % 3] for line in lines]
    assert all(max(line["probabilities"], key=line["probabilities"].get) == line["prediction"] for line in lines)
    right = sum(line["label"] == line["prediction"] for line in lines)
    assert right / len(lines) == pytest.approx(result["score"])
    confusion = np.array(result["confusion_matrix"])
    assert (confusion.sum(), confusion.trace()) == (len(lines), right)
    assert [row["rows"] for row in result["per_class"].values()] == confusion.sum(1).tolist()
    assert confusion.sum(1).tolist() == [sum(line["label"] == name for line in lines) for name in "abc"]
    assert result["majority"] == pytest.approx(3 / 7)
    assert sum(rows for *_, rows in result["calibration"]["bins"]) == len(lines)
    low, high = result["intervals"]["accuracy"]
    assert low <= result["score"] <= high
    scored = evaluate(prepared, SETTINGS, tmp_path / "a", output=tmp_path / "e")
    assert len((tmp_path / "e/predictions.jsonl").read_text().splitlines()) == len(lines)
    assert scored["confusion_matrix"] == result["confusion_matrix"]


def test_predictions_that_do_not_vary_are_told_of() -> None:
    task = Classification("a", ("t",), ("x", "y"))
    one = task.details(np.array([[2.0, 1.0]] * 3), np.array([0, 1, 1]), task.labels)
    assert one["notes"] == ["the model predicts 'x' for all 3 held-out rows"]
    assert task.details(np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 1]), task.labels)["notes"] == []
    numbers = Regression("a", ("t",), ("y",))
    predictions = np.array([[1.0], [1.01], [1.0]])
    (note,) = numbers.details(predictions, np.array([0.0, 5.0, 10.0]), ("y",))["notes"]
    assert "the predictions hardly vary: their standard deviation is 0.00471, the labels' is 4.08" in note
    several = MultiLabel("a", ("t",), ("x", "y"))
    (note,) = several.details(np.full((2, 2), -3.0), np.array([[1.0, 0.0]] * 2), several.labels)["notes"]
    assert note == "the model predicts no label for all 2 held-out rows"
    tags = TokenClassification("a", ("t",), ("O", "B-A"))
    (note,) = tags.details(np.zeros((2, 3), dtype=int), np.array([[0, 1, -100]] * 2), tags.labels)["notes"]
    assert note == "the model predicts 'O' for every word"


def test_a_temperature_is_fitted_on_rows_set_aside_and_put_into_the_head(tmp_path: Path, model_folder: Path) -> None:
    generator = np.random.default_rng(0)
    path = table(tmp_path, {"t": texts(60), "y": generator.choice(["a", "b", "c"], 60)})  # nothing to learn but shares
    task = task_from_table(path, "t", "y", holdout=0.2)
    prepared = prepare(str(model_folder), task, max_length=16)
    fast = replace(SETTINGS, epochs=6, learning_rate=1e-2)
    result = tune(prepared, replace(fast, set_aside=20), "random", tmp_path / "a", rank=2)
    calibration, temperature = result["calibration"], result["calibration"]["temperature"]
    assert calibration["fitted_rows"] == 20
    assert temperature > 1  # overconfident on labels that cannot be learned
    before = result["history"][-1]["metrics"]
    assert calibration["before"] == pytest.approx({"log_loss": before["log_loss"], "ece": before["ece"]})
    assert result["metrics"]["log_loss"] < before["log_loss"]
    assert result["score"] == result["history"][-1]["score"]
    scored = evaluate(prepared, fast, tmp_path / "a")  # the saved adapter has the temperature in its head
    assert scored["metrics"]["log_loss"] == pytest.approx(result["metrics"]["log_loss"], rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    losses = [-np.log(line["probabilities"][line["label"]]) for line in lines]
    assert np.mean(losses) == pytest.approx(result["metrics"]["log_loss"])


def test_thresholds_of_several_labels_are_chosen_on_training_rows(tmp_path: Path, model_folder: Path) -> None:
    cells = [
        ["rare"] if row % 5 == 0 else ["common"] if row % 2 else ["common", "rare"][: row % 3] for row in range(40)
    ]
    path = table(tmp_path, {"t": texts(40), "y": cells}, "a.jsonl")
    task = task_from_table(path, "t", "y", holdout=0.25)
    prepared = prepare(str(model_folder), task, max_length=16)
    result = tune(prepared, SETTINGS, "random", tmp_path / "a", rank=2)
    assert [*result["thresholds"]] == ["common", "rare"]
    assert all(0 < threshold < 1 for threshold in result["thresholds"].values())
    lines = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    for line in lines:
        above = [name for name, value in line["probabilities"].items() if value >= result["thresholds"][name]]
        assert above == line["prediction"]
    assert evaluate(prepared, SETTINGS, tmp_path / "a")["score"] == pytest.approx(result["score"])


def test_a_recorded_model_has_the_thresholds_in_its_config(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(24), "y": [["a"], ["b"], ["a", "b"]] * 8}, "a.jsonl")
    prepared = prepare(str(model_folder), task_from_table(path, "t", "y", holdout=0.25), max_length=16)
    thresholds = record(prepared, SETTINGS, tmp_path / "run")["thresholds"]
    assert json.loads((tmp_path / "run/model/config.json").read_text())["label_thresholds"] == thresholds


def test_a_task_beside_ones_own_trainer(tmp_path: Path, model_folder: Path) -> None:
    path = table(tmp_path, {"t": texts(18), "y": ["a", "b", "c"] * 6})
    task = task_from_table(path, "t", "y", holdout=0.34)
    rows = prepare(str(model_folder), task, max_length=16)
    model = base_model(rows.model, task, seed=0)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        data_collator=rows.collate,
        compute_metrics=rows.compute_metrics,
        preprocess_logits_for_metrics=task.predictions,
    )
    with task.training_units(model):
        trainer.train()
    assert {"eval_accuracy", "eval_f1_macro", "eval_loss"} <= {*trainer.evaluate()}
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_labels_that_differ_in_spelling_only_are_told_of(tmp_path: Path) -> None:
    path = table(tmp_path, {"t": texts(12), "y": ["News", "news", "film"] * 4})
    with pytest.warns(UserWarning, match="tickets: the labels 'News' and 'news' are different labels"):
        task_from_table(path, "t", "y", holdout=0.5)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"unknown suffix; .*; save the sheet as CSV"):
        task_from_table(tmp_path / "a.xlsx", "t", "y")
    (tmp_path / "a.csv").write_bytes("t,y\ncafé,a\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.csv is not UTF-8 .*; save it with this encoding"):
        task_from_table(tmp_path / "a.csv", "t", "y")


def test_categories_without_a_row_are_no_labels(tmp_path: Path) -> None:
    cells = pd.Categorical(["a", "b"] * 4, categories=["a", "b", "c"])
    task = task_from_table(table(tmp_path, {"t": texts(8), "y": cells}, "a.parquet"), "t", "y", holdout=0.5)
    assert (task.labels, sorted(labels_of(task, "validation"))) == (("a", "b"), [0, 0, 1, 1])


def test_names_of_numbers_and_of_flags_are_no_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "t": datasets.Value("string"),
            **{name: datasets.ClassLabel(names=["false", "true"]) for name in ("rude", "toxic")},
            "stars": datasets.ClassLabel(names=["1", "2"]),
        }
    )
    columns = {"t": texts(8), "rude": [0, 1] * 4, "toxic": [0, 0, 1, 1] * 2, "stars": [0, 1] * 4}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    task = task_from_table(tmp_path / "a.parquet", "t", "rude,toxic", holdout=0.5)
    assert (task.type, task.labels) == ("multi-label", ("rude", "toxic"))
    stars = task_from_table(tmp_path / "a.parquet", "t", "stars", task_type="regression", holdout=0.5)
    assert (stars.labels, {*labels_of(stars, "validation")}) == (("stars",), {1.0, 2.0})


@pytest.mark.parametrize("kind", ["multi-label", "token-classification"])
@pytest.mark.parametrize(
    "cell", ["['O', 'B-X']", '["O"]', "[3 0]", "[]", """["it's", 'a']""", "[None]", "[1.0, -2]", "[True, False]"]
)
def test_a_printed_list_is_refused(tmp_path: Path, kind: str, cell: str) -> None:
    path = table(tmp_path, {"t": texts(4), "y": ["[O]|x y", cell, "O O", "O O"]})
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\) has the text .* in 'y', a printed list"):
        task_from_table(path, "t", "y", task_type=kind, holdout=0.5)


@pytest.mark.parametrize("kind", ["multi-label", "token-classification"])
def test_a_list_with_a_missing_value_is_refused(tmp_path: Path, kind: str) -> None:
    path = table(tmp_path, {"t": texts(4), "y": [["O", "B-X"], ["O", None]] * 2}, "a.parquet")
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\) has a list with a missing value in 'y'"):
        task_from_table(path, "t", "y", task_type=kind, holdout=0.5)


def test_a_code_with_an_underscore_is_no_number() -> None:
    rows = pd.DataFrame({"t": texts(60), "y": [f"{row % 30}_{row % 30}" for row in range(60)]})
    assert infer_type(rows, ["t"], ["y"]) == "classification"


def test_numbered_labels_of_a_run_on_a_table_are_its_labels(tmp_path: Path, model_folder: Path) -> None:
    """A table to evaluate may lack one of them."""
    path = table(tmp_path, {"t": texts(18), "y": [0, 1, 2] * 6})
    prepared = prepare(str(model_folder), task_from_table(path, "t", "y", holdout=0.34), max_length=16)
    tune(prepared, SETTINGS, "random", tmp_path / "a", rank=2)
    names = trained_labels(str(model_folder), tmp_path / "a")
    export(str(model_folder), None, tmp_path / "a", tmp_path / "m", "merged")
    assert trained_labels(str(tmp_path / "m")) == names
    config = read_json(tmp_path / "m/config.json", sealed=False)
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))  # trained further by another program
    assert trained_labels(str(tmp_path / "m")) is None
    assert trained_labels(str(model_folder)) is None
    few = table(tmp_path, {"t": texts(4), "y": [2, 1] * 2}, "few.csv")
    task = task_from_table(few, "t", "y", labels=names, train=False)
    assert (task.labels, labels_of(task, "validation")) == (("0", "1", "2"), [2, 1, 2, 1])
    other = prepare(str(model_folder), task, max_length=16, train=False, adapter=tmp_path / "a")
    assert evaluate(other, SETTINGS, tmp_path / "a")["labels"] == ["0", "1", "2"]

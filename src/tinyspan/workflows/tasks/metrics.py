"""Metrics of labels and predictions, by name."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "CLASSIFICATION",
    "LOWER_IS_BETTER",
    "MULTI_LABEL",
    "REGRESSION",
    "TOKENS",
    "best_threshold",
    "calibration_error",
    "calibration_statistics",
    "classification_scores",
    "confidence_bins",
    "encoding_of",
    "multi_label_scores",
    "regression_scores",
    "scores_per_label",
    "temperature_of",
    "token_scores",
    "token_statistics",
]

Numbers = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]

CLASSIFICATION = ("accuracy", "balanced_accuracy", "f1_macro", "f1_micro", "matthews", "log_loss", "ece")
REGRESSION = ("pearson", "spearman", "rmse")
MULTI_LABEL = ("f1_micro", "f1_macro", "exact_match")
TOKENS = ("entity_f1", "entity_precision", "entity_recall", "token_accuracy")
LOWER_IS_BETTER = frozenset({"log_loss", "ece", "rmse", "perplexity"})
CORRELATIONS = ("pearson", "spearman")
PRECISE = {"xatol": 1e-8}  # of the temperature's logarithm
BINS = 15  # of equal width, for the expected calibration error (Guo et al. 2017)


def classification_scores(name: str, metric: str, logits: Numbers, labels: Positions) -> dict[str, float]:
    """Return the metrics of a classification in `CLASSIFICATION`.

    The F1 of a label without rows and predictions is left out of the macro average. Matthews' phi is 0 if all labels or
    all predictions are the same, with a warning if it is the task's metric.

    Args:
        name: name of the task, for messages.
        metric: the task's metric.
        logits: [rows, outputs].
        labels: [rows], positions of the outputs.
    """
    from scipy.special import log_softmax, softmax
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

    predictions = logits.argmax(-1)
    present = np.union1d(labels, predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn: a label may have no rows in a small held-out part
        balanced = float(balanced_accuracy_score(labels, predictions))
    vary = _vary(name, metric, "matthews", labels, predictions)
    log_probabilities = log_softmax(logits.astype(float), axis=-1)
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "balanced_accuracy": balanced,
        "f1_macro": float(f1_score(labels, predictions, labels=present, average="macro", zero_division=0)),
        "f1_micro": float(f1_score(labels, predictions, labels=present, average="micro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predictions)) if vary else 0.0,
        "log_loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": calibration_error(softmax(logits.astype(float), axis=-1), labels),
    }


def regression_scores(name: str, metric: str, predictions: Numbers, labels: Numbers) -> dict[str, float]:
    """Return the metrics of a regression in `REGRESSION`.

    A correlation in which one side is constant is 0, with a warning if it is the task's metric.

    Args:
        name: name of the task, for messages.
        metric: the task's metric.
        predictions: [rows], in the units of the labels, as is the root of the mean squared error.
        labels: [rows].
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import root_mean_squared_error

    vary = _vary(name, metric, metric if metric in CORRELATIONS else "pearson", labels, predictions)
    one, other = labels.astype(float), predictions.astype(float)
    return {
        "pearson": float(pearsonr(one, other).statistic) if vary else 0.0,
        "spearman": float(spearmanr(one, other).statistic) if vary else 0.0,
        "rmse": float(root_mean_squared_error(one, other)),
    }


def multi_label_scores(predictions: Positions, labels: Positions) -> dict[str, float]:
    """Return the metrics of a multi-label classification in `MULTI_LABEL`.

    Args:
        predictions: [rows, outputs], 0 or 1.
        labels: [rows, outputs], 0 or 1.
    """
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "f1_micro": float(f1_score(labels, predictions, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(labels, predictions, average="macro", zero_division=0)),
        "exact_match": float(accuracy_score(labels, predictions)),
    }


def scores_per_label(
    labels: Positions, predictions: Positions, outputs: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """Return precision, recall and F1 of each label, and its number of rows.

    Args:
        labels: [rows], positions of the outputs; or [rows, outputs], 0 or 1.
        predictions: as `labels`.
        outputs: names of the outputs in their order.

    Example:
        >>> scores_per_label(np.array([0, 1, 1]), np.array([0, 0, 1]), ["bug", "billing"])["billing"]
        {'precision': 1.0, 'recall': 0.5, 'f1': 0.6666666666666666, 'rows': 2}
    """
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(labels, predictions, labels=range(len(outputs)), zero_division=0)
    return {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
        for name, precision, recall, f1, rows in zip(outputs, *columns, strict=True)
    }


def temperature_of(logits: Numbers, labels: Positions) -> float | None:
    """Return the temperature T that minimizes the log loss of softmax(logits / T), between 1/20 and 20.

    Args:
        logits: [rows, outputs].
        labels: [rows], positions of the outputs.

    Returns:
        The temperature, or None if the loss falls to the lower bound, for example because every row is predicted right.
        A smaller temperature is always better then, and the rows do not determine one.

    Example:
        >>> logits = np.log([[0.9, 0.1]] * 4)  # confidence 0.9, and accuracy 0.75
        >>> round(temperature_of(logits, np.array([0, 0, 0, 1])), 3)
        2.0
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows, logits = np.arange(len(labels)), logits.astype(float)

    def log_loss(exponent: float) -> float:
        return float(-log_softmax(logits * np.exp(-exponent), axis=-1)[rows, labels].mean())

    if (logits.argmax(-1) == labels).all():
        return None
    limit = np.log(20)
    best = float(minimize_scalar(log_loss, bounds=(-limit, limit), method="bounded", options=PRECISE).x)
    return float(np.exp(best)) if best > -0.99 * limit else None


def best_threshold(probabilities: Numbers, labels: Numbers) -> float:
    """Return the threshold of one label with the best F1: halfway between two probabilities, or 0.5 without such rows.

    Args:
        probabilities: [rows].
        labels: [rows], 0 or 1.

    Example:
        >>> best_threshold(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1]))
        0.25
    """
    if not 0 < labels.sum() < len(labels):
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order]
    found = np.cumsum(labels[order])
    f1 = 2 * found / (np.arange(1, len(labels) + 1) + labels.sum())
    f1[:-1][ordered[:-1] == ordered[1:]] = -1  # no threshold lies between equal probabilities
    best = int(f1.argmax())
    below = ordered[best + 1] if best + 1 < len(ordered) else 0.0
    return float((ordered[best] + below) / 2)


def encoding_of(tags: Iterable[str]) -> str | None:
    """Return the encoding of entities in tags, as seqscore calls it; None if tags are no entities, such as NOUN.

    Example:
        >>> encoding_of(["O", "B-PER", "I-PER"]), encoding_of(["O", "S-LOC"]), encoding_of(["NOUN", "VERB"])
        ('BIO', 'BIOES', None)
    """
    parts = [tag.split("-", 1) for tag in tags if tag != "O"]
    states = {state for state, *_ in parts}
    if not parts or not all(len(part) == 2 for part in parts):
        return None
    for states_of, encoding in (({"I"}, "IO"), ({"B", "I"}, "BIO"), ({"B", "I", "E", "S"}, "BIOES")):
        if states <= states_of:
            return encoding
    return None


def token_scores(statistics: Numbers, *, entities: bool = True) -> dict[str, float]:
    """Return the metrics of token classification in `TOKENS`; without any entity, those of entities are 0.

    Args:
        statistics: result of `token_statistics`.
        entities: whether the tags are entities; otherwise only `token_accuracy` is returned.
    """
    found, wrong, missed, right, words = statistics.sum(0)
    scores = {"token_accuracy": float(right / words)}
    if entities:
        precision, recall = found / max(found + wrong, 1), found / max(found + missed, 1)
        scores |= {
            "entity_f1": float(2 * found / max(2 * found + wrong + missed, 1)),
            "entity_precision": float(precision),
            "entity_recall": float(recall),
        }
    return scores


def _in_bio(tag: str) -> str:
    return {"S": "B", "E": "I"}.get(tag[0], tag[0]) + tag[1:]


def calibration_error(probabilities: Numbers, labels: Positions) -> float:
    """Return the expected calibration error: `sum_b (n_b / n) |accuracy_b - mean confidence_b|` over bins b.

    Args:
        probabilities: [rows, outputs].
        labels: [rows], positions of the outputs.

    Example:
        >>> calibration_error(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1]))
        0.30000000000000004
    """
    return float(np.abs(calibration_statistics(probabilities, labels).sum(0)).sum() / len(labels))


def calibration_statistics(probabilities: Numbers, labels: Positions) -> Numbers:
    """Return [rows, bins]: whether a prediction is right minus its confidence, in the bin of the confidence."""
    confidence, bins = probabilities.max(-1), confidence_bins(probabilities)
    statistics = np.zeros((len(labels), BINS))
    statistics[np.arange(len(labels)), bins] = (probabilities.argmax(-1) == labels) - confidence
    return statistics


def confidence_bins(probabilities: Numbers) -> Positions:
    """Return the bin of each row's confidence, its largest probability."""
    bins: Positions = np.minimum((probabilities.max(-1) * BINS).astype(int), BINS - 1)
    return bins


def token_statistics(
    predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]], encoding: str | None
) -> Numbers:
    """Return [rows, 5]: the numbers of found, wrong and missed entities, of right tags and of words.

    An entity counts as found if its span and type are right, and tags that break the encoding are repaired as by
    conlleval, the script of the CoNLL shared tasks (library seqscore). Without an encoding there are no entities.

    Args:
        predictions: the tags of each row.
        labels: the right tags, of the same lengths.
        encoding: result of `encoding_of`.
    """
    if encoding == "BIOES":  # which seqscore does not repair; the same entities in BIO
        predictions, labels = ([[_in_bio(tag) for tag in row] for row in rows] for rows in (predictions, labels))
        encoding = "BIO"
    statistics = np.zeros((len(labels), 5))
    for row, predicted, right in zip(statistics, predictions, labels, strict=True):
        row[3:] = sum(a == b for a, b in zip(predicted, right, strict=True)), len(right)
        if encoding is not None:
            from seqscore.scoring import score_label_sequences

            repair = "conlleval" if encoding == "BIO" else None
            entities, _ = score_label_sequences([predicted], [right], encoding, repair=repair)
            row[:3] = entities.true_pos, entities.false_pos, entities.false_neg
    return statistics


def _vary(
    name: str, metric: str, correlation: str, labels: Numbers | Positions, predictions: Numbers | Positions
) -> bool:
    """Return whether labels and predictions vary; otherwise warn if the correlation is the task's metric."""
    for kind, side in (("labels", labels), ("predictions", predictions)):
        if np.ptp(side) == 0:
            if metric == correlation:
                warnings.warn(
                    f"{name}: the {len(side)} held-out {kind} are all {side[0]:g}, for which {metric} is not "
                    "defined; it is reported as 0",
                    stacklevel=3,
                )
            return False
    return True

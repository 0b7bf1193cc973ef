"""Names of a classifier's labels: whether two lists of names mean the same labels, and in which order."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["canonical", "generic_names", "is_generic", "label_names", "positions", "set_label_names"]

SEPARATORS = re.compile(
    r"[\s_]+|(?<=\w)-(?=\w)|(?<=[a-z])(?=[A-Z])"
)  # `not_entailment`, `non-entailment`, `isDuplicate`
NUMBERED = re.compile(r"(?:label|class|logit|output)?[ _-]?(\d+)", re.IGNORECASE)
SINGLE = {"label", "logit", "output", "regression", "score", "value"}  # of a head with one output
ALIASES = {  # one-word spellings of public checkpoints -> the canonical form of the usual one
    "contradict": "contradiction",
    "contradictory": "contradiction",
    "contradicts": "contradiction",
    "entail": "entailment",
    "entailed": "entailment",
    "entails": "entailment",
    "neg": "negative",
    "nonduplicate": "notduplicate",
    "nonentailment": "notentailment",
    "nonequivalent": "notequivalent",
    "notacceptable": "unacceptable",
    "pos": "positive",
    "similarityscore": "similarity",
}


def canonical(name: str) -> str:
    """Return a form that is the same for common spellings of a label: case, separators, negations, abbreviations.

    Example:
        >>> canonical("Non-Entailment") == canonical("not_entailment") == canonical("NotEntailment")
        True
        >>> canonical("C") == canonical("C++")
        False
    """
    words = [word.casefold() for word in SEPARATORS.split(name.strip()) if word]
    if len(words) > 1 and words[0] == "is":
        words = words[1:]
    if len(words) > 1 and words[0] in ("no", "non"):
        words[0] = "not"
    joined = "".join(words)
    return ALIASES.get(joined, joined)


def positions(labels: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Return for every label the position of the name that means it; None if the names mean other labels.

    Example:
        >>> positions(["negative", "positive"], ["POS", "NEG"])
        (1, 0)
        >>> positions(["negative", "positive"], ["toxic", "harmless"]) is None
        True
    """
    for form in (str, canonical):  # names that only a literal comparison tells apart are compared literally
        wanted, given = [form(label) for label in labels], [form(name) for name in names]
        if len(set(wanted)) == len(wanted) and sorted(wanted) == sorted(given):
            return tuple(given.index(label) for label in wanted)
    return None


def is_generic(names: Sequence[str]) -> bool:
    """Whether names only count the outputs, such as LABEL_0 and LABEL_1, and so say nothing about their meaning.

    Example:
        >>> is_generic(["LABEL_0", "LABEL_1"]), is_generic(["1 star", "2 stars"])
        (True, False)
    """
    numbers = [NUMBERED.fullmatch(name.strip()) for name in names]
    if all(number is not None and int(number[1]) == index for index, number in enumerate(numbers)):
        return True
    return len(names) == 1 and canonical(names[0]) in SINGLE


def label_names(model: Any) -> tuple[str, ...] | None:
    """Return the names of the outputs of a model's head in their order, `id2label`; None if they have no names.

    Args:
        model: a model with a config, or the config.
    """
    named = getattr(getattr(model, "config", model), "id2label", None)
    if not isinstance(named, dict) or not named:
        return None
    names = tuple(str(named[index]) for index in sorted(named, key=int))
    return None if is_generic(names) else names


def generic_names(model: nn.Module) -> list[str]:
    """Return LABEL_0, LABEL_1, ..., one for each output of a model's head."""
    return [f"LABEL_{index}" for index in range(getattr(getattr(model, "config", None), "num_labels", None) or 0)]


def set_label_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Name the outputs of a model's head, if it has a config with as many labels."""
    config: Any = getattr(model, "config", None)
    if names and getattr(config, "num_labels", None) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}

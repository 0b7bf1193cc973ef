"""Names of a classifier's labels: comparison of two lists of names, and the permutation between them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

__all__ = [
    "are_same",
    "canonical",
    "generic_names",
    "is_generic",
    "label_names",
    "matched",
    "may_hold_head",
    "positions",
    "set_label_names",
]

SEPARATORS = re.compile(
    r"[\s_]+|(?<=\w)-(?=\w)|(?<=[a-z])(?=[A-Z])"
)  # `not_entailment`, `non-entailment`, `isDuplicate`
NUMBERED = re.compile(r"(?:label|class|logit|output)?[ _-]?(\d+)", re.IGNORECASE)
SINGLE = {"label", "logit", "output", "regression", "score", "value"}  # generic names of a single output
ALIASES = {  # spellings in public checkpoints -> canonical form
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
    """Return a canonical form of a label, independent of case, separators, and forms of negation and abbreviation.

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
    """Return the position in `names` of every label; None if the names denote other labels.

    Example:
        >>> positions(["negative", "positive"], ["POS", "NEG"])
        (1, 0)
        >>> positions(["negative", "positive"], ["toxic", "harmless"]) is None
        True
    """
    for form in (str, canonical):  # first literally, since different names may have the same canonical form
        wanted, given = [form(label) for label in labels], [form(name) for name in names]
        if len(set(wanted)) == len(wanted) and sorted(wanted) == sorted(given):
            return tuple(given.index(label) for label in wanted)
    return None


def matched(words: Iterable[str], names: Sequence[str]) -> dict[str, int]:
    """Return the position of the name that each word denotes, for the words that denote one of these names.

    A word denotes a name if they are equal, or if no other name has the same canonical form.

    Example:
        >>> matched(["negative", "NEG", "neutral"], ["POS", "NEG"])
        {'negative': 1, 'NEG': 1}
        >>> matched(["neg", "Neg"], ["neg", "negative"])
        {'neg': 0}
    """
    forms = [canonical(name) for name in names]
    unique = {form for form, count in Counter(forms).items() if count == 1}
    index = {form: position for position, form in enumerate(forms) if form in unique}
    exact = {name: position for position, name in enumerate(names)}
    denoted = {word: exact[word] if word in exact else index.get(canonical(word)) for word in words}
    return {word: position for word, position in denoted.items() if position is not None}


def are_same(labels: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether two lists of names denote the same labels in the same order.

    Example:
        >>> are_same(["negative", "positive"], ["NEG", "POS"]), are_same(["negative", "positive"], ["POS", "NEG"])
        (True, False)
    """
    return list(labels) == list(names) or positions(labels, names) == tuple(range(len(labels)))


def is_generic(names: Sequence[str]) -> bool:
    """Return whether names only number the outputs, such as LABEL_0 and LABEL_1, without a meaning.

    Example:
        >>> is_generic(["LABEL_0", "LABEL_1"]), is_generic(["1 star", "2 stars"])
        (True, False)
    """
    numbers = [NUMBERED.fullmatch(name.strip()) for name in names]
    if all(number is not None and int(number[1]) == index for index, number in enumerate(numbers)):
        return True
    return len(names) == 1 and canonical(names[0]) in SINGLE


def label_names(model: Any) -> tuple[str, ...] | None:
    """Return the names of the outputs of a model's head in order, from `id2label`; None if they have no names.

    Args:
        model: a model with a config, or a config.
    """
    id2label = getattr(getattr(model, "config", model), "id2label", None)
    if not isinstance(id2label, dict) or not id2label:
        return None
    names = tuple(str(id2label[index]) for index in sorted(id2label, key=int))
    return None if is_generic(names) else names


def generic_names(model: nn.Module) -> list[str]:
    """Return LABEL_0, LABEL_1, ..., one for each output of a model's head."""
    return [f"LABEL_{index}" for index in range(getattr(getattr(model, "config", None), "num_labels", None) or 0)]


def may_hold_head(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether one of these parameters may be in a model's head: it has a row for each output.

    Embeddings are left out, since a model of two labels may have two types of tokens.
    """
    size = len(generic_names(model))
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = [named[name] for name in names if name in named]
    return any(value.shape[:1] == (size,) and id(value) not in embeddings for value in chosen)


def set_label_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Set the names of the outputs of a model's head, if its config has the same number of labels."""
    config: Any = getattr(model, "config", None)
    if names and getattr(config, "num_labels", None) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}

"""The tokenizers of models that are combined, which must give the same text the same token ids."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tinyspan.errors import MismatchError
from tinyspan.io.storage import reading
from tinyspan.workflows.combine.shared_base import CONFIG
from tinyspan.workflows.models import load_pretrained, resolve_model

__all__ = ["require_one_vocabulary"]

VOCABULARY = "tokenizer.json"
TOKENIZER_FILES = (VOCABULARY, "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


def require_one_vocabulary(tokenizers: Sequence[str]) -> None:
    """Check that all tokenizers have the same tokens with the same ids."""
    first: tuple[str, dict[str, int]] | None = None
    for place in dict.fromkeys(tokenizers):
        if (vocabulary := _vocabulary(place)) is None:
            continue
        if first is None:
            first = place, vocabulary
            continue
        other, expected = first
        advice = "the same text has other token ids in it; combine models with one tokenizer"
        if len(vocabulary) != len(expected):
            raise MismatchError(
                f"{place} has another tokenizer: expected the {len(expected):,} tokens of {other}, found "
                f"{len(vocabulary):,}; {advice}"
            )
        for token, index in sorted(expected.items(), key=lambda item: item[1]):
            if vocabulary.get(token) != index:
                actual = f"the id {vocabulary[token]}" if token in vocabulary else "no such token"
                raise MismatchError(
                    f"{place} has another tokenizer: expected the id {index} for the token {token!r}, as in {other}, "
                    f"found {actual}; {advice}"
                )


def _vocabulary(model: str) -> dict[str, int] | None:
    """Return the token ids of a model's tokenizer; None if its folder contains none."""
    folder = Path(resolve_model(model))
    if (path := folder / VOCABULARY).is_file():
        with reading(path):
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the package has no class of its own for errors
                raise ValueError(str(error)) from error
        return dict(tokenizer.get_vocab())
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return None  # an adapter
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return dict(load_pretrained(AutoTokenizer, model).get_vocab())

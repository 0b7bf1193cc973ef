"""Language tasks: texts as tokens, the loss of each token, generation, and its metrics."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from tinyspan.errors import InputError, TinyspanError
from tinyspan.model.subspace import SubspaceModel

__all__ = [
    "IGNORED",
    "generate",
    "generation_scores",
    "perplexity",
    "prompts_of",
    "token_losses",
    "tokenized_pairs",
    "tokenized_text",
]

IGNORED = -100  # the label of a token that is not to be predicted, in transformers and torch


def tokenized_text(rows: pd.DataFrame, tokenizer: Any, length: int) -> Dataset:
    """Join texts, each with the end-of-text token behind it, and cut the whole into rows of `length` tokens.

    The last row may be shorter. Every token but the first of a row is predicted from those before it in the row. A text
    begins with the beginning-of-text token if the tokenizer puts it there.

    Raises:
        InputError: all texts together have fewer than two tokens.
    """
    ids: list[int] = []
    for text in tokenizer(rows["text"].tolist(), add_special_tokens=False)["input_ids"]:
        ids += [*_start(tokenizer), *text, *_end(tokenizer)]
    cut = [ids[start : start + length] for start in range(0, len(ids), length)]
    cut = [row for row in cut if len(row) > 1]
    if not cut:
        raise InputError(f"the text has {len(ids)} tokens; expected at least 2")
    masks, labels = [[1] * len(row) for row in cut], [[IGNORED, *row[1:]] for row in cut]
    return Dataset.from_dict({"input_ids": cut, "attention_mask": masks, "labels": labels})


def tokenized_pairs(
    rows: pd.DataFrame, tokenizer: Any, max_length: int, max_target_length: int, *, encoder_decoder: bool
) -> Dataset:
    """Tokenize prompts and the completions to be learned; a prompt's loss is not counted.

    Args:
        rows: columns `prompt` and `completion`.
        tokenizer: of the model.
        max_length: tokens of a prompt. Of a longer one the encoder gets the beginning, a decoder, which continues it,
            the end, behind the beginning-of-text token if the tokenizer puts one there.
        max_target_length: tokens of a completion, with the end-of-text token; longer ones are cut.
        encoder_decoder: whether the completion goes to a decoder of its own, or behind the prompt.
    """
    prompts, completions = rows["prompt"].tolist(), rows["completion"].tolist()
    if encoder_decoder:
        encoded = dict(tokenizer(prompts, truncation=True, max_length=max_length))
        labels = tokenizer(text_target=completions, truncation=True, max_length=max_target_length)["input_ids"]
        return Dataset.from_dict({**encoded, "labels": labels})
    start = _start(tokenizer)
    room = max(max_length - len(start), 1)
    heads = [[*start, *ids[-room:]] for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    tails = [
        [*ids, *_end(tokenizer)][:max_target_length]
        for ids in tokenizer(completions, add_special_tokens=False)["input_ids"]
    ]
    both = list(zip(heads, tails, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [head + tail for head, tail in both],
            "attention_mask": [[1] * (len(head) + len(tail)) for head, tail in both],
            "labels": [[IGNORED] * len(head) + tail for head, tail in both],
        }
    )


def _start(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before a text, if it does."""
    first = tokenizer("")["input_ids"][:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id != tokenizer.eos_token_id else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def token_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """Return -log p of every label [rows, tokens], and 0 where there is none to predict.

    Args:
        logits: [rows, tokens, vocabulary].
        labels: [rows, tokens], `IGNORED` where nothing is predicted.
        shifted: whether the logits of a token are of the next one, as a decoder-only model's are. The first token of
            each row is then not predicted.
    """
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    found = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    losses[:, 1 if shifted else 0 :] = found
    return losses


def perplexity(losses: npt.NDArray[Any], labels: npt.NDArray[Any], *, shifted: bool) -> float:
    """Return exp of the mean loss per predicted token; inf where that is beyond float64.

    Args:
        losses: what `token_losses` returned.
        labels: as there.
        shifted: as there.

    Raises:
        TinyspanError: a loss is NaN or infinite.
    """
    predicted = labels != IGNORED
    if shifted:
        predicted[:, 0] = False
    chosen = losses[predicted].astype(np.float64)
    if not np.isfinite(chosen).all():
        raise TinyspanError("the loss of a held-out token is NaN or infinite; lower the learning rates")
    with np.errstate(over="ignore"):
        return float(np.exp(chosen.mean()))


@torch.no_grad()
def generate(
    model: nn.Module,
    rows: Dataset,
    tokenizer: Any,
    *,
    batch_size: int,
    max_new_tokens: int,
    encoder_decoder: bool,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[str]:
    """Complete the prompt of each row greedily, and return the texts without special tokens and outer whitespace.

    Whatever else the model's generation config asks for, such as a least length, is left out.

    Args:
        model: a model with `generate`, or a `SubspaceModel` of one.
        rows: what `tokenized_pairs` returned.
        tokenizer: of the model.
        batch_size: rows at a time.
        max_new_tokens: after so many a completion ends.
        encoder_decoder: as for `tokenized_pairs`.
        progress: is given the first row of each batch, to show how far the work is.
    """
    model.eval()
    if isinstance(model, SubspaceModel):
        model.refresh()
        model = model.model
    device = next(model.parameters()).device
    texts: list[str] = []
    prompts, side = prompts_of(rows, encoder_decoder), "right" if encoder_decoder else "left"
    inner: Any = model
    own = inner.generation_config
    inner.generation_config = _greedy(inner, tokenizer, max_new_tokens)  # what a call leaves open
    try:
        for start in progress(range(0, len(rows), batch_size)):
            batch = {"input_ids": prompts[start : start + batch_size]}
            padded = tokenizer.pad(batch, padding_side=side, return_tensors="pt").to(device)
            made = inner.generate(padded["input_ids"], attention_mask=padded["attention_mask"])
            if not encoder_decoder:
                made = made[:, padded["input_ids"].shape[1] :]
            texts += [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    finally:
        inner.generation_config = own
    return texts


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Return a config of greedy search with the model's own special tokens."""

    def special(name: str) -> Any:
        found = getattr(model.generation_config, name, None)
        return getattr(model.config, name, None) if found is None else found

    ends = special("eos_token_id")
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = special("pad_token_id") if model.config.is_encoder_decoder else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        bos_token_id=special("bos_token_id"),
        eos_token_id=sorted(ends) or None,
        decoder_start_token_id=special("decoder_start_token_id"),
    )


def prompts_of(rows: Dataset, encoder_decoder: bool, count: int | None = None) -> list[list[int]]:
    """Return the tokens of the prompts, of the first `count` rows or all."""
    chosen = rows[: count or len(rows)]
    if encoder_decoder:
        return list(chosen["input_ids"])
    both = zip(chosen["input_ids"], chosen["labels"], strict=True)
    return [[token for token, label in zip(*row, strict=True) if label == IGNORED] for row in both]


def generation_scores(generated: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return the mean `exact_match`, without outer whitespace, and the mean ROUGE-L F of the pairs, as fractions.

    Words are runs of letters and digits of any script, in lower case.
    """
    from torchmetrics.functional.text import rouge_score

    exact = [ours == theirs.strip() for ours, theirs in zip(generated, expected, strict=True)]
    rouge = rouge_score(
        list(generated),
        list(expected),
        normalizer=lambda text: re.sub(r"[\W_]+", " ", text.lower()),
        tokenizer=str.split,
        rouge_keys="rougeL",
    )
    return {"exact_match": float(np.mean(exact)), "rouge_l": float(rouge["rougeL_fmeasure"])}

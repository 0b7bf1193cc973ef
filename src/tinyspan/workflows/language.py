"""Language tasks: tokenization, loss per token, generation, and metrics of generated text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tinyspan.errors import InputError, TinyspanError
from tinyspan.model.subspace import SubspaceModel

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import GenerationConfig

__all__ = [
    "IGNORED",
    "generate",
    "generation_scores",
    "perplexity",
    "prompts_of",
    "token_losses",
    "token_sums",
    "tokenized_pairs",
    "tokenized_text",
]

IGNORED = -100  # label of a token without a loss, in transformers and torch


def tokenized_text(rows: pd.DataFrame, tokenizer: Any, length: int) -> Dataset:
    """Concatenate texts, each followed by the end-of-text token, and split them into rows of `length` tokens.

    The last row may be shorter. Every token of a row except the first is predicted from those before it in the row. A
    text starts with the beginning-of-text token if the tokenizer adds one.

    Raises:
        InputError: all texts together have fewer than two tokens.
    """
    from datasets import Dataset

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
    """Tokenize prompts and completions; only the completions count in the loss.

    Args:
        rows: columns `prompt` and `completion`.
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens of a prompt. Of a longer prompt, an encoder gets the beginning; a decoder
            gets the end, which it continues, after the beginning-of-text token if the tokenizer adds one.
        max_target_length: maximum number of tokens of a completion, including the end-of-text token; longer ones are
            truncated.
        encoder_decoder: whether the completion is the decoder's input, or follows the prompt.
    """
    from datasets import Dataset

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
    """Return the token that the tokenizer adds before a text, if it adds one, as a list."""
    first = tokenizer("")["input_ids"][:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id != tokenizer.eos_token_id else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def token_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """Return -log p of every label [rows, tokens], and 0 where the label is `IGNORED`.

    Args:
        logits: [rows, tokens, vocabulary].
        labels: [rows, tokens], `IGNORED` where nothing is predicted.
        shifted: whether the logits at a token predict the next one, as in a decoder-only model. The first token of each
            row is then not predicted.
    """
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    values = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    losses[:, 1 if shifted else 0 :] = values
    return losses


def perplexity(losses: npt.NDArray[Any], labels: npt.NDArray[Any], *, shifted: bool) -> float:
    """Return exp of the mean loss per predicted token; inf if that exceeds float64.

    Args:
        losses: the result of `token_losses`.
        labels: labels of `token_losses`.
        shifted: see `token_losses`.

    Raises:
        TinyspanError: a loss is NaN or infinite.
    """
    sums, counts = token_sums(losses, labels, shifted=shifted)
    if not np.isfinite(sums).all():
        raise TinyspanError("the loss of a held-out token is NaN or infinite; lower the learning rates")
    with np.errstate(over="ignore"):
        return float(np.exp(sums.sum() / counts.sum()))


def token_sums(
    losses: npt.NDArray[Any], labels: npt.NDArray[Any], *, shifted: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the sum of the losses of each row, and the number of its predicted tokens; see `perplexity`."""
    predicted = labels != IGNORED
    if shifted:
        predicted[:, 0] = False
    sums: npt.NDArray[np.float64] = np.where(predicted, losses, 0).astype(np.float64).sum(1)
    return sums, predicted.sum(1)


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

    All other settings of the model's generation config, such as a minimum length, are ignored.

    Args:
        model: a model with `generate`, or a `SubspaceModel` of one.
        rows: the result of `tokenized_pairs`.
        tokenizer: tokenizer of the model.
        batch_size: rows per batch.
        max_new_tokens: maximum number of tokens of a completion.
        encoder_decoder: see `tokenized_pairs`.
        progress: wraps the iteration over the first rows of the batches, for a progress bar.
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
    inner.generation_config = _greedy(inner, tokenizer, max_new_tokens)  # defaults of the calls below
    try:
        for start in progress(range(0, len(rows), batch_size)):
            batch = {"input_ids": prompts[start : start + batch_size]}
            padded = tokenizer.pad(batch, padding_side=side, return_tensors="pt").to(device)
            tokens = inner.generate(padded["input_ids"], attention_mask=padded["attention_mask"])
            if not encoder_decoder:
                tokens = tokens[:, padded["input_ids"].shape[1] :]
            texts += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    finally:
        inner.generation_config = own
    return texts


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Return a config of greedy search with the model's special tokens."""
    from transformers import GenerationConfig

    def special(name: str) -> Any:
        token = getattr(model.generation_config, name, None)
        return getattr(model.config, name, None) if token is None else token

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
    """Return the tokens of the first `count` prompts, or of all."""
    chosen = rows[: count or len(rows)]
    if encoder_decoder:
        return list(chosen["input_ids"])
    both = zip(chosen["input_ids"], chosen["labels"], strict=True)
    return [[token for token, label in zip(*row, strict=True) if label == IGNORED] for row in both]


def generation_scores(generated: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return the mean `exact_match` and the mean ROUGE-L F of the pairs, as fractions; outer whitespace is ignored.

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

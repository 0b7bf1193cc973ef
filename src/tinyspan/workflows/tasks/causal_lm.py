"""Causal language modelling with a decoder, on running text or on prompts and completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tinyspan.errors import InputError
from tinyspan.workflows.language import prompts_of
from tinyspan.workflows.tasks.base import Encoding, Example, FromTransformers, Room, Split, register_type
from tinyspan.workflows.tasks.texts import PAIR, Language, example_pairs, perfect_logits

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CausalLM"]


@register_type("causal-lm")
@dataclass(frozen=True)
class CausalLM(Language):
    """A decoder predicts each token from those before it; with prompts, only the tokens of the completions."""

    head = FromTransformers("AutoModelForCausalLM")

    def require_room(self, rows: Dataset, split: Split, room: Room, encoding: Encoding) -> None:
        """Check that pieces of text, or prompts with a completion of maximum length, are not too long."""
        if self.columns != PAIR:
            super().require_room(rows, split, room, encoding)
            return
        prompt = max(map(len, prompts_of(rows, False)))
        if prompt + encoding.max_target_length > room.tokens:
            raise InputError(
                f"a {split} prompt has {prompt} tokens, with a completion of up to {encoding.max_target_length} more "
                f"than the {room.tokens} that {room.model!r} takes; lower max_length= or max_target_length="
            )

    def check_config(self, config: Any, model: str) -> None:
        """Check that the model is not an encoder-decoder."""
        if config.is_encoder_decoder:
            raise InputError(f"the model {model!r} is an encoder-decoder: task_type=seq2seq")

    @torch.no_grad()
    def check_model(self, loaded: nn.Module, model: str) -> None:
        """Check that the model cannot see the tokens that it predicts, as an encoder with such a head can."""
        ids = torch.tensor([[1, 2, 3], [1, 2, 0]])
        first, second = loaded.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :2]
        if (first - second).abs().max() > 1e-4 * first.abs().max():
            raise InputError(f"the model {model!r} is not a decoder: its output at a token depends on later tokens")

    @classmethod
    def example(cls) -> Example:
        """Return a task on prompts and completions."""
        return Example(
            cls(cls.type),
            example_pairs(),
            lambda labels, outputs: perfect_logits(labels.roll(-1, 1), outputs),  # logits predict the next token
        )

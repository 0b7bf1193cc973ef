"""Sequence-to-sequence tasks: completions of prompts with an encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tinyspan.errors import InputError
from tinyspan.workflows.tasks.base import Encoding, Example, FromTransformers, Room, Split, register_type
from tinyspan.workflows.tasks.texts import Language, example_pairs, perfect_logits

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = ["Seq2Seq"]


@register_type("seq2seq")
@dataclass(frozen=True)
class Seq2Seq(Language):
    """The encoder reads a prompt, and the decoder predicts the tokens of its completion."""

    head = FromTransformers("AutoModelForSeq2SeqLM")
    encoder_decoder: ClassVar[bool] = True

    def _columns_of(self, rows: pd.DataFrame, what: str) -> tuple[str, ...]:
        columns = super()._columns_of(rows, what)
        if len(columns) < 2:
            expected = "prompt and completion, or two of other names (text=)"
            raise InputError(f"{what}: seq2seq needs the columns {expected}; found {', '.join(map(str, rows.columns))}")
        return columns

    def require_room(self, rows: Dataset, split: Split, room: Room, encoding: Encoding) -> None:
        """Check that prompts are not too long for the encoder, nor completions for the decoder."""
        super().require_room(rows, split, room, encoding)
        most = room.target_tokens
        if encoding.max_target_length > most:
            raise InputError(f"the decoder of {room.model!r} takes {most} tokens: max_target_length={most}")

    def check_config(self, config: Any, model: str) -> None:
        """Check that the model is an encoder-decoder whose config defines the decoder's first token."""
        if not config.is_encoder_decoder:
            raise InputError(f"the model {model!r} is not an encoder-decoder; for a decoder: task_type=causal-lm")
        absent = [name for name in ("decoder_start_token_id", "pad_token_id") if getattr(config, name, None) is None]
        if absent and config.model_type not in ("mbart", "plbart"):  # their decoders start with the last token
            raise InputError(f"the config of {model!r} has no {absent[0]}; set it there and save the model again")

    @classmethod
    def example(cls) -> Example:
        """Return a task on prompts and completions."""
        return Example(cls(cls.type), example_pairs(), perfect_logits)

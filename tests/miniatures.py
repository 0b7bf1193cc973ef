"""A decoder and an encoder-decoder small enough for seconds, and prompts in the made-up language."""

from typing import Any

import pandas as pd
import torch
from miniature_tasks import BAD, FILLER, GOOD, sentences
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["[PAD]", "[EOS]", "[UNK]", "good", "bad", *GOOD, *BAD, *FILLER]


def tokenizer(*, encoder_decoder: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    special: dict[str, Any] = {"eos_token": "[EOS]", "unk_token": "[UNK]", "model_max_length": 128}
    if encoder_decoder:  # as T5's, where a decoder's often has neither this token nor an end behind a prompt
        special["pad_token"] = "[PAD]"
        words.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def model_of(kind: str, seed: int = 0) -> Any:
    """Return a decoder (`causal-lm`) or encoder-decoder (`seq2seq`); GPT-2 and BART have absolute positions."""
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    bart = {"d_model": 16, "max_position_embeddings": 24, **{f"{a}_layers": 2 for a in ("encoder", "decoder")}}
    bart |= {f"{a}_{b}": 2 for a in ("encoder", "decoder") for b in ("attention_heads", "ffn_dim")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "causal-lm":
            return LlamaForCausalLM(LlamaConfig(**sizes, **common, num_key_value_heads=1, tie_word_embeddings=True))
        if kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=24))
        if kind == "bart":
            return BartForConditionalGeneration(
                BartConfig(**sizes, **bart, decoder_start_token_id=1, forced_eos_token_id=None)
            )
        return T5ForConditionalGeneration(T5Config(**sizes, **t5, decoder_start_token_id=0))


def reviews(rows: int, seed: int) -> pd.DataFrame:
    found = sentences(rows, seed)
    found["completion"] = ["good" if label else "bad" for label in found["label"]]
    return found.rename(columns={"sentence": "prompt"})[["prompt", "completion"]]

"""`by_layer` finds the layers of real model classes from their module tree, and the engine works on all of them.

Tiny, randomly initialised, float64; nothing is downloaded.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from tinyspan import Basis, SubspaceModel, by_layer, fastfood_basis, random_basis, whole_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
}
MORE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
    "bert": {},
    "deberta-v2": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "gemma": {"head_dim": 16, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2, "experts_implementation": "eager"},  # float64
    "modernbert": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "mpnet": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": {"num_key_value_heads": 2},
    "roberta": {},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    "vit": {"image_size": 32, "patch_size": 16},
}
BLOCKS = {"albert": 1, "bart": 4, "t5": 4}  # one shared layer; two stacks of two


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = AutoConfig.for_model(name, **{**SIZES, **MORE[name]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(config).double().eval()
        if name == "vit":
            return model, {"pixel_values": torch.randn(1, 3, 32, 32, dtype=torch.float64)}
    tokens = torch.arange(5)[None] + 3
    return model, {"input_ids": tokens, **({"decoder_input_ids": tokens} if name in ("bart", "t5") else {})}


@pytest.mark.parametrize("name", sorted(MORE))
def test_the_engine_on(name: str) -> None:
    model, inputs = build(name)
    partition = by_layer(model)
    assert len(partition) == BLOCKS.get(name, 2)
    names = [spec.name for spec in partition.parameters()]
    assert len(names) == len(set(names))

    plain = copy.deepcopy(model)
    drawn = random_basis(partition, 2)
    basis = Basis.from_directions(
        partition, {block.name: drawn.maps[block.name].directions.double() for block in partition}
    )
    subspace = SubspaceModel(model, basis)
    found = subspace(**inputs)[0]
    expected = plain(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # z = 0 is theta_0

    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * target).mean().backward()
    (expected * target).mean().backward()
    gradients = {key: value.grad for key, value in partition.select(plain).items()}
    for block, z in zip(partition, subspace.z, strict=True):
        whole = [gradients[spec.name] for spec in block.parameters]
        g = torch.cat([
            torch.zeros(spec.numel, dtype=torch.float64) if part is None else part.reshape(-1)
            for spec, part in zip(block.parameters, whole, strict=True)
        ])  # fmt: skip
        assert z.grad is not None
        torch.testing.assert_close(z.grad[0], basis.maps[block.name].rmatvec(g), rtol=1e-9, atol=1e-12)

    torch.optim.SGD(subspace.z.parameters(), lr=1e-2).step()
    with torch.no_grad():
        moved = subspace(**inputs)[0]
        assert (moved * target).mean() < (found * target).mean()
        assert torch.equal(subspace.merge()(**inputs)[0], moved)


@pytest.mark.parametrize("name", sorted(MORE))
def test_said_on(name: str) -> None:
    """One map over all layers and a scale for each, of which the plain model's gradients tell what should come out."""
    model, inputs = build(name)
    plain, layers, (block,) = copy.deepcopy(model), by_layer(model), whole_model(model)
    basis = fastfood_basis(whole_model(model), 6)
    subspace = SubspaceModel(model, basis, init_std=1e-3, layer_scales=layers)
    change = basis.maps[block.name].matvec(subspace.z[0].detach()[0])
    weights = whole_model(plain).select(plain)
    with torch.no_grad():
        for key, part in block.unflatten(change).items():
            weights[key] += part
    found, expected = subspace(**inputs)[0], plain(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    found.square().mean().backward()
    expected.square().mean().backward()
    g = block.flatten({key: torch.zeros_like(w) if w.grad is None else w.grad for key, w in weights.items()})
    torch.testing.assert_close(subspace.z[0].grad[0], basis.maps[block.name].rmatvec(g), rtol=1e-9, atol=1e-12)
    products = block.unflatten(g * change)
    of_scales = [sum(products[spec.name].sum() for spec in layer.parameters) for layer in layers]
    torch.testing.assert_close(subspace.scales.grad, torch.stack(of_scales), rtol=1e-9, atol=1e-12)

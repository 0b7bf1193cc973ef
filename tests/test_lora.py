"""LoRA folders that the real peft loads."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyspan import InputError, SubspaceModel, by_layer, by_pattern, random_basis
from tinyspan.lora import export_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def made(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            config: Any = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, pad_token_id=0)
            return transformers.GPT2ForSequenceClassification(config).eval()
        named = {"bert": "Bert", "roberta": "Roberta", "llama": "Llama"}[kind]
        config = getattr(transformers, f"{named}Config")(**SMALL, pad_token_id=0)
        return getattr(transformers, f"{named}ForSequenceClassification")(config).eval()  # type: ignore[no-any-return]


def trained(kind: str, density: float = 1.0) -> SubspaceModel:
    """Away from theta_0 in every way: z, head."""
    model = made(kind)
    head = "score" if kind in ("gpt2", "llama") else "classifier"
    subspace = SubspaceModel(
        model, random_basis(by_layer(model), 4, density=density), modules_to_save=[head], start_std=2
    )
    with torch.no_grad():
        for parameter in getattr(model, head).parameters():
            parameter += 0.3
    return subspace


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(5, 17).view(2, 6)).logits
    return found


def loaded(kind: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that it misses
        return peft.PeftModel.from_pretrained(made(kind), str(folder))


@pytest.mark.parametrize("density", [1.0, 0.01])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
def test_peft_loads_the_same_model(kind: str, density: float, tmp_path: Path) -> None:
    """Whole rank, float32: 1e-5 is left for the factors' rounding."""
    subspace = trained(kind, density)
    exported = export_lora(subspace, tmp_path / "lora")
    assert exported.error < 1e-5
    expected = logits(subspace)
    assert not torch.allclose(expected, logits(made(kind)), atol=1e-2)
    model = loaded(kind, tmp_path / "lora")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_cut_is_the_best_of_its_rank_and_its_error_is_told(tmp_path: Path) -> None:
    subspace = trained("bert")
    missed = total = 0.0
    exported = export_lora(subspace, tmp_path / "lora", rank=3)
    assert set(exported.ranks.values()) == {3}
    model = loaded("bert", tmp_path / "lora")
    for name, update in subspace.update().items():
        owner, _, kind = name.rpartition(".")
        module = model.base_model.model.get_submodule(owner)
        if kind == "weight" and hasattr(module, "lora_A"):
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            values = torch.linalg.svdvals(update.double())
            torch.testing.assert_close(float((update - product).norm()), float(values[3:].norm()), rtol=1e-4, atol=1e-6)
            missed, total = missed + float((update - product).square().sum()), total + float(update.square().sum())
    assert exported.error == pytest.approx((missed / total) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.0])
def test_an_error_bound_is_kept_with_the_smallest_ranks(bound: float, tmp_path: Path) -> None:
    subspace = trained("bert")
    exported = export_lora(subspace, tmp_path / "lora", error=bound)
    assert exported.error <= bound + 1e-6
    for owner, rank in exported.ranks.items():
        values = torch.linalg.svdvals(subspace.update()[f"{owner}.weight"].double())
        assert float(values[rank:].norm()) <= bound * float(values.norm()) + 1e-9
        assert rank == 1 or float(values[rank - 1 :].norm()) > bound * float(values.norm())


def test_norms_and_heads_are_whole_whatever_the_rank(tmp_path: Path) -> None:
    subspace = trained("roberta")
    export_lora(subspace, tmp_path / "lora", rank=1)
    merged = loaded("roberta", tmp_path / "lora").merge_and_unload().state_dict()
    expected = subspace.state_dict()
    for name, value in merged.items():
        if "LayerNorm" in name or "classifier" in name or name.endswith(".bias"):
            torch.testing.assert_close(value, expected[f"model.{name}"], rtol=0, atol=0)


def test_misuse(tmp_path: Path) -> None:
    subspace = trained("bert")
    for cut in ({"rank": 2, "error": 0.1}, {"rank": 0}, {"rank": -1}, {"error": 1.0}, {"error": -0.1}):
        with pytest.raises(InputError, match="rank of at least 1"):
            export_lora(subspace, tmp_path / "lora", **cut)  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(InputError, match="holds something"):
        export_lora(subspace, tmp_path / "full")
    still = SubspaceModel(made("bert"), random_basis(by_layer(made("bert")), 2))
    with pytest.raises(InputError, match="was z trained"):
        export_lora(still, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


class Odd(nn.Module):
    """Names that are suffixes of others, running means, and, if wanted, a bias of its own."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.sub = nn.ModuleDict({"fc": nn.Linear(6, 6)})
        if bias:
            self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fc(x)) + self.sub["fc"](x)
        return out


def test_names_that_end_alike_and_running_means(tmp_path: Path) -> None:
    model = Odd()
    basis = random_basis(by_pattern(model, {"all": "fc.weight|sub.fc.weight"}), 2)
    subspace = SubspaceModel(model, basis, start_std=3)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    subspace(x)  # in training mode: the running means move
    subspace.eval()
    exported = export_lora(subspace, tmp_path / "lora", error=0.3)
    assert exported.ranks.keys() == {"fc", "sub.fc"}
    found = peft.PeftModel.from_pretrained(Odd(), str(tmp_path / "lora")).eval()
    exact = export_lora(subspace, tmp_path / "exact")
    whole = peft.PeftModel.from_pretrained(Odd(), str(tmp_path / "exact")).eval()
    torch.testing.assert_close(whole(x), subspace(x), rtol=1e-4, atol=1e-4)
    assert exact.error < 1e-5
    torch.testing.assert_close(found.base_model.model.norm(x), subspace.model.norm(x), rtol=1e-5, atol=1e-5)


def test_a_parameter_that_no_adapter_of_peft_can_carry_is_refused(tmp_path: Path) -> None:
    model = Odd(bias=True)
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "fc.*|bias"}), 2), start_std=1)
    with pytest.raises(InputError, match="'bias' is no weight"):
        export_lora(subspace, tmp_path / "lora")

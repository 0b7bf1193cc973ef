"""LoRA folders that the real peft loads, and those that it wrote."""

import copy
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from towers import trainable_counts

from tinyspan import (
    Basis,
    InputError,
    MismatchError,
    StorageError,
    SubspaceModel,
    TrajectoryRecorder,
    by_layer,
    by_pattern,
    fastfood_basis,
    random_basis,
    svd_basis,
    trainable_by_layer,
)
from tinyspan.analysis import principal_angles
from tinyspan.labels import label_names, set_label_names
from tinyspan.lora import Lora, export_lora, import_lora, lora_basis, read_lora, sharing

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def made(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            config: Any = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, pad_token_id=0)
            return transformers.GPT2ForSequenceClassification(config).eval()
        if kind == "distilbert":
            config = transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50)
            return transformers.DistilBertForSequenceClassification(config).eval()
        named = {"bert": "Bert", "roberta": "Roberta", "llama": "Llama"}[kind]
        config = getattr(transformers, f"{named}Config")(**SMALL, pad_token_id=0)
        return getattr(transformers, f"{named}ForSequenceClassification")(config).eval()  # type: ignore[no-any-return]


def trained(kind: str, density: float = 1.0) -> SubspaceModel:
    """Away from theta_0 in every way: z, head."""
    model = made(kind)
    head = "score" if kind in ("gpt2", "llama") else "classifier"
    subspace = SubspaceModel(
        model, random_basis(by_layer(model), 4, density=density), modules_to_save=[head], init_std=2
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
    for name, update in subspace.delta().items():
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
        values = torch.linalg.svdvals(subspace.delta()[f"{owner}.weight"].double())
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
        with pytest.raises(InputError, match="rank= of at least 1"):
            export_lora(subspace, tmp_path / "lora", **cut)  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(InputError, match="is not empty"):
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
    subspace = SubspaceModel(model, basis, init_std=3)
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


def test_modules_whose_names_end_alike_come_along(tmp_path: Path) -> None:
    """PEFT takes pre_classifier for classifier, and misses its weights unless they are there."""

    model = made("distilbert")
    kept = ["classifier", "embeddings", "embeddings.LayerNorm"]
    subspace = SubspaceModel(model, random_basis(by_layer(model), 3), modules_to_save=kept, init_std=2).eval()
    with torch.no_grad():
        for parameter in (*model.classifier.parameters(), *model.distilbert.embeddings.parameters()):
            parameter += 0.3
    export_lora(subspace, tmp_path / "lora")
    found = peft.PeftModel.from_pretrained(made("distilbert"), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(found), logits(subspace), rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """Names that PEFT confuses: `norm` ends the name of a linear layer, and a buffer of the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.prenorm = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.prenorm(self.fc(x))) + self.count
        return out


def test_modules_that_peft_would_confuse_are_refused(tmp_path: Path) -> None:
    model = Nested()
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "fc.*|prenorm.*|norm.*"}), 2), init_std=1)
    with pytest.raises(InputError, match=r"ends of their names, \['norm'\], would save 'prenorm' completely"):
        export_lora(subspace, tmp_path / "lora")
    model = Nested()
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "fc.*"}), 2), init_std=1)
    model.count.fill_(1)
    with pytest.raises(InputError, match="a buffer of the model itself has changed"):
        export_lora(subspace, tmp_path / "lora")
    model = nn.TransformerEncoderLayer(8, 2, 16)
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "self_attn.out_proj.*"}), 2), init_std=1)
    with pytest.raises(InputError, match="bypasses a LoRA there"):
        export_lora(subspace, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_model_that_is_one_linear_layer_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": ".*"}), 2), init_std=1)
    with pytest.raises(InputError, match="a LoRA cannot represent 'weight'; export a merged model"):
        export_lora(subspace, tmp_path / "lora")


def test_a_parameter_that_no_adapter_of_peft_can_carry_is_refused(tmp_path: Path) -> None:
    model = Odd(bias=True)
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "fc.*|bias"}), 2), init_std=1)
    with pytest.raises(InputError, match="a LoRA cannot represent 'bias'"):
        export_lora(subspace, tmp_path / "lora")


# -- in ---------------------------------------------------------------------------------------------------------------

TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "roberta": ["query", "value"],
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}


def written(kind: str, folder: Path, seed: int = 0, **options: Any) -> Any:
    """A LoRA of random numbers and a moved head, saved by peft; the model that holds it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        task = {"task_type": "SEQ_CLS"} | options
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[kind], init_lora_weights=False, **task)
        model = peft.get_peft_model(made(kind), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter += torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return model


def head(kind: str) -> list[str]:
    return ["score" if kind in ("gpt2", "llama") else "classifier"]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {".*layer.0.*query": 2}}])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_a_lora_is_read_as_peft_merges_it(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = written(kind, tmp_path, **options)
    base = made(kind)
    lora = read_lora(base, tmp_path)
    merged, start = model.merge_and_unload().state_dict(), base.state_dict()
    moved = {name for name in start if not torch.equal(merged[name], start[name])}
    assert moved == lora.factors.keys() | lora.directly_trained.keys()
    for name, (left, right) in lora.factors.items():
        assert left.shape[1] == len(right) <= 3
        torch.testing.assert_close(start[name].double() + left @ right, merged[name].double(), rtol=1e-5, atol=1e-6)
    for name, value in lora.directly_trained.items():
        assert torch.equal(merged[name], value)


def test_patterns_of_alpha(tmp_path: Path) -> None:
    model = written("bert", tmp_path, alpha_pattern={"layer.1.attention.self.query": 11})
    lora, merged = read_lora(made("bert"), tmp_path), model.merge_and_unload().state_dict()
    for name, (left, right) in lora.factors.items():
        update = merged[name].double() - made("bert").state_dict()[name].double()
        torch.testing.assert_close(left @ right, update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_many_loras_become_one_basis_and_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    """Through memory, disk and back into peft: float32 leaves 1e-5."""
    expected = {}
    for seed in range(3):
        expected[seed] = logits(written(kind, tmp_path / f"{seed}", seed))
    base = made(kind)
    loras = [read_lora(base, tmp_path / f"{seed}") for seed in range(3)]
    basis = lora_basis(base, loras)
    basis.save_pretrained(tmp_path / "basis")
    subspace = SubspaceModel(base, basis, modules_to_save=head(kind)).eval()
    for seed, lora in enumerate(loras):
        assert import_lora(subspace, lora, f"{seed}") < 1e-6
    for seed in range(3):
        subspace.set_adapter(f"{seed}")
        torch.testing.assert_close(logits(subspace), expected[seed], rtol=1e-4, atol=1e-5)
    subspace.save_pretrained(tmp_path / "adapter")
    again = SubspaceModel.from_pretrained(made(kind), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), expected[2], rtol=1e-4, atol=1e-5)
    exported = export_lora(again, tmp_path / "out")
    assert set(exported.ranks.values()) == {3}  # as many as it came with
    torch.testing.assert_close(logits(loaded(kind, tmp_path / "out")), expected[2], rtol=1e-4, atol=1e-5)
    subspace.add_weighted_adapter(["0", "1", "2"], [1 / 3] * 3, "mean")
    subspace.set_adapter("mean")
    for name, update in subspace.delta().items():
        mean = sum(left @ right for left, right in (lora.factors[name] for lora in loras)) / 3
        torch.testing.assert_close(update.double(), mean, rtol=1e-4, atol=1e-6)


def three(folder: Path) -> list[Lora]:
    for seed in range(3):
        written("bert", folder / f"{seed}", seed)
    return [read_lora(made("bert"), folder / f"{seed}") for seed in range(3)]


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_the_basis_is_the_dense_singular_vectors(rank: int, tmp_path: Path) -> None:
    loras = three(tmp_path)
    basis = lora_basis(made("bert"), loras, rank=rank)
    for name, v in basis.maps.items():
        updates = [left @ right for left, right in (lora.factors[name] for lora in loras)]
        updates = [update / update.norm() for update in updates]
        kept = min(rank, 9, *updates[0].shape)
        assert (v.left.shape[1], len(v.right)) == (kept, kept)  # type: ignore[attr-defined]
        for whole, found in ((torch.cat(updates, 1), v.left.T), (torch.cat(updates).T, v.right)):  # type: ignore[attr-defined]
            expected = torch.linalg.svd(whole).U[:, :kept].T
            assert float(principal_angles(expected, found.double()).max()) < 1e-6
        torch.testing.assert_close(
            basis.spectrum[name][:kept], torch.linalg.svdvals(torch.cat(updates, 1))[:kept], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("error", [0.8, 0.3, 0.01])
def test_an_error_bound_holds_for_every_weight(error: float, tmp_path: Path) -> None:
    loras = three(tmp_path)
    basis = lora_basis(made("bert"), loras, error=error)
    assert (basis.rank < 81) == (error > 0.1)  # 3 x 3 directions a side, none of them small
    for name, v in basis.maps.items():
        updates = [(left @ right).reshape(-1) for left, right in (lora.factors[name] for lora in loras)]
        lost = [float((u - v.matvec(v.rmatvec(u))).square().sum() / u.square().sum()) for u in updates]
        assert sum(lost) / len(lost) <= error**2


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_a_lora_goes_into_any_orthonormal_basis(density: float, tmp_path: Path) -> None:
    """z = V^T dW, and the error told, against dense vectors."""
    written("bert", tmp_path)
    base = made("bert")
    lora, basis = read_lora(base, tmp_path), random_basis(by_layer(base), 8, density=density)
    subspace = SubspaceModel(base, basis, modules_to_save=["classifier"], ensemble=2)
    error = import_lora(subspace, lora, "from peft")
    subspace.set_adapter("from peft")
    lost = total = 0.0
    for block, z in zip(subspace.blocks, subspace.z, strict=True):
        update = torch.zeros(block.numel, dtype=torch.float64)
        for spec, start, stop in block.spans():
            if spec.name in lora.factors:
                update[start:stop] = (lora.factors[spec.name][0] @ lora.factors[spec.name][1]).reshape(-1)
        v = basis.maps[block.name].dense(torch.float64)  # type: ignore[attr-defined]
        torch.testing.assert_close(z.mean(0).double(), v @ update, rtol=1e-5, atol=1e-6)
        lost += float((update - v.T @ (v @ update)).square().sum())
        total += float(update.square().sum())
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert 0.5 < error < 1


def test_a_lora_brings_the_names_of_its_labels(tmp_path: Path) -> None:
    turned = trained("bert")
    set_label_names(turned.model, ("positive", "negative"))
    export_lora(turned, tmp_path / "turned")
    written("bert", tmp_path / "unnamed")
    base = made("bert")
    set_label_names(base, ("negative", "positive"))
    subspace = SubspaceModel(base, random_basis(by_layer(base), 4), modules_to_save=["classifier"])
    headless = replace(read_lora(base, tmp_path / "unnamed"), directly_trained={})
    for name, lora, labels, expected in (
        ("turned", read_lora(base, tmp_path / "turned"), ("positive", "negative"), ("positive", "negative")),
        ("unnamed", read_lora(base, tmp_path / "unnamed"), None, None),
        ("headless", headless, None, ("negative", "positive")),
    ):
        assert lora.labels == labels
        import_lora(subspace, lora, name)
        subspace.set_adapter(name)
        assert label_names(subspace.model) == expected


def test_a_module_saved_as_a_whole_goes_into_the_basis_of_loras(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    for name, options in (("a", {"target_modules": ["0", "1"]}), ("b", {"modules_to_save": ["1"]})):
        config = peft.LoraConfig(r=1, init_lora_weights=False, **{"target_modules": ["0"], **options})
        model = peft.get_peft_model(base(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * parameter.requires_grad)
        model.save_pretrained(tmp_path / name)
    model = base()
    loras = [read_lora(model, tmp_path / name) for name in ("a", "b")]
    basis = lora_basis(model, loras[:1])
    del loras[1].directly_trained["1.bias"]  # which lies in no block
    subspace = SubspaceModel(model, basis)
    import_lora(subspace, loras[1], "b")
    moved = loras[1].directly_trained["1.weight"].double() - subspace.base_weights()["1.weight"].double()
    expected = basis.maps["1.weight"].rmatvec(moved.reshape(-1))
    torch.testing.assert_close(subspace.bank.state_of("b").z["1.weight"][0].double(), expected)


@pytest.mark.parametrize("shape", [(0,), (8,)])
def test_shards_that_were_not_gathered_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(
        tmp_path
    )
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.0.lora_A.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lora_A.weight' has the shape .*, expected a matrix; was it saved"):
        read_lora(nn.Sequential(nn.Linear(4, 3)), tmp_path)


def test_a_parameter_of_another_shape_is_not_broadcast(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": ".*"}), 2))
    factors = {"0.weight": (torch.ones(3, 1).double(), torch.ones(1, 4).double())}
    lora = Lora("one", factors, {"0.bias": torch.ones(1)}, [], "")
    with pytest.raises(MismatchError, match=r"'0.bias' has the shape \[1\] in the adapter and \[3\] in the model"):
        import_lora(subspace, lora, "one")


def test_training_goes_on(tmp_path: Path) -> None:
    loras = three(tmp_path)
    base = made("bert")
    subspace = SubspaceModel(base, lora_basis(base, loras, rank=4), modules_to_save=["classifier"]).eval()
    import_lora(subspace, loras[0], "first")
    subspace.set_adapter("first")
    optimizer = torch.optim.AdamW(subspace.parameter_groups(5e-2, 0.0))  # z alone, the head stays
    losses = []
    for _ in range(20):
        out = subspace(input_ids=torch.arange(5, 17).view(2, 6), labels=torch.tensor([0, 1]))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_what_adapters_share(tmp_path: Path) -> None:
    loras = three(tmp_path)
    found = sharing(loras)
    names = sorted(loras[0].factors)
    whole = [torch.cat([(one.factors[n][0] @ one.factors[n][1]).reshape(-1) for n in names]) for one in loras]
    mean = sum(whole) / 3
    assert found.mean_share == pytest.approx(float((sum(w / w.norm() for w in whole) / 3).square().sum()))
    for index, vector in enumerate(whole):
        assert found.without[index] == pytest.approx(float((vector - mean).norm() / vector.norm()))
        others = lora_basis(made("bert"), [*loras[:index], *loras[index + 1 :]])
        lost = 0.0
        for name in names:
            update = (loras[index].factors[name][0] @ loras[index].factors[name][1]).reshape(-1)
            lost += float((update - others.maps[name].matvec(others.maps[name].rmatvec(update))).square().sum())
        assert found.unseen[index] == pytest.approx((lost / float(vector.square().sum())) ** 0.5, rel=1e-4)
    assert found.mean_share == pytest.approx(1 / 3, abs=0.1)  # drawn apart from each other
    assert found.chance == pytest.approx(sum(found.unseen) / 3, abs=0.05)
    alike = sharing([loras[0], loras[0]])
    assert alike.mean_share == pytest.approx(1)
    assert max(*alike.without, *alike.unseen) < 1e-4  # the ridge is 1e-10, of squares
    larger = replace(loras[0], factors={name: (10 * left, right) for name, (left, right) in loras[0].factors.items()})
    assert sharing([loras[0], larger]).mean_share == pytest.approx(1)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_loras_that_cannot_be_read(tmp_path: Path) -> None:
    base = made("bert")
    for name, options, match in (
        ("dora", {"use_dora": True}, "lora_magnitude_vector"),
        ("embedding", {"target_modules": ["word_embeddings"]}, "lora_embedding_A"),
        ("bias", {"lora_bias": True}, "lora_B.bias"),
    ):
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["query"], **options})  # type: ignore[arg-type]
        peft.get_peft_model(made("bert"), config).save_pretrained(str(tmp_path / name))
        with pytest.raises(InputError, match=match):
            read_lora(base, tmp_path / name)
    peft.get_peft_model(made("bert"), peft.VeraConfig(r=2, target_modules=["query"])).save_pretrained(
        str(tmp_path / "vera")
    )
    with pytest.raises(InputError, match="VERA"):
        read_lora(base, tmp_path / "vera")
    with pytest.raises(InputError, match="not an adapter"):
        read_lora(base, tmp_path)
    written("bert", tmp_path / "good")
    with pytest.raises(InputError, match="in no linear layer"):
        read_lora(made("gpt2"), tmp_path / "good")
    wide = transformers.BertForSequenceClassification(transformers.BertConfig(**{**SMALL, "hidden_size": 32}))
    with pytest.raises(MismatchError, match="another model"):
        read_lora(wide, tmp_path / "good")
    file = tmp_path / "good" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(StorageError, match="cannot be read"):
        read_lora(base, tmp_path / "good")
    file.unlink()
    with pytest.raises(InputError, match="needs adapter_config"):
        read_lora(base, tmp_path / "good")
    (tmp_path / "good/adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(StorageError, match=r"adapter_model\.bin is damaged"):
        read_lora(base, tmp_path / "good")
    with pytest.raises(InputError, match="neither a folder nor"):
        read_lora(base, tmp_path / "nothing")
    for name, option in (("replicated", "layer_replication"), ("tokens", "trainable_token_indices")):
        written("bert", tmp_path / name)
        edited(tmp_path / name, **{option: [[0, 1], [0, 1]]})
        with pytest.raises(InputError, match=option):
            read_lora(base, tmp_path / name)
    for changes in ({"peft_type": None}, {"peft_type": "NOPE"}, {"lora_alpha": None}, {"lora_alpha": "a"}):
        written("bert", tmp_path / "odd")
        edited(tmp_path / "odd", **changes)
        with pytest.raises(StorageError, match=r"adapter_config\.json is damaged"):
            read_lora(base, tmp_path / "odd")
    pissa = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa")
    peft.get_peft_model(made("bert"), pissa).save_pretrained(str(tmp_path / "pissa"))
    with pytest.raises(InputError, match="changed the base weights"):
        read_lora(base, tmp_path / "pissa")


def test_misuse_of_loras(tmp_path: Path) -> None:
    loras = three(tmp_path)
    base = made("bert")
    for cut in ({"rank": 2, "error": 0.1}, {"rank": 0}, {"error": 1.0}):
        with pytest.raises(InputError, match="rank= of at least 1"):
            lora_basis(base, loras, **cut)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one"):
        lora_basis(base, [])
    with pytest.raises(InputError, match="at least two"):
        sharing(loras[:1])
    with pytest.raises(MismatchError, match="no parameter"):
        lora_basis(made("gpt2"), loras)
    with pytest.raises(InputError, match=r"modules_to_save=\['classifier'"):
        import_lora(SubspaceModel(made("bert"), lora_basis(made("bert"), loras)), loras[0], "a")
    narrow = by_pattern(made("bert"), {"queries": ".*query.weight"})
    with pytest.raises(MismatchError, match="no block"):
        import_lora(SubspaceModel(made("bert"), random_basis(narrow, 2), modules_to_save=["classifier"]), loras[0], "a")
    fast = SubspaceModel(made("bert"), fastfood_basis(by_layer(base), 4), modules_to_save=["classifier"])
    with pytest.raises(InputError, match="orthonormal"):
        import_lora(fast, loras[0], "a")
    subspace = SubspaceModel(base, lora_basis(base, loras), modules_to_save=["classifier"])
    import_lora(subspace, loras[0], "a")
    three_classes = replace(loras[1], directly_trained={"classifier.weight": torch.zeros(3, 16)})
    with pytest.raises(MismatchError, match="another task"):
        import_lora(subspace, three_classes, "b")
    with pytest.raises(MismatchError, match=r"no 'score\.weight'"):
        import_lora(subspace, replace(loras[1], directly_trained={"score.weight": torch.zeros(2, 16)}), "b")
    assert subspace.adapters == ["default", "a"]
    with pytest.raises(InputError, match="another name"):
        import_lora(subspace, loras[0], "a")
    peft.get_peft_model(made("bert"), peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(
        str(tmp_path / "new")
    )
    with pytest.raises(InputError, match="was it trained"):
        read_lora(made("bert"), tmp_path / "new")
    moved = SubspaceModel(made("bert"), random_basis(by_layer(base), 2), init_std=1)
    with pytest.raises(InputError, match="not theta_0"):
        lora_basis(moved.model, loras)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_what_goes_out_comes_in_again(kind: str, tmp_path: Path) -> None:
    """With the norms and biases that lie in the blocks; whole rank, so only float32 is lost."""
    subspace = trained(kind)
    expected = logits(subspace)
    export_lora(subspace, tmp_path / "lora")
    again = SubspaceModel(made(kind), subspace.basis, modules_to_save=head(kind)).eval()
    assert import_lora(again, read_lora(again.model, tmp_path / "lora"), "back") < 1e-5
    again.set_adapter("back")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(again.z, subspace.z, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_come_along(bias: str, tmp_path: Path) -> None:
    expected = []
    for seed in range(2):
        written("bert", tmp_path / f"{seed}", seed, bias=bias)
        model = loaded("bert", tmp_path / f"{seed}")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("query.base_layer.bias"):
                    parameter += seed + 0.5
        model.save_pretrained(str(tmp_path / f"{seed}"))
        expected.append(logits(model))
    base = made("bert")
    loras = [read_lora(base, tmp_path / f"{seed}") for seed in range(2)]
    assert loras[0].modules == ["classifier"]
    subspace = SubspaceModel(base, lora_basis(base, loras), modules_to_save=["classifier"]).eval()
    for seed, lora in enumerate(loras):
        assert import_lora(subspace, lora, f"{seed}") < 1e-6
        subspace.set_adapter(f"{seed}")
        torch.testing.assert_close(logits(subspace), expected[seed], rtol=1e-4, atol=1e-5)
    plain = SubspaceModel(made("bert"), lora_basis(made("bert"), three(tmp_path)), modules_to_save=["classifier"])
    with pytest.raises(InputError, match="use a basis that contains it"):
        import_lora(plain, loras[0], "no biases")


def test_modules_that_peft_saves_beside(tmp_path: Path) -> None:
    """PEFT takes every module whose name ends so: pre_classifier too, where classifier is asked for."""

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], init_lora_weights=False)
    model = peft.get_peft_model(made("distilbert"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.3
    model.save_pretrained(str(tmp_path))
    lora = read_lora(made("distilbert"), tmp_path)
    assert set(lora.modules) == {"pre_classifier", "classifier"}
    plain = made("distilbert")
    subspace = SubspaceModel(plain, lora_basis(plain, [lora]), modules_to_save=lora.modules).eval()
    import_lora(subspace, lora, "a")
    subspace.set_adapter("a")
    torch.testing.assert_close(logits(subspace), logits(model), rtol=1e-4, atol=1e-5)


def test_a_weight_that_no_adapter_moves_and_very_unequal_ones(tmp_path: Path) -> None:
    model = written("bert", tmp_path / "a")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer.0.attention.self.query.lora_B" in name:
                parameter.zero_()
            elif "lora_B" in name:
                parameter *= 1e-5
    model.save_pretrained(str(tmp_path / "a"))
    expected = logits(model)
    written("bert", tmp_path / "b", 1)
    base = made("bert")
    still = read_lora(base, tmp_path / "a")
    assert "bert.encoder.layer.0.attention.self.query.weight" not in still.factors
    lora_basis(base, [still]).save_pretrained(tmp_path / "basis")
    subspace = SubspaceModel(base, Basis.from_pretrained(tmp_path / "basis"), modules_to_save=["classifier"]).eval()
    assert import_lora(subspace, still, "a") < 1e-6
    subspace.set_adapter("a")
    torch.testing.assert_close(logits(subspace), expected, rtol=1e-4, atol=1e-6)
    both = [still, read_lora(made("bert"), tmp_path / "b")]
    for cut, most in (({}, 1e-6), ({"error": 0.1}, 0.15)):
        base = made("bert")
        subspace = SubspaceModel(base, lora_basis(base, both, **cut), modules_to_save=["classifier"])
        assert import_lora(subspace, still, "small") < most


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_lora_of_parameters_is_read_as_peft_merges_it(kind: str, tmp_path: Path) -> None:
    """Asked for by `target_parameters`, a Conv1D's weight is updated as it lies in memory."""
    target = {"gpt2": "attn.c_proj.weight", "bert": "attention.output.dense.weight"}[kind]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[target], init_lora_weights=False)
    model = peft.get_peft_model(made(kind), config)
    model.save_pretrained(str(tmp_path))
    lora = read_lora(made(kind), tmp_path)
    before, after = made(kind), model.merge_and_unload()
    for name, (left, right) in lora.factors.items():
        moved = after.get_parameter(name).double() - before.get_parameter(name).double()
        torch.testing.assert_close(left @ right, moved, rtol=1e-4, atol=1e-6)
    assert len(lora.factors) == 2


def test_the_hash_knows_what_the_factors_are_scaled_by(tmp_path: Path) -> None:
    written("bert", tmp_path)
    first = read_lora(made("bert"), tmp_path)
    edited(tmp_path, lora_alpha=50)
    other = read_lora(made("bert"), tmp_path)
    assert first.content_hash != other.content_hash
    for name, (left, _) in first.factors.items():
        torch.testing.assert_close(other.factors[name][0], 10 * left)


def test_tied_weights_are_refused_both_ways(tmp_path: Path) -> None:
    """PEFT would change one of two names, and so another model than ours."""

    def base() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))

    model = base()
    subspace = SubspaceModel(model, random_basis(by_layer(model), 2), modules_to_save=["wte"], init_std=1)
    with pytest.raises(InputError, match=r"is 'lm_head\.weight' too"):
        export_lora(subspace, tmp_path / "out")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(base(), config).save_pretrained(str(tmp_path / "head"))
    with pytest.raises(InputError, match=r"is tied to 'transformer\.wte\.weight'"):
        read_lora(base(), tmp_path / "head")
    for kept in (["wte"], ["lm_head"], ["wte", "lm_head"]):
        for moves in (0.0, 0.1):
            folder = tmp_path / f"{'-'.join(kept)}-{moves}"
            config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=kept, init_lora_weights=False)
            model = peft.get_peft_model(base(), config).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "modules_to_save" in name:
                        parameter += moves
            model.save_pretrained(str(folder))
            if moves and len(kept) == 1:
                with pytest.raises(InputError, match=r"is tied to '(transformer\.wte|lm_head)\.weight'"):
                    read_lora(base(), folder)
                continue
            if not moves:  # nor has one that was rounded with its base
                copy.deepcopy(model).bfloat16().save_pretrained(str(tmp_path / "half"))
                assert read_lora(base(), tmp_path / "half").factors
            plain = base().eval()
            lora = read_lora(plain, folder)  # both have moved, and alike, or neither
            subspace = SubspaceModel(plain, lora_basis(plain, [lora]), modules_to_save=lora.modules).eval()
            import_lora(subspace, lora, "a")
            subspace.set_adapter("a")
            torch.testing.assert_close(logits(subspace), logits(model), rtol=1e-4, atol=1e-5)


def test_updates_are_exact_inside_autocast(tmp_path: Path) -> None:
    base = made("bert")
    subspace = SubspaceModel(base, lora_basis(base, three(tmp_path)), init_std=1)
    expected = subspace.delta()
    with torch.autocast("cpu", torch.bfloat16):
        found = subspace.delta()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_a_roberta_classifier_with_a_saved_head_is_merged(density: float, tmp_path: Path) -> None:
    """Into a plain model: peft 0.21 raises AttributeError here for VeRA and Uni-LoRA."""
    subspace = trained("roberta", density)
    expected = logits(subspace)
    subspace.save_pretrained(tmp_path / "adapter", self_contained=True)
    SubspaceModel.from_pretrained(made("roberta"), tmp_path / "adapter").merge().save_pretrained(tmp_path / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_without_peft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written("bert", tmp_path / "a")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"tinyspan\[peft\]"):
        read_lora(made("bert"), tmp_path / "a")


# -- a subspace of one ------------------------------------------------------------------------------------------------


def fresh(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same base model and the same new LoRA every time; PEFT keeps the LoRA in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=TARGETS[kind], task_type="SEQ_CLS")
        return peft.get_peft_model(made(kind).to(dtype), config).eval()


def fitted(model: Any, parameters: Any, recorder: TrajectoryRecorder | None = None, steps: int = 6) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-2), []
    for step in range(steps):
        loss = model(input_ids=torch.arange(5, 17).view(2, 6), labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if recorder is not None:
            recorder.record(step)
    return losses


@pytest.mark.parametrize("kind", list(TARGETS))
def test_a_lora_is_recorded_and_trained_again_in_its_own_directions(kind: str, tmp_path: Path) -> None:
    """At the cost of the adapter: no number of the base model is recorded, and none has directions."""
    model = fresh(kind)
    partition = trainable_by_layer(model)
    lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert {spec.name for spec in partition.parameters()} == lora.keys()
    assert len(partition) == 2
    recorder = TrajectoryRecorder(model, partition, tmp_path / "path")
    plain = fitted(model, [p for p in model.parameters() if p.requires_grad], recorder)
    basis = svd_basis(recorder.trajectory(), 3)

    subspace = SubspaceModel(fresh(kind), basis, modules_to_save=head(kind))
    assert trainable_counts(subspace)[0] == 2 * 3
    trained = {name for name, p in subspace.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert trained == {f"model.{n}" for n, p in fresh(kind).named_parameters() if "modules_to_save" in n}
    losses = fitted(subspace, subspace.parameter_groups(0.3, 3e-2))
    assert losses[0] == pytest.approx(plain[0], abs=1e-6)
    assert losses[-1] < losses[0]
    expected = logits(subspace)
    subspace.save_pretrained(tmp_path / "adapter", self_contained=True)
    again = SubspaceModel.from_pretrained(fresh(kind), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)

    subspace.merge().save_pretrained(str(tmp_path / "lora"))  # an ordinary LoRA, for anyone who has PEFT
    torch.testing.assert_close(logits(loaded(kind, tmp_path / "lora")), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(subspace.model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_the_base_model_of_a_lora_may_be_half_precision(tmp_path: Path) -> None:
    model = fresh("llama", torch.bfloat16)
    partition = trainable_by_layer(model)
    assert {spec.dtype for spec in partition.parameters()} == {torch.float32}
    recorder = TrajectoryRecorder(model, partition, tmp_path / "path")
    fitted(model, [p for p in model.parameters() if p.requires_grad], recorder)
    subspace = SubspaceModel(fresh("llama", torch.bfloat16), svd_basis(recorder.trajectory(), 2))
    losses = fitted(subspace, subspace.parameter_groups(0.3, 0))
    assert losses[-1] < losses[0]
    subspace.save_pretrained(tmp_path / "adapter", self_contained=True)
    again = SubspaceModel.from_pretrained(fresh("llama", torch.bfloat16), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(subspace))


def test_the_base_model_of_a_lora_may_hold_whole_numbers(tmp_path: Path) -> None:
    """As a quantized one does: in the fingerprint, in no block."""

    def quantized() -> Any:
        model = fresh("llama")
        model.base_model.model.model.codes = nn.Parameter(torch.arange(9, dtype=torch.int8), requires_grad=False)
        return model

    model = quantized()
    subspace = SubspaceModel(model, random_basis(trainable_by_layer(model), 2), init_std=1)
    subspace.save_pretrained(tmp_path / "adapter")
    again = SubspaceModel.from_pretrained(quantized(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(subspace))
    other = quantized()
    other.base_model.model.model.codes += 1
    with pytest.raises(MismatchError, match="frozen parameters"):
        SubspaceModel.from_pretrained(other, tmp_path / "adapter")


def test_of_several_adapters_the_one_at_work_is_trained(tmp_path: Path) -> None:
    model = fresh("bert")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    partition = trainable_by_layer(model)
    assert not [spec.name for spec in partition.parameters() if "other" in spec.name]
    subspace = SubspaceModel(model, random_basis(partition, 2), modules_to_save=["classifier"])
    assert trainable_counts(subspace) == (2 * 2, 16 * 2 + 2)
    with pytest.raises(InputError, match="is already a PEFT adapter"):
        export_lora(subspace, tmp_path / "out")


def test_a_lora_outside_the_layers_is_told_of() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query", "pooler.dense"])
    with pytest.warns(UserWarning, match="pooler.dense.lora_A.default.weight' is trained but lies in no layer"):
        trainable_by_layer(peft.get_peft_model(made("bert"), config))


def test_a_model_in_which_nothing_is_trained() -> None:
    with pytest.raises(InputError, match="no parameter in the layers"):
        trainable_by_layer(made("bert").requires_grad_(False))

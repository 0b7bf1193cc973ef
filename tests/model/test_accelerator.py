"""The same numbers on an accelerator as on the processor, where there is one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from test_trainer import ROWS, Classifier, arguments
from torch import Tensor, nn
from towers import Tower
from transformers import LlamaConfig, LlamaForSequenceClassification

from tinyspan import (
    Basis,
    Partition,
    SubspaceModel,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    by_pattern,
    fastfood_basis,
    plots,
    random_basis,
    svd_basis,
    whole_model,
)
from tinyspan.analysis import compare, span_share, updates
from tinyspan.interop.deltas import apply_delta, export_delta
from tinyspan.interop.lora import export_lora, import_lora, lora_basis, read_lora
from tinyspan.interop.trainer import SubspaceTrainer
from tinyspan.maps.base import LinearMap
from tinyspan.maps.dense import FUSED, DenseMap, dense_map
from tinyspan.maps.kronecker import KroneckerMap
from tinyspan.maps.sparse import SparseMap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
DEVICE = "cuda"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def to_device(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE)


def dense_numbers(dtype: torch.dtype, size: int = 5000) -> DenseMap:
    return dense_map(numbers(4, size) / size**0.5, dtype)


MAPS: dict[str, Callable[[], LinearMap]] = {
    "float64": lambda: dense_numbers(torch.float64),
    "float32": lambda: dense_numbers(torch.float32),
    "bfloat16": lambda: dense_numbers(torch.bfloat16),
    "int8": lambda: dense_numbers(torch.int8),
    "bfloat16, fused": lambda: dense_numbers(torch.bfloat16, FUSED // 4),
    "int8, fused": lambda: dense_numbers(torch.int8, FUSED // 4),
    "sparse": lambda: SparseMap(9000, torch.arange(4500) * 2, dense_numbers(torch.float64, 4500)),
    "sparse, int8": lambda: SparseMap(9000, torch.arange(3000) * 3, dense_numbers(torch.int8, 3000)),
    "kronecker": lambda: KroneckerMap(numbers(70, 2), numbers(2, 90)),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_map(kind: str, dtype: torch.dtype) -> None:
    """To 1e-12 of the size of the result in float64, 1e-5 in float32: sums in another order."""
    v = MAPS[kind]()
    moved = v.converted(to_device)
    z, g, start = numbers(v.rank), numbers(v.size, seed=1), numbers(v.size, seed=2)
    out = torch.empty(v.size, dtype=dtype, device=DEVICE)
    moved.displace(start.to(out), z.to(out), out)
    found = [moved.matvec(z.to(out)), moved.rmatvec(g.to(out)), out]
    expected = torch.empty_like(start)
    v.displace(start, z, expected)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, right in zip(found, (v.matvec(z), v.rmatvec(g), expected), strict=True):
        assert ours.dtype == dtype
        assert (ours.cpu().double() - right).norm() <= tolerance * right.norm()


def bases(partition: Partition) -> dict[str, Basis]:
    return {
        "dense": random_basis(partition, 3),
        "sparse": random_basis(partition, 3, density=0.5),
        "int8": random_basis(partition, 3, dtype=torch.int8),
        "bfloat16": random_basis(partition, 3, dtype=torch.bfloat16),
        "fastfood": fastfood_basis(partition, 3),
    }


def trained(model: nn.Module, basis: Basis, tokens: Tensor, moved_later: bool, scaled: bool = False) -> SubspaceModel:
    """Return a model after some steps on the device of `tokens`; built there, or moved there after it was built."""
    if not moved_later:
        model = model.to(tokens.device)
    scales = by_layer(model) if scaled else None
    subspace = SubspaceModel(
        model, basis, modules_to_save=["head"], ensemble=2, init_std=0.1, seed=3, layer_scales=scales
    )
    subspace = subspace.to(tokens.device)
    optimizer = torch.optim.Adam(subspace.parameter_groups(1e-2, 1e-3))
    for _ in range(4):
        subspace(tokens).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return subspace


@pytest.mark.parametrize("moved_later", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse", "int8", "bfloat16", "fastfood"])
def test_a_model_is_trained_as_on_the_processor(
    kind: str, moved_later: bool, tower: Tower, tokens: Tensor, tmp_path: Path
) -> None:
    """In float64; what is saved there is loaded here, merged there and unmerged it is theta_0 again."""
    here, there = copy.deepcopy(tower), copy.deepcopy(tower)
    basis = bases(by_layer(tower))[kind]
    right = trained(here, basis, tokens, False)
    ours = trained(there, basis, tokens.to(DEVICE), moved_later)
    for (name, a), b in zip(ours.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9, msg=name)
    out = ours(tokens.to(DEVICE)).detach().cpu()
    ours.save_pretrained(tmp_path / "adapter", self_contained=True)
    loaded = SubspaceModel.from_pretrained(copy.deepcopy(tower), tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens), out, rtol=1e-10, atol=1e-10)
    export_delta(ours, tmp_path / "delta.safetensors")
    again = copy.deepcopy(tower).to(DEVICE)
    apply_delta(again, tmp_path / "delta.safetensors")
    torch.testing.assert_close(again(tokens.to(DEVICE)).cpu(), out, rtol=1e-10, atol=1e-10)
    merged = ours.merge()
    torch.testing.assert_close(merged(tokens.to(DEVICE)).cpu(), out, rtol=1e-10, atol=1e-10)
    ours.unmerge()
    torch.testing.assert_close(ours(tokens.to(DEVICE)).cpu(), out, rtol=1e-10, atol=1e-10)
    for name, value in ours.base_weights().items():
        assert torch.equal(value.cpu(), dict(tower.named_parameters())[name])


@pytest.mark.parametrize("moved_later", [False, True])
def test_scales_of_the_layers(moved_later: bool, tower: Tower, tokens: Tensor) -> None:
    basis = random_basis(whole_model(tower), 3)
    right = trained(copy.deepcopy(tower), basis, tokens, False, scaled=True)
    ours = trained(copy.deepcopy(tower), basis, tokens.to(DEVICE), moved_later, scaled=True)
    for (name, a), b in zip(ours.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("merged", [False, True])
def test_there_and_back(merged: bool, tower: Tower, tokens: Tensor) -> None:
    """Moved to the accelerator and back, merged or not, and copied there, it computes what it did."""
    subspace = trained(copy.deepcopy(tower), random_basis(by_layer(tower), 3, density=0.5), tokens, False)
    expected = subspace(tokens).detach()
    if merged:
        subspace.merge()
    copied = copy.deepcopy(subspace.to(DEVICE))
    for model in (subspace, copied):
        if merged:
            model.unmerge()
        torch.testing.assert_close(model(tokens.to(DEVICE)).cpu(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.to("cpu")(tokens), expected, rtol=1e-12, atol=1e-12)


def test_a_lora_goes_out_and_comes_in(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))
    basis = random_basis(by_pattern(base, {"all": r"\d\.weight"}), 4)
    there = SubspaceModel(copy.deepcopy(base).to(DEVICE), basis, init_std=1.0)
    export_lora(there, tmp_path / "lora")
    lora = read_lora(base, tmp_path / "lora")
    again = SubspaceModel(copy.deepcopy(base), lora_basis(base, [lora])).to(DEVICE)
    assert import_lora(again, lora, "it") < 1e-5
    again.set_adapter("it")
    x = numbers(3, 9).float().to(DEVICE)
    torch.testing.assert_close(again(x), there(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_start", [False, True])
def test_the_trainer_moves_a_model(at_start: bool, tmp_path: Path) -> None:
    """What `tune` does: a model that was built on the processor is trained where the Trainer puts it."""
    model = Classifier().float()
    basis = random_basis(by_layer(model), 3)
    subspace = SubspaceModel(model.to(DEVICE if at_start else "cpu"), basis, modules_to_save=["head"])
    before = [z.detach().clone() for z in subspace.z]
    trainer = SubspaceTrainer(subspace, arguments(tmp_path, use_cpu=False), train_dataset=ROWS)
    trainer.train()
    for z, first in zip(subspace.z, before, strict=True):
        assert z.device == trainer.args.device
        assert not torch.equal(z.cpu(), first.cpu())


def test_adapters_are_swapped(tower: Tower, tokens: Tensor, tmp_path: Path) -> None:
    basis = random_basis(by_layer(tower), 3)
    outs = {}
    for seed, name in enumerate(("one", "other")):
        model = SubspaceModel(copy.deepcopy(tower), basis, modules_to_save=["head"], init_std=0.2, seed=seed)
        with torch.no_grad():
            for value in (*model.z, model.model.head.weight):
                value += numbers(*value.shape, seed=seed)
        model.save_pretrained(tmp_path / name)
        outs[name] = model(tokens).detach()
    here = SubspaceModel(copy.deepcopy(tower), basis, modules_to_save=["head"])
    there = SubspaceModel(copy.deepcopy(tower).to(DEVICE), basis, modules_to_save=["head"])
    for model in (here, there):
        for name in ("one", "other"):
            model.load_adapter(tmp_path / name, name)
        model.add_weighted_adapter(["one", "other"], [0.5, 0.5], "mean")
    here.set_adapter("mean")
    outs["mean"] = here(tokens).detach()
    for name, out in outs.items():
        there.set_adapter(name)
        torch.testing.assert_close(there(tokens.to(DEVICE)).cpu(), out, rtol=1e-10, atol=1e-10)
    with there.disable_adapter():
        torch.testing.assert_close(there(tokens.to(DEVICE)).cpu(), tower(tokens), rtol=1e-10, atol=1e-10)


def recorded(model: nn.Module, folder: Path, device: str) -> Trajectory:
    """Record steps of SGD, faster one after the other than they are written."""
    model = model.to(device)
    recorder = TrajectoryRecorder(model, by_layer(model), folder)
    tokens = torch.arange(12, device=device).view(3, 4) % 11
    for step in range(6):
        model.zero_grad()
        model(tokens).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        recorder.record(step)
    return recorder.trajectory()


def test_an_update_is_compared_and_drawn(tower: Tower) -> None:
    basis = random_basis(by_layer(tower), 2)
    subspace = SubspaceModel(tower, basis, init_std=1.0)
    before = [(block.name, update.clone()) for block, update in updates(subspace)]
    subspace.to(DEVICE)
    for (block, moved), (name, update) in zip(updates(subspace), before, strict=True):
        assert (block.name, moved.device.type) == (name, "cpu")
        torch.testing.assert_close(moved, update)
    for row in compare(subspace, basis):
        assert float(row.angles.max()) < 1e-3
        assert row.shares[0] == pytest.approx(1)
    plots.envelopes(subspace, Figure().subplots())


def test_a_run_is_recorded_while_it_goes_on(tower: Tower, tmp_path: Path) -> None:
    """A point that is written behind training is of its own step, and so are the directions."""
    here = recorded(copy.deepcopy(tower), tmp_path / "here", "cpu")
    there = recorded(copy.deepcopy(tower), tmp_path / "there", DEVICE)
    for block in here.partition:
        assert torch.equal(here.start(block), there.start(block))
        for (_, a), (_, b) in zip(here.chunks(block), there.chunks(block), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # deltas are stored in float32
    ours, right = svd_basis(there, 3), svd_basis(here, 3)
    for name in right.maps:
        share = span_share(
            Basis.from_directions(by_layer(tower), {n: v.dense() for n, v in right.maps.items()}),
            {n: v.dense()[0] for n, v in ours.maps.items()},
        )
        assert share.by_block[name] == pytest.approx(1, abs=1e-6)


def test_autocast_and_checkpointing() -> None:
    """Under autocast gradient checkpointing leaves the gradients of z as they are, to the rounding of bfloat16."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, pad_token_id=0, num_labels=2, **shape)
    batch = {
        "input_ids": torch.randint(1, 50, (8, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE),
        "labels": torch.tensor([0, 1] * 4, device=DEVICE),
    }
    gradients = []
    for checkpointed in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = LlamaForSequenceClassification(config)
        subspace = SubspaceModel(model, random_basis(by_layer(model), 8), modules_to_save=["score"]).to(DEVICE)
        if checkpointed:
            subspace.gradient_checkpointing_enable()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = subspace.train()(**batch).loss
        loss.backward()
        gradients.append(torch.cat([z.grad.reshape(-1) for z in subspace.z if z.grad is not None]))
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() <= 0.01 * gradients[0].norm()


def test_a_compiled_model_is_the_same(tower: Tower, tokens: Tensor) -> None:
    basis = random_basis(by_layer(tower), 3)
    plain = SubspaceModel(copy.deepcopy(tower).to(DEVICE), basis, modules_to_save=["head"], init_std=0.1)
    compiled = SubspaceModel(copy.deepcopy(tower).to(DEVICE), basis, modules_to_save=["head"], init_std=0.1)
    run = torch.compile(compiled)
    for module in (plain, run):
        module(tokens.to(DEVICE)).square().sum().backward()
    for a, b in zip(compiled.z, plain.z, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)

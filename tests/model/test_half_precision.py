"""Weights recorded in half precision are trained in float32: recording, discovery, training, and adapters on disk."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora import fitted, logits, made
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from towers import Tower, nudge

from tinyspan import (
    Basis,
    InputError,
    MismatchError,
    Partition,
    SubspaceModel,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    by_module,
    random_basis,
    svd_basis,
    trainable_by_layer,
    trajectory_from_checkpoints,
    whole_model,
)
from tinyspan.interop.deltas import apply_delta, export_delta
from tinyspan.io.tensors import write_tensors
from tinyspan.model.base import check_model

HALF = [torch.bfloat16, torch.float16]
ROUNDED = {torch.bfloat16: "rounded by up to 0.39% of each weight", torch.float16: "rounded by up to 0.05% of each"}


def record(model: nn.Module, partition: Partition, folder: Path, points: int = 3) -> Trajectory:
    """Record a walk from the weights of a model, which are put back."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    recorder = TrajectoryRecorder(model, partition, folder)
    generator = torch.Generator().manual_seed(0)
    for step in range(points):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        recorder.record(step)
    model.load_state_dict(start)
    return recorder.trajectory()


def recorded(dtype: torch.dtype, folder: Path, partition: Callable[[nn.Module], Partition] = by_layer) -> Trajectory:
    model = Tower().to(dtype)
    with pytest.warns(UserWarning, match="half precision"):
        return record(model, partition(model), folder)


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("partition", [by_layer, whole_model])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_the_recorded_model_is_trained_in_float32(
    dtype: torch.dtype, partition: Callable[[nn.Module], Partition], density: float, tokens: Tensor, tmp_path: Path
) -> None:
    def widened() -> Tower:
        return Tower().to(dtype).float()

    svd_basis(recorded(dtype, tmp_path / "walk", partition), 2, density=density).save_pretrained(tmp_path / "basis")
    basis = Basis.from_pretrained(tmp_path / "basis")
    check_model(widened(), basis)
    model = widened()
    subspace = SubspaceModel(model, basis, modules_to_save=["head"])
    subspace(tokens).square().sum().backward()
    assert all(z.grad is not None and z.grad.abs().sum() > 0 for z in subspace.z)
    with torch.no_grad():
        for z in subspace.z:
            z += 0.1
    expected = subspace(tokens).detach()
    subspace.save_pretrained(tmp_path / "adapter")
    export_delta(subspace, tmp_path / "delta")

    again = SubspaceModel.from_pretrained(widened(), tmp_path / "adapter")
    assert torch.equal(again(tokens), expected)
    again.load_adapter(tmp_path / "adapter", "other")
    again.set_adapter("other")
    assert torch.equal(again(tokens), expected)
    assert torch.equal(again.merge()(tokens), expected)
    again.unmerge()
    assert all(torch.equal(value, widened().state_dict()[name]) for name, value in start_of(again.model).items())
    other = widened()
    apply_delta(other, tmp_path / "delta")
    assert torch.equal(other(tokens), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_recording_tells_at_once_what_is_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Tower().to(dtype)
    with pytest.warns(UserWarning, match=rf"'layers\.0\.inner\.weight' in {dtype}: .*{ROUNDED[dtype]}") as caught:
        TrajectoryRecorder(model, by_layer(model), tmp_path / "walk")
    assert caught[0].filename == __file__
    assert "dtype=torch.float32" in str(caught[0].message)


def test_each_message_names_a_step_that_works(tmp_path: Path) -> None:
    """From a model in its stored dtype, over the same one loaded in float32, to the right one."""
    basis = svd_basis(recorded(torch.bfloat16, tmp_path / "walk"), 2)
    with pytest.raises(InputError, match=r"load the model in float32 \(.*or model\.float\(\)\)"):
        SubspaceModel(Tower().bfloat16(), basis)
    SubspaceModel(Tower().bfloat16().float(), basis)
    unrounded = r"another theta_0: .*'layers\.0' .* load it in half precision and convert it with model\.float\(\)"
    with pytest.raises(MismatchError, match=unrounded):
        SubspaceModel(Tower().float(), basis)
    with pytest.raises(
        MismatchError, match=r"expected shape \[8, 4\] and torch\.float32, .* in the dtype expected here"
    ):
        SubspaceModel(Tower().bfloat16().double(), basis)
    with pytest.raises(MismatchError, match="another theta_0"):
        SubspaceModel(Tower().half().float(), basis)
    moved = Tower().bfloat16()
    nudge(moved, 0.5)
    with pytest.raises(MismatchError, match="another theta_0"):
        SubspaceModel(moved.float(), basis)


def test_a_basis_without_theta_0_fits_every_float32_model(tokens: Tensor) -> None:
    model = Tower().bfloat16()
    basis = random_basis(by_layer(model), 2)
    SubspaceModel(Tower().float(), basis)(tokens)


def test_a_drawn_basis_of_half_precision_is_drawn_again(tokens: Tensor, tmp_path: Path) -> None:
    model = Tower().bfloat16()
    subspace = SubspaceModel(model.float(), random_basis(by_layer(Tower().bfloat16()), 2), init_std=1)
    subspace.save_pretrained(tmp_path / "adapter")
    again = SubspaceModel.from_pretrained(Tower().bfloat16().float(), tmp_path / "adapter")
    assert torch.equal(again(tokens), subspace(tokens))


def test_the_points_are_grouped_by_blocks_of_the_float32_model(tmp_path: Path) -> None:
    walk, model = recorded(torch.bfloat16, tmp_path / "walk"), Tower().bfloat16()
    grouped = Trajectory(tmp_path / "walk", by_module(model.float()))
    assert grouped.partition == walk.recorded.per_module()
    SubspaceModel(model, svd_basis(grouped, 2))
    with pytest.raises(InputError, match="holds no points of"):
        walk.with_partition(by_layer(Tower().half()))


def test_a_lora_in_half_precision(tmp_path: Path) -> None:
    import peft

    def fresh(widen: bool) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
            base = made("llama").to(torch.bfloat16)
            return peft.get_peft_model(base, config, autocast_adapter_dtype=widen).eval()

    model = fresh(widen=False)
    partition = trainable_by_layer(model)
    assert {spec.dtype for spec in partition.parameters()} == {torch.bfloat16}
    with pytest.warns(UserWarning, match="half precision"):
        recorder = TrajectoryRecorder(model, partition, tmp_path / "walk")
    fitted(model, [p for p in model.parameters() if p.requires_grad], recorder)
    subspace = SubspaceModel(fresh(widen=True), svd_basis(recorder.trajectory(), 2))
    losses = fitted(subspace, subspace.parameter_groups(0.3, 0))
    assert losses[-1] < losses[0]
    subspace.save_pretrained(tmp_path / "adapter", self_contained=True)
    again = SubspaceModel.from_pretrained(fresh(widen=True), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(subspace))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wide", [False, True])
def test_checkpoints_in_half_precision(dtype: torch.dtype, wide: bool, tmp_path: Path) -> None:
    """theta_0 may be given in their dtype, or in float32 if that holds the same numbers."""
    model = Tower().to(dtype)
    nudge(model, 0.5)
    write_tensors(tmp_path / "checkpoint/model.safetensors", dict(model.named_parameters()))
    base = Tower().to(dtype).float() if wide else Tower().to(dtype)
    with pytest.warns(UserWarning, match=ROUNDED[dtype]) as caught:
        walk = trajectory_from_checkpoints(base, by_layer(base), [tmp_path / "checkpoint"], tmp_path / "walk")
    assert len(caught) == 1
    basis = svd_basis(walk, 1)
    subspace = SubspaceModel(Tower().to(dtype).float(), basis)
    with torch.no_grad():
        for block, z in zip(subspace.blocks, subspace.z, strict=True):
            z.copy_(basis.maps[block.name].rmatvec(walk.delta(walk.partition[block.name]))[None])
    end = {name: value.float() for name, value in model.named_parameters()}
    for name, value in subspace.delta().items():
        torch.testing.assert_close(subspace.base_weights()[name] + value, end[name], rtol=1e-5, atol=1e-6)


def test_checkpoints_of_another_dtype_than_theta_0_tell_which_to_load(tmp_path: Path) -> None:
    for name, model in (("half", Tower().bfloat16()), ("wide", Tower().float())):
        write_tensors(tmp_path / name / "model.safetensors", dict(model.named_parameters()))
    rounded = Tower().bfloat16()
    for model, name, dtype in ((Tower().float(), "half", "bfloat16"), (rounded, "wide", "float32")):
        with pytest.raises(MismatchError, match=re.escape(f"from_pretrained(..., dtype=torch.{dtype})")):
            trajectory_from_checkpoints(model, by_layer(model), [tmp_path / name], tmp_path / "walk")


def test_a_cut_model_in_half_precision(tokens: Tensor, tmp_path: Path) -> None:
    """FSDP2 in one process, as docs/processes.md has it: recorded in the stored dtype, trained in float32."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:

        def cut(model: Tower) -> Any:
            mesh = init_device_mesh("cpu", (1,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)

        model = cut(Tower().bfloat16())
        with pytest.warns(UserWarning, match="half precision"):
            recorder = TrajectoryRecorder(model, by_layer(model), tmp_path / "walk")
        for step in range(3):
            nudge(model, 0.1 + step)
            recorder.record(step)
        svd_basis(recorder.trajectory(), 1, group=torch.distributed.group.WORLD, folder=tmp_path / "basis")
        basis = Basis.from_pretrained(tmp_path / "basis")
        subspace = SubspaceModel(cut(Tower().bfloat16().float()), basis, init_std=1)
        subspace.save_pretrained(tmp_path / "adapter")
        again = SubspaceModel.from_pretrained(cut(Tower().bfloat16().float()), tmp_path / "adapter")
        assert torch.equal(again(tokens), subspace(tokens))
        subspace.load_state_dict(again.state_dict())
    finally:
        torch.distributed.destroy_process_group()

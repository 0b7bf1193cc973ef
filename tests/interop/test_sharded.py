"""Recording, discovery and tuning of a model that FSDP2 has cut over two processes equal those of one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from test_processes import PROCESSES, TOKENS, same, spawned, train
from test_trainer import ROWS, arguments
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from towers import Tower
from transformers import Trainer

from tinyspan import (
    Basis,
    InputError,
    MismatchError,
    Partition,
    SubspaceModel,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    by_pattern,
    empty_basis,
    fastfood_basis,
    random_basis,
    svd_basis,
    whole_model,
)
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.interop.trainer import SubspaceTrainer

pytestmark = pytest.mark.processes

TRAINED = ["head", "embedding"]
RUN = {"rank": 3, "dtype": torch.float64}


def sharded(model: nn.Module | None = None, root: bool = True) -> Any:
    """Cut the layers one by one, and then the rest."""
    model, mesh = model or Tower(), init_device_mesh("cpu", (PROCESSES,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh) if root else model


def record(model: nn.Module, recorder: TrajectoryRecorder, rows: slice) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, tokens in enumerate(TOKENS):
        model(tokens[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.record(step)


def tuned(model: nn.Module, basis: Basis, rows: slice, accumulate: int = 1) -> tuple[SubspaceModel, list[Tensor]]:
    subspace = SubspaceModel(model, basis, modules_to_save=TRAINED, ensemble=2)
    return subspace, [whole(value) for value in train(subspace, subspace, rows, accumulate)]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def work(rank: int, folder: Path) -> dict[str, Any]:
    """What each of the processes does."""
    mine = slice(4 * rank, 4 * rank + 4)
    model = sharded()
    partition = by_layer(model)
    record(model, TrajectoryRecorder(model, partition, folder / f"walk{rank}"), mine)
    walk = Trajectory(folder / f"walk{rank}")
    basis = svd_basis(walk, group=torch.distributed.group.WORLD, folder=folder / f"basis{rank}", **RUN)

    subspace, trained = tuned(sharded(), basis, mine)
    with torch.no_grad():
        subspace.eval()
        logits = subspace(TOKENS[0])
    subspace.save_pretrained(folder / f"adapter{rank}")
    again = SubspaceModel.from_pretrained(sharded(), folder / f"adapter{rank}")
    with torch.no_grad():
        assert torch.equal(again(TOKENS[0]), logits)
        with again.disable_adapter():
            start = again(TOKENS[0])
        assert torch.equal(again(TOKENS[0]), logits)  # and no whole copy of other weights is left
        assert torch.equal(again.merge()(TOKENS[0]), logits)
        again.unmerge()
    torch.distributed.checkpoint.save(subspace.state_dict(), checkpoint_id=folder / "state")
    resumed, other_model = SubspaceModel(sharded(), basis, modules_to_save=TRAINED, ensemble=2), Tower()
    torch.distributed.checkpoint.load(state := resumed.state_dict(), checkpoint_id=folder / "state")
    resumed.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(resumed(TOKENS[0]), logits)
        other_model.layers[0].inner.weight[0] += 1  # a row that the first process holds
    free = random_basis(by_layer(sharded()), 2)
    state = SubspaceModel(sharded(), free).state_dict()
    with pytest.raises(MismatchError, match=r"another theta_0, in block 'layers\.0'"):  # in every process
        SubspaceModel(sharded(other_model), free).load_state_dict(state)
    kept = fully_shard(Tower(), mesh=init_device_mesh("cpu", (PROCESSES,)), reshard_after_forward=False)
    other = SubspaceModel(kept, basis, modules_to_save=TRAINED, ensemble=2)
    with torch.no_grad():
        assert torch.equal(other(TOKENS[0]), start)  # and leaves whole copies, which must not outlive another z
        z = {block.name: z for block, z in zip(other.blocks, subspace.z, strict=True)}
        other.set_state(z)
        again.set_state(z, again.base_state().directly_trained)
        assert torch.equal(other(TOKENS[0]), again(TOKENS[0]))
    _, accumulated = tuned(sharded(), basis, mine, accumulate=2)

    part, (first, second) = sharded(), TOKENS[0][mine].chunk(2)
    late = SubspaceModel(part, basis)
    part.set_requires_gradient_sync(False)
    late(first).square().sum().backward()
    assert all(z.grad is None for z in late.z)
    part.set_requires_gradient_sync(True)
    late(second).square().sum().backward()
    at_once = SubspaceModel(sharded(), basis)
    at_once(TOKENS[0][mine]).square().sum().backward()
    same([z.grad for z in late.z], [z.grad for z in at_once.z])

    flat = fastfood_basis(whole_model(sharded()), 4)
    scaled = SubspaceModel(model := sharded(), flat, layer_scales=by_layer(model), init_std=1e-2)
    scaled(TOKENS[0]).sum().backward()
    gradients = [parameter.grad for parameter in (*scaled.z, scaled.scales)]
    refused(rank, folder)
    recorded_by_callback(rank, folder)
    return {
        "partition": partition.to_json(),
        "directions": [basis.maps[block.name].tensors()["directions"] for block in partition],
        "spectrum": [basis.spectrum[block.name] for block in partition],
        "trained": trained,
        "accumulated": accumulated,
        "logits": logits,
        "start": start,
        "gradients": gradients,
        "held": sum(buffer.numel() for name, buffer in subspace.named_buffers() if name.startswith("_start")),
    }


def refused(rank: int, folder: Path) -> None:
    """What cannot work is told before training."""
    subspace = SubspaceModel(model := Tower(), fastfood_basis(by_layer(model), 2))
    sharded(subspace.model)
    with pytest.raises(InputError, match="replaced by others, which do not follow z: call fully_shard"):
        subspace(TOKENS[0])
    subspace = SubspaceModel(model := sharded(), fastfood_basis(by_layer(model), 2))
    cuts = hasattr(Trainer, "_defer_fsdp_gradient_reduction")  # leaves what is cut as it is; older ones do not
    for settings, told in (
        ({"save_strategy": "epoch"}, "checkpoints hold adapters, not the optimizer: pass save_only_model=True"),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "does not support writing z into shards"),
    ):
        with pytest.raises(InputError, match=told if cuts else "would exchange the gradients of shards"):
            SubspaceTrainer(subspace, arguments(folder / "trainer", **settings), train_dataset=ROWS).train()
    with pytest.raises(MismatchError, match=r"ensemble to be the same in all processes, got [12] here \(process"):
        SubspaceModel(model := sharded(), fastfood_basis(by_layer(model), 2), ensemble=1 + rank)
    constructors = [fastfood_basis, lambda partition, rank: empty_basis(partition)]
    with pytest.raises(MismatchError, match="the ranks of the basis to be the same"):
        SubspaceModel(model := sharded(), constructors[rank](by_layer(model), 2))
    with pytest.raises(MismatchError, match="how the basis was made to be the same"):
        SubspaceModel(model := sharded(), random_basis(by_layer(model), 2, seed=rank))
    in_part = sharded(Tower(seed=rank), root=False)
    mixed = by_pattern(in_part, {"mixed": "embedding.*|layers.0.*"})
    with pytest.raises(InputError, match="some of the weights that the basis changes are sharded and others"):
        SubspaceModel(in_part, random_basis(mixed, 2))
    whole_ones = by_pattern(in_part, {"whole": "embedding.*"})
    with pytest.raises(MismatchError, match="theta_0 of 'whole' to be the same in all processes"):
        SubspaceModel(in_part, random_basis(whole_ones, 2))
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = Tower()
    for layer in model.layers:
        layer.inner.weight = nn.Parameter(distribute_tensor(layer.inner.weight.detach(), mesh, [Replicate()]))
    with pytest.raises(InputError, match="expected every process to hold its own shard"):
        by_layer(model)


def recorded_by_callback(rank: int, folder: Path) -> None:
    """What the Trainer would tell the callback."""
    state = SimpleNamespace(global_step=0, max_steps=2, num_train_epochs=1, epoch=0.0, is_world_process_zero=rank == 0)
    control = SimpleNamespace(should_save=False)
    callback, model = TrajectoryCallback(folder / "callback", 1), sharded()
    callback.on_train_begin(None, state, control, model=model)
    for state.global_step in (1, 2):
        callback.on_step_end(None, state, control)
    callback.on_train_end(SimpleNamespace(load_best_model_at_end=False), state, control)
    assert callback.trajectory().steps == [0, 1]
    assert callback.trajectory().folder == folder / f"callback/shard-{rank}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(work, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    """Of one process."""
    folder, model = tmp_path_factory.mktemp("one") / "walk", Tower()
    record(model, TrajectoryRecorder(model, by_layer(model), folder), slice(0, 8))
    return svd_basis(Trajectory(folder), **RUN)


def test_recording_and_discovery(found: list[dict[str, Any]], basis: Basis) -> None:
    parts = [Partition.from_json(one["partition"]) for one in found]
    assert sum(part.numel for part in parts) == basis.partition.numel
    assert parts[0].numel < 0.6 * basis.partition.numel
    for index, block in enumerate(basis.partition):
        torch.testing.assert_close(found[0]["spectrum"][index], basis.spectrum[block.name], rtol=1e-6, atol=1e-9)
        for i, direction in enumerate(basis.maps[block.name].tensors()["directions"]):
            rows = [
                part[block.name].unflatten(one["directions"][index][i]) for part, one in zip(parts, found, strict=True)
            ]
            for name, values in block.unflatten(direction).items():
                joined = torch.cat([row[name] for row in rows])
                torch.testing.assert_close(joined, values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["trained", "accumulated"])
def test_tuning(found: list[dict[str, Any]], basis: Basis, way: str) -> None:
    subspace, expected = tuned(Tower(), basis, slice(0, 8), accumulate=2 if way == "accumulated" else 1)
    assert max(z.abs().max() for z in subspace.z) > 0.2
    for one in found:
        same(one[way], expected)
    with torch.no_grad():
        torch.testing.assert_close(found[0]["logits"], subspace(TOKENS[0]), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[0]["start"], Tower()(TOKENS[0]), rtol=0, atol=1e-12)
    held = [one["held"] for one in found]
    assert sum(held) == basis.partition.numel
    assert max(held) < 0.6 * sum(held)  # nobody keeps theta_0 of all


def test_whole_blocks_and_scales_add_up(found: list[dict[str, Any]]) -> None:
    """z^T grad z and lambda^T grad lambda are the derivative along the whole change: the same in every process."""
    for a, b in zip(found[0]["gradients"], found[1]["gradients"], strict=True):
        assert a.abs().max() > 0
        assert torch.equal(a, b)

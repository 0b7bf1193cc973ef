"""Two processes that talk through gloo do what one does."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from towers import Checkpointed, Tower

from tinyspan import (
    InputError,
    MismatchError,
    SubspaceModel,
    by_layer,
    fastfood_basis,
    random_basis,
    whole_model,
)
from tinyspan.model.curvature import empirical_fisher, gauss_newton

pytestmark = pytest.mark.processes

PROCESSES = 2
STEPS = 5
TOKENS = torch.randint(0, 11, (STEPS, 8, 5), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 2, (STEPS, 8), generator=torch.Generator().manual_seed(2))


def dense() -> SubspaceModel:
    model = Tower()
    return SubspaceModel(model, random_basis(by_layer(model), 3), modules_to_save=["head", "embedding"], ensemble=2)


def sparse() -> SubspaceModel:
    model = Tower()
    return SubspaceModel(model, random_basis(by_layer(model), 3, density=0.1), modules_to_save=["head"])


def scaled() -> SubspaceModel:
    """A map that is applied to the whole block, and a learned scale for each layer."""
    model = Tower()
    basis = fastfood_basis(whole_model(model), 6)
    return SubspaceModel(model, basis, modules_to_save=["head"], init_std=1e-2, layer_scales=by_layer(model))


def checkpointed() -> SubspaceModel:
    model = Checkpointed()
    return SubspaceModel(model, random_basis(by_layer(model), 3), modules_to_save=["head", "embedding"])


MODELS = {"dense": dense, "sparse": sparse, "scaled": scaled, "checkpointed": checkpointed}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "view": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
}


def train(model: nn.Module, subspace: SubspaceModel, rows: slice, accumulate: int = 1) -> list[Tensor]:
    """Return what is trained, after some steps of AdamW on these rows of every batch."""
    optimizer = torch.optim.AdamW(subspace.parameter_groups(0.1, 1e-2), weight_decay=0.0)
    for tokens, labels in zip(TOKENS, LABELS, strict=True):
        pieces = list(zip(tokens[rows].chunk(accumulate), labels[rows].chunk(accumulate), strict=True))
        for index, (some, theirs) in enumerate(pieces):
            alone = index < len(pieces) - 1 and isinstance(model, DistributedDataParallel)
            with model.no_sync() if alone else contextlib.nullcontext():
                (nn.functional.cross_entropy(model(some), theirs) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in subspace.parameters() if parameter.requires_grad]


def spawned(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """Run `work` in two processes that know of each other, and return what each has left in its file."""
    torch.multiprocessing.spawn(joined, (work, folder), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def joined(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # threads of torch that outlive the interpreter now and then abort the process


def ddp(rank: int, folder: Path) -> dict[Any, Any]:
    mine = slice(4 * rank, 4 * rank + 4)
    found: dict[Any, Any] = {}
    for kind, build in MODELS.items():
        for way, settings in WAYS.items():
            subspace = build()
            found[kind, way] = train(DistributedDataParallel(subspace, **settings), subspace, mine)
        subspace = build()
        found[kind, "accumulated"] = train(DistributedDataParallel(subspace), subspace, mine, accumulate=2)
    found |= {"sent": sent(mine), "alone": alone(), "curvature": curvature(dense())}
    refused(rank)
    return found


def sent(mine: slice) -> dict[str, list[int]]:
    """How many bytes are exchanged: in gradients per step, and of parameters and buffers, then and per forward pass."""
    gradients, states = [], []
    broadcast = torch.distributed._broadcast_coalesced

    def count(group: Any, tensors: list[Tensor], *rest: Any) -> None:
        states.append(sum(tensor.numel() * tensor.itemsize for tensor in tensors))
        broadcast(group, tensors, *rest)

    def counting(state: Any, bucket: GradBucket) -> Future[Tensor]:
        gradients.append(bucket.buffer().numel() * bucket.buffer().itemsize)
        return allreduce_hook(state, bucket)

    torch.distributed._broadcast_coalesced = count
    subspace = sparse()
    model = DistributedDataParallel(subspace)
    model.register_comm_hook(None, counting)
    at_first = len(states)
    train(model, subspace, mine)
    torch.distributed._broadcast_coalesced = broadcast
    return {"gradients": gradients, "at first": states[:at_first], "forward": states[at_first:]}


def alone() -> list[Tensor]:
    """Without DistributedDataParallel each process trains on its own."""
    return train(model := dense(), model, slice(0, 8))


def compiled(rank: int, folder: Path) -> list[Tensor]:
    subspace = dense()
    model = torch.compile(DistributedDataParallel(subspace), backend="aot_eager")
    return train(model, subspace, slice(4 * rank, 4 * rank + 4))


class Hidden(Tower):
    """Returns its logits where nobody looks."""

    def forward(self, tokens: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(tokens)
        return {"seen": logits, "hidden": lambda: logits}


def refused(rank: int) -> None:
    """What would be wrong is told."""
    model = Hidden()
    hiding = SubspaceModel(model, random_basis(by_layer(model), 3))
    with pytest.raises(InputError, match="gradients of z would be lost, since the loss was not computed from"):
        hiding(TOKENS[0])["hidden"]().sum().backward()
    seen = hiding(TOKENS[0])["seen"].sum()
    seen.backward()
    assert all(z.grad.abs().max() > 0 for z in hiding.z)
    only_by_backward(dense, "SubspaceModel.forward_at, which each process computes by itself")
    hooked()

    written, plain = dense(), dense()
    logits = written(TOKENS[0])
    logits *= 2  # in place
    logits.sum().backward()
    (plain(TOKENS[0]) * 2).sum().backward()
    for z, expected in zip(written.z, plain.z, strict=True):
        torch.testing.assert_close(z.grad, expected.grad, rtol=0, atol=1e-12)
    hiding.zero_grad()
    early = hiding.model.layers[0].inner(torch.ones(1, 4, dtype=torch.float64))
    (hiding(TOKENS[0])["seen"].sum() + early.sum()).backward()
    through_engine = [z.grad.clone() for z in hiding.z]
    hiding.zero_grad()
    early = hiding.model.layers[0].inner(torch.ones(1, 4, dtype=torch.float64))
    hiding(TOKENS[0])["seen"].sum().backward()
    assert not torch.equal(hiding.z[0].grad, through_engine[0])  # what was computed outside of forward counts too

    other = Tower(seed=rank)
    model = DistributedDataParallel(SubspaceModel(other, random_basis(by_layer(other), 3)))
    with (
        contextlib.nullcontext() if rank == 0 else pytest.raises(MismatchError, match="differs from that of the first")
    ):
        model(TOKENS[0])
    torch.distributed.barrier()


def only_by_backward(build: Callable[[], SubspaceModel], remedy: str) -> None:
    """Nothing else gives the gradients of z in part, or none: it is refused."""
    subspace, reference = build(), build()
    reference(TOKENS[0]).sum().backward()
    z, head = list(subspace.z), list(subspace.model.head.parameters())
    ways: dict[str, Callable[[Tensor], Any]] = {
        "autograd.grad": lambda loss: torch.autograd.grad(loss, z),
        "unused": lambda loss: torch.autograd.grad(loss, z, allow_unused=True),
        "inputs": lambda loss: loss.backward(inputs=z),
        "more inputs": lambda loss: loss.backward(inputs=[*head, *z]),
        "second derivatives": lambda loss: loss.backward(create_graph=True),
    }
    for way in ways.values():
        with pytest.raises(InputError, match=f"(z|inputs=...) .*are not available .*{remedy}"):
            way(subspace(TOKENS[0]).sum())
        subspace.zero_grad()
        subspace(TOKENS[0]).sum().backward()
        same([one.grad for one in subspace.z], [one.grad for one in reference.z])
    subspace.zero_grad()
    subspace(TOKENS[0]).sum().backward(inputs=head)
    same([whole.grad for whole in head], [whole.grad for whole in reference.model.head.parameters()])
    assert all(one.grad is None for one in z)


def hooked() -> None:
    """Hooks on z are called once in a backward pass, with this process's gradient, as on any parameter."""
    for call in (SubspaceModel.__call__, lambda subspace, tokens: subspace.model(tokens)):
        subspace, reference, seen = dense(), dense(), []
        reference(TOKENS[0]).sum().backward()
        subspace.z[0].register_hook(lambda gradient, seen=seen: seen.append(gradient) or 2 * gradient)
        subspace.z[1].register_post_accumulate_grad_hook(lambda z, seen=seen: seen.append(z.grad))
        subspace.refresh()
        call(subspace, TOKENS[0]).sum().backward()
        first, second = (z.grad for z in reference.z)
        assert len(seen) == 2
        for gradient in seen:
            same([gradient], [first if gradient is not subspace.z[1].grad else second])
        same([z.grad for z in subspace.z], [2 * first, second])
    subspace = dense()
    flat = torch.cat([z.detach().reshape(-1) for z in subspace.z]).requires_grad_()
    (found,) = torch.autograd.grad(subspace.forward_at(flat, TOKENS[0]).sum(), flat)
    same(list(found.split([z.numel() for z in subspace.z])), [z.grad.reshape(-1) for z in reference.z])


def curvature(subspace: SubspaceModel) -> list[Tensor]:
    """Return what each process computes by itself."""
    subspace.eval()
    loader = [(TOKENS[0], LABELS[0])]
    columns = [subspace.jacobian(TOKENS[0], method=method) for method in ("reverse", "forward", "central")]
    return [*columns, gauss_newton(subspace, loader), empirical_fisher(subspace, loader)]


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return spawned(ddp, tmp_path_factory.mktemp("ddp"))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", [*WAYS, "accumulated"])
@pytest.mark.parametrize("kind", MODELS)
def test_two_halves_of_a_batch_train_as_the_whole(under_ddp: list[dict[Any, Any]], kind: str, way: str) -> None:
    subspace = MODELS[kind]()
    expected = train(subspace, subspace, slice(0, 8), accumulate=2 if way == "accumulated" else 1)
    assert max(z.abs().max() for z in subspace.z) > 0.2
    for found in under_ddp:
        same(found[kind, way], expected)


def test_only_z_and_the_ordinary_parameters_are_exchanged(under_ddp: list[dict[Any, Any]]) -> None:
    subspace = sparse()
    trained = sum(p.numel() * p.itemsize for p in subspace.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.itemsize for p in subspace.parameters() if not p.requires_grad)
    for found in under_ddp:
        assert sum(found["sent"]["gradients"]) == STEPS * trained
        assert sum(found["sent"]["at first"]) == trained + frozen + 32  # theta_0 of the blocks is not sent, its hash is
        assert found["sent"]["forward"] == [32] * STEPS


def test_processes_that_nobody_joins_train_alone(under_ddp: list[dict[Any, Any]]) -> None:
    expected = train(model := dense(), model, slice(0, 8))
    for found in under_ddp:
        same(found["alone"], expected)


def test_each_process_computes_curvature_by_itself(under_ddp: list[dict[Any, Any]]) -> None:
    expected = curvature(dense())
    assert all(one.abs().max() > 0 for one in expected)
    for found in under_ddp:
        same(found["curvature"], expected)


@pytest.mark.slow
def test_a_compiled_one_trains_as_the_whole(tmp_path: Path) -> None:
    expected = train(model := dense(), model, slice(0, 8))
    for found in spawned(compiled, tmp_path):
        same(found, expected)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one process, in which `fully_shard` works."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def cut(trained: bool = False) -> SubspaceModel:
    model: Any = Tower()
    for layer in model.layers:
        fully_shard(layer)
    if trained:  # whose weights still have the gradient of a step
        model(TOKENS[1]).sum().backward()
    return SubspaceModel(model, random_basis(by_layer(model), 3), modules_to_save=["head", "embedding"])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_over_shards_only_backward_computes_gradients_of_z(one_process: None) -> None:
    only_by_backward(cut, "or do not shard the model")
    for method in ("register_hook", "register_post_accumulate_grad_hook"):
        subspace = cut()
        handle = getattr(subspace.z[0], method)(lambda value: None)
        with pytest.raises(InputError, match="hooks on z are not available over shards of fully_shard"):
            subspace(TOKENS[0]).sum().backward()
        handle.remove()
        subspace(TOKENS[0]).sum().backward()
        assert all(z.grad.abs().max() > 0 for z in subspace.z)


def test_over_shards_a_gradient_from_before_is_not_part_of_the_first_one(one_process: None) -> None:
    first, after_a_step = cut(), cut(trained=True)
    for subspace in (first, after_a_step):
        subspace(TOKENS[0]).sum().backward()
    for found, expected in zip(after_a_step.z, first.z, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)


def test_over_shards_jacobians_are_central_differences(one_process: None) -> None:
    model = Tower()
    exact = SubspaceModel(model, random_basis(by_layer(model), 3)).eval().jacobian(TOKENS[0])
    subspace = cut().eval()
    torch.testing.assert_close(subspace.jacobian(TOKENS[0], method="central"), exact, rtol=1e-7, atol=1e-8)
    for method in ("reverse", "forward"):
        with pytest.raises(InputError, match="cannot be called as a function of z"):
            subspace.jacobian(TOKENS[0], method=method)  # type: ignore[arg-type]

import copy
import gc
import inspect
import pickle
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from towers import Layer, Tower, trainable_counts

from tinyspan import (
    Basis,
    DenseMap,
    InputError,
    MismatchError,
    Partition,
    StorageError,
    SubspaceModel,
    TinyspanError,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    by_module,
    by_pattern,
    empty_basis,
    fastfood_basis,
    random_basis,
    svd_basis,
    whole_model,
)
from tinyspan.interop.deltas import apply_delta, export_delta
from tinyspan.io.storage import read_json, write_json
from tinyspan.model.base import check_model, directly_trained_names
from tinyspan.model.hooks import Attachments
from tinyspan.model.opened_adapter import OpenedAdapter


def double(basis: Basis) -> Basis:
    """The same directions in float64."""
    return Basis.from_directions(basis.partition, {name: v.directions.double() for name, v in basis.maps.items()})


def dense(basis: Basis) -> Basis:
    """The same map as directions, one expanded coordinate after the other."""
    maps = {
        name: DenseMap(torch.stack([v.matvec(e) for e in torch.eye(v.rank).double()])) for name, v in basis.maps.items()
    }
    return Basis(basis.partition, maps)


def literal(
    model: nn.Module,
    basis: Basis,
    z: dict[str, Tensor],
    tokens: Tensor,
    scales: Tensor | None = None,
    layers: Partition | None = None,
) -> Tensor:
    """theta_0 + lambda_l V mean_i z_i written out and passed through a functional call: slow and obviously right."""
    weights = dict(basis.partition.select(model))
    layer_of = {spec.name: number for number, layer in enumerate(layers or ()) for spec in layer.parameters}
    moved = {}
    for block in basis.partition:
        change = block.unflatten(z[block.name].mean(0) @ basis.maps[block.name].directions)
        for name, part in change.items():
            moved[name] = weights[name].detach() + (part if scales is None else scales[layer_of[name]] * part)
    out: Tensor = functional_call(model, moved, (tokens,))
    return out


@given(
    layers=st.integers(1, 3),
    width=st.integers(2, 5),
    ensemble=st.integers(1, 4),
    rank=st.integers(1, 4),
    grouping=st.sampled_from([by_layer, by_module, whole_model]),
)
@settings(max_examples=30, deadline=None)
def test_forward_and_gradients_equal_the_literal_formula(
    layers: int, width: int, ensemble: int, rank: int, grouping: Callable[[nn.Module], object]
) -> None:
    partition = grouping(Tower(layers, width))
    rank = min(rank, min(block.numel for block in partition))  # type: ignore[attr-defined]
    basis = double(random_basis(partition, rank))  # type: ignore[arg-type]
    tokens = torch.arange(12).view(3, 4) % 11
    subspace = SubspaceModel(
        Tower(layers, width), basis, modules_to_save=["head"], ensemble=ensemble, init_std=0.3, seed=layers
    )
    z = {
        block.name: value.detach().clone().requires_grad_()
        for block, value in zip(basis.partition, subspace.z, strict=True)
    }
    expected = literal(Tower(layers, width), basis, z, tokens)
    found = subspace(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    found.square().sum().backward()
    expected.square().sum().backward()
    for own, name in zip(subspace.z, z, strict=True):
        torch.testing.assert_close(own.grad, z[name].grad, rtol=1e-10, atol=1e-12)
    for parameter in basis.partition.select(subspace.model).values():
        assert parameter.grad_fn is not None  # its gradient is passed on and freed
    assert subspace.model.head.weight.grad is not None
    assert subspace.model.embedding.weight.grad is None


def test_gradients_accumulate_like_any_parameter(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    subspace(tokens).sum().backward()
    once = [z.grad.clone() for z in subspace.z if z.grad is not None]
    subspace(tokens).sum().backward()
    for z, gradient in zip(subspace.z, once, strict=True):
        torch.testing.assert_close(z.grad, 2 * gradient)
    subspace.zero_grad()
    assert all(z.grad is None for z in subspace.z)


def test_the_initial_z_is_drawn_from_the_seed(tower: Tower) -> None:
    """One generator serves all blocks, so no two blocks and no two members start alike."""
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), ensemble=2, init_std=0.25, seed=7)
    generator = torch.Generator().manual_seed(7)
    for z in subspace.z:
        assert torch.equal(z, 0.25 * torch.randn(2, 3, generator=generator).double())


def test_modules_to_save_are_whole_names() -> None:
    """`layers.1` is neither `layers.10` nor a module whose name ends with the same letters."""
    model = Tower(layers=11, width=2)
    model.sublayers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    expected = [f"layers.1.{name}" for name, _ in model.layers[1].named_parameters()]
    assert directly_trained_names(model, ["layers.1"]) == expected
    basis = empty_basis(by_pattern(model, {"head": "head.weight"}))
    subspace = SubspaceModel(model, basis, modules_to_save=["layers.1"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == expected
    assert sum(parameter.numel() for parameter in subspace.parameter_groups()[1]["params"]) == 26


class Undefined(torch.autograd.Function):
    """Has a gradient for its first input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None


def test_a_weight_may_get_no_gradient_from_what_uses_it(tokens: Tensor) -> None:
    class Odd(Tower):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            out: Tensor = Undefined.apply(x @ self.layers[0].norm.weight, self.layers[0].inner.weight)
            return out

    subspace = SubspaceModel(Odd(), double(random_basis(by_module(Odd()), 2)))
    subspace(tokens).square().sum().backward()
    got = {block.name for block, z in zip(subspace.blocks, subspace.z, strict=True) if z.grad is not None}
    assert got == {block.name for block in subspace.blocks if block.name.endswith("layers.0.norm")}
    assert len(got) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
def test_training_equals_training_the_literal_formula(tokens: Tensor, optimizer: type[torch.optim.Optimizer]) -> None:
    basis = double(random_basis(by_layer(Tower()), 3))
    subspace, reference = SubspaceModel(Tower(), basis), Tower().requires_grad_(False)
    z = {block.name: torch.zeros(1, 3, dtype=torch.float64, requires_grad=True) for block in basis.partition}
    ours, theirs = optimizer(subspace.z.parameters(), lr=0.05), optimizer(z.values(), lr=0.05)  # type: ignore[call-arg]
    losses = []
    for _ in range(6):
        for optimiser, output in ((ours, subspace(tokens)), (theirs, literal(reference, basis, z, tokens))):
            optimiser.zero_grad()
            loss = output.square().sum()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    for own, value in zip(subspace.z, z.values(), strict=True):
        torch.testing.assert_close(own, value, rtol=1e-9, atol=1e-12)
    assert losses[-1] < losses[0]


def test_an_update_through_data_is_noticed(tower: Tower, tokens: Tensor) -> None:
    """Some optimizers write to `parameter.data`, which no version counter sees."""
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    before = subspace(tokens)
    subspace.z[0].data.add_(1.0)
    assert not torch.equal(subspace(tokens), before)


@pytest.mark.parametrize("ensemble", [1, 3])
@pytest.mark.parametrize("make", [random_basis, fastfood_basis])
def test_the_graph_stays_while_z_changes(
    make: Callable[[Partition, int], Basis], ensemble: int, tower: Tower, tokens: Tensor
) -> None:
    """It contains no values of z, and the gradients are those at the present z."""
    subspace = SubspaceModel(tower, make(by_layer(tower), 3), ensemble=ensemble, init_std=0.1)
    nodes = set()
    for _ in range(3):
        subspace.zero_grad()
        subspace(tokens).square().sum().backward()
        nodes.add(tower.layers[0].inner.weight.grad_fn)
        z = parameters_to_vector(subspace.z).detach().requires_grad_()
        (expected,) = torch.autograd.grad(subspace.forward_at(z, tokens).square().sum(), z)
        found = torch.cat([one.grad.reshape(-1) for one in subspace.z if one.grad is not None])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        vector_to_parameters(z.detach() + 0.1, subspace.z)
    assert len(nodes) == 1


def gradient_at(subspace: SubspaceModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of a loss in the present z, and that of the function of z."""
    subspace.zero_grad()
    subspace(tokens).square().sum().backward()
    z = parameters_to_vector(subspace.z).detach().requires_grad_()
    (expected,) = torch.autograd.grad(subspace.forward_at(z, tokens).square().sum(), z)
    return torch.cat([one.grad.reshape(-1) for one in subspace.z if one.grad is not None]), expected


def test_training_goes_on_after_a_first_call_in_inference_mode(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    with torch.inference_mode():
        subspace(tokens)
    for _ in range(2):
        torch.testing.assert_close(*gradient_at(subspace, tokens))
        vector_to_parameters(parameters_to_vector(subspace.z).detach() + 0.1, subspace.z)


def test_an_interrupted_graph_is_built_again(tower: Tower, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    subspace.to(torch.float64)  # after a move the graph is built anew
    with monkeypatch.context() as patch:
        patch.setattr(subspace.engine.moving[1], "follow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            subspace(tokens)
    torch.testing.assert_close(*gradient_at(subspace, tokens))


def test_a_weight_that_its_layer_scales_in_place(tower: Tower, tokens: Tensor) -> None:
    """The weight is then no longer the result of z alone, and follows it anew when z changes."""
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    subspace(tokens)
    tower.layers[0].inner.weight.mul_(2.0)
    vector_to_parameters(parameters_to_vector(subspace.z).detach() + 0.1, subspace.z)
    torch.testing.assert_close(*gradient_at(subspace, tokens))


class Renamed(Tower):
    """A model that names its parameters otherwise than by its modules, as wrappers for checkpoints do."""

    def named_parameters(self, *arguments: Any, **options: Any) -> Any:
        for name, parameter in super().named_parameters(*arguments, **options):
            yield f"whole.{name}", parameter


def test_parameters_under_other_names_than_the_modules(tokens: Tensor) -> None:
    model = Renamed()
    basis = double(random_basis(by_pattern(model, {"all": r"whole\.layers.*"}), 3))
    subspace = SubspaceModel(model, basis, init_std=0.1)
    for _ in range(2):
        subspace(tokens).sum().backward()
        before = [z.grad for z in subspace.z]
        assert all(gradient is not None and gradient.any() for gradient in before)
        vector_to_parameters(parameters_to_vector(subspace.z).detach() + 0.1, subspace.z)


def test_a_sparse_gradient_beside_a_weight_without_one(tokens: Tensor) -> None:
    model = nn.ModuleDict({"used": nn.Embedding(11, 4, sparse=True), "unused": nn.Linear(4, 4)}).double()
    basis = double(random_basis(by_pattern(model, {"all": ".*"}), 3))
    subspace = SubspaceModel(model, basis)
    subspace.refresh()
    model["used"](tokens).sum().backward()
    expected = basis.maps["all"].rmatvec(
        torch.cat(
            [
                torch.bincount(tokens.reshape(-1), minlength=11).double()[:, None].expand(11, 4).reshape(-1),
                torch.zeros(20).double(),
            ]
        )
    )
    torch.testing.assert_close(subspace.z[0].grad, expected[None])


def test_a_merged_model_holds_no_buffer(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    subspace(tokens)
    buffer = weakref.ref(subspace.engine._buffer)
    assert buffer() is not None
    subspace.merge()
    assert buffer() is None


def test_a_loss_of_an_earlier_z_has_no_gradient(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    loss = subspace(tokens).square().sum()
    subspace.z[0].data.add_(1.0)
    subspace.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def other_weight(tower: Tower) -> None:
    tower.layers[1].inner.weight = nn.Parameter(tower.layers[1].inner.weight.detach().clone())


def other_module(tower: Tower) -> None:
    tower.layers[1].inner = Layer(4).inner.double()


def other_layers(tower: Tower) -> None:
    tower.layers = Tower().layers


@pytest.mark.parametrize("replace", [other_weight, other_module, other_layers])
@pytest.mark.parametrize("steps", [0, 1])
def test_weights_that_are_replaced_are_missed(
    steps: int, replace: Callable[[Tower], None], tower: Tower, tokens: Tensor
) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    for _ in range(steps):
        subspace(tokens)
    replace(tower)
    subspace.z[0].data.add_(1.0)
    with pytest.raises(InputError, match="replaced by others, which do not follow z"):
        subspace(tokens)


def test_merge_then_unmerge_is_the_identity(tokens: Tensor) -> None:
    model = Tower()
    model.layers[0].norm.weight.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    subspace = SubspaceModel(model, double(random_basis(by_layer(model), 3)), init_std=0.2)
    expected = subspace(tokens)
    merged = subspace.merge()
    assert merged is model
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=0)
    merged(tokens).sum().backward()
    assert model.layers[0].inner.weight.grad is not None  # no hook eats it any more
    assert all(z.grad is None for z in subspace.z)
    model.zero_grad()

    subspace.unmerge()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(subspace(tokens), expected, rtol=0, atol=0)
    subspace(tokens).sum().backward()
    assert all(z.grad is not None for z in subspace.z)


def test_a_merged_model_can_be_read_without_a_forward_pass(tokens: Tensor) -> None:
    basis = double(random_basis(by_layer(Tower()), 3))
    subspace = SubspaceModel(Tower(), basis)
    with torch.no_grad():
        subspace.z[0].add_(1.0)
    merged = subspace.merge()
    z = {block.name: value for block, value in zip(basis.partition, subspace.z, strict=True)}
    torch.testing.assert_close(merged(tokens), literal(Tower(), basis, z, tokens))


def test_gradients_of_weights_that_follow_z_are_neither_set_nor_accumulated(tower: Tower) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    weight = subspace.model.layers[0].inner.weight
    with pytest.raises(InputError, match="cannot be set; set that of z"):
        weight.grad = torch.ones(8, 4, dtype=torch.float64)
    with pytest.raises(InputError, match="put it on z, or use register_hook"):
        weight.register_post_accumulate_grad_hook(lambda weight: None)


def test_swap_in_place(tokens: Tensor) -> None:
    basis = double(random_basis(by_layer(Tower()), 3))
    subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], ensemble=2)
    plain = subspace(tokens)
    z = {block.name: torch.randn(3, dtype=torch.float64) for block in basis.partition}
    subspace.set_state(z, {"head.bias": torch.ones(2, dtype=torch.float64)})
    reference = Tower()
    with torch.no_grad():
        reference.head.bias.fill_(1.0)
    torch.testing.assert_close(subspace(tokens), literal(reference, basis, {k: v[None] for k, v in z.items()}, tokens))
    bias = Tower().head.bias.detach()
    subspace.set_state({name: torch.zeros(2, 3) for name in z}, {"head.bias": bias})
    torch.testing.assert_close(subspace(tokens), plain)

    for wrong, ordinary, message in (
        ({}, {}, "expected z for the blocks"),
        ({name: torch.zeros(4) for name in z}, {}, "expected \\[2, 3\\] or \\[3\\]"),
        ({name: torch.zeros(3, 3) for name in z}, {}, "expected \\[2, 3\\] or \\[3\\]"),
        (z, {"embedding.weight": torch.zeros(11, 4)}, "not a directly trained parameter"),
        (z, {"head.bias": torch.zeros(3)}, "expected shape \\[2\\], got \\[3\\]"),
    ):
        with pytest.raises(MismatchError, match=message):
            subspace.set_state(wrong, ordinary)
    torch.testing.assert_close(subspace(tokens), plain)  # a refused swap changes nothing


def test_parameters_are_what_an_optimizer_should_see(tower: Tower) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), modules_to_save=["head"], ensemble=2)
    named = dict(subspace.named_parameters())
    assert {"z.0", "z.1", "model.head.weight", "model.head.bias", "model.embedding.weight"} == set(named)
    trainable = {name for name, parameter in named.items() if parameter.requires_grad}
    assert trainable == {"z.0", "z.1", "model.head.weight", "model.head.bias"}
    assert trainable_counts(subspace) == (12, 10)
    assert subspace.get_nb_trainable_parameters() == (22, 12 + sum(value.numel() for value in tower.parameters()))
    groups = subspace.parameter_groups(0.5, 0.25)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.5, 2), (0.25, 2)]
    assert groups[0]["weight_decay"] == 0.0
    assert [group["lr"] for group in subspace.parameter_groups()] == [1e-2, 2e-5]  # the paper's


def test_the_wrapped_models_signature_shows(tower: Tower) -> None:
    subspace = SubspaceModel(tower, random_basis(by_layer(tower), 3))
    assert list(inspect.signature(subspace.forward).parameters) == ["tokens"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_their_own(tokens: Tensor, duplicate: Callable[[SubspaceModel], SubspaceModel]) -> None:
    first = SubspaceModel(Tower(), double(random_basis(by_layer(Tower()), 3)), modules_to_save=["head"], init_std=0.3)
    second = duplicate(first)
    assert torch.equal(second(tokens), first(tokens))
    second(tokens).sum().backward()
    assert all(z.grad is not None for z in second.z)
    assert all(z.grad is None for z in first.z)
    with torch.no_grad():
        second.z[0].add_(1.0)
    assert not torch.equal(second(tokens), first(tokens))
    first.merge()
    merged = duplicate(first)
    merged.model(tokens).sum().backward()
    assert all(z.grad is None for z in merged.z)
    # the wrapped model can be copied by itself, and wrapped again
    inner = copy.deepcopy(second.model)
    inner(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in inner.layers.parameters())
    SubspaceModel(inner, double(random_basis(by_layer(inner), 2)))


def test_state_dict_round_trip(tokens: Tensor) -> None:
    basis = double(random_basis(by_layer(Tower()), 3))
    first = SubspaceModel(Tower(), basis, modules_to_save=["head"], init_std=0.3)
    second = SubspaceModel(Tower(), basis, modules_to_save=["head"])
    first.refresh()
    second(tokens)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(tokens), first(tokens))


@pytest.fixture
def sparse() -> SubspaceModel:
    """One coordinate of twenty moves in each layer; some weights have none of these."""
    return SubspaceModel(
        Tower(),
        random_basis(by_layer(Tower()), 3, density=0.05, dtype=torch.float64),
        modules_to_save=["head"],
        init_std=0.3,
    )


def test_a_sparse_basis_touches_its_own_coordinates_alone(sparse: SubspaceModel, tokens: Tensor) -> None:
    """The others keep their bits, weights without any get no gradient, and theta_0 is kept on the support only."""
    before = by_layer(Tower()).select(Tower())
    sparse(tokens).square().sum().backward()
    moved, untouched = 0, 0
    for block in sparse.blocks:
        support = sparse.basis.maps[block.name].tensors()["indices"]
        for spec, a, b in block.spans():
            weight = sparse.model.get_parameter(spec.name)
            changed = (weight != before[spec.name]).reshape(-1).nonzero().squeeze(1) + a
            inside = support[(support >= a) & (support < b)]
            assert torch.equal(changed, inside.long())
            assert weight.requires_grad == bool(len(inside))
            moved, untouched = moved + len(inside), untouched + (not len(inside))
    assert moved == 8  # 5 % of 84 in each of two layers
    assert untouched
    assert sum(buffer.numel() for name, buffer in sparse.named_buffers() if name.startswith("_start_")) == moved
    assert all(z.grad is not None and z.grad.any() for z in sparse.z)
    sparse.merge()
    sparse.unmerge()
    for name, weight in by_layer(sparse.model).select(sparse.model).items():
        assert torch.equal(weight, before[name])


def test_the_state_of_another_model_does_not_reach_the_coordinates_outside(
    sparse: SubspaceModel, tokens: Tensor
) -> None:
    expected = sparse(tokens)
    other = SubspaceModel(Tower(seed=1), random_basis(by_layer(Tower()), 3, density=0.05), modules_to_save=["head"])
    state = other.state_dict()
    state |= {name: value for name, value in sparse.state_dict().items() if not name.startswith("model.layers")}
    sparse.load_state_dict(state)
    assert torch.equal(sparse(tokens), expected)


def test_nor_does_it_under_another_name_of_a_tied_weight() -> None:
    def tied(seed: int) -> nn.Module:
        model = Tower(seed=seed)
        model.alias = model.layers[0].inner
        return model

    basis = random_basis(by_layer(Tower()), 3, density=0.05)
    sparse, other = (SubspaceModel(tied(seed), basis) for seed in (0, 1))
    state = sparse.state_dict() | {
        name: value for name, value in other.state_dict().items() if name.startswith("model.alias")
    }
    sparse.load_state_dict(state)
    assert torch.equal(sparse.model.layers[0].inner.weight, Tower().layers[0].inner.weight)


def test_nor_does_it_through_a_module_around(sparse: SubspaceModel, tokens: Tensor) -> None:
    expected = sparse(tokens)
    around = nn.ModuleDict({"inner": sparse})
    other = SubspaceModel(Tower(seed=1), random_basis(by_layer(Tower()), 3, density=0.05), modules_to_save=["head"])
    state = {f"inner.{name}": value for name, value in other.state_dict().items() if name.startswith("model.layers")}
    around.load_state_dict({**around.state_dict(), **state})
    assert torch.equal(sparse(tokens), expected)


def test_a_merged_model_that_others_changed_is_not_taken_for_theta_0(sparse: SubspaceModel) -> None:
    merged = sparse.merge()
    sparse.unmerge()
    sparse.merge()
    with torch.no_grad():
        merged.layers[1].inner.weight *= 3
    present = {name: value.clone() for name, value in merged.state_dict().items()}
    with pytest.raises(MismatchError, match=r"block 'layers.1'"):
        sparse.unmerge()
    assert all(torch.equal(value, present[name]) for name, value in merged.state_dict().items())


def test_a_basis_stays_in_its_format_whatever_the_model_becomes() -> None:
    subspace = SubspaceModel(Tower(), random_basis(by_layer(Tower()), 3, dtype=torch.bfloat16)).float()
    assert all(
        v.tensors()["directions"].dtype == torch.bfloat16 for v in (moving.v for moving in subspace.engine.moving)
    )


def test_a_carried_basis_that_was_left_alone_may_be_overwritten(sparse: SubspaceModel, tmp_path: Path) -> None:
    """As a full disk or a kill between the basis and the manifest leaves it."""
    sparse.save_pretrained(tmp_path / "a")
    (tmp_path / "a/manifest.json").unlink()
    (tmp_path / "a/adapter.safetensors").unlink()
    sparse.save_pretrained(tmp_path / "a")
    assert SubspaceModel.from_pretrained(Tower(), tmp_path / "a").basis.is_sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_sparse_adapter_carries_its_basis(
    tmp_path: Path, tokens: Tensor, wander: Callable[..., Trajectory], dtype: torch.dtype
) -> None:
    trajectory = wander(Tower(), by_layer(Tower()))
    basis = svd_basis(trajectory, 3, density=0.2, dtype=dtype, folder=tmp_path / "basis")
    first = SubspaceModel(Tower(), basis, modules_to_save=["head"], init_std=0.3)
    first.save_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "lean", self_contained=False)
    expected = first(tokens)
    shutil.rmtree(tmp_path / "basis")
    (tmp_path / "a").rename(tmp_path / "moved")
    loaded = SubspaceModel.from_pretrained(Tower(), tmp_path / "moved")
    assert torch.equal(loaded(tokens), expected)
    assert loaded.basis.content_hash() == basis.content_hash()
    with pytest.raises(InputError, match="not at"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "lean")
    with pytest.raises(InputError, match="lies in the output folder"):  # overwriting would take its own basis away
        loaded.save_pretrained(tmp_path / "moved", overwrite=True)
    loaded.basis.save_pretrained(tmp_path / "elsewhere")  # and is still read from where it was
    with pytest.raises(InputError, match="lies in the output folder"):
        loaded.save_pretrained(tmp_path / "moved", overwrite=True)
    assert torch.equal(SubspaceModel.from_pretrained(Tower(), tmp_path / "moved")(tokens), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(SubspaceModel.from_pretrained(Tower(), tmp_path / "again")(tokens), expected)
    block = tmp_path / "again/basis/block-001.safetensors"
    block.write_bytes(block.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StorageError, match="block-001"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "again")


def test_any_adapter_can_carry_its_basis(tmp_path: Path, tokens: Tensor, wander: Callable[..., Trajectory]) -> None:
    basis = svd_basis(wander(Tower(), by_layer(Tower())), 3, dtype=torch.float64)  # was never saved
    subspace = SubspaceModel(Tower(), basis, init_std=0.3)
    subspace.save_pretrained(tmp_path / "a", self_contained=True)
    assert basis.location is None
    assert torch.equal(SubspaceModel.from_pretrained(Tower(), tmp_path / "a")(tokens), subspace(tokens))
    subspace.save_pretrained(tmp_path / "a", self_contained=True, overwrite=True)
    assert torch.equal(SubspaceModel.from_pretrained(Tower(), tmp_path / "a")(tokens), subspace(tokens))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_a_sparse_one_train_on_their_own(sparse: SubspaceModel, tokens: Tensor, duplicate: Any) -> None:
    expected = sparse(tokens).detach()
    twin = duplicate(sparse)
    twin(tokens).square().sum().backward()
    with torch.no_grad():
        for z in twin.z:
            z -= 0.1 * z.grad
    assert not torch.equal(twin(tokens), expected)
    assert torch.equal(sparse(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_sparse_one_moves_and_converts(tokens: Tensor, dtype: torch.dtype) -> None:
    basis = random_basis(by_layer(Tower()), 3, density=0.3, dtype=dtype)
    subspace = SubspaceModel(Tower(), basis, init_std=0.3)
    expected = subspace(tokens)
    torch.testing.assert_close(subspace.float()(tokens), expected.float(), rtol=1e-4, atol=1e-5)
    subspace(tokens).square().sum().backward()
    assert all(z.grad is not None and z.grad.dtype == torch.float32 for z in subspace.z)


def test_weights_in_another_memory_format_take_a_sparse_update() -> None:
    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)

    partition = by_pattern(made(), {"all": ".*"})
    basis = random_basis(partition, 2, density=0.5)
    image = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    sparse, whole = (SubspaceModel(made(), one, init_std=0.5) for one in (basis, dense(basis)))
    torch.testing.assert_close(sparse(image), whole(image), rtol=1e-5, atol=1e-6)
    for subspace in (sparse, whole):
        subspace(image).square().sum().backward()
    torch.testing.assert_close(sparse.z[0].grad, whole.z[0].grad, rtol=1e-5, atol=1e-5)
    sparse.merge()
    sparse.unmerge()
    assert torch.equal(sparse.model[0].weight, made()[0].weight)  # type: ignore[index]


def test_freeze_trains_the_ordinary_parameters_alone(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, empty_basis(by_layer(tower)), modules_to_save=["head", "embedding"])
    assert torch.equal(subspace(tokens), Tower()(tokens))
    subspace(tokens).sum().backward()
    trained = {name for name, parameter in subspace.named_parameters() if parameter.grad is not None}
    assert trained == {"model.head.weight", "model.head.bias", "model.embedding.weight"}
    assert trainable_counts(subspace)[0] == 0


def test_save_then_load(tmp_path: Path, tokens: Tensor, wander: Callable[..., Trajectory]) -> None:
    svd_basis(wander(Tower(), by_layer(Tower())), rank=3, dtype=torch.float64).save_pretrained(tmp_path / "basis")
    basis = Basis.from_pretrained(tmp_path / "basis")
    subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], ensemble=2, init_std=0.3)
    with torch.no_grad():
        subspace.model.head.weight.add_(1.0)
    subspace.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter.safetensors").stat().st_size < 2000
    loaded = SubspaceModel.from_pretrained(Tower(), tmp_path / "adapter")
    assert torch.equal(loaded(tokens), subspace(tokens))
    # the pair of folders may move together
    (tmp_path / "moved").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "moved/adapter")
    (tmp_path / "basis").rename(tmp_path / "moved/basis")
    assert torch.equal(SubspaceModel.from_pretrained(Tower(), tmp_path / "moved/adapter")(tokens), subspace(tokens))
    (tmp_path / "moved/basis").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not at"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "moved/adapter")
    found = OpenedAdapter(tmp_path / "moved/adapter", tmp_path / "elsewhere").basis()
    assert torch.equal(
        SubspaceModel.from_pretrained(Tower(), tmp_path / "moved/adapter", found)(tokens), subspace(tokens)
    )


@pytest.mark.parametrize("kind", ["random", "empty"])
def test_bases_that_can_be_made_again_need_no_folder(tmp_path: Path, tokens: Tensor, kind: str) -> None:
    model, partition = Tower().float(), by_layer(Tower().float())
    basis = random_basis(partition, 3, seed=4) if kind == "random" else empty_basis(partition)
    subspace = SubspaceModel(model, basis, modules_to_save=["head"], init_std=0.3)
    subspace.save_pretrained(tmp_path / "a")
    assert torch.equal(SubspaceModel.from_pretrained(Tower().float(), tmp_path / "a")(tokens), subspace(tokens))


def test_wrong_pairings_are_refused(tmp_path: Path, tower: Tower, wander: Callable[..., Trajectory]) -> None:
    trajectory = wander(tower, by_layer(tower))
    basis = svd_basis(trajectory, rank=2)
    with pytest.raises(MismatchError, match=r"another theta_0: the model differs in block 'layers\.0'"):
        SubspaceModel(Tower(seed=3), basis)
    with pytest.raises(MismatchError, match=r"no parameter 'layers\.1"):
        SubspaceModel(Tower(1), basis)
    basis.save_pretrained(tmp_path / "b")
    SubspaceModel(tower, basis).save_pretrained(tmp_path / "a")
    with pytest.raises(MismatchError, match="was trained in the basis"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a", svd_basis(trajectory, rank=3))
    other = random_basis(by_layer(tower), 2)
    SubspaceModel(Tower(), other, modules_to_save=["head"]).save_pretrained(tmp_path / "r")
    with pytest.raises(MismatchError, match=r"the adapter .* was made for another theta_0"):
        SubspaceModel.from_pretrained(Tower(seed=3), tmp_path / "r")


def test_misuse(tower: Tower, tmp_path: Path) -> None:
    basis = random_basis(by_layer(tower), 2)
    for arguments, message in (
        ({"modules_to_save": ["classifier"]}, "no module is called 'classifier'"),
        ({"modules_to_save": ["norm"]}, "already lies in a block"),
        ({"ensemble": 0}, "ensemble >= 1"),
        ({"init_std": -1.0}, "init_std >= 0"),
        ({"init_std": float("nan")}, "finite init_std >= 0"),
        ({"init_std": float("inf")}, "finite init_std >= 0"),
    ):
        with pytest.raises(InputError, match=message):
            SubspaceModel(Tower(), basis, **arguments)  # type: ignore[arg-type]
    half = Tower().bfloat16()
    with pytest.raises(InputError, match="load the model in float32"):
        SubspaceModel(half, random_basis(by_layer(half), 2))
    subspace = SubspaceModel(tower, basis)
    with torch.no_grad():
        subspace.z[0].fill_(torch.nan)
    with pytest.raises(TinyspanError, match="nothing was saved"):
        subspace.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_tied_embeddings_inside_and_outside(tokens: Tensor) -> None:
    """A head tied to the embedding is one parameter; tied layers are one block."""
    model = Tower(2, width=4)
    model.layers[1] = model.layers[0]
    model.decoder = nn.Linear(4, 11, bias=False).double()
    model.decoder.weight = model.embedding.weight
    basis = double(random_basis(by_layer(model), 3))
    subspace = SubspaceModel(model, basis, modules_to_save=["embedding"], init_std=0.2)
    assert len(subspace.z) == 1
    z = {"layers.0": subspace.z[0].detach().clone().requires_grad_()}
    reference = Tower(2, width=4)
    reference.layers[1] = reference.layers[0]
    expected = literal(reference, basis, z, tokens)
    found = subspace(tokens)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(subspace.z[0].grad, z["layers.0"].grad)
    assert model.decoder.weight is model.embedding.weight


def test_a_state_of_tied_weights_can_be_saved_and_loaded(tokens: Tensor, tmp_path: Path) -> None:
    """As the Trainer does it: safetensors refuses a state in which two names share memory."""

    def tied(init_std: float) -> SubspaceModel:
        model = Tower(2, width=4)
        model.decoder = nn.Linear(4, 11, bias=False).double()
        model.decoder.weight = model.embedding.weight
        basis = double(random_basis(by_layer(model), 3))
        return SubspaceModel(model, basis, modules_to_save=["embedding"], init_std=init_std)

    trained, fresh = tied(0.2), tied(0.0)
    with torch.no_grad():
        trained.model.embedding.weight.add_(1.0)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    found = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not found.missing_keys
    torch.testing.assert_close(fresh(tokens), trained(tokens), rtol=0, atol=0)
    assert fresh.model.decoder.weight is fresh.model.embedding.weight


def test_a_tied_module_to_save_is_trained_under_either_name(tower: Tower) -> None:
    tower.decoder = nn.Linear(4, 11, bias=False).double()
    tower.decoder.weight = tower.embedding.weight
    basis = double(random_basis(by_layer(tower), 3))
    subspace = SubspaceModel(tower, basis, modules_to_save=["decoder"])
    assert trainable_counts(subspace) == (6, 44)
    named = dict(subspace.named_parameters("outer", remove_duplicate=False))
    assert named["outer.model.decoder.weight"] is named["outer.model.embedding.weight"]
    tower = Tower()
    tower.decoder = nn.Linear(4, 8, bias=False).double()
    tower.decoder.weight = tower.layers[0].inner.weight
    with pytest.raises(InputError, match="already lies in a block"):
        SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), modules_to_save=["decoder"])


def test_moving_and_converting_keeps_the_meaning(tokens: Tensor) -> None:
    subspace = SubspaceModel(Tower().float(), random_basis(by_layer(Tower().float()), 3), init_std=0.3)
    expected = subspace(tokens)
    torch.testing.assert_close(subspace.double()(tokens), expected.double(), rtol=1e-5, atol=1e-6)
    subspace(tokens).sum().backward()
    assert all(z.grad is not None and z.grad.dtype == torch.float64 for z in subspace.z)


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("ensemble", [1, 3])
def test_what_is_widened_is_saved_for_the_model_it_was_and_goes_back_to_it(
    density: float, ensemble: int, tokens: Tensor, tmp_path: Path
) -> None:
    """float32 numbers are the same in float64, but a mean of z is rounded otherwise there."""
    basis = random_basis(by_layer(Tower().float()), 3, density=density)
    subspace = SubspaceModel(Tower().float(), basis, modules_to_save=["head"], ensemble=ensemble, init_std=0.3)
    subspace.merge()
    subspace.double().refresh()
    expected = subspace(tokens)
    subspace.save_pretrained(tmp_path / "wide")
    loaded = SubspaceModel.from_pretrained(Tower().float(), tmp_path / "wide", basis)
    torch.testing.assert_close(loaded(tokens).double(), expected, rtol=1e-5, atol=1e-6)
    export_delta(subspace, tmp_path / "delta.safetensors")
    plain = Tower().float()
    apply_delta(plain, tmp_path / "delta.safetensors")
    torch.testing.assert_close(plain(tokens).double(), expected, rtol=1e-5, atol=1e-6)
    subspace.unmerge()
    for name, weight in Tower().float().double().named_parameters():
        assert torch.equal(subspace.model.get_parameter(name), weight)
    torch.testing.assert_close(subspace(tokens), expected, rtol=1e-5, atol=1e-6)
    assert subspace.merge() is subspace.model
    with torch.no_grad():
        subspace.z[0] += 1
    with pytest.raises(InputError, match="z has changed while the model was merged"):
        subspace.float().refresh()


def test_a_merged_model_loads_no_state(tower: Tower, tokens: Tensor) -> None:
    """Its weights would stay those of another z."""
    basis = double(random_basis(by_layer(tower), 3))
    state = SubspaceModel(Tower(), basis, modules_to_save=["head"], init_std=1).state_dict()
    subspace = SubspaceModel(tower, basis, modules_to_save=["head"])
    before = subspace(tokens).detach()
    subspace.merge()
    with pytest.raises(InputError, match="does not follow z; call unmerge"):
        subspace.load_state_dict(state)
    assert torch.equal(subspace(tokens), before)
    subspace.unmerge()
    subspace.load_state_dict(state)
    assert not torch.equal(subspace(tokens), before)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_gradients_are_projected_by_the_map_that_was_moved(density: float, tokens: Tensor) -> None:
    """A move to another device makes a new map; what stays behind, emptied here, plays no part any more."""
    basis = random_basis(by_layer(Tower()), 3, density=density)
    subspace = SubspaceModel(Tower(), basis, init_std=0.3)
    subspace(tokens).sum().backward()
    expected = [z.grad.clone() for z in subspace.z if z.grad is not None]
    left_behind = [moving.v for moving in subspace.engine.moving]
    for moving in subspace.engine.moving:
        moving.v = moving.v.converted(torch.clone)
    subspace.to("cpu").zero_grad()
    for v in left_behind:
        v.tensors()["directions"].zero_()
    subspace(tokens).sum().backward()
    assert len(expected) == 2
    for z, gradient in zip(subspace.z, expected, strict=True):
        torch.testing.assert_close(z.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("merged", [False, True])
def test_only_the_whole_is_moved(tower: Tower, tokens: Tensor, merged: bool) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    if merged:
        subspace.merge()
    subspace.engine._attachments.release()  # torch asserts that what is moved to meta depends on nothing
    subspace.model.to("meta")
    with pytest.raises(InputError, match="weights are on meta, z on cpu: move the SubspaceModel"):
        subspace.unmerge() if merged else subspace(tokens)


def test_a_merged_model_does_not_pretend_to_follow_z(tower: Tower) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    subspace.merge()
    with pytest.raises(InputError, match="call unmerge"):
        subspace.set_state({"layers.0": torch.zeros(3), "layers.1": torch.zeros(3)})


def test_whatever_is_reached_through_the_wrapper_is_up_to_date(tokens: Tensor) -> None:
    basis = double(random_basis(by_layer(Tower()), 3))
    subspace = SubspaceModel(Tower(), basis, init_std=0.5)
    expected = SubspaceModel(Tower(), basis, init_std=0.5)(tokens)
    assert torch.equal(subspace(tokens), expected)
    for read in (lambda s: s.layers[1].norm.weight, lambda s: s.state_dict()["model.layers.1.norm.weight"]):
        fresh = SubspaceModel(Tower(), basis, init_std=0.5)
        assert torch.equal(read(fresh), subspace.model.layers[1].norm.weight)


def test_new_weights_are_used_inside_one_autocast_region(tokens: Tensor) -> None:
    """Autocast caches half-precision copies of the weights; writing new ones must not go unseen."""
    subspace = SubspaceModel(Tower().float(), random_basis(by_layer(Tower().float()), 3))
    with torch.autocast("cpu", torch.bfloat16):
        before = subspace(tokens)
        subspace.set_state({"layers.0": torch.full((3,), 5.0), "layers.1": torch.full((3,), 5.0)})
        after = subspace(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(subspace(tokens), after)
    assert not torch.equal(before, after)


def test_weights_that_are_merged_or_restored_are_used_inside_one_autocast_region(tokens: Tensor) -> None:
    model = Tower().float()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(tokens)
        subspace = SubspaceModel(model, random_basis(by_layer(model), 3), init_std=1.0)
        assert not torch.equal(subspace.merge()(tokens), before)
        subspace.unmerge()
        del subspace
        assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("make", [random_basis, fastfood_basis])
def test_weights_are_not_rounded_under_autocast(make: Callable[[Partition, int], Basis]) -> None:
    basis = make(by_layer(Tower().float()), 3)
    subspace, expected = (SubspaceModel(Tower().float(), basis, init_std=1.0) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        subspace.refresh()
        delta = subspace.delta()
    expected.refresh()
    for name, change in expected.delta().items():
        assert torch.equal(delta[name], change)
        assert torch.equal(subspace.model.get_parameter(name), expected.model.get_parameter(name))


def test_weights_in_another_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"conv": "0.*"}), 2), init_std=0.5)
    image = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = subspace(image)
    subspace.to(memory_format=torch.channels_last)
    torch.testing.assert_close(subspace(image), expected)


def test_a_refused_adapter_leaves_the_model_as_it_came(tmp_path: Path, tokens: Tensor) -> None:
    basis = double(random_basis(by_layer(Tower()), 3))
    basis.save_pretrained(tmp_path / "basis")
    SubspaceModel(Tower(), basis, modules_to_save=["head"], init_std=0.3).save_pretrained(tmp_path / "a")
    other = Tower()
    other.head = nn.Linear(4, 3).double()
    expected = other(tokens)
    with pytest.raises(MismatchError, match="another task"):
        SubspaceModel.from_pretrained(other, tmp_path / "a")
    assert torch.equal(other(tokens), expected)
    SubspaceModel(other, basis)


def test_projection_is_exact_under_autocast() -> None:
    """A backward pass inside an autocast region must not round V^T g to bfloat16."""
    subspace = SubspaceModel(Tower().float(), random_basis(by_layer(Tower().float()), 3))
    weight = subspace.model.layers[0].inner.weight
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        weight.backward(gradient)
    block, v = subspace.blocks[0], subspace.basis.maps["layers.0"]
    ((a, b),) = [(a, b) for spec, a, b in block.spans() if spec.name == "layers.0.inner.weight"]
    expected = v.directions[:, a:b] @ gradient.reshape(-1)  # type: ignore[attr-defined]
    torch.testing.assert_close(subspace.z[0].grad, expected[None], rtol=1e-6, atol=1e-7)


def test_one_wrapper_at_a_time(tower: Tower, tokens: Tensor) -> None:
    basis = double(random_basis(by_layer(tower), 3))
    first = SubspaceModel(tower, basis)
    with pytest.raises(InputError, match="already follows"):
        SubspaceModel(tower, basis)
    with pytest.raises(InputError, match="deepcopy"):
        copy.copy(first)
    with pytest.raises(InputError, match="one process per device"):
        first._replicate_for_data_parallel()  # as nn.DataParallel does
    second = SubspaceModel(first.merge(), basis)
    second(tokens).sum().backward()
    with pytest.raises(InputError, match="another SubspaceModel follows"):
        first.unmerge()
    assert not hasattr(second, "nope")


def test_z_may_not_drift_from_a_merged_model(tower: Tower, tmp_path: Path) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    subspace.merge()
    subspace.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        subspace.z[0].add_(1.0)
    for use in (subspace.merge, subspace.state_dict, lambda: subspace.save_pretrained(tmp_path / "b")):
        with pytest.raises(InputError, match="while the model was merged"):
            use()


def test_buffers_of_saved_modules_travel_with_the_adapter(tokens: Tensor, tmp_path: Path) -> None:
    def with_norm() -> Tower:
        tower = Tower()
        tower.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
        nn.init.ones_(tower.head[0].weight)
        nn.init.zeros_(tower.head[0].bias)
        tower.register_buffer("cache", torch.zeros(1), persistent=False)
        return tower

    basis = double(random_basis(by_layer(Tower()), 3))
    basis.save_pretrained(tmp_path / "basis")
    first = SubspaceModel(with_norm(), basis, modules_to_save=["head"])
    first(tokens)  # moves the running statistics
    assert "cache" not in first.get_state().directly_trained
    first.save_pretrained(tmp_path / "a")
    loaded = SubspaceModel.from_pretrained(with_norm(), tmp_path / "a")
    assert torch.equal(loaded.eval()(tokens), first.eval()(tokens))


def test_an_adapter_knows_the_frozen_parameters_it_was_trained_with(tmp_path: Path, tower: Tower) -> None:
    basis = double(random_basis(by_layer(tower), 3))
    basis.save_pretrained(tmp_path / "basis")
    SubspaceModel(tower, basis, modules_to_save=["head"]).save_pretrained(tmp_path / "a")
    other = Tower()
    with torch.no_grad():
        other.embedding.weight[3, 1] += 1e-9
    with pytest.raises(MismatchError, match="frozen parameters"):
        SubspaceModel.from_pretrained(other, tmp_path / "a")


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_half_precision_is_refused_and_nothing_changes(tower: Tower, tokens: Tensor, convert: str) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    expected = subspace(tokens)
    with pytest.raises(InputError, match="under autocast"):
        getattr(subspace, convert)()
    assert torch.equal(subspace(tokens), expected)


def test_pattern_partition_over_everything(tokens: Tensor) -> None:
    partition = by_pattern(Tower(), {"all": ".*"})
    subspace = SubspaceModel(Tower(), double(random_basis(partition, 2)))
    subspace(tokens).sum().backward()
    assert subspace.z[0].grad is not None
    assert trainable_counts(subspace) == (2, 0)


# -- maps that are applied to a block as a whole, and scales of layers ----------------------------------------------


def said(init_std: float = 0.3, rank: int = 5, **options: Any) -> SubspaceModel:
    """One global Fastfood map and a scale per layer, away from the start."""
    tower = Tower()
    basis = fastfood_basis(whole_model(tower), rank)
    subspace = SubspaceModel(tower, basis, init_std=init_std, layer_scales=by_layer(tower), **options)
    subspace.set_state({"model": subspace.z[0].detach().clone()}, scales=torch.tensor([0.7, -1.6]))
    return subspace


def of(subspace: SubspaceModel) -> tuple[dict[str, Tensor], Tensor | None]:
    """Copies of z and of the scales that autograd can follow."""
    z = zip(subspace.blocks, subspace.z, strict=True)
    scales = None if subspace.scales is None else subspace.scales.detach().clone().requires_grad_()
    return {block.name: value.detach().clone().requires_grad_() for block, value in z}, scales


def close(subspace: SubspaceModel, z: dict[str, Tensor], scales: Tensor | None) -> None:
    """Compare the gradients; the weights' own are gone."""
    for own, theirs in zip(subspace.z, z.values(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    if scales is not None:
        assert subspace.scales is not None
        torch.testing.assert_close(subspace.scales.grad, scales.grad, rtol=1e-10, atol=1e-12)
    for parameter in subspace.basis.partition.select(subspace.model).values():
        assert (parameter.grad_fn is not None) == parameter.requires_grad


@given(
    layers=st.integers(1, 3),
    width=st.integers(2, 5),
    ensemble=st.integers(1, 3),
    rank=st.integers(1, 9),
    grouping=st.sampled_from([by_layer, by_module, whole_model]),
    scaled=st.sampled_from([None, by_layer, by_module]),
    density=st.sampled_from([None, 1.0, 0.6, 0.2]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8]),
)
@settings(max_examples=120, deadline=None)
def test_whole_blocks_and_scales_equal_the_literal_formula(
    layers: int, width: int, ensemble: int, rank: int, grouping: Any, scaled: Any, density: Any, dtype: torch.dtype
) -> None:
    """Fastfood (no density), dense and sparse maps, in every format in which directions are stored."""
    tower, tokens = Tower(layers, width), torch.arange(12).view(3, 4) % 11
    partition = grouping(tower)
    smallest = min(max(1, round((density or 1.0) * block.numel)) for block in partition)
    if density is None:
        basis = fastfood_basis(partition, min(rank, smallest))
    else:
        basis = random_basis(partition, min(rank, smallest), density=density, dtype=dtype)
    scales_of = scaled(tower) if scaled else None
    subspace = SubspaceModel(
        tower, basis, modules_to_save=["head"], ensemble=ensemble, init_std=0.3, layer_scales=scales_of
    )
    if scales_of is not None:
        draw = torch.randn(len(scales_of), generator=torch.Generator().manual_seed(layers), dtype=torch.float64)
        subspace.set_state(
            {block.name: z.detach() for block, z in zip(partition, subspace.z, strict=True)}, scales=draw
        )
    z, scales = of(subspace)
    found = subspace(tokens)
    expected = literal(Tower(layers, width), dense(basis), z, tokens, scales, scales_of)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for times in (1, 2):  # gradients accumulate
        subspace(tokens).square().sum().backward()
        literal(Tower(layers, width), dense(basis), z, tokens, scales, scales_of).square().sum().backward()
        close(subspace, z, scales)
        assert subspace.model.head.weight.grad is not None, times
    subspace.zero_grad()
    assert all(value.grad is None for value in subspace.parameter_groups()[0]["params"])


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("grouping", [whole_model, by_layer])
def test_a_block_of_which_some_weights_get_no_gradient(tokens: Tensor, skipped: int, grouping: Any) -> None:
    """What came is projected when the backward pass ends; nothing is kept for the next one."""
    layers, reference = by_layer(Tower()), Tower()
    subspace = SubspaceModel(Tower(), fastfood_basis(grouping(Tower()), 5), init_std=0.3, layer_scales=layers)
    z, scales = of(subspace)
    basis = dense(subspace.basis)
    for skip in (True, False, True):
        for tower in (subspace.model, reference):
            layer = tower.layers[skipped]
            layer.forward = (lambda x: x) if skip else partial(Layer.forward, layer)
        subspace(tokens).square().sum().backward()
        literal(reference, basis, z, tokens, scales, layers).square().sum().backward()
        close(subspace, z, scales)


def test_a_backward_pass_that_fails_leaves_nothing_behind(tokens: Tensor) -> None:
    def fail(gradient: Tensor) -> None:
        raise RuntimeError("on purpose")

    subspace = said()
    subspace.model.layers[0].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="on purpose"):
        subspace(tokens).square().sum().backward()
    subspace.model.layers[0]._forward_hooks.clear()
    subspace.zero_grad()
    z, scales = of(subspace)
    subspace(tokens).square().sum().backward()
    literal(Tower(), dense(subspace.basis), z, tokens, scales, by_layer(Tower())).square().sum().backward()
    close(subspace, z, scales)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_layers_that_share_weights(tokens: Tensor, reentrant: bool) -> None:
    """Reentrant checkpointing runs backward passes inside the backward pass: a shared weight's gradient comes twice."""
    subspace = said()
    z, scales = of(subspace)
    reference = Tower()

    def twice(tower: nn.Module, x: Tensor) -> Tensor:
        x = tower.embedding(x).requires_grad_()
        for layer in [*tower.layers, *tower.layers]:
            run = checkpoint if tower is subspace.model else lambda layer, x, **options: layer(x)
            x = run(layer, x, use_reentrant=reentrant)
        return tower.head(x.mean(1))  # type: ignore[no-any-return]

    for tower in (subspace.model, reference):
        tower.forward = partial(twice, tower)
    found = subspace(tokens)
    expected = literal(reference, dense(subspace.basis), z, tokens, scales, by_layer(Tower()))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    close(subspace, z, scales)


@pytest.mark.parametrize("scaled", [False, True])
def test_training_did_and_said_equals_training_the_literal_formula(tokens: Tensor, scaled: bool) -> None:
    basis, layers = fastfood_basis(whole_model(Tower()), 20), by_layer(Tower()) if scaled else None
    subspace = SubspaceModel(Tower(), basis, layer_scales=layers)
    z, scales = of(subspace)
    written, losses = dense(basis), []
    ours = torch.optim.AdamW(subspace.parameter_groups(0.05)[:1])
    theirs = torch.optim.AdamW([*z.values(), *([] if scales is None else [scales])], lr=0.05, weight_decay=0.0)
    for _ in range(6):
        ours.zero_grad()
        theirs.zero_grad()
        loss = subspace(tokens).square().sum()
        loss.backward()
        literal(Tower(), written, z, tokens, scales, layers).square().sum().backward()
        if not losses and subspace.scales is not None:
            assert not subspace.scales.grad.any()  # V z is still 0
        ours.step()
        theirs.step()
        losses.append(loss.item())
    torch.testing.assert_close(subspace.z[0], z["model"], rtol=1e-8, atol=1e-10)
    if subspace.scales is not None:
        torch.testing.assert_close(subspace.scales, scales, rtol=1e-8, atol=1e-10)
        assert (subspace.scales - 1).abs().min() > 1e-3
    assert losses[-1] < losses[0]


def test_said_lists_its_scales_beside_z() -> None:
    subspace = said(modules_to_save=["head"], ensemble=2)
    trainable = {name for name, parameter in subspace.named_parameters() if parameter.requires_grad}
    assert trainable == {"scales", "z.0", "model.head.weight", "model.head.bias"}
    assert [name for name, _ in subspace.named_parameters(recurse=False)] == ["scales"]
    assert trainable_counts(subspace) == (2 * 5 + 2, 10)
    in_z, ordinary = subspace.parameter_groups(0.5, 0.25)
    assert [len(in_z["params"]), in_z["lr"], in_z["weight_decay"]] == [2, 0.5, 0.0]
    assert [len(ordinary["params"]), ordinary["lr"]] == [2, 0.25]
    assert SubspaceModel(Tower(), fastfood_basis(whole_model(Tower()), 3)).scales is None


def test_said_merges_and_unmerges(tokens: Tensor) -> None:
    before = {name: value.detach().clone() for name, value in Tower().named_parameters()}
    subspace = said()
    expected = subspace(tokens)
    assert torch.equal(subspace.merge()(tokens), expected)
    for name, change in subspace.delta().items():
        torch.testing.assert_close(before[name] + change, subspace.model.get_parameter(name), rtol=0, atol=1e-14)
    with torch.no_grad():
        subspace.scales += 1.0
    with pytest.raises(InputError, match="while the model was merged"):
        subspace.refresh()
    with torch.no_grad():
        subspace.scales -= 1.0
    subspace.unmerge()
    for name, value in subspace.model.named_parameters():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(subspace(tokens), expected, rtol=0, atol=1e-12)
    assert not torch.equal(expected, Tower()(tokens))


@pytest.mark.parametrize("stored", [False, True])
def test_save_then_load_of_said(tmp_path: Path, tokens: Tensor, stored: bool) -> None:
    subspace = said(modules_to_save=["head"])
    if stored:
        subspace.basis.save_pretrained(tmp_path / "basis")
        loaded = Basis.from_pretrained(tmp_path / "basis")
        assert (loaded.content_hash(), loaded.ranks) == (
            fastfood_basis(whole_model(Tower()), 5).content_hash(),
            {"model": 5},
        )
        for name, tensor in subspace.basis.maps["model"].tensors().items():
            assert torch.equal(loaded.maps["model"].tensors()[name], tensor)
    subspace.save_pretrained(tmp_path / "adapter")
    again = SubspaceModel.from_pretrained(Tower(), tmp_path / "adapter")
    assert torch.equal(again.scales, subspace.scales)
    assert torch.equal(again(tokens), subspace(tokens))
    assert (tmp_path / "adapter/adapter.safetensors").stat().st_size < 2000


def test_a_damaged_fastfood_basis_is_noticed(tmp_path: Path) -> None:
    fastfood_basis(by_layer(Tower()), 3).save_pretrained(tmp_path / "b")
    file = tmp_path / "b/block-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    loaded = Basis.from_pretrained(tmp_path / "b")
    loaded.maps["layers.0"]
    with pytest.raises(StorageError, match=r"block-001\.safetensors is damaged"):
        loaded.maps["layers.1"]


@pytest.mark.parametrize("constructor", [fastfood_basis, random_basis])
def test_a_generator_that_draws_other_numbers_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constructor: Any
) -> None:
    SubspaceModel(Tower(), constructor(by_layer(Tower()), 3)).save_pretrained(tmp_path / "a")
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: randn(*shape, **options) + 1e-6)
    with pytest.raises(MismatchError, match="drawn again from its seed, differs"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_said_train_on_their_own(tokens: Tensor, duplicate: Callable[[SubspaceModel], SubspaceModel]) -> None:
    first = said()
    expected = first(tokens)
    second = duplicate(first)
    second(tokens).square().sum().backward()
    assert first.scales.grad is None
    expected.square().sum().backward()
    torch.testing.assert_close(second.scales.grad, first.scales.grad)
    torch.testing.assert_close(second.z[0].grad, first.z[0].grad)
    third = said(init_std=0.0)
    third.load_state_dict(first.state_dict())
    assert torch.equal(third(tokens), expected)


def test_said_moves_and_converts(tokens: Tensor) -> None:
    subspace = said()
    expected = subspace(tokens)
    torch.testing.assert_close(subspace.float()(tokens), expected.float(), rtol=1e-4, atol=1e-5)
    subspace(tokens).square().sum().backward()
    assert subspace.scales.grad.dtype == subspace.z[0].grad.dtype == torch.float32
    subspace.zero_grad()
    subspace.double()(tokens).square().sum().backward()
    assert subspace.scales.grad.dtype == subspace.z[0].grad.dtype == torch.float64


def test_misuse_of_scales() -> None:
    basis = fastfood_basis(whole_model(Tower()), 3)
    with pytest.raises(MismatchError, match=r"'embedding\.weight' lies in only one of the two"):
        SubspaceModel(Tower(), basis, layer_scales=by_pattern(Tower(), {"all": ".*"}))
    plain, scaled = SubspaceModel(Tower(), basis), said(rank=3)
    for subspace, wrong, message in (
        (plain, torch.ones(2), r"scales: expected none, got shape \[2\]"),
        (scaled, torch.ones(3), r"scales: expected shape \[2\], got shape \[3\]"),
    ):
        with pytest.raises(MismatchError, match=message):
            subspace.set_state({"model": torch.ones(3)}, scales=wrong)
        assert not torch.equal(subspace.z[0], torch.ones(1, 3).double())


@pytest.mark.parametrize("trained", [False, True])
def test_a_dropped_one_is_freed_and_its_model_can_be_wrapped_again(tower: Tower, tokens: Tensor, trained: bool) -> None:
    """torch's hooks are invisible to the garbage collector: a strong reference from them would live for ever."""
    basis = random_basis(by_layer(tower), 2)
    subspace = SubspaceModel(tower, basis)
    if trained:
        subspace(tokens).sum().backward()
    dropped = weakref.ref(subspace)
    gc.disable()  # it is freed at once: it holds a copy of theta_0, and the garbage collector may be long in coming
    try:
        del subspace
        assert dropped() is None
    finally:
        gc.enable()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in tower.parameters())
    assert all(parameter.grad_fn is None for parameter in tower.parameters())
    again = SubspaceModel(tower, basis)
    again(tokens).sum().backward()
    assert all(z.grad is not None for z in again.z)


def test_one_that_lives_until_python_exits_causes_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python then sets the names in a module to None, before it deletes the objects of the main module."""
    attachments = Attachments()
    monkeypatch.setattr("tinyspan.model.hooks.sys", None)
    attachments.__del__()


class Reordered(Tower):
    """The same model, whose layers list norm, outer, inner, and which lists its head first."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer._modules = {name: layer._modules[name] for name in ("norm", "outer", "inner")}
        self._modules = {name: self._modules[name] for name in ("head", "layers", "embedding")}


def test_the_order_in_which_a_model_lists_its_parameters_does_not_matter(
    tmp_path: Path, tokens: Tensor, wander: Callable[..., Trajectory]
) -> None:
    """Blocks are flattened by name in the stored order; the frozen embedding and head are compared by name too."""
    assert [name for name, _ in Reordered().named_parameters()] != [name for name, _ in Tower().named_parameters()]
    for first, second in ((Tower, Reordered), (Reordered, Tower)):
        folder = tmp_path / first.__name__
        trajectory = wander(first(), by_layer(first()), name=f"{first.__name__}-walk")
        svd_basis(trajectory, rank=2, dtype=torch.float64).save_pretrained(folder / "basis")
        subspace = SubspaceModel(first(), Basis.from_pretrained(folder / "basis"), init_std=0.3)
        subspace.save_pretrained(folder / "adapter")
        expected = subspace(tokens)
        expected.sum().backward()
        other = SubspaceModel.from_pretrained(second(), folder / "adapter")
        torch.testing.assert_close(other(tokens), expected, rtol=0, atol=1e-14)
        other(tokens).sum().backward()
        for ours, theirs in zip(other.z, subspace.z, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-13)
        merged = dict(other.merge().named_parameters())
        for name, value in subspace.merge().named_parameters():
            assert torch.equal(merged[name], value)


def renamed(model: Tower) -> Tower:
    """As another version of a library may build it."""
    for layer in model.layers:
        layer.normalization = layer._modules.pop("norm")
    return model


def test_the_first_difference_is_named_with_what_to_do(tmp_path: Path, wander: Callable[..., Trajectory]) -> None:
    svd_basis(wander(Tower(), by_layer(Tower())), rank=2).save_pretrained(tmp_path / "basis")
    SubspaceModel(Tower(), Basis.from_pretrained(tmp_path / "basis"), modules_to_save=["head"]).save_pretrained(
        tmp_path / "adapter"
    )
    OpenedAdapter(tmp_path / "adapter").bind(Tower())
    check_model(Tower(), Basis.from_pretrained(tmp_path / "basis"))

    def refused(model: nn.Module, message: str) -> None:
        for check in (
            lambda: check_model(model, Basis.from_pretrained(tmp_path / "basis")),
            lambda: SubspaceModel(model, Basis.from_pretrained(tmp_path / "basis")),
            lambda: OpenedAdapter(tmp_path / "adapter").bind(model),
            lambda: SubspaceModel.from_pretrained(model, tmp_path / "adapter"),
        ):
            with pytest.raises(MismatchError, match=message):
                check()

    absent = r"(basis|adapter)'? was made for another model: the model has no parameter 'layers\.0\.norm\.weight'"
    nearest = r".*the nearest is 'layers\.0\.normalization\.weight'; load the base model"
    refused(renamed(Tower()), absent + nearest)
    refused(
        Tower().float(), r"'layers\.0\.inner\.weight': expected shape \[8, 4\] and torch\.float64, the model has .*32"
    )
    changed = Tower()
    with torch.no_grad():
        changed.layers[1].norm.bias[2] += 1e-9
    refused(changed, r"another theta_0: the model differs in block 'layers\.1' .* load the base model")
    for folder in (tmp_path / "basis", tmp_path / "adapter"):
        manifest = read_json(folder / "manifest.json")
        manifest["versions"]["transformers"] = "4.0.0"
        write_json(folder / "manifest.json", manifest)
    refused(renamed(Tower()), absent + ".* written with transformers 4.0.0, this is .*, which may have renamed it")


def test_what_an_adapter_carries_must_fit_in_shape_and_dtype(tmp_path: Path, tower: Tower, tokens: Tensor) -> None:
    basis = double(random_basis(by_layer(tower), 2))
    basis.save_pretrained(tmp_path / "basis")
    SubspaceModel(tower, basis, modules_to_save=["head"]).save_pretrained(tmp_path / "a")
    for head, message in (
        (
            nn.Linear(4, 2),
            r"'head\.weight'|'head\.bias' has shape \[2\] and torch\.float64, the model has \[2\] and .*float32",
        ),
        (nn.Linear(4, 3).double(), "another task"),
        (nn.Linear(4, 2, bias=False).double(), r"'head\.bias' .* the model has none of this name"),
    ):
        other = Tower()
        other.head = head
        with pytest.raises(MismatchError, match=message):
            OpenedAdapter(tmp_path / "a").bind(other)
        with pytest.raises(MismatchError, match=message):
            SubspaceModel.from_pretrained(other, tmp_path / "a")


def test_another_basis_in_the_place_of_the_adapters_is_refused(tmp_path: Path, tower: Tower) -> None:
    double(random_basis(by_layer(tower), 2)).save_pretrained(tmp_path / "basis")
    SubspaceModel(tower, Basis.from_pretrained(tmp_path / "basis")).save_pretrained(tmp_path / "a")
    assert OpenedAdapter(tmp_path / "a").stored_basis is not None
    double(random_basis(by_layer(tower), 2, seed=1)).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="was trained in the basis"):
        OpenedAdapter(tmp_path / "a", tmp_path / "other").basis()
    shutil.rmtree(tmp_path / "basis")
    (tmp_path / "other").rename(tmp_path / "basis")
    with pytest.raises(MismatchError, match=r"was trained in the basis .* pass the basis that it was tuned in"):
        _ = OpenedAdapter(tmp_path / "a").stored_basis
    shutil.rmtree(tmp_path / "basis")
    with pytest.raises(InputError, match=r"not at .*pass its location as basis="):
        _ = OpenedAdapter(tmp_path / "a").stored_basis


@pytest.mark.parametrize("sick", [torch.nan, torch.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_nan_in_z_is_refused_before_the_weights_take_it(tokens: Tensor, sick: float, scaled: bool) -> None:
    model = Tower()
    layers = by_layer(model) if scaled else None
    basis = double(random_basis(whole_model(model) if scaled else by_layer(model), 3))
    subspace = SubspaceModel(model, basis, init_std=0.1, layer_scales=layers)
    before = subspace(tokens)
    healthy = {name: value.detach().clone() for name, value in model.named_parameters()}
    place, name = (subspace.scales, "scales") if scaled else (subspace.z[1], "layers.1")
    assert place is not None
    good = place.detach().clone()
    with torch.no_grad():
        place[-1] = sick
    for use in (lambda: subspace(tokens), subspace.refresh, subspace.merge, subspace.state_dict):
        with pytest.raises(TinyspanError, match=f"z of block '{name}' is NaN or infinite.*Lower the learning rate"):
            use()
    for key, value in model.named_parameters():
        assert torch.equal(value, healthy[key])
    with torch.no_grad():
        place.copy_(good)
    assert torch.equal(subspace(tokens), before)


def test_a_model_without_numbers_is_refused_by_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Tower()
    partition = by_layer(model)
    assert partition == by_layer(Tower())
    basis = random_basis(partition, 2)
    with pytest.raises(InputError, match=r"'embedding\.weight' is on the meta device .* load all weights first"):
        SubspaceModel(model, basis)
    with pytest.raises(InputError, match=r"'layers\.0\.inner\.weight' is on the meta device"):
        TrajectoryRecorder(model, partition, tmp_path / "t")
    half = Tower()
    half.head.to("meta")  # offloaded, and to be trained beside
    with pytest.raises(InputError, match=r"'head\.weight' is on the meta device"):
        SubspaceModel(half, basis, modules_to_save=["head"])
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_model_is_refused_by_name(dtype: torch.dtype) -> None:
    model = Tower()
    model.layers[0].inner.weight = nn.Parameter(torch.zeros(8, 4).to(dtype), requires_grad=False)
    partition = Partition.from_json(
        [{"name": "a", "parameters": [["layers.0.inner.weight", [8, 4], "float8_e4m3fn"]]}]
    ) if dtype.is_floating_point else by_layer(Tower())  # fmt: skip
    with pytest.raises(InputError, match=rf"'layers\.0\.inner\.weight'.*{str(dtype)[6:]}.* load "):
        SubspaceModel(model, random_basis(partition, 2))


def test_a_parameter_that_two_layers_share_moves_once(tokens: Tensor) -> None:
    """It lies in the block of the first; its gradient is the sum over both uses."""
    model = Tower()
    model.layers[1].inner = model.layers[0].inner
    plain, partition = copy.deepcopy(model), by_layer(model)
    assert "layers.1.inner.weight" not in {spec.name for spec in partition.parameters()}
    subspace = SubspaceModel(model, double(random_basis(partition, 3)), init_std=0.1)
    weights = partition.select(plain)
    with torch.no_grad():
        for name, change in subspace.delta().items():
            weights[name] += change
    found, expected = subspace(tokens), plain(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.square().mean().backward()
    expected.square().mean().backward()
    for block, z in zip(partition, subspace.z, strict=True):
        g = block.flatten({name: weight.grad for name, weight in weights.items()})
        torch.testing.assert_close(z.grad[0], subspace.basis.maps[block.name].rmatvec(g), rtol=0, atol=1e-12)
    assert torch.equal(subspace.merge()(tokens), found)


def test_a_sick_base_model_is_refused_by_name() -> None:
    model = Tower()
    with torch.no_grad():
        model.layers[1].outer.bias[0] = torch.inf
    with pytest.raises(InputError, match=r"'layers\.1\.outer\.bias' is NaN or infinite before any training"):
        SubspaceModel(model, random_basis(by_layer(model), 2))


def test_a_block_without_directions_stays_at_theta_0(tmp_path: Path, tower: Tower, tokens: Tensor) -> None:
    recorder = TrajectoryRecorder(tower, by_layer(tower), tmp_path / "t")
    for step in range(3):
        with torch.no_grad():
            tower.layers[0].inner.weight[0, step] += 1.0
        recorder.record(step)
    with pytest.warns(UserWarning, match=r"'layers\.1' does not move"):
        svd_basis(recorder.trajectory(), rank=2, dtype=torch.float64, folder=tmp_path / "basis")
    subspace = SubspaceModel(Tower(), Basis.from_pretrained(tmp_path / "basis"), modules_to_save=["head"])
    optimizer = torch.optim.SGD(subspace.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        subspace(tokens).square().sum().backward()
        optimizer.step()
    subspace.save_pretrained(tmp_path / "a")
    assert len(subspace.z) == 1
    loaded = SubspaceModel.from_pretrained(Tower(), tmp_path / "a")
    assert torch.equal(loaded(tokens), subspace(tokens))
    merged, start = loaded.merge(), Tower()
    assert torch.equal(merged.layers[1].inner.weight, start.layers[1].inner.weight)
    assert not torch.equal(merged.layers[0].inner.weight, start.layers[0].inner.weight)


def test_a_flipped_bit_in_an_adapter_is_noticed_before_the_model_is_touched(tmp_path: Path, tower: Tower) -> None:
    SubspaceModel(Tower(), empty_basis(by_layer(tower)), modules_to_save=["head"]).save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    for check in (
        lambda: OpenedAdapter(tmp_path / "a").bind(tower),
        lambda: SubspaceModel.from_pretrained(tower, tmp_path / "a"),
    ):
        with pytest.raises(StorageError, match=r"adapter\.safetensors is damaged"):
            check()
    SubspaceModel(tower, empty_basis(by_layer(tower)))  # nothing follows it yet


def test_a_frozen_z_gets_no_gradient() -> None:
    model = Tower()
    subspace = SubspaceModel(model, random_basis(by_layer(model), 2), modules_to_save=["head"])
    subspace.z.requires_grad_(False)
    subspace(torch.arange(10).reshape(2, 5)).sum().backward()
    assert all(z.grad is None for z in subspace.z)
    assert model.head.weight.grad is not None


def test_a_method_of_the_users_own_is_not_taken_for_that_of_shards() -> None:
    class Own(Tower):
        def reshard(self) -> None:
            raise AssertionError("called")

    model = Own()
    subspace = SubspaceModel(model, random_basis(by_layer(model), 2), init_std=1)
    assert not torch.equal(subspace(torch.arange(10).reshape(2, 5)), Tower()(torch.arange(10).reshape(2, 5)))


def test_an_error_while_weights_are_written_leaves_no_mixture(
    tower: Tower, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    expected = subspace(tokens)
    before = parameters_to_vector(subspace.z).detach().clone()

    def fails(*arguments: Any) -> Any:
        raise MemoryError

    vector_to_parameters(before + 1.0, subspace.z)
    with monkeypatch.context() as patch:
        patch.setattr(subspace.engine.moving[1], "write", fails)
        with pytest.raises(MemoryError):
            subspace(tokens)
    vector_to_parameters(before, subspace.z)
    assert torch.equal(subspace(tokens), expected)


def test_a_copy_after_autocast_training_computes_with_its_own_z(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first Accelerator
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(subspace)
    AcceleratorState._reset_state(reset_partial_state=True)
    other = copy.deepcopy(prepared)
    with torch.no_grad():
        for z in other.z:
            z.zero_()
    torch.testing.assert_close(other(tokens), Tower()(tokens))
    other(tokens).sum().backward()
    assert all(z.grad is not None for z in other.z)
    assert all(z.grad is None for z in subspace.z)
    unwrapped = extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(unwrapped(tokens), tower(tokens))


def test_z_that_was_replaced_is_refused_where_the_weights_would_be_others(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    subspace.z[0] = nn.Parameter(subspace.z[0].detach() + 1.0)
    for use in (subspace.merge, subspace.refresh):
        with pytest.raises(InputError, match="z or the scales were replaced by other tensors"):
            use()


def test_theta_0_is_given_out_as_a_copy(tower: Tower, tokens: Tensor) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    for value in subspace.base_weights().values():
        value += 1.0
    vector_to_parameters(torch.zeros_like(parameters_to_vector(subspace.z)), subspace.z)
    torch.testing.assert_close(subspace(tokens), Tower()(tokens))


def test_z_gets_gradients_after_a_move_that_failed(
    tower: Tower, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), init_std=0.1)
    subspace(tokens)

    def fails(*arguments: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "_apply", fails)
        with pytest.raises(MemoryError):
            subspace.to(torch.float64)
    torch.testing.assert_close(*gradient_at(subspace, tokens))


def test_the_state_is_outside_of_the_graph(tower: Tower) -> None:
    state = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)), modules_to_save=["head"]).get_state()
    assert not any(value.requires_grad for value in (*state.z.values(), *state.directly_trained.values()))


def test_a_model_with_a_new_parameter_can_be_merged(tower: Tower) -> None:
    subspace = SubspaceModel(tower, double(random_basis(by_layer(tower), 3)))
    tower.extra = nn.Linear(1, 1)
    assert subspace.merge().extra.weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_wrapper_is_in_the_mode_of_its_model(tower: Tower, training: bool) -> None:
    assert SubspaceModel(tower.train(training), double(random_basis(by_layer(tower), 3))).training is training


def test_parameters_that_are_trained_and_not_saved_are_told(tower: Tower, tmp_path: Path) -> None:
    basis = double(random_basis(by_layer(tower), 3))
    subspace = SubspaceModel(tower, basis, modules_to_save=["head"])
    subspace.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'embedding.weight' requires gradients and is not part of the adapter"):
        subspace.save_pretrained(tmp_path / "a", self_contained=True)

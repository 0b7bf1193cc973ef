"""Gradients of a few weights alone, against those that autograd computes of all."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from towers import Tower
from transformers.pytorch_utils import Conv1D

from tinyspan import Basis, DenseMap, Partition, SubspaceModel, by_layer, by_pattern, random_basis
from tinyspan.sampled import PIECE, SampledProduct, is_plain_linear, pays

DOUBLE = {"rtol": 1e-11, "atol": 1e-12}  # sums of a thousand products in another order, in float64


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample however small the weights are."""
    monkeypatch.setattr("tinyspan.subspace.pays", lambda *arguments: True)


@pytest.fixture
def tokens() -> Tensor:
    return torch.arange(12).view(3, 4) % 11


def drawn(partition: Partition, dense: bool = False) -> Basis:
    """Sparse directions on a fifth of the coordinates; the same in a dense format, whose gradients are whole."""
    basis = random_basis(partition, 3, density=0.2, dtype=torch.float64)
    if not dense:
        return basis
    return Basis(partition, {name: DenseMap(basis.maps[name].dense(torch.float64)) for name in basis.maps})  # type: ignore[attr-defined]


def both(make: Callable[[], nn.Module], pattern: str = ".*", saved: tuple[str, ...] = ()) -> list[SubspaceModel]:
    """The same model in the sparse basis and in the dense one."""
    models = []
    for dense in (False, True):
        model = make()
        basis = drawn(by_pattern(model, {"all": pattern}), dense)
        models.append(SubspaceModel(model, basis, start_std=0.3, modules_to_save=saved))
    return models


def whole_gradients(subspace: SubspaceModel) -> list[int]:
    """Return a list that tells of every gradient of a whole matrix that is computed from now on."""
    seen: list[int] = []
    for weight in subspace.model.parameters():
        if weight.ndim == 2 and weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.numel()))
    return seen


def assert_same_gradients(sparse: SubspaceModel, dense: SubspaceModel) -> None:
    for mine, expected in zip(sparse.z, dense.z, strict=True):
        assert mine.grad is not None
        assert mine.grad.any()
        torch.testing.assert_close(mine.grad, expected.grad, **DOUBLE)
    for (name, mine), expected in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        assert (mine.grad is None) == (expected.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, expected.grad, **DOUBLE)


@given(
    rows=st.sampled_from([0, 1, 3, PIECE, PIECE + 1, 2 * PIECE + 5]),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_some_numbers_of_a_product_are_those_of_the_whole(rows: int, shape: tuple[int, int], data: Any) -> None:
    wanted = data.draw(st.sets(st.integers(0, shape[0] * shape[1] - 1), min_size=1))
    support = torch.tensor(sorted(wanted))
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for columns in shape)
    torch.testing.assert_close(SampledProduct(support, shape)(a, b), (a.T @ b).reshape(-1)[support], **DOUBLE)


def test_it_pays_for_few_of_many() -> None:
    large = torch.empty(1536, 384, device="meta")
    assert pays(large.numel() // 100, large)
    assert not pays(large.numel() // 4, large)
    assert not pays(2, torch.empty(64, 64, device="meta"))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_a_layers_gradients(transposed: bool, leading: tuple[int, ...], grow: bool) -> None:
    """Of z and of its inputs, which may be rows of any shape; a Conv1D takes no single one."""
    torch.manual_seed(0)
    made = (Conv1D(4, 6) if transposed else nn.Linear(6, 4)).double()
    leading = leading or (() if not transposed else (1,))
    sparse, dense = both(lambda: copy.deepcopy(made))
    seen, found = whole_gradients(sparse), []
    for subspace in (sparse, dense):
        x = torch.randn(*leading, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(
            grow
        )
        y = subspace(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    torch.testing.assert_close(*found, **DOUBLE)
    for mine, expected in zip(sparse.z, dense.z, strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, **DOUBLE)
    assert not seen


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ensemble", [1, 3])
def test_a_model_trains_as_with_whole_gradients(tokens: Tensor, ensemble: int) -> None:
    """Gradients accumulate, and three steps of AdamW end where those of the dense map do."""
    ends = []
    for dense in (False, True):
        basis = drawn(by_layer(Tower()), dense)
        subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], ensemble=ensemble, start_std=0.3)
        seen = whole_gradients(subspace)
        optimizer = torch.optim.AdamW(subspace.parameters(), lr=0.1)
        for _ in range(3):
            for rows in tokens:
                subspace(rows[None]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert set(seen) == ({2 * 4} if not dense else {2 * 4, 8 * 4})  # the head's; the layers'
        ends.append([parameter.detach().clone() for parameter in subspace.parameters()])
    for mine, expected in zip(*ends, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10)  # a quotient of moments, three times


class Odd(nn.Module):
    """Uses one layer twice, another one's weight without the layer, and a third one's in two places."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.twice, self.bare, self.tied = (nn.Linear(4, 4) for _ in range(3))
            self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.tied.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.bare(x) + x @ self.bare.weight + self.bare(input=x)
        out: Tensor = self.other(torch.relu_(self.tied(x)))
        return out


@pytest.mark.usefixtures("always")
def test_whatever_else_uses_a_weight_is_counted() -> None:
    sparse, dense = both(Odd)
    for subspace in (sparse, dense):
        subspace(torch.eye(4, dtype=torch.float64)[:3]).square().sum().backward()
    assert_same_gradients(sparse, dense)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("hook", ["output", "inputs"])
def test_hooks_of_others_that_change_what_a_layer_does(hook: str) -> None:
    """Those from before the model was wrapped, and those from after."""

    def make(when: str) -> list[SubspaceModel]:
        def hooked(layer: nn.Linear) -> None:
            if hook == "output":
                layer.register_forward_hook(lambda layer, inputs, y: 3 * y, prepend=when == "after")
            else:
                layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0] ** 2,), prepend=when == "after")

        def model() -> Odd:
            odd = Odd()
            if when == "before":
                hooked(odd.twice)
            return odd

        pair = both(model)
        for subspace in pair if when == "after" else ():
            hooked(subspace.model.twice)  # type: ignore[arg-type]
        return pair

    for when in ("before", "after"):
        pair = make(when)
        for subspace in pair:
            subspace(torch.eye(4, dtype=torch.float64)[:3]).square().sum().backward()
        assert_same_gradients(*pair)


@pytest.mark.usefixtures("always")
def test_a_layer_whose_forward_was_replaced_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def replaced() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
        plain = model[1].forward
        model[1].forward = lambda x: 3 * plain(x)
        return model.double()

    assert not any(is_plain_linear(layer) for layer in replaced().modules())
    sparse, dense = both(replaced)
    for subspace in (sparse, dense):
        subspace(torch.eye(4, dtype=torch.float64)).square().sum().backward()
    assert_same_gradients(sparse, dense)


@pytest.mark.usefixtures("always")
def test_gradients_of_something_else_alone_leave_z_alone() -> None:
    sparse, _ = both(Odd)
    x = torch.eye(4, dtype=torch.float64)[:3].requires_grad_()
    loss = sparse(x).square().sum()
    (found,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert found.any()
    assert sparse.z[0].grad is None
    loss.backward()
    assert sparse.z[0].grad is not None


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool) -> None:
    class Checkpointed(Odd):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(super().forward, x, use_reentrant=reentrant)  # type: ignore[assignment]
            return out

    pair = both(Checkpointed)
    for subspace in pair:
        seen = whole_gradients(subspace)
        x = torch.eye(4, dtype=torch.float64)[:3].requires_grad_()
        subspace(x).square().sum().backward()
        assert len(seen) == (1 if subspace is pair[0] else 3)  # of the weight that is used without its layer
    assert_same_gradients(*pair)


@pytest.mark.usefixtures("always")
def test_functional_calls_and_compiled_models_see_plain_layers(tokens: Tensor) -> None:
    sparse = SubspaceModel(Tower(), drawn(by_layer(Tower())), start_std=0.3)
    dense = SubspaceModel(Tower(), drawn(by_layer(Tower()), dense=True), start_std=0.3)
    sparse.refresh()
    weights = {name: value.detach() for name, value in sparse.model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(sparse.model, weights, (tokens,)).square().sum()
        return found

    found = torch.func.grad(loss)(weights)
    dense(tokens).square().sum().backward()
    for block, expected in zip(dense.blocks, dense.z, strict=True):
        projected = sparse.basis.maps[block.name].project(block.flatten(found))
        torch.testing.assert_close(projected[None], expected.grad, **DOUBLE)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss(leaves).backward()
    torch.testing.assert_close({name: leaf.grad for name, leaf in leaves.items()}, found, **DOUBLE)
    assert all(z.grad is None for z in sparse.z)

    torch.compile(sparse.model, backend="aot_eager")(tokens).square().sum().backward()
    for mine, expected in zip(sparse.z, dense.z, strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, **DOUBLE)


@pytest.mark.usefixtures("always")
def test_tangents_pass() -> None:
    found = []
    for subspace in both(Odd):
        with torch.autograd.forward_ad.dual_level():
            x = torch.eye(4, dtype=torch.float64)
            y = subspace(torch.autograd.forward_ad.make_dual(x, 2 * x + 1))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*found, **DOUBLE)


@pytest.mark.usefixtures("always")
def test_after_a_forward_pass_that_failed_all_is_as_before() -> None:
    sparse, dense = both(Odd)
    for subspace in (sparse, dense):
        before = [weight.requires_grad for weight in subspace.model.parameters()]
        with pytest.raises(RuntimeError, match="shapes"):
            subspace(torch.ones(3, 5, dtype=torch.float64))
        assert [weight.requires_grad for weight in subspace.model.parameters()] == before
        subspace(torch.eye(4, dtype=torch.float64)).square().sum().backward()
    assert_same_gradients(sparse, dense)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_wrapped_model_is_a_plain_one(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    sparse, _ = both(Odd)
    sparse.refresh()
    plain = duplicate(sparse.model)
    plain(torch.eye(4, dtype=torch.float64)).square().sum().backward()
    for weight in plain.parameters():
        assert (weight.grad is not None) == weight.requires_grad
    assert sparse.z[0].grad is None


@pytest.mark.usefixtures("always")
def test_a_merged_model_has_no_hooks() -> None:
    sparse, _ = both(Odd)
    assert any(layer._forward_hooks for layer in sparse.model.modules())
    merged = sparse.merge()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in merged.modules())
    sparse.unmerge()
    sparse(torch.eye(4, dtype=torch.float64)).sum().backward()
    assert sparse.z[0].grad is not None


@pytest.mark.parametrize("inside", [False, True])
def test_in_half_precision_sums_are_no_less_exact(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, and with the backward pass inside it as well: compared with float64."""
    errors = []
    for sampled in (True, False):
        monkeypatch.setattr("tinyspan.subspace.pays", lambda *arguments, sampled=sampled: sampled)
        found = []
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            layer = nn.Linear(64, 64, bias=False).to(dtype)
            partition = by_pattern(layer, {"all": ".*"})
            subspace = SubspaceModel(layer, random_basis(partition, 3, density=0.05, dtype=torch.float32))
            x = torch.randn(700, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
            enabled = dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = subspace(x).float().square().sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            found.append(subspace.z[0].grad)
        assert found[0] is not None
        assert found[0].dtype == torch.float32
        errors.append((found[0] - found[1]).norm() / found[1].norm())
    assert errors[0] < 0.01  # bfloat16 holds eight bits
    assert errors[0] < 1.5 * errors[1]


def test_large_weights_are_sampled_by_themselves(tokens: Tensor) -> None:
    subspace = SubspaceModel(Tower(1, 256), random_basis(by_layer(Tower(1, 256)), 3, density=0.01, dtype=torch.float64))
    seen = whole_gradients(subspace)
    subspace(tokens).sum().backward()
    assert not seen

"""Gradients of a few weights alone, against those that autograd computes of all."""

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from towers import Tower
from transformers.pytorch_utils import Conv1D

from tinyspan import Basis, DenseMap, InputError, Partition, SubspaceModel, by_layer, by_pattern, random_basis
from tinyspan.model import autograd
from tinyspan.model.sampled import PIECE, SampledProduct, is_plain_linear, pays

DOUBLE = {"rtol": 1e-11, "atol": 1e-12}  # sums of a thousand products in another order, in float64


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample however small the weights are."""
    monkeypatch.setattr("tinyspan.model.engine.pays", lambda *arguments: True)


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
        models.append(SubspaceModel(model, basis, init_std=0.3, modules_to_save=saved))
    return models


LISTENING: list[list[int]] = []  # to the gradients of whole matrices


@pytest.fixture(autouse=True)
def _listen(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(gradient: Tensor, plain: Callable[[Tensor], Tensor] = autograd.flat) -> Tensor:
        for seen in LISTENING:
            if gradient.ndim == 2:
                seen.append(gradient.numel())
        return plain(gradient)

    LISTENING.clear()
    monkeypatch.setattr(autograd, "flat", flat)


def whole_gradients(subspace: SubspaceModel) -> list[int]:
    """Return a list that tells of every gradient of a whole matrix that is computed from now on."""
    seen: list[int] = []
    LISTENING.append(seen)
    for weight in subspace.parameters():
        if weight.ndim == 2 and weight.requires_grad and not any(weight is z for z in subspace.z):
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


def saved(model: nn.Module) -> nn.Module:
    """What torch.save makes of a whole model."""
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    found: nn.Module = torch.load(memory, weights_only=False)
    return found


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
    large = torch.empty(1536, 384)
    assert pays(large.numel() // 100, large)
    assert not pays(large.numel() // 4, large)
    assert not pays(large.numel() // 100, large.to("meta"))
    assert not pays(2, torch.empty(64, 64))


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
        assert not seen or subspace is dense
    torch.testing.assert_close(*found, **DOUBLE)
    for mine, expected in zip(sparse.z, dense.z, strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, **DOUBLE)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ensemble", [1, 3])
def test_a_model_trains_as_with_whole_gradients(tokens: Tensor, ensemble: int) -> None:
    """Gradients accumulate, and three steps of AdamW end where those of the dense map do."""
    ends = []
    for dense in (False, True):
        basis = drawn(by_layer(Tower()), dense)
        subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], ensemble=ensemble, init_std=0.3)
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


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def of_z(subspace: SubspaceModel, loss: Tensor) -> Tensor:
    loss.backward()
    assert subspace.z[0].grad is not None
    assert not subspace.z[0].grad.requires_grad
    return subspace.z[0].grad


def with_module_hook(subspace: SubspaceModel, hook: Callable[..., Any], everywhere: bool = False) -> Tensor:
    """The outputs after a hook on the outputs of one layer, or of all modules that there are."""
    register = register_module_forward_hook if everywhere else subspace.model.twice.register_forward_hook  # type: ignore[union-attr, operator]
    handle = register(lambda layer, inputs, y: hook(layer, inputs, y) if isinstance(layer, nn.Linear) else None)
    try:
        return subspace(X)
    finally:
        handle.remove()


def changed_outputs(subspace: SubspaceModel) -> Tensor:
    return of_z(subspace, with_module_hook(subspace, lambda layer, inputs, y: 3 * y).square().sum())


def outputs_changed_everywhere(subspace: SubspaceModel) -> Tensor:
    return of_z(subspace, with_module_hook(subspace, lambda layer, inputs, y: 3 * y, everywhere=True).square().sum())


def kept_outputs(subspace: SubspaceModel) -> Tensor:
    kept: list[Tensor] = []
    with_module_hook(subspace, lambda layer, inputs, y: kept.append(y), everywhere=True)
    return of_z(subspace, sum((y.square().sum() for y in kept), torch.zeros(())))


def changed_inputs(subspace: SubspaceModel) -> Tensor:
    subspace.model.twice.register_forward_pre_hook(lambda layer, inputs: (inputs[0] ** 2,))  # type: ignore[union-attr, operator]
    return of_z(subspace, subspace(X).square().sum())


def a_penalty_in_a_hook(subspace: SubspaceModel) -> Tensor:
    penalties: list[Tensor] = []
    subspace.model.twice.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda layer, inputs: penalties.append(layer.weight.square().sum())
    )
    return of_z(subspace, subspace(X).square().sum() + sum(penalties))


def forward_replaced(subspace: SubspaceModel) -> Tensor:
    layer: Any = subspace.model.twice
    plain = layer.forward
    layer.forward = lambda x: 3 * plain(x)
    return of_z(subspace, subspace(X).square().sum())


def a_hook_on_the_weight(subspace: SubspaceModel) -> Tensor:
    subspace.model.twice.weight.register_hook(lambda gradient: 0 * gradient)  # type: ignore[union-attr, operator]
    return of_z(subspace, subspace(X).square().sum())


def a_penalty_on_gradients(subspace: SubspaceModel) -> Tensor:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(subspace(x).square().sum(), x, create_graph=True)
    return of_z(subspace, gradient.square().sum())


def twice_backward(subspace: SubspaceModel) -> Tensor:
    loss = subspace(X).square().sum()
    loss.backward(retain_graph=True)
    return of_z(subspace, loss)


def a_gradient_left_from_before(subspace: SubspaceModel) -> Tensor:
    for weight in subspace.merge().parameters():
        weight.requires_grad_(True)
    subspace.model(X).sum().backward()
    subspace.unmerge()
    return of_z(subspace, subspace(X).square().sum())


def batched_gradients(subspace: SubspaceModel) -> Tensor:
    x = X.clone().requires_grad_()
    y = subspace(x)
    seeds = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    return torch.autograd.grad(y, x, seeds, is_grads_batched=True)[0]


def gradients_in_a_vmap(subspace: SubspaceModel) -> Tensor:
    x = X.clone().requires_grad_()
    y = subspace(x)
    seeds = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    return torch.vmap(lambda seed: torch.autograd.grad(y, x, seed, retain_graph=True)[0])(seeds)


def a_bias_made_of_others(subspace: SubspaceModel) -> Tensor:
    layer: Any = subspace.model.twice
    bias = layer.bias.detach()
    del layer.bias
    layer.bias = 2 * bias
    return of_z(subspace, subspace(X).square().sum())


def scripted(subspace: SubspaceModel) -> Tensor:
    subspace.refresh()
    found: Tensor = torch.jit.script(subspace.model.twice)(X)
    return found


def a_vectorized_jacobian(subspace: SubspaceModel) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(subspace, X, vectorize=True)
    return found


def forward_over_reverse(subspace: SubspaceModel) -> Tensor:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone().requires_grad_(), torch.ones_like(X))
        (gradient,) = torch.autograd.grad(subspace(x).square().sum(), x)
        return forward_ad.unpack_dual(gradient).tangent


def tangents(subspace: SubspaceModel) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(subspace(forward_ad.make_dual(X, 2 * X + 1))).tangent


def functional_gradient(subspace: SubspaceModel) -> Tensor:
    subspace.refresh()
    found: Tensor = torch.func.grad(lambda x: subspace(x).square().sum())(X)
    return found


def traced(subspace: SubspaceModel) -> Tensor:
    subspace.refresh()
    found = torch.jit.trace(subspace.model, X)
    assert "PythonOp" not in str(found.inlined_graph)
    return found(2 * X)


def nested_inputs(subspace: SubspaceModel) -> Tensor:
    x = torch.nested.nested_tensor([X[:1], X[1:]], layout=torch.jagged)
    return of_z(subspace, sum((y.square().sum() for y in subspace(x).unbind()), torch.zeros(())))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "way",
    [
        changed_outputs,
        outputs_changed_everywhere,
        kept_outputs,
        changed_inputs,
        a_penalty_in_a_hook,
        forward_replaced,
        a_hook_on_the_weight,
        a_penalty_on_gradients,
        twice_backward,
        a_gradient_left_from_before,
        batched_gradients,
        gradients_in_a_vmap,
        a_bias_made_of_others,
        scripted,
        a_vectorized_jacobian,
        forward_over_reverse,
        tangents,
        functional_gradient,
        traced,
        nested_inputs,
    ],
    ids=lambda way: way.__name__,
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
def test_whatever_is_done_with_the_model(way: Callable[[SubspaceModel], Tensor]) -> None:
    pattern = ".*weight" if way is a_bias_made_of_others else ".*"
    sparse, dense = both(Odd if way is not nested_inputs else lambda: Odd().tied, pattern)
    torch.testing.assert_close(way(sparse), way(dense), **DOUBLE)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("way", [batched_gradients, a_vectorized_jacobian, gradients_in_a_vmap, a_penalty_on_gradients])
def test_the_same_with_transposed_weights(way: Callable[[SubspaceModel], Tensor]) -> None:
    torch.manual_seed(0)
    made = Conv1D(5, 4).double()
    sparse, dense = both(lambda: copy.deepcopy(made))
    torch.testing.assert_close(way(sparse), way(dense), **DOUBLE)


@pytest.mark.usefixtures("always")
def test_what_was_computed_before_a_merge_cannot_be_differentiated_after() -> None:
    for subspace in both(Odd):
        loss = subspace(X).square().sum()
        subspace.merge()
        with pytest.raises(RuntimeError, match="detached in-place"):
            loss.backward()
        assert subspace.z[0].grad is None


def test_a_weight_that_follows_z_cannot_be_frozen_by_hand() -> None:
    for subspace in both(Odd):
        with pytest.raises(RuntimeError, match="requires_grad flags of leaf variables"):
            subspace.model.twice.weight.requires_grad_(False)  # type: ignore[union-attr, operator]


def test_hooks_that_would_never_be_called_are_refused() -> None:
    model = Odd()
    model.twice.weight.register_post_accumulate_grad_hook(lambda weight: None)
    basis = drawn(by_pattern(model, {"all": ".*"}))
    with pytest.raises(InputError, match=r"'twice\.weight' has a post-accumulate-gradient hook"):
        SubspaceModel(model, basis)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_hook_on_a_weight_stays_when_z_changes_and_can_be_removed() -> None:
    for subspace in both(Odd):
        weight: Any = subspace.model.twice.weight  # type: ignore[union-attr]
        seen: list[Tensor] = []
        handle = weight.register_hook(seen.append)
        for count in (1, 2):
            with torch.no_grad():
                subspace.z[0] += 0.1
            subspace(X).square().sum().backward()
            assert len(seen) == count
        subspace.to(torch.float64)(X).square().sum().backward()  # after a move the graph is built anew
        assert len(seen) == 3
        handle.remove()
        with torch.no_grad():
            subspace.z[0] += 0.1
        subspace(X).square().sum().backward()
        assert len(seen) == 3


@pytest.mark.usefixtures("always")
def test_without_gradients_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, _ = both(Odd)
    monkeypatch.setattr("tinyspan.model.sampled._Sampled.apply", lambda *arguments: pytest.fail("prepared"))
    with torch.no_grad():
        assert not sparse(X).requires_grad
    with pytest.raises(pytest.fail.Exception):
        sparse(X)


@pytest.mark.usefixtures("always")
def test_threads_do_not_disturb_each_other() -> None:
    """A forward pass without gradients, as of an evaluation, while another one is trained."""
    sparse, dense = both(Odd)
    dense(X).square().sum().backward()
    done = Event()

    def evaluate() -> None:
        while not done.is_set():
            with torch.no_grad():
                sparse.model(X)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(evaluate)
        for _ in range(200):
            sparse.z[0].grad = None
            sparse(X).square().sum().backward()
            torch.testing.assert_close(sparse.z[0].grad, dense.z[0].grad, **DOUBLE)
        done.set()
        running.result()


@pytest.mark.usefixtures("always")
def test_layers_that_are_compiled_one_by_one_share_a_graph() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(10))).double()
    subspace = SubspaceModel(model, drawn(by_pattern(model, {"all": ".*"})))
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model:
        layer.compile(backend=counter)
    subspace(X).sum().backward()
    assert counter.frame_count <= 3  # the first layer's inputs need no gradients


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
    sparse = SubspaceModel(Tower(), drawn(by_layer(Tower())), init_std=0.3)
    dense = SubspaceModel(Tower(), drawn(by_layer(Tower()), dense=True), init_std=0.3)
    sparse.refresh()
    weights = {name: value.detach() for name, value in sparse.model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(sparse.model, weights, (tokens,)).square().sum()
        return found

    found = torch.func.grad(loss)(weights)
    dense(tokens).square().sum().backward()
    for block, expected in zip(dense.blocks, dense.z, strict=True):
        projected = sparse.basis.maps[block.name].rmatvec(block.flatten(found))
        torch.testing.assert_close(projected[None], expected.grad, **DOUBLE)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss(leaves).backward()
    torch.testing.assert_close({name: leaf.grad for name, leaf in leaves.items()}, found, **DOUBLE)
    assert all(z.grad is None for z in sparse.z)

    torch.compile(sparse.model, backend="aot_eager")(tokens).square().sum().backward()
    for mine, expected in zip(sparse.z, dense.z, strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, **DOUBLE)


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
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies_and_merged_models_are_plain_ones(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    sparse, _ = both(Odd)
    sparse.refresh()
    assert type(sparse.model.twice) is not nn.Linear
    again = copy.deepcopy(sparse)
    for plain in (duplicate(sparse.model), copy.deepcopy(again.merge()), again.model):
        assert [type(layer) for layer in plain.children()] == [nn.Linear] * 4
        assert not any("_sampled" in layer.__dict__ for layer in plain.children())
        plain(torch.eye(4, dtype=torch.float64)).square().sum().backward()
        for weight in plain.parameters():
            assert (weight.grad is not None) == weight.requires_grad
    assert sparse.z[0].grad is None
    again.unmerge()
    for subspace in (sparse, again):
        seen = whole_gradients(subspace)
        subspace(torch.eye(4, dtype=torch.float64)).square().sum().backward()
        assert len(seen) == 1  # of the weight that is used without its layer
    torch.testing.assert_close(again.z[0].grad, sparse.z[0].grad, **DOUBLE)


@pytest.mark.parametrize("inside", [False, True])
def test_in_half_precision_sums_are_no_less_exact(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, and with the backward pass inside it as well: compared with float64."""
    errors = []
    for sampled in (True, False):
        monkeypatch.setattr("tinyspan.model.engine.pays", lambda *arguments, sampled=sampled: sampled)
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
    assert subspace.z[0].grad is not None
    assert subspace.z[0].grad.any()
    assert not seen

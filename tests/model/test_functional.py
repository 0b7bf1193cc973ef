"""z as a function: every derivative that torch offers, against the literal dense formula in float64.

Values and gradients agree to 1e-10 (sums in another order), second derivatives to 1e-9, central differences to 1e-7.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as slow_hessian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import batch_norm, cross_entropy, mse_loss
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint
from towers import Checkpointed, Tower
from transformers import BertConfig, BertForSequenceClassification

from tinyspan import (
    Basis,
    DenseMap,
    InputError,
    KroneckerMap,
    MismatchError,
    SubspaceModel,
    by_layer,
    by_pattern,
    empty_basis,
    fastfood_basis,
    random_basis,
    whole_model,
)
from tinyspan.maps.base import LinearMap
from tinyspan.maps.dense import dense_map
from tinyspan.model.autograd import matvec, rmatvec
from tinyspan.model.curvature import empirical_fisher, gauss_newton

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CURVED = {"rtol": 1e-9, "atol": 1e-11}
TOKENS = torch.arange(12).view(3, 4) % 11
LABELS = torch.tensor([0, 1, 1])


def plain(**options: Any) -> SubspaceModel:
    return SubspaceModel(Tower(), random_basis(by_layer(Tower()), 3, dtype=torch.float64), init_std=0.3, **options)


def stored(dtype: torch.dtype) -> SubspaceModel:
    return SubspaceModel(Tower(), random_basis(by_layer(Tower()), 3, dtype=dtype), init_std=0.3)


def sparse() -> SubspaceModel:
    basis = random_basis(by_layer(Tower()), 3, density=0.3, dtype=torch.float64)
    return SubspaceModel(Tower(), basis, init_std=0.3)


def fastfood() -> SubspaceModel:
    return SubspaceModel(Tower(), fastfood_basis(whole_model(Tower()), 5), init_std=0.3)


def kronecker() -> SubspaceModel:
    partition = by_pattern(Tower(), {"inner": r"layers\.0\.inner\.weight"})
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((8, 2), (2, 4)))
    return SubspaceModel(Tower(), Basis(partition, {"inner": KroneckerMap(left, right)}), init_std=0.3)


def tied() -> SubspaceModel:
    model = Tower()
    model.layers[1].inner = model.layers[0].inner
    return SubspaceModel(model, random_basis(by_layer(model), 3, dtype=torch.float64), init_std=0.3)


def shared() -> SubspaceModel:
    model = Tower()
    model.layers[1].inner.weight = model.layers[0].inner.weight
    return SubspaceModel(model, random_basis(by_layer(model), 3, dtype=torch.float64), init_std=0.3)


def scaled() -> SubspaceModel:
    basis, layers = fastfood_basis(whole_model(Tower()), 5), by_layer(Tower())
    subspace = SubspaceModel(Tower(), basis, init_std=0.3, layer_scales=layers)
    subspace.set_state({"model": subspace.z[0].detach().clone()}, scales=torch.tensor([0.7, -1.6]))
    return subspace


KINDS: dict[str, Callable[[], SubspaceModel]] = {
    "dense": plain,
    "ensemble": lambda: plain(ensemble=2),
    "float32": lambda: stored(torch.float32),
    "bfloat16": lambda: stored(torch.bfloat16),
    "int8": lambda: stored(torch.int8),
    "sparse": sparse,
    "fastfood": fastfood,
    "kronecker": kronecker,
    "tied": tied,
    "shared weight": shared,
    "scaled": scaled,
}


@pytest.fixture(params=KINDS)
def subspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SubspaceModel:
    monkeypatch.setattr("tinyspan.model.engine.pays", lambda *arguments: True)  # sample however small the weights are
    found: SubspaceModel = KINDS[request.param]().eval()
    return found


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def vector(subspace: SubspaceModel) -> Tensor:
    return parameters_to_vector(subspace.z).detach()


def columns(v: LinearMap) -> Tensor:
    """V^T written out, [k, D]."""
    return torch.stack([v.matvec(unit) for unit in torch.eye(v.rank).double()])


def literal(subspace: SubspaceModel, z: Tensor, scales: Tensor | None = None, tokens: Tensor = TOKENS) -> Tensor:
    """theta_0 + lambda_l V mean_i z_i written out with dense directions: slow, and obviously right."""
    weights, moved, start = {}, {}, subspace.base_weights()
    layers = {spec.name: n for n, layer in enumerate(subspace.layer_scales or ()) for spec in layer.parameters}
    parts = z.split([own.numel() for own in subspace.z])
    for block, part in zip(subspace.blocks, parts, strict=True):
        change = part.view(subspace.ensemble, -1).mean(0) @ columns(subspace.basis.maps[block.name])
        moved |= block.unflatten(change)
    for name, change in moved.items():
        weights[name] = start[name] + (change if scales is None else scales[layers[name]] * change)
    out: Tensor = functional_call(copy.deepcopy(subspace.model), weights, (tokens,))
    return out


def own_scales(subspace: SubspaceModel) -> Tensor | None:
    return None if subspace.scales is None else subspace.scales.detach()


def loss_at(subspace: SubspaceModel) -> Callable[[Tensor], Tensor]:
    return lambda z: cross_entropy(subspace.forward_at(z, TOKENS), LABELS, reduction="sum")


def literal_loss(subspace: SubspaceModel) -> Callable[[Tensor], Tensor]:
    return lambda z: cross_entropy(literal(subspace, z, own_scales(subspace)), LABELS, reduction="sum")


def engine_loss(subspace: SubspaceModel) -> Tensor:
    return cross_entropy(subspace(TOKENS), LABELS, reduction="sum")


def expected_gradient(subspace: SubspaceModel) -> Tensor:
    z = vector(subspace).requires_grad_()
    return torch.autograd.grad(literal_loss(subspace)(z), z)[0]


def expected_hessian(subspace: SubspaceModel) -> Tensor:
    found: Tensor = slow_hessian(literal_loss(subspace), vector(subspace))  # type: ignore[assignment]
    return found


# -- the linear operations --


MAPS: dict[str, LinearMap] = {
    "dense": DenseMap(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()),
    "int8": dense_map(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.int8),
    "kronecker": KroneckerMap(torch.eye(4, 2).double(), torch.ones(1, 2).double()),
}


@pytest.mark.parametrize("kind", MAPS)
def test_the_two_products_are_each_others_derivative(kind: str) -> None:
    v = MAPS[kind]
    dense = columns(v)
    z, g = torch.randn(v.rank).double().requires_grad_(), torch.randn(v.size).double().requires_grad_()
    for function, x, matrix in ((matvec, z, dense.T), (rmatvec, g, dense)):
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(v, x), x, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(v, x), x)
        for transform in (jacrev, jacfwd):
            torch.testing.assert_close(transform(lambda x, f=function: f(v, x))(x.detach()), matrix, **CLOSE)
        batch = torch.randn(5, len(x)).double()
        torch.testing.assert_close(vmap(lambda x, f=function: f(v, x))(batch), batch @ matrix.T, **CLOSE)


# -- the function against the literal formula, and the engine against both --


def test_first_derivatives(subspace: SubspaceModel) -> None:
    z, expected = vector(subspace), expected_gradient(subspace)
    torch.testing.assert_close(subspace.forward_at(z, TOKENS), literal(subspace, z, own_scales(subspace)), **CLOSE)
    torch.testing.assert_close(subspace(TOKENS), subspace.forward_at(z, TOKENS), **CLOSE)
    torch.testing.assert_close(grad(loss_at(subspace))(z), expected, **CLOSE)
    torch.testing.assert_close(flat(torch.autograd.grad(engine_loss(subspace), [*subspace.z])), expected, **CLOSE)
    assert all(own.grad is None for own in subspace.z)
    engine_loss(subspace).backward(inputs=[*subspace.z])
    torch.testing.assert_close(flat(own.grad for own in subspace.z), expected, **CLOSE)
    subspace.zero_grad()
    engine_loss(subspace).backward()
    torch.testing.assert_close(flat(own.grad for own in subspace.z), expected, **CLOSE)


def test_transforms(subspace: SubspaceModel) -> None:
    z, f = vector(subspace), lambda z: subspace.forward_at(z, TOKENS)
    reference = z.clone().requires_grad_()
    expected: Any = torch.autograd.functional.jacobian(lambda z: literal(subspace, z, own_scales(subspace)), reference)
    direction = torch.ones_like(z)
    torch.testing.assert_close(jacrev(f)(z), expected, **CLOSE)
    torch.testing.assert_close(jacfwd(f)(z), expected, **CLOSE)
    torch.testing.assert_close(jvp(f, (z,), (direction,))[1], expected @ direction, **CLOSE)
    outputs, pull = vjp(f, z)
    torch.testing.assert_close(pull(torch.ones_like(outputs))[0], expected.sum((0, 1)), **CLOSE)
    many = torch.stack([z, 2 * z])
    by_hand = torch.stack([f(one) for one in many])
    torch.testing.assert_close(vmap(f)(many), by_hand, **CLOSE)
    rows = vmap(lambda tokens: jacrev(lambda z: subspace.forward_at(z, tokens[None])[0])(z))(TOKENS)
    torch.testing.assert_close(rows, expected, **CLOSE)


def test_second_derivatives(subspace: SubspaceModel) -> None:
    z, expected = vector(subspace), expected_hessian(subspace)
    f = loss_at(subspace)
    for nested in (hessian(f), jacrev(jacrev(f)), jacfwd(jacfwd(f)), jacrev(jacfwd(f))):
        torch.testing.assert_close(nested(z), expected, **CURVED)
    first = flat(torch.autograd.grad(engine_loss(subspace), [*subspace.z], create_graph=True))
    rows = [flat(torch.autograd.grad(number, [*subspace.z], retain_graph=True)) for number in first]
    torch.testing.assert_close(torch.stack(rows), expected, **CURVED)


def test_a_penalty_on_the_gradient_through_backward(subspace: SubspaceModel) -> None:
    expected = 2 * expected_hessian(subspace) @ expected_gradient(subspace)
    engine_loss(subspace).backward(create_graph=True)
    gradients = [own.grad for own in subspace.z]
    subspace.zero_grad()
    flat(gradients).square().sum().backward()
    torch.testing.assert_close(flat(own.grad for own in subspace.z), expected, **CURVED)
    subspace.zero_grad()


def test_scales_are_differentiated_by_the_product_rule() -> None:
    subspace = scaled()
    assert subspace.scales is not None
    z, scales = vector(subspace), subspace.scales.detach()

    def f(parameters: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(subspace, parameters, (TOKENS,)), LABELS, reduction="sum")

    def expected(z: Tensor, scales: Tensor) -> Tensor:
        return cross_entropy(literal(subspace, z, scales), LABELS, reduction="sum")

    gradients = torch.autograd.functional.jacobian(expected, (z, scales))
    found = grad(f)({"z.0": z[None], "scales": scales})
    torch.testing.assert_close((found["z.0"][0], found["scales"]), gradients, **CLOSE)
    engine = torch.autograd.grad(engine_loss(subspace), [subspace.z[0], subspace.scales], create_graph=True)
    torch.testing.assert_close((engine[0][0], engine[1]), gradients, **CLOSE)
    mixed: Any = slow_hessian(expected, (z, scales))
    rows = [torch.autograd.grad(number, subspace.scales, retain_graph=True)[0] for number in engine[0][0]]
    torch.testing.assert_close(torch.stack(rows), mixed[0][1], **CURVED)


def test_second_derivatives_of_scales_at_an_earlier_z_are_refused() -> None:
    subspace = scaled()
    loss = engine_loss(subspace)
    with torch.no_grad():
        subspace.z[0] += 1
    with pytest.raises(RuntimeError, match="its second derivatives are lost"):
        loss.backward(create_graph=True)


def test_z_by_name_together_with_other_parameters(subspace: SubspaceModel) -> None:
    names = [f"z.{index}" for index in range(len(subspace.z))]
    before = {name: weight.detach().clone() for name, weight in subspace.model.named_parameters()}

    def f(z: dict[str, Tensor], bias: Tensor) -> Tensor:
        return cross_entropy(
            functional_call(subspace, {**z, "model.head.bias": bias}, (TOKENS,)), LABELS, reduction="sum"
        )

    z = {name: own.detach() for name, own in zip(names, subspace.z, strict=True)}
    of_z, of_bias = grad(f, argnums=(0, 1))(z, subspace.model.head.bias.detach())
    torch.testing.assert_close(flat(of_z.values()), expected_gradient(subspace), **CLOSE)
    assert of_bias.any()
    leaves = {name: value.clone().requires_grad_() for name, value in z.items()}
    f(leaves, subspace.model.head.bias).backward()
    torch.testing.assert_close(flat(leaf.grad for leaf in leaves.values()), flat(of_z.values()), **CLOSE)
    assert all(own.grad is None for own in subspace.z)  # the module's own z has no part
    for name, weight in subspace.model.named_parameters():
        assert torch.equal(weight, before[name])


def test_another_parameter_in_the_place_of_z() -> None:
    subspace = plain()
    other = {f"z.{index}": nn.Parameter(0.5 * own.detach()) for index, own in enumerate(subspace.z)}
    functional_call(subspace, other, (TOKENS,)).sum().backward()
    assert all(z.grad is not None for z in other.values())
    assert all(own.grad is None for own in subspace.z)


def test_forward_mode_by_dual_numbers(subspace: SubspaceModel) -> None:
    z, direction = vector(subspace), torch.ones_like(vector(subspace))
    with forward_ad.dual_level():
        outputs = subspace.forward_at(forward_ad.make_dual(z, direction), TOKENS)
        tangent = forward_ad.unpack_dual(outputs).tangent
    expected: Any = torch.autograd.functional.jacobian(lambda z: literal(subspace, z, own_scales(subspace)), z)
    torch.testing.assert_close(tangent, expected @ direction, **CLOSE)


def test_hooks_on_z_are_called(subspace: SubspaceModel) -> None:
    seen: list[Tensor] = []
    subspace.z[0].register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)
    accumulated: list[Tensor] = []
    subspace.z[0].register_post_accumulate_grad_hook(lambda z: accumulated.append(z.grad.clone()))
    expected = expected_gradient(subspace)[: subspace.z[0].numel()]
    engine_loss(subspace).backward()
    torch.testing.assert_close(seen[0].reshape(-1), expected, **CLOSE)
    torch.testing.assert_close(accumulated[0].reshape(-1), 2 * expected, **CLOSE)


def test_batched_gradients_of_the_engine(subspace: SubspaceModel) -> None:
    outputs = subspace(TOKENS)
    seeds = torch.eye(outputs.numel(), dtype=outputs.dtype).view(-1, *outputs.shape)
    rows = torch.autograd.grad(outputs, [*subspace.z], seeds, is_grads_batched=True)
    expected: Any = torch.autograd.functional.jacobian(
        lambda z: literal(subspace, z, own_scales(subspace)), vector(subspace)
    )
    found = torch.cat([row.flatten(1) for row in rows], 1)
    torch.testing.assert_close(found, expected.flatten(0, 1), **CLOSE)


def test_an_optimizer_may_list_the_weights_that_follow_z() -> None:
    """As `torch.compile(subspace).parameters()` and those of a larger module do."""
    subspace = plain()
    outer = nn.Sequential(subspace)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    reference = [
        z - 0.1 * g for z, g in zip(subspace.z, torch.autograd.grad(engine_loss(subspace), [*subspace.z]), strict=True)
    ]
    engine_loss(subspace).backward()
    optimizer.step()
    for z, expected in zip(subspace.z, reference, strict=True):
        torch.testing.assert_close(z, expected, **CLOSE)


def test_lbfgs_on_z() -> None:
    subspace = plain()
    optimizer = torch.optim.LBFGS(subspace.z.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    before = engine_loss(subspace).item()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = engine_loss(subspace)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert engine_loss(subspace).item() < 0.9 * before


# -- refusals --


def test_what_is_no_function_of_z_is_refused() -> None:
    subspace = plain()
    z = vector(subspace)
    with pytest.raises(MismatchError, match=r"expected z of shape \[6\], got \[5\]"):
        subspace.forward_at(z[:5], TOKENS)
    with subspace.disable_adapter(), pytest.raises(InputError, match="inside disable_adapter"):
        subspace.forward_at(z, TOKENS)
    subspace.merge()
    with pytest.raises(InputError, match="call unmerge"):
        subspace.forward_at(z, TOKENS)


@pytest.mark.parametrize("transformed", [False, True])
def test_activation_checkpointing_is_refused_in_functional_calls(transformed: bool) -> None:
    class Checkpointed(Tower):
        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = checkpoint(super().forward, tokens, use_reentrant=False)  # type: ignore[assignment]
            return out

    subspace = SubspaceModel(Checkpointed(), random_basis(by_layer(Tower()), 3, dtype=torch.float64))
    z = vector(subspace)
    if transformed:
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            grad(lambda z: subspace.forward_at(z, TOKENS).sum())(z)
    else:
        with pytest.raises(RuntimeError, match="activation checkpointing recomputes layers"):
            subspace.forward_at(z.requires_grad_(), TOKENS)


@pytest.mark.parametrize("way", ["backward", "grad", "dual"])
def test_reentrant_checkpointing_by_hand_is_refused_in_functional_calls(way: str) -> None:
    model = Checkpointed()
    basis = random_basis(by_layer(model), 3, dtype=torch.float64)
    subspace = SubspaceModel(model, basis, modules_to_save=["embedding"])
    z = vector(subspace)
    with torch.no_grad():
        torch.testing.assert_close(subspace.forward_at(z, TOKENS), subspace(TOKENS))
    if way == "backward":
        with pytest.raises(InputError, match="activation checkpointing recomputes layers"):
            subspace.forward_at(z.requires_grad_(), TOKENS)
    elif way == "dual":
        with forward_ad.dual_level(), pytest.raises(InputError, match="activation checkpointing recomputes layers"):
            subspace.forward_at(forward_ad.make_dual(z, torch.ones_like(z)), TOKENS)
    else:
        with pytest.raises(RuntimeError, match="setup_context"):
            grad(lambda z: subspace.forward_at(z, TOKENS).sum())(z)


def test_a_functional_call_can_be_checkpointed() -> None:
    subspace = plain()
    z = vector(subspace).requires_grad_()
    checkpoint(lambda z: subspace.forward_at(z, TOKENS).square().sum(), z, use_reentrant=True).backward()
    assert z.grad is not None
    expected = grad(lambda z: subspace.forward_at(z, TOKENS).square().sum())(z)
    torch.testing.assert_close(z.grad, expected, **CLOSE)


def bert(attention: str) -> SubspaceModel:
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        attn_implementation=attention,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).double().eval()
    return SubspaceModel(model, random_basis(by_layer(model), 2, dtype=torch.float64), init_std=0.3).eval()


def test_forward_mode_through_fused_attention_names_the_remedy() -> None:
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    fused, eager = bert("sdpa"), bert("eager")
    with pytest.raises(NotImplementedError, match='attn_implementation="eager"'):
        jacfwd(lambda z: fused.forward_at(z, **batch).logits)(vector(fused))
    expected = eager.jacobian(batch, method="forward")
    assert expected.shape == (3, 2, 4)
    for method in ("reverse", "forward", "central"):
        torch.testing.assert_close(fused.jacobian(batch, method=method), expected, rtol=1e-6, atol=1e-8)


def test_gradient_checkpointing_of_transformers_is_refused_in_functional_calls() -> None:
    subspace = bert("eager")
    subspace.model.gradient_checkpointing_enable()
    subspace.model.train()
    with pytest.raises(InputError, match="gradient_checkpointing_disable"):
        grad(lambda z: subspace.forward_at(z, input_ids=TOKENS).logits.sum())(vector(subspace))
    subspace.eval()  # in which transformers checkpoints nothing
    batch = {"input_ids": TOKENS}
    torch.testing.assert_close(subspace.jacobian(batch), bert("eager").jacobian(batch), **CLOSE)


# -- normalization --


class Normalized(nn.Module):
    """A linear map, some normalization of its outputs, and a nonlinear function of these."""

    def __init__(self, norm: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(width, width)
        self.norm = norm
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x).view(-1, 4, 3)).pow(3).flatten(1)
        return out


def instance_norm(track_running_stats: bool = False) -> nn.Module:
    norm = nn.InstanceNorm1d(4, eps=1e-2, affine=True, track_running_stats=track_running_stats)
    norm.weight.data, norm.bias.data = torch.arange(1.0, 5), torch.arange(4.0)
    return norm


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "instance": instance_norm(),
    "instance with running statistics": instance_norm(track_running_stats=True),
    "torch.instance": lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "layer": nn.LayerNorm([4, 3]),
    "torch.layer": lambda x: torch.layer_norm(input=x, normalized_shape=[3]),
    "native layer": lambda x: torch.native_layer_norm(x, [3], None, None, 1e-5)[0],
    "group": nn.GroupNorm(2, 4),
    "batch": nn.BatchNorm1d(4),
}


@pytest.mark.parametrize("kind", NORMS)
def test_second_derivatives_of_normalization(kind: str) -> None:
    model = Normalized(NORMS[kind]).eval()
    basis = random_basis(by_pattern(model, {"all": "linear.*"}), 3, dtype=torch.float64)
    subspace = SubspaceModel(model, basis, init_std=0.3).eval()
    x, z = torch.linspace(-1, 1, 24).double().view(2, 12).sin(), vector(subspace)
    torch.testing.assert_close(vjp(lambda z: subspace.forward_at(z, x), z)[0], subspace(x), **CLOSE)

    def f(z: Tensor) -> Tensor:
        return subspace.forward_at(z, x).square().sum()

    def gradient(z: Tensor) -> Tensor:
        subspace.set_state({"all": z})
        return torch.autograd.grad(subspace(x).square().sum(), subspace.z[0])[0][0]

    step = 1e-5
    expected = torch.stack([(gradient(z + step * e) - gradient(z - step * e)) / (2 * step) for e in torch.eye(3)])
    for nested in (hessian(f), jacrev(jacrev(f)), jacfwd(jacfwd(f)), jacrev(jacfwd(f))):
        torch.testing.assert_close(nested(z), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_means_and_scales_of_native_layer_normalization() -> None:
    def norm(x: Tensor) -> Tensor:
        out, mean, scale = torch.native_layer_norm(x, [3], None, None, 1e-5)
        return out + mean * scale.square()

    model = Normalized(norm).eval()
    basis = random_basis(by_pattern(model, {"all": "linear.*"}), 3, dtype=torch.float64)
    subspace, x = SubspaceModel(model, basis, init_std=0.3), torch.linspace(-1, 1, 24).double().view(2, 12)
    found = vjp(lambda z: subspace.forward_at(z, x), vector(subspace))[0]
    torch.testing.assert_close(found, subspace(x), **CLOSE)


@pytest.mark.parametrize("norm", ["instance", "batch", "batch by keyword", "torch.batch", "native batch"])
def test_normalization_with_wrong_derivatives_is_refused(norm: str) -> None:
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "instance": instance_norm(track_running_stats=True),
        "batch": nn.BatchNorm1d(4, track_running_stats=False),
        "batch by keyword": lambda x: batch_norm(x, None, None, training=True),
        "torch.batch": lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        "native batch": lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0],
    }
    model = Normalized(norms[norm])
    basis = random_basis(by_pattern(model, {"all": "linear.*"}), 3, dtype=torch.float64)
    subspace = SubspaceModel(model, basis)
    with pytest.raises(InputError, match=r"call eval\(\) first"):
        grad(lambda z: subspace.forward_at(z, torch.ones(2, 12).double()).sum())(vector(subspace))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.InstanceNorm1d(1, affine=True)])
def test_normalization_of_an_outlier_in_half_precision(norm: nn.Module, dtype: torch.dtype) -> None:
    class Outlier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 16), norm

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.linear(x)[:, None])
            return out

    model = Outlier().eval()
    torch.nn.init.eye_(model.linear.weight)
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "linear.weight"}), 2)).eval()
    x = torch.linspace(-1, 1, 16).repeat(2, 1)
    x[:, 3] = 600  # its square is above 65504, the maximum of float16
    with torch.autocast("cpu", dtype=dtype):
        expected = subspace(x)
        found = subspace.forward_at(vector(subspace).requires_grad_(), x)
    assert expected.abs().max() > 3
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected)


# -- curvature --


def test_jacobians_of_all_methods(subspace: SubspaceModel) -> None:
    expected: Any = torch.autograd.functional.jacobian(
        lambda z: literal(subspace, z, own_scales(subspace)), vector(subspace)
    )
    before = vector(subspace)
    torch.testing.assert_close(subspace.jacobian(TOKENS), expected, **CLOSE)
    torch.testing.assert_close(subspace.jacobian(TOKENS, method="forward"), expected, **CLOSE)
    torch.testing.assert_close(subspace.jacobian(TOKENS, method="central"), expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(vector(subspace), before)


@pytest.mark.parametrize("number", [-1.0, 1e8])
def test_the_step_of_a_central_difference_grows_with_the_size_of_z(number: float) -> None:
    model = nn.Linear(1, 1, bias=False).double().eval()
    basis = Basis.from_directions(by_pattern(model, {"all": ".*"}), {"all": torch.ones(1, 1).double()})
    subspace = SubspaceModel(model, basis).eval()
    subspace.set_state({"all": torch.tensor([number]).double()})
    x = torch.tensor([[3.0]]).double()
    torch.testing.assert_close(subspace.jacobian(x, method="central"), x[:, None], rtol=1e-7, atol=0)


def test_z_and_weights_are_put_back_after_central_differences() -> None:
    subspace = plain().eval()
    expected, before = subspace(TOKENS), vector(subspace)

    def fail(logits: Tensor) -> Tensor:
        raise ZeroDivisionError

    subspace.jacobian(TOKENS, method="central")
    assert torch.equal(subspace.model(TOKENS), expected)
    with pytest.raises(ZeroDivisionError):
        subspace.jacobian(TOKENS, method="central", outputs=fail)
    assert torch.equal(vector(subspace), before)
    assert torch.equal(subspace.model(TOKENS), expected)


def test_a_jacobian_in_float32_by_central_differences() -> None:
    model = Tower().float().eval()
    subspace = SubspaceModel(model, random_basis(by_layer(model), 3), init_std=0.3).eval()
    exact = subspace.jacobian(TOKENS)
    torch.testing.assert_close(subspace.jacobian(TOKENS, method="central"), exact, rtol=1e-3, atol=2e-4)


def test_a_jacobian_in_training_mode_or_by_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match=r"call eval\(\) first"):
        plain().jacobian(TOKENS)
    inside = plain().eval()
    inside.model.train()
    with pytest.raises(InputError, match=r"call eval\(\) first"):
        inside.jacobian(TOKENS)
    with pytest.raises(InputError, match="reverse, forward, central, got 'other'"):
        plain().eval().jacobian(TOKENS, method="other")  # type: ignore[arg-type]


def test_curvature_of_a_model_that_is_no_function_of_z_is_refused() -> None:
    subspace = plain()
    loader = [(TOKENS, LABELS)]
    ways: list[Callable[[], Tensor]] = [
        *(
            lambda method=method: subspace.jacobian(TOKENS, method=method)
            for method in ("reverse", "forward", "central")
        ),
        lambda: gauss_newton(subspace, loader),
        lambda: empirical_fisher(subspace, loader),
    ]

    def require_refusals(message: str) -> None:
        for way in ways:
            with pytest.raises(InputError, match=message):
                way()

    require_refusals(r"call eval\(\) first")
    subspace.eval()
    with subspace.disable_adapter():
        require_refusals("inside disable_adapter")
    subspace.merge()
    require_refusals("call unmerge")


def test_curvature_with_other_targets_than_rows_is_refused() -> None:
    subspace = plain().eval()
    for matrix in (gauss_newton, empirical_fisher):
        for targets in (LABELS[:2], LABELS.repeat(2)):
            with pytest.raises(InputError, match=f"expected one target per row, got {len(targets)} targets for 3 rows"):
                matrix(subspace, [(TOKENS, targets)])
    with pytest.raises(InputError, match="one row per example, got 2 for one"):
        empirical_fisher(subspace, [(TOKENS, LABELS)], outputs=lambda logits: logits.repeat(2, 1))


@torch.no_grad()
def test_curvature_without_gradients_around_it_and_of_frozen_z() -> None:
    subspace, frozen, loader = plain().eval(), plain().eval(), [(TOKENS, LABELS)]
    frozen.z[0].requires_grad_(False)
    expected = subspace.jacobian(TOKENS, method="forward")
    for one in (subspace, frozen):
        found = one.jacobian(TOKENS, outputs=lambda logits: 2 * logits)
        torch.testing.assert_close(found, 2 * expected, **CLOSE)
        p = one(TOKENS).softmax(-1)
        gradients = torch.einsum("noi,no->ni", expected, p - torch.eye(2)[LABELS].double())
        torch.testing.assert_close(empirical_fisher(one, loader), gradients.T @ gradients, **CLOSE)


def test_jacobians_have_no_graph() -> None:
    subspace = SubspaceModel(
        Tower(), random_basis(by_layer(Tower()), 3, dtype=torch.float64), modules_to_save=["head"]
    ).eval()
    for method in ("reverse", "forward", "central"):
        assert not subspace.jacobian(TOKENS, method=method).requires_grad  # type: ignore[arg-type]
    assert not gauss_newton(subspace, [(TOKENS, LABELS)], method="forward").requires_grad


def test_curvature_of_an_empty_basis_is_empty() -> None:
    subspace = SubspaceModel(Tower(), empty_basis(by_layer(Tower())), modules_to_save=["head"]).eval()
    for method in ("reverse", "forward", "central"):
        columns = subspace.jacobian(TOKENS, method=method)  # type: ignore[arg-type]
        assert (columns.shape, columns.dtype) == ((3, 2, 0), torch.float64)
    for matrix in (gauss_newton, empirical_fisher):
        empty = matrix(subspace, [(TOKENS, LABELS)])
        assert (empty.shape, empty.dtype) == ((0, 0), torch.float64)


def test_gauss_newton_and_fisher_matrices_over_a_loader() -> None:
    subspace = plain().eval()
    seen: list[int] = []

    def progress(loader: Any) -> Any:
        for batch in loader:
            seen.append(len(batch[1]))
            yield batch

    loader = [(TOKENS[:2], LABELS[:2]), (TOKENS[2:], LABELS[2:])]
    columns, logits = subspace.jacobian(TOKENS), subspace(TOKENS).detach()
    p = logits.softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("noi,nop,npj->ij", columns, curvature, columns)
    torch.testing.assert_close(gauss_newton(subspace, loader, progress=progress), expected, **CLOSE)
    assert seen == [2, 1]
    gradients = torch.einsum("noi,no->ni", columns, p - torch.eye(2)[LABELS].double())
    torch.testing.assert_close(empirical_fisher(subspace, loader), gradients.T @ gradients, **CLOSE)
    squared = gauss_newton(subspace, [(TOKENS, logits)], loss=lambda a, b: mse_loss(a, b, reduction="sum") / 2)
    torch.testing.assert_close(squared, torch.einsum("noi,noj->ij", columns, columns), **CLOSE)
    with pytest.raises(InputError, match="expected batches of inputs and targets"):
        gauss_newton(subspace, [TOKENS])


def test_curvature_of_a_model_of_transformers() -> None:
    subspace = bert("sdpa")
    loader = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": LABELS}]
    matrix = gauss_newton(subspace, loader)
    assert matrix.shape == (4, 4)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_a_quadratic_has_the_hessian_of_its_directions() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    basis = Basis.from_directions(by_pattern(model, {"all": ".*"}), {"all": torch.eye(2).double()})
    subspace = SubspaceModel(model, basis)
    x = torch.tensor([[3.0, 4.0]]).double()
    found = hessian(lambda z: subspace.forward_at(z, x).square().sum())(torch.zeros(2).double())
    torch.testing.assert_close(found, 2 * x.T @ x, **CLOSE)


def test_the_graph_may_be_built_inside_a_transform() -> None:
    """As a gradient with respect to the inputs does, in the first call after a move."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    basis = random_basis(by_pattern(model, {"all": ".*"}), 3, dtype=torch.float64)
    subspace, x = SubspaceModel(model, basis, init_std=0.3), torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(subspace(x).sum(), [x, subspace.z[0]])
    subspace.to(torch.float64)
    torch.testing.assert_close(grad(lambda x: subspace(x).sum())(x.detach()), expected[0], **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(subspace(x).sum(), subspace.z[0])[0], expected[1], **CLOSE)


def test_another_model_may_be_deleted_inside_a_transform() -> None:
    subspace, others = plain(), [plain()]
    inner = others[0].model

    def f(z: Tensor) -> Tensor:
        others.clear()
        return loss_at(subspace)(z)

    grad(f)(vector(subspace))
    assert all(type(weight) is nn.Parameter and weight.is_leaf for weight in inner.parameters())

"""Hessians and gradients of rows in z: against curvlinops, and differences of the literal dense formula, in float64.

Exact derivatives agree to 1e-9, central differences of gradients to 1e-7, second differences of losses to 1e-5.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from test_functional import (
    CLOSE,
    CURVED,
    KINDS,
    LABELS,
    TOKENS,
    bert,
    expected_gradient,
    expected_hessian,
    literal_loss,
    plain,
    vector,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint
from towers import Tower

from tinyspan import Basis, InputError, SubspaceModel, by_layer, by_pattern, empty_basis, random_basis
from tinyspan.model.curvature import empirical_fisher, gauss_newton, hessian, row_gradients

LOADER = [(TOKENS[:2], LABELS[:2]), (TOKENS[2:], LABELS[2:])]


def second_differences(f: Callable[[Tensor], Tensor], z: Tensor, step: float = 1e-4) -> Tensor:
    """The Hessian from values alone: (f(++) - f(+-) - f(-+) + f(--)) / 4 s^2."""
    units = step * torch.eye(len(z), dtype=z.dtype)
    rows = []
    for a in units:
        ends = [[f(z + x * a + y * b) for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1))] for b in units]
        rows.append(torch.stack([pp - pm - mp + mm for pp, pm, mp, mm in ends]) / (4 * step**2))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_of_every_kind_of_map(kind: str) -> None:
    subspace = KINDS[kind]().eval()
    expected, before = expected_hessian(subspace), vector(subspace)
    torch.testing.assert_close(hessian(subspace, LOADER), expected, **CURVED)
    central = hessian(subspace, LOADER, method="central", symmetric=False)
    torch.testing.assert_close(central, expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(hessian(subspace, LOADER, method="central"), (central + central.T) / 2)
    torch.testing.assert_close(row_gradients(subspace, LOADER).sum(0), expected_gradient(subspace), **CLOSE)
    assert torch.equal(vector(subspace), before)
    assert all(own.grad is None for own in subspace.z)


@torch.no_grad()
def test_a_hessian_from_values_of_the_loss_alone() -> None:
    subspace = plain().eval()
    expected = second_differences(literal_loss(subspace), vector(subspace))
    for method in ("reverse", "central"):
        torch.testing.assert_close(hessian(subspace, LOADER, method=method), expected, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_the_matrices_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="requirements-no-deps.txt is not installed")
    subspace = plain().eval()
    parts = [subspace, nn.CrossEntropyLoss(reduction="sum"), list(subspace.z), LOADER]
    unit = torch.eye(len(vector(subspace)), dtype=torch.float64)
    for operator, ours in (
        (curvlinops.HessianLinearOperator, hessian(subspace, LOADER)),
        (curvlinops.GGNLinearOperator, gauss_newton(subspace, LOADER)),
        (curvlinops.GGNLinearOperator, gauss_newton(subspace, LOADER, method="forward")),
        (curvlinops.EFLinearOperator, empirical_fisher(subspace, LOADER)),
    ):
        torch.testing.assert_close(ours, operator(*parts) @ unit, **CURVED)


def test_gradients_of_rows_are_those_of_one_row_after_the_other() -> None:
    subspace = plain().eval()
    seen: list[int] = []

    def progress(loader: Iterable[Any]) -> Iterator[Any]:
        for batch in loader:
            seen.append(len(batch[1]))
            yield batch

    rows = row_gradients(subspace, LOADER, progress=progress)
    assert seen == [2, 1]
    for index, row in enumerate(rows):
        logits = subspace(TOKENS[index : index + 1])
        gradients = torch.autograd.grad(cross_entropy(logits, LABELS[index : index + 1]), [*subspace.z])
        torch.testing.assert_close(row, torch.cat([one.reshape(-1) for one in gradients]), **CLOSE)
    torch.testing.assert_close(rows.T @ rows, empirical_fisher(subspace, LOADER), **CLOSE)
    assert not rows.requires_grad


@pytest.mark.parametrize("way", [gauss_newton, hessian, row_gradients, empirical_fisher])
def test_outputs_that_are_doubled_are_those_of_a_loss_of_doubled_outputs(way: Callable[..., Tensor]) -> None:
    subspace = plain().eval()
    seen: list[int] = []
    found = way(subspace, LOADER, outputs=lambda a: 2 * a, progress=lambda loader: seen.append(len(loader)) or loader)
    expected = way(subspace, LOADER, loss=lambda a, target: cross_entropy(2 * a, target))
    torch.testing.assert_close(found, expected, **CURVED)
    assert seen == [2]


@pytest.mark.parametrize("way", [gauss_newton, hessian, row_gradients, empirical_fisher])
def test_batches_of_arguments_by_name(way: Callable[..., Tensor]) -> None:
    class Negated(Tower):
        def forward(self, tokens: Tensor, negated: bool = False) -> Tensor:
            out = super().forward(tokens)
            return -out if negated else out

    subspace = SubspaceModel(Negated(), random_basis(by_layer(Tower()), 3, dtype=torch.float64), init_std=0.3).eval()
    found = way(subspace, [{"tokens": TOKENS, "negated": True, "labels": LABELS}])
    torch.testing.assert_close(found, way(subspace, [(TOKENS, LABELS)], outputs=lambda a: -a), **CURVED)


class HalfUsed(nn.Module):
    """A model whose outputs depend on one of its two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = (nn.Linear(2, 1, bias=False).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_a_block_on_which_nothing_depends_has_zeros() -> None:
    model, x = HalfUsed().eval(), torch.tensor([[3.0, 4.0]]).double()
    partition = by_pattern(model, {"a": "used.weight", "b": "unused.weight"})
    basis = Basis.from_directions(partition, {name: torch.eye(2).double() for name in ("a", "b")})
    subspace = SubspaceModel(model, basis).eval()
    expected = torch.tensor([3.0, 4.0, 0.0, 0.0]).double()
    assert torch.equal(subspace.jacobian(x), expected[None, None])
    loader = [(x, torch.zeros(1))]
    assert torch.equal(row_gradients(subspace, loader, loss=lambda value, target: value.sum()), expected[None])
    for method in ("reverse", "central"):
        found = hessian(subspace, loader, loss=lambda value, target: value.square().sum() / 2, method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.outer(expected, expected), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:the outputs do not depend on z")
def test_outputs_that_depend_on_no_block_have_zeros() -> None:
    model, x = HalfUsed().eval(), torch.tensor([[3.0, 4.0]]).double()
    basis = Basis.from_directions(by_pattern(model, {"a": "unused.weight"}), {"a": torch.eye(2).double()})
    subspace = SubspaceModel(model, basis).eval()
    loader = [(x, torch.zeros(1))]
    with pytest.warns(UserWarning, match="the outputs do not depend on z"):  # by backward passes
        subspace.jacobian(x)
    for method in ("reverse", "forward", "central"):
        assert torch.equal(subspace.jacobian(x, method=method), torch.zeros(1, 1, 2).double())  # type: ignore[arg-type]
    assert torch.equal(row_gradients(subspace, loader, loss=lambda value, target: value.sum()), torch.zeros(1, 2))
    for way in ("reverse", "central"):
        found = hessian(subspace, loader, loss=lambda value, target: value.square().sum(), method=way)  # type: ignore[arg-type]
        assert torch.equal(found, torch.zeros(2, 2).double())


def test_a_number_per_row_is_one_output() -> None:
    """As the logit of one class."""
    subspace = plain().eval()

    def squared(values: Tensor, target: Tensor) -> Tensor:
        return (values - target).square().sum()

    for method in ("reverse", "forward", "central"):
        found, expected = (
            subspace.jacobian(TOKENS, method=method, outputs=outputs)  # type: ignore[arg-type]
            for outputs in (lambda a: a[:, 1], lambda a: a[:, 1:2])
        )
        assert torch.equal(found, expected)
    for way in (gauss_newton, hessian, row_gradients, empirical_fisher):
        found, expected = (
            way(subspace, LOADER, loss=squared, outputs=outputs)  # type: ignore[operator]
            for outputs in (lambda a: a[:, 1], lambda a: a[:, 1:2])
        )
        assert torch.equal(found, expected)
        with pytest.raises(InputError, match="got one number for all rows"):
            way(subspace, LOADER, loss=squared, outputs=lambda a: a[:, 1].sum())  # type: ignore[operator]


def test_gauss_newton_by_central_differences_of_a_checkpointed_model() -> None:
    class Checkpointed(Tower):
        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = checkpoint(super().forward, tokens, use_reentrant=False)  # type: ignore[assignment]
            return out

    basis = random_basis(by_layer(Tower()), 3, dtype=torch.float64)
    subspace, expected = (SubspaceModel(made(), basis, init_std=0.3).eval() for made in (Checkpointed, Tower))
    found = gauss_newton(subspace, LOADER, method="central")
    torch.testing.assert_close(found, gauss_newton(expected, LOADER), rtol=1e-7, atol=1e-8)


def test_the_hessian_of_the_squared_error_near_its_minimum_is_that_of_gauss_newton() -> None:
    subspace = plain().eval()
    loader = [(TOKENS, subspace(TOKENS).detach())]

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return mse_loss(a, b, reduction="sum") / 2

    expected = gauss_newton(subspace, loader, loss=squared)
    torch.testing.assert_close(hessian(subspace, loader, loss=squared), expected, **CURVED)


@torch.no_grad()
def test_frozen_z_counts_and_the_surrounding_no_grad_does_not() -> None:
    subspace, frozen = plain().eval(), plain().eval()
    frozen.z[0].requires_grad_(False)
    for way in (hessian, row_gradients):
        assert torch.equal(way(subspace, LOADER), way(frozen, LOADER))  # type: ignore[operator]


def test_fused_attention_has_second_derivatives_and_forward_mode_here() -> None:
    fused, eager = bert("sdpa"), bert("eager")
    loader = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": LABELS}]
    expected = hessian(eager, loader)
    assert expected.any()
    torch.testing.assert_close(hessian(fused, loader), expected, **CURVED)
    torch.testing.assert_close(hessian(fused, loader, method="central"), expected, rtol=1e-6, atol=1e-8)
    exact = gauss_newton(fused, loader, method="reverse")
    torch.testing.assert_close(gauss_newton(fused, loader, method="forward"), exact, **CURVED)


def test_in_float32_the_asymmetry_shows_the_error_of_differences() -> None:
    model = Tower().float().eval()
    subspace = SubspaceModel(model, random_basis(by_layer(model), 3), init_std=0.3).eval()
    exact = hessian(subspace, LOADER)
    central = hessian(subspace, LOADER, method="central", symmetric=False)
    error, asymmetry = (central - exact).abs().max(), (central - central.T).abs().max()
    assert 1e-7 < asymmetry < 1e-2
    assert error < 10 * asymmetry


def test_a_loss_that_is_linear_in_z_has_no_curvature() -> None:
    model = nn.Linear(2, 3, bias=False).double()
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": ".*"}), 2, dtype=torch.float64)).eval()
    loader = [(torch.ones(4, 2, dtype=torch.float64), torch.zeros(4))]
    for method in ("reverse", "central"):
        flat = hessian(subspace, loader, loss=lambda values, target: values.sum(), method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(flat, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_an_empty_basis_has_empty_matrices() -> None:
    subspace = SubspaceModel(Tower(), empty_basis(by_layer(Tower())), modules_to_save=["head"]).eval()
    for method in ("reverse", "central"):
        empty = hessian(subspace, LOADER, method=method)  # type: ignore[arg-type]
        assert (empty.shape, empty.dtype) == ((0, 0), torch.float64)
    assert row_gradients(subspace, LOADER).shape == (3, 0)
    assert row_gradients(plain().eval(), []).shape == (0, 6)


def test_what_is_refused() -> None:
    subspace = plain()
    for way in (hessian, row_gradients):
        with pytest.raises(InputError, match=r"call eval\(\) first"):
            way(subspace, LOADER)  # type: ignore[operator]
    subspace.eval()
    with pytest.raises(InputError, match="reverse, central, got 'forward'"):
        hessian(subspace, LOADER, method="forward")  # type: ignore[arg-type]
    for method in ("reverse", "central"):
        with pytest.raises(InputError, match="expected one target per row, got 2 targets for 3 rows"):
            hessian(subspace, [(TOKENS, LABELS[:2])], method=method)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="one row per example, got 6 for 3"):
            hessian(subspace, [(TOKENS, LABELS)], outputs=lambda a: a.repeat(2, 1), method=method)  # type: ignore[arg-type]

"""Models in one place: weights and gradients against the literal sum, shared modules, and training that is undone."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from towers import Tower

from tinyspan.workflows.combine.span import Heads, Span, shared_blocks, stack_differences

MODELS = 3


@pytest.fixture(params=[torch.float64, torch.float32])
def states(request: pytest.FixtureRequest) -> list[dict[str, Tensor]]:
    """theta_0 and three models around it."""
    model, generator = Tower().to(request.param), torch.Generator().manual_seed(5)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    return [
        start,
        *(
            {n: v + 0.1 * torch.randn(v.shape, generator=generator).to(v) for n, v in start.items()}
            for _ in range(MODELS)
        ),
    ]


def span_of(states: list[dict[str, Tensor]], folder: Path, absent: str = "", dtype: torch.dtype | None = None) -> Span:
    """Return the span of all parameters; those whose names begin with `absent` have no origin in the base."""
    start, *models = states
    model = Tower().to(next(iter(start.values())).dtype)
    blocks = shared_blocks(model, set(start))
    origin = {name: value for name, value in start.items() if not absent or not name.startswith(absent)}
    stack_differences(blocks, origin, iter(models), len(models), folder, dtype or next(iter(start.values())).dtype)
    return Span(Heads([model], set(start)), blocks, folder)


def literal(states: list[dict[str, Tensor]], span: Span, coefficients: Tensor) -> dict[str, Tensor]:
    """theta_0 + sum_m c_bm (theta_m - theta_0), parameter by parameter."""
    start, *models = states
    of_block = dict(zip(span.names, coefficients, strict=True))
    block_of = {
        spec.name.removeprefix("models.0."): block.name for block in span.partition for spec in block.parameters
    }
    return {
        name: value + sum(of_block[block_of[name]][m].to(value) * (models[m][name] - value) for m in range(len(models)))
        if name in block_of
        else value
        for name, value in start.items()
    }


def weights(span: Span) -> Mapping[str, Tensor]:
    return dict(span.heads.models[0].named_parameters())


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value.detach(), other[name], rtol=0, atol=tolerance, msg=name)


def tolerance_of(states: list[dict[str, Tensor]]) -> float:
    """Some rounding units of numbers of about 1, of which each weight sums four."""
    return 1e-14 if next(iter(states[0].values())).dtype == torch.float64 else 2e-6


def test_the_weights_are_the_literal_sum(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    span = span_of(states, tmp_path)
    coefficients = torch.randn(span.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    span.set(coefficients)
    close(weights(span), literal(states, span, coefficients), tolerance_of(states))
    span.set(torch.zeros(span.shape))
    close(weights(span), states[0], 0.0)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2.0**-8), (torch.int8, 1 / 254)])
def test_reduced_differences_have_their_stated_error(
    states: list[dict[str, Tensor]], tmp_path: Path, dtype: torch.dtype, error: float
) -> None:
    span = span_of(states, tmp_path, dtype=dtype)
    coefficients = torch.zeros(span.shape)
    coefficients[:, 1] = 1
    span.set(coefficients)
    largest = max(float((state[name] - states[0][name]).abs().max()) for state in states[1:] for name in states[0])
    for name, value in weights(span).items():
        gap = (value.detach() - states[2][name]).abs().max()
        assert 0 < gap <= 1.01 * error * largest + 1e-6, name


def test_the_gradient_is_that_of_the_literal_sum(
    states: list[dict[str, Tensor]], tokens: Tensor, tmp_path: Path
) -> None:
    span = span_of(states, tmp_path)
    coefficients = 0.3 * torch.randn(span.shape, generator=torch.Generator().manual_seed(2)).to(span.subspace.z[0])
    span.set(coefficients)
    span.subspace(task=0, tokens=tokens).square().mean().backward()
    gradient = span.gradient()
    leaf = coefficients.clone().requires_grad_()
    model = Tower().to(leaf.dtype)
    torch.func.functional_call(model, literal(states, span, leaf), (tokens,)).square().mean().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=100 * tolerance_of(states))
    assert gradient.abs().min() > 0
    assert all(z.grad is None for z in span.subspace.z)


def test_what_the_base_lacks_starts_from_the_mean_of_the_models(
    states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    span = span_of(states, tmp_path, absent="head")
    heads = [name for name in states[0] if name.startswith("head")]
    assert heads
    for coefficients in (torch.full(span.shape, 1 / MODELS), torch.zeros(span.shape)):
        span.set(coefficients)
        for name in heads:
            mean = torch.stack([state[name] for state in states[1:]]).mean(0)
            torch.testing.assert_close(weights(span)[name].detach(), mean, rtol=0, atol=tolerance_of(states))
    alone = torch.zeros(span.shape)
    alone[:, 2] = 1
    span.set(alone)
    close(weights(span), states[3], tolerance_of(states))


def test_a_block_in_which_the_models_are_equal_has_no_coefficients(
    states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    for state in states[1:]:
        state |= {name: value.clone() for name, value in states[0].items() if name.startswith("embed")}
    span = span_of(states, tmp_path)
    assert "embeddings" not in span.names
    assert len(span.names) > 1


def test_only_parameters_in_which_the_models_differ_are_stored_and_written(
    states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    kept = next(name for name in states[0] if name.startswith("layers.1."))
    for state in states[1:]:
        state[kept] = states[0][kept] + 1  # whatever the base has
    span = span_of(states, tmp_path)
    (block,) = (block for block in span.partition if block.name == "layers.1")
    assert f"models.0.{kept}" not in [spec.name for spec in block.parameters]
    assert span.maps[block.name].size == block.numel
    assert len(span.names) == len(shared_blocks(Tower(), set(states[0])))
    states[0][kept] = states[1][kept]
    coefficients = torch.randn(span.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    span.set(coefficients)
    close(weights(span), literal(states, span, coefficients), tolerance_of(states))
    with span.written(lambda block, differences: differences[1]) as heads:
        close(dict(heads.models[0].named_parameters()), states[2], tolerance_of(states))


def test_other_updates_are_written_and_taken_back(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    span = span_of(states, tmp_path)
    span.set(torch.ones(span.shape))
    with span.written(lambda block, differences: differences[0] - 2 * differences[2]) as heads:
        coefficients = torch.tensor([1.0, 0.0, -2.0]).expand(span.shape)
        close(dict(heads.models[0].named_parameters()), literal(states, span, coefficients), tolerance_of(states))
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.add_(1.0)  # as training does
    close(weights(span), states[0], 0.0)
    span.set(torch.ones(span.shape))
    close(weights(span), literal(states, span, torch.ones(span.shape)), tolerance_of(states))


def test_models_share_modules_and_parameters_of_the_given_names() -> None:
    models = [nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, size)) for size in (1, 3)]
    heads = Heads(models, ["0.0.weight", "0.0.bias"])
    assert models[0][0] is models[1][0]
    assert models[0][1] is not models[1][1]
    assert heads(1, input=torch.ones(4, 2)).shape == (4, 3)
    assert sum(parameter.numel() for parameter in heads.parameters()) == 6 + 3 + 9


class Encoder(nn.Module):
    """A layer that all types of models have, and for some a pooler."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.pooler = nn.Linear(2, 2), pooler


@pytest.mark.parametrize("first_has_pooler", [True, False])
def test_models_of_different_types_keep_their_own_modules(first_has_pooler: bool) -> None:
    """As a tagger, whose head is one layer, and a classifier with a pooler, whose head has two."""
    tagger = nn.ModuleDict({"bert": Encoder(None), "classifier": nn.Linear(2, 3)})
    head = nn.ModuleDict({"dense": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
    classifier = nn.ModuleDict({"bert": Encoder(nn.Linear(2, 2)), "classifier": head})
    before = [[name for name, _ in model.named_parameters()] for model in (tagger, classifier)]
    Heads([classifier, tagger] if first_has_pooler else [tagger, classifier], ["bert.layer.weight", "bert.layer.bias"])
    assert [[name for name, _ in model.named_parameters()] for model in (tagger, classifier)] == before
    assert tagger["bert"].layer.weight is classifier["bert"].layer.weight


def test_a_shared_parameter_of_a_module_with_others_is_shared_alone() -> None:
    models = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    Heads(models, ["0.weight"])
    assert models[0][0].weight is models[1][0].weight
    assert models[0][0].bias is not models[1][0].bias


def test_a_tied_parameter_is_shared_under_all_its_names() -> None:
    """As the embeddings and the output layer of most decoders."""
    models = [nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)) for _ in range(2)]
    for model in models:
        model[1].weight = model[0].weight  # type: ignore[union-attr, assignment]
    heads = Heads(models, [name for name, _ in models[0].named_parameters()])
    assert len({id(weight) for model in models for weight in (model[0].weight, model[1].weight)}) == 1
    assert len(list(heads.parameters())) == 2

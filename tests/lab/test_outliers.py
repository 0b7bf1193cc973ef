"""The outlier study: what is done to the weights, coordinate by coordinate, and each statistic by hand."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyspan import InputError, by_pattern
from tinyspan.lab.outliers import dissect, norm_gains
from tinyspan.partition import Block, Partition

Seen = dict[str, Tensor]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(30, 10), nn.LayerNorm(10)).double()


@pytest.fixture
def partition(model: nn.Module) -> Partition:
    return by_pattern(model, {"all": ".*"})


def place(block: Block, name: str, index: int) -> int:
    return next(a for spec, a, _ in block.spans() if spec.name == name) + index


def dissected(
    model: nn.Module, partition: Partition, start: Tensor, update: Tensor, seed: int = 0
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return what `dissect` finds, and the weights at every call of the score."""
    block, seen = partition["all"], []

    def score() -> float:
        seen.append(block.flatten(partition.select(model)).clone())
        return float(len(seen))

    put(model, block, start + update)
    return dissect(model, partition, {"all": start}, {"all": update}, score, seed=seed), seen


def put(model: nn.Module, block: Block, vector: Tensor) -> None:
    model.load_state_dict(block.unflatten(vector))


@pytest.fixture
def case(model: nn.Module, partition: Partition) -> tuple[Tensor, Tensor, list[int]]:
    """theta_0, and an update that is small but at two weights of the matrix and one LayerNorm gain."""
    block = partition["all"]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(block.numel, generator=generator, dtype=torch.float64)
    update = 0.01 * torch.randn(block.numel, generator=generator, dtype=torch.float64)
    where = [place(block, "0.weight", 7), place(block, "0.weight", 200), place(block, "1.weight", 4)]
    update[where] = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    return start, update, where


def test_each_condition_changes_just_the_coordinates_it_names(
    model: nn.Module, partition: Partition, case: tuple[Tensor, Tensor, list[int]]
) -> None:
    start, update, where = case
    found, seen = dissected(model, partition, start, update)
    end = start + update
    weights = dict(zip(found["scores"], seen, strict=True))  # scored in the order they are listed
    assert list(found["scores"].values()) == list(range(1, len(seen) + 1))

    def changed(name: str, value: Callable[[Tensor], Tensor] = torch.zeros_like) -> set[int]:
        positions = (weights[name] != end).nonzero().squeeze(1)
        assert torch.equal(weights[name][positions], value(start)[positions])
        return set(positions.tolist())

    block = partition["all"]
    gain = where[2]
    begin = torch.Tensor.clone
    assert changed("intact") == set()
    assert torch.equal(weights["undo all"], start)
    assert changed("zero outliers") == set(where)
    assert changed("zero largest one") == {where[0]}
    assert changed("zero norm gains in outliers") == {gain}
    assert changed("zero other outliers") == set(where[:2])
    assert changed("undo outliers", begin) == set(where)
    assert changed("keep only outliers", begin) == set(range(block.numel)) - set(where)
    assert changed("zero largest start") == set(start.abs().topk(3).indices.tolist())
    gains = {place(block, "1.weight", index) for index in range(10)}
    assert changed("zero all norm gains") == gains
    assert len(changed("zero random")) == 3
    matched = changed("zero matched")
    assert matched.isdisjoint(where)  # as many per parameter, but others
    assert len(matched & gains) == 1
    assert len(matched & set(range(300))) == 2
    assert matched == changed("undo matched", begin)
    # the other random control: all others, which hold less of the sum of squares than the outliers
    equal, kept = changed("undo equal sum of squares", begin), changed("keep only equal sum of squares", begin)
    assert equal == set(range(block.numel)) - set(where)
    assert kept == set(range(block.numel)) - equal
    assert found["equal sum of squares"] == len(equal)
    # afterwards the model is as it was
    assert torch.equal(block.flatten(partition.select(model)), end)
    assert (found["disabled"], found["numbers"]) == (3, block.numel)


def test_a_control_holds_as_much_of_the_sum_of_squares(model: nn.Module, partition: Partition) -> None:
    """One outlier of size 4 holds as much as 16 others of size 1, which are drawn from all over the block."""
    block = partition["all"]
    start, update = torch.zeros(block.numel, dtype=torch.float64), torch.ones(block.numel, dtype=torch.float64)
    update[:160] = -1.0  # a mean of 0, nearly
    update[5] = 4.0
    drawn = set()
    for seed in range(3):
        found, seen = dissected(model, partition, start, update, seed)
        weights = dict(zip(found["scores"], seen, strict=True))
        undone = (weights["undo equal sum of squares"] == 0).nonzero().squeeze(1).tolist()
        assert len(undone) == found["equal sum of squares"] == 16
        assert 5 not in undone
        assert max(undone) > 160
        kept = weights["keep only equal sum of squares"]
        assert kept[undone].square().sum() == kept.square().sum() == 16
        drawn.add(tuple(undone))
    assert len(drawn) == 3


def test_the_statistics_are_those_worked_out_by_hand(
    model: nn.Module, partition: Partition, case: tuple[Tensor, Tensor, list[int]]
) -> None:
    start, update, where = case
    found = dissected(model, partition, start, update)[0]["blocks"]["all"]
    assert found["count"] == 3
    assert found["share"] == 3 / len(update)
    assert found["by_parameter"] == {"0.weight": 2, "0.bias": 0, "1.weight": 1, "1.bias": 0}
    assert found["sizes"] == {"0.weight": 300, "0.bias": 10, "1.weight": 10, "1.bias": 10}
    assert found["norm_gains"] == pytest.approx(1 / 3)
    assert found["norm_gains_found"] == pytest.approx(1 / 10)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(start, update, dim=0)))
    assert found["norm"] == pytest.approx(float(update.norm()))
    largest = set(start.abs().topk(3).indices.tolist())
    assert found["largest_start"] == pytest.approx(len(largest & set(where)) / 3)
    far = ((start - start.mean()) / start.std(correction=0)).abs()
    assert found["start"]["share"] == pytest.approx(float((far > 3).double().mean()))
    assert found["start"]["kurtosis"] == pytest.approx(float(far.pow(4).mean()))
    assert found["start_outliers"] == pytest.approx(int((far[where] > 3).sum()) / 3)
    # without its projection on theta_0 the update is orthogonal to it
    rest = update - (start @ update) / (start @ start) * start
    distance = ((rest - rest.mean()) / rest.std(correction=0)).abs()
    assert found["without_start"]["share"] == pytest.approx(float((distance > 3).double().mean()))
    assert found["without_start"]["kurtosis"] == pytest.approx(float(distance.pow(4).mean()))
    assert [(name, index) for name, index, _ in found["largest"]][:3] == [
        ("0.weight", 7),
        ("0.weight", 200),
        ("1.weight", 4),
    ]
    assert max(found["profile"]) == pytest.approx(found["largest"][0][2], abs=0.01)


def test_the_start_itself_explains_an_update_along_it(model: nn.Module, partition: Partition) -> None:
    """What the study looks for: an update along theta_0 has theta_0's outliers, and none without that part."""
    block = partition["all"]
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(block.numel, generator=generator, dtype=torch.float64)
    start[place(block, "1.weight", 0)] = 40.0
    noise = 0.001 * torch.randn(block.numel, generator=generator, dtype=torch.float64)
    found = dissected(model, partition, start, 0.01 * start + noise)[0]["blocks"]["all"]
    assert found["cosine"] > 0.95
    assert found["largest_start"] == found["start_outliers"] == 1.0
    assert found["kurtosis"] > 30
    assert found["without_start"]["kurtosis"] < 5


def test_matched_coordinates_are_never_outliers(model: nn.Module, partition: Partition) -> None:
    """Nearly all gains are outliers: there are fewer others than it takes to match them, and only these are zeroed."""
    block = partition["all"]
    start, update = torch.ones(block.numel, dtype=torch.float64), torch.zeros(block.numel, dtype=torch.float64)
    gains = [place(block, "1.weight", index) for index in range(10)]
    update[gains[:8]] = 1.0
    found, seen = dissected(model, partition, start, update)
    zeroed = (seen[list(found["scores"]).index("zero matched")] == 0).nonzero().squeeze(1).tolist()
    assert zeroed == gains[8:]
    assert (found["disabled"], found["matched"]) == (8, 2)


def test_outliers_of_one_update_in_a_model_that_made_another(model: nn.Module, partition: Partition) -> None:
    block = partition["all"]
    start, update = torch.ones(block.numel, dtype=torch.float64), torch.full((block.numel,), 2.0, dtype=torch.float64)
    judged = torch.zeros_like(update)
    judged[5] = 1.0
    seen: list[Tensor] = []

    def score() -> float:
        seen.append(block.flatten(partition.select(model)).clone())
        return 0.0

    put(model, block, start + update)
    found = dissect(model, partition, {"all": start}, {"all": update}, score, judged={"all": judged})
    weights = dict(zip(found["scores"], seen, strict=True))
    assert weights["zero outliers"].tolist() == [0.0 if index == 5 else 3.0 for index in range(block.numel)]
    assert weights["undo outliers"].tolist() == [1.0 if index == 5 else 3.0 for index in range(block.numel)]
    assert found["blocks"]["all"]["count"] == 1


def test_the_intact_model_is_the_one_that_was_given(
    model: nn.Module, partition: Partition, case: tuple[Tensor, Tensor, list[int]]
) -> None:
    """To the last bit: a correlation of nearly equal predictions shows a difference of one unit in the last place."""
    start, update, _ = case
    block, seen = partition["all"], []
    trained = torch.nextafter(start + update, torch.tensor(torch.inf, dtype=torch.float64))
    put(model, block, trained)

    def score() -> float:
        seen.append(block.flatten(partition.select(model)).clone())
        return 0.0

    found = dissect(model, partition, {"all": start}, {"all": update}, score)
    assert torch.equal(seen[list(found["scores"]).index("intact")], trained)
    assert torch.equal(block.flatten(partition.select(model)), trained)


def test_no_outliers_no_harm(model: nn.Module, partition: Partition) -> None:
    zeros = torch.zeros(partition.numel, dtype=torch.float64)
    found, _ = dissected(model, partition, zeros, zeros)
    assert found["disabled"] == 0
    assert found["blocks"]["all"]["largest_start"] == 0.0


def test_random_coordinates_follow_the_seed(
    model: nn.Module, partition: Partition, case: tuple[Tensor, Tensor, list[int]]
) -> None:
    start, update, _ = case
    state = torch.random.get_rng_state()
    one, again, other = (dissected(model, partition, start, update, seed)[1] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_norm_gains_are_found_by_the_modules_class(model: nn.Module) -> None:
    assert norm_gains(model) == {"1.weight"}
    assert norm_gains(nn.RMSNorm(3)) == {"weight"}
    assert norm_gains(nn.BatchNorm1d(3, affine=False)) == set()


def test_a_theta_0_or_an_update_of_zeros_has_no_direction(model: nn.Module, partition: Partition) -> None:
    """Cosines of a zero vector count as 0; what is written as JSON holds no NaN."""
    ones, zeros = torch.linspace(1, 2, partition.numel).double(), torch.zeros(partition.numel).double()
    for start, update in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        found, _ = dissected(model, partition, start, update)
        assert found["blocks"]["all"]["cosine"] == 0.0
        json.dumps(found, allow_nan=False)


def test_a_sick_update_is_refused(model: nn.Module, partition: Partition) -> None:
    ones = torch.ones(partition.numel, dtype=torch.float64)
    with pytest.raises(InputError, match="NaN or infinite"):
        dissected(model, partition, ones, ones * torch.nan)

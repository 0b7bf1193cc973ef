"""Outlier dimensions of an update and the effect of disabling them: the paper's experiment and its controls."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.analysis import envelope, outliers, standardized
from tinyspan.partition import Block, Partition

__all__ = ["STRETCHES", "dissect", "norm_gains"]

STRETCHES = 200  # segments of the envelope of |update| along a layer
TINY = 1e-300  # replaces the norm of a zero vector as divisor, so that its cosine is 0
Mask = Tensor  # [D_b] of bool
Change = Callable[[Tensor, Tensor, Mapping[str, Mask]], Tensor]  # theta_0, theta_0 + u, masks -> the weights


def dissect(
    model: nn.Module,
    partition: Partition,
    start: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    score: Callable[[], float],
    *,
    judged: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Find the coordinates where an update is an outlier, and score the model with these and others disabled.

    Per block, let O be the coordinates of the update u that are more than 3 sigma from its mean (Zhang et al. 2023,
    section 4.5), and theta = theta_0 + u. The changes of the weights, by name:

    - `intact`: none. `undo all`: theta_0 everywhere.
    - `zero outliers`: 0 at O, as in the paper. `zero random`: 0 at the same number of random coordinates, the paper's
      control. `zero matched`: 0 at random coordinates outside of O, in each parameter as many as O has there, if
    possible.
    - `zero largest one`: 0 at the largest outlier of each block only.
    - `zero norm gains in outliers`, `zero other outliers`: O split in two.
    - `undo outliers`: theta_0 at O. `keep only outliers`: theta_0 everywhere but at O. `undo matched`: theta_0 at the
      matched coordinates.
    - `undo equal sum of squares`, `keep only equal sum of squares`: the same two with random coordinates outside of O
      that hold at least as much of the sum of squares of the vector which determines O, in each block, if possible.
    - `zero largest start`: 0 at the |O| largest |theta_0|, independent of the update.
    - `zero all norm gains`: 0 at every gain of a normalisation.

    Args:
        model: a model with the weights theta_0 + u in the blocks, which are restored. They are read from the model,
            because a sum computed here could differ from them in the last bit.
        partition: the blocks.
        start: block -> theta_0 [D_b].
        update: block -> u [D_b].
        score: function that returns the score of the model in its present state.
        judged: vectors from which to compute O instead of u: the outliers of one update in the model of another one.
        seed: seed of the random coordinates.

    Returns:
        `scores`: name -> score; `blocks`: block -> statistics of the update that determines O (see `_statistics`);
            `disabled`, `matched` and `equal sum of squares`: the numbers of these coordinates in all blocks, and
            `numbers`: the number of all coordinates.
    """
    gains, judged = norm_gains(model), judged or update
    generator = torch.Generator().manual_seed(seed)
    masks: dict[str, dict[str, Mask]] = {}
    blocks: dict[str, dict[str, Any]] = {}
    for block in partition:
        masks[block.name] = _masks(block, start[block.name], judged[block.name], gains, generator)
        blocks[block.name] = _statistics(block, start[block.name], judged[block.name], gains)
    for block in partition:  # after all others, whose random coordinates stay those of earlier results
        own = masks[block.name]
        own["equal"] = _of_equal_sum(judged[block.name], own["outliers"], generator)
        own["all but equal"] = ~own["equal"]

    weights = partition.select(model)
    ends = {block.name: block.flatten(weights).to("cpu", copy=True) for block in partition}

    @torch.no_grad()
    def put(changed: Change) -> None:
        for block in partition:
            vector = changed(start[block.name], ends[block.name], masks[block.name])
            for name, value in block.unflatten(vector).items():
                weights[name].copy_(value)

    def scored(changed: Change) -> float:
        put(changed)
        return score()

    def zero(name: str) -> float:
        return scored(lambda _, end, chosen: torch.where(chosen[name], 0.0, end))

    def undo(name: str) -> float:
        return scored(lambda begin, end, chosen: torch.where(chosen[name], begin, end))

    def count(name: str) -> int:
        return sum(int(masks[block.name][name].sum()) for block in partition)

    scores = {
        "intact": scored(_end),
        "undo all": scored(lambda begin, end, chosen: begin),
        "zero outliers": zero("outliers"),
        "zero random": zero("random"),
        "zero matched": zero("matched"),
        "zero largest one": zero("largest one"),
        "zero norm gains in outliers": zero("norm gains in outliers"),
        "zero other outliers": zero("other outliers"),
        "undo outliers": undo("outliers"),
        "undo matched": undo("matched"),
        "keep only outliers": undo("all but outliers"),
        "undo equal sum of squares": undo("equal"),
        "keep only equal sum of squares": undo("all but equal"),
        "zero largest start": zero("largest start"),
        "zero all norm gains": zero("all norm gains"),
    }
    put(_end)
    return {
        "scores": scores,
        "blocks": blocks,
        "disabled": count("outliers"),
        "matched": count("matched"),
        "equal sum of squares": count("equal"),
        "numbers": partition.numel,
    }


def _end(begin: Tensor, end: Tensor, masks: Mapping[str, Mask]) -> Tensor:
    return end


def norm_gains(model: nn.Module) -> set[str]:
    """Return the names of the gains of the model's normalisations: the weights of LayerNorm, RMSNorm and the like."""
    return {
        f"{name}.weight".removeprefix(".")
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def _masks(block: Block, start: Tensor, update: Tensor, gains: set[str], generator: torch.Generator) -> dict[str, Mask]:
    distance = standardized(update).abs()
    outlying = distance > 3.0
    count = int(outlying.sum())
    is_gain = _gain_mask(block, gains)
    matched = torch.zeros_like(outlying)
    for _, a, b in block.spans():
        others = (~outlying[a:b]).nonzero().squeeze(1)
        order = torch.randperm(len(others), generator=generator)[: int(outlying[a:b].sum())]
        matched[a + others[order]] = True
    return {
        "outliers": outlying,
        "all but outliers": ~outlying,
        "norm gains in outliers": outlying & is_gain,
        "other outliers": outlying & ~is_gain,
        "largest one": _mask_of(distance.topk(min(1, count)).indices, outlying),
        "random": _mask_of(torch.randperm(block.numel, generator=generator)[:count], outlying),
        "matched": matched,
        "largest start": _mask_of(start.abs().topk(count).indices, outlying),
        "all norm gains": is_gain,
    }


def _of_equal_sum(update: Tensor, outlying: Mask, generator: torch.Generator) -> Mask:
    """Return random coordinates that are not outliers, the fewest in their order with at least their sum of squares."""
    others = (~outlying).nonzero().squeeze(1)
    others = others[torch.randperm(len(others), generator=generator)]
    squares = update.double().square()
    count = int((squares[others].cumsum(0) < squares[outlying].sum()).sum()) + 1
    return _mask_of(others[: count if outlying.any() else 0], outlying)


def _statistics(block: Block, start: Tensor, update: Tensor, gains: set[str]) -> dict[str, Any]:
    """Return statistics of one block's update.

    Returns:
        `count`, `share`, `kurtosis`, `by_parameter`, `largest` of `analysis.outliers`; `norm`: |u|; `cosine`: of u and
        theta_0; `largest_start`: share of the outliers among the same number of largest |theta_0|; `start_outliers`:
        share of the outliers that are beyond 3 sigma in theta_0; `norm_gains`: share of the outliers that are gains of
        normalisations, and `norm_gains_found`: share of these gains that are outliers; `without_start`: `share` and
        `kurtosis` of u minus its projection on theta_0; `start`: the same of theta_0 itself; `profile`: the largest |u
        - mean| / std of consecutive segments of equal length.
    """
    result = outliers(update, block)
    start, update = start.double(), update.double()
    mask = torch.zeros(block.numel, dtype=torch.bool)
    mask[result.indices] = True
    is_gain = _gain_mask(block, gains)
    along = float(start @ update / (start @ start).clamp(min=TINY))
    rest = update - along * start
    of_start = outliers(start, block)
    count = max(result.count, 1)
    return {
        "count": result.count,
        "numbers": block.numel,
        "share": result.share,
        "kurtosis": result.kurtosis,
        "by_parameter": {_short(name, block): number for name, number in result.by_parameter.items()},
        "sizes": {_short(spec.name, block): spec.numel for spec in block.parameters},
        "largest": [(_short(name, block), index, round(far, 2)) for name, index, far in result.largest],
        "norm": float(update.norm()),
        "cosine": along * float(start.norm() / update.norm().clamp(min=TINY)),
        "largest_start": float(mask[start.abs().topk(result.count).indices].sum()) / count,
        "start_outliers": float(mask[of_start.indices].sum()) / count,
        "norm_gains": float((mask & is_gain).sum()) / count,
        "norm_gains_found": float((mask & is_gain).sum()) / max(int(is_gain.sum()), 1),
        "without_start": _tail(rest, block),
        "start": {"share": of_start.share, "kurtosis": of_start.kurtosis},
        "profile": [round(height, 2) for height in envelope(update, STRETCHES).tolist()],
    }


def _tail(vector: Tensor, block: Block) -> dict[str, float]:
    result = outliers(vector, block)
    return {"share": result.share, "kurtosis": result.kurtosis}


def _gain_mask(block: Block, gains: set[str]) -> Mask:
    mask = torch.zeros(block.numel, dtype=torch.bool)
    for spec, a, b in block.spans():
        mask[a:b] = spec.name in gains
    return mask


def _mask_of(indices: Tensor, like: Mask) -> Mask:
    mask = torch.zeros_like(like)
    mask[indices] = True
    return mask


def _short(name: str, block: Block) -> str:
    return name.removeprefix(f"{block.name}.")

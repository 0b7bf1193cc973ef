"""Many points, many adapters: what they cost does not grow with their number."""

import copy
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from meter import Meter, transferred
from torch import Tensor
from towers import Tower

from tinyspan import Basis, SubspaceModel, Trajectory, TrajectoryRecorder, by_layer, random_basis, svd_basis

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="memory, files and bytes are counted by Linux"),
]
POINTS, ADAPTERS = 10_000, 1_000


class Walker:
    """A model that can be put where its run was at any step, or at the same step of another run."""

    def __init__(self) -> None:
        self.model = Tower().float().double()  # numbers of few digits: every delta comes back exactly
        self.partition = by_layer(self.model)
        self._parameters = self.partition.select(self.model)
        self._start = {name: value.detach().clone() for name, value in self._parameters.items()}

    def moved(self, step: int, run: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step + 2 * POINTS * run)
        return {
            block.name: (torch.randn(block.numel, generator=generator).double() * 128).round() / 1024
            for block in self.partition
        }

    @torch.no_grad()
    def go(self, step: int, run: int = 0) -> None:
        moved = self.moved(step, run)
        for block in self.partition:
            for name, value in block.unflatten(moved[block.name]).items():
                self._parameters[name].copy_(self._start[name] + value)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, walker = tmp_path_factory.mktemp("bounded") / "t", Walker()
    recorder, meter = TrajectoryRecorder(walker.model, walker.partition, folder), Meter("recording points")
    for step in meter.each(POINTS):
        walker.go(step)
        recorder.record(step)
        if (step + 1) % (POINTS // 10) == 0:
            recorder.flush()  # the meter counts threads
    recorder.seal()
    meter.check(megabytes=1.5)
    return folder


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process have at most 256 files open at once; usual limits are 1024 and more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_points_are_read(long_run: Path, few_files: None) -> None:
    walker, trajectory = Walker(), Trajectory(long_run)
    assert trajectory.steps == list(range(POINTS))
    assert (long_run / "manifest.json").stat().st_size < 20_000
    block = walker.partition.blocks[1]
    whole = torch.cat([piece for _, piece in trajectory.chunks(block)], dim=1)  # all of them at once
    for step in (0, 77, POINTS - 1):
        assert torch.equal(whole[step], walker.moved(step)[block.name])

    meter = Meter("reading one point of many")
    for unit in meter.each(1000):
        step = 7919 * unit % POINTS
        joined = torch.cat([piece for _, piece in trajectory.with_points([step]).chunks(block)], dim=1)
        assert torch.equal(joined[0], walker.moved(step)[block.name])
    meter.check(megabytes=1.5)

    steps = range(0, POINTS, POINTS // 20)
    for name, found in svd_basis(trajectory.with_points(steps), rank=20).maps.items():
        points = torch.stack([walker.moved(step)[name] for step in steps])
        span = torch.linalg.svd(points, full_matrices=False).Vh
        torch.testing.assert_close(
            found.directions.double().T @ found.directions.double(), span.T @ span, atol=1e-5, rtol=0
        )


def test_ten_thousand_points_go_on(long_run: Path, tmp_path: Path) -> None:
    """Points that are recorded again stay; the first that differs takes those after it away, one by one."""
    walker, folder = Walker(), shutil.copytree(long_run, tmp_path / "t")
    again, differs = POINTS - 400, POINTS - 200
    walker.go(again - 1)
    recorder, meter = TrajectoryRecorder.resume(walker.model, walker.partition, folder), Meter("recording again")
    for unit in meter.each(differs - again):
        walker.go(again + unit)
        recorder.record(again + unit)
    meter.check(megabytes=1.5)
    assert all(tenth.written == 0 for tenth in meter.tenths)

    walker.go(differs, run=1)
    journal, before = (folder / "points.jsonl").stat().st_size, transferred()
    recorder.record(differs)
    recorder.flush()
    read, written = (b - a for a, b in zip(before, transferred(), strict=True))
    assert read < 2 * journal
    assert written < 50_000  # the manifest and the point; the journal is not written again
    walker.go(differs + 1, run=1)
    recorder.record(differs + 1)
    trajectory = recorder.trajectory()
    assert trajectory.steps == list(range(differs + 2))
    for step, run in ((differs - 1, 0), (differs, 1), (differs + 1, 1)):
        for block in walker.partition:
            assert torch.equal(trajectory.delta(block, step), walker.moved(step, run)[block.name])


def test_a_thousand_adapters_on_one_basis(tmp_path: Path, tokens: Tensor) -> None:
    """Loaded, merged, unmerged and swapped, one after the other; a copy of the model takes a megabyte."""
    base, expected = Tower(width=128), list[Tensor]()
    random_basis(by_layer(base), 4).save_pretrained(tmp_path / "basis")
    basis = Basis.from_pretrained(tmp_path / "basis")

    meter = Meter("saving adapters")
    for unit in meter.each(ADAPTERS):
        made = SubspaceModel(copy.deepcopy(base), basis, modules_to_save=["head"], init_std=0.1, seed=unit)
        expected.append(made(tokens).detach())
        made.save_pretrained(tmp_path / f"adapters/{unit}")
    meter.check(megabytes=4)
    assert len({tuple(outputs.flatten().tolist()) for outputs in expected}) == ADAPTERS

    meter, one = Meter("loading adapters"), made
    for unit in meter.each(ADAPTERS):
        folder = tmp_path / f"adapters/{unit}"
        loaded = SubspaceModel.from_pretrained(copy.deepcopy(base), folder, None if unit % 2 else basis)
        assert torch.equal(loaded.merge()(tokens), expected[unit])
        loaded.unmerge()
        assert torch.equal(loaded(tokens), expected[unit])
        one.set_state({block.name: z for block, z in zip(loaded.blocks, loaded.z, strict=True)})
        assert torch.equal(one(tokens), expected[unit])
    meter.check(megabytes=4)

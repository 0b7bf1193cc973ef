"""Discovery in two processes, each of which holds half of every block, equals discovery in one."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tinyspan import Basis, InputError, MismatchError, Trajectory, TrajectoryRecorder, by_pattern, svd_basis
from tinyspan.linalg import TensorColumns, right_singular_vectors

BLOCKS = {"a": 5000, "b": 700, "still": 6}
POINTS = 6
SHARDS = 2


def walk(sizes: dict[str, tuple[int, int]], folder: Path, points: int = POINTS) -> Trajectory:
    """Record the coordinates `start` .. `stop` of every block of a run."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(stop - start)) for name, (start, stop) in sizes.items()})
    recorder = TrajectoryRecorder(model, by_pattern(model, {name: name for name in sizes}), folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in range(points):
            for name, (start, stop) in sizes.items():
                if name != "still":
                    model[name] += torch.randn(BLOCKS[name], generator=generator)[start:stop] * 10.0 ** -(step % 5)
            recorder.record(step)
    return recorder.trajectory()


def shard(rank: int) -> dict[str, tuple[int, int]]:
    """Cut every block into a short and a long part."""
    cuts = {name: (0, size // 3, size) for name, size in BLOCKS.items()}
    return {name: (cut[rank], cut[rank + 1]) for name, cut in cuts.items()}


def wide() -> Tensor:
    """W over five orders of magnitude, so that V takes one more pass."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.linalg.qr(torch.randn(4000, POINTS, generator=generator, dtype=torch.float64)).Q.T
    return torch.logspace(0, -5, POINTS, dtype=torch.float64)[:, None] * rows


def vectors(rows: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    return right_singular_vectors(TensorColumns(rows), lambda values: POINTS, torch.float32, "wide", group=group)


def one_process(rank: int, folder: Path) -> None:
    """What each of the processes does."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SHARDS, timeout=timedelta(seconds=60)
    )
    group: Any = torch.distributed.group.WORLD
    trajectory = walk(shard(rank), folder / f"walk{rank}")
    basis = svd_basis(trajectory, explained_variance=0.9999, group=group, folder=folder / f"basis{rank}")
    if rank == 0:
        (folder / "basis0/manifest.json").unlink()  # what is whole in one process alone, all of them make again
    svd_basis(trajectory, explained_variance=0.9999, group=group, folder=folder / f"basis{rank}", overwrite=True)
    again = Basis.from_pretrained(folder / f"basis{rank}")
    assert again.content_hash() == basis.content_hash()
    torch.save(vectors(wide().tensor_split((1234,), dim=1)[rank], group), folder / f"wide{rank}")
    short = walk(shard(rank), folder / f"short{rank}", POINTS - rank)
    with pytest.raises(MismatchError, match=r"process 1 .* has the steps \[\[0, 1, 2, 3, 4\]\], process 0 has"):
        svd_basis(short, rank=2, group=group)
    rows = torch.ones(POINTS, 10, dtype=torch.float64)
    rows[0, 0] = torch.nan if rank else 1.0
    with pytest.raises(InputError, match="'wide': the points hold NaN"):
        vectors(rows, group)
    torch.distributed.destroy_process_group()


def same_directions(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare singular vectors, whose signs are arbitrary and depend on the last digits of the Gram matrix."""
    signs = (found * expected).sum(1, keepdim=True).sign()
    torch.testing.assert_close(signs * found, expected, rtol=0, atol=1e-6)


@pytest.mark.processes
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (tmp_path,), nprocs=SHARDS)
    with pytest.warns(UserWarning, match="'still' does not move"):
        whole = svd_basis(walk({name: (0, size) for name, size in BLOCKS.items()}, tmp_path / "walk"), 6)
    bases = [Basis.from_pretrained(tmp_path / f"basis{rank}") for rank in range(SHARDS)]
    assert bases[0].ranks == bases[1].ranks
    assert 1 < bases[0].ranks["a"] < 6
    assert bases[0].content_hash() != bases[1].content_hash()
    assert [basis.construction["shard"] for basis in bases] == [0, 1]
    for name, k in bases[0].ranks.items():
        joined = torch.cat([basis.maps[name].tensors()["directions"] for basis in bases], dim=1)
        same_directions(joined, whole.maps[name].tensors()["directions"][:k])
        torch.testing.assert_close(bases[0].spectrum[name], whole.spectrum[name], rtol=1e-6, atol=0)
        assert torch.equal(bases[0].spectrum[name], bases[1].spectrum[name])
    found = [torch.load(tmp_path / f"wide{rank}") for rank in range(SHARDS)]
    values, directions = vectors(wide(), None)
    torch.testing.assert_close(found[0][0], values, rtol=1e-5, atol=0)
    joined = torch.cat([part for _, part in found], dim=1)
    same_directions(joined, directions)

"""How long do the directions of one layer of a base-size encoder take, and how right are they?

    python benchmarks/discovery.py --json docs/results/discovery.json

One block in memory (t = 32 points, D = 7,087,872, float32): `svd_basis`'s kernel beside `torch.linalg.svd`,
`torch.svd_lowrank`, a float32 Gram matrix, and the limit of the machine: the time for the bytes at the rate of a copy,
and for the operations at the rate of a large float64 product, both measured before and after the block. The distance
from the limit is that of a block whose V is written to memory that was used before, as it is for all blocks but the
first with `folder=`. In new memory the system adds the time to provide it. The same with singular values over five
orders of magnitude.

From disk: `svd_basis(..., folder=...)` of `--blocks` such layers beside reading the trajectory's files once and writing
as many bytes as the basis has once, best of `--runs` of each in turn, and the peak memory above that of the process
before. The system may have the files in its cache, in both.

In two processes: each has half of every block; their directions beside those of one process.

The whole encoder, 12 layers, from disk: `--from-disk --blocks 12 --runs 1`, which takes 23 GB there.

`--quick` leaves out `torch.svd_lowrank`, measures five orders of magnitude on an eighth of a block, and one layer once.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan import Trajectory, TrajectoryRecorder, analysis, by_pattern, svd_basis
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import write_json
from tinyspan.linalg import TensorColumns, right_singular_vectors
from tinyspan.workflows.hardware import hardware, peak_memory, reset_peak_memory

POINTS = 32
PIECE = 1 << 24  # bytes read and written at once
COPIED, MULTIPLIED = 1 << 27, 2048  # numbers of the copy and rows of the product that tell what the machine allows
REST = 5  # seconds before each measurement from disk, so that none finds memory that the one before has just freed
LARGE = 1 << 28  # bytes of a basis from which on that matters
Way = Callable[[Tensor], tuple[Tensor, Tensor]]


def walk(size: int, smallest: float, seed: int = 0) -> Tensor:
    """Points [t, D] whose singular values fall evenly, on a logarithmic scale, from 1 to `smallest`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(POINTS, size, generator=generator)
    rows /= size**0.5  # nearly orthonormal already
    mix = torch.linalg.qr(torch.randn(POINTS, POINTS, generator=generator, dtype=torch.float64)).Q
    scale = torch.logspace(0, torch.tensor(smallest).log10().item(), POINTS, dtype=torch.float64)
    return torch.cat([((mix * scale) @ piece.double()).float() for piece in rows.split(1 << 18, dim=1)], dim=1)


def tinyspan(rows: Tensor, group: Any = None, empty: Callable[..., Tensor] = torch.empty) -> tuple[Tensor, Tensor]:
    """What `svd_basis` does with a block."""
    return right_singular_vectors(
        TensorColumns(rows), lambda values: POINTS, torch.float32, "block", empty=empty, group=group
    )


def in_used_memory(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What `svd_basis(..., folder=...)` does with each block but the first: V takes the memory of the one before."""
    return tinyspan(rows, empty=lambda *shape, dtype: _used(shape))


@cache
def _used(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape)


def float32_gram(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The quick way, which squares the condition number in float32."""
    squares, left = torch.linalg.eigh(rows @ rows.T)
    values = squares.flip(0).clamp(min=1e-30).sqrt()
    return values, (left.flip(1).T / values[:, None]) @ rows


def dense_svd(rows: Tensor) -> tuple[Tensor, Tensor]:
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return values, directions


def lowrank(rows: Tensor) -> tuple[Tensor, Tensor]:
    _, values, directions = torch.svd_lowrank(rows, q=POINTS)
    return values, directions.T


FAST = (tinyspan, in_used_memory, float32_gram)


def reference(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and V in float64: QR of W^T by pieces in the cache would do, but plain and dense is surest."""
    q, r = torch.linalg.qr(rows.double().T)
    left, values, _ = torch.linalg.svd(r)
    return values, (q @ left).T


def orthogonality(directions: Tensor) -> float:
    gram = sum(piece.double() @ piece.double().T for piece in directions.split(1 << 18, dim=1))
    assert isinstance(gram, Tensor)
    return float((gram - torch.eye(len(directions))).abs().max())


def best_of(runs: int, call: Callable[[], Any]) -> tuple[float, Any]:
    seconds, found = float("inf"), None
    for _ in range(runs):
        found = None
        began = time.perf_counter()
        found = call()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds, found


def rates() -> tuple[float, float]:
    """Bytes per second of a copy, and operations per second of a large float64 product."""
    source, target = torch.ones(COPIED), torch.ones(COPIED)
    copying, _ = best_of(3, partial(target.copy_, source))
    square = torch.ones(MULTIPLIED, MULTIPLIED, dtype=torch.float64)
    multiplying, _ = best_of(3, partial(torch.mm, square, square, out=torch.empty_like(square)))
    return 2 * source.nbytes / copying, 2 * len(square) ** 3 / multiplying


def limit(size: int, bandwidth: float, rate: float) -> dict[str, float]:
    """What one block takes at least: reading the points twice and writing V once, and the products for G and V."""
    moved, operations = 3 * 4 * POINTS * size, POINTS * (POINTS + 1) * size + 2 * POINTS**2 * size
    return {
        "bytes moved": moved,
        "operations": operations,
        "bytes a second of a copy": bandwidth,
        "operations a second of a large float64 product": rate,
        "seconds at the speed of a copy": moved / bandwidth,
        "seconds at the speed of a product": operations / rate,
        "seconds": moved / bandwidth + operations / rate,
    }


def in_memory(size: int, spread: float, runs: int, ways: Sequence[Way]) -> dict[str, Any]:
    """Time and errors of some ways to get V of one block."""
    table: dict[str, Any] = {}
    rows = walk(size, spread)
    values, directions = reference(rows)
    for way in ways:
        seconds, (found, v) = best_of(runs if way in FAST else 1, partial(way, rows))
        k = len(v)
        half = POINTS // 2  # the span of the leading half: single vectors of close singular values may mix
        angle = float(analysis.principal_angles(v[:half], directions[:half].float()).max())
        table[way.__name__] = {
            "seconds": seconds,
            "orthogonality": orthogonality(v),
            "largest relative error of a singular value": float((found[:k].double() / values[:k] - 1).abs().max()),
            "largest angle of the leading half, rad": angle,
            "directions": k,
        }
        print(f"{way.__name__:>14} {spread:g}  {table[way.__name__]}", flush=True)
    return table


def read_once(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(PIECE):
                pass


def write_once(sizes: Sequence[int], folder: Path) -> None:
    """Write new files of so many bytes each, and flush them."""
    folder.mkdir()
    piece = bytes(PIECE)
    for number, size in enumerate(sizes):
        with (folder / str(number)).open("wb") as file:
            for start in range(0, size, PIECE):
                file.write(piece[: size - start])
            file.flush()
            os.fsync(file.fileno())


def record(size: int, blocks: int, folder: Path) -> Trajectory:
    model = nn.ParameterDict({f"layer{index}": nn.Parameter(torch.zeros(size)) for index in range(blocks)})
    recorder = TrajectoryRecorder(model, by_pattern(model, {name: name for name in model}), folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in range(POINTS):
            for parameter in model.values():
                parameter += torch.randn(size, generator=generator) * 1e-3
            recorder.record(step)
    return recorder.trajectory()


def from_disk(size: int, blocks: int, runs: int, folder: Path) -> dict[str, Any]:
    points = record(size, blocks, folder / "trajectory").folder
    seconds: dict[str, list[float]] = {"discovery": [], "reading": [], "writing": []}
    sizes = [POINTS * size * 4] * blocks

    def timed(name: str, call: Callable[[], Any]) -> None:
        os.sync()
        time.sleep(REST if sum(sizes) > LARGE else 0)
        began = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - began)

    for _ in range(runs):
        timed("reading", partial(read_once, points))
        timed("writing", partial(write_once, sizes, folder / "copy"))
        shutil.rmtree(folder / "copy")
        trajectory = Trajectory(points)  # its files are compared with their hashes anew
        reset_peak_memory()
        before = peak_memory()
        timed("discovery", partial(svd_basis, trajectory, POINTS, folder=folder / "basis"))
        above = peak_memory() - before - sizes[0]
        shutil.rmtree(folder / "basis")
    best = {name: min(runs) for name, runs in seconds.items()}
    return {
        "blocks": blocks,
        "bytes of points": sum(entry.bytes for entry in trajectory.files.values()),
        "bytes of the basis": sum(sizes),
        "seconds": seconds,
        "seconds of discovery": best["discovery"],
        "seconds to read the points once and to write the basis once": best["reading"] + best["writing"],
        "peak memory above one block's V, with the points' pages that the system has mapped": above,
    }


def shard(rank: int, size: int, folder: Path) -> None:
    """What each of two processes does with its half of the columns."""
    init = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    rows = walk(size, 1e-5).chunk(2, dim=1)[rank]
    torch.distributed.barrier()
    began = time.perf_counter()
    _, directions = tinyspan(rows, torch.distributed.group.WORLD)
    torch.save((time.perf_counter() - began, directions), folder / str(rank))
    torch.distributed.destroy_process_group()


def in_two_processes(size: int, folder: Path) -> dict[str, float]:
    torch.multiprocessing.spawn(shard, (size, folder), nprocs=2)
    halves = [torch.load(folder / str(rank)) for rank in range(2)]
    seconds, (_, directions) = best_of(1, partial(tinyspan, walk(size, 1e-5)))
    joined = torch.cat([half for _, half in halves], dim=1)
    return {
        "size": size,
        "largest difference": float((joined - directions).abs().max()),
        "seconds in two processes": max(seconds for seconds, _ in halves),
        "seconds in one": seconds,
    }


def claims_in_memory(
    usual: dict[str, Any], wide: dict[str, Any], least: float
) -> Iterator[tuple[str, float, float, bool]]:
    mine = usual["tinyspan"]
    ratio = usual["in_used_memory"]["seconds"] / least
    yield "time of one block over its limit", ratio, 1.5, ratio <= 1.5
    errors = {
        "orthogonality": 1e-6,
        "largest relative error of a singular value": 1e-5,
        "largest angle of the leading half, rad": 1e-5,
    }
    for spread, found in (("1e3", mine), ("1e5", wide["tinyspan"])):
        for name, bound in errors.items():
            yield f"{name}, singular values over {spread}", found[name], bound, found[name] <= bound


def claims_from_disk(disk: dict[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    ratio = disk["seconds of discovery"] / disk["seconds to read the points once and to write the basis once"]
    yield "time from disk over reading and writing once", ratio, 2.5, ratio <= 2.5
    memory = disk["peak memory above one block's V, with the points' pages that the system has mapped"]
    yield "bytes of memory above one block's V", memory, 2e9, memory <= 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=7_087_872, help="D")
    parser.add_argument("--blocks", type=int, default=2, help="of the trajectory on disk")
    parser.add_argument("--runs", type=int, default=3, help="best of so many, of the fast ways and from disk")
    parser.add_argument("--quick", action="store_true", help="what takes a minute")
    parser.add_argument("--from-disk", action="store_true", help="only that")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--scratch", type=Path, help="folder for the trajectory and the basis; a temporary one")
    arguments = parser.parse_args()
    size, quick, content, claims = arguments.size, arguments.quick, dict[str, Any](), list[Any]()
    if not arguments.from_disk:
        ways = [tinyspan, in_used_memory, float32_gram, dense_svd, lowrank]
        before = rates()
        usual = in_memory(size, 1e-3, arguments.runs, ways[:-1] if quick else ways)
        content["limit"] = limit(size, *map(max, before, rates()))
        content["times as fast as torch.linalg.svd"] = usual["dense_svd"]["seconds"] / usual["tinyspan"]["seconds"]
        wide = in_memory(size // 8 if quick else size, 1e-5, arguments.runs, ways[:2] if quick else ways)
        content["in memory"] = {"singular values over 1e3": usual, "singular values over 1e5": wide}
        claims += claims_in_memory(usual, wide, content["limit"]["seconds"])
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            content["two processes"] = in_two_processes(size // 8, Path(scratch))
        difference = content["two processes"]["largest difference"]
        claims += [("largest difference of two processes from one", difference, 1e-6, difference <= 1e-6)]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        blocks, runs = (1, 1) if quick else (arguments.blocks, arguments.runs)
        content["from disk"] = from_disk(size, blocks, runs, Path(scratch))
        claims += claims_from_disk(content["from disk"])
    for name in content.keys() - {"in memory"}:
        print(name, content[name])
    content["claims"] = [{"name": n, "value": v, "target": t, "holds": bool(h)} for n, v, t, h in claims]
    for claim in content["claims"]:
        verdict = "holds" if claim["holds"] else "FAILS"
        print(f"{verdict}  {claim['name']}: {claim['value']:.3g} (target {claim['target']:g})")
    if arguments.json:
        write_json(arguments.json, {**content, "hardware": hardware(), "versions": package_versions()})


if __name__ == "__main__":
    main()

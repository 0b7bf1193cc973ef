"""How long do the directions of one layer of a base-size encoder take, and how right are they?

    python benchmarks/discovery.py --json docs/results/discovery.json

One block in memory (t = 32 points, D = 7,087,872, float32): `svd_basis`'s kernel beside `torch.linalg.svd`,
`torch.svd_lowrank` and a float32 Gram matrix, in one run; the same with singular values over five orders of magnitude.
Then from disk: `svd_basis(..., folder=...)` of `--blocks` such layers beside reading the trajectory's files once and
writing the basis's files once, and the peak memory above that of the process before.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan import Trajectory, TrajectoryRecorder, analysis, by_pattern, svd_basis
from tinyspan.experiments.hardware import hardware, peak_memory, reset_peak_memory
from tinyspan.storage import package_versions, write_json
from tinyspan.svd import in_float64, piece_width, right_singular_vectors

POINTS = 32


def walk(size: int, smallest: float, seed: int = 0) -> Tensor:
    """Points [t, D] whose singular values fall evenly, on a logarithmic scale, from 1 to `smallest`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(POINTS, size, generator=generator)
    rows /= size**0.5  # nearly orthonormal already
    mix = torch.linalg.qr(torch.randn(POINTS, POINTS, generator=generator, dtype=torch.float64)).Q
    scale = torch.logspace(0, torch.tensor(smallest).log10().item(), POINTS, dtype=torch.float64)
    return torch.cat([((mix * scale) @ piece.double()).float() for piece in rows.split(1 << 18, dim=1)], dim=1)


def ours(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What `svd_basis` does with a block."""

    def pieces() -> Iterator[Tensor]:
        return in_float64(rows.split(piece_width(POINTS), dim=1))

    return right_singular_vectors(pieces, rows.shape[1], lambda values: POINTS, torch.float32, "block")


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


def in_memory(size: int, runs: int) -> dict[str, Any]:
    ways = {"tinyspan": ours, "float32 Gram": float32_gram, "linalg.svd": dense_svd, "svd_lowrank": lowrank}
    table: dict[str, Any] = {}
    for spread in (1e-3, 1e-5):
        rows = walk(size, spread)
        values, directions = reference(rows)
        for name, way in ways.items():
            seconds, (found, v) = best_of(runs if name in ("tinyspan", "float32 Gram") else 1, partial(way, rows))
            k = len(v)
            half = POINTS // 2  # the span of the leading half: single vectors of close singular values may mix
            angle = float(analysis.principal_angles(v[:half], directions[:half].float()).max())
            table[f"{name}, spread {spread:g}"] = {
                "seconds": seconds,
                "orthogonality": orthogonality(v),
                "largest relative error of a singular value": float((found[:k].double() / values[:k] - 1).abs().max()),
                "largest angle of the leading half, rad": angle,
                "directions": k,
            }
            print(f"{name:>14} {spread:g}  {table[f'{name}, spread {spread:g}']}", flush=True)
        del rows, directions
    return table


def from_disk(size: int, blocks: int, folder: Path) -> dict[str, Any]:
    model = nn.ParameterDict({f"layer{index}": nn.Parameter(torch.zeros(size)) for index in range(blocks)})
    partition = by_pattern(model, {name: name for name in model})
    recorder = TrajectoryRecorder(model, partition, folder / "trajectory")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in range(POINTS):
            for parameter in model.values():
                parameter += torch.randn(size, generator=generator) * 1e-3
            recorder.record(step)
    del model, recorder
    trajectory = Trajectory(folder / "trajectory")
    began = time.perf_counter()
    for path in sorted((folder / "trajectory/points").iterdir()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    reading = time.perf_counter() - began
    reset_peak_memory()
    before = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024 if peak_memory() == 0 else peak_memory()
    began = time.perf_counter()
    basis = svd_basis(trajectory, POINTS, folder=folder / "basis")
    seconds = time.perf_counter() - began
    above = peak_memory() - before - POINTS * size * 4
    began = time.perf_counter()
    for path in sorted((folder / "basis").glob("*.safetensors")):
        with (folder / "copy").open("wb") as file:
            file.write(path.read_bytes())
            os.fsync(file.fileno())
    writing = time.perf_counter() - began
    return {
        "blocks": blocks,
        "bytes of points": sum(entry.bytes for entry in trajectory.manifest.files.values()),
        "seconds": seconds,
        "seconds to read the points once": reading,
        "seconds to write the basis once": writing,
        "peak memory above one block's V": above,
        "rank": basis.rank,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=7_087_872, help="D")
    parser.add_argument("--blocks", type=int, default=2, help="of the trajectory on disk")
    parser.add_argument("--runs", type=int, default=3, help="best of so many, of the fast ways")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    table = in_memory(arguments.size, arguments.runs)
    with tempfile.TemporaryDirectory() as scratch:
        disk = from_disk(arguments.size, arguments.blocks, Path(scratch))
    print(disk)
    mine, theirs = table["tinyspan, spread 0.001"], table["linalg.svd, spread 0.001"]
    wide = table["tinyspan, spread 1e-05"]
    ratio = theirs["seconds"] / mine["seconds"]
    limit = disk["seconds to read the points once"] + disk["seconds to write the basis once"]
    claims = [
        ("times as fast as torch.linalg.svd", ratio, 30, ratio >= 30),
        ("orthogonality error", mine["orthogonality"], 1e-6, mine["orthogonality"] <= 1e-6),
        ("the same, singular values over 1e5", wide["orthogonality"], 1e-6, wide["orthogonality"] <= 1e-6),
        *(
            (f"{name}, over 1e5", wide[name], 1e-5, wide[name] <= 1e-5)
            for name in ("largest relative error of a singular value", "largest angle of the leading half, rad")
        ),
        ("time over reading and writing once", disk["seconds"] / limit, 2, disk["seconds"] <= 2 * limit),
        (
            "bytes of memory above one block's V",
            disk["peak memory above one block's V"],
            2e9,
            disk["peak memory above one block's V"] <= 2e9,
        ),
    ]
    report = [{"name": n, "value": v, "target": t, "holds": bool(h)} for n, v, t, h in claims]
    for claim in report:
        verdict = "holds" if claim["holds"] else "FAILS"
        print(f"{verdict}  {claim['name']}: {claim['value']:.3g} (target {claim['target']:g})")
    if arguments.json:
        content = {"in memory": table, "from disk": disk, "claims": report}
        write_json(arguments.json, {**content, "hardware": hardware(), "versions": package_versions()})


if __name__ == "__main__":
    main()

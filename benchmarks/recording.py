"""What does recording a trajectory add to training time, what does a point take on disk, and what does bfloat16 lose?

    python benchmarks/recording.py --base --json docs/results/recording.json

The embedded encoder is trained by AdamW on real text (with `--base` a randomly initialised one of 12 layers of width
768 besides), in blocks of a few steps that take turns: without recording; with one point, taken before the first step
and written during the others, in float32 and in bfloat16; and with one that is flushed before training goes on. All
blocks of a round train on the same batches. A block ends when its point is on disk, so all that a point costs is in its
block; that, over the time of 50 steps, is what one point per 50 steps adds.

Then one run is recorded in both dtypes at once, and its directions are compared.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, DataCollatorWithPadding
from transformers.utils import logging

from tinyspan import Trajectory, TrajectoryRecorder, by_layer, svd_basis
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import write_json
from tinyspan.lab.demo import Plan
from tinyspan.workflows.hardware import hardware
from tinyspan.workflows.models import base_model, load_pretrained
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.settings import Settings

PLAN, STEPS = Plan(), 50
WAYS = {"without": None, "float32": None, "bfloat16": torch.bfloat16, "float32, flushed": None}
Batch = dict[str, torch.Tensor]


class Training:
    """A model, its optimizer, and steps of it on batches of real text."""

    def __init__(self, model: nn.Module, prepared: Prepared, settings: Settings) -> None:
        self.model, self.autocast = model.train(), settings.autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate)
        loader = DataLoader(
            prepared.train,  # type: ignore[arg-type]
            settings.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(0),
            collate_fn=DataCollatorWithPadding(prepared.tokenizer),
        )
        self.batches: Iterator[Batch] = (
            dict(batch) for batch in itertools.chain.from_iterable(itertools.repeat(loader))
        )

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def blocks(training: Training, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Time blocks of training that take turns; returns seconds, and the bytes of a point."""
    partition = by_layer(training.model)
    recorders = {
        way: TrajectoryRecorder(training.model, partition, folder / way, dtype=dtype)
        for way, dtype in WAYS.items()
        if way != "without"
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    calls: dict[str, list[float]] = {way: [] for way in recorders}
    ways = list(WAYS)
    training.step(next(training.batches))  # makes the optimizer's state
    for number in range(rounds):
        batches = list(itertools.islice(training.batches, steps))
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            began = time.perf_counter()
            if way != "without":
                recorders[way].record(number)
                if way == "float32, flushed":
                    recorders[way].flush()
                calls[way].append(time.perf_counter() - began)
            for batch in batches:
                training.step(batch)
            if way != "without":
                recorders[way].flush()
            seconds[way].append(time.perf_counter() - began)
    step = median(seconds["without"]) / steps
    found: dict[str, Any] = {
        "parameters in the blocks": partition.numel,
        "seconds per step": step,
        "steps per block": steps,
        "blocks of each way": rounds,
    }
    for way, recorder in recorders.items():
        added = np.array(seconds[way]) - np.array(seconds["without"])
        entry = recorder.trajectory().files["points/000001.safetensors"]
        found[way] = {
            "seconds per block": seconds[way],
            "seconds in the call, median": median(calls[way]),
            "seconds added by a point": spread(added),
            f"added at one point per {STEPS} steps": spread(added / (STEPS * step)),
            "bytes of a point": entry.bytes,
        }
    found["without"] = {"seconds per block": seconds["without"]}
    return found


def spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return the median, and its 95 % interval by resampling."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def rounding(training: Training, folder: Path, points: int, every: int) -> dict[str, Any]:
    """Record one run in both dtypes and compare its directions block by block."""
    partition = by_layer(training.model)
    recorders = [
        TrajectoryRecorder(training.model, partition, folder / f"rounding-{dtype}", every=every, dtype=dtype)
        for dtype in (None, torch.bfloat16)
    ]
    for number, batch in enumerate(itertools.islice(training.batches, points * every)):
        training.step(batch)
        for recorder in recorders:
            recorder.record(number)
    whole, half = (recorder.trajectory() for recorder in recorders)
    exact, rounded = (svd_basis(trajectory, points) for trajectory in (whole, half))
    found: dict[str, Any] = {"points": points, "steps between points": every, "relative rounding": noise(whole, half)}
    relative = {name: values / values[0] for name, values in exact.spectrum.items()}
    errors = {name: (rounded.spectrum[name] / values - 1).abs() for name, values in exact.spectrum.items()}
    turned = {
        block.name: angles(*(basis.maps[block.name].directions for basis in (exact, rounded))) for block in partition
    }
    for k in sorted({min(k, points) for k in (8, 16, 32)}):
        found[f"k = {k}"] = {
            "smallest singular value, over the largest": min(float(values[k - 1]) for values in relative.values()),
            "largest relative error of a singular value": max(float(values[:k].max()) for values in errors.values()),
            "largest principal angle, rad": max(each[k - 1] for each in turned.values()),
            "median over the blocks of that angle": median(each[k - 1] for each in turned.values()),
        }
    for limit in (0.01, 0.1, 0.5):
        found[f"singular value, over the largest, above which every angle is below {limit}"] = max(
            (float(relative[name][k]) for name in turned for k, angle in enumerate(turned[name]) if angle >= limit),
            default=0.0,
        )
    return found


def angles(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Return for every k the largest principal angle between the leading k rows of each, from one Gram matrix."""
    k = min(len(first), len(second))
    gram = torch.zeros(2 * k, 2 * k, dtype=torch.float64)
    for a, b in zip(first[:k].split(1 << 16, dim=1), second[:k].split(1 << 16, dim=1), strict=True):
        rows = torch.cat([a, b]).double()
        gram += rows @ rows.T
    left, right = (torch.linalg.cholesky(part) for part in (gram[:k, :k], gram[k:, k:]))  # float32 rows are nearly so
    cosines = torch.linalg.solve_triangular(left, gram[:k, k:], upper=False)
    cosines = torch.linalg.solve_triangular(right, cosines.T, upper=False)
    smallest = [float(torch.linalg.svdvals(cosines[:n, :n])[-1]) for n in range(1, k + 1)]
    return [max(0.0, 1 - cosine**2) ** 0.5 for cosine in smallest]


def noise(whole: Trajectory, half: Trajectory) -> dict[str, float]:
    """Return how much the rounding changes the numbers of the last point, relative to each: at most, and on average."""
    largest, squares, count = 0.0, 0.0, 0
    for block in whole.partition:
        exact, rounded = whole.delta(block).double(), half.delta(block).double()
        share = ((rounded - exact) / exact)[exact != 0]
        largest, squares = max(largest, float(share.abs().max())), squares + float(share.square().sum())
        count += len(share)
    return {"largest": largest, "root mean square": (squares / count) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of a block; the write must fit into them")
    parser.add_argument("--rounds", type=int, default=8, help="blocks of each way; 0 leaves the embedded encoder out")
    parser.add_argument("--base", action="store_true", help="an encoder of 12 layers of width 768, too")
    parser.add_argument("--base-rounds", type=int, default=8, help="blocks of two steps of each way, of that encoder")
    parser.add_argument("--points", type=int, default=32, help="of the run that is recorded in both dtypes; 0: none")
    parser.add_argument("--quick", action="store_true", help="4 rounds and 12 points, in a minute: a trial, no result")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rounds, points = (4, 12) if arguments.quick else (arguments.rounds, arguments.points)
    prepared = prepare(PLAN.model, PLAN.task, max_length=PLAN.max_length, train_rows=PLAN.train_rows)
    settings = PLAN.settings(0)
    torch.manual_seed(0)
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if rounds:
            training = Training(base_model(PLAN.model, prepared.task, 0), prepared, settings)
            content["minilm"] = blocks(training, Path(scratch), arguments.steps, rounds)
        if points:
            training = Training(base_model(PLAN.model, prepared.task, 0), prepared, settings)
            content["rounding"] = rounding(training, Path(scratch), points, every=3)
    if arguments.base:
        vocabulary = load_pretrained(AutoConfig, PLAN.model).vocab_size
        model = BertForSequenceClassification(BertConfig(vocab_size=vocabulary))
        with tempfile.TemporaryDirectory() as scratch:
            content["base"] = blocks(Training(model, prepared, settings), Path(scratch), 2, arguments.base_rounds)
    report: list[dict[str, Any]] = []
    print(
        f"| encoder | recording | seconds per step | added at one point per {STEPS} steps | in the call | MB a point |"
    )
    print("|---|---|---|---|---|---|")
    for name in (name for name in ("minilm", "base") if name in content):
        step = content[name]["seconds per step"]
        for way in list(WAYS)[1:]:
            found = content[name][way]
            added = found[f"added at one point per {STEPS} steps"]
            share = f"{added['median']:.2%} ({added['low']:.2%} to {added['high']:.2%})"
            call, megabytes = found["seconds in the call, median"], found["bytes of a point"] / 1e6
            print(f"| {name} | {way} | {step:.3f} | {share} | {call:.3f} s | {megabytes:.1f} |")
            if way != "float32, flushed":
                value = added["median"]
                what = f"time added at one point per {STEPS} steps, {name}, {way}"
                report.append({"name": what, "value": value, "target": 0.03, "holds": value <= 0.03})
        sizes = [content[name][way]["bytes of a point"] for way in ("bfloat16", "float32")]
        ratio = sizes[0] / sizes[1]
        what = f"bytes of a point in bfloat16 over float32, {name}"
        report.append({"name": what, "value": ratio, "target": 0.51, "holds": ratio <= 0.51})
    for name, value in content.get("rounding", {}).items():
        print(f"rounding, {name}: {value}")
    for claim in report:
        verdict = "holds" if claim["holds"] else "FAILS"
        print(f"{verdict}  {claim['name']}: {claim['value']:.3g} (target {claim['target']})")
    if arguments.json:
        content |= {"claims": report, "hardware": hardware(), "versions": package_versions()}
        write_json(arguments.json, content)


if __name__ == "__main__":
    main()

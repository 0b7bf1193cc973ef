"""What does a sparse basis do? Score against bytes, beside full fine-tuning, controls, and PEFT's methods.

    python benchmarks/density.py --run --workers 2 --data DIR --output runs/density --json docs/results/density.json
    python benchmarks/density.py --render --json docs/results/density.json --images docs/images

Every method trains the same head directly, on the same rows, for the same steps, with AdamW and a rate that
falls to 0 linearly; a regression starts at the mean of its labels (`--regression-start`). Full fine-tuning trains all
else too, the others freeze the embeddings. Its path is recorded once per task and seed, and every basis is taken from
that. `--output` holds one file for every finished run, which is never made again: kill the command at any moment and
repeat it, with more tasks or seeds too. The runs are ordered so that what is there at any moment says something: first
all that learning rates are chosen by, then seed by seed.

The rule for learning rates: every method has three, a factor of 3 apart, and takes the one with the best mean score on
SST-2 and QNLI, seed 0, of training rows that no run trains on. If the best one is at the end of its range the next one
is tried too, at most twice. (MRPC says nothing here: of 1,000 rows full fine-tuning learns to score 71 where the larger
class is 68.) The head has one rate under all methods but freeze, which has no other. Directions in int8 take the rate
of those in float32. Scores that are told are of validation rows.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from shutil import rmtree
from typing import Any

import study
import torch
from matplotlib.figure import Figure
from methods import PEFT, bytes_in, heads, in_basis, with_peft
from study import Run, difference, means, rows_of, start_of, surely_at_most, told_rate, train
from torch import Tensor, nn
from transformers import TrainerCallback

from tinyspan import Basis, SubspaceModel, Trajectory, by_layer, empty_basis, svd_basis
from tinyspan.io.folders import Busy, claimed
from tinyspan.lab.summary import markdown, summarize
from tinyspan.partition import Block
from tinyspan.workflows.hardware import seeded

CHOICE_TASKS = ("sst2", "qnli")
DENSITIES = {"dense": 1.0, "10 %": 0.1, "1 %": 0.01, "0.3 %": 0.003, "0.1 %": 0.001}
CENTRES = {  # method -> the middle one of its first three learning rates
    "full": 2e-4,
    "freeze": 1e-3,
    "dense": 2e-2,
    "10 %": 2e-2,
    "1 %": 4e-2,
    "0.3 %": 6e-2,
    "0.1 %": 1e-1,
    "1 %, random": 1e-1,
    "1 %, largest weights": 1e-1,
    "1 %, whole rows": 4e-2,
    "LoRA r = 1": 3e-3,
    "LoRA r = 8": 2e-3,
    "VeRA": 1e-2,
    "Uni-LoRA": 5e-3,
    "TinyLoRA": 1e-2,
}
ROUNDED = {"1 %, int8": "1 %", "0.1 %, int8": "0.1 %"}  # method -> the one whose rate it takes
METHODS = [*CENTRES, *ROUNDED]
Results = study.Results[Run]


@dataclass(frozen=True)
class Plan(study.Plan):
    """What all runs have in common; the defaults take about an hour on two cores."""

    epochs: int = 3


# -- training ---------------------------------------------------------------------------------------------------------


class Density(study.Study[Run]):
    """The runs of all methods."""

    def cells(self) -> list[Run]:
        """Return all runs that are known so far, the first to make first."""
        return schedule(self.arguments, self.finished())[0]

    def fine_tuned(self, run: Run, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
        """Train one method at one rate on one task, and return its scores and bytes.

        Raises:
            Busy: another process works on the trajectory that this run needs.
        """
        rows, choice = rows_of(self.plan, run.task, self.arguments.data)
        if run.method not in {"full", "freeze", *PEFT}:
            trajectory = self.path(replace(run, method="full", rate=chosen(self.finished())["full"]))
        model = start_of(self.plan, rows, run.seed)
        head = heads(model, by_layer(model))
        with seeded(run.seed):
            if run.method == "full":
                module: nn.Module = model
            elif run.method == "freeze":
                module = in_basis(model, empty_basis(by_layer(model)))
            elif run.method in PEFT:
                module = with_peft(model, run.method)
            else:
                module = in_basis(model, basis_of(run.method, trajectory, self.plan.rank, run.seed))
        settings = self.plan.settings(run.seed, epochs=self.plan.epochs)
        result = train(
            module, run, settings, rows, choice, head=head, head_rate=self.plan.head_rate, callbacks=callbacks
        )
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            if isinstance(module, SubspaceModel):
                module.save_pretrained(Path(scratch) / "adapter", self_contained=True)
            else:
                module.save_pretrained(Path(scratch) / "adapter")  # type: ignore[operator]
            return {**result, "bytes": bytes_in(Path(scratch) / "adapter")}

    def clean(self) -> None:
        """Take away the trajectories that no run will need, unless another process does."""
        trajectories = self.folder / "trajectories"
        with suppress(Busy), claimed(trajectories):
            results = self.finished()
            runs, complete = schedule(self.arguments, results)
            rates = chosen(results)
            if "full" not in rates:
                return
            unfinished = {(run.task, run.seed) for run in runs if run not in results}
            if not complete:
                unfinished |= {(task, 0) for task in CHOICE_TASKS}
            needed = {self.path_folder(Run("full", rates["full"], *of)) for of in unfinished}
            for folder in trajectories.glob("*-*-*"):
                if folder not in needed:
                    rmtree(folder)

    def tell(self, content: dict[str, Any], results: Results) -> None:
        """Tell of the tasks and seeds that were asked for alone."""
        tasks, seeds = self.arguments.tasks, self.arguments.seeds
        content["plan"] |= {"tasks": tasks, "choice tasks": CHOICE_TASKS}
        content["runs"] = [run for run in content["runs"] if run["task"] in tasks and run["seed"] < seeds]
        methods = {run["method"] for run in content["runs"]}
        content["learning rates"] = {
            method: told_rate(rate, choice_scores(ROUNDED.get(method, method), results))
            for method, rate in chosen(results).items()
            if method in methods
        }
        content["claims"] = claims(content)


# -- bases ------------------------------------------------------------------------------------------------------------


def basis_of(method: str, trajectory: Trajectory, rank: int, seed: int) -> Basis:
    """Return the basis a method trains in."""
    density, _, kind = method.partition(", ")
    if kind in ("", "int8"):
        dtype = torch.int8 if kind else torch.float32
        return svd_basis(trajectory, rank, density=DENSITIES[density], dtype=dtype)
    choose = {"random": random_coordinates, "largest weights": largest_weights, "whole rows": whole_rows}[kind]
    coordinates = {
        block.name: choose(trajectory, block, max(1, round(DENSITIES[density] * block.numel)), seed).sort().values
        for block in trajectory.partition
    }
    return svd_basis(trajectory, rank, coordinates=coordinates)


def random_coordinates(trajectory: Trajectory, block: Block, count: int, seed: int) -> Tensor:
    return torch.randperm(block.numel, generator=torch.Generator().manual_seed(seed))[:count]


def largest_weights(trajectory: Trajectory, block: Block, count: int, seed: int) -> Tensor:
    """Return the coordinates of the largest |theta_0|."""
    return trajectory.start(block).abs().topk(count).indices


def whole_rows(trajectory: Trajectory, block: Block, count: int, seed: int) -> Tensor:
    """Return the rows of weight matrices that move most in the mean square, whole but for the last one."""
    moved = torch.cat([deltas.double().square().sum(0) for _, deltas in trajectory.chunks(block)])
    rows = []
    for spec, start, stop in block.spans():
        if len(spec.shape) == 2:
            width = spec.shape[1]
            means = moved[start:stop].view(spec.shape).mean(1).tolist()
            rows += [(mean, start + index * width, width) for index, mean in enumerate(means)]
    rows.sort(reverse=True)
    return torch.cat([torch.arange(start, start + width) for _, start, width in rows])[:count]


# -- which runs, and in which order -----------------------------------------------------------------------------------


def runs_at(method: str, rate: float) -> list[Run]:
    """Return the runs by which a rate is judged."""
    return [Run(method, rate, task, 0) for task in CHOICE_TASKS]


def choice_scores(method: str, results: Results) -> dict[float, float | None]:
    """Return the rates of a method that are to be tried so far, with their scores."""
    return study.choice_scores(CENTRES[method], partial(runs_at, method), results)


def chosen(results: Results) -> dict[str, float]:
    """Return the rate of every method whose search is finished."""
    rates = study.chosen(CENTRES, lambda method: choice_scores(method, results))
    return rates | {method: rates[wide] for method, wide in ROUNDED.items() if wide in rates}


def schedule(asked: argparse.Namespace, results: Results) -> tuple[list[Run], bool]:
    """Return all runs that are known so far, the first to make first, and whether these are all."""
    methods = asked.methods
    rates = {method: rate for method, rate in chosen(results).items() if method in methods}
    searched = dict.fromkeys(ROUNDED.get(method, method) for method in (methods if "full" in rates else ["full"]))
    runs = [run for method in searched for rate in choice_scores(method, results) for run in runs_at(method, rate)]
    for seed, task, method in product(range(asked.seeds), asked.tasks, methods):
        if method in rates:
            runs.append(Run(method, rates[method], task, seed))
    return list(dict.fromkeys(runs)), len(rates) == len(methods)


# -- what they say ----------------------------------------------------------------------------------------------------


def size_of(content: Mapping[str, Any], method: str) -> float | None:
    """Return the bytes of a method's folder without the head's numbers, the mean of its runs."""
    sizes = [run["bytes"] - 4 * run["head"] for run in content["runs"] if run["method"] == method and "bytes" in run]
    return sum(sizes) / len(sizes) if sizes else None


def claims(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what holds of the means over seeds, with half of the 95 % interval of each difference.

    That one method beats another holds if the interval is above 0, and that it is at most so much above if the interval
    is below that.
    """
    found = []

    def add(name: str, value: float | None, target: float, holds: bool, interval: float | None) -> None:
        if value is not None:
            found.append({"name": name, "value": value, "target": target, "holds": holds, "interval": interval})

    within = [("full", "1 %"), ("dense", "1 %"), ("dense", "0.3 %"), ("dense", "0.1 %"), ("1 %", "1 %, int8")]
    for better, worse in [*within, ("0.1 %", "0.1 %, int8"), ("LoRA r = 8", "0.1 %"), ("LoRA r = 1", "0.1 %")]:
        lost = difference(content, better, worse)
        name = f"points that {better} is above {worse}, at most"
        add(name, lost.mean, 1, surely_at_most(lost, 1), lost.half)
    for control in ("1 %, random", "1 %, largest weights", "1 %, whole rows"):
        gained = difference(content, "1 %", control)
        holds = gained.mean is not None and gained.half is not None and gained.mean - gained.half > 0
        add(f"points that 1 % is above {control}, surely more than", gained.mean, 0, holds, gained.half)
    for ours, theirs in product(("1 %", "1 %, int8", "0.3 %", "0.1 %", "0.1 %, int8"), ("LoRA r = 8", "LoRA r = 1")):
        sizes = size_of(content, ours), size_of(content, theirs)
        if sizes[0] is not None and sizes[1] is not None:
            ratio = sizes[0] / sizes[1]
            add(f"bytes of {ours}, its basis included, over those of {theirs}", ratio, 1, ratio <= 1, None)
    return found


def tables(content: Mapping[str, Any]) -> str:
    """Return a Markdown table of all methods."""
    lines = []
    for method in METHODS:
        rate, size = content["learning rates"].get(method), size_of(content, method)
        if rate is None or size is None:
            continue
        run = next(run for run in content["runs"] if run["method"] == method and "bytes" in run)
        chosen_rate = f"{rate['chosen']:g}" + (" (edge)" if rate["at the edge"] else "")
        size_with_head = f"{(size + 4 * run['head']) / 1e6:,.3f}"
        shown = summarize(means(content, method)).shown("{:.1f}")
        lines.append([method, chosen_rate, shown, f"{run['trained']:,}", f"{size / 1e6:,.3f}", size_with_head])
    tasks = ", ".join(content["plan"]["tasks"])
    header = [
        "method",
        "rate",
        f"score on {tasks}, mean ± 95 %",
        "numbers trained beside the head",
        "MB",
        "MB with head",
    ]
    return markdown(header, lines)


def figure(content: Mapping[str, Any]) -> Figure:
    """Draw the score against the bytes: one line for our densities, points for all else."""
    drawn = Figure(figsize=(9, 5), layout="constrained")
    axes = drawn.subplots()

    def place(method: str) -> tuple[float, float, float] | None:
        mean, size = summarize(means(content, method)), size_of(content, method)
        return None if mean.mean is None or size is None else (size, mean.mean, mean.half or 0.0)

    def draw(methods: Sequence[str], style: str, label: str, colour: str, below: int, tilt: int = 0) -> None:
        known = [(method, at) for method in methods if (at := place(method)) is not None]
        if known:
            sizes, scores, halves = zip(*(at for _, at in known), strict=True)
            axes.errorbar(sizes, scores, halves, fmt=style, color=colour, capsize=3, label=label, elinewidth=0.8)
        for method, (size, score, half) in known:
            place_at = (size, score + half if tilt else score)
            at = {"xy": place_at, "xytext": (2 if tilt else 6, -below), "textcoords": "offset points"}
            upright = "bottom" if tilt else "center"
            axes.annotate(method, **at, fontsize=8, color=colour, va=upright, rotation=tilt)  # type: ignore[arg-type]

    draw(list(DENSITIES), "o-", "trained in k directions, by density; the adapter carries its basis", "#d1495b", 14)
    draw([f"{density}, int8" for density in DENSITIES], "s", "the same, directions in int8", "#b97a12", 26)
    draw(["1 %, random", "1 %, largest weights", "1 %, whole rows"], "x", "controls: other coordinates", "#7b5ea7", 6)
    crowded = [method for method in PEFT if method != "TinyLoRA"]
    draw(crowded, "D", "PEFT", "#3d7ea6", -1, tilt=50)
    draw(["TinyLoRA"], "D", "_PEFT", "#3d7ea6", -14)  # told once
    for method, style in (("full", "-"), ("freeze", ":")):
        if (at := place(method)) is not None:
            axes.axhline(at[1], color="#3b3b3b", linestyle=style, linewidth=1, label=method)
            axes.axhspan(at[1] - at[2], at[1] + at[2], color="#3b3b3b", alpha=0.07)
    axes.set_xscale("log")
    means_drawn = [at[1] for method in METHODS if (at := place(method)) is not None]
    if means_drawn:  # the intervals of methods that fail with one seed in three go far beyond
        axes.set_ylim(min(means_drawn) - 4, max(means_drawn) + 5)
    head = next((run["head"] for run in content["runs"] if "head" in run), 0)
    axes.set_xlabel(f"bytes of a task on disk, without those of the head ({4 * head:,}, the same for all)")
    axes.set_ylabel(f"score, mean of {len(content['plan']['tasks'])} tasks; 95 % intervals over seeds")
    axes.legend(framealpha=1, edgecolor="none", fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    parser = study.parser_of(__doc__, "density", Plan)
    parser.add_argument("--tasks", default="sst2,mrpc,qnli", type=lambda text: text.split(","))
    parser.add_argument("--methods", default=METHODS, type=lambda text: text.split(";"), help="separated by ;")
    arguments = parser.parse_args()
    if not {"full"} <= {*arguments.methods} <= {*METHODS}:
        parser.error(f"expected full and others of {'; '.join(METHODS)}")
    study.quiet()
    plan = study.plan_of(arguments, Plan)
    if arguments.run:
        Density(plan, arguments, Run).start()
    if arguments.render:
        study.render(arguments, tables, figure)


if __name__ == "__main__":
    main()

"""The demo: a real encoder, trained in four ways, and a page with the results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyspan.analysis import explained_variance
from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.io.folders import RESULT, check_folder, is_unfinished, resumable
from tinyspan.io.storage import read_json, write_json
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.progress import Display
from tinyspan.workflows.report import write_report
from tinyspan.workflows.report.surface import loss_around
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import record, tune
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.training import run_of

__all__ = ["Plan", "run_demo"]

RESULTS, PAGE = "results.json", "report.html"
POINTS = 4  # recorded points per direction


@dataclass(frozen=True)
class Plan:
    """Settings of the demo; with the defaults it takes about four minutes on two cores.

    The learning rates were chosen for full and intrinsic on 600 training sentences that were held out for this purpose,
    and are the same for all four methods. `docs/defaults.md` shows the results of random and freeze with their own
    rates.
    """

    model: str = "minilm"
    task: str = "rotten_tomatoes"
    data: Path | None = None
    train_rows: int = 1_000
    held_out_rows: int | None = None
    max_length: int = 48
    epochs: int = 3
    rank: int = 8
    batch_size: int = 32
    learning_rate: float = 2e-4
    z_learning_rate: float = 2e-2

    def settings(self, seed: int) -> Settings:
        """Return the settings of the training, for all four methods."""
        return Settings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            max_length=self.max_length,
            learning_rate=self.learning_rate,
            z_learning_rate=self.z_learning_rate,
            seed=seed,
        )


def run_demo(
    output: Path,
    display: Display,
    *,
    seed: int = 0,
    overwrite: bool = False,
    plan: Plan = Plan(),
) -> list[dict[str, Any]]:
    """Record, discover, tune in four ways, render the page, and write everything to `output`.

    Returns:
        The results of full, intrinsic, random and freeze, which `results.json` also contains.

    Raises:
        InputError: the folder is in use, or the extra `demo` is not installed.
    """
    check_folder(output, "demo", overwrite, resumable=True)
    settings = plan.settings(seed)
    prepared = prepare(
        plan.model,
        plan.task,
        data=plan.data,
        max_length=plan.max_length,
        train_rows=plan.train_rows,
        validation_rows=plan.held_out_rows,
    )
    job = {"command": "demo", **run_of(prepared, settings), "rank": plan.rank}
    with resumable(output, "demo", job, overwrite):
        results = _compare(output, display, prepared, settings, plan)
    return results


def _compare(
    output: Path, display: Display, prepared: Prepared, settings: Settings, plan: Plan
) -> list[dict[str, Any]]:
    """Compute the missing parts of the demo, each in its own folder, and render the page."""
    steps = settings.steps(plan.train_rows)
    display.expect("the whole demo", 4 * steps)
    display.say(
        f"{plan.train_rows} sentences to train on, {len(prepared.validation)} held out; "
        f"{plan.epochs} epochs, {'bfloat16 autocast' if settings.autocast else 'float32'}"
    )

    def done(name: str) -> bool:
        finished = (output / name / RESULT).is_file() and not is_unfinished(output / name)
        if finished:
            display.advance(steps)
        return finished

    if not done("full"):
        callbacks = [display.training("full")]
        every = max(1, steps // (POINTS * plan.rank))  # more points than directions, which otherwise contain them all
        record(prepared, settings, output / "full", every=every, callbacks=callbacks)
    trajectory = Trajectory(output / "full")
    basis = svd_basis(
        trajectory,
        rank=plan.rank,
        folder=output / "basis",
        overwrite=True,
        progress=lambda blocks: display.each(blocks, "discovering", len(trajectory.partition)),
    )
    display.say(f"discovered {plan.rank} directions in each of {len(basis.partition)} layers")

    def tuned(method: str, chosen: Basis | str, rank: int | None = None) -> dict[str, Any]:
        if not done(method):
            tune(prepared, settings, chosen, output / method, rank=rank, callbacks=[display.training(method)])
        return read_json(output / method / RESULT)

    freeze, random = tuned("freeze", "none"), tuned("random", "random", plan.rank)
    results = [read_json(output / "full" / RESULT), tuned("intrinsic", basis), random, freeze]
    display.say("drawing the page")
    write_report(
        output / PAGE,
        [output / name for name in ("full", "intrinsic", "random", "freeze")],
        title=f"{len(basis.partition)} encoder layers, fine-tuned in {results[1]['subspace_parameters']} numbers",
        lead=_lead(plan, prepared, results, basis),
        surface_of=lambda item, flat: loss_around(
            item.folder,
            flat,
            prepared,
            settings,
            progress=lambda rows: display.each(rows, "loss around the path", len(rows)),
        ),
        overwrite=True,
    )
    write_json(output / RESULTS, {"results": results})
    return results


def _lead(plan: Plan, prepared: Prepared, results: list[dict[str, Any]], basis: Basis) -> list[str]:
    """Return what the page says about the demo alone."""
    full, intrinsic, random, freeze = (f"{result['score']:.3f}" for result in results)
    spectra = [basis.spectrum[block.name] for block in basis.partition]
    points = len(spectra[0])
    explained = float(torch.stack([explained_variance(values)[basis.rank - 1] for values in spectra]).mean())
    return [
        f"Fine-tuning changes all {basis.partition.blocks[0].numel:,} weights of each of the {len(basis.partition)} "
        f"layers of this encoder, but its path lies almost in a subspace of {basis.rank} dimensions per layer: they "
        f"hold {explained:.1%} of the squared distances of its {points} recorded points from the start. Training "
        f"{basis.rank} numbers per layer along these directions reaches {intrinsic} where training every weight "
        f"reaches {full}. The same number of random directions reaches {random}, and no direction {freeze}. Word "
        "embeddings and the classification head are trained directly in all four cases, as in the paper.",
        f"All four methods start from the same pre-trained weights and use the same {plan.train_rows:,} training "
        f"sentences of {prepared.task.name} (film reviews) in the same order, for {plan.epochs} epochs, with the "
        "same learning rates. These were chosen for full and intrinsic; with rates of their own, random and freeze "
        "gain a few points. This is one run with one seed, and the directions come from this run, whose end they "
        "nearly contain. This shows that training in them works, not that they can be found without fine-tuning "
        'first. After Zhang, Liu and Shao, "Fine-tuning Happens in Tiny Subspaces", ACL 2023.',
    ]

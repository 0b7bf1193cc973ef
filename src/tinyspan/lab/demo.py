"""The demo: a real encoder, trained in four ways, and a page with the results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyspan.analysis import GAUSSIAN_SHARE, outliers, plane, standardized
from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.io.folders import check_folder, is_unfinished, resumable
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab import figures
from tinyspan.lab.report import write_report
from tinyspan.model.subspace import SubspaceModel
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.models import base_model
from tinyspan.workflows.progress import Display
from tinyspan.workflows.runs import RESULT, record, tune
from tinyspan.workflows.surface import loss_around
from tinyspan.workflows.training import Prepared, Settings, prepare, run_of

__all__ = ["Plan", "run_demo"]

STRETCHES = 400
RESULTS = "results.json"


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
        record(prepared, settings, output / "full", every=steps // plan.rank, callbacks=callbacks)
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
    _draw(output, results, trajectory, basis, prepared, settings, display)
    write_report(output, results, basis)
    write_json(output / RESULTS, {"results": results})
    return results


def _draw(
    output: Path,
    results: list[dict[str, Any]],
    trajectory: Trajectory,
    basis: Basis,
    prepared: Prepared,
    settings: Settings,
    display: Display,
) -> None:
    folder = output / "figures"
    short = {block.name: f"layer {index + 1}" for index, block in enumerate(basis.partition)}
    figures.save(figures.comparison(results), folder, "comparison")
    figures.save(figures.curves(results), folder, "curves")
    spectra = {short[name]: values.numpy() for name, values in basis.spectrum.items()}
    figures.save(figures.spectrum(spectra), folder, "spectrum")

    model = base_model(prepared.model, prepared.task, settings.seed)
    intrinsic = SubspaceModel.from_pretrained(model, output / "intrinsic", basis)
    profiles, counts, components = update_profile(basis, intrinsic)
    renamed = {short[name]: profile for name, profile in profiles.items()}
    figures.save(figures.extremes(renamed, counts, components, GAUSSIAN_SHARE), folder, "extremes")

    main = plane(trajectory)
    surface = loss_around(
        output / "full",
        main,
        prepared,
        settings,
        progress=lambda rows: display.each(rows, "loss around the path", len(rows)),
    )
    grid = surface.first.numpy(), surface.second.numpy()
    figure = figures.path_in_plane(main.paths[0].double().numpy(), *grid, surface.loss.numpy(), main.explained)
    figures.save(figure, folder, "path")


def update_profile(
    basis: Basis, subspace: SubspaceModel
) -> tuple[dict[str, npt.NDArray[np.float64]], npt.NDArray[np.float64], list[str]]:
    """Return the envelope of |V z| along each layer, and the share of outliers by component and layer.

    Returns:
        Layer -> largest |x - mean| / std of consecutive segments; shares [components, layers]; component names.
    """
    profiles, shares = {}, []
    for block, z in zip(subspace.blocks, subspace.z, strict=True):
        update = basis.maps[block.name].matvec(z.detach().mean(0)).double()
        distance = standardized(update).abs()
        profiles[block.name] = np.array([piece.max().item() for piece in distance.chunk(STRETCHES)])
        result = outliers(update, block)
        sizes = {spec.name: spec.numel for spec in block.parameters}
        shares.append([result.by_parameter[name] / sizes[name] for name in sizes])
    first = subspace.blocks[0]
    components = [spec.name.removeprefix(f"{first.name}.") for spec in first.parameters]
    return profiles, np.array(shares).T, components

"""The demo: a real encoder on real text, four ways to train it, and a page that shows what happened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from tinyspan.analysis import GAUSSIAN_SHARE, Plane, loss_surface, outliers, plane
from tinyspan.basis import Basis, svd_basis
from tinyspan.experiments import figures
from tinyspan.experiments.models import base_model
from tinyspan.experiments.progress import Display
from tinyspan.experiments.report import write_report
from tinyspan.experiments.runs import record, tune
from tinyspan.experiments.training import Prepared, Settings, prepare
from tinyspan.partition import Block
from tinyspan.storage import prepare_folder, write_json
from tinyspan.subspace import SubspaceModel
from tinyspan.trajectory import Trajectory

__all__ = ["run_demo"]

MODEL, TASK = "minilm", "rotten_tomatoes"
TRAIN_ROWS, HELD_OUT_ROWS, MAX_LENGTH, EPOCHS, RANK = 1_000, 600, 48, 3, 8
LEARNING_RATE, Z_LEARNING_RATE = 2e-4, 2e-2  # chosen on 600 further training rows, the same for all methods
SURFACE_ROWS, SURFACE_GRID = 48, (11, 9)
STRETCHES = 400
RESULTS = "results.json"


def run_demo(output: Path, display: Display, *, seed: int = 0, overwrite: bool = False) -> list[dict[str, Any]]:
    """Record, discover, tune in four ways, draw, and leave everything in `output`.

    Returns:
        The results of full, freeze, random and intrinsic, which `results.json` holds too.

    Raises:
        InputError: the folder is in use, or the extra `demo` is not installed.
    """
    prepare_folder(output, RESULTS, overwrite)
    settings = Settings(
        epochs=EPOCHS, max_length=MAX_LENGTH, learning_rate=LEARNING_RATE, z_learning_rate=Z_LEARNING_RATE, seed=seed
    )
    prepared = prepare(MODEL, TASK, max_length=MAX_LENGTH, train_rows=TRAIN_ROWS, validation_rows=HELD_OUT_ROWS)
    steps = -(-TRAIN_ROWS // settings.batch_size) * EPOCHS
    display.say(
        f"{len(prepared.train)} sentences to train on, {len(prepared.validation)} held out; "
        f"{EPOCHS} epochs, {'bfloat16 autocast' if settings.autocast else 'float32'}"
    )
    results = {
        "full": record(
            prepared,
            settings,
            output / "full",
            every=steps // RANK,
            callbacks=[display.training("full fine-tuning")],
        )
    }
    trajectory = Trajectory(output / "full")
    basis = svd_basis(
        trajectory, rank=RANK, progress=lambda blocks: display.each(blocks, "discovering", len(trajectory.partition))
    )
    basis.save(output / "basis")
    display.say(f"discovered {RANK} directions in each of {len(basis.partition)} layers")
    for method, chosen, rank in (("freeze", "none", None), ("random", "random", RANK), ("intrinsic", basis, None)):
        results[method] = tune(
            prepared,
            settings,
            chosen,  # type: ignore[arg-type]
            output / method,
            rank=rank,
            callbacks=[display.training(method)],
        )
    ordered = [results[method] for method in ("full", "intrinsic", "random", "freeze")]
    _draw(output, ordered, trajectory, basis, prepared, settings, display)
    write_report(output, ordered, basis)
    write_json(output / RESULTS, ordered)
    return ordered


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
    intrinsic = SubspaceModel.load(model, output / "intrinsic", basis)
    profiles, counts, components = update_profile(basis, intrinsic)
    renamed = {short[name]: profile for name, profile in profiles.items()}
    figures.save(figures.extremes(renamed, counts, components, GAUSSIAN_SHARE), folder, "extremes")

    main = plane(trajectory)
    first, second, loss = _surface(output / "full" / "model", main, trajectory, prepared, settings, display)
    drawn = figures.path_in_plane(main.path.double().numpy(), first, second, loss, main.explained)
    figures.save(drawn, folder, "path")


def update_profile(
    basis: Basis, subspace: SubspaceModel
) -> tuple[dict[str, npt.NDArray[np.float64]], npt.NDArray[np.float64], list[str]]:
    """Return the envelope of |V z| along each layer and the share of outliers by component and layer.

    Returns:
        Layer -> largest |x - mean| / std of consecutive stretches; shares [components, layers]; component names.
    """
    profiles, shares = {}, []
    for block, z in zip(basis.partition, subspace.z, strict=True):
        update = basis.maps[block.name].expand(z.detach().mean(0)).double()
        distance = ((update - update.mean()) / update.std(correction=0)).abs()
        profiles[block.name] = np.array([piece.max().item() for piece in distance.chunk(STRETCHES)])
        found = outliers(update, block)
        sizes = {spec.name: spec.numel for spec in block.parameters}
        shares.append([found.by_parameter[name] / sizes[name] for name in sizes])
    components = [_component(block, spec.name) for block in basis.partition.blocks[:1] for spec in block.parameters]
    return profiles, np.array(shares).T, components


def _component(block: Block, parameter: str) -> str:
    return parameter.removeprefix(f"{block.name}.")


def _surface(
    model_folder: Path,
    main: Plane,
    trajectory: Trajectory,
    prepared: Prepared,
    settings: Settings,
    display: Display,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Evaluate the training loss around the path; embeddings and head stay as full fine-tuning left them."""
    model = base_model(str(model_folder), prepared.task, settings.seed, need_head=True)
    _rewind(model, trajectory)
    subspace = SubspaceModel(model, main.basis).eval()
    rows = [prepared.train[index] for index in range(SURFACE_ROWS)]
    batch = DataCollatorWithPadding(prepared.tokenizer)(rows)

    @torch.no_grad()
    def loss() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
            return float(subspace(**batch).loss)

    first, second = (_around(main.path[:, axis], count) for axis, count in enumerate(SURFACE_GRID))
    rows_done = display.each(second.tolist(), "loss around the path", len(second))
    values = loss_surface(subspace, loss, first.tolist(), list(rows_done))
    return first, second, values.numpy()


def _rewind(model: torch.nn.Module, trajectory: Trajectory) -> None:
    """Put theta_0 into the blocks of a fine-tuned model."""
    weights: Mapping[str, Tensor] = trajectory.partition.select(model)
    with torch.no_grad():
        for block in trajectory.partition:
            for name, value in block.unflatten(trajectory.start(block)).items():
                weights[name].copy_(value)


def _around(coordinates: Tensor, count: int) -> npt.NDArray[np.float64]:
    low, high = float(coordinates.min()), float(coordinates.max())
    margin = 0.3 * (high - low)
    return np.linspace(low - margin, high + margin, count)

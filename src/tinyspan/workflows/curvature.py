"""The curvature of the loss in z, along a recorded run or at an adapter: `tinyspan curvature`.

With some dozens of coordinates the Hessian of the loss is a small matrix, and is computed exactly. For a recorded run
the coordinates are those of the run's own directions.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinyspan.analysis import coordinates
from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.errors import InputError
from tinyspan.io.folders import CURVATURE, RESULT, UNFINISHED, check_folder, is_unfinished, resumable
from tinyspan.io.manifests import MANIFEST, check_attached, package_versions, read_manifest
from tinyspan.io.storage import read_json, write_json
from tinyspan.maps.dense import DenseMap
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partitioning import regrouped
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.hardware import default_device, hardware
from tinyspan.workflows.heads import undo_temperature
from tinyspan.workflows.loss_in_z import CurvatureOptions, LossInZ, Point
from tinyspan.workflows.models import base_model
from tinyspan.workflows.results import settings_of
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.training import run_of

__all__ = ["MAX_COORDINATES", "CurvatureSource", "curvature", "opened_source"]

MAX_COORDINATES = 512  # K above which no matrix [K, K] is computed
DEFAULT_RANK = 4  # directions per block of a recorded run
OUTSIDE = (
    "weights outside the blocks, such as the head and the embeddings, are those of the end of the run at every point, "
    "because trajectories do not record them"
)
NO_GAUSS_NEWTON = "no Gauss-Newton matrix: a language model has one output per token of its vocabulary and position"


@dataclass(frozen=True)
class CurvatureSource:
    """An opened recorded run or adapter.

    Attributes:
        folder: the folder.
        opened: its content.
        result: content of `result.json`, if there is one.
    """

    folder: Path
    opened: Trajectory | OpenedAdapter
    result: Mapping[str, Any] | None

    @property
    def adapter(self) -> OpenedAdapter | None:
        """The adapter; None for a recorded run."""
        return self.opened if isinstance(self.opened, OpenedAdapter) else None

    def model(self, given: str | None = None) -> str:
        """Return the name of the model: the fine-tuned model of a recorded run, or the base model of an adapter.

        Args:
            given: another name or place of the base model.

        Raises:
            InputError: a recorded run has no fine-tuned model or gets another one, or an adapter does not name its base
                model.
        """
        if self.adapter is not None:
            name = given or (self.result or {}).get("model") or self.adapter.manifest.details.get("model")
            if name is None:
                raise InputError(f"the adapter {self.folder} does not name its base model: give model=")
            return str(name)
        if given is not None:
            place = self.folder / "model"
            raise InputError(f"{self.folder} is a recorded run, whose model is {place}: leave out model=")
        if not (self.folder / "model").is_dir():
            raise InputError(
                f"{self.folder} has no model/, from which the head comes; `record` writes one at the end of a run"
            )
        return str(self.folder / "model")


def opened_source(folder: Path, basis: Path | None = None) -> CurvatureSource:
    """Open a folder that `record` or `tune` wrote.

    Args:
        folder: the folder.
        basis: folder of an adapter's basis, if it has moved.

    Raises:
        InputError: the folder is something else, or not finished.
        StorageError: a file is damaged.
    """
    expected = "expected the folder of a recorded run or of an adapter"
    if is_unfinished(folder):
        raise InputError(f"{folder} holds unfinished work; repeat the command that started it first")
    if not (folder / MANIFEST).is_file():
        what = "is no folder" if not folder.is_dir() else f"has no {MANIFEST}"
        if (folder / "config.json").is_file():
            what = "is a model, which has neither directions nor points"
        raise InputError(f"{folder} {what}; {expected}")
    kind = read_manifest(folder).kind
    if kind == "basis":
        raise InputError(f"{folder} is a basis, which has no points; {expected}, such as the run it comes from")
    if kind == "adapter":
        adapter = OpenedAdapter(folder, basis)
        _ = adapter.stored_basis  # opens the basis, or fails
        return CurvatureSource(folder, adapter, adapter.result)
    if basis is not None:
        raise InputError(f"{folder} is a recorded run, which has its own directions: leave out basis=")
    check_attached(folder, RESULT)
    result = read_json(folder / RESULT, sealed=False) if (folder / RESULT).is_file() else None
    return CurvatureSource(folder, Trajectory(folder), result)


def curvature(
    source: CurvatureSource,
    prepared: Prepared,
    output: Path,
    options: CurvatureOptions,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    expect: Callable[[int], None] = lambda batches: None,
    advance: Callable[[int], None] = lambda batches: None,
) -> dict[str, Any]:
    """Compute the Hessian and the Gauss-Newton matrix of the mean loss in z, and write `curvature.json` to `output`.

    For an adapter they are computed at its z. For a recorded run the coordinates are those of its own first singular
    directions in each block, and the points are theta_0 and the recorded points, each at z_i = V^T (theta_i - theta_0).
    Weights outside the blocks are those of the end of the run at every point. The model is in evaluation mode, without
    autocast. Each finished point is kept, so that a repeated call goes on after an interruption.

    Args:
        source: the run or adapter.
        prepared: rows, tokenized for the model of the source; see `CurvatureSource.model`.
        output: folder to write.
        options: see `CurvatureOptions`.
        overwrite: replace an earlier output.
        say: function that gets a message about the matrices to come.
        expect: function that gets the number of batches to come, over all passes.
        advance: function that gets the number of batches of a pass that are done.

    Returns:
        The content of `curvature.json`: `run`, `kind`, `model`, `task`, `options`, `K`, `blocks` (block -> number of
        coordinates), `rows`, `notes`, `versions`, `hardware`, `seconds`; `points`, each with `step`, `distance`
        (`|z|`), `share`, `loss`, `gradient_norm`, `row_gradients` (norms of the rows' gradients), `hessian` and
        `gauss_newton` (eigenvalues, descending), `trace`, `sharpness` (the largest eigenvalue of the Hessian),
        `asymmetry` and `seconds`; and `lines` through the last point along eigenvectors of the Hessian, each with
        `eigenvalue`, `number`, `blocks` (block -> share of the eigenvector), `steps`, `loss` and `quadratic`.

    Raises:
        InputError: z has no coordinate or more than 512, the run has fewer points than `rank`, an option for runs is
            given for an adapter, there are no such rows, or the output folder is in use.
        MismatchError: the adapter was trained with another model.
        TinyspanError: the loss or a derivative is NaN or infinite.
    """
    if source.adapter is not None and (options.rank, options.partition, options.every) != (None, "model", 1):
        raise InputError("rank=, partition= and every= are for a recorded run; an adapter has its own coordinates")
    check_folder(output, "curvature", overwrite, [source.folder, Path(prepared.model)], resumable=True)
    rows = _chosen_rows(prepared, options)
    basis = None if isinstance(source.opened, OpenedAdapter) else _directions(source.opened, options)
    job = {
        **run_of(prepared, settings_of(source)),
        "command": "curvature",
        "source": _content_hash(source),
        "options": asdict(options),
    }
    with resumable(output, "curvature", job, overwrite):
        if not (output / CURVATURE).is_file():
            subspace, points = _model_and_points(source, prepared, basis, options)
            loss = LossInZ(subspace, prepared, rows, options, advance)
            files = [output / UNFINISHED / f"point-{index:05d}.json" for index in range(len(points))]
            left = sum(not file.is_file() for file in files)
            say(f"{left} points, matrices of {loss.size} x {loss.size}, {len(rows)} rows")
            expect(loss.passes * left * len(loss.batches))
            with prepared.task.training_units(subspace):
                for point, file in zip(points, files, strict=True):
                    if not file.is_file():
                        write_json(file, loss.point(point, is_last=point is points[-1]))
            found = [read_json(file) for file in files]
            write_json(output / CURVATURE, _result(source, prepared, options, loss, found))
    return read_json(output / CURVATURE)


# -- points and rows --------------------------------------------------------------------------------------------------


def _chosen_rows(prepared: Prepared, options: CurvatureOptions) -> list[dict[str, Any]]:
    """Return some rows of a split, drawn with a fixed seed, the shortest first, so that batches have little padding.

    Raises:
        InputError: there are none.
    """
    dataset = prepared.train if options.split == "train" else prepared.validation
    if not dataset:
        raise InputError(f"there are no {options.split} rows: prepare the task with them")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(prepared.draw_seed))
    rows = [dataset[index] for index in order[: options.rows].tolist()]
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def _directions(run: Trajectory, options: CurvatureOptions) -> Basis:
    """Return the first singular directions of a run in each block.

    Raises:
        InputError: the run has no points, or fewer than the rank, or there would be too many coordinates.
    """
    if not len(run):
        raise InputError(f"{run.folder} has no points, so it has no directions; record some")
    run = run.with_partition(regrouped(run.recorded, options.partition))
    rank = options.rank or min(DEFAULT_RANK, len(run))
    blocks = len(run.partition)
    _require_size(rank * blocks, f"{rank} in each of {blocks} blocks; lower rank=, or pass partition=model")
    return svd_basis(run, rank)


def _require_size(size: int, where: str) -> None:
    if not 1 <= size <= MAX_COORDINATES:
        raise InputError(
            f'z has {size} coordinates ({where}); expected 1 to {MAX_COORDINATES}. For more of them, the page "z as a '
            'function" of the documentation shows linear operators of curvlinops on a SubspaceModel'
        )


def _content_hash(source: CurvatureSource) -> str:
    opened = source.opened
    return opened.manifest.content_hash() if isinstance(opened, OpenedAdapter) else opened.content_hash()


def _model_and_points(
    source: CurvatureSource, prepared: Prepared, basis: Basis | None, options: CurvatureOptions
) -> tuple[SubspaceModel, list[Point]]:
    """Return the model in its basis, in evaluation mode, and the points at which the curvature is computed."""
    model = base_model(prepared.model, prepared.task, 0, need_head=True, adapter=source.adapter)
    if isinstance(source.opened, OpenedAdapter):
        subspace = _as_one_member(wrap_with_adapter(SubspaceModel, model, source.opened))
        undo_temperature(subspace, source.result)
        points = [Point(None, None, None)]
    else:
        assert basis is not None
        source.opened.load_into(model, None)
        undo_temperature(model, source.result)
        subspace, points = SubspaceModel(model, basis), _points_of(source.opened, basis, options.every)
    _require_size(sum(z.numel() for z in subspace.z), "of an adapter; tune one of lower rank")
    return subspace.to(default_device(), getattr(torch, options.dtype)).eval(), points


def _as_one_member(subspace: SubspaceModel) -> SubspaceModel:
    """Return a model with one vector z per block in place of an ensemble of several, whose mean it is."""
    if subspace.ensemble == 1:
        return subspace
    z, scales = subspace.get_state().z, subspace.scales
    model = subspace.merge()
    subspace.engine.restore()
    single = SubspaceModel(model, subspace.basis, layer_scales=subspace.layer_scales)
    single.set_state({name: of_block.mean(0) for name, of_block in z.items()}, scales=scales)
    return single


def _points_of(run: Trajectory, basis: Basis, every: int) -> list[Point]:
    """Return theta_0 and the points of a run, in the coordinates of a basis."""
    run = run.with_partition(basis.partition)
    parts, squares = [], torch.zeros(len(run) + 1, dtype=torch.float64)
    for block in run.partition:
        if basis.ranks[block.name]:
            parts.append(coordinates(run, block, DenseMap(basis.maps[block.name].dense())))
        for _, deltas in run.chunks(block):
            squares[1:] += deltas.double().square().sum(1)
    z, last = torch.cat(parts, 1), len(run)
    shares = z.double().square().sum(1) / squares
    steps = [0, *(step + 1 for step in run.steps)]
    indices = [index for index in range(last + 1) if index % every == 0 or index == last]
    return [Point(steps[i], z[i], float(shares[i]) if squares[i] else None) for i in indices]


def _result(
    source: CurvatureSource,
    prepared: Prepared,
    options: CurvatureOptions,
    loss: LossInZ,
    points: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the content of `curvature.json`; see `curvature`."""
    lines = points[-1].pop("lines")
    notes = [OUTSIDE] if source.adapter is None else []
    return {
        "run": str(source.folder),
        "kind": read_manifest(source.folder).kind,
        "model": prepared.model,
        "task": prepared.task.name,
        "options": asdict(options),
        "K": loss.size,
        "blocks": {block.name: own.numel() for block, own in zip(loss.subspace.blocks, loss.subspace.z, strict=True)},
        "rows": loss.rows,
        "points": points,
        "lines": lines,
        "notes": notes if loss.has_gauss_newton else [*notes, NO_GAUSS_NEWTON],
        "versions": package_versions(),
        "hardware": hardware(),
        "seconds": sum(point["seconds"] for point in points),
    }

"""Cells: each is one training or measurement with its own folder; several cells can share trajectories and bases.

A study is a folder. A cell writes `<model>/<task>/<method>/seed-<n>/result.json` to it, from which the tables are
computed. Large outputs that can be recomputed (trajectories, bases, adapters) are under `shared/`.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import CONSTRUCTORS
from tinyspan.bases.discovery import svd_basis
from tinyspan.bases.point_matrix import Center
from tinyspan.errors import InputError, MismatchError, StorageError
from tinyspan.io.folders import RESULT, UNFINISHED, Busy, claimed
from tinyspan.io.manifests import attach, read_manifest
from tinyspan.io.storage import json_digest, read_json, reading, write_json
from tinyspan.lab.outliers import dissect
from tinyspan.lab.scheduler import SCHEDULED, CellResults, CellStudy, once
from tinyspan.lab.suite import FROM_RUNS, Suite
from tinyspan.maps.dense import DenseMap
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partitioning import by_layer
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.models import base_model, load_pretrained
from tinyspan.workflows.progress import Display
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import method_of, record, subspace_model
from tinyspan.workflows.settings import SubspaceOptions
from tinyspan.workflows.tasks import TASKS
from tinyspan.workflows.training import fine_tune, score

__all__ = ["Cell", "Kind", "Known", "Results", "Study", "check_inputs"]

SHARED = "shared"
Kind = str
DRAWN = {"freeze": "empty", "did": "fastfood", "said": "fastfood"}  # kind -> constructor, where the names differ


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
        model: name of the model in the suite.
        task: task for training and scoring.
        kind: the method: `full`, `freeze`, `random` and `intrinsic` as in the paper; `line`, the straight line to the
            end of the run (k = 1); `flipped`, the intrinsic basis with a random sign for every coordinate; `inductive`,
            the basis of the task `source`; `unified`, the basis of the ends of all tasks' runs; `zero-shot`, the same
            without this task; `did`, one Fastfood basis over all layers (k numbers in all); `said`, the same with a
            scale per layer; `outliers`, the dissection of the update of the method `source`; or the name of a
            registered constructor, such as one of your own.
        seed: seed of all random numbers.
        rank: k, if the method has one.
        center: centering of the SVD, if there is one.
        source: see `kind`; for a unified basis, its tasks, joined by `+`.
        embeddings: whether to train the embeddings directly, or freeze them.
    """

    model: str
    task: str
    kind: Kind
    seed: int
    rank: int | None = None
    center: Center | None = None
    source: str | None = None
    embeddings: bool = True

    @property
    def method(self) -> str:
        """The name of the method with its parameters, as in the folder's path."""
        parts = [self.kind, f"of-{self.source}" if self.source else "", f"k{self.rank}" if self.rank else ""]
        return "-".join(filter(None, [*parts, self.center, "" if self.embeddings else "frozen-embeddings"]))

    @property
    def folder(self) -> Path:
        """Path of the cell's folder in its study."""
        return Path(self.model, self.task, self.method, f"seed-{self.seed}")


Known = Callable[[Cell], float | None]  # the score of a finished cell, otherwise None
Needed = Callable[[Known], dict[Cell, str]]  # cells, each with the table that needs it


class Results(CellResults[Cell]):
    """The results of finished cells in a study's folder; each is read once.

    Args:
        folder: folder of the study.
        settings_hash: hash of the study's settings; see `Suite.settings_hash`.
        entries: names of the entries to keep in memory; by default all.
    """

    def __init__(self, folder: Path, settings_hash: str, entries: Collection[str] | None = None) -> None:
        super().__init__(folder, entries)
        self.settings_hash = settings_hash

    def check(self, cell: Cell, path: Path, result: Mapping[str, Any]) -> None:
        """Check that a result belongs to this cell and this study.

        Raises:
            StorageError: the file belongs to another cell, or its score is invalid.
            InputError: it was computed with other settings than the study's.
        """
        if result["recipe"] != self.settings_hash:
            raise InputError(f"{path} was made with other settings than this study; delete it")
        expected, named = (cell.model, cell.task, cell.method, cell.seed), ("model", "task", "method", "seed")
        if (other := tuple(result[name] for name in named)) != expected:
            raise StorageError(f"{path} belongs to another cell: expected {expected}, found {other}")
        if not -1 <= result["score"] <= 1:
            raise StorageError(f"{path}: expected a score between -1 and 1, found {result['score']}")

    def score(self, cell: Cell) -> float | None:
        """Return a finished cell's score, a fraction."""
        result = self[cell]
        return None if result is None else float(result["score"])


class Study(CellStudy[Cell]):
    """A study of one suite.

    Args:
        folder: folder of the study.
        suite: settings of the cells.
        data: folder with one folder per task; by default GLUE is downloaded from the hub.
        display: progress display of the training runs.
        needed: function that returns the needed cells, each with its table, from the scores of the finished ones.
    """

    results: Results

    def __init__(
        self,
        folder: Path,
        suite: Suite,
        data: Path | None,
        display: Display,
        needed: Callable[[Known], dict[Cell, str]],
    ) -> None:
        super().__init__(Results(folder, suite.settings_hash(), SCHEDULED), display)
        self.suite, self.data, self.needed = suite, data, needed
        self.prepared = lru_cache(maxsize=4)(self._prepare)

    def cells(self) -> dict[Cell, str]:
        """Return the cells that the tables need, each with the first table that needs it."""
        return self.needed(self.results.score)

    def make(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell and return the content of its `result.json`.

        Raises:
            Busy: another process is computing a part that the cell needs.
        """
        compute = {"full": self._train_all, "outliers": self._dissect}.get(cell.kind, self._train_in_basis)
        identity = {**asdict(cell), "method": cell.method, "recipe": self.suite.settings_hash()}
        return {"suite": self.suite.name, "table": self.cells()[cell], **compute(cell), **identity}

    def tidy(self, cell: Cell) -> None:
        """Delete the training states of a finished cell, which a killed process may have left."""
        state = self.folder / SHARED / cell.folder / UNFINISHED
        if state.is_dir() and self.results[cell] is not None:
            with suppress(Busy), claimed(state.parent):
                shutil.rmtree(state)

    # -- the methods -------------------------------------------------------------------------------------------------

    def _train_all(self, cell: Cell) -> dict[str, Any]:
        return read_json(self._trajectory(cell, cell.task).folder / RESULT)

    def _train_in_basis(self, cell: Cell) -> dict[str, Any]:
        if self._stores_adapter(cell):
            return read_json(self._adapter(cell)[0] / RESULT)
        return self._tune(cell, self._basis(cell))[1]

    def _tune(self, cell: Cell, basis: Basis) -> tuple[SubspaceModel, dict[str, Any]]:
        prepared, settings = self.prepared(cell.model, cell.task), self.suite.settings(cell.task, cell.seed)
        options = SubspaceOptions(self.suite.ensemble, self.suite.init_std)
        if not cell.embeddings:  # the search for d90 counts the trained numbers: one z, starting at zero
            options = SubspaceOptions(1, 0.0, train_embeddings=False, layer_scales=cell.kind == "said")
        subspace = subspace_model(prepared, settings, basis, options=options)
        name = f"{cell.model} {cell.task} {cell.method} seed {cell.seed}"
        state = self.folder / SHARED / cell.folder / UNFINISHED  # deleted once the result is stored
        result = fine_tune(
            subspace,
            prepared,
            settings,
            method_of(basis),
            [self.display.training(name)],
            score_every_epoch=False,
            checkpoints=state,
        )
        result["spectrum"] = {name: values.tolist() for name, values in basis.spectrum.items()}
        if cell.kind in ("unified", "zero-shot"):
            result["z"] = {block.name: z.tolist() for block, z in zip(subspace.blocks, subspace.z, strict=True)}
        return subspace, result

    def _basis(self, cell: Cell, folder: Path | None = None) -> Basis:
        """Return the basis of a method; one that is computed from points is written to the folder if one is given."""
        if cell.kind not in FROM_RUNS:
            model = base_model(self.suite.models[cell.model], TASKS[cell.task], cell.seed)
            return CONSTRUCTORS[DRAWN.get(cell.kind, cell.kind)].draw(model, cell.rank, cell.seed)
        center = cell.center or self.suite.center
        if cell.kind in ("unified", "zero-shot"):
            ends = [self._trajectory(cell, task).with_points([-1]) for task in (cell.source or "").split("+")]
            return svd_basis(ends, cell.rank, center=center)
        trajectory = self._trajectory(cell, cell.source or cell.task)
        if cell.kind == "line":
            return svd_basis(trajectory.with_points([-1]), 1, center="init")
        basis = svd_basis(trajectory, cell.rank, center=center, folder=folder, overwrite=True)
        return _flip_signs(basis, cell.seed) if cell.kind == "flipped" else basis

    def _dissect(self, cell: Cell) -> dict[str, Any]:
        """Score a trained model with the outliers of its update disabled, and with the controls.

        The outliers of an update V z are also disabled in the fully fine-tuned model, since the paper does not say in
        which of the two it disables them.
        """
        prepared, settings = self.prepared(cell.model, cell.task), self.suite.settings(cell.task, cell.seed)
        trajectory = self._trajectory(cell, cell.task)
        start = {block.name: trajectory.start(block) for block in trajectory.partition}
        full = base_model(str(trajectory.folder / "model"), prepared.task, cell.seed, need_head=True)
        ends = {block.name: trajectory.delta(block) for block in trajectory.partition}

        def dissected(model: nn.Module, update: dict[str, Tensor], judged: dict[str, Tensor]) -> dict[str, Any]:
            def scored() -> float:
                return float(score(model, prepared, settings, "given")["score"])

            return dissect(model, trajectory.partition, start, update, scored, judged=judged, seed=cell.seed)

        self.display.say(f"{cell.model} {cell.task} seed {cell.seed}: dissecting the update of {cell.source}")
        if cell.source == "full":
            return {**score(full, prepared, settings, "full"), "outliers": dissected(full, ends, ends)}
        folder, basis = self._adapter(self._source_cell(cell))
        subspace = SubspaceModel.from_pretrained(base_model(prepared.model, prepared.task, cell.seed), folder, basis)
        means = {block.name: z.detach().mean(0) for block, z in zip(subspace.blocks, subspace.z, strict=True)}
        update = {name: basis.maps[name].matvec(z) for name, z in means.items()}
        return {
            **score(subspace, prepared, settings, method_of(basis)),
            "of_rank": basis.rank,
            "outliers": dissected(subspace.merge(), update, update),
            "in_full": dissected(full, ends, update)["scores"],
        }

    def _source_cell(self, cell: Cell) -> Cell:
        """Return the cell whose update is dissected."""
        rank = self.suite.rank_of(cell.task)
        if cell.source == "random":
            return replace(cell, kind="random", rank=rank, center=None, source=None)
        available = self.suite.points_of(cell.task) - (cell.center == "mean")
        return replace(cell, kind="intrinsic", rank=min(rank, available), source=None)

    # -- shared parts ------------------------------------------------------------------------------------------------

    def _stores_adapter(self, cell: Cell) -> bool:
        """Whether a cell's adapter is stored for a later dissection."""
        return cell.embeddings and cell in (
            self._source_cell(replace(cell, source=source)) for source in ("random", "intrinsic")
        )

    def _trajectory(self, cell: Cell, task: str) -> Trajectory:
        """Return the recorded run of a task with the cell's model and seed."""
        full = Cell(cell.model, task, "full", cell.seed)  # of all weights, also where a cell freezes the embeddings
        folder = self.folder / SHARED / full.folder

        def make() -> Trajectory:
            prepared, settings = self.prepared(cell.model, task), self.suite.settings(task, cell.seed)
            assert prepared.train is not None
            steps, points = settings.steps(len(prepared.train)), self.suite.points
            every: int | Literal["epoch"] = "epoch" if points == "epoch" else steps // points
            callbacks = [self.display.training(f"{cell.model} {task} full seed {cell.seed}")]
            record(
                prepared, settings, folder, every=every, overwrite=True, callbacks=callbacks, score_every_epoch=False
            )
            return Trajectory(folder)

        return once(folder, RESULT, make, lambda: Trajectory(folder))

    def _adapter(self, cell: Cell) -> tuple[Path, Basis]:
        """Return the adapter of a tuned cell and its basis."""
        folder = self.folder / SHARED / cell.folder

        def make() -> Basis:
            basis = self._basis(cell, folder / "basis")
            subspace, result = self._tune(cell, basis)
            subspace.save_pretrained(folder / "adapter", overwrite=True)
            write_json(folder / "adapter" / RESULT, result)
            attach(folder / "adapter", [RESULT])
            return basis

        def load() -> Basis:
            basis = Basis.from_pretrained(folder / "basis") if cell.kind == "intrinsic" else self._basis(cell)
            manifest = read_manifest(folder / "adapter", "adapter")
            if manifest.parents != [basis.content_hash()]:
                raise MismatchError(f"{folder} was made in another basis")
            if RESULT not in manifest.attached:
                raise MismatchError(f"{folder} was not finished")
            return basis

        return folder / "adapter", once(folder, f"adapter/{RESULT}", make, load)

    def _prepare(self, model: str, task: str) -> Prepared:
        prepared = prepare(
            self.suite.models[model],
            task,
            data=task_folder(self.data, task),
            max_length=self.suite.max_length,
            train_rows=self.suite.train_rows,
            validation_rows=self.suite.validation_rows,
        )
        self._require_rows_of_finished(model, task, prepared)
        return prepared

    def _require_rows_of_finished(self, model: str, task: str, prepared: Prepared) -> None:
        """Check that the rows are those of the finished cells; results of earlier versions do not say.

        Raises:
            InputError: they are not.
        """
        for path in sorted(self.folder.glob(f"{model}/{task}/*/seed-*/{RESULT}")):
            with reading(path):
                digests = read_json(path, sealed=False).get("row_digests")
            if digests:
                if different := prepared.other_rows(digests):
                    raise InputError(
                        f"{path} was made with other rows: {different}; give the data, and the model whose tokenizer "
                        "was used, of the finished cells, or choose another folder"
                    )
                return


def task_folder(data: Path | None, task: str) -> Path | None:
    """Return the folder with the rows of a task."""
    return data / task if data is not None and not TASKS[task].embedded else None


def check_inputs(suite: Suite, data: Path | None) -> dict[str, str]:
    """Check models, data folders and numbers of rows before any training.

    Returns:
        Name of each model -> SHA-256 of the weights of its layers.

    Raises:
        InputError: a model cannot be loaded, the data folder lacks a task, or a task has too few rows.
    """
    weights = {}
    for name, location in suite.models.items():
        try:
            weights[name] = _layers_digest(location)
        except InputError as error:
            raise InputError(f"the model {name} could not be loaded: {error}") from error
    for task in suite.tasks:
        rows = {split: len(TASKS[task].read(split, task_folder(data, task))) for split in ("train", "validation")}
        steps = suite.settings(task, 0).steps(min(rows["train"], suite.train_rows or rows["train"]))
        if suite.points != "epoch" and suite.points > steps:
            raise InputError(f"{task}: {rows['train']} rows give {steps} steps, too few for {suite.points} points")
    return weights


def _layers_digest(location: str) -> str:
    """Return the digest of a model's layers; its head is not loaded, since the class may give them other names."""
    model: Any = load_pretrained("AutoModel", location, dtype=torch.float32)
    layers = by_layer(model)
    return json_digest(layers.fingerprint(layers.select(model)))


def _flip_signs(basis: Basis, seed: int) -> Basis:
    """Return the basis with a random sign for every coordinate: same norms and angles, other directions."""
    generator, maps = torch.Generator().manual_seed(seed), {}
    for block in basis.partition:
        signs = torch.randint(0, 2, (block.numel,), generator=generator) * 2 - 1
        maps[block.name] = DenseMap(basis.maps[block.name].dense() * signs)
    return Basis(basis.partition, maps, fingerprint=basis.fingerprint, construction={"constructor": "given"})

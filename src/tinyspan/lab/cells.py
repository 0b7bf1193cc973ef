"""Cells: one training or measurement each, in a folder of its own, and the parts that several of them share.

A study is a folder. A cell leaves `<model>/<task>/<method>/seed-<n>/result.json` in it, which is all that tables need.
What is large and can be made again (trajectories, bases, adapters) lies under `shared/`.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import CONSTRUCTORS
from tinyspan.bases.discovery import Center, svd_basis
from tinyspan.errors import InputError, MismatchError, StorageError
from tinyspan.io.folders import UNFINISHED, Busy, claimed
from tinyspan.io.storage import attach, read_json, read_manifest, write_json
from tinyspan.lab.outliers import dissect
from tinyspan.lab.scheduler import CellResults, CellStudy, once
from tinyspan.lab.suite import Suite
from tinyspan.maps.dense import DenseMap
from tinyspan.model.subspace import SubspaceModel
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.models import base_model, load_pretrained
from tinyspan.workflows.progress import Display
from tinyspan.workflows.runs import RESULT, SubspaceOptions, method_of, record, subspace_model
from tinyspan.workflows.tasks import TASKS
from tinyspan.workflows.training import Prepared, fine_tune, prepare, score

__all__ = ["Cell", "Kind", "Known", "Results", "Study", "check_inputs"]

SHARED = "shared"
Kind = str
FROM_RUNS = ("intrinsic", "line", "flipped", "inductive", "unified", "zero-shot")  # kinds whose bases are of points
DRAWN = {"freeze": "empty", "did": "fastfood", "said": "fastfood"}  # of other kinds: whose constructor is named so


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
        model: its name in the suite.
        task: trained and scored on.
        kind: the method: `full`, `freeze`, `random` and `intrinsic` as in the paper; `line`, the straight line to the
            end of the run (k = 1); `flipped`, the intrinsic basis with the sign of every coordinate drawn at random;
            `inductive`, the basis of the task `source`; `unified`, the ends of all tasks' runs stacked; `zero-shot`,
            the same without this task; `did`, one Fastfood basis of all layers (k numbers in all); `said`, the same and
            a scale per layer; `outliers`, the dissection of the update of the method `source`; or the name of a
            registered constructor, such as one of your own.
        seed: of everything random.
        rank: k, where the method has one.
        center: of the SVD, where there is one.
        source: see `kind`; the tasks of a unified basis, joined by `+`.
        embeddings: train them directly, or freeze them.
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
        """The name of the method with its parameters, as folders carry it."""
        parts = [self.kind, f"of-{self.source}" if self.source else "", f"k{self.rank}" if self.rank else ""]
        return "-".join(filter(None, [*parts, self.center, "" if self.embeddings else "frozen-embeddings"]))

    @property
    def folder(self) -> Path:
        """Where the cell lies in its study."""
        return Path(self.model, self.task, self.method, f"seed-{self.seed}")


Known = Callable[[Cell], float | None]  # a finished cell's score
Needed = Callable[[Known], dict[Cell, str]]  # cells, each with the table that asks for it


class Results(CellResults[Cell]):
    """The results of finished cells in a study's folder; each is read once.

    Args:
        folder: of the study.
        recipe: what `Suite.recipe` says of the study's settings.
    """

    def __init__(self, folder: Path, recipe: str) -> None:
        super().__init__(folder)
        self.recipe = recipe

    def check(self, cell: Cell, path: Path, result: Mapping[str, Any]) -> None:
        """Refuse a result that is another cell's, or of another study.

        Raises:
            StorageError: the file is another cell's, or its score is no score.
            InputError: it was made with other settings than the study's.
        """
        if result["recipe"] != self.recipe:
            raise InputError(f"{path} was made with other settings than this study; take it away")
        expected, named = (cell.model, cell.task, cell.method, cell.seed), ("model", "task", "method", "seed")
        if (other := tuple(result[name] for name in named)) != expected:
            raise StorageError(f"{path} is another cell's: expected {expected}, found {other}")
        if not -1 <= result["score"] <= 1:
            raise StorageError(f"{path}: expected a score between -1 and 1, found {result['score']}")

    def score(self, cell: Cell) -> float | None:
        """Return a finished cell's score, a fraction."""
        result = self[cell]
        return None if result is None else float(result["score"])


class Study(CellStudy[Cell]):
    """A folder of cells made with one suite.

    Args:
        folder: of the study.
        suite: how to make them.
        data: holds one folder per task; by default GLUE comes from the hub.
        display: shows the training runs.
        needed: returns the cells to be made, as far as finished cells' scores tell, each with the table that asks.
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
        super().__init__(Results(folder, suite.recipe()), display)
        self.suite, self.data, self.needed = suite, data, needed
        self.prepared = lru_cache(maxsize=4)(self._prepare)

    def cells(self) -> dict[Cell, str]:
        """Return the cells that the tables need, each with the table that asks for it first."""
        return self.needed(self.results.score)

    def make(self, cell: Cell) -> dict[str, Any]:
        """Make a cell and return what `result.json` holds.

        Raises:
            Busy: another process works on a part that the cell needs.
        """
        made = {"full": self._full, "outliers": self._dissected}.get(cell.kind, self._tuned)
        told = {**asdict(cell), "method": cell.method, "recipe": self.suite.recipe()}
        return {"suite": self.suite.name, "table": self.cells()[cell], **made(cell), **told}

    def tidy(self, cell: Cell) -> None:
        """Take a finished cell's states of training away, if a killed process has not."""
        state = self.folder / SHARED / cell.folder / UNFINISHED
        if state.is_dir() and self.results[cell] is not None:
            with suppress(Busy), claimed(state.parent):
                shutil.rmtree(state)

    # -- the methods -------------------------------------------------------------------------------------------------

    def _full(self, cell: Cell) -> dict[str, Any]:
        return read_json(self._trajectory(cell, cell.task).folder / RESULT)

    def _tuned(self, cell: Cell) -> dict[str, Any]:
        if self._dissectable(cell):
            return read_json(self._adapter(cell)[0] / RESULT)
        return self._tune(cell, self._basis(cell))[1]

    def _tune(self, cell: Cell, basis: Basis) -> tuple[SubspaceModel, dict[str, Any]]:
        prepared, settings = self.prepared(cell.model, cell.task), self.suite.settings(cell.task, cell.seed)
        options = SubspaceOptions(self.suite.ensemble, self.suite.init_std)
        if not cell.embeddings:  # the search for d90 counts what is trained: one z, from zero
            options = SubspaceOptions(1, 0.0, train_embeddings=False, layer_scales=cell.kind == "said")
        subspace = subspace_model(prepared, settings, basis, options=options)
        name = f"{cell.model} {cell.task} {cell.method} seed {cell.seed}"
        state = self.folder / SHARED / cell.folder / UNFINISHED  # taken away by who keeps the result
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
        """Return the basis a method trains in, left in a folder if it is taken of points and one is given."""
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
        return _flipped(basis, cell.seed) if cell.kind == "flipped" else basis

    def _dissected(self, cell: Cell) -> dict[str, Any]:
        """Score a trained model with the outliers of its update disabled, and with the controls.

        The outliers of an update V z are also disabled in the model that full fine-tuning made: the paper does not say
        which of the two it zeroes them in.
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
        folder, basis = self._adapter(self._tuned_cell(cell))
        subspace = SubspaceModel.from_pretrained(base_model(prepared.model, prepared.task, cell.seed), folder, basis)
        means = {block.name: z.detach().mean(0) for block, z in zip(subspace.blocks, subspace.z, strict=True)}
        update = {name: basis.maps[name].matvec(z) for name, z in means.items()}
        return {
            **score(subspace, prepared, settings, method_of(basis)),
            "of_rank": basis.rank,
            "outliers": dissected(subspace.merge(), update, update),
            "in_full": dissected(full, ends, update)["scores"],
        }

    def _tuned_cell(self, cell: Cell) -> Cell:
        """Return the cell whose update a dissection takes apart."""
        rank = self.suite.rank_of(cell.task)
        if cell.source == "random":
            return replace(cell, kind="random", rank=rank, center=None, source=None)
        available = self.suite.points_of(cell.task) - (cell.center == "mean")
        return replace(cell, kind="intrinsic", rank=min(rank, available), source=None)

    # -- shared parts ------------------------------------------------------------------------------------------------

    def _dissectable(self, cell: Cell) -> bool:
        """Whether a cell's adapter is kept, because a dissection may want it."""
        return cell in (self._tuned_cell(replace(cell, source=source)) for source in ("random", "intrinsic"))

    def _trajectory(self, cell: Cell, task: str) -> Trajectory:
        """Return the recorded run of a task with the cell's model and seed."""
        folder = (
            self.folder / SHARED / replace(cell, task=task, kind="full", rank=None, center=None, source=None).folder
        )

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
            if read_manifest(folder / "adapter", "adapter").parents != [basis.content_hash()]:
                raise MismatchError(f"{folder} was made in another basis")
            return basis

        return folder / "adapter", once(folder, f"adapter/{RESULT}", make, load)

    def _prepare(self, model: str, task: str) -> Prepared:
        return prepare(
            self.suite.models[model],
            task,
            data=task_folder(self.data, task),
            max_length=self.suite.max_length,
            train_rows=self.suite.train_rows,
            validation_rows=self.suite.validation_rows,
        )


def task_folder(data: Path | None, task: str) -> Path | None:
    """Return where the rows of a task lie."""
    return data / task if data is not None and not TASKS[task].embedded else None


def check_inputs(suite: Suite, data: Path | None) -> None:
    """Refuse a model that is not there, a data folder that lacks a task, or too few rows, before any training.

    Raises:
        InputError: says which.
    """
    for name, location in suite.models.items():
        try:
            load_pretrained(AutoConfig, location)
        except InputError as error:
            raise InputError(f"the model {name} could not be loaded: {error}") from error
    for task in suite.tasks:
        rows = {split: len(TASKS[task].read(split, task_folder(data, task))) for split in ("train", "validation")}
        steps = suite.settings(task, 0).steps(min(rows["train"], suite.train_rows or rows["train"]))
        if suite.points != "epoch" and suite.points > steps:
            raise InputError(f"{task}: {rows['train']} rows make {steps} steps, too few for {suite.points} points")


def _flipped(basis: Basis, seed: int) -> Basis:
    """Flip the sign of every coordinate at random: same sizes, same angles, other directions."""
    generator, maps = torch.Generator().manual_seed(seed), {}
    for block in basis.partition:
        signs = torch.randint(0, 2, (block.numel,), generator=generator) * 2 - 1
        maps[block.name] = DenseMap(basis.maps[block.name].dense().mul_(signs))
    return Basis(basis.partition, maps, fingerprint=basis.fingerprint, construction={"constructor": "given"})

"""A grid of learning rates, ranks and seeds in one basis: the best setting by training rows that are set aside.

Every setting is trained without the set-aside rows and scored on them. The setting with the best mean over the seeds is
trained again on all training rows, and only these runs are scored on the held-out rows, so that the choice does not
raise the reported score. Several data sets share the basis, and each gets its own setting.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, StorageError, TinyspanError
from tinyspan.io.folders import LOCK, RESULT, UNFINISHED, Busy, check_place, claimed, first_difference, is_unfinished
from tinyspan.io.storage import read_json, reading, sweep, write_json, writing
from tinyspan.lab.scheduler import SCHEDULED, CellResults, CellStudy, Executor, run_cells, run_study
from tinyspan.lab.summary import Summary, markdown, summarize
from tinyspan.workflows.checks import check_rank
from tinyspan.workflows.progress import Display, quieten
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import method_of, subspace_model, tune
from tinyspan.workflows.settings import Settings, SubspaceOptions
from tinyspan.workflows.training import fine_tune, run_of

__all__ = ["Combination", "Grid", "SweepCell", "SweepStudy", "has_z", "run_sweep", "sweep_table"]

SWEEP = "sweep.json"
ADAPTER = "adapter"
VARIED = ("learning_rate", "z_learning_rate", "seed", "set_aside")  # settings that the grid determines
Part = Literal["set-aside", "held-out"]


@dataclass(frozen=True)
class Combination:
    """One setting of a grid.

    Attributes:
        rank: rank of a constructed basis; None if the basis has its own.
        learning_rate: learning rate of the directly trained parameters.
        z_learning_rate: learning rate of z; None if the basis has no z.
    """

    rank: int | None
    learning_rate: float
    z_learning_rate: float | None

    @property
    def name(self) -> str:
        """Name of the folder with its runs."""
        rank = "" if self.rank is None else f"rank-{self.rank}-"
        z_rate = "" if self.z_learning_rate is None else f"-z-rate-{self.z_learning_rate!r}"
        return f"{rank}rate-{self.learning_rate!r}{z_rate}"


@dataclass(frozen=True)
class Grid:
    """The settings to compare; each is run with every seed.

    Attributes:
        basis: a basis, or the name of a constructor; see `tune`.
        settings: settings that all runs share; `set_aside` is the number of training rows that decide.
        learning_rates: learning rates of the directly trained parameters.
        z_learning_rates: learning rates of z; `(None,)` for a basis without z, such as `none`.
        ranks: ranks of a constructed basis; `(None,)` for a basis with its own rank.
        seeds: number of seeds; they are 0, 1, ...
        options: see `SubspaceOptions`.

    Raises:
        InputError: a list is empty or has a value twice, no rows are set aside, `patience` is given, or ranks or rates
            of z are given for a basis that does not have them, or missing for one that does.

    Example:
        >>> grid = Grid("random", Settings(set_aside=200), (1e-4, 1e-3), (1e-2, 4e-2), ranks=(4, 16))
        >>> len(grid.combinations)
        8
    """

    basis: Basis | str
    settings: Settings
    learning_rates: tuple[float, ...]
    z_learning_rates: tuple[float | None, ...] = (None,)
    ranks: tuple[int | None, ...] = (None,)
    seeds: int = 3
    options: SubspaceOptions = SubspaceOptions()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name, values in self.lists.items():
            if not values or len({*values}) < len(values):
                raise InputError(f"expected at least one {name}, and each only once, got {list(values)}")
        if self.seeds < 1:
            raise InputError(f"expected at least one seed, got {self.seeds}")
        if self.settings.set_aside == 0:
            raise InputError(
                "a sweep needs training rows that are set aside (--set-aside), on which the settings are compared: a "
                "choice by the held-out rows would raise their score"
            )
        if self.settings.patience is not None:
            raise InputError("a sweep has no early stopping: the chosen setting is trained on all training rows")
        for rank in self.ranks:
            check_rank(self.basis, rank)
        if not has_z(self.basis) and self.z_learning_rates != (None,):
            raise InputError("the basis has no z: leave out z_learning_rates=")
        if has_z(self.basis) and None in self.z_learning_rates:
            raise InputError("the basis has a z: give z_learning_rates=")
        for combination in self.combinations:
            self.run_settings(combination, 0)  # checks the rates

    @property
    def lists(self) -> dict[str, tuple[Any, ...]]:
        """The values to compare, by the names of the fields of a `Combination`."""
        return {
            "rank": self.ranks,
            "learning_rate": self.learning_rates,
            "z_learning_rate": self.z_learning_rates,
        }

    @property
    def combinations(self) -> list[Combination]:
        """All settings, in the order in which they are run."""
        return [Combination(*values) for values in product(*self.lists.values())]

    def run_settings(self, combination: Combination, seed: int) -> Settings:
        """Return the settings of one run; the rows are split before it."""
        z_rate = combination.z_learning_rate
        return replace(
            self.settings,
            learning_rate=combination.learning_rate,
            z_learning_rate=self.settings.z_learning_rate if z_rate is None else z_rate,
            seed=seed,
            set_aside=0,
        )


def has_z(basis: Basis | str) -> bool:
    """Return whether there is a z to train in a basis, or in one that is constructed by name."""
    return basis.rank > 0 if isinstance(basis, Basis) else basis not in ("none", "empty")


@dataclass(frozen=True)
class SweepCell:
    """One run.

    Attributes:
        data: name of the data set.
        combination: the setting.
        seed: seed of the run, and of a constructed basis.
        part: rows that are scored: `set-aside`, which are not trained on, or `held-out`, after training on all training
            rows.
    """

    data: str
    combination: Combination
    seed: int
    part: Part

    @property
    def folder(self) -> Path:
        """Path of the cell's folder in the sweep."""
        return Path(self.data, self.part, self.combination.name, f"seed-{self.seed}")

    @property
    def identity(self) -> dict[str, Any]:
        """Return the cell in JSON types."""
        return {"data_set": self.data, "part": self.part, **asdict(self.combination), "seed": self.seed}


class SweepResults(CellResults[SweepCell]):
    """The results of finished runs."""

    def check(self, cell: SweepCell, path: Path, result: Mapping[str, Any]) -> None:
        """Check that a result belongs to this cell.

        Raises:
            StorageError: the file belongs to another cell.
        """
        found = {name: result[name] for name in cell.identity}
        if (other := first_difference(found, cell.identity)) is not None:
            raise StorageError(f"{path} belongs to another cell: {other}")


class SweepStudy(CellStudy[SweepCell]):
    """A folder with the runs of a grid.

    Args:
        folder: folder of the sweep.
        data: name -> model and rows.
        grid: the settings.
        display: progress display.
    """

    def __init__(self, folder: Path, data: Mapping[str, Prepared], grid: Grid, display: Display) -> None:
        super().__init__(SweepResults(folder, (*SCHEDULED, "settings")), display)
        self.data, self.grid = data, grid
        self.aside = {name: prepared.set_aside(grid.settings.set_aside)[1] for name, prepared in data.items()}

    def cells(self) -> list[SweepCell]:
        """Return the runs that are scored on the set-aside rows, and those of each setting that is chosen by now."""
        to_compare = [cell for name in self.data for one in self.grid.combinations for cell in self.runs(name, one)]
        chosen = {name: self.chosen(name) for name in self.data}
        return to_compare + [
            cell for name, one in chosen.items() if one is not None for cell in self.runs(name, one, "held-out")
        ]

    def runs(self, name: str, combination: Combination, part: Part = "set-aside") -> list[SweepCell]:
        """Return the runs of a setting, one per seed."""
        return [SweepCell(name, combination, seed, part) for seed in range(self.grid.seeds)]

    def summary(self, name: str, combination: Combination, part: Part = "set-aside") -> Summary | None:
        """Return the mean score of a setting over the seeds; None if a run is not finished or has diverged."""
        results = [self.results[cell] for cell in self.runs(name, combination, part)]
        scores = [None if result is None else result.get("score") for result in results]
        return None if None in scores else summarize(scores)

    def chosen(self, name: str) -> Combination | None:
        """Return the setting with the best mean on the set-aside rows, the first of several.

        Returns:
            None while runs of the data set are missing, or if all settings have diverged.
        """
        cells = [cell for one in self.grid.combinations for cell in self.runs(name, one)]
        if any(self.results[cell] is None for cell in cells):
            return None
        summaries = {one: self.summary(name, one) for one in self.grid.combinations}
        means = {one: found.mean for one, found in summaries.items() if found is not None and found.mean is not None}
        best = min if self.data[name].task.lower_is_better else max
        return best(means, key=means.__getitem__) if means else None

    def make(self, cell: SweepCell) -> dict[str, Any]:
        """Train, and score the rows of the cell's part."""
        run = self._tune if cell.part == "held-out" else self._compare
        return {**run(cell, self.grid.run_settings(cell.combination, cell.seed)), **cell.identity}

    def _compare(self, cell: SweepCell, settings: Settings) -> dict[str, Any]:
        rows, folder = self.aside[cell.data], self.folder / cell.folder
        subspace = subspace_model(rows, settings, self.grid.basis, cell.combination.rank, self.grid.options)
        try:
            return fine_tune(
                subspace,
                rows,
                settings,
                method_of(subspace.basis),
                [self._progress(cell)],
                score_every_epoch=False,
                checkpoints=folder / UNFINISHED,
            )
        except TinyspanError as error:
            if type(error) is not TinyspanError:  # a subclass has other causes
                raise
            return {"diverged": str(error)}

    def _tune(self, cell: SweepCell, settings: Settings) -> dict[str, Any]:
        rows, folder = self.data[cell.data], self.folder / cell.folder / ADAPTER
        if (folder / RESULT).is_file() and not is_unfinished(folder):  # killed before the cell was complete
            return read_json(folder / RESULT)
        options, rank = self.grid.options, cell.combination.rank
        return tune(
            rows, settings, self.grid.basis, folder, rank=rank, options=options, callbacks=[self._progress(cell)]
        )

    def _progress(self, cell: SweepCell) -> Any:
        return self.display.training(f"{cell.data} {cell.combination.name} seed {cell.seed}", cell.part)

    def describe(self, result: Mapping[str, Any]) -> str:
        """Return a short description of a result."""
        return f"diverged: {result['diverged']}" if "diverged" in result else super().describe(result)

    def tidy(self, cell: SweepCell) -> None:
        """Delete the training states of a finished cell."""
        state = self.folder / cell.folder / UNFINISHED
        if state.is_dir() and self.results[cell] is not None:
            with suppress(Busy), claimed(state.parent):
                shutil.rmtree(state)

    def summarized(self) -> dict[str, Any]:
        """Return the content of `result.json` of the finished sweep.

        Raises:
            TinyspanError: all settings have diverged for a data set.
        """
        sets = {}
        for name, prepared in self.data.items():
            if (chosen := self.chosen(name)) is None:
                raise TinyspanError(f"{name}: the loss became NaN or infinite in every setting; lower the rates")
            sets[name] = {
                "task": prepared.task.name,
                "metric": prepared.task.metric,
                "rows": {"train": len(prepared.train or ()), "validation": len(prepared.validation)},
                "settings": [
                    {
                        **asdict(one),
                        "chosen": one == chosen,
                        "set_aside": self._scores(name, one, "set-aside"),
                        **({"held_out": self._scores(name, one, "held-out")} if one == chosen else {}),
                    }
                    for one in self.grid.combinations
                ],
                "adapters": [str(cell.folder / ADAPTER) for cell in self.runs(name, chosen, "held-out")],
                "notes": [*self._at_the_edge(chosen), *self._of_two_precisions(name)],
            }
        return {**_common(self.data, self.grid), "seeds": self.grid.seeds, "data": sets}

    def _scores(self, name: str, combination: Combination, part: Part) -> dict[str, Any]:
        results = [self.results[cell] or {} for cell in self.runs(name, combination, part)]
        summary = self.summary(name, combination, part)
        interval = {} if summary is None else {"mean": summary.mean, "half": summary.half}
        return {"scores": [result.get("score") for result in results], **interval}

    def _of_two_precisions(self, name: str) -> list[str]:
        """Return a note if processes on several machines computed in different precisions."""
        cells = [cell for cell in self.cells() if cell.data == name]
        settings = [(self.results[cell] or {}).get("settings", {}) for cell in cells]
        if len({one["autocast"] for one in settings if "autocast" in one}) < 2:
            return []
        return ["some runs were computed in bfloat16 and some in float32, so they are not comparable: give --precision"]

    def _at_the_edge(self, chosen: Combination) -> list[str]:
        """Return a note for each rate or rank of the chosen setting beyond which the grid has none."""
        values = asdict(chosen)
        return [
            f"the chosen {name}, {values[name]:g}, is the {end} of the grid; the same command with more values "
            "continues from these results"
            for name, grid in self.grid.lists.items()
            if len(grid) > 1
            for end, edge in (("smallest", min(grid)), ("largest", max(grid)))
            if values[name] == edge
        ]


def run_sweep(
    folder: Path,
    data: Mapping[str, Prepared],
    grid: Grid,
    display: Display,
    *,
    workers: int = 1,
    executor: Executor = "local",
    executor_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compute the missing runs of a grid, choose a setting per data set, and write `result.json`.

    The folder may contain finished runs, also of another grid with the same other settings.

    Args:
        folder: folder of the sweep.
        data: name -> model and rows of each data set; all have the same model.
        grid: the settings.
        display: progress display.
        workers: number of processes; see `run_study`.
        executor: see `run_study`.
        executor_options: see `run_study`.

    Returns:
        The content of `result.json`: the settings that all runs share, and under `data` for each data set `metric`,
        `settings` (each with rates, rank, whether it was `chosen`, and for `set_aside` and `held_out` rows the `scores`
        by seed, their `mean` and the half width of Student's 95 % interval), `adapters` (folders of the final runs) and
        `notes`.

    Raises:
        InputError: the folder holds something else, or a sweep with other settings or rows, or too few rows can be set
            aside.
        TinyspanError: runs failed, or all settings have diverged for a data set.
    """
    study = SweepStudy(folder, data, grid, display)
    _describe(folder, data, grid)
    threads = max(1, torch.get_num_threads() // workers) if executor == "local" else 0
    run_study(
        study,
        worker=partial(work, folder, dict(data), grid, threads),
        workers=workers,
        executor=executor,
        executor_options=executor_options,
    )
    result = study.summarized()
    write_json(folder / RESULT, result)
    return result


def work(folder: Path, data: Mapping[str, Prepared], grid: Grid, threads: int) -> None:
    """Run one worker; submitit calls this."""
    if threads:
        torch.set_num_threads(threads)
    quieten()
    with Display() as display:
        run_cells(SweepStudy(folder, data, grid, display))


def sweep_table(result: Mapping[str, Any]) -> str:
    """Return the settings of every data set as a Markdown table; the chosen ones are in bold.

    Args:
        result: result of `run_sweep`.
    """
    named, ranked = len(result["data"]) > 1, any(one["rank"] for _, one in _settings(result))
    in_z = any(one["z_learning_rate"] for _, one in _settings(result))
    metrics = {entry["metric"] for entry in result["data"].values()}
    score = metrics.pop() if len(metrics) == 1 else "score"
    header = [*["data"] * named, *["rank"] * ranked, "learning rate", *["z learning rate"] * in_z]
    header += [f"set-aside {score}", f"held-out {score}"]
    rows = []
    for name, one in _settings(result):
        cells = [*[name] * named, *[str(one["rank"])] * ranked, f"{one['learning_rate']:g}"]
        cells += [*([f"{one['z_learning_rate']:g}"] if in_z else []), _shown(one["set_aside"])]
        rows.append([*(f"**{cell}**" if one["chosen"] else cell for cell in cells), _shown(one.get("held_out"))])
    return markdown(header, rows)


def _settings(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, one) for name, entry in result["data"].items() for one in entry["settings"]]


def _shown(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return ""
    return summarize(scores["scores"]).shown("{:.3f}") if "mean" in scores else "diverged"


def _common(data: Mapping[str, Prepared], grid: Grid) -> dict[str, Any]:
    """Return the settings that all runs of a sweep share."""
    settings = asdict(grid.settings)
    return {
        "model": next(iter(data.values())).model,
        "basis": grid.basis if isinstance(grid.basis, str) else grid.basis.content_hash(),
        "settings": {name: value for name, value in settings.items() if name not in VARIED},
        "options": asdict(grid.options),
        "rows_set_aside": grid.settings.set_aside,
    }


def _describe(folder: Path, data: Mapping[str, Prepared], grid: Grid) -> None:
    """Write what the runs of a sweep share, and compare it with what the folder holds.

    Raises:
        InputError: the folder holds something else, or a sweep with other settings or rows, or cannot be written.
        StorageError: the disk is full.
    """
    check_place(folder)
    path = folder / SWEEP
    begun = (LOCK, f".{SWEEP}.")  # files of a start that failed
    if not path.is_file() and folder.is_dir() and any(not one.name.startswith(begun) for one in folder.iterdir()):
        raise InputError(f"{folder} holds something other than a sweep; choose another folder")
    common = _common(data, grid)
    sets = {name: _rows_of(prepared, grid) for name, prepared in data.items()}
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, fallback_to_soft=False):
            sweep(folder)
            stored = {"common": common, "data": {}}
            if path.is_file():
                with reading(path):
                    stored = {name: dict(read_json(path)[name]) for name in stored}
            shared = {name: sets[name] for name in stored["data"] if name in sets}
            other = first_difference(stored["common"], common)
            other = other or first_difference({name: stored["data"][name] for name in shared}, shared)
            if other is not None:
                raise InputError(
                    f"{folder} holds a sweep with {other}: choose another folder, since finished runs would not be "
                    "comparable"
                )
            write_json(path, {"common": common, "data": {**stored["data"], **sets}})


def _rows_of(prepared: Prepared, grid: Grid) -> dict[str, Any]:
    run = run_of(prepared, grid.settings)
    return {name: run[name] for name in ("task_definition", "rows")}

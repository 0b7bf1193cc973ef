"""What the studies have in common: rows, runs, rates chosen by rows set aside from training, claims and the JSON file.

A run is a cell of `tinyspan.lab.scheduler`: a frozen dataclass with `method`, `rate`, `task`, `seed` and a `name`, that
of its folder. It is trained as `tinyspan` trains. A study may go on on another machine, so that each result tells its
device.
"""

import argparse
import subprocess
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import peft
import torch
from matplotlib.figure import Figure
from methods import DEVICE
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from tinyspan import SubspaceModel, Trajectory, by_layer
from tinyspan.errors import InputError, StorageError, TinyspanError
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.io.folders import RESULT, Busy
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab.figures import save
from tinyspan.lab.scheduler import CellResults, CellStudy, once, run_study
from tinyspan.lab.summary import Summary, summarize
from tinyspan.partition import Partition
from tinyspan.workflows.hardware import hardware, has_bfloat16
from tinyspan.workflows.progress import Display, quieten
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import method_of, starting_model
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.training import fine_tune, score

FACTOR = 3.0  # between neighbouring learning rates


@dataclass(frozen=True)
class Plan:
    """What all runs of a study have in common."""

    model: str = "minilm"
    train_rows: int = 1000
    choice_rows: int = 300
    validation_rows: int = 1000
    max_length: int = 64
    batch_size: int = 16
    points: int = 32
    rank: int = 8
    head_rate: float = 1e-3
    regression_start: str = "mean"  # of the labels trained on; or "zero", as transformers leaves a new head
    autocast: bool = has_bfloat16()

    def settings(self, seed: int, **changes: Any) -> Settings:
        """Return how a run with a seed is trained, but for what the study decides besides."""
        precision = "bfloat16" if self.autocast else "float32"
        common = {name: getattr(self, name) for name in ("batch_size", "max_length", "regression_start")}
        return Settings(precision=precision, seed=seed, **common, **changes)


@dataclass(frozen=True)
class Run:
    """One training."""

    method: str
    rate: float
    task: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where the run lies in its study."""
        return Path("runs", self.name)

    @property
    def name(self) -> str:
        """Of its folder."""
        method = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in self.method.lower())
        return f"{self.task}-{self.seed}-{method}-{self.rate:g}"


AnyRun = TypeVar("AnyRun", bound=Any)
Results = Mapping[AnyRun, Mapping[str, Any]]


class Study(CellStudy[AnyRun], Generic[AnyRun]):
    """A study on the command line.

    Args:
        plan: of all its runs.
        arguments: of the command line.
        kind: of its runs.
    """

    partition: Callable[[nn.Module], Partition] = staticmethod(by_layer)  # blocks of the recorded trajectories

    def __init__(self, plan: Any, arguments: argparse.Namespace, kind: type[AnyRun]) -> None:
        super().__init__(CellResults(arguments.output), Display(Console()))
        self.plan, self.arguments, self.kind = plan, arguments, kind
        self._finished: dict[Path, tuple[AnyRun, dict[str, Any]]] = {}

    @abstractmethod
    def fine_tuned(self, run: AnyRun, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
        """Make a run, and return its scores and sizes."""

    @abstractmethod
    def tell(self, content: dict[str, Any], results: Results[AnyRun]) -> None:
        """Add to the plan and the runs of the JSON file what follows from the results."""

    def path_folder(self, run: AnyRun) -> Path | None:
        """Return where a run leaves its path, None if it leaves none."""
        return self.folder / "trajectories" / f"{run.task}-{run.seed}-{run.rate:g}" if run.method == "full" else None

    def clean(self) -> None:
        """Take away the paths that no run needs any longer."""

    def report(self) -> None:
        """Write what is known into the JSON file."""
        if (path := self.arguments.json) is not None:
            results = self.finished()
            content: dict[str, Any] = {"plan": {**asdict(self.plan), "seeds": self.arguments.seeds}}
            content["runs"] = [{**asdict(run), **result} for run, result in results.items()]
            self.tell(content, results)
            write_report(path, content)

    def finished(self) -> dict[AnyRun, dict[str, Any]]:
        """Return what every finished run has left, those of earlier commands too."""
        names = [field.name for field in fields(self.kind)]
        for path in sorted((self.folder / "runs").glob(f"*/{RESULT}")):
            if path not in self._finished:
                entry = read_json(path)
                self._finished[path] = self.kind(*(entry.pop(name) for name in names)), entry
        return dict(self._finished.values())

    def make(self, run: AnyRun) -> dict[str, Any]:
        """Make a run and return what its file holds, that it has diverged too."""
        try:
            if (folder := self.path_folder(run)) is None:
                result = self.fine_tuned(run)
            else:
                self.path(run)
                result = read_json(folder / RESULT)
        except (Busy, InputError, StorageError):
            raise
        except TinyspanError as error:
            result = {"diverged": str(error)}
        return {**asdict(run), **result, "device": hardware()["device"]}

    def path(self, run: AnyRun) -> Trajectory:
        """Return the trajectory that a run leaves, recorded again if it was taken away.

        Raises:
            Busy: another process records it.
        """
        folder = self.path_folder(run)
        assert folder is not None

        def make() -> Trajectory:
            write_json(folder / RESULT, self.fine_tuned(run, [Points(folder, self.plan.points, self.partition)]))
            return Trajectory(folder)

        return once(folder, RESULT, make, lambda: Trajectory(folder))

    def run(self, run: AnyRun) -> None:
        """Make a run, unless it is finished, and tell what is known since."""
        super().run(run)
        self.report()
        self.clean()

    def start(self) -> None:
        """Make what is missing, in this process, or let the same command do it in several single-threaded ones."""
        workers, known = self.arguments.workers, self.folder / "plan.json"
        if known.is_file() and read_json(known) != asdict(self.plan):
            sys.exit(f"{self.folder} holds runs of another plan, {read_json(known)}; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(known, asdict(self.plan))
        torch.set_num_threads(1)
        worker = partial(subprocess.run, [sys.executable, *sys.argv, "--workers", "1"], check=True)
        with self.display:
            run_study(self, worker=worker, workers=workers)
        self.report()


# -- training ---------------------------------------------------------------------------------------------------------


class Points(TrajectoryCallback):
    """Records so many points, evenly along the run, the last one at its end."""

    def __init__(self, folder: Path, points: int, partition: Callable[[nn.Module], Partition]) -> None:
        super().__init__(folder, 1, partition, overwrite=True)
        self.points = points

    def expected_points(self, state: Any) -> int:
        """Return the number of points."""
        return self.points

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a point if the step is the last one of as many equal parts of the run."""
        if -state.global_step * self.points % state.max_steps < self.points:
            super().on_step_end(args, state, control, **kwargs)


def start_of(plan: Plan, rows: Prepared, seed: int) -> Any:
    """Return the pre-trained model, where it will train, with a head drawn with a seed."""
    return starting_model(rows, plan.settings(seed)).to(DEVICE)


@lru_cache(maxsize=8)
def rows_of(plan: Plan, task: str, data: Path | None) -> tuple[Prepared, Prepared]:
    """Return a task, and the task to be scored on the rows to choose by."""
    rows = prepare(
        plan.model,
        task,
        data=None if data is None else data / task,
        max_length=plan.max_length,
        train_rows=plan.train_rows + plan.choice_rows,
        validation_rows=plan.validation_rows,
    )
    assert rows.train is not None
    if len(rows.train) < plan.train_rows + plan.choice_rows:
        raise InputError(f"{task} has {len(rows.train)} training rows, expected {plan.train_rows + plan.choice_rows}")
    return rows.set_aside(plan.choice_rows)


def train(
    module: nn.Module,
    run: Any,
    settings: Settings,
    rows: Prepared,
    choice: Prepared,
    *,
    head: Sequence[str],
    head_rate: float,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a module at a run's rate, its head at another but under `freeze`, and return its scores and sizes.

    The rows to choose by are scored with seed 0, by which rates are chosen.
    """
    head_rate = run.rate if run.method == "freeze" else head_rate
    method = method_of(module.basis) if isinstance(module, SubspaceModel) else "full"
    inner: Any = module.model if isinstance(module, SubspaceModel) else module
    sizes = {name: parameter.numel() for name, parameter in inner.named_parameters() if parameter.requires_grad}
    in_head = {
        part: sum(size for name, size in sizes.items() if name.startswith(f"{part}."))
        for part, _ in inner.named_modules()
        if any(f".{part}".endswith(f".{one}") for one in head)  # PEFT puts something before it
    }
    settings = replace(
        settings,
        learning_rate=run.rate,
        z_learning_rate=run.rate,
        module_learning_rates={part: head_rate for part, size in in_head.items() if size},
    )
    result = fine_tune(module, rows, settings, method, callbacks, score_every_epoch=False)
    everything = result["subspace_parameters"] + result["ordinary_parameters"]
    told = {name: result[name] for name in ("score", "seconds", "generation") if name in result}
    if run.seed == 0:
        told["choice"] = score(module, choice, settings, method)["score"]
    told |= {"trained": everything - sum(in_head.values()), "head": sum(in_head.values())}
    return {**told, "loss": result["history"][-1]["train_loss"]}


# -- learning rates ---------------------------------------------------------------------------------------------------


def choice_scores(
    centre: float, runs_at: Callable[[float], Sequence[AnyRun]], results: Results
) -> dict[float, float | None]:
    """Return the rates to try so far, and the mean score of `runs_at` each: None until they are finished, -1 diverged.

    Three rates a factor of 3 apart; if the best one is at the end of the range the next one too, at most twice.
    """

    def judged(power: int) -> tuple[float, float | None]:
        rate = float(f"{centre * FACTOR**power:.2g}")
        runs = runs_at(rate)
        found = [results[run].get("choice") for run in runs if run in results]
        if len(found) < len(runs):
            return rate, None
        return rate, -1.0 if None in found else sum(found) / len(found)  # type: ignore[arg-type]

    scores = dict(judged(power) for power in (-1, 0, 1))
    for further in (2, 3):
        if None not in scores.values() and (side := edge(scores)) != 0:
            scores |= [judged(side * further)]
    return scores


def surely_at_most(difference: Summary, most: float) -> bool:
    """Return whether the whole interval of a difference is at most so large."""
    return difference.mean is not None and difference.half is not None and difference.mean + difference.half <= most


def edge(scores: Mapping[float, float | None]) -> int:
    """Return -1 or 1 if the best rate is the lowest or the highest one, else 0; of equal ones the lowest is best."""
    rates, best = sorted(scores), best_rate(scores)
    return -1 if best == rates[0] else int(best == rates[-1])


def best_rate(scores: Mapping[float, float | None]) -> float:
    return max(sorted(scores), key=lambda rate: scores[rate] or 0.0)


def chosen(methods: Iterable[str], scores_of: Callable[[str], dict[float, float | None]]) -> dict[str, float]:
    """Return the rate of every method whose search is finished."""
    scores = {method: scores_of(method) for method in methods}
    return {method: best_rate(tried) for method, tried in scores.items() if None not in tried.values()}


def told_rate(rate: float, scores: Mapping[float, float | None]) -> dict[str, Any]:
    """Return what the JSON file holds of the choice of a rate."""
    tried = [[tried, scores[tried]] for tried in sorted(scores)]
    return {"chosen": rate, "at the edge": edge(scores) != 0, "choice scores": tried}


def parser_of(description: str | None, name: str, kind: type[Plan]) -> argparse.ArgumentParser:
    """Return the command line that every study has, on which a plan's numbers and names can be changed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument("--render", action="store_true", help="tell what the JSON file holds, and draw it if it can be")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="one folder per GLUE task; by default from the hub")
    parser.add_argument("--output", type=Path, default=Path("runs", name), help="one file per finished run")
    parser.add_argument("--json", type=Path, help="write everything there, after every run")
    parser.add_argument("--images", type=Path, help=f"draw {name}.png there, if there is a figure")
    parser.set_defaults(name=name)
    parser.add_argument("--workers", type=int, default=1, help="single-threaded processes")
    for field in fields(kind):
        if field.type in (int, str):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    return parser


def plan_of(arguments: argparse.Namespace, kind: type[Plan]) -> Any:
    return kind(**{field.name: getattr(arguments, field.name, field.default) for field in fields(kind)})


def quiet() -> None:
    """Quieten what the libraries below say in every run."""
    quieten()
    warnings.filterwarnings("ignore", "Specified to not save", UserWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def means(content: Mapping[str, Any], method: str) -> list[float | None]:
    """Return a method's mean score over the tasks for every seed, in points; None where one is missing."""
    plan, rate = content["plan"], content["learning rates"].get(method, {}).get("chosen")
    runs = [run for run in content["runs"] if (run["method"], run["rate"]) == (method, rate)]
    scores = {(run["task"], run["seed"]): run.get("score") for run in runs}
    of_seeds = [[scores.get((task, seed)) for task in plan["tasks"]] for seed in range(plan["seeds"])]
    return [None if None in found else 100 * sum(found) / len(found) for found in of_seeds]  # type: ignore[arg-type]


def difference(content: Mapping[str, Any], one: str, other: str) -> Summary:
    """Return by how many points one method is above another, paired by seed."""
    pairs = zip(means(content, one), means(content, other), strict=True)
    return summarize([None if a is None or b is None else a - b for a, b in pairs])


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write the JSON file of a study, with the machine and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**content, "hardware": hardware(), "versions": package_versions() | {"peft": peft.__version__}})


def verdicts(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per claim."""
    lines = []
    for claim in claims:
        half = "" if claim["interval"] is None else f" ± {claim['interval']:.2f}"
        verdict = "holds" if claim["holds"] else "FAILS"
        lines.append(f"{verdict}  {claim['name']} {claim['target']:g}: {claim['value']:.3g}{half}")
    return "\n".join(lines)


def render(
    arguments: argparse.Namespace,
    tables: Callable[[Mapping[str, Any]], str],
    figure: Callable[[Mapping[str, Any]], Figure] | None = None,
) -> None:
    """Print the tables and the claims of a JSON file, and draw its figure if a folder is given for it."""
    content = read_json(arguments.json)
    print(tables(content))
    if "claims" in content:
        print(verdicts(content["claims"]))
    if figure is not None and arguments.images is not None:
        save(figure(content), arguments.images, arguments.name)

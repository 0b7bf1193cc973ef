"""What a study of many trainings is made of: rows, training, learning rates, and workers that share the runs.

A run is a frozen dataclass with `method`, `rate`, `task`, `seed` and a `name`, that of its folder. When it is finished
it leaves one file there and is never made again; what is left to do follows from the files alone. A study may go on on
another machine, so that each file tells its device.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from methods import DEVICE, trained
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler

from tinyspan import Trajectory, TrajectoryRecorder
from tinyspan.errors import InputError, StorageError, TinyspanError
from tinyspan.io.folders import Busy, claimed
from tinyspan.io.storage import package_versions, read_json, write_json
from tinyspan.lab.summary import Summary, summarize
from tinyspan.workflows.hardware import hardware, has_bfloat16, seeded
from tinyspan.workflows.models import base_model
from tinyspan.workflows.progress import quieten
from tinyspan.workflows.tasks import score_of
from tinyspan.workflows.training import Prepared, prepare

FACTOR = 3.0  # between neighbouring learning rates
RESULT = "run.json"
POLL = 2.0  # seconds between looks at what the other worker has finished

AnyRun = TypeVar("AnyRun", bound=Any)
Results = Mapping[AnyRun, Mapping[str, Any]]


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


@dataclass(frozen=True)
class Run:
    """One training."""

    method: str
    rate: float
    task: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        method = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in self.method.lower())
        return f"{self.task}-{self.seed}-{method}-{self.rate:g}"


# -- training ---------------------------------------------------------------------------------------------------------


def start_of(plan: Plan, rows: Prepared, seed: int) -> Any:
    """Return the pre-trained model, where it will train, with a head drawn with a seed."""
    label_mean = {"mean": rows.label_mean, "zero": None}[plan.regression_start]
    return base_model(rows.model, rows.task, seed, label_mean=label_mean).to(DEVICE)


@lru_cache(maxsize=8)
def rows_of(plan: Plan, task: str, data: Path | None) -> tuple[Any, Any, Any, Any]:
    """Return a task's rows to train on, to choose by and to score on, and what makes batches of them."""
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
    choice = rows.train.select(range(plan.train_rows, len(rows.train)))
    train = rows.train.select(range(plan.train_rows))
    return replace(rows, train=train), train, choice, DataCollatorWithPadding(rows.tokenizer)


def train_and_score(
    module: nn.Module,
    plan: Plan,
    run: Any,
    head: list[str],
    train: Any,
    data: Path | None,
    steps: int,
    recorder: TrajectoryRecorder | None = None,
    judged: bool = True,
) -> dict[str, Any]:
    """Train a module on some rows at a run's rate, its head at the plan's, and return its scores and sizes.

    The score on the rows to choose by is taken only where the run is `judged` by it.
    """
    rows, _, choice, collate = rows_of(plan, run.task, data)
    own, in_head = trained(module, head)
    head_rate = run.rate if run.method == "freeze" else plan.head_rate
    groups = [{"params": own, "lr": run.rate}, {"params": in_head, "lr": head_rate}]
    began = time.perf_counter()
    with seeded(run.seed):  # the same order of rows for all methods
        loss = fit(module, [group for group in groups if group["params"]], train, collate, plan, steps, recorder)
    seconds = time.perf_counter() - began
    splits = {"choice": choice, "score": rows.validation} if judged else {"score": rows.validation}
    scores = {name: score_of(rows.task, *predicted(module, split, collate, plan)) for name, split in splits.items()}
    counts = {name: sum(p.numel() for p in group) for name, group in (("trained", own), ("head", in_head))}
    return {**scores, **counts, "loss": loss, "seconds": round(seconds, 1)}


def fit(
    module: nn.Module,
    groups: list[dict[str, Any]],
    train: Any,
    collate: Any,
    plan: Plan,
    steps: int,
    recorder: TrajectoryRecorder | None,
) -> float:
    """Train, record the points along the way if there is a recorder, and return the mean loss of the last epoch."""
    sampler = LengthGroupedSampler(plan.batch_size, lengths=[len(ids) for ids in train["input_ids"]])
    batches = DataLoader(train, plan.batch_size, sampler=sampler, collate_fn=collate)
    points = {steps * point // plan.points - 1 for point in range(1, plan.points + 1)}
    if len(points) < plan.points or -1 in points:
        raise InputError(f"{steps} steps are too few for {plan.points} points")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    clipped = [parameter for group in groups for parameter in group["params"]]
    losses: list[Any] = []
    module.train()
    for step, batch in enumerate(islice((batch for _ in range(steps) for batch in batches), steps)):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=plan.autocast):
            loss = module(**batch.to(DEVICE)).loss
        if not torch.isfinite(loss):
            raise TinyspanError(f"the loss is NaN or infinite at step {step} of {steps}")
        loss.backward()
        nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if recorder is not None and step in points:
            recorder.record(step)
    if recorder is not None:
        recorder.seal()
    return float(torch.stack(losses[-len(batches) :]).mean())


@torch.no_grad()
def predicted(module: nn.Module, rows: Any, collate: Any, plan: Plan) -> tuple[Any, Any]:
    """Return labels and predictions."""
    module.eval()
    predictions, labels = [], []
    for batch in DataLoader(rows, 4 * plan.batch_size, collate_fn=collate):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=plan.autocast):
            logits = module(**batch.to(DEVICE)).logits.float().cpu()
        predictions.append(logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1))
        labels.append(batch["labels"].cpu())
    return torch.cat(labels).numpy(), torch.cat(predictions).numpy()


def recorded(output: Path, full: Any, folder: Path, points: int, record: Callable[[], object]) -> Trajectory:
    """Return the trajectory that a finished run left in a folder, recorded again if it was taken away.

    Raises:
        Busy: the run is not finished, or another process records it again.
    """
    if not (output / "runs" / full.name / RESULT).is_file():  # else two processes might record, one over the other
        raise Busy(f"{full.name} is not finished")
    with claimed(folder):
        with suppress(InputError):
            if len(trajectory := Trajectory(folder)) == points:
                return trajectory
        record()
    return Trajectory(folder)


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


def edge(scores: Mapping[float, float | None]) -> int:
    """Return -1 or 1 if the best rate is the lowest or the highest one, else 0; of equal ones the lowest is best."""
    rates, best = sorted(scores), best_rate(scores)
    return -1 if best == rates[0] else int(best == rates[-1])


def best_rate(scores: Mapping[float, float | None]) -> float:
    return max(sorted(scores), key=lambda rate: scores[rate] or 0.0)


def told_rate(rate: float, scores: Mapping[float, float | None]) -> dict[str, Any]:
    """Return what the JSON file holds of the choice of a rate."""
    tried = [[tried, scores[tried]] for tried in sorted(scores)]
    return {"chosen": rate, "at the edge": edge(scores) != 0, "choice scores": tried}


# -- workers ----------------------------------------------------------------------------------------------------------


def results_in(output: Path, kind: type[AnyRun]) -> dict[AnyRun, dict[str, Any]]:
    """Return what every finished run left."""
    names = [field.name for field in fields(kind)]
    found = [read_json(path) for path in sorted((output / "runs").glob(f"*/{RESULT}"))]
    return {kind(*(entry.pop(name) for name in names)): entry for entry in found}


def work(
    output: Path,
    schedule: Callable[[], tuple[list[AnyRun], bool]],
    make: Callable[[AnyRun], dict[str, Any]],
    after: Callable[[], None],
) -> None:
    """Make runs until none is left, each unless another process works on it.

    Args:
        output: folder of the study.
        schedule: returns all runs that are known so far, the first to make first, and whether these are all.
        make: makes one.
        after: is called after each.
    """
    while True:
        runs, complete = schedule()
        left = [run for run in runs if not (output / "runs" / run.name / RESULT).is_file()]
        if not left and complete:
            return
        for run in left:
            folder = output / "runs" / run.name
            with suppress(Busy), claimed(folder):
                if not (folder / RESULT).is_file():  # finished since we looked
                    try:
                        result = make(run)
                    except (Busy, InputError, StorageError):  # Busy: another process makes what this run needs
                        raise
                    except TinyspanError as error:
                        result = {"diverged": str(error)}
                    write_json(folder / RESULT, {**asdict(run), **result, "device": hardware()["device"]})
                    print(f"{run.name}: {result}\n", end="", flush=True)  # in one piece, also where unbuffered
                break
        else:
            time.sleep(POLL)
        after()


def start(plan: Plan, output: Path, workers: int, work: Callable[[], None]) -> None:
    """Work in this process, or let the same command do it in several single-threaded ones."""
    known = output / "plan.json"
    if known.is_file() and read_json(known) != asdict(plan):
        sys.exit(f"{output} holds runs of another plan, {read_json(known)}; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_json(known, asdict(plan))
    if workers > 1:
        processes = [subprocess.Popen([sys.executable, *sys.argv, "--workers", "1"]) for _ in range(workers)]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit("a worker failed; the same command goes on")
    else:
        torch.set_num_threads(1)
        work()


def parser_of(description: str | None, output: str) -> argparse.ArgumentParser:
    """Return the command line that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument("--render", action="store_true", help="tell what the JSON file holds, and draw it if it can be")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="one folder per GLUE task; by default from the hub")
    parser.add_argument("--output", type=Path, default=Path(output), help="one file per finished run")
    parser.add_argument("--json", type=Path, help="write everything there, after every run")
    parser.add_argument("--workers", type=int, default=1, help="single-threaded processes")
    return parser


def add_plan(parser: argparse.ArgumentParser, kind: type[Plan]) -> None:
    """Let the command line change a plan's numbers and names."""
    for field in fields(kind):
        if field.type in (int, str):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)


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

"""A combination from models to the chosen one: candidates, their scores, the choice, controls, and what is written."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tinyspan.errors import InputError, TinyspanError
from tinyspan.extras import missing_extra
from tinyspan.io.folders import COMBINED, MODEL, MODELS, RESULT, UNFINISHED, check_folder, resumable
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import read_json, write_json
from tinyspan.workflows.combine.controls import CONTROLS, run_control
from tinyspan.workflows.combine.members import Members
from tinyspan.workflows.combine.methods import METHODS, Method
from tinyspan.workflows.combine.opening import Options, open_problem
from tinyspan.workflows.combine.output import save_combined
from tinyspan.workflows.combine.problem import Candidate, Evaluation, Part, Problem, TaskRows
from tinyspan.workflows.combine.selection import Difference, Resamples, difference, resample, simplest_of_best
from tinyspan.workflows.combine.sources import Division, Source, open_sources, rows_of, trained_rows
from tinyspan.workflows.hardware import hardware
from tinyspan.workflows.models import resolve_model, tokenizer_of
from tinyspan.workflows.results import keep_reading
from tinyspan.workflows.rows import digest_of
from tinyspan.workflows.tasks import Labelled
from tinyspan.workflows.training import definition_of

__all__ = ["combine", "verdict"]

SPAN, SCORES = "span", "scores"  # folders of the state
FILES = (".safetensors", ".bin", ".json")  # endings of the files that determine a model
LINE = [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]  # positions along the line between two models
PLANE = [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]  # coefficients of each of two models


def combine(
    sources: Sequence[Source],
    output: Path,
    *,
    base: str | None = None,
    division: Division = Division(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Combine models of one base, and write the simplest candidate within noise of the best to `output`.

    Coefficients are learned on one part of the rows, candidates are compared on a second, and reported on the held-out
    rows. For one task with several models, all their parameters are combined. For several tasks with one model each,
    the layers and embeddings are combined, and each task keeps its own head. After an interruption, the same call
    continues.

    Args:
        sources: the models and rows of one task, or of several.
        output: folder to write: `model`, or `models` with one folder per task, and `result.json`.
        base: path or hub id of the base model; by default the one that the models name.
        division: numbers of rows.
        options: what is computed.
        overwrite: replace an earlier result.
        say: function that gets a line about progress.

    Returns:
        The content of `result.json`; see the guide.

    Raises:
        InputError: fewer than two models, too few rows, an unknown method, NaN in a model, equal models, or a folder
            that cannot be used.
        MismatchError: the models have different base models, tokenizers or labels.
    """
    inputs = [Path(model) for source in sources for model in source.models]
    check_folder(output, "combined", overwrite, inputs, resumable=True)
    for name in options.methods:
        if not METHODS[name].is_installed:
            raise missing_extra(str(METHODS[name].needs), f"the method {name}")
    if options.controls and find_spec("peft") is None:
        raise missing_extra("peft", "controls=True")
    for source in sources:
        if source.title in ("", ".", "..") or Path(source.title).name != source.title:
            raise InputError(f"the task's name {source.title!r} names a folder of the output: expected one without '/'")
    names = dict.fromkeys(options.methods) or sorted(METHODS, key=lambda name: METHODS[name].simplicity)
    methods = [METHODS[name] for name in names]
    opened = open_sources(sources, base)
    check_folder(output, "combined", overwrite, [Path(resolve_model(opened[0].base))], resumable=True)
    tasks = [rows_of(source, members, division) for source, members in zip(sources, opened, strict=True)]
    job = _job(sources, opened, tasks, division, options)
    with resumable(output, "combined", job, overwrite):
        if not (output / RESULT).is_file():
            work = _Work(sources, opened, tasks, output, division, options, say)
            write_json(output / RESULT, work.run(methods))
    return read_json(output / RESULT)


def _job(
    sources: Sequence[Source],
    opened: Sequence[Members],
    tasks: Sequence[TaskRows],
    division: Division,
    options: Options,
) -> dict[str, Any]:
    """Return what determines the result, in JSON types."""
    every = [member for members in opened for member in members.members]
    return {
        "command": "combine",
        "base": opened[0].base,
        "base_files": _files(Path(resolve_model(opened[0].base))),
        "models": [member.name for member in every],
        "files": [_files(Path(source)) for source in dict.fromkeys(member.source for member in every)],
        "tasks": [source.title for source in sources],
        "definitions": [definition_of(rows.task) for rows in tasks],
        "division": asdict(division),
        "options": {**asdict(options), "methods": list(options.methods)},
        "rows": [{part: digest_of(rows) for part, rows in task.parts.items()} for task in tasks],
        "versions": {name: package_versions().get(name) for name in ("tinyspan", "torch", "transformers")},
    }


def _files(folder: Path) -> list[list[Any]]:
    """Return the sizes and times of the files of a model, by which a changed one is noticed."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in FILES) if folder.is_dir() else []
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@dataclass
class _Scored:
    """A candidate with its scores on the rows to choose on and on the held-out rows."""

    candidate: Candidate
    choose: Evaluation
    test: Evaluation
    samples: dict[Part, Resamples]


class _Work:
    """A combination in progress; all that takes time is kept in the state folder."""

    def __init__(
        self,
        sources: Sequence[Source],
        opened: Sequence[Members],
        tasks: Sequence[TaskRows],
        output: Path,
        division: Division,
        options: Options,
        say: Callable[[str], None],
    ) -> None:
        self.sources, self.tasks, self.output, self.division = sources, tasks, output, division
        self.options, self.say = options, say
        self.opened, self.base = opened, opened[0].base
        self.members = [member for members in opened for member in members.members]
        self.state = output / UNFINISHED
        for folder in (SPAN, SCORES):
            (self.state / folder).mkdir(exist_ok=True)
        self.began = time.perf_counter()

    def run(self, methods: Sequence[Method]) -> dict[str, Any]:
        options = self.options
        try:
            problem = open_problem(self.opened, self.tasks, self.state / SPAN, self.state / SCORES, options, self.say)
            methods = self.applicable(problem, methods)
        except InputError:
            if not any((self.state / SCORES).iterdir()):  # nothing is kept of what cannot be combined
                for folder in (SPAN, SCORES):
                    shutil.rmtree(self.state / folder)
            raise
        scored = self.scored(problem, methods)
        chosen = simplest_of_best(
            [one.candidate for one in scored], [one.choose for one in scored], [one.samples["choose"] for one in scored]
        )
        controls = self.controls(problem, scored, scored[chosen]) if self.options.controls else []
        geometry = self.geometry(problem, scored) if self.options.geometry else {}
        self.write(problem, scored[chosen])
        return self.result(problem, scored, chosen, controls, geometry)

    # -- candidates --------------------------------------------------------------------------------------------------

    def applicable(self, problem: Problem, methods: Sequence[Method]) -> list[Method]:
        """Return the methods that apply and whose packages are installed; say which are left out.

        Raises:
            InputError: no method is left.
        """
        chosen = []
        for method in methods:
            if not method.applies(problem):
                if self.options.methods:
                    self.say(f"left out: {method.name} does not apply to these models and tasks")
            elif not method.is_installed:
                self.say(f"left out: {missing_extra(str(method.needs), f'the method {method.name}')}")
            else:
                chosen.append(method)
        if not chosen:
            names = ", ".join(method.name for method in methods)
            raise InputError(f"none of the methods applies to these models and tasks: {names}")
        return chosen

    def scored(self, problem: Problem, methods: Sequence[Method]) -> list[_Scored]:
        """Return the candidates of the methods, with their scores."""
        scored: list[_Scored] = []
        for method in methods:
            for candidate in method.build(problem):
                if any(candidate.name == one.candidate.name for one in scored):
                    raise InputError(f"two candidates have the name {candidate.name!r}, the second of {method.name}")
                one = _Scored(candidate, problem.evaluate(candidate, "choose"), problem.evaluate(candidate, "test"), {})
                if -math.inf in (one.choose.mean, one.test.mean):
                    self.say(f"left out: {candidate.name}, whose predictions are NaN or infinite")
                    continue
                evaluations: tuple[tuple[Part, Evaluation], ...] = (("choose", one.choose), ("test", one.test))
                for part, evaluation in evaluations:
                    one.samples[part] = problem.stored_array(
                        f"{candidate.name} {part}", partial(resample, problem, evaluation, part)
                    )
                scored.append(one)
        if not scored:
            raise TinyspanError("the predictions of all candidates are NaN or infinite; leave out the model that is")
        return scored

    def controls(self, problem: Problem, scored: Sequence[_Scored], chosen: _Scored) -> list[dict[str, Any]]:
        """Train the controls from the best linear candidate that learned nothing, and compare them with the chosen."""
        linear = [one for one in scored if not one.candidate.learned and one.candidate.coefficients is not None]
        start = max(linear or scored, key=lambda one: one.choose.mean)
        results = []
        for control in CONTROLS:
            runs = []
            for rate in control.rates:

                def compute(rate: float = rate, control: Any = control) -> dict[str, Any]:
                    done = run_control(problem, start.candidate, control, rate)
                    values = {part: problem.evaluation(done.predictions[part], part) for part in done.predictions}
                    if -math.inf in [value.mean for value in values.values()]:
                        return {"name": done.name, "rate": rate, "choose": None}
                    samples = resample(problem, values["choose"], "choose")
                    gap = difference(samples, chosen.samples["choose"], values["choose"].mean - chosen.choose.mean)
                    self.say(f"{done.name} at {rate:g}: {values['choose'].mean:.4f}")
                    return {
                        "name": done.name,
                        "rate": rate,
                        "passes": done.passes,
                        "start": start.candidate.name,
                        "choose": values["choose"].mean,
                        "test": _part(problem, values["test"]),
                        "difference_to_chosen": listed(gap),
                    }

                name = f"{control.name} {rate} {start.candidate.name} {chosen.candidate.name}"
                runs.append(problem.stored(name, compute))
            if runs := [run for run in runs if run["choose"] is not None]:  # others diverged
                results.append(max(runs, key=lambda run: float(run["choose"])))
        return results

    def geometry(self, problem: Problem, scored: Sequence[_Scored]) -> dict[str, Any]:
        """Return the loss on the rows to learn from, on the line and in the plane between two models."""
        singles = [one for one in scored if one.candidate.method == "single"]
        if problem.is_run or len(singles) < 2:
            first, second = 0, problem.shape[1] - 1
        else:
            best = sorted(singles, key=lambda one: -one.choose.mean)[:2]
            first, second = sorted(problem.models.index(one.candidate.name) for one in best)

        def loss_at(x: float, y: float) -> float | None:
            coefficients = torch.zeros(problem.shape)
            coefficients[:, first] += x
            coefficients[:, second] += y
            problem.span.set(coefficients)
            with torch.no_grad():
                losses = [
                    sum(
                        float(problem.loss(problem.span.subspace, index, batch)) * len(batch["labels"])
                        for batch in problem.batches(index, "learn")
                    )
                    / len(rows.parts["learn"])
                    for index, rows in enumerate(problem.tasks)
                ]
            mean = sum(losses) / len(losses)
            return mean if math.isfinite(mean) else None

        def compute() -> dict[str, Any]:
            self.say(f"loss between {problem.models[first]} and {problem.models[second]}")
            return {
                "models": [problem.models[first], problem.models[second]],
                "line": {"positions": LINE, "losses": [loss_at(1 - t, t) for t in LINE]},
                "plane": {"coefficients": PLANE, "losses": [[loss_at(x, y) for x in PLANE] for y in PLANE]},
            }

        return problem.stored("geometry", compute)

    # -- output ------------------------------------------------------------------------------------------------------

    def write(self, problem: Problem, chosen: _Scored) -> None:
        """Write the chosen model, or the models of all tasks with one encoder; of an interrupted call, write them anew.

        Thresholds of the labels are fitted on the rows to choose on.
        """
        candidate = chosen.candidate
        for name in (MODEL, MODELS):
            shutil.rmtree(self.output / name, ignore_errors=True)
        with ExitStack() as stack:
            heads: nn.Module = stack.enter_context(problem.at(candidate))
            if candidate.update is None:
                heads = problem.span.subspace.merge()
                stack.callback(problem.span.subspace.unmerge)
            problem.units.close()
            device = problem.span.subspace.z[0].device
            stack.callback(heads.to, device)  # before theta_0 is written into them again
            heads = heads.to("cpu")
            models: dict[str, PreTrainedModel] = {
                rows.name: model
                for rows, model in zip(self.tasks, heads.models, strict=True)  # type: ignore[arg-type]
            }
            tokenizer = tokenizer_of(self.base, next(iter(models.values())).config)
            for index, (rows, model) in enumerate(zip(self.tasks, models.values(), strict=True)):
                thresholds = _thresholds(rows, chosen.choose.predictions[index], problem.labels(index, "choose"))
                keep_reading(model.config, self.division.max_length, thresholds, tokenizer)
            first, model = next(iter(models.items()))
            if {name for name, _ in model.named_parameters()} == problem.span.heads.shared:
                models = {first: model}
            save_combined(models, dict.fromkeys(models, tokenizer), self.output, problem.span.heads.shared)

    def result(
        self,
        problem: Problem,
        scored: Sequence[_Scored],
        chosen: int,
        controls: list[dict[str, Any]],
        geometry: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the content of `result.json`."""
        singles = [one for one in scored if one.candidate.method == "single"]
        best = max(singles, key=lambda one: one.choose.mean) if singles else None
        rows = [self.described(problem, one, best) for one in scored]
        return {
            "method": COMBINED,
            "base": self.base,
            "models": [
                {"name": member.name, "source": member.source, "order": member.order} for member in self.members
            ],
            "tasks": [
                {
                    "name": task.name,
                    "type": task.task.type,
                    "metric": task.task.metric,
                    "labels": list(task.labels),
                    "rows": {part: len(part_rows) for part, part_rows in task.parts.items()},
                    **described_source(source),
                    "trained": trained_rows(source, members),
                }
                for task, source, members in zip(self.tasks, self.sources, self.opened, strict=True)
            ],
            "blocks": problem.span.names,
            "candidates": rows,
            "own_models": self.own(problem, singles),
            "best_single": None if best is None else best.candidate.name,
            "chosen": scored[chosen].candidate.name,
            "verdict": verdict(rows, chosen, None if best is None else best.candidate.name, controls),
            "controls": controls,
            "geometry": dict(geometry),
            "options": {**asdict(self.options), "methods": list(self.options.methods)},
            "max_length": self.division.max_length,
            "seconds": round(time.perf_counter() - self.began, 2),
            "versions": package_versions(),
            "hardware": hardware(),
        }

    def described(self, problem: Problem, one: _Scored, best: _Scored | None) -> dict[str, Any]:
        """Return a candidate in JSON types."""
        entry: dict[str, Any] = {
            "name": one.candidate.name,
            "method": one.candidate.method,
            "learned": one.candidate.learned,
            "passes": one.candidate.passes,
            "choose": _part(problem, one.choose),
            "test": _part(problem, one.test),
        }
        if best is not None:
            for part, mine, theirs in (("choose", one.choose, best.choose), ("test", one.test, best.test)):
                gap = difference(one.samples[part], best.samples[part], mine.mean - theirs.mean)  # type: ignore[index]
                entry[part]["difference_to_best_single"] = listed(gap)
        if one.candidate.coefficients is not None:
            entry["coefficients"] = one.candidate.coefficients.tolist()
        return entry

    def own(self, problem: Problem, singles: Sequence[_Scored]) -> dict[str, Any] | None:
        """Return the scores of the tasks' own models, which are several encoders; None for one task."""
        if len(self.tasks) == 1 or len(singles) != len(self.tasks):
            return None
        by_name = {one.candidate.name: one for one in singles}
        scores = [by_name[member.name].test.scores[index] for index, member in enumerate(self.members)]
        return {"scores": scores, "mean": problem.mean(scores)}


def _thresholds(rows: TaskRows, predictions: Any, labels: Any) -> dict[str, float] | None:
    """Return the threshold of each label, fitted on rows that are not reported on; None if the task has none."""
    if not isinstance(rows.task, Labelled) or rows.task.type != "multi-label":
        return None
    task = rows.task.fitted(predictions, labels).task
    thresholds: dict[str, float] | None = task.details(predictions, labels, rows.labels).get("thresholds")
    return thresholds


def described_source(source: Source) -> dict[str, Any]:
    """Return the rows that a source names, in JSON types, without what it does not say."""
    values = {
        "data": None if source.data is None else str(source.data.absolute()),
        "text": list(source.text),
        "train_rows": source.train_rows,
        "set_aside": source.set_aside,
        "eval_rows": source.eval_rows,
        "origin": dict(getattr(source.task, "origin", {})),
    }
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def listed(gap: Difference) -> list[float | None]:
    """Return a difference and its interval in JSON types, where an interval that is not defined is null."""
    return [value if math.isfinite(value) else None for value in gap]


def _part(problem: Problem, evaluation: Evaluation) -> dict[str, Any]:
    return {"mean": evaluation.mean, "scores": list(evaluation.scores)}


def verdict(
    rows: Sequence[Mapping[str, Any]], chosen: int, best: str | None, controls: Sequence[Mapping[str, Any]]
) -> str:
    """Return a sentence about the chosen candidate, and one about training if that does better.

    Training does better if it is significantly better on the rows to choose on.

    Args:
        rows: the candidates in JSON types.
        chosen: position of the chosen one.
        best: name of the best single model.
        controls: the trained controls in JSON types.
    """
    one = rows[chosen]
    if best is None:
        text = f"{one['name']} was chosen; no single model was compared."
    elif one["method"] == "single":
        which = "the best single model" if one["name"] == best else "the single model"
        text = f"No combination beat {which}, {one['name']}, beyond noise on the rows to choose on."
    else:
        value, low, high = one["test"]["difference_to_best_single"]
        interval = "no interval" if low is None else f"95 % interval {low:+.3f} to {high:+.3f}"
        text = (
            f"{one['name']} was chosen; on the held-out rows it differs from the best single model, {best}, by "
            f"{value:+.3f} ({interval})."
        )
    better = [control for control in controls if (control["difference_to_chosen"][1] or 0) > 0]
    if better:
        top = max(better, key=lambda control: float(control["choose"]))
        text += (
            f" Training on the same rows does better: {top['name']} at {top['rate']:g} has {top['test']['mean']:.3f} "
            f"on the held-out rows, {one['name']} {one['test']['mean']:.3f}."
        )
    return text

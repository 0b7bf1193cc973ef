"""What is the span of a few fine-tuned models good for? Combinations of tasks, of checkpoints, and their cost.

    python benchmarks/combine.py --data DIR --output runs/combine --json docs/results/combine.json
    python benchmarks/combine.py --part cost --data DIR --output runs/combine --json docs/results/combine.json
    python benchmarks/combine.py --part decoders --models DIR --data DIR --output runs/combine

Four parts, each resumable: every fine-tuned model and every scored candidate is a file in `--output`, which is never
made again.

* `tasks`: one encoder for all tasks of the suite `small`. One model per task and seed is fine-tuned on `--train-rows`
  rows; each keeps its pooler and head. The coefficients are learned from 128, 32 and 512 rows a task that no model was
  trained on. Candidates are compared on `--choose-rows` others, and every figure is of held-out rows. Controls train
  the heads, all weights or a LoRA on the same rows, from the best scale of task arithmetic, each at one learning rate:
  the better of two in an earlier study of one seed and four tasks.
* `checkpoints`: 12 points of a run at a constant learning rate, of which all up to a third and all up to the end are
  combined, beside runs of these lengths whose rate decays linearly to 0.
* `decoders`: two LoRAs of SmolLM2-135M-Instruct on different texts, one that asks a question which a sentence of QNLI
  answers and one that says a sentence of MRPC in other words, combined and scored by the perplexity of both. The model
  is what `benchmarks/language.py --fetch` puts into `--models`.
* `cost`: seconds and bytes written per candidate, without scoring it, of coefficients set in place and of a merged
  model that is written to disk and loaded again, as searches over merged models do. If mergekit is installed, its own
  merge to disk, which mergekit-evolve calls for every candidate, is measured too.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import peft
import torch
from transformers import AutoModelForCausalLM

from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab.summary import summarize
from tinyspan.workflows.combine.controls import CONTROLS, run_control
from tinyspan.workflows.combine.members import Members
from tinyspan.workflows.combine.methods import METHODS
from tinyspan.workflows.combine.methods.evolution import CANDIDATES
from tinyspan.workflows.combine.opening import Options, open_problem
from tinyspan.workflows.combine.problem import Candidate, Problem, TaskRows
from tinyspan.workflows.combine.runner import combine
from tinyspan.workflows.combine.sources import Division, Source, open_sources, rows_of
from tinyspan.workflows.combine.span import FIRST
from tinyspan.workflows.hardware import hardware, has_bfloat16, seeded
from tinyspan.workflows.models import base_model
from tinyspan.workflows.progress import Display, quieten
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import record
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import Task, get_task

MODEL, MAX_LENGTH, BATCH = "minilm", 64, 16
TASKS = ("mrpc", "sst2", "stsb", "rte", "qnli")
SIZES = (128, 32, 512)  # rows of each task to learn from
ONCE, GRIDS = "once", ("uniform-average", "task-arithmetic", "ties", "dare")  # do not depend on these rows
REWRITTEN = "mergekit-evolve"  # its search, with every candidate written and loaded again
STEPS = [(128, method) for method in (ONCE, "gradient", "controls", "evolution", "gauss-newton")]
STEPS += [(size, method) for size in (32, 512) for method in ("gradient", "controls")]
STEPS += [(32, method) for method in ("evolution", "gauss-newton")]
STEPS += [(128, REWRITTEN)]
STEP_NAMES = {f"{method}-{size}": (size, method) for size, method in STEPS}
CONTROL_RATES = {control.name: rate for control, rate in zip(CONTROLS, (1e-3, 1e-4, 1e-3), strict=True)}
OWN = "each task's own model"
EPOCHS, CONSTANT = 6, 12  # of the runs whose checkpoints are combined, and their points
RUN_TASKS = ("sst2", "mrpc", "qnli")
RATE = 1e-4
TEXTS = {  # task -> label of the rows, prompt with one of their columns, and column of the completion
    "qnli": (0, "Text: {sentence}\nQuestion:", "question"),
    "mrpc": (1, "Text: {sentence1}\nIn other words:", "sentence2"),
}
DECODER = {"train": 192, "learn": 16, "choose": 32, "test": 100}  # rows of each text
TOKENS, COMPLETION, LORA_RANK, LORA_RATE, LORA_BATCH = 48, 32, 8, 1e-3, 8
SEARCHED = {"uniform-average": None, "task-arithmetic": None, "ties": None, "evolution": None, "gradient": 1}


def models_of(task: str, seed: int, plan: argparse.Namespace, display: Display) -> Path:
    """Return the folder of a fine-tuned model; it is trained if it is not there."""
    folder = plan.output / "models" / f"{task}-{seed}"
    if not (folder / "result.json").is_file():
        rows = plan.train_rows + plan.new_rows
        settings = Settings(3, BATCH, MAX_LENGTH, RATE, seed=seed, set_aside=plan.new_rows)
        display.say(f"fine-tuning on {task}, seed {seed}")
        record(rows_for(task, rows, plan), settings, folder, dtype=torch.bfloat16, score_every_epoch=False)
    return folder / "model"


def rows_for(task: str, rows: int, plan: argparse.Namespace) -> Prepared:
    return prepare(
        MODEL,
        task,
        data=plan.data / task,
        max_length=MAX_LENGTH,
        train_rows=rows,
        validation_rows=plan.eval_rows,
    )


def same_plan(folder: Path, taken: dict[str, int]) -> None:
    """Write the numbers of rows to the folder of a study, whose steps are kept under their names alone.

    Raises:
        SystemExit: the folder has steps with other numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (path := folder / "plan.json").is_file() and (kept := read_json(path)) != taken:
        raise SystemExit(f"{folder} holds steps with {kept}, not {taken}: give another --output")
    write_json(path, taken)


# -- tasks ------------------------------------------------------------------------------------------------------------


def tasks_part(plan: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Return the scores of all candidates that were computed, now or before.

    128 rows come first, and what is cheap before what takes long.
    """
    entries: list[dict[str, Any]] = []
    for size, method in (STEP_NAMES[name] for name in plan.steps):
        for seed in plan.seeds:
            path = plan.output / f"tasks-{seed}" / f"{method}-{size}.json"
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"entries": one_step(size, method, seed, plan, display)})
    for size, method in STEPS:
        for path in sorted(plan.output.glob(f"tasks-*/{method}-{size}.json")):
            entries += read_json(path)["entries"]
    return {"entries": entries, "summary": table_of(entries)}


def one_step(size: int, method: str, seed: int, plan: argparse.Namespace, display: Display) -> list[dict[str, Any]]:
    """Return the candidates of one method, or of those that learn nothing, or the controls, of one seed.

    Of every grid, only the candidate that is best on the rows to choose on is scored on the held-out rows.
    """
    sources = [
        Source(
            get_task(task), [str(models_of(task, seed, plan, display))], data=plan.data / task, eval_rows=plan.eval_rows
        )
        for task in TASKS
    ]
    opened = open_sources(sources, MODEL)
    division = Division(max(SIZES), plan.choose_rows, MAX_LENGTH, seed)
    whole = [rows_of(source, members, division) for source, members in zip(sources, opened, strict=True)]
    folder = plan.output / f"tasks-{seed}"
    for name in ("span", "scores", f"scores-{size}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = Options(seed=seed)
    problem = open_problem(opened, whole, folder / "span", folder / "scores", options, display.say)
    if method == ONCE:
        singles = [scored(problem, candidate, seed, None) for candidate in METHODS["single"].build(problem)]
        own = [singles[index]["scores"][index] for index in range(len(sources))]
        reference = {"name": OWN, "method": OWN, "seed": seed, "rows": None, "mean": problem.mean(own), "scores": own}
        best = [scored(problem, best_of(problem, name), seed, None) for name in GRIDS]
        return [reference, max(singles, key=lambda entry: entry["choose"]), *best]
    few = [with_fewer(rows, size) for rows in whole]
    start = best_of(problem, "task-arithmetic")
    problem = open_problem(opened, few, folder / "span", folder / f"scores-{size}", options, display.say)
    if method == "controls":
        return [trained(problem, start, control, seed, size, display) for control in CONTROLS]
    if method == REWRITTEN:
        return [rewritten(problem, seed, size, folder)]
    candidates = METHODS[method].build(problem)
    if method == "gauss-newton":  # one number per model: with one per layer, a Jacobian takes 70 passes over all rows
        candidates = islice(candidates, 1)
    return [scored(problem, candidate, seed, size) for candidate in candidates]


def best_of(problem: Problem, method: str) -> Candidate:
    """Return the candidate of a method with the best score on the rows to choose on."""
    return max(METHODS[method].build(problem), key=lambda candidate: problem.evaluate(candidate, "choose").mean)


def with_fewer(rows: TaskRows, size: int) -> TaskRows:
    """Return the task with the first of its rows to learn from."""
    learn = rows.parts["learn"].select(range(size))
    return TaskRows(rows.name, rows.task, rows.labels, rows.collate, {**rows.parts, "learn": learn})


def scored(problem: Problem, candidate: Candidate, seed: int, size: int | None) -> dict[str, Any]:
    choose, test = problem.evaluate(candidate, "choose"), problem.evaluate(candidate, "test")
    return {
        "name": candidate.name,
        "method": candidate.method,
        "seed": seed,
        "rows": size,
        "learned": candidate.learned,
        "passes": candidate.passes,
        "choose": choose.mean,
        "mean": test.mean,
        "scores": list(test.scores),
    }


def rewritten(problem: Problem, seed: int, size: int, folder: Path) -> dict[str, Any]:
    """Return the candidate that the search of mergekit-evolve 0.1.5 finds among as many models as `evolution` scores.

    CMA-ES starts at the average with a standard deviation of 1/6; a weight is the absolute value of a number; the best
    model that was seen is taken. Every model is merged, written in bfloat16 and loaded again, and then scored as all
    others, in place: mergekit-evolve itself does not keep heads of classification.
    """

    def compute() -> dict[str, Any]:
        import cmaes

        count = problem.shape[1]
        search = cmaes.CMA(mean=np.full(count, 1 / count), sigma=1 / 6, seed=seed)
        best, passes, making, scoring = (-math.inf, np.zeros(count)), problem.passes, 0.0, 0.0
        with TemporaryDirectory(dir=folder) as scratch:
            for _ in range(-(-CANDIDATES // search.population_size)):
                told = []
                for numbers in [search.ask() for _ in range(search.population_size)]:
                    began = time.perf_counter()
                    state = written_and_loaded(problem, torch.tensor(np.abs(numbers)).float(), Path(scratch) / "merged")
                    making += time.perf_counter() - began
                    began = time.perf_counter()
                    score = problem.evaluation(at_weights(problem, state), "learn").mean
                    scoring += time.perf_counter() - began
                    told.append((numbers, -score))
                    best = max(best, (score, np.abs(numbers)), key=lambda pair: pair[0])
                search.tell(told)
        models = problem.passes - passes
        return {"coefficients": best[1].tolist(), "passes": models, "making": making, "scoring": scoring}

    stored = problem.stored(REWRITTEN, compute)
    coefficients = torch.tensor(stored["coefficients"]).float().expand(problem.shape)
    candidate = Candidate(REWRITTEN, REWRITTEN, coefficients, learned=problem.shape[1], passes=stored["passes"])
    return scored(problem, candidate, seed, size) | {"making": stored["making"], "scoring": stored["scoring"]}


def written_and_loaded(problem: Problem, numbers: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters of the first model at coefficients, written in bfloat16 and loaded again."""
    model: Any = problem.span.heads.models[0]
    problem.span.set(numbers.expand(problem.shape))
    model.save_pretrained(folder, state_dict={name: value.bfloat16() for name, value in model.named_parameters()})
    return dict(type(model).from_pretrained(folder).named_parameters())


def at_weights(problem: Problem, state: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """Return the predictions for the rows to learn from, at the parameters that the models combine."""

    def update(block: str, differences: torch.Tensor) -> torch.Tensor:
        (found,) = (one for one in problem.span.partition if one.name == block)
        return found.flatten({spec.name: changes[spec.name] for spec in found.parameters})

    start = problem.span.subspace.base_weights()
    changes = {name: state[name.removeprefix(FIRST)].detach().float() - value for name, value in start.items()}
    with problem.span.written(update) as heads:
        return problem.predictions(heads, "learn")


def trained(problem: Problem, start: Candidate, control: Any, seed: int, size: int, display: Display) -> dict[str, Any]:
    """Return a control at its one learning rate of this study."""
    rate = CONTROL_RATES[control.name]

    def compute() -> dict[str, Any]:
        run = run_control(problem, start, control, rate)
        choose = problem.evaluation(run.predictions["choose"], "choose")
        test = problem.evaluation(run.predictions["test"], "test")
        display.say(f"{control.name} at {rate:g}: {test.mean:.4f}")
        own = {"name": control.name, "method": "control", "seed": seed, "rows": size, "rate": rate}
        return {**own, "passes": run.passes, "choose": choose.mean, "mean": test.mean, "scores": list(test.scores)}

    return problem.stored(control.name, compute)


def table_of(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over seeds of every kind of candidate, and its share of the tasks' own models, seed by seed.

    A seed whose own models were not scored has no share.
    """
    own = {entry["seed"]: entry["mean"] for entry in entries if entry["method"] == OWN}
    rows: dict[tuple[str, int | None], dict[int, float]] = {}
    for entry in entries:
        grid = entry["method"] in ("single", "task-arithmetic", "ties", "dare")
        key = (entry["method"] if grid else entry["name"], entry["rows"])
        rows.setdefault(key, {})[entry["seed"]] = entry["mean"]
    return [
        {
            "name": name,
            "rows": size,
            "values": list(values.values()),
            **summary_of(list(values.values())),
            "share": summary_of([value / own[seed] for seed, value in values.items() if seed in own]),
        }
        for (name, size), values in rows.items()
    ]


def summary_of(values: list[float]) -> dict[str, Any]:
    summary = summarize(values)
    return {"mean": summary.mean, "half": summary.half}


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints_part(plan: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Return the scores of combined checkpoints and of decayed runs that were computed, now or before."""
    (plan.output / "checkpoints").mkdir(exist_ok=True)
    for task, seed, third in product(plan.run_tasks, plan.seeds, (True, False)):
        path = plan.output / "checkpoints" / f"{run_name(task, seed, third)}.json"
        if not path.is_file():
            write_json(path, one_run(task, seed, third, plan, display))
    runs = [read_json(path) for path in sorted((plan.output / "checkpoints").glob("*.json"))]
    return {"runs": runs, "summary": table_of_runs(runs)}


def run_name(task: str, seed: int, third: bool) -> str:
    return f"{task}-{seed}-{'third' if third else 'whole'}"


def one_run(task: str, seed: int, third: bool, plan: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Return the candidates of the checkpoints up to a third, or the end, of a run at a constant rate."""
    folder = plan.output / "checkpoints" / run_name(task, seed, third)
    if not (folder / "result.json").is_file():
        points = constant_run(task, seed, plan, display)
        taken = points[: CONSTANT // 3] if third else points
        source = Source(
            with_new_rows(task, plan), [str(point) for point in taken], train_rows=0, eval_rows=plan.eval_rows
        )
        division = Division(plan.new_rows - plan.choose_rows, plan.choose_rows, MAX_LENGTH, seed)
        methods = tuple(name for name in METHODS if name not in ("entropy", "gauss-newton"))
        combine(
            [source],
            folder,
            base=MODEL,
            division=division,
            options=Options(methods, geometry=False, seed=seed),
            say=display.say,
        )
    result = read_json(folder / "result.json")
    return {
        "task": task,
        "seed": seed,
        "length": "third" if third else "whole",
        "decayed": decayed_score(task, seed, third, plan, display),
        "chosen": result["chosen"],
        "best_single": result["best_single"],
        "candidates": [
            {key: entry[key] for key in ("name", "method", "learned", "passes")}
            | {"choose": entry["choose"]["mean"], "test": entry["test"]["mean"]}
            for entry in result["candidates"]
        ],
    }


def table_of_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over seeds of every kind of candidate, by task and length.

    Of every method with several candidates, the one that is best on the rows to choose on counts. `last point` is the
    end of the run at a constant rate.
    """
    rows: dict[tuple[str, str, str], dict[int, float]] = {}
    for run in runs:
        best: dict[str, dict[str, Any]] = {}
        singles = [entry for entry in run["candidates"] if entry["method"] == "single"]
        for entry in run["candidates"]:
            name = entry["name"] if entry["learned"] else entry["method"]
            if name not in best or entry["choose"] > best[name]["choose"]:
                best[name] = entry
            if entry["name"] == run["chosen"]:
                best["chosen"] = entry
        scores = {"decayed run": run["decayed"], "last point": singles[-1]["test"]}
        for name, score in (scores | {name: entry["test"] for name, entry in best.items()}).items():
            rows.setdefault((run["task"], run["length"], name), {})[run["seed"]] = score
    return [
        {
            "task": task,
            "length": length,
            "name": name,
            "values": list(values.values()),
            **summary_of([*values.values()]),
        }
        for (task, length, name), values in rows.items()
    ]


def with_new_rows(task: str, plan: argparse.Namespace) -> Task:
    """Return a task whose training rows are those that `constant_run` sets aside, which its checkpoints do not say."""
    registered = get_task(task)
    aside = rows_for(task, plan.train_rows + plan.new_rows, plan).with_aside(plan.new_rows).aside_numbers
    rows = {
        "train": registered.read("train", plan.data / task).loc[[*aside]],
        "validation": registered.read("validation", plan.data / task),
    }
    return replace(registered, source=lambda _, split: rows[split].copy())  # type: ignore[call-arg]


def constant_run(task: str, seed: int, plan: argparse.Namespace, display: Display) -> list[Path]:
    """Return the folders of the checkpoints of a run at a constant rate; it is trained if they are not there."""
    folder = plan.output / "constant" / f"{task}-{seed}"
    rows = rows_for(task, plan.train_rows + plan.new_rows, plan).with_aside(plan.new_rows)
    assert rows.train is not None
    total = EPOCHS * -(-len(rows.train) // BATCH)
    steps = [round(total * (index + 1) / CONSTANT) for index in range(CONSTANT)]
    places = [folder / f"checkpoint-{step}" for step in steps]
    if not (folder / "done").is_file():
        display.say(f"a run at a constant rate on {task}, seed {seed}")
        model = base_model(MODEL, rows.task, seed, label_mean=rows.label_mean)
        with seeded(seed), rows.task.training_units(model):
            for step in training_steps(model, rows, total):
                if step in steps:
                    model.save_pretrained(folder / f"checkpoint-{step}")
                    rows.tokenizer.save_pretrained(folder / f"checkpoint-{step}")
        (folder / "done").touch()
    return places


def training_steps(model: Any, rows: Prepared, total: int) -> Iterator[int]:
    """Train at a constant rate, and yield the number of steps after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    done = 0
    while True:
        order = torch.randperm(len(rows.train or ())).tolist()
        for first in range(0, len(order), BATCH):
            batch = rows.collate([rows.train[row] for row in order[first : first + BATCH]])  # type: ignore[index]
            rows.task.loss_of(model, batch, rows.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            yield done
            if done == total:
                return


def decayed_score(task: str, seed: int, third: bool, plan: argparse.Namespace, display: Display) -> float:
    """Return the score of a run of the same length whose rate decays."""
    folder = plan.output / "decayed" / run_name(task, seed, third)
    if not (folder / "result.json").is_file():
        display.say(f"a decayed run on {task}, seed {seed}")
        epochs = EPOCHS // 3 if third else EPOCHS
        settings = Settings(epochs, BATCH, MAX_LENGTH, RATE, seed=seed, set_aside=plan.new_rows)
        rows = rows_for(task, plan.train_rows + plan.new_rows, plan)
        record(rows, settings, folder, dtype=torch.bfloat16, score_every_epoch=False)
    return float(read_json(folder / "result.json")["score"])


# -- decoders ---------------------------------------------------------------------------------------------------------


def decoders_part(plan: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Return the perplexities of two decoders, their combinations and the base that were computed, now or before."""
    folder = plan.output / "decoders"
    for seed in plan.seeds:
        loras = {name: lora_of(name, seed, plan, display) for name in TEXTS}
        for method in plan.decoder_methods:
            path = folder / f"{method}-{seed}.json"
            if not path.is_file():
                write_json(path, {"entries": one_decoder(method, loras, seed, plan, display)})
    paths = [path for method in (ONCE, *SEARCHED) for path in sorted(folder.glob(f"{method}-[0-9]*.json"))]
    entries = [entry for path in paths for entry in read_json(path)["entries"]]
    return {
        "texts": list(TEXTS),
        "rows": DECODER,
        "entries": entries,
        "summary": table_of_texts(entries),
    }


def write_texts(folder: Path, name: str, plan: argparse.Namespace) -> None:
    """Write prompts and completions: rows to train on, others to learn from and to choose on, and held-out rows."""
    label, prompt, completion = TEXTS[name]
    count, new = DECODER["train"], DECODER["learn"] + DECODER["choose"]
    for split, held_out in (("train", False), ("validation", True)):
        rows = get_task(name).read(split, plan.data / name)  # type: ignore[arg-type]
        rows = rows[rows["label"] == label].sample(frac=1, random_state=0)
        texts = pd.DataFrame(
            {"prompt": [prompt.format(**row) for _, row in rows.iterrows()], "completion": " " + rows[completion]}
        ).drop_duplicates("prompt")
        parts = {"trained": texts[:count], "new": texts[count : count + new]}
        for part, found in {"trained": texts, "new": texts}.items() if held_out else parts.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            found.to_json(folder / part / f"{split}.jsonl", orient="records", lines=True)


def decoder_of(plan: argparse.Namespace) -> str:
    return str(plan.models / "decoder" / "model")


def lora_of(name: str, seed: int, plan: argparse.Namespace, display: Display) -> Path:
    """Return the folder of a LoRA of queries and values on one text; it is trained if it is not there."""
    folder: Path = plan.output / "decoders" / "loras" / f"{name}-{seed}"
    if (folder / "adapter_config.json").is_file():
        return folder
    display.say(f"a LoRA on {name}, seed {seed}")
    write_texts(plan.output / "decoders" / "rows" / name, name, plan)
    rows = prepare(
        decoder_of(plan),
        "causal-lm",
        data=plan.output / "decoders" / "rows" / name / "trained",
        max_length=TOKENS,
        max_target_length=COMPLETION,
        validation_rows=1,
    )
    assert rows.train is not None
    with seeded(seed):
        model: Any = AutoModelForCausalLM.from_pretrained(decoder_of(plan))
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["q_proj", "v_proj"]
        )
        model = peft.get_peft_model(model, config).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LORA_RATE, weight_decay=0.0)
        order = torch.randperm(len(rows.train)).tolist()
        for first in range(0, len(order), LORA_BATCH):
            for group in optimizer.param_groups:
                group["lr"] = LORA_RATE * (1 - first / len(order))
            batch = rows.collate([rows.train[row] for row in order[first : first + LORA_BATCH]])
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
                loss = rows.task.loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def opened_decoders(
    loras: Mapping[str, Path], seed: int, plan: argparse.Namespace
) -> tuple[list[Members], list[TaskRows]]:
    """Return the LoRAs and their rows."""
    sources = [
        Source(
            get_task("causal-lm"),
            [str(lora)],
            name,
            plan.output / "decoders" / "rows" / name / "new",
            train_rows=0,
            eval_rows=DECODER["test"],
            max_target_length=COMPLETION,
        )
        for name, lora in loras.items()
    ]
    opened = open_sources(sources, decoder_of(plan))
    division = Division(DECODER["learn"], DECODER["choose"], TOKENS, seed)
    return opened, [rows_of(source, members, division) for source, members in zip(sources, opened, strict=True)]


def one_decoder(
    method: str, loras: Mapping[str, Path], seed: int, plan: argparse.Namespace, display: Display
) -> list[dict[str, Any]]:
    """Return the best candidate of a method on the rows to choose on, or both models alone and the base."""
    opened, rows = opened_decoders(loras, seed, plan)
    for name in ("span", "scores"):
        (plan.output / "decoders" / f"{name}-{seed}").mkdir(exist_ok=True)
    span, scores = (plan.output / "decoders" / f"{name}-{seed}" for name in ("span", "scores"))
    problem = open_problem(opened, rows, span, scores, Options(batch_size=BATCH, seed=seed), display.say)
    if method == ONCE:
        base = Candidate("base", "base", torch.zeros(problem.shape))
        return [scored(problem, candidate, seed, None) for candidate in (base, *METHODS["single"].build(problem))]
    candidates = islice(METHODS[method].build(problem), SEARCHED[method])
    best = max(candidates, key=lambda candidate: problem.evaluate(candidate, "choose").mean)
    return [scored(problem, best, seed, None)]


def table_of_texts(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the perplexity of each text, and their geometric mean, over seeds, of every kind of candidate."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        grid = entry["method"] in ("task-arithmetic", "ties")
        name = entry["name"].rpartition("-")[0] if entry["method"] == "single" else entry["name"]
        rows.setdefault(entry["method"] if grid else name, []).append(entry)
    table = []
    for name, found in rows.items():
        columns = {text: [entry["scores"][index] for entry in found] for index, text in enumerate(TEXTS)}
        columns["geometric mean"] = [math.exp(-entry["mean"]) for entry in found]
        table.append(
            {"name": name, **{key: {"values": values, **summary_of(values)} for key, values in columns.items()}}
        )
    return table


# -- cost -------------------------------------------------------------------------------------------------------------


def cost_part(plan: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Return seconds and bytes written per candidate, of all ways in one run, of five encoders and of two decoders.

    Each candidate draws one coefficient per model, or per model and layer in place.
    """
    sources = [
        Source(
            get_task(task), [str(models_of(task, 0, plan, display))], data=plan.data / task, eval_rows=plan.eval_rows
        )
        for task in TASKS
    ]
    opened = open_sources(sources, MODEL)
    rows = [
        rows_of(s, m, Division(min(SIZES), plan.choose_rows, MAX_LENGTH)) for s, m in zip(sources, opened, strict=True)
    ]
    costs = {"encoders": cost_of(opened, rows, plan, display)}
    if Path(decoder_of(plan)).is_dir():
        loras = {name: lora_of(name, 0, plan, display) for name in TEXTS}
        costs["decoders"] = cost_of(*opened_decoders(loras, 0, plan), plan, display)
    return costs


def cost_of(
    opened: Sequence[Members], rows: Sequence[TaskRows], plan: argparse.Namespace, display: Display
) -> dict[str, Any]:
    """Return the costs of candidates of some models."""
    with TemporaryDirectory(dir=plan.output) as scratch:
        problem = open_problem(opened, rows, Path(scratch), Path(scratch), Options(), display.say)
        generator = torch.Generator().manual_seed(0)
        model: Any = problem.span.heads.models[0]
        merged = Path(scratch) / "merged"

        def in_place() -> None:
            problem.span.set(torch.rand(problem.shape, generator=generator))

        def written() -> None:
            in_place()
            state = {name: value.detach().clone() for name, value in model.named_parameters()}
            model.save_pretrained(merged, state_dict=state)
            type(model).from_pretrained(merged)

        costs = {
            "in place": timed(in_place, plan.rounds, None),
            "written and loaded": timed(written, plan.rounds, merged),
        }
        if find_spec("mergekit") is not None:
            costs["mergekit"] = with_mergekit(problem, Path(scratch), plan)
    costs["times"] = {
        name: {unit: cost[unit] / costs["in place"][unit] for unit in ("seconds", "processor seconds")}
        for name, cost in costs.items()
        if name != "in place" and "error" not in cost
    }
    return {**costs, "models": problem.shape[1], "weights": sum(block.numel for block in problem.span.partition)}


def timed(candidate: Callable[[], None], rounds: int, folder: Path | None) -> dict[str, Any]:
    """Return the median time of the whole machine and of the processor for a candidate, and the bytes it wrote."""
    whole, processor = [], []
    for _ in range(rounds):
        began, used = time.perf_counter(), time.process_time()
        candidate()
        whole.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    size = 0 if folder is None else sum(path.stat().st_size for path in folder.iterdir())
    return {"seconds": median(whole), "processor seconds": median(processor), "bytes": size, "rounds": rounds}


def with_mergekit(problem: Problem, folder: Path, plan: argparse.Namespace) -> dict[str, Any]:
    """Return the cost of mergekit's own merge to disk, as mergekit-evolve calls it, and of loading what it wrote.

    If mergekit cannot merge the models, `error` is its message.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    model: Any = problem.span.heads.models[0]
    places = [folder / "base", *(folder / f"single-{index}" for index in range(problem.shape[1]))]
    for index, place in enumerate(places):
        coefficients = torch.zeros(problem.shape)
        coefficients[:, index - 1] = min(index, 1)
        problem.span.set(coefficients)
        model.save_pretrained(place, state_dict={name: value.bfloat16() for name, value in model.named_parameters()})
    layers = [0, model.config.num_hidden_layers]
    sources = [{"model": str(place), "layer_range": layers, "parameters": {"weight": 0.3}} for place in places[1:]]
    recipe = MergeConfiguration.model_validate(
        {
            "merge_method": "task_arithmetic",
            "slices": [{"sources": [*sources, {"model": str(places[0]), "layer_range": layers}]}],
            "parameters": {"normalize": False, "int8_mask": True},
            "dtype": "bfloat16",
            "base_model": str(places[0]),
        }
    )
    options = MergeOptions(cuda=False, low_cpu_memory=False, out_shard_size=10**12, quiet=True, copy_tokenizer=False)
    merged = folder / "by-mergekit"

    def candidate() -> None:
        shutil.rmtree(merged, ignore_errors=True)
        run_merge(recipe, str(merged), options)
        type(model).from_pretrained(merged)

    try:
        cost = timed(candidate, min(plan.rounds, 5), merged)
    except Exception as error:  # whatever it cannot do with these models
        cost = {"error": f"{type(error).__name__}: {error}"}
    return {**cost, "version": version("mergekit")}


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return a type of argument: names of a collection, separated by commas."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; expected some of {', '.join(known)}")
        return text.split(",")

    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", action="append", choices=["tasks", "checkpoints", "decoders", "cost"], help="default: all"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per task")
    parser.add_argument("--output", type=Path, default=Path("runs/combine"))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--train-rows", type=int, default=1600)
    parser.add_argument("--new-rows", type=int, default=768, help="rows of each task that no model is trained on")
    parser.add_argument("--choose-rows", type=int, default=128)
    parser.add_argument("--eval-rows", type=int, default=300)
    parser.add_argument(
        "--steps",
        type=names_of(STEP_NAMES),
        default=[*STEP_NAMES],
        help="of the part tasks: METHOD-ROWS,...; default: all",
    )
    parser.add_argument(
        "--run-tasks", type=names_of(RUN_TASKS), default=[*RUN_TASKS], help="of the part checkpoints; default: all"
    )
    parser.add_argument(
        "--decoder-methods",
        type=names_of((ONCE, *SEARCHED)),
        default=[ONCE, *SEARCHED],
        help="of the part decoders; default: all",
    )
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="folder with the decoder")
    parser.add_argument("--rounds", type=int, default=20, help="candidates of the part cost")
    parser.add_argument("--models-only", action="store_true", help="only fine-tune the models of the part tasks")
    parser.add_argument("--json", type=Path, help="write every figure there; other parts in the file stay")
    plan = parser.parse_args()
    quieten()
    taken = {name: getattr(plan, name) for name in ("train_rows", "new_rows", "choose_rows", "eval_rows", "rounds")}
    same_plan(plan.output, {name: number for name, number in taken.items() if name != "rounds"})
    with Display() as display:
        if plan.models_only:
            for seed in plan.seeds:
                for task in TASKS:
                    models_of(task, seed, plan, display)
            return
        functions = {
            "tasks": tasks_part,
            "checkpoints": checkpoints_part,
            "decoders": decoders_part,
            "cost": cost_part,
        }
        content = read_json(plan.json) if plan.json and plan.json.is_file() else {}
        for name in plan.part or list(functions):
            content[name] = functions[name](plan, display)
            content[name] |= {"plan": taken, "hardware": hardware(), "versions": package_versions()}
            if plan.json:
                write_json(plan.json, content)
    print(json.dumps({name: content[name] for name in plan.part or functions}, indent=1)[:4000])


if __name__ == "__main__":
    main()

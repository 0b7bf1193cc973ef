"""The commands that repeat a recorded run, a basis or an adapter, from what its folder says."""

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import drawn_constructor
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.partition import Partition
from tinyspan.partitioning import PARTITIONS
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.loss_in_z import CurvatureOptions
from tinyspan.workflows.run_rows import Draw, draw_of

if TYPE_CHECKING:
    from tinyspan.workflows.report.items import Item

__all__ = ["commands"]

OPTIONS = ("epochs", "batch_size", "max_length", "learning_rate", "seed", "precision", "set_aside", "patience")
FLAG = object()  # value of an option that takes none
ONLY_IN_PYTHON = ("max_steps", "module_learning_rates")  # settings without an option


def commands(items: Sequence["Item"]) -> list[str]:
    """Return one command, or a comment on why there is none, for every folder.

    Args:
        items: the opened folders; a basis names those among them from which it was computed.
    """
    return ["\n".join(_lines(item, items)) for item in items]


def _combine(item: "Item", result: Mapping[str, Any]) -> Iterator[str]:
    tasks, options = result["tasks"], result["options"]
    models = [*dict.fromkeys(model["source"] for model in result["models"])]
    pairs: list[tuple[str, Any]] = [
        ("--base", result["base"]),
        ("--learn-rows", tasks[0]["rows"]["learn"]),
        ("--choose-rows", tasks[0]["rows"]["choose"]),
        ("--max-length", result["max_length"]),
        ("--methods", ",".join(options["methods"]) or None),
        ("--controls", FLAG if options["controls"] else None),
        ("--no-geometry", None if options["geometry"] else FLAG),
        ("--dtype", options["dtype"]),
        ("--seed", options["seed"]),
    ]
    pairs += [(f"--{name.replace('_', '-')}", options[name]) for name in ("batch_size", "precision")]
    stored = [*chain(*pairs)]
    if len(tasks) > 1:
        named = ", ".join(f"{task['name']}: {model}" for task, model in zip(tasks, models, strict=True))
        yield _comment(f"a page of tasks with the models {named}, and the rows of each")
        yield _command("combine", ["--tasks", "page.yaml"], stored, _output(item))
    else:
        yield _command("combine", models, _rows_of(tasks[0]), stored, _output(item))


def _rows_of(task: Mapping[str, Any]) -> list[Any]:
    """Return the options that name the rows of a combination's only task."""
    if origin := task.get("origin"):
        named = {"data": origin["path"], "text": ",".join(origin["text"]), "label": ",".join(origin["label"])}
        named["holdout"] = origin.get("holdout")
    else:
        named = {"task_type" if task["name"] == task["type"] else "task": task["name"]}
        named |= {"data": task.get("data"), "text": ",".join(task.get("text", ())) or None}
    named |= {name: task.get(name) for name in ("train_rows", "set_aside", "eval_rows")}
    return [*chain(*((f"--{name.replace('_', '-')}", value) for name, value in named.items()))]


def _lines(item: "Item", items: Sequence["Item"]) -> Iterator[str]:
    source, result = item.source, item.result
    if item.curvature is not None:
        stored = item.curvature["options"]
        names = [field.name for field in fields(CurvatureOptions) if field.name in stored]
        pairs = [(f"--{name.replace('_', '-')}", stored[name]) for name in names]
        yield _command("curvature", [Path(item.curvature["run"])], [*chain(*pairs)], _output(item))
        return
    if item.combined is not None:
        yield from _combine(item, item.combined)
        return
    if isinstance(source, Basis):
        yield from _discover(item, source, items)
        return
    if result is None:
        yield _comment(f"{item.name}: without result.json, its settings are unknown; it was not written by a command")
        return
    settings = result.get("settings") or {}
    if special := [f"{name} {settings[name]}" for name in ONLY_IN_PYTHON if settings.get(name)]:
        yield _comment(
            f"{item.name} was trained with {', '.join(special)}, which has no option: use Settings in Python"
        )
    weights = result.get("class_weights") or ()
    if weights and not _are_balanced(weights):
        yield _comment(f"{item.name} has the class weights {weights}, which no option gives: use a task in Python")
    if isinstance(source, Trajectory):
        stored = ["--every", _every(source, result), "--dtype", source.manifest.construction.get("dtype")]
        yield _command("record", _training(result), stored, _output(item))
    elif isinstance(source, OpenedAdapter):
        construction = source.manifest.construction
        modules = ", ".join(construction.get("modules_to_save", ())) or "nothing"
        yield _comment(f"{item.name} trains directly: {modules}")
        options = result.get("options")
        if options is None:  # of an earlier version
            options = {"ensemble": construction.get("ensemble", 1)}
            yield _comment(
                f"{item.name}: whether embeddings were trained, and the initial values of z, are not recorded "
                "(--no-train-embeddings, --init-std)"
            )
        elif options.get("layer_scales"):
            yield _comment(f"{item.name} has layer_scales, which has no option: use SubspaceOptions in Python")
        words = ["--z-learning-rate", settings.get("z_learning_rate"), *_subspace(options)]
        yield _command("tune", _training(result), _basis(source), words, _output(item))
    elif result.get("history"):
        yield _comment(f"{item.name}: a result alone; the folder of its run is not recorded")
    else:
        rows, length = _draw(result).validation, settings.get("max_length")
        adapter = [] if result["method"] == "full" else ["--adapter", "ADAPTER"]
        stored = ["--eval-rows", rows, "--max-length", length, "--precision", settings.get("precision")]
        yield _command("evaluate", _task(result), adapter, stored, _target_length(result), _output(item))


def _training(result: Mapping[str, Any]) -> list[Any]:
    """Return the options of `record` and `tune` for the rows and the settings of a result."""
    settings, draw = result.get("settings") or {}, _draw(result)
    words = _task(result)
    for name in OPTIONS:
        if settings.get(name) not in (None, 0) or name == "seed":
            words += [f"--{name.replace('_', '-')}", settings[name]]
    words += _target_length(result)
    if result.get("type") == "regression":
        words += ["--regression-start", settings.get("regression_start", "zero")]  # older results lack it
    if _are_balanced(result.get("class_weights") or ()):
        words += ["--class-weights", "balanced"]
    return [*words, "--train-rows", draw.train, "--eval-rows", draw.validation]


def _draw(result: Mapping[str, Any]) -> Draw:
    """Return what the run of a result drew; a result of another program may not say."""
    known = "draw" in result or {"train", "validation"} <= {*(result.get("rows") or {})}
    return draw_of(result) if known else Draw(None, None)


def _target_length(result: Mapping[str, Any]) -> list[Any]:
    """Return the option for the length of completions, if the task is a language task."""
    length = (result.get("settings") or {}).get("max_target_length")
    return ["--max-target-length", length] if result.get("type") in ("causal-lm", "seq2seq") and length else []


def _subspace(options: Mapping[str, Any]) -> list[Any]:
    """Return the options of `tune` for the fields of `SubspaceOptions`."""
    words = ["--ensemble", options.get("ensemble"), "--init-std", options.get("init_std")]
    return words if options.get("train_embeddings", True) else [*words, "--no-train-embeddings", FLAG]


def _are_balanced(weights: Sequence[float]) -> bool:
    """Return whether weights n / (K n_c) of K labels may be `balanced`: their inverses have the mean 1."""
    return bool(weights) and math.isclose(sum(1 / weight for weight in weights), len(weights), rel_tol=1e-6)


def _task(result: Mapping[str, Any]) -> list[Any]:
    if origin := result.get("data"):
        columns = [(f"--{name}", ",".join(origin[name])) for name in ("text", "label")]
        words = ["--task-type", result.get("type"), "--holdout", origin["holdout"], "--metric", result["metric"]]
        return ["--model", result.get("model"), "--data", origin["path"], *chain(*columns), *words]
    if result["task"] == result.get("type"):  # a task on texts of one's own has the name of its type
        return ["--model", result.get("model"), "--task-type", result["task"]]
    return ["--model", result.get("model"), "--task", result["task"], "--metric", result["metric"]]


def _every(trajectory: Trajectory, result: Mapping[str, Any]) -> str:
    """Return `epoch` or the number of steps between points."""
    rows, settings = result.get("rows") or {}, result.get("settings") or {}
    steps = [step + 1 for step in trajectory.steps]
    if steps and rows.get("train") and settings.get("batch_size"):
        per_epoch = -(-rows["train"] // settings["batch_size"])
        if steps[0] == per_epoch:
            return "epoch"
    return str(steps[0]) if steps else "epoch"


def _basis(adapter: OpenedAdapter) -> list[Any]:
    details, construction = adapter.manifest.details, adapter.manifest.construction.get("basis") or {}
    name = construction.get("constructor")
    if details.get("basis") is not None:
        return ["--basis", os.path.relpath(Path(adapter.folder, details["basis"]).resolve())]
    if name == "empty":
        return ["--basis", "none"]
    if drawn_constructor(name) is not None:
        rank = construction.get("rank")
        return ["--basis", name, *(["--rank", rank] if rank is not None else [])]
    return ["--basis", details.get("basis_on_hub") or "BASIS"]


def _discover(item: "Item", basis: Basis, items: Sequence["Item"]) -> Iterator[str]:
    construction = basis.construction
    if construction.get("constructor") != "svd":
        yield _comment(f"{item.name}: from the constructor {construction.get('constructor')}, not by a command")
        return
    places = {other.source.content_hash(): other for other in items if isinstance(other.source, Trajectory)}
    runs = [places[parent].folder if parent in places else f"RUN-{parent[:12]}" for parent in basis.parents]
    if missing := [parent[:12] for parent in basis.parents if parent not in places]:
        yield _comment(f"{item.name}: the folders of the trajectories {', '.join(missing)} are not recorded")
    words: list[Any] = []
    for name in ("rank", "explained_variance", "center", "density", "dtype"):
        if construction.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", construction[name]]
    recorded = [
        other.source.recorded
        for other in items
        if isinstance(other.source, Trajectory) and other.source.content_hash() in basis.parents
    ]
    words += ["--partition", _partition(basis.partition, recorded[0] if recorded else None)]
    yield _command("discover", runs, words, _output(item))


def _partition(partition: Partition, recorded: Partition | None) -> str | None:
    """Return the name of a partition; None for that by layers, or if no name is known.

    Args:
        partition: the partition of a basis.
        recorded: that of a trajectory from which the basis was computed, if it is known.
    """
    if partition == recorded:
        return None
    for name in PARTITIONS if recorded is not None else ("model", "module"):  # regrouped, these two stay what they are
        if (regroup := PARTITIONS[name].regroup) is not None and regroup(recorded or partition) == partition:
            return str(name)
    return None


def _comment(text: str) -> str:
    """Return a comment on one line, whatever the names in it are: the lines are copied into a shell."""
    return f"# {' '.join(text.split())}"


def _output(item: "Item") -> list[Any]:
    return ["--output", f"{item.folder.name}-again"]


def _command(name: str, *parts: Sequence[Any]) -> str:
    """Return a command line of several lines, without options that have no value."""
    words = [word for part in parts for word in part]
    pairs: list[str] = []
    while words:
        word = words.pop(0)
        if isinstance(word, str) and word.startswith("--"):
            value = words.pop(0)
            if value is FLAG:
                pairs.append(shlex.quote(word))
            elif value is not None:
                pairs.append(f"{shlex.quote(word)} {shlex.quote(str(value))}")
        else:
            pairs.append(shlex.quote(str(word)))
    lines, line = [], f"tinyspan {name}"
    for pair in pairs:
        if len(line) + len(pair) > 96:
            lines.append(f"{line} \\")
            line = "   "
        line += f" {pair}"
    return "\n".join([*lines, line])

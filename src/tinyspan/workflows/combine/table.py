"""The result of a combination as text: a sentence, facts, and the table of candidates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tinyspan.workflows.tasks.metrics import LOWER_IS_BETTER

__all__ = ["candidate_rows", "combined_facts", "combined_sentence"]

Result = Mapping[str, Any]
MEANS = {**dict.fromkeys(LOWER_IS_BETTER, "mean of the negative"), "perplexity": "mean of -log"}  # heading by metric


def combined_sentence(name: str, result: Result) -> str:
    """Return what was combined, in one or two sentences."""
    tasks = result["tasks"]
    rows = tasks[0]["rows"]
    models = f"{len(result['models'])} models of {result['base']}"
    what = f"for {tasks[0]['name']}" if len(tasks) == 1 else f"one for each of {len(tasks)} tasks"
    return (
        f"{name}: a combination of {models}, {what}; {rows['learn']:,} rows of each task to learn from, "
        f"{rows['choose']:,} to choose on, and {rows['test']:,} held-out rows. {result['verdict']}"
    )


def combined_facts(result: Result) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe a combination."""
    yield "kind", "combination"
    yield "base model", str(result["base"])
    yield "models", ", ".join(model["name"] for model in result["models"])
    yield "blocks", f"{len(result['blocks'])}: {', '.join(result['blocks'])}"
    yield "chosen", str(result["chosen"])
    yield "time", f"{result['seconds']:,.1f} s"
    options = {name: value for name, value in result["options"].items() if value or type(value) in (int, float)}
    yield "settings", ", ".join(f"{name} {value}" for name, value in options.items())
    yield "machine", f"{result['hardware']['threads']} of {result['hardware']['cpus']} CPU threads"
    yield "versions", ", ".join(f"{name} {value}" for name, value in result["versions"].items())


def candidate_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the table of candidates, reference scores and controls: its header and its rows.

    Of `chosen on`, the mean and the differences, more is better: they are of -log of perplexities, and of the negative
    of other metrics that are better if lower. Marked are the chosen candidate, the best single model on the rows to
    choose on, and single models with the same score there.
    """
    tasks = result["tasks"]
    several = len(tasks) > 1
    header = ["candidate", "learned", "passes", "chosen on", *(f"{task['name']}, {task['metric']}" for task in tasks)]
    if several:
        header.append(MEANS.get(tasks[0]["metric"], "mean"))
    marks = _marks(result)
    rows = [[*_row(entry, several, marks[entry["name"]]), _gap(entry)] for entry in result["candidates"]]
    if result["own_models"] is not None:
        scores = [f"{score:.3f}" for score in result["own_models"]["scores"]]
        rows.append(["each task's own model", "", "", "", *scores, f"{result['own_models']['mean']:.3f}", ""])
    for control in result["controls"]:
        cells = [f"control: {control['name']}, rate {control['rate']:g}", "", f"{control['passes']:,}"]
        rows.append([*cells, f"{control['choose']:.3f}", *_scores(control["test"], several), ""])
    return [*header, "against the best single model"], rows


def _marks(result: Result) -> dict[str, list[str]]:
    """Return what is remarkable about each candidate."""
    singles = {entry["name"]: entry["choose"]["mean"] for entry in result["candidates"] if entry["method"] == "single"}
    marks: dict[str, list[str]] = {entry["name"]: [] for entry in result["candidates"]}
    marks[result["chosen"]].append("chosen")
    for name, score in singles.items():
        if name == result["best_single"]:
            marks[name].append("best single")
        elif score == singles[result["best_single"]]:
            marks[name].append("tied with the best single")
    return marks


def _row(entry: Result, several: bool, marks: Sequence[str]) -> list[str]:
    name = f"{entry['name']} ({', '.join(marks)})" if marks else entry["name"]
    learned, passes = (f"{entry[key]:,}" if entry[key] else "" for key in ("learned", "passes"))
    return [name, learned, passes, f"{entry['choose']['mean']:.3f}", *_scores(entry["test"], several)]


def _scores(part: Result, several: bool) -> Sequence[str]:
    scores = [f"{score:.3f}" for score in part["scores"]]
    return [*scores, f"{part['mean']:.3f}"] if several else scores


def _gap(entry: Result) -> str:
    gap = entry["test"].get("difference_to_best_single")
    if gap is None:
        return ""
    return f"{gap[0]:+.3f}" if gap[1] is None else f"{gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f})"

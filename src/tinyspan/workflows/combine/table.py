"""The table of candidates of a combination, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["candidate_rows"]

Result = Mapping[str, Any]


def candidate_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the table of candidates, reference scores and controls: its header and its rows."""
    tasks = result["tasks"]
    several = len(tasks) > 1
    header = ["candidate", "learned", "passes", "chosen on", *(f"{task['name']}, {task['metric']}" for task in tasks)]
    header += ["mean"] if several else []
    rows = [[*_row(entry, several, entry["name"] == result["chosen"]), _gap(entry)] for entry in result["candidates"]]
    if result["own_models"] is not None:
        scores = [f"{score:.3f}" for score in result["own_models"]["scores"]]
        rows.append(["each task's own model", "", "", "", *scores, f"{result['own_models']['mean']:.3f}", ""])
    for control in result["controls"]:
        cells = [f"control: {control['name']}, rate {control['rate']:g}", "", f"{control['passes']:,}"]
        rows.append([*cells, f"{control['choose']:.3f}", *_scores(control["test"], several), ""])
    return [*header, "against the best single model"], rows


def _row(entry: Result, several: bool, chosen: bool) -> list[str]:
    name = f"{entry['name']} (chosen)" if chosen else entry["name"]
    learned, passes = (f"{entry[key]:,}" if entry[key] else "" for key in ("learned", "passes"))
    return [name, learned, passes, f"{entry['choose']['mean']:.3f}", *_scores(entry["test"], several)]


def _scores(part: Result, several: bool) -> Sequence[str]:
    scores = [f"{score:.3f}" for score in part["scores"]]
    return [*scores, f"{part['mean']:.3f}"] if several else scores


def _gap(entry: Result) -> str:
    gap = entry["test"].get("difference_to_best_single")
    return "" if gap is None else f"{gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f})"

"""How straight is the path of fine-tuning? The spectrum of recorded runs, of three epochs and of more.

    python benchmarks/straightness.py runs/small/shared/minilm/*/full/seed-* --json docs/results/straightness.json

A run is a folder that `tinyspan record` wrote, or one under `shared/` of a study. Per layer, with the points theta_i:

* `explained`: the share of sum_i |theta_i - theta_0|^2 in the span of the first 1, 2, 4, ... right singular vectors
* `straightness`: |theta_t - theta_0| over the length of the path through the recorded points; 1 for a straight line

Both are means over the layers that move. A run that is in the JSON file already, by its content hash, is not computed
again.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tinyspan import Trajectory
from tinyspan.analysis import explained_variance, spectra
from tinyspan.io.folders import RESULT
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab.summary import markdown, summarize

MODEL, RANKS = "minilm", (1, 2, 4, 8, 16)


def measured(run: Trajectory) -> dict[str, Any]:
    """Return the spectrum and the straightness of a run, as means over the blocks that move."""
    moving = {name: values for name, values in spectra(run).items() if values.any()}
    shares = [explained_variance(values) for values in moving.values()]
    ranks = [rank for rank in RANKS if rank <= len(run)]
    return {
        "points": len(run),
        "explained": {str(rank): float(torch.stack([share[rank - 1] for share in shares]).mean()) for rank in ranks},
        "straightness": float(torch.tensor([_straightness(run, name) for name in moving]).mean()),
    }


def _straightness(run: Trajectory, block: str) -> float:
    length, before = 0.0, torch.zeros(())
    for index in range(len(run)):
        delta = run.delta(block, index).double()
        length += float((delta - before).norm())
        before = delta
    return float(before.norm()) / length


def of(runs: Mapping[str, Any], task: str, epochs: int, model: str = MODEL) -> list[dict[str, Any]]:
    """Return the runs of a model on a task with a number of epochs, by seed."""
    chosen = [run for run in runs.values() if (run["model"], run["task"], run["epochs"]) == (model, task, epochs)]
    return sorted(chosen, key=lambda run: int(run["seed"]))


def tables(content: Mapping[str, Any]) -> str:
    """Return the table of all runs, with means over seeds and 95 % intervals."""
    runs = content["runs"]
    kinds = sorted({(run["model"], run["task"], run["epochs"]) for run in runs.values()})
    rows = []
    for model, task, epochs in kinds:
        found = of(runs, task, epochs, model)
        shares = [summarize([100 * run["explained"].get(str(rank), 1.0) for run in found]) for rank in RANKS]
        straight = summarize([run["straightness"] for run in found]).shown("{:.2f}")
        named = task if model == MODEL else f"{model}: {task}"
        rows.append([named, str(epochs), str(len(found)), straight, *(share.shown("{:.1f}") for share in shares)])
    return markdown(["task", "epochs", "seeds", "straightness", *(f"{rank} directions, %" for rank in RANKS)], rows)


def main() -> None:
    """Measure the runs that are not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--json", type=Path, default=Path("runs/straightness.json"))
    arguments = parser.parse_args()
    content: dict[str, Any] = {"runs": {}}
    if arguments.json.is_file():
        content = {"runs": read_json(arguments.json)["runs"]}
    for folder in arguments.runs:
        run = Trajectory(folder)
        if (name := run.content_hash()) not in content["runs"]:
            result = read_json(folder / RESULT)
            entry = {
                "model": result["model"],
                "task": result["task"],
                "epochs": result["epochs"],
                "seed": result["seed"],
                **measured(run),
            }
            content["runs"][name] = entry
            write_json(arguments.json, {**content, "versions": package_versions()})
    print(tables(content))


if __name__ == "__main__":
    main()

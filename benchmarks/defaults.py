"""Which centring and which ensemble should be the default? Measured on real text, chosen on training rows.

    python benchmarks/defaults.py --seeds 3 --json docs/results/defaults.json

The demo's model, task, sizes and learning rates; scores are on 600 training sentences that no run trained on, not on
the held-out ones. One trajectory a seed serves every variant. A seed that is in the JSON file already is not run again.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

from tinyspan import Basis, SubspaceModel, Trajectory, by_layer, empty_basis, random_basis, svd_basis
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import read_json, write_json
from tinyspan.lab.demo import Plan
from tinyspan.lab.summary import summarize
from tinyspan.workflows.hardware import hardware
from tinyspan.workflows.models import base_model, embedding_modules, head_modules
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import method_of, record
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.training import fine_tune

PLAN, CHOICE_ROWS = Plan(), 600
REFERENCE = "center init, h = 1 from 0"


def rows_for_choosing() -> Prepared:
    """The demo's training sentences, and further training sentences to score on."""
    prepared = prepare(
        PLAN.model,
        PLAN.task,
        max_length=PLAN.max_length,
        train_rows=PLAN.train_rows + CHOICE_ROWS,
        validation_rows=1,
    )
    return prepared.set_aside(CHOICE_ROWS)[1]


def tuned(prepared: Prepared, settings: Settings, basis: Basis, *, embeddings: bool = True, **options: Any) -> float:
    """Train in a basis and return the score."""
    model = base_model(prepared.model, prepared.task, settings.seed)
    ordinary = head_modules(model, basis.partition)
    if embeddings:
        ordinary += embedding_modules(model, basis.partition)
    subspace = SubspaceModel(model, basis, modules_to_save=ordinary, seed=settings.seed, **options)
    return float(fine_tune(subspace, prepared, settings, method_of(basis))["score"])


def one_seed(seed: int, prepared: Prepared) -> dict[str, float]:
    """Return the score of every variant for one seed."""
    settings = PLAN.settings(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "full"
        scores = {
            "full": record(prepared, settings, folder, every=settings.steps(PLAN.train_rows) // PLAN.rank)["score"]
        }
        trajectory = Trajectory(folder)
        init = svd_basis(trajectory, PLAN.rank)
        mean_centred = svd_basis(trajectory, PLAN.rank - 1, center="mean")
        uncentred = svd_basis(trajectory, PLAN.rank, center="none")
    partition = by_layer(base_model(prepared.model, prepared.task, seed))
    scores["center init, h = 1 from 0"] = tuned(prepared, settings, init)
    scores["center mean (k = 7)"] = tuned(prepared, settings, mean_centred)
    scores["center none"] = tuned(prepared, settings, uncentred)
    for std in (0.01, 0.1):
        scores[f"center init, h = 16, std {std}"] = tuned(prepared, settings, init, ensemble=16, init_std=std)
    scores["center init, embeddings frozen"] = tuned(prepared, settings, init, embeddings=False)
    scores["freeze"] = tuned(prepared, settings, empty_basis(partition))
    scores["freeze, ordinary rate 1e-3"] = tuned(
        prepared, dataclasses.replace(settings, learning_rate=1e-3), empty_basis(partition)
    )
    random = random_basis(partition, PLAN.rank, seed=seed)
    scores["random"] = tuned(prepared, settings, random)
    scores["random, z rate 1"] = tuned(prepared, dataclasses.replace(settings, z_learning_rate=1.0), random)
    return scores


def main() -> None:
    """Run the missing seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/defaults.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan = {**dataclasses.asdict(PLAN), "choice_rows": CHOICE_ROWS}
    found: dict[str, Any] = {"plan": plan, "seeds": {}}
    if arguments.json.is_file():
        found = read_json(arguments.json, sealed=False)
    if found["plan"] != plan:
        sys.exit(f"{arguments.json} holds runs of another plan; choose another file")
    prepared = rows_for_choosing()
    for seed in range(arguments.seeds):
        if str(seed) not in found["seeds"]:
            found["seeds"][str(seed)] = one_seed(seed, prepared)
            found |= {"versions": package_versions(), "hardware": hardware()}
            write_json(arguments.json, found)
    print(f"| variant | mean of {len(found['seeds'])} seeds | minus {REFERENCE}, paired, with 95 % interval |")
    print("|---|---|---|")
    for variant in found["seeds"]["0"]:
        values = [scores[variant] for scores in found["seeds"].values()]
        above = summarize([scores[variant] - scores[REFERENCE] for scores in found["seeds"].values()])
        half = math.nan if above.half is None else above.half
        compared = "" if variant == REFERENCE else f"{above.mean:+.3f} ± {half:.3f}"
        print(f"| {variant} | {summarize(values).mean:.3f} | {compared} |")


if __name__ == "__main__":
    main()

"""LoRA and subspaces: one LoRA trained again in its own directions, and many LoRAs in one basis.

    python benchmarks/adapters.py --run --workers 2 --data DIR --output runs/adapters --json docs/results/adapters.json
    python benchmarks/adapters.py --compare --data DIR --output runs/adapters --json docs/results/adapters.json
    python benchmarks/adapters.py --render --json docs/results/adapters.json

`--run` trains a LoRA of rank 8 on every task and seed, recording the path of its own parameters, and then z alone in
the directions of that path, and in random ones. Learning rates follow the rule of `density.py`. `--compare` puts the
LoRAs of one seed, which started from different random numbers on every task, into one basis with tinyspan, vLoRA and
lorashare (`pip install vlora-dev lorashare`; what is absent is left out), and scores what comes out again, beside the
mean of all updates in place of each. The head is always the adapter's own. Scores are of validation rows. A seed of
the JSON file whose LoRAs, tasks and libraries are the same is not compared again.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import study
import torch
from methods import heads, with_peft
from study import Run, difference, means, rows_of, start_of, surely_at_most, told_rate, train
from torch import Tensor, nn
from transformers import TrainerCallback

from tinyspan import SubspaceModel, random_basis, svd_basis, trainable_by_layer
from tinyspan.io.storage import read_json
from tinyspan.lab.summary import markdown, summarize
from tinyspan.lora import Lora, import_lora, lora_basis, read_lora, sharing
from tinyspan.partitioning import by_layer
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.models import base_model
from tinyspan.workflows.tasks import get_task
from tinyspan.workflows.training import score

TASKS = ("sst2", "mrpc", "qnli", "rte", "stsb")
CHOICE_TASKS = ("sst2", "qnli")
CENTRES = {"LoRA": 2e-3, "its own directions": 1e-1, "random directions": 1e-1}
RANKS = (4, 8, 16, 24)  # directions on each side of a weight
REPEATS = 5  # the best time of

Updates = dict[str, Tensor]  # weight -> dW


@dataclass(frozen=True)
class Plan(study.Plan):
    """What all runs have in common."""

    epochs: int = 3


# -- one LoRA ---------------------------------------------------------------------------------------------------------


class Adapters(study.Study[Run]):
    """The runs of LoRA, and of z in directions of its parameters."""

    partition = staticmethod(trainable_by_layer)

    def cells(self) -> list[Run]:
        """Return all runs that are known so far, the first to make first."""
        return schedule(self.arguments.tasks, self.arguments.seeds, self.finished())

    def path_folder(self, run: Run) -> Path | None:
        """Return where a LoRA leaves the path of its own parameters."""
        return lora_folder(self.folder, run) / "path" if run.method == "LoRA" else None

    def fine_tuned(self, run: Run, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
        """Train a LoRA, or z in directions of its parameters, and return its scores and sizes.

        Raises:
            Busy: another process works on the trajectory that this run needs.
        """
        plan = self.plan
        rows, choice = rows_of(plan, run.task, self.arguments.data)
        model = start_of(plan, rows, run.seed)
        head = heads(model, by_layer(model))
        with seeded(1000 * run.seed + TASKS.index(run.task)):
            module = with_peft(model, "LoRA r = 8")
        partition = trainable_by_layer(module)
        if run.method == "random directions":
            module = SubspaceModel(module, random_basis(partition, plan.rank, seed=run.seed), modules_to_save=head)
        elif run.method != "LoRA":
            path = self.path(replace(run, method="LoRA", rate=chosen(self.finished())["LoRA"]))
            module = SubspaceModel(module, svd_basis(path, plan.rank), modules_to_save=head)
        settings = plan.settings(run.seed, epochs=plan.epochs)
        result = train(module, run, settings, rows, choice, head=head, head_rate=plan.head_rate, callbacks=callbacks)
        if run.method == "LoRA":
            module.save_pretrained(str(lora_folder(self.folder, run) / "adapter"))
        return {**result, "in blocks": partition.numel}

    def tell(self, content: dict[str, Any], results: study.Results[Run]) -> None:
        """Tell of the rates and what holds, beside what is there of the comparison."""
        place, rates = self.arguments.json, chosen(results)
        content["plan"] |= {"tasks": self.arguments.tasks, "choice tasks": CHOICE_TASKS}
        content["learning rates"] = {m: told_rate(rate, choice_scores(m, results)) for m, rate in rates.items()}
        content["compared"] = read_json(place).get("compared", []) if place.is_file() else []
        content["claims"] = claims(content)


def lora_folder(output: Path, run: Run) -> Path:
    return output / "loras" / f"{run.task}-{run.seed}-{run.rate:g}"


# -- which runs -------------------------------------------------------------------------------------------------------


def choice_scores(method: str, results: study.Results[Run]) -> dict[float, float | None]:
    """Return the rates of a method that are to be tried so far, with their scores."""
    return study.choice_scores(CENTRES[method], partial(runs_at, method), results)


def runs_at(method: str, rate: float) -> list[Run]:
    return [Run(method, rate, task, 0) for task in CHOICE_TASKS]


def chosen(results: study.Results[Run]) -> dict[str, float]:
    """Return the rate of every method whose search is finished."""
    return study.chosen(CENTRES, lambda method: choice_scores(method, results))


def schedule(tasks: Sequence[str], seeds: int, results: study.Results[Run]) -> list[Run]:
    """Return all runs that are known so far, the first to make first."""
    rates = chosen(results)
    searched = CENTRES if "LoRA" in rates else ["LoRA"]
    runs = [run for method in searched for rate in choice_scores(method, results) for run in runs_at(method, rate)]
    runs += [Run(m, rates[m], task, seed) for seed, task, m in product(range(seeds), tasks, CENTRES) if m in rates]
    return list(dict.fromkeys(runs))


# -- many LoRAs -------------------------------------------------------------------------------------------------------


def with_tinyspan(model: nn.Module, folders: Mapping[str, Path], rank: int | None) -> Callable[[str], Updates]:
    """Put LoRAs into one basis; of each only z is kept. Heads, which differ in size, are left out."""
    loras = {task: read_encoder(model, folder) for task, folder in folders.items()}
    subspace = SubspaceModel(model, lora_basis(model, list(loras.values()), rank=rank))
    for task, lora in loras.items():
        import_lora(subspace, lora, task)

    def rebuilt(task: str) -> Updates:
        subspace.set_adapter(task)
        return subspace.delta()

    return rebuilt


def read_encoder(model: nn.Module, folder: Path) -> Lora:
    """Read a LoRA without its head."""
    return replace(read_lora(model, folder), directly_trained={}, modules=[])


def with_vlora(folders: Mapping[str, Path], rank: int) -> Callable[[str], Updates]:
    import vlora

    adapters = [vlora.load_adapter(str(folder)) for folder in folders.values()]
    shared = vlora.SharedSubspace.from_adapters(adapters, task_ids=list(folders), num_components=rank)

    def rebuilt(task: str) -> Updates:
        found = shared.reconstruct(task)
        names = found.layer_names
        return {f"{encoder(name)}.weight": found.lora_b[name] @ found.lora_a[name] for name in names}

    return rebuilt


def with_lorashare(folders: Mapping[str, Path], rank: int) -> Callable[[str], Updates]:
    import lorashare

    shared = lorashare.SHAREModel.from_adapters({t: str(f) for t, f in folders.items()}, num_components=rank)

    def rebuilt(task: str) -> Updates:
        found = shared.reconstruct(task)
        a = {key: value for key, value in found.items() if ".lora_A" in key}
        return {
            f"{encoder(key.partition('.lora_A')[0])}.weight": found[key.replace(".lora_A", ".lora_B")] @ value
            for key, value in a.items()
        }

    return rebuilt


def encoder(name: str) -> str:
    """Return a module's name without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")


def stored(kind: str, rank: int | None, loras: Sequence[Lora]) -> tuple[int, int]:
    """Return the float32 bytes of what all adapters share, and of each one, without heads."""
    shared = each = 0
    for left, right in loras[0].factors.values():
        m, r, n, many = len(left), len(right), right.shape[1], sum(len(lora.factors) > 0 for lora in loras)
        if kind == "tinyspan":
            p, q = (min(rank or many * r, many * r, side) for side in (m, n))
            shared, each = shared + p * m + q * n, each + p * q
        elif kind == "vLoRA":
            k = min(rank or many, many)
            shared, each = shared + (k + 1) * r * (m + n), each + 2 * k
        else:
            k = rank or many * r
            shared, each = shared + min(k, m) * m + min(k, n) * n, each + 2 * r * k
    return 4 * shared, 4 * each


def compare(trained: Adapters, earlier: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield, after each seed, what is known of all: errors, scores, sizes and seconds of every way to one basis.

    What was found earlier of a seed is kept if it is of these tasks, of LoRAs with these scores, and of these ways.
    """
    plan, arguments, results = trained.plan, trained.arguments, trained.finished()
    rate = chosen(results)["LoRA"]
    scores = {
        (run.task, run.seed): result["score"]
        for run, result in results.items()
        if (run.method, run.rate) == ("LoRA", rate)
    }
    ways: list[tuple[str, int | None]] = [("tinyspan", None), *(("tinyspan", rank) for rank in RANKS)]
    ways += [("vLoRA", k) for k in range(1, len(arguments.tasks))] if find_spec("vlora") else []
    ways += [("lorashare", rank) for rank in (*RANKS, 8 * len(arguments.tasks))] if find_spec("lorashare") else []
    ways_told = [list(way) for way in (*ways, ("mean", None))]
    found: dict[int, dict[str, Any]] = {}
    for entry in earlier:
        same = entry["LoRA"] == {task: scores.get((task, entry["seed"])) for task in arguments.tasks}
        if same and [[way["kind"], way["rank"]] for way in entry["ways"]] == ways_told:
            found[entry["seed"]] = entry
    for seed in range(arguments.seeds):
        if seed in found:
            continue
        folders = {t: lora_folder(arguments.output, Run("LoRA", rate, t, seed)) / "adapter" for t in arguments.tasks}
        bases = {task: base_model(plan.model, rows_of(plan, task, arguments.data)[0].task, 0) for task in folders}
        loras = {task: read_lora(bases[task], folder) for task, folder in folders.items()}
        exact = {task: {n: b @ a for n, (b, a) in lora.factors.items()} for task, lora in loras.items()}
        mean = {n: sum(update[n] for update in exact.values()) / len(exact) for n in next(iter(exact.values()))}
        build = {
            "tinyspan": lambda rank, folders=folders, model=None: with_tinyspan(model, folders, rank),
            "vLoRA": lambda rank, folders=folders, **rest: with_vlora(folders, rank),
            "lorashare": lambda rank, folders=folders, **rest: with_lorashare(folders, rank),
            "mean": lambda rank, mean=mean, **rest: lambda task: mean,
        }
        shared = sharing(list(loras.values()))
        entry = {
            "seed": seed, "tasks": list(folders), "LoRA": {task: scores[task, seed] for task in folders},
            "mean share": shared.mean_share, "error of the mean": shared.without, "error unseen": shared.unseen,
            "chance": shared.chance, "ways": [],
        }  # fmt: skip
        times: dict[Any, list[float]] = {way: [] for way in ways}
        for _, (kind, rank) in product(range(REPEATS), ways):
            model = headless(plan)
            began = time.perf_counter()
            build[kind](rank, model=model)
            times[kind, rank].append(time.perf_counter() - began)
        for kind, rank in [*ways, ("mean", None)]:
            rebuilt = build[kind](rank, model=headless(plan))
            updates = {task: {n: u.double() for n, u in rebuilt(task).items()} for task in folders}
            shared_bytes, each = (0, 0) if kind == "mean" else stored(kind, rank, list(loras.values()))
            entry["ways"].append(
                {
                    "kind": kind,
                    "rank": rank,
                    "seconds": min(times.get((kind, rank), [0.0])),
                    "shared bytes": shared_bytes,
                    "bytes each": each,
                    "errors": [distance(updates[task], exact[task]) for task in folders],
                    "scores": [scored(plan, t, seed, updates[t], loras[t], arguments.data) for t in folders],
                }
            )
            print(json.dumps(entry["ways"][-1]), flush=True)
        found[seed] = entry
        yield [found[seed] for seed in sorted(found)]


def headless(plan: Plan) -> nn.Module:
    """Return the model with a head that plays no part."""
    return base_model(plan.model, get_task("sst2"), 0)


def distance(found: Updates, exact: Updates) -> float:
    """Return || found - exact || / || exact || over all weights."""
    lost = sum(float((found[name] - value).square().sum()) for name, value in exact.items())
    return float((lost / sum(float(value.square().sum()) for value in exact.values())) ** 0.5)


@torch.no_grad()
def scored(plan: Plan, task: str, seed: int, updates: Updates, lora: Lora, data: Path | None) -> float:
    """Return the validation score of the base model with these updates and the adapter's own head."""
    rows, _ = rows_of(plan, task, data)
    model = start_of(plan, rows, seed)
    own = dict(model.named_parameters())
    for name, update in updates.items():
        own[name] += update.to(own[name])
    for name, value in lora.directly_trained.items():
        own[name].copy_(value)
    return float(score(model, rows, plan.settings(seed), "lora")["score"])


# -- what they say ----------------------------------------------------------------------------------------------------


def claims(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what holds, with half of the 95 % interval over seeds where there is one."""
    found: list[dict[str, Any]] = []
    for other, name, most in (
        ("its own directions", "points that LoRA is above z in its own directions, at most", 1),
        ("random directions", "points that LoRA is above z in random directions, at most", 1),
    ):
        lost = difference(content, "LoRA", other)
        if lost.mean is not None:
            holds = surely_at_most(lost, most)
            found.append({"name": name, "value": lost.mean, "target": most, "holds": holds, "interval": lost.half})
    for kind, rank in (("vLoRA", None), ("lorashare", None)):
        pairs = [(way(entry, "tinyspan", None), way(entry, kind, rank)) for entry in content["compared"]]
        if pairs and all(theirs is not None for _, theirs in pairs):
            ratio = max(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)
            exact = max(max(ours["errors"]) for ours, _ in pairs)
            best = min(max(theirs["errors"]) for _, theirs in pairs)
            found += [
                {"name": f"seconds of tinyspan, nothing lost, over {kind}'s with most directions", "value": ratio,
                 "target": 1.0, "holds": ratio <= 1, "interval": None},
                {"name": f"largest error of tinyspan, nothing lost; {kind}'s is {best:.1e}", "value": exact,
                 "target": max(best, 1e-6), "holds": exact <= max(best, 1e-6), "interval": None},
            ]  # fmt: skip
    return found


def way(entry: Mapping[str, Any], kind: str, rank: int | None) -> Mapping[str, Any] | None:
    """Return a way of the comparison; of another library without a rank the one with the most directions."""
    found = [way for way in entry["ways"] if way["kind"] == kind and (rank is None or way["rank"] == rank)]
    if kind == "tinyspan":
        found = [way for way in found if way["rank"] == rank]
    return found[-1] if found else None


def tables(content: Mapping[str, Any]) -> str:
    """Return the Markdown tables of both parts."""
    rows = []
    for method in content["learning rates"]:
        runs = [r for r in content["runs"] if r["method"] == method]
        score = summarize(means(content, method))
        rate = content["learning rates"][method]["chosen"]
        rows.append([method, f"{rate:g}", f"{runs[0]['trained']:,}", str(score)])
    first = markdown(["method", "rate", "numbers trained", "mean of tasks"], rows)
    rows = []
    for entry in content["compared"][:1]:
        for kind, rank in [(way["kind"], way["rank"]) for way in entry["ways"]]:
            alike = [w for e in content["compared"] for w in e["ways"] if (w["kind"], w["rank"]) == (kind, rank)]
            scores = [100 * sum(w["scores"]) / len(w["scores"]) for w in alike]
            errors = [error for w in alike for error in w["errors"]]
            rows.append(
                [kind, str(rank or "all"), f"{min(w['seconds'] for w in alike):.3f}",
                 f"{alike[0]['shared bytes'] / 1e6:.2f}", f"{alike[0]['bytes each'] / 1e3:.2f}",
                 f"{max(errors):.2g}", str(summarize(scores))]
            )  # fmt: skip
    head = ["", "rank", "seconds", "shared MB", "kB each", "largest error", "mean of tasks"]
    return f"{first}\n\n{markdown(head, rows)}"


def main() -> None:
    """Run, compare or render."""
    parser = study.parser_of(__doc__, "adapters", Plan)
    parser.add_argument("--compare", action="store_true", help="put the LoRAs that were trained into one basis")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    arguments = parser.parse_args()
    plan: Plan = study.plan_of(arguments, Plan)
    study.quiet()
    trained = Adapters(plan, arguments, Run)
    if arguments.run:
        trained.start()
    if arguments.compare:
        content = read_json(arguments.json)
        for compared in compare(trained, content["compared"]):
            content["compared"] = compared
            content["claims"] = claims(content)
            study.write_report(arguments.json, content)
    if arguments.render:
        study.render(arguments, tables)


if __name__ == "__main__":
    main()

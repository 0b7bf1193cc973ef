"""Do bases of other tasks serve a new one, can the best be told beforehand, and what do they do with few rows?

    python benchmarks/transfer.py --run --workers 2 --data DIR --output runs/transfer --json docs/results/transfer.json
    python benchmarks/transfer.py --render --json docs/results/transfer.json --images docs/images

Full fine-tuning of every task is recorded once per seed, and the first directions of that path are the task's basis.
The unified basis is taken from the paths of all tasks but the target, stacked. (The paper stacks one checkpoint per
task. All points of the same paths give as many directions as the other bases have, so every z has as many numbers.)

* The matrix: z is trained on each target, with all its rows, in the basis of each source.
* The ranking: the share of the target's first gradients that lies in each basis, as `tinyspan suggest` computes it,
  from at most `--suggest-rows` of the rows, beside three variants: through the head as it is at first, which is random,
  and of the mean gradient of all rows instead of the mean over batches. The rank correlation of share and score is that
  of ranks within each target, all targets pooled. Its p is exact, from all permutations of the tasks, as targets and as
  sources together: a source that serves every target makes the pairs depend on each other.
* Few rows: z in the basis that the ranking puts first (from no more rows than are trained on), in the unified basis and
  in a random one, LoRA, full fine-tuning, and the head alone.

Every method trains the same head directly, on the same rows, for the same steps, however few the rows, with
AdamW and a rate that falls to 0 linearly; a regression starts at the mean of those rows' labels (`--regression-start`).
Full fine-tuning trains all else too, the others freeze the embeddings. A seed decides which rows are drawn, their
order, the head, dropout and the random basis.

The rule for learning rates: every method, z in every single basis too, has three of them, a factor of 3 apart, on each
target with each number of rows, and takes the one with the best score with seed 0 on `--choice-rows` training rows of
the target that no run trains on. If the best one is at the end of its range the next one is tried too, at most twice.
(One rate of z for all targets, chosen with fewer rows, fails with more of them even in a task's own basis.) The head
has one rate under all methods but freeze. Scores are of validation rows.

`--output` holds one file for every finished run, which is never made again: kill the command at any moment and repeat
it. The runs go seed by seed: sources, ranking, matrix, then from all rows to few.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import study
import torch
from matplotlib.figure import Figure
from methods import heads, in_basis, with_peft
from scipy.stats import rankdata
from study import best_rate, rows_of, start_of, told_rate, train
from torch import nn
from transformers import TrainerCallback

from tinyspan import Basis, Trajectory, by_layer, empty_basis, random_basis, svd_basis
from tinyspan.analysis import span_share
from tinyspan.io.folders import Busy, claimed
from tinyspan.lab.summary import Summary, markdown, summarize
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.suggest import first_gradients, fit_head, frozen_encoder

OWN, SUGGESTED, UNIFIED, RANDOM, LORA = "z, own", "z, suggested", "z, unified", "z, random", "LoRA r = 8"
METHODS = [SUGGESTED, UNIFIED, RANDOM, LORA, "full", "freeze"]
CENTRES = {"full": 2e-4, "freeze": 1e-3, LORA: 2e-3, "z": 4e-2, RANDOM: 3e-1}  # the middle one of three learning rates
VARIANTS = [f"{head}, {over}" for head in ("fitted head", "random head") for over in ("batches", "mean gradient")]
DEFAULT = VARIANTS[0]  # what `tinyspan suggest` does


@dataclass(frozen=True)
class Plan(study.Plan):
    """What all runs have in common; the defaults are some 650 of half a minute to a minute of two cores each."""

    tasks: str = "sst2,mrpc,qnli,rte,stsb"
    shots: str = "100,300"  # besides all `train_rows`
    suggest_rows: int = 300
    validation_rows: int = 500
    steps: int = 112
    points: int = 16

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return self.tasks.split(",")

    @property
    def sizes(self) -> list[int]:
        """Return how many rows are trained on, ascending."""
        return sorted({*map(int, self.shots.split(",")), self.train_rows})


@dataclass(frozen=True)
class Run:
    """One training, or with the method `suggest` one ranking of the sources."""

    method: str
    rate: float
    task: str
    rows: int
    seed: int

    folder = study.Run.folder

    @property
    def name(self) -> str:
        """Of its folder."""
        method = "".join(letter for letter in self.method.lower() if letter.isalnum())
        return f"{self.task}-{self.rows}-{self.seed}-{method}-{self.rate:g}"

    @property
    def cell(self) -> "Cell":
        """What has a rate of its own."""
        return self.method, self.task, self.rows


# -- training ---------------------------------------------------------------------------------------------------------


class Transfer(study.Study[Run]):
    """The trainings, and the rankings of the sources."""

    def cells(self) -> list[Run]:
        """Return all runs that are known so far, the first to make first."""
        return schedule(self.plan, self.arguments.methods, self.arguments.seeds, self.finished())[0]

    def path_folder(self, run: Run) -> Path | None:
        """Return where full fine-tuning with all rows leaves its path."""
        return super().path_folder(run) if run.rows == self.plan.train_rows else None

    def path_of(self, task: str, seed: int) -> Trajectory:
        """Return the path of full fine-tuning with all rows, at its rate.

        Raises:
            Busy: the rate is not chosen yet, or another process records the path.
        """
        rate = chosen(("full", task, self.plan.train_rows), self.finished())
        if rate is None:
            raise Busy(f"the rate of full fine-tuning on {task} is not chosen yet")
        return self.path(Run("full", rate, task, self.plan.train_rows, seed))

    def fine_tuned(self, run: Run, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
        """Train one method at one rate on one task, and return its scores; or rank the sources.

        Raises:
            Busy: another process works on a trajectory that this run needs.
        """
        plan = self.plan
        paths = {task: self.path_of(task, run.seed) for task in sources(plan, run)}
        rows, choice = rows_of(plan, run.task, self.arguments.data)
        rows = drawn(rows, run)
        if run.method == "suggest":
            return suggested(plan, run, rows, paths)
        model = start_of(plan, rows, run.seed)
        partition = by_layer(model)
        head = heads(model, partition)
        with seeded(run.seed):
            if run.method == "full":
                module: nn.Module = model
            elif run.method == LORA:
                module = with_peft(model, run.method)
            elif run.method == "freeze":
                module = in_basis(model, empty_basis(partition))
            elif run.method == RANDOM:
                module = in_basis(model, random_basis(partition, plan.rank, seed=run.seed))
            else:
                module = in_basis(model, svd_basis(list(paths.values()), plan.rank))
        settings = plan.settings(run.seed, max_steps=plan.steps)
        return train(module, run, settings, rows, choice, head=head, head_rate=plan.head_rate, callbacks=callbacks)

    def clean(self) -> None:
        """Take away the paths of rates that were not chosen, and in the end all of them, unless another process does.

        Until then each is needed: a source that a later seed suggests has its rate chosen with seed 0.
        """
        with suppress(Busy), claimed(self.folder / "trajectories"):
            results = self.finished()
            _, complete = schedule(self.plan, self.arguments.methods, self.arguments.seeds, results)
            for run in results:
                if (folder := self.path_folder(run)) is not None:
                    rate = chosen(("full", run.task, self.plan.train_rows), results)
                    if complete or rate not in (None, run.rate):
                        rmtree(folder, ignore_errors=True)

    def tell(self, content: dict[str, Any], results: study.Results[Run]) -> None:
        """Tell of the rates, the ranking and what holds."""
        searched = {run.cell: choice_scores(run.cell, results) for run in results if run.rate}
        content["plan"]["methods"] = self.arguments.methods
        content["learning rates"] = [
            {"method": method, "task": task, "rows": rows, **told_rate(best_rate(scores), scores)}
            for (method, task, rows), scores in searched.items()
            if None not in scores.values()
        ]
        content["ranking"] = [found for variant in VARIANTS if (found := correlation(content, variant)) is not None]
        content["claims"] = claims(content)


def sources(plan: Plan, run: Run) -> list[str]:
    """Return the tasks whose paths a run needs."""
    if run.method in ("suggest", UNIFIED):
        return [task for task in plan.names if task != run.task]
    return [run.method.removeprefix("z of ")] if run.method.startswith("z of ") else []


def drawn(rows: Prepared, run: Run) -> Prepared:
    """Return the rows with those to train on that a run sees: those of fewer rows are among those of more."""
    assert rows.train is not None
    order = torch.randperm(len(rows.train), generator=torch.Generator().manual_seed(run.seed))
    return replace(rows, train=rows.train.select(order[: run.rows].tolist()))


def suggested(plan: Plan, run: Run, few: Prepared, paths: Mapping[str, Trajectory]) -> dict[str, Any]:
    """Return the shares of a task's first gradients in the basis of every other task, by variant."""
    bases = {source: svd_basis(path, plan.rank) for source, path in paths.items()}
    settings = replace(plan.settings(run.seed), batch_size=Settings().batch_size)  # batches as the command's
    began = time.perf_counter()
    fitted = frozen_encoder(few, settings)
    score = fit_head(fitted, few, settings)
    models = {"fitted head": fitted.merge(), "random head": start_of(plan, few, run.seed)}
    partition = next(iter(bases.values())).partition
    shares: dict[str, dict[str, float]] = {}
    for head, model in models.items():
        gradients = list(first_gradients(model, partition, few, settings))
        mean = {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}
        shares[f"{head}, batches"] = {source: mean_share(basis, gradients) for source, basis in bases.items()}
        shares[f"{head}, mean gradient"] = {source: mean_share(basis, [mean]) for source, basis in bases.items()}
    random = span_share(next(iter(bases.values())), mean).random
    return {"shares": shares, "random": random, "head score": score, "seconds": round(time.perf_counter() - began, 1)}


def mean_share(basis: Basis, gradients: Sequence[Mapping[str, torch.Tensor]]) -> float:
    return sum(span_share(basis, gradient).value for gradient in gradients) / len(gradients)


# -- which runs, and in which order -----------------------------------------------------------------------------------

Cell = tuple[str, str, int]  # a method, a target, how many rows: what has a rate of its own
Results = study.Results[Run]


def choice_scores(cell: Cell, results: Results) -> dict[float, float | None]:
    """Return the rates to try so far, and the score of each on the rows to choose by."""
    method, task, rows = cell
    centre = CENTRES.get(method, CENTRES["z"])
    return study.choice_scores(centre, lambda rate: [Run(method, rate, task, rows, 0)], results)


def chosen(cell: Cell, results: Results) -> float | None:
    """Return the rate of a cell, if its search is finished."""
    scores = choice_scores(cell, results)
    return None if None in scores.values() else best_rate(scores)


def cells(plan: Plan, methods: Sequence[str], seed: int, results: Results) -> Iterator[Cell | None]:
    """Yield what is made with a seed, the first to make first; None for what waits for a ranking."""
    for task in plan.names:
        yield "full", task, plan.train_rows
    if SUGGESTED in methods:
        for task in plan.names:
            for rows in sorted({min(rows, plan.suggest_rows) for rows in plan.sizes}, reverse=True):
                yield "suggest", task, rows
        for task in plan.names:
            for source in plan.names:
                yield f"z of {source}", task, plan.train_rows
    for rows in reversed(plan.sizes):
        for method in methods:
            for task in plan.names:
                if method != SUGGESTED:
                    yield method, task, rows
                elif (ranking := results.get(Run("suggest", 0.0, task, min(rows, plan.suggest_rows), seed))) is None:
                    yield None
                elif "shares" in ranking:  # else a path of this seed has diverged
                    yield f"z of {first(ranking)}", task, rows


def runs_of(cell: Cell, seed: int, results: Results) -> list[Run]:
    """Return the runs of a cell: with seed 0 one for every rate, with another one at the rate that was chosen, if any.

    A source that is suggested with another seed than 0 alone has its rate chosen first, with seed 0.
    """
    method, task, rows = cell
    if method == "suggest":
        return [Run(method, 0.0, task, rows, seed)]
    scores = choice_scores(cell, results)
    if seed == 0 or None in scores.values():
        return [Run(method, rate, task, rows, 0) for rate in scores]
    return [Run(method, best_rate(scores), task, rows, seed)]


def schedule(plan: Plan, methods: Sequence[str], seeds: int, results: Results) -> tuple[list[Run], bool]:
    """Return all runs that are known so far, the first to make first, and whether these are all."""
    found = [(cell, seed) for seed in range(seeds) for cell in cells(plan, methods, seed, results)]
    runs = [run for cell, seed in found if cell is not None for run in runs_of(cell, seed, results)]
    return list(dict.fromkeys(runs)), all(cell is not None for cell, _ in found) and all(run in results for run in runs)


def first(ranking: Mapping[str, Any]) -> str:
    """Return the source that a ranking puts first."""
    shares: dict[str, float] = ranking["shares"][DEFAULT]
    return max(shares, key=shares.__getitem__)


# -- what they say ----------------------------------------------------------------------------------------------------

Key = tuple[str, str, int, int]  # method, task, rows, seed


def scores_of(content: Mapping[str, Any]) -> dict[Key, float]:
    """Return the score, in points, of every run at its method's rate; of own and suggested sources by that name too."""
    rates = {(told["method"], told["task"], told["rows"]): told["chosen"] for told in content["learning rates"]}
    found = {}
    for run in content["runs"]:
        cell = run["method"], run["task"], run["rows"]
        if "score" in run and run["rate"] == rates.get(cell):
            found[(*cell, run["seed"])] = 100 * run["score"]
            if run["method"] == f"z of {run['task']}":
                found[(OWN, *cell[1:], run["seed"])] = 100 * run["score"]
    for (_, task, rows, seed), ranking in rankings_of(content).items():
        for size in sizes_of(content):
            source = (f"z of {first(ranking)}", task, size, seed)
            if min(size, content["plan"]["suggest_rows"]) == rows and source in found:
                found[SUGGESTED, task, size, seed] = found[source]
    return found


def rankings_of(content: Mapping[str, Any]) -> dict[Key, Mapping[str, Any]]:
    runs = [run for run in content["runs"] if "shares" in run]
    return {("suggest", run["task"], run["rows"], run["seed"]): run for run in runs}


def sizes_of(content: Mapping[str, Any]) -> list[int]:
    plan = content["plan"]
    return sorted({*map(int, plan["shots"].split(",")), plan["train_rows"]})


def tasks_of(content: Mapping[str, Any]) -> list[str]:
    names: list[str] = content["plan"]["tasks"].split(",")
    return names


def average(values: Sequence[float | None]) -> float | None:
    """Return the mean, None if a value is missing."""
    return None if None in values or not values else sum(values) / len(values)  # type: ignore[arg-type]


def minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def means(content: Mapping[str, Any], method: str, rows: int) -> list[float | None]:
    """Return a method's mean score over the tasks for every seed; None where one is missing."""
    scores = scores_of(content)
    return [
        average([scores.get((method, task, rows, seed)) for task in tasks_of(content)])
        for seed in range(content["plan"]["seeds"])
    ]


def difference(content: Mapping[str, Any], one: str, other: str, rows: int) -> Summary:
    """Return by how many points one method is above another, paired by seed."""
    pairs = zip(means(content, one, rows), means(content, other, rows), strict=True)
    return summarize([minus(a, b) for a, b in pairs])


def over_others(content: Mapping[str, Any], method: str) -> Summary:
    """Return by how many points a method is above z in the basis of another task, their mean, with all rows."""
    scores, rows, gained = scores_of(content), content["plan"]["train_rows"], []
    for seed in range(content["plan"]["seeds"]):
        of_tasks = []
        for task in tasks_of(content):
            others = [source for source in tasks_of(content) if source != task]
            mean = average([scores.get((f"z of {source}", task, rows, seed)) for source in others])
            of_tasks.append(minus(scores.get((method, task, rows, seed)), mean))
        gained.append(average(of_tasks))
    return summarize(gained)


def ranks_within(content: Mapping[str, Any], variant: str, seeds: Sequence[int]) -> tuple[Any, Any] | None:
    """Return ranks of shares and of scores, means over seeds, [target, source], less the mean rank; 0 for itself."""
    plan, tasks, scores, rankings = content["plan"], tasks_of(content), scores_of(content), rankings_of(content)
    rows, looked_at = plan["train_rows"], min(plan["train_rows"], plan["suggest_rows"])
    ranks = np.zeros((2, len(tasks), len(tasks)))
    for target, task in enumerate(tasks):
        others = [source for source in tasks if source != task]
        if any(("suggest", task, looked_at, seed) not in rankings for seed in seeds):
            return None
        told = [rankings["suggest", task, looked_at, seed]["shares"][variant] for seed in seeds]
        shares = [average([one[source] for one in told]) for source in others]
        reached = [average([scores.get((f"z of {source}", task, rows, seed)) for seed in seeds]) for source in others]
        if None in reached:
            return None
        for which, values in enumerate((shares, reached)):
            ranks[which, target, np.arange(len(tasks)) != target] = rankdata(values) - len(tasks) / 2
    return ranks[0], ranks[1]


def cosine(a: Any, b: Any) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size else 0.0


def correlation(content: Mapping[str, Any], variant: str) -> dict[str, Any] | None:
    """Return Spearman's correlation of share and score over the sources of each target, and over all pooled.

    Returns:
        `pooled`, of means over the seeds that are there; `p`, the share of permutations of the tasks with as high a
        one; `pairs`; `by target`; `by seed`, of each seed alone; None if no seed is finished.
    """
    found = {seed: ranks_within(content, variant, [seed]) for seed in range(content["plan"]["seeds"])}
    finished = {seed: ranks for seed, ranks in found.items() if ranks is not None}
    if not finished or (ranks := ranks_within(content, variant, list(finished))) is None:
        return None
    shares, scores = ranks
    permuted = [cosine(shares, scores[np.ix_(order, order)]) for order in permutations(range(len(scores)))]
    pooled = cosine(shares, scores)
    return {
        "variant": variant,
        "pooled": pooled,
        "p": sum(value >= pooled - 1e-12 for value in permuted) / len(permuted),
        "pairs": len(scores) * (len(scores) - 1),
        "by target": {task: cosine(*pair) for task, *pair in zip(tasks_of(content), shares, scores, strict=True)},
        "by seed": [cosine(*of_seed) for of_seed in finished.values()],
    }


def claims(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what holds, with half of the 95 % interval over seeds of each value.

    That one method beats another is said to hold if the interval is above 0, that shares and scores are correlated if
    fewer than 5 % of the permutations are as much so.
    """
    found, sizes = [], sizes_of(content)

    def add(name: str, gained: Summary) -> None:
        if gained.mean is not None:
            holds = gained.half is not None and gained.mean - gained.half > 0
            found.append({"name": name, "value": gained.mean, "target": 0, "holds": holds, "interval": gained.half})

    for ranking in content["ranking"]:
        if ranking["variant"] == DEFAULT:
            half = summarize(ranking["by seed"]).half
            name = (
                f"rank correlation of share and score ({ranking['pairs']} pairs, p = {ranking['p']:.2g}), surely above"
            )
            holds = ranking["p"] < 0.05
            found.append({"name": name, "value": ranking["pooled"], "target": 0, "holds": holds, "interval": half})
    for method in (OWN, SUGGESTED, UNIFIED, RANDOM, "full"):
        add(f"points that {method} is above z in another task's basis, surely more than", over_others(content, method))
    add(
        "points that full is above z, own, with all rows, surely more than",
        difference(content, "full", OWN, max(sizes)),
    )
    for rows in sizes:
        for ours, others in (
            (SUGGESTED, (RANDOM, LORA, "full", "freeze")),
            (UNIFIED, (RANDOM, LORA, "full", "freeze", SUGGESTED)),
        ):
            for other in others:
                name = f"points that {ours} is above {other} with {rows} rows, surely more than"
                add(name, difference(content, ours, other, rows))
    return found


def tables(content: Mapping[str, Any]) -> str:
    """Return Markdown tables: few rows, the matrix, the ranking."""
    scores, sizes, tasks = scores_of(content), sizes_of(content), tasks_of(content)
    plan, rankings = content["plan"], rankings_of(content)
    seeds, rows = range(plan["seeds"]), plan["train_rows"]
    of_methods = []
    for method in plan["methods"]:
        name = "z of" if method == SUGGESTED else method
        told = [told for told in content["learning rates"] if told["method"].startswith(name)]
        rates, edges = [one["chosen"] for one in told], sum(one["at the edge"] for one in told)
        shown = f"{min(rates):g} to {max(rates):g}, {edges} of {len(told)} at the edge" if rates else ""
        of_methods.append([method, shown, *(str(summarize(means(content, method, size))) for size in sizes)])

    def cell(source: str, task: str) -> str:
        shown = str(summarize([scores.get((f"z of {source}", task, rows, seed)) for seed in seeds]))
        looked_at = min(rows, plan["suggest_rows"])
        found = [rankings.get(("suggest", task, looked_at, seed)) for seed in seeds]
        told = [one["shares"][DEFAULT][source] / one["random"] for one in found if one is not None and source != task]
        return f"{shown} ({sum(told) / len(told):,.0f})" if told else shown

    matrix = [[task, *(cell(source, task) for source in tasks)] for task in tasks]
    ranking = [
        [
            one["variant"],
            f"{one['pooled']:.2f}",
            f"{one['p']:.2g}",
            summarize(one["by seed"]).shown("{:.2f}"),
            *(f"{one['by target'][task]:.1f}" for task in tasks),
        ]
        for one in content["ranking"]
    ]
    return "\n\n".join(
        [
            markdown(["method", "rates", *(f"{size:,} rows" for size in sizes)], of_methods),
            markdown(["target, z in the basis of (share over random)", *tasks], matrix),
            markdown(["shares through", "rank correlation", "p", "mean of single seeds", *tasks], ranking),
        ]
    )


def figure(content: Mapping[str, Any]) -> Figure:
    """Draw score against rows for every method, and for every source of a target its score against its share."""
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    styles = {
        OWN: ("#2e8b57", "P-"),
        SUGGESTED: ("#d1495b", "o-"),
        UNIFIED: ("#e9a23b", "s-"),
        RANDOM: ("#7b5ea7", "x:"),
        LORA: ("#3d7ea6", "D-"),
        "full": ("#3b3b3b", "^-"),
        "freeze": ("#9a9a9a", "v:"),
    }
    for index, (method, (colour, style)) in enumerate(styles.items()):
        found = [(rows, summarize(means(content, method, rows))) for rows in sizes_of(content)]
        known = [(rows, one.mean, one.half or 0.0) for rows, one in found if one.mean is not None]
        if known:
            sizes, values, halves = zip(*known, strict=True)
            moved = [size * (1 + 0.02 * (index - 2.5)) for size in sizes]  # so that intervals do not hide each other
            left.errorbar(moved, values, halves, fmt=style, color=colour, capsize=3, label=method, elinewidth=0.8)
    left.set_xscale("log")
    left.set_xticks(sizes_of(content), [f"{size:,}" for size in sizes_of(content)])
    left.minorticks_off()
    left.set_xlabel("training rows of the target; as many steps for all")
    left.set_ylabel(f"score, mean of {', '.join(tasks_of(content))};\n95 % intervals over seeds")
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    scores, rankings, plan = scores_of(content), rankings_of(content), content["plan"]
    looked_at = min(plan["train_rows"], plan["suggest_rows"])
    for index, task in enumerate(tasks_of(content)):
        others = [source for source in tasks_of(content) if source != task]
        points = []
        for seed in range(plan["seeds"]):
            told = rankings.get(("suggest", task, looked_at, seed))
            reached = [scores.get((f"z of {source}", task, plan["train_rows"], seed)) for source in others]
            if told is not None and (mean := average(reached)) is not None:
                times = [told["shares"][DEFAULT][source] / told["random"] for source in others]
                points += zip(times, [minus(score, mean) for score in reached], strict=True)
        if points:
            right.plot(*zip(*points, strict=True), "osD^v"[index % 5], label=task, markersize=5, alpha=0.8)
            right.legend(frameon=False, fontsize=8, title="target")
            right.set_xscale("log")
    right.set_xlabel("share of the target's first gradients in a source's basis,\nover that in a random one")
    right.set_ylabel("score in that basis, less the mean of all sources")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    parser = study.parser_of(__doc__, "transfer", Plan)
    parser.add_argument("--methods", default=METHODS, type=lambda text: text.split(";"), help="separated by ;")
    arguments = parser.parse_args()
    plan = study.plan_of(arguments, Plan)
    if not {*arguments.methods} <= {*METHODS}:
        parser.error(f"expected methods of {'; '.join(METHODS)}")
    study.quiet()
    if arguments.run:
        Transfer(plan, arguments, Run).start()
    if arguments.render:
        study.render(arguments, tables, figure)


if __name__ == "__main__":
    main()

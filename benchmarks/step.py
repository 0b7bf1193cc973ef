"""What does a training step cost? Time and peak memory of ours, full fine-tuning and PEFT's methods, in one run.

    python benchmarks/step.py --json docs/results/step.json
    python benchmarks/step.py --model base --rounds 2 --json docs/results/step-base.json
    python benchmarks/step.py --overhead --json docs/results/step-overhead.json

Beside other work set OMP_WAIT_POLICY=passive: threads that wait for each other by spinning take the time they measure.

All methods take the same batches of real text, the demo's, in the same precision, with fused AdamW; all but full
freeze the embeddings and train pooler and head directly. `minilm` is the encoder that the extra `demo`
carries; `base` has 12 layers of width 768 and random weights. Our directions are random numbers, which cost as much
as learned ones. PEFT's methods adapt all linear layers of the encoder.

Every measurement is a process of its own, and the methods take turns, round by round, so that what else the machine
does hits all alike. Time is the median over rounds of the median over steps. Peak memory is that of the process while
it trains, less what it held after a step of a tiny model of the same kind, less the weights and the basis: gradients,
states of the optimizer, activations, copies. On an accelerator all is one process, whose allocator counts what each
method takes there.

Beside each stands the physical limit, 2 c P T / (rate of a large matrix product) + bytes / (rate of a large copy): P
weights of the encoder's matrices, T tokens of a batch, c = 3 where the gradients of all weights are formed, 2 where
only those of activations are, 1 for a forward pass, 2.01 where of the gradients of weights only the one in a hundred is
formed that a sparse basis wants (on a processor); attention's own products are left out. Bytes are those of the basis
(read twice), of the weights and gradients that a step of ours touches (theta_0 and gradients read, weights written),
and of what AdamW reads and writes (7 numbers for every one that is trained). The shorter the texts, the more the bytes
weigh against the products: the ratio of two limits is what the ratio of two times could be at best.

With `--overhead` the arithmetic is so small that the operators' overhead is measured, as on an accelerator: 6 layers of
width 64 with random weights, 2 rows of 8 tokens, k = 8, one thread. All methods are then trained in one process, in
turn: a round is some steps of each.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import peft
import psutil
import torch
from methods import DEVICE, heads, in_basis, trained, with_peft
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from tinyspan import Basis, Partition, by_layer, empty_basis
from tinyspan.io.manifests import package_versions
from tinyspan.io.storage import write_json
from tinyspan.lab.summary import markdown
from tinyspan.maps.dense import DenseMap, dense_map
from tinyspan.maps.sparse import SparseMap
from tinyspan.model.sampled import SampledProduct
from tinyspan.workflows.hardware import hardware, peak_memory, reset_peak_memory, seeded
from tinyspan.workflows.models import base_model
from tinyspan.workflows.progress import quieten
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.tasks import get_task

DENSE, SPARSE = "ours, dense, ", "ours, sparse 1 %, "
METHODS = (
    "full",
    *(f"{DENSE}{dtype}" for dtype in ("float32", "bfloat16", "int8")),
    *(f"{SPARSE}{dtype}" for dtype in ("float32", "bfloat16")),
    "LoRA r = 8",
    "VeRA",
    "Uni-LoRA",
    "frozen encoder",
)
WARM = 2  # steps before those that are measured
SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 256}  # --overhead
GEMM, COPY = (8192, 1 << 29) if DEVICE.type == "cuda" else (2048, 1 << 26)  # by which rates are measured


@dataclass(frozen=True)
class Plan:
    """What all measurements have in common."""

    model: str
    task: str
    data: Path | None
    max_length: int
    batch_size: int
    rank: int
    steps: int
    autocast: bool
    threads: int
    compiled: str | None


def encoder(plan: Plan) -> Any:
    """Return the model, its weights in memory of the process: a mapped file would count only where it is touched."""
    if plan.model != "base":
        model: Any = base_model(plan.model, get_task(plan.task), 0)
    else:
        with seeded(0):
            model = BertForSequenceClassification(BertConfig())  # 12 layers of width 768
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.to(DEVICE)


def batches_of(plan: Plan) -> list[Any]:
    """Return the batches of all steps."""
    count = plan.batch_size * (plan.steps + WARM)
    vocabulary = "minilm" if plan.model == "base" else plan.model  # BERT's own
    prepared = prepare(vocabulary, plan.task, data=plan.data, max_length=plan.max_length, train_rows=count)
    assert prepared.train is not None
    rows = [prepared.train[index % len(prepared.train)] for index in range(count)]
    collate = DataCollatorWithPadding(prepared.tokenizer)
    return [collate(rows[start : start + plan.batch_size]) for start in range(0, count, plan.batch_size)]


def built(method: str, model: Any, rank: int) -> tuple[nn.Module, Basis | None]:
    """Return a model that is trained by a method, and its basis if it has one."""
    if method == "full":
        return model, None
    if method.startswith((DENSE, SPARSE)):
        density, dtype = 0.01 if method.startswith(SPARSE) else 1.0, getattr(torch, method.rpartition(" ")[2])
        basis = drawn(by_layer(model), rank, density, dtype)
        return in_basis(model, basis), basis
    if method == "frozen encoder":
        return in_basis(model, empty_basis(by_layer(model))), None
    return with_peft(model, method), None


def drawn(partition: Partition, rank: int, density: float, dtype: torch.dtype) -> Basis:
    """Return directions that are not orthonormal, on which no cost depends, drawn where they are needed."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    maps: dict[str, DenseMap | SparseMap] = {}
    for block in partition:
        size = round(density * block.numel)
        dense = dense_map(torch.randn(rank, size, generator=generator, device=DEVICE) / block.numel**0.5, dtype)
        support = torch.randperm(block.numel, generator=generator, device=DEVICE)[:size].sort().values
        maps[block.name] = dense if size == block.numel else SparseMap(block.numel, support, dense)
    return Basis(partition, maps)


def stepped(module: nn.Module, autocast: bool, compiled: str | None = None) -> Callable[[Any], None]:
    """Return a function that makes one optimizer step on a batch, with the module compiled if a mode is given."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    if compiled is not None:
        module = torch.compile(module, mode=compiled)

    def step(batch: Any) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        finish()

    return step


def measure(method: str, plan: Plan, batches: list[Any]) -> dict[str, Any]:
    """Train for some steps in this process; return seconds, peak memory, and what the physical limit is made of."""
    prepare_process(plan.threads)
    warm_up(method, plan)
    before = resident()
    model = encoder(plan)
    partition, head = by_layer(model), heads(model, by_layer(model))
    matrices = sum(spec.numel for spec in partition.parameters() if len(spec.shape) == 2)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    module, basis = built(method, model, plan.rank)
    of_basis = 0 if basis is None else sum(t.nbytes for name in basis.maps for t in basis.maps[name].tensors().values())
    own, in_head = trained(module.train(), head)
    step = stepped(module, plan.autocast, plan.compiled)
    resident()
    reset_peak_memory()
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - began)
    peak = peak_memory() - before - weights - of_basis
    touched = 0 if basis is None else partition.numel * (0.01 if method.startswith(SPARSE) else 1)
    tokens = max(batch["input_ids"].numel() for batch in batches)
    products = {"full": 3, "frozen encoder": 1}.get(method, 2 if basis is None else 3)
    if method.startswith(SPARSE) and DEVICE.type == "cpu":  # of the gradients of weights one in a hundred is computed
        products = 2.01
    return {
        "seconds": median(seconds[WARM:]),
        "peak": peak,
        "weights": weights,
        "basis": of_basis,
        "trained": sum(parameter.numel() for parameter in own),
        "operations": 2 * products * matrices * tokens,
        "bytes": 2 * of_basis + 4 * (3 * touched + 7 * sum(parameter.numel() for parameter in (*own, *in_head))),
    }


def prepare_process(threads: int) -> None:
    quieten()
    warnings.filterwarnings("ignore", "Specified to not save", UserWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    torch.set_num_threads(threads)


def warm_up(method: str, plan: Plan) -> None:
    """Make a step of a tiny model, so that what code and libraries take is there before memory is measured."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    module, _ = built(method, BertForSequenceClassification(BertConfig(**shape)).to(DEVICE), 2)
    tokens = torch.ones(2, 8, dtype=torch.int64, device=DEVICE)
    stepped(module.train(), plan.autocast)({"input_ids": tokens, "labels": tokens[:, 0]})
    if method.startswith(SPARSE) and DEVICE.type == "cpu":  # as in large layers
        SampledProduct(torch.tensor([0]), (1, 1))(*torch.ones(2, 1, 1))
    if method.endswith(("bfloat16", "int8")):  # large ones of these are multiplied by other code
        large = dense_map(torch.zeros(32, 1 << 19, device=DEVICE), getattr(torch, method.rpartition(" ")[2]))
        start, z, out = (torch.zeros(size, device=DEVICE) for size in (large.size, large.rank, large.size))
        large.displace(start, z, out)
        large.rmatvec(start)


def finish() -> None:
    """Wait until the accelerator has done what it was told to."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def resident() -> int:
    """Return the memory this process holds, after what was freed went back to the system where that can be asked.

    On an accelerator it is what the process has allocated there.
    """
    gc.collect()
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def rates(plan: Plan) -> dict[str, float]:
    """Return operations a second of a large matrix product in the steps' precision, and bytes a second of a copy."""
    prepare_process(plan.threads)
    left, right = torch.randn(2, GEMM, GEMM, dtype=torch.bfloat16 if plan.autocast else torch.float32, device=DEVICE)
    source, target = torch.randn(2, COPY, device=DEVICE)
    return {
        "operations a second": 2 * GEMM**3 / best(lambda: left @ right),
        "bytes a second": 8 * COPY / best(lambda: target.copy_(source)),
    }


def best(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        finish()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def in_turn(plan: Plan, methods: list[str], rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Measure every method once a round, each time in a new process; return medians, and the best rates."""
    context = multiprocessing.get_context("forkserver")  # forks of one process that has imported what takes seconds
    context.set_forkserver_preload(["peft", "tinyspan.workflows.training"])
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    speeds: list[dict[str, float]] = []
    batches = [batch.to(DEVICE) for batch in batches_of(plan)]

    def alone(call: Callable[..., Any], *arguments: Any) -> Any:
        if DEVICE.type == "cuda":
            return call(*arguments)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(call, *arguments).result()

    for index in range(rounds):
        speeds.append(alone(rates, plan))
        for method in methods:
            found[method].append(alone(measure, method, plan, batches))
            told = found[method][-1]
            print(f"{index + 1}/{rounds} {method}: {told['seconds']:.3f} s, {told['peak'] / 1e6:.0f} MB", flush=True)
    speed = {name: max(rates[name] for rates in speeds) for name in speeds[0]}
    table = {}
    for method, rounds_of in found.items():
        seconds, peaks = ([measured[key] for measured in rounds_of] for key in ("seconds", "peak"))
        limit = (
            rounds_of[0]["operations"] / speed["operations a second"] + rounds_of[0]["bytes"] / speed["bytes a second"]
        )
        medians = {"seconds": median(seconds), "peak": median(peaks), "limit, seconds": limit}
        table[method] = {**rounds_of[0], **medians, "rounds": {"seconds": seconds, "peak": peaks}}
    for row in table.values():
        row["time over full"] = row["seconds"] / table["full"]["seconds"]
        row["limit over full"] = row["limit, seconds"] / table["full"]["limit, seconds"]
        row["peak over full"] = row["peak"] / table["full"]["peak"]
    return table, speed


def overhead(methods: list[str], steps: int, rounds: int) -> dict[str, Any]:
    """Train all methods in this process in turn, a few steps each; return medians over the rounds, and operators."""
    prepare_process(1)
    tokens = torch.randint(1000, 2000, (2, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 1], device=DEVICE)}
    step_of: dict[str, Callable[[Any], None]] = {}
    for method in methods:
        with seeded(0):
            module, _ = built(method, BertForSequenceClassification(BertConfig(**SMALL)).to(DEVICE), 8)
        step_of[method] = stepped(module.train(), autocast=False)
    medians: dict[str, list[float]] = {method: [] for method in methods}
    for index in range(rounds + 1):
        for method, step in step_of.items():
            seconds = []
            for _ in range(WARM + steps):
                began = time.perf_counter()
                step(batch)
                seconds.append(time.perf_counter() - began)
            if index:  # the first round warms up
                medians[method].append(median(seconds[WARM:]))
        print(f"{index}/{rounds} rounds", flush=True)
    table: dict[str, Any] = {}
    for method, seconds in medians.items():
        with torch.profiler.profile() as profile:
            step_of[method](batch)
        operators = sum(event.name.startswith("aten::") for event in profile.events())
        table[method] = {"seconds": median(seconds), "rounds": {"seconds": seconds}, "operators": operators}
        table[method]["time over full"] = table[method]["seconds"] / table["full"]["seconds"]
    return table


def claims(table: dict[str, Any], regime: str) -> list[dict[str, Any]]:
    """Return what holds of the ratios; `regime` is "overhead", "base", or anything else for a small encoder."""
    found = []
    dense, sparse = {"overhead": (1.0, 1.0), "base": (1.15, 0.75)}.get(regime, (1.2, 0.8))

    def add(name: str, value: float, target: float) -> None:
        found.append({"name": name, "value": value, "target": target, "holds": value <= target})

    def over(name: str, of: str, other: str, target: float) -> None:
        if of in table and other in table:
            add(f"{of}: time over {name}", table[of]["seconds"] / table[other]["seconds"], target)

    known = [method for method in table if method.startswith("ours")]
    for method in known:
        if method.startswith(SPARSE) or method == f"{DENSE}float32":
            over("full", method, "full", sparse if method.startswith(SPARSE) else dense)
        else:
            over("float32", method, f"{DENSE}float32", 1)
        if method.startswith(SPARSE) or regime == "overhead":
            over("LoRA r = 8", method, "LoRA r = 8", 1)
    for method in known:
        if "peak over full" in table[method]:
            add(f"{method}: peak memory over full", table[method]["peak over full"], 0.6)
    return found


def of_overhead(table: dict[str, Any]) -> str:
    """Return a Markdown table of what `overhead` returns."""
    header = ["method", "ms a step", "quartiles", "over full", "over LoRA", "operators"]
    lines = []
    for method, row in table.items():
        low, high = (1e3 * second for second in quartiles(row["rounds"]["seconds"]))
        over = f"{row['seconds'] / table['LoRA r = 8']['seconds']:.2f}" if "LoRA r = 8" in table else ""
        milliseconds, times = f"{1e3 * row['seconds']:.1f}", f"{row['time over full']:.2f}"
        lines.append([method, milliseconds, f"{low:.1f} to {high:.1f}", times, over, f"{row['operators']:,}"])
    return markdown(header, lines)


def quartiles(seconds: list[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    low, _, high = quantiles(seconds) if len(seconds) > 1 else seconds * 3
    return low, high


def shown(table: dict[str, Any]) -> str:
    """Return a Markdown table."""
    header = [
        "method",
        "s a step",
        "quartiles",
        "over full",
        "limit, s",
        "over full",
        "time over limit",
        "peak, MB",
        "over full",
        "basis, MB",
    ]
    lines = [
        [
            method,
            f"{row['seconds']:.3f}",
            " to ".join(f"{second:.3f}" for second in quartiles(row["rounds"]["seconds"])),
            f"{row['time over full']:.2f}",
            f"{row['limit, seconds']:.3f}",
            f"{row['limit over full']:.2f}",
            f"{row['seconds'] / row['limit, seconds']:.1f}",
            f"{row['peak'] / 1e6:,.0f}",
            f"{row['peak over full']:.2f}",
            f"{row['basis'] / 1e6:,.1f}",
        ]
        for method, row in table.items()
    ]
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, base, or the folder of another")
    parser.add_argument("--task", default="rotten_tomatoes")
    parser.add_argument("--data", type=Path, help="the task's folder, if it is not an embedded one")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32, help="k")
    parser.add_argument("--steps", type=int, default=20, help="per process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overhead", action="store_true", help="measure overhead; see above")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 steps")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16; weights stay float32")
    parser.add_argument("--compile", dest="compiled", metavar="MODE", help="of torch.compile: default, reduce-overhead")
    parser.add_argument("--methods", default=list(METHODS), type=lambda text: text.split(";"), help="separated by ;")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    if not {"full"} <= {*arguments.methods} <= {*METHODS}:
        parser.error(f"expected full and others of {'; '.join(METHODS)}")
    steps, rounds = (3, 2) if arguments.quick else (arguments.steps, arguments.rounds)
    names = ("model", "task", "data", "max_length", "batch_size", "rank", "compiled")
    taken = {name: getattr(arguments, name) for name in names}
    plan = Plan(**taken, steps=steps, autocast=arguments.autocast, threads=torch.get_num_threads())
    quieten()
    if arguments.overhead:
        plan = replace(plan, model=f"BERT {SMALL}", max_length=8, batch_size=2, rank=8, threads=1)
        table, speed = overhead(arguments.methods, steps, rounds), None
        print(of_overhead(table))
    else:
        table, speed = in_turn(plan, arguments.methods, rounds)
        print(shown(table))
    claimed = claims(table, "overhead" if arguments.overhead else plan.model)
    for claim in claimed:
        verdict = "holds" if claim["holds"] else "FAILS"
        print(f"{verdict}  {claim['name']}: {claim['value']:.3g} (target {claim['target']:g})")
    if arguments.json:
        content = {
            "plan": {**asdict(plan), "data": None, "rounds": rounds, "waiting": os.environ.get("OMP_WAIT_POLICY")},
            "methods": table,
            "rates": speed,
        }
        versions = package_versions() | {"peft": peft.__version__}
        write_json(arguments.json, {**content, "claims": claimed, "hardware": hardware(), "versions": versions})


if __name__ == "__main__":
    main()

"""Killed at any moment: the same command goes on, loses no finished point or cell, and ends with the same bits.

Commands run in forked processes of a server that has imported everything, on one thread. A trial starts a command,
ends it by a signal at a random instant, or at the n-th time it flushes or renames a file, repeats it until it ends by
itself, and compares what is there, byte by byte, with an undisturbed run.
"""

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tinyspan import Basis, Trajectory, cli
from tinyspan.io.manifests import MANIFEST, read_manifest
from tinyspan.io.storage import read_json
from tinyspan.lab import demo
from tinyspan.lab.demo import Plan

pytestmark = pytest.mark.processes

processes = get_context("forkserver")
processes.set_forkserver_preload(
    [
        *("tinyspan.cli", "tinyspan.lab.demo", "tinyspan.lab.rendering", "tinyspan.workflows.callbacks"),
        *(
            "pandas",
            "datasets",
            "scipy.optimize",
            "scipy.stats",
            "sklearn.metrics",
        ),  # by functions of tasks
        *("transformers.models.auto.modeling_auto", "transformers.data.data_collator"),
        *("transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert"),
        *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
    ]
)

RATES = ["--learning-rate", "3e-3", "--batch-size", "8", "--precision", "float32", "--epochs", "2"]
MEASURED = ("seconds", "peak_memory_bytes", "cell_seconds")  # differ between any two runs
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def child(words: list[str], log: str, die_at: int | None, plan: Plan | None) -> None:
    """Be the command line; die before the n-th flush, rename or removal of a file if told to."""
    try:
        _child(words, log, die_at, plan)
    except KeyboardInterrupt:  # before the command line was ready
        os._exit(130)


def _child(words: list[str], log: str, die_at: int | None, plan: Plan | None) -> None:
    import torch

    gc.freeze()  # each Trainer collects garbage, which takes longer than its training otherwise
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if plan is not None:
        demo.run_demo.__kwdefaults__["plan"] = plan  # type: ignore[index]
    if die_at is not None:
        left = iter(range(die_at))
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, _dying(getattr(os, name), left))
        Path.replace = lambda self, target: os.replace(self, target)  # type: ignore[assignment]
    sys.argv = ["tinyspan", *words]
    cli.main()


def _dying(function: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return call


@dataclass
class Command:
    """A command that writes into a folder of a workplace.

    Attributes:
        words: the command line, with `OUT` for the output folder.
        work: where outputs go.
        plan: of the demo.
        seconds: how long the undisturbed run took, 0 before there was one.
    """

    words: list[str]
    work: Path
    plan: Plan | None = None
    seconds: float = 0.0

    def start(self, output: Path, die_at: int | None = None) -> Any:
        words = [str(output) if word == "OUT" else word for word in self.words]
        Path(f"{output}.log").write_text("")  # what an earlier start said is no sign of this one
        process = processes.Process(target=child, args=(words, f"{output}.log", die_at, self.plan))
        process.start()
        return process

    def finish(self, output: Path) -> float:
        began, process = time.monotonic(), self.start(output)
        process.join(300)
        log = Path(f"{output}.log").read_text()
        assert process.exitcode == 0 or "holds an earlier output" in log, log  # stopped when all was done
        return time.monotonic() - began


def content(folder: Path) -> dict[str, str]:
    """Return the hash of every file that two equal runs must agree on."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = any(part in (".holder", ".lock", "README.md", "report.html") for part in path.parts)
        if not path.is_file() or hidden:
            continue
        data = path.read_bytes()
        if path.suffix == ".json" and path.parent.name != "model":
            data = json.dumps(_without(json.loads(data), MEASURED), sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _without(value: Any, names: tuple[str, ...]) -> Any:
    """Leave out what is measured, and the hashes of files that hold it."""
    if isinstance(value, dict):
        if "sha256" in value.get("result.json", {}):
            value = {key: inner for key, inner in value.items() if key != "result.json"}
        return {key: _without(inner, names) for key, inner in value.items() if key not in (*names, "checksum")}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def whole_parts(folder: Path) -> dict[str, int]:
    """Open everything that a killed command left, which must be whole, and count what is finished."""
    found = {}
    for path in folder.rglob(MANIFEST):
        kind = read_manifest(path.parent).kind
        if kind == "trajectory":
            trajectory = Trajectory(path.parent)
            for block in trajectory.partition:
                for _ in trajectory.chunks(block):
                    pass
            found[str(path.relative_to(folder))] = len(trajectory)
        elif kind == "basis":
            basis = Basis.from_pretrained(path.parent)
            assert all(basis.maps[block.name].rank == basis.ranks[block.name] for block in basis.partition)
    for path in folder.rglob("result.json"):
        read_json(path)
        found[str(path.relative_to(folder))] = 1
    return found


def disturb(command: Command, reference: dict[str, str], seconds: float, seed: int, stops: int) -> int:
    """Stop a command some times at random instants, let it end, compare; return how often it was really stopped."""
    draw, output, stopped = random.Random(seed), command.work / f"random-{seed}", 0
    kept: dict[str, int] = {}
    has_ended = False
    while stopped < stops and not has_ended:
        process, number = command.start(output), draw.choice(SIGNALS)
        process.join(draw.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, number)
            process.join(120)
            assert not process.is_alive()
        log = Path(f"{output}.log").read_text()
        if process.exitcode == 0 or "holds an earlier output" in log:  # it was stopped when all was done
            has_ended = stopped > 0
            if not has_ended:  # it was faster than the undisturbed run, so the instants come too late
                shutil.rmtree(output)
                seconds /= 2
            continue
        stopped += 1
        early = number != signal.SIGKILL and log == ""  # before the child was the command line
        assert early or process.exitcode in (-number, 128 + number), log
        assert early or process.exitcode < 0 or "tinyspan: interrupted: " in log
        assert "Traceback" not in log
        now = whole_parts(output)
        assert all(now.get(name, 0) >= count for name, count in kept.items()), (kept, now)
        kept = now
    if not has_ended:
        command.finish(output)
    assert content(output) == reference
    return stopped


def die_at_every_write(command: Command, reference: dict[str, str], every: int) -> int:
    """Kill a command at its n-th flush or rename, n = 1, 1 + `every`, ... until it ends before; return how often."""
    killed = 0
    for die_at in range(0, 10_000, every):
        output = command.work / f"write-{die_at}"
        process = command.start(output, die_at)
        process.join(300)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, Path(f"{output}.log").read_text()
        killed += 1
        whole_parts(output)
        command.finish(output)
        assert content(output) == reference
    return killed


NAMES = ("record", "discover", "tune", "demo", "reproduce")


@pytest.fixture(scope="module")
def commands(
    model_folder: Path, data_folder: Path, glue_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Command]:
    work = tmp_path_factory.mktemp("kill")
    data = ["--model", str(model_folder), "--task", "sst2", "--data", str(data_folder)]
    record = Command(["record", *data, *RATES, "--every", "3", "-o", "OUT"], work / "record")
    for name in NAMES:
        (work / name).mkdir()
    first = processes.Process(target=os.getpid)  # starts the server, whose imports are no part of a command's time
    first.start()
    first.join()
    record.seconds = record.finish(recorded := record.work / "whole")
    words = ["discover", str(recorded), "--rank", "3", "--partition", "module", "-o", "OUT"]
    discover = Command(words, work / "discover")
    discover.seconds = discover.finish(basis := discover.work / "whole")
    suite = {
        "models": {"tiny": str(model_folder)}, "tasks": ["mrpc", "sst2"], "seeds": 1, "train_rows": 48, "epochs": 1,
        "batch_size": 8, "max_length": 16, "points": 4, "rank": 3, "learning_rate": 3e-3, "z_learning_rate": 3e-2,
        "dimensions": [2, 3], "precision": "float32",
    }  # fmt: skip
    (work / "mini.yaml").write_text(json.dumps(suite))
    study = ["reproduce", "table1", "--suite", str(work / "mini.yaml"), "--data", str(glue_folder), "-o", "OUT"]
    plan = Plan(str(model_folder), "sst2", data_folder, train_rows=32, rank=2, batch_size=8, epochs=2)
    return {
        "record": record,
        "discover": discover,
        "tune": Command(["tune", *data, *RATES, "--basis", str(basis), "-o", "OUT"], work / "tune"),
        "demo": Command(["demo", "-o", "OUT"], work / "demo", plan),
        "reproduce": Command(study, work / "reproduce"),
    }


Reference = Callable[[str], tuple[dict[str, str], float]]


@pytest.fixture(scope="module")
def reference_of(commands: dict[str, Command]) -> Reference:
    """What an undisturbed run of a command leaves, and how long it takes."""

    @cache
    def call(name: str) -> tuple[dict[str, str], float]:
        command = commands[name]
        command.seconds = command.seconds or command.finish(command.work / "whole")
        return content(command.work / "whole"), command.seconds

    return call


@pytest.mark.parametrize("name", NAMES[:-1])
def test_stopped_at_random_instants(name: str, commands: Any, reference_of: Reference) -> None:
    """For `reproduce` see the slow test below, and test_study.py, which interrupts it within its process."""
    reference, seconds = reference_of(name)
    assert disturb(commands[name], reference, seconds, seed=1881, stops=3) > 0  # draws SIGINT, SIGTERM, SIGKILL


@pytest.mark.parametrize("name", ["record", "discover", "tune"])
def test_killed_inside_writes(name: str, commands: Any, reference_of: Reference) -> None:
    assert die_at_every_write(commands[name], reference_of(name)[0], every=47) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stopped_at_fifty_random_instants(name: str, commands: Any, reference_of: Reference) -> None:
    reference, seconds = reference_of(name)
    stopped = seed = 0
    while stopped < 50:
        seed += 1
        stopped += disturb(commands[name], reference, seconds, 100 + seed, stops=4)
    print(f"{name}: stopped {stopped} times in {seed} runs of {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_inside_every_write(name: str, commands: Any, reference_of: Reference) -> None:
    killed = die_at_every_write(commands[name], reference_of(name)[0], every=2 if name in NAMES[:3] else 15)
    print(f"{name}: killed {killed} times inside a write")

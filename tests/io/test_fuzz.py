"""Mutated files of every kind through everything that reads them: success or an error of ours, fast and in bounds.

Every input is a whole folder (or recipe) with one file changed, drawn from its number alone: bits and bytes, numbers
and words of the text, or its structure. Of the latter most are sealed again (checksums, hashes, sizes), so that what
checks the content behind the seal is reached. Each input runs in this process between two readings of Linux's VmHWM,
the peak of the resident memory, which is reset in between through /proc/self/clear_refs. Seconds are those of the
processor, which other processes do not lengthen. An error of ours whose cause is a failed allocation counts as a
failure: the size was believed.
"""

import gc
import json
import mmap
import random
import re
import resource
import shutil
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from towers import Tower

from tinyspan import (
    Basis,
    SubspaceModel,
    TinyspanError,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    empty_basis,
    fastfood_basis,
    random_basis,
    svd_basis,
    whole_model,
)
from tinyspan.io.manifests import attach, file_entry
from tinyspan.io.storage import CHECKSUM, json_digest, write_json
from tinyspan.io.tensors import write_tensors
from tinyspan.lab import figures
from tinyspan.lab.rendering import render
from tinyspan.lab.suite import Suite, load_suite, suite_text
from tinyspan.lab.tables import TABLES, cells_of
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.trajectories.from_checkpoints import _checkpoint
from tinyspan.workflows.inspect import describe
from tinyspan.workflows.results import settings_of
from tinyspan.workflows.runs import method_of

pytestmark = pytest.mark.hostile

SECONDS, MEGABYTES = 1.0, 500
TOKENS = torch.arange(10).reshape(2, 5)
Draw = random.Random


# -- the folders, whole ------------------------------------------------------------------------------------------------


def walk(folder: Path, seal: bool = True) -> Trajectory:
    model = Tower()
    recorder = TrajectoryRecorder(model, by_layer(model), folder)
    for step in range(3):
        with torch.no_grad():
            for number, value in enumerate(by_layer(model).select(model).values()):
                value += torch.sin(torch.arange(value.numel()) * (step + 2.0) + number).reshape(value.shape)
        recorder.record(step)
    if seal:
        recorder.seal()
    return recorder.trajectory()


def make_corpus(root: Path) -> None:
    """Write one whole folder of every kind."""
    trajectory = walk(root / "trajectory")
    walk(root / "unsealed", seal=False)
    svd_basis(trajectory, 2).save_pretrained(root / "basis")
    shutil.copytree(root / "trajectory", root / "of-half")  # what others are made of stays whole
    shutil.copytree(root / "basis", root / "of-adapter")
    svd_basis(trajectory, 2, dtype=torch.bfloat16).save_pretrained(root / "bfloat16")
    fastfood_basis(by_layer(Tower()), 5).save_pretrained(root / "fastfood")
    bases = {
        "adapter": Basis.from_pretrained(root / "of-adapter"),
        "drawn": random_basis(by_layer(Tower()), 2),
        "scaled": fastfood_basis(whole_model(Tower()), 5),
        "frozen": empty_basis(by_layer(Tower())),
    }
    for name, basis in bases.items():
        layers = by_layer(Tower()) if name == "scaled" else None
        subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], ensemble=2, layer_scales=layers)
        subspace.save_pretrained(root / name)
    for name in ("trajectory", "adapter"):
        write_json(root / name / "result.json", result())
        attach(root / name, ["result.json"])

    def killed(blocks: Any) -> Iterator[Any]:
        yield from list(blocks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svd_basis(trajectory, 2, folder=root / "half", progress=killed)
    named = dict(Tower().named_parameters())
    write_tensors(root / "checkpoint/a.safetensors", dict(list(named.items())[:6]))
    write_tensors(root / "checkpoint/b.safetensors", dict(list(named.items())[6:]))
    parts = {name: "a.safetensors" if index < 6 else "b.safetensors" for index, name in enumerate(named)}
    (root / "checkpoint/model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (root / "pickled").mkdir()
    torch.save({name: value.detach() for name, value in named.items()}, root / "pickled/pytorch_model.bin")
    (root / "recipe").mkdir()
    (root / "recipe/mine.yaml").write_text(suite_text("small") + "exceptions:\n  mrpc: {epochs: 2, rank: 16}\n")
    make_study(root / "study")


def result() -> dict[str, Any]:
    settings = {"epochs": 2, "batch_size": 8, "max_length": 16, "precision": "float32", "autocast": False, "seed": 3}
    return {
        "method": "full", "task": "rte", "seed": 3, "epochs": 1, "metric": "accuracy", "score": 0.5,
        "settings": {**settings, "learning_rate": 1e-3, "z_learning_rate": 1e-2}, "subspace_parameters": 4,
        "versions": {"torch": "2", "transformers": "5"}, "cell_seconds": 1.5,
        "hardware": {"device": None, "threads": 1, "cpus": 1, "machine": "x"},
    }  # fmt: skip


def make_study(folder: Path) -> None:
    """Write a study with made-up numbers in results of the real form."""
    tables = ("table1", "table3", "table4", "table5", "figure3")
    suite = Suite(
        name="fuzz",
        models={"tiny": "tiny"},
        tasks=("mrpc", "rte", "sst2"),
        seeds=1,
        epochs=4,
        rank=3,
        dimensions=(2, 3),
    )
    write_json(folder / "study.json", {"tables": {table: suite.model_dump(mode="json") for table in tables}})
    measured = dict.fromkeys(("share", "kurtosis", "cosine", "largest_start", "norm_gains", "norm_gains_found"), 0.25)
    block = {
        **measured, "profile": [0.5, 3.5], "largest": [["attention", 1, 4.5]],
        "without_start": {"share": 0.25, "kurtosis": 3.0}, "start": {"kurtosis": 3.0},
    }  # fmt: skip
    scores = dict.fromkeys(("intact", "zero outliers", "zero random", "zero matched", "undo outliers"), 0.5)
    for cell in cells_of(tables, suite, lambda cell: None):
        found = {**result(), **vars(cell), "method": cell.method, "recipe": suite.settings_hash()}
        found |= {"spectrum": {"layer": [3.0, 2.0, 1.0, 0.5]}, "z": {"layer": [[1.0, 2.0, 3.0]]}}
        found |= {"outliers": {"scores": scores, "blocks": {"layer": block}}, "in_full": scores}
        write_json(folder / cell.folder / "result.json", found)


# -- all that reads them -----------------------------------------------------------------------------------------------


def read_trajectory(folder: Path) -> None:
    describe(folder, verify=True)
    trajectory = Trajectory(folder)
    for block in trajectory.partition:
        list(trajectory.chunks(block, 50))
        trajectory.start(block)
        trajectory.delta(block)
    trajectory.with_partition(trajectory.recorded.as_one_block()).fingerprint()
    basis = svd_basis(trajectory, explained_variance=0.5)
    SubspaceModel(Tower(), basis)(TOKENS)


def resume(folder: Path) -> None:
    model = Tower()
    recorder = TrajectoryRecorder.resume(model, by_layer(model), folder)
    for step in (0, 7):
        recorder.record(step)
    recorder.finish(7)
    list(recorder.trajectory().chunks(by_layer(model).blocks[0]))


def read_basis(folder: Path) -> None:
    describe(folder, verify=True)
    basis = Basis.from_pretrained(folder)
    basis.matvec({block.name: torch.ones(basis.ranks[block.name]) for block in basis.partition})
    basis.rmatvec({block.name: torch.ones(block.numel) for block in basis.partition})
    method_of(basis)
    [basis.spectrum[block.name].sum() for block in basis.partition]
    SubspaceModel(Tower(), basis, init_std=1.0)(TOKENS)


def read_adapter(folder: Path) -> None:
    describe(folder, verify=True)
    settings_of(folder)
    SubspaceModel.from_pretrained(Tower(), folder, OpenedAdapter(folder).basis(Tower()))(TOKENS)


def read_half(folder: Path) -> None:
    svd_basis(Trajectory(folder.with_name("of-half")), 2, folder=folder)


def read_checkpoint(folder: Path) -> None:
    _checkpoint(Tower(), by_layer(Tower()), folder)


def read_suite(folder: Path) -> None:
    suite = load_suite(str(folder / "mine.yaml"))
    suite.settings_hash()
    tables = [table for table in TABLES if len(suite.tasks) > 2 or table not in ("table2", "figure3")]
    cells_of(tables, suite, lambda cell: 0.5)


def read_study(folder: Path) -> None:
    render(folder)


@dataclass(frozen=True)
class Kind:
    """A folder of the corpus, what reads it, and how often it is drawn."""

    folder: str
    read: Callable[[Path], None]
    weight: int


KINDS = (
    Kind("trajectory", read_trajectory, 4),
    Kind("unsealed", read_trajectory, 2),
    Kind("trajectory", resume, 2),
    Kind("unsealed", resume, 2),
    Kind("basis", read_basis, 3),
    Kind("bfloat16", read_basis, 1),
    Kind("fastfood", read_basis, 3),
    Kind("adapter", read_adapter, 3),
    Kind("drawn", read_adapter, 2),
    Kind("scaled", read_adapter, 2),
    Kind("frozen", read_adapter, 1),
    Kind("half", read_half, 2),
    Kind("checkpoint", read_checkpoint, 2),
    Kind("pickled", read_checkpoint, 1),
    Kind("recipe", read_suite, 5),
    Kind("study", read_study, 2),
)


# -- mutations ---------------------------------------------------------------------------------------------------------

NUMBERS = ["9" * 5000, "1" + "0" * 30, "0", "-1", "1", "2", "3", "7", "255", "1.5", "-0.0", "4096", "2147483648",
           "9223372036854775807", "18446744073709551616", "1000000000", "1000000000000", "1e15", "1e308", "1e999",
           "-1e999", "NaN", ".inf", ".nan", "true", "null", "0x7fffffff", "Infinity", "1:1:1",
           "2026-13-45"]  # fmt: skip
WORDS = ["", "..", "../../x", "/etc/passwd", "\\u0000", "\\ud800", "a" * 5000, "int64", "float16", "complex64", "save",
         "random", "fastfood", "svd", "empty", "start.safetensors", "layers.0", "model", "F32", "BOOL", "I64", "*a",
         "F8_E4M3", "&a", "!!python/object/apply:os.system [touch x]", "!!binary x", "!!int", "<<", "- - -", "? ",
         "%"]  # fmt: skip
VALUES = [None, True, 0, -1, 1, 2, 3, 5, 84, 10**9, 10**12, 10**15, 2**63 - 1, 2**63, 2**64, 10**25, 1.5, 1e308, "x",
          "", "..", "/etc/passwd", "a" * 3000, "\x00", "\ud800", "é", "float32", "int8", "bfloat16", "random", "F32",
          "fastfood", "svd", "given", [], {}, [[]], [1, 2], {"a": 1}, ["head"], "I32", "F64", "F8_E5M2", "U8", [0],
          "C64", [10**15, 0], [0, 10**12], [2**62, 4], list(range(500))]  # fmt: skip


def mutate_bytes(data: bytes, draw: Draw, other: bytes) -> bytes:
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        a, b = sorted((draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)))
        how = draw.randrange(7)
        if how == 0 and content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif how == 1:
            content[a:a] = draw.randbytes(draw.choice((1, 2, 8, 100)))
        elif how == 2:
            del content[a : a + draw.choice((1, 2, 8, b - a))]
        elif how == 3:
            del content[a:]
        elif how == 4:
            content[a:b] = other[a:b]
        elif how == 5:
            content[b:b] = content[a:b] * draw.choice((1, 2, 20))
        else:
            content[a : a + 8] = struct.pack("<Q", draw.choice((0, 1, 8, 2**24, 10**8, 2**63, 2**64 - 1)))
    return bytes(content)


def mutate_text(data: bytes, draw: Draw) -> bytes:
    """Replace, double or swap numbers and words, or nest something deep."""
    text = data.decode("utf-8", "replace")
    for _ in range(draw.choice((1, 1, 2, 4))):
        tokens = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?|\"[^\"]*\"|[\w.]+", text))
        if not tokens or len(text) > 200_000:
            break
        one, two = draw.choice(tokens), draw.choice(tokens)
        new = draw.choice(NUMBERS)
        how = draw.randrange(6)
        if how == 1:
            new = draw.choice(WORDS) if one[0][0] != '"' else f'"{draw.choice(WORDS)}"'
        elif how == 2:
            new = two[0]
        elif how == 3:
            new = f"{one[0]}{draw.choice((',', ': ', chr(10), ' '))}{one[0]}"
        elif how == 4:
            deep = draw.choice((10, 70, 300, 1200, 20_000))
            opening, closing = draw.choice((("[", "]"), ('{"a":', "}"), ("- ", ""), ("[", "")))
            new = opening * deep + "1" + closing * deep
        elif how == 5:
            new = "[" + ",".join([one[0][:50]] * draw.choice((2, 100, 10_000))) + "]"
        text = text[: one.start()] + new + text[one.end() :]
    return text.encode("utf-8", "surrogatepass")


def places(content: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in JSON content."""
    found, level = [], [content]
    while level:
        outer = level.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer)) if isinstance(outer, list) else ()
        found += [(outer, key) for key in keys]
        level += [outer[key] for key in keys]
    return found


def mutate_structure(content: Any, draw: Draw) -> None:
    """Change JSON content in place: another value, one gone, one more, two exchanged, one in lists."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        known = places(content)
        if not 0 < len(known) < 5000:
            return
        outer, key = draw.choice(known)
        twin, of_twin = draw.choice(known)
        how = draw.randrange(8)
        if how < 3:
            outer[key] = deepcopy(draw.choice(VALUES))
        elif how == 3:
            del outer[key]
        elif how == 4:
            other = json.loads(json.dumps(twin[of_twin]))
            outer[key] = other
        elif how == 5 and isinstance(outer, list):
            outer += [json.loads(json.dumps(value)) for value in outer * draw.choice((1, 2, 50))]
        elif how == 6:
            for _ in range(draw.choice((1, 30, 150))):
                outer[key] = [outer[key]] if draw.random() < 0.5 else {"a": outer[key]}
        elif isinstance(outer, dict):
            outer[draw.choice(("", "x", "basis", "block-000.safetensors", "layers.0", "../x"))] = deepcopy(
                draw.choice(VALUES)
            )


def mutate_tensors(data: bytes, draw: Draw) -> bytes:
    """Change the header, whose length is set right again, or put numbers where they hurt."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    how = draw.randrange(4)
    if how < 2:
        mutate_structure(header, draw)
    elif how == 2 and body:
        for _ in range(draw.choice((1, 10))):
            place = draw.randrange(len(body)) // 8 * 8
            body[place : place + 8] = draw.choice(
                (struct.pack("<d", float("nan")), struct.pack("<ff", float("inf"), 1e38), b"\xff" * 8, b"\x7f" * 8)
            )
    else:  # tensors of giant shapes in no bytes at all, and of one byte
        name = draw.choice([*header, "x"])
        start = draw.choice((0, len(body)))
        header[name] = {
            "dtype": draw.choice(("F32", "F64", "I32", "BOOL")),
            "shape": draw.choice(([10**15, 0], [0, 10**15], [10**15], [2**40, 2**40, 0], [0], [], [1] * 100)),
            "data_offsets": [start, start],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body)


def sealed(content: Any) -> bytes:
    """Return JSON with the checksum it should have."""
    if not isinstance(content, dict):
        return json.dumps(content).encode()
    content.pop(CHECKSUM, None)
    return json.dumps({**content, CHECKSUM: json_digest(content)}).encode()


def seal_again(folder: Path, name: str) -> None:
    """Set every size, hash and checksum right that a changed file in a folder of ours makes wrong."""
    path = folder / "manifest.json"
    if not path.is_file():
        done = folder / "unfinished" / f"{name}.json"
        if done.is_file():
            done.write_bytes(sealed({name: file_entry(folder / name).model_dump()}))
        return
    try:
        manifest = json.loads(path.read_bytes())
        for listed in ("files", "attached"):
            if name in manifest[listed]:
                manifest[listed][name] = file_entry(folder / name).model_dump()
        if (folder / "points.jsonl").is_file():
            link = json_digest(
                {k: v for k, v in manifest.items() if k not in ("versions", "details", "attached", CHECKSUM)}
            )
            lines = [json.loads(line) for line in (folder / "points.jsonl").read_bytes().splitlines()]
            for number, line in enumerate(lines, 1):
                line.pop(CHECKSUM, None)
                if name == f"points/{number:06d}.safetensors":
                    line |= file_entry(folder / name).model_dump()
                link = line[CHECKSUM] = json_digest([link, {k: v for k, v in line.items() if k != CHECKSUM}])
            (folder / "points.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if "points" in manifest["details"]:
                manifest["details"]["points"] |= {"count": len(lines), "hash": link}
        path.write_bytes(sealed(manifest))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return  # what is no manifest any more cannot be sealed


def mutate(folder: Path, draw: Draw) -> str:
    """Change one file of a folder, and return which and how."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
    name = draw.choice(names)
    path, data = folder / name, (folder / name).read_bytes()
    how = draw.choices(("bytes", "text", "structure", "sealed"), (2, 2, 1, 5))[0]
    is_json, is_tensors = name.endswith((".json", ".jsonl")), name.endswith(".safetensors")
    if name.endswith(".bin") or how == "bytes" or (is_tensors and how == "text"):
        path.write_bytes(mutate_bytes(data, draw, (folder / draw.choice(names)).read_bytes()))
    elif how == "text" or (name.endswith(".yaml") and draw.random() < 0.5):
        path.write_bytes(mutate_text(data, draw))
    elif name.endswith(".yaml"):
        content = yaml.safe_load(data)
        mutate_structure(content, draw)
        try:
            path.write_text(yaml.safe_dump(content))
        except RecursionError:
            path.write_text(json.dumps(content))
    elif is_tensors:
        path.write_bytes(mutate_tensors(data, draw))
    elif name.endswith(".jsonl"):
        lines = [json.loads(line) for line in data.splitlines()]
        mutate_structure(lines, draw)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif is_json:
        content = json.loads(data)
        mutate_structure(content, draw)
        path.write_bytes(sealed(content) if how == "sealed" else json.dumps(content).encode())
    if how == "sealed" or (how != "structure" and draw.random() < 0.5):
        seal_again(folder, name)
    return f"{name}, {how}"


# -- the run -----------------------------------------------------------------------------------------------------------


def peak(reset: bool = False) -> float:
    """Return the peak of the resident memory in MB since it was last reset to what is used now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def address_space(gigabytes: int) -> Iterator[None]:
    """Let no input bring the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + gigabytes * 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def believed(error: BaseException | None) -> bool:
    """Whether an error came of an allocation that failed."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass
class Run:
    """What one input led to."""

    number: int
    kind: str
    how: str
    outcome: str
    seconds: float
    megabytes: float


def run(number: int, corpus: Path, scratch: Path) -> Run:
    """Make an input from its number, and read it."""
    draw = random.Random(number)
    kind = draw.choices(KINDS, [kind.weight for kind in KINDS])[0]
    folder = scratch / kind.folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(corpus / kind.folder, folder)
    try:
        how = mutate(folder, draw)
    except Exception as error:  # of ours here, not of the library
        raise AssertionError(f"input {number} could not be made") from error
    before, began = peak(reset=True), time.process_time()
    try:
        kind.read(folder)
        outcome = "success"
    except TinyspanError as error:
        outcome = "allocated" if believed(error) else type(error).__name__
    except BaseException as error:
        outcome = f"FAILED {type(error).__module__}.{type(error).__name__}: {str(error)[:200]}"
        if isinstance(error, KeyboardInterrupt):
            raise
    seconds, megabytes = time.process_time() - began, peak() - before
    return Run(number, f"{kind.folder} {kind.read.__name__}", how, outcome, seconds, megabytes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    make_corpus(root)
    return root


def fuzz(numbers: range, corpus: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Run the inputs, tell what came of them, and fail if one of them misbehaved."""
    monkeypatch.setattr(figures, "save", lambda *arguments: None)  # matplotlib's drawing is not what is tested
    shutil.copytree(corpus, scratch, dirs_exist_ok=True)
    for kind in KINDS:
        with warnings.catch_warnings(), address_space(8):
            warnings.simplefilter("ignore")
            kind.read(scratch / kind.folder)
    gc.collect()
    with warnings.catch_warnings(), address_space(8):
        warnings.simplefilter("ignore")
        runs = [run(number, corpus, scratch) for number in numbers]
    outcomes = Counter(run.outcome for run in runs)
    slowest, largest = max(runs, key=lambda run: run.seconds), max(runs, key=lambda run: run.megabytes)
    print(f"\n{len(runs):,} inputs: {dict(outcomes.most_common())}")
    print(f"slowest: {slowest}\nlargest: {largest}")
    for kind in sorted({run.kind for run in runs}):
        good = Counter(run.outcome == "success" for run in runs if run.kind == kind)
        print(f"  {kind:<28} {good[True]:>5} success {good[False]:>6} errors of ours")
    bad = [
        run
        for run in runs
        if run.outcome.startswith(("FAILED", "allocated")) or run.seconds >= SECONDS or run.megabytes >= MEGABYTES
    ]
    assert not bad, "\n".join(map(str, bad[:40]))
    return runs


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured through /proc")


@needs_proc
def test_the_measure_of_memory_sees_what_was_used_for_a_moment() -> None:
    """Pages of its own: what the allocator has kept of earlier tests may serve a large object without any new page."""
    before = peak(reset=True)
    with mmap.mmap(-1, 100_000_000) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
    assert 90 < peak() - before < 150
    assert peak(reset=True) - before < 50


@needs_proc
def test_mutated_files_end_in_success_or_our_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz(range(300), corpus, tmp_path, monkeypatch)


@needs_proc
@pytest.mark.slow
def test_twenty_thousand_mutated_files_end_in_success_or_our_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with -s to see the counts."""
    runs = fuzz(range(1_000_000, 1_020_000), corpus, tmp_path, monkeypatch)
    outcomes = Counter("success" if run.outcome == "success" else "error" for run in runs)
    assert outcomes["success"] > 1000
    assert outcomes["error"] > 10_000

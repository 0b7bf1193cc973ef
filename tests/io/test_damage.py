"""Every file of every kind of folder, damaged in every way: it is noticed, and never gives other numbers."""

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from towers import Tower

from tinyspan import (
    Basis,
    KroneckerMap,
    StorageError,
    SubspaceModel,
    TinyspanError,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    fastfood_basis,
    svd_basis,
)
from tinyspan.io.manifests import attach, check_attached, read_manifest, write_manifest
from tinyspan.io.storage import read_json, write_json
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.workflows.inspect import describe

pytestmark = pytest.mark.hostile

POINTS = 3
TOKENS = torch.arange(10).reshape(2, 5)


def walk(folder: Path, seed: int, resume: bool = False) -> None:
    """Record a random walk, or go on with one from its start, and seal it."""
    model, generator = Tower(), torch.Generator().manual_seed(seed)
    if resume:
        recorder = TrajectoryRecorder.resume(model, by_layer(model), folder, done=0)
    else:
        recorder = TrajectoryRecorder(model, by_layer(model), folder)
    for step in range(POINTS):
        with torch.no_grad():
            for value in by_layer(model).select(model).values():
                value += torch.randn(value.shape, generator=generator, dtype=torch.float64)
        recorder.record(step)
    recorder.finish(POINTS - 1)


def make(kind: str, folder: Path, seed: int) -> None:
    """Write one folder of a kind; folders of different seeds hold different numbers in files of the same sizes."""
    partition = by_layer(Tower())
    if kind == "fastfood":
        fastfood_basis(partition, 5, seed=seed).save_pretrained(folder)
        return
    if kind == "kronecker":
        generator = torch.Generator().manual_seed(seed)
        sides = {block.name: block.numel // 4 for block in partition}
        maps = {
            name: KroneckerMap(torch.randn(4, 2, generator=generator), torch.randn(3, n, generator=generator))
            for name, n in sides.items()
        }
        Basis(partition, maps).save_pretrained(folder)
        return
    if kind == "trajectory":
        walk(folder, seed)
        (folder / "model").mkdir()
        (folder / "model/vocab.txt").write_text(f"{seed} words")
        write_json(folder / "result.json", result(seed))
        attach(folder, ["model/vocab.txt", "result.json"])
        return
    walk(folder.with_name(f"walk{seed}"), seed)
    trajectory = Trajectory(folder.with_name(f"walk{seed}"))
    if kind in ("float32", "bfloat16"):
        svd_basis(trajectory, 2, dtype=getattr(torch, kind)).save_pretrained(folder)
        return
    basis = svd_basis(trajectory, 2)
    basis.save_pretrained(folder.with_name("basis"), overwrite=True)
    SubspaceModel(Tower(), basis, modules_to_save=["head"], ensemble=2, init_std=1.0, seed=seed).save_pretrained(folder)
    write_json(folder / "result.json", result(seed))
    attach(folder, ["result.json"])


def result(seed: int) -> dict[str, Any]:
    return {"method": "full", "task": "rte", "seed": seed, "epochs": 1, "metric": "accuracy", "score": seed / 8}


def read(kind: str, folder: Path) -> list[Any]:
    """Return everything the library reads from a folder."""
    if kind == "trajectory":
        trajectory = Trajectory(folder)
        check_attached(folder)
        found: list[Any] = [trajectory.steps, trajectory.content_hash(), read_json(folder / "result.json")]
        whole = trajectory.with_partition(trajectory.recorded.as_one_block())
        found.append(whole.fingerprint())
        for block in trajectory.partition:
            found += [trajectory.start(block), trajectory.delta(block, 0), trajectory.delta(block)]
            found += [piece for pair in trajectory.chunks(block, 7) for piece in pair]
        return found + list(svd_basis(trajectory, 2).spectrum.values())
    if kind == "adapter":
        subspace = SubspaceModel.from_pretrained(Tower(), folder)
        check_attached(folder)
        found = [read_json(folder / "result.json"), subspace(TOKENS), *subspace.state_dict().values()]
        return [*found, OpenedAdapter(folder).basis().content_hash()]
    basis = Basis.from_pretrained(folder)
    found = [basis.ranks, basis.content_hash(), basis.fingerprint, basis.construction, basis.parents]
    for block in basis.partition:
        z, g = torch.ones(basis.ranks[block.name]), torch.ones(block.numel)
        v = basis.maps[block.name]
        found += [*v.tensors().values(), v.matvec(z), v.rmatvec(g), basis.spectrum[block.name]]
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def cases(folder: Path, sibling: Path, flips: int = 5) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield a file, what happens to it, and what it then holds, or None if it is gone."""
    every = names(folder)
    for before, name in zip([every[-1], *every], every, strict=False):
        others = [path for path in (folder / before, sibling / name) if path.exists()]
        for what, content in damages(folder / name, others, flips):
            yield name, what, content


def damages(path: Path, others: list[Path], flips: int) -> Iterator[tuple[str, bytes | None]]:
    data, generator = path.read_bytes(), random.Random(path.name)
    for place in [0, len(data) - 1, *(generator.randrange(len(data)) for _ in range(flips))]:
        bit = 1 << generator.randrange(8)
        yield f"bit {bit} of byte {place}", data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
    for length in [0, len(data) - 1, *(generator.randrange(len(data)) for _ in range(3))]:
        yield f"cut to {length} bytes", data[:length]
    lines = data.splitlines(keepends=True)
    if path.suffix == ".jsonl":
        yield "the last line lost", b"".join(lines[:-1])
        yield "a line lost", b"".join(lines[1:])
        yield "two lines swapped", b"".join([lines[1], lines[0], *lines[2:]])
    yield "appended to", data + b" x"
    yield "deleted", None
    for other in others:
        if other.read_bytes() != data:
            yield f"replaced by {other.parent.name}/{other.name}", other.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")


def put(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("kind", ["trajectory", "float32", "bfloat16", "fastfood", "kronecker", "adapter"])
def test_damage_is_noticed_and_never_gives_other_numbers(tmp_path: Path, kind: str) -> None:
    whole, sibling = tmp_path / "whole", tmp_path / "sibling"
    make(kind, sibling, 1)
    make(kind, whole, 0)
    expected, noticed = read(kind, whole), 0
    assert same(read(kind, whole), expected)
    assert describe(whole, verify=True)[1] == []
    for name, what, content in cases(whole, sibling):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "copy")
        put(tmp_path / "copy" / name, content)
        try:
            problems = describe(tmp_path / "copy", verify=True)[1]
        except TinyspanError as error:
            problems = [str(error)]
        try:
            intact = same(read(kind, tmp_path / "copy"), expected)
            assert intact, f"{name}, {what}: other numbers"
        except TinyspanError:
            intact, noticed = False, noticed + 1
        named = "" if content == (sibling / name).read_bytes() and name == "manifest.json" else name
        assert intact or any(named in problem for problem in problems), f"{name}, {what}: {problems}"
    assert noticed > 40


def test_a_run_goes_on_from_damage_to_the_same_points_or_not_at_all(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    walk(whole, 0)
    walk(tmp_path / "sibling", 1)
    blocks = Trajectory(whole).partition.blocks
    expected = [Trajectory(whole).delta(block, i) for block in blocks for i in range(POINTS)]
    for sealed in (True, False):
        if not sealed:
            manifest = read_manifest(whole)
            manifest.details.clear()
            write_manifest(whole, manifest)  # as a run leaves it that was killed
        refused = 0
        for name, what, content in cases(whole, tmp_path / "sibling", flips=2):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(whole, tmp_path / "copy")
            put(tmp_path / "copy" / name, content)
            try:
                walk(tmp_path / "copy", 0, resume=True)
                trajectory = Trajectory(tmp_path / "copy")
                found = [trajectory.delta(block, i) for block in blocks for i in range(POINTS)]
                assert same(found, expected), f"{name}, {what}: other numbers"
            except TinyspanError:
                refused += 1
        assert refused > 30


def test_an_interrupted_discovery_goes_on_from_damage_to_the_same_basis_or_not_at_all(tmp_path: Path) -> None:
    walk(tmp_path / "walk", 0)
    trajectory, half = Trajectory(tmp_path / "walk"), tmp_path / "half"
    expected = svd_basis(trajectory, 2).content_hash()

    def killed(blocks: Any) -> Iterator[Any]:
        yield from list(blocks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svd_basis(trajectory, 2, folder=half, progress=killed)
    assert "unfinished/block-001.safetensors.json" in names(half)
    refused = 0
    swapped = "unfinished/block-000.safetensors.json", "unfinished/block-001.safetensors.json"
    for name, what, content in cases(half, half, flips=3):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(half, tmp_path / "copy")
        put(tmp_path / "copy" / name, content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a damaged note of a block is told, and the block made again
                again = svd_basis(trajectory, 2, folder=tmp_path / "copy")
            assert again.content_hash() == expected, f"{name}, {what}"
        except TinyspanError:
            refused += 1
    assert refused > 0
    for one, other in (swapped, ("block-000.safetensors", "block-001.safetensors")):  # both, so that they agree
        data = (half / one).read_bytes()
        (half / one).write_bytes((half / other).read_bytes())
        (half / other).write_bytes(data)
    with pytest.warns(UserWarning, match=r"block-000\.safetensors\.json is damaged.*computed again"):
        assert svd_basis(trajectory, 2, folder=half).content_hash() == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1])), "lists other points"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "lists other points"),
        (lambda path: path.unlink(), "lists other points"),
        (lambda path: path.write_bytes(path.read_bytes()[1:]), "is damaged"),
    ],
)
def test_a_cut_journal_of_a_sealed_trajectory_is_noticed(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    walk(tmp_path / "t", 0)
    damage(tmp_path / "t/points.jsonl")
    with pytest.raises(StorageError, match=rf"points\.jsonl.*{message}"):
        Trajectory(tmp_path / "t")


def test_attached_files_are_covered_as_they_are_now(tmp_path: Path) -> None:
    walk(tmp_path / "t", 0)
    before = Trajectory(tmp_path / "t").content_hash()
    write_json(tmp_path / "t/result.json", {"score": 0.5})
    attach(tmp_path / "t", ["result.json"])
    assert Trajectory(tmp_path / "t").content_hash() == before
    write_json(tmp_path / "t/result.json", {"score": 0.75})
    with pytest.raises(StorageError, match=r"result\.json: expected \d+ bytes, found \d+"):
        check_attached(tmp_path / "t")
    check_attached(tmp_path / "t", "model/")
    attach(tmp_path / "t", ["result.json"])
    check_attached(tmp_path / "t")
    with pytest.raises(StorageError, match=r"none\.json is missing"):
        attach(tmp_path / "t", ["none.json"])

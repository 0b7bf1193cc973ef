"""A grid of a thousand cells with next to no training: what goes on around it does not grow with the cells made."""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from meter import Meter

from tinyspan import SubspaceModel, TinyspanError, TrajectoryRecorder, by_layer
from tinyspan.io.storage import write_json
from tinyspan.lab import cells as cells_module
from tinyspan.lab.cells import Cell, Study
from tinyspan.lab.rendering import render
from tinyspan.lab.reproduce import reproduce
from tinyspan.lab.suite import Suite
from tinyspan.workflows import training
from tinyspan.workflows.models import base_model
from tinyspan.workflows.progress import Display

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="memory, files and bytes are counted by Linux"),
]
SEEDS = 67  # of 3 tasks with 5 cells each: 1005 cells
FAILING = {("sst2", "random", seed) for seed in range(0, SEEDS, 10)}


def nothing_learned(model: Any, prepared: Any, settings: Any, method: Any, *_: Any, **__: Any) -> dict[str, Any]:
    """Stand for `fine_tune`: z takes one step, and the model is scored."""
    if (prepared.task.name, method, settings.seed) in FAILING:
        raise MemoryError("none left")
    if isinstance(model, SubspaceModel):
        with torch.no_grad():
            for z in model.z:
                z += 0.01
    return training.score(model, prepared, settings, method)


def nothing_recorded(prepared: Any, settings: Any, output: Path, **_: Any) -> dict[str, Any]:
    """Stand for `record`: four points of a random walk."""
    model = base_model(prepared.model, prepared.task, settings.seed)
    recorder = TrajectoryRecorder(model, by_layer(model), output, overwrite=True)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        recorder.record(step)
    recorder.seal()
    result = nothing_learned(model, prepared, settings, "full")
    write_json(output / "result.json", result)
    return result


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Spare the garbage collector, which runs after every cell, a quarter of a second for all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore:.*pearson is not defined")  # next to nothing is learned
def test_a_thousand_cells(
    model_folder: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_collection: None
) -> None:
    suite = Suite(
        name="many",
        models={"tiny": str(model_folder)},
        tasks=("mrpc", "sst2", "stsb"),
        seeds=SEEDS,
        train_rows=48,
        batch_size=8,
        max_length=16,
        epochs=1,
        points=4,
        rank=3,
        dimensions=(2, 3),
    )
    folder, meter, run, calls = tmp_path / "grid", Meter("making cells"), Study.run, Counter[str]()
    units = meter.each(1000)

    def metered(study: Study, cell: Cell) -> None:
        next(units, None)
        run(study, cell)

    def counted(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        calls["stat"] += 1
        return stat(path, *arguments, **options)

    stat = os.stat
    monkeypatch.setattr(os, "stat", counted)
    monkeypatch.setattr(cells_module, "fine_tune", nothing_learned)
    monkeypatch.setattr(cells_module, "record", nothing_recorded)
    monkeypatch.setattr(Study, "run", metered)
    with Display() as display, pytest.raises(TinyspanError, match="7 cells failed"):
        reproduce(folder, ["figure2"], suite, glue_folder, display)
    print(f"questions to the file system: {calls['stat']}")
    assert sum(1 for _ in folder.glob("tiny/*/*/seed-*/result.json")) == 15 * SEEDS - len(FAILING)
    failed = {f"tiny/{task}/{method}-k3/seed-{seed}/failure.txt" for task, method, seed in FAILING}
    assert {str(path.relative_to(folder)) for path in folder.rglob("failure.txt")} == failed
    # The thirds are 400 cells apart. safetensors never frees the two bounds of a tensor it has read: 64 bytes each,
    # 22 kB per cell. Once, the interpreter doubles its table of strings, by 7.7 MB, for the many names of files.
    meter.check(megabytes=20, bytes_by=1.05)
    assert calls["stat"] < 15 * SEEDS * (15 * SEEDS + 700)  # after a cell, two for each that is left: half of them

    monkeypatch.setattr("test_bounded_scheduler.FAILING", set())
    with Display() as display:
        reproduce(folder, ["figure2"], suite, glue_folder, display)
    assert not list(folder.rglob("failure.txt"))
    assert f"{15 * SEEDS} of {15 * SEEDS} cells are finished" in render(folder).read_text()

"""Fixtures with small models, and the assignment of tests to workers; every process uses one thread."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and each worker has a core of its own
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from miniature_tasks import *  # noqa: F403 - fixtures of a small pre-trained model and its tasks
from torch import Tensor, nn
from towers import Tower

from tinyspan import Basis, DenseMap, Partition, Trajectory, TrajectoryRecorder, register_basis
from tinyspan.bases.constructors import CONSTRUCTORS

os.fsync = lambda number: None  # thousands of files are written, and none has to outlive a power cut
if not torch.accelerator.is_available():  # otherwise torch formats the stack for each seed of an absent device
    for device in (torch.cuda, torch.xpu, torch.mtia):
        device.manual_seed_all = lambda seed: None

# for tools/mutants.py: the same examples for every mutant, and no search for a smaller one that fails
hypothesis.settings.register_profile(
    "mutants", derandomize=True, database=None, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file with a shared fixture on one worker, which creates it once; distribute other tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares_a_fixture(config.rootpath / file) else nodeid

    return Scheduling(config, log)


@cache
def shares_a_fixture(file: Path) -> bool:
    return 'scope="module"' in file.read_text(encoding="utf-8")


frozen = 0  # number of modules that were imported when objects were last excluded from garbage collection


def pytest_runtest_logstart() -> None:
    """Exclude what earlier tests imported from garbage collection: each Trainer triggers one, of 0.4 s otherwise."""
    global frozen
    if len(sys.modules) > frozen + 20:
        gc.collect()
        gc.freeze()
        frozen = len(sys.modules)


@pytest.fixture
def tower() -> Tower:
    return Tower()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wander(tmp_path: Path) -> Callable[..., Trajectory]:
    """Record a random walk: `wander(model, partition, points=3)`."""

    def record(
        model: nn.Module, partition: Partition, points: int = 3, name: str = "walk", seed: int = 0
    ) -> Trajectory:
        generator = torch.Generator().manual_seed(seed)
        parameters = partition.select(model)
        before = {key: value.detach().clone() for key, value in parameters.items()}
        recorder = TrajectoryRecorder(model, partition, tmp_path / name)
        with torch.no_grad():
            for step in range(points):
                for value in parameters.values():
                    value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
                recorder.record(step)
            for key, value in parameters.items():
                value.copy_(before[key])
        return recorder.trajectory()

    return record


def first_coordinates(partition: Partition, count: int = 1) -> Basis:
    """Construct a basis of the first coordinates of every block, as a user's constructor."""
    maps = {block.name: DenseMap(torch.eye(count, block.numel)) for block in partition}
    return Basis(partition, maps, construction={"constructor": "first", "count": count})


@pytest.fixture
def own_constructor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Basis]:
    """Register a user's constructor under the name `first` for one test."""
    monkeypatch.setattr(CONSTRUCTORS, "_entries", dict(CONSTRUCTORS._entries))
    return register_basis("first", method="coordinates")(first_coordinates)


@pytest.fixture
def held() -> Callable[[Path], AbstractContextManager["subprocess.Popen[bytes]"]]:
    """Lock a folder in another process: `with held(folder) as process`."""
    code = "import sys; from pathlib import Path; from tinyspan.io.folders import claimed\n"
    code += "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"

    @contextmanager
    def hold(folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
        command = [sys.executable, "-c", code, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            yield holder
            holder.kill()

    return hold

"""The scheduler on cells that compute nothing: what is made once, and the estimate of the remaining time."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyspan import InputError
from tinyspan.lab.scheduler import CellResults, CellStudy, Counter, _dispatch
from tinyspan.workflows.progress import Display


@dataclass(frozen=True)
class Numbered:
    """A cell with a number."""

    number: int

    @property
    def folder(self) -> Path:
        return Path(f"cell-{self.number}")


class Numbers(CellStudy[Numbered]):
    """Four cells, each with its number as score."""

    def __init__(self, folder: Path) -> None:
        super().__init__(CellResults(folder), Display())
        self.made: list[Numbered] = []

    def cells(self) -> list[Numbered]:
        return [Numbered(number) for number in range(4)]

    def make(self, cell: Numbered) -> dict[str, Any]:
        self.made.append(cell)
        return {"score": float(cell.number)}


def test_a_cell_that_another_process_has_finished_is_not_made_again(tmp_path: Path) -> None:
    """Between the look at its result and the lock."""
    study, cell = Numbers(tmp_path), Numbered(1)
    study.run(cell)
    Numbers(tmp_path).run(cell)
    other = Numbers(tmp_path)
    other.run(cell)
    assert (study.made, other.made) == ([cell], [])


class Refused(Exception):
    """The error of submitit for a job that was not accepted."""


@pytest.mark.parametrize("accepted", [True, False])
def test_jobs_that_are_not_accepted_or_end_early_are_told(
    accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self, **_: Any) -> None: ...

        def update_parameters(self, **_: Any) -> None: ...

        @contextmanager
        def batch(self) -> Iterator[None]:
            yield
            if not accepted:
                raise Refused("sbatch: error: invalid time limit")

        def submit(self, worker: Any) -> Any:
            paths = SimpleNamespace(stderr="jobs/7.err")
            return SimpleNamespace(
                done=lambda: True, exception=lambda: OSError(), job_id=7, state="OUT_OF_MEMORY", paths=paths
            )

    utils = SimpleNamespace(FailedJobError=Refused)
    submitit = SimpleNamespace(AutoExecutor=Engine, core=SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "submitit", submitit)
    study, said = Numbers(tmp_path), list[str]()
    monkeypatch.setattr(study.display, "say", said.append)
    if accepted:
        _dispatch(study, print, 1, "slurm", {})
        assert said[-1] == "worker 7 ended early (OUT_OF_MEMORY); its log is jobs/7.err"
    else:
        with pytest.raises(InputError, match=r"slurm did not accept the jobs: .* invalid time limit; see --executor"):
            _dispatch(study, print, 1, "slurm", {})


def test_the_remaining_time_follows_from_the_cells_of_this_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells were finished before; the third takes ten minutes, and one is left."""
    study, said, now = Numbers(tmp_path), [], 0.0
    for number in (0, 1):
        study.run(Numbered(number))
    monkeypatch.setattr(study.display, "say", said.append)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    counter = Counter(study)
    study.run(Numbered(2))
    now = 600.0
    counter.look()
    assert said == [
        "4 cells, 2 of them finished already",
        "cell-2: score 2.0000  (3 done, 0 running, 1 to do, about 10 min left)",
    ]

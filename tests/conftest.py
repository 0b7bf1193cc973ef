"""Small models that every test builds the same way."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from towers import Tower

from tinyspan import Partition, Trajectory, TrajectoryRecorder


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

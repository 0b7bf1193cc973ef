"""Small models that every test builds the same way."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tinyspan import Partition, Trajectory, TrajectoryRecorder


class Layer(nn.Module):
    """Two linear maps and a norm around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.outer(torch.tanh(self.inner(x))))
        return out


class Tower(nn.Module):
    """Embedding, a stack of layers, a head: the shape of an encoder, in float64."""

    def __init__(self, layers: int = 2, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(11, width)
            self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
            self.head = nn.Linear(width, 2)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x.mean(1))
        return out


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

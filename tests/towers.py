"""A small float64 model with the structure of an encoder: an embedding, a stack of layers and a head."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyspan import SubspaceModel


class Layer(nn.Module):
    """Two linear maps with a residual connection, followed by a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.outer(torch.tanh(self.inner(x))))
        return out


class Tower(nn.Module):
    """An embedding, a stack of layers and a head, in float64."""

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


class Checkpointed(Tower):
    """A tower that computes its layers again in the backward pass, if `reentrant` by a backward pass inside."""

    reentrant = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(x.mean(1))
        return out


def nudge(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


def trainable_counts(subspace: SubspaceModel) -> tuple[int, int]:
    """Return how many parameters are trained in z, scales included, and directly."""
    in_z, directly = (sum(value.numel() for value in group["params"]) for group in subspace.parameter_groups())
    return in_z, directly

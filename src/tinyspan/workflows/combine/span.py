"""The span of models of one base: theta_0 + sum_m c_bm delta_m on every block b, in the place of one model.

delta_m is the difference of model m to the base. Parameters that the base does not have, such as those of a new head,
have the mean of the models as their origin, so that coefficients 1 / M are the average there, too. The stacked
differences are the directions of a basis and the coefficients are its z, so that a `SubspaceModel` writes the weights
and computes exact gradients; no candidate needs a model of its own.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError
from tinyspan.io.storage import read_json, write_json
from tinyspan.io.tensors import open_tensors, write_tensors
from tinyspan.maps.dense import DenseMap, dense_map
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Block, ParameterSpec, Partition
from tinyspan.partitioning import by_layer
from tinyspan.weights import wide_dtype
from tinyspan.workflows.models import embedding_modules

__all__ = ["FIRST", "HEAD", "NEW", "Heads", "Span", "shared_blocks", "stack_differences"]

EMBEDDINGS, HEAD = "embeddings", "head"  # names of the blocks outside the layers
NEW = "new head"  # name of the block of parameters that the base does not have
FIRST = "models.0."  # prefix of the first model's parameters inside `Heads`


class Heads(nn.Module):
    """Models of several tasks that share the modules and parameters of the given names, which exist once in memory.

    Args:
        models: the models; those after the first are changed to use the first one's shared parameters.
        shared: names of the shared parameters.

    Example:
        >>> models = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, size)) for size in (1, 3)]
        >>> heads = Heads(models, ["0.weight", "0.bias"])
        >>> heads.models[0][0] is heads.models[1][0], [name for name, _ in heads.named_parameters()][-2:]
        (True, ['models.1.1.weight', 'models.1.1.bias'])
    """

    def __init__(self, models: Sequence[nn.Module], shared: Collection[str]) -> None:
        super().__init__()
        self.models, self.shared = nn.ModuleList(models), set(shared)
        common = {id(parameter) for name, parameter in models[0].named_parameters() if name in self.shared}
        every = models[0].named_parameters(remove_duplicate=False)  # tied parameters under all their names
        names = {name for name, parameter in every if id(parameter) in common}
        for model in models[1:]:
            _share(model, models[0], names)

    def forward(self, task: int, **inputs: Any) -> Any:
        """Return the outputs of the model of a task."""
        return self.models[task](**inputs)


def _share(model: nn.Module, source: nn.Module, names: Collection[str], prefix: str = "") -> None:
    """Replace modules whose parameters are all shared, and shared parameters of other modules.

    Models of different types of task may have modules that the other one lacks, such as a pooler.
    """
    for name, child in model.named_children():
        other = getattr(source, name, None)
        if not isinstance(other, nn.Module):
            continue
        both = (one for part in (child, other) for one, _ in part.named_parameters(remove_duplicate=False))
        inside = [f"{prefix}{name}.{own}" for own in both]
        if inside and all(one in names for one in inside):
            setattr(model, name, other)
        elif inside:
            _share(child, other, names, f"{prefix}{name}.")
    for name, parameter in source._parameters.items():
        if f"{prefix}{name}" in names and parameter is not None:
            setattr(model, name, parameter)


def shared_blocks(model: nn.Module, names: Collection[str], absent: Collection[str] = ()) -> Partition:
    """Return the blocks of a model whose parameters are combined: each layer, the embeddings, the head, and a new head.

    Args:
        model: the model.
        names: names of the parameters to combine; the others are in no block.
        absent: names of the parameters that the base does not have.
    """
    layers = by_layer(model)
    layer_of = {spec.name: block.name for block in layers for spec in block.parameters}
    embeddings = tuple(f"{module}." for module in embedding_modules(model, layers))
    blocks: dict[str, list[ParameterSpec]] = {block.name: [] for block in layers}
    for name, parameter in model.named_parameters():
        if name in names:
            outside = NEW if name in absent else EMBEDDINGS if name.startswith(embeddings) else HEAD
            block = layer_of.get(name) or outside
            spec = ParameterSpec(name, tuple(parameter.shape), parameter.dtype)
            blocks.setdefault(block, []).append(spec)
    return Partition(tuple(Block(name, tuple(specs)) for name, specs in blocks.items() if specs))


def stack_differences(
    blocks: Partition,
    origin: Mapping[str, Tensor],
    states: Iterator[Mapping[str, Tensor]],
    count: int,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the differences of models to the origin, one file per block with the directions [M, D_b].

    One model and one block of all differences are in memory at a time; the weights of a model are kept in `folder`
    until those of all models are there. A parameter in which all models are equal, such as one that a LoRA leaves as it
    is, has their weights as its origin and no part in the directions.

    Args:
        blocks: the combined parameters.
        origin: theta_0 by name; for a parameter without one, the mean of the models is taken.
        states: weights of every model in turn, by name.
        count: M.
        folder: folder to write `block-NNN.safetensors`, `origin.safetensors` and `differing.json`, the names of the
            parameters of each block in which the models differ, to.
        dtype: dtype of the stored differences: float32, bfloat16 or int8.
    """
    sums: dict[str, Tensor] = {}
    absent = [spec for spec in blocks.parameters() if spec.name not in origin]
    for index, state in enumerate(states):
        for number, block in enumerate(blocks):
            write_tensors(folder / _row_file(number, index), {"weights": block.flatten(state)})
        for spec in absent:
            sums[spec.name] = sums.get(spec.name, torch.zeros(spec.shape, dtype=torch.float64)) + state[spec.name]
    start = {**origin, **{spec.name: (sums[spec.name] / count).to(spec.dtype) for spec in absent}}
    differing: dict[str, list[str]] = {}
    for number, block in enumerate(blocks):
        flat = block.flatten(start)
        directions = flat.new_empty(count, block.numel)
        for index in range(count):
            directions[index] = open_tensors(folder / _row_file(number, index)).get_tensor("weights")
        spans = list(block.spans())
        moving = [(spec, a, b) for spec, a, b in spans if not _are_equal(directions[:, a:b])]
        for spec, a, b in spans:
            if (spec, a, b) not in moving:  # nothing to combine, whatever the base has
                start[spec.name] = directions[0, a:b].clone().view(spec.shape)
        differing[block.name] = [spec.name for spec, _, _ in moving]
        directions.sub_(flat)
        if len(moving) < len(spans):
            directions = torch.cat([directions[:, :0], *(directions[:, a:b] for _, a, b in moving)], 1)
        write_tensors(folder / _block_file(number), dense_map(directions, dtype).tensors())
        for index in range(count):
            (folder / _row_file(number, index)).unlink()
    write_tensors(folder / ORIGIN, {spec.name: start[spec.name] for spec in blocks.parameters()})
    write_json(folder / DIFFERING, differing)


ORIGIN, DIFFERING = "origin.safetensors", "differing.json"


def _are_equal(rows: Tensor) -> bool:
    return all(torch.equal(rows[0], row) for row in rows[1:])


def _row_file(block: int, model: int) -> str:
    return f"model-{model:03d}-block-{block:03d}.safetensors"


def _block_file(block: int) -> str:
    return f"block-{block:03d}.safetensors"


class Span:
    """Models in one place: the weights of `heads` are theta_0 + sum_m c_bm delta_m.

    Args:
        heads: the models, at any weights; their shared weights are set to theta_0.
        blocks: the combined parameters, by their names in the first model.
        folder: folder that `stack_differences` wrote. The differences are mapped from disk, not read.

    Attributes:
        partition: the blocks in which the models differ, with the parameters in which they do.
        names: names of these blocks.
        count: M, the number of models.
        subspace: the model as a function of the coefficients.
    """

    def __init__(self, heads: Heads, blocks: Partition, folder: Path) -> None:
        self.heads = heads
        maps: dict[str, DenseMap] = {}
        reader = open_tensors(folder / ORIGIN)
        named = dict(heads.models[0].named_parameters())
        with torch.no_grad():
            for spec in blocks.parameters():
                named[spec.name].copy_(reader.get_tensor(spec.name))
        moving, differing = [], read_json(folder / DIFFERING)
        for number, block in enumerate(blocks):
            if not (names := {*differing[block.name]}):
                continue
            specs = [spec for spec in block.parameters if spec.name in names]
            own = Block(block.name, tuple(ParameterSpec(f"{FIRST}{s.name}", s.shape, s.dtype) for s in specs))
            stored = open_tensors(folder / _block_file(number))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            maps[block.name] = DenseMap.from_tensors(own.numel, tensors)
            self.count = maps[block.name].rank
            moving.append(own)
        if not moving:
            raise InputError(
                "the models are equal in all parameters that would be combined, such as an encoder that was frozen in "
                "training: there is nothing to combine"
            )
        self.partition = Partition(tuple(moving))
        self.names = [block.name for block in self.partition]
        self.maps = maps
        heads.requires_grad_(False)
        self.subspace = SubspaceModel(heads, Basis(self.partition, maps))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, M), the shape of the coefficients."""
        return len(self.names), self.count

    @torch.no_grad()
    def set(self, coefficients: Tensor) -> None:
        """Move the weights to coefficients [B, M]."""
        vector_to_parameters(coefficients.to(self.subspace.z[0]).reshape(-1), self.subspace.z)
        self.subspace.refresh()

    def gradient(self) -> Tensor:
        """Return the gradient of the loss with respect to the coefficients, [B, M], after `backward`, and clear it.

        It is on the CPU, as the coefficients are.
        """
        gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in self.subspace.z]
        vector = parameters_to_vector(gradients).view(self.shape)
        for z in self.subspace.z:
            z.grad = None
        return vector.cpu()

    @contextmanager
    def written(self, update: Callable[[str, Tensor], Tensor]) -> Iterator[Heads]:
        """Return a context in which the weights are theta_0 + update(block, differences) as plain parameters.

        They may be trained in the context; afterwards the weights are theta_0 again.

        Args:
            update: name of a block and differences [M, D_b] on the CPU, in the dtype of the weights -> [D_b].
        """
        self.set(torch.zeros(self.shape))
        self.subspace.merge()
        try:
            named = dict(self.heads.named_parameters())
            with torch.no_grad():
                for block in self.partition:
                    differences = self.maps[block.name].dense(wide_dtype(block.parameters[0].dtype))
                    change = update(block.name, differences)
                    for name, part in block.unflatten(change).items():
                        named[name].add_(part.to(named[name].device))
            yield self.heads
        finally:
            self.subspace.unmerge()

"""The mean loss on some rows of a task as a function of z, with its derivatives at a point."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tinyspan.errors import InputError, TinyspanError
from tinyspan.model.batches import logits_of, rows_of, split_batch
from tinyspan.model.curvature import HessianMethod, gauss_newton, hessian, row_gradients
from tinyspan.model.jacobian import called
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.hardware import default_device
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.tasks import Labelled
from tinyspan.workflows.tasks.base import Split

__all__ = ["CurvatureOptions", "LossInZ", "Point"]

STEPS = 6  # steps along an eigenvector on each side of a point


@dataclass(frozen=True)
class CurvatureOptions:
    """What is computed, and on which rows.

    Attributes:
        rank: directions per block of a recorded run; by default 4, or as many as it has points.
        partition: name of the registered partition into whose blocks the run is grouped: `model` for one block, `layer`
            for one per layer. The time grows with the number of coordinates.
        every: use every this many points of a run, and always theta_0 and the last one.
        rows: number of rows, drawn with a fixed seed.
        split: the rows on which the run was trained, or the held-out ones.
        method: method of the Hessian; see `model.curvature.hessian`. With `central`, the Gauss-Newton matrix comes from
            central differences, too.
        dtype: number format of the model.
        batch_size: rows per batch.

    Raises:
        InputError: a number is below 1, or the split, the method or the dtype is unknown.
    """

    rank: int | None = None
    partition: str = "model"
    every: int = 1
    rows: int = 128
    split: Split = "train"
    method: HessianMethod = "reverse"
    dtype: Literal["float32", "float64"] = "float32"
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("rank", "every", "rows", "batch_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"expected {name} to be at least 1, got {name}={number}")
        for name, values in (("split", Split), ("method", HessianMethod), ("dtype", Literal["float32", "float64"])):
            if getattr(self, name) not in get_args(values):
                raise InputError(f"expected {name} to be {' or '.join(get_args(values))}, got {getattr(self, name)!r}")


class Point(NamedTuple):
    """A point at which the curvature is computed.

    Attributes:
        step: number of optimizer steps before it; None for an adapter.
        z: its coordinates [K]; None for those that the model has.
        share: share of `|theta_i - theta_0|^2` in the span of the directions; None at theta_0 and for an adapter.
    """

    step: int | None
    z: Tensor | None
    share: float | None


class LossInZ:
    """The mean loss on some rows as a function of z, and its derivatives.

    Args:
        subspace: the model.
        prepared: the task.
        rows: tokenized rows.
        options: see `CurvatureOptions`.
        advance: function that gets the number of batches that are done.
    """

    def __init__(
        self,
        subspace: SubspaceModel,
        prepared: Prepared,
        rows: Sequence[dict[str, Any]],
        options: CurvatureOptions,
        advance: Callable[[int], None],
    ) -> None:
        self.subspace, self.options = subspace, options
        self._task, self._outputs, self._advance = prepared.task, prepared.labels, advance
        self.rows, self.size = len(rows), sum(z.numel() for z in subspace.z)
        groups = (rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size))
        self.batches = [self._batch(prepared, group) for group in groups]
        weights = (self._task.row_weight(row, self._outputs) for batch in self.batches for row in batch["labels"])
        self._weight = float(sum(weights))
        self.has_gauss_newton = isinstance(self._task, Labelled)
        self.passes = 2 + self.has_gauss_newton
        with torch.no_grad():
            inputs, _ = split_batch(self.batches[0])
            self._outputs_per_row = logits_of(called(subspace, next(rows_of(inputs)))).numel()

    def _batch(self, prepared: Prepared, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = {**prepared.collate(list(rows)).to(default_device())}
        if self._task.encoder_decoder:
            prepare: Any = self.subspace.model.prepare_decoder_input_ids_from_labels
            batch["decoder_input_ids"] = prepare(labels=batch["labels"])
        return batch

    def _row_loss(self, values: Tensor, target: Tensor) -> Tensor:
        return self._task.row_loss(values, target, self._outputs)

    def _counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self._advance(1)

    @torch.no_grad()
    def value(self, z: Tensor | None = None) -> float:
        """Return the mean loss at the present z, or at another one."""
        if z is not None:
            _move(self.subspace, z)
        total = 0.0
        for inputs, targets in map(split_batch, self.batches):
            values = logits_of(called(self.subspace, inputs)).flatten(1)
            total += float(sum(map(self._row_loss, values, targets)))
        return total / self._weight

    def point(self, point: Point, *, is_last: bool) -> dict[str, Any]:
        """Return the entry of a point in `points`, with the `lines` through the last one.

        Raises:
            TinyspanError: the loss or a derivative is NaN or infinite.
        """
        began = time.perf_counter()
        if point.z is not None:
            _move(self.subspace, point.z)
        z = parameters_to_vector(self.subspace.z).detach().double().cpu()
        where = "the adapter's z" if point.step is None else f"the point after {point.step} steps"
        loss = self.value()
        if not math.isfinite(loss):
            raise TinyspanError(f"the loss at {where} is {loss}; was the run sound?")
        method = self.options.method
        raw = self._mean(hessian, where, method=method, symmetric=False)
        gradients = self._mean(row_gradients, where) * self.rows
        values, vectors = _descending(raw)
        entry = {
            "step": point.step,
            "distance": float(z.norm()),
            "share": point.share,
            "loss": loss,
            "gradient_norm": float(gradients.mean(0).norm()),
            "row_gradients": _norms(gradients),
            "hessian": values.tolist(),
            "gauss_newton": None,
            "trace": float(values.sum()),
            "sharpness": float(values[0]),
            "asymmetry": float((raw - raw.T).abs().max() / (2 * raw.abs().max())) if raw.any() else 0.0,
        }
        if self.has_gauss_newton:
            exact = "reverse" if self._outputs_per_row <= self.size else "forward"  # passes per row, or K per batch
            matrix = self._mean(gauss_newton, where, method=exact if method == "reverse" else "central")
            entry["gauss_newton"] = _descending(matrix)[0].tolist()
        if is_last:
            entry["lines"] = self._lines(z, loss, gradients.mean(0), values, vectors)
        return {**entry, "seconds": time.perf_counter() - began}

    def _mean(self, derivatives: Callable[..., Tensor], where: str, **options: Any) -> Tensor:
        """Return derivatives of the sum of the row losses, divided by the sum of the rows' weights, in float64.

        Raises:
            TinyspanError: one is NaN or infinite.
        """
        found = derivatives(self.subspace, self.batches, loss=self._row_loss, progress=self._counted, **options)
        if not found.isfinite().all():
            raise TinyspanError(f"a derivative of the loss at {where} is NaN or infinite; was the run sound?")
        return found.double().cpu() / self._weight

    def _lines(self, z: Tensor, loss: float, gradient: Tensor, values: Tensor, vectors: Tensor) -> list[dict[str, Any]]:
        """Return the loss along the first two eigenvectors, and along the last one if its eigenvalue is negative.

        A line reaches to the distance `|z|` on both sides, or only to where the quadratic term is as large as the loss.
        """
        numbers = [*range(min(2, len(values)))]
        if len(values) > 2 and values[-1] < 0:
            numbers.append(len(values) - 1)
        sizes, names = [own.numel() for own in self.subspace.z], [block.name for block in self.subspace.blocks]
        lines = []
        for number in numbers:
            value, vector = float(values[number]), vectors[:, number]
            radii = [float(z.norm()), math.sqrt(2 * abs(loss / value)) if value else 0.0]
            steps = torch.arange(-STEPS, STEPS + 1).double() / STEPS * min(filter(None, radii), default=1.0)
            losses = [self.value(z + step * vector) for step in steps]
            quadratic = loss + steps * float(gradient @ vector) + steps.square() * value / 2
            shares = [float(part.square().sum()) for part in vector.split(sizes)]
            lines.append(
                {
                    "number": number + 1,
                    "eigenvalue": value,
                    "blocks": dict(zip(names, shares, strict=True)),
                    "steps": steps.tolist(),
                    "loss": [one if math.isfinite(one) else None for one in losses],
                    "quadratic": quadratic.tolist(),
                }
            )
        _move(self.subspace, z)
        return lines


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of the symmetric part of a matrix in descending order, and its eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0), vectors.flip(1)


def _norms(gradients: Tensor) -> dict[str, float]:
    norms = gradients.norm(dim=1)
    return {"mean": float(norms.mean()), "median": float(norms.median()), "max": float(norms.max())}


@torch.no_grad()
def _move(subspace: SubspaceModel, z: Tensor) -> None:
    vector_to_parameters(z.to(subspace.z[0]), subspace.z)

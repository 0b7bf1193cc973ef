"""The shared basis of LoRA adapters of one model, and measures of how much they have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import register_basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.interop.lora.common import check_cut
from tinyspan.interop.lora.incoming import Lora, whole_updates
from tinyspan.linalg import CUTOFF, TensorColumns, right_singular_vectors, squared_norm
from tinyspan.maps.base import LinearMap
from tinyspan.maps.kronecker import KroneckerMap
from tinyspan.model.base import select_weights
from tinyspan.partition import Block, ParameterSpec, Partition
from tinyspan.trajectories.trajectory import model_name
from tinyspan.weights import follows_subspace

__all__ = ["Sharing", "lora_basis", "sharing"]


@register_basis("lora", rebuilds=False)
def lora_basis(
    model: nn.Module, loras: Sequence[Lora], *, rank: int | None = None, error: float | None = None
) -> Basis:
    """Return the shared basis of LoRA adapters of one model: one block per weight, V = L (x) R^T.

    For each weight, L [m, p] contains the leading left singular vectors of the horizontally stacked updates [u_1 ..
    u_T], where u_i = dW_i / ||dW_i||, and R [q, n] contains the leading right singular vectors of the vertically
    stacked ones (the higher-order singular value decomposition, De Lathauwer et al. 2000). An adapter in this basis
    needs Z = L^T dW R^T, p q numbers per weight; see `import_lora`. No dW is formed: LoRA's factors are sufficient.

    Without `rank` and `error`, only singular values below 1e-6 of the largest are dropped; p and q are then the sum of
    the adapters' ranks, or the full dimension. The basis does not depend on how an adapter splits dW into B and A, nor
    on the relative sizes of the adapters. Trained biases are weights [m, 1].

    Args:
        model: the base model, which becomes theta_0.
        loras: see `read_lora`.
        rank: the maximum number of columns of L, and of rows of R; give this, or `error`.
        error: instead of a rank: the smallest numbers for which the root mean square over the adapters of ||dW_i - V
            Z_i|| / ||dW_i|| is below this in every weight.

    Raises:
        InputError: there is no adapter, both rank and error are given or one is out of range, or the model follows a
            SubspaceModel.
        MismatchError: a weight is not in the model.

    Example:
        >>> import tempfile, peft
        >>> from tinyspan.interop.lora import read_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
        >>> config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> folder = tempfile.mkdtemp()
        >>> peft.get_peft_model(model, config).save_pretrained(folder)
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
        >>> basis = lora_basis(base, [read_lora(base, folder)])
        >>> basis.ranks
        {'0.weight': 4}
    """
    if not loras:
        raise InputError("a basis of LoRA adapters needs at least one adapter")
    check_cut(rank, error)
    if follows_subspace(model):
        raise InputError("the model follows a SubspaceModel, so its weights are not theta_0; load the base model anew")
    own = dict(model.named_parameters())
    by_weight: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for lora in loras:
        biases = {
            key: value for key, value in lora.directly_trained.items() if key.rpartition(".")[0] not in lora.modules
        }
        for name, pair in {**lora.factors, **whole_updates(biases, own)}.items():
            by_weight.setdefault(name, []).append(_normalize(*pair))
    if absent := by_weight.keys() - own.keys():
        raise MismatchError(f"the adapters were read for another model: this one has no parameter {min(absent)!r}")
    maps: dict[str, LinearMap] = {}
    spectrum = {}
    for name, factors in by_weight.items():
        columns, spectrum[name] = _span([_left_factor(left, right) for left, right in factors], rank, error, name)
        rows, _ = _span([_left_factor(right.T, left.T) for left, right in factors], rank, error, name)
        maps[name] = KroneckerMap(columns.T.contiguous(), rows)
    specs = [ParameterSpec(name, tuple(own[name].shape), own[name].dtype) for name in own if name in maps]
    partition = Partition(tuple(Block(spec.name, (spec,)) for spec in specs))
    weights = select_weights(model, partition, "the basis", {})
    return Basis(
        partition,
        maps,
        spectrum=spectrum,
        fingerprint=partition.fingerprint(weights),
        construction={"constructor": "lora", "rank": rank, "error": error},
        parents=[lora.content_hash for lora in loras],
        model_name=model_name(model),
    )


def _normalize(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of L R / ||L R||."""
    left = left / left.norm()
    right = right / right.norm()
    return left / max(squared_norm(left, right) ** 0.5, torch.finfo(torch.float64).tiny), right


def _left_factor(left: Tensor, right: Tensor) -> Tensor:
    """Return [m, r] with the left singular vectors and values of L R."""
    triangle: Tensor = torch.linalg.qr(right.T, mode="r").R
    return left @ triangle.T


def _span(parts: Sequence[Tensor], rank: int | None, error: float | None, name: str) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors of the stacked parts, as rows [p, m], and all singular values.

    Both sides of the weight share an error bound: each gets half of its square.
    """
    rows = torch.cat(list(parts), 1).T
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R  # it has the same singular values and right singular vectors

    def rank_of(values: Tensor) -> int:
        sound = int((values > CUTOFF * values[0]).sum())
        if error is not None:
            tail = values.square().flip(0).cumsum(0).flip(0)  # entry i: squared error of keeping the first i values
            sound = min(sound, int((tail > error**2 / 2 * tail[0]).sum()))
        return max(1, min(sound, rank or sound))

    values, vectors = right_singular_vectors(TensorColumns(rows), rank_of, torch.float32, name)
    return vectors, values


@dataclass(frozen=True)
class Sharing:
    """Measures of what the updates of linear layers have in common, over several LoRA adapters.

    Attributes:
        mean_share: ||mean_i u_i||^2 with u_i = dW_i / ||dW_i|| over all weights, which is the mean of all pairwise
            cosines, each adapter with itself included: 1 / T if the adapters are orthogonal, 1 if they are equal.
        without: per adapter, ||dW_i - mean_j dW_j|| / ||dW_i||: the error of the mean as a replacement.
        unseen: per adapter, ||dW_i - V V^T dW_i|| / ||dW_i||, where V is the full basis of the others; nearly 1 if they
            contain nothing of it.
        chance: the expected `unseen` of a random update: sqrt(1 - p q / (m n)), as root mean square over the weights.
    """

    mean_share: float
    without: list[float]
    unseen: list[float]
    chance: float


def sharing(loras: Sequence[Lora]) -> Sharing:
    """Measure how much LoRA adapters have in common: by their mean, and by the basis of all others for each of them.

    A basis of T adapters always contains these T; the measure is whether it contains another one.

    Raises:
        InputError: there are fewer than two adapters.
    """
    if len(loras) < 2:
        raise InputError("measuring what adapters share needs at least two of them")
    products = torch.tensor([[_inner(one, other) for other in loras] for one in loras], dtype=torch.float64)
    squares = products.diagonal()
    off = (squares - 2 * products.mean(1) + products.mean()).clamp(min=0)
    held, expected = torch.zeros(len(loras)).double(), torch.zeros(len(loras)).double()
    for name in dict.fromkeys(name for lora in loras for name in lora.factors):
        whose = [index for index, lora in enumerate(loras) if name in lora.factors]
        factors = [loras[index].factors[name] for index in whose]
        lefts = _projected_onto_others([left for left, _ in factors])
        rights = _projected_onto_others([right.T for _, right in factors])
        for index, (left, right), inside, beside in zip(whose, factors, lefts, rights, strict=True):
            held[index] += (inside * beside).sum()
            ranks = sum(other.shape[1] for other, _ in factors) - left.shape[1]
            share = min(ranks, len(left)) * min(ranks, right.shape[1]) / (len(left) * right.shape[1])
            expected[index] += share * squared_norm(left, right)
    return Sharing(
        mean_share=float((products / (squares[:, None] * squares).sqrt()).mean()),
        without=(off / squares).sqrt().tolist(),
        unseen=(1 - held / squares).clamp(min=0).sqrt().tolist(),
        chance=float((1 - expected / squares).mean().clamp(min=0).sqrt()),
    )


def _projected_onto_others(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return X_i^T P_i X_i for every part X_i [m, r], where P_i projects onto the columns of all other parts.

    With X_i = Q_i S_i, and G the Gram matrix of all Q stacked, the part outside the other columns is the Schur
    complement ((G + d)^-1)_ii^-1 - d: one inverse for all i. The ridge d makes it defined for linearly dependent parts.
    """
    ridge = 1e-10
    bases, triangles = zip(*(torch.linalg.qr(part) for part in parts), strict=True)
    stacked = torch.cat(bases, 1)
    inverse = torch.linalg.inv(stacked.T @ stacked + ridge * torch.eye(stacked.shape[1], dtype=stacked.dtype))
    projections, start = [], 0
    for basis, triangle in zip(bases, triangles, strict=True):
        one = torch.eye(basis.shape[1], dtype=stacked.dtype)
        own = slice(start, start := start + basis.shape[1])
        projections.append(triangle.T @ (one - torch.linalg.inv(inverse[own, own]) + ridge * one) @ triangle)
    return projections


def _inner(one: Lora, other: Lora) -> float:
    """Return the sum over all weights of <dW, dW'> = <L^T L', R R'^T>."""
    total = 0.0
    for name in one.factors.keys() & other.factors.keys():
        (left, right), (second, turned) = one.factors[name], other.factors[name]
        total += float(((left.T @ second) * (right @ turned.T)).sum())
    return total

"""Settings of a training run, and of z in it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tinyspan.errors import InputError
from tinyspan.workflows.hardware import (
    has_bfloat16,
)

__all__ = ["Settings", "SubspaceOptions"]


@dataclass(frozen=True)
class Settings:
    """Settings of the training. The defaults are the paper's (section 4.1 and appendix), except `regression_start`.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step.
        max_length: maximum number of tokens per row, or of a prompt; longer ones are truncated.
        learning_rate: initial learning rate of the directly trained parameters, decayed linearly to 0.
        z_learning_rate: initial learning rate of z, decayed likewise.
        precision: `bfloat16` computes under autocast; `auto` does so if the device supports it. Weights stay float32.
        seed: seed of the head's initial weights, the order of rows, and dropout.
        max_target_length: maximum number of tokens per completion, for language tasks, in training and generation.
        max_steps: optimizer steps to train for instead of whole `epochs`.
        module_learning_rates: module name -> learning rate of its directly trained parameters, instead of
            `learning_rate`: a new head often needs a larger one than pre-trained weights.
        regression_start: initial prediction of a new regression head: the `mean` of the training labels, or about
            `zero`, which is the initialisation of transformers. From zero, a model whose labels are far from zero
            learns their mean first and the rest much later, since a bias changes by about the learning rate per step.
        set_aside: number of training rows that a run neither trains on nor reports on, for choices; see
            `Prepared.with_aside`. They are scored after every epoch.
        patience: number of epochs after which training stops if the score on the set-aside rows has not improved; the
            weights of the best epoch are kept. The learning rates decay as without it.

    Raises:
        InputError: a number is not above 0, or infinite, `set_aside` is below 0, `patience` is given without rows that
            are set aside, or `regression_start` or `precision` is unknown.
    """

    epochs: int = 32
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 2e-5
    z_learning_rate: float = 1e-2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    max_target_length: int = 64
    regression_start: Literal["mean", "zero"] = "mean"
    max_steps: int | None = None
    module_learning_rates: Mapping[str, float] = field(default_factory=dict)
    set_aside: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "max_length", "learning_rate", "z_learning_rate", "max_target_length")
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {f"the learning rate of {module}": rate for module, rate in self.module_learning_rates.items()}
        numbers |= {} if self.max_steps is None else {"max_steps": self.max_steps}
        numbers |= {} if self.patience is None else {"patience": self.patience}
        for name, number in numbers.items():
            if not 0 < number < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {number}")
        if self.set_aside < 0:
            raise InputError(f"set_aside must be at least 0, got {self.set_aside}")
        if self.patience is not None and self.set_aside == 0:
            raise InputError(
                "patience needs training rows that are set aside, such as set_aside=200 (--set-aside 200): a choice of "
                "the best epoch by the held-out rows would raise their score"
            )
        if self.regression_start not in ("mean", "zero"):
            raise InputError(f"regression_start must be 'mean' or 'zero', got {self.regression_start!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"precision must be 'auto', 'float32' or 'bfloat16', got {self.precision!r}")

    def steps(self, rows: int) -> int:
        """Return the number of optimizer steps for this number of training rows."""
        return self.max_steps or self.steps_per_epoch(rows) * self.epochs

    def steps_per_epoch(self, rows: int) -> int:
        """Return the number of optimizer steps in one pass over this number of training rows."""
        return -(-rows // self.batch_size)

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16."""
        return has_bfloat16() if self.precision == "auto" else self.precision == "bfloat16"


@dataclass(frozen=True)
class SubspaceOptions:
    """Initialisation of z, and what is trained besides z.

    Attributes:
        ensemble: h, the number of vectors that are averaged; the paper uses 16.
        init_std: standard deviation of the initial values of z; with 0, training starts at theta_0.
        train_embeddings: whether to train the embeddings directly, as the paper does, or freeze them.
        layer_scales: whether to learn one scale per layer besides z, as in SAID.

    Raises:
        InputError: `ensemble` is below 1, or `init_std` is negative, NaN or infinite.
    """

    ensemble: int = 1
    init_std: float = 0.0
    train_embeddings: bool = True
    layer_scales: bool = False

    def __post_init__(self) -> None:
        if self.ensemble < 1 or not 0 <= self.init_std < math.inf:
            raise InputError(
                f"expected ensemble >= 1 and a finite init_std >= 0, got {self.ensemble} and {self.init_std}"
            )

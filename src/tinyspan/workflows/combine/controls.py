"""Controls: what training on the rows to learn from achieves, from a combination that learned nothing.

They show whether training is the better answer. They are not combinations, and are never written.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.workflows.combine.learning import decay, training_steps
from tinyspan.workflows.combine.problem import Candidate, Part, Problem
from tinyspan.workflows.combine.span import FIRST, HEAD, Heads, shared_blocks
from tinyspan.workflows.hardware import seeded
from tinyspan.workflows.tasks.base import Array

__all__ = ["CONTROLS", "Control", "ControlRun", "run_control"]

LORA_RANK = 8


@dataclass(frozen=True)
class Control:
    """A way to train.

    Attributes:
        name: name in tables.
        rates: learning rates, of which the best on the rows to choose on is reported.
        prepare: sets `requires_grad` of what is trained.
    """

    name: str
    rates: tuple[float, ...]
    prepare: Callable[[Heads], None]


def _body_of(heads: Heads) -> set[str]:
    """Return the names of the parameters in the layers and the embeddings of the first model."""
    first = heads.models[0]
    blocks = shared_blocks(first, {name for name, _ in first.named_parameters()})
    return {spec.name for block in blocks for spec in block.parameters if block.name != HEAD}


def _heads_alone(heads: Heads) -> None:
    body = {f"{FIRST}{name}" for name in _body_of(heads)}
    for name, parameter in heads.named_parameters():
        parameter.requires_grad_(name not in body)


def _all_weights(heads: Heads) -> None:
    heads.requires_grad_(True)


def _lora(heads: Heads) -> None:
    """Put a LoRA on every linear layer of the encoder; the heads stay."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    first: Any = heads.models[0]
    body = _body_of(heads)
    layers = [
        name
        for name, module in first.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" in body
    ]
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=layers), first)


CONTROLS = (
    Control("heads alone, trained", (1e-3, 5e-3), _heads_alone),
    Control("all weights, trained", (2e-5, 1e-4), _all_weights),
    Control(f"LoRA r = {LORA_RANK}, trained", (1e-3, 4e-3), _lora),
)


@dataclass(frozen=True)
class ControlRun:
    """A trained control.

    Attributes:
        name: name in tables.
        rate: the learning rate.
        passes: forward passes over one row of its training.
        predictions: for each part, the predictions for the rows of each task.
    """

    name: str
    rate: float
    passes: int
    predictions: Mapping[Part, tuple[Array, ...]]


def run_control(problem: Problem, start: Candidate, control: Control, rate: float) -> ControlRun:
    """Train from a candidate on the rows to learn from, with AdamW at a linearly decaying rate.

    The number of steps is that of learned coefficients, and dropout is on. Afterwards all weights and buffers
    are as before.

    Args:
        problem: models and rows.
        start: the candidate to start from.
        control: what is trained.
        rate: learning rate.
    """
    change = _change_of(problem, start)
    with problem.span.written(change) as heads, _restored(heads):
        with seeded(problem.seed):
            control.prepare(heads)
        before = problem.passes
        with seeded(problem.seed):  # dropout
            _train(problem, heads, rate)
        spent = problem.passes - before
        parts: tuple[Part, ...] = ("choose", "test")
        predictions = {part: problem.predictions(heads, part) for part in parts}
    problem.passes = before + spent
    return ControlRun(control.name, rate, spent, predictions)


def _change_of(problem: Problem, candidate: Candidate) -> Callable[[str, Tensor], Tensor]:
    """Return the candidate as a change of each block."""
    if candidate.update is not None:
        return candidate.update
    assert candidate.coefficients is not None
    of_block = dict(zip(problem.span.names, candidate.coefficients, strict=True))
    return lambda block, differences: of_block[block] @ differences


@contextmanager
def _restored(heads: Heads) -> Iterator[None]:
    """Restore modules that LoRA replaces, parameters outside the blocks, buffers, and what is trained, afterwards."""
    modules = {name: dict(module.named_children()) for name, module in heads.named_modules()}
    attributes = [set(vars(model)) for model in heads.models]
    kept = {name: value.detach().clone() for name, value in (*heads.named_parameters(), *heads.named_buffers())}
    try:
        yield
    finally:
        for name, children in modules.items():
            owner = heads.get_submodule(name)
            for child, module in children.items():
                if getattr(owner, child) is not module:
                    setattr(owner, child, module)
        for model, names in zip(heads.models, attributes, strict=True):
            for name in set(vars(model)) - names:  # PEFT's config
                delattr(model, name)
        named = dict([*heads.named_parameters(), *heads.named_buffers()])
        with torch.no_grad():
            for name, value in kept.items():
                named[name].copy_(value)
        heads.requires_grad_(False).eval()
        heads.zero_grad(set_to_none=True)


def _train(problem: Problem, heads: Heads, rate: float) -> None:
    parameters = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = decay(problem, optimizer)
    heads.train()
    for step in training_steps(problem):
        for index, batch in step:
            (problem.loss(heads, index, batch) / len(problem.tasks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

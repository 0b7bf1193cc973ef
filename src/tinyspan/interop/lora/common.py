"""Functions that export and import share: PEFT's files, and the names in them."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn

from tinyspan.errors import InputError
from tinyspan.extras import missing_extra
from tinyspan.io.hub import fetched
from tinyspan.io.storage import reading
from tinyspan.weights import finite, tied_names

__all__ = [
    "LABELS",
    "PEFT_FILES",
    "PREFIX",
    "check_cut",
    "is_linear",
    "peft_config",
    "peft_labels",
    "peft_package",
    "peft_tensors",
    "second_names",
]

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LABELS = "labels.json"  # names of a head's outputs in their order, which PEFT's files do not contain
PREFIX = "base_model.model."  # prefix of every name in PEFT's files


def peft_config(name: str | Path, revision: str | None = None, token: str | None = None) -> Any:
    """Return the configuration of a PEFT adapter; see `read_lora`."""
    peft = peft_package()
    config, _ = _peft_files(name, revision, token)
    with reading(config):
        return peft.PeftConfig.from_pretrained(str(config.parent))


def peft_tensors(name: str | Path, revision: str | None = None, token: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a PEFT adapter, by the names in its file; see `read_lora`."""
    peft = peft_package()
    _, weights = _peft_files(name, revision, token)
    with reading(weights):
        try:
            tensors: dict[str, Tensor] = peft.utils.load_peft_weights(str(weights.parent), device="cpu")
        except UnpicklingError as error:
            raise ValueError(str(error)) from error
        sick = next((key for key, value in tensors.items() if not finite(value)), None)
        if sick is not None:
            raise ValueError(f"{sick} holds NaN or infinite numbers")
    return tensors


def peft_labels(name: str | Path, revision: str | None = None, token: str | None = None) -> tuple[str, ...] | None:
    """Return the label names of an adapter that `export_lora` wrote; None if its folder contains none."""
    path = fetched(name, revision, token, (*PEFT_FILES, LABELS)) / LABELS
    if not path.is_file():
        return None
    with reading(path):
        labels = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise TypeError(f"expected a list of names, got {labels!r:.100}")
        return tuple(labels)


def _peft_files(name: str | Path, revision: str | None, token: str | None) -> tuple[Path, Path]:
    """Return the paths of an adapter's configuration and weights."""
    folder = fetched(name, revision, token, PEFT_FILES)
    files = [folder / file for file in PEFT_FILES if (folder / file).is_file()]
    if len(files) < 2 or files[0].name != PEFT_FILES[0]:
        raise InputError(f"{name} is not an adapter of PEFT: it needs {PEFT_FILES[0]} and {PEFT_FILES[1]}")
    return files[0], files[1]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear; this includes the Conv1D of transformers, whose weight is transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def second_names(model: nn.Module) -> dict[str, str]:
    """Return another name for every name of a parameter that has several."""
    tied = tied_names(model)
    return {**{first: name for name, first in tied.items()}, **tied}


def check_cut(rank: int | None, error: float | None) -> None:
    """Check that at most one of rank and error is given, and that it is in range."""
    if None not in (rank, error) or (rank is not None and rank < 1) or not 0 <= (error or 0.0) < 1:
        raise InputError(f"give rank= of at least 1, or error= from 0 to below 1; got {rank} and {error}")


def peft_package() -> Any:
    """Import PEFT, which is required for LoRA adapters only."""
    try:
        import peft
    except ImportError as error:
        raise missing_extra("peft", "an adapter of PEFT") from error
    return peft

"""Conversion of the checkpoint folders of an earlier run into a trajectory."""

import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError
from tinyspan.io.folders import check_folder
from tinyspan.io.tensors import read_checkpoint
from tinyspan.partition import ParameterSpec, Partition
from tinyspan.sharding import local
from tinyspan.trajectories.recorder import TrajectoryRecorder, warn_of_rounding
from tinyspan.trajectories.trajectory import Trajectory, point_name
from tinyspan.weights import is_exact_in

__all__ = ["numeric_order", "trajectory_from_checkpoints"]


def trajectory_from_checkpoints(
    model: nn.Module,
    partition: Partition,
    checkpoints: Sequence[str | Path],
    folder: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Trajectory:
    """Convert the checkpoint folders of an earlier run into a trajectory, in the given order.

    The last folder is the end of the run. A warning is issued if the numbers at the end of the folder names descend, as
    they do in alphabetical order (`checkpoint-1000` before `checkpoint-200`; see `numeric_order`), or if two folders
    hold the same weights.

    Args:
        model: model with theta_0, the weights from which the run started; it is not changed.
        partition: partition of `model`.
        checkpoints: folders with `model.safetensors` or `pytorch_model.bin`, as one file or as shards. Parameter names
            may lack the prefix of the base model (`encoder.layer.0...` for `bert.encoder.layer.0...`) or have an
            additional one. If the names match in neither way, the model's class loads the checkpoint into a second copy
            of the model. The tensors have the dtype of theta_0, or a narrower one that represents theta_0 exactly.
        folder: folder of the trajectory.
        overwrite: replace an earlier trajectory.
        dtype: dtype of the stored deltas, as for `TrajectoryRecorder`.

    Raises:
        InputError: no checkpoint is given, one is given twice, or one is not a checkpoint folder.
        MismatchError: a checkpoint lacks a parameter of the partition, or has it with another shape or dtype.
        StorageError: a file is damaged, or the disk has too little space for the points.
    """
    if not checkpoints:
        raise InputError("expected at least one checkpoint folder, got none")
    _require_distinct(checkpoints)
    _warn_if_descending(checkpoints)
    check_folder(Path(folder), "trajectory", overwrite, [Path(checkpoint) for checkpoint in checkpoints])
    dtypes = {spec.name: spec.dtype for spec in partition.parameters()}
    narrower: dict[str, torch.dtype] = {}
    for checkpoint in checkpoints:  # check all checkpoints before anything is written
        tensors = _checkpoint(model, partition, Path(checkpoint))
        narrower |= {name: value.dtype for name, value in tensors.items() if value.dtype != dtypes[name]}
    if narrower:  # the recorder itself warns about theta_0 in half precision
        warn_of_rounding({**dtypes, **narrower})
    points = len(checkpoints)
    recorder = TrajectoryRecorder(model, partition, folder, overwrite=overwrite, dtype=dtype, points=points)
    for step, checkpoint in enumerate(checkpoints):
        recorder.append(step, _checkpoint(model, partition, Path(checkpoint)))
    recorder.seal()
    trajectory = recorder.trajectory()
    _warn_if_equal(trajectory, checkpoints)
    return trajectory


def numeric_order(checkpoints: Iterable[str | Path]) -> list[Path]:
    """Sort folders by the numbers in their names.

    Example:
        >>> [path.name for path in numeric_order(["run/checkpoint-1000", "run/checkpoint-200"])]
        ['checkpoint-200', 'checkpoint-1000']
    """

    def key(path: Path) -> list[str | int]:
        return [int(part) if index % 2 else part for index, part in enumerate(re.split("([0-9]+)", str(path)))]

    return sorted(map(Path, checkpoints), key=key)


def _require_distinct(checkpoints: Sequence[str | Path]) -> None:
    folders: dict[str, str | Path] = {}
    for checkpoint in checkpoints:
        place = os.path.realpath(checkpoint)
        if place in folders:
            raise InputError(f"a checkpoint is given twice, as {folders[place]} and as {checkpoint}")
        folders[place] = checkpoint


def _warn_if_descending(checkpoints: Sequence[str | Path]) -> None:
    """Warn if folders whose names differ only in the number at the end are not in ascending order."""
    last: dict[str, tuple[int, str | Path]] = {}
    for checkpoint in checkpoints:
        if match := re.fullmatch("(.*?)([0-9]+)", os.path.abspath(checkpoint)):
            step, (before, previous) = int(match[2]), last.get(match[1], (-1, checkpoint))
            if step < before:
                warnings.warn(
                    f"the checkpoints are not in the order of their steps: {Path(previous).name} comes before "
                    f"{Path(checkpoint).name}, and the last one given counts as the end of the run; "
                    "tinyspan.trajectories.from_checkpoints.numeric_order(checkpoints) sorts them by number",
                    stacklevel=3,
                )
                return
            last[match[1]] = (step, checkpoint)


def _warn_if_equal(trajectory: Trajectory, checkpoints: Sequence[str | Path]) -> None:
    hashes: dict[str, str | Path] = {}
    for index, checkpoint in enumerate(checkpoints):
        digest = trajectory.files[point_name(index)].sha256
        if digest in hashes:
            warnings.warn(
                f"the checkpoints {hashes[digest]} and {checkpoint} hold the same weights: this point counts twice",
                stacklevel=3,
            )
        hashes[digest] = checkpoint


def _checkpoint(model: nn.Module, partition: Partition, folder: Path) -> dict[str, Tensor]:
    """Read the partition's parameters from a checkpoint folder, under any of their tied names."""
    try:
        return _match(model, partition, dict(read_checkpoint(folder)), folder)
    except MismatchError:
        if (tensors := _load_with_class(model, folder)) is None:
            raise
    return _match(model, partition, tensors, folder)


def _load_with_class(model: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """Load a checkpoint with the model's class, which renames experts, for example; None if it cannot load it."""
    if not sys.modules.get("transformers"):  # then no model is from there, or it is not installed
        return None
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not (folder / "config.json").is_file():
        return None
    kind: Any = type(model)
    try:
        loaded, info = kind.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError):
        return None
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}  # initialised at random
    return {name: value for name, value in loaded.state_dict().items() if name not in new}


def _match(model: nn.Module, partition: Partition, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    by_suffix: dict[str, list[str]] = {}
    for key in tensors:
        for suffix in _suffixes(key):
            by_suffix.setdefault(suffix, []).append(key)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    own = partition.select(model)
    selected: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for spec in partition.parameters():
        key = _find_key(spec, aliases[id(own[spec.name])], tensors, by_suffix, folder)
        _check_tensor(tensors[key], key, spec, own[spec.name], folder)
        if owners.setdefault(key, spec.name) != spec.name:
            raise MismatchError(f"{folder}: {key!r} would serve as {owners[key]!r} and as {spec.name!r}")
        selected[spec.name] = tensors[key]
    return selected


def _find_key(
    spec: ParameterSpec,
    aliases: list[str],
    tensors: Mapping[str, Tensor],
    by_suffix: Mapping[str, list[str]],
    folder: Path,
) -> str:
    """Return a parameter's key in a checkpoint: its name, or else a key that matches it up to a prefix."""
    for alias in aliases:
        matches = [alias] if alias in tensors else by_suffix.get(alias, [])
        matches = matches or [suffix for suffix in _suffixes(alias) if suffix in tensors][:1]
        if len(matches) == 1:
            return matches[0]
    raise MismatchError(f"{folder} has no tensor for the parameter {spec.name!r}; is it a checkpoint of this model?")


def _check_tensor(value: Tensor, key: str, spec: ParameterSpec, start: Tensor, folder: Path) -> None:
    """Raise an error if a tensor has another shape than its parameter, or a dtype that cannot represent theta_0."""
    if tuple(value.shape) != spec.shape:
        raise MismatchError(f"{folder}: {key!r} has shape {list(value.shape)}, expected {list(spec.shape)}")
    narrower = value.dtype.is_floating_point and value.dtype.itemsize < spec.dtype.itemsize
    if value.dtype != spec.dtype and not (narrower and is_exact_in(local(start).detach(), value.dtype)):
        raise MismatchError(
            f"{folder}: {key!r} is {value.dtype}, and theta_0 is {spec.dtype}"
            f"{f', with values that {value.dtype} cannot represent' if narrower else ''}; load theta_0 in the "
            f"checkpoint's dtype, from_pretrained(..., dtype={value.dtype})"
        )


def _suffixes(name: str) -> list[str]:
    """Return the proper suffixes of a name with at least two parts, longest first: `b.c.d`, `c.d` for `a.b.c.d`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts) - 1)]

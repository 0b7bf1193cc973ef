"""The folders of which a page tells."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, StorageError
from tinyspan.io.folders import COMBINED, CURVATURE, MARKER, PREDICTIONS, RESULT, check_place, is_unfinished
from tinyspan.io.manifests import MANIFEST, Manifest, check_file, read_manifest
from tinyspan.io.storage import read_json, reading
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["NAMES", "Item", "check_page", "opened_items"]

MARK = '<meta name="generator" content="tinyspan">'
LARGEST_PREDICTIONS = 1 << 28  # bytes of predictions that are read
NAMES = {
    "trajectory": "recorded run",
    "basis": "basis",
    "adapter": "adapter",
    "result": "result",
    "curvature": "curvature",
    "combined": "combination",
}


@dataclass
class Item:
    """A folder of which a page tells.

    Attributes:
        folder: the folder.
        kind: `trajectory`, `basis`, `adapter`, `result` for a folder with a result only, `curvature` or `combined`.
        name: the folder's name, or more of its path where several have the same.
        manifest: manifest of the folder; None for the others.
        source: the opened trajectory, basis or adapter; None for the others.
        result: content of `result.json`, if there is one.
        predictions: lines of `predictions.jsonl`, if there is one.
        curvature: content of `curvature.json`, if there is one.
        combined: content of the `result.json` of a combination.
    """

    folder: Path
    kind: str
    name: str = ""
    manifest: Manifest | None = None
    source: Trajectory | Basis | OpenedAdapter | None = None
    result: Mapping[str, Any] | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list)
    curvature: Mapping[str, Any] | None = None
    combined: Mapping[str, Any] | None = None


class _Adapter(OpenedAdapter):
    """An opened adapter that draws a basis which is not stored once, and not for every picture."""

    def basis(self, model: nn.Module | None = None) -> Basis:
        return self._basis

    @cached_property
    def _basis(self) -> Basis:
        return super().basis()


# -- input ------------------------------------------------------------------------------------------------------------


def check_page(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise an error if a page cannot be written to a path, without changing anything.

    Raises:
        InputError: the path is a folder, holds another file or (without `overwrite`) an earlier page, cannot be
            written, or lies in a folder that is read.
    """
    check_place(output.parent)
    for folder in inputs:
        if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{output} lies in {folder}, which is read; write the page elsewhere")
    if output.is_dir():
        raise InputError(f"{output} is a folder; expected the name of a file, such as {output / 'page.html'}")
    if not output.exists():
        return
    with reading(output), output.open("rb") as file:
        is_page = MARK.encode() in file.read(1000)
    if not is_page:
        raise InputError(f"{output} is a file of something else; choose another name for the page")
    if not overwrite:
        raise InputError(f"{output} holds an earlier page; choose another name or pass --overwrite")


def opened_items(folders: Sequence[Path]) -> list[Item]:
    """Open the folders of a page, and check their manifests and results.

    Raises:
        InputError: a folder is given twice, does not exist, holds unfinished work, or is no trajectory, basis,
            adapter, result or curvature; the message says what it is.
        StorageError: a file is damaged.
    """
    places = [os.path.realpath(folder) for folder in folders]
    if len({*places}) < len(places):
        twice = next(folder for index, folder in enumerate(folders) if places[index] in places[:index])
        raise InputError(f"{twice} is given twice")
    items = [_opened(Path(folder)) for folder in folders]
    for item, name in zip(items, _names(places), strict=True):
        item.name = name
    return items


def _names(places: Sequence[str]) -> list[str]:
    """Return the shortest end of each path that no other path has."""
    parts = [Path(place).parts for place in places]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        if len({*names}) == len(names):
            return names
        depths = [depth + (names.count(name) > 1) for name, depth in zip(names, depths, strict=True)]


def _opened(folder: Path) -> Item:
    if not folder.is_dir():
        raise InputError(f"{folder} is {'a file' if folder.exists() else 'no folder: there is none of this name'}")
    if is_unfinished(folder):
        raise InputError(f"{folder} holds unfinished work; repeat the command that started it, then report on it")
    if (folder / CURVATURE).is_file():
        return Item(folder, "curvature", curvature=read_json(folder / CURVATURE))
    if not (folder / MANIFEST).is_file():
        if not (folder / RESULT).is_file():
            raise InputError(f"{folder} is no trajectory, basis, adapter or result: {_what_it_is(folder)}")
        if (result := read_json(folder / RESULT, sealed=False)).get("method") == COMBINED:
            return Item(folder, "combined", combined=result)
        item = Item(folder, "result")
    else:
        manifest = read_manifest(folder)
        item = Item(folder, manifest.kind, manifest=manifest)
        if manifest.kind == "trajectory":
            item.source = Trajectory(folder)
        else:
            item.source = _Adapter(folder) if manifest.kind == "adapter" else Basis.from_pretrained(folder)
    item.result = _read_result(item)
    item.predictions = _read_predictions(item)
    return item


def _what_it_is(folder: Path) -> str:
    """Return a phrase for a folder that a page cannot be made of."""
    if (folder / MARKER).is_file():
        with reading(folder / MARKER):
            mark = (folder / MARKER).read_bytes()[:100].decode("utf-8", "replace").strip()
        parts = {"demo": "give its parts: full, intrinsic, random, freeze", "unified": "give its basis and adapters"}
        if mark in parts:
            return f"it is the output of `tinyspan {'unify' if mark == 'unified' else mark}`; {parts[mark]}"
    if (folder / "study.json").is_file():
        return "it is a study, whose page `tinyspan render` writes"
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of PEFT; convert it with `tinyspan unify`"
    if (folder / "config.json").is_file():
        return "it is a model of transformers; report on the run that trained it"
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "it is empty"


def _read_result(item: Item) -> Mapping[str, Any] | None:
    path = item.folder / RESULT
    if not path.is_file():
        return None
    _check_attached(item, RESULT)
    result = read_json(path, sealed=False)
    if not {"method", "task", "metric", "score"} <= result.keys():
        raise InputError(
            f"{path} is no result of `record`, `tune` or `evaluate`: it has no method, task, metric or score"
        )
    with reading(path):
        result["score"] = float(result["score"])
        result["method"] = str(result["method"])
    return result


def _read_predictions(item: Item) -> list[dict[str, Any]]:
    path = item.folder / PREDICTIONS
    if item.result is None or item.result.get("type") != "regression" or not path.is_file():
        return []  # only the scatter of a regression needs them
    _check_attached(item, PREDICTIONS)
    with reading(path):
        if path.stat().st_size > LARGEST_PREDICTIONS:
            raise StorageError(f"{path} is damaged: expected at most {LARGEST_PREDICTIONS:,} bytes of predictions")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is not a JSON object")
    return rows


def _check_attached(item: Item, name: str) -> None:
    if item.manifest is not None and name in item.manifest.attached:
        check_file(item.folder, name, item.manifest.attached[name])


# -- the page ---------------------------------------------------------------------------------------------------------

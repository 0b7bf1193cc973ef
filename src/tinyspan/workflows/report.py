"""One self-contained page about recorded runs, bases, adapters and results, alone or side by side."""

import base64
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

from tinyspan import analysis, plots
from tinyspan.analysis import Comparison, Plane, Surface
from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, StorageError
from tinyspan.io.folders import MARKER, check_place, is_unfinished
from tinyspan.io.storage import MANIFEST, Manifest, check_file, read_json, read_manifest, reading, replacing
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.inspect import describe
from tinyspan.workflows.repeat import commands

__all__ = ["Item", "SurfaceOf", "check_page", "opened_items", "write_report"]

RESULT, PREDICTIONS = "result.json", "predictions.jsonl"
MARK = '<meta name="generator" content="tinyspan">'
COMPARED_RANK = 8  # directions of a block whose angles are computed
LARGEST_PREDICTIONS = 1 << 28  # bytes of predictions that are read

SurfaceOf = Callable[["Item", Plane], Surface]
NAMES = {"trajectory": "recorded run", "basis": "basis", "adapter": "adapter", "result": "result"}


@dataclass
class Item:
    """A folder of which a page tells.

    Attributes:
        folder: the folder.
        kind: `trajectory`, `basis`, `adapter`, or `result` for a folder with `result.json` only.
        name: the folder's name, or more of its path where several have the same.
        manifest: manifest of the folder; None for a result.
        source: the opened trajectory, basis or adapter; None for a result.
        result: content of `result.json`, if there is one.
        predictions: lines of `predictions.jsonl`, if there is one.
    """

    folder: Path
    kind: str
    name: str = ""
    manifest: Manifest | None = None
    source: Trajectory | Basis | OpenedAdapter | None = None
    result: Mapping[str, Any] | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list)


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
        InputError: a folder is given twice, does not exist, holds unfinished work, or is no trajectory, basis, adapter
            or result; the message says what it is.
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
    if not (folder / MANIFEST).is_file():
        if not (folder / RESULT).is_file():
            raise InputError(f"{folder} is no trajectory, basis, adapter or result: {_what_it_is(folder)}")
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
    if item.result is None or not path.is_file():
        return []
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


@dataclass
class Section:
    """A section of the page: its heading and its parts, each of which has a kind that the template knows."""

    title: str
    parts: list[dict[str, Any]]


def write_report(
    output: Path,
    folders: Sequence[Path],
    *,
    title: str | None = None,
    lead: Sequence[str] = (),
    surface_of: SurfaceOf | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write one HTML page, which needs no other file, about trajectories, bases, adapters and results.

    What a folder does not contain is left out: a basis has no score, and older results have no confusion matrix. What
    cannot be compared is left out as well, and the page says why.

    Args:
        output: the file to write.
        folders: the folders, in the order in which the page shows them.
        title: heading of the page; by default the names of the folders.
        lead: paragraphs below the heading, before one sentence about each folder.
        surface_of: function that computes the loss around the path of a trajectory in a plane; see `loss_around`.
        overwrite: replace an earlier page.
        say: function that gets a message before each section is drawn.

    Raises:
        InputError: a folder cannot be reported on, or the file cannot be written; nothing is written.
        StorageError: a file is damaged.
    """
    check_page(output, overwrite, folders)
    items = opened_items(folders)
    page = _Page(items, surface_of)
    sections = []
    for name, build in (
        ("Results", page.results),
        ("Learning curves", page.curves),
        ("Directions", page.spectra),
        ("Path", page.paths),
        ("Runs compared", page.comparisons),
        ("Where the update sits", page.updates),
        ("Predictions", page.predictions),
        ("What was trained and what it cost", page.costs),
        ("How to repeat it", page.repeat),
        ("What this page leaves out", page.omissions),
    ):
        say(name.lower())
        if parts := list(build()):
            sections.append(Section(name, parts))
    environment = Environment(
        loader=PackageLoader("tinyspan.workflows", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    named = " and ".join(part for part in (", ".join(item.name for item in items[:-1]), items[-1].name) if part)
    kinds = NAMES[items[0].kind].capitalize() if len(items) == 1 else "Side by side:"
    sentences = [_sentence(item) for item in items]
    text = environment.get_template("report.html.j2").render(
        title=title or f"{kinds} {named}", lead=lead, sentences=sentences, sections=sections
    )
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


class _Page:
    """The sections of a page; each is a generator of its parts."""

    def __init__(self, items: Sequence[Item], surface_of: SurfaceOf | None) -> None:
        self.items, self.surface_of = items, surface_of
        self.scored = [item for item in items if item.result is not None]
        self.omitted: list[str] = []

    # -- results ------------------------------------------------------------------------------------------------------

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the scores as bars, and the table of methods."""
        pictures = []
        for (task, metric), group in _groups(self.scored):
            if len(group) > 1:
                rows, names = [_result(item) for item in group], [item.name for item in group]
                stated = ", ".join(f"{item.name} {_score(_result(item))}" for item in group)
                pictures.append(
                    _picture(
                        partial(plots.scores, rows, labels=names),
                        f"Bars of the held-out {metric} on {task}: {stated}",
                        f"Held-out {metric} on {task}.",
                        height=1.3 + 0.42 * len(rows),
                    )
                )
        if pictures:
            yield _pictures(pictures)
        if not self.scored:
            return
        yield _table(
            [
                "",
                "score",
                "95 % interval",
                "numbers in z",
                "trained directly",
                "seconds",
                "memory",
                "method",
                "scored by",
            ],
            [
                [
                    item.name,
                    f"{row['score']:.4f}",
                    _interval(row),
                    _count(row.get("subspace_parameters")),
                    _count(row.get("ordinary_parameters")),
                    "" if row.get("seconds") is None else f"{row['seconds']:,.0f}",
                    _bytes(row.get("peak_memory_bytes")),
                    row["method"],
                    f"{row['metric']} on {row['task']}",
                ]
                for item in self.scored
                for row in [_result(item)]
            ],
        )
        yield _text(
            "Scores are on held-out rows. The interval covers the choice of these rows, and not what another seed "
            "would change. Seconds are of training and scoring, memory is the peak of the process or the accelerator.",
            soft=True,
        )
        if remarks := [f"{item.name}: {text}." for item in self.scored for text in _remarks(_result(item))]:
            yield {"kind": "list", "lines": remarks}
        for item in self.scored:
            metrics, intervals = _result(item).get("metrics") or {}, _result(item).get("intervals") or {}
            if metrics:
                lines = [
                    [name, f"{value:.4f}", _range(intervals.get(name))]
                    for name, value in metrics.items()
                    if _is_number(value)
                ]
                yield _table(["metric", "value", "95 % interval"], lines, summary=f"All metrics of {item.name}")

    def curves(self) -> Iterator[dict[str, Any]]:
        """Yield the learning curves of the results of each task."""
        pictures = []
        for (task, metric), group in _groups(self.scored):
            rows, names = [_result(item) for item in group], [item.name for item in group]
            for key, words in (
                ("score", f"held-out {metric}"),
                ("train_loss", "training loss"),
                ("validation_loss", "held-out loss"),
            ):
                if not any(key in entry for row in rows for entry in row.get("history", ())):
                    continue
                last = ", ".join(
                    f"{name} {row['history'][-1][key]:.3f}"
                    for name, row in zip(names, rows, strict=True)
                    if row.get("history") and key in row["history"][-1]
                )
                pictures.append(
                    _picture(
                        partial(plots.learning_curves, rows, key=key, labels=names),
                        f"Curves of the {words} on {task} after each epoch" + (f"; at the end {last}" if last else ""),
                        f"{words.capitalize()} on {task} after each epoch.",
                    )
                )
        if pictures:
            yield _pictures(pictures)

    # -- directions ---------------------------------------------------------------------------------------------------

    def spectra(self) -> Iterator[dict[str, Any]]:
        """Yield the spectrum of every trajectory and basis, each once."""
        pictures: list[dict[str, Any]] = []
        recorded = {item.source.content_hash() for item in self.items if isinstance(item.source, Trajectory)}
        shown: set[str] = set()
        for item in self.items:
            source = item.source
            if isinstance(source, OpenedAdapter):
                try:
                    source = source.stored_basis
                except (InputError, StorageError) as error:
                    self.omitted.append(f"The spectrum of {item.name}: {error}.")
                    continue
            if source is None or (key := source.content_hash()) in shown:
                continue
            shown.add(key)
            if isinstance(source, Basis) and (
                recorded & {*source.parents} or not any(map(len, source.spectrum.values()))
            ):
                continue  # shown for its trajectory, or has none
            try:
                values = analysis.spectra(source)
            except InputError as error:
                self.omitted.append(f"The spectrum of {item.name}: {error}.")
                continue
            pictures += _spectrum_pictures(item.name, source, values)
        if pictures:
            yield _text(
                "How far each block moved along its first direction, its second, and so on. A steep drop means that "
                "the path of the block is almost a straight line."
            )
            yield _pictures(pictures)

    def paths(self) -> Iterator[dict[str, Any]]:
        """Yield the path of every trajectory in its plane, and those of runs from one theta_0 in a common plane."""
        pictures = []
        runs = [item for item in self.items if isinstance(item.source, Trajectory)]
        for item in runs:
            if flat := self._plane([item]):
                surface = None if self.surface_of is None else self.surface_of(item, flat)
                over = ", over the training loss in this plane (darker is lower)" if surface is not None else ""
                pictures.append(
                    _picture(
                        partial(plots.path, flat, surface=surface),
                        f"Path of {item.name} from theta_0 in the plane of its two main directions{over}; the plane "
                        f"holds {flat.explained:.0%} of the squared distances",
                        f"{item.name}: all blocks together, in the plane of the two main directions{over}.",
                        height=3.9,
                    )
                )
        for group in self._from_one_start(runs):
            if len(group) > 1 and (flat := self._plane(group)):
                names = [item.name for item in group]
                pictures.append(
                    _picture(
                        partial(plots.path, flat, labels=names),
                        f"Paths of {', '.join(names)} from the same theta_0 in one plane; it holds "
                        f"{flat.explained:.0%} of the squared distances",
                        f"{', '.join(names)} in the plane in which they move most together.",
                        height=3.9,
                    )
                )
        if pictures:
            yield _pictures(pictures)

    def _plane(self, group: Sequence[Item]) -> Plane | None:
        try:
            return analysis.plane(*(item.source for item in group if isinstance(item.source, Trajectory)))
        except InputError as error:
            self.omitted.append(f"The path of {', '.join(item.name for item in group)}: {error}.")
            return None

    def _from_one_start(self, runs: Sequence[Item]) -> list[list[Item]]:
        """Group runs by theta_0; say which of them start elsewhere."""
        groups: dict[str, list[Item]] = {}
        for item in runs:
            groups.setdefault(_start(item), []).append(item)
        if len(groups) > 1:
            apart = "; ".join(", ".join(item.name for item in group) for group in groups.values())
            self.omitted.append(f"One plane for all runs: they start from different weights ({apart}).")
        return list(groups.values())

    def comparisons(self) -> Iterator[dict[str, Any]]:
        """Yield angles and cosines of pairs: all of at most three folders, otherwise the first with each other one."""
        items = [item for item in self.items if item.source is not None]
        pairs = [(a, b) for index, a in enumerate(items) for b in items[index + 1 :]]
        if len(items) > 3:
            pairs = [(items[0], other) for other in items[1:]]
        parts: list[dict[str, Any]] = []
        for a, b in pairs:
            assert a.source is not None
            assert b.source is not None
            try:
                rows = analysis.compare(a.source, b.source, COMPARED_RANK)
            except InputError as error:
                self.omitted.append(f"{a.name} and {b.name} compared: {error}.")
                continue
            if not any(len(row.angles) or row.cosine is not None for row in rows):
                self.omitted.append(f"{a.name} and {b.name} compared: the blocks of one of them were not trained.")
                continue
            parts += _comparison(a.name, b.name, rows)
        if parts:
            yield _text(
                f"By block, with the first {COMPARED_RANK} directions of each. Small principal angles mean common "
                "directions; random directions are at almost 90 degrees. The cosine is that of the two updates, and a "
                "share is the part of the squared norm of one update that lies in the other's directions."
            )
            yield from parts

    def updates(self) -> Iterator[dict[str, Any]]:
        """Yield where the update of every trajectory and adapter sits, and its outliers."""
        parts: list[dict[str, Any]] = []
        for item in self.items:
            source = item.source
            if source is None or isinstance(source, Basis):
                continue
            try:
                blocks = len(source.partition)
                norms = analysis.component_norms(source)
                if not any(row.norm for row in norms):
                    self.omitted.append(f"The update of {item.name}: it is zero, since the blocks were not trained.")
                    continue
                parts.append({"kind": "heading", "text": item.name})
                parts.append(_pictures(_update_pictures(item.name, source, norms, blocks)))
            except InputError as error:
                self.omitted.append(f"The update of {item.name}: {error}.")
        if parts:
            yield _text(
                "The update is theta - theta_0 at the end of a run, and V z of an adapter. Outliers are coordinates "
                "that are more than three standard deviations of their block from its mean; a Gaussian vector has "
                "0.27 % of them, which is 1.0 in the picture."
            )
            yield from parts

    # -- predictions --------------------------------------------------------------------------------------------------

    def predictions(self) -> Iterator[dict[str, Any]]:
        """Yield the confusion matrix or the scatter, the calibration, and the scores by label, of every result."""
        pictures, tables = [], []
        for item in self.scored:
            row = _result(item)
            if row.get("confusion_matrix"):
                right = sum(line[index] for index, line in enumerate(row["confusion_matrix"]))
                total = sum(map(sum, row["confusion_matrix"]))
                side = 2.2 + 0.45 * len(row["labels"])
                pictures.append(
                    _picture(
                        partial(plots.confusion_matrix, row),
                        f"Confusion matrix of {item.name}: {right:,} of {total:,} held-out rows on the diagonal",
                        f"{item.name}: held-out rows by label and prediction; colours are shares of the row.",
                        width=min(max(side + 0.8, 4.4), 9.0),
                        height=min(side, 8.0),
                    )
                )
            if (row.get("calibration") or {}).get("bins"):
                pictures.append(
                    _picture(
                        partial(plots.calibration, row),
                        f"Calibration of {item.name}: expected calibration error {row['calibration']['ece']:.3f}",
                        f"{item.name}: accuracy against confidence; the area of a point grows with its rows.",
                    )
                )
            if item.predictions and all(_is_number(line.get("label")) for line in item.predictions):
                pictures.append(
                    _picture(
                        partial(plots.scatter, item.predictions),
                        f"Predictions of {item.name} against the labels of {len(item.predictions):,} held-out rows, "
                        f"{row['metric']} {row['score']:.3f}",
                        f"{item.name}: prediction against label of each held-out row.",
                    )
                )
            if row.get("per_class"):
                lines = [
                    [label, *(f"{scores[key]:.3f}" for key in ("precision", "recall", "f1")), f"{scores['rows']:,}"]
                    for label, scores in row["per_class"].items()
                ]
                header = ["label", "precision", "recall", "F1", "rows"]
                tables.append(_table(header, lines, summary=f"Scores of {item.name} by label"))
        if pictures:
            yield _pictures(pictures)
        yield from tables

    # -- cost and commands --------------------------------------------------------------------------------------------

    def costs(self) -> Iterator[dict[str, Any]]:
        """Yield what each folder contains, and the settings and the machine of its run."""
        rows = [dict(_facts(item)) for item in self.items]
        names = list(dict.fromkeys(name for row in rows for name in row))
        common = [name for name in names if len({row[name] for row in rows if name in row}) == 1]
        if len(rows) > 1 and common:
            values = [[name, next(row[name] for row in rows if name in row)] for name in common]
            yield _table(["", "the same in all that have it"], values, words=True)
            names = [name for name in names if name not in common]
        yield _table(
            ["", *(item.name for item in self.items)],
            [[name, *(row.get(name, "") for row in rows)] for name in names],
            words=True,
        )
        machines = {row[name] for row in rows for name in ("machine",) if name in row}
        if len(machines) > 1:
            yield _text("The machines differ, so the times cannot be compared.")

    def repeat(self) -> Iterator[dict[str, Any]]:
        """Yield the commands that make each folder again."""
        yield _text(
            "The commands follow from what the folders contain. Where the rows came from a folder of your own, add "
            "--data DIR.",
            soft=True,
        )
        yield {"kind": "code", "text": "\n\n".join(commands(self.items))}

    def omissions(self) -> Iterator[dict[str, Any]]:
        """Yield why something is left out."""
        if self.omitted:
            yield {"kind": "list", "lines": [text.replace("..", ".") for text in self.omitted]}


# -- parts ------------------------------------------------------------------------------------------------------------


def _sentence(item: Item) -> str:
    """Return what a folder holds, and its score, in one or two sentences."""
    source, result = item.source, item.result
    if isinstance(source, Trajectory):
        blocks = f"{len(source.partition)} blocks with {source.partition.numel:,} numbers"
        text = f"{item.name}: a run recorded at {len(source)} points, {blocks}."
    elif isinstance(source, Basis):
        directions = f"up to {source.rank} directions in each of {len(source.partition)} blocks"
        text = f"{item.name}: a basis with {directions}, {source.partition.numel:,} numbers in all."
    elif isinstance(source, OpenedAdapter):
        text = f"{item.name}: an adapter of {len(source.partition)} blocks with {source.partition.numel:,} numbers."
    else:
        text = f"{item.name}: a result alone, without weights."
    if result is None:
        return text if isinstance(source, Basis) else f"{text} It has no result.json, so nothing is known of its score."
    rows = (result.get("rows") or {}).get("validation")
    interval = _interval(result)
    score = f"{result['metric']} {_score(result)}" + (f" (95 % interval {interval})" if interval else "")
    on = f"{result['task']}" + (f", {rows:,} held-out rows" if rows else "")
    trained = ""
    if result.get("subspace_parameters") is not None and item.kind == "adapter":
        trained = (
            f" It trains {result['subspace_parameters']:,} numbers in z and {result['ordinary_parameters']:,} weights "
            "directly."
        )
    return f"{text}{trained} Method {result['method']}, model {result.get('model')}: {score} on {on}."


def _facts(item: Item) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe a folder and its run."""
    if item.manifest is not None:
        for name, value in describe(item.folder)[0]:
            if name not in ("run", "score", "whole", "made by") and not name.startswith("sigma of "):
                whole = item.source.content_hash() if isinstance(item.source, Trajectory) else value  # with its points
                yield name, f"{whole[:12]}..." if name == "hash" else value
    else:
        yield "kind", "result"
    if (row := item.result) is None:
        yield "versions", _pairs(item.manifest.versions if item.manifest else {})
        return
    yield "run", f"{row['method']} on {row['task']}, seed {row.get('seed')}, {row.get('epochs')} epochs"
    rows = row.get("rows") or {}
    yield "rows", f"{rows.get('train', 0):,} to train on, {rows.get('validation', 0):,} held out"
    yield "numbers in z", _count(row.get("subspace_parameters"))
    yield "weights trained directly", _count(row.get("ordinary_parameters"))
    yield "time", f"{row['seconds']:,.1f} s" if row.get("seconds") is not None else ""
    yield "peak memory", _bytes(row.get("peak_memory_bytes"))
    settings = {name: value for name, value in (row.get("settings") or {}).items() if value not in (None, {}, [])}
    yield "settings", _pairs(settings)
    if hardware := row.get("hardware"):
        cpus = f"{hardware.get('threads')} of {hardware.get('cpus')} {hardware.get('machine')} CPU threads"
        yield "machine", f"{hardware['device']}" if hardware.get("device") else cpus
    yield "versions", _pairs(row.get("versions") or {})


def _comparison(a: str, b: str, rows: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    pictures = []
    if any(len(row.angles) for row in rows):
        smallest = min(float(row.angles.min()) for row in rows if len(row.angles))
        pictures.append(
            _picture(
                partial(plots.angles, rows),
                f"Principal angles between {a} and {b} by block; the smallest is {smallest:.0f} degrees",
                f"Principal angles between {a} and {b}.",
                height=3.3,
                wide=len(rows) > 16,
            )
        )
    if any(value is not None for row in rows for value in (row.cosine, *row.shares)):
        cosines = [row.cosine for row in rows if row.cosine is not None]
        stated = f"; the cosines are from {min(cosines):.2f} to {max(cosines):.2f}" if cosines else ""
        pictures.append(
            _picture(
                partial(plots.cosines, rows),
                f"Cosine of the updates of {a} and {b}, and shares, by block{stated}",
                f"Updates of a = {a} and b = {b}.",
                height=3.3,
                wide=len(rows) > 16,
            )
        )
    if not pictures:
        return
    yield {"kind": "heading", "text": f"{a} and {b}"}
    yield _pictures(pictures)
    labels = plots.block_labels([row.block for row in rows])
    yield _table(
        ["block", "angles", "cosine", "share of a's in b (random)", "share of b's in a (random)", "|a|", "|b|"],
        [
            [
                label,
                f"{row.angles[0]:.1f} to {row.angles[-1]:.1f}" if len(row.angles) else "",
                _decimals(row.cosine),
                *(
                    "" if share is None else f"{share:.3f} ({chance:.1g})"
                    for share, chance in zip(row.shares, row.chance, strict=True)
                ),
                *(_decimals(norm) for norm in row.norms),
            ]
            for label, row in zip(labels, rows, strict=True)
        ],
        summary=f"Numbers by block, a = {a} and b = {b}",
    )


def _spectrum_pictures(name: str, source: Any, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    moving = [spectrum for spectrum in values.values() if spectrum.any()]
    first = [float(analysis.explained_variance(spectrum)[0]) for spectrum in moving]
    drawn = _with_spectrum(source, values)
    return [
        _picture(
            partial(plots.spectrum, drawn),
            f"Singular values of {name} by block, relative to the first",
            f"{name}: singular values, relative to the first.",
        ),
        _picture(
            partial(plots.explained_variance, drawn),
            f"Share of variance that the directions of {name} explain; the first one explains from {min(first):.0%} to "
            f"{max(first):.0%} in a block",
            f"{name}: share of the squared distances that the first directions explain.",
        ),
    ]


def _with_spectrum(source: Any, values: Mapping[str, Any]) -> Basis:
    """Return a basis with singular values that are already computed."""
    return source if isinstance(source, Basis) else Basis(source.partition, {}, spectrum=values, ranks={"": 0})


def _update_pictures(name: str, source: Any, norms: Any, blocks: int) -> list[dict[str, Any]]:
    components = len({row.component for row in norms})
    size = {"width": min(3.0 + 0.42 * blocks, 14.0), "height": min(1.6 + 0.26 * components, 9.0)}
    wide = size["width"] > 8
    furthest = max(norms, key=lambda row: row.per_weight)
    return [
        _picture(
            partial(plots.update_norms, source),
            f"Change of the weights of {name} by component and block; largest in {furthest.block}.{furthest.component}",
            f"{name}: how far a weight of each component moved, compared with the average weight.",
            wide=wide,
            **{**size, "width": max(size["width"], 4.8)},
        ),
        _picture(
            partial(plots.outliers, source),
            f"Share of outliers in the update of {name} by component and block",
            f"{name}: outliers by component and block.",
            wide=wide,
            **{**size, "width": max(size["width"], 4.8)},
        ),
        _picture(
            partial(plots.envelopes, source),
            f"Largest entries along the update of each block of {name}, in standard deviations",
            f"{name}: the update along each block, from its first weight to its last.",
            height=min(1.4 + 0.45 * blocks, 12.0),
        ),
    ]


def _picture(
    draw: Callable[..., Any],
    alt: str,
    caption: str,
    *,
    width: float = 4.8,
    height: float = 3.4,
    wide: bool = False,
) -> dict[str, Any]:
    """Draw a picture and return it as a figure of the page, embedded as SVG."""
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(ax=figure.subplots())
    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "tinyspan"}):
        figure.savefig(data, format="svg", metadata={"Date": None}, dpi=160)
    source = "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
    return {"source": source, "alt": f"{alt}.", "caption": caption, "wide": wide}


def _pictures(pictures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"kind": "pictures", "pictures": pictures}


def _text(text: str, *, soft: bool = False) -> dict[str, Any]:
    return {"kind": "text", "text": text, "soft": soft}


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, summary: str | None = None, words: bool = False
) -> dict[str, Any]:
    return {"kind": "table", "header": header, "rows": rows, "summary": summary, "words": words}


def _groups(items: Sequence[Item]) -> list[tuple[tuple[str, str], list[Item]]]:
    """Group results by task and metric, which can be drawn on one axis."""

    def key(item: Item) -> tuple[str, str]:
        return str(_result(item)["task"]), str(_result(item)["metric"])

    order = list(dict.fromkeys(map(key, items)))
    ordered = sorted(items, key=lambda item: order.index(key(item)))
    return [(name, list(group)) for name, group in groupby(ordered, key)]


def _result(item: Item) -> Mapping[str, Any]:
    assert item.result is not None
    return item.result


def _start(item: Item) -> str:
    """Return what identifies theta_0 and the parameters of a trajectory."""
    assert item.manifest is not None
    return json.dumps([item.manifest.partition, item.manifest.fingerprint], sort_keys=True)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _remarks(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a score is compared with, and the notes of the run."""
    if result.get("majority") is not None and result["metric"] == "accuracy":
        yield f"predicting the most frequent label for every row has an accuracy of {result['majority']:.3f}"
    if result.get("best_epoch") is not None:
        yield f"the score is that of epoch {result['best_epoch']:g}, the best on the set-aside rows"
    yield from map(str, result.get("notes") or ())


def _score(result: Mapping[str, Any]) -> str:
    return f"{result['score']:.3f}"


def _interval(result: Mapping[str, Any]) -> str:
    return _range(analysis.score_interval(result))


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _bytes(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:,.0f} MB"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

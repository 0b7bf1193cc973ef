"""One self-contained page about recorded runs, bases, adapters and results, alone or side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tinyspan import analysis, plots
from tinyspan.analysis import Plane, Surface
from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, StorageError
from tinyspan.io.storage import replacing
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.report.combined import combined_parts
from tinyspan.workflows.report.items import NAMES, Item, check_page, opened_items
from tinyspan.workflows.report.parts import (
    comparison_parts,
    count_of,
    curvature_parts,
    facts_of,
    groups_of,
    interval_of,
    is_number,
    picture,
    pictures_part,
    range_of,
    remarks_on,
    result_of,
    score_of,
    sentence_of,
    size_of,
    spectrum_pictures,
    start_of,
    table_part,
    text_part,
    update_pictures,
)
from tinyspan.workflows.report.repeat import commands

__all__ = ["SurfaceOf", "write_report"]

COMPARED_RANK = 8  # directions of a block whose angles are computed
SurfaceOf = Callable[["Item", Plane], Surface]


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
    """Write one HTML page, which needs no other file, about runs, bases, adapters, results, curvatures, combinations.

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
        ("Curvature", page.curvatures),
        ("Combination", page.combinations),
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
        loader=PackageLoader("tinyspan.workflows.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    named = " and ".join(part for part in (", ".join(item.name for item in items[:-1]), items[-1].name) if part)
    kinds = NAMES[items[0].kind].capitalize() if len(items) == 1 else "Side by side:"
    sentences = [sentence_of(item) for item in items]
    text = environment.get_template("page.html.j2").render(
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
        for (task, metric), group in groups_of(self.scored):
            if len(group) > 1:
                rows, names = [result_of(item) for item in group], [item.name for item in group]
                stated = ", ".join(f"{item.name} {score_of(result_of(item))}" for item in group)
                pictures.append(
                    picture(
                        partial(plots.scores, rows, labels=names),
                        f"Bars of the held-out {metric} on {task}: {stated}",
                        f"Held-out {metric} on {task}.",
                        height=1.3 + 0.42 * len(rows),
                    )
                )
        if pictures:
            yield pictures_part(pictures)
        if not self.scored:
            return
        measured = [f"{result_of(item)['metric']} on {result_of(item)['task']}" for item in self.scored]
        several = len({*measured}) > 1
        header = ["", "method", "score", "95 % interval", "numbers in z", "trained directly", "seconds", "memory"]
        lines = []
        for item, scored_by in zip(self.scored, measured, strict=True):
            row = result_of(item)
            cells = [
                item.name,
                str(row["method"]),
                f"{row['score']:.4f}",
                interval_of(row),
                count_of(row.get("subspace_parameters")),
                count_of(row.get("ordinary_parameters")),
                "" if row.get("seconds") is None else f"{row['seconds']:,.0f}",
                size_of(row.get("peak_memory_bytes")),
            ]
            lines.append([*cells, scored_by] if several else cells)
        yield table_part([*header, "score of"] if several else header, lines)
        yield text_part(
            "Scores are on held-out rows. The interval covers the choice of these rows, and not what another seed "
            "would change. Seconds are of training and scoring, memory is the peak of the process or the accelerator.",
            soft=True,
        )
        remarks: dict[str, list[str]] = {}
        for item in self.scored:
            for text in remarks_on(result_of(item)):
                remarks.setdefault(text, []).append(item.name)
        if remarks:
            yield {"kind": "list", "lines": [f"{', '.join(names)}: {text}." for text, names in remarks.items()]}
        for item in self.scored:
            metrics, intervals = result_of(item).get("metrics") or {}, result_of(item).get("intervals") or {}
            if metrics:
                lines = [
                    [name, f"{value:.4f}", range_of(intervals.get(name))]
                    for name, value in metrics.items()
                    if is_number(value)
                ]
                yield table_part(["metric", "value", "95 % interval"], lines, summary=f"All metrics of {item.name}")

    def curves(self) -> Iterator[dict[str, Any]]:
        """Yield the learning curves of the results of each task."""
        pictures = []
        for (task, metric), group in groups_of(self.scored):
            rows, names = [result_of(item) for item in group], [item.name for item in group]
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
                    picture(
                        partial(plots.learning_curves, rows, key=key, labels=names),
                        f"Curves of the {words} on {task} after each epoch" + (f"; at the end {last}" if last else ""),
                        f"{words.capitalize()} on {task} after each epoch.",
                    )
                )
        if pictures:
            yield pictures_part(pictures)

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
            pictures += spectrum_pictures(item.name, source, values)
        if pictures:
            yield text_part(
                "How far each block moved along its first direction, its second, and so on. A steep drop means that "
                "the path of the block is almost a straight line."
            )
            yield pictures_part(pictures)

    def paths(self) -> Iterator[dict[str, Any]]:
        """Yield the path of every trajectory in its plane, and those of runs from one theta_0 in a common plane."""
        pictures = []
        runs = [item for item in self.items if isinstance(item.source, Trajectory)]
        for item in runs:
            if flat := self._plane([item]):
                surface = None if self.surface_of is None else self.surface_of(item, flat)
                over = ", over the training loss in this plane (darker is lower)" if surface is not None else ""
                pictures.append(
                    picture(
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
                    picture(
                        partial(plots.path, flat, labels=names),
                        f"Paths of {', '.join(names)} from the same theta_0 in one plane; it holds "
                        f"{flat.explained:.0%} of the squared distances",
                        f"{', '.join(names)} in the plane in which they move most together.",
                        height=3.9,
                    )
                )
        if pictures:
            yield pictures_part(pictures)

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
            groups.setdefault(start_of(item), []).append(item)
        if len(groups) > 1:
            apart = "; ".join(", ".join(item.name for item in group) for group in groups.values())
            self.omitted.append(f"One plane for all runs: they start from different weights ({apart}).")
        return list(groups.values())

    def curvatures(self) -> Iterator[dict[str, Any]]:
        """Yield the eigenvalues of every curvature, and the loss along eigenvectors."""
        parts = [part for item in self.items if item.curvature for part in curvature_parts(item.name, item.curvature)]
        if parts:
            yield text_part(
                "The Hessian of the mean loss in z, without dropout. Its largest eigenvalue is the sharpness: how fast "
                "the slope changes in the steepest direction. A negative eigenvalue is a direction in which the loss "
                "curves down. The Gauss-Newton matrix leaves out the curvature of the model itself."
            )
            yield from parts

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield the candidates of every combination, their coefficients, and the loss between two models."""
        for item in self.items:
            if item.combined is not None:
                yield from combined_parts(item.name, item.combined)

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
            parts += comparison_parts(a.name, b.name, rows)
        if parts:
            yield text_part(
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
                parts.append(pictures_part(update_pictures(item.name, source, norms, blocks)))
            except InputError as error:
                self.omitted.append(f"The update of {item.name}: {error}.")
        if parts:
            yield text_part(
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
            row = result_of(item)
            if row.get("confusion_matrix"):
                right = sum(line[index] for index, line in enumerate(row["confusion_matrix"]))
                total = sum(map(sum, row["confusion_matrix"]))
                side = 2.2 + 0.45 * len(row["labels"])
                pictures.append(
                    picture(
                        partial(plots.confusion_matrix, row),
                        f"Confusion matrix of {item.name}: {right:,} of {total:,} held-out rows on the diagonal",
                        f"{item.name}: held-out rows by label and prediction; colours are shares of the row.",
                        width=min(max(side + 0.8, 4.4), 9.0),
                        height=min(side, 8.0),
                    )
                )
            if (row.get("calibration") or {}).get("bins"):
                pictures.append(
                    picture(
                        partial(plots.calibration, row),
                        f"Calibration of {item.name}: expected calibration error {row['calibration']['ece']:.3f}",
                        f"{item.name}: accuracy against confidence; the area of a point grows with its rows.",
                    )
                )
            if item.predictions and all(is_number(line.get("label")) for line in item.predictions):
                pictures.append(
                    picture(
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
                tables.append(table_part(header, lines, summary=f"Scores of {item.name} by label"))
        if pictures:
            yield pictures_part(pictures)
        yield from tables

    # -- cost and commands --------------------------------------------------------------------------------------------

    def costs(self) -> Iterator[dict[str, Any]]:
        """Yield what each folder contains, and the settings and the machine of its run."""
        rows = [dict(facts_of(item)) for item in self.items]
        names = list(dict.fromkeys(name for row in rows for name in row))
        common = [name for name in names if len({row[name] for row in rows if name in row}) == 1]
        if len(rows) > 1 and common:
            values = [[name, next(row[name] for row in rows if name in row)] for name in common]
            yield table_part(["", "the same in all that have it"], values, words=True)
            names = [name for name in names if name not in common]
        yield table_part(
            ["", *(item.name for item in self.items)],
            [[name, *(row.get(name, "") for row in rows)] for name in names],
            words=True,
        )
        machines = {row[name] for row in rows for name in ("machine",) if name in row}
        if len(machines) > 1:
            yield text_part("The machines differ, so the times cannot be compared.")

    def repeat(self) -> Iterator[dict[str, Any]]:
        """Yield the commands that make each folder again."""
        yield text_part(
            "The commands follow from what the folders contain. Where the rows came from a folder of your own, add "
            "--data DIR.",
            soft=True,
        )
        yield {"kind": "code", "text": "\n\n".join(commands(self.items))}

    def omissions(self) -> Iterator[dict[str, Any]]:
        """Yield why something is left out."""
        if self.omitted:
            yield {"kind": "list", "lines": [f"{text.rstrip('.')}." for text in self.omitted]}


# -- parts ------------------------------------------------------------------------------------------------------------

"""Parts of a page: sentences, facts, tables and pictures of items, and how numbers are written."""

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from tinyspan import analysis, plots
from tinyspan.analysis import Comparison
from tinyspan.bases.basis import Basis
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.combine.table import combined_facts, combined_sentence
from tinyspan.workflows.inspect import describe
from tinyspan.workflows.report.items import Item

__all__ = [
    "comparison_parts",
    "count_of",
    "curvature_parts",
    "facts_of",
    "groups_of",
    "interval_of",
    "is_number",
    "picture",
    "pictures_part",
    "range_of",
    "remarks_on",
    "result_of",
    "score_of",
    "sentence_of",
    "size_of",
    "spectrum_pictures",
    "start_of",
    "table_part",
    "text_part",
    "update_pictures",
]


def sentence_of(item: Item) -> str:
    """Return what a folder holds, and its score, in one or two sentences."""
    source, result = item.source, item.result
    if item.curvature is not None:
        return curvature_sentence(item.name, item.curvature)
    if item.combined is not None:
        return combined_sentence(item.name, item.combined)
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
    interval = interval_of(result)
    score = f"{result['metric']} {score_of(result)}" + (f" (95 % interval {interval})" if interval else "")
    on = f"{result['task']}" + (f", {rows:,} held-out rows" if rows else "")
    trained = ""
    if result.get("subspace_parameters") is not None and item.kind == "adapter":
        trained = (
            f" It trains {result['subspace_parameters']:,} numbers in z and {result['ordinary_parameters']:,} weights "
            "directly."
        )
    return f"{text}{trained} Method {result['method']}, model {result.get('model')}: {score} on {on}."


def facts_of(item: Item) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe a folder and its run."""
    if item.curvature is not None:
        yield from curvature_facts(item.curvature)
        return
    if item.combined is not None:
        yield from combined_facts(item.combined)
        return
    if item.manifest is not None:
        for name, value in describe(item.folder)[0]:
            if name not in ("run", "score", "whole", "made by") and not name.startswith("sigma of "):
                whole = item.source.content_hash() if isinstance(item.source, Trajectory) else value  # with its points
                yield name, f"{whole[:12]}..." if name == "hash" else value
    else:
        yield "kind", "result"
    if (row := item.result) is None:
        yield "versions", pairs_of(item.manifest.versions if item.manifest else {})
        return
    yield "run", f"{row['method']} on {row['task']}, seed {row.get('seed')}, {row.get('epochs')} epochs"
    rows = row.get("rows") or {}
    yield "rows", f"{rows.get('train', 0):,} to train on, {rows.get('validation', 0):,} held out"
    yield "numbers in z", count_of(row.get("subspace_parameters"))
    yield "weights trained directly", count_of(row.get("ordinary_parameters"))
    yield "time", f"{row['seconds']:,.1f} s" if row.get("seconds") is not None else ""
    yield "peak memory", size_of(row.get("peak_memory_bytes"))
    settings = {name: value for name, value in (row.get("settings") or {}).items() if value not in (None, {}, [])}
    yield "settings", pairs_of(settings)
    yield from machine_of(row)


def machine_of(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the machine and the versions of a result."""
    if hardware := row.get("hardware"):
        cpus = f"{hardware.get('threads')} of {hardware.get('cpus')} {hardware.get('machine')} CPU threads"
        yield "machine", f"{hardware['device']}" if hardware.get("device") else cpus
    yield "versions", pairs_of(row.get("versions") or {})


def curvature_sentence(name: str, row: Mapping[str, Any]) -> str:
    """Return what a curvature was computed of, and the sharpness at the last point."""
    what = f"the run {row['run']} at {len(row['points'])} points" if row["kind"] == "trajectory" else str(row["run"])
    split = "training" if row["options"]["split"] == "train" else "held-out"
    return (
        f"{name}: the curvature of the loss of {what}, in {row['K']} coordinates, on {row['rows']:,} {split} rows of "
        f"{row['task']}. Sharpness {row['points'][-1]['sharpness']:.4g} at the end."
    )


def curvature_facts(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe a curvature."""
    yield "kind", "curvature"
    yield "run", str(row["run"])
    yield "coordinates", f"{row['K']} in {len(row['blocks'])} blocks"
    yield "options", pairs_of({name: value for name, value in row["options"].items() if value is not None})
    yield "time", f"{row['seconds']:,.1f} s"
    yield from machine_of(row)


def curvature_parts(name: str, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the pictures and the table of a curvature."""
    points = row["points"]
    first, last = points[0], points[-1]
    over = "at the points of" if len(points) > 1 else "at the z of"
    worst = max(point["asymmetry"] for point in points)
    yield pictures_part(
        [
            picture(
                partial(plots.eigenvalues, row),
                f"Eigenvalues of the Hessian {over} {name}; the largest goes from {first['sharpness']:.4g} to "
                f"{last['sharpness']:.4g}",
                f"{name}: eigenvalues of the Hessian of the mean loss in z.",
            ),
            picture(
                partial(plots.loss_along, row),
                f"Loss of {name} along eigenvectors of the Hessian through the last point, with the quadratic",
                f"{name}: the loss along eigenvectors through the last point; dashed, what the Hessian predicts.",
            ),
        ]
    )
    header = ["steps", "distance", "share in the span", "loss", "|gradient|", "row gradient", "sharpness", "lowest"]
    yield table_part(
        [*header, "trace", "Gauss-Newton"],
        [
            [
                count_of(point["step"]),
                f"{point['distance']:.3f}",
                decimals_of(point["share"]),
                f"{point['loss']:.4f}",
                *(f"{value:.3g}" for value in (point["gradient_norm"], point["row_gradients"]["median"])),
                *(f"{value:.4g}" for value in (point["sharpness"], point["hessian"][-1], point["trace"])),
                f"{point['gauss_newton'][0]:.4g}" if point["gauss_newton"] else "",
            ]
            for point in points
        ],
    )
    error = f"the Hessians as computed differ from their transposes by up to {2 * worst:.1g} of their largest number"
    yield {"kind": "list", "lines": [f"{name}: {note}." for note in (*row["notes"], error)]}


def comparison_parts(a: str, b: str, rows: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    """Yield pictures and a table of two runs compared block by block."""
    pictures = []
    if any(len(row.angles) for row in rows):
        smallest = min(float(row.angles.min()) for row in rows if len(row.angles))
        pictures.append(
            picture(
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
            picture(
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
    yield pictures_part(pictures)
    labels = plots.block_labels([row.block for row in rows])
    yield table_part(
        ["block", "angles", "cosine", "share of a's in b (random)", "share of b's in a (random)", "|a|", "|b|"],
        [
            [
                label,
                f"{row.angles[0]:.1f} to {row.angles[-1]:.1f}" if len(row.angles) else "",
                decimals_of(row.cosine),
                *(
                    "" if share is None else f"{share:.3f} ({chance:.1g})"
                    for share, chance in zip(row.shares, row.chance, strict=True)
                ),
                *(decimals_of(norm) for norm in row.norms),
            ]
            for label, row in zip(labels, rows, strict=True)
        ],
        summary=f"Numbers by block, a = {a} and b = {b}",
    )


def spectrum_pictures(name: str, source: Any, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pictures of the spectrum of directions."""
    moving = [spectrum for spectrum in values.values() if spectrum.any()]
    first = [float(analysis.explained_variance(spectrum)[0]) for spectrum in moving]
    drawn = with_spectrum(source, values)
    return [
        picture(
            partial(plots.spectrum, drawn),
            f"Singular values of {name} by block, relative to the first",
            f"{name}: singular values, relative to the first.",
        ),
        picture(
            partial(plots.explained_variance, drawn),
            f"Share of variance that the directions of {name} explain; the first one explains from {min(first):.0%} to "
            f"{max(first):.0%} in a block",
            f"{name}: share of the squared distances that the first directions explain.",
        ),
    ]


def with_spectrum(source: Any, values: Mapping[str, Any]) -> Basis:
    """Return a basis with singular values that are already computed."""
    return source if isinstance(source, Basis) else Basis(source.partition, {}, spectrum=values, ranks={"": 0})


def update_pictures(name: str, source: Any, norms: Any, blocks: int) -> list[dict[str, Any]]:
    """Return the pictures of where an update sits."""
    components = len({row.component for row in norms})
    size = {"width": min(3.0 + 0.42 * blocks, 14.0), "height": min(1.6 + 0.26 * components, 9.0)}
    wide = size["width"] > 8
    furthest = max(norms, key=lambda row: row.per_weight)
    return [
        picture(
            partial(plots.update_norms, source),
            f"Change of the weights of {name} by component and block; largest in {furthest.block}.{furthest.component}",
            f"{name}: how far a weight of each component moved, compared with the average weight.",
            wide=wide,
            **{**size, "width": max(size["width"], 4.8)},
        ),
        picture(
            partial(plots.outliers, source),
            f"Share of outliers in the update of {name} by component and block",
            f"{name}: outliers by component and block.",
            wide=wide,
            **{**size, "width": max(size["width"], 4.8)},
        ),
        picture(
            partial(plots.envelopes, source),
            f"Largest entries along the update of each block of {name}, in standard deviations",
            f"{name}: the update along each block, from its first weight to its last.",
            height=min(1.4 + 0.45 * blocks, 12.0),
        ),
    ]


def picture(
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


def pictures_part(pictures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of a page with pictures."""
    return {"kind": "pictures", "pictures": pictures}


def text_part(text: str, *, soft: bool = False) -> dict[str, Any]:
    """Return the part of a page with a paragraph."""
    return {"kind": "text", "text": text, "soft": soft}


def table_part(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, summary: str | None = None, words: bool = False
) -> dict[str, Any]:
    """Return the part of a page with a table."""
    return {"kind": "table", "header": header, "rows": rows, "summary": summary, "words": words}


def groups_of(items: Sequence[Item]) -> list[tuple[tuple[str, str], list[Item]]]:
    """Group results by task and metric, which can be drawn on one axis."""

    def key(item: Item) -> tuple[str, str]:
        return str(result_of(item)["task"]), str(result_of(item)["metric"])

    order = list(dict.fromkeys(map(key, items)))
    ordered = sorted(items, key=lambda item: order.index(key(item)))
    return [(name, list(group)) for name, group in groupby(ordered, key)]


def result_of(item: Item) -> Mapping[str, Any]:
    """Return an item's result, which exists."""
    assert item.result is not None
    return item.result


def start_of(item: Item) -> str:
    """Return what identifies theta_0 and the parameters of a trajectory."""
    assert item.manifest is not None
    return json.dumps([item.manifest.partition, item.manifest.fingerprint], sort_keys=True)


def pairs_of(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def remarks_on(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a score is compared with, and the notes of the run."""
    if result.get("majority") is not None and result["metric"] == "accuracy":
        yield f"predicting the most frequent label for every row has an accuracy of {result['majority']:.3f}"
    if result.get("best_epoch") is not None:
        yield f"the score is that of epoch {result['best_epoch']:g}, the best on the set-aside rows"
    yield from map(str, result.get("notes") or ())


def score_of(result: Mapping[str, Any]) -> str:
    """Return a score with three decimals."""
    return f"{result['score']:.3f}"


def interval_of(result: Mapping[str, Any]) -> str:
    """Return the interval of a score."""
    return range_of(analysis.score_interval(result))


def range_of(interval: Sequence[float] | None) -> str:
    """Return an interval with three decimals; empty without one."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def count_of(number: int | None) -> str:
    """Return a number with separators; empty without one."""
    return "" if number is None else f"{number:,}"


def size_of(number: int | None) -> str:
    """Return a number of bytes in MB; empty without one."""
    return "" if number is None else f"{number / 1e6:,.0f} MB"


def decimals_of(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

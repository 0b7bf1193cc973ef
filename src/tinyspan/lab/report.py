"""The page of the demo: one HTML file that contains all figures."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tinyspan.bases.basis import Basis
from tinyspan.io.storage import replacing
from tinyspan.lab.figures import wilson_interval

__all__ = ["write_report"]

FIGURES = ("comparison", "curves", "spectrum", "path", "extremes")


def write_report(output: Path, results: Sequence[Mapping[str, Any]], basis: Basis) -> None:
    """Write `report.html` from the results and the SVG files in `figures/`."""
    environment = Environment(loader=PackageLoader("tinyspan.lab", "."), autoescape=True, undefined=StrictUndefined)
    by_method = {result["method"]: result for result in results}
    rows = [
        {**result, "interval": wilson_interval(result["score"], result["rows"]["validation"])} for result in results
    ]
    page = environment.get_template("report.html.j2").render(
        results=rows,
        best=by_method["full"],
        ours=by_method["intrinsic"],
        random=by_method["random"],
        freeze=by_method["freeze"],
        gap=by_method["full"]["score"] - by_method["intrinsic"]["score"],
        layers=len(basis.partition),
        rank=basis.rank,
        layer_size=basis.partition.blocks[0].numel,
        basis=basis,
        figures={name: _embed(output / "figures" / f"{name}.svg") for name in FIGURES},
    )
    with replacing(output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _embed(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()

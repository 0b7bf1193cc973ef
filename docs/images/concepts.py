"""Draw concepts.svg, a sketch: blocks of a model at the left, one block's path, directions and z at the right.

Run `python docs/images/concepts.py`.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "tinyspan"  # the same file every time
BLUE, GREY, RED = "#2166ac", "#bdbdbd", "#b2182b"


def model(axes: Axes) -> None:
    """Draw the layers as boxes, each with its z."""
    parts = ["embeddings", "layer 1", "layer 2", "layer 3", "head"]
    for row, name in enumerate(parts):
        block = name.startswith("layer")
        colour = BLUE if block else GREY
        axes.barh(row, 1.0, height=0.72, color=colour, alpha=0.85 if block else 0.6)
        axes.text(0.5, row, name, ha="center", va="center", color="white" if block else "black")
        if block:
            number = name[-1]
            axes.annotate("", xy=(1.03, row), xytext=(1.42, row), arrowprops={"arrowstyle": "->", "color": BLUE})
            axes.text(1.46, row, f"$z_{number}$: k numbers", va="center", color=BLUE)
            axes.text(1.22, row + 0.13, f"$V_{number}$", ha="center", color=BLUE)
        else:
            axes.text(1.06, row, "in modules_to_save,\nor frozen", va="center", color="#606060", fontsize=8)
    axes.set(xlim=(0, 2.3), ylim=(-0.6, 4.6), title="a partition: one block per layer")
    axes.axis("off")


def path(axes: Axes) -> None:
    """Draw a path that bends in a plane, the plane's two directions, and a point of it."""
    along = np.linspace(0, 1, 12)
    x, y = 2.6 * along, 1.5 * along**2 + 0.1 * np.sin(9 * along)
    axes.plot(x, y, "o-", color=GREY, markeredgecolor="#606060", label="trajectory: points of the run")
    axes.plot(0, 0, "o", color="black", markersize=9)
    axes.text(0.02, -0.2, r"$\theta_0$, pre-trained", ha="right")
    axes.text(x[-1] + 0.05, y[-1] + 0.12, r"$\theta_t$, fine-tuned", ha="right")
    first = np.array([x[-1], y[-1]]) / np.hypot(x[-1], y[-1])
    second = np.array([first[1], -first[0]])
    for name, direction in (("$v_1$", first), ("$v_2$", second * 0.6)):
        axes.annotate("", xy=direction, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 2})
        axes.text(direction[0] + 0.04, direction[1] + 0.1, name, color=BLUE)
    point = 2.2 * first + 0.35 * second
    for start, stop in (((0, 0), 2.2 * first), (2.2 * first, point)):
        axes.plot(*zip(start, stop, strict=True), ":", color=RED)
    axes.plot(*point, "o", color=RED, markersize=9, label=r"$\theta_0 + V z$: what is trained")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.set(xlim=(-0.9, 3.0), ylim=(-0.75, 2.3), title="one block: basis $V = (v_1, v_2)$ and $z$")
    axes.axis("off")


if __name__ == "__main__":
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    model(left)
    path(right)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})

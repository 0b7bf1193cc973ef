"""Figures of what stands still or is sick: drawn without NaN, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from towers import Tower

from tinyspan import Basis, InputError, SubspaceModel, by_layer
from tinyspan.lab import figures
from tinyspan.lab.demo import update_profile

PATH = np.array([[0.0, 0.0], [1.0, 1.0]])


def drawn(figure: Any, folder: Path) -> Any:
    with np.errstate(all="raise"):
        figures.save(figure, folder, "figure")
    return figure


def points(axes: Any) -> np.ndarray:
    return np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])


def test_a_layer_that_stands_still_is_named_but_not_drawn(tmp_path: Path) -> None:
    with np.errstate(all="raise"):
        figure = figures.spectrum({"layer 1": np.array([2.0, 1.0, 0.0]), "layer 2": np.zeros(3)})
    left, right = drawn(figure, tmp_path).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["layer 1", "layer 2 (does not move)"]
    for axes, expected in ((left, [1.0, 0.5, 0.0]), (right, [0.8, 1.0, 1.0])):
        np.testing.assert_allclose(points(axes), expected)


def test_an_update_of_zeros_is_flat(tmp_path: Path) -> None:
    model = Tower().float()
    partition = by_layer(model)
    basis = Basis.from_directions(partition, {block.name: torch.eye(1, block.numel) for block in partition})
    profiles, counts, components = update_profile(basis, SubspaceModel(model, basis))  # z is zero
    with np.errstate(all="raise"):
        drawn(figures.extremes(profiles, counts, components, 0.0027), tmp_path)
        drawn(figures.updates({"none": list(profiles.values())}), tmp_path)
    assert not counts.any()


@pytest.mark.parametrize("loss", [np.ones((3, 4)), np.where(np.arange(12) % 5 == 4, np.inf, np.arange(12.0))])
def test_a_flat_loss_or_one_with_holes_can_be_drawn(tmp_path: Path, loss: np.ndarray) -> None:
    grid = np.linspace(0, 1, 4), np.linspace(0, 1, 3)
    drawn(figures.path_in_plane(PATH, *grid, loss.reshape(3, 4), 0.9), tmp_path)
    with pytest.raises(InputError, match="NaN or infinite everywhere"):
        figures.path_in_plane(PATH, *grid, np.full((3, 4), np.nan), 0.9)


@pytest.mark.parametrize(("score", "rows"), [(-0.1, 10), (1.1, 10), (np.nan, 10), (0.5, 0)])
def test_a_score_that_is_no_share_has_no_interval(score: float, rows: int) -> None:
    with pytest.raises(InputError, match="expected a share"):
        figures.wilson_interval(score, rows)

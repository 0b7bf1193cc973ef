"""Pictures: what is on the axis is compared with numbers that are computed here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from test_analysis import walk_of
from towers import Tower

from tinyspan import Basis, InputError, SubspaceModel, by_layer, plots, random_basis, svd_basis
from tinyspan.analysis import GAUSSIAN_SHARE, Surface, compare, component_norms, outliers, plane
from tinyspan.lab import figures


@pytest.fixture
def ax() -> Any:
    return Figure(layout="constrained").subplots()


@pytest.fixture(autouse=True)
def drawn_without_warnings() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield
    pyplot.close("all")


def result(method: str = "full", score: float = 0.75, **more: Any) -> dict[str, Any]:
    history = [{"epoch": 1.0, "train_loss": 0.7}, {"epoch": 2.0, "train_loss": 0.5, "score": score}]
    rows = {"train": 64, "validation": 100}
    fixed = {"task": "sst2", "seed": 0, "metric": "accuracy", "rows": rows, "history": history}
    return {"method": method, "score": score, **fixed, **more}


def line(ax: Any, index: int = 0) -> list[list[float]]:
    return [[float(x), float(y)] for x, y in ax.lines[index].get_xydata()]


def test_scores_are_bars_with_the_stored_or_the_wilson_interval(ax: Any) -> None:
    stored = result("intrinsic", 0.5, intervals={"accuracy": [0.4, 0.7]})
    assert plots.scores([result(), stored], ax) is ax
    assert [float(bar.get_width()) for bar in ax.patches] == [0.75, 0.5]
    # 1.96 of Wilson's formula by hand: (0.75 + 1.9208 / 100) / 1.03841, +- 1.96 / 1.03841 sqrt(0.75 0.25 / 100 + ...)
    assert line(ax, 0) == [[pytest.approx(0.6569, abs=1e-4), 0.0], [pytest.approx(0.8245, abs=1e-4), 0.0]]
    assert line(ax, 1) == [[0.4, 1.0], [0.7, 1.0]]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["full", "intrinsic"]
    with pytest.raises(InputError, match="one metric, got accuracy, pearson"):
        plots.scores([result(), result(metric="pearson")], ax)
    with pytest.raises(InputError, match="got no result"):
        plots.scores([], ax)


def test_a_perplexity_has_no_interval_and_no_bounds(ax: Any) -> None:
    plots.scores(result(score=12.5, metric="perplexity"), ax)
    assert len(ax.lines) == 0
    assert ax.get_xlim()[1] > 12.5


def test_an_update_that_is_no_number_is_not_drawn(tower: Tower, ax: Any) -> None:
    subspace = SubspaceModel(tower, random_basis(by_layer(tower), 1))
    subspace.set_state({block.name: torch.tensor([torch.nan]) for block in subspace.blocks})
    with pytest.raises(InputError, match="the update is NaN or infinite"):
        plots.update_norms(subspace, ax)


def test_an_interval_below_zero_is_not_cut_off(ax: Any) -> None:
    plots.scores(result(score=0.02, metric="matthews", intervals={"matthews": [-0.06, 0.1]}), ax)
    assert ax.get_xlim()[0] <= -0.06


def test_the_line_of_three_sigma_stays_in_its_block(ax: Any) -> None:
    plots.envelopes({"0": np.array([1.0, 1.5]), "1": np.array([1.0, 1.2])}, ax)
    assert [found[0][1] for found in (line(ax, 0), line(ax, 1))] == pytest.approx([1.9, 0.9])


def test_learning_curves_skip_what_was_not_measured(ax: Any) -> None:
    runs = [result(), result("freeze", 0.6), result("lora", history=[])]
    plots.learning_curves(runs, ax)
    assert [line(ax, index) for index in range(2)] == [[[2.0, 0.75]], [[2.0, 0.6]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["full", "freeze"]
    assert ax.get_ylabel() == "held-out accuracy"
    other = Figure().subplots()
    plots.learning_curves(runs[0], other, key="train_loss")
    assert line(other) == [[1.0, 0.7], [2.0, 0.5]]
    with pytest.raises(InputError, match="no result has 'score'"):
        plots.learning_curves(runs[2], ax)


def test_without_an_axis_a_figure_is_created() -> None:
    ax = plots.learning_curves(result())
    assert ax.figure in map(pyplot.figure, pyplot.get_fignums())


def test_a_confusion_matrix_has_counts_and_shares_of_rows(ax: Any) -> None:
    plots.confusion_matrix(result(labels=["no", "yes", "none"], confusion_matrix=[[8, 2, 0], [5, 5, 0], [0, 0, 0]]), ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.8, 0.2, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert [text.get_text() for text in ax.texts] == ["8", "2", "0", "5", "5", "0", "0", "0", "0"]
    with pytest.raises(InputError, match="no confusion matrix"):
        plots.confusion_matrix(result(), ax)


def test_calibration_leaves_empty_bins_out(ax: Any) -> None:
    bins = [[0.55, None, 0], [0.65, 0.5, 10], [0.95, 0.9, 90]]
    stated = {"ece": 0.06, "bins": bins, "temperature": 1.5, "before": {"ece": 0.2}}
    plots.calibration(result(calibration=stated), ax)
    assert ax.collections[0].get_offsets().tolist() == [[0.65, 0.5], [0.95, 0.9]]
    assert ax.get_title() == "expected calibration error 0.060,\n0.200 before temperature 1.50"
    with pytest.raises(InputError, match="no calibration"):
        plots.calibration(result(calibration={"ece": 0.0, "bins": [[0.5, None, 0]]}), ax)


def test_a_scatter_needs_numbers(ax: Any) -> None:
    plots.scatter([{"row": 0, "label": 2.0, "prediction": 1.0}, {"row": 1, "label": 3, "prediction": 3.5}], ax)
    assert ax.collections[0].get_offsets().tolist() == [[2.0, 1.0], [3.0, 3.5]]
    assert line(ax) == [[1.0, 1.0], [3.5, 3.5]]
    with pytest.raises(InputError, match="no prediction to draw"):
        plots.scatter([], ax)
    with pytest.raises(InputError, match="numbers label and prediction"):
        plots.scatter([{"label": "good", "prediction": "bad"}], ax)


def test_the_spectrum_of_a_run_and_of_its_basis(tower: Tower, tmp_path: Path) -> None:
    run = walk_of(tower, tmp_path / "run", 4, 0)
    for source in (run, svd_basis(run, 2)):
        values, shares = (draw(source, Figure().subplots()) for draw in (plots.spectrum, plots.explained_variance))
        for index, block in enumerate(run.partition):
            singular = torch.linalg.svdvals(run.matrix(block))
            np.testing.assert_allclose(values.lines[index].get_ydata(), singular / singular[0], rtol=1e-6)
            expected = singular.square().cumsum(0) / singular.square().sum()
            np.testing.assert_allclose(shares.lines[index].get_ydata(), expected, rtol=1e-6)
    assert [text.get_text() for text in values.get_legend().get_texts()] == ["layers.0", "layers.1"]
    with pytest.raises(InputError, match="has no singular values"):
        plots.spectrum(random_basis(run.partition, 2))


def test_a_block_that_stands_still_is_named_but_not_drawn(tower: Tower, ax: Any) -> None:
    spectrum = {"layers.0": torch.tensor([2.0, 1.0, 0.0]), "layers.1": torch.zeros(3)}
    still = Basis(by_layer(tower), {}, spectrum=spectrum, ranks={"layers.0": 2, "layers.1": 0})
    plots.spectrum(still, ax)
    assert line(ax) == [[1, 1], [2, 0.5], [3, 0]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["layers.0", "layers.1 (does not move)"]


def test_a_path_is_that_of_its_plane_over_the_loss(tower: Tower, tmp_path: Path, ax: Any) -> None:
    run = walk_of(tower, tmp_path / "run", 3, 0)
    flat = plane(run)
    plots.path(run, ax)
    np.testing.assert_allclose(line(ax), flat.paths[0], atol=1e-6)
    assert [text.get_text() for text in ax.texts] == ["theta_0", "end of the run"]
    first, second = torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 3)
    for loss in (torch.ones(3, 4), torch.arange(12.0).view(3, 4).masked_fill(torch.eye(3, 4) > 0, torch.inf)):
        over = plots.path(flat, Figure().subplots(), surface=Surface(first, second, loss))
        assert len(over.figure.axes) == 2  # with a colour bar
    with pytest.raises(InputError, match="NaN or infinite everywhere"):
        plots.path(flat, ax, surface=Surface(first, second, torch.full((3, 4), torch.nan)))


def test_two_runs_in_one_plane(tower: Tower, tmp_path: Path, ax: Any) -> None:
    runs = walk_of(tower, tmp_path / "a", 3, 0), walk_of(tower, tmp_path / "b", 2, 1)
    plots.plane(*runs, ax=ax)
    for index, points in enumerate(plane(*runs).paths):
        np.testing.assert_allclose(line(ax, index), points, atol=1e-6)
    assert [text.get_text() for text in ax.texts] == ["theta_0", "a", "b"]


def test_angles_and_cosines_of_every_block(tower: Tower, tmp_path: Path, ax: Any) -> None:
    rows = compare(walk_of(tower, tmp_path / "a", 3, 0), walk_of(tower, tmp_path / "b", 2, 1))
    plots.angles(rows, ax)
    for position, row in enumerate(rows):
        assert line(ax, position) == [[position, float(angle)] for angle in row.angles]
    other = plots.cosines(rows, Figure().subplots())
    np.testing.assert_allclose([y for _, y in line(other, 0)], [row.cosine for row in rows])
    for index in (0, 1):
        np.testing.assert_allclose([y for _, y in line(other, 1 + index)], [row.shares[index] for row in rows])
    alone = compare(random_basis(by_layer(tower), 1), random_basis(by_layer(tower), 1, seed=1))
    with pytest.raises(InputError, match="no update to compare"):
        plots.cosines(alone, ax)
    with pytest.raises(InputError, match="no angle"):
        plots.angles([], ax)


def test_norms_and_outliers_by_component_and_block(tower: Tower, tmp_path: Path, ax: Any) -> None:
    run = walk_of(tower, tmp_path / "run", 2, 0)
    plots.update_norms(run, ax)
    average = torch.cat([run.delta(block) for block in run.partition]).square().mean().sqrt()
    rows = component_norms(run)
    assert [text.get_text() for text in ax.get_yticklabels()] == [row.component for row in rows[: len(rows) // 2]]
    expected = np.array([row.per_weight for row in rows]).reshape(2, -1).T / float(average)
    np.testing.assert_allclose(ax.images[0].get_array(), expected, rtol=1e-6)
    other = plots.outliers(run, Figure().subplots())
    for column, block in enumerate(run.partition):
        counts = outliers(run.delta(block), block).by_parameter
        shares = [counts[spec.name] / spec.numel / GAUSSIAN_SHARE for spec in block.parameters]
        np.testing.assert_allclose(other.images[0].get_array()[:, column], shares)


def test_envelopes_from_the_first_block_on_top(tower: Tower, tmp_path: Path, ax: Any) -> None:
    run = walk_of(tower, tmp_path / "run", 2, 0)
    plots.envelopes(run, ax)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["layers.1", "layers.0"]
    top = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert top.min() == pytest.approx(1.0)
    assert top.max() <= 1.9 + 1e-9
    cut = plots.envelopes({"a": np.array([1.0, 24.0])}, Figure().subplots(), ceiling=12.0)
    assert cut.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(0.9)
    assert [text.get_text() for text in cut.texts] == ["24 sigma"]


def test_an_update_of_zeros_is_flat(ax: Any) -> None:
    model = Tower().float()
    partition = by_layer(model)
    basis = Basis.from_directions(partition, {block.name: torch.eye(1, block.numel) for block in partition})
    subspace = SubspaceModel(model, basis)  # z is zero
    plots.envelopes(subspace, ax)
    assert not plots.outliers(subspace, Figure().subplots()).images[0].get_array().any()
    with pytest.raises(InputError, match="the update is zero"):
        plots.update_norms(subspace, ax)


def test_a_heat_map_leaves_holes_and_large_grids_without_numbers(ax: Any) -> None:
    plots.heat_map(np.array([[0.5, np.nan], [-0.25, 0.0]]), ["a", "b"], ["c", "d"], ax)
    assert [text.get_text() for text in ax.texts] == ["0.50", "-0.25", "0.00"]
    names = [str(index) for index in range(30)]
    assert not plots.heat_map(np.ones((30, 30)), names, names, Figure().subplots()).texts


def test_short_names_of_blocks() -> None:
    assert plots.block_labels(["h.0.attn", "h.0.mlp", "h.1.attn"]) == ["h.0.attn", "h.0.mlp", "h.1.attn"]
    assert plots.block_labels(["m.h.0", "m.h.10"]) == ["h.0", "h.10"]
    assert plots.block_labels(["a.left", "a.right"]) == ["left", "right"]


def test_results_of_one_method_are_told_apart() -> None:
    runs = [result(), result(seed=1), result(task="rte"), result("freeze")]
    assert plots.result_labels(runs) == ["full, sst2, seed 0", "full, sst2, seed 1", "full, rte", "freeze"]
    assert plots.result_labels([result(), result()]) == ["full, sst2, seed 0 (1)", "full, sst2, seed 0 (2)"]


def test_the_envelopes_of_a_study_have_one_column_for_each_update(tmp_path: Path) -> None:
    figure = figures.updates({"full": [np.array([1.0, 4.0])] * 2, "random": [np.array([2.0, 24.0])] * 2})
    assert [axes.get_title() for axes in figure.axes] == ["full", "random"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["24 sigma"] * 2
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["layer 2", "layer 1"]
    figures.save(figure, tmp_path, "updates")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["updates.png", "updates.svg"]

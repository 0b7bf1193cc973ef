"""Means and intervals against values worked out by hand."""

import math

import pytest

from tinyspan.lab.summary import markdown, missing, summarize


def test_the_interval_is_students() -> None:
    # mean 4, s = sqrt(((-2)^2 + 0 + 2^2) / 2) = 2, t(0.975, 2) = 4.302653
    found = summarize([2.0, 4.0, 6.0])
    assert (found.mean, found.seeds, found.wanted) == (4.0, 3, 3)
    assert found.half == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert str(found) == "4.0 ± 5.0"


def test_one_seed_has_no_interval_and_missing_ones_are_told() -> None:
    assert str(summarize([71.26])) == "71.3"
    assert str(summarize([70.0, None, 72.0])) == "71.0 ± 12.7 (2/3)"
    assert str(summarize([None])) == "missing"
    assert missing(summarize([None, None]))
    assert summarize([1.0]).signed() == "+1.0"
    assert summarize([-1.0, -3.0]).signed() == "-2.0 ± 12.7"


def test_markdown() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"

"""Combination of models of one base: their span, methods that choose coefficients in it, and the choice among them."""

from tinyspan.workflows.combine.opening import Options
from tinyspan.workflows.combine.runner import combine
from tinyspan.workflows.combine.sources import Division, Source

__all__ = ["Division", "Options", "Source", "combine"]

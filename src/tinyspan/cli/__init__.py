"""The command line: each command parses its arguments, calls a workflow and prints the result."""

from tinyspan.cli import train, sweep, predict, adapters, report, curvature, studies  # in the order of `--help`  # isort: skip
from tinyspan.cli.application import app, main

__all__ = ["adapters", "app", "curvature", "main", "predict", "report", "studies", "sweep", "train"]

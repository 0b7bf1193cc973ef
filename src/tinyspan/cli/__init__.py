"""The command line: each command parses its arguments, calls a workflow and prints the result."""

# in the order of `--help`
from tinyspan.cli import train, sweep, predict, adapters, combine, report, curvature, studies  # isort: skip
from tinyspan.cli.application import app, main

__all__ = ["adapters", "app", "combine", "curvature", "main", "predict", "report", "studies", "sweep", "train"]

"""The command line: each command parses its arguments, calls a workflow and prints the result."""

from tinyspan.cli import train, sweep, adapters, report, studies  # each registers its commands; `--help` has this order  # isort: skip
from tinyspan.cli.application import app, main

__all__ = ["adapters", "app", "main", "report", "studies", "sweep", "train"]

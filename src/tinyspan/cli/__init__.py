"""The command line: each command parses its arguments, calls a workflow and prints the result."""

from tinyspan.cli import train, predict, adapters, studies  # each registers its commands; `--help` has this order  # isort: skip
from tinyspan.cli.application import app, main

__all__ = ["adapters", "app", "main", "predict", "studies", "train"]

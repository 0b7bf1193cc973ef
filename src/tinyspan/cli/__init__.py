"""The command line: parse arguments, call a workflow, print."""

from tinyspan.cli import train, adapters, studies  # each registers its commands, in this order  # isort: skip
from tinyspan.cli.app import app, main

__all__ = ["adapters", "app", "main", "studies", "train"]

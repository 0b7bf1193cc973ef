"""Tasks: how rows become batches, a head and a score; one file per type, and the data sets that are known by name.

Every module of this package is imported, so that a new file is registered by being here. An installed package adds task
types and data sets of its own with an entry point of the group `tinyspan.tasks`, a module that registers them.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from tinyspan.workflows.tasks.base import TASKS, TYPES, Split, Task, get_task, register, register_type
from tinyspan.workflows.tasks.causal_lm import CausalLM
from tinyspan.workflows.tasks.classification import Classification
from tinyspan.workflows.tasks.metrics import METRICS, score_of
from tinyspan.workflows.tasks.regression import Regression
from tinyspan.workflows.tasks.seq2seq import Seq2Seq

__all__ = [
    "METRICS",
    "TASKS",
    "TYPES",
    "CausalLM",
    "Classification",
    "Regression",
    "Seq2Seq",
    "Split",
    "Task",
    "get_task",
    "load_plugins",
    "register",
    "register_type",
    "score_of",
]

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")


def load_plugins() -> None:
    """Import the modules that installed packages name in entry points of the group `tinyspan.tasks`."""
    for plugin in entry_points(group="tinyspan.tasks"):
        plugin.load()


load_plugins()

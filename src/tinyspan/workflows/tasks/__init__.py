"""Tasks: batches, head and score; one type per file, and importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from tinyspan.workflows.tasks.base import TASKS, TYPES, Split, Task, get_task, register_task, register_type
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
    "register_task",
    "register_type",
    "score_of",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

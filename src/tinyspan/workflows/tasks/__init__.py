"""Tasks: batches, head and score; one type per file, and importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from tinyspan.workflows.tasks.base import TASKS, TYPES, Split, Task, get_task, register_task, register_type
from tinyspan.workflows.tasks.causal_lm import CausalLM
from tinyspan.workflows.tasks.classification import Classification
from tinyspan.workflows.tasks.labelled import Labelled
from tinyspan.workflows.tasks.multi_label import MultiLabel
from tinyspan.workflows.tasks.regression import Regression
from tinyspan.workflows.tasks.seq2seq import Seq2Seq
from tinyspan.workflows.tasks.table import task_from_table
from tinyspan.workflows.tasks.token_classification import TokenClassification

__all__ = [
    "TASKS",
    "TYPES",
    "CausalLM",
    "Classification",
    "Labelled",
    "MultiLabel",
    "Regression",
    "Seq2Seq",
    "Split",
    "Task",
    "TokenClassification",
    "get_task",
    "register_task",
    "register_type",
    "task_from_table",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

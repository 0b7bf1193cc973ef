"""The rows of a combination are those that no model was trained on, and rows that may be others are refused."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from miniature_tasks import sentences
from miniatures import model_of
from miniatures import tokenizer as tokenizer_of_words
from safetensors.torch import load_file, save_file

from tinyspan.errors import InputError
from tinyspan.io.manifests import attach
from tinyspan.io.storage import read_json, write_json
from tinyspan.workflows.combine.members import Members, open_members
from tinyspan.workflows.combine.problem import TaskRows
from tinyspan.workflows.combine.sources import Division, Source, open_sources, rows_of, trained_rows
from tinyspan.workflows.combine.specification import load_sources
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import record
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task, task_from_table

DIVISION = Division(learn=8, choose=12, max_length=32)
SETTINGS = Settings(epochs=1, batch_size=16, max_length=32, learning_rate=3e-3, precision="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The model, and the folder in which the runs are."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(model_folder, folder / "base")
    return folder


def recorded(folder: Path, prepared: Prepared, **options: Any) -> Path:
    record(prepared, replace(SETTINGS, **options), folder)
    return folder


@pytest.fixture(scope="module")
def table(base: Path) -> Path:
    """A table of 80 rows, of which all texts differ."""
    rows = sentences(80, 5)
    texts = [f"{text} {'the ' * (index % 7)}{'film ' * (index // 7)}" for index, text in enumerate(rows["sentence"])]
    rows = pd.DataFrame({"text": texts, "mood": ["good" if label else "bad" for label in rows["label"]]})
    rows.to_csv(base / "moods.csv", index=False)
    return base / "moods.csv"


@pytest.fixture(scope="module")
def of_table(base: Path, table: Path) -> list[str]:
    """Two runs on 60 of the rows, with 24 of them set aside."""
    task = task_from_table(table, "text", "mood", holdout=0.25)
    places = [
        recorded(base / f"table-{seed}", prepare(str(base / "base"), task, max_length=32), seed=seed, set_aside=24)
        for seed in (0, 1)
    ]
    return [str(place / "model") for place in places]


@pytest.fixture(scope="module")
def drawn(base: Path, data_folder: Path) -> list[str]:
    """Two runs on 44 of 64 rows, none of which was set aside."""
    prepared = prepare(str(base / "base"), "sst2", data=data_folder, max_length=32, train_rows=44)
    places = [recorded(base / f"drawn-{seed}", prepared, seed=seed) for seed in (0, 1)]
    return [str(place / "model") for place in places]


@pytest.fixture(scope="module")
def texts(base: Path) -> Path:
    """A decoder, two runs of it on pieces of 8 tokens of 60 texts, with 24 pieces set aside, and the texts."""
    folder = base / "texts"
    folder.mkdir()
    model_of("causal-lm").save_pretrained(base / "decoder")
    tokenizer_of_words(encoder_decoder=False).save_pretrained(base / "decoder")
    for split, rows in (("train", 60), ("validation", 30)):
        lines = pd.DataFrame({"text": sentences(rows, 1 if split == "train" else 2)["sentence"]})
        lines.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
    return folder


def without_result(model: str, place: Path) -> str:
    """Copy a model out of its run, and change its weights a little."""
    shutil.copytree(model, place)
    tensors = load_file(place / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return str(place)


def opened(source: Source, base: Path) -> Members:
    return open_sources([source], str(base / "base"))[0]


def numbers(rows: TaskRows) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for part in ("learn", "choose") for row in rows.parts[part]["input_ids"])


def refused(source: Source, members: Members, division: Division = DIVISION) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(source, members, division)
    return str(caught.value)


# -- names and steps of several tasks ---------------------------------------------------------------------------------


def test_models_of_several_tasks_have_names_of_their_own(base: Path, drawn: list[str], tmp_path: Path) -> None:
    sources = []
    for name in ("a", "b", "c"):
        place = tmp_path / name / ("checkpoint-5" if name != "c" else "checkpoint-6")
        sources.append(Source(get_task("sst2"), [without_result(drawn[0], place)], name))
    members = [one for each in open_sources(sources, str(base / "base")) for one in each.members]
    assert [one.name for one in members] == ["a: checkpoint-5", "b: checkpoint-5", "checkpoint-6"]
    assert [one.order for one in members] == [None] * 3


# -- which rows are new -----------------------------------------------------------------------------------------------


def test_rows_set_aside_of_all_are_stated_by_their_number(base: Path, of_table: list[str], tmp_path: Path) -> None:
    """For models without a result, `set_aside` alone means what `record --set-aside` does."""
    models = [without_result(model, tmp_path / f"{index}") for index, model in enumerate(of_table)]
    task = task_from_table(base / "moods.csv", "text", "mood", holdout=0.25)
    source = Source(task, models, set_aside=24)
    aside = prepare(str(base / "base"), task).with_aside(24).aside
    assert aside is not None
    rows = rows_of(source, opened(source, base), Division(8, 16))
    assert numbers(rows) == sorted(map(tuple, aside["input_ids"]))
    assert "got 24" in refused(source, opened(source, base), Division(8, 17))


def test_models_that_do_not_tell(base: Path, of_table: list[str], tmp_path: Path) -> None:
    foreign = [without_result(model, tmp_path / f"m{index}") for index, model in enumerate(of_table)]
    task = task_from_table(base / "moods.csv", "text", "mood", holdout=0.25)
    source = Source(task, foreign)
    members = opened(source, base)
    with pytest.warns(UserWarning, match="no result.json says on which rows m0, m1 were trained"):
        rows_of(source, members, DIVISION)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows_of(replace(source, train_rows=0), members, DIVISION)
    message = refused(replace(source, train_rows=60, set_aside=24), members)
    assert (
        "train_rows=60 does not say which rows m0, m1 were trained on, and no result.json does; give data=" in message
    )
    assert "leave one of them out" in refused(replace(source, train_rows=0, set_aside=4), members)
    mixed = Source(task, [of_table[0], foreign[1]])
    members = opened(mixed, base)
    with pytest.warns(UserWarning, match="on which rows m1 was trained"):
        some = rows_of(mixed, members, Division(8, 16))
    assert numbers(rows_of(replace(mixed, train_rows=60, set_aside=24), members, Division(8, 16))) == numbers(some)
    message = refused(replace(mixed, set_aside=20), members)
    assert "expected set_aside=24, as in the result.json of table-0/model, got set_aside=20" in message


def test_all_rows_that_were_not_drawn_are_taken(base: Path, drawn: list[str], data_folder: Path) -> None:
    source = Source(get_task("sst2"), drawn, data=data_folder)
    members = opened(source, base)
    every = prepare(str(base / "base"), "sst2", data=data_folder, max_length=32).train
    used = prepare(str(base / "base"), "sst2", data=data_folder, max_length=32, train_rows=44).train
    assert every is not None
    assert used is not None
    new = sorted(map(tuple, every["input_ids"]))
    for row in used["input_ids"]:
        new.remove(tuple(row))
    assert len(new) == 20
    assert numbers(rows_of(source, members, DIVISION)) == new
    assert "there are no 21 others" in refused(source, members, Division(9, 12, 32))


def test_another_seed_of_the_draw(base: Path, drawn: list[str], data_folder: Path) -> None:
    """The rows that the runs did not draw are those of their own draw."""
    prepared = prepare(str(base / "base"), "sst2", data=data_folder, max_length=32, train_rows=40, draw_seed=3)
    places = [recorded(base / f"seed3-{seed}", prepared, seed=seed) for seed in (0, 1)]
    source = Source(get_task("sst2"), [str(place / "model") for place in places], data=data_folder)
    more = prepare(str(base / "base"), "sst2", data=data_folder, max_length=32, train_rows=60, draw_seed=3).train
    assert more is not None
    expected = sorted(map(tuple, more.select(range(40, 60))["input_ids"]))
    assert numbers(rows_of(source, opened(source, base), DIVISION)) == expected
    mixed = replace(source, models=[source.models[0], drawn[0]])
    assert "the models were trained on different rows" in refused(mixed, opened(mixed, base))


# -- rows that are not those of the runs ------------------------------------------------------------------------------


def test_another_share_held_out(base: Path, table: Path, of_table: list[str]) -> None:
    source = Source(task_from_table(table, "text", "mood", holdout=0.25), of_table)
    members = opened(source, base)
    assert len(numbers(rows_of(source, members, DIVISION))) == 20
    other = replace(source, task=task_from_table(table, "text", "mood", holdout=0.2))
    message = refused(other, members)
    assert "moods: the rows are not those on which table-0/model was trained: its result.json" in message
    assert "has 60 training rows, with those set aside, and here are 64; give the data, columns and holdout=" in message


def test_rows_are_read_once(base: Path, table: Path, of_table: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = Source(task_from_table(table, "text", "mood", holdout=0.25), of_table), []
    members = opened(source, base)
    monkeypatch.setattr(
        "tinyspan.workflows.combine.sources.prepare",
        lambda *args, **options: (calls.append(options), prepare(*args, **options))[1],
    )
    rows_of(source, members, Division(8, 16, 32))
    assert len(calls) == 1
    rows_of(source, members, Division(8, 16, 24))  # other rows than those of the runs, which are read to be compared
    assert [call["max_length"] for call in calls] == [32, 24, 32]


@pytest.mark.parametrize("older", [False, True])
def test_data_that_has_changed(older: bool, base: Path, table: Path, of_table: list[str], tmp_path: Path) -> None:
    """As many rows, in another order; a result of an earlier version has the numbers of held-out rows alone."""
    rows = pd.read_csv(table)
    rows.iloc[[1, 2, *range(3, 80), 0]].to_csv(tmp_path / "moods.csv", index=False)
    models = list(of_table)
    for index, model in enumerate(of_table):
        if older:
            run = shutil.copytree(Path(model).parent, tmp_path / f"run-{index}")
            result = read_json(run / "result.json")
            del result["row_digests"], result["draw"]
            write_json(run / "result.json", result)
            attach(run, ["result.json"])
            models[index] = str(run / "model")
    same = Source(task_from_table(table, "text", "mood", holdout=0.25), models)
    members = opened(same, base)
    rows_of(same, members, DIVISION)
    changed = replace(same, task=task_from_table(tmp_path / "moods.csv", "text", "mood", holdout=0.25))
    expected = "names other held-out rows" if older else "the SHA-256 "
    assert expected in refused(changed, members)
    rows_of(replace(changed, train_rows=0), members, DIVISION)


def test_pieces_of_texts(base: Path, texts: Path) -> None:
    """A run counts pieces of text and draws texts; another length moves the borders of the pieces."""
    task, decoder = get_task("causal-lm"), str(base / "decoder")
    prepared = prepare(decoder, task, data=texts, max_length=8)
    assert prepared.train is not None
    assert 16 < len(prepared.train) < 60  # fewer pieces than texts
    runs = [
        recorded(base / f"texts-{seed}", prepared, max_length=8, seed=seed, set_aside=16, learning_rate=1e-2)
        for seed in (0, 1)
    ]
    source = Source(task, [str(run / "model") for run in runs], data=texts)
    members = open_sources([source], decoder)[0]
    aside = prepared.with_aside(16).aside
    assert aside is not None
    rows = rows_of(source, members, Division(6, 10, 8))
    assert numbers(rows) == sorted(map(tuple, aside["input_ids"]))
    message = refused(source, members, Division(6, 10, 16))
    assert "trained on pieces of 8 tokens, and pieces of max_length=16 begin elsewhere" in message
    some = prepare(decoder, task, data=texts, max_length=8, train_rows=50)
    result = read_json(recorded(base / "few", some, max_length=8, seed=2, set_aside=16) / "result.json")
    assert result["draw"] == {"train": 50, "validation": None, "seed": 0}
    few = replace(source, models=[str(base / "few" / "model")])
    members = open_members(few.models, task, decoder)
    aside = some.with_aside(16).aside
    assert aside is not None
    assert numbers(rows_of(few, members, Division(6, 10, 8))) == sorted(map(tuple, aside["input_ids"]))
    both = replace(source, models=[*source.models, *few.models])
    assert "trained on different rows" in refused(both, open_members(both.models, task, decoder), Division(6, 10, 8))


# -- combinations -----------------------------------------------------------------------------------------------------


def test_a_combination_knows_the_rows_of_its_models(
    base: Path, table: Path, of_table: list[str], tmp_path: Path
) -> None:
    task = task_from_table(table, "text", "mood", holdout=0.25)
    source = Source(task, of_table)
    members = opened(source, base)
    trained = trained_rows(source, members)
    assert (trained["train_rows"], trained["set_aside"]) == (None, 24)
    assert trained_rows(replace(source, train_rows=0), members) == {"train_rows": 0, "set_aside": 0}
    without_result(of_table[0], tmp_path / "out" / "model")
    entry = {"name": task.name, "trained": json.loads(json.dumps(trained))}
    write_json(tmp_path / "out" / "result.json", {"method": "combine", "base": str(base / "base"), "tasks": [entry]})
    again = Source(task, [str(tmp_path / "out" / "model"), of_table[1]])
    members = open_sources([again], None)[0]
    assert members.base == str(base / "base")
    with pytest.warns(UserWarning, match="coefficients of out/model were learned and chosen on rows that the runs set"):
        rows = rows_of(again, members, Division(8, 16, 32))
    aside = prepare(str(base / "base"), task).with_aside(24).aside
    assert aside is not None
    assert numbers(rows) == sorted(map(tuple, aside["input_ids"]))
    alone = members._replace(members=members.members[:1])
    other = replace(again, task=task_from_table(table, "text", "mood", holdout=0.2))
    assert "not those on which out/model was trained" in refused(other, alone)


# -- pages ------------------------------------------------------------------------------------------------------------


def test_a_page_with_texts_metrics_and_lengths(table: Path, texts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    first = f"- {{model: a, data: {table}, text: text, label: mood, holdout: 0.25, metric: log_loss}}"
    second = f"- {{model: b, task_type: causal-lm, data: {texts}, text: text, max_target_length: 9}}"
    page.write_text(f"tasks:\n{first}\n{second}\n")
    (one, two), _ = load_sources(page)
    assert (one.task.type, one.task.metric, one.max_target_length) == ("classification", "log_loss", 64)
    assert (two.task.type, two.data, two.text, two.max_target_length) == ("causal-lm", texts, ["text"], 9)
    for entry, match in (
        ("{model: b, task_type: causal-lm}", "task_type causal-lm goes with data"),
        ("{model: b, task_type: classification, task: sst2}", "expected task, or data with text and label, or data"),
        ("{model: b, task_type: causal-lm, data: x, text: t, label: y}", "without task and task_type"),
        ("{model: b, task: causal-lm, data: x}", "causal-lm is a type of task: task_type"),
        ("{model: b, task: sst2, data: x, holdout: 0.5}", "holdout goes with data, text and label"),
    ):
        page.write_text(f"tasks:\n{first}\n- {entry}\n")
        with pytest.raises(InputError, match=match):
            load_sources(page)

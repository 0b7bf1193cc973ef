import json
from pathlib import Path

import pandas as pd
import pytest

from tinyspan import InputError
from tinyspan.workflows.tabular import read_split, read_table
from tinyspan.workflows.tasks import get_task


def read(folder: Path, content: str, name: str = "train.csv", task: str = "sst2") -> pd.DataFrame:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return get_task(task).read("train", folder)


@pytest.mark.parametrize(
    ("lines", "place", "count", "remedy"),
    [
        (["Good, but long,1", "Bad, but short,0"], "line 2", 3, "put text with commas in quotation marks"),
        (["fine,1", "Bad, but short,0"], "line 3", 3, "put text with commas in quotation marks"),
        (["fine,1", '"a ""flat"", film",0', "Bad, but short,0"], "line 4", 3, "put text with commas"),
        (['"two\nlines",1', "", "Bad, but short,0"], "line 5", 3, "put text with commas"),
        (["fine,1,", "dull,0,"], "line 2", 3, "remove the commas at the end of the line"),
        (["fine,1", "dull,0,,"], "line 3", 4, "remove the commas at the end of the line"),
        (["fine,1", "dull"], "line 3", 1, "write empty fields too"),
        (["a story", "of war,1"], "line 2", 1, "put text with line breaks in quotation marks"),
        (["fine,1", '"dull,0', "flat,0"], "lines 3 to 4", 1, "quotation marks that are closed"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_with_more_or_fewer_fields_is_refused(
    tmp_path: Path, lines: list[str], place: str, count: int, remedy: str, end: str
) -> None:
    with pytest.raises(InputError) as refused:
        read(tmp_path, end.join(["sentence,label", *lines]))
    message = str(refused.value)
    assert f"train.csv, {place}: expected as many fields as in the header (2), found {count}; " in message
    assert remedy in message


def test_the_same_number_of_surplus_fields_in_every_row_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.csv, line 2: .* in the header \(1\), found 2"):
        read(tmp_path, "text\nGood, but long\nBad, but short\n", task="causal-lm")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_fields_keep_commas_quotes_and_line_breaks(tmp_path: Path, mark: str, end: str) -> None:
    lines = ["sentence,label", '"Good, but long",1', "", '"two\nlines",0', '"a ""flat"" film",0', "   ", "fine,1", ""]
    rows = read(tmp_path, mark + end.join(lines))
    assert rows["sentence"].tolist() == ["Good, but long", "two\nlines", 'a "flat" film', "fine"]
    assert rows["label"].tolist() == [1, 0, 0, 1]


def test_empty_cells_are_empty_texts_and_missing_labels(tmp_path: Path) -> None:
    assert read(tmp_path, "sentence,label\n,1\nfine,0\n")["sentence"].tolist() == ["", "fine"]
    with pytest.raises(InputError, match="1 labels are missing"):
        read(tmp_path, "sentence,label\ndull,\nfine,0\n")


def test_texts_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    text = "fine, " * 30_000
    assert read(tmp_path, f'sentence,label\n"{text}",1\n')["sentence"].tolist() == [text]


@pytest.mark.parametrize("delimiter", ["\t", ";", "|"])
def test_other_delimiters_are_detected(tmp_path: Path, delimiter: str) -> None:
    content = f"id{delimiter}sentence{delimiter}label\n1{delimiter}Good, but long{delimiter}1\n"
    for name in ("train.csv", "train.tsv"):
        rows = read(tmp_path, content, name)
        assert rows.to_dict("list") == {"sentence": ["Good, but long"], "label": [1]}
        (tmp_path / name).unlink()


def test_the_wanted_columns_decide_the_delimiter(tmp_path: Path) -> None:
    rows = read(tmp_path, "sentence,label,x;y;z;w\nfine,1,0\n")
    assert rows.to_dict("list") == {"sentence": ["fine"], "label": [1]}
    with pytest.raises(
        InputError, match=r"line 2: .*\(2\), found 3; put text with semicolons .*\(\"Good; but long\";1\)"
    ):
        read(tmp_path, "sentence;label\nGood; but long;1\n")


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names the column 'sentence' 2 times"):
        read(tmp_path, "sentence,sentence,label\nfine,dull,1\n")
    assert read(tmp_path, "note,note,sentence,label\n,,fine,1\n")["sentence"].tolist() == ["fine"]


def test_files_of_unknown_suffixes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected one of \.parquet, \.csv, .*; found train\.xlsx"):
        read(tmp_path, "sentence\tlabel\nfine\t1\n", "train.xlsx")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "dull", "label": 0}', "line 2: no 'sentence', which other rows have; found text, label"),
        ('{"sentence": "dull"}', "line 2: no 'label', which other rows have; found sentence"),
        ('{"sentence": null, "label": 0}', r"row 1 \(counted from 0\) has nothing in 'sentence', and 0 more rows"),
        ('{"sentence": "dull", "label": 0', "cannot be read: line 2: "),
        ('["dull", 0]', r"line 2: expected an object of columns and values, got \['dull', 0\]"),
    ],
)
def test_a_json_row_with_other_keys_is_refused(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, f'{{"sentence": "fine", "label": 1}}\n{row}\n', "train.jsonl")


def test_a_json_list_with_other_keys_is_refused(tmp_path: Path) -> None:
    rows = [{"sentence": "fine", "label": 1}, {"text": "dull", "label": 0}]
    with pytest.raises(InputError, match=r"train\.json, row 1 \(counted from 0\): no 'sentence'"):
        read(tmp_path, json.dumps(rows, indent=1), "train.json")


def test_a_missing_text_of_a_labelled_task_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"sentence": ["fine", None], "label": [1, 0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\) has nothing in 'sentence'"):
        get_task("sst2").read("train", tmp_path)


def test_rows_of_parquet_are_numbered_by_their_place(tmp_path: Path) -> None:
    """pandas stores the index of a table that was shuffled."""
    pd.DataFrame({"sentence": ["fine", "dull"], "label": [1, 0]}, index=[7, 3]).to_parquet(tmp_path / "train.parquet")
    assert get_task("sst2").read("train", tmp_path).index.tolist() == [0, 1]
    pd.DataFrame({"sentence": ["fine", "dull"]}, pd.Index(["b", "a"], name="y")).to_parquet(tmp_path / "b.parquet")
    assert read_table(tmp_path / "b.parquet", ["sentence"])["y"].tolist() == ["b", "a"]


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "TRAIN.CSV").write_text("sentence\nfine\n")
    assert read_table(tmp_path / "TRAIN.CSV", ["sentence"])["sentence"].tolist() == ["fine"]
    (tmp_path / "validation.CSV").write_text("sentence\ndull\n")
    assert read_split(tmp_path, ["validation"], ["sentence"])["sentence"].tolist() == ["dull"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_token_of_conll_may_have_a_separator_of_lines(tmp_path: Path, end: str) -> None:
    lines = ["a\u2028b\tO", "c\x85 X\tB-X\t", "", "10\xa0000 NN O ", "d\x0b O"]
    (tmp_path / "a.conll").write_text(end.join(lines), encoding="utf-8", newline="")
    rows = read_table(tmp_path / "a.conll", ["tokens"]).values.tolist()
    assert rows == [[["a\u2028b", "c\x85 X"], ["O", "B-X"]], [["10\xa0000", "d\x0b"], ["O", "O"]]]


def test_comments_of_conll_are_no_tokens(tmp_path: Path) -> None:
    lines = ["# id 7\tdomain=en", "# a second", "a _ _ O", "b _ _ B-X", "", "# _ _ O", "c _ _ O"]
    (tmp_path / "a.conll").write_text("\n".join(lines))
    rows = read_table(tmp_path / "a.conll", ["tokens"]).values.tolist()
    assert rows == [[["a", "b"], ["O", "B-X"]], [["#", "c"], ["O", "O"]]]
    for comment in ("# id 12-3 domain=en", "# sent_id = 12", "# newdoc\n"):
        (tmp_path / "a.conll").write_text(f"{comment}\na _ _ O\n")
        assert read_table(tmp_path / "a.conll", ["tokens"]).values.tolist() == [[["a"], ["O"]]]
    (tmp_path / "a.conll").write_text("a O\n\nb\n")
    with pytest.raises(InputError, match="line 3: expected a token and its tag, got 'b'"):
        read_table(tmp_path / "a.conll", ["tokens"])


@pytest.mark.parametrize(("start", "end", "place"), [("", "", "line 2"), ("[", "]", "row 1 (counted from 0)")])
def test_half_of_an_emoji_in_json_is_refused(tmp_path: Path, start: str, end: str, place: str) -> None:
    comma = "," if start else ""
    rows = r'{"sentence": "fine \ud83d\ude00", "label": 1}', r'{"sentence": "dull \ud83d", "label": 0}'
    with pytest.raises(InputError) as refused:
        read(tmp_path, f"{start}{rows[0]}{comma}\n{rows[1]}{end}", "train.json")
    assert f"{place}: '\\ud83d' is half of a surrogate pair" in str(refused.value)

"""Suites: ours are sound, and a bad one is refused with its line and the reason."""

from pathlib import Path

import pytest

from tinyspan import InputError
from tinyspan.lab.suite import Suite, load_suite, suite_names, suite_text

SMALLEST = """
models: [minilm]
tasks: [mrpc, sst2]
seeds: 1
epochs: 4
rank: 4
dimensions: [2, 4]
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(SMALLEST.lstrip() + text)
    return str(path)


def test_ours_are_sound_and_short() -> None:
    assert {"paper", "small"} <= set(suite_names())
    for name in suite_names():
        assert load_suite(name).name == name
        assert len(suite_text(name).splitlines()) <= 40


def test_the_paper_suite_is_the_papers() -> None:
    suite = load_suite("paper")
    assert len(suite.tasks) == 8
    assert (suite.seeds, suite.ensemble, suite.center, suite.points) == (5, 16, "none", "epoch")
    assert (suite.epochs_of("mrpc"), suite.rank_of("mrpc")) == (32, 32)
    assert (suite.epochs_of("mnli"), suite.rank_of("mnli")) == (64, 64)
    settings = suite.settings("mnli", 3)
    assert (settings.epochs, settings.batch_size, settings.max_length, settings.seed) == (64, 32, 128, 3)
    assert (settings.learning_rate, settings.z_learning_rate) == (2e-5, 1e-2)


def test_a_regressions_start_is_the_suites_and_changes_the_settings_hash(tmp_path: Path) -> None:
    zero, mean = (load_suite(written(tmp_path, text)) for text in ("regression_start: zero\n", ""))
    assert [suite.settings("stsb", 0).regression_start for suite in (zero, mean)] == ["zero", "mean"]
    assert zero.settings_hash() != mean.settings_hash()
    assert load_suite("small").settings_hash() == "3b05bfa9ef1f"  # that of the results kept in docs/results


def test_a_suite_of_earlier_versions_says_start_std(tmp_path: Path) -> None:
    earlier, present = (load_suite(written(tmp_path, f"{name}: 0.25\n")) for name in ("start_std", "init_std"))
    assert earlier.init_std == present.init_std == 0.25
    assert earlier.settings_hash() == present.settings_hash() != load_suite(written(tmp_path, "")).settings_hash()
    assert Suite.model_validate(present.model_dump(mode="json")) == present


def test_models_are_named_by_their_last_part_or_as_told(tmp_path: Path) -> None:
    assert load_suite("small", models=["a/b", "minilm"]).models == {"b": "a/b", "minilm": "minilm"}
    assert load_suite("small", models={"x": "a/b"}).models == {"x": "a/b"}
    with pytest.raises(InputError, match="models"):
        load_suite("small", models={"a/b": "a/b"})


def test_overrides_replace_and_none_does_not() -> None:
    assert load_suite("small", tasks=["rte"], seeds=None).tasks == ("rte",)
    with pytest.raises(InputError, match=r"small: tasks: unknown task 'ret'"):
        load_suite("small", tasks=["ret"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("colour: red\n", r"line 7: colour: Extra inputs"),
        ("batch_size: many\n", r"line 7: batch_size: .*integer"),
        ("learning_rate: .nan\n", r"line 7: learning_rate: .*finite|greater"),
        ("z_learning_rate: .inf\n", r"line 7: z_learning_rate: .*finite"),
        ("init_std: .inf\n", r"line 7: init_std: .*finite"),
        ("learning_rate: 0\n", r"line 7: learning_rate: .*greater than 0"),
        ("exceptions:\n  mrpc: {rnk: 3}\n", r"line 8: exceptions.mrpc.rnk: Extra"),
        ("exceptions: {marc: {rank: 3}}\n", r"line 7: exceptions: unknown task 'marc'"),
        ("exceptions: {mrpc: {rank: 5}}\n", r"line 5: rank 5 is above what the 4 points of mrpc span"),
        ("center: mean\n", r"line 5: rank 4 is above"),
        ("points: 3\n", r"line 5: rank 4 is above what the 3 points"),
        (
            "bases: [line]\n",
            r"line 7: bases: 'line' is a method of every study; register the constructor under another",
        ),
        ("seeds: [\n", r"not YAML"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load_suite(written(tmp_path, text))


def test_dimensions_above_the_points_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALLEST.lstrip().replace("[2, 4]", "[2, 8]"))
    with pytest.raises(InputError, match="line 6: dimensions up to 8"):
        load_suite(str(path))


def test_no_suite_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected base, paper, small or a YAML file"):
        load_suite("tiny")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="name: value"):
        load_suite(str(tmp_path / "list.yaml"))

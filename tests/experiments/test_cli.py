"""The command line as a user types it: outputs, exit codes, and one clear sentence for every misuse."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_the_whole_way(run: Any, quick: list[object], tmp_path: Path) -> None:
    full, basis, adapter = tmp_path / "full", tmp_path / "basis", tmp_path / "with space" / "adapter"
    code, out, _ = run("record", *quick, "--every", 2, "--output", full)
    assert (code, "full on sst2, accuracy" in out) == (0, True)
    code, out, _ = run("discover", full, "--rank", 3, "--output", basis)
    assert (code, "2 blocks, up to 3 directions" in out) == (0, True)
    code, out, _ = run("tune", *quick, "--basis", basis, "--output", adapter, "--z-learning-rate", 0.03)
    assert code == 0
    result = json.loads((adapter / "result.json").read_text())
    assert (result["method"], result["subspace_parameters"]) == ("intrinsic", 6)

    where = ["--model", quick[1], "--task", "sst2", "--data", quick[5]]
    code, out, _ = run("evaluate", *where, "--adapter", adapter, "--output", tmp_path / "scored")
    assert code == 0
    assert json.loads((tmp_path / "scored/result.json").read_text())["score"] == result["score"]
    code, _, _ = run("evaluate", "--model", full / "model", *where[2:])
    assert code == 0

    for folder, words in (
        (full, ["trajectory", "4, after steps 2, 4, 6, 8", "full on sst2"]),
        (basis, ["basis", "center init", "sigma of bert.encoder.layer.0"]),
        (adapter, ["adapter", "bert.embeddings", "accuracy"]),
    ):
        code, out, _ = run("inspect", folder)
        assert (code, "every file has its size" in out) == (0, True)
        code, out, _ = run("inspect", "--verify", folder)
        assert (code, "yes, every file has its hash" in out) == (0, True)
        for word in words:
            assert word in out

    damaged = basis / "block-000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, out, err = run("inspect", basis)
    assert code == 1
    assert "block-000.safetensors: expected" in err


@pytest.mark.parametrize("partition", ["module", "model"])
def test_other_partitions_and_formats(run: Any, quick: list[object], tmp_path: Path, partition: str) -> None:
    assert run("record", *quick, "--every", 2, "--output", tmp_path / "t")[0] == 0
    flags = ["--partition", partition, "--dtype", "bfloat16", "--center", "mean"]
    assert run("discover", tmp_path / "t", "-k", 2, *flags, "-o", tmp_path / "b")[0] == 0
    code, _, err = run("tune", *quick, "--basis", tmp_path / "b", "--output", tmp_path / "a")
    assert (code, err.count("Error")) == (0, 0)


@pytest.mark.parametrize("basis", ["none", "random", "fastfood"])
def test_baselines(run: Any, quick: list[object], tmp_path: Path, basis: str) -> None:
    rank = [] if basis == "none" else ["--rank", 3]
    assert run("tune", *quick, "--basis", basis, *rank, "--output", tmp_path / "a")[0] == 0
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["method"] == {"none": "freeze"}.get(basis, basis)


def test_overwriting_is_asked_for(run: Any, quick: list[object], tmp_path: Path) -> None:
    arguments = ["tune", *quick, "--basis", "none", "--output", tmp_path / "a"]
    assert run(*arguments)[0] == 0
    before = (tmp_path / "a/result.json").read_text()
    code, _, err = run(*arguments)
    assert (code, "--overwrite" in err) == (2, True)
    assert (tmp_path / "a/result.json").read_text() == before
    assert run(*arguments, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["record", "--task", "sst9"], "unknown task 'sst9'"),
        (["record", "--data", "/nowhere"], "/nowhere does not exist"),
        (["record", "--model", "/no/model"], "could not be loaded"),
        (["record", "--every", "often"], "--every takes"),
        (["record", "--every", "0"], "--every takes"),
        (["record", "--every", "9999"], "records nothing"),
        (["record", "--learning-rate", "-1"], "learning_rate must be above 0"),
        (["tune", "--basis", "random"], "give --rank"),
        (["tune", "--basis", "none", "--rank", "3"], "give --rank"),
        (["tune", "--basis", "/no/basis"], "is no basis"),
        (["tune", "--basis", "none", "--ensemble", "0"], "ensemble"),
    ],
)
def test_misuse_ends_with_two_and_one_sentence(
    run: Any, quick: list[object], tmp_path: Path, words: list[str], message: str
) -> None:
    code, out, err = run(words[0], *quick, "--output", tmp_path / "out", *words[1:])
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_more_misuse(run: Any, quick: list[object], tmp_path: Path) -> None:
    assert run("record", *quick, "--every", 4, "--output", tmp_path / "t")[0] == 0
    code, _, err = run("discover", tmp_path / "t", "--rank", 3, "--output", tmp_path / "b")
    assert (code, "rank 3 is not between 1 and 2" in err) == (2, True)
    code, _, err = run("discover", tmp_path / "t", "--rank", 1, "--output", tmp_path / "t")
    assert (code, "is read and lies in the output folder" in err) == (2, True)
    code, _, err = run("evaluate", *quick[:6], "--adapter", tmp_path / "t")
    assert (code, "expected a adapter" in err) == (2, True)
    code, _, err = run("evaluate", *quick[:6])
    assert (code, "has no trained head" in err) == (2, True)
    code, _, err = run("inspect", tmp_path)
    assert (code, "has no manifest.json" in err) == (2, True)
    code, _, err = run("tune", "--no-such-flag")
    assert code == 2


def test_help_everywhere(run: Any) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("record", "discover", "tune", "evaluate", "inspect", "demo"):
        assert command in out
        assert run(command, "--help")[0] == 0

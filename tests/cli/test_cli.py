"""The command line as a user types it: outputs, exit codes, and one clear sentence for every misuse."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tinyspan import InputError, SubspaceModel, Trajectory, TrajectoryRecorder, by_layer, by_pattern, cli, svd_basis
from tinyspan.cli.application import as_options, printable
from tinyspan.interop.deltas import apply_delta
from tinyspan.partitioning import PARTITIONS
from tinyspan.workflows.models import base_model
from tinyspan.workflows.tasks import TASKS


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("another folder or pass overwrite=True", "another folder or pass --overwrite"),
        ("give rank= or explained_variance=, got 1 and 0.5", "give --rank or --explained-variance, got 1 and 0.5"),
        ("rank=9 is not 1, with center='init'; rank", "--rank 9 is not 1, with --center init; rank"),
        ("explained_variance=0.5. explained_variance must", "--explained-variance 0.5. --explained-variance must"),
        ("is stored with dtype=None, not with dtype=int8", "is stored with dtype=None, not with --dtype int8"),
        ("/rank=3/explained_variance: 'rank=2' x-rank=4", "/rank=3/explained_variance: 'rank=2' x-rank=4"),
        (
            "seed=1 explained_variance_x=2 explained_variance.csv",
            "seed=1 explained_variance_x=2 explained_variance.csv",
        ),
    ],
)
def test_messages_name_the_options_of_the_command(message: str, expected: str) -> None:
    options = {"overwrite", "rank", "explained_variance", "center", "dtype"}
    assert as_options(message, options) == expected


def test_the_library_names_arguments_and_the_command_its_options(run: Any, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    partition = by_pattern(model, {"all": ".*"})
    recorder = TrajectoryRecorder(model, partition, tmp_path / "full")
    recorder.append(0, {name: weight + 1 for name, weight in model.named_parameters()})
    recorder.seal()
    code, _, err = run("discover", tmp_path / "full", "--output", tmp_path / "basis")
    assert (code, "give either --rank or --explained-variance, got None and None" in err) == (2, True)
    assert run("discover", tmp_path / "full", "--rank", 1, "--output", tmp_path / "basis")[0] == 0
    code, _, err = run("discover", tmp_path / "full", "--rank", 1, "--output", tmp_path / "basis")
    assert (code, "or pass --overwrite" in err, "=True" in err) == (2, True, False)
    with pytest.raises(InputError, match="or pass overwrite=True"):
        svd_basis(Trajectory(tmp_path / "full"), rank=1, folder=tmp_path / "basis")


def test_the_whole_way(run: Any, quick: list[object], tmp_path: Path) -> None:
    full, basis, adapter = tmp_path / "full", tmp_path / "basis", tmp_path / "with space" / "adapter"
    code, out, _ = run("record", *quick, "--every", 2, "--output", full, "--regression-start", "zero")
    assert json.loads((full / "result.json").read_text())["settings"]["regression_start"] == "zero"
    assert (code, "full on sst2, accuracy" in out) == (0, True)
    code, out, _ = run("discover", full, "--rank", 3, "--output", basis)
    assert (code, "2 blocks, up to 3 directions" in out) == (0, True)
    code, out, _ = run("tune", *quick, "--basis", basis, "--output", adapter, "--z-learning-rate", 0.03,
                     "--regression-start", "zero")  # fmt: skip
    assert code == 0
    result = json.loads((adapter / "result.json").read_text())
    assert (result["method"], result["subspace_parameters"]) == ("intrinsic", 6)
    assert result["settings"]["regression_start"] == "zero"

    where = ["--model", quick[1], "--task", "sst2", "--data", quick[5]]
    code, out, _ = run("evaluate", *where, "--adapter", adapter, "--output", tmp_path / "scored")
    assert code == 0
    assert json.loads((tmp_path / "scored/result.json").read_text())["score"] == result["score"]
    code, _, _ = run("evaluate", "--model", full / "model", *where[2:])
    assert code == 0

    for folder, words in (
        (full, ["trajectory", "4, after steps 1, 3, 5, 7 (the first is step 0)", "full on sst2"]),
        (basis, ["basis", "center init", "sigma of bert.encoder.layer.0"]),
        (adapter, ["adapter", "bert.embeddings", "accuracy"]),
    ):
        code, out, _ = run("inspect", folder)
        assert (code, "every file has its size" in out) == (0, True)
        code, out, _ = run("inspect", "--verify", folder)
        assert (code, "yes, every file has its hash" in out) == (0, True)
        for word in words:
            assert word in out

    for folder, advice in (
        (full, f"its fine-tuned model is {full / 'model'}"),
        (basis, f"{str(basis)!r} is a basis, not a model"),
        (adapter, f"{str(adapter)!r} is an adapter, not a model: pass the base model"),
    ):
        code, _, err = run("evaluate", "--model", folder, *where[2:])
        assert (code, advice in err) == (2, True), err

    damaged = basis / "block-000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, out, err = run("inspect", basis)
    assert code == 1
    assert "block-000.safetensors: expected" in err


def test_an_interrupted_run_is_not_whole(run: Any, tower: Any, wander: Any) -> None:
    folder = wander(tower, by_layer(tower)).folder
    for words, whole in (((), "every file has its size"), (("--verify",), "yes, every file has its hash")):
        assert whole in run("inspect", *words, folder)[1]
    (folder / "unfinished").mkdir()
    (folder / "unfinished/recipe.json").write_text("{}")
    for words in ((), ("--verify",)):
        code, out, _ = run("inspect", *words, folder)
        assert code == 0
        assert re.search(r"^whole +NO, the work is unfinished; repeat the command that started it$", out, re.MULTILINE)


def test_an_adapter_goes_out_in_every_form(run: Any, quick: list[object], tuned: Any, tmp_path: Path) -> None:
    """Each loads, without tinyspan but for the delta, as the model that the adapter is."""
    peft = pytest.importorskip("peft")
    adapter, where = tuned[1], [*quick[:4], "--adapter", tuned[1]]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=torch.arange(5, 17).view(2, 6)).logits
        return found

    def base() -> Any:
        return base_model(str(quick[1]), TASKS["sst2"], 3)

    expected = logits(SubspaceModel.from_pretrained(base(), adapter))
    code, out, _ = run("export", *where, "--output", tmp_path / "lora")
    assert (code, "relative error" in out) == (0, True)
    found = [peft.PeftModel.from_pretrained(base(), str(tmp_path / "lora"))]
    assert run("export", *where, "--to", "delta", "--output", tmp_path / "delta.safetensors")[0] == 0
    found.append(base())
    apply_delta(found[-1], tmp_path / "delta.safetensors")
    assert run("export", *where, "--to", "merged", "--output", tmp_path / "merged")[0] == 0
    found.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"))
    for model in found:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert run("evaluate", "--model", tmp_path / "merged", *quick[2:6])[0] == 0
    code, _, err = run("export", *where, "--to", "merged", "--output", tmp_path / "merged")
    assert (code, "exists already" in err) == (2, True)
    code, _, err = run("export", *where, "--to", "delta", "--rank", 2, "--output", tmp_path / "d")
    assert (code, "--rank and --error apply to a LoRA" in err) == (2, True)


@pytest.mark.parametrize("partition", ["module", "model"])
def test_other_partitions_and_formats(run: Any, quick: list[object], tmp_path: Path, partition: str) -> None:
    assert run("record", *quick, "--every", 2, "--output", tmp_path / "t")[0] == 0
    flags = ["--partition", partition, "--dtype", "bfloat16", "--center", "mean"]
    assert run("discover", tmp_path / "t", "-k", 2, *flags, "-o", tmp_path / "b")[0] == 0
    code, _, err = run("tune", *quick, "--basis", tmp_path / "b", "--output", tmp_path / "a")
    assert (code, err.count("Error")) == (0, 0)


def test_partitions_that_do_not_group_a_trajectory(run: Any, quick: list[object], tmp_path: Path) -> None:
    assert run("record", *quick, "--every", 2, "--output", tmp_path / "t")[0] == 0
    able = ", ".join(sorted(name for name in PARTITIONS if PARTITIONS[name].regroup is not None))
    for name, problem in (("rows", f"unknown partition 'rows'; expected one of {', '.join(sorted(PARTITIONS))}"),
                          ("trainable", f"expected one of {able}")):  # fmt: skip
        code, _, err = run("discover", tmp_path / "t", "-k", 2, "--partition", name, "-o", tmp_path / "b")
        assert (code, problem in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("basis", ["none", "random", "fastfood"])
def test_baselines(run: Any, quick: list[object], tmp_path: Path, basis: str) -> None:
    rank = [] if basis == "none" else ["--rank", 3]
    assert run("tune", *quick, "--basis", basis, *rank, "--output", tmp_path / "a")[0] == 0
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["method"] == {"none": "freeze"}.get(basis, basis)


@pytest.mark.usefixtures("own_constructor")
def test_a_basis_by_a_constructor_of_ones_own(run: Any, quick: list[object], tmp_path: Path) -> None:
    """It is found by its name, and made again from it when the adapter is scored and exported."""
    adapter = tmp_path / "a"
    assert run("tune", *quick, "--basis", "first", "--output", adapter)[0] == 0
    result = json.loads((adapter / "result.json").read_text())
    assert (result["method"], result["subspace_parameters"]) == ("coordinates", 2)
    where = ["--model", quick[1], "--task", "sst2"]
    assert run("evaluate", *where, "--data", quick[5], "--adapter", adapter, "--output", tmp_path / "e")[0] == 0
    assert json.loads((tmp_path / "e/result.json").read_text())["score"] == result["score"]
    code, _, err = run("tune", *quick, "--basis", "first", "--rank", 2, "--output", tmp_path / "b")
    assert (code, "give --rank with --basis fastfood or random, and only then" in " ".join(err.split())) == (2, True)
    code, _, err = run("tune", *quick, "--basis", "furst", "--output", tmp_path / "b")
    assert (code, "the constructors are empty, fastfood, first, none, random" in " ".join(err.split())) == (2, True)


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
        (["record", "--every", "9999"], "--every 9999 records nothing"),
        (["record", "--learning-rate", "-1"], "--learning-rate must be above 0"),
        (["tune", "--basis", "random"], "give --rank"),
        (["tune", "--basis", "none", "--rank", "3"], "give --rank"),
        (["tune", "--basis", "/no/basis"], "is not a basis"),
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
    assert (
        code,
        "--rank 3 is not between 1 and 2, the number of directions that the points have with --center init" in err,
    ) == (2, True)
    code, _, err = run("discover", tmp_path / "t", "--rank", 1, "--output", tmp_path / "t")
    assert (code, "is read and lies in the output folder" in err) == (2, True)
    code, _, err = run("evaluate", *quick[:6], "--adapter", tmp_path / "t")
    assert (code, "is not an adapter, but a " in err) == (2, True)
    code, _, err = run("evaluate", *quick[:6])
    assert (code, "has no trained head" in err) == (2, True)
    code, _, err = run("inspect", tmp_path)
    assert (code, "has no manifest.json" in err) == (2, True)
    code, _, err = run("tune", "--no-such-flag")
    assert code == 2


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [("of-its-own", "AutoConfig"), ("of-its-own", "AutoTokenizer"), ("clip", "AutoModelForSequenceClassification")],
)
def test_code_in_a_models_folder_is_never_run(
    run: Any,
    quick: list[object],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    auto: str,
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "code_of_its_own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Thing: pass\n")
    classes = {"AutoConfig": "code_of_its_own.Thing", auto: "code_of_its_own.Thing"}
    if model_type == "clip":  # transformers has its config, but no class that classifies sentences
        del classes["AutoConfig"]
    if auto == "AutoTokenizer":
        classes[auto] = ["code_of_its_own.Thing", None]  # type: ignore[assignment]
        rewrite(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="Thing")
    rewrite(folder / "config.json", model_type=model_type, auto_map=classes)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks on a terminal unless told
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code, _, err = run("record", *quick, "--model", folder, "--output", tmp_path / "out")
    assert (code, "tinyspan never runs such code" in err) == (2, True), err
    assert not (tmp_path / "was-run").exists()
    assert not (tmp_path / "out").exists()


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_help_everywhere(run: Any) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("record", "discover", "tune", "evaluate", "predict", "inspect", "demo"):
        assert command in out
        assert run(command, "--help")[0] == 0


@pytest.fixture
def tuned(run: Any, quick: list[object], tmp_path: Path) -> tuple[Path, Path]:
    """A basis and an adapter in it."""
    basis, adapter = tmp_path / "basis", tmp_path / "adapter"
    assert run("record", *quick, "--every", 2, "--output", tmp_path / "full")[0] == 0
    assert run("discover", tmp_path / "full", "--rank", 2, "--output", basis)[0] == 0
    assert run("tune", *quick, "--basis", basis, "--output", adapter)[0] == 0
    return basis, adapter


def test_a_wrong_pairing_is_refused_before_any_row_is_read(
    run: Any,
    quick: list[object],
    tuned: tuple[Path, Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("rows are read")

    monkeypatch.setattr("tinyspan.workflows.tasks.Classification.read", never)
    (basis, adapter), where = tuned, ["--task", "sst2", "--data", quick[5]]
    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"] += 1e-6
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    shorter = shutil.copytree(model_folder, tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))

    def refused(message: str, *words: object) -> None:
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err

    differs = "was made for another theta_0: the model differs in block 'bert.encoder.layer.1'"
    absent = "was made for another model: the model has no parameter 'bert.encoder.layer.1."
    for model, message in ((other, differs), (shorter, absent)):
        output = ["--output", tmp_path / "out"]
        refused(f"the basis {basis} {message}", "tune", *where, "--model", model, "--basis", basis, *output)
        refused(f"the adapter {adapter} {message}", "evaluate", *where, "--model", model, "--adapter", adapter, *output)
    refused("another task", "evaluate", "--task", "mnli", "--model", model_folder, "--adapter", adapter)
    good = ["evaluate", *where, "--model", model_folder, "--adapter", adapter]
    assert run("discover", tmp_path / "full", "--rank", 3, "--output", tmp_path / "another")[0] == 0
    refused("was trained in the basis", *good, "--basis", tmp_path / "another")
    basis.rename(tmp_path / "moved")
    refused("pass its location as --basis", *good)
    refused("has no trained head", "evaluate", *where, "--model", model_folder)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AssertionError, match="rows are read"):
        run(*good, "--basis", tmp_path / "moved")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "rows of sst2: there are none"),
        ([0, 2], "rows of sst2: expected labels 0 to 1, got [0, 2]"),
        ([0, -1], "rows of sst2: expected labels 0 to 1, got [-1, 0]"),
        ([0, 0.5], "rows of sst2: expected labels 0 to 1, got [0.0, 0.5]"),
        ([0, None], "rows of sst2: 1 labels are missing, infinite, or beyond float32"),
    ],
)
def test_sick_rows_are_refused_in_every_form_and_split(
    run: Any, quick: list[object], tmp_path: Path, suffix: str, split: str, labels: list[float], message: str
) -> None:
    for name in ("train", "validation"):
        chosen = labels if name == split else [0, 1]
        rows = pd.DataFrame({"sentence": ["a film"] * len(chosen), "label": chosen})
        written(rows, tmp_path / f"{name}.{suffix}")
    for command in (["record"], ["tune", "--basis", "none"]):
        code, out, err = run(*command, *quick[:4], "--data", tmp_path, "--output", tmp_path / "out")
        assert (code, out) == (2, "")
        assert f"{split} {message}" in err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def written(rows: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=True)


@pytest.mark.parametrize(("task", "metric"), [("cola", "matthews"), ("stsb", "pearson")])
def test_a_single_class_is_scored_as_zero_with_a_warning(
    run: Any, model_folder: Path, tmp_path: Path, task: str, metric: str
) -> None:
    columns = ["sentence"] if task == "cola" else ["sentence1", "sentence2"]
    for name, labels in (("train", [0, 1] * 8), ("validation", [1] * 16)):
        rows = pd.DataFrame({**dict.fromkeys(columns, ["fine film", "dull film"] * 8), "label": labels})
        written(rows, tmp_path / f"{name}.jsonl")
    words = ["--model", model_folder, "--task", task, "--data", tmp_path, "--epochs", 1, "--basis", "none"]
    with warnings.catch_warnings():  # as in a process of its own: shown, not raised
        warnings.simplefilter("default")
        code, out, err = run("tune", *words, "--output", tmp_path / "a")
    assert code == 0
    assert f"{metric} 0.0000" in out
    assert f"tinyspan: warning: {task}: all 16 validation rows have the label 1" in err
    assert f"tinyspan: warning: {task}: the 16 held-out labels are all 1, for which {metric} is not defined" in err
    assert json.loads((tmp_path / "a/result.json").read_text())["score"] == 0.0


def test_nan_ends_a_run_with_its_step(run: Any, quick: list[object], tmp_path: Path) -> None:
    rate = ["--learning-rate", 1e30]
    code, out, err = run("record", *quick, *rate, "--every", 1, "--output", tmp_path / "t")
    assert (code, out) == (1, "")
    if torch.cuda.is_available():  # where the loss is looked at seldom, it is the recorder that sees it first
        assert "is NaN or infinite; the 1 points before it are kept" in err
    else:
        assert "the loss is NaN or infinite at step 2 of 8, so training ends. Points and checkpoints written" in err
    assert len(Trajectory(tmp_path / "t")) == 1  # what was recorded is kept and can be read
    code, out, err = run("tune", *quick, *rate, "--basis", "none", "--output", tmp_path / "a")
    assert (code, out) == (1, "")
    assert "at step 2 of 8" in err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--z-learning-rate", "nan"],
        ["--z-learning-rate", "inf"],
        ["--init-std", "nan"],
        ["--init-std", "inf"],
        ["--rank", "100000"],
    ],
)
def test_settings_that_are_no_numbers_are_misuse(
    run: Any, quick: list[object], tmp_path: Path, words: list[str]
) -> None:
    code, out, err = run("tune", *quick, "--basis", "random", "--rank", 2, "--output", tmp_path / "a", *words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_a_layer_that_stands_still_goes_all_the_way(
    run: Any, quick: list[object], model_folder: Path, tmp_path: Path
) -> None:
    model = base_model(str(model_folder), TASKS["sst2"], 0)
    recorder = TrajectoryRecorder(model, by_layer(model), tmp_path / "t")
    for step in range(3):
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[step] += 0.1
        recorder.record(step)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = run("discover", tmp_path / "t", "--rank", 2, "--output", tmp_path / "b")
    assert (code, "block 'bert.encoder.layer.0' does not move, so it gets no directions" in err) == (0, True)
    code, out, _ = run("inspect", tmp_path / "b")
    assert code == 0
    assert "rank 0 to 2" in " ".join(out.split())
    assert "nan" not in out
    code, _, _ = run("tune", *quick, "--basis", tmp_path / "b", "--output", tmp_path / "a")
    assert code == 0
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["subspace_parameters"] == 2
    code, out, _ = run("evaluate", *quick[:6], "--adapter", tmp_path / "a")
    assert (code, f"{result['score']:.4f}" in out) == (0, True)


def test_a_run_that_stands_still_has_no_directions(run: Any, model_folder: Path, tmp_path: Path) -> None:
    model = base_model(str(model_folder), TASKS["sst2"], 0)
    recorder = TrajectoryRecorder(model, by_layer(model), tmp_path / "t")
    for step in range(3):
        recorder.record(step)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = run("discover", tmp_path / "t", "--rank", 2, "--output", tmp_path / "b")
    assert (code, out) == (2, "")
    assert "no point differs from theta_0 in any block" in err
    assert run("inspect", tmp_path / "b")[0] == 2  # and no basis is left that pretends to be one


def test_a_model_without_tokenizer_and_rows_that_are_too_long(
    run: Any, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder / name, bare)
    where = ["--task", "sst2", "--output", tmp_path / "out"]
    code, _, err = run("record", "--model", bare, "--data", data_folder, *where)
    assert (code, "has no tokenizer in its folder" in err) == (2, True)
    rows = pd.DataFrame({"sentence": ["film " * 60, "fine", "dull"], "label": [0, 1, 0]})
    for split in ("train", "validation"):
        rows.to_csv(tmp_path / f"{split}.csv", index=False)
    code, _, err = run("record", "--model", model_folder, "--data", tmp_path, *where)
    assert (code, "has 62 tokens" in err, "--max-length 32" in err) == (2, True, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_an_interrupt_that_compiled_code_swallows_is_told_as_one() -> None:
    """Torch may answer an interrupt inside its own code with a ValueError about something else."""
    code = """
import os, signal, sys
from tinyspan import cli

def app():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("was not interrupted")
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object type")

cli.application.app = app
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith("tinyspan: interrupted: repeat the command")


def test_options_of_studies_that_name_something_twice_or_no_number() -> None:
    assert cli.studies._models("a=x,b") == {"a": "x", "b": "b"}
    assert cli.studies._models("a=,b=x") == {"a": "a", "b": "x"}
    assert cli.studies._models("a,b") == ["a", "b"]
    for twice in ("a=x,a=y", "a,a"):
        with pytest.raises(InputError, match=f"contains a name twice: {twice}"):
            cli.studies._models(twice)
    assert cli.studies.executor_options(["nice=-5", "name=--5", "gpus=2"]) == {"nice": -5, "name": "--5", "gpus": 2}


def test_the_page_of_the_commands_lists_every_one() -> None:
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    commands = [entry.callback for entry in cli.app.registered_commands]
    rows = [f"| `tinyspan {work.__name__}` | {' '.join((work.__doc__ or '').split())} |" for work in commands if work]
    assert re.findall(r"^\| `tinyspan .*$", page, re.MULTILINE) == rows


def test_control_characters_of_files_are_written_out() -> None:
    assert printable("a\x1b[2Jb\nc\u00e9") == "a\\x1b[2Jb\nc\u00e9"

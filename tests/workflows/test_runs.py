"""Record, tune and evaluate end to end on the miniature model and language."""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    GPT2Model,
    LongformerConfig,
    RobertaConfig,
    T5Config,
    TrainerCallback,
    XLMRobertaXLConfig,
    XLNetConfig,
)

from tinyspan import Basis, InputError, MismatchError, StorageError, SubspaceModel, Trajectory, by_layer, svd_basis
from tinyspan.errors import Interrupted
from tinyspan.io.manifests import attach
from tinyspan.io.storage import read_json, write_json
from tinyspan.trajectories import points as recording
from tinyspan.workflows.models import base_model, embedding_modules, head_modules
from tinyspan.workflows.predictor import Predictor
from tinyspan.workflows.results import settings_of
from tinyspan.workflows.resumable import ResumableTrainer
from tinyspan.workflows.rows import Prepared, digest_of, positions_of, prepare
from tinyspan.workflows.runs import evaluate, record, starting_model, subspace_model, tune
from tinyspan.workflows.settings import Settings, SubspaceOptions
from tinyspan.workflows.tasks import Classification, Task, get_task
from tinyspan.workflows.training import run_of

pytestmark = pytest.mark.studies

SETTINGS = Settings(epochs=2, batch_size=16, learning_rate=3e-3, z_learning_rate=3e-2, precision="float32")
KEYS = {
    "method", "model", "task", "type", "seed", "metric", "labels", "score", "epochs", "history", "subspace_parameters",
    "ordinary_parameters", "metrics", "seconds", "peak_memory_bytes", "basis", "versions", "settings", "rows",
    "draw", "row_digests", "hardware", "intervals", "majority", "per_class", "confusion_matrix", "calibration",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "full"
    record(prepared, SETTINGS, folder, every=2)
    return folder


@pytest.fixture(scope="module")
def basis(recorded: Path) -> Basis:
    found = svd_basis(Trajectory(recorded), rank=3)
    found.save_pretrained(recorded.parent / "basis")
    return found


def test_a_classifier_becomes_the_start_of_a_regression(recorded: Path, similarity: Prepared, tmp_path: Path) -> None:
    """Its config says that it is a classifier, and transformers refuses one with a single label."""
    tuned = replace(similarity, model=str(recorded / "model"))
    before = base_model(str(recorded / "model"), get_task("sst2"), 0)
    after = base_model(tuned.model, tuned.task, 0)
    assert (after.config.problem_type, after.config.num_labels) == ("regression", 1)
    assert torch.equal(before.bert.pooler.dense.weight, after.bert.pooler.dense.weight)
    assert tune(tuned, SETTINGS, "none", tmp_path / "a")["metric"] == "pearson"
    again = base_model(tuned.model, get_task("mnli"), 0)
    assert (again.config.problem_type, again.config.num_labels) == ("single_label_classification", 3)


def test_how_many_tokens_a_model_takes() -> None:
    """XLNet says -1, RoBERTa counts positions from behind the padding token, T5 says nothing."""
    assert positions_of(XLNetConfig()) == math.inf
    for config in (RobertaConfig, LongformerConfig, XLMRobertaXLConfig):
        assert positions_of(config(max_position_embeddings=514, pad_token_id=1)) == 512
    assert positions_of(BertConfig(max_position_embeddings=32, pad_token_id=0)) == 32
    assert positions_of(T5Config()) == math.inf


def test_rows_that_leave_no_room_for_a_text_are_refused(model_folder: Path, glue_folder: Path) -> None:
    for task, least in (("sst2", 3), ("mrpc", 4)):
        data = glue_folder / task
        with pytest.raises(InputError, match=f"special tokens beside its text: max_length={least} or more"):
            prepare(str(model_folder), task, data=data, max_length=least - 1)
        rows = prepare(str(model_folder), task, data=data, max_length=least)
        assert max(map(len, rows.validation["input_ids"])) == least


def test_modules_outside_the_blocks(prepared: Prepared) -> None:
    model = base_model(prepared.model, prepared.task, 0)
    partition = by_layer(model)
    assert embedding_modules(model, partition) == ["bert.embeddings"]
    assert head_modules(model, partition) == ["bert.pooler", "classifier"]


def test_the_heads_first_weights_depend_on_the_seed_alone(prepared: Prepared) -> None:
    state = torch.random.get_rng_state()
    one, again, other = (base_model(prepared.model, prepared.task, seed).classifier.weight for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_record_leaves_trajectory_model_and_result(recorded: Path, prepared: Prepared) -> None:
    result = read_json(recorded / "result.json")
    assert set(result) - {"notes"} == KEYS
    assert (result["method"], result["epochs"], result["basis"]) == ("full", 2, None)
    assert [row["epoch"] for row in result["history"]] == [1.0, 2.0]
    assert result["history"][-1]["score"] == result["score"]
    assert result["ordinary_parameters"] == sum(
        p.numel() for p in base_model(prepared.model, prepared.task, 0).parameters()
    )
    trajectory = Trajectory(recorded)
    assert trajectory.steps == [1, 3, 5, 7]
    # the end of the path is the model that was saved, and that model scores what was reported
    final = base_model(str(recorded / "model"), prepared.task, 0, need_head=True)
    for block in trajectory.partition:
        torch.testing.assert_close(
            trajectory.start(block) + trajectory.delta(block), block.flatten(trajectory.partition.select(final))
        )
    assert evaluate(replace(prepared, model=str(recorded / "model")), SETTINGS)["score"] == result["score"]


def test_training_for_a_number_of_steps(prepared: Prepared, tmp_path: Path) -> None:
    """The half epoch at the end has a point and a loss of its own."""
    assert prepared.train is not None
    per_epoch = SETTINGS.steps_per_epoch(len(prepared.train))
    settings = replace(SETTINGS, max_steps=per_epoch + per_epoch // 2, module_learning_rates={"classifier": 0.01})
    assert settings.steps(len(prepared.train)) == settings.max_steps
    result = record(prepared, settings, tmp_path / "full")
    assert [row["epoch"] for row in result["history"]] == [1.0, 1.5] == [1.0, result["epochs"]]
    assert Trajectory(tmp_path / "full").steps == [per_epoch - 1, per_epoch + per_epoch // 2 - 1]
    assert result["settings"]["module_learning_rates"] == {"classifier": 0.01}
    for wrong in ({"max_steps": 0}, {"module_learning_rates": {"classifier": 0.0}}):
        with pytest.raises(InputError, match="must be above 0"):
            replace(SETTINGS, **wrong)  # type: ignore[arg-type]


def test_rows_are_set_aside_from_training(prepared: Prepared) -> None:
    shuffled = replace(prepared, shuffled=True)
    assert shuffled.train is not None
    rest, to_choose = shuffled.set_aside(10)
    assert rest.train is not None
    assert [*rest.train["input_ids"], *to_choose.validation["input_ids"]] == list(shuffled.train["input_ids"])
    assert len(to_choose.validation) == 10
    assert to_choose.train == rest.train
    assert rest.validation == prepared.validation
    prompted = replace(shuffled, completions=("fine",) * 32).set_aside(10)
    assert [len(one.completions) for one in prompted] == [32, 0]  # of the held-out rows alone
    for rows in (len(shuffled.train), 0, -1, 10**6):
        with pytest.raises(InputError, match=f"cannot set {rows} of .* expected at least 1 and fewer than all"):
            shuffled.set_aside(rows)
    with pytest.raises(InputError, match="of 0 training rows aside"):
        replace(prepared, train=None).set_aside(1)


def test_rows_that_are_set_aside_and_trained_on_are_told(prepared: Prepared) -> None:
    """Not where words are unknown to the tokenizer: these texts may differ."""
    assert prepared.train is not None
    rows = concatenate_datasets([prepared.train, prepared.train.select([0, 1])])
    twice = replace(prepared, train=rows, shuffled=True, train_numbers=())
    with pytest.warns(UserWarning, match="sst2: 2 of 3 rows that are set aside have the tokens of other training rows"):
        twice.set_aside(3)
    with pytest.warns(UserWarning, match="sst2: 2 of 3 rows that are set aside"):
        twice.with_last_aside(3)
    word = next(token for token in rows["input_ids"][0] if token not in rows["input_ids"][1])
    with pytest.warns(UserWarning, match="sst2: 1 of 3 rows that are set aside"):
        replace(twice, tokenizer=SimpleNamespace(unk_token_id=word)).set_aside(3)


def test_rows_that_are_sorted_by_label_are_set_aside_by_the_seed(prepared: Prepared) -> None:
    assert prepared.train is not None
    in_order = replace(prepared, train=prepared.train.sort("labels"))
    assert in_order.train is not None
    rest, to_choose = in_order.set_aside(20)
    assert set(to_choose.validation["labels"]) == {0, 1}
    assert rest.train is not None
    parts = [*rest.train["input_ids"], *to_choose.validation["input_ids"]]
    assert sorted(parts) == sorted(in_order.train["input_ids"])
    assert in_order.set_aside(20)[1].digests() == to_choose.digests()
    assert replace(in_order, draw_seed=1).set_aside(20)[1].digests() != to_choose.digests()


def test_training_needs_training_rows(prepared: Prepared, tmp_path: Path) -> None:
    scored = replace(prepared, train=None)
    with pytest.raises(InputError, match="there are no training rows: prepare the task with train=True"):
        record(scored, SETTINGS, tmp_path / "run")
    with pytest.raises(InputError, match="there are no training rows: prepare the task with train=True"):
        tune(scored, SETTINGS, "none", tmp_path / "a")


def test_rows_keep_their_numbers_when_they_are_set_aside(model_folder: Path, data_folder: Path) -> None:
    one = prepare(str(model_folder), "sst2", data=data_folder, train_rows=40)
    rest, to_choose = one.set_aside(10)
    assert rest.train is not None
    assert rest.row_numbers == one.row_numbers
    assert {*rest.train_numbers}.isdisjoint(to_choose.row_numbers)
    texts = get_task("sst2").read("train", data_folder)["sentence"]
    for tokens, numbers, count in (
        (rest.train, rest.train_numbers, 30),
        (to_choose.validation, to_choose.row_numbers, 10),
    ):
        assert len(numbers) == count
        assert list(tokens["input_ids"]) == one.tokenizer([texts[number] for number in numbers])["input_ids"]
    assert replace(one, train_numbers=()).set_aside(10)[1].row_numbers == ()


@pytest.mark.parametrize("index", [list("abcdef"), [0] * 6])
def test_an_index_that_does_not_number_rows(model_folder: Path, index: list[Any]) -> None:
    example = Classification.example()
    task = replace(example.task, source=lambda _, split: example.rows.set_axis(index))  # type: ignore[call-arg]
    one = prepare(str(model_folder), task)
    assert (len(one.validation), one.row_numbers, one.train_numbers) == (6, (), ())


def test_a_run_sets_rows_of_its_training_aside(prepared: Prepared, tmp_path: Path) -> None:
    settings = replace(SETTINGS, set_aside=24, epochs=1)
    result = tune(prepared, settings, "none", tmp_path / "a")
    assert result["rows"] == {"train": 40, "validation": 32, "aside": 24}
    rest = prepared.set_aside(24)[0]
    plain = tune(rest, replace(settings, set_aside=0), "none", tmp_path / "b")["history"]
    scored = [{name: row.pop(name) for name in ("aside_score", "aside_loss")} for row in result["history"]]
    assert result["history"] == plain  # scoring these rows, too, changes nothing else
    on_aside = tune(prepared.set_aside(24)[1], replace(settings, set_aside=0), "none", tmp_path / "d")["history"]
    expected = [{"aside_score": row["score"], "aside_loss": row["validation_loss"]} for row in on_aside]
    for one, other in zip(scored, expected, strict=True):
        assert one == pytest.approx(other)
    split = prepared.with_aside(24)
    assert split.with_aside(24) is split
    assert prepared.with_aside(0) is prepared
    assert {*split.digests()} == {"train", "validation", "aside"}
    with pytest.raises(InputError, match="24 training rows are set aside already; expected 0"):
        tune(split, SETTINGS, "none", tmp_path / "c")
    with pytest.raises(InputError, match="cannot set 64 of 64 training rows aside"):
        record(prepared, replace(settings, set_aside=64), tmp_path / "c")
    with pytest.raises(InputError, match="set_aside must be at least 0, got -1"):
        replace(SETTINGS, set_aside=-1)


def test_rows_that_prepare_draws_are_shuffled(model_folder: Path, data_folder: Path) -> None:
    for limit, shuffled in ((63, True), (64, False), (None, False)):
        rows = prepare(str(model_folder), "sst2", data=data_folder, train_rows=limit, draw_seed=3)
        assert (rows.shuffled, rows.draw_seed) == (shuffled, 3)
    assert not prepare(str(model_folder), "sst2", data=data_folder, train_rows=63, train=False).shuffled


def test_the_draw_seed_determines_the_rows(model_folder: Path, data_folder: Path) -> None:
    """A larger draw begins with the rows of a smaller one."""

    def draw(rows: int, seed: int) -> tuple[tuple[int, ...], list[int]]:
        drawn = prepare(str(model_folder), "sst2", data=data_folder, train_rows=rows, validation_rows=9, draw_seed=seed)
        return drawn.train_numbers, sorted(drawn.row_numbers)

    one, larger, other = draw(20, 0), draw(30, 0), draw(20, 1)
    assert one == (larger[0][:20], larger[1])
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_a_digest_is_that_of_the_rows_alone() -> None:
    columns: dict[str, list[Any]] = {"input_ids": [[1, 2, 3], [4, 5], [6], [7, 8]], "labels": [0, 1, 0, 1]}
    for part in ([0, 1], [1, 2], [2, 3], [2, 0], [0, 1, 2, 3]):
        alone = Dataset.from_dict({name: [values[row] for row in part] for name, values in columns.items()})
        assert digest_of(Dataset.from_dict(columns).select(part)) == digest_of(alone)


def test_the_last_rows_of_a_draw_are_those_that_a_smaller_one_lacks(model_folder: Path, data_folder: Path) -> None:
    draws = [prepare(str(model_folder), "sst2", data=data_folder, train_rows=rows) for rows in (20, 30)]
    smaller, larger = draws
    split = larger.with_last_aside(10)
    assert split.digests()["train"] == smaller.digests()["train"]
    assert split.train_numbers == smaller.train_numbers
    assert split.aside_numbers == larger.train_numbers[20:]
    assert split.aside is not None
    assert larger.train is not None
    assert list(split.aside["input_ids"]) == list(larger.train["input_ids"])[20:]


def test_a_seed_determines_the_head_and_a_constructed_basis(prepared: Prepared) -> None:
    def start(seed: int) -> tuple[list[list[float]], str]:
        subspace = subspace_model(prepared, replace(SETTINGS, seed=seed), "random", 2)
        return subspace.model.classifier.weight.tolist(), subspace.basis.content_hash()

    one, again, other = start(0), start(0), start(1)
    assert one == again
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_each_task_and_seed_has_its_own_initial_z(prepared: Prepared) -> None:
    def initial(name: str, seed: int) -> list[Any]:
        named = replace(prepared, task=replace(prepared.task, name=name))
        options = SubspaceOptions(init_std=0.1)
        return [z.tolist() for z in subspace_model(named, replace(SETTINGS, seed=seed), "random", 2, options).z]

    one = initial("sst2", 0)
    assert one == initial("sst2", 0)
    assert one != initial("cola", 0)
    assert one != initial("sst2", 1)


@dataclass(frozen=True)
class Other(Classification):
    """Another loss or metric under the name of a known task."""


def test_tasks_of_one_name_are_different_runs(prepared: Prepared) -> None:
    def run(task: Task) -> dict[str, Any]:
        return run_of(replace(prepared, task=task), SETTINGS)

    fields = ("sst2", ("sentence",), ("negative", "positive"), "accuracy")
    one = run(Classification(*fields))
    assert one == run(Classification(*fields)) == json.loads(json.dumps(one))
    others = (
        Other(*fields),
        Classification(*fields[:3], "matthews"),
        Classification("sst2", ("text",), *fields[2:]),
        Classification(*fields[:2], ("no", "yes"), fields[3]),
    )
    assert all(run(task) != one for task in others)


@pytest.mark.parametrize("method", ["intrinsic", "random", "fastfood", "none"])
def test_tune_then_evaluate_gives_the_same_score(prepared: Prepared, basis: Basis, tmp_path: Path, method: str) -> None:
    chosen, rank = basis if method == "intrinsic" else method, {"random": 3, "fastfood": 6}.get(method)
    result = tune(prepared, SETTINGS, chosen, tmp_path / "a", rank=rank)  # type: ignore[arg-type]
    assert set(result) - {"notes"} == KEYS | {"options"}
    assert result["method"] == {"none": "freeze"}.get(method, method)
    assert result["subspace_parameters"] == (0 if method == "none" else 6)
    assert (result["basis"] is None) == (method == "none")
    again = evaluate(prepared, SETTINGS, tmp_path / "a", output=tmp_path / "e")
    assert (again["score"], again["method"]) == (result["score"], result["method"])
    assert json.loads((tmp_path / "e/result.json").read_text())["score"] == result["score"]


def test_the_same_seed_gives_the_same_run(prepared: Prepared, basis: Basis, tmp_path: Path) -> None:
    first = tune(prepared, SETTINGS, basis, tmp_path / "a")
    torch.rand(3)  # the global generator's state must not matter
    again = tune(prepared, SETTINGS, basis, tmp_path / "b")
    other = tune(prepared, replace(SETTINGS, seed=5), basis, tmp_path / "c")
    assert first["history"] == again["history"] != other["history"]
    same = (tmp_path / "a/adapter.safetensors").read_bytes() == (tmp_path / "b/adapter.safetensors").read_bytes()
    assert same


def test_the_numbers_trained_are_the_numbers_told(prepared: Prepared, basis: Basis, tmp_path: Path) -> None:
    options = SubspaceOptions(ensemble=4, init_std=0.1, train_embeddings=False)
    result = tune(prepared, SETTINGS, basis, tmp_path / "a", options=options)
    head = 16 * 16 + 16 + 2 * 16 + 2
    assert (result["subspace_parameters"], result["ordinary_parameters"]) == (4 * 3 * 2, head)
    loaded = SubspaceModel.from_pretrained(base_model(prepared.model, prepared.task, 9), tmp_path / "a")
    pretrained = base_model(prepared.model, prepared.task, 9)
    assert torch.equal(loaded.model.bert.embeddings.word_embeddings.weight,
                       pretrained.bert.embeddings.word_embeddings.weight)  # fmt: skip


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_regression(similarity: Prepared, tmp_path: Path, start: Any) -> None:
    result = record(similarity, replace(SETTINGS, epochs=80, regression_start=start), tmp_path / "out")
    assert result["metric"] == "pearson"
    assert result["score"] > 0.9
    assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]


def test_the_model_of_a_run_knows_its_length(prepared: Prepared, tmp_path: Path) -> None:
    record(prepared, replace(SETTINGS, epochs=1, max_length=12), tmp_path / "run")
    assert AutoConfig.from_pretrained(tmp_path / "run/model").trained_max_length == 12
    assert Predictor(str(tmp_path / "run/model"), text=["sentence"], task_type="classification").max_length == 12


def test_a_new_regression_starts_at_the_mean_of_its_labels(similarity: Prepared, tmp_path: Path) -> None:
    choices = [replace(SETTINGS, regression_start=choice) for choice in ("mean", "zero")]
    start, zero = (starting_model(similarity, choice) for choice in choices)
    assert start.classifier.bias.item() == (4.5 + 0.25) / 2
    assert zero.classifier.bias.item() == 0
    differing = [name for name, value in start.state_dict().items() if not torch.equal(value, zero.state_dict()[name])]
    assert differing == ["classifier.bias"]
    subspace = subspace_model(similarity, SETTINGS, "none")
    assert subspace.model.classifier.bias.item() == (4.5 + 0.25) / 2

    record(similarity, replace(SETTINGS, epochs=1), tmp_path / "out")  # whose head is trained, and stays as it is
    trained = replace(similarity, model=str(tmp_path / "out/model"))
    ends = [starting_model(trained, choice) for choice in choices]
    assert torch.equal(ends[0].classifier.bias, ends[1].classifier.bias)
    assert 0 < abs(ends[0].classifier.bias.item() - (4.5 + 0.25) / 2) < 0.1


def test_an_adapter_that_does_not_tell_its_start_began_at_zero(similarity: Prepared, tmp_path: Path) -> None:
    tune(similarity, replace(SETTINGS, epochs=1), "none", tmp_path / "a")
    assert settings_of(tmp_path / "a").regression_start == "mean"
    result = read_json(tmp_path / "a/result.json")
    del result["settings"]["regression_start"]
    write_json(tmp_path / "a/result.json", result)
    attach(tmp_path / "a", ["result.json"])
    assert settings_of(tmp_path / "a").regression_start == "zero"


def test_only_a_regression_starts_at_a_mean(prepared: Prepared) -> None:
    assert prepared.label_mean is None
    assert not starting_model(prepared, SETTINGS).classifier.bias.any()


def test_a_head_without_a_bias_starts_as_it_is(similarity: Prepared, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(similarity.tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    with pytest.warns(UserWarning, match="no bias"):
        one = base_model(str(tmp_path / "gpt2"), similarity.task, 0, label_mean=2.0)
    other = base_model(str(tmp_path / "gpt2"), similarity.task, 0)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_refusals_come_before_any_work(
    prepared: Prepared, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr("tinyspan.workflows.runs.fine_tune", never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for call in (
        lambda: record(prepared, SETTINGS, tmp_path / "full"),
        lambda: tune(prepared, SETTINGS, basis, tmp_path / "full", overwrite=True),
        lambda: evaluate(prepared, SETTINGS, output=tmp_path / "full"),
    ):
        with pytest.raises(InputError, match="holds something else"):
            call()
    with pytest.raises(InputError, match="give rank= with basis="):
        tune(prepared, SETTINGS, "random", tmp_path / "a")
    with pytest.raises(InputError, match="give rank= with basis="):
        tune(prepared, SETTINGS, basis, tmp_path / "a", rank=2)
    with pytest.raises(InputError, match="has no trained head"):
        evaluate(prepared, SETTINGS)
    with pytest.raises(InputError, match="above 0"):
        Settings(epochs=0)
    with pytest.raises(InputError, match="'mean' or 'zero'"):
        Settings(regression_start="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="could not be loaded"):
        base_model(str(tmp_path / "nothing"), prepared.task, 0)
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_without_its_encoder_is_no_pre_trained_model(prepared: Prepared, tmp_path: Path) -> None:
    from tinyspan.io.tensors import write_tensors

    model = base_model(prepared.model, prepared.task, 0)
    model.save_pretrained(tmp_path / "m")
    renamed = {name.replace("encoder", "enkoder"): value for name, value in model.state_dict().items()}
    write_tensors(tmp_path / "m/model.safetensors", renamed)
    with pytest.raises(InputError, match="is not pre-trained: 32 weights"):
        base_model(str(tmp_path / "m"), prepared.task, 0)


def test_a_basis_of_another_base_model_is_refused(prepared: Prepared, basis: Basis, tmp_path: Path) -> None:
    other = base_model(prepared.model, prepared.task, 0)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.bias.add_(1e-6)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"differs in block 'bert\.encoder\.layer\.1'"):
        tune(replace(prepared, model=str(tmp_path / "other")), SETTINGS, basis, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_nan_is_an_error_not_a_number(prepared: Prepared, tmp_path: Path) -> None:
    from tinyspan import TinyspanError

    with pytest.raises(TinyspanError, match="NaN or infinite"):
        tune(prepared, replace(SETTINGS, learning_rate=1e30), "none", tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Stop(TrainerCallback):
    """Interrupt a run after a step, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def outcome(folder: Path) -> tuple[Any, ...]:
    """What two equal runs agree on: history, score, and every weight."""
    result = read_json(folder / "result.json")
    files = sorted(path for path in folder.rglob("*.safetensors"))
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return result["history"], result["score"], contents


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    record(prepared, SETTINGS, folder / "record", every=3)
    tune(prepared, SETTINGS, "random", folder / "tune", rank=3)
    return {name: outcome(folder / name) for name in ("record", "tune")}


@pytest.mark.parametrize("after", [1, 3, 4, 5, 7, 8])  # 4 steps an epoch, a point every 3: before, at, and between
@pytest.mark.parametrize("command", ["record", "tune"])
def test_an_interrupted_run_ends_bit_for_bit_as_another(
    prepared: Prepared, undisturbed: Any, tmp_path: Path, command: str, after: int
) -> None:
    def run(*callbacks: TrainerCallback) -> dict[str, Any]:
        if command == "record":
            return record(prepared, SETTINGS, tmp_path / "out", every=3, callbacks=callbacks)
        return tune(prepared, SETTINGS, "random", tmp_path / "out", rank=3, callbacks=callbacks)

    with pytest.raises(Interrupted, match="the same command goes on from there"):
        run(Stop(after))
    assert not (tmp_path / "out/result.json").exists()
    run()
    assert outcome(tmp_path / "out") == undisturbed[command]
    assert not (tmp_path / "out/unfinished").exists()
    with pytest.raises(InputError, match="earlier output"):
        run()


def test_a_run_in_a_sparse_basis_is_interrupted(prepared: Prepared, recorded: Path, tmp_path: Path) -> None:
    sparse = svd_basis(Trajectory(recorded), rank=3, density=0.1)  # which every state of training contains
    with pytest.raises(Interrupted, match="up to step 4"):
        tune(prepared, SETTINGS, sparse, tmp_path / "out", callbacks=[Stop(5)])
    tune(prepared, SETTINGS, sparse, tmp_path / "out")
    tune(prepared, SETTINGS, sparse, tmp_path / "whole")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_no_state_of_training_is_ahead_of_the_points(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, complete, seen = recording.write_tensors, ResumableTrainer._complete, []

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.05)
        return write(*arguments)

    def watched(trainer: ResumableTrainer, *arguments: Any) -> None:
        lines = (tmp_path / "out/points.jsonl").read_bytes().splitlines()
        seen.append((trainer.state.global_step, len(lines)))
        complete(trainer, *arguments)

    monkeypatch.setattr(recording, "write_tensors", slowly)
    monkeypatch.setattr(ResumableTrainer, "_complete", watched)
    record(prepared, SETTINGS, tmp_path / "out", every=3)
    assert seen == [(3, 1), (4, 1), (6, 2), (8, 3)]
    assert Trajectory(tmp_path / "out").steps == [2, 5, 7]


def test_an_interrupted_run_goes_on_in_its_dtype(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        record(prepared, SETTINGS, tmp_path / "out", every=3, callbacks=[Stop(5)], dtype=torch.bfloat16)
    with pytest.raises(InputError, match="unfinished work with dtype bfloat16, where this has None"):
        record(prepared, SETTINGS, tmp_path / "out", every=3)
    record(prepared, SETTINGS, tmp_path / "out", every=3, dtype=torch.bfloat16)
    record(prepared, SETTINGS, tmp_path / "whole", every=3, dtype=torch.bfloat16)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    with pytest.raises(InputError, match="deltas are stored with"):
        record(prepared, SETTINGS, tmp_path / "other", dtype=torch.float16)
    assert not (tmp_path / "other").exists()


def test_unfinished_runs_go_on_with_their_own_settings_and_rows_alone(
    prepared: Prepared, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match="keeps 1 point and the training up to step 4"):
        record(prepared, SETTINGS, tmp_path / "out", every=3, callbacks=[Stop(5)])
    before = (tmp_path / "out/points.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"settings\.learning_rate 0\.003, where this has 0\.004"):
        record(prepared, replace(SETTINGS, learning_rate=4e-3), tmp_path / "out", every=3)
    with pytest.raises(InputError, match="unfinished work with every 3, where this has 2"):
        record(prepared, SETTINGS, tmp_path / "out", every=2)
    fewer = prepare(str(model_folder), "sst2", data=data_folder, train_rows=63)
    with pytest.raises(InputError, match=r"unfinished work with rows\.train"):
        record(fewer, SETTINGS, tmp_path / "out", every=3)
    assert (tmp_path / "out/points.jsonl").read_bytes() == before
    record(fewer, SETTINGS, tmp_path / "out", every=3, overwrite=True)
    assert Trajectory(tmp_path / "out").steps == [2, 5, 7]


def test_an_unfinished_adapter_goes_on_with_its_own_options_alone(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tune(prepared, SETTINGS, "random", tmp_path / "out", rank=2, callbacks=[Stop(1)])
    with pytest.raises(InputError, match=r"unfinished work with options\.ensemble 1, where this has 2"):
        tune(prepared, SETTINGS, "random", tmp_path / "out", rank=2, options=SubspaceOptions(ensemble=2))


@pytest.mark.parametrize("damage", ["flip", "cut", "unfinished"])
def test_a_damaged_state_is_noticed_and_the_one_before_is_taken(
    prepared: Prepared, undisturbed: Any, tmp_path: Path, damage: str
) -> None:
    with pytest.raises(Interrupted):
        record(prepared, SETTINGS, tmp_path / "out", every=3, callbacks=[Stop(7)])
    states = tmp_path / "out/unfinished"
    assert sorted(path.name for path in states.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    file = states / "checkpoint-6" / {"flip": "optimizer.pt", "cut": "model.safetensors"}.get(damage, "whole.json")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if damage == "flip" else data[:-1])
    if damage == "unfinished":
        file.unlink()
        record(prepared, SETTINGS, tmp_path / "out", every=3)
    else:
        with pytest.warns(UserWarning, match="resumes from an earlier state"):
            record(prepared, SETTINGS, tmp_path / "out", every=3)
    assert outcome(tmp_path / "out") == undisturbed["record"]


def test_a_full_disk_ends_training_with_what_is_kept(
    prepared: Prepared, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def full(content: object, path: Any, *arguments: Any, **options: Any) -> None:
        if "checkpoint-4" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")
        real(content, path, *arguments, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"checkpoint-4 could not be written: the disk or quota is full"):
        record(prepared, SETTINGS, tmp_path / "out", every=3)
    assert [path.name for path in (tmp_path / "out/unfinished").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    record(prepared, SETTINGS, tmp_path / "out", every=3)
    assert outcome(tmp_path / "out") == undisturbed["record"]


def test_a_config_names_no_code_on_the_hub_nor_a_package_that_is_not_there(prepared: Prepared, tmp_path: Path) -> None:
    plain = base_model(prepared.model, prepared.task, 0)
    plain.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        (tmp_path / "m/config.json").write_text(json.dumps(config | {key: "kernels-community/flash-attn2"}))
        loaded = base_model(str(tmp_path / "m"), prepared.task, 0)
        assert loaded.config._attn_implementation == plain.config._attn_implementation
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "m/config.json").write_text(json.dumps(quantized))
    with pytest.raises(InputError, match="could not be loaded"):
        base_model(str(tmp_path / "m"), prepared.task, 0)

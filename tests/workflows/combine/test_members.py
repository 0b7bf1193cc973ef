"""Models to combine: every form gives the weights that the model itself has, and what does not fit is refused."""

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import model_of
from miniatures import tokenizer as tokenizer_of_words
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from tinyspan import (
    InputError,
    MismatchError,
    StorageError,
    SubspaceModel,
    Trajectory,
    TrajectoryRecorder,
    by_layer,
    random_basis,
)
from tinyspan.io.folders import UNFINISHED
from tinyspan.io.storage import read_json, write_json
from tinyspan.labels import set_label_names
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.trajectories.trajectory import point_name
from tinyspan.workflows.combine import model_forms, shared_base
from tinyspan.workflows.combine.members import digest, open_members, require_distinct, require_several
from tinyspan.workflows.combine.model_forms import RecordedRun
from tinyspan.workflows.combine.shared_base import SharedBase
from tinyspan.workflows.models import base_model, load_model, tokenizer_of
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import record, tune
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task

peft = pytest.importorskip("peft")

SETTINGS = Settings(epochs=2, batch_size=16, learning_rate=3e-3, z_learning_rate=3e-2, precision="float32")
SST2 = get_task("sst2")


@torch.no_grad()
def moved(model: Any, seed: int) -> Any:
    """Change all weights of a model at random."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value += 0.02 * torch.randn(value.shape, generator=generator)
    return model


@pytest.fixture
def fine_tuned(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a fine-tuned model: `fine_tuned("a", seed=1)` leaves tmp_path/a, with the labels and tokenizer of sst2."""

    def write(name: str, seed: int = 1, base: Path = model_folder, change: Any = None, **options: Any) -> Path:
        model = moved(load_model(str(base), SST2, 0).model, seed)
        if change is not None:
            with torch.no_grad():
                change(model)
        model.save_pretrained(tmp_path / name, **options)
        tokenizer_of(str(base), model.config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@dataclass
class Trained:
    """A recorded run, an adapter and a LoRA of one base model."""

    run: Path
    adapter: Path
    lora: Path


def write_lora(base: Path, folder: Path, head: bool = True, targets: tuple[str, ...] = ("query",)) -> Path:
    """Write a LoRA with random updates of every layer and of the head."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(base)
        task_type = "SEQ_CLS" if head else None
        config = peft.LoraConfig(task_type=task_type, r=2, target_modules=list(targets), init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    record(prepared, SETTINGS, folder / "full", every=2)
    tune(prepared, SETTINGS, "random", folder / "adapter", rank=3)
    return Trained(folder / "full", folder / "adapter", write_lora(Path(prepared.model), folder / "lora"))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def base_weights(model_folder: Path) -> dict[str, Tensor]:
    return weights(load_model(str(model_folder), SST2, 0).model)


def names(folders: list[Path]) -> list[str]:
    return [str(folder) for folder in folders]


def refused(sources: list[Path], base: Path | None, kind: type[InputError] = InputError) -> str:
    """Return the message with which the sources are refused."""
    with pytest.raises(InputError) as caught:
        open_members(names(sources), SST2, None if base is None else str(base))
    assert type(caught.value) is kind
    return str(caught.value)


# -- what each form of a model gives ----------------------------------------------------------------------------------


def test_fine_tuned_models(fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    folders = [fine_tuned("a", 1), fine_tuned("b", 2)]
    found = open_members(names(folders), SST2, str(model_folder))
    assert found.base == str(model_folder)
    assert found.outputs == ("negative", "positive")
    assert [(one.name, one.source, one.order, one.result) for one in found.members] == [
        ("a", str(folders[0]), None, None),
        ("b", str(folders[1]), None, None),
    ]
    expected = base_weights(model_folder)
    for member, folder in zip(found.members, folders, strict=True):
        state = member.load()
        own = weights(AutoModelForSequenceClassification.from_pretrained(folder))
        assert [(name, value.shape) for name, value in state.items()] == [(n, v.shape) for n, v in expected.items()]
        assert all(torch.equal(state[name], own[name]) for name in own)
        assert not any(torch.equal(state[name], expected[name]) for name in expected)


def test_half_precision_becomes_float32(fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    folder = fine_tuned("half")
    half = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    (member,) = open_members([str(folder)], SST2, str(model_folder)).members
    state = member.load()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], value.float()) for name, value in weights(half).items())


def test_a_folder_of_checkpoints_is_all_of_them_in_order(fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    for seed, step in enumerate((9, 120, 20)):
        fine_tuned(f"run/checkpoint-{step}", seed)
    run = fine_tuned("run", 7)  # as the Trainer leaves the last model above its checkpoints
    (run / "checkpoint-best").mkdir()  # not a step
    found = open_members([str(run)], SST2, str(model_folder)).members
    assert [(one.name, one.order) for one in found] == [
        ("checkpoint-9", 9),
        ("checkpoint-20", 20),
        ("checkpoint-120", 120),
    ]
    own = weights(AutoModelForSequenceClassification.from_pretrained(run / "checkpoint-20"))
    assert digest(found[1].load()) == digest(own)
    single = open_members([str(run / "checkpoint-9")], SST2, str(model_folder)).members
    assert [(one.name, one.order) for one in single] == [("checkpoint-9", 9)]


def test_only_checkpoints_of_one_run_in_their_order_have_steps(
    trained: Trained, fine_tuned: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    for seed, place in enumerate(("one/checkpoint-3", "one/checkpoint-9", "two/checkpoint-3", "two/checkpoint-12")):
        fine_tuned(place, seed)
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "link").symlink_to(one)

    def orders(*sources: Path) -> list[int | None]:
        return [member.order for member in open_members(names([*sources]), SST2, str(model_folder)).members]

    assert orders(one / "checkpoint-3", tmp_path / "link" / "checkpoint-9") == [3, 9]
    assert orders(one / "checkpoint-9", one / "checkpoint-3") == [None, None]  # not in their order
    assert orders(one / "checkpoint-3", two / "checkpoint-12") == [None, None]  # of two runs
    assert orders(one, two) == [None] * 4
    assert orders(one, trained.run) == [None] * 6


def test_a_recorded_run_is_its_points_with_the_final_head(trained: Trained, model_folder: Path) -> None:
    found = open_members([str(trained.run)], SST2)  # the run names its base model
    assert found.base == str(model_folder)
    steps = Trajectory(trained.run).steps
    assert len(steps) == 4
    assert [(one.name, one.order) for one in found.members] == [(f"full@{step}", step) for step in steps]
    assert all(one.result == read_json(trained.run / "result.json") for one in found.members)
    states = [one.load() for one in found.members]
    trajectory, first = Trajectory(trained.run), base_weights(model_folder)
    in_blocks = {spec.name for spec in trajectory.partition.parameters()}
    final = weights(load_model(str(trained.run / "model"), SST2, 0).model)
    for index, state in enumerate(states):
        for block in trajectory.partition:
            vector = block.flatten(first) + trajectory.delta(block, index)
            assert torch.equal(block.flatten(state), vector)
        assert all(torch.equal(state[name], final[name]) for name in final.keys() - in_blocks)
        assert state.keys() == final.keys()
    torch.testing.assert_close(states[-1], final)
    assert len({digest(state) for state in states}) == 4  # no point was overwritten by the next


def test_points_that_equal_an_earlier_one_are_no_members(trained: Trained, model_folder: Path) -> None:
    """A loss scaler skips steps; `require_distinct` would refuse the run."""
    run = RecordedRun(str(trained.run))
    first, *_, last = run.trajectory.steps
    for index in range(1, len(run.trajectory) - 1):
        run.trajectory.files[point_name(index)] = run.trajectory.files[point_name(0)]
    found = run.members("run", SharedBase(str(model_folder), SST2))
    assert [one.name for one in found] == [f"run@{first}", f"run@{last}"]


def test_the_model_of_a_run_is_one_member(trained: Trained, model_folder: Path) -> None:
    found = open_members([str(trained.run / "model")], SST2)
    assert found.base == str(model_folder)
    (member,) = found.members
    assert (member.name, member.order) == ("full/model", None)
    assert member.result == read_json(trained.run / "result.json")
    assert digest(member.load()) == digest(weights(load_model(str(trained.run / "model"), SST2, 0).model))


def test_an_adapter_is_merged(trained: Trained, model_folder: Path) -> None:
    found = open_members([str(trained.adapter)], SST2)
    assert found.base == str(model_folder)
    (member,) = found.members
    assert (member.name, member.order) == ("adapter", None)
    assert member.result == read_json(trained.adapter / "result.json")
    base = base_model(str(model_folder), SST2, 0, adapter=trained.adapter)
    expected = wrap_with_adapter(SubspaceModel, base, OpenedAdapter(trained.adapter)).merge()
    assert digest(member.load()) == digest(weights(expected))
    assert digest(member.load()) == digest(weights(expected))  # the base model was not changed


def test_a_lora_is_merged_with_its_head(trained: Trained, model_folder: Path) -> None:
    found = open_members([str(trained.lora)], SST2)
    assert found.base == str(model_folder)
    (member,) = found.members
    base = AutoModelForSequenceClassification.from_pretrained(model_folder)
    expected = weights(peft.PeftModel.from_pretrained(base, str(trained.lora)).merge_and_unload())
    torch.testing.assert_close(member.load(), expected, rtol=1e-6, atol=1e-7)
    first = base_weights(model_folder)
    different = {name for name, value in member.load().items() if not torch.equal(value, first[name])}
    assert {"classifier.weight", "bert.encoder.layer.1.attention.self.query.weight"} <= different


def test_all_forms_together(trained: Trained, fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    """One of them names the base model, and a path is written in several ways."""
    checkpoint = shutil.copytree(trained.lora, fine_tuned("plain").parent / "loras/checkpoint-30")
    sources = [checkpoint.parents[1] / "plain", trained.run, trained.adapter, checkpoint.parent]
    found = open_members(names(sources), SST2)
    assert found.base == str(model_folder)
    points = [f"full@{step}" for step in Trajectory(trained.run).steps]
    assert [one.name for one in found.members] == ["plain", *points, "adapter", "checkpoint-30"]
    assert {one.order for one in found.members} == {None}
    require_several(found.members)
    states = {one.name: one.load() for one in found.members}
    digests = {name: digest(state) for name, state in states.items()}
    require_distinct(digests, digest(base_weights(model_folder)))
    assert len({tuple(state) for state in states.values()}) == 1
    for state in states.values():  # the tensors belong to the caller
        for value in state.values():
            value.zero_()
    assert {one.name: digest(one.load()) for one in found.members} == digests


def test_models_that_are_kept_for_several_members_are_released(
    trained: Trained, fine_tuned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        found = load_model(*arguments, **options)
        loaded.append(weakref.ref(found.model))
        return found

    for module in (model_forms, shared_base):
        monkeypatch.setattr(module, "load_model", noted)
    found = open_members(names([fine_tuned("plain"), trained.run, trained.adapter, trained.lora]), SST2)
    digests = [digest(one.load()) for one in found.members]
    for one in found.members:
        one.release()
    gc.collect()
    assert [reference() for reference in loaded] == [None] * len(loaded)
    assert [digest(one.load()) for one in found.members] == digests


def test_tied_weights_of_a_decoder_are_one_parameter(tmp_path: Path) -> None:
    """Also where a file of torch has both names, which transformers does not tie without reading them."""
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        model = moved(model_of("causal-lm"), seed)
        model.save_pretrained(tmp_path / name)
        tokenizer_of_words(encoder_decoder=False).save_pretrained(tmp_path / name)
        if name == "b":
            (tmp_path / "b/model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / "b/pytorch_model.bin")
    found = open_members(names([tmp_path / "a", tmp_path / "b"]), get_task("causal-lm"), str(tmp_path / "base"))
    assert found.outputs == ()
    for member in found.members:
        state = member.load()
        assert "lm_head.weight" not in state
        expected = weights(load_model(member.source, get_task("causal-lm"), 0).model)
        assert digest(state) == digest(expected)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_all_members_are_checked_before_weights_are_read(
    fine_tuned: Callable[..., Path], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def noted(model: str, *arguments: Any, **options: Any) -> Any:
        loaded.append((model, options.get("values", True)))
        return load_model(model, *arguments, **options)

    for module in (model_forms, shared_base):
        monkeypatch.setattr(module, "load_model", noted)
    folders = [fine_tuned("a"), model_folder]
    assert "no trained head" in refused(folders, model_folder)
    assert loaded == [(str(model_folder), False), (str(folders[0]), False), (str(model_folder), False)]


def test_fewer_than_two(fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    one = open_members([str(fine_tuned("a"))], SST2, str(model_folder)).members
    with pytest.raises(InputError, match=r"at least two models to combine, got only .*/a: give several"):
        require_several(one)
    with pytest.raises(InputError, match="at least two models to combine, got none: give several"):
        require_several([])
    require_several([*one, *one])


def test_folders_that_are_not_models(trained: Trained, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty is not a model to combine: expected the folder of a model" in refused(
        [tmp_path / "empty"], model_folder
    )
    (tmp_path / "file").write_text("a")
    assert "file is not a model to combine" in refused([tmp_path / "file"], model_folder)
    assert "no such folder" in refused([tmp_path / "absent/absent/absent"], model_folder)
    base = load_model(str(model_folder), SST2, 0).model
    random_basis(by_layer(base), 2).save_pretrained(tmp_path / "basis")
    assert "basis is a basis, which holds no weights: give adapters" in refused([tmp_path / "basis"], model_folder)
    recorder = TrajectoryRecorder(base, by_layer(base), tmp_path / "bare")
    recorder.record(0)
    recorder.seal()
    assert "bare is a trajectory with no folder model with its head" in refused([tmp_path / "bare"], model_folder)
    for folder in (trained.run, trained.adapter):
        unfinished = shutil.copytree(folder, tmp_path / f"unfinished-{folder.name}")
        write_json(unfinished / UNFINISHED / "recipe.json", {})
        assert f"{unfinished} holds unfinished work; repeat the command" in refused([unfinished], model_folder)


def test_a_base_model_that_nobody_names(fine_tuned: Callable[..., Path]) -> None:
    assert "none of the models names its base model" in refused([fine_tuned("a", 1), fine_tuned("b", 2)], None)


def test_different_base_models(trained: Trained, model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    lora = write_lora(other, tmp_path / "lora")
    message = refused([trained.adapter, lora], None, MismatchError)
    assert f"{trained.adapter} was trained from {str(model_folder)!r}, and {lora} from {str(other)!r}" in message
    assert "base=" in message
    assert len(open_members(names([trained.adapter, lora]), SST2, str(model_folder)).members) == 2
    shutil.rmtree(other)
    message = refused([lora], None)
    assert f"{lora} names the base model {str(other)!r}, which cannot be loaded; give its present location" in message


def test_a_model_given_twice(fine_tuned: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    folder = fine_tuned("run/checkpoint-1", 1)
    fine_tuned("run/checkpoint-2", 2)
    (tmp_path / "link").symlink_to(folder)
    for again in (folder, tmp_path / "link", tmp_path / "run"):
        assert "a model is given twice, as " in refused([folder, again], model_folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"intermediate_size": 48}, "{base} has the parameter {intermediate!r} of shape [32, 16], and {other} has it"),
        ({"num_hidden_layers": 1}, "{base} has the parameter {second!r} of shape [16, 16], and {other} has no such"),
        ({"num_hidden_layers": 3}, "it has the parameter {third!r}, which {base} lacks"),
    ],
)
def test_weights_of_another_model(
    change: dict[str, int],
    expected: str,
    fine_tuned: Callable[..., Path],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    config = BertConfig.from_pretrained(model_folder, **change)
    other = BertForSequenceClassification(config)
    set_label_names(other, SST2.labels)
    other.save_pretrained(tmp_path / "other")
    message = refused([fine_tuned("a"), tmp_path / "other"], model_folder, MismatchError)
    assert f"{tmp_path / 'other'} has another base model: " in message
    layer = "bert.encoder.layer"
    assert (
        expected.format(
            base=model_folder,
            other=tmp_path / "other",
            intermediate=f"{layer}.0.intermediate.dense.weight",
            second=f"{layer}.1.attention.self.query.weight",
            third=f"{layer}.2.attention.output.LayerNorm.bias",
        )
        in message
    )
    assert "give that one, base=" in message


def test_trained_from_other_weights(trained: Trained, model_folder: Path, tmp_path: Path) -> None:
    """Runs and adapters contain the fingerprint of their base model; names and shapes are the same here."""
    other = shutil.copytree(model_folder, tmp_path / "other")
    model = moved(load_model(str(model_folder), SST2, 0).model, 5)
    model.bert.save_pretrained(other)
    for source, folder, what in (
        (trained.run, trained.run, "the recorded run"),
        (trained.run / "model", trained.run, "the recorded run"),
        (trained.adapter, trained.adapter, "the adapter"),
    ):
        message = refused([source], other, MismatchError)
        assert f"{what} {folder} was made for another theta_0: the model differs in block 'bert.encoder" in message
        assert "load the base model it was made from" in message
    message = refused([trained.lora], other, MismatchError)
    assert f"{trained.lora} was trained from {str(model_folder)!r}, and {other} has other weights: 'bert.emb" in message


def test_another_tokenizer(fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    good, other = fine_tuned("a", 1), fine_tuned("b", 2)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["fine"], words["lovely"] = words["lovely"], words["fine"]
    path.write_text(json.dumps(content))
    message = refused([good, other], model_folder, MismatchError)
    expected = words["lovely"]
    assert (
        f"{other} has another tokenizer: expected the id {expected} for the token 'fine', as in {model_folder}"
        in message
    )
    words["unheard"] = len(words)
    path.write_text(json.dumps(content))
    message = refused([good, other], model_folder, MismatchError)
    assert f"expected the {len(words) - 1} tokens of {model_folder}, found {len(words)}" in message
    path.write_text("{")
    with pytest.raises(StorageError, match=r"tokenizer.json is damaged"):
        open_members([str(other)], SST2, str(model_folder))
    for file in other.glob("*token*"):
        file.unlink()
    assert len(open_members(names([good, other]), SST2, str(model_folder)).members) == 2


def test_the_tokenizer_of_a_lora(trained: Trained, model_folder: Path, tmp_path: Path) -> None:
    """PEFT saves none, and the Trainer does; the base model may have a vocabulary alone."""
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    lora = shutil.copytree(trained.lora, tmp_path / "lora")
    shutil.copy(model_folder / "tokenizer.json", lora)
    assert len(open_members([str(lora)], SST2, str(base)).members) == 1
    content = json.loads((lora / "tokenizer.json").read_text())
    content["model"]["vocab"]["unheard"] = 99
    (lora / "tokenizer.json").write_text(json.dumps(content))
    assert f"{lora} has another tokenizer" in refused([lora], base, MismatchError)


def test_no_trained_head(trained: Trained, fine_tuned: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    message = refused([fine_tuned("a"), model_folder], model_folder)
    assert f"the model {str(model_folder)!r} has no trained head for sst2 (classifier.bias is missing" in message
    lora = write_lora(model_folder, tmp_path / "lora", head=False)
    message = refused([lora], model_folder)
    assert (
        f"{lora} has no trained head for sst2: neither it nor the base model {str(model_folder)!r} has 'cla" in message
    )
    headed = shutil.copytree(model_folder, tmp_path / "headed")
    load_model(str(model_folder), SST2, 0).model.save_pretrained(headed)
    assert len(open_members([str(lora)], SST2, str(headed)).members) == 1  # this base model has a head


def test_a_head_for_other_labels(fine_tuned: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    other = fine_tuned("other", change=lambda model: set_label_names(model, ["spam", "ham"]))
    message = refused([other], model_folder)
    assert (
        f"the head of {str(other)!r} was trained for the labels spam, ham, and sst2 has the labels negative" in message
    )
    three = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    message = refused([tmp_path / "three"], model_folder)
    assert "three' has no trained head for sst2 (classifier.bias is missing or has another size)" in message


def test_a_lora_for_other_labels(trained: Trained, model_folder: Path, tmp_path: Path) -> None:
    lora = shutil.copytree(trained.lora, tmp_path / "lora")
    (lora / "labels.json").write_text('["positive", "negative"]')
    assert open_members([str(lora)], SST2).outputs == ("positive", "negative")
    (lora / "labels.json").write_text('["spam", "ham"]')
    message = refused([lora], model_folder)
    assert f"the head of {lora} was trained for the labels spam, ham, and sst2 has the labels negative, pos" in message
    with torch.random.fork_rng():
        model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=3)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "three")
    message = refused([tmp_path / "three"], model_folder, MismatchError)
    assert re.search(
        r"three has 'classifier\.(bias' of shape \[3\], expected \[2\]|weight' .*, expected \[2, 16\]), as in", message
    )


def test_an_adapter_for_another_task(trained: Trained, model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"the adapter .* was trained for another task, with the labels negative, pos"):
        open_members([str(trained.adapter)], get_task("mrpc"))
    with pytest.raises(InputError, match=r"adapter was trained for a task of the type classification, and stsb is reg"):
        open_members([str(trained.adapter)], get_task("stsb"))


def test_outputs_in_another_order(fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    other = fine_tuned("other", change=lambda model: set_label_names(model, ["POSITIVE", "NEGATIVE"]))
    (member,) = (found := open_members([str(other)], SST2, str(model_folder))).members
    assert (member.name, found.outputs) == ("other", ("POSITIVE", "NEGATIVE"))
    message = refused([fine_tuned("a"), other], model_folder, MismatchError)
    assert f"negative, positive in {other.parent / 'a'}, and POSITIVE, NEGATIVE in {other}" in message
    spelled = fine_tuned("spelled", change=lambda model: set_label_names(model, ["NEG", "POS"]))
    assert len(open_members(names([other.parent / "a", spelled]), SST2, str(model_folder)).members) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value: float, fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    folder = fine_tuned("a", change=lambda model: model.bert.pooler.dense.bias[3].fill_(value))
    (member,) = open_members([str(folder)], SST2, str(model_folder)).members
    with pytest.raises(InputError, match=r"a cannot be combined: its parameter 'bert.pooler.dense.bias' holds NaN"):
        member.load()


def test_models_that_are_the_same(fine_tuned: Callable[..., Path], model_folder: Path) -> None:
    folders = [fine_tuned("a", 1), fine_tuned("b", 2), fine_tuned("c", 1)]
    found = open_members(names(folders), SST2, str(model_folder))
    digests = {member.name: digest(member.load()) for member in found.members}
    with pytest.raises(InputError, match="a and c are the same model: all parameters are equal; leave one of them out"):
        require_distinct(digests)
    del digests["c"]
    require_distinct(digests, digest(base_weights(model_folder)))
    with pytest.raises(InputError, match="b is equal to the base model in all parameters, so it adds nothing"):
        require_distinct(digests, digest(weights(load_model(str(folders[1]), SST2, 0).model)))

"""What the Trainer saves of a SubspaceModel: adapters, with the state of training beside them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from test_features import ROWS, arguments, bert
from transformers import Trainer

from tinyspan import Basis, InputError, MismatchError, SubspaceModel, by_layer, random_basis
from tinyspan.interop.trainer import SubspaceTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "linear"}


def wrapped(model: Any = None, basis: Basis | None = None, **options: Any) -> SubspaceModel:
    model = bert().float() if model is None else model
    basis = random_basis(by_layer(model), 3) if basis is None else basis
    return SubspaceModel(model, basis, **{"modules_to_save": ["classifier"], "ensemble": 2, **options})


def trainer(subspace: SubspaceModel, folder: Path, **changes: Any) -> SubspaceTrainer:
    settings = arguments(folder, **{**SAVING, **changes})
    return SubspaceTrainer(subspace, settings, train_dataset=ROWS, eval_dataset=ROWS[:8], z_learning_rate=0.1)


def require_alike(one: SubspaceModel, other: SubspaceModel) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_checkpoints_and_what_is_saved_are_adapters(tmp_path: Path, density: float) -> None:
    basis = random_basis(by_layer(bert().float()), 3, density=density)
    subspace = wrapped(basis=basis)
    saved = trainer(subspace, tmp_path)
    saved.train()
    saved.save_model()
    saved.save_model()  # in place of the first
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert not (folder / "model.safetensors").exists()
        assert (folder / "training_args.bin").is_file()
        assert (folder / "basis").is_dir() is (density < 1)
        require_alike(SubspaceModel.from_pretrained(bert().float(), folder), subspace)
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter.safetensors"} <= names
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole, resumed = wrapped(), wrapped()
    trainer(whole, tmp_path).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer(resumed, tmp_path).train(resume_from_checkpoint=True)
    require_alike(whole, resumed)


def test_a_checkpoint_of_the_whole_model_still_resumes(tmp_path: Path) -> None:
    whole, resumed = wrapped(), wrapped()
    first = trainer(whole, tmp_path)
    first._save = lambda output_dir=None, state_dict=None: Trainer._save(first, output_dir, state_dict)  # type: ignore[method-assign]
    first.train()
    assert (tmp_path / "checkpoint-2/model.safetensors").is_file()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    require_alike(whole, resumed)


def other_theta_0() -> SubspaceModel:
    model = bert().float()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[0] += 1
    return wrapped(model)


def other_frozen() -> SubspaceModel:
    model = bert().float()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0, 0] += 1
    return wrapped(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrapped(basis=random_basis(by_layer(bert().float()), 3, seed=1)), "was trained in the basis"),
        (other_theta_0, "differs in block '.*1'"),
        (other_frozen, "differs in block 'frozen parameters'"),
        (lambda: wrapped(ensemble=1), "trained with ensemble=2, this model has 1"),
        (lambda: wrapped(modules_to_save=["pooler"]), r"trained with modules_to_save=\['classifier'\]"),
    ],
)
def test_resuming_refuses_another_run_s_checkpoint(tmp_path: Path, make: Any, message: str) -> None:
    trainer(wrapped(), tmp_path).train()
    other = make()
    with pytest.raises(MismatchError, match=message):
        trainer(other, tmp_path).train(resume_from_checkpoint=True)
    assert not any(z.any() for z in other.z)


def test_the_best_checkpoint_s_adapter_is_loaded(tmp_path: Path) -> None:
    subspace = wrapped()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 6}
    best = trainer(subspace, tmp_path, **settings, metric_for_best_model="eval_score", greater_is_better=True)
    scores = iter([0.1, 0.3, 0.2])
    best.compute_metrics = lambda prediction: {"score": next(scores)}
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    require_alike(SubspaceModel.from_pretrained(bert().float(), tmp_path / "checkpoint-4"), subspace)
    with pytest.raises(AssertionError):
        require_alike(SubspaceModel.from_pretrained(bert().float(), tmp_path / "checkpoint-6"), subspace)


def test_other_outputs_in_the_trainer_s_folder_are_left_alone(tmp_path: Path) -> None:
    basis = random_basis(by_layer(bert().float()), 3, density=0.2)
    basis.save_pretrained(tmp_path / "basis")  # of the user's, in the place of the one that is carried
    trainer(wrapped(basis=basis), tmp_path).save_model()
    require_alike(SubspaceModel.from_pretrained(bert().float(), tmp_path), wrapped(basis=basis))
    other = random_basis(by_layer(bert().float()), 3, density=0.2, seed=1)
    other.save_pretrained(tmp_path / "other/basis")
    with pytest.raises(InputError, match="is not the basis of the adapter to be saved"):
        trainer(wrapped(basis=basis), tmp_path / "other").save_model()
    assert Basis.from_pretrained(tmp_path / "other/basis").content_hash() == other.content_hash()
    with pytest.raises(InputError, match="holds a basis, whose manifest an adapter would replace"):
        trainer(wrapped(), tmp_path / "basis").save_model()
    assert Basis.from_pretrained(tmp_path / "basis").content_hash() == basis.content_hash()


def test_an_earlier_run_s_carried_basis_is_replaced(tmp_path: Path) -> None:
    for seed in range(2):
        subspace = wrapped(basis=random_basis(by_layer(bert().float()), 3, density=0.2, seed=seed), init_std=0.1)
        trainer(subspace, tmp_path).save_model()
        require_alike(SubspaceModel.from_pretrained(bert().float(), tmp_path), subspace)


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """Keeps what the Trainer uploads."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def create_repo(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id="me/run")

    def upload_folder(self, folder_path: str, path_in_repo: str = "", **kwargs: Any) -> Any:
        ignored = shutil.ignore_patterns(*kwargs.get("ignore_patterns") or ())
        shutil.copytree(folder_path, self.place / path_in_repo, ignore=ignored, dirs_exist_ok=True)
        return SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: Hub(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.ModelCard.validate", lambda *args, **kwargs: None)
    return tmp_path / "hub"


def test_what_the_trainer_pushes_can_be_used_by_others(tmp_path: Path, hub: Path) -> None:
    basis = random_basis(by_layer(bert().float()), 3)
    basis.save_pretrained(tmp_path / "basis")
    subspace = wrapped(basis=basis)
    pushing = {"push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": "checkpoint"}
    pushed = trainer(subspace, tmp_path / "run", **pushing)
    pushed.train()
    for place in (hub, hub / "last-checkpoint"):  # while training goes on
        require_alike(SubspaceModel.from_pretrained(bert().float(), place), subspace)
        assert json.loads((place / "manifest.json").read_text())["details"]["basis"] is None
    shutil.rmtree(hub)
    pushed.push_to_hub(tags=["mine"])
    require_alike(SubspaceModel.from_pretrained(bert().float(), hub), subspace)
    card = ModelCard.load(hub / "README.md")
    assert card.data.library_name == "tinyspan"
    assert {"mine", "tinyspan", "adapter"} <= set(card.data.tags)
    assert 'SubspaceModel.from_pretrained(base_model, "me/run")' in card.text


def test_a_basis_that_nobody_could_fetch_is_refused_before_training(tmp_path: Path, hub: Path) -> None:
    partition, drawn = by_layer(bert().float()), random_basis(by_layer(bert().float()), 3)
    basis = Basis.from_directions(partition, {block.name: drawn.maps[block.name].directions for block in partition})
    with pytest.raises(InputError, match=r"basis.push_to_hub\(\) it first"):
        trainer(wrapped(basis=basis), tmp_path / "run", push_to_hub=True, hub_model_id="me/run")
    later = trainer(wrapped(basis=basis), tmp_path / "run")
    with pytest.raises(InputError, match=r"basis.push_to_hub\(\) it first"):
        later.push_to_hub()

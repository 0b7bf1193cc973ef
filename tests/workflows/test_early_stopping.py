"""Early stopping on rows that are set aside from training: when it stops, what it keeps, and how it resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tinyspan import InputError, SubspaceModel, Trajectory
from tinyspan.errors import Interrupted
from tinyspan.io.storage import read_json
from tinyspan.workflows.models import base_model
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.runs import evaluate, record, starting_model, tune
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.training import fine_tune

pytestmark = pytest.mark.studies

# 3 steps per epoch
SETTINGS = Settings(8, 16, learning_rate=3e-3, z_learning_rate=3e-2, precision="float32", set_aside=16, patience=2)
BEST = 2


class Scale(TrainerCallback):
    """Make the loss high after every epoch but the second, by a factor of the head's weights."""

    def __init__(self) -> None:
        self.poolers: list[torch.Tensor] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = getattr(model, "model", model)
        with torch.no_grad():
            model.classifier.weight.mul_({1.0: 100, 2.0: 0.01, 3.0: -100}.get(state.epoch, 1))
        self.poolers.append(model.bert.pooler.dense.weight.detach().clone())


class Interrupt(TrainerCallback):
    """Interrupt a run after a step, or when training ends."""

    def __init__(self, after: int | None) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after is None:
            raise KeyboardInterrupt


def outcome(folder: Path) -> tuple[Any, ...]:
    result = read_json(folder / "result.json")
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return *(result[name] for name in ("history", "score", "metrics", "best_epoch", "epochs")), contents


@pytest.fixture(scope="module")
def losses(prepared: Prepared) -> Prepared:
    return replace(prepared, task=replace(prepared.task, metric="log_loss"))


@pytest.fixture(scope="module")
def undisturbed(losses: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    record(losses, SETTINGS, folder / "record", every=2, callbacks=[Scale()])
    tune(losses, SETTINGS, "none", folder / "tune", callbacks=[Scale()])
    return folder


def test_the_best_epoch_is_kept(undisturbed: Path, losses: Prepared) -> None:
    for name in ("record", "tune"):
        result = read_json(undisturbed / name / "result.json")
        history = result["history"]
        assert min(history, key=lambda row: row["aside_score"])["epoch"] == BEST
        assert (result["best_epoch"], result["epochs"], len(history)) == (BEST, BEST + 2, BEST + 2)
        best, last = history[BEST - 1], history[-1]
        assert (result["score"], result["metrics"]["ece"]) == (best["score"], best["metrics"]["ece"])
        assert "no temperature is fitted: 16 rows are too few, expected 20" in result["notes"]
        assert result["rows"] == {"train": 48, "validation": 32, "aside": 16}
        place = {"adapter": undisturbed / name} if name == "tune" else {}
        model = str(undisturbed / "record/model") if name == "record" else losses.model
        again = evaluate(replace(losses, model=model), SETTINGS, **place)  # type: ignore[arg-type]
        assert again["metrics"] | {"": again["score"]} == pytest.approx(result["metrics"] | {"": result["score"]})
        assert last["score"] > 1.1 * result["score"]  # of the last weights
    assert Trajectory(undisturbed / "record").steps[-1] == 3 * (BEST + 2) - 1


def test_training_is_the_same_as_without_patience(undisturbed: Path, losses: Prepared, tmp_path: Path) -> None:
    keep, rest = Scale(), losses.set_aside(16)[0]
    tune(rest, replace(SETTINGS, set_aside=0, patience=None), "none", tmp_path / "a", callbacks=[keep])
    loaded: Any = SubspaceModel.from_pretrained(base_model(losses.model, losses.task, 0), undisturbed / "tune")
    assert torch.equal(loaded.model.bert.pooler.dense.weight, keep.poolers[BEST - 1])
    assert len(keep.poolers) == 8


@pytest.mark.parametrize(
    ("command", "after"), [("record", 4), ("record", None), *(("tune", step) for step in (1, 5, 8, 11, None))]
)  # in every epoch, and when the run has stopped
def test_an_interrupted_run_stops_and_chooses_as_another(
    losses: Prepared, undisturbed: Path, tmp_path: Path, command: str, after: int | None
) -> None:
    def run(*callbacks: TrainerCallback) -> None:
        if command == "record":
            record(losses, SETTINGS, tmp_path / "out", every=2, callbacks=[Scale(), *callbacks])
        else:
            tune(losses, SETTINGS, "none", tmp_path / "out", callbacks=[Scale(), *callbacks])

    with pytest.raises(Interrupted):
        run(Interrupt(after))
    run()
    assert outcome(tmp_path / "out") == outcome(undisturbed / command)
    assert not (tmp_path / "out/unfinished").exists()


def test_a_damaged_best_state_is_computed_again(losses: Prepared, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tune(losses, SETTINGS, "none", tmp_path / "out", callbacks=[Scale(), Interrupt(None)])
    states = tmp_path / "out/unfinished"
    assert sorted(path.name for path in states.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-6",
        "checkpoint-9",
    ]
    (states / "checkpoint-6/adapter.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="training resumes from an earlier state"):
        tune(losses, SETTINGS, "none", tmp_path / "out", callbacks=[Scale()])
    assert outcome(tmp_path / "out") == outcome(undisturbed / "tune")


def test_held_out_rows_are_scored_once_on_request(losses: Prepared, undisturbed: Path) -> None:
    model = starting_model(losses, SETTINGS)
    result = fine_tune(model, losses, SETTINGS, "full", [Scale()], score_every_epoch=False)
    assert [row["epoch"] for row in result["history"] if "score" in row] == [result["best_epoch"]] == [BEST]
    expected = read_json(undisturbed / "record/result.json")
    assert result["score"] == pytest.approx(expected["score"], abs=0.01)  # scoring changes the order of rows


def test_of_an_accuracy_the_highest_is_the_best(prepared: Prepared) -> None:
    settings = replace(SETTINGS, batch_size=8, learning_rate=1e-2)
    result = fine_tune(starting_model(prepared, settings), prepared, settings, "full")
    scores = [row["aside_score"] for row in result["history"]]
    assert max(scores) > min(scores)
    assert result["best_epoch"] == scores.index(max(scores)) + 1
    assert result["epochs"] == len(scores) == min(8, result["best_epoch"] + 2)


def test_without_rows_that_are_set_aside_patience_is_refused(run: Any, quick: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs training rows that are set aside, such as set_aside=200"):
        Settings(patience=2)
    with pytest.raises(InputError, match="patience must be above 0"):
        Settings(patience=0, set_aside=1)
    words = ["tune", *quick, "--basis", "none", "--output", tmp_path / "a", "--patience", 1]
    code, _, err = run(*words)
    assert (code, "held-out rows would raise their score" in err) == (2, True), err
    code, out, err = run(*words, "--set-aside", 20)
    assert (code, "freeze on sst2" in out) == (0, True), err
    assert {"best_epoch", "score"} <= {*read_json(tmp_path / "a/result.json")}
    assert "set-aside score" in err

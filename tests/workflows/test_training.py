"""What the Trainer and its optimizer do in a run: rates, order of rows, dropout, and the start that a run resumes."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from tinyspan import InputError, SubspaceModel, by_layer, random_basis
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import starting_model, subspace_model
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import Classification, MultiLabel
from tinyspan.workflows.tasks.labelled import Fit
from tinyspan.workflows.training import _origin, _saves_head, _trainer, definition_of, fine_tune, run_of

SETTINGS = Settings(epochs=2, batch_size=16, learning_rate=3e-3, z_learning_rate=3e-2, precision="float32")
STEPS = 8  # in two epochs of 64 rows


class Observer(TrainerCallback):
    """Keeps the groups of the optimizer before every step, without their parameters."""

    def __init__(self) -> None:
        self.groups: list[list[dict[str, Any]]] = []
        self.optimizer: Any = None

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        self.optimizer = kwargs["optimizer"]
        groups = self.optimizer.param_groups
        self.groups.append([{name: value for name, value in group.items() if name != "params"} for group in groups])


def test_rates_decrease_linearly_to_zero(prepared: Prepared) -> None:
    observer, settings = Observer(), replace(SETTINGS, module_learning_rates={"classifier": 1e-2})
    subspace = subspace_model(prepared, settings, "random", 3)
    fine_tune(subspace, prepared, settings, "random", [observer], score_every_epoch=False)
    assert type(getattr(observer.optimizer, "optimizer", observer.optimizer)) is torch.optim.AdamW
    assert len(observer.groups) == STEPS
    for step, groups in enumerate(observer.groups):
        rates = sorted({group["lr"] for group in groups})
        assert rates == pytest.approx([rate * (1 - step / STEPS) for rate in (3e-3, 1e-2, 3e-2)])
        for group in groups:
            assert (group["weight_decay"], group["betas"], group["eps"]) == (0.0, (0.9, 0.999), 1e-8)


def observed(prepared: Prepared, model: Any, seed: int) -> tuple[list[Any], Tensor]:
    """Return the rows of every training batch, in their order, and where the first dropout layer first drops."""
    batches: list[Any] = []
    masks: list[Tensor] = []
    model = deepcopy(model)

    def keep_rows(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        if module.training:
            lengths = inputs["attention_mask"].sum(1).tolist()
            rows = zip(inputs["input_ids"].tolist(), lengths, inputs["labels"].tolist(), strict=True)
            batches.append([(tuple(ids[:length]), label) for ids, length, label in rows])

    model.register_forward_pre_hook(keep_rows, with_kwargs=True)
    dropout = model.bert.embeddings.dropout
    dropout.register_forward_hook(lambda module, _, out: masks.append(out == 0) if module.training else None)
    fine_tune(model, prepared, replace(SETTINGS, seed=seed), "full", score_every_epoch=False)
    return batches, masks[0][:, :5]  # every row has five tokens


def test_a_seed_determines_the_order_of_rows_and_dropout(prepared: Prepared) -> None:
    """The three runs start from one model, so that nothing else differs."""
    assert prepared.train is not None
    model = starting_model(prepared, SETTINGS)
    (rows, mask), (again, same_mask), (others, other_mask) = (observed(prepared, model, seed) for seed in (0, 0, 1))
    assert [len(batch) for batch in rows] == [16] * STEPS
    every = sorted(zip(map(tuple, prepared.train["input_ids"]), prepared.train["labels"], strict=True))
    for epoch in (rows[: STEPS // 2], rows[STEPS // 2 :], others[: STEPS // 2]):
        assert sorted(row for batch in epoch for row in batch) == every
    assert rows == again
    assert rows != others
    assert rows[: STEPS // 2] != rows[STEPS // 2 :]
    assert torch.equal(mask, same_mask)
    assert not torch.equal(mask, other_mask)
    assert 0.05 < float(mask.float().mean()) < 0.15  # the share that the model's config says is 0.1


class Stop(TrainerCallback):
    """Interrupts a run after its fifth step, of which four are in a saved state."""

    def on_step_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_a_run_resumes_from_its_own_start_alone(prepared: Prepared, tmp_path: Path) -> None:
    starts = [starting_model(prepared, SETTINGS) for _ in range(2)]
    with torch.no_grad():
        starts[1].bert.pooler.dense.bias.add_(0.5)  # outside of everything that the settings say

    def run(start: int, folder: str, *callbacks: TrainerCallback) -> Any:
        model, saved = deepcopy(starts[start]), tmp_path / folder
        fine_tune(model, prepared, SETTINGS, "full", callbacks, score_every_epoch=False, checkpoints=saved)
        return weights_of(model)

    whole = [run(start, f"whole-{start}") for start in range(2)]
    with pytest.raises(KeyboardInterrupt):
        run(0, "cut", Stop())
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-4"]
    with pytest.warns(UserWarning, match="belongs to other settings, rows, weights or versions; it is deleted"):
        found = run(1, "cut")
    assert all(torch.equal(value, whole[1][name]) for name, value in found.items())
    assert not torch.equal(found["classifier.weight"], whole[0]["classifier.weight"])


def test_a_run_resumes_in_its_own_basis_alone(prepared: Prepared, tmp_path: Path) -> None:
    """z starts at 0 in both, so that their weights are the same."""
    model = starting_model(prepared, SETTINGS)

    def run(seed: int, *callbacks: TrainerCallback) -> None:
        subspace = SubspaceModel(deepcopy(model), random_basis(by_layer(model), 2, seed=seed))
        fine_tune(subspace, prepared, SETTINGS, "random", callbacks, score_every_epoch=False, checkpoints=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run(0, Stop())
    with pytest.warns(UserWarning, match="belongs to other settings, rows, weights or versions; it is deleted"):
        run(1)


def test_numbers_of_held_out_rows_are_told_if_they_were_drawn(prepared: Prepared) -> None:
    for holdout, expected in ((0.5, sorted(prepared.row_numbers)), (None, None)):
        task = replace(prepared.task, origin={"path": "a.csv", "holdout": holdout})  # type: ignore[call-arg]
        assert _origin(replace(prepared, task=task))["data"].get("held_out_rows") == expected


def test_the_format_of_the_computation_is_part_of_a_run(prepared: Prepared) -> None:
    """`auto` is another one on another machine."""
    for precision, autocast in (("float32", False), ("bfloat16", True)):
        assert run_of(prepared, replace(SETTINGS, precision=precision))["settings"]["autocast"] is autocast


@pytest.mark.parametrize(
    "name", ["epochs", "batch_size", "max_length", "learning_rate", "z_learning_rate", "max_target_length", "max_steps"]
)
def test_settings_of_zero_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be above 0 and finite, got 0"):
        Settings(**{name: 0})  # type: ignore[arg-type]


def test_where_the_rows_are_is_no_part_of_what_a_task_is() -> None:
    task = Classification("a", ("t",), ("x", "y"))
    moved = replace(task, source=lambda _, split: pd.DataFrame(), origin={"path": "elsewhere.csv"})
    assert definition_of(moved) == definition_of(task)


def test_a_temperature_is_for_a_head_that_is_saved(prepared: Prepared) -> None:
    model = starting_model(prepared, SETTINGS)
    basis = random_basis(by_layer(model), 1)
    assert _saves_head(model)
    assert _saves_head(SubspaceModel(deepcopy(model), basis, modules_to_save=["classifier"]))
    assert not _saves_head(SubspaceModel(deepcopy(model), basis))


def test_one_device_of_several_is_used(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several, the Trainer would put a plain model into DataParallel, with so many times the rows per batch."""
    several = property(lambda self: 1 if self._n_gpu == 1 else 4)
    monkeypatch.setattr(TrainingArguments, "n_gpu", several)
    trainer = _trainer(starting_model(prepared, SETTINGS), prepared, SETTINGS, str(tmp_path))
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, SETTINGS.batch_size)


@pytest.mark.parametrize(("kind", "aside"), [(Classification, 2), (MultiLabel, 2), (MultiLabel, 0)])
def test_a_temperature_and_thresholds_are_fitted_on_rows_that_are_not_scored(
    kind: Any, aside: int, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the rows that are set aside, if there are any; thresholds otherwise on the training rows."""
    example = kind.example()
    for split, rows in (("train", example.rows), ("validation", example.rows[::-1][:4])):
        rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
    settings = replace(SETTINGS, epochs=1, set_aside=aside)
    prepared = prepare(str(model_folder), example.task, data=tmp_path)
    chosen = prepared.with_aside(aside).aside or prepared.train
    seen: list[tuple[Any, Any]] = []

    def fitted(task: Any, predictions: Any, labels: Any) -> Fit:
        seen.append((torch.tensor(predictions), torch.tensor(labels)))
        return Fit(task)

    monkeypatch.setattr(kind, "fitted", fitted)
    model: Any = starting_model(prepared, settings)
    fine_tune(model, prepared, settings, example.task.type)
    ((predictions, labels),) = seen
    batch = prepared.collate(list(chosen))
    with torch.no_grad():
        expected = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    for found, right in zip(rows_in_order(predictions, labels), rows_in_order(expected, batch["labels"]), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def rows_in_order(*columns: Tensor) -> list[Tensor]:
    """Return the columns with their rows sorted by the first number of the first column."""
    order = columns[0][:, 0].argsort()
    return [column[order] for column in columns]


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="precision must be 'auto', 'float32' or 'bfloat16', got 'float16'"):
        Settings(precision="float16")  # type: ignore[arg-type]

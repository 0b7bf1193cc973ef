import errno
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from towers import Tower
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from tinyspan import (
    Basis,
    InputError,
    StorageError,
    SubspaceModel,
    TinyspanError,
    Trajectory,
    by_layer,
    by_module,
    random_basis,
)
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.interop.trainer import SubspaceTrainer
from tinyspan.io.journals import cut_lines
from tinyspan.io.manifests import FileEntry
from tinyspan.io.tensors import write_tensors
from tinyspan.trajectories import points as recording


class Classifier(Tower):
    """A tower that returns its loss, as the Trainer wants it."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(tokens)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


ROWS = [{"tokens": torch.tensor([i % 11, (3 * i) % 11]), "labels": torch.tensor(i % 2)} for i in range(24)]


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
        **changes,
    }
    return TrainingArguments(**settings)


def subspace() -> SubspaceModel:
    model = Classifier().float()
    return SubspaceModel(model, random_basis(by_layer(model), 3), modules_to_save=["head", "embedding"], ensemble=2)


def test_a_compiled_subspace_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass the SubspaceModel itself and TrainingArguments"):
        SubspaceTrainer(torch.compile(subspace()), arguments(tmp_path))


def test_the_norms_of_gradients_are_checked_by_every_accelerator(tmp_path: Path) -> None:
    trainer = SubspaceTrainer(subspace(), arguments(tmp_path))
    trainer.create_accelerator_and_postprocess()  # as before every trial of hyperparameter_search
    assert trainer.accelerator.clip_grad_norm_ == trainer._clip_and_record


def test_a_basis_that_checkpoints_cannot_name_is_told(tmp_path: Path) -> None:
    model = Classifier().float()
    partition = by_layer(model)
    basis = Basis.from_directions(partition, {block.name: torch.eye(2, block.numel) for block in partition})
    for save_strategy, told in (("no", 0), ("epoch", 1)):
        settings = arguments(tmp_path / save_strategy, save_strategy=save_strategy, max_steps=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            SubspaceTrainer(SubspaceModel(model, basis), settings, train_dataset=ROWS).train()
        assert sum("the basis is saved in no folder" in str(one.message) for one in caught) == told
        model = Classifier().float()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_trained_parameter_is_in_the_optimizer_once_with_its_rate(tmp_path: Path, weight_decay: float) -> None:
    model = subspace()
    trainer = SubspaceTrainer(
        model, arguments(tmp_path, weight_decay=weight_decay), train_dataset=ROWS, z_learning_rate=0.5
    )
    groups = trainer.create_optimizer().param_groups
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == (0.5 if name.startswith("z.") else 1e-3)
            assert group["weight_decay"] == (weight_decay if name.endswith("weight") else 0.0)


@pytest.mark.parametrize("make", [subspace, lambda: Classifier().float()])
def test_modules_have_learning_rates_of_their_own(tmp_path: Path, make: Callable[[], torch.nn.Module]) -> None:
    def groups(**rates: float) -> list[dict[str, Any]]:
        trainer = SubspaceTrainer(
            model, arguments(tmp_path, weight_decay=0.1), train_dataset=ROWS, module_learning_rates=rates
        )
        return list(trainer.create_optimizer().param_groups)

    model = make()
    names = {id(parameter): name.removeprefix("model.") for name, parameter in model.named_parameters()}
    rates = {names[id(one)]: group["lr"] for group in groups(head=0.25) for one in group["params"]}
    assert {name for name, rate in rates.items() if rate == 0.25} == {"head.weight", "head.bias"}
    assert {rate for name, rate in rates.items() if name[:2] not in ("he", "z.")} == {1e-3}
    assert rates.keys() == {names[id(one)] for one in model.parameters() if one.requires_grad}
    with pytest.raises(InputError, match="given for 'hed', of which no parameter"):
        groups(head=0.25, hed=0.5)


def test_a_rate_that_inner_modules_leave_nothing_is_refused(tmp_path: Path) -> None:
    rates = {"layers.0": 0.1, "layers": 0.2, "layers.1": 0.3}
    trainer = SubspaceTrainer(
        Classifier().float(), arguments(tmp_path), train_dataset=ROWS, module_learning_rates=rates
    )
    with pytest.raises(InputError, match=r"given for 'layers', but every .* inner module \(layers\.0, layers\.1\)"):
        trainer.create_optimizer()


def test_z_may_be_frozen(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = subspace()
    model.z.requires_grad_(False)
    before = model.model.head.weight.detach().clone()
    SubspaceTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=ROWS).train()
    assert not torch.equal(model.model.head.weight, before)
    next(iter(model.z)).requires_grad_(True)
    SubspaceTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=ROWS).train()
    assert not [warning for warning in recwarn if "no gradient has reached z" in str(warning.message)]


def test_the_loss_falls_and_only_what_should_moves(tmp_path: Path) -> None:
    model = subspace()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses: list[float] = []
    trainer = SubspaceTrainer(
        model, arguments(tmp_path, num_train_epochs=20, logging_steps=6), train_dataset=ROWS, z_learning_rate=0.3
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(before)  # z, head, embedding: everything this model lists is trained
    for z in model.z:
        torch.testing.assert_close(z[0], z[1])  # ensemble members that start together stay together


def test_an_ordinary_model_is_trained_as_by_trainer(tmp_path: Path) -> None:
    ours, theirs = Classifier().float(), Classifier().float()
    for kind, model in ((SubspaceTrainer, ours), (Trainer, theirs)):
        kind(model, arguments(tmp_path), train_dataset=ROWS).train()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("every", "steps"), [("epoch", [5, 11]), (4, [3, 7, 11])])
def test_the_callback_records_in_anyones_trainer(tmp_path: Path, every: object, steps: list[int]) -> None:
    model = Classifier()
    callback = TrajectoryCallback(tmp_path / "t", every, by_module)  # type: ignore[arg-type]
    Trainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[callback]).train()
    trajectory = callback.trajectory()
    assert trajectory.steps == steps
    block = trajectory.partition.blocks[0]
    final = block.flatten(trajectory.partition.select(model))
    assert torch.equal(trajectory.start(block), block.flatten(trajectory.partition.select(Classifier())))
    torch.testing.assert_close(trajectory.start(block) + trajectory.delta(block), final, rtol=0, atol=1e-15)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_and_accumulation_see_z(tmp_path: Path, accumulate: int) -> None:
    """Two half batches make the step of one whole batch; the norm over all that is trained is clipped."""
    model = subspace()
    trainer = SubspaceTrainer(
        model,
        arguments(
            tmp_path,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            max_grad_norm=1e-3,
            logging_steps=1,
            optim="sgd",
        ),
        train_dataset=ROWS[:8],
        z_learning_rate=1.0,
    )
    before = [z.detach().clone() for z in model.z]
    trainer.train()
    reference = subspace()
    batch = {key: torch.stack([row[key] for row in ROWS[:8]]) for key in ROWS[0]}
    reference(**batch)["loss"].backward()
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1e-3)
    logged = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    assert logged == pytest.approx(norm.item(), rel=1e-4)
    for z, start, expected in zip(model.z, before, reference.z, strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(start - z, expected.grad, rtol=1e-3, atol=1e-8)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, resumed = subspace(), subspace()
    saving = {"save_strategy": "steps", "save_steps": 6, "use_cpu": True}
    SubspaceTrainer(whole, arguments(tmp_path / "w", **saving), train_dataset=ROWS, z_learning_rate=0.1).train()
    second = SubspaceTrainer(resumed, arguments(tmp_path / "r"), train_dataset=ROWS, z_learning_rate=0.1)
    second.train(resume_from_checkpoint=str(tmp_path / "w/checkpoint-6"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_the_callback_refuses_to_take_a_resumed_model_for_theta_0(tmp_path: Path) -> None:
    model = Classifier()
    Trainer(model, arguments(tmp_path / "w", save_strategy="epoch"), train_dataset=ROWS).train()
    callback = TrajectoryCallback(tmp_path / "t")
    trainer = Trainer(Classifier(), arguments(tmp_path / "w"), train_dataset=ROWS, callbacks=[callback])
    with pytest.raises(InputError, match="are not theta_0"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "w/checkpoint-6"))
    assert not (tmp_path / "t").exists()


def test_the_callback_goes_on_with_the_trajectory_of_a_resumed_run(tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: Path | None = None) -> TrajectoryCallback:
        callback = TrajectoryCallback(folder, 2)
        options = arguments(tmp_path / "w", save_strategy="steps", save_steps=6)
        trainer = Trainer(Classifier(), options, train_dataset=ROWS, callbacks=[callback])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return callback

    whole = run(tmp_path / "t").trajectory()
    again = run(tmp_path / "t", tmp_path / "w/checkpoint-6").trajectory()
    assert again.steps == whole.steps == [1, 3, 5, 7, 9, 11]
    for block in whole.partition:
        for index in range(6):
            torch.testing.assert_close(again.delta(block, index), whole.delta(block, index), rtol=0, atol=1e-7)


class Follow(TrainerCallback):
    """Keep the weights after every step."""

    def __init__(self) -> None:
        self.after: dict[int, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after[state.global_step - 1] = nn.utils.parameters_to_vector(model.layers.parameters()).detach().clone()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("early", [None, "before", "after"])
@pytest.mark.parametrize(("every", "evaluated"), [(5, 6), (5, 4), ("epoch", 6), ("epoch", 4)])
def test_the_last_point_is_the_end_of_training_not_the_best_model(
    tmp_path: Path, early: str | None, every: Any, evaluated: int, resumed: bool
) -> None:
    """The Trainer puts the best checkpoint's weights in place before it says that training has ended."""
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": evaluated, "eval_steps": evaluated}
    options = steps | {"num_train_epochs": 4, "learning_rate": 0.5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_step", "greater_is_better": False}
    for again in (False, True) if resumed else (False,):
        model, follow, record = Classifier().float(), Follow(), TrajectoryCallback(tmp_path / "t", every)
        stop = [EarlyStoppingCallback(1)] if early else []
        Trainer(
            model,
            arguments(tmp_path / "out", **options, **best),
            train_dataset=ROWS,
            eval_dataset=ROWS,
            compute_metrics=lambda output, seen=follow.after: {"step": float(max(seen))},  # the first one is the best
            callbacks=[*(stop if early == "before" else []), record, follow, *(stop if early == "after" else [])],
        ).train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{evaluated}") if again else None)
    trajectory = record.trajectory()
    last = max(follow.after)
    assert last == (2 * evaluated - 1 if early else 23)
    assert trajectory.steps[-1] == last
    before = nn.utils.parameters_to_vector(Classifier().float().layers.parameters()).detach()
    moved = torch.cat([trajectory.delta(block) for block in trajectory.partition])
    torch.testing.assert_close(moved, follow.after[last] - before, rtol=0, atol=1e-6)
    if not resumed:
        ended = nn.utils.parameters_to_vector(model.layers.parameters()).detach()
        assert torch.equal(ended, follow.after[evaluated - 1])


def test_smaller_batches_after_an_error_begin_the_trajectory_anew(tmp_path: Path) -> None:
    class Short(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 2 and self._train_batch_size == 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(*args, **kwargs)

    model, record = Classifier().float(), TrajectoryCallback(tmp_path / "t", 1)
    settings = arguments(tmp_path, auto_find_batch_size=True, num_train_epochs=1)
    trainer = Short(model, settings, train_dataset=ROWS, callbacks=[record])
    trainer.train()
    assert trainer.state.global_step > 6
    trajectory = record.trajectory()
    assert trajectory.steps == list(range(trainer.state.global_step))
    block = trajectory.partition.blocks[0]
    moved = torch.cat([model.get_parameter(spec.name).detach().reshape(-1) for spec in block.parameters])
    torch.testing.assert_close(trajectory.start(block) + trajectory.delta(block), moved, rtol=0, atol=1e-6)
    fresh = torch.cat([Classifier().float().get_parameter(spec.name).reshape(-1) for spec in block.parameters])
    assert torch.equal(trajectory.start(block), fresh.detach())  # theta_0 is where the whole path began
    with pytest.raises(InputError, match="holds an earlier output"):
        Trainer(Classifier().float(), settings, train_dataset=ROWS, callbacks=[record]).train()


def test_points_of_a_run_that_failed_are_not_written_over(tmp_path: Path) -> None:
    class Fails(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 4:
                raise KeyError("a fault of yours")
            return super().training_step(*args, **kwargs)

    record = TrajectoryCallback(tmp_path / "t", 1)
    settings = arguments(tmp_path, auto_find_batch_size=True)
    trainer = Fails(Classifier().float(), settings, train_dataset=ROWS, callbacks=[record])
    for error in (KeyError, InputError):
        with pytest.raises(error):
            trainer.train()
    assert record.trajectory().steps == [0, 1, 2, 3]


def test_the_callback_refuses_a_model_that_moves_in_a_basis_already(tmp_path: Path) -> None:
    callback = TrajectoryCallback(tmp_path / "t")
    with pytest.raises(InputError, match="record the training of a plain model"):
        SubspaceTrainer(subspace(), arguments(tmp_path), train_dataset=ROWS, callbacks=[callback]).train()
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("flag", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharding_after_wrapping_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    prepare = Trainer.create_accelerator_and_postprocess

    def sharding(trainer: Trainer) -> None:
        prepare(trainer)
        setattr(trainer, flag, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharding)
    with pytest.raises(InputError, match=f"{name} would replace the weights .* launch without it .* fully_shard"):
        SubspaceTrainer(subspace(), arguments(tmp_path), train_dataset=ROWS)


@pytest.mark.parametrize("every", [0, "step", 1.5, None])
def test_the_callback_refuses_a_bad_interval(tmp_path: Path, every: Any) -> None:
    with pytest.raises(InputError, match="'epoch', or a number of steps of at least 1, got"):
        TrajectoryCallback(tmp_path, every)


def test_the_callback_takes_a_partition(tmp_path: Path) -> None:
    model = Classifier()
    partition = by_module(model)
    callback = TrajectoryCallback(tmp_path / "t", 4, partition)
    Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=ROWS, callbacks=[callback]).train()
    assert callback.trajectory().partition == partition
    with pytest.raises(InputError, match="to be a Partition or a function such as by_layer, got str"):
        TrajectoryCallback(tmp_path / "u", partition="layer")  # type: ignore[arg-type]


class Sick(Classifier):
    """Whose loss, or gradient alone, is NaN or infinite in the forward pass number `at`."""

    def __init__(self, at: int, where: str, value: float) -> None:
        super().__init__()
        self.at, self.where, self.value, self.calls = at, where, value, 0

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        out = super().forward(tokens, labels)
        self.calls += 1
        if self.calls == self.at:
            if self.where == "loss":
                out["loss"] = out["loss"] * self.value
            else:
                out["loss"].register_hook(lambda gradient: gradient * self.value)
        return out


def sick_trainer(folder: Path, model: torch.nn.Module, **changes: object) -> SubspaceTrainer:
    return SubspaceTrainer(model, arguments(folder, logging_strategy="epoch", **changes), train_dataset=ROWS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("where", "what"), [("loss", "loss"), ("gradient", "norm of the gradients")])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_training_ends_at_the_first_sick_step_before_the_weights_take_it(
    tmp_path: Path, where: str, what: str, value: float, clip: float
) -> None:
    model = Sick(4, where, value).float()
    with pytest.raises(TinyspanError, match=f"the {what} is NaN or infinite at step 4 of 12.* are kept"):
        sick_trainer(tmp_path, model, max_grad_norm=clip).train()
    assert model.calls == 4
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_gradient_whose_norm_overflows_is_no_silent_standstill(tmp_path: Path) -> None:
    """Clipping by an infinite norm would make every gradient zero: no NaN, and no training."""
    model = Sick(2, "gradient", 1e30).float()
    with pytest.raises(TinyspanError, match="norm of the gradients is NaN or infinite at step 2"):
        sick_trainer(tmp_path, model).train()


def test_an_accelerator_is_asked_seldom_and_before_anything_is_logged_or_saved(tmp_path: Path) -> None:
    for every, saving, calls in ((4, "no", 4), (100, "no", 6), (100, "steps", 3)):
        model = Sick(2, "loss", torch.nan).float()
        trainer = sick_trainer(tmp_path / f"{every}{saving}", model, save_strategy=saving, save_steps=3)
        trainer._check_every = every
        with pytest.raises(TinyspanError, match="the loss is NaN or infinite at step 2 of 12"):
            trainer.train()
        assert model.calls == calls
        assert not list((tmp_path / f"{every}{saving}").glob("checkpoint-*/*.safetensors"))


def test_loss_scaling_may_meet_infinite_gradients(tmp_path: Path) -> None:
    trainer = sick_trainer(tmp_path, Sick(2, "loss", torch.nan).float())
    trainer.accelerator.scaler = object()
    trainer._record_value("loss", torch.tensor(torch.inf))
    trainer._check_finite()


def test_a_point_is_not_recorded_of_nan(tmp_path: Path) -> None:
    model = Sick(4, "loss", torch.nan).float()
    callback = TrajectoryCallback(tmp_path / "t", 2)
    trainer = SubspaceTrainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[callback])
    with pytest.raises(TinyspanError, match="at step 4"):
        trainer.train()
    assert callback.trajectory().steps == [1]
    plain = Trainer(
        Sick(4, "loss", torch.nan).float(),
        arguments(tmp_path),
        train_dataset=ROWS,
        callbacks=[TrajectoryCallback(tmp_path / "u", 2)],
    )
    with pytest.raises(TinyspanError, match="is NaN or infinite; the 1 points before it are kept"):
        plain.train()


# -- recording behind training -----------------------------------------------------------------------------------------


def journal(folder: Path) -> int:
    """How many points are on disk; does not wait for one."""
    path = folder / "points.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


@pytest.fixture
def slow_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
        time.sleep(0.05)
        return write_tensors(path, tensors)

    monkeypatch.setattr(recording, "write_tensors", slowly)


class Watching(Trainer):
    """Notes how many points are on disk whenever a checkpoint is about to be written."""

    recorded: Path

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        self.seen = [*getattr(self, "seen", []), (self.state.global_step, journal(self.recorded))]
        super()._save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize(
    ("saving", "every", "seen"),
    [
        ({"save_strategy": "steps", "save_steps": 4}, 2, [(4, 2), (8, 4), (12, 6)]),
        ({"save_strategy": "steps", "save_steps": 7}, "epoch", [(7, 1), (12, 1)]),  # the end of an epoch comes after
        ({"save_strategy": "epoch"}, "epoch", [(6, 1), (12, 2)]),
        ({"save_strategy": "epoch"}, 3, [(6, 2), (12, 4)]),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 4},
            2,
            [(4, 2), (8, 4), (12, 6)],
        ),
    ],
)
def test_no_checkpoint_is_ahead_of_the_points(
    tmp_path: Path, slow_writes: None, saving: dict[str, object], every: object, seen: list[tuple[int, int]]
) -> None:
    callback = TrajectoryCallback(tmp_path / "t", every)  # type: ignore[arg-type]
    options = arguments(tmp_path / "w", learning_rate=1e-2, **saving)
    trainer = Watching(Classifier(), options, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[callback])
    trainer.recorded = tmp_path / "t"
    trainer.train()
    assert trainer.seen == seen


def test_a_full_disk_ends_training_before_a_checkpoint_is_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Fills(TrainerCallback):
        def on_step_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
            if state.global_step == 5:
                callback.flush()
                monkeypatch.setattr("tinyspan.io.tensors.save_file", full)

    callback = TrajectoryCallback(tmp_path / "t", 2)
    options = arguments(tmp_path / "w", save_strategy="steps", save_steps=6)
    trainer = Trainer(Classifier(), options, train_dataset=ROWS, callbacks=[callback, Fills()])
    with pytest.raises(StorageError, match=r"000003\.safetensors could not be written: the disk or quota is full"):
        trainer.train()
    assert not list((tmp_path / "w").glob("checkpoint-*"))
    assert callback.trajectory().steps == [1, 3]


class Dies(TrainerCallback):
    """Ends the process, so to speak, when the Trainer has saved a checkpoint at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("every", "at", "lost", "steps"),
    [
        ("epoch", 6, 0, [5, 11]),  # the checkpoint is made before the epoch ends, and has no point
        ("epoch", 8, 0, [5, 11]),  # within an epoch no point is due
        (4, 8, 1, [3, 7, 11]),
        (4, 6, 0, [3, 7, 11]),
    ],
)
def test_a_run_goes_on_with_the_point_that_it_was_killed_before(
    tmp_path: Path, every: object, at: int, lost: int, steps: list[int]
) -> None:
    def run(name: str, *callbacks: TrainerCallback, checkpoint: Path | None = None) -> Trajectory:
        callback = TrajectoryCallback(tmp_path / name, every)  # type: ignore[arg-type]
        options = arguments(tmp_path / "w", save_strategy="steps", save_steps=2)
        trainer = Trainer(Classifier(), options, train_dataset=ROWS, callbacks=[callback, *callbacks])
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return callback.trajectory()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("t", Dies(at))
    if lost:
        cut_lines(tmp_path / "t/points.jsonl", lost)
    again = run("t", checkpoint=tmp_path / f"w/checkpoint-{at}")
    assert again.steps == whole.steps == steps
    for block in whole.partition:
        for index in range(len(steps)):
            torch.testing.assert_close(again.delta(block, index), whole.delta(block, index), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("every", "points"), [("epoch", 2), (4, 3), (5, 3), (12, 1)])
def test_training_without_room_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, every: object, points: int
) -> None:
    def run(free: int, dtype: torch.dtype | None = None, **changes: object) -> TrajectoryCallback:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        callback = TrajectoryCallback(tmp_path / "t", every, dtype=dtype, overwrite=True)  # type: ignore[arg-type]
        Trainer(Classifier(), arguments(tmp_path, **changes), train_dataset=ROWS, callbacks=[callback]).train()
        return callback

    needed = recording.trajectory_bytes(by_layer(Classifier()), points)
    with caplog.at_level(logging.INFO, logger="tinyspan"), pytest.raises(StorageError, match="t has no room: it needs"):
        run(needed - 1)
    assert f"t will hold theta_0 and {points} points, {needed / 1e6:,.1f} MB" in caplog.text
    assert not (tmp_path / "t").exists()
    found = run(needed - 1, torch.bfloat16).trajectory()
    assert (len(found), found.manifest.construction) == (points, {"dtype": "bfloat16"})
    assert len(run(needed).trajectory()) == points


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from ROWS


def test_rows_without_a_known_end_make_an_unknown_number_of_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=20_000))
    callback = TrajectoryCallback(tmp_path / "t")
    Trainer(Classifier(), arguments(tmp_path, max_steps=8), train_dataset=Endless(), callbacks=[callback]).train()
    assert callback.trajectory().steps == [5, 7]

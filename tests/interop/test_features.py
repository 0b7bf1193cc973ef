"""Whatever the Trainer can do sees z: each feature against a loop over the literal formula, in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from tinyspan import Basis, SubspaceModel, TinyspanError, by_layer, random_basis, trainable_by_layer
from tinyspan.interop.trainer import SubspaceTrainer

ROWS = [
    {"input_ids": torch.tensor([i % 11, (3 * i) % 11, 5]), "labels": torch.tensor((i * i) % 3 % 2)} for i in range(24)
]
Z_RATE, RATE = 0.1, 1e-3
ENSEMBLE = 2


def bert(hidden: int = 8) -> BertForSequenceClassification:
    """Two layers without dropout, in float64, always the same."""
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        vocab_size=11,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).double()
    model.accepts_loss_kwargs = False  # it would ignore what the Trainer gives it for gradient accumulation
    return model


def basis_of(model: nn.Module) -> Basis:
    partition, drawn = by_layer(model), random_basis(by_layer(model), 3)
    return Basis.from_directions(
        partition, {block.name: drawn.maps[block.name].directions.double() for block in partition}
    )


def subspace(modules_to_save: tuple[str, ...] = ("classifier",)) -> SubspaceModel:
    model = bert()
    return SubspaceModel(model, basis_of(model), modules_to_save=modules_to_save, ensemble=ENSEMBLE)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": RATE,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(**settings)


class Literal(nn.Module):
    """theta_0 + V mean_i z_i as an expression of autograd, with an ordinary classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.model = bert().requires_grad_(False)
        self.model.classifier.requires_grad_(True)
        self.basis = basis_of(self.model)
        self.z = nn.ParameterList(
            torch.zeros(ENSEMBLE, self.basis.ranks[block.name], dtype=torch.float64) for block in self.basis.partition
        )

    def forward(self, **batch: Tensor) -> Any:
        weights = dict(self.model.named_parameters())
        for block, z in zip(self.basis.partition, self.z, strict=True):
            change = self.basis.maps[block.name].dense(torch.float64).T @ z.mean(0)
            weights |= {name: weights[name] + part for name, part in block.unflatten(change).items()}
        return torch.func.functional_call(self.model, weights, (), batch)


def batches(size: int) -> list[dict[str, Tensor]]:
    cut = [ROWS[a : a + size] for a in range(0, len(ROWS), size)]
    return [{key: torch.stack([row[key] for row in rows]) for key in rows[0]} for rows in cut]


def literally(steps: int, size: int, clip: float = 0.0, schedule: str = "constant") -> tuple[list[float], Literal]:
    """Train the literal formula in a plain loop."""
    model = Literal()
    groups = [{"params": model.z.parameters(), "lr": Z_RATE, "weight_decay": 0.0}]
    groups.append({"params": model.model.classifier.parameters(), "lr": RATE, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=steps)
    losses, rows = [], batches(size)
    for step in range(steps):
        loss = model(**rows[step % len(rows)]).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"max_grad_norm": 0.01}, {"clip": 0.01}, id="clipping"),
        pytest.param({"lr_scheduler_type": "cosine"}, {"schedule": "cosine"}, id="cosine schedule"),
        pytest.param({"lr_scheduler_type": "linear"}, {"schedule": "linear"}, id="linear schedule"),
        pytest.param(
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_grad_norm": 0.01},
            {"clip": 0.01},
            id="accumulation",
        ),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {},
            id="reentrant checkpointing",
        ),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {},
            id="checkpointing",
        ),
        pytest.param({"torch_compile_backend": "eager"}, {}, id="compile", marks=pytest.mark.processes),
        pytest.param({"torch_compile_backend": "inductor"}, {}, id="inductor", marks=pytest.mark.slow),
    ],
)
def test_the_trainer_with(tmp_path: Path, settings: dict[str, Any], reference: dict[str, Any]) -> None:
    """Losses of every step, z and classifier at the end are those of the plain loop."""
    model = subspace()
    trainer = SubspaceTrainer(model, arguments(tmp_path, **settings), train_dataset=ROWS, z_learning_rate=Z_RATE)
    trainer.train()
    losses, literal = literally(6, 4, **reference)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, abs=1e-6)
    for z, expected in zip(model.z, literal.z, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)
    for a, b in zip(model.model.classifier.parameters(), literal.model.classifier.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_at_work(tmp_path: Path, reentrant: bool) -> None:
    model, calls = subspace(), []
    model.model.bert.encoder.layer[0].attention.register_forward_hook(lambda *rest: calls.append(1))
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    SubspaceTrainer(model, arguments(tmp_path, max_steps=2, **settings), train_dataset=ROWS).train()
    assert len(calls) == 4


def test_training_in_which_no_gradient_reaches_z_ends_at_the_first_step(tmp_path: Path) -> None:
    model = subspace()
    for layer in model.model.bert.encoder.layer:
        layer.register_forward_hook(lambda layer, inputs, out: out.detach())
    with pytest.raises(TinyspanError, match="no gradient has reached z in the first step"):
        SubspaceTrainer(model, arguments(tmp_path), train_dataset=ROWS).train()


def test_under_bf16_autocast_the_gradient_of_z_is_that_of_the_weights_projected(tmp_path: Path) -> None:
    plain = bert().float()
    batch = batches(8)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain(**batch).loss
    loss.backward()
    basis = random_basis(by_layer(plain), 3)
    model = SubspaceModel(bert().float(), basis, modules_to_save=["classifier"])
    settings = {"bf16": True, "max_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd"}
    trainer = SubspaceTrainer(model, arguments(tmp_path, **settings), train_dataset=ROWS[:8], z_learning_rate=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    exact = copy.deepcopy(bert().float())
    exact(**batch).loss.backward()
    for block, z in zip(model.blocks, model.z, strict=True):
        expected = basis.maps[block.name].rmatvec(block.flatten(gradients))
        wide = block.flatten({name: parameter.grad for name, parameter in exact.named_parameters()})
        assert not torch.allclose(expected, basis.maps[block.name].rmatvec(wide), rtol=1e-4, atol=0)  # it was bfloat16
        assert z.dtype == torch.float32
        torch.testing.assert_close(-z[0], expected, rtol=1e-5, atol=1e-8)


def test_the_best_checkpoint_is_loaded_when_training_stops_early(tmp_path: Path) -> None:
    """z moves at a rate at which the loss soon rises; what is left is the model of the least evaluation loss."""
    model = subspace()
    settings = {
        "max_steps": 24,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "lr_scheduler_type": "constant",
    }
    trainer = SubspaceTrainer(
        model,
        arguments(tmp_path, **settings),
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        z_learning_rate=3.0,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) < 12
    assert found.index(min(found)) == len(found) - 3
    best = trainer.state.best_model_checkpoint
    assert best.endswith(f"checkpoint-{2 * (len(found) - 2)}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found), rel=1e-9)
    batch = {key: torch.stack([row[key] for row in ROWS[:8]]) for key in ROWS[0]}
    with torch.no_grad():
        assert model.merge()(**batch).loss.item() == pytest.approx(min(found), rel=1e-6)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "linear", "max_grad_norm": 0.01, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = subspace(), subspace()
    SubspaceTrainer(whole, arguments(tmp_path, **settings), train_dataset=ROWS, z_learning_rate=Z_RATE).train()
    again = SubspaceTrainer(resumed, arguments(tmp_path, **settings), train_dataset=ROWS, z_learning_rate=Z_RATE)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    losses, literal = literally(6, 4, clip=0.01, schedule="linear")
    logged = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-6)
    for a, b, expected in zip(whole.z, resumed.z, literal.z, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(b, expected, rtol=0, atol=1e-6)


class Report(TrainerCallback):
    """What a `report_to` integration is: it sees what is logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_what_is_reported_is_the_rate_and_the_gradient_of_z(tmp_path: Path) -> None:
    report, model = Report(), subspace(())
    settings = {"lr_scheduler_type": "linear", "max_grad_norm": 1e9, "max_steps": 4}
    SubspaceTrainer(
        model, arguments(tmp_path, **settings), train_dataset=ROWS, z_learning_rate=Z_RATE, callbacks=[report]
    ).train()
    reference = subspace(())
    reference(**batches(4)[0]).loss.backward()
    norm = torch.cat([z.grad.reshape(-1) for z in reference.z]).norm().item()
    assert report.seen[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert [logs["learning_rate"] for logs in report.seen[:4]] == pytest.approx(
        [Z_RATE * (1 - i / 4) for i in range(4)]
    )


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_follows_z(backend: str) -> None:
    model, reference = subspace(), subspace()
    compiled = torch.compile(model, backend=backend)
    for one in (compiled, reference):
        optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
        for batch in batches(4)[:3]:
            one(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for z, expected in zip(model.z, reference.z, strict=True):
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=0)


def test_so_is_one_under_a_lora_whose_kind_of_task_nobody_named(tmp_path: Path) -> None:
    lora = get_peft_model(bert(), LoraConfig(target_modules=["query"], r=2))
    model = SubspaceModel(lora, random_basis(trainable_by_layer(lora), 2))
    found = SubspaceTrainer(model, arguments(tmp_path), eval_dataset=ROWS).evaluate()
    with torch.no_grad():
        batch = {key: torch.stack([row[key] for row in ROWS]) for key in ROWS[0]}
        assert found["eval_loss"] == pytest.approx(bert()(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", [SubspaceTrainer, Trainer])
def test_a_model_whose_labels_nobody_named_is_evaluated_like_the_one_it_wraps(tmp_path: Path, kind: Any) -> None:
    model = subspace() if kind is SubspaceTrainer else bert()
    found = kind(model, arguments(tmp_path), eval_dataset=ROWS).evaluate()
    with torch.no_grad():
        batch = {key: torch.stack([row[key] for row in ROWS]) for key in ROWS[0]}
        assert found["eval_loss"] == pytest.approx(bert()(**batch).loss.item(), rel=1e-6)

"""What the Trainer decides by looking at a model comes out for a SubspaceModel as for the model that it wraps."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from towers import Tower
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from tinyspan import InputError, SubspaceModel, by_layer, random_basis, trainable_by_layer
from tinyspan.interop.trainer import SubspaceTrainer

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 13}


def seeded(make: Any, **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**changes)


def llama(**changes: Any) -> LlamaForCausalLM:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0, **changes)))


def bert(**changes: Any) -> BertForSequenceClassification:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return seeded(lambda: BertForSequenceClassification(BertConfig(**SMALL, **dropout, **changes)))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=13, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return seeded(lambda: T5ForConditionalGeneration(config))


def with_lora(model: nn.Module, target: str = "q_proj", mixed: bool = False) -> Any:
    config = LoraConfig(target_modules=[target], r=2, init_lora_weights=False)
    return seeded(lambda: get_peft_model(model, config, mixed=mixed))


def texts(rows: int = 8, length: int = 6) -> list[dict[str, Tensor]]:
    """Next-token data, of unlike numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(rows):
        tokens = torch.randint(1, 13, (length,), generator=generator)
        labels = tokens.clone()
        labels[: index % 4] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def pairs() -> list[dict[str, Tensor]]:
    """Rows of an encoder-decoder, with the decoder's input that a collator prepares for label smoothing."""
    return [{**row, "decoder_input_ids": row["input_ids"].roll(1)} for row in texts()]


def classes(multi_label: bool = False) -> list[dict[str, Tensor]]:
    labels = [torch.tensor([1.0, 0.0]) if multi_label else torch.tensor(index % 2) for index in range(8)]
    return [{"input_ids": row["input_ids"], "labels": label} for row, label in zip(texts(), labels, strict=True)]


def arguments(folder: Path, kind: Any = TrainingArguments, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return kind(**settings)


def trained(kind: type[Trainer], model: nn.Module, settings: Any, rows: Any, **options: Any) -> tuple[Trainer, float]:
    trainer = kind(model, settings, train_dataset=rows, eval_dataset=rows, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return trainer, before


@pytest.mark.parametrize(
    ("make", "rows", "changes"),
    [
        pytest.param(llama, texts, {}, id="decoder"),
        pytest.param(llama, texts, {"label_smoothing_factor": 0.1}, id="decoder, smoothed"),
        pytest.param(
            llama,
            texts,
            {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            id="decoder, smoothed, accumulated",
        ),
        pytest.param(
            llama,
            texts,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            id="decoder, accumulated",
        ),
        pytest.param(llama, texts, {"neftune_noise_alpha": 5.0}, id="decoder, noisy embeddings"),
        pytest.param(llama, texts, {"bf16": True}, id="decoder, bfloat16"),
        pytest.param(llama, texts, {"gradient_checkpointing": True}, id="decoder, checkpointed"),
        pytest.param(lambda: with_lora(llama()), texts, {"label_smoothing_factor": 0.1}, id="LoRA, smoothed"),
        pytest.param(
            lambda: with_lora(llama(), mixed=True), texts, {"label_smoothing_factor": 0.1}, id="mixed LoRA, smoothed"
        ),
        pytest.param(lambda: with_lora(llama()), texts, {"neftune_noise_alpha": 5.0}, id="LoRA, noisy embeddings"),
        pytest.param(t5, pairs, {"label_smoothing_factor": 0.1}, id="encoder-decoder, smoothed"),
        pytest.param(
            t5, pairs, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, id="encoder-decoder"
        ),
        pytest.param(bert, classes, {"label_smoothing_factor": 0.1}, id="classifier, smoothed"),
        pytest.param(
            lambda: bert(problem_type="multi_label_classification"),
            lambda: classes(multi_label=True),
            {"label_smoothing_factor": 0.1},
            id="several labels, smoothed",
            marks=pytest.mark.filterwarnings("ignore:Label smoothing is not compatible"),
        ),
    ],
)
def test_loss_and_first_update_are_those_of_the_bare_model(
    tmp_path: Path, make: Any, rows: Any, changes: dict[str, Any]
) -> None:
    """A step of SGD at rate 1 takes z to V^T times what it adds to the weights of the bare model."""
    bare, model = make(), make()
    lora = hasattr(model, "peft_config")
    basis = random_basis(trainable_by_layer(model) if lora else by_layer(model), 3)
    first = {name: weight.detach().clone() for name, weight in bare.named_parameters()}
    settings = arguments(tmp_path, **changes)
    plain, loss = trained(Trainer, bare, settings, rows())
    subspace = SubspaceModel(model, basis)
    ours, found = trained(SubspaceTrainer, subspace, settings, rows(), z_learning_rate=1.0)
    assert found == pytest.approx(loss, rel=1e-6)
    keys = ("loss", "total_flos")
    logged = [[entry[key] for entry in one.state.log_history for key in keys if key in entry] for one in (ours, plain)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)
    moved = {name: weight.detach() - first[name] for name, weight in bare.named_parameters()}
    for block, z in zip(subspace.blocks, subspace.z, strict=True):
        expected = basis.maps[block.name].rmatvec(block.flatten(moved))
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(z[0], expected, rtol=2e-2 if "bf16" in changes else 1e-3, atol=1e-6)


def test_a_decoder_under_label_smoothing_learns_the_next_token(tmp_path: Path) -> None:
    """Without the shift it would learn to copy its input."""
    rows = [{"input_ids": (torch.arange(6) + start) % 12 + 1} for start in range(12)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    model = llama()
    subspace = SubspaceModel(model, random_basis(by_layer(model), 8), modules_to_save=["lm_head", "embed_tokens"])
    settings = arguments(
        tmp_path, label_smoothing_factor=0.1, max_steps=60, optim="adamw_torch", learning_rate=5e-2, logging_steps=60
    )
    SubspaceTrainer(subspace, settings, train_dataset=rows).train()
    tokens = torch.stack([row["input_ids"] for row in rows])
    predicted = subspace(input_ids=tokens).logits.argmax(-1)
    assert (predicted[:, :-1] == tokens[:, 1:]).float().mean() > 0.95
    assert (predicted == tokens).float().mean() < 0.05


@pytest.mark.parametrize("trainer", [SubspaceTrainer, Trainer])
@pytest.mark.parametrize("make", [llama, t5, bert, lambda: with_lora(llama()), lambda: with_lora(llama(), mixed=True)])
def test_what_is_looked_up_is_that_of_the_bare_model(tmp_path: Path, make: Any, trainer: Any) -> None:
    settings = arguments(tmp_path, label_smoothing_factor=0.1, gradient_checkpointing=True)
    theirs = Trainer(make(), settings)
    model = make()
    ours = trainer(SubspaceModel(model, random_basis(by_layer(model), 2)), settings)
    names = ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels", "is_model_parallel")
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    for one in (ours, theirs):
        one._set_signature_columns_if_needed()
    assert sorted(ours._signature_columns) == sorted(theirs._signature_columns)
    if trainer is SubspaceTrainer:
        unused = [one.accelerator.ddp_handler.find_unused_parameters for one in (ours, theirs)]
        assert unused[0] == unused[1]


def test_labels_of_another_name_are_found_too(tmp_path: Path) -> None:
    model = BertForQuestionAnswering(BertConfig(**SMALL))
    trainer = SubspaceTrainer(SubspaceModel(model, random_basis(by_layer(model), 2)), arguments(tmp_path))
    assert trainer.label_names == ["start_positions", "end_positions"]


def test_a_subspace_model_is_shown_under_its_own_name() -> None:
    model = bert()
    text = repr(SubspaceModel(model, random_basis(by_layer(model), 2)))
    assert text.startswith("SubspaceModel(\n")
    assert "(model): BertForSequenceClassification(" in text


def test_a_lora_over_a_quantized_model_is_trained_like_itself(tmp_path: Path) -> None:
    lora = with_lora(llama())
    lora.get_base_model().is_quantized = True
    lora.get_base_model().hf_quantizer = SimpleNamespace(is_trainable=True)
    subspace = SubspaceModel(lora, random_basis(trainable_by_layer(lora), 2))
    Trainer(lora, arguments(tmp_path))
    SubspaceTrainer(subspace, arguments(tmp_path))


def test_liger_kernels_are_put_into_the_wrapped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[nn.Module] = []
    monkeypatch.setattr(
        "transformers.integrations.liger.apply_liger_kernel", lambda model, config: models.append(model)
    )
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: None)
    model = llama()
    trainer = SubspaceTrainer(
        SubspaceModel(model, random_basis(by_layer(model), 2)), arguments(tmp_path), train_dataset=texts()
    )
    trainer.args.use_liger_kernel = True
    trainer.train()
    assert models == [model]


def test_a_seq2seq_trainer_generates_as_its_arguments_say(tmp_path: Path) -> None:
    class Both(SubspaceTrainer, Seq2SeqTrainer):
        pass

    config = GenerationConfig(max_new_tokens=3, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    settings = arguments(
        tmp_path,
        Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_config=config,
        prediction_loss_only=False,
    )
    found = []
    for kind, wrap in ((Seq2SeqTrainer, False), (Both, True)):
        model: Any = t5()
        model = SubspaceModel(model, random_basis(by_layer(model), 2)) if wrap else model
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"].clamp(min=0)} for row in texts()]
        found.append(torch.tensor(kind(model, settings).predict(rows).predictions))
    assert found[0][:, 1:4].any()
    assert not found[0][:, 4:].any()  # 3 new tokens, then padding
    assert torch.equal(*found)


# -- the optimizer -----------------------------------------------------------------------------------------------------


def classifier() -> SubspaceModel:
    model = bert()
    return SubspaceModel(model, random_basis(by_layer(model), 3), modules_to_save=["classifier", "embeddings"])


@pytest.mark.parametrize(("given", "in_z"), [({}, 0.5), ({"z_learning_rate": 2.0}, 2.0)])
def test_the_optimizer_that_was_asked_for_is_used(tmp_path: Path, given: dict[str, float], in_z: float) -> None:
    subspace, kind = classifier(), (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
    settings = arguments(tmp_path, optim="adamw_torch", learning_rate=1e-3, weight_decay=0.1)
    trainer = SubspaceTrainer(subspace, settings, optimizer_cls_and_kwargs=kind, **given)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    z, *ordinary = optimizer.param_groups
    assert (z["lr"], z["momentum"], z["weight_decay"]) == (in_z, 0.9, 0.0)
    assert {group["lr"] for group in ordinary} == {0.5}
    assert {group["weight_decay"] for group in ordinary} == {0.1, 0.0}
    assert trainer.optimizer_cls_and_kwargs is kind
    assert kind[1] == {"lr": 0.5, "momentum": 0.9}


def test_a_factory_makes_its_own_groups(tmp_path: Path) -> None:
    class Factory:
        def __call__(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
            return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)

    trainer = SubspaceTrainer(classifier(), arguments(tmp_path), optimizer_cls_and_kwargs=(Factory, {"lr": 0.25}))
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.25]
    trainer.optimizer, trainer.module_learning_rates = None, {"classifier": 0.5}
    with pytest.raises(InputError, match="module_learning_rates cannot be used with a factory"):
        trainer.create_optimizer()
    trainer.module_learning_rates, trainer.z_learning_rate = {}, 0.5
    with pytest.raises(InputError, match="z_learning_rate cannot be used with a factory"):
        trainer.create_optimizer()


def test_a_rate_of_z_is_refused_beside_groups_of_parameters(tmp_path: Path) -> None:
    subspace = classifier()
    kind = torch.optim.SGD, {"lr": 0.25, "params": [{"params": list(subspace.z)}]}
    trainer = SubspaceTrainer(subspace, arguments(tmp_path), optimizer_cls_and_kwargs=kind, z_learning_rate=0.5)
    with pytest.raises(InputError, match="z_learning_rate cannot be used with a factory or given groups"):
        trainer.create_optimizer()


@pytest.mark.parametrize("rates", [{"z_learning_rate": 0.5}, {"module_learning_rates": {"classifier": 0.5}}])
def test_rates_are_refused_beside_an_optimizer(tmp_path: Path, rates: dict[str, Any]) -> None:
    subspace = classifier()
    optimizer = torch.optim.SGD(subspace.parameter_groups())
    with pytest.raises(InputError, match=f"{min(rates)} cannot be used with optimizers="):
        SubspaceTrainer(subspace, arguments(tmp_path), optimizers=(optimizer, None), **rates)
    SubspaceTrainer(subspace, arguments(tmp_path), optimizers=(optimizer, None))


@pytest.mark.parametrize("make", [classifier, bert])
def test_modules_have_rates_of_their_own_in_the_optimizer_that_was_asked_for(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    model, kind = make(), (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
    rates = {"bert.embeddings": 0.25, "bert.embeddings.LayerNorm": 0.125}  # the innermost module's counts
    trainer = SubspaceTrainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=kind, module_learning_rates=rates)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name.removeprefix("model.") for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert {group["momentum"] for group in groups} == {0.9}
    assert found.keys() == {names[id(parameter)] for parameter in model.parameters() if parameter.requires_grad}
    for name, rate in found.items():
        inner = "bert.embeddings.LayerNorm."
        assert rate == (0.125 if name.startswith(inner) else 0.25 if name.startswith("bert.embeddings.") else 0.5)


def test_the_rate_of_a_module_is_not_that_of_one_whose_name_begins_alike(tmp_path: Path) -> None:
    model = Tower(layers=11, width=2)
    trainer = SubspaceTrainer(model, arguments(tmp_path), module_learning_rates={"layers.1": 0.25})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    found = {names[id(parameter)] for group in groups if group["lr"] == 0.25 for parameter in group["params"]}
    assert found == {f"layers.1.{name}" for name, _ in model.layers[1].named_parameters()}


class LowRank(SubspaceTrainer):
    """Asks for what `galore_adamw` asks for: special options for one matrix of all that the model trains."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
        named = dict(model.named_parameters())
        target = named.pop("model.bert.embeddings.word_embeddings.weight")
        groups = [{"params": list(named.values())}, {"params": [target], "foreach": False}]
        return torch.optim.SGD, {"lr": args.learning_rate, "params": groups}


def test_a_low_rank_optimizer_sees_the_model_and_keeps_the_rates(tmp_path: Path) -> None:
    subspace = classifier()
    trainer = LowRank(subspace, arguments(tmp_path, learning_rate=1e-3), z_learning_rate=0.5)
    groups = trainer.create_optimizer().param_groups
    assert (groups[0]["lr"], groups[0]["params"]) == (0.5, list(subspace.z))
    special = [group for group in groups if group["foreach"] is False]
    assert [group["params"] for group in special] == [[subspace.model.bert.embeddings.word_embeddings.weight]]
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in subspace.parameters() if p.requires_grad
    }
    assert {group["lr"] for group in groups[1:]} == {1e-3}


@pytest.mark.parametrize("name", ["model", "optimizer_dict"])
def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(tmp_path: Path, name: str) -> None:
    trainer = SubspaceTrainer(
        classifier(), arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, name: {}})
    )
    with pytest.raises(InputError, match="SGD steps while gradients are computed"):
        trainer.create_optimizer()


# -- a plain Trainer, and losses that miss the SubspaceModel -----------------------------------------------------------


def test_a_plain_trainer_finds_labels_and_the_best_model(tmp_path: Path) -> None:
    settings = arguments(
        tmp_path, max_steps=4, eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(classifier(), settings, train_dataset=classes(), eval_dataset=classes())
    trainer.train()
    assert math.isfinite(trainer.state.best_metric)


def test_a_loss_that_calls_the_inner_model_is_told_once() -> None:
    inner = bert()
    batch = {key: torch.stack([row[key] for row in classes()]) for key in ("input_ids", "labels")}
    subspace = SubspaceModel(inner, random_basis(by_layer(inner), 3))
    optimizer = torch.optim.SGD(subspace.z.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in (subspace, inner, inner, inner):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1
    assert "Build loss objects on the SubspaceModel, or call refresh()" in str(caught[0].message)


def test_a_loss_that_refreshes_the_inner_model_is_right() -> None:
    inner = bert()
    batch = {key: torch.stack([row[key] for row in classes()]) for key in ("input_ids", "labels")}
    subspace = SubspaceModel(inner, random_basis(by_layer(inner), 3), init_std=0.1)
    optimizer = torch.optim.AdamW(subspace.z.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            subspace.refresh()
            for _ in range(2):  # accumulation
                inner(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_part_of_z_without_a_gradient_is_told_once(tmp_path: Path) -> None:
    subspace = classifier()
    subspace.model.bert.encoder.layer[0].register_forward_hook(lambda layer, inputs, out: out.detach())
    with pytest.warns(UserWarning, match=r"z of 1 of 2 blocks in the first step, '.*0'") as caught:
        SubspaceTrainer(subspace, arguments(tmp_path, max_steps=3), train_dataset=classes()).train()
    assert sum("no gradient has reached" in str(warning.message) for warning in caught) == 1

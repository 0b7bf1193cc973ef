"""Fine-tune a model on a task and score it on the rows held out, through the Hugging Face Trainer."""

import copy
import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from tinyspan.errors import InputError, TinyspanError
from tinyspan.io.storage import package_versions
from tinyspan.model.subspace import SubspaceModel
from tinyspan.workflows.hardware import (
    default_device,
    hardware,
    has_bfloat16,
    peak_memory,
    reset_peak_memory,
    seeded,
)
from tinyspan.workflows.language import (
    generate,
    generation_scores,
    perplexity,
    prompts_of,
    token_losses,
    tokenized_pairs,
    tokenized_text,
)
from tinyspan.workflows.models import check_kind, load_pretrained, tokenizer_of
from tinyspan.workflows.resumable import Checkpoints, ResumableTrainer
from tinyspan.workflows.tasks import PAIR, TEXT, Split, Task, get_task, load_rows, score_of

__all__ = ["Method", "Prepared", "Settings", "fine_tune", "prepare", "run_of", "score"]

SPLITS: tuple[Split, ...] = ("train", "validation")
# types of models whose positions are counted from the padding token's number on
AFTER_PADDING = {"camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"}
AFTER_PADDING |= {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
EXAMPLES = 5  # of what was generated, in a result
Progress = Callable[[Sequence[int]], Iterable[int]]
Method = Literal["full", "freeze", "random", "fastfood", "intrinsic", "given", "lora"]


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the paper's (section 4.1 and appendix), but for the last.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step.
        max_length: tokens per row, or of a prompt; longer ones are cut.
        learning_rate: of ordinary parameters, decayed linearly to 0.
        z_learning_rate: of z, decayed likewise.
        precision: `bfloat16` computes under autocast; `auto` does so where the processor has it. Weights stay float32.
        seed: of the head's first weights, the order of rows and dropout.
        max_target_length: tokens per completion, of language tasks, in training and when generated.
        max_steps: optimizer steps to train for instead of whole `epochs`.
        module_learning_rates: of the ordinary parameters in some modules, by name, in place of `learning_rate`: a new
            head often wants a larger one than pre-trained weights.
        regression_start: what a new regression head says first: the `mean` of the training labels, or about `zero`, as
            transformers leaves it. From zero, a model whose labels are far from it learns their mean first, and the
            rest much later: a bias moves by about the learning rate a step.

    Raises:
        InputError: a number is not above 0, or infinite, or there is no such start.
    """

    epochs: int = 32
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 2e-5
    z_learning_rate: float = 1e-2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    max_target_length: int = 64
    regression_start: Literal["mean", "zero"] = "mean"
    max_steps: int | None = None
    module_learning_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "max_length", "learning_rate", "z_learning_rate", "max_target_length")
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {f"the learning rate of {module}": rate for module, rate in self.module_learning_rates.items()}
        numbers |= {} if self.max_steps is None else {"max_steps": self.max_steps}
        for name, number in numbers.items():
            if not 0 < number < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {number}")
        if self.regression_start not in ("mean", "zero"):
            raise InputError(f"regression_start must be 'mean' or 'zero', got {self.regression_start!r}")

    def steps(self, rows: int) -> int:
        """Return how many optimizer steps so many training rows make."""
        return self.max_steps or self.steps_per_epoch(rows) * self.epochs

    def steps_per_epoch(self, rows: int) -> int:
        """Return how many optimizer steps one pass over so many training rows makes."""
        return -(-rows // self.batch_size)

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16."""
        return has_bfloat16() if self.precision == "auto" else self.precision == "bfloat16"


@dataclass(frozen=True)
class Prepared:
    """A task's rows, tokenized for a model.

    Attributes:
        model: name or path of the pre-trained model, as the user gave it.
        train: None where only scoring is wanted.
        completions: the held-out ones as text, in the order of the rows, if the task has prompts.
    """

    model: str
    task: Task
    tokenizer: Any
    train: Dataset | None
    validation: Dataset
    completions: Sequence[str] = ()

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        """Make a batch of rows, padded."""
        if self.task.is_language:
            tokenizer = copy.deepcopy(self.tokenizer)
            tokenizer.padding_side = "right"  # whatever its own is: positions count from the left
            return DataCollatorForSeq2Seq(tokenizer)
        return DataCollatorWithPadding(self.tokenizer)

    @property
    def encoder_decoder(self) -> bool:
        """Whether completions go to a decoder of their own."""
        return self.task.type == "seq2seq"

    @property
    def label_mean(self) -> float | None:
        """Mean label of the training rows; None if there are none, or the task is no regression."""
        return float(np.mean(self.train["labels"])) if self.train and self.task.classes == 1 else None

    def set_aside(self, rows: int) -> tuple["Prepared", "Prepared"]:
        """Set the last training rows aside, to choose settings by rows that are neither trained on nor reported on.

        Returns:
            The task without these training rows, and the same with these to be scored on in place of the held-out ones.

        Raises:
            InputError: no training row would be left.
        """
        count = len(self.train or ()) - rows
        if self.train is None or count < 1:
            raise InputError(f"cannot set {rows} of {len(self.train or ())} training rows aside: none would be left")
        rest, aside = self.train.select(range(count)), self.train.select(range(count, len(self.train)))
        return replace(self, train=rest), replace(self, train=rest, validation=aside, completions=())

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the tokens and labels of each split."""
        return {name: _digest(rows) for name, rows in (("train", self.train), ("validation", self.validation)) if rows}


def prepare(
    model: str,
    task: str,
    *,
    data: Path | None = None,
    columns: Sequence[str] = (),
    max_length: int = 128,
    max_target_length: int = 64,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    draw_seed: int = 0,
    train: bool = True,
) -> Prepared:
    """Load and tokenize a task for a model.

    Args:
        model: path, hub id or `minilm`.
        task: name of a task.
        data: local folder; see `load_rows`, and for a language task `load_texts`.
        columns: of a language task's text, or of its prompt and completion, if they are named otherwise.
        max_length: tokens per row, or of a prompt.
        max_target_length: tokens of a completion.
        train_rows: use only so many training rows, drawn by `draw_seed`.
        validation_rows: use only so many held-out rows, drawn likewise.
        draw_seed: of these draws; apart from the seed of a run, so that all runs see the same rows.
        train: whether to read the training rows at all.

    Raises:
        InputError: the model, the task or its data cannot be had.
    """
    known = get_task(task)
    if columns:
        known = _with_columns(known, columns)
    loaded = {split: load_rows(known, split, data) for split in SPLITS if train or split == "validation"}
    config = load_pretrained(AutoConfig, model)
    tokenizer = tokenizer_of(model, config)
    if known.is_language:
        known = replace(known, columns=_same_columns(loaded))
        check_kind(model, config, known)

    def drawn(split: Split, limit: int | None) -> pd.DataFrame:
        rows = loaded[split]
        if limit is None or limit >= len(rows):
            return rows
        return rows.sample(limit, random_state=draw_seed)

    def tokenized(split: Split, rows: pd.DataFrame) -> Dataset:
        if not known.is_language:
            found = _labelled(rows, known, tokenizer, max_length, split)
        elif known.columns == TEXT:
            found = tokenized_text(rows, tokenizer, max_length)
        else:
            seq2seq = known.type == "seq2seq"
            found = tokenized_pairs(rows, tokenizer, max_length, max_target_length, encoder_decoder=seq2seq)
        _require_room(found, split, model, config, tokenizer, known, max_target_length)
        return found

    held_out = drawn("validation", validation_rows)
    validation = tokenized("validation", held_out)
    order = _by_length(validation)
    return Prepared(
        model,
        known,
        tokenizer,
        tokenized("train", drawn("train", train_rows)) if train else None,
        validation.select(order),
        tuple(held_out["completion"].iloc[order]) if known.columns == PAIR else (),
    )


def _labelled(rows: pd.DataFrame, task: Task, tokenizer: Any, max_length: int, split: Split) -> Dataset:
    texts = [rows[column].astype(str).tolist() for column in task.columns]
    if max_length <= (special := tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)):
        raise InputError(f"a row has {special} special tokens beside its text: --max-length {special + 1} or more")
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    labels = rows["label"].astype(float if task.classes == 1 else int).tolist()
    if len(set(labels)) == 1:
        warnings.warn(f"{task.name}: all {len(labels)} {split} rows have the label {labels[0]}", stacklevel=4)
    return Dataset.from_dict({**encoded, "labels": labels})


def _with_columns(task: Task, columns: Sequence[str]) -> Task:
    """Let a language task's texts come from other columns.

    Raises:
        InputError: the task has columns of its own, or there are not one or two names.
    """
    if not task.is_language:
        raise InputError(f"{task.name} has its own columns, {', '.join(task.columns)}; --columns goes with --task-type")
    if not (len(columns) in (1, 2) and all(columns) and len({*columns}) == len(columns)):
        raise InputError(f"expected the name of the text's column, or of prompt's and completion's, got {columns!r}")
    return replace(task, columns=tuple(columns))


def _same_columns(loaded: Mapping[Split, pd.DataFrame]) -> tuple[str, ...]:
    """Return the columns of all splits; refuse running text in one and prompts in another."""
    found = {split: tuple(map(str, rows.columns)) for split, rows in loaded.items()}
    if len({*found.values()}) > 1:
        told = " and ".join(f"the {split} rows have {', '.join(columns)}" for split, columns in found.items())
        raise InputError(f"{told}; expected the same columns")
    return found["validation"]


def _require_room(
    rows: Dataset, split: Split, model: str, config: Any, tokenizer: Any, task: Task, max_target_length: int
) -> None:
    """Refuse rows that are too long for a model, or that have tokens it does not know.

    Raises:
        InputError: says which number to lower.
    """
    encoder, decoder = (getattr(config, part, config) for part in ("encoder", "decoder"))
    longest, of_decoder = _positions(encoder), _positions(decoder)
    longest = min(longest, tokenizer.model_max_length)
    tokens = max(map(len, rows["input_ids"]))
    if not task.is_language and min(map(len, rows["input_ids"])) == 0:
        raise InputError(f"a {split} row has no token: its text is empty, and the tokenizer of {model!r} adds none")
    largest = max(max(map(max, rows["input_ids"])), tokenizer.pad_token_id or 0)
    if largest >= (known := getattr(encoder, "vocab_size", None) or math.inf):
        raise InputError(
            f"the tokenizer of {model!r} made the token {largest}, and the model knows {known}: resize its embeddings "
            "(resize_token_embeddings), or take the tokenizer that belongs to it"
        )
    if task.columns == PAIR and task.type == "causal-lm":
        prompt = max(map(len, prompts_of(rows, False)))
        if prompt + max_target_length > longest:
            raise InputError(
                f"a {split} prompt has {prompt} tokens, with a completion of up to {max_target_length} more than the "
                f"{longest} that {model!r} takes; lower --max-length or --max-target-length"
            )
    elif tokens > longest:
        raise InputError(f"a {split} row has {tokens} tokens, {model!r} takes {longest}: --max-length {longest}")
    if task.type == "seq2seq" and max_target_length > of_decoder:
        raise InputError(f"the decoder of {model!r} takes {of_decoder} tokens: --max-target-length {of_decoder}")


def _positions(config: Any) -> float:
    """Return how many tokens a model takes; without limit if it does not say, or says less than one."""
    found = getattr(config, "max_position_embeddings", None) or 0
    if config.model_type in AFTER_PADDING and config.pad_token_id is not None:
        found -= config.pad_token_id + 1
    return found if found > 0 else math.inf


def _digest(rows: Dataset) -> str:
    table = rows.with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _by_length(rows: Dataset) -> list[int]:
    """Return an order of rows to be scored in which a batch has little padding; scores do not depend on it."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sorted(range(len(rows)), key=lengths.__getitem__)


def fine_tune(
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    method: Method,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    score_every_epoch: bool = True,
    checkpoints: Path | None = None,
    save_every: int | Literal["epoch"] = "epoch",
    progress: Progress = iter,
) -> dict[str, Any]:
    """Train a model, or the z and ordinary parameters of a `SubspaceModel`, and score it on the held-out rows.

    Args:
        model: to be trained.
        prepared: the rows.
        settings: how to train.
        method: what the result calls it.
        callbacks: of the Trainer.
        score_every_epoch: or after the last epoch alone, which saves time.
        checkpoints: a folder to save the state of training in; the same call goes on from the newest one there, and
            ends with the same weights and scores as one that was not interrupted.
        save_every: how often: after every epoch, or besides after every so many steps.
        progress: of generation, which comes last and only if the task has prompts; see `generate`.

    Returns:
        What `result.json` holds: `method`, `model`, `task`, `seed`, `metric`, `score` (of the held-out rows after the
        last epoch; a perplexity, else a fraction), `epochs`, `history`, `subspace_parameters`, `ordinary_parameters`,
        `seconds` (training and evaluation, wall clock), `peak_memory_bytes` (of the process, or of the accelerator),
        `basis`, `settings`, `rows`, `versions`, `hardware`, and for a task with prompts `generation`, see `generated`.

    Raises:
        TinyspanError: the loss, the gradients or the predictions become NaN or infinite.
    """
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed):
        saved = None
        if checkpoints is not None:
            run = {**run_of(prepared, settings), "score_every_epoch": score_every_epoch}
            run |= {"start": _weights_digest(model)}
            run |= {"basis": model.basis.content_hash()} if isinstance(model, SubspaceModel) else {}
            saved = Checkpoints(checkpoints, save_every, run)
        trainer = _trainer(model, prepared, settings, scratch, callbacks, score_every_epoch, saved)
        reset_peak_memory()
        trainer.train_or_resume()
        if not score_every_epoch:
            trainer.evaluate()
        seconds, peak = trainer.seconds, trainer.peak_memory_bytes
    history = _history(trainer.state.log_history)
    generation = generated(model, prepared, settings, progress)
    return _result(model, prepared, settings, method, history[-1]["score"], history, seconds, peak, generation)


def run_of(prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """Return what decides a run but the weights it starts from, in JSON's types; runs in which it is equal agree."""
    versions = {name: package_versions().get(name) for name in ("tinyspan", "torch", "transformers")}
    return {
        "model": prepared.model,
        "task": prepared.task.name,
        "settings": {**asdict(settings), "autocast": settings.autocast},
        "rows": prepared.digests(),
        "versions": versions,
    }


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def score(
    model: nn.Module, prepared: Prepared, settings: Settings, method: Method, progress: Progress = iter
) -> dict[str, Any]:
    """Score a trained model on the held-out rows; returns the keys of `fine_tune`, with no epochs and no history."""
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed):
        trainer = _trainer(model, prepared, settings, scratch)
        reset_peak_memory()
        began = time.perf_counter()
        scores = trainer.evaluate()
        seconds = time.perf_counter() - began
    generation = generated(model, prepared, settings, progress)
    return _result(model, prepared, settings, method, scores["eval_score"], [], seconds, peak_memory(), generation)


def generated(
    model: nn.Module, prepared: Prepared, settings: Settings, progress: Progress = iter
) -> dict[str, Any] | None:
    """Complete the held-out prompts greedily and compare; None if the task has no prompts.

    Returns:
        `exact_match`, `rouge_l`, and of the shortest rows `examples` with `prompt`, `expected` and `generated`.
    """
    if not prepared.completions:
        return None
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=settings.autocast):
        texts = generate(
            model,
            prepared.validation,
            prepared.tokenizer,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_target_length,
            encoder_decoder=prepared.encoder_decoder,
            progress=progress,
        )
    prompts = prompts_of(prepared.validation, prepared.encoder_decoder, EXAMPLES)
    shown = zip(prepared.tokenizer.batch_decode(prompts, skip_special_tokens=True), prepared.completions, texts)  # noqa: B905
    examples = [{"prompt": a, "expected": b, "generated": c} for a, b, c in shown]
    return {**generation_scores(texts, prepared.completions), "examples": examples}


def _trainer(
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    scratch: str,
    callbacks: Sequence[TrainerCallback] = (),
    score_every_epoch: bool = True,
    checkpoints: Checkpoints | None = None,
) -> ResumableTrainer:
    arguments = TrainingArguments(
        output_dir=scratch if checkpoints is None else str(checkpoints.folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size * (1 if prepared.task.is_language else 4),  # logits are large
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",  # rows of similar length together: half the padding
        bf16=settings.autocast,
        use_cpu=default_device().type == "cpu",
        eval_strategy="epoch" if score_every_epoch else "no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no",  # the ResumableTrainer says when
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    regression, language, shifted = prepared.task.classes == 1, prepared.task.is_language, not prepared.encoder_decoder

    def losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        found = logits if isinstance(logits, tuple) else (logits,)  # a mixture of experts has its own loss among them
        return token_losses(next(one for one in found if one.dim() == 3), labels, shifted=shifted)

    def first(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits  # states come besides
        return found

    def compute_metrics(output: Any) -> dict[str, float]:
        if language:
            return {"score": perplexity(output.predictions, output.label_ids, shifted=shifted)}
        if not np.isfinite(output.predictions).all():
            raise TinyspanError(f"{prepared.task.name}: the predictions are NaN or infinite; lower the learning rates")
        predictions = output.predictions.squeeze(-1) if regression else output.predictions.argmax(-1)
        return {"score": score_of(prepared.task, output.label_ids, predictions)}

    trainer = ResumableTrainer(
        model,
        arguments,
        data_collator=prepared.collate,
        preprocess_logits_for_metrics=losses if language else first,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
        z_learning_rate=settings.z_learning_rate,
        module_learning_rates=settings.module_learning_rates,
        checkpoints=checkpoints,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _history(log: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Join the Trainer's training and evaluation entries of each epoch."""
    ours = {"loss": "train_loss", "eval_loss": "validation_loss", "eval_score": "score"}
    epochs: dict[float, dict[str, float]] = {}
    for entry in log:
        for key in ours.keys() & entry.keys():
            if not math.isfinite(entry[key]):
                raise TinyspanError(
                    f"the loss is NaN or infinite at epoch {entry['epoch']:g}; lower the learning rates"
                )
            epochs.setdefault(entry["epoch"], {"epoch": entry["epoch"]})[ours[key]] = float(entry[key])
    return list(epochs.values())


def _counts(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained in z and in the ordinary way."""
    if isinstance(model, SubspaceModel):
        return model.count_parameters()
    return 0, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _result(
    model: nn.Module,
    prepared: Prepared,
    settings: Settings,
    method: Method,
    score: float,
    history: list[dict[str, float]],
    seconds: float,
    peak: int,
    generation: dict[str, Any] | None,
) -> dict[str, Any]:
    in_z, ordinary = _counts(model)
    basis = model.basis.content_hash() if isinstance(model, SubspaceModel) and model.basis.rank > 0 else None
    return {
        "method": method,
        "model": prepared.model,
        "task": prepared.task.name,
        "seed": settings.seed,
        "metric": prepared.task.metric,
        "basis": basis,
        "settings": {**asdict(settings), "autocast": settings.autocast},
        "rows": {"train": len(prepared.train or ()), "validation": len(prepared.validation)},
        "versions": package_versions(),
        "hardware": hardware(),
        "score": score,
        **({"generation": generation} if generation else {}),
        "epochs": (history[-1]["epoch"] if settings.max_steps else settings.epochs) if history else 0,
        "history": history,
        "subspace_parameters": in_z,
        "ordinary_parameters": ordinary,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
    }

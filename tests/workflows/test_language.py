"""Language modelling and generation through the commands, on miniature decoders and encoder-decoders."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from miniatures import WORDS, model_of, reviews, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, BertForMaskedLM

from tinyspan import InputError, TinyspanError
from tinyspan.workflows.language import (
    IGNORED,
    generate,
    generation_scores,
    perplexity,
    prompts_of,
    token_losses,
    tokenized_pairs,
    tokenized_text,
)
from tinyspan.workflows.models import base_model
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.settings import Settings
from tinyspan.workflows.tasks import get_task
from tinyspan.workflows.training import score

pytestmark = pytest.mark.studies

KINDS = {"causal-lm": "causal-lm", "gpt2": "causal-lm", "seq2seq": "seq2seq", "bart": "seq2seq"}
RUNNING = [("causal-lm", "running"), ("gpt2", "running")]  # an encoder-decoder has prompts
QUICK = ["--epochs", 6, "--batch-size", 8, "--precision", "float32", "--max-target-length", 3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("language models")
    for kind in KINDS:
        model_of(kind).save_pretrained(folder / kind)
        tokenizer(encoder_decoder=KINDS[kind] == "seq2seq").save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompts and completions as JSON lines; the same under other names; running text."""
    folder = tmp_path_factory.mktemp("texts")
    for split, rows, seed in (("train", 64, 1), ("validation", 20, 2)):
        for kind in ("pairs", "renamed", "running"):
            (folder / kind).mkdir(exist_ok=True)
        found = reviews(rows, seed)
        found.to_json(folder / "pairs" / f"{split}.jsonl", orient="records", lines=True)
        found.set_axis(["question", "answer"], axis=1).to_csv(folder / "renamed" / f"{split}.csv", index=False)
        (folder / "running" / f"{split}.txt").write_text("\n".join(found["prompt"]))
    return {kind: folder / kind for kind in ("pairs", "renamed", "running")}


@pytest.mark.parametrize(
    ("kind", "data", "learned", "more"),
    [
        ("causal-lm", "running", 0.95, ["--max-length", 16]),
        ("causal-lm", "pairs", 0.5, []),
        ("seq2seq", "renamed", 0.5, ["--text", "question,answer"]),
    ],
)
def test_record_discover_tune_evaluate_export(
    kind: str,
    data: str,
    learned: float,
    more: list[object],
    models: dict[str, Path],
    texts: dict[str, Path],
    tmp_path: Path,
    run: Any,
) -> None:
    task = ["--model", models[kind], "--task-type", kind]
    rows = ["--data", texts[data], *more]
    code, out, _ = run("evaluate", *task, *rows, "--max-target-length", 3, "--precision", "float32")
    assert code == 0
    before = float(out.split("perplexity ")[1].split(",")[0].split()[0])
    assert len(WORDS) / 2 < before < 2 * len(WORDS)  # untrained: about as many as words

    code, out, err = run("record", *task, *rows, *QUICK, "--learning-rate", 1e-2, "--output", tmp_path / "full")
    assert code == 0, err
    full = json.loads((tmp_path / "full" / "result.json").read_text())
    assert full["metric"] == "perplexity"
    assert 1 <= full["score"] < before * learned
    assert full["history"][-1]["score"] == full["score"]

    assert run("discover", tmp_path / "full", "--rank", 4, "--output", tmp_path / "basis")[0] == 0
    words = ["tune", *task, *rows, *QUICK, "--learning-rate", 1e-2, "--z-learning-rate", 1e-1]
    code, out, err = run(*words, "--basis", tmp_path / "basis", "--output", tmp_path / "tuned")
    assert code == 0, err
    tuned = json.loads((tmp_path / "tuned" / "result.json").read_text())
    assert tuned["score"] < before * learned
    assert f"perplexity {tuned['score']:.4f}" in out

    code, again, err = run("evaluate", *task, *rows, "--adapter", tmp_path / "tuned")
    assert code == 0, err
    assert again.strip() in out.rpartition(":")[0]  # the same scores, with the lengths it was tuned with
    if data != "running":
        found = tuned["generation"]
        assert found["exact_match"] == pytest.approx(found["rouge_l"])  # of one word
        assert full["generation"]["exact_match"] > 0.3  # one of the two words at least; untrained, one of 25
        assert f"exact match {found['exact_match']:.4f}" in out
        assert set(found["examples"][0]) == {"prompt", "expected", "generated"}
    else:
        assert "generation" not in tuned
        assert "exact match" not in out

    export = ["export", *task, "--adapter", tmp_path / "tuned", "--to", "merged"]
    code, _, err = run(*export, "--output", tmp_path / "merged")
    assert code == 0, err
    code, merged, err = run("evaluate", "--model", tmp_path / "merged", *task[2:], *rows, *QUICK[2:])
    assert code == 0, err
    assert merged.split("perplexity")[1][:7] == out.split("perplexity")[1][:7]

    wrong = ["--model", models[kind], "--task", "sst2", "--adapter", tmp_path / "tuned"]
    for words in (["evaluate", *wrong, *rows[:2]], ["export", *wrong, "--to", "delta", "--output", tmp_path / "delta"]):
        code, _, err = run(*words)
        assert (code, f"was trained for {kind} ({kind}), not for sst2" in err.replace("\n", " ")) == (2, True), err


def test_bases_are_ranked_for_text(models: dict[str, Path], texts: dict[str, Path], tmp_path: Path, run: Any) -> None:
    task = ["--model", models["causal-lm"], "--task-type", "causal-lm", "--data", texts["pairs"]]
    assert run("record", *task, *QUICK, "--learning-rate", 1e-2, "--output", tmp_path / "full")[0] == 0
    code, _, err = run("suggest", *task, tmp_path / "full", "--precision", "float32", "--output", tmp_path / "ranked")
    assert code == 0, err
    assert "comparing first gradients" in err
    assert "head" not in err
    assert json.loads((tmp_path / "ranked" / "result.json").read_text())["head"] is None


def test_an_interrupted_run_with_tied_weights_goes_on(
    models: dict[str, Path], texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    from tinyspan.workflows import runs

    task = ["--model", models["causal-lm"], "--task-type", "causal-lm", "--data", texts["pairs"]]
    tune = ["tune", *task, *QUICK, "--basis", "random", "--rank", 2, "--learning-rate", 1e-2]
    assert run(*tune, "--output", tmp_path / "whole")[0] == 0

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # after the last epoch's state was saved
        patched.setattr(runs.SubspaceModel, "save_pretrained", stopped)
        code, _, err = run(*tune, "--output", tmp_path / "cut")
    assert (code, "interrupted" in err) == (130, True)
    code, _, err = run(*tune, "--output", tmp_path / "cut")
    assert code == 0, err
    scores = [json.loads((tmp_path / name / "result.json").read_text())["score"] for name in ("whole", "cut")]
    assert scores[0] == scores[1]


# -- tokens -------------------------------------------------------------------------------------------------------


def test_running_text_is_cut_into_rows_and_nothing_is_lost() -> None:
    words = tokenizer(encoder_decoder=False)
    rows = tokenized_text(pd.DataFrame({"text": ["the film is fine", "a dull story"]}), words, 4)
    ids = [word for row in rows["input_ids"] for word in row]
    assert [len(row) for row in rows["input_ids"]] == [4, 4]  # a last row of one token predicts nothing
    assert words.convert_ids_to_tokens(ids) == ["the", "film", "is", "fine", "[EOS]", "a", "dull", "story"]
    assert rows["labels"][:] == [[IGNORED, *row[1:]] for row in rows["input_ids"]]
    with pytest.raises(InputError, match="1 tokens; expected at least 2"):
        tokenized_text(pd.DataFrame({"text": [" "]}), words, 4)


def test_a_decoder_learns_the_completion_alone() -> None:
    words = tokenizer(encoder_decoder=False)
    pair = pd.DataFrame({"prompt": ["the film is fine"], "completion": ["good again"]})
    (row,) = tokenized_pairs(pair, words, 3, 2, encoder_decoder=False)
    assert words.convert_ids_to_tokens(row["input_ids"]) == ["film", "is", "fine", "good", "again"]  # the nearest words
    assert row["labels"] == [IGNORED] * 3 + row["input_ids"][3:]
    (row,) = tokenized_pairs(pair, words, 9, 9, encoder_decoder=False)
    assert words.convert_ids_to_tokens(row["input_ids"])[-1] == "[EOS]"


def test_a_text_begins_as_the_tokenizer_has_it_and_a_prompt_does_not_end() -> None:
    words = tokenizer(encoder_decoder=False)
    words.add_special_tokens({"bos_token": "war"})
    both = TemplateProcessing(single="war $A [EOS]", special_tokens=[("war", words.bos_token_id), ("[EOS]", 1)])
    words.backend_tokenizer.post_processor = both
    pair = pd.DataFrame({"prompt": ["the film is fine"], "completion": ["good"]})
    (row,) = tokenized_pairs(pair, words, 3, 9, encoder_decoder=False)
    assert words.convert_ids_to_tokens(row["input_ids"]) == ["war", "is", "fine", "good", "[EOS]"]
    (row,) = tokenized_text(pd.DataFrame({"text": ["the film"]}), words, 9)
    assert words.convert_ids_to_tokens(row["input_ids"]) == ["war", "the", "film", "[EOS]"]


def test_an_encoder_decoder_has_the_completion_apart() -> None:
    words = tokenizer(encoder_decoder=True)
    pair = pd.DataFrame({"prompt": ["the film is fine"], "completion": ["good again"]})
    (row,) = tokenized_pairs(pair, words, 3, 9, encoder_decoder=True)
    assert words.convert_ids_to_tokens(row["input_ids"]) == ["the", "film", "[EOS]"]
    assert words.convert_ids_to_tokens(row["labels"]) == ["good", "again", "[EOS]"]


# -- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [True, False])
def test_perplexity_is_that_of_a_plain_loop(shifted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[0, 3:] = labels[2, :2] = IGNORED
    losses = []
    for row in range(3):
        for position in range(1 if shifted else 0, 5):
            if labels[row, position] != IGNORED:
                seen = logits[row, position - 1 if shifted else position]
                losses.append(-(seen.log_softmax(0)[labels[row, position]]).item())
    found = token_losses(logits, labels, shifted=shifted).numpy()
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(found, labels.numpy(), shifted=shifted) == pytest.approx(expected, rel=1e-6)  # float32 losses


def test_a_loss_that_is_nan_is_an_error_and_a_huge_one_infinite() -> None:
    labels = np.array([[IGNORED, 1, 1]])
    with pytest.raises(TinyspanError, match="held-out token"):
        perplexity(np.array([[0.0, 1.0, np.nan]]), labels, shifted=True)
    assert perplexity(np.array([[0.0, 1.0, 2000.0]]), labels, shifted=True) == math.inf


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "data"), [*((kind, "pairs") for kind in KINDS), *RUNNING])
def test_the_score_weighs_tokens_not_rows(
    kind: str, data: str, side: str, models: dict[str, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    """Rows of different lengths in batches of 8 and 3 give the loss of each row alone, added up."""
    shutil.copytree(models[kind], tmp_path / "model")
    words = tokenizer(encoder_decoder=KINDS[kind] == "seq2seq")
    words.padding_side = side
    words.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    prepared = prepare(name, KINDS[kind], data=texts[data], max_length=13, max_target_length=3)
    model, total, count = base_model(name, prepared.task, 0).eval(), 0.0, 0
    for row in prepared.validation:
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        tokens = sum(label != IGNORED for label in row["labels"])
        total, count = total + model(**batch).loss.item() * tokens, count + tokens
    assert len({len(row["input_ids"]) for row in prepared.validation}) > 1
    for size in (8, 3):
        found = score(model, prepared, Settings(batch_size=size, precision="float32", max_target_length=3), "full")
        assert found["score"] == pytest.approx(math.exp(total / count), rel=1e-5)  # float32


def test_padding_on_the_right_leaves_the_tokenizer_as_it_is() -> None:
    words = tokenizer(encoder_decoder=True)
    words.padding_side = "left"
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in ([5, 6], [7])]
    batch = get_task("causal-lm").collator(words)(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [7, words.pad_token_id]]
    assert words.padding_side == "left"


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_completes_as_each_row_alone(kind: str, models: dict[str, Path], texts: dict[str, Path]) -> None:
    prepared = prepare(str(models[kind]), KINDS[kind], data=texts["pairs"], max_target_length=3)
    model = model_of(kind, seed=7).eval()
    with torch.no_grad():  # so that what is said depends on the prompt
        for parameter in model.parameters():
            parameter.mul_(10)
    prompts = prompts_of(prepared.validation, prepared.task.encoder_decoder)
    assert len({*map(len, prompts)}) > 1
    alone = []
    for ids in prompts:
        made = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        made = made[0] if prepared.task.encoder_decoder else made[0, len(ids) :]
        alone.append(prepared.tokenizer.decode(made, skip_special_tokens=True).strip())
    model.generation_config.update(min_length=9, repetition_penalty=9.0, do_sample=True)  # as some are published
    found = generate(
        model,
        prepared.validation,
        prepared.tokenizer,
        batch_size=7,
        max_new_tokens=4,
        encoder_decoder=prepared.task.encoder_decoder,
    )
    assert found == alone
    assert len({*found}) > 1
    assert model.generation_config.min_length == 9


def test_generation_scores_of_known_pairs() -> None:
    found = generation_scores(["good", "the cat sat", ""], [" good ", "the cat sat down", "bad"])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["rouge_l"] == pytest.approx((1 + 6 / 7 + 0) / 3)  # F of precision 1 and recall 3/4
    assert generation_scores(["Хорошо, очень"], ["хорошо"])["rouge_l"] == pytest.approx(2 / 3)  # any script


# -- what is refused ----------------------------------------------------------------------------------------------


def test_misuse_is_told(models: dict[str, Path], texts: dict[str, Path], tmp_path: Path, run: Any) -> None:
    decoder, encoder_decoder = ["--model", models["causal-lm"]], ["--model", models["seq2seq"]]
    pairs, running, task = ["--data", texts["pairs"]], ["--data", texts["running"]], "--task-type"
    file = ["--data", texts["pairs"] / "train.jsonl"]
    for words, reason in [
        ([*decoder, *pairs], "give --task, or for labelled rows of your own --data, --text and --label, or for texts"),
        ([*decoder, *pairs, "--task", "sst2", task, "causal-lm"], "and only one of them"),
        ([*decoder, task, "causal-lm"], "needs texts: --data FOLDER"),
        ([*decoder, *file, task, "causal-lm"], "is a file; expected the folder"),
        ([*encoder_decoder, *running, task, "seq2seq"], "seq2seq needs the columns prompt and completion"),
        ([*decoder, *pairs, task, "causal-lm", "--text", "story"], "no column 'story'; found prompt, completion"),
        ([*decoder, *pairs, task, "causal-lm", "--text", "a,b,c"], "prompt and completion columns"),
        ([*decoder, *pairs, task, "seq2seq"], "not an encoder-decoder; for a decoder: --task-type causal-lm"),
        ([*encoder_decoder, *pairs, task, "causal-lm"], "is an encoder-decoder: --task-type seq2seq"),
        ([*decoder, *pairs, "--task", "causal-lm"], "is a type of task, not a task: --task-type causal-lm"),
        ([*decoder, *pairs, task, "causal-lm", "--max-length", 9999, "--max-target-length", 0], "max-target-length"),
        (["--model", "minilm", *pairs, "--task", "sst2", "--text", "a"], "has its own columns"),
    ]:
        code, _, err = run("record", *words, "--output", tmp_path / "out")
        assert (code, reason in err.replace("\n", " ")) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_language_model(model_folder: Path, texts: dict[str, Path], tmp_path: Path, run: Any) -> None:
    """Neither without the head of one nor with it: it sees the tokens that it is to predict."""
    words = ["record", "--task-type", "causal-lm", "--data", texts["pairs"], "--output", tmp_path / "o"]
    words += ["--max-target-length", 3, "--model"]
    code, _, err = run(*words, model_folder)
    assert code == 2
    assert "is not pre-trained for causal-lm" in err
    shutil.copytree(model_folder, tmp_path / "masked")
    BertForMaskedLM(AutoConfig.from_pretrained(model_folder)).save_pretrained(tmp_path / "masked")
    code, _, err = run(*words, tmp_path / "masked")
    assert code == 2
    assert "is not a decoder: its output at a token depends on later tokens" in err


def test_what_does_not_fit_the_model_is_told_before_training(
    models: dict[str, Path], texts: dict[str, Path], tmp_path: Path, run: Any
) -> None:
    words = ["record", "--data", texts["pairs"], "--output", tmp_path / "o"]
    decoder = ["--task-type", "causal-lm", "--model", models["gpt2"]]
    code, _, err = run(*words, *decoder, "--max-target-length", 22)
    assert (code, "with a completion of up to 22 more than the 24" in err) == (2, True), err
    code, _, err = run(*words, "--task-type", "seq2seq", "--model", models["bart"], "--max-target-length", 25)
    assert (code, "--max-target-length 24" in err) == (2, True), err

    shutil.copytree(models["gpt2"], tmp_path / "more words")
    larger = tokenizer(encoder_decoder=False)
    larger.add_special_tokens({"pad_token": "<pad>"})
    larger.save_pretrained(tmp_path / "more words")
    code, _, err = run(*words, *decoder[:3], tmp_path / "more words", "--max-target-length", 3)
    assert (code, f"made the token {len(WORDS)}, and the model knows {len(WORDS)}" in err) == (2, True), err

    shutil.copytree(models["seq2seq"], tmp_path / "no start")
    config = json.loads((tmp_path / "no start" / "config.json").read_text())
    del config["decoder_start_token_id"]
    (tmp_path / "no start" / "config.json").write_text(json.dumps(config))
    code, _, err = run(*words, "--task-type", "seq2seq", "--model", tmp_path / "no start")
    assert (code, "has no decoder_start_token_id" in err) == (2, True), err

    (tmp_path / "mixed").mkdir()
    shutil.copy(texts["running"] / "train.txt", tmp_path / "mixed")
    shutil.copy(texts["pairs"] / "validation.jsonl", tmp_path / "mixed")
    code, _, err = run("record", *decoder, "--data", tmp_path / "mixed", "--output", tmp_path / "o")
    assert (code, "train rows have text and the validation rows have prompt, completion" in err) == (2, True), err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("empty", [None, "", " \n"])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_an_empty_prompt_or_completion_is_refused(tmp_path: Path, column: str, empty: str | None) -> None:
    rows = [{"prompt": "the film", "completion": "good"}, {"prompt": "a story", "completion": "bad", column: empty}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = rf"expected text, but row 1 \(counted from 0\) has nothing in '{column}', and 0 more rows"
    with pytest.raises(InputError, match=message):
        get_task("causal-lm").read("train", tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "hub"])
def test_empty_rows_of_running_text_are_left_out(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pd.DataFrame({"text": ["", " = A film = \n", None, " \n", "A story."], "page": [1, 1, 1, 1, 2]})
    data = tmp_path
    if suffix == "hub":
        splits = datasets.DatasetDict(train=datasets.Dataset.from_pandas(rows))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
        data = Path("owner/wiki")
    elif suffix == "parquet":
        rows.to_parquet(tmp_path / "train.parquet")
    elif suffix == "csv":
        rows.to_csv(tmp_path / "train.csv", index=False)
    else:
        rows.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    with pytest.warns(UserWarning, match="3 of 5 have no text and are left out") as warned:
        loaded = get_task("causal-lm").read("train", data)
    assert len(warned) == 1
    assert loaded.to_dict("list") == {"text": [" = A film = \n", "A story."]}
    assert loaded.index.tolist() == [0, 1]


def test_running_text_without_any_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n\n")
    with (
        pytest.warns(UserWarning, match="1 of 1 have no text"),
        pytest.raises(InputError, match=r"train rows of .*: there are none"),
    ):
        get_task("causal-lm").read("train", tmp_path)


def test_what_is_no_text_is_not_left_out(tmp_path: Path) -> None:
    pd.DataFrame({"text": [["a", "list"], ["another"]]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"expected text, but row 0 \(counted from 0\) has array"):
        get_task("causal-lm").read("train", tmp_path)


def test_text_under_another_key_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a film"}\n\n{"content": "a story"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl, line 3: no 'text', which other rows have; found content"):
        get_task("causal-lm").read("train", tmp_path)


def test_data_sets_on_the_hub(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stand_in(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration))
        rows = datasets.Dataset.from_pandas(reviews(8, 1))
        return datasets.DatasetDict(train=rows, validation=rows)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    found: Prepared = prepare(str(models["causal-lm"]), "causal-lm", data=Path("owner/reviews:short"))
    assert asked == [("owner/reviews", "short")] * 2
    assert len(found.completions) == 8


def test_the_hub_that_cannot_be_reached(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="owner/nothing is neither a file nor a folder, and could not be loaded"):
        prepare(str(models["causal-lm"]), "causal-lm", data=Path("owner/nothing"))


# -- labelled tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "named"), [("gpt2", True), ("gpt2", False), ("bart", True)])
def test_decoders_classify_too(
    kind: str, named: bool, data_folder: Path, run: Any, tmp_path: Path, models: dict[str, Path]
) -> None:
    """A decoder's tokenizer, and often its config, has no padding token; BART returns its states beside the logits."""
    folder = tmp_path / "model"
    shutil.copytree(models[kind], folder)
    config = json.loads((folder / "config.json").read_text())
    if not named:
        del config["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    common = ["--model", folder, "--task", "sst2", "--data", data_folder, "--epochs", 1, "--precision", "float32"]
    code, _, err = run("record", *common, "--output", tmp_path / "full")
    assert code == 0, err
    code, _, err = run("tune", *common, "--basis", "random", "--rank", 2, "--output", tmp_path / "adapter")
    assert code == 0, err
    code, out, err = run("evaluate", *common[:6], "--adapter", tmp_path / "adapter")
    assert code == 0, err
    score = json.loads((tmp_path / "adapter/result.json").read_text())["score"]
    assert f"accuracy {score:.4f}" in out


def test_rows_without_a_token_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    rows = pd.DataFrame({"sentence": ["good", "", "bad", "good"], "label": [1, 0, 0, 1]})
    for split in ("train", "validation"):
        rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
    with pytest.raises(InputError, match="a validation row has no token"):
        prepare(str(models["gpt2"]), "sst2", data=tmp_path)


def test_a_byte_order_mark_is_no_word(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("good film", encoding="utf-8-sig")
    assert get_task("causal-lm").read("train", tmp_path)["text"].tolist() == ["good film"]

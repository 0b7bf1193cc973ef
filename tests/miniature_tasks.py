"""A pre-trained model and a task small enough for seconds: two layers of width 16, a made-up language of 20 words."""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
from transformers.utils import logging

from tinyspan import cli
from tinyspan.workflows.rows import Prepared, prepare

logging.set_verbosity_error()
logging.disable_progress_bar()

GOOD, BAD = ["fine", "lovely", "great", "moving"], ["dull", "awful", "flat", "stale"]
FILLER = ["the", "film", "is", "a", "story", "of", "love", "and", "war", "again", "but", "so"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


def sentences(rows: int, seed: int) -> pd.DataFrame:
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    labels = [index % 2 for index in range(rows)]
    texts = [
        " ".join([pick(FILLER), pick(FILLER), pick(GOOD if label else BAD), *([pick(FILLER)] * (index % 3))])
        for index, label in enumerate(labels)
    ]
    return pd.DataFrame({"sentence": texts, "label": labels})


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sentences(64, 1).to_parquet(folder / "train.parquet")
    sentences(32, 2).to_csv(folder / "validation.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def prepared(model_folder: Path, data_folder: Path) -> Prepared:
    return prepare(str(model_folder), "sst2", data=data_folder)


@pytest.fixture
def similarity(model_folder: Path, tmp_path: Path) -> Prepared:
    """A regression of sixteen rows with two labels."""
    rows = pd.DataFrame(
        {"sentence1": ["fine film", "dull film"] * 8, "sentence2": ["a story"] * 16, "label": [4.5, 0.25] * 8}
    )
    for split in ("train", "validation"):
        rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
    return prepare(str(model_folder), "stsb", data=tmp_path)


def pairs(rows: int, seed: int) -> pd.DataFrame:
    """Two sentences; label 1 if both are of one mood."""
    first, second = sentences(rows, seed), sentences(rows, seed + 100).sample(frac=1, random_state=seed)
    labels = (first["label"].to_numpy() == second["label"].to_numpy()).astype(int)
    return pd.DataFrame(
        {"sentence1": first["sentence"].to_list(), "sentence2": second["sentence"].to_list(), "label": labels}
    )


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per task, as GLUE on disk: sst2, mrpc and stsb of the made-up language."""
    folder = tmp_path_factory.mktemp("glue")
    for task, make in (("sst2", sentences), ("mrpc", pairs), ("stsb", pairs)):
        (folder / task).mkdir()
        for split, rows, seed in (("train", 64, 1), ("validation", 32, 2)):
            found = make(rows, seed)
            if task == "stsb":
                found["label"] = found["label"] * 5.0
            found.to_parquet(folder / task / f"{split}.parquet")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command line in this process: `code, out, err = run("inspect", folder)`."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinyspan", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (0 if code is None else int(code)), out, err

    return call


@pytest.fixture
def quick(model_folder: Path, data_folder: Path) -> list[object]:
    rates = ["--learning-rate", 3e-3, "--batch-size", 16, "--precision", "float32"]
    return ["--model", model_folder, "--task", "sst2", "--data", data_folder, "--epochs", 2, *rates]

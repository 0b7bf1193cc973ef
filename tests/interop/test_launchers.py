"""The Trainer under `accelerate launch` and `torchrun`, in two processes that talk through gloo."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import ROWS, Classifier, arguments
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.distributed import DistributedConfig

from tinyspan import SubspaceModel, Trajectory, TrajectoryRecorder, by_layer, empty_basis, random_basis, svd_basis
from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.interop.trainer import SubspaceTrainer

pytestmark = pytest.mark.processes

CUTS = hasattr(DistributedConfig, "fsdp_size")  # whether transformers cuts a model while it loads it
TOKENS = [torch.tensor([(i * j) % 31 + 1 for j in range(1, 9)]) for i in range(16)]
SENTENCES = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]


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


def record(model: nn.Module, folder: Path) -> None:
    """In a loop of one's own, all rows at once."""
    recorder, optimizer = (
        TrajectoryRecorder(model, by_layer(model), folder),
        torch.optim.SGD(model.parameters(), lr=1.0),
    )
    for step in range(4):
        batch = {name: torch.stack([row[name] for row in ROWS[step:]]) for name in ("tokens", "labels")}
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.record(step)


def over_shards(folder: Path, accumulate: int, size: int) -> None:
    """Record, discover and tune inside the Trainer what is cut over the processes, if there are several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "max_grad_norm": 0.3,
    }

    def llama() -> Any:
        """Cut by transformers while it is loaded."""
        cut = {"distributed_config": DistributedConfig(fsdp_size=world)} if world > 1 else {}
        return LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, **cut)

    def classifier() -> nn.Module:
        """Its layers cut by hand, and the directly trained parameters whole in each process."""
        model = Classifier()
        for layer in model.layers if world > 1 else ():
            fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        return model

    callback = TrajectoryCallback(folder / f"llama-walk-{world}", 1)
    Trainer(llama(), arguments(folder / "plain", **settings), train_dataset=SENTENCES, callbacks=[callback]).train()
    by_hand = folder / f"classifier-walk-{world}-{rank}"
    record(classifier(), by_hand)
    discover = partial(
        svd_basis, rank=3, dtype=torch.float64, group=torch.distributed.group.WORLD if world > 1 else None
    )
    models = {
        "llama": (llama, discover(callback.trajectory()), SENTENCES, ["lm_head"]),
        "classifier": (classifier, discover(Trajectory(by_hand)), ROWS, ["head", "embedding"]),
        "frozen": (llama, empty_basis(by_layer(llama())), SENTENCES, ["lm_head"]),
    }
    results: dict[str, Any] = {}
    for kind, (build, basis, rows, ordinary) in models.items():
        subspace = SubspaceModel(build(), basis, modules_to_save=ordinary)
        output = folder / f"{kind}-{world}"
        saved = {"save_strategy": "epoch", "save_only_model": True, "eval_strategy": "epoch"}
        run = SubspaceTrainer(
            subspace,
            arguments(output, **settings, **saved),
            train_dataset=rows,
            eval_dataset=rows[:8],
            z_learning_rate=0.1,
        )
        run.evaluate()  # leaves whole copies of some weights
        run.train()
        run.save_model()
        keys = ("loss", "grad_norm", "eval_loss")
        logs = [{key: entry[key] for key in keys if key in entry} for entry in run.state.log_history]
        results[kind] = logs, list(basis.spectrum.values()), [z.detach() for z in subspace.z]
        if world > 1:
            last = output / f"checkpoint-{run.state.global_step}/shard-{rank}"
            for saved_to in (last, output / f"shard-{rank}"):
                again = SubspaceModel.from_pretrained(build(), saved_to, basis)
                evaluated = SubspaceTrainer(again, run.args, eval_dataset=rows[:8]).evaluate()
                assert evaluated["eval_loss"] == logs[-2]["eval_loss"]  # the last entry sums up
            assert (output / "training_args.bin").is_file()
    torch.save(results, folder / f"shards-{world}-{rank}.pt")


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}


def launch(launcher: str, works: Sequence[Callable[..., None]], folder: Path, accumulate: int) -> None:
    """Let two processes do it, each work in a folder of its name."""
    names = ",".join(work.__name__ for work in works)
    command = [sys.executable, "-m", *LAUNCHERS[launcher], __file__, names, str(folder), str(accumulate)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


Launched = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Do all works in one launch: most of it is imports."""

    @cache
    def call(launcher: str, accumulate: int) -> Path:
        folder = tmp_path_factory.mktemp(launcher)
        (folder / "trainer").mkdir()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
            config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
            LlamaForCausalLM(config).double().save_pretrained(folder / "over_shards/model")
        launch(launcher, [trainer, over_shards] if CUTS else [trainer], folder, accumulate)
        return folder

    return call


@pytest.mark.parametrize(
    ("launcher", "accumulate"), [("accelerate", 2), pytest.param("torchrun", 1, marks=pytest.mark.slow)]
)
def test_the_trainer_in_two_processes_is_the_trainer_in_one(launched: Launched, launcher: str, accumulate: int) -> None:
    folder = launched(launcher, accumulate) / "trainer"
    (folder / "one").mkdir()
    trainer(folder / "one", accumulate, size=8 // accumulate)
    expected, logs, _ = torch.load(folder / "one/0.pt")
    for rank in range(2):
        z, theirs, wrapper = torch.load(folder / f"{rank}.pt")
        assert wrapper == "DistributedDataParallel"
        for a, b in zip(z, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        for found, entry in zip(theirs, logs, strict=True):
            assert found == pytest.approx(entry, abs=2e-6)
    one, two = Trajectory(folder / "one/trajectory"), Trajectory(folder / "trajectory")
    assert one.steps == two.steps == list(range(len(two))) != []
    for block in one.partition:
        assert one.delta(block).abs().max() > 1e-3
        torch.testing.assert_close(one.delta(block), two.delta(block), rtol=0, atol=1e-6)


@pytest.mark.skipif(not CUTS, reason="this transformers does not cut while it loads")
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_trainer_over_shards_is_the_trainer_in_one(launched: Launched, accumulate: int) -> None:
    folder = launched("accelerate", accumulate) / "over_shards"
    over_shards(folder, accumulate, size=8 // accumulate)
    expected = torch.load(folder / "shards-1-0.pt")
    for rank in range(2):
        for kind, (logs, spectra, z) in torch.load(folder / f"shards-2-{rank}.pt").items():
            for found, entry in zip(logs, expected[kind][0], strict=True):
                assert found == pytest.approx(entry, abs=1e-6)  # the Trainer adds its losses up in float32
            for a, b in zip((*spectra, *z), (*expected[kind][1], *expected[kind][2]), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


if __name__ == "__main__":  # one of the processes that a launcher starts
    for work in (trainer, over_shards):
        if work.__name__ in sys.argv[1].split(","):
            work(Path(sys.argv[2], work.__name__), int(sys.argv[3]), size=4 // int(sys.argv[3]))
    torch.distributed.barrier()
    os._exit(0)  # threads of torch that outlive the interpreter now and then abort the process

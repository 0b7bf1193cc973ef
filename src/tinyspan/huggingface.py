"""Record and tune inside the Hugging Face Trainer: `TrajectoryCallback` and `SubspaceTrainer`."""

from tinyspan.interop.trainer import SubspaceTrainer, TrajectoryCallback

__all__ = ["SubspaceTrainer", "TrajectoryCallback"]

"""Record and tune inside the Hugging Face Trainer: `TrajectoryCallback` and `SubspaceTrainer`."""

from tinyspan.interop.callback import TrajectoryCallback
from tinyspan.interop.trainer import SubspaceTrainer

__all__ = ["SubspaceTrainer", "TrajectoryCallback"]

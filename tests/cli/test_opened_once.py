"""How often commands load a model, hash its weights, and read manifests and files."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tinyspan import Partition
from tinyspan.io import manifests
from tinyspan.workflows import models


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Numbers of calls by function, wherever the function was imported to."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*args, **options)

        for other in (owner, *(module for key, module in sys.modules.items() if key.startswith("tinyspan"))):
            if getattr(other, name, None) is original:
                monkeypatch.setattr(other, name, call)

    for owner, name in (
        (models, "load_model"),
        (Partition, "fingerprint"),
        (manifests, "read_manifest"),
        (manifests, "check_file"),
    ):
        counted(owner, name)
    return counts


def test_a_model_is_loaded_once_and_an_adapter_opened_once_and_its_model_hashed_once(
    run: Any, quick: list[object], calls: Counter[str], tmp_path: Path
) -> None:
    """There are two manifests, of the adapter and of its basis."""
    basis, adapter = tmp_path / "basis", tmp_path / "adapter"
    assert run("record", *quick, "--every", 2, "--output", tmp_path / "full")[0] == 0
    assert run("discover", tmp_path / "full", "--rank", 2, "--output", basis)[0] == 0
    calls.clear()
    assert run("tune", *quick, "--basis", basis, "--output", adapter)[0] == 0
    assert calls["load_model"] == 1
    files = 2 + 2 * 2  # adapter and result; per block one without, and one with the hash of its content
    for words in (
        ["evaluate", *quick[:6], "--adapter", adapter],
        ["export", *quick[:4], "--adapter", adapter, "--to", "delta", "--output", tmp_path / "delta"],
    ):
        calls.clear()
        code, _, err = run(*words)
        assert code == 0, err
        assert calls == {"load_model": 1, "fingerprint": 1, "read_manifest": 2, "check_file": files}

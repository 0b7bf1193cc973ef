"""Properties and state of the machine: memory, number formats, random generators."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["default_device", "has_bfloat16", "hardware", "peak_memory", "reset_peak_memory", "seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Return a context with torch's global generator seeded; its state is restored afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def default_device() -> torch.device:
    """Return the accelerator that the Trainer uses, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16() -> bool:
    """Whether the accelerator, or the CPU if there is none, multiplies bfloat16 natively."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def hardware() -> dict[str, Any]:
    """Return the description of the machine under the keys of `result.json`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}


def reset_peak_memory() -> None:
    """Reset the peak memory, where the system supports this (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak memory in bytes since `reset_peak_memory`: of the accelerator, if any, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

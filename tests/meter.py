"""What this process has and does, measured along a long run: memory, files, threads, objects, bytes, time."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean, median

LARGE = {"Basis", "SubspaceModel", "Trainer", "Trajectory", "TrajectoryRecorder"}  # classes that must not pile up
OBJECTS = 4  # of them at once
TENTHS = 10


@dataclass
class Tenth:
    """The state at the end of a tenth of the run, and what a unit of it cost in the middle."""

    megabytes: float
    files: int
    maps: int
    threads: int
    objects: int
    milliseconds: float
    read: float
    written: float


class Meter:
    """Measures every tenth of a run: `for unit in meter.each(1000): ...`, then `meter.check(...)`."""

    def __init__(self, name: str) -> None:
        self.name, self.tenths = name, list[Tenth]()

    def each(self, units: int) -> Iterator[int]:
        """Yield the numbers of the units."""
        length, began = units // TENTHS, time.perf_counter()
        for tenth in range(TENTHS):
            before, seconds = transferred(), list[float]()
            for unit in range(tenth * length, (tenth + 1) * length):
                start = time.process_time()  # of the processor, which other processes do not lengthen
                yield unit
                seconds.append(time.process_time() - start)
            after = transferred()
            read, written = ((b - a) / length for a, b in zip(before, after, strict=True))
            self.tenths.append(Tenth(*_state(), 1000 * median(seconds), read, written))
        self._tell(units, time.perf_counter() - began)

    def _tell(self, units: int, seconds: float) -> None:
        print(f"\n{self.name}: {units} units, {seconds:.0f} s")
        print("     MB  files   maps threads objects  ms/unit  bytes read  bytes written per unit")
        for tenth in self.tenths:
            print("{:7.1f} {:6} {:6} {:7} {:7} {:8.2f} {:11.0f} {:14.0f}".format(*astuple(tenth)))

    def check(self, megabytes: float, bytes_by: float = 1.01) -> None:
        """Compare the last third of the run with the second: nothing that the process has grows, no unit costs more.

        Args:
            megabytes: by how much the resident memory may grow.
            bytes_by: the factor by which the bytes read and written per unit may.
        """
        second, last = self.tenths[3:6], self.tenths[7:]
        grown = mean(tenth.megabytes for tenth in last) - mean(tenth.megabytes for tenth in second)
        assert grown <= megabytes, f"{self.name}: {grown:.1f} MB more in the last third than in the second"
        for what, spare in {"files": 0, "maps": 32, "threads": 0}.items():  # the allocator maps, too
            early, late = ([getattr(tenth, what) for tenth in third] for third in (second, last))
            assert max(late) <= min(early) + spare, f"{self.name}: {what} {early}, later {late}"
        alive = max(tenth.objects for tenth in self.tenths)
        assert alive <= OBJECTS, f"{self.name}: {alive} large objects at once"
        for what in ("read", "written"):
            early, late = (mean(getattr(tenth, what) for tenth in third) for third in (second, last))
            assert late <= bytes_by * early, f"{self.name}: bytes {what} per unit {early:.0f}, later {late:.0f}"
        ratio = self.tenths[-1].milliseconds / self.tenths[1].milliseconds
        print(f"grown by {grown:.2f} MB; time per unit, last tenth to second: {ratio:.2f}")
        assert ratio < 5  # what grows with the number of units before it would be far above


def transferred() -> tuple[int, int]:
    """Return the bytes that this process has asked the system to read and to write."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]), int(counts["wchar"])


def _state() -> tuple[float, int, int, int, int]:
    objects = sum(type(thing).__name__ in LARGE for thing in gc.get_objects())  # those the collector has to free, too
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what is free goes back to the system, or it would seem in use
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    megabytes = (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 1e6  # without pages of files, which come and go
    files, maps = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("\n")
    return megabytes, files, maps, threading.active_count(), objects

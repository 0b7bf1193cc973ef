"""Which small faults in the code do the tests not notice? Runs mutmut on each room with the tests of that room.

    python tools/mutants.py                         # everything in TESTS; also: make mutants
    python tools/mutants.py maps partition          # make mutants ONLY="maps partition"
    python tools/mutants.py maps/dense.py           # one file of a room, with the tests of the room
    python tools/mutants.py partition --again       # after adding tests: only what survived before
    python tools/mutants.py model --sample 60       # make mutants ONLY=model SAMPLE=60: so many of the room, at random

mutmut writes a copy of the code with all mutants, runs the tests of the room once to learn which of them call which
function, and forks a process per mutant, which runs only these. A room that is interrupted goes on at the next call;
changed functions are tested again. Each room has a folder under build/mutants, which can be deleted.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

from mutmut import configuration
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # path in src/tinyspan: the tests that mirror it, and a few that call it directly
    "partition.py": ["test_partition.py", "test_partition_contract.py"],
    "partitioning.py": ["test_partition.py", "test_partition_contract.py"],
    "linalg.py": ["test_linalg.py"],
    "sharding.py": ["test_sharding.py"],
    "weights.py": ["test_weights.py"],
    "maps": ["maps"],
    "io": ["io"],
    "trajectories": ["trajectories"],
    "bases": ["bases"],
    "model": ["model"],
    "analysis": ["test_analysis.py"],
    "workflows/tasks": ["workflows/test_task_contract.py", "workflows/test_tasks.py", "workflows/test_intervals.py"],
    "workflows/training.py": ["workflows/test_training.py", "workflows/test_early_stopping.py"],
    "lab/cells.py": ["lab/test_study.py"],
}
UNTESTED = "not checked"
UNDETECTED = ("survived", "no tests", "timeout")  # a time-out may be an endless loop, or only a busy machine
SETTINGS = """\
[mutmut]
source_paths = src
only_mutate = {pattern}
pytest_add_cli_args_test_selection =
    -m
    not (slow or scripts or processes or hostile)
    {tests}
pytest_add_cli_args =
    --override-ini=addopts=
    -pno:xdist
    -pno:cacheprovider
    --hypothesis-profile=mutants
process_isolation = forkserver
timeout_constant = 5
"""  # no addopts: no doctests, which mutmut copies to every mutant. fork hangs: tests leave threads of torch behind


def main() -> None:
    """Run mutmut on every path, and print what survived and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=list(TESTS), help="rooms or files in src/tinyspan")
    parser.add_argument("--again", action="store_true", help="only what survived, for instance after adding tests")
    parser.add_argument("--sample", type=int, metavar="N", help="test N mutants of each path, drawn with seed 0")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for path in arguments.paths:
        prepare(path)
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(arguments.processes)]
        if arguments.sample:
            done = subprocess.run([*command, "none"], capture_output=True, text=True)  # writes the mutants, tests none
            if "nothing matches" not in done.stderr:
                sys.exit(f"mutmut could not write the mutants of {path}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        else:
            subprocess.run(command, check=True)
        statuses = {name: status for _, name, status in results()}
        drawn = random.Random(0).sample(sorted(statuses), min(arguments.sample or len(statuses), len(statuses)))
        wanted = (UNTESTED, *UNDETECTED) if arguments.again else (UNTESTED,)
        if names := [name for name in drawn if statuses[name] in wanted]:
            subprocess.run([*command, *names], check=True)
        rows += summary()
    print(f"{'file':40}{'mutants':>9}{'killed':>9}{'timeout':>9}{'survived':>10}{'no tests':>10}{'rate':>8}")
    for name, found in rows:
        killed, timeout, survived, missed = (found.count(s) for s in ("killed", "timeout", "survived", "no tests"))
        rate = f"{100 * (killed + timeout) / len(found):.1f} %"
        print(f"{name:40}{len(found):9}{killed:9}{timeout:9}{survived:10}{missed:10}{rate:>8}")


def prepare(path: str) -> None:
    """Enter the folder of a path in src/tinyspan, with links to the sources and the settings of mutmut."""
    path = path if (ROOT / "src/tinyspan" / path).exists() else f"{path}.py"
    room = next((room for room in TESTS if path == room or path.startswith(f"{room}/")), None)
    if room is None or not (ROOT / "src/tinyspan" / path).exists():
        sys.exit(f"no tests are listed for {path}; the rooms are {', '.join(TESTS)}")
    folder = ROOT / "build/mutants" / path.removesuffix(".py").replace("/", ".")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("src", "tests", "pyproject.toml"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    tests = "\n    ".join(f"tests/{name}" for name in TESTS[room])
    pattern = f"src/tinyspan/{path}" if path.endswith(".py") else f"src/tinyspan/{path}/*"
    (folder / "setup.cfg").write_text(SETTINGS.format(pattern=pattern, tests=tests))
    os.chdir(folder)
    configuration.reset_config()


def results() -> list[tuple[Path, str, str]]:
    """Return file, name and status of every mutant in this folder."""
    found = []
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        found += [(path, name, status_by_exit_code[code]) for name, code in data.exit_code_by_key.items()]
    return found


def summary() -> list[tuple[str, list[str]]]:
    """Print what survived as differences; return the statuses of the tested mutants of each file."""
    statuses: dict[str, list[str]] = {}
    for path, name, status in results():
        if status == UNTESTED:
            continue
        statuses.setdefault(str(path.relative_to("src/tinyspan")), []).append(status)
        if status != "killed":
            print(f"{name}: {status}\n{get_diff_for_mutant(name, path=path)}\n")
    return list(statuses.items())


if __name__ == "__main__":
    main()

"""No command asks the network for anything while model and data lie on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SENTINEL = """
import os, sys

def refuse(event, arguments):
    to_a_file = event == "socket.connect" and isinstance(arguments[1], (str, bytes))  # between processes of one machine
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") and not to_a_file:
        with open(os.environ["ATTEMPTS"], "a") as file:
            print(event, arguments, file=file)
        raise OSError("there is no network")

sys.addaudithook(refuse)
"""

COMMANDS = """
import sys
import tinyspan
heavy = {"accelerate", "datasets", "huggingface_hub", "matplotlib", "pandas", "sklearn", "transformers", "typer"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import json, pathlib, socket
from tinyspan.cli import main

model, data, glue, suite = sys.argv[1:]
task = ["--model", model, "--task", "sst2", "--data", data]
train = [*task, "--epochs", "1", "--precision", "float32"]
for words in (
    ["record", *train, "--every", "1", "--output", "full"],
    ["discover", "full", "--rank", "1", "--output", "basis"],
    ["tune", *train, "--basis", "basis", "--output", "adapter"],
    ["evaluate", *task, "--adapter", "adapter", "--output", "scored"],
    ["evaluate", "--model", "full/model", *task[2:]],
    ["inspect", "adapter"],
    ["suites"],
    ["reproduce", "table1", "--suite", suite, "--data", glue, "--output", "study"],
    ["render", "study"],
):
    sys.argv = ["tinyspan", *words]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, (words, stopped.code)
assert not pathlib.Path("attempts").exists(), pathlib.Path("attempts").read_text()
try:
    socket.create_connection(("example.org", 80))
except OSError:
    print("refused")
"""

SUITE = """
models: {{tiny: {model}}}
tasks: [sst2]
seeds: 1
epochs: 1
points: 2
rank: 1
dimensions: [1]
precision: float32
"""


@pytest.mark.slow  # about ten seconds, most of them imports
def test_no_command_needs_the_network(model_folder: Path, data_folder: Path, glue_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SENTINEL)
    (tmp_path / "suite.yaml").write_text(SUITE.format(model=model_folder))
    online = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, model_folder, data_folder, glue_folder, "suite.yaml"],
        cwd=tmp_path,
        env={**online, "PYTHONPATH": path, "ATTEMPTS": "attempts", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["refused"]), done.stdout + done.stderr
    assert (tmp_path / "attempts").read_text() == "socket.getaddrinfo ('example.org', 80, 0, 1, 0)\n"

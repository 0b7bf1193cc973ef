"""Odd places on the command line, and two commands that want one folder."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from disks import mount, small_disk

pytestmark = pytest.mark.studies

SUITE = "{models: {}, tasks: [sst2], epochs: 1, batch_size: 8, points: 4, rank: 3, seeds: 1, dimensions: [2, 3]}"
PLACE = (
    r"is a file|is a link that leads to no folder|File name too long|no permission to write in|is no text|"
    r"Too many levels|holds something else \(no tinyspan|is read and lies in the output"
)
HELD = (
    r"{folder} is being written by process {pid} on \S+ since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \(.*{word}.*\); "
    r"wait for it, stop it, or choose another folder"
)
STOPS_ONCE_IT_HOLDS = """
import os, signal, sys
from pathlib import Path
from tinyspan.io import folders
lock, place, stopped = folders._lock, Path(sys.argv.pop(1)), []
def held(folder):
    got = lock(folder)
    if folder == place and not stopped:
        stopped.append(folder)
        os.kill(os.getpid(), signal.SIGSTOP)
    return got
folders._lock = held
"""
COMMAND = f"{STOPS_ONCE_IT_HOLDS}\nsys.argv[0] = 'tinyspan'\nfrom tinyspan.cli import main\nmain()"
DEMO = f"""{STOPS_ONCE_IT_HOLDS}
from tinyspan.lab.demo import Plan, run_demo
from tinyspan.workflows.progress import Display
model, data = sys.argv[1:]
plan = Plan(model, "sst2", Path(data), train_rows=64, rank=3, batch_size=16, learning_rate=3e-3)
try:
    with Display() as display:
        run_demo(place, display, plan=plan)
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


def stopped_while_it_holds(code: str, folder: Path, *words: object) -> "subprocess.Popen[str]":
    """Start a process that stops itself when it has got hold of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()
    return process


def finish(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


@pytest.fixture
def writing_commands(run: Any, quick: list[object], tmp_path: Path) -> dict[str, list[object]]:
    """Commands that write into a folder, without that folder."""
    full = tmp_path / "made/full"
    assert run("record", *quick, "--every", 4, "--output", full)[0] == 0
    return {
        "discover": ["discover", full, "--rank", 2, "--output"],
        "record": ["record", *quick, "--output"],
        "tune": ["tune", *quick, "--basis", "none", "--output"],
        "evaluate": ["evaluate", "--model", full / "model", *quick[2:6], "--output"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", ["discover", "record", "tune", "evaluate"])
def test_the_second_of_two_commands_is_refused(
    run: Any, writing_commands: dict[str, list[object]], tmp_path: Path, command: str
) -> None:
    words, folder = writing_commands[command], tmp_path / "out put"
    first = stopped_while_it_holds(COMMAND, folder, *words, folder)
    told = HELD.format(folder=folder, pid=first.pid, word=f"tinyspan {command}")
    for more in ([], ["--overwrite"]):
        code, out, err = run(*words, folder, *more)
        assert (code, out) == (1, ""), err
        assert re.search(f"^tinyspan: {told}$", err, re.MULTILINE), err
        assert "held-out score" not in err  # refused before it trained
    finish(first)
    assert (folder / "manifest.json").is_file() or (folder / "result.json").is_file()
    assert not (folder / ".holder").exists()
    if command != "evaluate":
        assert run("inspect", "--verify", folder)[0] == 0
    assert run(*words, folder)[0] == 2  # an earlier output


@pytest.mark.slow
def test_the_second_of_two_demos_is_refused(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first = stopped_while_it_holds(DEMO, folder, model_folder, data_folder)
    second = subprocess.run(
        [sys.executable, "-c", DEMO, str(folder), str(model_folder), str(data_folder)], capture_output=True, text=True
    )
    told = HELD.format(folder=folder, pid=first.pid, word="")
    assert re.fullmatch(f"Busy: {told}", second.stderr.strip()), second.stderr
    finish(first)
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_killed_command_holds_nothing(run: Any, writing_commands: dict[str, list[object]], tmp_path: Path) -> None:
    first = stopped_while_it_holds(COMMAND, tmp_path / "out", *writing_commands["discover"], tmp_path / "out")
    first.kill()
    first.communicate()
    assert (tmp_path / "out/.holder").exists()
    assert run(*writing_commands["discover"], tmp_path / "out")[0] == 0
    assert not (tmp_path / "out/.holder").exists()


@pytest.mark.parametrize("command", ["discover", "record", "tune", "evaluate"])
def test_places_that_cannot_be_written(
    run: Any, writing_commands: dict[str, list[object]], tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "file/below", "dangling", "loop", "loop/below", "x" * 256, "other", "no\udcfftext", "made"):
        code, out, err = run(*writing_commands[command], tmp_path / name)
        assert (code, out) == (2, ""), err
        assert re.fullmatch(rf"tinyspan: .*({PLACE}).*\n", err), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["two words", "naïve 文字", "-o", "100%d", "*[a]?", "line\nbreak", "~", ".", "sub/../x"]
)
def test_odd_names(
    run: Any, writing_commands: dict[str, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = run(*writing_commands["discover"], name)
    assert code == 0, err
    assert name in out
    assert run("inspect", "--verify", "--", name)[0] == 0
    assert run(*writing_commands["discover"], name)[0] == 2
    assert run(*writing_commands["discover"], name, "--overwrite")[0] == 0


def test_a_terminal_without_the_letters_of_a_name(writing_commands: dict[str, list[object]], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from tinyspan.cli import main; main()", *map(str, writing_commands["discover"])]
    done = subprocess.run(
        [*command, tmp_path / "文字"], capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u6587\\u5b57" in done.stdout


@pytest.mark.slow
def test_record_and_tune_at_an_odd_place(
    run: Any, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two\nlines, 文字 [*] 'q' 100%").mkdir()
    monkeypatch.chdir(tmp_path / "two\nlines, 文字 [*] 'q' 100%")
    assert run("record", *quick, "-o", "-full")[0] == 0
    assert run("discover", "-k", 2, "-o", "./basis #1/", "--", "-full")[0] == 0
    assert run("tune", *quick, "--basis", "basis #1", "-o", "sub/../*")[0] == 0
    where = ["--task", "sst2", "--data", quick[5]]
    assert run("evaluate", "--model", quick[1], *where, "--adapter", "*", "-o", "{scored}")[0] == 0
    assert run("evaluate", "--model", "./-full/model", *where)[0] == 0


def test_a_study_where_it_cannot_be_written(run: Any, glue_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    suite = tmp_path / "a suite.yaml"
    suite.write_text(SUITE)
    words = [
        "reproduce",
        "table5",
        "--suite",
        suite,
        "--models",
        f"tiny={model_folder}",
        "--data",
        glue_folder,
        "--output",
    ]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with small_disk(tmp_path / "disk", 9) as disk:
        assert mount("-t", "tmpfs", "-o", "remount,ro", "tmpfs", disk) is None
        for name in ("file", "file/below", "loop", "x" * 256, "disk", "disk/new"):
            code, out, err = run(*words, tmp_path / name)
            assert (code, out) == (2, ""), err
            assert re.fullmatch(rf"tinyspan: .*({PLACE}).*\n", err), err


@pytest.mark.slow
def test_a_study_with_odd_names(
    run: Any, glue_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", "table5", "--suite", "suite.yaml", "--data", glue_folder, "--output", "a [study] 100% 文字"]
    for workers in (1, 2):
        code, _, err = run(*words, "--models", f"my model (v2) 100%={model_folder}", "--workers", workers)
        assert code == 0, err
    page = (tmp_path / "a [study] 100% 文字/README.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^ ()]*)\)", page)
    assert len(links) == page.count("![") > 0
    for name in ("a\nb", "no\udcfftext"):
        code, _, err = run(*words, "--models", f"{name}={model_folder}")
        assert (code, bool(re.search("cannot name a folder|in one line", err))) == (2, True), err

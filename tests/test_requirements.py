"""The hashed requirements are the tested set."""

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Return the lines of a requirements file: package -> requirement and hashes."""
    lines = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    parts = [line.split(" --hash=") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    found = [(Requirement(first.strip()), [digest.strip() for digest in digests]) for first, *digests in parts]
    return {canonicalize_name(requirement.name): (requirement, digests) for requirement, digests in found}


def test_the_hashed_requirements_are_the_tested_set() -> None:
    tested, hashed = pinned("constraints.txt"), pinned("requirements-hashed.txt")
    assert len(tested) > 60
    assert {name: str(hashed[name][0].specifier) for name in tested} == {
        name: str(requirement.specifier) for name, (requirement, _) in tested.items()
    }
    demo = re.findall(r'"([\w.-]+)(==[\w.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(demo) == 2
    for name, version in demo:
        assert str(hashed[canonicalize_name(name)][0].specifier) == version
    known = {*tested, *(canonicalize_name(name) for name, _ in demo), "setuptools"}
    for name in hashed.keys() - known:  # what torch and others need on one platform, or under one Python, alone
        assert re.search("(sys_platform|python_full_version) ==", str(hashed[name][0].marker)), name


def test_every_requirement_is_one_version_with_its_hashes() -> None:
    for name, (requirement, digests) in pinned("requirements-hashed.txt").items():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), name
        assert digests, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests), name


def test_the_command_that_made_them_is_told() -> None:
    text = (ROOT / "requirements-hashed.txt").read_text(encoding="utf-8")
    command = re.search(r"^#    (uv pip compile .*)$", text, flags=re.MULTILINE)
    assert command is not None
    assert f"    {command[1]}\n" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

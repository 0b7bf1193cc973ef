"""The documentation site: what its build refuses, and that it leaves no module out. `make docs` builds all of it."""

import re
import shutil
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("page", "code", "told"),
    [
        ("```python\nn = 2\n```\n\n```python\nprint(n * 21)\n```", 0, ""),
        ("```python\n# on the hub\nabsent()\n```", 0, ""),
        ("```python\nn = 2\n```\n\n```python\nassert n == 3\n```", 1, "an example fails"),
        ("[nowhere](absent.md)", 1, "not found"),
    ],
)
def test_an_example_that_fails_ends_the_build(
    page: str, code: int, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build = pytest.importorskip("sphinx.cmd.build", reason="the extra `docs` is not installed")
    pytest.importorskip("furo", reason="the extra `docs` is not installed")
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "conf.py", tmp_path / "docs")
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n{page}\n")
    assert build.main(["-q", "-W", "--keep-going", str(tmp_path / "docs"), str(tmp_path / "site")]) == code
    assert told in capfd.readouterr().err
    if "21" in page:
        assert "42" in re.sub("<.*?>", "", (tmp_path / "site/index.html").read_text())


def test_every_module_has_a_page() -> None:
    listed = set(re.findall(r"^   (tinyspan[\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.M))
    modules = {f"tinyspan.{path.stem}" for path in (DOCS.parent / "src/tinyspan").glob("*.py")}
    assert modules - {"tinyspan.__init__", "tinyspan.__main__", "tinyspan.cli"} <= listed

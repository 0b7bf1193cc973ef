"""The documentation site: what its build refuses, and that it leaves no module out. `make docs` builds all of it."""

import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.scripts

DOCS = Path(__file__).parents[1] / "docs"


def build(pages: dict[str, str], folder: Path) -> int:
    """Build a site of some pages with the configuration of ours, and return the exit code."""
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="the extra `docs` is not installed")
    pytest.importorskip("furo", reason="the extra `docs` is not installed")
    (folder / "docs").mkdir()
    shutil.copy(DOCS / "conf.py", folder / "docs")
    for name, text in pages.items():
        (folder / f"docs/{name}.md").write_text(f"# Page\n\n{text}\n")
    words = ["-q", "-W", "--keep-going", "-D", "suppress_warnings=toc.not_included"]
    code: int = sphinx.main([*words, str(folder / "docs"), str(folder / "site")])
    return code


def test_examples_run_and_show_what_they_print(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = "```python\nn = 2\n```\n\n```python\nprint(n * 21)\n```"
    run += "\n\n```python\nfrom matplotlib import pyplot\n\npyplot.subplots()[1].set_xlabel('number < 3')\n```"
    assert build({"index": run, "hub": "```python\n# on the hub\nabsent()\n```"}, tmp_path) == 0
    assert capfd.readouterr().err == ""
    page = (tmp_path / "site/index.html").read_text()
    assert page.count('<img alt="number &lt; 3" src="data:image/svg+xml;base64,') == 1
    assert "42" in re.sub("<.*?>", "", page)


def test_an_example_that_fails_and_a_link_to_nowhere_end_the_build(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "```python\nn = 2\n```\n\n```python\nassert n == 3\n```"
    assert build({"index": "Whole.", "fails": fails, "links": "[nowhere](absent.md)"}, tmp_path) == 1
    warnings = [line for line in capfd.readouterr().err.splitlines() if "WARNING" in line]
    assert [re.findall(r"(\w+\.md).*(an example fails|not found)", line) for line in warnings] == [
        [("fails.md", "an example fails")],
        [("links.md", "not found")],
    ]


def test_every_module_has_a_page() -> None:
    listed = set(re.findall(r"^   (tinyspan[\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.M))
    source = DOCS.parent / "src"
    modules = {".".join(path.relative_to(source).with_suffix("").parts) for path in (source / "tinyspan").rglob("*.py")}
    applications = ("tinyspan.cli", "tinyspan.lab", "tinyspan.workflows", "tinyspan.__main__")
    named = ("tinyspan.interop.lora.", "tinyspan.interop.trainer", "tinyspan.interop.callback")  # lora and huggingface
    named += ("tinyspan.analysis.", "tinyspan.plots.")  # on the pages of their packages
    assert {
        name for name in modules if not name.endswith("__init__") and not name.startswith(applications + named)
    } <= listed

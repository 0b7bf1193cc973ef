"""Build of the documentation site: `make docs`. Warnings are errors, and so is an example that fails."""

import base64
import gc
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import lru_cache
from html import escape
from importlib import import_module
from io import BytesIO, StringIO
from pkgutil import iter_modules
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MPLBACKEND"] = "agg"

import pandas
import pyarrow
from datasets import Dataset
from docutils import nodes
from matplotlib import pyplot
from pyarrow import parquet
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tinyspan import workflows
from tinyspan.workflows import tasks
from tinyspan.workflows.progress import quieten
from tinyspan.workflows.tasks.labelled import Source

warnings.filterwarnings("ignore", category=FutureWarning, module="posteriors")  # of tensordict, in each of its classes
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")  # the Trainer's default, on a CPU

project = "tinyspan"
copyright = "The tinyspan developers"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "tinyspan"
templates_path = ["_templates"]
default_role = "code"  # docstrings put code between single backticks
autodoc_member_order = "bysource"
napoleon_use_ivar = True
myst_heading_anchors = 3
nitpicky = True
nitpick_ignore_regex = [  # what other libraries document
    (
        "py:.*",
        r"(annotated_types|collections|contextlib|datasets|numpy|pandas|pathlib|pyarrow|pydantic\w*|rich|torch|transformers|typing|yaml)\..*",
    ),
    ("py:.*", "ProcessGroup|TrainerCallback|_PydanticGeneralMetadata|inspect.Parameter"),
    ("py:class", r"Array|PreTrainedModel|pa\.(Schema|RecordBatch)"),  # of named tuples, as text
    ("py:class", r"list\[dict\[str"),  # an attribute's type, which is cut at its comma
    (
        "py:class",
        r"tinyspan\.(bases\.constructors\.Build|lab\.scheduler\.(AnyCell|Part)|linalg\.Result|maps\.base\.Kind|model\.files\.Kind|partitioning\.Build|registry\.(Default|Entry)|workflows\.progress\.Item|workflows\.tasks\.base\.AnyType)",
    ),  # type variables
]

# what modules import in functions, and at the top only for type checkers: annotations are resolved by these names
for package in (workflows, tasks):
    for module in iter_modules(package.__path__, f"{package.__name__}."):
        names = vars(import_module(module.name))
        if "annotations" in names:
            names.update(pd=pandas, pa=pyarrow, pq=parquet, Dataset=Dataset)
            names.update(PreTrainedModel=PreTrainedModel, GenerationConfig=GenerationConfig)
            names.update(PreTrainedTokenizerBase=PreTrainedTokenizerBase)
            names.update(Source=Source)  # of a field that subclasses inherit

NOT_HERE = ("# on the hub", "# in every process")  # the first line of an example that is not run


def run_examples(app: Sphinx, page: nodes.document) -> None:
    """Run a page's Python blocks in order as one script, in a folder of its own.

    What a block prints is shown below it, and so are the figures that it creates with pyplot.
    """
    names: dict[str, object] = {}
    home = os.getcwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in list(page.findall(nodes.literal_block)):
                if block.get("language") != "python" or block.astext().startswith(NOT_HERE):
                    continue
                code = "\n" * (block.line or 0) + block.astext()  # tracebacks tell the page's lines
                with redirect_stdout(StringIO()) as printed:
                    exec(compile(code, page["source"], "exec"), names)
                below: list[nodes.Node] = []
                if text := printed.getvalue():
                    below.append(nodes.literal_block(text, text, language="text"))
                below += drawn()
                place = block.parent.index(block) + 1
                block.parent[place:place] = below
        except Exception:
            getLogger(__name__).warning("an example fails: %s", traceback.format_exc(), location=block)
        finally:
            os.chdir(home)


def drawn() -> Iterator[nodes.raw]:
    """Close the open figures of pyplot, and yield them as pictures, described by their axes."""
    for number in pyplot.get_fignums():
        figure, data = pyplot.figure(number), BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
        parts = [text for ax in figure.axes for text in (ax.get_title(), ax.get_ylabel(), ax.get_xlabel()) if text]
        picture = f"data:image/svg+xml;base64,{base64.b64encode(data.getvalue()).decode()}"
        yield nodes.raw("", f'<p><img alt="{escape("; ".join(parts))}" src="{picture}"></p>', format="html")
        pyplot.close(figure)


def share_navigation(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Compute the navigation of pages with source code, which is the same on all of them in a folder, only once."""
    if page.startswith("_modules/"):
        folder = page.rpartition("/")[0]
        if folder not in navigation:
            navigation[folder] = lru_cache(context["toctree"])
        context["toctree"] = navigation[folder]


navigation: dict[str, Callable[..., str]] = {}  # folder -> its toctree


def setup(app: Sphinx) -> None:
    """Run examples when a page is read."""
    quieten()
    gc.collect()
    gc.freeze()  # a Trainer collects garbage, which takes a second if everything that is imported is searched
    app.connect("doctree-read", run_examples)
    app.connect("html-page-context", share_navigation, priority=1)  # before the theme asks for it

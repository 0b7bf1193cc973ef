"""One self-contained page about recorded runs, bases, adapters and results: `tinyspan report`."""

from tinyspan.workflows.report.items import Item
from tinyspan.workflows.report.page import write_report

__all__ = ["Item", "write_report"]

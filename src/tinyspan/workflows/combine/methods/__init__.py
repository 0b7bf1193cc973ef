"""Methods of combination, one per file; importing this package imports and registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from tinyspan.workflows.combine.methods.base import METHODS, Method, register_method

__all__ = ["METHODS", "Method", "register_method"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

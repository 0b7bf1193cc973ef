"""Bases of a subspace, and their constructors: one family a file, each registered by being imported here."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

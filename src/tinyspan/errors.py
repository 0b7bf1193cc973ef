"""Exceptions of the library; each kind has its own exit code on the command line."""

__all__ = ["InputError", "Interrupted", "MismatchError", "StorageError", "TinyspanError"]


class TinyspanError(Exception):
    """Base class of the errors that this library raises."""


class InputError(TinyspanError, ValueError):
    """An argument is invalid; the message states the expected and the actual value and what to do. Exit code 2."""


class MismatchError(InputError):
    """Two things do not belong together, such as a basis and a model it was not made for. Exit code 2."""


class StorageError(TinyspanError):
    """A folder or file is missing, damaged, incomplete or of an unknown version. Exit code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped work that can be resumed; the message names the saved state. Exit code 128 + signal number."""

"""What can go wrong, in three kinds that a caller, and the command line's exit code, can tell apart."""

__all__ = ["InputError", "Interrupted", "MismatchError", "StorageError", "TinyspanError"]


class TinyspanError(Exception):
    """Base of every error raised on purpose by this library."""


class InputError(TinyspanError, ValueError):
    """An argument cannot be used: what was expected, what came, and what to do. Exit code 2."""


class MismatchError(InputError):
    """Two things do not belong together, such as a basis and a model it was not made for. Exit code 2."""


class StorageError(TinyspanError):
    """A folder or file is missing, damaged, incomplete or of an unknown version. Exit code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended work that can go on; the message says what is kept. Exit code 128 and the signal's number."""

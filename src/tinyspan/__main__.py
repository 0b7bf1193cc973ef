"""`python -m tinyspan` is the command `tinyspan`."""

from tinyspan.cli import main

if __name__ == "__main__":
    main()

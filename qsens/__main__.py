"""``python -m qsens``: the same as the console script."""

from qsens.cli import main

if __name__ == "__main__":
    main()

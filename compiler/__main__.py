"""``python -m edgec``: the command line, also for ``torchrun -m edgec``."""

from edgec.cli import main

if __name__ == "__main__":
    main(prog_name="edgec")

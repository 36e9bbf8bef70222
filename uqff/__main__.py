"""``python -m uqff``: the command line."""

from uqff.cli import main

if __name__ == "__main__":
    main(prog_name="uqff")

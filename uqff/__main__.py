"""``python -m uqff``: the command line."""

from uqff.cli import console

if __name__ == "__main__":
    console()

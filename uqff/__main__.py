"""``python -m uqff`` and ``uqff``: the command line, which can be interrupted while it is being imported, too."""

import os
from typing import NoReturn

__all__ = ["run"]


def run() -> NoReturn:
    """See :func:`uqff.cli.console`."""
    try:
        from uqff.cli import console

        console()
    except KeyboardInterrupt:
        os._exit(128 + 2)


if __name__ == "__main__":
    run()

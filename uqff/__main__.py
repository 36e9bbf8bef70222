"""``python -m uqff`` and ``uqff``: the command line, which can be interrupted while it is being imported, too."""

import os

from uqff.interrupts import INTERRUPTED, end_at_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["run"]


def run() -> "NoReturn":
    """See :func:`uqff.cli.console`."""
    try:
        end_at_once()
        from uqff.cli import console

        console()
    except KeyboardInterrupt:  # whoever called this handles signals by other means
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    run()

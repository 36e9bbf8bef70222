"""``python -m uqff`` and ``uqff``: the command line, which can be interrupted while it is being imported, too."""

from uqff.interrupts import end_at_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["run"]


def run() -> "NoReturn":
    """See :func:`uqff.cli.console`."""
    end_at_once()
    from uqff.cli import console

    console()


if __name__ == "__main__":
    run()

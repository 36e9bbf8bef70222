"""Write ``spec/schemas``; with ``--check`` write nothing, and exit 1 on any difference.

python -m tools.schemas            # make vectors
python -m tools.schemas --check    # make lint
"""

from __future__ import annotations

import argparse
import sys

from tools.generated import settle
from tools.schemas import imhex, kaitai, lists
from tools.schemas.compiled import SCHEMAS


def files() -> dict[str, str]:
    """Every generated file, by name."""
    return {
        kaitai.NAME: kaitai.schema(),
        imhex.NAME: imhex.schema(),
        "dtypes.json": lists.as_text(lists.dtypes()),
        "ggml-types.json": lists.as_text(lists.ggml_types()),
        "entries.json": lists.as_text(lists.entries()),
    }


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description="write spec/schemas from the declared layouts")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on any difference")
    check = parser.parse_args().check
    return settle(((SCHEMAS / name, text) for name, text in files().items()), check=check)


if __name__ == "__main__":
    sys.exit(main())

"""The pages of the specification, as texts."""

from __future__ import annotations

import re
from pathlib import Path

SPEC = Path(__file__).parent.parent.parent / "spec"


def test_every_section_says_whether_it_binds() -> None:
    """The first words of each are *Normative* or *Informative*, as README.md says."""
    silent = []
    for page in sorted(SPEC.rglob("*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        title, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
        for section in sections or [title]:
            title, _, body = section.partition("\n")
            if not body.lstrip().startswith(("*Normative", "*Informative")):
                silent.append((page.name, title))
    assert silent == []

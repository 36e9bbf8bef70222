"""The model card of a UQFF repository: metadata in YAML, a table of its models, how to run them.

Authority: Hugging Face, "Model Cards" (``base_model``, ``base_model_relation``, ``tags``); mistral.rs v0.6.0 and
v0.9.2, ``mistralrs-server`` and ``mistralrs-cli`` (``--from-uqff``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from uqff.inspection.summary import FileSummary

__all__ = ["MADE_BY", "CardModel", "model_card"]

MADE_BY: Final = "<!-- made by uqff push: remove this line, and your own text is kept -->"
"""Stands in every card that is made; one without it is somebody's own and is left alone."""

HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

UNITS: Final = ("bytes", "KB", "MB", "GB", "TB")


@dataclass(frozen=True)
class CardModel:
    """A model of the directory: what chooses it, its files, what is in them, and relative errors by type if known."""

    name: str
    files: tuple[str, ...]
    summary: FileSummary
    fallbacks: int | None = None
    errors: Mapping[str, float] | None = None


def model_card(repo: str, models: Sequence[CardModel], base_model: str | None) -> str:
    """The card, as the text of ``README.md``.

    Args:
        repo: where it will stand.
        models: of the directory, at least one.
        base_model: what was quantised: the name of a repository, which is linked; or any other text.
    """
    generation = models[0].summary.generation
    versions = sorted({str(version) for model in models for version in model.summary.versions})
    return "\n".join(
        [
            *_metadata(base_model),
            "",
            MADE_BY,
            "",
            f"# {_plain(repo.rpartition('/')[2])}",
            "",
            f"{_linked(base_model)} in UQFF {', '.join(versions)}, the quantised file format of "
            "[mistral.rs](https://github.com/EricLBuehler/mistral.rs).",
            "",
            *_table(models),
            "",
            "## Run it",
            "",
            "With mistral.rs:" if generation == "1.x" else "With mistral.rs 0.6 to 0.8, which read this version:",
            "",
            "```sh",
            *(_engine(repo, model) for model in models),
            "```",
            "",
            "In Python, with [mistralrs](https://pypi.org/project/mistralrs/):",
            "",
            "```python",
            "from mistralrs import Runner, Which",
            "",
            f"runner = Runner(which=Which.Plain(model_id={_text(repo)}, from_uqff={_text(_first(models[0]))}))",
            "```",
            "",
            "In Python, with [uqff](https://pypi.org/project/uqff-format/):",
            "",
            "```python",
            "import uqff",
            "",
            f"model = uqff.load_model({_text(_named(repo, models))})  # of transformers, with quantised weights",
            f"with uqff.open({_text(_named(repo, models))}) as file:",
            "    for key, (weight, bias) in file.items():",
            "        print(key, weight)",
            "```",
            "",
            "`SHA256SUMS` lists the files: `uqff checksum " + repo + " --check`, or `sha256sum -c` beside them.",
            "",
        ]
    )


def _metadata(base_model: str | None) -> list[str]:
    lines = ["---", "tags:", "- uqff", "- mistral.rs"]
    if base_model is not None and HUB_ID.fullmatch(base_model):
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: quantized"]
    return [*lines, "---"]


def _table(models: Sequence[CardModel]) -> list[str]:
    columns = ["type", "files", "stored as", "bits/weight", "size"]
    fallbacks, errors = (any(getattr(m, name) for m in models) for name in ("fallbacks", "errors"))
    columns += ["fallbacks"] * fallbacks + ["relative RMS error"] * errors
    rows = []
    for model in models:
        types = model.summary.types
        bits = model.summary.bits_per_weight
        row = [model.name, ", ".join(model.files), ", ".join(f"{each.layers} {each.kind}" for each in types)]
        row += ["-" if bits is None else f"{bits:.3f}", _size(model.summary.nbytes)]
        row += [str(model.fallbacks or 0)] * fallbacks
        known = model.errors or {}
        row += [", ".join(f"{kind} {error:.4f}" for kind, error in known.items()) or "-"] * errors
        rows.append(row)
    lines = [columns, ["---"] * len(columns), *([_plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _engine(repo: str, model: CardModel) -> str:
    if model.summary.generation == "1.x":
        return f"mistralrs run -m {repo} --from-uqff {_quoted(model.files[0])}"
    return f"mistralrs-server -i plain -m {repo} --from-uqff {_quoted(';'.join(model.files))}"


def _first(model: CardModel) -> str:
    return model.files[0] if model.summary.generation == "1.x" else ";".join(model.files)


def _named(repo: str, models: Sequence[CardModel]) -> str:
    return repo if len(models) == 1 else f"{repo}:{models[0].name}"


def _linked(base_model: str | None) -> str:
    if base_model is None:
        return "A model"
    if HUB_ID.fullmatch(base_model):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return _plain(base_model)


def _plain(text: str) -> str:
    """A text of which Markdown makes nothing, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w.-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}" if unit else f"{nbytes} bytes"

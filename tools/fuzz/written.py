"""Targets that read what this package writes besides models, and that write texts in which names of strangers stand.

Of a text it is looked at whether its reader makes of it what it was made of: nothing that stands in a name becomes part
of a page, a card or a recipe.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
import yaml

import uqff
from tools.fuzz.target import Target, seed_of
from uqff.evaluation.evaluate import Evaluation
from uqff.evaluation.kept import KeptLogits, LogitsWriter
from uqff.evaluation.measures import Predictions
from uqff.evaluation.windows import TextWindows
from uqff.hub.names import hub_name
from uqff.importance.hessians import Hessians, HessianWriter
from uqff.inspection.page import page
from uqff.inspection.summary import summarize
from uqff.planning.topology import topology
from uqff.publish.card import CardModel, model_card
from uqff.publish.push import push
from uqff.quantization.recipe import parse_recipe

__all__ = ["targets_of_written"]

NAMES = (
    b"model.layers.0.mlp.up_proj\nmodel.layers.1.mlp.up_proj\nlm_head\nit's.a'b\nmodel.layers.0.x-y/z",
    b"</title><script>alert(1)</script>\n[a](javascript:alert(1))|`x`\n---\nbase_model: x\n```\n${HOME} `id` $(id)",
)
"""A name on each line."""

WINDOWS = TextWindows.of([3 + at for at in range(24)], context=8)
WORDS = 40

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "i", "dl", "dt", "dd", "code", "pre", "div"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "span", "svg", "rect", "path", "line", "text"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "style", "open", "role", "aria-label", "viewbox"),
    *("preserveaspectratio", "x", "y", "width", "height", "fill", "d", "title", "opacity"),
}
"""What a page has of its own."""


def _write_hessian(path: Path) -> None:
    writer = HessianWriter(
        path, {"model.layers.0.mlp.up_proj": (32, 32), "model.layers.0.mlp.experts.up_proj": (2, 32, 32)}
    )
    for module, shape in (
        ("model.layers.0.mlp.up_proj", (32, 32)),
        ("model.layers.0.mlp.experts.up_proj", (2, 32, 32)),
    ):
        products = np.broadcast_to(np.eye(32, dtype=np.float32), shape)
        writer.add(module, products, np.ones(shape[0] if len(shape) == 3 else 1, np.int64))
    writer.finish()
    writer.close()


def _write_logits(path: Path) -> None:
    writer = LogitsWriter(path, WINDOWS, WORDS, "model", "digest")
    for at in range(len(WINDOWS)):
        writer.add(torch.arange(WINDOWS.scored * WORDS).reshape(-1, WORDS) % 7 / 2, torch.tensor(WINDOWS.targets(at)))
    writer.finish()
    writer.close()


class _Files:
    """A directory in which hostile files are put."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.home = folder
        folder.mkdir()
        shutil.copytree(model, folder / "model")
        self.weight = torch.arange(2 * 32 * 32, dtype=torch.float32).reshape(2, 32, 32).sin()
        with uqff.open(folder / "model") as file:
            self.summary = summarize(file)

    def hessian(self, data: bytes) -> None:
        path = self.home / "hessian"
        path.write_bytes(data)
        with Hessians(path) as found:
            for name in list(found)[:8]:
                _ = found[name], found.counts(name)
                for weight in (self.weight, self.weight[0]):
                    try:
                        products = found.layer(name, weight.shape)
                    except uqff.ShapeError:
                        continue
                    if products is not None:
                        uqff.quantize(weight, "q4_0", effort="calibrated", hessian=products.read())

    def logits(self, data: bytes) -> None:
        path = self.home / "logits"
        path.write_bytes(data)
        kept = KeptLogits(path, WINDOWS)
        try:
            if kept.vocabulary != WORDS:
                return
            found = []
            for at in range(len(WINDOWS)):
                own = torch.arange(WINDOWS.scored * WORDS).reshape(-1, WORDS) % 5 / 3
                targets = torch.tensor(WINDOWS.targets(at))
                read = lambda part, at=at, device=own.device: kept.window(at, part, device)  # noqa: E731
                found.append(Predictions.of(own, targets, WINDOWS.first, read))
            made = Evaluation("model", kept.model, WINDOWS, Predictions.joined(found), [])
            json.dumps(made.document, allow_nan=False)
        finally:
            kept.close()

    def page(self, data: bytes) -> None:
        path = self.home / "m.uqff"
        path.write_bytes(data)
        with uqff.open(path) as file:
            checked = _Page()
            for piece in page(file, summarize(file)):
                checked.feed(piece)
            checked.close()

    def card(self, data: bytes) -> None:
        """Of a report that is hostile."""
        (self.home / "model" / "uqff_report.json").write_bytes(data)
        made = push(self.home / "model", "an/other", dry_run=True)
        assert made.card is not None
        _check_card(made.card, len(self.summary.files))

    def measured(self, data: bytes) -> None:
        """Of errors that are hostile."""
        path = self.home / "measured.json"
        path.write_bytes(data)
        made = push(self.home / "model", "an/other", measured=path, dry_run=True)
        assert made.card is not None
        _check_card(made.card, len(self.summary.files))

    def card_names(self, data: bytes) -> None:
        """Of names of files, types and of what was quantised."""
        lines = [line for line in data.decode("utf-8", "replace").split("\n") if line.strip() and "\0" not in line]
        for line in lines:
            model = CardModel(line, (f"{line}.uqff".replace("/", "-"),), self.summary, errors={line: 0.5})
            made = model_card("an/other", [model], line)
            _check_card(made, 1)
            (run,) = re.findall(r"^mistralrs run .*$", made, re.M)
            if shlex.split(run)[-1] != model.files[0]:
                raise ValueError(f"the shell reads another name: {run!r}")


def _check_card(card: str, models: int) -> None:
    _, head, body = card.split("---\n", 2)
    known = yaml.safe_load(head)
    if not {"tags"} <= known.keys() <= {"tags", "base_model", "base_model_relation"}:
        raise ValueError(f"metadata: {known}")
    if known["tags"] != ["uqff", "mistral.rs"]:
        raise ValueError(f"tags: {known}")
    lines = body.split("\n")
    if sum(line.startswith("```") for line in lines) != 6:
        raise ValueError("a fence is not the card's own")
    table = [line for line in lines if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}
    if len(cells) != 1 or len(table) < 3:
        raise ValueError(f"a table of rows of {cells} cells")
    if re.search(r"(?<!\\)<(?!!-- made by uqff push)", "\n".join(table + lines[:8])):
        raise ValueError("a tag in the card")


class _Page(HTMLParser):
    """Nothing in a page but what it has of its own."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in TAGS:
            raise ValueError(f"element {tag} in the page")
        for name, _ in attrs:
            if name not in ATTRIBUTES:
                raise ValueError(f"attribute {name} of {tag} in the page")


def _topology(data: bytes) -> None:
    """A recipe of names has a rule for each of them, and for no other."""
    names = list(dict.fromkeys(line for line in data.decode("utf-8", "replace").split("\n") if line))[:20]
    recipe = parse_recipe(topology({name: ("q4k", "q8_0")[at % 2] for at, name in enumerate(names)}).encode())
    for at, name in enumerate(names):
        kinds = {rule.kind for rule in recipe.rules if rule.pattern and rule.pattern.search(f"{name}.weight")}
        if kinds != {("q4k", "q8_0")[at % 2]}:
            raise ValueError(f"{name!r} has {kinds}")


def _hub_names(data: bytes) -> None:
    for line in data.decode("utf-8", "replace").split("\n"):
        if (found := hub_name(line.replace("\0", ""))) is not None and hub_name(found.text) != found:
            raise ValueError(f"{line!r} is {found.text!r}")


def targets_of_written(folder: Path, model: Path) -> Iterator[Target]:
    """All of them.

    Args:
        folder: an empty one.
        model: a directory of 1.x.
    """
    files = _Files(folder / "written", model)
    _write_hessian(folder / "seed.hessian")
    yield Target("Hessians", "safetensors", [(folder / "seed.hessian").read_bytes()], files.hessian)
    _write_logits(folder / "seed.logits")
    yield Target("kept logits", "safetensors", [(folder / "seed.logits").read_bytes()], files.logits)
    (shard,) = sorted(model.glob("*.uqff"))
    yield Target("page", "safetensors", [shard.read_bytes()], files.page)
    yield Target("card", "json", [seed_of(model / "uqff_report.json")], files.card)
    measured = {"outputs": [{"quant": "q8_0", "types": [{"stored": "q8_0", "relative_rms": 0.01}]}]}
    yield Target("card, measured", "json", [json.dumps(measured).encode()], files.measured)
    yield Target("card, names", "lines", list(NAMES), files.card_names)
    yield Target("topology", "lines", list(NAMES), _topology)
    hub = b"owner/name@main:q4k\nhf://owner/name@refs/pr/1/folder/m.uqff\nhf://models/o/n@a%2Fb/c/:q8_0"
    yield Target("hub names", "lines", [hub], _hub_names)

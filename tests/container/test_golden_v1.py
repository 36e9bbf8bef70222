"""What the real clients wrote in 1.0, 1.1 and 1.2: parsed, equal to the 0.x records, saved again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.container.test_v1 import tensors_of
from tools.tiny.models import TinyModel
from uqff import Family, Version
from uqff.codes import ENTRY_VERSIONS
from uqff.container.report import build_output, check_output, check_report, read_report, report_document

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

INDEX: dict[str, Any] = {
    str(version): json.loads((GOLDEN / "v1" / str(version) / "MANIFEST.json").read_text()) for version in ENTRY_VERSIONS
}
FILES = [
    f"{version}/{directory}/{file}"
    for version, manifest in INDEX.items()
    for directory, about in manifest["directories"].items()
    for file in about["files"]
]
REPORTS = [file.replace("-0.uqff", ".uqff_report.json") for file in FILES if not file.startswith("1.0.0")]


def about(file: str) -> dict[str, Any]:
    """What the index says of the directory of a file."""
    version, directory, _ = file.split("/")
    entry: dict[str, Any] = INDEX[version]["directories"][directory]
    return entry


def test_index_is_complete() -> None:
    """Every file has an entry with its digest; every family and each version is there."""
    present = {path.relative_to(GOLDEN / "v1").as_posix() for path in (GOLDEN / "v1").glob("1.*/*/*.uqff")}
    assert present == set(FILES)
    families: dict[str, set[Family]] = {}
    for file in FILES:
        data = (GOLDEN / "v1" / file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == about(file)["files"][file.rsplit("/", 1)[1]]["sha256"]
        with uqff.open(GOLDEN / "v1" / file) as opened:
            families.setdefault(file.split("/")[0], set()).update(opened.fields(key)[0].family for key in opened)
    assert families["1.2.0"] == families["1.1.0"] == set(Family)
    assert families["1.0.0"] == set(Family) - {Family.UNQUANT}


@pytest.mark.parametrize("file", FILES)
def test_parse_and_save_again(tmp_path: Path, file: str) -> None:
    """Version, keys, shapes; the container is identical to the engine's up to ``__metadata__``."""
    path = GOLDEN / "v1" / file
    with uqff.open(path) as opened:
        assert opened.version == Version(*map(int, file.split("/")[0].split(".")))
        assert bool(opened.metadata) == (opened.version > (1, 0, 0))
        assert dict(opened.extra) == {}
        (saved,) = uqff.save(opened, tmp_path / "again-0.uqff", version=opened.version)
        with uqff.open(saved) as again:
            assert {key: again[key] for key in again} == {key: opened[key] for key in opened}
        if "mixtral" not in file:
            shapes = TinyModel(**about(file)["model"]).shapes()
            assert {key: opened[key].weight.shape for key in opened} == {
                key: shapes.get(f"{key}.weight", shapes["model.embed_tokens.weight"]) for key in opened
            }
    assert tensors_of(saved) == tensors_of(path)


def test_embeddings_are_layers_since_1_2() -> None:
    """A tied model has no head then; before, it has a head and no embedding."""
    for file in FILES:
        with uqff.open(GOLDEN / "v1" / file) as opened:
            newest, tied = opened.version == (1, 2, 0), "tied" in file
            assert ("model.embed_tokens" in opened, "lm_head" in opened) == (newest, not (newest and tied)), file


WITH_V0 = [file for file in FILES if about(file)["v0"]]


@pytest.mark.parametrize("file", WITH_V0)
def test_equal_to_the_records_of_0_x(file: str) -> None:
    """0.6.0 quantised the same weights: the same record, bit by bit, and the same numbers, from either generation.

    Two fields of two bytes may have another sign of zero (see the specification of AFQ, Q4_1, Q5_1, Q4K): compared as
    numbers.  Promotion of ``lm_head`` in 1.2 gives other types there.
    """
    model = TinyModel(**about(file)["model"])
    old_path = GOLDEN / about(file)["v0"] / file.rsplit("/", 1)[1]
    compared = 0
    with uqff.open(GOLDEN / "v1" / file) as new, uqff.open(old_path) as old:
        for index, name in enumerate(model.layer_names()):
            ours, theirs = new[name], old[index]
            if ours.weight.kind != theirs.weight.kind:
                assert name == "lm_head"
                continue
            compared += 1
            assert torch.equal(ours.weight.dequantize(), theirs.weight.dequantize()), name
            assert (ours.bias is None) == (theirs.bias is None)
            if ours.bias is not None and theirs.bias is not None:
                assert torch.equal(ours.bias.view(torch.uint8), theirs.bias.view(torch.uint8))
            if ours.weight.family in (Family.HQQ, Family.FP8):
                assert ours == theirs
    assert compared >= 7


def test_stacked_experts() -> None:
    """``[E, out, in]``, of the families that the version has them in."""
    kinds = set()
    for file in FILES:
        if "mixtral" in file:
            with uqff.open(GOLDEN / "v1" / file) as opened:
                weight = opened["model.layers.0.block_sparse_moe.experts.up_proj"].weight
                assert weight.shape == (2, 32, 64)
                kinds.add((str(opened.version), weight.kind))
    assert kinds >= {("1.1.0", "fp8"), ("1.1.0", "hqq8"), ("1.1.0", "f8q8"), ("1.2.0", "q4_0"), ("1.2.0", "afq2")}


@pytest.mark.parametrize("file", REPORTS)
def test_report_of_the_client(file: str) -> None:
    """Read, written again and built from the file: all equal; and it agrees with the directory."""
    path = GOLDEN / "v1" / file
    report = read_report(path)
    assert report is not None
    assert report_document(report) == json.loads(path.read_text())
    assert list(check_report(report, path.parent)) == []
    (output,) = report.outputs
    with uqff.open(path.parent / output.shards[0]) as opened:
        assert list(check_output(output, opened)) == []
        targets = {layer.module: layer.resolved_target or "" for layer in output.layer_details}
        reasons = {fallback.module: fallback.reason or "" for fallback in output.fallbacks}
        assert build_output(output.quant, opened, targets=targets, reasons=reasons) == output

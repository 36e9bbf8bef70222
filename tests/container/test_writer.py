"""The writer of layers: whatever the order, the files that ``uqff.save`` writes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import uqff
from uqff.container.mapped import MappedFile
from uqff.container.plan import SHARD_BYTES, layer_size, plan_files
from uqff.container.shards import shard_names
from uqff.container.writer import LayerWriter
from uqff.errors import FormatError


def layers_of(keys: list[str]) -> dict[str, uqff.Layer]:
    """Layers of different sizes, every second with a bias."""
    torch.manual_seed(0)
    made = {}
    for at, key in enumerate(keys):
        weight = torch.randn(2 + at % 3, 64)
        bias = torch.randn(len(weight)) if at % 2 else None
        made[key] = uqff.Layer(uqff.quantize(weight, ("afq4", "q8_0", "unquant")[at % 3]), bias)
    return made


def without_values(layers: dict[str, uqff.Layer]) -> dict[str, uqff.Layer]:
    """The same on the meta device: sizes without payload."""
    meta = torch.device("meta")
    return {
        key: uqff.Layer(layer.weight.to(meta), None if layer.bias is None else layer.bias.to(meta))
        for key, layer in layers.items()
    }


def writer_of(
    folder: Path,
    stem: str,
    layers: dict[str, uqff.Layer],
    version: tuple[int, int, int],
    shard_bytes: int = SHARD_BYTES,
) -> LayerWriter:
    """The files of layers, planned without payload."""
    plan = plan_files(without_values(layers), version, shard_bytes)
    return LayerWriter(plan, shard_names(folder, stem, len(plan.shards)))


@pytest.mark.parametrize("version", [(0, 2, 0), (1, 2, 0)], ids=["0.2", "1.2"])
def test_layers_streamed_in_any_order_are_those_saved(tmp_path: Path, version: tuple[int, int, int]) -> None:
    """Shards written backwards from layers on the meta device are those of `uqff.save`, in both generations."""
    names = [str(index) for index in range(12)]
    layers = layers_of(names if version < (1, 0, 0) else [f"model.layers.{name}.up" for name in names])
    shards = writer_of(tmp_path, "m-1", layers, version, 600)
    for key in reversed(list(layers)):
        shards.write(key, layers[key])
    shards.finish()
    (tmp_path / "saved").mkdir()
    saved = uqff.save(layers, tmp_path / "saved" / "m-1.uqff", version=version, shard_bytes=600)
    assert len(saved) > 2
    assert [file.path.name for file in shards.files] == [path.name for path in saved]
    assert [file.path.read_bytes() for file in shards.files] == [path.read_bytes() for path in saved]
    sizes = {key: layer_size(layer, version) for key, layer in layers.items()}
    assert {key: shards.plan.size(key) for key in layers} == sizes
    assert shards.plan.nbytes + (0 if version < (1, 0, 0) else 12) == sum(
        entry.end - entry.begin for path in saved for entry in MappedFile(path).header.entries.values()
    )


def test_another_layer_than_was_planned_is_refused(tmp_path: Path) -> None:
    """One with an entry more, one less, or another shape: neither is it cut nor is there a hole."""
    layers = layers_of(["a", "b"])
    writer = writer_of(tmp_path, "m", layers, (1, 2, 0))
    weight, bias = layers["b"].weight, layers["b"].bias
    assert bias is not None
    for key, layer, field, expected, got in (
        ("a", uqff.Layer(layers["a"].weight, bias[:2]), "bias", "no such entry", "F32 [2]"),
        ("b", uqff.Layer(weight), "bias", "F32 [3]", "no such entry"),
        ("b", uqff.Layer(weight.narrow(0, 0, 2), bias[:2]), "weight.shape", None, None),
    ):
        with pytest.raises(FormatError, match="layer changed while it was written") as caught:
            writer.write(key, layer)
        assert caught.value.layer == key
        if expected is not None:
            assert (caught.value.field, caught.value.expected, caught.value.got) == (field, expected, got)
    writer.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit to set")
@pytest.mark.parametrize("version", [(0, 2, 0), (1, 2, 0)], ids=["0.2", "1.2"])
def test_a_model_may_have_more_shards_than_a_process_may_open(tmp_path: Path, version: tuple[int, int, int]) -> None:
    """Few files are open at one time."""
    import resource

    layers = layers_of([str(index) if version < (1, 0, 0) else f"layers.{index}.up" for index in range(80)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 16, hard))
    try:
        paths = uqff.save(layers, tmp_path / "m.uqff", version=version, shard_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(paths) >= 80
    with uqff.open(tmp_path) as file:
        assert dict(file) == layers


@pytest.mark.parametrize("kind", ["q8_0", "afq4", "unquant"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 300])
def test_experts_streamed_one_by_one_are_the_stack(tmp_path: Path, kind: str, shard_bytes: int) -> None:
    """In any order, beside an ordinary layer, also where a shard ends within the stack."""
    weight = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(1))
    layers = {"a.experts": uqff.Layer(uqff.quantize(weight, kind)), "b": uqff.Layer(uqff.quantize(weight[0], "q4_0"))}
    streamed = writer_of(tmp_path, "m", layers, (1, 2, 0), shard_bytes)
    for expert in (2, 0, 3, 1):
        streamed.write_expert("a.experts", expert, uqff.Layer(uqff.quantize(weight[expert], kind)))
    streamed.write("b", layers["b"])
    streamed.finish()
    (tmp_path / "saved").mkdir()
    saved = uqff.save(layers, tmp_path / "saved" / "m.uqff", version=(1, 2, 0), shard_bytes=shard_bytes)
    assert [file.path.read_bytes() for file in streamed.files] == [path.read_bytes() for path in saved]


def test_an_expert_of_another_size_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(2, 3, 64)
    layers = {"a": uqff.Layer(uqff.quantize(weight, "q8_0"))}
    streamed = writer_of(tmp_path, "m", layers, (1, 2, 0))
    with pytest.raises(FormatError, match=r"changed while it was written.*layer a"):
        streamed.write_expert("a", 1, uqff.Layer(uqff.quantize(torch.ones(4, 64), "q8_0")))
    streamed.close()

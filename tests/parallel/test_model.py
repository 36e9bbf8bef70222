"""uqff.parallel.model: whole models on 1, 2 and 4 ranks against plain models with the dequantised weights."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import uqff
from tests.parallel.models import EXPERTS, PROMPT, TinyCase, single_experts, write
from tests.parallel.ranks import run_ranks
from uqff import CommError, FormatError, ShapeError, ShardError, UnsupportedError, UqffError
from uqff.parallel import Comm, load_model
from uqff.parallel.fallback import GatheringLayer
from uqff.parallel.generate import Generation, generate
from uqff.parallel.layer import QuantizedLayer
from uqff.parallel.linear import ColumnParallelLayer, RowParallelLayer
from uqff.progress import Step

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning"
)  # of torch, on import of its compiler

V0, V1_0, V1_1, V1_2 = (0, 1, 3), (1, 0, 0), (1, 1, 0), (1, 2, 0)
CASES = [
    TinyCase("llama", "q4k", V0),
    TinyCase("llama", "fp8", V1_2),
    TinyCase("llama", "hqq4", V0, tied=True),
    TinyCase("llama", "afq4", V1_2, tied=True, kv_heads=1),
    TinyCase("qwen2", "afq4", V0),
    TinyCase("qwen2", "hqq8", V1_2, tied=True),
    TinyCase("qwen2", "q8_0", V1_1, tied=True),
    TinyCase("qwen2", "fp8", V0, tied=True),
    TinyCase("qwen3", "f8q8", (0, 2, 0)),
    TinyCase("qwen3", "q4_0", V1_2, kv_heads=8),
    TinyCase("qwen3", "mxfp4", V1_0, tied=True),
    TinyCase("mistral", "mxfp4", (0, 2, 0)),
    TinyCase("mistral", "f8q8", V1_2, tied=True),
    TinyCase("mistral", "unquant", V1_2),
    TinyCase("mistral", "q6k", V1_2, dtype=torch.bfloat16),
    TinyCase("qwen3_moe", "hqq4", V0),
    TinyCase("qwen3_moe", "q8_0", V0, expert_inner=96),
    TinyCase("qwen3_moe", "afq4", V1_2),
    TinyCase("qwen3_moe", "q4k", V1_2, tied=True, expert_inner=256),
]
TOKENS = 6
BOUND = 2e-5
"""Of logits between 1 and 10, in float32: sums of up to 512 products in another order, over 2 layers. Also on one rank:
BLAS adds up in an order of its own for a weight at an address that is no multiple of 16, or for other numbers of rows.
"""

HALF_BOUND = 0.1
"""In bfloat16."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A case on the disk, and what the plain model makes of the prompt."""

    case: TinyCase
    directory: Path
    plain: torch.nn.Module
    logits: torch.Tensor
    generation: Generation
    margins: list[float]

    @property
    def bound(self) -> float:
        """How far another order of adding up may move a logit."""
        return BOUND if self.case.dtype is torch.float32 else HALF_BOUND

    def same_ids(self, ids: list[int]) -> bool:
        """Whether ids are the plain model's, up to a place where two tokens are so close that the order decides."""
        decided = next((i for i, margin in enumerate(self.margins) if margin <= 2 * self.bound), len(self.margins))
        return ids[:decided] == self.generation.ids[:decided] and len(ids) == len(self.generation.ids)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for case in CASES:
        directory, plain = write(case, folder)
        with torch.inference_mode():
            logits = plain(torch.tensor([PROMPT])).logits[0].float()
            made = generate(plain, PROMPT, TOKENS)
            best = plain(torch.tensor([PROMPT + made.ids[:-1]])).logits[0, len(PROMPT) - 1 :].float().topk(2).values
        margins = (best[:, 0] - best[:, 1]).tolist()
        found[case.name] = Written(case, directory, plain, logits, made, margins)
    return found


Outcome = tuple[torch.Tensor, list[int]]


def outcome(comm: Comm, directory: Path) -> Outcome:
    """Logits of the prompt and greedy ids, the same on all ranks."""
    model = load_model(directory, comm)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0].float()
    ids = generate(model, PROMPT, TOKENS, comm=comm).ids
    assert all(torch.equal(logits, other) for other in comm.all_gather(logits)), "ranks differ"
    assert all(torch.equal(torch.tensor(ids), other) for other in comm.all_gather(torch.tensor(ids)))
    return logits, ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_rank_is_the_dequantised_model(written: dict[str, Written], case: TinyCase) -> None:
    """Every weight and bias has the plain model's bits; products of the same numbers, added up in whatever order."""
    each = written[case.name]
    check_numbers(load_model(each.directory), each.plain)
    logits, ids = outcome(Comm(), each.directory)
    assert float((logits - each.logits).abs().max()) <= each.bound
    assert each.same_ids(ids)


def test_every_layer_is_told_once_it_is_in_its_place(written: dict[str, Written]) -> None:
    """One after another, and all of them; what the caller raises ends the loading."""
    directory, told = written[CASES[0].name].directory, list[Step]()
    model = load_model(directory, progress=told.append)
    held = {name for name, each in model.named_modules() if isinstance(each, QuantizedLayer)}
    assert {step.key for step in told} == {name.removesuffix(".rows") for name in held}
    count = len(told)
    assert told == [Step("load", step.key, n, count, n, count, "layers") for n, step in enumerate(told, 1)]

    def stop(step: Step) -> None:
        raise KeyboardInterrupt(step.key)

    with pytest.raises(KeyboardInterrupt, match=told[0].key):
        load_model(directory, progress=stop)


def check_numbers(model: torch.nn.Module, plain: torch.nn.Module) -> None:
    """All that the plain model has is in the model, bit for bit; quantised layers are compared as they multiply."""
    dtype = next(plain.parameters()).dtype
    ours: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            name = name.removesuffix(".rows")  # of an embedding or a head
            ours[f"{name}.weight"] = module.dequantize_w(dtype)
            if module.bias is not None:
                ours[f"{name}.bias"] = module.bias.to(dtype)
        else:
            ours |= {f"{name}.{part}": parameter for part, parameter in module.named_parameters(recurse=False)}
    theirs = single_experts(plain.state_dict())  # stacked since transformers 5
    for name in [name for name in theirs if ".experts." in name]:
        block, expert, projection, _ = name.rsplit(".", 3)
        if name not in ours:
            ours[name] = stack_of(ours, f"{block}.{projection}")[int(expert)]
    assert not theirs.keys() - ours.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def stack_of(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The experts of a projection, ``[experts, out, in]``, that are held in one layer or in one each."""
    whole = weights.get(f"{name}.weight")
    return torch.stack([weights[f"{name}.{e}.weight"] for e in range(EXPERTS)]) if whole is None else whole


def on_ranks(comm: Comm, directories: dict[str, Path], broken: dict[str, Path]) -> dict[str, Any]:
    """Numbers of rank 0; on two ranks then all that can go wrong."""
    results = {name: outcome(comm, directory) for name, directory in directories.items()}
    if comm.world_size == 2:
        check_failures(comm, directories, broken)
        check_share(comm, directories[CASES[0].name])
        check_killed(comm, directories[CASES[1].name])
    return {name: (logits.numpy(), ids) for name, (logits, ids) in results.items()} if comm.rank == 0 else {}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one(written: dict[str, Written], tmp_path: Path, world_size: int) -> None:
    """Every case on ranks: logits within the bound, the same tokens. On two also: failures, which none survives."""
    directories = {name: each.directory for name, each in written.items()}
    broken = break_model(directories[CASES[2].name], tmp_path)
    results = run_ranks(world_size, on_ranks, directories, broken, timeout=60, dead=int(world_size == 2))
    for name, (logits, ids) in results[0].items():
        each = written[name]
        assert float((torch.from_numpy(logits) - each.logits).abs().max()) <= each.bound, name
        assert each.same_ids(ids), name


def break_model(directory: Path, folder: Path) -> dict[str, Path]:
    """Copies of a model: cut short, one byte changed in a layer's header, one in its codes, another configuration."""
    broken = {name: folder / name for name in ("cut", "blob", "codes", "config")}
    for copy in broken.values():
        shutil.copytree(directory, copy)
    data = (directory / "0-0.uqff").read_bytes()
    (broken["cut"] / "0-0.uqff").write_bytes(data[:-1000])
    start = 8 + int.from_bytes(data[:8], "little")
    (broken["blob"] / "0-0.uqff").write_bytes(data[: start + 4] + b"\x77" + data[start + 5 :])
    middle = len(data) // 2
    (broken["codes"] / "0-0.uqff").write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    config = json.loads((directory / "config.json").read_text())
    (broken["config"] / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    return broken


def check_failures(comm: Comm, directories: dict[str, Path], broken: dict[str, Path]) -> None:
    """What is wrong on one rank is an error on both, at once, and the ranks can go on."""
    good, first = directories[CASES[2].name], comm.rank == 0

    def load(name: str, **options: Any) -> None:
        load_model(good if first else broken[name], comm, **options)

    with pytest.raises((ShardError, FormatError)) as raised:
        load("cut")
    if first:
        assert re.match(r"opening model .* failed on rank 1: expected every rank to succeed, got ", str(raised.value))
    assert "0-0.uqff" in str(raised.value)
    with pytest.raises(ShardError, match=r"differs between ranks: .*, got another on rank 1$"):
        load("blob")
    with pytest.raises(ShardError, match=r"differs between ranks: .*, got another on rank 1$"):
        load("config")
    with pytest.raises(ShardError, match=r"differs between ranks: .*, got another on rank 1$"):
        load("codes", check="all")
    with pytest.raises(ShardError, match=r"differs between ranks: .*, got another on rank 1$"):
        load_model(good, comm, dtype=torch.float32 if first else torch.bfloat16)
    with pytest.raises(FileNotFoundError if not first else ShardError, match="no such file"):
        load_model(good if first else good / "nowhere", comm)
    with pytest.raises(UqffError) as raised:  # both have it: each says which layer
        load_model(broken["blob"], comm)
    assert "layer 0" in str(raised.value)
    assert outcome(comm, good)[1]


def check_share(comm: Comm, directory: Path) -> None:
    """Weights are cut: of 2 bytes held by the file, each rank has about one."""
    whole, mine = (sum(buffer.nbytes for buffer in load_model(directory, each).buffers()) for each in (Comm(), comm))
    assert mine < 0.52 * whole


def check_killed(comm: Comm, directory: Path) -> None:
    """A rank that dies in the middle of a forward is an error on the other, which names the collective."""
    group = dist.new_group(timeout=timedelta(seconds=60))
    comm = Comm(group)
    model = load_model(directory, comm)
    if comm.rank == 1:
        model.get_submodule("model.layers.1").register_forward_pre_hook(lambda *_: os._exit(9))
    with pytest.raises(
        CommError, match=r"^sum_all_reduce of float32 \[1, 8, 256\] failed on rank 0 of 2: expected every"
    ):
        generate(model, PROMPT, TOKENS, comm=comm)


def test_slices_that_cannot_be_cut_are_gathered(written: dict[str, Written]) -> None:
    """Q4K has blocks of 256 inputs: o_proj's 256 stay whole on two ranks, down_proj's 512 are cut."""
    comm = Comm()
    comm.rank, comm.world_size = 1, 2
    comm.all_gather_bytes = lambda data, device="cpu": [data, data]  # type: ignore[method-assign]
    model = load_model(written[CASES[0].name].directory, comm)
    kinds = {
        name: type(model.get_submodule(f"model.layers.0.{name}")) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert kinds == {"self_attn.o_proj": GatheringLayer, "mlp.down_proj": RowParallelLayer}
    assert type(model.get_submodule("model.layers.0.self_attn.k_proj")) is ColumnParallelLayer


def cut(directory: Path, folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a 1.x model with some layers changed, by path."""
    shutil.copytree(directory, folder / name)
    with uqff.open(directory) as file:
        layers: dict[str, Any] = dict(file)
        edit(layers)
        uqff.save(layers, folder / name / "0-0.uqff", version=V1_2)
    return folder / name


def test_layers_that_do_not_fit(written: dict[str, Written], tmp_path: Path) -> None:
    """A layer too few, one too many, one of another shape, one without its bias: each is named."""
    good = written[CASES[1].name].directory
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    with pytest.raises(FormatError, match=rf"model lacks a weight: .* \(file .*0-0.uqff, layer {up}\)"):
        load_model(cut(good, tmp_path, "few", lambda layers: layers.pop(up)))
    with pytest.raises(FormatError, match=r"layer has no place in the model: .*layer model.extra\)"):
        load_model(cut(good, tmp_path, "many", lambda layers: layers.update({"model.extra": layers[up]})))
    with pytest.raises(ShapeError, match=rf"does not fit the configuration: expected \[512, 256\], .*layer {up}\)"):
        load_model(cut(good, tmp_path, "shape", lambda layers: layers.update({up: layers["lm_head"]})))
    with pytest.raises(FormatError, match=rf"layer lacks a bias: expected bias \[256\] \(layer {q}\)"):
        load_model(cut(good, tmp_path, "bias", lambda layers: layers.update({q: uqff.Layer(layers[q].weight)})))


@pytest.mark.parametrize("blocks", [3, 30_000, 2**53])
def test_more_layers_than_there_are(written: dict[str, Written], tmp_path: Path, blocks: int) -> None:
    """Said before transformers makes modules for all of them, which took minutes and gigabytes."""
    shutil.copytree(written[CASES[1].name].directory, tmp_path / "deep")
    path = tmp_path / "deep" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": blocks}))
    with pytest.raises(FormatError, match=rf"got {blocks} \(file .*config.json, field config.num_hidden_layers\)"):
        load_model(tmp_path / "deep")


def test_a_numbered_layer_is_missing(written: dict[str, Written], tmp_path: Path) -> None:
    """Pre-1.0: the count must be right, as the engine has it; the error says which weight the number stands for."""
    good = written[CASES[0].name].directory
    for name, drop, add in (("few", 3, None), ("many", None, 15)):
        shutil.copytree(good, tmp_path / name)
        with uqff.open(good) as file:
            layers = {int(key): layer for key, layer in file.items() if int(key) != drop}
            if add is not None:
                layers[add] = layers[0]
            uqff.save(layers, tmp_path / name / "0-0.uqff", version=V0)
    with pytest.raises(ShardError, match=r"expected 15 layers, got 14, without 3 \(model.layers.0.self_attn.v_proj\)"):
        load_model(tmp_path / "few")
    with pytest.raises(ShardError, match=r"the file has not the layers that its model has: expected 15 .*, got 16 "):
        load_model(tmp_path / "many")


def test_what_stands_beside_the_file(written: dict[str, Written], tmp_path: Path) -> None:
    """No configuration, an architecture that is not run, a residual that lacks a norm, a dtype for numbers only."""
    good = written[CASES[1].name].directory
    for name in ("config", "architecture", "residual"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "config" / "config.json").unlink()
    with pytest.raises(
        FormatError, match=r"no configuration beside the model: got no such file \(file .*config.json\)"
    ):
        load_model(tmp_path / "config")
    more = '{"architectures": ["DiffusionGemmaForBlockDiffusion"], "text_config": {}}'
    (tmp_path / "architecture" / "config.json").write_text(more)
    with pytest.raises(
        UnsupportedError, match=r"architecture cannot be run: expected one of Llama, .*, got DiffusionGemma$"
    ):
        load_model(tmp_path / "architecture")
    tensors = load_file(good / "residual.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "residual" / "residual.safetensors")
    with pytest.raises(FormatError, match=r"model lacks a weight: .*layer model.norm\)"):
        load_model(tmp_path / "residual")
    with pytest.raises(UnsupportedError, match="dtype of activations"):
        load_model(good, dtype=torch.int8)


def test_dtype_is_that_of_the_residual_unless_given(written: dict[str, Written]) -> None:
    half = next(each for each in written.values() if each.case.dtype is torch.bfloat16).directory
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert load_model(half)(input_ids=ids).logits.dtype is torch.bfloat16
        model = load_model(half, dtype=torch.float32)
        assert model(input_ids=ids).logits.dtype is torch.float32
        assert model.to(torch.float16)(input_ids=ids).logits.dtype is torch.float16


def test_transformers_can_drive_it(written: dict[str, Written]) -> None:
    """``generate`` of the library gives the same tokens: the model is one of its own."""
    each = written[CASES[1].name]
    model: Any = load_model(each.directory)
    made = model.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
    assert made[0, len(PROMPT) :].tolist() == each.generation.ids

"""uqff.integrations.vllm: vLLM's own classes with our layers in them, and its engine, say what load_model says.

They need vLLM for CPUs: ``make test-vllm``.  What of the plug-in needs no vLLM is tested in test_vllm_stored.py.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.parallel.models import PROMPT, TinyCase, write
from tools.tiny import text
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.integrations.vllm.stored import StoredWeight
from uqff.parallel.unloaded import Unloaded

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # several engines one after another, in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
vllm = pytest.importorskip("vllm")

V0, V1_1, V1_2 = (0, 2, 0), (1, 1, 0), (1, 2, 0)
CASES = [
    TinyCase("llama", "hqq4", V1_1, tied=True),  # the head is a layer, and not the embedding
    TinyCase("llama", "q4k", V1_2),
    TinyCase("qwen2", "afq4", V0),  # biases
    TinyCase("qwen3", "mxfp4", V1_2),
    TinyCase("qwen3_moe", "q4k", V1_2, tied=True, expert_inner=256),
    TinyCase("qwen3_moe", "fp8", V0),  # experts one by one
    TinyCase("mistral", "f8q8", V1_2, tied=True),
]
OTHERS = (
    *("Mixtral", "Phi-2", "Phi-3", "Gemma", "Gemma 2", "StarCoder2", "GLM-4", "GLM-4-MoE", "SmolLM3", "Granite 4"),
    *("HunYuan dense", "HunYuan MoE"),
)
GOLDEN = Path(__file__).parents[1] / "golden" / "gguf"
COUNT = 6
NEAR = 1e-5
"""Of log probabilities: vLLM adds up in another order in attention, norms and softmax."""


def asked(directory: Path) -> list[int]:
    """A prompt out of the vocabulary of a model."""
    count = json.loads((directory / "config.json").read_text())["vocab_size"]
    return [token % count for token in PROMPT]


def expected(directory: Path, isq: str | None = None) -> list[tuple[int, float]]:
    """The tokens that ``load_model`` says, and their log probabilities."""
    model = uqff.load_model(directory, dtype=torch.float32, isq=isq)
    said: list[tuple[int, float]] = []
    with torch.inference_mode():
        for _ in range(COUNT):
            ids = torch.tensor([asked(directory) + [token for token, _ in said]])
            last = torch.log_softmax(model(ids).logits[0, -1], -1)
            said.append((int(last.argmax()), float(last.max())))
    return said


def answered(directory: Path, **options: Any) -> list[tuple[int, float]]:
    """The same of vLLM."""
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM 0.32.0 looks at what all modules have in their __dict__, and stumbles over an object of llvmlite without one.
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    options = {"enforce_eager": True, "quantization": "uqff", "dtype": "float32"} | options
    try:
        engine = vllm.LLM(model=str(directory), skip_tokenizer_init=True, max_model_len=64, **options)
        if hidden is not None:
            sys.modules["llvmlite.binding.ffi"] = hidden
        how = vllm.SamplingParams(temperature=0, max_tokens=COUNT, detokenize=False, ignore_eos=True, logprobs=1)
        (said,) = engine.generate([{"prompt_token_ids": asked(directory)}], how, use_tqdm=False)
        (answer,) = said.outputs
        return [(token, found[token].logprob) for token, found in zip(answer.token_ids, answer.logprobs, strict=True)]
    finally:
        engine = None
        cleanup_dist_env_and_memory()
        gc.collect()


def assert_same(got: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> None:
    """Equal tokens, and near log probabilities."""
    assert [token for token, _ in got] == [token for token, _ in wanted]
    assert max(abs(a - b) for (_, a), (_, b) in zip(got, wanted, strict=True)) < NEAR


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM does when it begins; what it compiles stays here."""
    (found,) = entry_points(group="vllm.general_plugins", name="uqff")
    found.load()()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        yield


def test_classes_leave_nothing_of_those_of_vllm_abstract() -> None:
    """A release of vLLM that asks for more is noticed here; so is a parameter that was renamed."""
    from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.layers.quantization.base_config import method_has_implemented_embedding
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader import BaseModelLoader, get_model_loader

    from uqff.integrations.vllm import register
    from uqff.integrations.vllm.config import UqffQuantizationConfig
    from uqff.integrations.vllm.experts import UqffExpertsMethod
    from uqff.integrations.vllm.linear import UqffLinearMethod
    from uqff.integrations.vllm.loader import UqffModelLoader
    from uqff.integrations.vllm.vocabulary import UqffEmbeddingMethod

    register()  # once more: nothing happens
    assert QUANTIZATION_METHODS.count("uqff") == 1
    assert get_quantization_config("uqff") is UqffQuantizationConfig
    assert type(get_model_loader(vllm.config.LoadConfig(load_format="uqff"))) is UqffModelLoader
    for made in (UqffQuantizationConfig, UqffLinearMethod, UqffEmbeddingMethod, UqffExpertsMethod, UqffModelLoader):
        assert not inspect.isabstract(made), made
    assert issubclass(UqffLinearMethod, LinearMethodBase)
    assert issubclass(UqffModelLoader, BaseModelLoader)
    assert method_has_implemented_embedding(UqffEmbeddingMethod)
    for ours, theirs in (
        (UqffLinearMethod, UnquantizedLinearMethod),
        (UqffEmbeddingMethod, UnquantizedEmbeddingMethod),
    ):
        for name in ("create_weights", "apply"):
            taken = [list(inspect.signature(getattr(each, name)).parameters) for each in (ours, theirs)]
            assert taken[0] == taken[1], (ours, name)
    assert type(UqffQuantizationConfig.from_config({"quant_method": "uqff"})) is UqffQuantizationConfig


@pytest.mark.parametrize("kind", ["q4_0", "hqq8"])
def test_rows_that_lie_as_in_gguf_files_are_put_in_order(kind: str, tmp_path: Path) -> None:
    """Of a directory of several types, of which config.json names one; rows of HQQ cannot change places."""
    directory = shutil.copytree(GOLDEN, tmp_path / "golden")
    config = json.loads((directory / "config.json").read_text())
    method = {"quantization_config": {"quant_method": "uqff", "isq": kind}}
    (directory / "config.json").write_text(json.dumps(config | method))
    assert_same(answered(directory, quantization=None), expected(directory, kind))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_engine_says_what_load_model_says(case: TinyCase, tmp_path: Path) -> None:
    """Of either generation, tied or not, with biases and with experts."""
    directory, _ = write(case, tmp_path)
    assert_same(answered(directory), expected(directory))


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Fused and parallel layers, other norms, embeddings that vLLM keeps as plain numbers, experts by other names."""
    kind = text.TEXTS[name]
    changes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2 if name == "Phi-2" else 1}
    if "head_dim" in kind.config():
        changes["head_dim"] = 32  # the least that vLLM has kernels for
    text.write_text(dataclasses.replace(kind, values=kind.values | changes), tmp_path / "checkpoint")
    uqff.quantize_model(tmp_path / "checkpoint", tmp_path / "model", "q8_0")
    wanted = expected(tmp_path / "model")  # before vLLM has put its activations into transformers
    assert_same(answered(tmp_path / "model"), wanted)


def test_config_json_says_enough(tmp_path: Path) -> None:
    """A directory of 1.2 needs no argument, in bfloat16 neither; what is no UQFF is loaded as ever."""
    directory, _ = write(TinyCase("llama", "q8_0", V1_2, dtype=torch.bfloat16), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "uqff"}}))
    said = answered(directory, quantization=None, dtype="auto")
    assert len(said) == COUNT
    plain, _ = write(TinyCase("qwen2", "q8_0", V1_2), tmp_path)
    assert vllm.EngineArgs(model=str(plain), skip_tokenizer_init=True).create_model_config().quantization is None


def test_compiled_programs_are_those_of_the_types_at_hand(tmp_path: Path) -> None:
    """What vLLM has compiled, it keeps by a hash of a model's configuration: of other types it must be another."""
    place, hashes = tmp_path / "model", set()
    for kind in ("q4_0", "q8_0"):
        directory, _ = write(TinyCase("llama", kind, V1_2), tmp_path / kind)
        if place.exists():
            place.rename(tmp_path / "before")
        directory.rename(place)
        arguments = vllm.EngineArgs(model=str(place), quantization="uqff", skip_tokenizer_init=True)
        hashes.add(arguments.create_model_config().compute_hash())
    assert len(hashes) == 2
    assert_same(answered(place, enforce_eager=False), expected(place))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a rank has a CPU of its own")
def test_ranks_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of K quants have blocks of 256 inputs, which two ranks cannot cut: they hold all, and use their share."""
    first, second, *_ = os.sched_getaffinity(0)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    directory, _ = write(TinyCase("qwen3_moe", "q4k", V1_2, expert_inner=256), tmp_path)
    assert_same(answered(directory, tensor_parallel_size=2), expected(directory))


def test_experts_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    """Before anything is loaded."""
    directory, _ = write(TinyCase("qwen3_moe", "q8_0", V1_2), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "relu2"}))
    with pytest.raises(Exception, match="relu2"):
        answered(directory)


def test_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    """As by load_model: a model that leaves something out is not the one of the files."""
    directory, _ = write(TinyCase("llama", "q8_0", V1_2), tmp_path)
    with uqff.open(directory) as file:
        layers = {
            **dict(file.items()),
            "model.layers.1.mlp.more_proj": uqff.Layer(uqff.quantize(torch.ones(8, 32), "q8_0")),
        }
        uqff.save(layers, tmp_path / "0-0.uqff", version=V1_2)
    (tmp_path / "0-0.uqff").replace(directory / "0-0.uqff")
    with pytest.raises((FormatError, ValueError), match="more_proj"):
        answered(directory)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes layers of vLLM as a rank of some would, without any ranks."""
    from vllm.model_executor.layers import linear

    def become(rank: int, size: int) -> None:
        for module in (linear, sys.modules["vllm.model_executor.parameter"]):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    with vllm.config.set_current_vllm_config(vllm.config.VllmConfig()):
        yield become


def stored(weight: uqff.QuantizedTensor) -> StoredWeight:
    """What the loader gives."""
    return StoredWeight.of(Unloaded.of(uqff.Layer(weight), "layer"), torch.float32, lambda: None)


HEADS, KV_HEADS, SIZE, HIDDEN = 8, 2, 32, 256


@pytest.mark.parametrize("kind", ["q4k", "hqq4", "afq4", "fp8", "mxfp4"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("fused", [False, True])
def test_ranks_have_their_rows_of_query_key_and_value(world: Any, kind: str, size: int, fused: bool) -> None:
    """Each layer of its own, or one of all; of four ranks, two have the same head of keys and values."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    from uqff.integrations.vllm.config import UqffQuantizationConfig

    torch.manual_seed(size)
    rows = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
    whole = uqff.quantize(torch.randn(sum(rows.values()), HIDDEN), kind)
    single = {name: uqff.quantize(torch.randn(count, HIDDEN), kind) for name, count in rows.items()}
    numbers = {name: each.dequantize(torch.float32) for name, each in single.items()}
    if fused:
        numbers = dict(zip(rows, whole.dequantize(torch.float32).split(list(rows.values())), strict=True))
    x = torch.randn(3, HIDDEN)
    for rank in range(size):
        world(rank, size)
        layer = QKVParallelLinear(
            HIDDEN, SIZE, HEADS, KV_HEADS, bias=False, quant_config=UqffQuantizationConfig(), prefix="qkv"
        )
        if fused:
            layer.weight.weight_loader(layer.weight, stored(whole))
        else:
            for name, each in single.items():
                layer.weight.weight_loader(layer.weight, stored(each), name)
        layer.quant_method.process_weights_after_loading(layer)
        mine = []
        for name, rows_of_one in numbers.items():
            share, of = (rank, size) if name == "q" else (rank * min(size, KV_HEADS) // size, min(size, KV_HEADS))
            mine.append(rows_of_one.chunk(of)[share])
        torch.testing.assert_close(layer(x)[0], x @ torch.cat(mine).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["q4k", "q8_0", "hqq4"])
def test_ranks_have_their_columns(world: Any, kind: str) -> None:
    """Shares of inputs add up to the whole, where a family can cut them and where it cannot."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    from uqff.integrations.vllm.config import UqffQuantizationConfig

    torch.manual_seed(7)
    weight, x, size = uqff.quantize(torch.randn(64, HIDDEN), kind), torch.randn(3, HIDDEN), 4
    total = torch.zeros(3, 64)
    for rank in range(size):
        world(rank, size)
        layer = RowParallelLinear(HIDDEN, 64, bias=False, quant_config=UqffQuantizationConfig(), prefix="down")
        layer.weight.weight_loader(layer.weight, stored(weight))
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x.chunk(size, -1)[rank].contiguous())
    torch.testing.assert_close(total, x @ weight.dequantize(torch.float32).T, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_an_error(world: Any) -> None:
    """Another shape, or a part that is missing."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    from uqff.integrations.vllm.config import UqffQuantizationConfig

    world(0, 1)
    layer = MergedColumnParallelLinear(
        HIDDEN, [64, 64], bias=False, quant_config=UqffQuantizationConfig(), prefix="gate_up"
    )
    with pytest.raises(ShapeError, match=r"expected \[64, 256\], got \[32, 256\]"):
        layer.weight.weight_loader(layer.weight, stored(uqff.quantize(torch.ones(32, HIDDEN), "q8_0")), 0)
    layer.weight.weight_loader(layer.weight, stored(uqff.quantize(torch.ones(64, HIDDEN), "q8_0")), 0)
    with pytest.raises(FormatError, match=r"expected 2 parts, got 1 \(layer gate_up\)"):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(UnsupportedError, match="changes a weight that is quantised"):
        layer.weight.weight_loader(layer.weight, stored(uqff.quantize(torch.ones(64, HIDDEN), "q8_0")).t(), 1)

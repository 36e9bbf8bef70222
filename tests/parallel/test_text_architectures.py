"""Every text architecture, from a checkpoint of `transformers`: the client's file, and transformers' logits."""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.parallel.checkpoints import Written, written_once
from tests.parallel.ranks import run_ranks
from tests.support.golden_models import GOLDEN
from tools.interop.architectures import NOT_WRITTEN, RENAMED, as_the_client
from tools.tiny import text
from tools.tiny.digests import digest
from tools.tiny.models import TinyModel
from uqff.errors import UnsupportedError
from uqff.export.dequantize import dequantize_model
from uqff.models.renaming import ModulePaths
from uqff.models.text import TEXT
from uqff.parallel import Comm, load_model
from uqff.parallel.filling import ReplicatedWarning
from uqff.parallel.transformers_model import build, expert_places, linear_roles

DOCUMENT: dict[str, Any] = json.loads((GOLDEN / "v1" / "TEXT.json").read_text())
KIND = DOCUMENT["isq"]
PROMPT = [[5, 9, 17, 30, 41, 11, 23, 3]]
CLOSE = 5e-6
"""Logits are about 1; sums are taken in other orders."""

SPLIT = ("Mixtral", "Phi-2", "Gemma 2", "StarCoder2", "GLM-4-MoE")
"""All of whose linear layers ranks share."""
PARTLY = ("Qwen3-Next", "Qwen3.5", "DeepSeek V2", "GLM-4", "Phi-3.5-MoE", "HunYuan MoE")
"""Of which transformers leaves some whole: linear attention, low-rank projections, gate and up in one, attention."""
WHOLE = ("Phi-3", "Granite 4", "LFM2-MoE")
"""Of which it splits none but experts. Other architectures have the roles of one of these."""

FORMS = ("Phi-2", "GLM-4-MoE", "DeepSeek V2", "Qwen3-Next", "Granite 4")
"""Biases; experts, whole and shared ones; heads of low rank; linear attention; nothing but experts."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Architecture to the directory of its checkpoint in `model` and of UQFF in `uqff`."""
    return written_once(text.has, text.write, tmp_path_factory, KIND)


def test_every_text_architecture_has_a_checkpoint() -> None:
    """A new entry of the table needs one; Gemma 3 is among those with towers; of gpt-oss the client writes nothing."""
    elsewhere = ("Gemma 3 text", "gpt-oss")
    wanted = [each.title for each in TEXT if each.title not in elsewhere]
    assert sorted(text.TEXTS) == sorted(wanted)
    assert [name for name, digests in DOCUMENT["digests"].items() if digests is None] == list(NOT_WRITTEN)


@pytest.mark.parametrize("name", [name for name in text.TEXTS if name not in NOT_WRITTEN])
def test_files_are_the_clients(name: str, written: Written, tmp_path: Path) -> None:
    """The file and the residual, less the bias that the client drops and under the names that it gives."""
    folder = written(name) / "uqff"
    file = as_the_client(name, folder / f"{KIND}-0.uqff", tmp_path)
    residual = folder / "residual.safetensors"
    if name in RENAMED:
        residual = _renamed(residual, tmp_path / residual.name, *RENAMED[name])
    wanted = DOCUMENT["digests"][name]
    assert {"q8_0-0.uqff": digest(file), "residual.safetensors": digest(residual)} == wanted


def _renamed(path: Path, made: Path, own: str, other: str) -> Path:
    from safetensors.numpy import load_file, save_file

    tensors = {name.replace(own, other): values for name, values in load_file(path).items()}
    save_file(tensors, made, {"renamed": own})  # which the digest leaves out
    return made


STACKS = int(metadata.version("transformers").partition(".")[0]) >= 5
REASON = "experts of transformers 4 are not run"
MIXTURES = (
    "Mixtral",
    "Phi-3.5-MoE",
    "Qwen3-Next",
    "GLM-4-MoE",
    "Granite 4",
    "DeepSeek V2",
    "DeepSeek V3",
    "HunYuan MoE",
)


@pytest.mark.parametrize("name", text.TEXTS)
def test_logits_are_those_of_the_dequantised_checkpoint(name: str, written: Written, tmp_path: Path) -> None:
    """As transformers computes them; so are those of a checkpoint that is quantised while it is loaded."""
    if name in MIXTURES and not STACKS:
        pytest.skip(REASON)
    from transformers import AutoModelForCausalLM

    folder = written(name)
    dequantize_model(folder / "uqff", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    ids = torch.tensor(PROMPT)
    with torch.inference_mode():
        wanted = plain(input_ids=ids).logits
        assert wanted.abs().max() > 0.1
        for source, options in ((folder / "uqff", {}), (folder / "model", {"isq": KIND})):
            got = load_model(source, dtype=torch.float32, **options)(input_ids=ids).logits
            assert (got - wanted).abs().max() <= CLOSE, source


def on_ranks(comm: Comm, directories: dict[str, str]) -> dict[str, tuple[Any, list[str]]]:
    """Logits, and what is told of layers that are whole."""
    made = {}
    for name, directory in directories.items():
        with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
            warnings.simplefilter("always", ReplicatedWarning)
            model = load_model(directory, comm)
            told = [str(each.message) for each in caught if issubclass(each.category, ReplicatedWarning)]
            made[name] = model(input_ids=torch.tensor(PROMPT)).logits.numpy(), told
    return made


def _logits_of_a_tied_head(comm: Comm, directory: Path) -> list[list[float]]:
    with torch.inference_mode():
        logits: list[list[float]] = load_model(directory, comm)(input_ids=torch.tensor(PROMPT)).logits[0].tolist()
    return logits


def test_a_tied_head_keeps_its_bias(tmp_path: Path) -> None:
    """Its rows are the embedding's, its bias is its own: on one rank, and where the vocabulary is cut among two."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=96, tie_word_embeddings=True, **sizes)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(PROMPT)).logits[0]
    for got in (_logits_of_a_tied_head(Comm(), tmp_path), *run_ranks(2, _logits_of_a_tied_head, tmp_path)):
        assert float((torch.tensor(got) - expected).abs().max()) <= CLOSE


def test_experts_that_transformers_4_has_otherwise() -> None:
    """Of Granite 4, each projection is a module of its own, which would stay plain: refused."""
    stack: Any = torch.nn.Module()
    stack.num_experts, stack.weight = 4, torch.nn.Parameter(torch.zeros(4, 2, 3))
    model: Any = torch.nn.Module()
    model.config, model.mlp = SimpleNamespace(model_type="granitemoehybrid"), torch.nn.Module()
    model.mlp.input_linear = stack
    with pytest.raises(UnsupportedError, match="experts of this form cannot be run") as caught:
        expert_places(model)
    assert caught.value.layer == "mlp.input_linear"
    stack.weight = torch.nn.Parameter(torch.zeros(4, 3))
    assert expert_places(model) == []


@pytest.mark.skipif(not STACKS, reason=REASON)
def test_roles() -> None:
    """Which architectures have layers that nothing says how to split, whatever their sizes."""
    names = [name for name in (*SPLIT, *PARTLY, *WHOLE) if text.has(name)]
    told = set()
    for name in names:
        made = text.TEXTS[name]
        config = made.config() | {"architectures": [made.architecture], "model_type": made.model_type}
        model, paths = build(config, torch.float32), ModulePaths(config)
        roles = linear_roles(model, 2)
        assert roles == linear_roles(model), name  # all sizes divide
        if any(role == "whole" and paths.declares(path) for path, role in roles.items()):
            told.add(name)
    assert told == {*names} - {*SPLIT}


UNEVEN = "model.layers.0.{} and {} more: whole on every rank, because heads or widths do not divide by 2"


@pytest.mark.skipif(not STACKS, reason=REASON)
def test_two_ranks_agree_with_one(written: Written, tmp_path: Path) -> None:
    """One architecture of each form; layers that ranks cannot share are whole on both, and that is told."""
    names = [name for name in FORMS if text.has(name)]
    directories = {name: str(written(name) / "uqff") for name in names}
    uneven = {
        "heads": TinyModel(hidden_size=96, heads=3, kv_heads=3, layers=2),
        "width": TinyModel(hidden_size=96, heads=4, kv_heads=2, intermediate_size=99, layers=2),
    }
    for name, model in uneven.items():
        model.write(tmp_path / name)
        directories[name] = str(tmp_path / name)
    first, second = run_ranks(2, on_ranks, directories, timeout=60)
    for name, directory in directories.items():
        with torch.inference_mode():
            one = load_model(directory)(input_ids=torch.tensor(PROMPT)).logits.numpy()
        assert abs(first[name][0] - one).max() <= CLOSE, name
        assert (first[name][0] == second[name][0]).all(), name
    assert {name for name in names if first[name][1]} == {*names} - {*SPLIT}
    assert first["heads"][1] == [UNEVEN.format("self_attn.q_proj", 7)]
    assert first["width"][1] == [UNEVEN.format("mlp.gate_proj", 5)]

"""load_model of checkpoints that are no UQFF: the weights of the files, on one rank and on several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.parallel.checkpoints import Form, write_checkpoint
from tests.parallel.models import PROMPT, TinyCase, fused_experts
from tests.parallel.ranks import rank_of, run_ranks
from tests.parallel.sources import MATRICES, ternary
from tests.parallel.test_model import check_numbers, outcome
from tests.support.checkpoints import write_checkpoint as write_files
from uqff import FormatError, MissingError, ShapeError
from uqff.cli import main
from uqff.parallel import Comm, FusedExperts, PackedExperts, load_model
from uqff.parallel.generate import generate
from uqff.parallel.layer import QuantizedLayer

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

BOUND = 2e-5
"""Of logits between 1 and 10, as in test_model.py."""

V = (1, 2, 0)
CASES: dict[str, tuple[TinyCase, Form]] = {
    "llama": (TinyCase("llama", "unquant", V), "single"),
    "mistral-tied": (TinyCase("mistral", "unquant", V, tied=True, kv_heads=1), "single"),
    "qwen2": (TinyCase("qwen2", "unquant", V), "single"),
    "qwen3": (TinyCase("qwen3", "unquant", V, kv_heads=8), "single"),
    "experts-single": (TinyCase("qwen3_moe", "unquant", V), "single"),
    "experts-outputs": (TinyCase("qwen3_moe", "unquant", V), "outputs first"),
    "experts-inputs": (TinyCase("qwen3_moe", "unquant", V, tied=True), "inputs first"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.nn.Module]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: (folder / name, write_checkpoint(case, folder / name, form)[1]) for name, (case, form) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_one_rank_has_the_weights_of_the_files(written: dict[str, tuple[Path, torch.nn.Module]], name: str) -> None:
    """Every weight and bias, bit for bit; the head of a tied model is its embedding, whatever else is in the file."""
    directory, plain = written[name]
    model = load_model(directory)
    check_numbers(model, plain)
    forms = {type(module) for module in model.modules()} & {PackedExperts, FusedExperts}
    assert forms == ({"experts-single": {PackedExperts}}.get(name, {FusedExperts}) if "experts" in name else set())
    with torch.inference_mode():
        expected = plain(torch.tensor([PROMPT])).logits[0]
        assert float((outcome(Comm(), directory)[0] - expected).abs().max()) <= BOUND


@pytest.mark.parametrize("source", [each for each in MATRICES if each != "plain"])
def test_models_that_others_have_quantised(tmp_path: Path, source: str) -> None:
    """Every weight has the numbers that its source gives it; a rank holds the slice, or all of what cannot be cut."""
    case = TinyCase("qwen3_moe", "unquant", V)
    tensors, model = write_checkpoint(case, tmp_path / "plain")
    matrices = [name for name in tensors if name.endswith("_proj.weight")]
    matrices += ["model.embed_tokens.weight"] if source == "mlx" else []
    numbers = tensors | {name: ternary(*tensors[name].shape, seed=at) for at, name in enumerate(matrices)}
    made: dict[str, torch.Tensor] = {name: each for name, each in tensors.items() if name not in matrices}
    quantization: dict[str, object] = {}
    for name in matrices:
        stored, quantization = MATRICES[source](name.removesuffix(".weight"), numbers[name])
        made |= stored
    write_files(tmp_path / "made", made, **case.config(), quantization_config=quantization)
    model.load_state_dict(
        fused_experts(numbers) if any(name.endswith("gate_up_proj") for name in model.state_dict()) else numbers
    )
    whole = load_model(tmp_path / "made")
    check_numbers(whole, model)
    held = {name: each for name, each in whole.named_modules() if isinstance(each, QuantizedLayer)}
    for name, layer in load_model(tmp_path / "made", rank_of(1, 2)).named_modules():
        if isinstance(layer, QuantizedLayer):
            assert layer.weight == held[name].weight.narrow(*layer.cut), name
            assert layer.weight.kind == held[name].weight.kind


def on_ranks(comm: Comm, directories: dict[str, Path]) -> dict[str, object]:
    """Logits of each."""
    return {name: outcome(comm, directory)[0].numpy() for name, directory in directories.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one(written: dict[str, tuple[Path, torch.nn.Module]], world_size: int) -> None:
    """The same logits on ranks, of which each reads its slice."""
    results = run_ranks(world_size, on_ranks, {name: directory for name, (directory, _) in written.items()}, timeout=60)
    for name, logits in results[0].items():
        with torch.inference_mode():
            expected = written[name][1](torch.tensor([PROMPT])).logits[0]
        assert float((torch.from_numpy(logits) - expected).abs().max()) <= BOUND, name


def test_run_reads_a_checkpoint(written: dict[str, tuple[Path, torch.nn.Module]]) -> None:
    """``uqff run`` of a checkpoint gives the tokens of the model."""
    directory, plain = written["qwen2"]
    said = CliRunner().invoke(main, ["run", str(directory), "--prompt", "t5 t9", "--tokens", "1", "--json"])
    assert said.exit_code == 0, said.output
    with torch.inference_mode():
        best = int(plain(torch.tensor([[5, 9]])).logits[0, -1].argmax())
    assert json.loads(said.stdout)["ids"] == [best]
    asked = ["run", str(directory), "--prompt", "t5 t9", "--tokens", "4", "--json", "--isq"]
    said = CliRunner().invoke(main, [*asked, "q2k", "--workers", "2"])
    assert said.exit_code == 0, said.output
    expected, other = (generate(load_model(directory, isq=kind), [5, 9], 4, stop=[2]).ids for kind in ("q2k", None))
    assert json.loads(said.stdout)["ids"] == expected != other
    assert CliRunner().invoke(main, [*asked, "q9"]).exit_code != 0


def test_what_does_not_fit_is_refused(written: dict[str, tuple[Path, torch.nn.Module]], tmp_path: Path) -> None:
    """A weight that is missing, one too many, one of another shape, and a directory without configuration."""
    tensors = load_file(written["qwen2"][0] / "model.safetensors")
    config = (written["qwen2"][0] / "config.json").read_text()
    name = "model.layers.1.mlp.up_proj.weight"

    def changed(folder: str, **changes: torch.Tensor | None) -> Path:
        directory = tmp_path / folder
        directory.mkdir()
        (directory / "config.json").write_text(config)
        left = {key: each for key, each in (tensors | changes).items() if each is not None}
        save_file(left, directory / "model.safetensors")
        return directory

    with pytest.raises(MissingError, match=r"no such layer.*model.layers.1.mlp.up_proj"):
        load_model(changed("missing", **{name: None}))
    with pytest.raises(FormatError, match=r"layer has no place in the model.*model.layers.2.mlp.up_proj"):
        load_model(changed("more", **{"model.layers.2.mlp.up_proj.weight": tensors[name].clone()}))
    with pytest.raises(ShapeError, match=r"layer does not fit the configuration: expected .512, 256., got .256, 512."):
        load_model(changed("turned", **{name: tensors[name].T.contiguous()}))
    bare = changed("bare")
    (bare / "config.json").unlink()
    with pytest.raises(FormatError, match="no configuration beside the model"):
        load_model(bare)

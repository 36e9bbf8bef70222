"""uqff.integrations.transformers: what transformers loads has our layers, and to the bit their logits."""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import uqff
import uqff.integrations.transformers as integration
from tests.parallel.models import PROMPT, TinyCase, single_experts, write
from tests.parallel.ranks import run_ranks
from tests.support.small_models import files_of
from tools.tiny import text
from uqff.errors import UnsupportedError
from uqff.integrations.saving import save_pretrained
from uqff.integrations.transformers import READS_SINCE, UqffConfig
from uqff.integrations.whole import IDLE_KEY
from uqff.parallel.comm import Comm
from uqff.parallel.filling import STORED_KEY
from uqff.parallel.layer import QuantizedLayer
from uqff.quantization.run import quantize_model

MAJOR = int(transformers.__version__.partition(".")[0])
reads = pytest.mark.skipif(
    MAJOR < READS_SINCE, reason="transformers before 5 looks for weights before it asks a method of quantisation"
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning"
)  # of torch, on import of its compiler

V0, V1_1, V1_2 = (0, 2, 0), (1, 1, 0), (1, 2, 0)
CASES = [
    TinyCase("qwen2", "afq4", V0),
    TinyCase("llama", "hqq4", V1_1, tied=True),  # the head is a layer, and the embedding is not
    TinyCase("qwen3_moe", "q4k", V1_2, tied=True, expert_inner=256, dtype=torch.bfloat16),
]


def loaded(directory: Path, **options: Any) -> Any:
    """What transformers loads; it says nothing of weights that it misses, or has not used."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def same_logits(model: Any, other: Any) -> bool:
    """Whether two models say the same of the prompt, to the bit."""
    ids = torch.tensor([PROMPT], device=model.device)
    with torch.inference_mode():
        return torch.equal(model(ids).logits, other(ids).logits)


@reads
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_directory_of_uqff_gives_the_logits_of_load_model(case: TinyCase, tmp_path: Path) -> None:
    """Of either generation, whatever is a layer; with the key of config.json, or with the argument."""
    directory, _ = write(case, tmp_path)
    expected = uqff.load_model(directory, dtype=case.dtype)
    model = loaded(directory, dtype=case.dtype, quantization_config=UqffConfig())
    assert same_logits(model, expected)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "uqff"}}))
    model = loaded(directory, dtype=case.dtype)
    assert same_logits(model, expected)
    assert sum(isinstance(module, QuantizedLayer) for module in model.modules()) == sum(
        isinstance(module, QuantizedLayer) for module in expected.modules()
    )
    model.save_pretrained(tmp_path / "saved")
    assert same_logits(uqff.load_model(tmp_path / "saved"), expected)
    assert uqff.verify(tmp_path / "saved").clean
    if case.version == V1_2:
        with uqff.open(directory) as file, uqff.open(tmp_path / "saved") as saved:
            assert {key: saved[key].weight for key in saved} == {key: file[key].weight for key in file}
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        assert ids[0, len(PROMPT)] == expected(torch.tensor([PROMPT])).logits[0, -1].argmax()


def test_what_saving_does_not_know_is_refused(tmp_path: Path) -> None:
    """Options of transformers' own save_pretrained."""
    with pytest.raises(UnsupportedError, match="options that saving UQFF does not know: got push_to_hub"):
        save_pretrained(None, tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


@reads
def test_a_save_in_several_files(tmp_path: Path) -> None:
    """By the options that transformers has for it, and gives itself when it pushes a model."""
    directory, _ = write(TinyCase("llama", "q8_0", V1_2), tmp_path)
    model = loaded(directory, quantization_config=UqffConfig())
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB", safe_serialization=True, save_peft_format=True)
    names = {path.name for path in (tmp_path / "saved").glob("*.uqff")}
    assert names == {f"q8_0-{number}.uqff" for number in range(len(names))}
    assert len(names) > 2
    assert same_logits(loaded(tmp_path / "saved"), model)
    for size in ("20 kilo", "0", -1, "GB"):
        with pytest.raises(UnsupportedError, match="no such size"):
            model.save_pretrained(tmp_path / "other", max_shard_size=size)
    model.save_pretrained(tmp_path / "saved", max_shard_size=10**9)
    assert [path.name for path in (tmp_path / "saved").glob("*.uqff")] == ["q8_0-0.uqff"]


@reads
@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_class_without_the_head_is_refused(name: str, tmp_path: Path) -> None:
    """It has no place for the head that is in the file, and weights of its own that are not."""
    directory, _ = write(TinyCase("llama", "q8_0", V1_2), tmp_path)
    with pytest.raises(UnsupportedError, match=r"with its head: expected AutoModelForCausalLM or .*, got Llama"):
        getattr(transformers, name).from_pretrained(directory, quantization_config=UqffConfig())


@reads
def test_layers_that_transformers_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Gemma 3n, keys that a block takes from another: no file without them is one that the engine loads.

    Those of a file are kept, quantised or not; a checkpoint's are not quantised, and such a model not saved.
    """
    directory, _ = write(TinyCase("llama", "q8_0", V1_2), tmp_path)
    idle = {f"model.layers.9.self_attn.{name}" for name in ("k_proj", "k_norm")}
    (tmp_path / "more").mkdir()
    with uqff.open(directory) as file:
        extra = {"model.layers.9.self_attn.k_proj": uqff.Layer(uqff.quantize(torch.ones(32, 64), "q4_0"))}
        uqff.save({**dict(file.items()), **extra}, tmp_path / "more" / "q8_0-0.uqff", version=(1, 2, 0))
        rest = {name: tensor.clone() for name, tensor in file.residual.items()}
    save_file(rest | {"model.layers.9.self_attn.k_norm.weight": torch.ones(16)}, tmp_path / "more/residual.safetensors")
    (tmp_path / "more" / "config.json").write_bytes((directory / "config.json").read_bytes())
    for module in ("uqff.integrations.saving", "uqff.models.renaming"):
        monkeypatch.setattr(f"{module}.idle_paths", lambda config: idle)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more", quantization_config=UqffConfig())
    model.save_pretrained(tmp_path / "saved")
    with uqff.open(tmp_path / "more") as before, uqff.open(tmp_path / "saved") as after:
        assert {key: after[key].weight for key in after} == {key: before[key].weight for key in before}
        assert set(after.residual) == set(before.residual) > set(rest)
    assert same_logits(uqff.load_model(tmp_path / "saved"), model)
    delattr(model, IDLE_KEY)  # as of one that was quantised while it was loaded
    with pytest.raises(UnsupportedError, match=r"leaves out layers .* loaded from UQFF, .* got 2 left out") as caught:
        model.save_pretrained(tmp_path / "never")
    assert caught.value.layer == "model.layers.9.self_attn.k_norm"
    assert not (tmp_path / "never").exists()


@reads
def test_an_architecture_that_is_unknown_is_said_to_be(tmp_path: Path) -> None:
    """One without a head by the name that is known, of which a class with a head could not be told."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"unknown architecture: .* got \['RwkvForCausalLM'\]"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=UqffConfig("q8_0"))


def test_what_other_methods_are_told_is_not_ignored(tmp_path: Path) -> None:
    """A list of modules that stay plain would else be taken, and all be quantised; a recipe does what it asks."""
    with pytest.raises(UnsupportedError, match="a recipe says which layers stay as they are: expected its file"):
        UqffConfig("q8_0", modules_to_not_convert=["lm_head"])
    assert UqffConfig("q8_0", modules_to_not_convert=None, more=1).to_dict() == {
        "quant_method": "uqff",
        "isq": "q8_0",
        "modules_to_not_convert": None,
        "more": 1,
    }
    directory = checkpoint(tmp_path, "llama")
    (tmp_path / "recipe.yaml").write_text('"/layers/":\n  isq: Q8_0\n')
    config = UqffConfig(str(tmp_path / "recipe.yaml"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    kinds = {model.lm_head.rows.weight.kind, model.model.layers[0].mlp.up_proj.weight.kind}
    assert kinds == {"unquant", "q8_0"}


def checkpoint(folder: Path, architecture: str) -> Path:
    """A plain checkpoint."""
    directory, model = write(TinyCase(architecture, "unquant", V1_2, expert_inner=256), folder)
    for name in ("0-0.uqff", "residual.safetensors"):
        (directory / name).unlink()
    tensors = single_experts({name: each.contiguous() for name, each in model.state_dict().items()})
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_checkpoint_is_quantised_while_it_is_loaded(architecture: str, tmp_path: Path) -> None:
    """As by load_model; the plain weights are not loaded by transformers too."""
    directory = checkpoint(tmp_path, architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=UqffConfig("q4k"))
    assert same_logits(model, uqff.load_model(directory, isq="q4k"))
    assert model.model.layers[0].self_attn.q_proj.weight.kind == "q4k"
    assert model.config.quantization_config.to_dict() == {"quant_method": "uqff", "isq": "q4k"}


def test_a_save_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last step all of the old directory is there; then the new one, with what was not the old model's."""
    directory = checkpoint(tmp_path, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=UqffConfig("q4k"))
    saved = tmp_path / "new" / "saved"
    model.save_pretrained(saved)
    first = files_of(saved)
    assert {"config.json", "generation_config.json", "residual.safetensors", "uqff_report.json"} < set(first)
    beside = {"tokenizer.json": b"{}", "README.md": b"# x"}
    (saved / "sub").mkdir()
    (saved / "sub" / "a").write_bytes(b"x")
    for name, data in (beside | {"afq4-0.uqff": b"old", "SHA256SUMS": b"old"}).items():
        (saved / name).write_bytes(data)

    def shown() -> dict[str, bytes]:
        return {
            str(path.relative_to(tmp_path)): path.read_bytes() for path in saved.parent.rglob("*") if path.is_file()
        }

    before = shown()

    def fails(*args: object, **options: object) -> None:
        assert {name: data for name, data in shown().items() if ".tmp-" not in name} == before
        raise OSError(28, "No space left on device")

    for last in ("save", "report"):
        with monkeypatch.context() as patched:
            patched.setattr(f"uqff.integrations.saving.{last}", fails)
            with pytest.raises(OSError, match="No space left"):
                model.save_pretrained(saved)
        assert shown() == before
    model.save_pretrained(saved)
    expected = {f"new/saved/{name}": data for name, data in (first | beside | {"sub/a": b"x"}).items()}
    assert shown() == expected
    monkeypatch.chdir(saved)
    with pytest.raises(UnsupportedError, match="the current directory cannot be replaced"):
        model.save_pretrained(".")


@pytest.mark.skipif(MAJOR >= READS_SINCE, reason="transformers from 5 on reads directories of UQFF")
def test_a_transformers_that_cannot_read_uqff_says_so(tmp_path: Path) -> None:
    """Before it looks for weights in vain."""
    directory, _ = write(CASES[0], tmp_path)
    with pytest.raises(UnsupportedError, match=rf"expected transformers {READS_SINCE} or later"):
        transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=UqffConfig())


def test_device_maps(tmp_path: Path) -> None:
    """Of CPUs in every form; what would leave layers out is refused before anything is read."""
    pytest.importorskip("accelerate")
    directory = checkpoint(tmp_path, "llama")
    expected = uqff.load_model(directory, isq="q4k")

    def mapped(device_map: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=UqffConfig("q4k"), device_map=device_map
        )

    whole: list[Any] = ["cpu", {"model": "cpu", "lm_head": torch.device("cpu")}]
    whole += [] if torch.cuda.is_available() else ["auto"]  # on a GPU, sums have another order
    for device_map in whole:
        assert same_logits(mapped(device_map), expected)
    left_out: list[Any] = ["meta", torch.device("meta"), {"model": "cpu", "lm_head": "meta"}]
    for device_map in left_out:
        with pytest.raises(UnsupportedError, match=r"read, not left out: got meta \(field device_map\)"):
            mapped(device_map)


def _shared(comm: Comm, directory: Path) -> tuple[bool, list[int], bytes]:
    """Of a rank: whether the logits are those of load_model on the same ranks, its share of a layer, and the logits."""
    os.environ.update(RANK=str(comm.rank), LOCAL_RANK=str(comm.rank), WORLD_SIZE=str(comm.world_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases call the option by another name
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto")
    ids = torch.tensor([PROMPT], device=model.device)
    with torch.inference_mode():
        logits = model(ids).logits.cpu()
    shape = model.model.layers[0].self_attn.q_proj.weight.shape
    same = same_logits(model, uqff.load_model(directory, comm, device=model.device))
    return same, list(shape), logits.numpy().tobytes()


@reads
def test_ranks_of_tp_plan_auto_have_their_shares(tmp_path: Path) -> None:
    """Two of gloo: half of a layer each, and the logits of load_model on two ranks, to the bit."""
    directory, _ = write(TinyCase("llama", "q8_0", V1_2), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "uqff"}}))
    whole: Any = uqff.load_model(directory)
    out, columns = whole.model.layers[0].self_attn.q_proj.weight.shape
    (same, shape, logits), (same_, shape_, logits_) = run_ranks(2, _shared, directory, timeout=60)
    assert same
    assert same_
    assert shape == shape_ == [out // 2, columns]
    assert logits == logits_


def test_layers_do_not_stay_on_disk(tmp_path: Path) -> None:
    """They are mapped there anyhow; transformers would look for weights that it could offload."""
    directory = checkpoint(tmp_path, "llama")
    with pytest.raises(
        UnsupportedError, match=r"layers of UQFF are mapped, not offloaded: got disk \(field device_map\)"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=UqffConfig("q4k"), device_map={"model": "disk", "lm_head": "cpu"}
        )


@reads
@pytest.mark.filterwarnings("ignore:.*is falling back to its reference")
@pytest.mark.parametrize("name", ["Mixtral", "Phi-3.5-MoE", "LFM2-MoE", "Granite 4"])
def test_modules_that_checkpoints_call_otherwise(name: str, tmp_path: Path) -> None:
    """Routers that are layers of the file, that the model has to know not to be in training, or that have buffers.

    Gates and ups in one stack; and names of classes and of kinds of layers that the engine does not know.
    """
    text.write(name, tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "uqff", ["q8_0"], dtype="f32")
    expected = uqff.load_model(tmp_path / "uqff")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "uqff", dtype=torch.float32)
    assert same_logits(model, expected)
    model.save_pretrained(tmp_path / "saved")
    assert same_logits(uqff.load_model(tmp_path / "saved"), expected)
    with uqff.open(tmp_path / "uqff") as file, uqff.open(tmp_path / "saved") as saved:
        assert {key: saved[key].weight for key in saved} == {key: file[key].weight for key in file}
        assert sorted(saved.residual) == sorted(file.residual)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "saved"))
    named = {
        key: before[key] for key in ("architectures", "layer_types") if name == "Granite 4" or key != "layer_types"
    }
    assert {key: after[key] for key in named} == named
    routers = [module for module in model.modules() if hasattr(module, STORED_KEY)]
    assert bool(routers) == (name in ("Mixtral", "Granite 4"))
    for router in routers:
        router.weight = torch.nn.Parameter(router.weight * 1.5, requires_grad=False)
    model.save_pretrained(tmp_path / "saved")
    assert same_logits(uqff.load_model(tmp_path / "saved"), model)  # what is changed is saved as it is


def test_an_install_without_transformers_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On import, by the extra's name."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = Path(integration.__file__)
    spec = spec_from_file_location("without_transformers", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'uqff-format\[run\]'"):
        spec.loader.exec_module(module_from_spec(spec))

"""Plans: the assignment against all others, errors and sizes against what is made, costs against a run of the model."""

from __future__ import annotations

import itertools
import json
import shlex
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import uqff
from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import VOCABULARY, TinyCase
from tools.tiny import text
from tools.tiny.models import TinyModel
from uqff.checkpoints.checkpoint import open_checkpoint
from uqff.checkpoints.numbers import NumberFiles
from uqff.cli import main
from uqff.codes import DType, Version
from uqff.errors import FormatError, MissingError, UnsupportedError
from uqff.evaluation.evaluate import text_windows
from uqff.importance.matrix import InputSquares
from uqff.planning.assign import frontier, within_cost, within_size
from uqff.planning.candidates import Candidate, Unit, by_error, find_units, measure_errors
from uqff.planning.sizes import rank_bytes
from uqff.planning.swapping import Swapper
from uqff.planning.topology import topology
from uqff.quantization.plan import plan_model
from uqff.quantization.recipe import parse_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

IDS = [3 + (7 * at * at + at // 3) % (VOCABULARY - 3) for at in range(100)]
KINDS = ["q3k", "q4_0", "q4k", "q5k", "q8_0", "mxfp4"]
RULES: Any = {"engine": "0.9", "version": Version(1, 2, 0), "dtype": DType.F32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``dense`` and a ``sparse`` checkpoint, and a ``text``."""
    made = tmp_path_factory.mktemp("plan")
    write_checkpoint(TinyCase("llama", "q8_0", (1, 2, 0), tied=True), made / "dense")
    write_checkpoint(TinyCase("qwen3_moe", "q8_0", (1, 2, 0), expert_inner=256), made / "sparse")
    (made / "text").write_text(" ".join(f"t{each}" for each in IDS))
    return made


def test_no_assignment_is_better() -> None:
    """Of all that are no larger, none on the frontier costs more than the least; a budget loses less than a move."""
    rng = np.random.default_rng(1)
    units = []
    for name in "abc":
        sizes = rng.integers(10, 99, 5)
        costs = (1 + rng.random(5)) * 2.0 ** (-sizes / 9)
        units.append(Unit(name, [], {str(at): Candidate(str(at), int(sizes[at]), 0.0, costs[at]) for at in range(5)}))
    everything = [
        (sum(c.nbytes for c in each), sum(c.cost for c in each))
        for each in itertools.product(*(unit.candidates.values() for unit in units))
    ]
    found = frontier(units)
    assert len(found) > 4
    for each in found:
        assert each.cost == pytest.approx(min(cost for size, cost in everything if size <= each.nbytes))
    for budget in range(found[0].nbytes, found[-1].nbytes + 20):
        taken = within_size(units, budget)
        assert taken.nbytes <= budget
        assert taken.cost <= [each for each in found if each.nbytes <= budget][-1].cost
    for each in found:
        assert within_cost(units, each.cost).nbytes == each.nbytes
    with pytest.raises(UnsupportedError, match=f"no mix of types is that small: expected {found[0].nbytes} bytes"):
        within_size(units, found[0].nbytes - 1)
    with pytest.raises(UnsupportedError, match="no mix of types is that good"):
        within_cost(units, found[-1].cost / 2)


def test_a_quality_between_two_of_the_frontier() -> None:
    """The step from one to the next is all of a large unit; small ones are smaller for what it leaves of the cost."""
    large = {"a": Candidate("a", 1000, 0.0, 10.0), "b": Candidate("b", 2000, 0.0, 0.0)}
    small = {"a": Candidate("a", 10, 0.0, 1.0), "b": Candidate("b", 30, 0.0, 0.0)}
    units = [Unit("large", [], large), Unit("small", [], small)]
    assert [(each.nbytes, each.cost) for each in frontier(units)] == [(1010, 11), (1030, 10), (2030, 0)]
    assert [within_cost(units, cost).nbytes for cost in (0, 0.9, 1, 9.9, 10, 11)] == [
        2030,
        2030,
        2010,
        2010,
        1030,
        1010,
    ]


def test_topology_selects_what_it_says() -> None:
    """Whole names only, dots and quotes are no patterns, one rule for the blocks of a projection."""
    kinds = {"model.layers.0.mlp.up_proj": "q4k", "model.layers.10.mlp.up_proj": "q4k", "lm_head": "q6k"}
    blocks = topology({f"transformer.h.{at}.{name}": "q4k" for at in range(130) for name in ("c_fc", "c_proj")})
    assert len(parse_recipe(blocks).rules) == 2, "a recipe has few selectors, whatever the blocks are called"
    text = topology({**kinds, "model.layers.1.mlp.up_proj": "q8_0", "odd'name": "q2k"})
    assert text == (
        "'/^model\\.layers\\.(?:0|10)\\.mlp\\.up_proj\\.weight$/':\n  isq: q4k\n"
        "'/^lm_head\\.weight$/':\n  isq: q6k\n"
        "'/^model\\.layers\\.1\\.mlp\\.up_proj\\.weight$/':\n  isq: q8_0\n"
        "'/^odd''name\\.weight$/':\n  isq: q2k\n"
    )
    assert len(parse_recipe(text).rules) == 4


def test_errors_are_those_of_the_weights(folder: Path) -> None:
    """Weighted by importance, in float64, experts each by their own; only what fits is a candidate."""
    importance = uqff.calibrate(folder / "sparse", text=folder / "text", context=32)
    with open_checkpoint(folder / "sparse") as opened:
        checkpoint = NumberFiles(opened)
        goals = plan_model(checkpoint, Version(1, 2, 0), None, promote=False)
        units = find_units(checkpoint, goals, [*KINDS, "hqq4"], fixed={"lm_head": "q8_0"}, **RULES)
        measure_errors(checkpoint, units, importance, engine="0.9", dtype=DType.F32)
    by_name = {unit.goals[0].key: unit for unit in units}
    assert set(by_name["lm_head"].candidates) == {"q8_0"}
    experts = by_name["model.layers.0.mlp.experts.down_proj"]
    assert set(experts.candidates) == {"q3k", "q4_0", "q4k", "q5k", "q8_0"}, "no MXFP4, no HQQ for experts"
    tensors = load_file(folder / "sparse" / "model.safetensors")
    path = "model.layers.0.mlp.experts"
    squares = importance.of(f"{path}.down_proj", (4, 256, 256))
    assert squares is not None
    error = signal = 0.0
    for expert in range(4):
        weight = tensors[f"{path}.{expert}.down_proj.weight"]
        far = (uqff.quantize(weight, "q4_0").dequantize() - weight).double().square().sum(0).numpy()
        error += float(far @ squares[expert].astype(np.float64))
        signal += float(weight.double().square().sum(0).numpy() @ squares[expert].astype(np.float64))
    assert experts.candidates["q4_0"].error == pytest.approx(error, rel=1e-6)
    assert experts.signal == pytest.approx(signal, rel=1e-6)


def test_fixed_types(folder: Path, tmp_path: Path) -> None:
    """Any layer of a unit may be named, the head of a tied model too; what is no layer, or at odds, is refused."""
    write_checkpoint(TinyCase("qwen3_moe", "q8_0", (1, 2, 0), expert_inner=256), tmp_path / "joined", "outputs first")
    path = "model.layers.0.mlp.experts"

    def units(name: Path, fixed: dict[str, str], *, tied: bool = False) -> dict[str, list[str]]:
        with open_checkpoint(name) as opened:
            checkpoint = NumberFiles(opened)
            goals = plan_model(checkpoint, Version(1, 2, 0), None, promote=False)
            found = find_units(checkpoint, goals, ["q4k", "q8_0"], fixed=fixed, tied=tied, **RULES)
        return {unit.name: list(unit.candidates) for unit in found}

    joined = tmp_path / "joined"
    for each in ("gate_proj", "up_proj", "gate_up_proj"):
        assert units(joined, {f"{path}.{each}": "q8_0"})[f"{path}.gate_up_proj"] == ["q8_0"]
    assert units(joined, {f"{path}.gate_proj": "q4k", f"{path}.up_proj": "q4k"})[f"{path}.gate_up_proj"] == ["q4k"]
    with pytest.raises(UnsupportedError, match=r"layers that get the same type.*expected q4k, got q8_0 of"):
        units(joined, {f"{path}.gate_proj": "q4k", f"{path}.up_proj": "q8_0"})
    assert units(folder / "dense", {"lm_head": "q8_0"}, tied=True)["model.embed_tokens"] == ["q8_0"]
    with pytest.raises(UnsupportedError, match=r"no such layer: expected .*, got lm_haed \(field fixed\)"):
        units(folder / "dense", {"lm_haed": "q8_0"}, tied=True)


def test_what_is_too_small_is_said_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that no mix has stops before any layer is measured."""

    def measured(*given: Any, **more: Any) -> None:
        raise AssertionError("layers were measured")

    monkeypatch.setattr("uqff.planning.plan.measure_errors", measured)
    for target in ({"bits": 2.0}, {"nbytes": 1000}):
        with pytest.raises(UnsupportedError, match="no mix of types is that small"):
            uqff.plan_types(folder / "dense", kinds=KINDS, text=folder / "text", context=32, **target)


def test_texts_are_read_before_the_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check text that is too short stops before any layer is measured."""

    def measured(*given: Any, **more: Any) -> None:
        raise AssertionError("layers were measured")

    monkeypatch.setattr("uqff.planning.plan.measure_errors", measured)
    (tmp_path / "short").write_text("t5 t6")
    with pytest.raises(FormatError, match="short"):
        uqff.plan_types(folder / "dense", bits=6, kinds=KINDS, check=tmp_path / "short", context=32)


def test_what_stands_outside_of_blocks_counts_as_they_do_together(folder: Path) -> None:
    """Without a text nothing else says how much the head is worth, whose errors no other layer's dilute."""
    with open_checkpoint(folder / "dense") as opened:
        checkpoint = NumberFiles(opened)
        goals = plan_model(checkpoint, Version(1, 2, 0), None, promote=False)
        units = find_units(checkpoint, goals, ["q8_0"], **RULES)
    for unit in units:
        unit.signal = 4.0
        unit.candidates["q8_0"].error = 1.0
    by_error(units)
    blocks = len({unit.name.split(".")[2] for unit in units if ".layers." in unit.name})
    costs = {unit.name: unit.candidates["q8_0"].cost for unit in units}
    assert costs.pop("model.embed_tokens") == 0.25
    assert blocks > 1
    assert set(costs.values()) == {0.25 / (2 * blocks)}


def test_errors_of_a_tied_embedding(tmp_path: Path) -> None:
    """Weighted by the head's inputs where the architecture ties them, whatever ``tie_word_embeddings`` says of it."""
    model = TinyModel(hidden_size=256, intermediate_size=256, tied=True)
    model.write(tmp_path)
    means = np.random.default_rng(2).exponential(1, 256).astype(np.float32)
    matrix = uqff.Importance({"lm_head": InputSquares(means[None], np.array([1]))})
    config = model.config() | {"architectures": ["GemmaForCausalLM"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    unit = uqff.plan_types(tmp_path, bits=9, imatrix=matrix, kinds=["q8_0"]).units[0]
    assert unit.name == "model.embed_tokens"
    weight = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].float()
    far = uqff.quantize(weight, "q8_0").dequantize() - weight
    expected = float(far.square().numpy().sum(0, dtype=np.float64) @ means.astype(np.float64))
    assert unit.candidates["q8_0"].error == expected


def test_a_swap_is_the_model_with_that_layer(folder: Path) -> None:
    """The divergence of a model loaded with a recipe of one rule; afterwards the plain model is back."""
    for name, module in (
        ("dense", "model.layers.1.mlp.up_proj"),
        ("dense", "model.embed_tokens"),
        ("sparse", "model.layers.0.mlp.experts.up_proj"),
    ):
        with open_checkpoint(folder / name) as opened:
            goals = plan_model(NumberFiles(opened), Version(1, 2, 0), None, promote=True)
        goal = next(goal for goal in goals if goal.module == module)
        cut = text_windows(folder / name, None, folder / "text", context=32)
        swapper = Swapper(uqff.load_model(folder / name, dtype=torch.float32), cut, engine="0.9", dtype=torch.float32)
        with swapper.swapped(Unit(module, [goal]), "q4_0"):
            swapped = swapper.divergence().value
        assert swapper.divergence().value == 0
        recipe: Any = parse_recipe(topology({goal.name.module: "q4_0"}))
        found = uqff.evaluate(folder / name, isq=recipe, reference=folder / name, text=folder / "text", context=32)
        assert found.distances is not None
        assert swapped == pytest.approx(found.distances.kld.value, rel=1e-4)
        assert swapped > 1e-5


def test_a_plan_is_what_is_made(folder: Path, tmp_path: Path) -> None:
    """The recipe quantises to these types and these bytes, within the target; uniform sizes are those of the types."""
    made = uqff.plan_types(
        folder / "dense", bits=4.6, text=folder / "text", check=folder / "text", kinds=KINDS, context=32
    )
    made.save(tmp_path / "mix.yaml")
    result = uqff.quantize_model(folder / "dense", tmp_path / "model", [made.kind], recipe=tmp_path / "mix.yaml")
    (output,) = result.outputs
    assert {layer.module: layer.stored for layer in output.layers} == made.types
    assert made.mix is not None
    assert sum(layer.nbytes for layer in output.layers) == made.mix.nbytes <= 4.6 * made.weights / 8
    assert sum((tmp_path / "model" / name).stat().st_size for name in output.shards) == made.file_bytes
    assert len(set(made.types.values())) > 1
    alone = {point.name: point for point in made.uniform}
    sizes = {each.kind: each.nbytes for each in made.sizes}
    assert alone["q8_0"].nbytes == sizes["q8_0"]
    assert alone["q4k"].nbytes < sizes["q4k"], "the embedding is promoted where nobody chooses"
    assert made.mix.cost < min(point.cost for point in made.uniform if point.nbytes <= 4.6 * made.weights / 8)
    assert made.check is not None
    measured = uqff.evaluate(tmp_path / "model", reference=folder / "dense", text=folder / "text", context=32)
    assert measured.distances is not None
    assert made.check.distances is not None
    assert made.check.distances.kld.value == pytest.approx(measured.distances.kld.value, rel=1e-4)


def test_sizes_and_ranks(folder: Path, tmp_path: Path) -> None:
    """From headers alone: what a type takes is what it makes; on two ranks half of what blocks allow to cut."""
    made = uqff.plan_types(folder / "dense", kinds=["q8_0", "q4k"], ranks=2)
    result = uqff.quantize_model(folder / "dense", tmp_path / "model", ["q8_0", "q4k"])
    assert [each.nbytes for each in made.sizes] == [
        sum(layer.nbytes for layer in output.layers) for output in result.outputs
    ]
    whole, blocks = made.sizes
    assert whole.rank_bytes == pytest.approx(whole.nbytes / 2, rel=0.01)
    assert blocks.rank_bytes == pytest.approx(blocks.nbytes / 2, rel=0.01)
    assert made.mix is None


def test_a_model_that_is_uqff_takes_what_it_takes(folder: Path, tmp_path: Path) -> None:
    """To the byte what the plan of its checkpoint says, of both generations; types are chosen for the checkpoint."""
    uqff.quantize_model(folder / "dense", tmp_path / "new", ["q8_0", "q4k"])
    uqff.quantize_model(folder / "sparse", tmp_path / "old", "q8_0", version="0.2")
    for name, source, kinds, version in (("new", "dense", ["q4k", "q8_0"], "1.2"), ("old", "sparse", ["q8_0"], "0.2")):
        planned = uqff.plan_types(folder / source, kinds=kinds, ranks=2, version=version)
        made = uqff.plan_types(tmp_path / name, ranks=2)
        assert (made.sizes, made.weights) == (planned.sizes, planned.weights)
        residual = load_file(tmp_path / name / "residual.safetensors")
        assert made.residual_bytes == sum(each.nbytes for each in residual.values())
        with pytest.raises(UnsupportedError, match="the model is UQFF already: expected the checkpoint") as caught:
            uqff.plan_types(tmp_path / name, bits=4.5)
        assert caught.value.file == str(tmp_path / name)
        with pytest.raises(UnsupportedError, match="the model is UQFF, not a checkpoint"):
            uqff.quantize_model(tmp_path / name, tmp_path / "again", "q4k")
    for each in (tmp_path / "new:q4k", tmp_path / "new" / "q4k-0.uqff"):
        assert [size.kind for size in uqff.plan_types(each).sizes] == ["q4k"]
    (tmp_path / "old" / "config.json").unlink()
    assert uqff.plan_types(tmp_path / "old").sizes[0].nbytes == made.sizes[0].nbytes
    with pytest.raises(MissingError, match=r"no configuration, which tells .*: expected config\.json"):
        uqff.plan_types(tmp_path / "old", ranks=2)


def test_ranks_of_a_model_with_towers() -> None:
    """The heads of its language model are counted, which stand apart in its configuration."""
    layer = uqff.Layer(uqff.quantize(torch.zeros(8, 32), "q8_0"))
    for heads, parts in ((4, 2), (3, 1)):
        wide = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_attention_heads": heads}}
        assert rank_bytes("language_model.model.layers.0.self_attn.q_proj", layer, 64, wide, 2) == 64 // parts


@pytest.mark.parametrize("name", ["Mixtral", "Granite 4"])
def test_layers_that_stand_elsewhere_in_the_model(name: str, tmp_path: Path) -> None:
    """Experts and routers of files that transformers holds under other names, or in two, cost what they cost."""
    if not text.has(name):
        pytest.skip("this transformers does not have it")
    text.write(name, tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"t{each}" for each in range(40)))
    plan = uqff.plan_types(
        tmp_path / "model", bits=7, kinds=["q4_0", "q8_0"], text=tmp_path / "text", context=16, windows=1
    )
    costs = {unit.name: unit.candidates["q4_0"].cost for unit in plan.units}
    assert len(costs) == 18
    experts = [cost for module, cost in costs.items() if "block_sparse_moe" in module and "layers.0" in module]
    assert len(experts) == (4 if name == "Mixtral" else 3)
    assert min(experts) >= 0 < max(experts)


def test_a_divergence_is_that_of_the_mix_as_a_whole(folder: Path) -> None:
    """What ``kld`` bounds is measured, not predicted; the mix of a size is measured, too."""
    options: Any = {"text": folder / "text", "kinds": ["q3k", "q4_0", "q5k", "q8_0"], "context": 32}
    for name in ("dense", "sparse"):
        kld = 1e-3 if name == "dense" else 0.1  # a token that another expert gets is far off, whatever the type
        plan = uqff.plan_types(folder / name, kld=kld, **options)
        assert plan.measured is not None
        assert 0 < plan.measured.value <= kld
        recipe: Any = parse_recipe(plan.topology)
        found = uqff.evaluate(folder / name, isq=recipe, reference=folder / name, text=folder / "text", context=32)
        assert found.distances is not None
        assert plan.measured.value == pytest.approx(found.distances.kld.value, rel=1e-4)
        assert plan.measured.error == pytest.approx(found.distances.kld.error, rel=1e-3)
        assert plan.mix is not None
        sized = uqff.plan_types(folder / name, nbytes=plan.mix.nbytes, **options)
        assert sized.measured is not None
        assert sized.measured.value > 0
        assert plan.document["measured"] == plan.measured.document
    with pytest.raises(UnsupportedError, match=r"no mix of types is that good: expected [0-9.e-]+ or more, got 1e-12"):
        uqff.plan_types(folder / "dense", kld=1e-12, **options)


def test_command(folder: Path, tmp_path: Path) -> None:
    """Writes the recipe, says what to do with it, draws; targets one at a time, and a text where one is needed."""
    call = ["plan", str(folder / "dense"), "--types", "q3k,q4k,q8_0"]
    more = ["--size", "600KiB", "-o", str(tmp_path / "mix.yaml"), "--picture", str(tmp_path / "p.svg")]
    done = CliRunner().invoke(main, [*call, *more], catch_exceptions=False)
    assert f"--recipe {tmp_path / 'mix.yaml'}" in done.stdout
    assert (tmp_path / "mix.yaml").read_text().startswith("'/^model\\.embed_tokens\\.weight$/':\n  isq: ")
    assert xml.etree.ElementTree.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    told = json.loads(CliRunner().invoke(main, [*call, "--ranks", "2", "--json"], catch_exceptions=False).stdout)
    assert [each["kind"] for each in told["sizes"]] == ["q3k", "q4k", "q8_0"]
    assert told["mix"] is None
    for option in ("--out", "--picture"):
        done = CliRunner().invoke(main, [*call, option, str(tmp_path / "none.x")])
        assert (done.exit_code, f"{option} is about a mix" in done.stderr) == (2, True)
        assert not (tmp_path / "none.x").exists()
    for option, number in (("--bits", "nan"), ("--bits", "inf"), ("--kld", "nan")):
        done = CliRunner().invoke(main, [*call, option, number, "--text", str(folder / "text")])
        assert (done.exit_code, "not a target: expected a number above 0" in done.stderr) == (1, True)
    for out, picture in (("nowhere/m.yaml", "p.svg"), ("m.yaml", "nowhere/p.svg"), ("m.yaml", "m.yaml")):
        places = ["--out", str(tmp_path / out), "--picture", str(tmp_path / picture)]
        done = CliRunner().invoke(main, [*call, "--bits", "0.001", *places])
        assert "no mix of types is that small" not in done.stderr  # which the work would have shown
        assert done.exit_code != 0
    assert not (tmp_path / "m.yaml").exists()
    (tmp_path / "two words").symlink_to(folder / "dense")
    call = ["plan", str(tmp_path / "two words"), *call[2:]]
    done = CliRunner().invoke(main, [*call, "--size", "600KiB", "-o", str(tmp_path / "a b")], catch_exceptions=False)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:4] == ["uqff", "quantize", str(tmp_path / "two words"), "OUT"]
    assert words[-2:] == ["--recipe", str(tmp_path / "a b")]
    assert "one at a time" in CliRunner().invoke(main, [*call, "--bits", "4", "--kld", "1"]).stderr
    assert "divergence needs a text" in CliRunner().invoke(main, [*call, "--kld", "1"]).stderr

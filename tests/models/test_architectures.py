"""Layer index to weight: the declared order of every architecture, and configurations that lie."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.golden_models import DIRECTORIES, TinyModel
from uqff.codes import Version
from uqff.errors import FormatError, UnsupportedError
from uqff.models.architectures import (
    ARCHITECTURES,
    architecture_of,
    check_numbered,
    entry_names,
    idle_paths,
    is_tied_model,
    layer_names,
    selected_entries,
    selected_layers,
    with_stated_tie,
)
from uqff.models.patterns import Pattern
from uqff.models.renaming import ModulePaths

LAYER = "model.layers.0"
SEVEN = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def modules(name: str, **config: Any) -> list[str]:
    """The paths of a model's layers."""
    config = {"architectures": [name], "num_hidden_layers": 2, **config}
    layers = layer_names(config)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    return [layer.module for layer in layers]


def in_blocks(*blocks: list[str], prefix: str = "") -> list[str]:
    head = [f"{prefix}lm_head"]
    return head + [f"{prefix}model.layers.{i}.{path}" for i, paths in enumerate(blocks) for path in paths]


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_the_order_is_the_clients(directory: str) -> None:
    """Weight names of every golden model, tied heads included."""
    case = DIRECTORIES[directory]
    weights = [layer.weight for layer in layer_names(TinyModel(**case["model"]).config())]
    assert weights == [f"{name}.weight" for name in case["layers"]]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3"])
def test_seven_projections(name: str) -> None:
    assert modules(f"{name}ForCausalLM") == in_blocks(SEVEN, SEVEN)


def test_phi_3_fuses() -> None:
    four = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert modules("Phi3ForCausalLM") == in_blocks(four, four)


def test_mixtral_has_its_router_before_the_experts() -> None:
    block = [*SEVEN[:4], "block_sparse_moe.gate"]
    block += [f"block_sparse_moe.experts.{e}.{w}" for e in range(3) for w in ("w1", "w2", "w3")]
    assert modules("MixtralForCausalLM", num_local_experts=3) == in_blocks(block, block)


def test_qwen3_moe_mixes_dense_and_sparse_layers() -> None:
    """A layer is dense if it is listed, or not a multiple of the step."""
    sparse = SEVEN[:4] + [f"mlp.experts.{e}.{n}_proj" for e in range(2) for n in ("gate", "up", "down")]
    name = "Qwen3MoeForCausalLM"
    assert modules(name, num_experts=2) == in_blocks(sparse, sparse)
    assert modules(name, num_experts=2, mlp_only_layers=[0]) == in_blocks(SEVEN, sparse)
    assert modules(name, num_experts=2, decoder_sparse_step=2) == in_blocks(SEVEN, sparse)
    assert modules(name, num_experts=0) == in_blocks(SEVEN, SEVEN)


def test_gemma_3_with_vision_has_a_prefix_and_a_text_config() -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 1}}
    assert [layer.module for layer in layer_names(config)] == in_blocks(SEVEN, prefix="language_model.")
    assert layer_names(config)[0].weight == "language_model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "given", "tied"),
    [
        ("Llama", None, False),
        ("Llama", True, True),
        ("Qwen2", False, False),
        ("Gemma3", None, True),
        ("Gemma3", False, False),
        ("Gemma", False, True),
        ("Gemma2", None, True),
    ],
)
def test_tied_heads_are_the_embedding(name: str, given: bool | None, tied: bool) -> None:
    config = {"architectures": [f"{name}ForCausalLM"], "num_hidden_layers": 1}
    if given is not None:
        config["tie_word_embeddings"] = given
    head = layer_names(config)[0]
    assert (head.module, head.block) == ("lm_head", None)
    assert is_tied_model(config) is tied
    assert head.weight == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def test_ties_of_nested_and_unknown_configurations() -> None:
    """What is nested counts where the architecture has its numbers there; of others, what is said, and not by a 1."""
    nested = {"architectures": ["Gemma3ForConditionalGeneration"]}
    assert is_tied_model({**nested, "text_config": {}})
    assert not is_tied_model({**nested, "text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True})
    assert is_tied_model({"architectures": ["X"], "tie_word_embeddings": True})
    assert not is_tied_model({"architectures": ["X"], "tie_word_embeddings": 1})
    assert not is_tied_model({})


def test_names_of_weight_bias_and_block() -> None:
    layer = layer_names({"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 12})[-7]
    assert (layer.index, layer.block) == (78, 11)
    assert (layer.weight, layer.bias) == (f"{layer.module}.weight", "model.layers.11.self_attn.q_proj.bias")


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", ["BertModel"], [3], {}])
def test_unknown_architectures_are_refused_with_the_list(names: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"expected one of Llama, .*LFM2-MoE") as caught:
        architecture_of({"architectures": names})
    for architecture in ARCHITECTURES:
        assert architecture.title in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("Llama", {"num_hidden_layers": None}, "config.num_hidden_layers"),
        ("Llama", {"num_hidden_layers": 0}, "config.num_hidden_layers"),
        ("Llama", {"num_hidden_layers": True}, "config.num_hidden_layers"),
        ("Llama", {"num_hidden_layers": "2"}, "config.num_hidden_layers"),
        ("Llama", {"num_hidden_layers": 10**30}, "config.num_hidden_layers"),
        ("Llama", {"num_hidden_layers": 100_000}, "config.num_hidden_layers"),
        ("Mixtral", {}, "config.num_local_experts"),
        ("Mixtral", {"num_local_experts": 10**5}, "config.num_hidden_layers"),
        ("Qwen3Moe", {"num_experts": 2, "decoder_sparse_step": 0}, "config.decoder_sparse_step"),
        ("Qwen3Moe", {"num_experts": 2, "mlp_only_layers": 1}, "config.mlp_only_layers"),
    ],
)
def test_configurations_that_lie(name: str, config: dict[str, Any], field: str) -> None:
    """Refused before anything is made of the number."""
    with pytest.raises(FormatError) as caught:
        modules(f"{name}ForCausalLM", **config)
    assert caught.value.field == field


def test_layers_by_pattern() -> None:
    """Natural order for what no architecture orders; only matrices and stacks of them; weights, not biases."""
    shapes: dict[str, tuple[int, ...]] = {f"encoder.layer.{i}.dense.weight": (4, 4) for i in (10, 2, 1)}
    shapes |= {"encoder.layer.1.norm.weight": (4,), "encoder.layer.1.dense.bias": (4,), "experts.weight": (2, 4, 4)}
    found = selected_layers({}, shapes, Pattern("."))
    assert [(layer.module, layer.block) for layer in found] == [
        ("encoder.layer.1.dense", 1),
        ("encoder.layer.2.dense", 2),
        ("encoder.layer.10.dense", 10),
        ("experts", None),
    ]
    assert [layer.index for layer in found] == [0, 1, 2, 3]
    with pytest.raises(FormatError, match="no weight matches: got norm"):
        selected_layers({}, shapes, Pattern("norm"))


def test_patterns_keep_the_order_of_a_known_architecture() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    shapes = {
        f"{module}.weight": (4, 4) for module in (*modules("LlamaForCausalLM", num_hidden_layers=1), "extra.q_proj")
    }
    found = selected_layers(config, shapes, Pattern("[oq]_proj"))
    assert [layer.module for layer in found] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        "extra.q_proj",
    ]


def test_entries_of_a_tied_model() -> None:
    """From 1.2 on the embedding serves as head; before, the head is a layer and the embedding none."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "tie_word_embeddings": True}
    old = entry_names(config, (1, 1, 0))
    assert [(entry.key, entry.role) for entry in old[:2]] == [("lm_head", "head"), (f"{LAYER}.mlp.down_proj", None)]
    assert old[0].parts[0].weight == "model.embed_tokens.weight"
    assert len(old) == 8
    new = entry_names(config, (1, 2, 0))
    assert [(entry.key, entry.role) for entry in new[:1]] == [("model.embed_tokens", "embedding")]
    assert [entry.key for entry in new[1:]] == [entry.key for entry in old[1:]]


def test_entries_of_an_untied_model() -> None:
    """From 1.2 on embedding and head are layers, sorted by key."""
    config = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 1}
    assert [entry.key for entry in entry_names(config, (1, 2, 0))][:3] == [
        "lm_head",
        "model.embed_tokens",
        f"{LAYER}.mlp.down_proj",
    ]


def test_entries_of_experts_are_stacked() -> None:
    """Mixtral's w1, w2, w3 are gate, down and up of 1.x, each with a part for every expert in order."""
    config = {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1, "num_local_experts": 3}
    stacked = {entry.key: entry for entry in entry_names(config, (1, 2, 0)) if entry.is_stacked}
    moe = f"{LAYER}.block_sparse_moe.experts"
    assert {key: [part.module for part in entry.parts] for key, entry in stacked.items()} == {
        f"{moe}.{path}_proj": [f"{moe}.{expert}.{name}" for expert in range(3)]
        for path, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }


def test_a_tie_is_stated_where_it_is_implied() -> None:
    """Gemma and Gemma 2 are tied whatever they say; the engine believes what is said, and that nothing means no."""
    for name in ("GemmaForCausalLM", "Gemma2ForCausalLM"):
        config = {"architectures": [name], "hidden_size": 2}
        assert with_stated_tie(config) == config | {"tie_word_embeddings": True}
        assert with_stated_tie(config | {"tie_word_embeddings": False}) == config | {"tie_word_embeddings": True}
        assert with_stated_tie(config | {"tie_word_embeddings": True}) is None
    for name in ("LlamaForCausalLM", "Gemma3ForCausalLM"):
        assert with_stated_tie({"architectures": [name]}) is None


def test_entries_by_pattern() -> None:
    """A stack by its own name or any of its parts'; a head that is none is not taken for a matrix of its own."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "tie_word_embeddings": True,
    }
    names = layer_names(config)
    shapes = {name.weight: (4, 4) for name in names} | {"lm_head.weight": (4, 4), "z.weight": (2, 2), "n.weight": (2,)}
    experts = "model.layers.0.block_sparse_moe.experts"
    for pattern, keys in [
        (r"experts\.gate_proj", [f"{experts}.gate_proj"]),
        (r"experts\.1\.w1", [f"{experts}.gate_proj"]),
        (r"lm_head|embed|^[zn]\.", ["model.embed_tokens", "z"]),
    ]:
        chosen = selected_entries(config, shapes, Pattern(pattern), (1, 2, 0))
        assert [entry.key for entry in chosen] == keys
    (entry,) = selected_entries({}, shapes, Pattern("^z"), (1, 2, 0))
    assert (entry.key, entry.role, entry.parts[0].weight) == ("z", None, "z.weight")
    with pytest.raises(FormatError, match="no weight matches"):
        selected_entries(config, shapes, Pattern("^n"), (1, 2, 0))


def test_how_much_a_configuration_may_announce() -> None:
    """Its numbers cost no byte, and each layer is looked for; what is left out of the experts is found at once."""
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 2, "mlp_only_layers": [*range(1999), "x", []]}
    assert len(layer_names({**config, "num_hidden_layers": 2000})) == 1 + 1999 * 7 + 4 + 2 * 3
    with pytest.raises(FormatError, match="not a count: expected a number from 1 to 2000, got 2001") as caught:
        layer_names({**config, "num_hidden_layers": 2001})
    assert caught.value.field == "config.num_hidden_layers"


def test_architectures_without_pre_1_0_files_have_no_numbers() -> None:
    """Numbers would be made up; of Qwen3-Next, which has both, older files lack what was not quantised then."""
    config = {"architectures": ["Lfm2ForCausalLM"], "num_hidden_layers": 1}
    with pytest.raises(UnsupportedError, match=r"have no numbers: expected version 1\.0 or later, got LFM2"):
        check_numbered(config)
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "num_experts": 1,
    }
    check_numbered(config)
    shared = [f"mlp.{part}.{n}_proj" for part in ("experts.0", "shared_expert") for n in ("gate", "up", "down")]
    assert [name.module for name in layer_names(config)[1:]] == [
        *(f"model.layers.0.{path}" for path in ("linear_attn.out_proj", *shared)),
        *(f"model.layers.1.{path}" for path in (*SEVEN[:4], *shared)),
    ]
    keys = [entry.key for entry in entry_names(config, (1, 2, 0))]
    assert [key for key in keys if "linear_attn" in key] == [
        f"model.layers.0.linear_attn.{name}" for name in ("in_proj_ba", "in_proj_qkvz", "out_proj")
    ]


def test_low_rank_queries_and_shared_experts_as_the_configuration_says() -> None:
    """DeepSeek: one projection or two, dense layers first, shared experts if there are any."""
    config = {"num_hidden_layers": 2, "n_routed_experts": 1, "first_k_dense_replace": 1}
    latent = [f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    experts = [f"mlp.experts.0.{n}_proj" for n in ("gate", "up", "down")]
    shared = [f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")]
    name = "DeepseekV3ForCausalLM"
    plain = in_blocks(["self_attn.q_proj", *latent, *SEVEN[4:]], ["self_attn.q_proj", *latent, *experts])
    assert modules(name, **config) == plain
    low = ["self_attn.q_a_proj", "self_attn.q_b_proj", *latent]
    wanted = in_blocks([*low, *SEVEN[4:]], [*low, *experts, *shared])
    assert modules(name, **config, q_lora_rank=8, n_shared_experts=1) == wanted


def test_gpt_oss_stacks_gates_and_ups() -> None:
    """Of pre-1.0 files the engine had another order, without experts."""
    config = {"architectures": ["GptOssForCausalLM"], "num_hidden_layers": 2}
    block = [*SEVEN[:4], "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert modules("GptOssForCausalLM") == in_blocks(block, block)
    assert architecture_of(config).takes_turns
    assert not architecture_of({"architectures": ["Qwen3MoeForCausalLM"]}).takes_turns
    with pytest.raises(UnsupportedError, match=r"have no numbers.*got gpt-oss"):
        check_numbered(config)


def test_the_tower_of_phi_3_v_is_that_of_the_engine() -> None:
    """24 blocks, whatever the configuration says; names as in a file of 0.9.5 with two decoder layers."""
    config = {"architectures": ["Phi3VForCausalLM"], "num_hidden_layers": 2, "img_processor": {"image_dim_out": 1024}}
    keys = [entry.key for entry in entry_names(config, (1, 2, 0))]
    vision = "model.vision_embed_tokens"
    of_tower = [key for key in keys if key.startswith(vision)]
    assert keys == sorted(keys)
    assert (len(keys), len(of_tower)) == (156, 24 * 6 + 2)
    assert f"{vision}.img_processor.vision_model.encoder.layers.23.self_attn.out_proj" in of_tower
    assert of_tower[-2:] == [f"{vision}.img_projection.0", f"{vision}.img_projection.2"]
    assert "model.layers.1.mlp.gate_up_proj" in keys
    paths = ModulePaths(config)
    assert not paths.is_of_text(f"{vision}.glb_GN")
    assert paths.is_of_text("model.layers.1.mlp.gate_up_proj")


def test_gemma_3n_has_projections_of_streams_and_keys_that_nothing_reads() -> None:
    """One projection fewer than streams each way; a layer that takes another's keys still has its own in files."""
    text = {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "altup_num_inputs": 3}
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "text_config": text,
        "audio_config": {"conf_num_hidden_layers": 0},
    }
    keys = {entry.key for entry in entry_names(config, Version(1, 2, 0))}
    decoder = "model.language_model"
    both = {f"{decoder}.altup_{way}projections.{stream}" for way in ("", "unembed_") for stream in (0, 1)}
    assert {key for key in keys if "altup" in key} == both
    assert f"{decoder}.layers.2.self_attn.k_proj" in keys
    shared = {f"{decoder}.layers.2.self_attn.{name}" for name in ("k_proj", "v_proj", "k_norm")}
    assert idle_paths(config) == shared
    with pytest.raises(FormatError, match="not a count"):
        entry_names({**config, "text_config": {**text, "altup_num_inputs": 0}}, Version(1, 2, 0))


@pytest.mark.parametrize("kind", ["full_attention", "indexed_attention", "qwen_sparse_attention"])
def test_words_of_transformers_for_the_attention_of_qwen4_exp(kind: str) -> None:
    """What `save_pretrained` calls it depends on the release; the layers are the same."""
    text = {"layer_types": ["linear_attention", kind], "num_hidden_layers": 2, "num_experts": 2}
    config = {"architectures": ["Qwen4ExpForConditionalGeneration"], "text_config": text}
    keys = [entry.key for entry in entry_names(config, (1, 2, 0))]
    assert "model.language_model.layers.0.linear_attn.out_proj" in keys
    assert "model.language_model.layers.1.self_attn.o_proj" in keys
    assert "model.language_model.layers.1.linear_attn.out_proj" not in keys

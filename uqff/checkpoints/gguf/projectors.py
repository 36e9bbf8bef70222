"""Which tensor of an ``mmproj`` file is which weight of a model: towers that see, and what leads from them to the text.

::

    mmproj                    model
    v.patch_embd.weight       visual.patch_embed.proj.weight      Conv3d: a tensor for each of two frames
    v.blk.N.attn_q, _k, _v    visual.blocks.N.attn.qkv            rows one after the other
    v.blk.N.attn_k            vision_tower...attention.k_proj     of Pixtral interleaved, as llama's are
    mm.0.weight               visual.merger.mlp.0.weight

Each kind of projector (``clip.projector_type``) is one :class:`Projector` in :data:`PROJECTORS`; what else the
metadata says is read in :mod:`uqff.checkpoints.gguf.vision`.

Authority: llama.cpp, ``conversion/qwenvl.py``, ``qwen3vl.py``, ``gemma.py`` (``Gemma3VisionModel``), ``smolvlm.py``,
``llava.py``, ``lfm2.py``, ``llama4.py``; ``gguf-py/gguf/tensor_mapping.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from uqff.checkpoints.gguf.forms import AS_IS, FRAMES, JOINED, PIXELS, Form, Plus

__all__ = ["PROJECTORS", "Projector", "TowerTensor"]

Size = str | int


class TowerTensor(NamedTuple):
    """A tensor of a tower, or of what stands between it and the text.

    Attributes:
        name: in the checkpoint.
        stored: in the file, what it is made of: one tensor, but of some forms.
        shape: in the checkpoint, of sizes by their words; see :attr:`Projector.told`.
        form: how it stands in the file, if it is no matrix of several.
        interleaved: whether the rows of its heads are interleaved.
        optional: whether a model may be without.
    """

    name: str
    stored: tuple[str, ...]
    shape: tuple[Size, ...]
    form: Form = AS_IS
    interleaved: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Projector:
    """A kind of ``mmproj`` file.

    Attributes:
        kind: ``clip.projector_type``.
        texts: ``general.architecture`` of the models that it goes with, and what their class is called then.
        outside: tensors that are not of blocks.
        block: those of each, with ``{block}``, its number.
        lists: those of each block that a list of the metadata marks, with ``{block}`` and ``{place}``, its place among
            the marked ones.
        told: sizes that the metadata does not say, and which dimension of which tensor does.
        superfluous: tensors that are made of others.
        once_swapped: whether older files call the first and the last matrix of an MLP by each other's names; llama.cpp
            tells them by their shapes (``tools/mtmd/clip.cpp``, ``is_ffn_swapped``).
    """

    kind: str
    texts: dict[str, str]
    outside: tuple[TowerTensor, ...]
    block: tuple[TowerTensor, ...]
    lists: tuple[TowerTensor, ...] = ()
    told: dict[str, tuple[str, int]] = field(default_factory=dict)
    superfluous: tuple[str, ...] = ()
    once_swapped: bool = False

    def tensors(self, blocks: int, marked: list[int]) -> Iterator[TowerTensor]:
        """All tensors of a tower.

        Args:
            blocks: how many it has.
            marked: which of them have those of :attr:`lists`.
        """
        yield from self.outside
        for block in range(blocks):
            yield from (_numbered(each, block=block) for each in self.block)
        for place, block in enumerate(marked):
            yield from (_numbered(each, block=block, place=place) for each in self.lists)


def _numbered(tensor: TowerTensor, **numbers: int) -> TowerTensor:
    stored = tuple(each.format(**numbers) for each in tensor.stored)
    return tensor._replace(name=tensor.name.format(**numbers), stored=stored)


def _linear(
    name: str, stored: str, rows: Size, columns: Size, *, bias: bool | None = True, interleaved: bool = False
) -> tuple[TowerTensor, ...]:
    """A matrix, and its bias: there is one, none (False), or perhaps (None)."""
    weight = TowerTensor(f"{name}.weight", (f"{stored}.weight",), (rows, columns), interleaved=interleaved)
    if bias is False:
        return (weight,)
    return weight, TowerTensor(f"{name}.bias", (f"{stored}.bias",), (rows,), AS_IS, interleaved, bias is None)


def _norm(name: str, stored: str, size: Size = "hidden", *, bias: bool = True) -> tuple[TowerTensor, ...]:
    """A norm."""
    ends = ("weight", "bias") if bias else ("weight",)
    return tuple(TowerTensor(f"{name}.{end}", (f"{stored}.{end}",), (size,)) for end in ends)


def _rows_of_three(name: str) -> tuple[TowerTensor, ...]:
    """Q, K and V, whose rows follow each other in the model."""
    stored = [f"v.blk.{{block}}.attn_{each}" for each in "qkv"]
    weight = TowerTensor(f"{name}.weight", tuple(f"{each}.weight" for each in stored), ("3 hidden", "hidden"))
    bias = TowerTensor(f"{name}.bias", tuple(f"{each}.bias" for each in stored), ("3 hidden",), JOINED)
    return weight, bias


_BLOCK: Final = "v.blk.{block}"
_CONVOLUTION: Final = ("hidden", "colours", "patch", "patch")


def _encoder(path: str) -> tuple[TowerTensor, ...]:
    """A block of SigLIP."""
    path = f"{path}.encoder.layers.{{block}}"
    attention = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "out_proj": "attn_out"}
    return (
        *_norm(f"{path}.layer_norm1", f"{_BLOCK}.ln1"),
        *_norm(f"{path}.layer_norm2", f"{_BLOCK}.ln2"),
        *(
            tensor
            for name, stored in attention.items()
            for tensor in _linear(f"{path}.self_attn.{name}", f"{_BLOCK}.{stored}", "hidden", "hidden")
        ),
        *_linear(f"{path}.mlp.fc1", f"{_BLOCK}.ffn_up", "inner", "hidden"),
        *_linear(f"{path}.mlp.fc2", f"{_BLOCK}.ffn_down", "hidden", "inner"),
    )


def _embeddings(path: str, patch: TowerTensor | None = None) -> tuple[TowerTensor, ...]:
    """What SigLIP has outside of its blocks."""
    name = f"{path}.embeddings.patch_embedding"
    return (
        patch or TowerTensor(f"{name}.weight", ("v.patch_embd.weight",), _CONVOLUTION),
        TowerTensor(f"{name}.bias", ("v.patch_embd.bias",), ("hidden",)),
        TowerTensor(
            f"{path}.embeddings.position_embedding.weight", ("v.position_embd.weight",), ("positions", "hidden")
        ),
        *_norm(f"{path}.post_layernorm", "v.post_ln"),
    )


def _frames(path: str) -> TowerTensor:
    """What a Conv3d of two frames is stored in."""
    stored = ("v.patch_embd.weight", "v.patch_embd.weight.1")
    return TowerTensor(f"{path}.patch_embed.proj.weight", stored, ("hidden", "colours", 2, "patch", "patch"), FRAMES)


def _merger(path: str) -> tuple[TowerTensor, ...]:
    """What leads from the tower of Qwen2-VL to the text."""
    return (
        *_linear(f"{path}.merger.mlp.0", "mm.0", "merged", "merged"),
        *_linear(f"{path}.merger.mlp.2", "mm.2", "text", "merged"),
    )


_SIGLIP: Final = "vision_tower.vision_model"
_LFM2: Final = "model.vision_tower.vision_model"
_IDEFICS3: Final = "model.vision_model"
_PIXTRAL: Final = "vision_tower.transformer.layers.{block}"
_POSITIONS: Final = {"positions": ("v.position_embd.weight", 0)}

GEMMA3: Final = Projector(
    "gemma3",
    {"gemma3": "Gemma3ForConditionalGeneration"},
    (
        *_embeddings(_SIGLIP),
        TowerTensor(
            "multi_modal_projector.mm_input_projection_weight", ("mm.input_projection.weight",), ("hidden", "text")
        ),
        TowerTensor(
            "multi_modal_projector.mm_soft_emb_norm.weight", ("mm.soft_emb_norm.weight",), ("hidden",), Plus(1.0)
        ),
    ),
    _encoder(_SIGLIP),
    told=_POSITIONS,
    once_swapped=True,
)

IDEFICS3: Final = Projector(
    "idefics3",
    {"llama": "Idefics3ForConditionalGeneration"},
    (
        *_embeddings(_IDEFICS3),
        *_linear("model.connector.modality_projection.proj", "mm.model.fc", "text", "merged", bias=False),
    ),
    _encoder(_IDEFICS3),
    told=_POSITIONS,
    once_swapped=True,
)

LFM2: Final = Projector(
    "lfm2",
    {"lfm2": "Lfm2VlForConditionalGeneration"},
    (
        *_embeddings(
            _LFM2,
            TowerTensor(
                f"{_LFM2}.embeddings.patch_embedding.weight", ("v.patch_embd.weight",), ("hidden", "pixels"), PIXELS
            ),
        ),
        *(
            tensor._replace(optional=True)
            for tensor in _norm("model.multi_modal_projector.layer_norm", "mm.input_norm", "merged")
        ),
        *_linear("model.multi_modal_projector.linear_1", "mm.1", "projector", "merged", bias=None),
        *_linear("model.multi_modal_projector.linear_2", "mm.2", "text", "projector", bias=None),
    ),
    _encoder(_LFM2),
    told={**_POSITIONS, "projector": ("mm.1.weight", 0)},
)

_LLAMA4: Final = "vision_model.model.layers.{block}"

LLAMA4: Final = Projector(
    "llama4",
    {"llama4": "Llama4ForConditionalGeneration"},
    (
        TowerTensor("vision_model.class_embedding", ("v.class_embd",), ("hidden",)),
        TowerTensor("vision_model.patch_embedding.linear.weight", ("v.patch_embd.weight",), ("hidden", "pixels")),
        TowerTensor("vision_model.positional_embedding_vlm", ("v.position_embd.weight",), ("positions", "hidden")),
        *_norm("vision_model.layernorm_pre", "v.pre_ln"),
        *_norm("vision_model.layernorm_post", "v.post_ln"),
        *_linear("vision_model.vision_adapter.mlp.fc1", "mm.model.mlp.1", "adapted", "merged", bias=False),
        *_linear("vision_model.vision_adapter.mlp.fc2", "mm.model.mlp.2", "seen", "adapted", bias=False),
        *_linear("multi_modal_projector.linear_1", "mm.model.fc", "text", "seen", bias=False),
    ),
    (
        *_norm(f"{_LLAMA4}.input_layernorm", f"{_BLOCK}.ln1"),
        *_norm(f"{_LLAMA4}.post_attention_layernorm", f"{_BLOCK}.attn_post_norm"),
        *(
            tensor
            for name, stored in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_out"}.items()
            for tensor in _linear(f"{_LLAMA4}.self_attn.{name}_proj", f"{_BLOCK}.{stored}", "hidden", "hidden")
        ),
        *_linear(f"{_LLAMA4}.mlp.fc1", f"{_BLOCK}.ffn_up", "inner", "hidden"),
        *_linear(f"{_LLAMA4}.mlp.fc2", f"{_BLOCK}.ffn_down", "hidden", "inner"),
    ),
    told={**_POSITIONS, "adapted": ("mm.model.mlp.1.weight", 0), "seen": ("mm.model.mlp.2.weight", 0)},
)

PIXTRAL: Final = Projector(
    "pixtral",
    dict.fromkeys(("mistral3", "llama"), "Mistral3ForConditionalGeneration"),
    (
        TowerTensor("vision_tower.patch_conv.weight", ("v.patch_embd.weight",), _CONVOLUTION),
        *_norm("vision_tower.ln_pre", "v.pre_ln", bias=False),
        *_norm("multi_modal_projector.norm", "mm.input_norm", bias=False),
        *_linear("multi_modal_projector.patch_merger.merging_layer", "mm.patch_merger", "hidden", "merged", bias=False),
        *_linear("multi_modal_projector.linear_1", "mm.1", "text", "hidden", bias=None),
        *_linear("multi_modal_projector.linear_2", "mm.2", "text", "text", bias=None),
    ),
    (
        *_norm(f"{_PIXTRAL}.attention_norm", f"{_BLOCK}.ln1", bias=False),
        *_norm(f"{_PIXTRAL}.ffn_norm", f"{_BLOCK}.ln2", bias=False),
        *(
            tensor
            for name, stored in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_out"}.items()
            for tensor in _linear(
                f"{_PIXTRAL}.attention.{name}_proj",
                f"{_BLOCK}.{stored}",
                "hidden",
                "hidden",
                bias=False,
                interleaved=name in "qk",
            )
        ),
        *_linear(f"{_PIXTRAL}.feed_forward.gate_proj", f"{_BLOCK}.ffn_gate", "inner", "hidden", bias=False),
        *_linear(f"{_PIXTRAL}.feed_forward.up_proj", f"{_BLOCK}.ffn_up", "inner", "hidden", bias=False),
        *_linear(f"{_PIXTRAL}.feed_forward.down_proj", f"{_BLOCK}.ffn_down", "hidden", "inner", bias=False),
    ),
    superfluous=("v.token_embd.img_break",),
)

_VISUAL: Final = "visual.blocks.{block}"

QWEN2: Final = Projector(
    "qwen2vl_merger",
    {"qwen2vl": "Qwen2VLForConditionalGeneration"},
    (_frames("visual"), *_norm("visual.merger.ln_q", "v.post_ln"), *_merger("visual")),
    (
        *_norm(f"{_VISUAL}.norm1", f"{_BLOCK}.ln1"),
        *_norm(f"{_VISUAL}.norm2", f"{_BLOCK}.ln2"),
        *_rows_of_three(f"{_VISUAL}.attn.qkv"),
        *_linear(f"{_VISUAL}.attn.proj", f"{_BLOCK}.attn_out", "hidden", "hidden"),
        *_linear(f"{_VISUAL}.mlp.fc1", f"{_BLOCK}.ffn_up", "inner", "hidden"),
        *_linear(f"{_VISUAL}.mlp.fc2", f"{_BLOCK}.ffn_down", "hidden", "inner"),
    ),
    once_swapped=True,
)

QWEN25: Final = Projector(
    "qwen2.5vl_merger",
    {"qwen2vl": "Qwen2_5_VLForConditionalGeneration"},
    (_frames("visual"), *_norm("visual.merger.ln_q", "v.post_ln", bias=False), *_merger("visual")),
    (
        *_norm(f"{_VISUAL}.norm1", f"{_BLOCK}.ln1", bias=False),
        *_norm(f"{_VISUAL}.norm2", f"{_BLOCK}.ln2", bias=False),
        *_rows_of_three(f"{_VISUAL}.attn.qkv"),
        *_linear(f"{_VISUAL}.attn.proj", f"{_BLOCK}.attn_out", "hidden", "hidden"),
        *_linear(f"{_VISUAL}.mlp.gate_proj", f"{_BLOCK}.ffn_gate", "inner", "hidden"),
        *_linear(f"{_VISUAL}.mlp.up_proj", f"{_BLOCK}.ffn_up", "inner", "hidden"),
        *_linear(f"{_VISUAL}.mlp.down_proj", f"{_BLOCK}.ffn_down", "hidden", "inner"),
    ),
    once_swapped=True,
)

_QWEN3: Final = "model.visual"
_DEEP: Final = f"{_QWEN3}.deepstack_merger_list.{{place}}"

QWEN3: Final = Projector(
    "qwen3vl_merger",
    {
        "qwen3vl": "Qwen3VLForConditionalGeneration",
        "qwen3vlmoe": "Qwen3VLMoeForConditionalGeneration",
        "qwen35": "Qwen3_5ForConditionalGeneration",
        "qwen35moe": "Qwen3_5MoeForConditionalGeneration",
    },
    (
        _frames(_QWEN3),
        TowerTensor(f"{_QWEN3}.patch_embed.proj.bias", ("v.patch_embd.bias",), ("hidden",)),
        TowerTensor(f"{_QWEN3}.pos_embed.weight", ("v.position_embd.weight",), ("positions", "hidden")),
        *_norm(f"{_QWEN3}.merger.norm", "v.post_ln"),
        *_linear(f"{_QWEN3}.merger.linear_fc1", "mm.0", "merged", "merged"),
        *_linear(f"{_QWEN3}.merger.linear_fc2", "mm.2", "text", "merged"),
    ),
    (
        *_norm(f"{_QWEN3}.blocks.{{block}}.norm1", f"{_BLOCK}.ln1"),
        *_norm(f"{_QWEN3}.blocks.{{block}}.norm2", f"{_BLOCK}.ln2"),
        *_linear(f"{_QWEN3}.blocks.{{block}}.attn.qkv", f"{_BLOCK}.attn_qkv", "3 hidden", "hidden"),
        *_linear(f"{_QWEN3}.blocks.{{block}}.attn.proj", f"{_BLOCK}.attn_out", "hidden", "hidden"),
        *_linear(f"{_QWEN3}.blocks.{{block}}.mlp.linear_fc1", f"{_BLOCK}.ffn_up", "inner", "hidden"),
        *_linear(f"{_QWEN3}.blocks.{{block}}.mlp.linear_fc2", f"{_BLOCK}.ffn_down", "hidden", "inner"),
    ),
    (
        *_norm(f"{_DEEP}.norm", "v.deepstack.{block}.norm", "merged"),
        *_linear(f"{_DEEP}.linear_fc1", "v.deepstack.{block}.fc1", "merged", "merged"),
        *_linear(f"{_DEEP}.linear_fc2", "v.deepstack.{block}.fc2", "text", "merged"),
    ),
    told=_POSITIONS,
)

PROJECTORS: Final = (GEMMA3, IDEFICS3, LFM2, LLAMA4, PIXTRAL, QWEN2, QWEN25, QWEN3)

"""``config.json`` of a model that sees, from the metadata of its text's GGUF file and of its ``mmproj`` file.

What the metadata says is compared with the model's own configuration where that is given.  The rest is what llama.cpp
takes for granted of a kind of projector, and the numbers of tokens, which are found by their texts::

    clip.vision.*             vision_config, what is said of the projector, preprocessor_config.json
    <architecture>.*          text_config; of Qwen2-VL and Qwen2.5-VL, at the top
    tokenizer.ggml.tokens     image_token_id, ...

Authority: llama.cpp, ``conversion/base.py`` (``MmprojModel``) and what :mod:`uqff.checkpoints.gguf.projectors` cites,
``tools/mtmd/clip.cpp``; transformers, the configuration of each model; mistral.rs v0.9.2,
``mistralrs-core/src/vision_models/*/config.rs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np

from uqff.checkpoints.gguf.config import SECTIONS
from uqff.checkpoints.gguf.declared import SeveralMatrices
from uqff.checkpoints.gguf.forms import AS_IS
from uqff.checkpoints.gguf.pairs import Pairs
from uqff.checkpoints.gguf.projectors import PROJECTORS, Projector, TowerTensor
from uqff.checkpoints.gguf.stored import AsIs, Formed, InFile, JoinedRows
from uqff.checkpoints.gguf.tokenizer import token_ids
from uqff.checkpoints.gguf.tower_configs import COLOURS, MARKED, MERGE, SCALE, TOWER_CONFIGS, Values
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.gguf.reader import GgufFile
from uqff.gguf.schema import ValueType
from uqff.models.layouts import half_split_order

__all__ = ["Vision", "vision_of"]

_COMMON: Final = (
    "has_vision_encoder",
    "has_audio_encoder",
    "has_llava_projector",
    "has_text_encoder",
    "projector_type",
    "use_gelu",
    "use_silu",
    "vision.attention.head_count",
    "vision.attention.layer_norm_epsilon",
    "vision.block_count",
    "vision.embedding_length",
    "vision.feed_forward_length",
    "vision.image_mean",
    "vision.image_size",
    "vision.image_std",
    "vision.patch_size",
    "vision.projection_dim",
    "vision.projector_type",
)
"""Metadata that all kinds have, or that says nothing that matters."""


class Vision(Pairs):
    """An ``mmproj`` file that can be converted: its kind, and what its metadata says. Made by :func:`vision_of`.

    Attributes:
        projector: its kind.
    """

    def __init__(self, file: GgufFile, projector: Projector) -> None:
        super().__init__(file, "clip.vision")
        self.projector = projector
        self._told = TOWER_CONFIGS[projector.kind]
        for key, value in self._told.flags.items():
            said = file.get_value(f"clip.{key}", ValueType.BOOL)
            if said not in (None, value):
                raise UnsupportedError("another activation", field=f"clip.{key}", expected=value, got=said)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes of tensors, by their words."""
        hidden, patch, scale = self.integer("embedding_length"), self.integer("patch_size"), self.scale
        sizes = {
            "hidden": hidden,
            "3 hidden": 3 * hidden,
            "inner": self.integer("feed_forward_length"),
            "text": self.integer("projection_dim"),
            "colours": COLOURS,
            "patch": patch,
            "pixels": COLOURS * patch**2,
            "merged": hidden * scale**2,
        }
        for word, (name, dimension) in self.projector.told.items():
            tensor = self.file.get(name)
            if tensor is None or dimension >= len(tensor.shape):
                path, got = str(self.file.paths[0]), "no such tensor"
                raise FormatError("the file lacks a tensor", file=path, field=name, got=got)
            sizes[word] = tensor.shape[dimension]
        return sizes

    @property
    def scale(self) -> int:
        """How many patches of a row become one, and of a column."""
        return self.integer(MERGE, default=self.integer(SCALE, default=self._told.scale))

    @property
    def heads(self) -> int:
        """Heads of attention."""
        return self.integer("attention.head_count")

    @property
    def marked(self) -> list[int]:
        """The blocks whose states go into the text, too."""
        stored = self.get(MARKED, (ValueType.ARRAY,))
        if stored is None:
            return []
        blocks, count = self.blocks(), stored.count if stored.type is ValueType.BOOL else 0
        if count != blocks:
            raise self.error("not the blocks", MARKED, f"{blocks} flags", count)
        return [block for block, value in enumerate(stored.values()) if value]

    def tensors(self) -> dict[str, InFile]:
        """How each tensor of the part stands in the file, by its name in the checkpoint.

        Raises:
            FormatError: one is not there.
            ShapeError: one has another shape than the metadata gives it.
            UnsupportedError: there are others.
        """
        found: dict[str, InFile] = {}
        taken = set(self.projector.superfluous)
        swapped = self._is_swapped()
        for wanted in self.projector.tensors(self.blocks(), self.marked):
            if swapped:
                wanted = wanted._replace(stored=tuple(map(_swapped, wanted.stored)))
            if wanted.optional and wanted.stored[0] not in self.file:
                continue
            found[wanted.name] = self._stored(wanted)
            taken.update(wanted.stored)
        if left := [name for name in self.file if name not in taken]:
            raise UnsupportedError(
                "tensors that the projector does not have",
                file=str(self.file.paths[0]),
                field=left[0],
                got=", ".join(left[:20]),
            )
        return found

    def _is_swapped(self) -> bool:
        """Whether the file is an older one, see :attr:`Projector.once_swapped`."""
        first, hidden, inner = self.file.get("v.blk.0.ffn_down.weight"), self.sizes["hidden"], self.sizes["inner"]
        is_first = first is not None and first.shape == (inner, hidden) and inner != hidden
        return self.projector.once_swapped and is_first

    def _stored(self, wanted: TowerTensor) -> InFile:
        shape = tuple(each if isinstance(each, int) else self.sizes[each] for each in wanted.shape)
        whole = len(wanted.stored) == 1 or wanted.form is not AS_IS
        shapes = wanted.form.shapes(shape, self.sizes) if whole else ((shape[0] // 3, *shape[1:]),) * 3
        module = wanted.name.rpartition(".")[0]
        tensors = []
        for name, expected in zip(wanted.stored, shapes, strict=True):
            tensor = self.file.get(name)
            path = str(self.file.paths[0])
            if tensor is None:
                raise FormatError("the file lacks a tensor", file=path, layer=module, field=name, got="no such tensor")
            if tensor.shape != expected:
                problem, got = "tensor does not fit the metadata", list(tensor.shape)
                raise ShapeError(problem, file=path, layer=module, field=name, expected=list(expected), got=got)
            tensors.append(tensor)
        if wanted.form is not AS_IS:
            return Formed(tensors, wanted.form, shape, self.sizes)
        if not whole:
            return JoinedRows(tensors, SeveralMatrices(wanted.stored), shape, self.sizes, module)
        order = half_split_order(shape[0], self.heads, layer=module) if wanted.interleaved else None
        return AsIs(tensors[0], order)

    def has(self, name: str) -> bool:
        """Whether a tensor is there."""
        return name in self.file

    @property
    def text_sizes(self) -> Mapping[str, str]:
        """Numbers that ``text_config`` calls otherwise than a text model: names there, and here."""
        return self._told.sizes

    def class_of(self, architecture: str) -> str:
        """What the whole model is called in ``config.json``.

        Raises:
            FormatError: it does not go with a text model of an architecture.
        """
        if architecture not in self.projector.texts:
            raise FormatError(
                "not the projector of this model",
                file=str(self.file.paths[0]),
                field="clip.projector_type",
                expected=f"that of {architecture}, or no projector (--mmproj none)",
                got=f"{self.projector.kind}, which goes with {' or '.join(self.projector.texts)}",
            )
        return self.projector.texts[architecture]

    def check_text(self, text: Mapping[str, Any]) -> None:
        """Make sure that it goes with the text model of a configuration.

        Raises:
            FormatError: it leads to states of another size.
        """
        if self.sizes["text"] != text["hidden_size"]:
            expected, got = text["hidden_size"], self.sizes["text"]
            raise self.error("not the projector of this model", "projection_dim", expected, got)

    def config(self, name: str, text: Mapping[str, Any], file: GgufFile) -> Values:
        """The ``config.json`` of the whole model.

        Args:
            name: of its class.
            text: the configuration of the text model.
            file: of the text model.

        Raises:
            UnsupportedError: the metadata has something that is not known here; a token is not there.
            FormatError: a number is missing or senseless.
        """
        told = self._told
        known = {*_COMMON, *(f"vision.{key}" for key in told.keys)}
        for key in self.file.pairs:
            if key.startswith("clip.") and key.removeprefix("clip.") not in known:
                raise UnsupportedError(
                    "metadata that is not known here; give the model's own configuration (--assets)",
                    file=str(self.file.paths[0]),
                    field=key,
                )
        kind = told.model_types[name]
        vision = {**told.vision(self), **told.granted, "model_type": told.vision_type or kind}
        ids = token_ids(file, told.tokens.values())
        whole = {**told.fixed, **told.whole(self), **{key: ids[text] for key, text in told.tokens.items()}}
        own = {"architectures": [name], "model_type": kind, "vision_config": vision}
        inner = {key: value for key, value in text.items() if key != "architectures"}
        if told.axes is not None:
            stored = file.get_value(f"{file.get_value('general.architecture')}.{SECTIONS}", ValueType.ARRAY)
            if "rope_parameters" in inner:
                inner["rope_parameters"] = {**inner["rope_parameters"], **told.axes}
            else:
                inner["rope_scaling"] = {**told.axes, "rope_type": "default", "mrope_section": stored.values(3)}
        inner = {told.sizes.get(key, key): value for key, value in inner.items()}
        if not told.text_types:
            return dict(sorted({**inner, **whole, **own}.items()))
        inner["model_type"] = told.text_types.get(name, inner["model_type"])
        if "llama_4_scaling_beta" in (inner["rope_scaling"] or {}):
            base = {"type": "yarn", "rope_theta": inner["rope_theta"]}
            inner |= {"model_type": "ministral3", "rope_parameters": {**inner["rope_scaling"], **base}}
        tie = {"tie_word_embeddings": text["tie_word_embeddings"]}
        return dict(sorted({**whole, **own, **tie, "text_config": inner}.items()))

    def check_config(self, config: Mapping[str, Any], path: str) -> None:
        """Compare a model's own configuration with the file.

        Raises:
            FormatError: they disagree.
        """
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise FormatError("no vision_config", file=path, field="vision_config", expected="an object", got=vision)
        told = {"vision_config.": (self._told.vision(self), vision), "": (self._told.whole(self), config)}
        for prefix, (said, given) in told.items():
            for key, expected in said.items():
                got = given.get(key)
                if got is not None and not _same(expected, got):
                    raise FormatError("not the file's model", file=path, field=prefix + key, expected=expected, got=got)

    def processor_of(self, name: str) -> str:
        """The class of the processor of a model."""
        return self._told.processors.get(name, f"{name.removesuffix('ForConditionalGeneration')}Processor")

    def tokenizer_settings(self, name: str) -> Values:
        """What ``tokenizer_config.json`` says beside what that of the text does."""
        special = {"extra_special_tokens": dict(self._told.special)} if self._told.special else {}
        return {"processor_class": self.processor_of(name), **special}

    def documents(self, name: str) -> dict[str, Values]:
        """What else stands beside the model, of a class."""
        told = self._told
        values = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": self.numbers("image_mean", COLOURS),
            "image_std": self.numbers("image_std", COLOURS),
            "rescale_factor": 1 / 255,
            **told.processor(self),
        }
        kind = self.processor_of(name)
        documents = {"preprocessor_config.json": {**values, "processor_class": kind}}
        if (beside := told.beside(self)) is not None:
            documents["processor_config.json"] = {**beside, "processor_class": kind}
        return documents


def _swapped(name: str) -> str:
    if ".ffn_up." in name:
        return name.replace(".ffn_up.", ".ffn_down.")
    return name.replace(".ffn_down.", ".ffn_up.")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        numbers = all(type(each) in (int, float) for each in (one, other))
        return numbers and bool(np.float32(one) == np.float32(other))
    return type(one) is type(other) and bool(one == other)


def vision_of(file: GgufFile) -> Vision:
    """What an ``mmproj`` file has.

    Raises:
        UnsupportedError: it is of another kind than those that are converted; or no ``mmproj`` file.
        FormatError: its metadata is not right.
    """
    if file.get_value("general.architecture") != "clip":
        raise UnsupportedError(
            "no mmproj file", field="general.architecture", expected="clip", got=file.get_value("general.architecture")
        )
    if file.get_value("clip.has_audio_encoder", ValueType.BOOL):
        raise UnsupportedError(
            "mmproj file with a part that hears, which is not converted", field="clip.has_audio_encoder", got=True
        )
    field, kind = "clip.projector_type", file.get_value("clip.projector_type", ValueType.TEXT)
    if kind is None:
        field, kind = "clip.vision.projector_type", file.get_value("clip.vision.projector_type", ValueType.TEXT)
    found = next((each for each in PROJECTORS if each.kind == kind), None)
    if found is None:
        raise UnsupportedError(
            "mmproj file of a projector that is not converted; without it (--mmproj none), the text model alone may be",
            field=field,
            expected=f"one of {', '.join(each.kind for each in PROJECTORS)}",
            got=kind,
        )
    return Vision(file, found)

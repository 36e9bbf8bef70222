"""``config.json`` in the two forms that it has, and read as one that has both.

transformers 4 wrote, and the engine reads, the first; transformers 5 writes the second and reads both::

    transformers 4, the engine                        transformers 5
    rope_theta, partial_rotary_factor                 rope_parameters.rope_theta, .partial_rotary_factor
    rope_scaling {rope_type, factor, ...}             rope_parameters {rope_type, factor, ...}
    of Mistral, which the engine reads newer:
      rope_scaling {"rope_type": "yarn", ...}         rope_parameters with beta_fast and beta_slow
    of LFM2, which the engine reads newer, too:
      rope_theta                                      rope_parameters.rope_theta
    of Gemma 3:
      rope_theta, rope_scaling                        rope_parameters.full_attention
      rope_local_base_freq                            rope_parameters.sliding_attention.rope_theta
      sliding_window_pattern                          layer_types
    of Qwen3-MoE:
      num_experts                                     num_local_experts
      max_window_layers                               none: all layers have the window, or none has
    of Qwen2-VL and Qwen2.5-VL:
      numbers of the language model                   text_config
    of these and Qwen3-VL:
      rope_scaling {type: mrope, mrope_section}       rope_parameters.mrope_section
    of Granite 4:
      layer_types of mamba, attention                 layer_types of linear_attention, full_attention
    of Phi-3.5-MoE:
      architectures of PhiMoEForCausalLM              architectures of PhimoeForCausalLM
    torch_dtype                                       dtype

What one form says and the other does not is added: whoever reads either finds the same model.  Nothing is taken away,
but what the engine stumbles over: of the tower of Qwen2-VL ``in_chans`` beside ``in_channels``, and :data:`QUICK_GELU`;
of Granite 4 the newer names of layers, for the older ones; of Phi-3.5-MoE the class of transformers, for the authors'.
A configuration of an unknown architecture stays as it is.

Authority: transformers 5.23, ``modeling_rope_utils.py`` (``RotaryEmbeddingConfigMixin``) and the configuration of each
model; 4.57, the same; mistral.rs v0.9.2, ``Config`` in ``mistralrs-core/src/models/*.rs``, ``layers.rs``
(``Llama3RopeConfig``, ``PhiRopeScalingConfig``) and ``vision_models/gemma3/config.rs``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from uqff.codes import Version
from uqff.container.document import check_regular, is_present, read_at_most, read_json
from uqff.errors import FormatError, UnsupportedError, located
from uqff.limits import MAX_CONFIG_BYTES
from uqff.models.architectures import architecture_of

__all__ = [
    "METHOD_KEY",
    "QUANT_METHOD",
    "config_to_write",
    "names_uqff",
    "numbers_of",
    "read_config",
    "restated",
    "text_of",
    "with_method",
]

QUANT_METHOD: Final = "uqff"
"""What ``quantization_config`` of a directory of UQFF calls the method."""

METHOD_KEY: Final = "quantization_config"

NAMED: Final = b'\n  "%s": {"quant_method": "%s"},' % (METHOD_KEY.encode(), QUANT_METHOD.encode())
"""The member of an object, with a comma after it."""

METHOD_SINCE: Final = Version(1, 2, 0)
"""The first version beside which it stands: engines that read none later refuse a method that they do not know."""

EXPERT_COUNTS: Final = ("num_experts", "num_local_experts")
GEMMA3: Final = ("Gemma 3", "Gemma 3 text")
BASES: Final = (*GEMMA3, "Gemma 3n")
"""Architectures whose layers of full and of sliding attention have rotary embeddings of their own."""
BY_LAYER: Final = ("Gemma 4", "DiffusionGemma")
"""Architectures of which there is the newer form only."""
LAYER_TYPES: Final = ("full_attention", "sliding_attention")
NESTED: Final = ("LFM2", "LFM2-MoE")
"""Architectures whose ``rope_theta`` the engine takes from ``rope_parameters`` alone; a million if there are none."""
CLASSES: Final = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""Classes by the names that transformers writes, which the engine does not know."""
FLOAT_KEY: Final = "__float__"
FLOATS: Final = ("Infinity", "-Infinity", "NaN")
KINDS: Final = {"linear_attention": "mamba", "full_attention": "attention"}
"""Kinds of layers of Granite 4 by their newer names; the engine refuses a configuration that has these."""
FLAT: Final = ("Qwen2-VL", "Qwen2.5-VL")
"""Architectures whose language model the engine reads at the top, and newer configurations nest."""
QUICK_GELU: Final = "quick_gelu"
"""What transformers calls the activation of the tower of Qwen2-VL; the default of both, it and the engine."""
OWN: Final = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What a nested configuration says of itself."""
SEVERAL_AXES: Final = (*FLAT, "Qwen3-VL", "Qwen3-VL-MoE")
"""Architectures of which the engine reads the axes of rotary positions in the older form."""
MOVED: Final = ("rope_theta", "partial_rotary_factor")
"""What stands beside ``rope_scaling`` in the older form."""
YARN: Final = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What transformers takes where a configuration does not say."""


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``, with what either form of it says.

    Raises:
        FormatError: it is no JSON object, or too long; or it says the same thing twice, differently.
        OSError: it cannot be read.
    """
    config = read_json(path, MAX_CONFIG_BYTES)
    with located(file=path):
        return restated(config)


def config_to_write(path: Path, config: Mapping[str, Any], version: Version) -> dict[str, Any] | None:
    """What a ``config.json`` must say that the engine and transformers read ``config`` from it.

    Args:
        path: what the source has; it need not be there.
        config: as :func:`read_config` gives it, or with something changed; empty if there is none.
        version: of the files beside it.

    Returns:
        None if the file says that already, and can be copied; or if there is no configuration.

    Raises:
        UnsupportedError: the engine has no words for it.
    """
    if not config:
        return None
    made = with_method(restated(config), version)
    _check_expressible(made, str(path))
    return None if is_present(path) and read_json(path, MAX_CONFIG_BYTES) == made else made


def with_method(config: Mapping[str, Any], version: Version) -> dict[str, Any]:
    """A configuration that names UQFF as the method of quantisation, in place of any other.

    A ``transformers`` that does not know it says so, and finds no weights; it is not told of the residual
    (``transformers_weights``), because then it goes on with random layers.  Beside older files than 1.2 no method is
    named, see :data:`METHOD_SINCE`.

    Authority: transformers 4.51.3, 4.57.6 and 5.23; 0.6.0, 0.8.12, 0.8.23: 'Unknown quantization method: uqff'; 0.9.5
    does not mind.
    """
    others = {key: value for key, value in config.items() if key != METHOD_KEY}
    if version >= METHOD_SINCE:
        return {**others, METHOD_KEY: {"quant_method": QUANT_METHOD}}
    return others if names_uqff(config.get(METHOD_KEY)) else dict(config)


def text_of(path: Path, config: Mapping[str, Any]) -> bytes | None:
    """The bytes of a ``config.json`` of which only the naming of the method changes, so that it can be taken back.

    Args:
        path: the file as it is.
        config: what it is to say.

    Returns:
        Its bytes with one more member in front, or without that; None if more than that is other.
    """
    if not is_present(path):
        return None
    raw = read_at_most(check_regular(path), MAX_CONFIG_BYTES)
    head, brace, rest = raw.partition(b"{")
    for made in (head + brace + NAMED + rest, raw.replace(brace + NAMED, brace, 1)):
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(made) == config:
                return made
    return None


def numbers_of(value: Any) -> Any:
    """A part of a configuration with numbers for what newer ones say in place of those that JSON has not.

    Authority: transformers 5.23, ``configuration_utils.py`` (``_encode_special_floats``).
    """
    if isinstance(value, dict):
        name = value.get(FLOAT_KEY) if len(value) == 1 else None
        if isinstance(name, str) and name in FLOATS:
            return float(name)
        return {key: numbers_of(each) for key, each in value.items()}
    return [numbers_of(each) for each in value] if isinstance(value, list) else value


def names_uqff(quantization: Any) -> bool:
    """Whether what a configuration says of the quantisation means UQFF."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def restated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what either form says; one that has both, and one of an unknown architecture, as it is.

    Raises:
        FormatError: it says the same thing twice, differently; or a part that is to be restated is not an object.
    """
    try:
        architecture = architecture_of(config)
    except UnsupportedError:
        return dict(config)
    text = config.get(architecture.text_config)
    if not architecture.text_config:
        config = _flattened(config) if architecture.title in FLAT else config
        return _with_dtype(_Restated(config, architecture.title, architecture.expert_count, "config").made)
    if not isinstance(text, dict):
        return dict(config)  # whoever needs a number of it says so
    inner = _Restated(text, architecture.title, architecture.expert_count, f"config.{architecture.text_config}").made
    return _with_dtype({**config, architecture.text_config: _with_dtype(inner)})


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that also says at the top what it says of its language model; tokens may differ there."""
    made, nested = dict(config), config.get("text_config")
    vision = made.get("vision_config")
    if isinstance(vision, dict):
        twice = "in_channels" in vision and vision.get("in_chans") == vision["in_channels"]
        left = {"in_chans": twice, "hidden_act": vision.get("hidden_act") == QUICK_GELU}
        made["vision_config"] = {key: value for key, value in vision.items() if not left.get(key)}
    if nested is None:
        return made
    if not isinstance(nested, dict):
        raise FormatError("not an object", field="config.text_config", got=type(nested).__name__)
    for key, value in nested.items():
        if key in OWN or value is None:
            continue
        if made.setdefault(key, value) != value and not key.endswith("_token_id"):
            raise FormatError(
                "the configuration says two things",
                field=f"config.{key}",
                expected=f"{value}, as config.text_config.{key}",
                got=made[key],
            )
    return made


class _Restated:
    """A configuration in the making."""

    def __init__(self, config: Mapping[str, Any], title: str, expert_count: str, field: str) -> None:
        self.made = dict(config)
        self.field = field
        rope = self._object(self.made, "rope_parameters", field)
        if title in BASES:
            self._add_rope_by_layer(rope or {})
        elif title in BY_LAYER:
            return  # the engine reads them as transformers writes them
        elif rope is not None:
            self._add_rope(rope, f"{field}.rope_parameters", phi=title == "Phi-3")
        if title in SEVERAL_AXES and rope is not None and "rope_scaling" not in self.made:
            self._add_axes(rope)
        self._add_rope_type(phi=title == "Phi-3")
        if title == "Mistral":
            self._add_yarn()
        if title in NESTED and rope is None and self.made.get("rope_theta") is not None:
            self.made["rope_parameters"] = {"rope_theta": self.made["rope_theta"], "rope_type": "default"}
        if expert_count in EXPERT_COUNTS:
            (other,) = (key for key in EXPERT_COUNTS if key != expert_count)
            if other in self.made:
                self._say(expert_count, self.made[other], f"{field}.{other}")
        named = self.made.get("architectures")
        if isinstance(named, list) and any(each in CLASSES for each in map(str, named)):
            self.made["architectures"] = [CLASSES.get(str(each), each) for each in named]
        kinds = self.made.get("layer_types")
        if title == "Granite 4" and isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
            self.made["layer_types"] = [KINDS.get(kind, kind) for kind in kinds]
        if title == "Qwen3-MoE" and "use_sliding_window" in self.made and "max_window_layers" not in self.made:
            # The engine gives the window to layers from this one on; transformers to all.
            windowed = self.made["use_sliding_window"] is True and self.made.get("sliding_window") is not None
            self.made["max_window_layers"] = 0 if windowed else self.made.get("num_hidden_layers")

    def _object(self, of: Mapping[str, Any], key: str, field: str) -> Mapping[str, Any] | None:
        value = of.get(key)
        if value is not None and not isinstance(value, dict):
            raise FormatError("not an object", field=f"{field}.{key}", got=type(value).__name__)
        return value

    def _say(self, key: str, value: Any, source: str) -> None:
        """Say at the top what is said elsewhere, or make sure that it is."""
        if self.made.get(key) is None:
            self.made[key] = value
        elif self.made[key] != value:
            raise FormatError(
                "the configuration says two things",
                field=f"{self.field}.{key}",
                expected=f"{value}, as {source}",
                got=self.made[key],
            )

    def _add_rope(self, rope: Mapping[str, Any], source: str, *, phi: bool) -> None:
        """Lift what newer configurations nest."""
        if any(isinstance(rope.get(each), dict) for each in LAYER_TYPES):
            raise FormatError("rotary positions by type of layer", field=source, expected="one of all layers")
        for key in MOVED:
            if rope.get(key) is not None:
                self._say(key, rope[key], f"{source}.{key}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return
        scaling = {"rope_type": kind, **{key: value for key, value in rope.items() if key not in (*MOVED, "type")}}
        stated = self._object(self.made, "rope_scaling", self.field)
        if stated is None:
            # Of Phi-3, transformers 4 allows these three and no other.
            factors = {key: value for key, value in scaling.items() if key in ("short_factor", "long_factor")}
            self.made["rope_scaling"] = {"type": kind, **factors} if phi else scaling
            return
        stated = {"rope_type": stated.get("type"), **stated}
        for key in sorted(scaling.keys() & stated.keys()):
            if scaling[key] != stated[key]:
                raise FormatError(
                    "the configuration says two things",
                    field=f"{self.field}.rope_scaling.{key}",
                    expected=f"{scaling[key]}, as {source}.{key}",
                    got=stated[key],
                )

    def _add_axes(self, rope: Mapping[str, Any]) -> None:
        """Which rotary positions are along which axis."""
        if "mrope_section" in rope:
            axes = {key: value for key, value in rope.items() if key.startswith("mrope_")}
            self.made["rope_scaling"] = {"type": "mrope", "rope_type": rope.get("rope_type", "default"), **axes}

    def _add_rope_by_layer(self, rope: Mapping[str, Any]) -> None:
        """Of :data:`BASES`."""
        whole, local = (self._object(rope, each, f"{self.field}.rope_parameters") for each in LAYER_TYPES)
        if whole is not None:
            self._add_rope(whole, f"{self.field}.rope_parameters.{LAYER_TYPES[0]}", phi=False)
        if local is not None and local.get("rope_theta") is not None:
            source = f"{self.field}.rope_parameters.{LAYER_TYPES[1]}.rope_theta"
            self._say("rope_local_base_freq", local["rope_theta"], source)
        pattern = _pattern(self.made.get("layer_types"))
        if pattern is not None and "sliding_window_pattern" not in self.made:
            self.made["sliding_window_pattern"] = pattern

    def _add_rope_type(self, *, phi: bool) -> None:
        """The engine knows the kind of a scaling by its newer name; that of Phi-3 by the older."""
        scaling = self._object(self.made, "rope_scaling", self.field)
        known, wanted = ("rope_type", "type") if phi else ("type", "rope_type")
        if scaling is not None and wanted not in scaling and known in scaling:
            kept = {key: value for key, value in scaling.items() if not phi or key != known}
            self.made["rope_scaling"] = {wanted: scaling[known], **kept}

    def _add_yarn(self) -> None:
        """The engine knows one scaling of Mistral, by its newer name only, and takes no number for granted."""
        scaling, theta = self.made.get("rope_scaling"), self.made.get("rope_theta")
        if scaling is not None and scaling.get("rope_type") == "yarn" and theta is not None:
            self.made["rope_parameters"] = {"rope_theta": theta, **YARN, **scaling}


def _with_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """Also by the name that transformers before 4.56 looks for."""
    dtype = config.get("dtype")
    return {**config, "torch_dtype": dtype} if isinstance(dtype, str) and "torch_dtype" not in config else config


def _pattern(layer_types: Any) -> int | None:
    """Every how-manieth layer has full attention; None if there is no such number, or one full layer at most."""
    if not isinstance(layer_types, list) or LAYER_TYPES[0] not in layer_types:
        return None
    pattern = layer_types.index(LAYER_TYPES[0]) + 1
    regular = [LAYER_TYPES[(at + 1) % pattern != 0] for at in range(len(layer_types))]
    return pattern if regular == layer_types else None


def _check_expressible(config: Mapping[str, Any], file: str) -> None:
    """Refuse what the engine would silently take for something else: it knows Gemma 3's windows by a number."""
    try:
        architecture = architecture_of(config)
    except UnsupportedError:
        return
    text = config.get(architecture.text_config) if architecture.text_config else config
    if architecture.title not in GEMMA3 or not isinstance(text, dict):
        return
    types, pattern = text.get("layer_types"), text.get("sliding_window_pattern", 6)
    if isinstance(types, list) and type(pattern) is int and pattern > 0:
        regular = [LAYER_TYPES[(at + 1) % pattern != 0] for at in range(len(types))]
        if types != regular:
            raise UnsupportedError(
                "no regular pattern of windows, which is all that the engine has",
                file=file,
                field="config.layer_types",
                expected=f"full_attention every {pattern} layers",
                got=types,
            )

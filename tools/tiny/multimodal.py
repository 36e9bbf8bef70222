"""Tiny checkpoints of multimodal architectures, with the names that `transformers` gives to tensors.

    python -m tools.tiny.multimodal --client PYTHON

lets `mistralrs==0.9.5` quantise each to Q8_0 and writes digests of the `.uqff` file and of the residual into
`tests/golden/v1/MULTIMODAL.json`: they prove names, order and bytes, as `tools.tiny.text` does of text architectures.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Final

from tools.interop.client import Client
from tools.tiny import gemma3n
from tools.tiny.architectures import GOLDEN, HIDDEN, VOCABULARY
from tools.tiny.digests import command, written
from tools.tiny.models import TinyModel
from tools.tiny.newer_towers import NEWER, PIECES
from tools.tiny.text import CLIENT_VERSION, LAYERS, values_of
from tools.tiny.towers import MULTIMODALS, Multimodal

__all__ = [
    "FIXED",
    "FORGOTTEN",
    "MULTIMODALS",
    "RENAMED",
    "ROUNDED",
    "SUPERFLUOUS",
    "VARIANTS",
    "client_digests",
    "forgetful_residual",
    "has",
    "readable_residual",
    "rounded",
    "write",
]

MULTIMODALS.update(NEWER)
DIGESTS = GOLDEN / "v1" / "MULTIMODAL.json"
LOADER = "MultimodalPlain"
"""The client's loader."""

SCALE: Final = ("router.per_expert_scale", "moe.per_expert_scale")
RENAMED: Final = {
    "Idefics2": ("model.text_model.", "model.text_model.model."),
    "Gemma 4 MoE": SCALE,
    "DiffusionGemma": SCALE,
}
"""Tensors that the client writes into the residual by another name: of Idefics2 it does not find them again."""
COMPUTED: Final = tuple(f"vision_tower.patch_positional_embedding.{name}" for name in ("cos", "sin"))
SUPERFLUOUS: Final = {
    "Idefics2": ("model.text_model.embed_tokens.weight",),
    "Mistral 3": COMPUTED,
    "Ministral 3": COMPUTED,
    "Gemma 3n": gemma3n.COMPUTED,
    "Gemma 4": tuple(f"model.embed_{kind}.embedding_pre_projection_norm.weight" for kind in ("audio", "vision")),
    "Gemma 4 MoE": ("model.embed_vision.embedding_pre_projection_norm.weight",),
    "DiffusionGemma": ("model.encoder.embed_vision.embedding_pre_projection_norm.weight",),
}
"""Tensors that the client writes into the residual, and does not need: a layer once more, what it computes, ones."""
PLE: Final = "model.language_model.layers.0.ple."
FORGOTTEN: Final = {
    "MiniCPM-o": ("resampler.kv_proj.weight",),
    "Qwen4-Exp": (
        *(f"{PLE}{name}.weight" for name in ("conv1d", "norm_conv", "norm_key", "norm_query")),
        *(f"{PLE}ple_embedding.ngram_embedding.shard_{piece}.weight" for piece in range(PIECES)),
        *(
            f"{PLE}ple_embedding.{name}"
            for name in ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")
        ),
    ),
}
"""Tensors that the client does not write into the residual, and then does not find."""
ROUNDED: Final = {"Qwen4-Exp": ".hc_norm.weight"}
"""Ends of the names of tensors that the client adds 1 to when it loads, and takes 1 from when it writes."""
FIXED: Final = ("Phi-3-V",)
"""Of which there is no tiny checkpoint: the client's tower has 300 million weights, whatever the configuration says."""
VARIANTS: Final = ("Gemma 3 text", "Ministral 3", "Gemma 4 MoE")
"""No architectures of their own: one has no tower."""


def has(name: str) -> bool:
    """Whether the `transformers` that is installed has an architecture, or it does not matter.

    5.0 and 5.1 do not have Qwen3-VL-MoE as it is published: its conversion looks for experts by number there, so that
    stacks are neither read nor saved with inputs first (`conversion_mapping.py`; since 5.2 they are).
    """
    from transformers import CONFIG_MAPPING, __version__

    if name == "Qwen3-VL-MoE" and __version__.startswith(("5.0.", "5.1.")):
        return False
    return MULTIMODALS[name].tensors is not None or MULTIMODALS[name].model_type in CONFIG_MAPPING


def write(name: str, folder: Path, *, whole: bool = False) -> None:
    """Write a checkpoint of an architecture: what `transformers` saves of it, with other values.

    With `whole`, also what only the client needs.
    """
    import numpy as np
    from safetensors.numpy import save_file

    made = MULTIMODALS[name]
    TinyModel(hidden_size=HIDDEN, heads=2, vocab_size=VOCABULARY).write(folder)
    path = folder / "model.safetensors"
    path.unlink()
    shapes, integers = _saved(made, path) if made.tensors is None else (_numbered(made.tensors), {})
    for here, there in made.renamed:
        shapes = {key if there in key else key.replace(here, there, 1): shape for key, shape in shapes.items()}
    values = {key: values_of(key, shape) for key, shape in shapes.items()}
    for part, dtype in made.dtypes.items():
        values.update({key: each.astype(dtype) for key, each in values.items() if part in key})
    fixed = {key: np.zeros(shape, np.float16) for key, shape in made.fixed.items()} if whole else {}
    save_file(values | integers | fixed, path)
    named = {} if made.files else {"architectures": [made.architecture], "torch_dtype": "float32"}
    documents = {
        "config.json": made.values | named,
        "preprocessor_config.json": made.preprocessor,
    }
    if made.processor is not None:
        documents["processor_config.json"] = made.processor
    for each, document in documents.items():
        (folder / each).write_text(json.dumps(document, indent=2))
    for here, there in made.files.items():
        (folder / here).rename(folder / there)


def _saved(made: Multimodal, path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """What `transformers` saves: shapes, and those tensors that are integers, which it computes."""
    import transformers
    from safetensors import safe_open

    config = transformers.CONFIG_MAPPING[made.model_type].from_dict(json.loads(json.dumps(made.values)))
    getattr(transformers, made.architecture)(config).save_pretrained(path.parent)
    with safe_open(path, "np") as saved:
        slices = {key: saved.get_slice(key) for key in saved.keys()}  # noqa: SIM118
        integers = {key: saved.get_tensor(key) for key, each in slices.items() if each.get_dtype().startswith("I")}
        return {key: tuple(each.get_shape()) for key, each in slices.items()}, integers


def _numbered(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """All layers of each tensor."""
    return {
        key.replace("*", str(layer)): shape
        for key, shape in tensors.items()
        for layer in range(LAYERS if "*" in key else 1)
    }


def forgetful_residual(name: str, path: Path, made: Path) -> Path:
    """A residual without :data:`FORGOTTEN`, with what the client makes of :data:`ROUNDED`."""
    from safetensors.numpy import load_file, save_file

    if name not in FORGOTTEN:
        return path
    kept = {key: value for key, value in load_file(path).items() if key not in FORGOTTEN[name]}
    kept = {key: rounded(name, key, value) for key, value in kept.items()}
    save_file(kept, made, {"made": "less"})
    return made


def rounded(name: str, key: str, values: Any) -> Any:
    """The numbers of a tensor as the client writes them."""
    return values + 1 - 1 if key.endswith(ROUNDED.get(name, ())) else values


def readable_residual(name: str, path: Path, made: Path, *, fixed: bool = True) -> Path:
    """The client's residual without :data:`SUPERFLUOUS`, by the names by which it finds tensors.

    Without `fixed`, also without what :func:`write` writes for the client alone.
    """
    from safetensors.numpy import load_file, save_file

    left_out = {*SUPERFLUOUS.get(name, ()), *(() if fixed else MULTIMODALS[name].fixed)}
    if name not in RENAMED and not left_out:
        return path
    there, here = RENAMED.get(name, ("", ""))
    tensors = {key.replace(here, there, 1) if here else key: value for key, value in load_file(path).items()}
    kept = {key: value for key, value in tensors.items() if key not in left_out}
    save_file(kept, made, {"made": "from the client's"})  # `digest` leaves this out
    return made


def client_digests(client: Client, name: str) -> dict[str, str]:
    """What the client writes for an architecture: digests by file name, of a residual that it can read."""
    return written(
        client,
        partial(write, name, whole=True),
        architecture=MULTIMODALS[name].client,
        loader=LOADER,
        readable=partial(readable_residual, name, fixed=False),
    )


main = command(client_digests, MULTIMODALS, {CLIENT_VERSION: DIGESTS})

if __name__ == "__main__":
    main()

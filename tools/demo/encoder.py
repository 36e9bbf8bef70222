"""A BERT sentence encoder in plain torch, as small as it can be: the demo runs it with original and rebuilt weights.

Names and arithmetic follow ``transformers`` (``models/bert/modeling_bert.py``, ``BertModel``) and the mean pooling of
sentence-transformers; dropout is off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

__all__ = ["LINEAR", "encode", "is_encoder"]

LINEAR = r"encoder\.layer\.\d+\..*\.dense|encoder\.layer\.\d+\.attention\.self\.(query|key|value)"
"""The linear layers of the encoder."""


def is_encoder(directory: Path) -> bool:
    """Whether a checkpoint directory holds a BERT encoder with a tokenizer, which :func:`encode` can run."""
    config = directory / "config.json"
    if not config.is_file() or not (directory / "tokenizer.json").is_file():
        return False
    return bool(json.loads(config.read_text("utf-8")).get("model_type") == "bert")


def encode(directory: Path, weights: Mapping[str, torch.Tensor], sentences: list[str]) -> torch.Tensor:
    """Sentence embeddings, float32 ``[sentences, hidden]``, of unit length.

    Args:
        directory: holds ``config.json`` and ``tokenizer.json``.
        weights: every tensor of the checkpoint by name.
        sentences: the texts.
    """
    from tokenizers import Tokenizer

    config = json.loads((directory / "config.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    tokens = torch.tensor([e.ids for e in encodings])
    mask = torch.tensor([e.attention_mask for e in encodings], dtype=torch.float32)
    with torch.inference_mode():
        hidden = _forward({re.sub(r"^bert\.", "", n): t for n, t in weights.items()}, config, tokens, mask)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=-1)


def _forward(
    w: Mapping[str, torch.Tensor], config: dict[str, float], tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    heads, eps = int(config["num_attention_heads"]), float(config["layer_norm_eps"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"].float(), w[f"{name}.bias"].float())

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"].float(), w[f"{name}.bias"].float(), eps)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    table = {name: w[f"embeddings.{name}_embeddings.weight"].float() for name in ("word", "position", "token_type")}
    x = table["word"][tokens] + table["position"][: tokens.shape[1]] + table["token_type"][0]
    x = norm(x, "embeddings.LayerNorm")
    bias = (1.0 - mask)[:, None, None, :] * torch.finfo(torch.float32).min
    for i in range(int(config["num_hidden_layers"])):
        at = f"encoder.layer.{i}"
        q, k, v = (split(linear(x, f"{at}.attention.self.{name}")) for name in ("query", "key", "value"))
        attention = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        x = norm(x + linear(attention, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x

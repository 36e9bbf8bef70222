"""Voxtral Realtime, tiny, in the layout of its authors: `params.json`, `consolidated.safetensors`, their own names."""

from __future__ import annotations

from typing import Any, Final

from tools.tiny.architectures import HEAD_SIZE, HEADS, HIDDEN, INNER, KV_HEADS, VOCABULARY
from tools.tiny.text import LAYERS

__all__ = ["FILES", "TENSORS", "VALUES"]

FILES: Final = {"config.json": "params.json", "model.safetensors": "consolidated.safetensors"}
"""What files are called in this layout."""

SOUND: Final = 32
"""Hidden size of the encoder of sound."""
MELS: Final = 128
FACTOR: Final = 4
"""Of steps of the encoder that make one of the decoder."""
TIME: Final = 32
STREAMS: Final = "mm_streams_embeddings.embedding_module"

Shapes = dict[str, tuple[int, ...]]

VALUES: Final[dict[str, Any]] = {
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "head_dim": HEAD_SIZE,
    "hidden_dim": INNER,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "use_biases": False,
    "rope_theta": 1000000.0,
    "norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "tied_embeddings": True,
    "sliding_window": 512,
    "model_max_length": 1024,
    "ada_rms_norm_t_cond": True,
    "ada_rms_norm_t_cond_dim": TIME,
    "multimodal": {
        "whisper_model_args": {
            "encoder_args": {
                "audio_encoding_args": {
                    "sampling_rate": 16000,
                    "frame_rate": 12.5,
                    "num_mel_bins": MELS,
                    "hop_length": 160,
                    "window_size": 400,
                    "global_log_mel_max": 1.5,
                },
                "dim": SOUND,
                "n_layers": LAYERS,
                "head_dim": HEAD_SIZE,
                "hidden_dim": 2 * SOUND,
                "n_heads": 2,
                "n_kv_heads": 2,
                "use_biases": True,
                "causal": True,
                "rope_theta": 1000000.0,
                "norm_eps": 1e-5,
                "sliding_window": 750,
            },
            "downsample_args": {"downsample_factor": FACTOR},
        }
    },
}


def _block(path: str, size: int, queries: int, keys: int, inner: int) -> Shapes:
    return {
        f"{path}.attention_norm.weight": (size,),
        f"{path}.attention.wq.weight": (queries, size),
        f"{path}.attention.wk.weight": (keys, size),
        f"{path}.attention.wv.weight": (keys, size),
        f"{path}.attention.wo.weight": (size, queries),
        f"{path}.ffn_norm.weight": (size,),
        f"{path}.feed_forward.w1.weight": (inner, size),
        f"{path}.feed_forward.w2.weight": (size, inner),
        f"{path}.feed_forward.w3.weight": (inner, size),
    }


TENSORS: Final[Shapes] = {
    **_block("layers.*", HIDDEN, HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, INNER),
    "layers.*.ada_rms_norm_t_cond.0.weight": (TIME, HIDDEN),
    "layers.*.ada_rms_norm_t_cond.2.weight": (HIDDEN, TIME),
    "norm.weight": (HIDDEN,),
    f"{STREAMS}.tok_embeddings.weight": (VOCABULARY, HIDDEN),
    f"{STREAMS}.audio_language_projection.0.weight": (HIDDEN, FACTOR * SOUND),
    f"{STREAMS}.audio_language_projection.2.weight": (HIDDEN, HIDDEN),
    f"{STREAMS}.whisper_encoder.conv_layers.0.conv.weight": (SOUND, MELS, 3),
    f"{STREAMS}.whisper_encoder.conv_layers.0.conv.bias": (SOUND,),
    f"{STREAMS}.whisper_encoder.conv_layers.1.conv.weight": (SOUND, SOUND, 3),
    f"{STREAMS}.whisper_encoder.conv_layers.1.conv.bias": (SOUND,),
    f"{STREAMS}.whisper_encoder.transformer.norm.weight": (SOUND,),
    **_block(f"{STREAMS}.whisper_encoder.transformer.layers.*", SOUND, SOUND, SOUND, 2 * SOUND),
    **{
        f"{STREAMS}.whisper_encoder.transformer.layers.*.{name}.bias": (SOUND,)
        for name in ("attention.wq", "attention.wv", "attention.wo", "feed_forward.w2")
    },
}
"""Names and shapes; `*` is the number of each layer."""

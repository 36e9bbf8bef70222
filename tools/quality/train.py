"""A small Llama of 6 million parameters that knows a little Python, trained in minutes on two cores.

    python -m tools.quality.train OUT

The same files on the same machine with the same versions of Python, torch and tokenizers: seeds are fixed, batches come
in a fixed order, and torch is told to be deterministic. Other CPUs add up in another order.

Hidden size 256, so that K quants fit every layer; embedding and head are two matrices. Everything is plain float32.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from tools.quality import corpus

VOCABULARY = 2048
SPECIAL = ("<unk>", "<s>", "</s>")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}
STEPS, BATCH, CONTEXT = 400, 16, 256
RATE, MATRIX_RATE, WARMUP = 3e-3, 0.02, 20


def tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of :data:`VOCABULARY` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # counts are added up in one order
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts[::4], trainer)
    return made


class Orthogonal(torch.optim.Optimizer):
    """Steps whose singular values are all about one, which takes half as many of them as Adam does (Muon).

    Authority: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for each in group["params"]:
                kept = self.state[each].setdefault("momentum", torch.zeros_like(each))
                kept.lerp_(each.grad, 1 - group["momentum"])
                update = orthogonalised(each.grad.lerp(kept, group["momentum"]))
                scale = max(1.0, each.shape[0] / each.shape[1]) ** 0.5
                each.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ of U S Vᵀ, by five turns of a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def train(out: Path, steps: int = STEPS) -> None:
    """Train the model and write it to a directory, which appears when it is done."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = corpus.texts("train")
    tokens = tokenizer(texts)
    ids = torch.from_numpy(np.concatenate([np.array(each.ids, np.int64) for each in tokens.encode_batch(texts)]))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model: Any = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02 if "o_proj" not in name and "down_proj" not in name else 0.006)
    hidden = [each for name, each in model.named_parameters() if each.ndim == 2 and ".layers." in name]
    others = [each for name, each in model.named_parameters() if each.ndim == 1 or ".layers." not in name]
    optimisers = [
        (Orthogonal(hidden, MATRIX_RATE), MATRIX_RATE),
        (torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0), RATE),
    ]
    order, start = np.random.default_rng(0), time.monotonic()
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 0.01
        for optimiser, rate in optimisers:
            optimiser.param_groups[0]["lr"] = rate * share
        at = order.integers(0, len(ids) - CONTEXT - 1, BATCH)
        batch = torch.stack([ids[each : each + CONTEXT + 1] for each in at])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for optimiser, _ in optimisers:
            optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            click.echo(f"step {step}: loss {float(loss.detach()):.3f}, {time.monotonic() - start:.0f} s")
    stage = out.with_name(f"{out.name}.partial")
    stage.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: each.detach().contiguous() for name, each in model.state_dict().items()}, stage / "model.safetensors"
    )
    tokens.save(str(stage / "tokenizer.json"))
    (stage / "config.json").write_text(json.dumps(CONFIG, indent=2))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (stage / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (stage / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    stage.rename(out)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=STEPS, show_default=True)
def main(out: Path, steps: int) -> None:
    """Train the small Llama into OUT."""
    train(out, steps)


if __name__ == "__main__":
    main()

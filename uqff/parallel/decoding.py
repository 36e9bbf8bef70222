"""One token after the other: a model, the keys and values of the tokens before, and what the next token is chosen from.

On a CUDA device, keys and values of all tokens have their place from the start, and all layers are one launch
(:class:`~uqff.parallel.replay.Replayed`), if ``transformers`` has such a cache for the model, and the ranks that share
it are on one machine. A token then goes through :class:`~uqff.parallel.decoder_step.DecoderStep`, if that knows the
model. Elsewhere keys and values have their places too, see :mod:`uqff.parallel.kv_cache`, and on a CPU a token of such
a model goes through :class:`~uqff.parallel.decoder_step_cpu.DecoderStepCpu`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from uqff.parallel.comm import Comm, exchange_device
from uqff.parallel.decoder_step import DecoderStep
from uqff.parallel.decoder_step_cpu import DecoderStepCpu
from uqff.parallel.kv_cache import preallocated
from uqff.parallel.replay import Replayed, peers_of
from uqff.parallel.vocabulary import Embedding

if TYPE_CHECKING:
    from uqff.gpu.peer import Peers

__all__ = ["NextToken"]


class NextToken:
    """The logits of the token that follows all that have been given so far."""

    def __init__(self, model: torch.nn.Module, comm: Comm, tokens: int) -> None:
        """No token has been given.

        Args:
            model: of :func:`~uqff.parallel.load_model`.
            comm: the ranks that share it.
            tokens: that will be given, at most.
        """
        self._model: Any = model
        self._comm = comm
        self._name = _name_of_cache(model)
        replays, peers = _replays(model, comm)
        self._cache = _static(self._model.config, tokens) if replays else None
        me = weakref.ref(self)  # or the caches of an answer would stay until garbage is looked for

        def step(given: torch.Tensor) -> torch.Tensor:
            this = me()
            assert this is not None
            return this._step(given)

        self._replayed = None if self._cache is None else Replayed(step, comm, peers)
        self._look_up = None if self._replayed is None else self._looking_up()
        if self._cache is None:
            self._cache = preallocated(model, tokens)
        # The head has the last token of the prompt to say something of, not all of them.
        self._last: dict[str, Any] = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}
        self._begun = False
        self._fused: DecoderStep | None = None
        self._on_cpu: DecoderStepCpu | None = None
        self._logits = torch.empty(0)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Give tokens.

        Args:
            ids: ``[1, tokens]``; all of a prompt at first, one then.

        Returns:
            ``[vocabulary]``, float32; the next call may overwrite it.
        """
        self.choose(ids)
        return self._logits

    def choose(self, ids: torch.Tensor) -> torch.Tensor:
        """Give tokens, and take the most probable one that follows; of equals the one of the lowest id.

        Ranks of unlike machines may differ in the last bit of a logit; rank 0's choice counts.

        Args:
            ids: as above.

        Returns:
            Its id, logit and log probability, float64 ``[3]``; the next call may overwrite it.
        """
        begun, self._begun = self._begun, True
        if self._replayed is not None and begun:
            return self._replayed(ids if self._look_up else self._model.get_input_embeddings()(ids))
        if begun and self._on_cpu is not None and ids.shape == (1, 1):
            logits = self._on_cpu(self._model.get_input_embeddings()(ids))
            if logits is not None:
                return self._chosen(logits)
        output = self._model(input_ids=ids, use_cache=True, **{self._name: self._cache}, **self._last)
        self._cache = getattr(output, self._name)
        if self._replayed is not None:
            self._fused = DecoderStep.of(self._model, self._cache)
        elif not begun and self._comm.world_size == 1:
            self._on_cpu = DecoderStepCpu.of(self._model, self._cache)
        return self._chosen(output.logits)

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        self._logits = each = logits[0, -1].to(torch.float32)
        ids = self._comm.all_gather(each.argmax())[0].view(1)
        return torch.cat([ids.double(), each[ids].double(), each.log_softmax(-1)[ids].double()])

    def _looking_up(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        embedding = self._model.get_input_embeddings()
        return embedding.lookup() if isinstance(embedding, Embedding) else embedding

    def _step(self, given: torch.Tensor) -> torch.Tensor:
        """From an id, or from hidden states where ids have to be looked up beforehand."""
        x = self._look_up(given) if self._look_up else given
        if self._fused is not None:
            return self._chosen(self._fused(x))
        return self._chosen(self._model(inputs_embeds=x, use_cache=True, **{self._name: self._cache}).logits)


def _name_of_cache(model: torch.nn.Module) -> str:
    """What a model calls the keys and values of earlier tokens: ``transformers`` has another word since 5.24."""
    return "cache" if _takes(model, "cache") else "past_key_values"


def _takes(model: torch.nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _replays(model: torch.nn.Module, comm: Comm) -> tuple[bool, Peers | None]:
    """Whether a step can be recorded, and what ranks reach each other by then, if there are several."""
    device = next(model.parameters()).device
    here = device.type == "cuda" and not any(getattr(module, "elsewhere", False) for module in model.modules())
    if comm.world_size == 1:
        return here, None
    peers = (
        peers_of(comm, device) if all(comm.all_gather_bytes(b"1" if here else b"", exchange_device(device))) else None
    )
    return peers is not None, peers


def _static(config: Any, tokens: int) -> Any | None:
    """A cache whose tensors stay where they are and that counts on the device; None where there is none.

    Those of sliding windows count on the host, too, which a replay would not do, as do all of older ``transformers``.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache: Any = StaticCache(config=config, max_cache_len=tokens)
    return cache if all(type(each) is StaticLayer and _counts_on_the_device(each) for each in cache.layers) else None


def _counts_on_the_device(layer: Any) -> bool:
    return isinstance(getattr(layer, "cumulative_length", None), torch.Tensor)

"""UQFF in vLLM: a plug-in of the group ``vllm.general_plugins``, which vLLM finds where this package is installed.

::

    LLM(model="DIR")        vllm serve DIR          # config.json of 1.2 names the method
    LLM(model="DIR", quantization="uqff")           # of older files it does not

vLLM makes its own model.  Where it asks a method of quantisation for weights, the places stay empty; then its model is
given what the files hold, by the names of a checkpoint, as it is given a checkpoint: plain tensors, and of layers
:class:`~uqff.integrations.vllm.stored.StoredWeight`, which stand for codes.  vLLM says which of its layers each belongs
to, and which share of it; nothing here knows an architecture.

Authority: vLLM 0.32.0, ``model_executor/layers/quantization/base_config.py``, ``linear.py``,
``vocab_parallel_embedding.py``, ``fused_moe/routed_experts.py`` and ``model_loader/base_loader.py``.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register the method of quantisation and the loader; vLLM calls this in each of its processes.

    A model of the method is loaded in the format ``uqff``, unless another is asked for.
    """
    from uqff.integrations.vllm import plugin

    plugin.register()

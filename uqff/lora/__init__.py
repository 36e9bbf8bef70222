"""LoRA: adapters that PEFT has saved, opened, checked, and added to weights; none of it needs torch.

    with uqff.lora.open_adapter("DIR") as adapter:
        adapter["model.layers.0.self_attn.q_proj"].delta()

``uqff.quantize_model(..., lora=...)`` merges adapters while it quantises; ``uqff.load_model(..., lora=...)`` adds them
to a model that is loaded.
"""

from uqff.lora.adapter import Adapter, open_adapter
from uqff.lora.applied import Adapters, Applied, LoraWarning, ModelWeights
from uqff.lora.config import LoraConfig
from uqff.lora.low_rank import LowRank, merged
from uqff.lora.static import StaticLora, static_loras, static_weight

__all__ = [
    "Adapter",
    "Adapters",
    "Applied",
    "LoraConfig",
    "LoraWarning",
    "LowRank",
    "ModelWeights",
    "StaticLora",
    "merged",
    "open_adapter",
    "static_loras",
    "static_weight",
]

"""timm's vision encoders of multimodal models, which rotate queries and keys: Qwen3-VL's and DeepSeek's.

A classifier holds such an encoder as `encoder`.
"""

from typing import Any

from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import nn

from t5lib.families.timm_rotary import TimmRotary


class TimmEncoders(TimmRotary):
    """Qwen3-VL's and DeepSeek's encoder, alone or in a classifier; they take images of any size."""

    name = "timm_encoders"
    features = None
    model_classes = (Qwen3VitEncoder, Qwen3VitClassifier, DeepseekVitEncoder, DeepseekVitClassifier)

    def trunk(self, model: nn.Module) -> nn.Module:
        return getattr(model, "encoder", model)

    def own_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {}


ADAPTER = TimmEncoders()

"""timm's VisionTransformer family: ViT, DeiT, AugReg, DINOv2, DeiT III, SigLIP and others."""

from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from t5lib.families.timm_base import TimmAdapter
from t5lib.layers.attention import TTTAttention


class TimmVit(TimmAdapter):
    """ViT, DeiT, AugReg, DINOv2, DeiT III, SigLIP and whatever else timm makes a VisionTransformer."""

    name = "timm_vit"
    model_classes = (VisionTransformer,)
    attention_classes = (Attention,)
    layer_class = TTTAttention

    def projections(self, layer: nn.Module) -> list[nn.Module]:
        return [layer.qkv, layer.q_norm, layer.k_norm]

    def own_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": model.pool_include_prefix,
        }


ADAPTER = TimmVit()

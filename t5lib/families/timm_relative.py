"""timm's models that add a bias of relative positions to every softmax map: BEiT and ViTs called `vit_relpos_*`.

They convert with `TTTConfig.drop_position_bias`. Positions are then told by the convolutions of the new layers and, in
a model that has them, by absolute embeddings; calibration fits the new layers to the attention with its bias.
"""

from dataclasses import dataclass
from typing import Any

from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor, nn

from t5lib.families.base import AttentionCall
from t5lib.families.timm_base import TimmAdapter
from t5lib.layers.attention import UnbiasedTTTAttention

SHARED = ("rel_pos_bias", "shared_rel_pos")  # parts of a model that make a bias for all of its attentions
OWN = ("rel_pos", "relative_position_bias_table")  # parts of an attention


@dataclass(frozen=True)
class BiasedCall(AttentionCall):
    """With the bias (1, H, N, N) that the model's attentions share, where they do."""

    bias: Tensor | None = None


class TimmRelative(TimmAdapter):
    """BEiT, BEiT v2, ViT-RelPos and ViT-SRelPos."""

    name = "timm_relative"
    has_attention_maps = False  # of q and k alone: the bias is not in them
    model_classes = (Beit, VisionTransformerRelPos)
    attention_classes = (BeitAttention, RelPosAttention)
    layer_class = UnbiasedTTTAttention

    def position_bias(self, model: nn.Module, name: str) -> list[str]:
        held = [*SHARED, *(f"{name}.{part}" for part in OWN)]
        return [each for each, _ in model.named_parameters() if any(f"{each}.".startswith(f"{p}.") for p in held)]

    def call_of(self, x: Tensor, shared: Tensor | None = None, **named: Any) -> AttentionCall:
        return BiasedCall((x,), bias=next(iter(named.values()), shared))

    def call_attention(self, attention: nn.Module, call: AttentionCall) -> None:
        assert isinstance(call, BiasedCall)
        attention(*call.tokens, call.bias)

    def after_heads(self, attention: nn.Module) -> nn.Module:
        return attention.proj

    def projections(self, layer: nn.Module) -> list[nn.Module]:
        """See Adapter; biases of queries and values are parameters of BEiT's attention itself."""
        parts = [layer.qkv, *(getattr(layer, name, None) for name in ("q_norm", "k_norm"))]
        biases = [bias for name in ("q_bias", "v_bias") if (bias := getattr(layer, name, None)) is not None]
        return [*filter(None, parts), nn.ParameterList(biases)]

    def own_arguments(self, model: nn.Module) -> dict[str, Any]:
        fc_norm = not isinstance(model.fc_norm, nn.Identity)
        return {"use_fc_norm" if isinstance(model, Beit) else "fc_norm": fc_norm}


ADAPTER = TimmRelative()

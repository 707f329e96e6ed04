"""timm's Eva family, whose queries and keys are turned by their positions: DINOv3, Perception Encoder, EVA02, RoPE-ViT.

The model makes its rotary table in every forward and hands it to its blocks, one for all or one for each (mixed
frequencies), and each block to its attention. EVA itself has none.
"""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from timm.layers import AttentionRope, pos_embed_sincos
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn

from t5lib.families.base import AttentionCall
from t5lib.families.timm_base import TimmAdapter
from t5lib.layers.attention import RotaryTTTAttention


class TimmEva(TimmAdapter):
    """EVA, EVA02, DINOv3, Perception Encoder, RoPE-ViT and whatever else timm makes an Eva."""

    name = "timm_eva"
    model_class = Eva
    attention_classes = (EvaAttention, AttentionRope)
    layer_class = RotaryTTTAttention

    def reset_left_out(self, model: nn.Module, name: str, inherit: str) -> list[str]:
        """See Adapter; also what Eva does to the start of a deep block's last projections."""
        names = super().reset_left_out(model, name, inherit)
        depth = int(name.split(".")[1]) + 1
        with torch.no_grad():
            for last in ("attn.proj.weight", "mlp.fc2.weight"):
                if (full := f"blocks.{depth - 1}.{last}") in names:
                    model.get_parameter(full).div_((2 * depth) ** 0.5)
        return names

    def call_of(self, x: Tensor, rope: Tensor | None = None, *_others: Any, **_named: Any) -> AttentionCall:
        return AttentionCall((x,), rope)

    def call_attention(self, attention: nn.Module, call: AttentionCall) -> None:
        attention(*call.tokens, rope=call.rope)

    def projections(self, layer: nn.Module) -> list[nn.Module]:
        """See Adapter; biases of queries and values are parameters of the attention itself where it has them."""
        modules = [layer.q_proj, layer.k_proj, layer.v_proj] if layer.qkv is None else [layer.qkv]
        biases = [bias for name in ("q_bias", "v_bias") if (bias := getattr(layer, name, None)) is not None]
        return [*modules, layer.q_norm, layer.k_norm, nn.ParameterList(biases)]

    def tracing(self) -> AbstractContextManager:
        """See Adapter; DINOv3 divides by the grid's sides, and `float` would make constants of them."""
        return patch.object(pos_embed_sincos, "float", torch.sym_float, create=True)

    def own_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        }


ADAPTER = TimmEva()

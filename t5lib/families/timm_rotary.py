"""What the adapters of timm's models with rotary positions share.

Such a model makes its rotary table in every forward and hands it to its blocks, one for all or one for each (mixed
frequencies), and each block to its attention.
"""

from contextlib import AbstractContextManager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from timm.layers import AttentionRope, pos_embed_sincos
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from t5lib.families.base import AttentionCall
from t5lib.families.timm_base import TimmAdapter
from t5lib.layers.attention import RotaryTTTAttention


class TimmRotary(TimmAdapter):
    """Models whose attentions are EvaAttention or AttentionRope, called with the rotary table or without."""

    attention_classes: ClassVar[tuple[type[nn.Module], ...]] = (EvaAttention, AttentionRope)
    layer_class = RotaryTTTAttention

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

"""timm's NaFlexVit, called with images of one size: SigLIP 2 (NaFlex), RADIO and others.

What the model also takes, patches of images of several sizes in one padded sequence, needs a mask and is refused.
"""

from typing import Any

from timm.layers import Attention
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from t5lib.families.base import AttentionCall
from t5lib.families.refusals import PACKING, with_remedy
from t5lib.families.timm_rotary import TimmRotary
from t5lib.layers.attention import TTTAttention
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error


class TimmNaflex(TimmRotary):
    """NaFlexVit with plain or rotary attention; it takes images of any size."""

    name = "timm_naflex"
    model_classes = (NaFlexVit,)
    attention_classes = (Attention, *TimmRotary.attention_classes)

    @staticmethod
    def announce(embedding: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        if arguments[0].ndim != 4:
            raise T5Error(f"the model was called with patches {tuple(arguments[0].shape)}: {with_remedy(PACKING)}")
        TimmRotary.announce(embedding, arguments, output)

    def new_layer(self, model: nn.Module, attention: nn.Module, config: TTTConfig) -> TTTAttention:
        if type(attention) is Attention:
            return TTTAttention(attention, config, model.num_prefix_tokens)
        return super().new_layer(model, attention, config)

    def call_attention(self, attention: nn.Module, call: AttentionCall) -> None:
        attention(*call.tokens, **({} if call.rope is None else {"rope": call.rope}))

    def own_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": model.pool_include_prefix,
        }


ADAPTER = TimmNaflex()

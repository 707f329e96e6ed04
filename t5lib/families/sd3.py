"""Stable Diffusion 3 and 3.5 in diffusers: SD3Transformer2DModel with TTT layers, still an ordinary diffusers model.

Every block has a joint attention `attn` over image and text; the last one drops the text. The first blocks of
SD3.5-Medium have an attention over the image alone beside it, `attn2`; in the numbering of TTTConfig.layers these come
after all joint ones.

Source of the layer set "paper": "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772): all
`attn2` and the last five joint attentions.
"""

from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel  # ModelMixin: from_pretrained of a pipeline looks for it here
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from t5lib.families.diffusers_base import ConvertedModel, DiffusersAdapter, converting_init
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.layers.grid import one_pass
from t5lib.utils.errors import T5Error

__all__ = ["ADAPTER", "MEDIUM", "ModelMixin", "T5SD3Transformer2DModel"]

LAST_JOINT = 5  # of the layer set "paper"
MEDIUM: dict[str, Any] = {  # arguments of SD3Transformer2DModel as SD3.5-Medium has them
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


class T5SD3Transformer2DModel(ConvertedModel, SD3Transformer2DModel):  # type: ignore[misc]  # diffusers' own bases differ
    """An SD3Transformer2DModel with TTT layers; t5lib.convert makes them, from_pretrained and pipelines load them."""

    __init__ = converting_init(SD3Transformer2DModel, lambda: ADAPTER)
    forward = one_pass(SD3Transformer2DModel.forward, "pos_embed", "transformer_blocks")


class SD3(DiffusersAdapter):
    """Stable Diffusion 3 and 3.5."""

    name = "sd3"
    softmax_class = SD3Transformer2DModel
    converted_class = T5SD3Transformer2DModel
    processors = (JointAttnProcessor2_0,)

    def conditions(self, model: nn.Module) -> dict[str, tuple[int | str, ...]]:
        return {
            "timestep": (),
            "encoder_hidden_states": ("T", model.config.joint_attention_dim),
            "pooled_projections": (model.config.pooled_projection_dim,),
        }

    def check_blocks(self, model: nn.Module) -> None:
        for index, block in enumerate(model.transformer_blocks):
            if not isinstance(block, JointTransformerBlock):
                raise T5Error(f"transformer_blocks.{index} is {type(block).__name__}; expected JointTransformerBlock")

    def attention_names(self, model: nn.Module) -> list[str]:
        """The joint ones, then the image-only ones of the dual blocks."""
        blocks = list(enumerate(model.transformer_blocks))
        joint = [f"transformer_blocks.{index}.attn" for index, _ in blocks]
        return joint + [f"transformer_blocks.{index}.attn2" for index, block in blocks if block.attn2 is not None]

    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        depth, count = len(model.transformer_blocks), len(self.attention_names(model))
        return {"all": tuple(range(count)), "paper": tuple(range(max(0, depth - LAST_JOINT), count))}

    def example_conditions(self, model: nn.Module, size: ExampleSize, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(size.batch, *shape, generator=generator)

        text = normal(size.text_tokens, model.config.joint_attention_dim)
        return {"encoder_hidden_states": text, "pooled_projections": normal(model.config.pooled_projection_dim)}


ADAPTER: SD3 = SD3()

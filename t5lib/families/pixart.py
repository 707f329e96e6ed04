"""PixArt in diffusers, Σ and α: PixArtTransformer2DModel with TTT layers, still an ordinary diffusers model.

A block has a self-attention over the image, `attn1`, and a cross-attention to the text, `attn2`. The self-attentions
are converted. The cost of the cross-attentions is linear in the image's tokens as it is; they stay, with their masks.

Source: "PixArt-Σ" (arXiv 2403.04692), "PixArt-α" (arXiv 2310.00426).
"""

from typing import Any

import torch
from diffusers import (  # ModelMixin: from_pretrained of a pipeline looks for it here
    ModelMixin,
    PixArtTransformer2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from t5lib.families.diffusers_base import ConvertedModel, DiffusersAdapter, converting_init
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.layers.grid import one_pass
from t5lib.utils.errors import T5Error

__all__ = ["ADAPTER", "SIGMA", "ModelMixin", "T5PixArtTransformer2DModel"]

SIGMA: dict[str, Any] = {  # arguments of PixArtTransformer2DModel as PixArt-Σ XL has them at 1,024 px
    "sample_size": 128,
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
PIXELS_PER_LATENT = 8
MASK = "encoder_attention_mask"


class T5PixArtTransformer2DModel(ConvertedModel, PixArtTransformer2DModel):  # type: ignore[misc]  # diffusers' own bases differ
    """A PixArtTransformer2DModel with TTT layers; t5lib.convert makes them, from_pretrained and pipelines load them."""

    __init__ = converting_init(PixArtTransformer2DModel, lambda: ADAPTER)
    forward = one_pass(PixArtTransformer2DModel.forward, "pos_embed", "transformer_blocks")


class PixArt(DiffusersAdapter):
    """PixArt-Σ and PixArt-α."""

    name = "pixart"
    softmax_class = PixArtTransformer2DModel
    converted_class = T5PixArtTransformer2DModel
    processors = (AttnProcessor2_0,)

    def conditions(self, model: nn.Module) -> dict[str, tuple[int | str, ...]]:
        return {"timestep": (), "encoder_hidden_states": ("T", _caption_width(model))}

    def check_blocks(self, model: nn.Module) -> None:
        for index, block in enumerate(model.transformer_blocks):
            if not isinstance(block, BasicTransformerBlock):
                raise T5Error(f"transformer_blocks.{index} is {type(block).__name__}; expected BasicTransformerBlock")

    def attention_names(self, model: nn.Module) -> list[str]:
        """The self-attentions."""
        return [f"transformer_blocks.{index}.attn1" for index in range(len(model.transformer_blocks))]

    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """No smaller set is published or measured; "auto" measures one."""
        return {"all": tuple(range(len(model.transformer_blocks)))}

    def check_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        """See Adapter; also the text's mask, if there is one."""
        super().check_inputs(model, inputs)
        mask, text = inputs.get(MASK), inputs["encoder_hidden_states"]
        if mask is not None and mask.shape != text.shape[:2]:
            raise T5Error(f"{MASK} of a batch is {tuple(mask.shape)}; of this text it is {tuple(text.shape[:2])}")

    def call(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """See Adapter; PixArt-α of 1,024 px also takes the size of the image, which the others ignore."""
        latents = inputs[self.input_name]
        height, width = (side * PIXELS_PER_LATENT for side in latents.shape[-2:])

        def column(value: float) -> Tensor:  # made on the device: a copy to it could not be part of a CUDA graph
            return latents.new_full((len(latents), 1), value)

        size = {
            "resolution": torch.cat((column(height), column(width)), dim=1),
            "aspect_ratio": column(height / width),
        }
        return model(**inputs, added_cond_kwargs=size, return_dict=False)[0]

    def num_tokens(self, model: nn.Module, inputs: Inputs) -> int:
        """See Adapter; self-attention sees no text."""
        grid = self.grid(model, inputs)
        return grid.rows * grid.columns

    def example_conditions(self, model: nn.Module, size: ExampleSize, generator: torch.Generator) -> Inputs:
        shape = (size.batch, size.text_tokens)
        text = torch.randn(*shape, _caption_width(model), generator=generator)
        return {"encoder_hidden_states": text, MASK: torch.ones(shape)}


def _caption_width(model: nn.Module) -> int:
    """Channels of the text, which is projected unless they are the cross-attention's."""
    return model.config.caption_channels or model.config.cross_attention_dim


ADAPTER: PixArt = PixArt()

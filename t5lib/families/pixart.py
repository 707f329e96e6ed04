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
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from t5lib.families.diffusers_base import ConvertedModel, DiffusersAdapter
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.layers.config import TTTConfig
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
    """A PixArtTransformer2DModel with TTT layers; t5lib.convert makes them, from_pretrained and pipelines load them.

    Args:
        t5_config: of the new layers, as plain values (t5lib.utils.config.to_dict); None for softmax attention. The
            others are those of diffusers' class.
    """

    t5_config: TTTConfig | None = None
    forward = one_pass(PixArtTransformer2DModel.forward, "pos_embed", "transformer_blocks")
    # diffusers' own, and what is new; a list, as there
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single", "mixer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        t5_config: dict[str, Any] | None = None,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            interpolation_scale=interpolation_scale,
            use_additional_conditions=use_additional_conditions,
            caption_channels=caption_channels,
            attention_type=attention_type,
        )
        ADAPTER.convert_as_told(self, t5_config)


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
        """See Adapter; PixArt-α of 1,024 px is told the size of the image too, which the others ignore."""
        latents = inputs[self.input_name]
        height, width = (side * PIXELS_PER_LATENT for side in latents.shape[-2:])
        size = {
            "resolution": latents.new_tensor([height, width]).repeat(len(latents), 1),
            "aspect_ratio": latents.new_tensor([height / width]).repeat(len(latents), 1),
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


ADAPTER = PixArt()

"""Qwen-Image in diffusers: QwenImageTransformer2DModel with TTT layers, still an ordinary diffusers model.

Every block has a joint attention `attn` over image and text, which rotates queries and keys. A forward is told where
its tokens lie by `img_shapes`: for each latent (frames, rows, columns) of every image that it sees.

Source: "Qwen-Image Technical Report" (arXiv 2508.02324).
"""

from typing import Any

import torch
from diffusers import (  # ModelMixin: from_pretrained of a pipeline looks for it here
    ModelMixin,
    QwenImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from torch import Tensor, nn

from t5lib.families.diffusers_base import ConvertedModel, converting_init
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.families.packed_latents import PackedLatentsAdapter, RotaryJointTTTAttention, telling_its_grid
from t5lib.layers.grid import TokenGrid
from t5lib.layers.split import RowsOfGrid
from t5lib.utils.errors import T5Error

__all__ = ["ADAPTER", "QWEN_IMAGE", "ModelMixin", "T5QwenImageTransformer2DModel"]

QWEN_IMAGE: dict[str, Any] = {}  # arguments of QwenImageTransformer2DModel as Qwen-Image has them: the defaults
MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask")


def grid_of(shapes: list[Any] | None) -> tuple[int, int]:
    """Rows and columns of the one image that each latent is.

    Raises:
        T5Error: a latent sees several images or frames, or latents are of different sizes.
    """
    if not shapes:
        raise T5Error(
            "a converted Qwen-Image is called without img_shapes, which give its grid; pass them as the pipeline does"
        )
    every = [tuple(each) for latent in shapes for each in (latent if isinstance(latent, list) else [latent])]
    if len(every) > len(shapes) or len(set(every)) > 1 or every[0][0] != 1:
        raise T5Error(
            f"img_shapes are {shapes}; expected (1, rows, columns) of one image for every latent, all of one size. A "
            "converted Qwen-Image draws one image and sees no others beside it (Edit, Layered); use the softmax "
            "pipeline for those (t5lib.revert of the transformer)"
        )
    return every[0][1], every[0][2]


class QwenImageTTTAttention(RotaryJointTTTAttention):
    """The layer that replaces the joint Attention of Qwen-Image.

    The angles are complex numbers of modulus 1, (N, D / 2) for the image and (T, D / 2) for the text.
    """

    @staticmethod
    def table(angles: tuple[Tensor, Tensor], tokens: int) -> Tensor:
        turns = torch.cat(angles)
        return torch.cat((turns.imag, turns.real), dim=-1).repeat_interleave(2, dim=-1)

    @staticmethod
    def angles(table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        sines, cosines = table[:, ::2].chunk(2, dim=-1)
        image, text = torch.complex(cosines, sines).tensor_split((tokens,))
        return image, text

    @staticmethod
    def own_angles(angles: tuple[Tensor, Tensor], grid: RowsOfGrid) -> tuple[Tensor, Tensor]:
        image, text = angles
        return image[grid.tokens], text

    def forward(  # type: ignore[override]  # as the softmax attentions are called, which differ too
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        grid: TokenGrid | None = None,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See RotaryJointTTTAttention.

        Args:
            encoder_hidden_states_mask: (B, T) bool, which tokens are text and no padding. With it the layer runs latent
                by latent, on the text that each has: what padding gives no attention sees.
        """
        common = {"attention_mask": attention_mask, "grid": grid, **others}
        if encoder_hidden_states_mask is None:
            return super().forward(hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb, **common)
        (image_turns, text_turns), rows = image_rotary_emb, []
        for x, text, mask in zip(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, strict=True):
            turns = (image_turns, text_turns[mask])
            o, text_o = super().forward(x[None], text[None, mask], image_rotary_emb=turns, **common)
            rows.append((o, torch.zeros_like(text[None]).masked_scatter(mask[:, None], text_o)))
        o, text_o = (torch.cat(part) for part in zip(*rows, strict=True))
        return o, text_o


class T5QwenImageTransformer2DModel(ConvertedModel, QwenImageTransformer2DModel):  # type: ignore[misc]  # diffusers' own bases differ
    """A QwenImageTransformer2DModel with TTT layers: t5lib.convert makes it, from_pretrained and pipelines load it."""

    __init__ = converting_init(QwenImageTransformer2DModel, lambda: ADAPTER)
    forward = telling_its_grid(QwenImageTransformer2DModel.forward, "img_shapes", grid_of, "transformer_blocks")


class QwenImage(PackedLatentsAdapter):
    """Qwen-Image."""

    name = "qwen_image"
    softmax_class = QwenImageTransformer2DModel
    converted_class = T5QwenImageTransformer2DModel
    layer_class = QwenImageTTTAttention
    processors = (QwenDoubleStreamAttnProcessor2_0,)
    tokens_from = "img_in"
    mlps = ("img_mlp", "txt_mlp")

    def conditions(self, model: nn.Module) -> dict[str, tuple[int | str, ...]]:
        return {"timestep": (), "encoder_hidden_states": ("T", model.config.joint_attention_dim)}

    def check_blocks(self, model: nn.Module) -> None:
        for index, block in enumerate(model.transformer_blocks):
            if not isinstance(block, QwenImageTransformerBlock):
                kind = type(block).__name__
                raise T5Error(f"transformer_blocks.{index} is {kind}; expected QwenImageTransformerBlock")

    def attention_names(self, model: nn.Module) -> list[str]:
        return [f"transformer_blocks.{index}.attn" for index in range(len(model.transformer_blocks))]

    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """No smaller set is published or measured; "auto" measures one."""
        return {"all": tuple(range(len(model.transformer_blocks)))}

    def places(self, inputs: Inputs, grid: TokenGrid) -> dict[str, Any]:
        return {"img_shapes": [[(1, grid.rows, grid.columns)]] * len(inputs[self.input_name])}

    def check_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        """See Adapter; texts of a batch are of one length here, unlike in a pipeline."""
        if masks := [name for name in MASKS if name in inputs]:
            raise T5Error(
                f"a batch holds {masks[0]}, and layers are fitted and measured on text without padding; make batches "
                "of prompts with equally many tokens, or of one prompt each, and leave the mask out"
            )
        super().check_inputs(model, inputs)

    def example_conditions(self, model: nn.Module, size: ExampleSize, generator: torch.Generator) -> Inputs:
        shape = (size.batch, size.text_tokens, model.config.joint_attention_dim)
        return {"encoder_hidden_states": torch.randn(shape, generator=generator)}


ADAPTER: QwenImage = QwenImage()

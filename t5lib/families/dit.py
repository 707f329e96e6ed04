"""DiT in diffusers: DiTTransformer2DModel with TTT layers, still an ordinary diffusers model.

Source: "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).
"""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin  # ModelMixin: from_pretrained of a pipeline looks for it here
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from t5lib.families.diffusers_base import ConvertedModel, DiffusersAdapter, latent_grid
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.layers.grid import TokenGrid, one_pass, tell_grid
from t5lib.utils.errors import T5Error

__all__ = ["ADAPTER", "ModelMixin", "T5DiTTransformer2DModel"]

SPACING = "downscale_freq_shift"  # of the timestep embedding's frequencies


class T5DiTTransformer2DModel(ConvertedModel, DiTTransformer2DModel):  # type: ignore[misc]  # diffusers' own bases differ
    """A DiTTransformer2DModel with TTT layers; t5lib.convert makes them, from_pretrained and pipelines load them.

    Args:
        t5_config: of the new layers, as plain values (t5lib.utils.config.to_dict); None for softmax attention.
        downscale_freq_shift: how the frequencies of the timestep embedding are spaced, 10000^(-i / (half - shift)):
            1 as in diffusers, 0 as in DiT's own code. The others are those of diffusers' class.
    """

    forward = one_pass(DiTTransformer2DModel.forward, "pos_embed", "transformer_blocks")

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        downscale_freq_shift: int = 1,
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
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = downscale_freq_shift
        ADAPTER.convert_as_told(self, t5_config)


class DiT(DiffusersAdapter):
    """DiT of every size."""

    name = "dit"
    softmax_class = DiTTransformer2DModel
    converted_class = T5DiTTransformer2DModel
    processors = (AttnProcessor2_0,)
    tokens_to = "proj_out_2"

    def conditions(self, model: nn.Module) -> dict[str, tuple[int | str, ...]]:
        return {"timestep": (), "class_labels": ()}

    def attention_names(self, model: nn.Module) -> list[str]:
        return [f"transformer_blocks.{index}.attn1" for index in range(len(model.transformer_blocks))]

    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The paper converts all."""
        everything = tuple(range(len(model.transformer_blocks)))
        return {"all": everything, "paper": everything}

    def check_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        """See Adapter; also the class numbers, of which the last stands for none."""
        super().check_inputs(model, inputs)
        labels, most = inputs["class_labels"], model.config.num_embeds_ada_norm
        if labels.is_floating_point() or not 0 <= labels.min() <= labels.max() <= most:
            raise T5Error(
                f"class_labels go from {labels.min().item()} to {labels.max().item()}; expected whole numbers, 0 to "
                f"{most - 1}, or {most} for no class"
            )

    def grid(self, model: nn.Module, inputs: Inputs) -> TokenGrid:
        return TokenGrid(*_square_grid(model.pos_embed, inputs[self.input_name]))

    @staticmethod
    def announce(embedding: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        tell_grid(embedding, *_square_grid(embedding, arguments[0]))

    def example_conditions(self, model: nn.Module, size: ExampleSize, generator: torch.Generator) -> Inputs:
        return {"class_labels": torch.randint(model.config.num_embeds_ada_norm, (size.batch,), generator=generator)}

    def restore_class(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Return to diffusers' class, unless that cannot hold the spacing of the model's timestep embedding."""
        if self.holds(config):
            super().restore_class(model, {n: value for n, value in config.items() if n != SPACING})
        else:
            model._internal_dict = FrozenDict(config)

    def holds(self, arguments: dict[str, Any]) -> bool:
        return arguments.get(SPACING, 1) == 1


def _square_grid(embedding: nn.Module, latents: Tensor) -> tuple[int, int]:
    """The grid of latents; diffusers' DiT cannot put others than square ones together again."""
    rows, columns = latent_grid(embedding, latents)
    if rows != columns:
        height, width = latents.shape[-2:]
        raise T5Error(f"a DiT takes square latents only, got {height}×{width}; crop or resize the images")
    return rows, columns


ADAPTER = DiT()

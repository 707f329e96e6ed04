"""DiT in diffusers: DiTTransformer2DModel with TTT layers, still an ordinary diffusers model.

Source: "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).
"""

from typing import Any

from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel, ModelMixin  # ModelMixin: from_pretrained of a pipeline looks for it here
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from t5lib.families.diffusers_base import (
    LatentGrid,
    check_attention,
    fixed_grid,
    follow_inputs,
    mark_as,
    new_layer,
    project,
    projections,
    remove_grid,
    reset_left_out,
    softmax_arguments,
    softmax_attention,
    watch,
)
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import from_dict, to_dict
from t5lib.utils.errors import T5Error

__all__ = [
    "PACKAGE",
    "ModelMixin",
    "T5DiTTransformer2DModel",
    "attention_names",
    "build",
    "check_convertible",
    "describe",
    "fixed_grid",
    "follow_inputs",
    "layer_sets",
    "make_grid",
    "mark",
    "new_layer",
    "project",
    "projections",
    "remove_grid",
    "reset_left_out",
    "skeleton",
    "softmax_attention",
    "unmark",
    "watch",
]

PACKAGE = "diffusers"


class T5DiTTransformer2DModel(DiTTransformer2DModel):
    """A DiTTransformer2DModel with TTT layers; t5lib.convert makes them, from_pretrained and pipelines load them.

    Args:
        t5_config: of the new layers, as plain values (t5lib.utils.config.to_dict); None for softmax attention.
        downscale_freq_shift: how the frequencies of the timestep embedding are spaced, 10000^(-i / (half - shift)):
            1 as in diffusers, 0 as in DiT's own code. The others are those of diffusers' class.
    """

    t5_config: TTTConfig | None = None
    _skip_layerwise_casting_patterns = ("pos_embed", "norm", "mixer")  # diffusers' own, and what is new

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
        if t5_config:
            from t5lib.conversion import convert

            convert(self, from_dict(TTTConfig, dict(t5_config), "config.json: t5_config"), inplace=True)


class SquareLatentGrid(LatentGrid):
    """A LatentGrid that refuses what diffusers' DiT cannot put together again."""

    def __call__(self, patch_embed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__call__(patch_embed, inputs)
        if self.rows != self.columns:
            height, width = inputs[0].shape[-2:]
            raise T5Error(f"a DiT takes square latents only, got {height}×{width}; crop or resize the images")


def check_convertible(model: nn.Module) -> None:
    """Raises T5Error naming what in `model` cannot be converted, and why."""
    if type(model) not in (DiTTransformer2DModel, T5DiTTransformer2DModel):
        raise T5Error(
            f"{type(model).__name__} is not diffusers' DiTTransformer2DModel but made of it; pass that itself"
        )
    for name in attention_names(model):
        check_attention(model.get_submodule(name), name, (AttnProcessor2_0,))


def attention_names(model: nn.Module) -> list[str]:
    """Names of all self-attentions, in order; position i is layer i of TTTConfig.layers."""
    return [f"transformer_blocks.{index}.attn1" for index in range(len(model.transformer_blocks))]


def layer_sets(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What TTTConfig.layers may name: the paper converts all."""
    everything = tuple(range(len(model.transformer_blocks)))
    return {"all": everything, "paper": everything}


def make_grid(model: nn.Module) -> SquareLatentGrid:
    """A grid that follows the size of every latent `model` sees."""
    grid = SquareLatentGrid(model.pos_embed.height, model.pos_embed.width)
    follow_inputs(model, grid)
    return grid


def mark(model: DiTTransformer2DModel, config: TTTConfig) -> None:
    """Make `model` a T5DiTTransformer2DModel, in place, whose config.json will tell its layers."""
    mark_as(model, T5DiTTransformer2DModel, config)


def unmark(model: T5DiTTransformer2DModel) -> None:
    """Back to diffusers' class, unless that cannot hold the spacing of the model's timestep embedding."""
    left = {name: value for name, value in model.config.items() if name != "t5_config"}
    if left.get("downscale_freq_shift", 1) == 1:
        left.pop("downscale_freq_shift", None)
        model.__class__ = DiTTransformer2DModel
    model._internal_dict = FrozenDict(left)
    del model.t5_config, model.t5_report


def describe(model: DiTTransformer2DModel) -> tuple[str, dict[str, Any]]:
    """The name of diffusers' class and the arguments that rebuild `model` (weights aside)."""
    return "DiTTransformer2DModel", softmax_arguments(model)


def build(architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> DiTTransformer2DModel:
    """The model of `describe`, with fresh weights and, given `config`, converted."""
    if architecture != "DiTTransformer2DModel":
        raise T5Error(f"expected a DiTTransformer2DModel, got '{architecture}'")
    if config is None and "downscale_freq_shift" not in arguments:
        return DiTTransformer2DModel(**arguments)
    return T5DiTTransformer2DModel(**arguments, t5_config=to_dict(config) if config else None)


def skeleton(architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> DiTTransformer2DModel:
    """As `build`, with no weights: parameters are on the meta device, buffers (not all are saved) are made."""
    with init_empty_weights():
        return build(architecture, arguments, config)

"""Stable Diffusion 3 and 3.5 in diffusers: SD3Transformer2DModel with TTT layers, still an ordinary diffusers model.

Every block has a joint attention `attn` over image and text; the last one drops the text. The first blocks of
SD3.5-Medium have an attention over the image alone beside it, `attn2`; in the numbering of TTTConfig.layers these come
after all joint ones.

Source of the layer set "paper": "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772): all
`attn2` and the last five joint attentions.
"""

from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin, SD3Transformer2DModel  # ModelMixin: from_pretrained of a pipeline looks for it here
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

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
    "MEDIUM",
    "PACKAGE",
    "ModelMixin",
    "T5SD3Transformer2DModel",
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
LAST_JOINT = 5  # of the layer set "paper"
MEDIUM = {  # arguments of SD3Transformer2DModel as SD3.5-Medium has them
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


class T5SD3Transformer2DModel(SD3Transformer2DModel):
    """An SD3Transformer2DModel with TTT layers; t5lib.convert makes them, from_pretrained and pipelines load them.

    Args:
        t5_config: of the new layers, as plain values (t5lib.utils.config.to_dict); None for softmax attention. The others
            are those of diffusers' class.
    """

    t5_config: TTTConfig | None = None
    _skip_layerwise_casting_patterns = ("pos_embed", "norm", "mixer")  # diffusers' own, and what is new

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        t5_config: dict[str, Any] | None = None,
    ):
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        if t5_config:
            from t5lib.conversion import convert

            convert(self, from_dict(TTTConfig, dict(t5_config), "config.json: t5_config"), inplace=True)


def check_convertible(model: nn.Module) -> None:
    """Raises T5Error naming what in `model` cannot be converted, and why."""
    if type(model) not in (SD3Transformer2DModel, T5SD3Transformer2DModel):
        raise T5Error(
            f"{type(model).__name__} is not diffusers' SD3Transformer2DModel but made of it; pass that itself"
        )
    for index, block in enumerate(model.transformer_blocks):
        if not isinstance(block, JointTransformerBlock):
            raise T5Error(f"transformer_blocks.{index} is {type(block).__name__}; expected JointTransformerBlock")
    for name in attention_names(model):
        check_attention(model.get_submodule(name), name, (JointAttnProcessor2_0,))


def attention_names(model: nn.Module) -> list[str]:
    """Names of all attentions: the joint ones, then the image-only ones of the dual blocks."""
    blocks = list(enumerate(model.transformer_blocks))
    joint = [f"transformer_blocks.{index}.attn" for index, _ in blocks]
    return joint + [f"transformer_blocks.{index}.attn2" for index, block in blocks if block.attn2 is not None]


def layer_sets(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What TTTConfig.layers may name."""
    depth, count = len(model.transformer_blocks), len(attention_names(model))
    return {"all": tuple(range(count)), "paper": tuple(range(max(0, depth - LAST_JOINT), count))}


def make_grid(model: nn.Module) -> LatentGrid:
    """A LatentGrid that follows the size of every latent `model` sees."""
    grid = LatentGrid(model.pos_embed.height, model.pos_embed.width)
    follow_inputs(model, grid)
    return grid


def mark(model: SD3Transformer2DModel, config: TTTConfig) -> None:
    """Make `model` a T5SD3Transformer2DModel, in place, whose config.json will tell its layers."""
    mark_as(model, T5SD3Transformer2DModel, config)


def unmark(model: T5SD3Transformer2DModel) -> None:
    model.__class__ = SD3Transformer2DModel
    model._internal_dict = FrozenDict({name: value for name, value in model.config.items() if name != "t5_config"})
    del model.t5_config, model.t5_report


def describe(model: SD3Transformer2DModel) -> tuple[str, dict[str, Any]]:
    """The name of diffusers' class and the arguments that rebuild `model` (weights aside)."""
    return "SD3Transformer2DModel", softmax_arguments(model)


def build(architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> SD3Transformer2DModel:
    """The model of `describe`, with fresh weights and, given `config`, converted."""
    if architecture != "SD3Transformer2DModel":
        raise T5Error(f"expected an SD3Transformer2DModel, got '{architecture}'")
    if config is None:
        return SD3Transformer2DModel(**arguments)
    return T5SD3Transformer2DModel(**arguments, t5_config=to_dict(config))


def skeleton(architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> SD3Transformer2DModel:
    """As `build`, with no weights: parameters are on the meta device, buffers (not all are saved) are made."""
    with init_empty_weights():
        return build(architecture, arguments, config)

"""Where the parts of the vision transformers of transformers are: the same everywhere, under various names.

A model is a vision tower (ViTModel, SiglipVisionModel, …), or holds one among its heads, decoders and text towers.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


@dataclass(frozen=True)
class Names:
    """Names of the parts of a tower.

    Attributes:
        patches: the convolution that makes a token of every patch.
        blocks: their container, which the tower's forward iterates.
        attention: in a block.
        output: the last projection in an attention.
    """

    patches: str
    blocks: str
    attention: str = "attention"
    output: str = "o_proj"


_VIT = Names("embeddings.patch_embeddings.projection", "layers")
_DINOV2 = Names("embeddings.patch_embeddings.projection", "encoder.layer")
_DINOV3 = Names("embeddings.patch_embeddings", "model.layer")
_CLIP = Names("embeddings.patch_embedding", "encoder.layers", "self_attn", "out_proj")
TOWERS = {
    **dict.fromkeys(("ViTModel", "DeiTModel", "ViTMSNModel", "ViTMAEModel", "IJepaModel"), _VIT),
    **dict.fromkeys(("Dinov2Model", "Dinov2Backbone"), _DINOV2),
    **dict.fromkeys(("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), _DINOV2),
    **dict.fromkeys(("DINOv3ViTModel", "DINOv3ViTBackbone"), _DINOV3),
    **dict.fromkeys(("SiglipVisionModel", "CLIPVisionModel", "MetaClip2VisionModel"), _CLIP),
}
ATTENTIONS = {
    *("ViTAttention", "DeiTAttention", "ViTMSNAttention", "ViTMAEAttention", "IJepaAttention", "Dinov2Attention"),
    *("Dinov2WithRegistersAttention", "DINOv3ViTAttention", "SiglipAttention", "CLIPAttention", "MetaClip2Attention"),
}
PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # of embeddings, before the patches


class Tower(NamedTuple):
    """A vision tower in a model.

    Attributes:
        path: its name, "" where it is the model itself.
        module: the tower.
        names: of its parts.
    """

    path: str
    module: nn.Module
    names: Names

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which come before those of the patches."""
        present = (getattr(self.module.embeddings, name, None) for name in PREFIX)
        return sum(math.prod(tokens.shape[:-1]) for tokens in present if tokens is not None)

    @property
    def patches(self) -> nn.Conv2d:
        return self.module.get_submodule(self.names.patches)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.module.get_submodule(self.names.blocks)

    @property
    def attention_names(self) -> list[str]:
        """Names of the attentions in the model."""
        start = f"{self.path}.{self.names.blocks}".lstrip(".")
        return [f"{start}.{index}.{self.names.attention}" for index in range(len(self.blocks))]


def names_of(kind: type) -> Names | None:
    """Names of the parts of models of the class `kind`; None if it is not a vision tower."""
    return next((TOWERS[base.__name__] for base in kind.__mro__ if base.__name__ in TOWERS), None)


def tower_of(model: nn.Module) -> Tower | None:
    """The first vision tower in `model`, None where there is none."""
    for path, module in model.named_modules():
        if names := names_of(type(module)):
            return Tower(path, module, names)
    return None

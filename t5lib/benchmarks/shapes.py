"""Denoisers in the shapes in which they are published, with random weights: weights do not matter to speed, and many of
the real ones are gated."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from t5lib.families import flux, pixart, qwen_image, sd3
from t5lib.families.diffusers_base import DiffusersAdapter


@dataclass(frozen=True)
class Shape:
    """A denoiser and what it is called with.

    Attributes:
        family: its adapter.
        arguments: of diffusers' class, where they differ from its defaults.
        text_tokens: as many as its pipeline makes of a prompt; of Qwen-Image, which pads none, those of a long one.
        batch: latents in a forward pass; 2 with guidance (with and without the prompt), 1 where guidance is distilled.
    """

    family: DiffusersAdapter
    arguments: dict[str, Any]
    text_tokens: int
    batch: int = 2

    def shallower(self, blocks: int) -> "Shape":
        """The first `blocks` blocks; of Flux, twice as many single ones."""
        changed = self.arguments | {"num_layers": blocks}
        if dual := changed.get("dual_attention_layers"):
            changed["dual_attention_layers"] = tuple(index for index in dual if index < blocks)
        if self.family is flux.ADAPTER:
            changed["num_single_layers"] = 2 * blocks
        return replace(self, arguments=changed)

    def make(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The softmax model, in eval mode."""
        torch.manual_seed(0)
        with torch.device(device):
            return nn.Module.to(self.family.softmax_class(**self.arguments), dtype).eval()


SHAPES = {
    "sd35-medium": Shape(sd3.ADAPTER, sd3.MEDIUM, text_tokens=333),
    "flux-dev": Shape(flux.ADAPTER, flux.DEV, text_tokens=512, batch=1),
    "pixart-sigma-1024": Shape(pixart.ADAPTER, pixart.SIGMA, text_tokens=300),
    "qwen-image": Shape(qwen_image.ADAPTER, qwen_image.QWEN_IMAGE, text_tokens=256),
}

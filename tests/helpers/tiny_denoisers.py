"""Tiny denoisers of diffusers and batches for them; a forward pass takes a few milliseconds."""

from collections.abc import Iterator
from itertools import count

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

HEADS, HEAD_DIM, CHANNELS, SIDE, TEXT, CLASSES = 2, 8, 4, 8, 3, 5
CAPTION, POOLED = 6, 10


def _randomized(model: nn.Module) -> nn.Module:
    """In eval mode, with every parameter random, also those that start at zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_sd3(*, seed: int = 0, **changes) -> SD3Transformer2DModel:
    """As SD3.5-Medium is: dual attention first, q/k RMS norms, no text after the last block."""
    settings = {
        "sample_size": SIDE,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 3,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": CAPTION,
        "caption_projection_dim": HEADS * HEAD_DIM,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 2 * SIDE,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _randomized(SD3Transformer2DModel(**settings | changes))


def tiny_dit(*, seed: int = 0, learned_variance: bool = True, **changes) -> DiTTransformer2DModel:
    settings = {
        "sample_size": SIDE,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS * (2 if learned_variance else 1),
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_embeds_ada_norm": CLASSES,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _randomized(DiTTransformer2DModel(**settings | changes))


def tiny_flux(*, seed: int = 0, guidance: bool = True, **changes) -> FluxTransformer2DModel:
    """As Flux.1-dev is, with two joint and two single blocks; `guidance=False`: as schnell."""
    settings = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": CAPTION,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": guidance,
        "axes_dims_rope": (2, 2, 4),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _randomized(FluxTransformer2DModel(**settings | changes))


def tiny_pixart(*, seed: int = 0, **changes) -> PixArtTransformer2DModel:
    """As PixArt-Σ is."""
    settings = {
        "sample_size": SIDE,
        "in_channels": CHANNELS,
        "out_channels": 2 * CHANNELS,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "caption_channels": CAPTION,
        "use_additional_conditions": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _randomized(PixArtTransformer2DModel(**settings | changes))


def tiny_qwen_image(*, seed: int = 0, **changes) -> QwenImageTransformer2DModel:
    settings = {
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": CAPTION,
        "axes_dims_rope": (2, 2, 4),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _randomized(QwenImageTransformer2DModel(**settings | changes))


def sd3_batch(number: int, size: int = 4, height: int = SIDE, width: int = SIDE) -> dict[str, Tensor]:
    """Also Flux's."""
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(size, CHANNELS, height, width, generator=generator),
        "prompt_embeds": torch.randn(size, TEXT, CAPTION, generator=generator),
        "pooled": torch.randn(size, POOLED, generator=generator),
    }


def dit_batch(number: int, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(size, CHANNELS, SIDE, SIDE, generator=generator),
        "labels": torch.randint(CLASSES + 1, (size,), generator=generator),
    }


def sd3_batches(start: int) -> Iterator[dict[str, Tensor]]:
    return (sd3_batch(number) for number in count(start))


def pixart_batch(number: int, size: int = 4, height: int = SIDE, width: int = SIDE) -> dict[str, Tensor]:
    """The last token of every text pads it."""
    batch = sd3_batch(number, size, height, width)
    mask = torch.ones(size, TEXT, dtype=torch.long)
    mask[:, -1] = 0
    return {"latents": batch["latents"], "prompt_embeds": batch["prompt_embeds"], "prompt_mask": mask}


def qwen_image_batch(number: int, size: int = 4, height: int = SIDE, width: int = SIDE) -> dict[str, Tensor]:
    return {name: t for name, t in sd3_batch(number, size, height, width).items() if name != "pooled"}


def dit_batches(start: int) -> Iterator[dict[str, Tensor]]:
    return (dit_batch(number) for number in count(start))

"""What a forward pass is measured on: a model made fit for a resolution, and random inputs of that size.

Shapes: B images, C channels, T text tokens.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.data.batches import Inputs
from t5lib.families import family_of
from t5lib.utils.errors import T5Error


def at_resolution(model: nn.Module, resolution: int, pixels_per_latent: int = 8) -> nn.Module:
    """A copy of a model, in eval mode, for square images of `resolution` pixels; timm's position table resampled.

    Raises:
        T5Error: `resolution` is no multiple of the patch size, or more than the model's positions hold.
    """
    if is_denoiser(model):
        _latent_side(model, resolution, pixels_per_latent)
        return copy.deepcopy(model).eval()
    _check_multiple(resolution, model.patch_embed.patch_size[0], "the patch size")
    model = copy.deepcopy(model).eval()
    model.set_input_size(img_size=(resolution, resolution))
    return model


def random_inputs(
    model: nn.Module, resolution: int, batch: int, *, pixels_per_latent: int = 8, text_tokens: int = 333
) -> Inputs:
    """What `model` is called with, float32 on the CPU: images (B, C, resolution, resolution), or for a denoiser the
    keyword arguments with latents, steps and conditions. The same numbers every time."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if not is_denoiser(model):
        return normal(batch, model.patch_embed.proj.in_channels, resolution, resolution)
    config, side = model.config, _latent_side(model, resolution, pixels_per_latent)
    inputs = {"hidden_states": normal(batch, config.in_channels, side, side)}
    inputs["timestep"] = torch.randint(1000, (batch,), generator=generator)
    if "num_embeds_ada_norm" in config:
        return inputs | {"class_labels": torch.randint(config.num_embeds_ada_norm, (batch,), generator=generator)}
    inputs["encoder_hidden_states"] = normal(batch, text_tokens, config.joint_attention_dim)
    return inputs | {"pooled_projections": normal(batch, config.pooled_projection_dim)}


def num_tokens(model: nn.Module, inputs: Inputs | None = None) -> int:
    """Tokens that attention sees in one image: patches and prefix tokens, of a denoiser's `inputs` also text tokens."""
    if not isinstance(inputs, dict):
        return model.patch_embed.num_patches + model.num_prefix_tokens
    rows, columns = (side // model.config.patch_size for side in inputs["hidden_states"].shape[-2:])
    text = inputs.get("encoder_hidden_states")
    return rows * columns + (0 if text is None else text.shape[1])


def is_denoiser(model: nn.Module) -> bool:
    return family_of(model).PACKAGE == "diffusers"


def output_of(model: Any, inputs: Inputs) -> Tensor:
    """The model's output."""
    return model(**inputs, return_dict=False)[0] if isinstance(inputs, dict) else model(inputs)


def cast_to(model: nn.Module, *where: torch.device | torch.dtype) -> nn.Module:
    """`model` itself, moved and in another precision; diffusers' own `to` would warn of every cast."""
    return nn.Module.to(model, *where)


def placed(inputs: Inputs, *where: torch.device | torch.dtype | str) -> Inputs:
    """Moved to a device, and in another precision where they are no numbers of steps or classes."""
    if not isinstance(inputs, dict):
        for each in where:
            inputs = inputs.to(each) if inputs.is_floating_point() or not isinstance(each, torch.dtype) else inputs
        return inputs
    return {name: placed(value, *where) for name, value in inputs.items()}


def first(inputs: Inputs, count: int) -> Inputs:
    """Of the first `count` images."""
    return {name: value[:count] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


def leading(inputs: Inputs) -> Tensor:
    """The images or latents."""
    return inputs["hidden_states"] if isinstance(inputs, dict) else inputs


def _latent_side(model: nn.Module, resolution: int, pixels_per_latent: int) -> int:
    patch = model.config.patch_size
    what = f"what a patch covers ({patch} latents of {pixels_per_latent} pixels),"
    _check_multiple(resolution, pixels_per_latent * patch, what)
    side, most = resolution // pixels_per_latent, (model.config.get("pos_embed_max_size") or 0) * patch
    if most and side > most:
        raise T5Error(
            f"resolution {resolution} gives latents of {side}, but the model's positions (pos_embed_max_size) end at "
            f"{most}; measure up to {most * pixels_per_latent} pixels"
        )
    return side


def _check_multiple(resolution: int, unit: int, what: str) -> None:
    if resolution % unit:
        nearest = max(1, round(resolution / unit)) * unit
        raise T5Error(f"resolution {resolution} is no multiple of {what} {unit}; nearest is {nearest}")

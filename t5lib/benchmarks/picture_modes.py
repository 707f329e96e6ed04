"""Stable Diffusion 3.5 Medium's denoiser in a pipeline of diffusers, made faster in the ways that users have."""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CacheMixin,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
from torch import Tensor, nn

from t5lib.families.inputs import Inputs
from t5lib.utils.errors import T5Error

EAGER, COMPILED, GRAPHS, FLOAT8, CACHE = "eager", "compiled", "graphs", "float8", "cache"
MODES = {
    EAGER: "nothing is compiled",
    COMPILED: "transformer.compile()",
    GRAPHS: 'transformer.compile(mode="reduce-overhead"), which are CUDA graphs',
    FLOAT8: "graphs, with the blocks' large linears in float8 (torchao)",
    CACHE: "each block compiled, and diffusers' first-block cache",
}
FLOAT8_FROM = (8, 9)  # compute capability
LARGE = 512  # channels; float8 gains nothing where matrices are smaller
FEWEST_CACHED = 3  # blocks: the cache compares the first, skips some, and leaves the last as it is
NO_TEXT = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]


def missing(mode: str, device: torch.device, blocks: int) -> str | None:
    """Why `mode` cannot be measured here; None where it can.

    Raises:
        T5Error: CUDA graphs without CUDA.
    """
    if mode == GRAPHS and device.type != "cuda":
        raise T5Error(f"the mode {GRAPHS} needs CUDA, and the device is {device}; choose others: --modes {EAGER}")
    if mode == FLOAT8:
        if importlib.util.find_spec("torchao") is None:
            return "torchao is not installed; pip install torchao"
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_FROM:
            return "float8 needs a CUDA card of compute capability 8.9 or more"
    if mode == CACHE and blocks < FEWEST_CACHED:
        return f"the cache needs {FEWEST_CACHED} blocks, and the model has {blocks}"
    return None


class Drawing:
    """A denoiser in one mode that draws square pictures with guidance, of made-up prompts.

    Args:
        model: will be changed.
        size: of the pictures, in pixels.
        text_tokens: of a prompt.
    """

    def __init__(self, model: SD3Transformer2DModel, mode: str, vae: AutoencoderKL, size: int, text_tokens: int):
        self.model, self.mode, self.size = model, mode, size
        self.config: Any = model.config
        self.text = self._text(text_tokens)
        self.cached: nn.Module | None = None
        if mode == FLOAT8:
            use_float8(model)
        if mode == COMPILED:
            model.compile()
        elif mode in (GRAPHS, FLOAT8):
            model.compile(mode="reduce-overhead")
        elif mode == CACHE:
            for block in model.transformer_blocks:
                block.forward = torch.compile(block.forward)
            self.second = model.transformer_blocks[1].forward = _Counted(model.transformer_blocks[1].forward)
        others: dict[str, Any] = dict.fromkeys(NO_TEXT)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.pipe = StableDiffusion3Pipeline(transformer=model, vae=vae, scheduler=scheduler, **others)
        self.pipe.set_progress_bar_config(disable=True)

    def latents(self, steps: int) -> Tensor:
        """Those of a picture, the same every time."""
        with self._cache():
            return self.pipe(
                **self.text,
                height=self.size,
                width=self.size,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images

    def decoded(self, latents: Tensor) -> Tensor:
        """Pixels, as the pipeline makes them."""
        config = self.pipe.vae.config
        return self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    def inputs(self) -> Inputs:
        """Of one pass, laid out like those in the pipeline: others would be compiled for anew."""
        model, device, draw = self.model, self.model.device, torch.Generator().manual_seed(1)
        side = self.size // self.pipe.vae_scale_factor
        latents = torch.randn(1, self.config.in_channels, side, side, generator=draw).to(device, model.dtype)
        both = (("negative_prompt_embeds", "prompt_embeds"), ("negative_pooled_prompt_embeds", "pooled_prompt_embeds"))
        texts = [torch.cat([self.text[name] for name in names]) for names in both]
        return {
            "hidden_states": torch.cat([latents] * 2),
            "timestep": torch.tensor(500.0, device=device).expand(2),
            "encoder_hidden_states": texts[0],
            "pooled_projections": texts[1],
        }

    def use_cache(self, threshold: float) -> None:
        """Skip blocks from now on; of a drawing in the mode CACHE."""
        self.cached = first_block_cache(self.model, threshold)

    @property
    def full_steps(self) -> int:
        """Steps that the last picture computed in full, with the cache."""
        return self.second.number

    @contextlib.contextmanager
    def _cache(self):
        if self.cached is None:
            yield
            return
        self.second.number = 0
        with CacheMixin.cache_context(self.cached, "picture"):
            yield
        HookRegistry.check_if_exists_or_initialize(self.cached).reset_stateful_hooks()

    def _text(self, tokens: int) -> Inputs:
        model, draw = self.model, torch.Generator().manual_seed(0)
        widths: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (tokens, self.config.joint_attention_dim),
            "pooled_prompt_embeds": (self.config.pooled_projection_dim,),
        }
        return {
            f"{kind}{name}": torch.randn(1, *width, generator=draw).to(model.device, model.dtype)
            for name, width in widths.items()
            for kind in ("", "negative_")
        }


class _Counted:
    """A call that counts how often it is made."""

    def __init__(self, call: Callable[..., Any]):
        self.call, self.number = call, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.number += 1
        return self.call(*args, **kwargs)


def first_block_cache(model: SD3Transformer2DModel, threshold: float) -> nn.Module:
    """Let `model` skip its blocks but the first and the last where the first one's output changes little.

    diffusers 0.42 does not support its cache for SD3: the model has no cache_context, and the last block returns no
    text, which the cache adds to. So the cache gets all blocks but the last.

    Returns:
        What CacheMixin.cache_context takes, around a picture; its state must be reset after each.
    """
    cached = nn.Module()
    cached.transformer_blocks = model.transformer_blocks[:-1]
    apply_first_block_cache(cached, FirstBlockCacheConfig(threshold))
    return cached


def use_float8(model: nn.Module) -> None:
    """Large linears of the blocks in float8, a scale for each row of weights and of activations."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # torchao would change settings of the compiler for the whole process, and so for the modes after this one.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(model, config, filter_fn=is_large)


def is_large(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear that all tokens pass; the modulation of norms is computed once for an image."""
    inside = name.startswith("transformer_blocks.") and ".norm" not in name
    return isinstance(module, nn.Linear) and inside and min(module.weight.shape) >= LARGE

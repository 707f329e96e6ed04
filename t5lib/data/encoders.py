"""What turns images into latents and captions into embeddings: frozen, used once, not needed for training.

Shapes: B batch, H × W pixels, C × h × w latent, L tokens of width D, P the pooled embedding's width.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_object
from t5lib.utils.weights import check_numbers, digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIPELINE_LOGGER = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"


class ImageEncoder:
    """Pixels in [-1, 1] → latents, scaled as the denoiser wants them: (mean of the posterior - shift) · scale.

    Args:
        vae: diffusers' AutoencoderKL, moved to `device`; None: the pixels themselves are the latents.
        channels: of the images where there is no VAE, 1 (grey) or 3 (RGB).
        patch: latents a token of the denoiser is wide, 2 for SD3 and DiT.
        dtype: fp32, bf16 or fp16. A VAE whose config says `force_upcast`, as that of SD3 does, stays in fp32.

    Attributes:
        multiple: pixels a token is wide, of which the sides of images must be multiples.

    Raises:
        T5Error: an unknown dtype, or channels that the VAE does not take.
    """

    def __init__(
        self, vae: nn.Module | None, *, channels: int = 3, patch: int = 2, dtype: str = "bf16", device: str = "cpu"
    ):
        one_of(dtype, DTYPES, "dtype")
        if channels not in (1, 3) or (vae is not None and channels != vae.config.in_channels):
            raise T5Error(f"images of {channels} channels: expected 1 or 3, and what the VAE takes where there is one")
        self.channels, self.device, self.dtype = channels, torch.device(device), DTYPES[dtype]
        self.vae, factor = vae, 1
        if vae is not None:
            self.dtype = torch.float32 if vae.config.force_upcast else self.dtype
            self.vae = vae.to(self.device, self.dtype).eval().requires_grad_(False)
            factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels a latent is wide
        self.multiple = factor * patch

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, C, h, w) float32, on the device."""
        pixels = pixels.to(self.device)
        if self.vae is None:
            return pixels.float()
        mean = self.vae.encode(pixels.to(self.dtype)).latent_dist.mean.float()
        return (mean - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def settings(self) -> dict[str, Any]:
        """All that decides about the latents, JSON-ready."""
        if self.vae is None:
            return {"vae": None, "channels": self.channels}
        config = self.vae.config
        return {
            "vae": digest(self.vae),
            "vae_dtype": str(self.dtype).removeprefix("torch."),
            "shift_factor": config.shift_factor or 0.0,
            "scaling_factor": config.scaling_factor,
        }


class TextEncoder:
    """Captions → what SD3's denoiser is given of them, computed by the pipeline's own `encode_prompt`.

    Args:
        pipeline: diffusers' StableDiffusion3Pipeline; of it only the tokenizers and text encoders are used and moved to
            `device`. Where it has no T5 encoder, zeros take its place, as in the pipeline; the transformer's
            config (not its weights) then gives their width.
        max_sequence_length: tokens of the T5 encoder.
        dtype: fp32, bf16 or fp16.

    Raises:
        T5Error: a pipeline without CLIP encoders, or with neither a T5 encoder nor the transformer's config; an unknown
            dtype; a length below 1.
    """

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 256, dtype: str = "bf16", device: str = "cpu"):
        one_of(dtype, DTYPES, "dtype")
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise T5Error("the pipeline has no CLIP text encoders; only the third one, T5, may be left out")
        if pipeline.text_encoder_3 is None and pipeline.transformer is None:
            raise T5Error("a pipeline without T5 encoder must have its transformer's config; use encoding_pipeline")
        if max_sequence_length < 1:
            raise T5Error(f"max_sequence_length is {max_sequence_length}; expected at least 1 token")
        self.pipeline, self.length = pipeline, max_sequence_length
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        for encoder in self._encoders():
            encoder.to(self.device, self.dtype).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions → prompt_embeds (B, L, D) and pooled (B, P), on the device. Longer captions are cut."""
        with _without_warnings():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                *([list(captions)] * 3),
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.length,
            )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def settings(self) -> dict[str, Any]:
        """All that decides about the embeddings, JSON-ready."""
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2, self.pipeline.tokenizer_3)
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in tokenizers if tokenizer]
        return {
            "text_encoders": [digest(encoder) for encoder in self._encoders()],
            "text_dtype": str(self.dtype).removeprefix("torch."),
            "tokenizers": hashlib.sha256(json.dumps(vocabularies).encode()).hexdigest()[:16],
            "max_sequence_length": self.length,
        }

    def _encoders(self) -> list[nn.Module]:
        found = (self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.text_encoder_3)
        return [encoder for encoder in found if encoder is not None]


def encoding_pipeline(folder: Path | str, dtype: str = "bf16") -> Any:
    """The StableDiffusion3Pipeline in `folder` without the weights of its transformer; the VAE in fp32.

    A folder from which the T5 encoder (text_encoder_3) was left out works too.

    Raises:
        T5Error: no pipeline folder of SD3.
    """
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline  # here: it takes 15 s to import

    one_of(dtype, DTYPES, "dtype")
    folder = Path(folder)
    index = read_object(folder / "model_index.json")
    if "text_encoder_2" not in index or "transformer" not in index:
        raise T5Error(f"{folder} holds a {index.get('_class_name')}; expected the folder of a StableDiffusion3Pipeline")
    left_out = {"transformer": None}
    if not (folder / "text_encoder_3").is_dir():
        left_out |= {"text_encoder_3": None, "tokenizer_3": None}
    dtypes = {"vae": torch.float32, "default": DTYPES[dtype]}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtypes, **left_out)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            check_numbers(part.state_dict(), f"{folder}/{name}")
    if pipeline.text_encoder_3 is None:  # the zeros in its place are as wide as the transformer says
        config = SD3Transformer2DModel.load_config(str(folder), subfolder="transformer")
        with torch.device("meta"):
            pipeline.transformer = SD3Transformer2DModel.from_config(config)
    return pipeline


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The pipeline warns of every caption that is longer than CLIP's 77 tokens."""
    logger = logging.getLogger(PIPELINE_LOGGER)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

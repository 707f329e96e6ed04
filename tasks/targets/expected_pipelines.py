"""What we take for granted about the pipelines that params.yaml fetches, all of it, and what it means if it is not so.

Nobody has run the weights of these repositories here: this is what their publishers and diffusers say of them. It is
checked before the large files are fetched (the configs are some kilobytes), the weights' names, shapes and precision
after it (safetensors' headers).
"""

import re
from dataclasses import dataclass
from typing import Any

TRANSFORMER, VAE, SCHEDULER = "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"
CLIP, BIG_CLIP, T5 = (f"{part}/config.json" for part in ("text_encoder", "text_encoder_2", "text_encoder_3"))
INDEX = "model_index.json"

# What a setting that a config leaves out stands for, as diffusers reads it.
DEFAULTS: dict[str, dict[str, Any]] = {
    TRANSFORMER: {"dual_attention_layers": [], "qk_norm": None, "norm_type": "ada_norm_zero"},
    VAE: {"scaling_factor": 0.18215, "shift_factor": None},
    SCHEDULER: {"shift": 1.0, "prediction_type": "epsilon"},
}

# What another value means, by file and setting; of others the file's own sentence, under None.
MEANINGS: dict[str, dict[str | None, str]] = {
    INDEX: {None: "this code was written for another pipeline"},
    TRANSFORMER: {
        None: "the model has another size: memory, hours and disk are estimated for the wrong one",
        "dual_attention_layers": "the layer set 'paper' names other attentions than the paper converted",
        "qk_norm": "queries and keys are normalized differently from the layers that we calibrated",
        "patch_size": "a token covers another number of pixels: sizes in params.yaml may not be multiples of it",
        "pos_embed_max_size": "its largest image has another size",
        "sample_size": "images are of another size where params.yaml names none",
    },
    VAE: {
        None: "a latent covers other pixels, or holds other numbers",
        "scaling_factor": "encoded images are scaled differently; they follow the file, so encode them again",
        "shift_factor": "encoded images are shifted differently; they follow the file, so encode them again",
    },
    SCHEDULER: {
        None: "latents are noised differently, so the loss is not that of section 6 of the method",
        "shift": "the noise levels of training differ from the paper's",
    },
    CLIP: {None: "captions become embeddings of another width than the denoiser takes"},
    BIG_CLIP: {None: "captions become embeddings of another width than the denoiser takes"},
    T5: {None: "captions become embeddings of another width than the denoiser takes"},
}


@dataclass(frozen=True)
class Expected:
    """What is expected of a repository.

    Attributes:
        configs: settings by file; a tuple stands for any of its values.
        tensors: shapes by folder and name, of weights in safetensors.
        text_parameters: of all text encoders.
        download: bytes of what is fetched, about.
    """

    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, list[int]]]
    text_parameters: int
    download: int

    @property
    def transformer(self) -> dict[str, Any]:
        return self.configs[TRANSFORMER]

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.configs[VAE]["block_out_channels"]) - 1)


_SD3_CONFIGS: dict[str, dict[str, Any]] = {
    INDEX: {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": (["transformers", "T5TokenizerFast"], ["transformers", "T5Tokenizer"]),
    },
    VAE: {
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
    },
    SCHEDULER: {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000},
    CLIP: {"hidden_size": 768, "projection_dim": 768, "num_hidden_layers": 12},
    BIG_CLIP: {"hidden_size": 1280, "projection_dim": 1280, "num_hidden_layers": 32},
    T5: {"d_model": 4096, "num_layers": 24, "vocab_size": 32128},
}
_SD3_TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "sample_size": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_MEDIUM = _SD3_TRANSFORMER | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
_LARGE = _SD3_TRANSFORMER | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
_DIT_XL: dict[str, Any] = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
}


def _sd3_tensors(channels: int, positions: int) -> dict[str, dict[str, list[int]]]:
    return {
        "transformer": {
            "pos_embed.pos_embed": [1, positions**2, channels],
            "pos_embed.proj.weight": [channels, 16, 2, 2],
            "context_embedder.weight": [channels, 4096],
            "transformer_blocks.0.attn.to_q.weight": [channels, channels],
            "transformer_blocks.0.attn.norm_q.weight": [64],
        },
        "vae": {"encoder.conv_out.weight": [32, 512, 3, 3], "decoder.conv_in.weight": [512, 16, 3, 3]},
        "text_encoder": {"text_projection.weight": [768, 768]},
        "text_encoder_2": {"text_projection.weight": [1280, 1280]},
    }


PIPELINES = {
    "stabilityai/stable-diffusion-3.5-medium": Expected(
        configs=_SD3_CONFIGS | {TRANSFORMER: _MEDIUM},
        tensors=_sd3_tensors(1536, 384),
        text_parameters=5_580_000_000,
        download=16_300_000_000,
    ),
    "stabilityai/stable-diffusion-3.5-large": Expected(
        configs=_SD3_CONFIGS | {TRANSFORMER: _LARGE},
        tensors=_sd3_tensors(2432, 192),
        text_parameters=5_580_000_000,
        download=27_600_000_000,
    ),
    "facebook/DiT-XL-2-256": Expected(
        configs={
            INDEX: {
                "_class_name": "DiTPipeline",
                "transformer": (["diffusers", "Transformer2DModel"], ["diffusers", "DiTTransformer2DModel"]),
                "vae": ["diffusers", "AutoencoderKL"],
            },
            TRANSFORMER: _DIT_XL,
            VAE: {"scaling_factor": 0.18215, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]},
            SCHEDULER: {
                "num_train_timesteps": 1000,
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "beta_end": 0.02,
                "prediction_type": "epsilon",
            },
        },
        tensors={
            "transformer": {
                "pos_embed.proj.weight": [1152, 4, 2, 2],
                "transformer_blocks.0.attn1.to_q.weight": [1152, 1152],
                "proj_out_2.weight": [32, 1152],
            }
        },
        text_parameters=0,
        download=3_400_000_000,
    ),
}


def expected(source: str) -> Expected | None:
    """What is expected of the repository that a hf: source names; None of one that nothing is written of here."""
    match = re.match(r"hf:([\w.-]+/[\w.-]+)", source)
    return PIPELINES.get(match[1]) if match else None

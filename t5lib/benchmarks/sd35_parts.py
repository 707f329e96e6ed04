"""The parts of Stable Diffusion 3.5 Medium beside its denoiser in their published shapes, with random weights.

The configurations are those of stabilityai/stable-diffusion-3.5-medium, openai/clip-vit-large-patch14,
laion/CLIP-ViT-bigG-14-laion2B-39B-b160k and google/t5-v1_1-xxl.
"""

from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

CLIP_LENGTH, T5_LENGTH = 77, 256  # tokens of a prompt
PARTS: dict[str, dict[str, Any]] = {
    "medium": {
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
        "clip": (
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
            {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
        ),
        "clip_vocabulary": 49408,
        "t5": {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    },
    "tiny": {  # the same parts, small enough for a test
        "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128},
        "clip": ({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},) * 2,
        "clip_vocabulary": 512,
        "t5": {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    },
}


def build_vae(sizes: dict[str, Any]) -> AutoencoderKL:
    """8 x 8 pixels a latent of 16 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **sizes,
    )


def build_clip(sizes: dict[str, Any], vocabulary: int, **special_tokens: Any) -> CLIPTextModelWithProjection:
    """A text encoder of CLIP; special_tokens are those of its tokenizer, such as eos_token_id."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            intermediate_size=4 * sizes["hidden_size"],
            projection_dim=sizes["hidden_size"],
            max_position_embeddings=CLIP_LENGTH,
            **special_tokens,
            **sizes,
        )
    )


def build_t5(sizes: dict[str, Any]) -> T5EncoderModel:
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))

"""Write a Stable Diffusion 3.5 Medium pipeline with random weights: the gated one's shapes, none of its skill.

    python data/sd35-random/make.py OUT [--text-encoders none|clip|all] [--blocks N] [--tiny] [--seed 0]

Its images mean nothing. It is for trying a whole run (converting, training, timing, memory) at full size where the
weights cannot be had: a `file:` source takes the folder. In bf16 the transformer and the VAE are 5.1 GB, both CLIP
encoders 1.6 GB, T5-XXL 9.5 GB, in files and, while they are made, in memory. `--blocks` takes fewer than the 24
blocks, with the same share of dual attention; `--tiny` has the same parts, small.

Shapes: the published configurations of stabilityai/stable-diffusion-3.5-medium, openai/clip-vit-large-patch14,
laion/CLIP-ViT-bigG-14-laion2B-39B-b160k and google/t5-v1_1-xxl. The tokenizers are small ones of our own.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from t5lib.families.sd3 import MEDIUM
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sd35-micro"))
from vocabulary import clip_tokenizer, t5_tokenizer

ENCODERS = ("none", "clip", "all")
CLIP_LENGTH = 77  # tokens
WORDS = ["a photograph of a red fox in the snow", "two green apples on a blue background", "an oil painting, evening"]
NOTICE = """# Random weights

The parts have the shapes of Stable Diffusion 3.5 Medium{size}, and weights drawn at random (seed {seed}).
**Its images mean nothing.** Made by data/sd35-random/make.py, to try code without the real weights.
"""

SIZES = {
    "medium": {
        "transformer": MEDIUM,
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
        "clip": (
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
            {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
        ),
        "clip_vocabulary": 49408,
        "t5": {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    },
    "tiny": {
        "transformer": MEDIUM
        | {
            "sample_size": 16,
            "num_layers": 6,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0, 1, 2),
        },
        "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128},
        "clip": ({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},) * 2,
        "clip_vocabulary": 512,
        "t5": {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--text-encoders", choices=ENCODERS, default="all")
    parser.add_argument("--blocks", type=int, help="of the transformer; default: all")
    parser.add_argument("--tiny", action="store_true", help="the same parts, small enough for a test")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    size = "tiny" if given.tiny else "medium"
    write(given.out, text_encoders=given.text_encoders, size=size, seed=given.seed, blocks=given.blocks)
    print(f"{given.out}: random weights, whose images mean nothing")


def write(
    out: Path, *, text_encoders: str = "all", size: str = "medium", seed: int = 0, blocks: int | None = None
) -> None:
    """Write the pipeline's folder; the same seed writes the same bytes.

    Args:
        text_encoders: "none": prompts must come as embeddings; "clip": T5's part of the prompt is zeros; "all".
        blocks: of the transformer, None for all of that size.

    Raises:
        T5Error: the folder exists, or more blocks than there are.
    """
    if out.exists():
        raise T5Error(f"{out} exists; pass a new folder, or delete it")
    pipe = build(text_encoders, size, seed, blocks)
    with atomic_dir(out) as folder:
        pipe.save_pretrained(folder)
        part = f", but for its depth of {blocks} blocks" if blocks else ""
        notice = NOTICE.format(size=part if size == "medium" else " in kind, not in size", seed=seed)
        write_text(folder / "README.md", notice)


def build(
    text_encoders: str = "all", size: str = "medium", seed: int = 0, blocks: int | None = None
) -> StableDiffusion3Pipeline:
    """The pipeline, in bf16 and eval mode."""
    sizes, parts = SIZES[size], {}
    shape = shallow(sizes["transformer"], blocks) if blocks else sizes["transformer"]
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.bfloat16)  # never a wider copy: it would take twice the memory
        try:
            parts |= {"transformer": SD3Transformer2DModel(**shape), "vae": build_vae(sizes["vae"])}
            parts |= _encoders(sizes, text_encoders)
        finally:
            torch.set_default_dtype(before)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16).eval()
    return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)


def shallow(shape: dict, blocks: int) -> dict:
    """`shape` with fewer blocks, the same share of them with dual attention, rounded, and these first.

    Raises:
        T5Error: not as many blocks.
    """
    most = shape["num_layers"]
    if not 1 <= blocks <= most:
        raise T5Error(f"blocks {blocks}: expected 1 to {most}")
    dual = round(blocks * len(shape["dual_attention_layers"]) / most)
    return shape | {"num_layers": blocks, "dual_attention_layers": tuple(range(dual))}


def build_vae(sizes: dict) -> AutoencoderKL:
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


def _encoders(sizes: dict, which: str) -> dict:
    """Encoders and tokenizers by the pipeline's names; None for those left out."""
    names = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    parts = dict.fromkeys(names)
    if which == "none":
        return parts
    for number, own in zip(("", "_2"), sizes["clip"], strict=True):
        tokenizer = clip_tokenizer(WORDS)
        tokenizer.model_max_length = CLIP_LENGTH
        parts |= {f"tokenizer{number}": tokenizer, f"text_encoder{number}": _clip(own, sizes, tokenizer)}
    if which == "all":
        settings = T5Config(feed_forward_proj="gated-gelu", **sizes["t5"])
        parts |= {"tokenizer_3": t5_tokenizer(WORDS), "text_encoder_3": T5EncoderModel(settings)}
    return parts


def _clip(own: dict, sizes: dict, tokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=sizes["clip_vocabulary"],
            intermediate_size=4 * own["hidden_size"],
            projection_dim=own["hidden_size"],
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **own,
        )
    )


if __name__ == "__main__":
    main()

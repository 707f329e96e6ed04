"""Write a Stable Diffusion 3.5 Medium pipeline with random weights: the gated one's shapes, none of its skill.

    python data/sd35-random/make.py OUT [--text-encoders none|clip|all] [--blocks N] [--tiny] [--seed 0]

Its images mean nothing. It is for trying a whole run (converting, training, timing, memory) at full size where the
weights cannot be had: a `file:` source takes the folder. In bf16 the transformer and the VAE are 5.1 GB, both CLIP
encoders 1.6 GB, T5-XXL 9.5 GB, in files and, while they are made, in memory. `--blocks` takes fewer than the 24
blocks, with the same share of dual attention; `--tiny` has the same parts, small.

Shapes: the published configurations (t5lib.families.sd3, t5lib.benchmarks.sd35_parts). The tokenizers are small ones of
our own.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from t5lib.benchmarks.sd35_parts import CLIP_LENGTH, PARTS, build_clip, build_t5, build_vae
from t5lib.families.sd3 import MEDIUM
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sd35-micro"))
from vocabulary import clip_tokenizer, t5_tokenizer

ENCODERS = ("none", "clip", "all")
WORDS = ["a photograph of a red fox in the snow", "two green apples on a blue background", "an oil painting, evening"]
NOTICE = """# Random weights

The parts have the shapes of Stable Diffusion 3.5 Medium{size}, and weights drawn at random (seed {seed}).
**Its images mean nothing.** Made by data/sd35-random/make.py, to try code without the real weights.
"""

SIZES = {
    "medium": {"transformer": MEDIUM} | PARTS["medium"],
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
    }
    | PARTS["tiny"],
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
        parts |= {"tokenizer_3": t5_tokenizer(WORDS), "text_encoder_3": build_t5(sizes["t5"])}
    return parts


def _clip(own: dict, sizes: dict, tokenizer) -> CLIPTextModelWithProjection:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return build_clip(own, sizes["clip_vocabulary"], **{name: getattr(tokenizer, name) for name in names})


if __name__ == "__main__":
    main()

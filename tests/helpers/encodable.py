"""Captioned pictures as shards, and a whole Stable Diffusion 3 pipeline so small that encoding takes milliseconds."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from t5lib.data.shards import Shard, ShardSet
from t5lib.utils.files import sha256

WIDTHS = {"clip": 8, "clip_2": 12, "t5": 24}


def picture(index: int, height: int, width: int, form: str = "png") -> bytes:
    """A smooth picture, other for each index."""
    rng, out = np.random.default_rng(index), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, {"jpg": "jpeg"}.get(form, form), quality=95)
    return out.getvalue()


def captioned(index: int, height: int = 16, width: int = 16, form: str = "png", caption: str = "txt") -> dict:
    """The files of one sample."""
    text = f"picture {index}"
    content = text.encode() if caption == "txt" else json.dumps({"caption": text, "status": "success"}).encode()
    return {f"{index:04d}.{form}": picture(index, height, width, form), f"{index:04d}.{caption}": content}


def labelled(index: int, classes: int = 10) -> dict:
    return {f"{index:04d}.png": picture(index, 8, 8), f"{index:04d}.cls": b"%d" % (index % classes)}


def write_tar(path: Path, samples: Iterable[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for name, content in sample.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def shard_set(shards: dict[Path, list[dict[str, bytes]]], classes: int = 0) -> ShardSet:
    """Write the tars and list them."""
    made = [
        Shard(path=str(write_tar(path, samples)), count=len(samples), sha256=sha256(path))
        for path, samples in shards.items()
    ]
    return ShardSet(
        name="pictures",
        licence="none",
        source="test",
        classes=tuple(map(str, range(classes))),
        count=sum(shard.count for shard in made),
        shards=tuple(made),
    )


def tiny_vae(channels: int = 3):
    """4 pixels to a latent of 4 channels; its config has a shift, as that of SD3."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[8, 8, 8],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.25,
        ).eval()


def tiny_pipeline(t5: bool = True):
    """Real classes throughout; tokenizers that read letters one by one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=4,
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=1,
                joint_attention_dim=WIDTHS["t5"],
                caption_projection_dim=8,
                pooled_projection_dim=WIDTHS["clip"] + WIDTHS["clip_2"],
                pos_embed_max_size=8,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(),
            text_encoder=_clip(WIDTHS["clip"]),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(WIDTHS["clip_2"]),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=T5EncoderModel(
                T5Config(vocab_size=64, d_model=WIDTHS["t5"], d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ).eval()
            if t5
            else None,
            tokenizer_3=T5TokenizerFast(
                vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in "▁" + LETTERS)],
                extra_ids=0,
            )
            if t5
            else None,
        )


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def _clip(width: int):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        pad_token_id=2 * len(LETTERS) + 1,
    )
    return CLIPTextModelWithProjection(config).eval()


def _clip_tokenizer():
    from transformers import CLIPTokenizer

    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *SPECIAL]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)

"""A target that is a tiny denoiser of either family, with weights, images and settings: stages take moments."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from encodable import shard_set
from PIL import Image
from safetensors.torch import save_file
from tiny_denoisers import CLASSES
from tiny_pipelines import SIDE, tiny_dit_pipeline, tiny_sd3_pipeline

STAGES = ("fetch", "shards", "source", "diagnose", "convert", "calibrate", "align", "freeze", "finetune")
STAGES += ("control", "evaluate", "explain", "benchmark", "report")
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
TRAINED = {"steps": 3, "batch_size": 4, "lr": 1e-4, "lr_new": 1e-3, "checkpoint_every": 1}
VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 0}
IMAGES = 24  # of each split, beside one that cannot be read
PROMPTS = 20
UNREADABLE = {"bad.png": b"", "bad.txt": b"a square", "bad.cls": b"0"}


def settings(kind: str, root: Path) -> dict[str, Any]:
    """Of the target that `write` makes; `kind` is "sd3" or "dit"."""
    side = SIDE if kind == "sd3" else 8
    return {
        "fetch": {
            "format": "pipeline",
            "source": f"file:{root}/{kind}",
            "features": {
                "source": f"file:{root}/vit.safetensors",
                "format": "timm",
                "architecture": "vit_tiny_patch16_224",
                "model_args": VIT,
            },
        },
        "shards": {
            "train": f"file:{root}/{kind}-train.json",
            "val": f"file:{root}/{kind}-val.json",
            "encode": {"buckets": {"sizes": [[side, side]]}},
            "max_skipped": 0.05,
            "dtype": "fp32",
            "max_sequence_length": 8,
        },
        "data": {"workers": 0, "eval_batch_size": 8},
        "source": {},
        "diagnose": {"images": 4},
        "convert": {"locality": "dwc_qk"},
        "calibrate": {"steps": 4, "warmup": 1, "batch_size": 4, "pool": 2, "reuse": 1, "checkpoint_every": 2},
        "align": {"steps": 2, "batch_size": 4},
        "freeze": {"ceiling": 5.0, "train": {**TRAINED, "trainable": "new", "ema": None}},
        "finetune": {**TRAINED, "align": 0.5, "ema": 0.9},
        "explain": {"images": 4},
        "benchmark": {"resolutions": [side, 2 * side], "repeats": 1, "pixels_per_latent": 2 if kind == "sd3" else 1},
        "evaluate": {"samples": 16, "shown": 2, "sampling": {"steps": 2, "max_sequence_length": 8}},
    }


def from_samples(kind: str, root: Path, **changes: Any) -> dict[str, Any]:
    """The section `shards` without images: the softmax model draws them. `changes` are of the section `samples`."""
    prompts = {"prompts": f"file:{root}/prompts.txt"} if kind == "sd3" else {}
    shards = {name: value for name, value in settings(kind, root)["shards"].items() if name not in ("train", "val")}
    sampling = {"count": 24, "val": 16, "steps": 2, "batch_size": 8}
    return shards | {"samples": prompts | sampling | changes}


def write(root: Path, kind: str) -> None:
    """The pipeline, the model whose features score its pictures, and the images."""
    pipeline = tiny_sd3_pipeline(t5=False) if kind == "sd3" else tiny_dit_pipeline()
    pipeline.save_pretrained(root / kind)
    (root / "prompts.txt").write_text("".join(f"one square on {number}\n" for number in range(PROMPTS)))
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", **VIT).state_dict(), root / "vit.safetensors")
    for split, first in (("train", 0), ("val", IMAGES)):
        make = captioned if kind == "sd3" else labelled
        samples = [UNREADABLE, *(make(index) for index in range(first, first + IMAGES))]
        shards = shard_set({root / f"{kind}-{split}.tar": samples}, classes=0 if kind == "sd3" else CLASSES)
        shards.write(root / f"{kind}-{split}.json", root=root)


def drawn(index: int, side: int, grey: bool) -> bytes:
    """One square on a plain background; colour and place follow from the index."""
    pixels = np.full((side, side, 3), list(COLOURS.values())[index % 2], np.uint8)
    pixels[2 + index % 3 : 6 + index % 3, 2:6] = 255
    image, out = Image.fromarray(pixels), io.BytesIO()
    (image.convert("L") if grey else image).save(out, "png")
    return out.getvalue()


def captioned(index: int) -> dict[str, bytes]:
    colour, name = list(COLOURS)[index % 2], f"square {index % 3}"
    about = {"caption": f"one {name} on {colour}", "name": name, "count": 1, "background": colour}
    return {f"{index:04}.png": drawn(index, SIDE, False), f"{index:04}.json": json.dumps(about).encode()}


def labelled(index: int) -> dict[str, bytes]:
    return {f"{index:04}.png": drawn(index, 8, True), f"{index:04}.cls": b"%d" % (index % CLASSES)}

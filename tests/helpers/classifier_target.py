"""A target that is a tiny classifier, with weights, images and settings: stages take moments."""

from pathlib import Path

import numpy as np
import timm
import torch
from labelled import write_split

import t5lib

TRAINED = {"epochs": 1.0, "batch_size": 8, "lr": 1e-4, "lr_new": 1e-3, "warmup": 0.2, "checkpoint_every": 1}
SETTINGS = {
    "data": {"img_size": 32, "num_classes": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "eval_batch_size": 10},
    "source": {"head": "fit"},
    "diagnose": {"images": 8},
    "convert": {"inner": "swiglu"},
    "calibrate": {"steps": 40, "batch_size": 8, "warmup": 4, "pool": 2, "reuse": 2, "checkpoint_every": 8},
    "align": {"steps": 12, "batch_size": 8, "lr": 1e-6, "lr_new": 1e-4, "features": "norm", "checkpoint_every": 5},
    "freeze": {"floor": 1.0, "train": {**TRAINED, "trainable": "new"}},
    "finetune": {**TRAINED, "distill": 0.5, "augment": {"hflip": 0.5}},
    "evaluate": {},
}
TRAIN, VAL = 48, 21


def write(root: Path) -> None:
    """What the stages `fetch` and `shards` of the target `tiny` make."""
    out = root / "data/out/tiny"
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    t5lib.save(timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.2, **sizes), out / "fetch")
    for split, count, seed in (("train", TRAIN, 0), ("val", VAL, 1)):
        write_split(out / "shards", split, count, np.random.default_rng(seed))

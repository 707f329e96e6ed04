"""Stage `shards` of denoisers: images encoded once, with their captions or classes."""

import os
from dataclasses import dataclass
from pathlib import Path

from t5lib.data.captions import open_captioned
from t5lib.data.encoders import ImageEncoder, TextEncoder, encoding_pipeline
from t5lib.data.encoding import EncodingConfig, encode
from t5lib.data.shards import ShardSet
from t5lib.data.latents import MANIFEST
from t5lib.utils.files import read_json
from tasks.denoisers.data import LatentsConfig
from tasks.runtime.stage import Stage
from tasks.shards import open_labelled, refuse_overlap
from tasks.targets import diffusers_folder
from tasks.targets.classifier import device

SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Where the images are, and how they are encoded.

    Attributes:
        train, val: file:MANIFEST.json, file:FOLDER or file:PATTERN of tar files, with <key>.jpg (.png, .webp) and
            <key>.txt or .json as img2dataset writes them. Relative paths start at the repository. For a
            class-conditional denoiser as classifiers have them (tasks/shards.py).
        encode: sizes, mirror images, threads.
        dtype: of the encoders, fp32, bf16 or fp16.
        max_sequence_length: tokens of the T5 encoder's text.
    """

    train: str
    val: str
    encode: EncodingConfig
    dtype: str = "bf16"
    max_sequence_length: int = 256


SECTIONS = {"shards": ShardsConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, int]:
    """Write train/ and val/ (t5lib.data.encoding), and images-*.json, the manifests of what was encoded."""
    config = stage.params(ShardsConfig)
    folder = diffusers_folder.folder_of(stage.input("fetch"), stage.root)
    sets = {split: _open(getattr(config, split), split, stage, folder) for split in SPLITS}
    refuse_overlap(sets["train"], sets["val"])
    images, text = _encoders(folder, config)
    work, sizes = stage.resume_dir(), {}
    for split, shards in sets.items():
        encode(shards, work / split, images=images, text=text, config=config.encode)
    for split, shards in sets.items():  # together at the end: what is encoded already must outlive a crash
        os.replace(work / split, stage.out / split)
        shards.write(stage.out / f"images-{split}.json", root=stage.root)
        sizes[split] = read_json(stage.out / split / MANIFEST)["count"]
        sizes[f"{split}_left_out"] = shards.count - sizes[split]
    return sizes


def _open(source: str, split: str, stage: Stage, folder: Path) -> ShardSet:
    if not diffusers_folder.takes_text(folder):
        return open_labelled(source, split, diffusers_folder.classes(folder), stage)
    notes = stage.root / "data/scratch/counted-shards.jsonl"
    return open_captioned(source, name=f"{stage.target} {split}", root=stage.root, notes=notes)


def _encoders(folder: Path, config: ShardsConfig) -> tuple[ImageEncoder, TextEncoder | None]:
    options = {"dtype": config.dtype, "device": str(device())}
    image_options = options | {
        "channels": diffusers_folder.image_channels(folder),
        "patch": diffusers_folder.patch(folder),
    }
    if not diffusers_folder.takes_text(folder):
        return ImageEncoder(diffusers_folder.image_vae(folder), **image_options), None
    parts = encoding_pipeline(folder, config.dtype)
    text = TextEncoder(parts, max_sequence_length=config.max_sequence_length, **options)
    return ImageEncoder(parts.vae, **image_options), text

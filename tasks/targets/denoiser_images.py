"""What a denoiser learns from and is measured on: captioned or labelled images, its teacher's own samples, or both."""

from pathlib import Path
from typing import Any, Literal

from t5lib.data.buckets import bucket_sizes
from t5lib.data.encoders import ImageEncoder, TextEncoder, encoding_pipeline
from t5lib.data.encoding import EncodingConfig
from t5lib.data.shards import ShardSet
from t5lib.evaluation.generation import TextTokens
from t5lib.evaluation.sample_shards import joined
from t5lib.utils import processes
from t5lib.utils.config import settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.runtime.stage import Stage
from tasks.targets import diffusers_folder, teacher_samples
from tasks.targets.base import device
from tasks.targets.image_shards import (
    ImagesConfig,
    check_source,
    check_sources,
    open_captions,
    open_labelled,
    refuse_overlap,
)
from tasks.targets.teacher_samples import SPLITS, SamplesConfig

ORIGINS = "origins.json"  # beside the manifests: how many images and how many samples each split has


@settings
class ShardsConfig(ImagesConfig):
    """Images whose tar files hold <key>.jpg (.png, .webp) and <key>.txt or .json, as img2dataset writes them, and how
    they are encoded. Captioned images are named by file: or an address. A class-conditional denoiser takes images as
    classifiers do (tasks/targets/classifier.py).

    Attributes:
        train, val: see ImagesConfig; null where the softmax model's samples take their place.
        samples: draw these with the softmax model: for training, beside the images of `train` if there are any, and for
            validation unless `val` names images.
        encode: sizes, mirror images, threads.
        dtype: of the encoders.
        max_sequence_length: tokens of the T5 encoder's text.
        max_skipped, limit: see ImagesConfig; of samples all are taken.
    """

    train: str | None = None  # type: ignore[assignment]  # more
    val: str | None = None  # type: ignore[assignment]  # more
    samples: SamplesConfig | None = None
    encode: EncodingConfig
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    max_sequence_length: TextTokens = 256

    def __post_init__(self) -> None:
        sources = {split: source for split in SPLITS if (source := getattr(self, split)) is not None}
        missing = [split for split in SPLITS if split not in sources]
        if missing and not self.samples:
            raise T5Error(
                f"{' and '.join(missing)} missing, and samples too; name images, or let the softmax model draw some "
                "to learn from, such as samples: {prompts: file:data/prompts/plain.txt, count: 2000}"
            )
        if len(sources) == len(SPLITS):
            check_sources(**sources)
        for split, source in sources.items():
            check_source(source, split)

    def drawn(self, split: str) -> int:
        """How many samples the split has."""
        return self.samples.number(split) if self.samples and (split == "train" or self.val is None) else 0


def gathered(config: ShardsConfig, stage: Stage, folder: Path) -> dict[str, ShardSet]:
    """The images and samples of each split: images are checked, then samples are drawn.

    Args:
        folder: of the pipeline.
    """
    images = processes.by_first(lambda: _all_images(config, stage, folder))
    if not config.samples:
        return images
    splits = [split for split in SPLITS if config.drawn(split)]
    sizes = bucket_sizes(config.encode.buckets)
    drawn = teacher_samples.draw(config.samples, splits, stage, folder, sizes, config.max_sequence_length)
    return {
        split: joined(f"{stage.target} {split}", *(sets[split] for sets in (images, drawn) if split in sets))
        for split in SPLITS
    }


def origins(config: ShardsConfig, sets: dict[str, ShardSet]) -> dict[str, dict[str, int]]:
    """What ORIGINS holds."""
    return {
        split: {"images": shards.count - config.drawn(split), "samples": config.drawn(split)}
        for split, shards in sets.items()
    }


def only_samples(made: Path, split: str) -> bool:
    """Whether a split has no real images, by what the stage `shards` made."""
    return not read_json(made / ORIGINS)[split]["images"]


def encoders(folder: Path, config: ShardsConfig) -> tuple[ImageEncoder, TextEncoder | None]:
    """The encoders of the pipeline in `folder`; no text encoder where it draws from classes."""
    options: dict[str, Any] = {"dtype": config.dtype, "device": str(device())}
    image_options = options | {
        "channels": diffusers_folder.image_channels(folder),
        "patch": diffusers_folder.patch(folder),
    }
    if not diffusers_folder.takes_text(folder):
        return ImageEncoder(diffusers_folder.image_vae(folder), **image_options), None
    parts = encoding_pipeline(folder, config.dtype)
    text = TextEncoder(parts, max_sequence_length=config.max_sequence_length, **options)
    return ImageEncoder(parts.vae, **image_options), text


def _all_images(config: ShardsConfig, stage: Stage, folder: Path) -> dict[str, ShardSet]:
    images = {split: _images(config, split, stage, folder) for split in SPLITS if getattr(config, split) is not None}
    if len(images) == len(SPLITS):
        refuse_overlap(images["train"], images["val"])
    return images


def _images(config: ShardsConfig, split: str, stage: Stage, folder: Path) -> ShardSet:
    if diffusers_folder.takes_text(folder):
        return open_captions(config, split, stage)
    return open_labelled(config, split, diffusers_folder.classes(folder), stage)

"""The softmax model's own samples: what a denoiser learns from where there are no captioned images, or beside them.

Training and validation samples are of different prompts (of a class-conditional model: of all classes, in equal shares)
and of different noise.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from t5lib.data.buckets import Size
from t5lib.data.captions import caption_of
from t5lib.data.latents import MANIFEST
from t5lib.data.shards import ShardSet
from t5lib.evaluation import prompts as prompt_files
from t5lib.evaluation.generation import GenerateConfig, Guidance, check_sampling
from t5lib.evaluation.sample_shards import Wanted, draw_shards
from t5lib.evaluation.scores import LEAST
from t5lib.pipelines import load_pipeline
from t5lib.utils.config import BatchSize, Repeats, WholeNumber, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from t5lib.utils.seeds import derived_seed
from tasks.runtime.stage import Stage
from tasks.targets import diffusers_folder
from tasks.targets.base import device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SPLITS = ("train", "val")
EVERY = 10  # of the prompts the first and every tenth after it are for validation
STREAM = 31  # keeps the noise apart from that of pictures that are evaluated


@settings
class SamplesConfig:
    """What the softmax model draws to learn from, at the sizes of shards.encode.buckets in turn.

    Attributes:
        prompts: file:FILE, a prompt a line, such as file:data/prompts/plain.txt; null for a class-conditional model.
        count: training samples.
        val: validation samples, where shards.val names no images.
        steps: of the pipeline's scheduler.
        guidance: scale of classifier-free guidance; 1 or less: none.
        batch_size: images drawn at once.
        seed: of the noise.
    """

    prompts: Annotated[str, Field(pattern=r"^file:.")] | None = None
    count: Annotated[int, Field(ge=1, le=10**7)] = 2000
    val: Annotated[int, Field(ge=LEAST, le=10**7)] = 200
    steps: Repeats = 28
    guidance: Guidance = 4.5
    batch_size: BatchSize = 4
    seed: WholeNumber = 0

    def number(self, split: str) -> int:
        return self.count if split == "train" else self.val

    def sampling(self, **more: Any) -> GenerateConfig:
        return GenerateConfig(steps=self.steps, guidance=self.guidance, batch_size=self.batch_size, **more)


def check_samples(config: SamplesConfig, root: Path, folder: Path | None, sizes: Sequence[Size]) -> None:
    """Raises T5Error for a file of prompts, or settings, that nothing can be drawn by.

    Args:
        folder: of the pipeline; None where it is not on this machine yet.
        sizes: of the images.
    """
    if config.prompts and _file(config.prompts, root).exists():  # that it is there is asked before a stage begins
        read_prompts(config.prompts, root)
    if folder is None:
        return
    text = diffusers_folder.takes_text(folder)
    if text != bool(config.prompts):
        raise T5Error(
            "prompts is missing; name a file with one prompt per line, such as file:data/prompts/plain.txt"
            if text
            else f"prompts is '{config.prompts}', but the model is class-conditional; leave prompts out: all classes "
            "are drawn in equal shares"
        )
    if not text:
        side, _ = diffusers_folder.image_size(folder)
        for size in sizes:
            check_sampling(config.sampling(size=size), diffusers_folder.scheduler(folder / "scheduler"), side)


def read_prompts(source: str, root: Path) -> dict[str, list[str]]:
    """The prompts of a file for each split, each once, in the file's order.

    Raises:
        T5Error: no such file, fewer than two prompts, or a line that is no caption.
    """
    file = _file(source, root)
    lines = [prompt.text for prompt in prompt_files.read(file, "plain")]
    every = list(dict.fromkeys(map(str, lines)))
    for line in every:
        caption_of({"__url__": str(file), "__key__": line[:40], "txt": line.encode()})
    if len(every) < 2:
        raise T5Error(f"{file} holds one prompt; expected two or more, some of them for validation")
    train = [prompt for place, prompt in enumerate(every) if place % EVERY]
    return {"train": train, "val": every[::EVERY]}


def draw(
    config: SamplesConfig, splits: Sequence[str], stage: Stage, folder: Path, sizes: Sequence[Size], tokens: int
) -> dict[str, ShardSet]:
    """The samples of each of `splits`, in the folder "samples" of the stage's output; goes on where it was stopped.

    Args:
        folder: of the pipeline.
        tokens: of the T5 encoder's text.
    """
    load, work = _once(folder), stage.resume_dir() / "samples"
    teacher = read_json(stage.input("fetch") / diffusers_folder.NOTE)["source"]
    classes, of_split = tuple[str, ...](), dict[str, Sequence[str | int]]()
    if diffusers_folder.takes_text(folder):
        of_split |= read_prompts(str(config.prompts), stage.root)
    else:
        classes = tuple(map(str, range(diffusers_folder.classes(folder))))
        of_split |= dict.fromkeys(SPLITS, range(len(classes)))
    for split in splits:
        draw_shards(
            wanted(config, split, of_split[split], sizes),
            work / split,
            load=load,
            config=config.sampling(max_sequence_length=None if classes else tokens),
            name=f"{stage.target} {split} samples",
            source=f"samples of {teacher}",
            classes=classes,
        )
    stage.publish("samples")
    return {split: ShardSet.read(stage.out / "samples" / split / MANIFEST) for split in splits}


def wanted(config: SamplesConfig, split: str, prompts: Sequence[str | int], sizes: Sequence[Size]) -> list[Wanted]:
    """The samples of a split: prompts in equal shares, taken evenly where there are more of them than samples, and each
    at one size after the other."""
    count = config.number(split)
    rounds = min(count, len(prompts))
    return [
        Wanted(
            prompt=prompts[index % rounds * len(prompts) // rounds],
            seed=derived_seed(config.seed, SPLITS.index(split), index, STREAM) >> 1,
            size=sizes[(index + index // rounds) % len(sizes)],
        )
        for index in range(count)
    ]


def _file(source: str, root: Path) -> Path:
    return root / Path(source.removeprefix("file:")).expanduser()


def _once(folder: Path) -> "Callable[[], DiffusionPipeline]":
    """Loads the softmax pipeline when it is first asked for; in the precision that pictures are evaluated in."""

    @functools.cache
    def load() -> "DiffusionPipeline":
        dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
        return load_pipeline(folder, torch_dtype=dtype).to(device())

    return load

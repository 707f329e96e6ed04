"""Images that a pipeline draws, kept as shards of captioned or labelled images: training data where there is none.

The folder that `draw_shards` fills:

    00000.tar, …       KEY.png, with KEY.json (caption and seed) or KEY.cls (class number)
    manifest.json      t5lib.data.shards.ShardSet: what is finished, written anew after every shard

What reads images reads these: t5lib.data.encoding makes latents of them as of any others.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from t5lib.data.buckets import Size
from t5lib.data.latents import MANIFEST, member
from t5lib.data.shards import Shard, ShardSet
from t5lib.evaluation.generation import GenerateConfig, sample
from t5lib.utils import processes
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file, sha256
from t5lib.utils.progress import StepReporter, progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SHARD = 64  # images a tar: what a kill costs at the most
LICENCE = "that of the model's weights"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An image to draw: of a text or a class number, from the noise of `seed`; `size` is (height, width) in pixels."""

    prompt: str | int
    seed: int
    size: Size


def draw_shards(
    wanted: Sequence[Wanted],
    folder: Path | str,
    *,
    load: Callable[[], "DiffusionPipeline"],
    config: GenerateConfig,
    name: str,
    source: str,
    classes: Sequence[str] = (),
) -> ShardSet:
    """Draw all of `wanted`, in order, into shards in `folder`. Shards that are finished are not drawn again; what was
    drawn of something else, or with other settings, is. Processes that work together take the shards in turn.

    Args:
        load: gives the pipeline, on its device; not called where nothing is left to draw.
        config: steps, guidance, tokens and batch size; its `size` is not used.
        name: of the set.
        source: tells which pipeline draws.
        classes: names of a class-conditional pipeline's classes.

    Raises:
        T5Error: what t5lib.evaluation.generation.sample refuses.
    """
    folder = Path(os.path.abspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    source = f"{source}; drawn, settings {_fingerprint(wanted, config)}"
    empty = ShardSet(name=name, licence=LICENCE, source=source, classes=tuple(classes), count=0, shards=())
    shards, pipeline = processes.by_first(lambda: _finished(folder, source)), None
    done = sum(shard.count for shard in shards.values())
    missing = [first for first in range(0, len(wanted), SHARD) if _tar(folder, first) not in shards]
    turns = processes.turns()
    with progress(f"draw {name}", len(wanted), done) as bar:
        for start in range(0, len(missing), turns.turns):
            ours = missing[start : start + turns.turns][turns.turn : turns.turn + 1]
            for first in ours:
                tar, part = _tar(folder, first), wanted[first : first + SHARD]
                pipeline = pipeline or load()
                _write(tar, first, part, _drawn(pipeline, part, config, _onwards(bar, done)))
                shards[tar] = Shard(path=str(tar), count=len(part), sha256=sha256(tar))
            for of_another in processes.gathered({_tar(folder, first): shards[_tar(folder, first)] for first in ours}):
                shards |= of_another
            done = sum(shard.count for shard in shards.values())
            listed = replace(empty, count=done, shards=tuple(shards[path] for path in sorted(shards)))
            if processes.leads():
                listed.write(folder / MANIFEST, root=folder)
    processes.wait()
    return ShardSet.read(folder / MANIFEST)


def _tar(folder: Path, first: int) -> Path:
    """Of the images from number `first` on."""
    return folder / f"{first // SHARD:05}.tar"


def joined(name: str, *sets: ShardSet) -> ShardSet:
    """Several sets of images as one. Of labelled ones the longest list of classes holds, the first of equals."""
    return ShardSet(
        name=name,
        licence="; ".join(dict.fromkeys(each.licence for each in sets)),
        source="; and ".join(each.source for each in sets),
        classes=max((each.classes for each in sets), key=len),
        count=sum(each.count for each in sets),
        shards=tuple(shard for each in sets for shard in each.shards),
    )


def _drawn(
    pipeline: "DiffusionPipeline", part: Sequence[Wanted], config: GenerateConfig, advance: Callable[[int], None]
) -> list[Tensor]:
    """The images (C, H, W) uint8 of `part`, drawn size by size."""
    images, done = dict[int, Tensor](), 0
    for size in dict.fromkeys(each.size for each in part):
        rows = [row for row, each in enumerate(part) if each.size == size]
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            prompts, seeds = [part[row].prompt for row in batch], [part[row].seed for row in batch]
            images |= zip(batch, sample(pipeline, prompts, seeds, replace(config, size=size)), strict=True)
            done += len(batch)
            advance(done)
    return [images[row] for row in range(len(part))]


def _write(tar: Path, first: int, part: Sequence[Wanted], images: Sequence[Tensor]) -> None:
    """Images `first` and those after it, as one tar. Equal images make equal bytes."""
    with atomic_file(tar) as partial, tarfile.open(partial, "w") as out:
        for number, (wanted, image) in enumerate(zip(part, images, strict=True), first):
            for ending, data in _files(wanted, image).items():
                out.addfile(member(f"{number:07}.{ending}", len(data)), io.BytesIO(data))


def _files(wanted: Wanted, image: Tensor) -> dict[str, bytes]:
    from torchvision.transforms.functional import to_pil_image

    picture = io.BytesIO()
    to_pil_image(image).save(picture, format="PNG")
    if isinstance(wanted.prompt, int):
        return {"png": picture.getvalue(), "cls": str(wanted.prompt).encode()}
    return {"png": picture.getvalue(), "json": json.dumps({"caption": wanted.prompt, "seed": wanted.seed}).encode()}


def _onwards(bar: StepReporter, before: int) -> Callable[[int], None]:
    """Reports so many images of a shard where so many were done before it."""
    return lambda count: bar.advance(before + count)


def _fingerprint(wanted: Sequence[Wanted], config: GenerateConfig) -> str:
    """Of all that decides about the images, but for the batch size, which changes rounding only."""
    settings = asdict(replace(config, size=None, batch_size=1))
    settings |= {"shard": SHARD, "wanted": [asdict(each) for each in wanted]}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _finished(folder: Path, source: str) -> dict[Path, Shard]:
    """By file, the shards that an earlier run for `source` finished and that are whole; other tars are removed."""
    try:
        listed = ShardSet.read(folder / MANIFEST)
        shards = listed.shards if listed.source == source else ()
    except T5Error:  # none yet, or damaged
        shards = ()
    finished = {Path(shard.path): shard for shard in shards if _is_whole(shard)}
    for tar in folder.glob("[0-9][0-9][0-9][0-9][0-9].tar"):
        if tar not in finished:
            tar.unlink()
    return finished


def _is_whole(shard: Shard) -> bool:
    try:
        with shard.opened():
            return True
    except T5Error:
        return False

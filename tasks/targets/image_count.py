"""How many images a target's sources hold, and how many bytes, told without reading them."""

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from t5lib.data.checking import tar_files
from t5lib.data.remote import is_remote
from t5lib.data.shards import IMAGE_FIELDS
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.runtime.needs import Remote
from tasks.targets.image_shards import ImagesConfig

# Published counts of data sets that params.yaml names: (training, validation).
KNOWN = {"timm/imagenet-1k-wds": {"train": 1_281_167, "val": 50_000}}


@dataclass(frozen=True)
class Images:
    """`count` and `size` (bytes) of the images of a split; None where that is not known. `how` it was told."""

    count: int | None
    size: int | None
    how: str


def counted(shards: ImagesConfig, split: str, root: Path) -> Images:
    """Number of images of "train" or "val", at most `shards.limit`."""
    source = getattr(shards, split)
    if source is None:
        return Images(0, 0, "none are named")
    images = _held(source, split, root)
    if shards.limit is None or (images.count is not None and images.count <= shards.limit):
        return images
    return Images(shards.limit, None, "by shards.limit")


def _held(source: str, split: str, root: Path) -> Images:
    """A manifest says it; of tar files the first is counted, and the others taken to be alike."""
    scheme, _, rest = source.partition(":")
    if is_remote(source):
        return Images(None, None, "counted when they are first read")
    if scheme == "hf":
        match = re.match(r"datasets/([\w.-]+/[\w.-]+)", rest)
        count = KNOWN.get(match[1] if match else "", {}).get(split)
        return Images(count, None, "as published" if count else "counted once it is fetched")
    place = root / Path(rest).expanduser()
    try:
        if place.suffix == ".json" and place.is_file():
            return Images(read_json(place)["count"], None, "by its manifest")
        tars = tar_files(place, source)
        return _like_the_first(tars)
    except (T5Error, OSError, tarfile.TarError, KeyError, TypeError):
        return Images(None, None, "not there, or not readable")


def remote_images(shards: ImagesConfig, root: Path, target: str) -> list[Remote]:
    """The images of the section `shards` that the hub has, unless they were fetched before."""
    if (root / f"data/out/{target}/shards.json").exists():
        return []
    splits = {"training images": shards.train, "validation images": shards.val}
    return [
        Remote(what, source)
        for what, source in splits.items()
        if source and source.startswith("hf:") and not is_remote(source)
    ]


def _like_the_first(tars: list[Path]) -> Images:
    sizes = [tar.stat().st_size for tar in tars]
    with tarfile.open(tars[0]) as opened:
        samples = sum(name.rpartition(".")[2].lower() in IMAGE_FIELDS for name in opened.getnames())
    total = sum(sizes)
    return Images(round(samples * total / max(1, sizes[0])), total, f"about, by the first of {len(tars)} tar files")

"""Image shards that a target's settings name, opened and checked."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from t5lib.data.checking import open_captioned, open_shards
from t5lib.data.remote import is_remote
from t5lib.data.shards import ShardSet
from t5lib.download import check, kept
from t5lib.utils.config import AtLeastOne, Share, settings
from t5lib.utils.errors import T5Error
from tasks.runtime.stage import Stage

CHECKED = "data/scratch/checked-shards.jsonl"  # what is known of tars that were read once, for all targets


@settings
class ImagesConfig:
    """Where the images are, and how many of them are taken.

    Attributes:
        train, val: each one of
            file:data/fashion-mnist/train.json          a manifest; its shards are checked against it
            file:/data/imagenet/train                   a folder of tar files, or a pattern: file:/data/in1k/train-*.tar
            hf:datasets/OWNER/REPO@COMMIT#train-*.tar   tar files from the hub, kept in data/datasets
            hf://datasets/OWNER/REPO@COMMIT/train-*.tar, https://HOST/train-{0000..0099}.tar, or the address of a
            manifest: read from there, through a cache of limited size (t5lib.data.remote)
            Paths are relative to the repository.
        max_skipped: share of the samples that may be left out because the image cannot be read, or the caption or class
            is missing. Every image is decoded once, to see that it can be.
        limit: how many images of each split are taken: the first that can be used, in the order of the tar files, so
            these should be well mixed. Tar files after them are not opened. Null takes all.
    """

    train: str
    val: str
    max_skipped: Share = 0.01
    limit: AtLeastOne | None = None

    def __post_init__(self) -> None:
        check_sources(self.train, self.val)


def check_source(source: str, split: str) -> None:
    """Raises T5Error unless `source` is of one of the forms that images may have."""
    if is_remote(source):
        _check_address(source, split)
        return
    if not re.match(r"file:.|hf:datasets/", source):
        raise T5Error(
            f"{split} is '{source[:200]}'; expected file:MANIFEST.json, file:FOLDER, file:PATTERN, "
            "hf:datasets/OWNER/REPO@COMMIT#PATTERN, or an address such as https://HOST/train-{0000..0099}.tar"
        )
    check(source)


def _check_address(source: str, split: str) -> None:
    """Raises T5Error for an address without encryption, with a password, or on the hub without a commit."""
    scheme, _, rest = source.partition("://")
    if scheme in ("http", "ftp", "file") and urlsplit(source).hostname not in ("127.0.0.1", "localhost"):
        raise T5Error(f"{split} is '{source[:200]}'; expected https://…, or file:PATH for what lies on this machine")
    if "@" in rest.partition("/")[0]:
        raise T5Error(
            f"{split} holds a user name or password, which would be recorded; use ~/.netrc or a profile instead"
        )
    if scheme == "hf" and not re.match(r"datasets/[^/@]+/[^/@]+@[^/]+/.", rest):
        raise T5Error(f"{split} is '{source[:200]}'; expected hf://datasets/OWNER/REPO@COMMIT/PATTERN, with its commit")


def check_sources(train: str, val: str) -> None:
    """Raises T5Error unless both are sources of images, and not the same."""
    for split, source in (("train", train), ("val", val)):
        check_source(source, split)
    places = [os.path.normpath(source.removeprefix("file:")) for source in (train, val)]
    if places[0] == places[1]:
        raise T5Error(
            f"val is '{val[:200]}', and so is train; scores on training images mean nothing: name others, such as a "
            "split of validation images"
        )


def listed(config: ImagesConfig, root: Path) -> tuple[ShardSet | None, ShardSet | None]:
    """What the manifests of `config.train` and `config.val` say; None for what is no manifest, or not there (yet)."""
    train, val = (_manifest(source, root, config.limit) for source in (config.train, config.val))
    return train, val


def _manifest(source: str | None, root: Path, limit: int | None) -> ShardSet | None:
    if source is None:
        return None
    place = root / Path(source.removeprefix("file:")).expanduser()
    if not source.startswith("file:") or place.suffix != ".json" or not place.is_file():
        return None
    images = ShardSet.read(place)
    return images.first(limit) if limit else images


def open_labelled(config: ImagesConfig, split: str, num_classes: int, stage: Stage) -> ShardSet:
    """The images of classes of "train" or "val", all of them checked; those that cannot be used are left out.

    Raises:
        T5Error: shards that are damaged or hold something else (named), or more samples than `max_skipped` that cannot
            be used.
    """
    source = getattr(config, split)
    return open_shards(
        _place(source, stage.root),
        name=f"{stage.target} {split}",
        source=source,
        notes=stage.root / CHECKED,
        max_skipped=config.max_skipped,
        limit=config.limit,
        classes=[str(index) for index in range(num_classes)],
    )


def _place(source: str, root: Path) -> Path | str:
    if is_remote(source):
        return source
    scheme, _, rest = source.partition(":")
    return root / Path(rest).expanduser() if scheme == "file" else kept(source, root / "data/datasets")


def open_captions(config: ImagesConfig, split: str, stage: Stage) -> ShardSet:
    """The same of captioned images."""
    return open_captioned(
        getattr(config, split),
        name=f"{stage.target} {split}",
        root=stage.root,
        notes=stage.root / CHECKED,
        max_skipped=config.max_skipped,
        limit=config.limit,
    )


def taken(sets: dict[str, ShardSet], config: ImagesConfig) -> dict[str, int]:
    """Metrics: how many images of each split are taken and left out, and the limit where there is one."""
    counts = {split: shards.count for split, shards in sets.items()}
    counts |= {f"{split}_left_out": shards.left_out for split, shards in sets.items()}
    return counts | ({} if config.limit is None else {"limit": config.limit})


def refuse_overlap(train: ShardSet, val: ShardSet) -> None:
    """Raises T5Error when a shard is in both."""
    known = {shard.sha256: shard.path for shard in train.shards}
    for shard in val.shards:
        if shard.sha256 in known:
            raise T5Error(
                f"{shard.path} of val is also in train ({known[shard.sha256]}); "
                "scores on training images mean nothing: use patterns that keep them apart"
            )

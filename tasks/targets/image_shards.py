"""Image shards that a target's settings name, opened and checked."""

import os
import re
from pathlib import Path
from typing import Any

from t5lib.data.checking import open_shards
from t5lib.data.shards import ShardSet
from t5lib.download import check, kept
from t5lib.utils.errors import T5Error
from tasks.runtime.stage import Stage

CHECKED = "data/scratch/checked-shards.jsonl"  # what is known of tars that were read once, for all targets


def check_source(source: str, split: str) -> None:
    """Raises T5Error unless `source` is of one of the forms that images may have."""
    if not re.match(r"file:.|hf:datasets/", source):
        raise T5Error(
            f"{split} is '{source[:200]}'; expected file:MANIFEST.json, file:FOLDER, file:PATTERN "
            "or hf:datasets/OWNER/REPO@COMMIT#PATTERN"
        )
    check(source)


def check_sources(train: str, val: str) -> None:
    """Raises T5Error unless both are sources of images, and not the same."""
    for split, source in (("train", train), ("val", val)):
        check_source(source, split)
    places = [os.path.normpath(source.removeprefix("file:")) for source in (train, val)]
    if places[0] == places[1]:
        raise T5Error(
            f"val is '{val[:200]}', and so is train; scores on images trained on mean nothing: name others, such as a "
            "split of validation images"
        )


def listed(config: Any, root: Path) -> tuple[ShardSet | None, ShardSet | None]:
    """What the manifests of `config.train` and `config.val` say; None for what is no manifest, or not there (yet)."""
    train, val = (_manifest(source, root) for source in (config.train, config.val))
    return train, val


def _manifest(source: str, root: Path) -> ShardSet | None:
    place = root / Path(source.removeprefix("file:")).expanduser()
    if not source.startswith("file:") or place.suffix != ".json" or not place.is_file():
        return None
    return ShardSet.read(place)


def open_labelled(source: str, split: str, num_classes: int, max_skipped: float, stage: Stage) -> ShardSet:
    """The images of classes that `source` names, all of them checked; those that cannot be used are left out.

    Raises:
        T5Error: another form of `source`, shards that are damaged or hold something else (named), or more samples than
            `max_skipped` that cannot be used.
    """
    check_source(source, f"shards.{split}")
    scheme, _, rest = source.partition(":")
    local = scheme == "file"
    return open_shards(
        stage.root / Path(rest).expanduser() if local else kept(source, stage.root / "data/datasets"),
        name=f"{stage.target} {split}",
        source=source,
        notes=stage.root / CHECKED,
        max_skipped=max_skipped,
        classes=[str(index) for index in range(num_classes)],
    )


def refuse_overlap(train: ShardSet, val: ShardSet) -> None:
    """Raises T5Error when a shard is in both."""
    known = {shard.sha256: shard.path for shard in train.shards}
    for shard in val.shards:
        if shard.sha256 in known:
            raise T5Error(
                f"{shard.path} of val is also in train ({known[shard.sha256]}); "
                "scores on images trained on mean nothing: use patterns that keep them apart"
            )

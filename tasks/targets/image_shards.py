"""Image shards that a target's settings name, opened and checked."""

import re
from pathlib import Path

from t5lib.data.shards import ShardSet, scan, tar_files
from t5lib.download import check, kept
from t5lib.utils.errors import T5Error
from tasks.runtime.stage import Stage

COUNTED = "data/scratch/counted-shards.jsonl"  # what a scan noted, for all targets


def check_source(source: str, split: str) -> None:
    """Raises T5Error unless `source` is of one of the forms that images may have."""
    if not re.match(r"file:.|hf:datasets/", source):
        raise T5Error(
            f"{split} is '{source[:200]}'; expected file:MANIFEST.json, file:FOLDER, file:PATTERN "
            "or hf:datasets/OWNER/REPO@COMMIT#PATTERN"
        )
    check(source)


def open_labelled(source: str, split: str, num_classes: int, stage: Stage) -> ShardSet:
    """The images of classes that `source` names, all of them checked.

    Raises:
        T5Error: another form of `source`, or shards that are damaged or hold something else (named).
    """
    check_source(source, f"shards.{split}")
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest.endswith(".json"):
        shards = ShardSet.read(stage.root / Path(rest).expanduser())
        shards.verify()
        return shards
    local = scheme == "file"
    place = stage.root / Path(rest).expanduser() if local else kept(source, stage.root / "data/datasets")
    classes = [str(index) for index in range(num_classes)]
    return scan(f"{stage.target} {split}", tar_files(place, source), classes, source, stage.root / COUNTED)


def refuse_overlap(train: ShardSet, val: ShardSet) -> None:
    """Raises T5Error when a shard is in both."""
    known = {shard.sha256: shard.path for shard in train.shards}
    for shard in val.shards:
        if shard.sha256 in known:
            raise T5Error(
                f"{shard.path} of val is also in train ({known[shard.sha256]}); "
                "scores on images trained on mean nothing: use patterns that keep them apart"
            )

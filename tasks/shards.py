"""Stage `shards`: opens and checks the training and validation images, and writes their manifests for later stages."""

from dataclasses import dataclass
from pathlib import Path

from t5lib.data.images import DataConfig
from t5lib.data.shards import ShardSet, scan, tar_files
from t5lib.utils.errors import T5Error
from tasks.downloads import kept
from tasks.runtime.stage import Stage, main


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Where the images are. Each of both is one of

        file:data/fashion-mnist/train.json          a manifest; its shards are checked against it
        file:/data/imagenet/train                   a folder of tar files, or a pattern: file:/data/in1k/train-*.tar
        hf:datasets/OWNER/REPO@COMMIT#train-*.tar   the same from the hub, kept in data/datasets

    Tar files without a manifest (img2dataset and webdataset layout: `<key>.jpg` and `<key>.cls`) are counted and
    hashed, once. Paths are relative to the repository.
    """

    train: str
    val: str


SECTIONS = {"shards": ShardsConfig, "data": DataConfig}


def run(stage: Stage) -> dict:
    """Check the shards and write train.json and val.json."""
    config = stage.params(ShardsConfig)
    num_classes = stage.params(DataConfig, "data").num_classes
    train = open_labelled(config.train, "train", num_classes, stage)
    val = open_labelled(config.val, "val", num_classes, stage)
    _refuse_mismatch(train, val, num_classes)
    for split, shards in (("train", train), ("val", val)):
        shards.write(stage.out / f"{split}.json", root=stage.root)
        stage.artifact(stage.out / f"{split}.json")
    sizes = {"train": train.count, "val": val.count, "classes": num_classes}
    return sizes | {"train_shards": len(train.shards), "val_shards": len(val.shards)}


def open_labelled(source: str, split: str, num_classes: int, stage: Stage) -> ShardSet:
    """The images of classes that `source` names, all of them checked."""
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest.endswith(".json"):
        shards = ShardSet.read(stage.root / Path(rest).expanduser())
        shards.verify()
        return shards
    if scheme == "file":
        place = stage.root / Path(rest).expanduser()
    elif source.startswith("hf:datasets/"):
        place = kept(source, stage.root / "data/datasets")
    else:
        raise T5Error(
            f"shards.{split} is '{source}'; expected file:MANIFEST.json, file:FOLDER, file:PATTERN "
            "or hf:datasets/OWNER/REPO@COMMIT#PATTERN"
        )
    classes = [str(index) for index in range(num_classes)]
    notes = stage.root / "data/scratch/counted-shards.jsonl"
    return scan(f"{stage.target} {split}", tar_files(place, source), classes, source, notes)


def _refuse_mismatch(train: ShardSet, val: ShardSet, num_classes: int) -> None:
    if train.classes != val.classes:
        raise T5Error(
            f"train has {len(train.classes)} classes and val {len(val.classes)}, or they have other names "
            "or another order; both must come from the same data set"
        )
    if len(train.classes) != num_classes:
        raise T5Error(
            f"the shards have {len(train.classes)} classes, but data.num_classes is {num_classes}; correct it"
        )
    refuse_overlap(train, val)


def refuse_overlap(train: ShardSet, val: ShardSet) -> None:
    """Raises T5Error when a shard is in both."""
    known = {shard.sha256: shard.path for shard in train.shards}
    for shard in val.shards:
        if shard.sha256 in known:
            raise T5Error(
                f"{shard.path} of val is also in train ({known[shard.sha256]}); "
                "scores on images trained on mean nothing: use patterns that keep them apart"
            )


if __name__ == "__main__":
    main(run)

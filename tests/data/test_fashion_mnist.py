import importlib.util
import io
import struct
from collections import Counter
from gzip import compress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t5lib.data.checking import open_shards
from t5lib.data.shards import ShardSet

FOLDER = Path(__file__).parents[2] / "data/fashion-mnist"


def samples(manifest: Path) -> list[dict]:
    return [sample for shard in ShardSet.read(manifest).shards for sample in shard.samples()]


@pytest.mark.parametrize(("split", "count"), [("train", 4000), ("val", 1000)])
def test_committed_images_are_those_of_their_manifest(split, count, tmp_path):
    listed = FOLDER / f"{split}.json"
    opened = open_shards(listed, name=split, source="", notes=tmp_path / "notes", max_skipped=0, classes=["any"])
    assert opened == ShardSet.read(listed)
    found = samples(FOLDER / f"{split}.json")
    assert Counter(int(sample["cls"]) for sample in found) == dict.fromkeys(range(10), count // 10)
    assert len({sample["png"] for sample in found}) == count
    assert {Image.open(io.BytesIO(sample["png"])).size for sample in found} == {(28, 28)}


def test_no_committed_image_is_in_both_splits():
    train, val = ({sample["png"] for sample in samples(FOLDER / f"{split}.json")} for split in ("train", "val"))
    assert not train & val


def test_committed_data_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 6e6


@pytest.fixture
def source(tmp_path) -> Path:
    """IDX files of 60 training and 30 test images; all pixels of an image hold its position in the file."""
    for name, labels in (("train", [i % 10 for i in range(60)]), ("t10k", [i // 3 for i in range(30)])):
        images = np.repeat(np.arange(len(labels), dtype=np.uint8), 28 * 28).tobytes()
        for kind, head, body in (("images-idx3", (28, 28), images), ("labels-idx1", (), bytes(labels))):
            shape = struct.pack(f">{1 + len(head)}I", len(labels), *head)
            content = bytes([0, 0, 8, 1 + len(head)]) + shape + body
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(compress(content))
    return tmp_path


def make(source: Path, out: Path, *options: str) -> None:
    spec = importlib.util.spec_from_file_location("make_fashion_mnist", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--source", str(source), "--out", str(out), *options])


def test_maker_takes_the_first_images_of_every_class_in_file_order(source, tmp_path):
    make(source, tmp_path / "out", "--train", "40", "--val", "20", "--shard-size", "15")
    train, val = (samples(tmp_path / "out" / f"{split}.json") for split in ("train", "val"))
    assert [sample["__key__"] for sample in train] == [f"train-{i:05d}" for i in range(40)]
    assert [sample["__key__"] for sample in val] == [f"val-{i:05d}" for i in range(30) if i % 3 < 2]
    assert [int(sample["cls"]) for sample in val] == [i // 3 for i in range(30) if i % 3 < 2]
    for sample in train + val:
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert pixels.shape == (28, 28) and (pixels == int(sample["__key__"][-5:])).all()
    assert [shard.count for shard in ShardSet.read(tmp_path / "out/train.json").shards] == [15, 15, 10]


def test_maker_writes_the_same_bytes_again(source, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    make(source, first, "--train", "20", "--val", "10")
    make(source, second, "--train", "20", "--val", "10")
    written = sorted(path.name for path in first.iterdir())
    assert written == ["train-0000.tar.gz", "train.json", "val-0000.tar.gz", "val.json"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "70", "--val", "10"), "--train 70: expected a positive multiple of 10 up to 60"),
        (("--train", "25", "--val", "10"), "--train 25: expected a positive multiple of 10"),
    ],
)
def test_maker_refuses_numbers_that_do_not_divide_evenly(source, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        make(source, tmp_path / "out", *options)


def test_maker_names_a_damaged_source(source, tmp_path):
    path = source / "train-images-idx3-ubyte.gz"
    path.write_bytes(compress(b"\x00\x00\x08\x03" + b"\x00" * 12 + b"cut"))
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz is not a whole IDX file"):
        make(source, tmp_path / "out")

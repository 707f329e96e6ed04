"""Resident images: the very pixels that the loader gives, in batches that follow from seed and number alone."""

import io
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from t5lib.data import in_memory
from t5lib.data.images import DataConfig, eval_batches, transform
from t5lib.data.in_memory import InMemoryImages, decode
from t5lib.data.shards import ShardSet
from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256, write_json

DATA = DataConfig(img_size=(14, 28), num_classes=10, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """23 noisy pictures of 20 × 31 pixels."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for index in range(23):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)).save(png, "png")
            for name, content in ((f"{index:02d}.cls", b"%d" % (index % 10)), (f"{index:02d}.png", png.getvalue())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shard = {"path": "0.tar", "count": 23, "sha256": sha256(folder / "0.tar")}
    about = {"name": "noise", "licence": "none", "source": "test", "classes": [str(i) for i in range(10)]}
    write_json(folder / "set.json", about | {"count": 23, "shards": [shard]})
    return ShardSet.read(folder / "set.json")


def numbered(count: int) -> InMemoryImages:
    """Image i is 2·i + 1 in its left column and 2·i in its right one, so that number and mirroring can be read off."""
    numbers = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1) * 2
    images = torch.cat([numbers + 1, numbers], dim=3).expand(-1, 3, 1, 2).contiguous()
    plain = replace(DATA, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return InMemoryImages(images, torch.arange(count), plain)


def read(images: torch.Tensor) -> tuple[list[int], list[bool]]:
    """(number, mirrored) of numbered images."""
    values = (images[:, 0, 0] * 255).round().int()
    return (values.amin(1) // 2).tolist(), (values[:, 0] < values[:, 1]).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_are_the_loaders_bit_for_bit(shards, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(in_memory, "DECODED_AT_ONCE", 5)
    data = replace(DATA, crop_pct=0.9)
    ours = InMemoryImages.load(decode(shards, data, tmp_path, workers=workers), data)
    theirs = list(eval_batches(shards, transform(data), batch_size=10))
    batches = list(ours.eval_batches(10))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    for (images, labels), (other_images, other_labels) in zip(batches, theirs, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_images_are_decoded_once_and_again_when_their_pixels_would_differ(shards, tmp_path):
    file = decode(shards, DATA, tmp_path)
    written = file.stat().st_mtime_ns
    assert decode(shards, replace(DATA, workers=3, eval_batch_size=7, mean=(0.5,) * 3), tmp_path) == file
    assert file.stat().st_mtime_ns == written
    others = {decode(shards, replace(DATA, img_size=28), tmp_path), decode(shards, DATA, tmp_path, limit=9)}
    assert len(others | {file}) == 3 == len(list(tmp_path.glob("*.safetensors")))
    assert len(InMemoryImages.load(decode(shards, DATA, tmp_path, limit=9), DATA)) == 9


def test_decoded_images_that_were_damaged_are_decoded_again(shards, tmp_path):
    file = decode(shards, DATA, tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert decode(shards, DATA, tmp_path).read_bytes() == whole


def test_an_interrupted_decoding_leaves_nothing(shards, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(in_memory, "save_file", full)
    with pytest.raises(OSError):
        decode(shards, DATA, tmp_path / "x")
    assert list((tmp_path / "x").iterdir()) == []


def test_each_epoch_has_every_image_in_a_new_order_and_batches_are_full():
    batches = list(islice(numbered(23).batches(5, seed=0)(0), 23))  # five epochs
    order = [n for images, labels in batches for n in read(images)[0]]
    assert [n for _, labels in batches for n in labels.tolist()] == order
    epochs = [order[i : i + 23] for i in range(0, 115, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_stream_follows_from_its_seed_and_can_be_taken_up_at_any_batch():
    images = numbered(23)
    whole = list(islice(images.batches(5, seed=3, hflip=0.5)(0), 20))
    torch.manual_seed(1)  # the global state has no say
    for start in (0, 1, 4, 9, 17):  # batch 4 spans two epochs
        part = list(islice(images.batches(5, seed=3, hflip=0.5)(start), 20 - start))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[start:], part, strict=True))
    assert not torch.equal(whole[0][0], next(images.batches(5, seed=4, hflip=0.5)(0))[0])


def test_images_are_mirrored_one_by_one_with_the_given_probability():
    seen = Counter()
    for images, _ in islice(numbered(100).batches(50, seed=0, hflip=0.3)(0), 20):
        numbers, mirrored = read(images)
        seen.update(zip(numbers, mirrored, strict=True))
    share = sum(count for (_, mirrored), count in seen.items() if mirrored) / 1000
    assert 0.25 < share < 0.35
    assert sum((n, True) in seen and (n, False) in seen for n in range(100)) > 80  # anew in every epoch
    assert not any(read(next(numbered(100).batches(50, seed=0)(0))[0])[1])


@pytest.mark.parametrize(("batch_size", "hflip"), [(0, 0.0), (24, 0.0), (5, 1.5)])
def test_arguments_out_of_range_are_refused(batch_size, hflip):
    with pytest.raises(T5Error, match=f"batch_size {batch_size} and hflip {hflip}: expected 1 to 23"):
        numbered(23).batches(batch_size, seed=0, hflip=hflip)
    with pytest.raises(T5Error, match=r"must be uint8 .* got torch.float32"):
        InMemoryImages(torch.zeros(2, 3, 4, 4), torch.zeros(2), DATA)

import hashlib
import io
import json
import pickle
import random
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import t5lib.data.images
import t5lib.data.shards
from t5lib.data.images import AugmentConfig, DataConfig, _TrainStream, eval_batches, train_batches, transform
from t5lib.data.shards import ShardSet
from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256, write_json
from t5lib.utils.processes import WHOLE, Part

PLAIN = DataConfig(img_size=14, num_classes=10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
HEAVY = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", hflip=0.5, scale=(0.3, 1.0), re_prob=0.5)


def png(index: int) -> bytes:
    """A picture that bears its number: red + 256 green."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (index % 256, index // 256, 0)).save(out, "png")
    return out.getvalue()


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0]).int().tolist()


def exact(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def noisy(image: Image.Image) -> torch.Tensor:
    """Stands for an augmentation: leaves the picture's number, and draws from all three global generators."""
    drawn = exact(image)
    drawn[2] = random.random() + np.random.rand() + torch.rand(())
    return drawn


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(indices) -> dict[str, bytes]:
    return {f"{i:04d}.{ext}": c for i in indices for ext, c in (("cls", b"%d" % (i % 10)), ("png", png(i)))}


def manifest(folder: Path, tars: list[Path], counts: list[int]) -> Path:
    shards = [{"path": t.name, "count": c, "sha256": sha256(t)} for t, c in zip(tars, counts, strict=True)]
    about = {"name": "numbers", "licence": "none", "source": "test", "classes": [str(i) for i in range(10)]}
    write_json(folder / "set.json", about | {"count": sum(counts), "shards": shards})
    return folder / "set.json"


def numbered(folder: Path, *counts: int) -> ShardSet:
    """Shards with so many samples each, numbered throughout."""
    tars, begin = [], 0
    for index, count in enumerate(counts):
        tars.append(write_tar(folder / f"{index}.tar", pairs(range(begin, begin + count))))
        begin += count
    return ShardSet.read(manifest(folder, tars, list(counts)))


def one_shard(folder: Path, files: dict[str, bytes]) -> ShardSet:
    return ShardSet.read(manifest(folder, [write_tar(folder / "bad.tar", files)], [len(files) // 2]))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> ShardSet:
    return numbered(tmp_path_factory.mktemp("four"), 13, 11, 9, 14)


def first(count: int, shards: ShardSet, **options) -> list:
    return list(islice(train_batches(shards, noisy, **({"batch_size": 5, "seed": 3} | options)), count))


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right) > 0
    for (images, labels), (other_images, other_labels) in zip(left, right, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_can_be_repeated_and_taken_up_at_any_batch(four, workers):
    whole = first(25, four, workers=workers)  # two and a half epochs of 47 samples
    assert_same(whole, first(25, four, workers=workers))
    for start in (1, 10, 21):
        assert_same(whole[start:], first(25 - start, four, workers=workers, start=start))


def test_fewer_shards_than_slots_can_be_taken_up_too(tmp_path):
    lone = numbered(tmp_path, 23)
    options = {"batch_size": 4, "workers": 2, "part": Part(row=1, rows=2)}
    assert_same(first(9, lone, **options)[4:], first(5, lone, **options, start=4))


def test_real_augmentation_follows_from_the_seed_alone(tmp_path):
    shards = numbered(tmp_path, 12)

    def stream(seed: int, start: int = 0) -> list:
        return list(islice(train_batches(shards, transform(PLAIN, HEAVY), batch_size=4, seed=seed, start=start), 6))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    whole = stream(0)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert_same(whole, stream(0))
    assert_same(whole[3:], stream(0, start=3)[:3])
    assert not torch.equal(whole[0][0], stream(1)[0][0])


def test_each_epoch_has_every_sample_in_a_new_order_with_new_augmentation(four):
    batches = first(4, four, batch_size=47)
    orders = [numbers(images) for images, _ in batches]
    assert all(sorted(order) == list(range(47)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert len({noise for images, _ in batches for noise in images[:, 2, 0, 0].tolist()}) == 4 * 47
    assert all(labels.tolist() == [n % 10 for n in order] for (_, labels), order in zip(batches, orders, strict=True))


@pytest.mark.parametrize(("counts", "buffer"), [((30,), 1000), ((2,) * 8, 1)], ids=["samples", "shards"])
def test_samples_and_shards_are_each_mixed_anew_in_every_epoch(tmp_path, monkeypatch, counts, buffer):
    monkeypatch.setattr(t5lib.data.images, "SHUFFLE_BUFFER", buffer)
    orders = [numbers(images) for images, _ in first(4, numbered(tmp_path, *counts), batch_size=sum(counts))]
    assert len({tuple(order) for order in [*orders, range(sum(counts))]}) == 5


@pytest.mark.parametrize("counts", [(42,), (13, 7, 22), (10, 10, 11, 11)], ids=str)
def test_an_epoch_has_every_sample_once(tmp_path, counts):
    batches = first(7, numbered(tmp_path, *counts), batch_size=6)
    assert Counter(n for images, _ in batches for n in numbers(images)) == Counter(range(42))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [2, 3])
def test_processes_make_their_part_of_the_one_stream_whatever_their_number(four, workers, number):
    """Beyond an epoch, and taken up in the middle; the shards are of unequal sizes."""
    whole = first(18, four, batch_size=6, workers=workers)[6:]
    options = {"batch_size": 6, "workers": workers, "start": 6}
    for place in range(number):
        assert_same(whole[place::number], first(12 // number, four, **options, part=Part(turn=place, turns=number)))
        rows = [(images[place::number], labels[place::number]) for images, labels in whole]
        assert_same(rows, first(12, four, **options, part=Part(row=place, rows=number)))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_left_alone(four, workers):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    stream = train_batches(four, noisy, batch_size=5, seed=0, workers=workers)
    next(stream), next(stream)
    list(eval_batches(four, exact, batch_size=20, workers=workers))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(four, workers):
    batches = list(eval_batches(four, exact, batch_size=10, workers=workers))
    assert [len(labels) for _, labels in batches] == [10, 10, 10, 10, 7]
    assert [n for images, _ in batches for n in numbers(images)] == list(range(47))


def test_evaluation_keeps_to_limit_and_rank(four):
    for rank in range(3):
        part = eval_batches(four, exact, batch_size=4, limit=20, rank=rank, world_size=3)
        assert [n for images, _ in part for n in numbers(images)] == list(range(rank, 20, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_not_the_one_listed_is_not_read(tmp_path, workers):
    shards = numbered(tmp_path, 6, 6)
    path = tmp_path / "1.tar"
    assert len(list(eval_batches(shards, exact, batch_size=4))) == 3
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))  # as large as it was
    for broken in (
        lambda: list(eval_batches(shards, exact, batch_size=4, workers=workers)),
        lambda: first(9, shards, workers=workers),
    ):
        with pytest.raises(T5Error, match=r"1\.tar has sha256 \w+, its manifest says \w+; the file was") as raised:
            broken()
        assert "Traceback" not in str(raised.value)


def test_a_shard_is_read_for_its_checksum_once_a_process(tmp_path, monkeypatch):
    shards, asked = numbered(tmp_path, 6, 6), []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: asked.append(file.name) or digest(file, kind))
    first(9, shards), list(eval_batches(shards, exact, batch_size=4))
    assert sorted(asked) == [shard.path for shard in shards.shards]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (4 * 2 * 1024, r"1\.tar holds 4 samples, its manifest says 6"),  # whole samples; tar itself sees nothing wrong
        (4 * 2 * 1024 + 1024 + 530, r"1\.tar cannot be read as a tar file \(unexpected end of data\)"),
    ],
    ids=["between members", "within a member"],
)
def test_a_cut_tar_is_noticed_even_where_the_manifest_lists_it_so(tmp_path, length, message):
    numbered(tmp_path, 6, 6)
    path = tmp_path / "1.tar"
    path.write_bytes(path.read_bytes()[:length])
    shards = ShardSet.read(manifest(tmp_path, [tmp_path / "0.tar", path], [6, 6]))
    for broken in (lambda: list(eval_batches(shards, exact, batch_size=4)), lambda: first(9, shards)):
        with pytest.raises(T5Error, match=message):
            broken()


def test_a_shard_that_is_listed_twice_is_refused(tmp_path):
    tar = write_tar(tmp_path / "0.tar", pairs(range(3)))
    (tmp_path / "link.tar").symlink_to(tar)
    (tmp_path / "copy.tar").write_bytes(tar.read_bytes())
    for other in ("0.tar", "link.tar", "copy.tar", "../" + tmp_path.name + "/0.tar"):
        with pytest.raises(T5Error, match=r"lists .* twice, or .* has the same content; leave one of them out"):
            ShardSet.read(manifest(tmp_path, [tar, tmp_path / other], [3, 3]))


def test_more_samples_than_the_manifest_says_are_refused(tmp_path):
    tar = write_tar(tmp_path / "0.tar", pairs(range(6)))
    shards = ShardSet.read(manifest(tmp_path, [tar], [5]))
    with pytest.raises(T5Error, match=r"0\.tar holds more than 5 samples"):
        list(shards.shards[0].samples())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0001.png": b"no picture"}, r"bad\.tar: sample '0001': \.png is not a readable image"),
        ({"0001.png": png(1)[:45]}, r"bad\.tar: sample '0001': \.png is not a readable image"),
        ({"0001.cls": b"10"}, r"bad\.tar: sample '0001' has class 10, expected 0 to 9"),
        ({"0001.cls": b"-1"}, r"bad\.tar: sample '0001' has class -1, expected 0 to 9"),
        *(
            ({"0001.cls": text}, r"bad\.tar: sample '0001': \.cls holds b.*, expected a number as text")
            for text in (b"shoe", b"0_1", b"+1", b"1.0", b"", b"1 2", "\u0661".encode(), b"1" * 5000, b"1\0", b"0x1")
        ),
    ],
)
def test_a_bad_sample_is_named_with_its_shard(tmp_path, change, message):
    shards = one_shard(tmp_path, pairs(range(3)) | change)
    with pytest.raises(T5Error, match=message):
        list(eval_batches(shards, exact, batch_size=2))


def test_samples_that_are_left_out_are_passed_over_and_counted(tmp_path):
    whole = numbered(tmp_path, 6, 6)
    shards = replace(whole, count=9, shards=(replace(whole.shards[0], count=3, left_out=(0, 3, 5)), whole.shards[1]))
    assert shards.left_out == 3
    batches = eval_batches(shards, exact, batch_size=9)
    assert [n for images, _ in batches for n in numbers(images)] == [1, 2, 4, *range(6, 12)]
    assert sorted(n for images, _ in first(1, shards, batch_size=9) for n in numbers(images)) == [
        1,
        2,
        4,
        *range(6, 12),
    ]
    shards.write(tmp_path / "left.json", tmp_path)
    assert ShardSet.read(tmp_path / "left.json") == shards
    with pytest.raises(T5Error, match="holds 6 samples, its manifest says 7"):
        list(replace(shards.shards[0], count=4).samples())


def test_images_of_every_format_become_rgb_with_their_class(tmp_path):
    files = {}
    for name, kind, mode in (("a.jpg", "jpeg", "L"), ("b.JPEG", "jpeg", "CMYK"), ("c.webp", "webp", "RGBA")):
        out = io.BytesIO()
        Image.new("RGB", (6, 6), (128, 128, 128)).convert(mode).save(out, kind)
        files |= {name: out.getvalue(), f"{name[0]}.cls": b" 3\n"}
    images, labels = next(eval_batches(one_shard(tmp_path, files), exact, batch_size=3))
    assert images.shape == (3, 3, 6, 6) and (images - 128).abs().max() <= 2
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 5}, "count is 5, but its 1 shards add up to 3"),
        ({"shards": [{"path": "gone.tar", "count": 3, "sha256": ""}]}, r"gone\.tar does not exist"),
        ({"licence": None}, "licence: expected str"),
        ({"shards": []}, "add up to 0"),
        ({"shards": [{"path": "0.tar", "count": 3, "sha256": "0" * 63}]}, r"0\.tar has sha256 '0+'; expected 64"),
        ({"shards": [{"path": "0.tar", "count": 2, "sha256": "", "left_out": [3]}]}, r"left_out is \[3\]; expected"),
        ({"shards": [{"path": "0.tar", "count": 1, "sha256": "", "left_out": [1, 1]}]}, r"left_out is \[1, 1\]"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(tmp_path, change, message):
    path = manifest(tmp_path, [write_tar(tmp_path / "0.tar", pairs(range(3)))], [3])
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(T5Error, match=message):
        ShardSet.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"start": -1}, "start is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"part": Part(row=1, rows=3)}, "batch_size holds 4 samples, which 3 processes cannot share evenly"),
        ({"workers": 48}, "workers is 48; expected at most the 47 samples"),
    ],
)
def test_arguments_are_refused_before_any_batch(four, options, message):
    with pytest.raises(T5Error, match=message):
        train_batches(four, exact, **({"batch_size": 4, "seed": 0} | options))


@pytest.mark.parametrize("size", [14, (12, 20)], ids=str)
def test_plain_transform_fits_and_normalises(size):
    config = DataConfig(img_size=size, num_classes=10, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    result = transform(config)(Image.new("RGB", (37, 23), (255, 0, 51)))
    assert result.shape == (3, *(size if isinstance(size, tuple) else (size, size))) and result.dtype == torch.float32
    assert torch.allclose(result.amax((1, 2)), torch.tensor([1.0, -1.0, 0.2]))


def test_crop_pct_cuts_the_border_off():
    framed = Image.new("RGB", (28, 28), "white")
    framed.paste((0, 0, 0), (2, 2, 26, 26))
    cropped = replace(PLAIN, crop_pct=0.8, interpolation="nearest")
    assert transform(cropped)(framed).amax() == -1 and transform(PLAIN)(framed).amax() > 0.8


def test_augmentation_with_everything_off_is_the_plain_transform():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 41, 3), dtype=np.uint8))
    for config in (PLAIN, replace(PLAIN, img_size=(14, 28), crop_pct=0.8)):
        assert torch.equal(transform(config, AugmentConfig())(image), transform(config)(image))


def test_random_crop_has_the_right_size_and_varies():
    cropping = transform(replace(PLAIN, img_size=(14, 28)), AugmentConfig(scale=(0.2, 0.5)))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 41, 3), dtype=np.uint8))
    assert cropping(image).shape == (3, 14, 28) and not torch.equal(cropping(image), cropping(image))


def test_full_strength_posterize_works():
    """timm asks Pillow for 0 bits there, an error in Pillow 13."""
    strongest = transform(PLAIN, AugmentConfig(auto_augment="rand-m10-n8-inc1-p1"))
    image = Image.new("RGB", (14, 14), (200, 100, 50))
    for seed in range(20):
        np.random.seed(seed)
        assert strongest(image).isfinite().all()


def test_workers_can_be_spawned(four):
    stream = _TrainStream(four, transform(PLAIN, HEAVY), 4, slice(4), WHOLE, seed=0, start=2)
    assert_same(list(islice(pickle.loads(pickle.dumps(stream)), 2)), list(islice(stream, 2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AugmentConfig(auto_augment="rnd-m9"), "auto_augment 'rnd-m9': no policy 'rnd'"),
        (lambda: AugmentConfig(auto_augment="rand-m9", color_jitter=0.3), "color_jitter is 0.3; expected null"),
        (lambda: AugmentConfig(scale=(0.8, 0.2)), "scale is"),
        (lambda: AugmentConfig(hflip=50), "hflip is 50; expected at most 1"),
        (lambda: DataConfig(img_size=0, num_classes=2, mean=(0, 0, 0), std=(1, 1, 1)), "img_size is 0"),
        (
            lambda: DataConfig(img_size=8, num_classes=2, mean=(0, 0, 0), std=(1, 0, 1)),
            r"std\.1 is 0; expected 0.001 or more",
        ),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(T5Error, match=message):
        build()

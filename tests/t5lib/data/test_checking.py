"""Shards are read to their end before they are used; what cannot be used is left out, counted and bounded."""

import shutil
from dataclasses import replace

import pytest
from encodable import captioned, labelled, picture, shard_set, write_tar
from PIL import Image

from t5lib.data import checking
from t5lib.data.checking import open_captioned, open_shards
from t5lib.data.shards import ShardSet
from t5lib.utils.errors import T5Error

TEN = [str(index) for index in range(10)]


@pytest.fixture
def open_images(tmp_path):
    def opened(source: str, classes=(), max_skipped: float = 0.0, limit: int | None = None) -> ShardSet:
        return open_shards(
            tmp_path / source,
            name="cats",
            source=f"file:{source}",
            notes=tmp_path / "notes/a.jsonl",
            max_skipped=max_skipped,
            limit=limit,
            classes=classes,
        )

    return opened


def test_folder_pattern_and_manifest_open_the_same_shards(tmp_path):
    made = shard_set({tmp_path / f"{name}.tar": [captioned(index) for index in (ord(name), 2)] for name in "ab"})
    made.write(tmp_path / "set.json", root=tmp_path)
    for source in (f"file:{tmp_path}", "file:?.tar", "file:set.json"):
        found = open_captioned(source, name="cats", root=tmp_path, notes=tmp_path / "notes")
        assert found.shards == made.shards and found.count == 4, source


def test_a_tar_is_decoded_once_and_known_again_by_its_content(open_images, tmp_path, monkeypatch):
    for index in range(2):
        write_tar(tmp_path / f"in/{index}.tar", [labelled(10 * index + i) for i in range(index + 2)])
    first = open_images("in", TEN)
    assert [shard.count for shard in first.shards] == [2, 3]

    notes = tmp_path / "notes/a.jsonl"
    notes.write_text(notes.read_text() + '{"half a li')
    stamp = (tmp_path / "in/1.tar").stat()
    write_tar(tmp_path / "in/1.tar", [labelled(20 + i) for i in range(3)])  # as large as before
    (tmp_path / "in/0.tar").rename(tmp_path / "in/2.tar")
    checking.os.utime(tmp_path / "in/1.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    read, content = [], checking._content
    monkeypatch.setattr(checking, "_content", lambda path, *others: read.append(path) or content(path, *others))
    again = open_images("in", TEN)
    assert read == [str(tmp_path / "in/1.tar")]
    assert [shard.count for shard in again.shards] == [3, 2] and again.shards[0].sha256 != first.shards[1].sha256


BAD = [
    {"0100.jpg": b"broken", "0100.txt": b"a", "0100.cls": b"1"},
    {"0101.jpg": b"", "0101.txt": b"a", "0101.cls": b"1"},
    {"0102.jpg": picture(0, 16, 16, "jpg")[:300], "0102.txt": b"a", "0102.cls": b"1"},
    {"0103.txt": b"a", "0103.cls": b"1"},
    {"0104.png": picture(0, 8, 8), "0104.txt": b" ", "0104.cls": b"one"},
    {"0105.png": picture(0, 8, 8)},
]


@pytest.mark.parametrize(("make", "classes"), [(captioned, ()), (labelled, TEN)], ids=["captions", "classes"])
def test_samples_that_cannot_be_used_are_left_out_counted_and_named(open_images, tmp_path, capsys, make, classes):
    good = [make(index) for index in range(18)]
    write_tar(tmp_path / "in/a.tar", [*good[:9], *BAD[:4], *good[9:]])
    write_tar(tmp_path / "in/b.tar", BAD[4:])
    shards = open_images("in", classes, max_skipped=0.25)
    assert (shards.count, shards.left_out, len(shards.shards)) == (18, 4, 1)  # b.tar has nothing else
    assert [sample["__key__"] for sample in shards.shards[0].samples()] == [f"{index:04d}" for index in range(18)]
    told = capsys.readouterr().out
    assert "cats: left out 6 of 24: " in told and "sample '0100': .jpg is not a readable image" in told
    with pytest.raises(T5Error, match=r"6 of the 24 samples of cats cannot be used, and max_skipped \(0.24\) allows 5"):
        open_images("in", classes, max_skipped=0.24)


def test_a_limit_takes_the_first_that_can_be_used_and_opens_no_more_tars_than_that_takes(open_images, tmp_path):
    good = [captioned(index) for index in range(8)]
    write_tar(tmp_path / "in/a.tar", [BAD[0], *good[:3]])
    write_tar(tmp_path / "in/b.tar", [good[3], BAD[2], good[4], good[5], BAD[3], good[6]])
    write_tar(tmp_path / "in/c.tar", [good[7]])
    whole = open_images("in", max_skipped=0.5)
    (tmp_path / "in/c.tar").write_bytes(b"damaged")
    for limit, unread in ((2, [1]), (3, [0]), (4, [0, 5]), (5, [0, 3]), (6, [0, 2]), (7, [0, 0])):
        some = open_images("in", max_skipped=0.5, limit=limit)
        assert some == whole.first(limit) and some.count == limit
        assert [shard.unread for shard in some.shards] == unread
        keys = [sample["__key__"] for shard in some.shards for sample in shard.samples()]
        assert keys == [f"{index:04d}" for index in range(limit)]
    assert whole.first(9) == whole
    open_images("in", max_skipped=0.5, limit=4).write(tmp_path / "some.json", tmp_path)
    assert open_images("some.json").shards == whole.first(4).shards  # a manifest of some images means these alone


def test_a_manifest_keeps_what_was_left_out_before(open_images, tmp_path):
    write_tar(tmp_path / "in/a.tar", [BAD[0], *(captioned(index) for index in range(3))])
    open_images("in", max_skipped=0.3).write(tmp_path / "set.json", tmp_path)
    again = open_images("set.json")
    assert (again.count, again.left_out) == (3, 1)


@pytest.mark.parametrize(
    ("samples", "classes", "message"),
    [
        ([{"5.txt": b"a cat"}], (), r"sample '5' has no image: found .txt, expected .jpg or"),
        ([labelled(5)], (), r"sample '0005' has no caption: found .png, .cls, expected .txt or .json"),
        ([captioned(5)], TEN, r"sample '0005' has no class: found .png, .txt, expected .cls"),
        ([{"a.b.jpg": b"", "a.b.txt": b"", "a.c.jpg": b""}], (), "the key of a sample ends at the first dot"),
        ([], (), r"a\.tar holds no samples"),
        ([labelled(5), {"6.png": picture(0, 8, 8), "6.cls": b"10"}], TEN, "sample '6' has class 10, expected 0 to 9"),
    ],
)
def test_shards_with_other_contents_are_refused_by_sample(open_images, tmp_path, samples, classes, message):
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(T5Error, match=message):
        open_images("a.tar", classes, max_skipped=1.0)


def test_the_same_tar_given_twice_is_said(open_images, tmp_path):
    write_tar(tmp_path / "in/a.tar", [captioned(0)])
    shutil.copy(tmp_path / "in/a.tar", tmp_path / "in/b.tar")
    with pytest.raises(T5Error, match=r"in/b\.tar and .*in/a\.tar have the same content; leave one of them out"):
        open_images("in")


def test_a_tar_that_its_manifest_does_not_describe_is_refused(open_images, tmp_path):
    made = shard_set({tmp_path / "a.tar": [captioned(index) for index in range(4)]})
    replace(made, count=3, shards=(replace(made.shards[0], count=3),)).write(tmp_path / "set.json", tmp_path)
    with pytest.raises(T5Error, match=r"a\.tar holds 4 samples, its manifest says 3"):
        open_images("set.json")
    made.write(tmp_path / "set.json", tmp_path)
    with pytest.raises(T5Error, match=r"set\.json lists no classes"):
        open_images("set.json", TEN)
    write_tar(tmp_path / "a.tar", [captioned(index) for index in range(1, 5)])
    with pytest.raises(T5Error, match=r"a\.tar has sha256"):
        open_images("set.json")


def test_animations_and_further_images_are_said(open_images, tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    moving = {"1.webp": (tmp_path / "a.webp").read_bytes(), "1.txt": b"a"}
    write_tar(tmp_path / "a.tar", [captioned(0) | {"0000.v2.jpg": b""}, moving])
    assert open_images("a.tar").count == 2
    told = capsys.readouterr().out
    assert "cats: 1 animated, of which the first frame is taken, such as" in told and "a.tar: sample '1'" in told
    assert "cats: 1 with several images, of which one is read (the key of a sample ends at the first dot" in told


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("file:nowhere", "file:nowhere gives no shards"),
        ("file:.", r"gone\.tar is not a file, or a link to one"),
        ("s3:bucket", "'s3:bucket' is not a source; expected file:MANI"),
        ("nobody://host/a.tar", "nobody://host/a.tar cannot be read: Protocol not known"),
    ],
)
def test_sources_without_shards_are_refused(tmp_path, source, message):
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nothing")
    with pytest.raises(T5Error, match=message):
        open_captioned(source, name="cats", root=tmp_path, notes=tmp_path / "notes")

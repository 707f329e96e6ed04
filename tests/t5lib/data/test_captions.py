"""Captioned shards in every layout img2dataset writes are opened, checked and decoded; what is wrong is named."""

import io
import tarfile
from dataclasses import replace

import pytest
from encodable import captioned, labelled, picture, shard_set, write_tar
from PIL import Image

from t5lib.data.captions import caption_of, check_captioned, image_of, open_captioned
from t5lib.utils.errors import T5Error


@pytest.fixture
def open_shards(tmp_path):
    return lambda source: open_captioned(source, name="cats", root=tmp_path, notes=tmp_path / "notes.jsonl")


def sample(**files) -> dict:
    return {"__url__": "a.tar", "__key__": "7", **files}


@pytest.mark.parametrize("form", ["jpg", "jpeg", "png", "webp"])
@pytest.mark.parametrize("caption", ["txt", "json"])
def test_every_layout_gives_image_and_caption(open_shards, tmp_path, form, caption):
    write_tar(tmp_path / "0.tar", [captioned(index, 12, 20, form, caption) for index in range(3)])
    shards = open_shards("file:0.tar")
    samples = list(shards.shards[0].samples())
    assert shards.count == 3
    assert [caption_of(one) for one in samples] == ["picture 0", "picture 1", "picture 2"]
    assert {image_of(one).size for one in samples} == {(20, 12)}


def test_folder_pattern_and_manifest_open_the_same_shards(open_shards, tmp_path):
    made = shard_set({tmp_path / f"{name}.tar": [captioned(index) for index in range(2)] for name in "ab"})
    made.write(tmp_path / "set.json", root=tmp_path)
    wanted = [shard.sha256 for shard in made.shards]
    for source in (f"file:{tmp_path}", "file:?.tar", "file:set.json"):
        assert [shard.sha256 for shard in open_shards(source).shards] == wanted, source


def test_a_txt_comes_before_the_json_beside_it():
    assert caption_of(sample(txt=b" from text\n", json=b'{"caption": "from json"}')) == "from text"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"json": b'{"caption": null}'}, "a.tar: sample '7' has an empty caption"),
        ({"txt": b" \n"}, "a.tar: sample '7' has an empty caption"),
        ({"json": b'{"url": "x"}'}, "a.tar: sample '7' has no caption: expected text in UTF-8"),
        ({"json": b"[1]"}, "has no caption"),
        ({"json": b"{"}, "has no caption"),
        ({"txt": b"\xff\xfe\xfa"}, "has no caption"),
    ],
)
def test_a_missing_caption_is_named(files, message):
    with pytest.raises(T5Error, match=message):
        caption_of(sample(**files))


def test_shards_with_other_contents_are_refused_by_sample(open_shards, tmp_path):
    write_tar(tmp_path / "classes.tar", [labelled(5)])
    write_tar(tmp_path / "texts.tar", [{"5.txt": b"a cat"}])
    write_tar(tmp_path / "none.tar", [])
    with pytest.raises(T5Error, match=r"sample '0005' has no caption: found .png, .cls, expected .txt or .json"):
        open_shards("file:classes.tar")
    with pytest.raises(T5Error, match=r"sample '5' has no image: found .txt"):
        open_shards("file:texts.tar")
    with pytest.raises(T5Error, match=r"none.tar holds no samples"):
        open_shards("file:none.tar")
    with pytest.raises(T5Error, match=r"file:nowhere gives no shards"):
        open_shards("file:nowhere")
    with pytest.raises(T5Error, match=r"'s3://bucket' is no source; expected file:MANIFEST.json"):
        open_shards("s3://bucket")


def test_a_tar_cut_between_two_members_is_noticed(open_shards, tmp_path):
    made = shard_set({tmp_path / "a.tar": [captioned(index) for index in range(4)]})
    made.write(tmp_path / "set.json", root=tmp_path)
    with tarfile.open(tmp_path / "a.tar") as tar:
        boundary = tar.getmember("0002.png").offset
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:boundary])
    with pytest.raises(T5Error, match=r"a.tar has sha256"):
        open_shards("file:set.json")
    with pytest.raises(T5Error, match=r"a.tar holds 2 samples, its manifest says 4"):
        list(made.shards[0].samples())
    (tmp_path / "a.tar").write_bytes(whole)
    open_shards("file:set.json")


def test_a_manifest_of_captioned_shards_needs_no_classes(tmp_path):
    made = shard_set({tmp_path / "a.tar": [captioned(0)]})
    made.verify(check_captioned)
    with pytest.raises(T5Error, match="has no class"):
        replace(made, classes=("cat",)).verify()


def test_an_unreadable_image_is_named():
    for broken in (b"not an image", picture(0, 16, 16, "jpg")[:200]):
        with pytest.raises(T5Error, match=r"a.tar: sample '7': .jpg is not a readable image"):
            image_of(sample(jpg=broken))


def test_images_come_upright_and_transparent_parts_white():
    turned, clear, exif = io.BytesIO(), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (20, 10)).save(turned, "jpeg", exif=exif)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(clear, "png")
    assert image_of(sample(jpg=turned.getvalue())).size == (10, 20)
    assert image_of(sample(png=clear.getvalue())).getpixel((0, 0)) == (255, 255, 255)


def test_grey_images_have_one_channel_and_grey_files_become_rgb():
    grey = io.BytesIO()
    Image.new("L", (4, 4), 99).save(grey, "png")
    assert image_of(sample(png=grey.getvalue()), channels=1).mode == "L"
    assert image_of(sample(png=grey.getvalue())).getpixel((0, 0)) == (99, 99, 99)

"""Captions in every layout img2dataset writes are read; what is no caption is named."""

import json

import pytest

from t5lib.data.captions import about, caption_of
from t5lib.data.shards import SampleError


def sample(**files) -> dict:
    return {"__url__": "a.tar", "__key__": "7", **files}


@pytest.mark.parametrize(
    "files",
    [
        {"txt": b" a cat\n"},
        {"txt": b"\xef\xbb\xbfa cat"},  # with the mark that Windows puts in front
        {"json": b'{"caption": "a cat"}'},
        {"json": b'\xef\xbb\xbf{"caption": "a cat"}'},
        {"json": '{"caption": "a cat"}'.encode("utf-16-le")},  # JSON tells its encoding by itself
        {"txt": b"a cat", "json": b'{"caption": "a dog"}'},
    ],
)
def test_a_caption_is_read_and_a_txt_comes_before_the_json_beside_it(files):
    assert caption_of(sample(**files)) == "a cat"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"json": b'{"caption": null}'}, "a.tar: sample '7' has an empty caption"),
        ({"txt": b" \n"}, "a.tar: sample '7' has an empty caption"),
        ({"txt": b"\xef\xbb\xbf"}, "a.tar: sample '7' has an empty caption"),
        ({"json": b'{"url": "x"}'}, "a.tar: sample '7' has an empty caption"),
        ({"txt": bytes(9)}, "a.tar: sample '7' has an empty caption"),
        ({"txt": "\u200b\x01\u00a0".encode()}, "a.tar: sample '7' has an empty caption"),  # nothing to be seen
        ({"json": rb'{"caption": "\u0000"}'}, "a.tar: sample '7' has an empty caption"),
        ({"txt": "a cat".encode("utf-16-le")}, "has no caption: expected text, got 'a.x00 "),
        ({"txt": "a cat".encode("utf-16-be")}, "has no caption: expected text, got '.x00a"),
        ({"txt": "a cat".encode("utf-16")}, "has no caption: expected text in UTF-8"),
        ({"txt": b"a cat" * 30_000}, "has no caption: expected text, got 'a cata"),
        ({"json": b'{"caption": 3}'}, "has no caption: expected text, got '3'"),
        ({"json": rb'{"caption": "a \ud83d cat"}'}, "has no caption: expected text, got 'a "),  # half of a character
        ({"txt": b"\xff\xfe\xfa"}, "has no caption: expected text in UTF-8"),
        ({"json": b"[1]"}, r".json holds no JSON object, but b'\[1\]'"),
        ({"json": b"{"}, ".json holds no JSON object"),
        ({"json": b"[" * 200_000}, ".json holds no JSON object"),
        ({"json": b'{"a":' * 200_000}, ".json holds no JSON object"),
        ({"json": b'{"caption": ' + b"1" * 5000 + b"}"}, ".json holds no JSON object"),
        ({"png": b""}, "has no caption: found .png, expected .txt or .json"),
        ({"b.txt": b""}, "found .b.txt, .* the key of a sample ends at the first dot: rename"),
    ],
)
def test_what_is_no_caption_is_named_in_one_line(files, message):
    with pytest.raises(SampleError, match=message) as raised:
        caption_of(sample(**files))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    str(raised.value).encode()


def test_names_from_a_tar_reach_no_terminal_as_they_are():
    with pytest.raises(SampleError) as raised:
        caption_of({"__url__": "a.tar", "__key__": "\x1b[2J" + "7" * 9999, "\x1b]0;b": b"", "\udcff.txt": b""})
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_entries_of_the_json_are_read_and_none_are_no_error():
    assert about(sample(json=json.dumps({"name": "cat"}).encode())) == {"name": "cat"}
    assert about(sample(txt=b"a cat")) == {}

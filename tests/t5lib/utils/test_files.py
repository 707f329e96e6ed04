"""A reader sees the old file or folder or the new one, whole; what fails leaves nothing behind."""

import hashlib
import json
import os
import sys

import pytest

from t5lib.utils import files
from t5lib.utils.errors import T5Error


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_json_are_written_with_their_folder(tmp_path):
    files.write_text(tmp_path / "a/b/text", "ü\n")
    files.write_json(tmp_path / "a/b/data.json", {"x": [1, None]})
    assert (tmp_path / "a/b/text").read_text(encoding="utf-8") == "ü\n"
    assert files.read_json(tmp_path / "a/b/data.json") == {"x": [1, None]}
    assert names(tmp_path / "a/b") == ["data.json", "text"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            files.write_text(path, "new")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\ud800")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_what_is_not_json_is_not_written(tmp_path):
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"x": object()})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""], ids=["cut", "binary", "empty"])
def test_broken_json_is_an_error_with_a_remedy(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(T5Error, match=r"x.json is not valid JSON .*run the step that makes it again"):
        files.read_json(tmp_path / "x.json")


def test_missing_json_is_an_error(tmp_path):
    with pytest.raises(T5Error, match=r"x.json does not exist"):
        files.read_json(tmp_path / "x.json")


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_folder_takes_its_place_on_success_alone(tmp_path):
    folder = tmp_path / "out"
    with files.atomic_dir(folder) as temporary:
        (temporary / "one").write_text("1")
        assert not folder.exists()
    with files.atomic_dir(folder) as temporary:
        (temporary / "two").write_text("2")
        assert names(folder) == ["one"]
    assert names(folder) == ["two"]
    with pytest.raises(ZeroDivisionError):
        with files.atomic_dir(folder) as temporary:
            (temporary / "three").write_text("3")
            _ = 1 / 0
    assert names(folder) == ["two"] and names(tmp_path) == ["out"]
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_an_old_folder_and_a_new_one_are_swapped_in_one_step(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with files.atomic_dir(folder) as temporary:
        (temporary / "one").write_text("")
    monkeypatch.setattr(os, "replace", None)  # two steps, between which a kill would leave neither
    with files.atomic_dir(folder) as temporary:
        (temporary / "two").write_text("")
    assert names(folder) == ["two"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [files._exchange, lambda *_: False], ids=["exchange", "two steps"])
def test_the_old_folder_is_whole_until_the_new_one_takes_its_place(tmp_path, monkeypatch, exchange):
    """Whenever a kill comes, one of the two is there, whole: deleting the old one is the last thing done."""
    folder = tmp_path / "out"
    monkeypatch.setattr(files, "_exchange", exchange)
    with files.atomic_dir(folder) as temporary:
        (temporary / "one").write_text("")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as if killed before anything is deleted
    with files.atomic_dir(folder) as temporary:
        (temporary / "two").write_text("")
    assert names(folder) == ["two"]
    assert [path.name for path in tmp_path.rglob("one")] == ["one"]


def test_json_is_readable_by_people(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").read_text() == json.dumps({"a": 1}, indent=2) + "\n"


def test_what_killed_writers_left_is_removed_and_a_folder_set_aside_is_put_back(tmp_path):
    for name in (".data.json.ab12_xyz.json", "a/.weights.abcdefgh", ".keep", "a/data.json", ".half.abcdefgh/new/x"):
        files.write_text(tmp_path / name, "")
    files.write_text(tmp_path / ".model.12345678/old/weights", "old")
    files.remove_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".keep", "a/data.json", "model/weights"]

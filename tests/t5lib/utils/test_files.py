"""A reader sees the old file or folder or the new one, whole; what fails leaves nothing behind."""

import hashlib
import json
import os

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


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"", b"[" * 200_000], ids=["cut", "binary", "empty", "absurdly deep"]
)
def test_broken_json_is_an_error_with_a_remedy(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(T5Error, match=r"x.json is not valid JSON .*run the step that makes it again"):
        files.read_json(tmp_path / "x.json")


def test_missing_json_is_an_error(tmp_path):
    with pytest.raises(T5Error, match=r"x.json does not exist"):
        files.read_json(tmp_path / "x.json")


def test_a_folder_in_the_place_of_json_is_an_error(tmp_path):
    with pytest.raises(T5Error, match=r"cannot be read \(Is a directory\); expected a JSON file there"):
        files.read_json(tmp_path)


def test_device_pipe_and_hole_are_errors_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(10**12)
    for path in ("/dev/zero", tmp_path / "pipe"):
        for read in (files.read_json, files.sha256):
            with pytest.raises(T5Error, match="is a device, pipe or socket"):
                read(path)
    for read in (files.read_json, files.sha256):
        with pytest.raises(T5Error, match="has 1000 GB and begins with a hole"):
            read(tmp_path / "hole")
    with open(tmp_path / "hole", "r+b") as file:
        file.write(b"[")
    with pytest.raises(T5Error, match="has 1000000 MB; expected a text file of at most 256 MB"):
        files.read_json(tmp_path / "hole")


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


@pytest.mark.parametrize("exchanges", [True, False], ids=["in one step", "in two"])
def test_a_folder_is_always_there_and_what_a_kill_leaves_is_swept(tmp_path, monkeypatch, exchanges):
    """Killed right before and right after the folder takes its place, wherever the system can exchange names."""
    folder = tmp_path / "out"
    with files.atomic_dir(folder) as temporary:
        (temporary / "one").write_text("")
    if not exchanges:
        monkeypatch.setattr(files, "_EXCHANGE", 1 << 20)  # which no system knows
    replaced = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # of no process
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as if killed before anything is deleted
        patch.setattr(os, "replace", lambda *paths, replace=os.replace: (replaced.append(paths), replace(*paths)))
        with files.atomic_dir(folder) as temporary:
            (temporary / "two").write_text("")
    assert len(replaced) == (0 if exchanges else 2)
    assert names(folder) == ["two"] and [path.name for path in tmp_path.rglob("one")] == ["one"]
    (tmp_path / f".out.{files._HOST}-{os.getpid()}.x").mkdir()  # of a process that is at work
    with files.atomic_dir(folder) as temporary:
        (temporary / "three").write_text("")
    assert names(folder) == ["three"]
    assert names(tmp_path) == [f".out.{files._HOST}-{os.getpid()}.x", "out"]


def test_what_killed_writers_of_other_folders_left_is_swept_too_and_nothing_else(tmp_path):
    dead, host = 2**22 + 1, files._HOST
    swept = f".other.{host}-{dead}.12345678/new/x", f".lost.{host}-{dead}.12345678/old/x"
    kept = (
        f".alive.{host}-{os.getpid()}.12345678/x",
        f".elsewhere.00000000-{dead}.12345678/x",
        f".mine.{host}-{dead}.notes/x",
        f".file.{host}-{dead}.12345678",
    )
    for name in (*swept, *kept):
        files.write_text(tmp_path / name, "")
    with files.atomic_dir(tmp_path / "out"):
        pass
    expected = ["lost", "out", *(name.partition("/")[0] for name in kept)]
    assert names(tmp_path) == sorted(expected) and names(tmp_path / "lost") == ["x"]


def test_json_is_readable_by_people(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").read_text() == json.dumps({"a": 1}, indent=1) + "\n"


def test_what_killed_writers_left_is_removed_and_a_folder_set_aside_is_put_back(tmp_path):
    for name in (".data.json.ab12_xyz.json", "a/.weights.abcdefgh", ".keep", "a/data.json", ".half.abcdefgh/new/x"):
        files.write_text(tmp_path / name, "")
    files.write_text(tmp_path / f".model.{files._HOST}-77.12345678/old/weights", "old")
    files.remove_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".keep", "a/data.json", "model/weights"]

"""What a target needs and cannot be had is named at once, each with its remedy, before any work."""

import errno
import os
import tarfile

import pytest

from t5lib.utils.errors import SourceError, T5Error
from t5lib.utils.files import write_json
from tasks.runtime import local_sources, params, readiness

SETTINGS = {
    "fetch": {"source": "hf:owner/gated@main"},
    "shards": {"train": "file:pictures/train-*.tar", "val": "file:pictures/val-*.tar", "encode": {}},
}


@pytest.fixture
def gated(monkeypatch):
    def refuse(rest):
        raise SourceError(f"hf:{rest} is gated; set HF_TOKEN")

    monkeypatch.setattr(readiness.hub, "check_access", refuse)


def test_everything_that_is_missing_is_named_with_its_remedy(tmp_path, gated):
    with pytest.raises(T5Error) as caught:
        readiness.check(tmp_path, "mine", SETTINGS)
    first, weights, train, val = str(caught.value).splitlines()
    assert first == "'mine' cannot be built yet. Missing:"
    assert weights.strip() == (
        "weights: hf:owner/gated@main is gated; set HF_TOKEN; or name yours in params.yaml: targets.mine.fetch.source "
        "(file:FOLDER for what you have)"
    )
    assert "training images: file:pictures/train-*.tar is not there" in train and "img2dataset" in train
    assert "targets.mine.shards.val" in val


def test_what_is_there_or_was_fetched_before_is_not_missing(tmp_path, gated):
    (tmp_path / "pictures").mkdir()
    for split in ("train", "val"):
        tarfile.open(tmp_path / f"pictures/{split}-0.tar", "w").close()
    with pytest.raises(T5Error, match="Missing:\\n  weights"):
        readiness.check(tmp_path, "mine", SETTINGS)
    (tmp_path / "data/out/mine").mkdir(parents=True)
    (tmp_path / "data/out/mine/fetch.json").touch()
    readiness.check(tmp_path, "mine", SETTINGS)


def test_where_the_hub_cannot_say_what_it_wants_the_page_and_the_token_are_named(tmp_path, monkeypatch):
    def offline(rest):
        raise SourceError(f"hf:{rest}: the hub cannot be reached")

    monkeypatch.setattr(readiness.hub, "check_access", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(T5Error, match=r"accept the conditions on https://huggingface\.co/owner/gated and set HF_TOKEN"):
        readiness.check(tmp_path, "mine", SETTINGS)


@pytest.mark.parametrize("installed", [True, False])
def test_what_the_optimizer_needs_is_missing_unless_it_is_installed(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(local_sources.importlib.util, "find_spec", lambda name: object() if installed else None)
    settings = {"freeze": {"ceiling": 1.5, "train": {"optimizer": "adamw8bit"}}}
    if installed:
        readiness.check(tmp_path, "mine", settings)
        return
    with pytest.raises(T5Error, match="bitsandbytes: adamw8bit needs it; pip install bitsandbytes"):
        readiness.check(tmp_path, "mine", settings)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("file:nowhere.json", "is not there"),
        ("file:/dev/zero", "is a device"),
        ("file:notes.md", "is not a tar file"),
        ("file:empty", "gives no shards"),
        ("file:list.json", "x.tar does not exist"),
        ("file:data/out/other/shards/train.json", None),  # another stage may be about to make it
        ("file:sound.tar", None),
    ],
)
def test_images_of_this_machine_that_cannot_be_used_are_told_before_the_first_stage(tmp_path, source, problem):
    (tmp_path / "notes.md").write_text("no tar")
    (tmp_path / "empty").mkdir()
    tarfile.open(tmp_path / "sound.tar", "w").close()
    shards = [{"path": "x.tar", "count": 1, "sha256": ""}]
    listed = {"name": "x", "licence": "x", "source": "x", "classes": [], "count": 1, "shards": shards}
    write_json(tmp_path / "list.json", listed)
    if problem is None:
        local_sources.check(tmp_path, "mine", {"shards": {"train": source}})
        return
    with pytest.raises(T5Error, match=rf"training images: {source}.*{problem}.*put them there, or name yours"):
        local_sources.check(tmp_path, "mine", {"shards": {"train": source}})


def test_every_target_of_ours_names_its_sources_where_they_are_looked_for():
    for target in params.read()["targets"].values():
        settings = local_sources.SOURCES
        named = {(section, name) for section, name, *_ in settings if local_sources._setting(target.get(section), name)}
        images = {("shards", "train"), ("shards", "val")}
        assert {("fetch", "source")} <= named and (images <= named or ("shards", "samples.prompts") in named)


def test_a_full_disk_is_told_before_anything_starts(tmp_path, monkeypatch):
    readiness.check_disk(tmp_path)
    assert list((tmp_path / "data").iterdir()) == []

    def fail(path, _content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(readiness, "write_bytes", fail)
    with pytest.raises(T5Error, match=r"no space is left on its disk; free some .*; nothing was started$"):
        readiness.check_disk(tmp_path)

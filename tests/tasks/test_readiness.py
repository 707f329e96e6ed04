"""What a target needs and cannot be had is named at once, each with its remedy, before any work."""

import pytest

from t5lib.errors import SourceError, T5Error
from tasks import params, readiness

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
    assert weights.strip() == "weights: hf:owner/gated@main is gated; set HF_TOKEN"
    assert "training images: file:pictures/train-*.tar is not there" in train and "img2dataset" in train
    assert "targets.mine.shards.val" in val


def test_what_is_there_or_was_fetched_before_is_not_missing(tmp_path, gated):
    (tmp_path / "pictures").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"pictures/{split}-0.tar").touch()
    with pytest.raises(T5Error, match="Missing:\\n  weights"):
        readiness.check(tmp_path, "mine", SETTINGS)
    (tmp_path / "data/out/mine").mkdir(parents=True)
    (tmp_path / "data/out/mine/fetch.json").touch()
    readiness.check(tmp_path, "mine", SETTINGS)


def test_every_target_of_ours_names_its_sources_where_they_are_looked_for():
    for target in params.read()["targets"].values():
        named = {(section, name) for section, name, _, _ in readiness.SOURCES if target[section].get(name)}
        assert {("fetch", "source"), ("shards", "train"), ("shards", "val")} <= named

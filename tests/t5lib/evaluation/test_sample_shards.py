"""Samples as shards: what is in them, and that a run that was stopped goes on to the same bytes."""

import json

import pytest
from tiny_denoisers import CLASSES
from tiny_pipelines import SIDE, tiny_dit_pipeline, tiny_sd3_pipeline

from t5lib.data.decoding import image_of
from t5lib.data.shards import ShardSet
from t5lib.evaluation import sample_shards
from t5lib.evaluation.generation import GenerateConfig
from t5lib.evaluation.sample_shards import Wanted, draw_shards, joined

QUICK = GenerateConfig(steps=2, guidance=3.0, batch_size=2)


@pytest.fixture(autouse=True)
def few_a_shard(monkeypatch):
    monkeypatch.setattr(sample_shards, "SHARD", 3)


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd3_pipeline(t5=False)


@pytest.fixture(scope="module")
def dit():
    return tiny_dit_pipeline()


def texts(count: int) -> list[Wanted]:
    """At two sizes in turn."""
    sizes = ((SIDE, SIDE), (SIDE, 2 * SIDE))
    return [Wanted(prompt=f"a cat {index}", seed=index, size=sizes[index % 2]) for index in range(count)]


def drawn(folder, pipeline, wanted, config=QUICK, **more) -> ShardSet:
    load = pipeline if callable(pipeline) and not hasattr(pipeline, "transformer") else lambda: pipeline
    return draw_shards(wanted, folder, load=load, config=config, name="mine", source="samples of tiny", **more)


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_images_of_the_sizes_asked_for_with_their_captions(sd3, tmp_path):
    shards = drawn(tmp_path / "out", sd3, texts(7))
    assert shards.count == 7 and [shard.count for shard in shards.shards] == [3, 3, 1]
    samples = [sample for shard in shards.shards for sample in shard.samples()]
    sizes = [(image.height, image.width) for image in (image_of(sample, 3) for sample in samples)]
    assert sizes == [each.size for each in texts(7)]
    assert [json.loads(sample["json"]) for sample in samples] == [
        {"caption": f"a cat {index}", "seed": index} for index in range(7)
    ]


def test_of_classes_they_are_labelled(dit, tmp_path):
    wanted = [Wanted(prompt=index % CLASSES, seed=index, size=(8, 8)) for index in range(4)]
    shards = drawn(tmp_path / "out", dit, wanted, classes=[str(index) for index in range(CLASSES)])
    samples = [sample for shard in shards.shards for sample in shard.samples()]
    assert [int(sample["cls"]) for sample in samples] == [0, 1, 2, 3] and len(shards.classes) == CLASSES
    assert image_of(samples[0], 1).mode == "L"


def test_a_run_that_was_killed_goes_on_at_the_next_shard_to_the_same_bytes(sd3, tmp_path, monkeypatch):
    whole = drawn(tmp_path / "whole", sd3, texts(7))
    count, sample = [], sample_shards.sample

    def dying(*args):
        count.append(1)
        if len(count) > 3:  # two batches a shard: in the middle of the second
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(sample_shards, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "killed", sd3, texts(7))
    assert ShardSet.read(tmp_path / "killed/manifest.json").count == 3
    monkeypatch.setattr(sample_shards, "sample", lambda *args: count.append(1) or sample(*args))
    count.clear()
    drawn(tmp_path / "killed", sd3, texts(7))
    assert len(count) == 3  # two of the second shard, one of the last
    assert content(tmp_path / "killed") == content(tmp_path / "whole") and whole.count == 7


def test_what_is_finished_needs_no_pipeline_and_what_is_damaged_is_drawn_again(sd3, tmp_path):
    drawn(tmp_path / "out", sd3, texts(4))
    before = content(tmp_path / "out")

    def never():
        raise AssertionError("the pipeline was loaded")

    drawn(tmp_path / "out", never, texts(4))
    damaged = tmp_path / "out/00000.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    drawn(tmp_path / "out", sd3, texts(4))
    assert content(tmp_path / "out") == before


def test_other_settings_begin_anew(sd3, tmp_path):
    first = drawn(tmp_path / "out", sd3, texts(7))
    other = drawn(tmp_path / "out", sd3, texts(2), GenerateConfig(steps=1, guidance=3.0))
    assert other.count == 2 and other.source != first.source
    assert sorted(content(tmp_path / "out")) == ["00000.tar", "manifest.json"]
    assert drawn(tmp_path / "out", sd3, texts(2), GenerateConfig(steps=1, guidance=3.0, batch_size=7)) == other


def test_joined_sets_count_together_and_keep_the_longer_list_of_classes(dit, tmp_path):
    wanted = [Wanted(prompt=index, seed=index, size=(8, 8)) for index in range(2)]
    one = drawn(tmp_path / "one", dit, wanted, classes=["a", "b"])
    other = drawn(tmp_path / "other", dit, wanted, classes=["0", "1", "2"])
    both = joined("both", one, other)
    assert (both.count, len(both.shards), both.classes) == (4, 2, ("0", "1", "2"))
    assert joined("both", one, one).classes == ("a", "b")

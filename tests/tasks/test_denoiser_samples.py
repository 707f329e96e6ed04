"""A denoiser converted from its weights alone: all stages on the teacher's own samples, and what is refused before."""

import shutil
from pathlib import Path

import denoiser_target
import pytest
import torch

import t5lib
from t5lib.data.latents import LatentShards
from t5lib.data.shards import ShardSet
from t5lib.evaluation import sample_shards
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks import targets
from tasks.runtime import local_sources
from tasks.targets.run import run_stage
from tasks.targets.teacher_samples import SamplesConfig, read_prompts, wanted

OUT = Path("data/out/tiny")
KINDS = [pytest.param(kind, marks=pytest.mark.xdist_group(f"{kind}-samples")) for kind in ("sd3", "dit")]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(kind, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(kind)
    denoiser_target.write(root, kind)
    return root


def settings(kind: str, root: Path, **changes) -> dict:
    return denoiser_target.settings(kind, root) | {"shards": denoiser_target.from_samples(kind, root, **changes)}


@pytest.fixture(scope="module")
def built(root, kind) -> dict[str, dict]:
    """The metrics of every stage, run in order."""
    return {name: run_stage(name, "tiny", params=settings(kind, root), root=root) for name in denoiser_target.STAGES}


def shards(root: Path, target: str, section: dict, kind: str) -> dict:
    """The stage, for another target of the same pipeline."""
    shutil.copytree(root / OUT / "fetch", root / f"data/out/{target}/fetch", dirs_exist_ok=True)
    return run_stage("shards", target, params=denoiser_target.settings(kind, root) | {"shards": section}, root=root)


def images(folder: Path, split: str) -> list[dict]:
    shards = ShardSet.read(folder / f"images-{split}.json").shards
    return [sample for shard in shards for sample in shard.samples()]


def test_samples_take_the_place_of_images(built, root, kind):
    assert built["shards"] | {"train": 24, "train_samples": 24, "val": 16, "val_samples": 16} == built["shards"]
    shards = root / OUT / "shards"
    assert read_json(shards / "origins.json")["train"] == {"images": 0, "samples": 24}
    for split, count in (("train", 24), ("val", 16)):
        assert len(LatentShards(shards / split / "manifest.json")) == len(images(shards, split)) == count
    if kind == "dit":
        labels = [int(sample["cls"]) for sample in images(shards, "train")]
        assert max(map(labels.count, labels)) - min(map(labels.count, labels)) <= 1
    listed = (shards / "images-val.json").read_text()
    assert '"samples/val/00000.tar"' in listed and str(root) not in listed.replace(f"file:{root}", "")


def test_training_and_validation_share_neither_prompt_nor_noise(built, root, kind):
    shards = root / OUT / "shards"
    if kind == "sd3":
        train, val = ({sample["json"] for sample in images(shards, split)} for split in ("train", "val"))
        captions = [{line.split(b'"seed"')[0] for line in each} for each in (train, val)]
        assert captions[0] and captions[1] and not captions[0] & captions[1]
    train, val = ({sample["png"] for sample in images(shards, split)} for split in ("train", "val"))
    assert len(train) == 24 and len(val) == 16 and not train & val


def test_fine_tune_and_control_are_skipped_and_pass_on_what_they_got(built, root):
    for name, start in (("finetune", "align"), ("control", "source")):
        assert built[name]["steps"] == 0 and "names no images" in built[name]["skipped"]
        one, other = (t5lib.load(root / OUT / each).state_dict() for each in (name, start))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_scores_are_against_samples_of_the_source_and_say_so(built, kind):
    models = built["evaluate"]["models"]
    expected = ["source", "converted", "calibrated", "aligned", "frozen", "samples of the source"]
    assert list(models) == expected
    assert all(models[name]["reference"] == "samples of the source" for name in expected[:-1])
    assert models["aligned"]["real"] == 16 and models["aligned"]["patch_cosine"] > 0
    assert built["freeze"]["of_source"] > 0


def test_the_report_says_what_was_skipped_and_why(built, root):
    summary = (root / OUT / "report/summary.md").read_text()
    page = (root / OUT / "report/report.html").read_text()
    for text in (summary, page):
        assert "Fine-tune and control were skipped: shards.train names no images" in text
        assert "beside 16 samples of the source" in text and "to samples of the source" in text
        assert "real images" not in text and "| Fine-tuned" not in text and "| Control" not in text
    assert "Calibrated and aligned, the converted model has an FD-DINOv2" in summary
    assert "There is no control" in page
    assert list(built["report"]["fd_dinov2"]) == ["source", "converted", "calibrated", "aligned", "frozen"]


def test_a_stage_that_was_killed_while_it_drew_goes_on_to_the_same_bytes(built, root, kind, monkeypatch):
    monkeypatch.setattr(sample_shards, "SHARD", 8)
    section = denoiser_target.from_samples(kind, root)
    whole = shards(root, "other", section, kind)
    expected = _files(root / "data/out/other/shards")
    sample, count = sample_shards.sample, []

    def dying(*args):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(sample_shards, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        shards(root, "other", section, kind)
    assert not (root / "data/out/other/shards").exists()
    monkeypatch.setattr(sample_shards, "sample", lambda *args: count.append(1) or sample(*args))
    assert shards(root, "other", section, kind) == whole
    assert _files(root / "data/out/other/shards") == expected
    assert len(count) == 2 + 5 - 1  # the first shard of five was not drawn again


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_images_and_samples_are_one_set(built, root, kind):
    images = denoiser_target.settings(kind, root)["shards"]
    both = images | {"samples": denoiser_target.from_samples(kind, root)["samples"]}
    metrics = shards(root, "both", both, kind)
    assert (metrics["train"], metrics["train_samples"], metrics["val"]) == (48, 24, 24)
    assert "val_samples" not in metrics
    made = root / "data/out/both/shards"
    assert read_json(made / "origins.json")["train"] == {"images": 24, "samples": 24}
    assert len(LatentShards(made / "train/manifest.json")) == 48
    metrics = shards(root, "both", both | {"train": None}, kind)
    assert (metrics["train"], metrics["val"]) == (24, 24) and "val_samples" not in metrics


def checked(settings: dict, root: Path) -> None:
    targets.checked(settings, "mine", root)


def test_settings_that_give_nothing_to_learn_from_are_refused_before_any_work(root, kind):
    for shards, told in (
        ({"encode": settings(kind, root)["shards"]["encode"]}, r"train and val missing, and samples too; name images"),
        (denoiser_target.from_samples(kind, root, count=0), "count is 0; expected 1 or more"),
        (denoiser_target.from_samples(kind, root, val=3), "val is 3; expected 16 or more"),
        (denoiser_target.from_samples(kind, root, count=2), r"diagnose\.images is 4; expected at most 2, as many as"),
    ):
        with pytest.raises(T5Error, match=told) as error:
            checked(settings(kind, root) | {"shards": shards}, root)
        assert "\n" not in str(error.value)


def test_prompts_that_do_not_suit_are_refused_before_any_work(root, kind, tmp_path):
    file = tmp_path / "prompts.txt"
    if kind == "dit":
        with pytest.raises(T5Error, match="class-conditional; leave prompts out"):
            checked(settings(kind, root, prompts=f"file:{root}/prompts.txt"), root)
        return
    with pytest.raises(T5Error, match="prompts is missing; name a file with one prompt per line"):
        checked(settings(kind, root, prompts=None), root)
    with pytest.raises(T5Error, match=r"prompts: file:.* is not there; write them, one per line, or name yours"):
        local_sources.check(root, "mine", settings(kind, root, prompts=f"file:{file}"))
    for text, told in (
        ("\n \n", "holds no prompt"),
        ("a cat\na cat\n", "holds one prompt"),
        ("a\0b\nc\n", "no caption"),
    ):
        file.write_text(text)
        with pytest.raises(T5Error, match=told):
            checked(settings(kind, root, prompts=f"file:{file}"), root)


def test_prompts_come_in_equal_shares_at_every_size_and_evenly_where_they_are_many(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{number}\n" for number in range(40)))
    prompts = read_prompts("file:prompts.txt", tmp_path)
    assert prompts["val"] == ["0", "10", "20", "30"] and len(prompts["train"]) == 36
    sizes = ((8, 8), (8, 16))
    config = SamplesConfig(count=144, val=16)
    drawn = wanted(config, "train", prompts["train"], sizes)
    assert sorted((each.prompt, each.size) for each in drawn) == sorted(
        (prompt, size) for prompt in prompts["train"] for size in sizes for _ in range(2)
    )
    few = [each.prompt for each in wanted(SamplesConfig(count=4), "train", prompts["train"], sizes)]
    assert few == [prompts["train"][place] for place in (0, 9, 18, 27)]
    noise = {each.seed for each in drawn} | {each.seed for each in wanted(config, "val", prompts["val"], sizes)}
    assert len(noise) == 144 + 16

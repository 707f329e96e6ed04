"""Disk, memory and work of a denoiser follow from its settings and its pipeline's configs."""

import dataclasses
import io
import tarfile
from pathlib import Path

import pytest
from tiny_denoisers import tiny_dit, tiny_sd3

from t5lib.benchmarks.resolution_sweep import count_flops
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize
from t5lib.training.denoiser import DenoiserTrainConfig
from t5lib.utils.errors import T5Error
from tasks import readiness, targets
from tasks.runtime import cards, params, preflight
from tasks.targets import pipeline_checks, training_needs
from tasks.targets.denoiser_shape import Shape
from tasks.targets.expected_pipelines import PIPELINES
from tasks.targets.image_count import counted
from tasks.targets.image_shards import ImagesConfig

ROOT = Path(__file__).resolve().parents[3]
GIB = cards.GIB


@pytest.fixture
def root(tmp_path):
    """A folder with params.yaml and nothing else."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


def needs(root, target, changes=()):
    """Of a target whose pipeline is not here; its model is not built."""
    settings = params.changed(params.read_target(root, target), changes, target)
    return targets.needs(root, target, settings)


def tar(path, images):
    with tarfile.open(path, "w") as out:
        for number in range(images):
            for ending in ("jpg", "txt"):
                out.addfile(tarfile.TarInfo(f"{number}.{ending}"), io.BytesIO())


@pytest.mark.parametrize("model", [tiny_sd3(), tiny_sd3(qk_norm=None, dual_attention_layers=()), tiny_dit()])
def test_the_size_of_a_model_follows_from_its_config(model):
    shape = Shape.of(dict(model.config))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.saved_bytes == 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    size = ExampleSize(64, text_tokens=77 + 3)
    counted = count_flops(model, family_of(model).example_inputs(model, size))
    assert shape.flops(*shape.tokens(64**2, 8, text=3)) == pytest.approx(
        counted, rel=0.15
    )  # tiny ones spend much on modulation


def test_the_real_pipelines_have_the_published_numbers_of_parameters():
    shapes = {name.rpartition("-")[2]: Shape.of(known.transformer) for name, known in PIPELINES.items()}
    assert shapes["medium"].parameters == 2_243_171_520
    assert shapes["large"].parameters == 8_056_627_520
    assert shapes["256"].parameters == 749_826_464
    sides = {"medium": (1024, cards.MEDIUM_FLOPS), "large": (1024, 3.112e13), "256": (256, 2.373e11)}  # count_flops's
    for name, (side, flops) in sides.items():
        assert shapes[name].flops(*shapes[name].tokens(side**2, 8, 256)) == pytest.approx(flops, rel=0.01)


def test_a_training_of_mediums_shape_takes_the_memory_that_was_measured():
    shape = Shape.of(PIPELINES["stabilityai/stable-diffusion-3.5-medium"].transformer)
    recipe = DenoiserTrainConfig(batch_size=4, align=1.0, gradient_checkpointing=True, precision="bf16")
    size = training_needs.Size(shape.saved_bytes, shape.parameters)
    memory = training_needs.memory("finetune", size, recipe, shape.blocks, lambda n: n * 4429 * shape.channels)
    assert memory.likely / GIB == pytest.approx(49.9, rel=0.05)  # docs/results/sd35-step-cost-h100.json


def test_medium_from_nothing(root, monkeypatch):
    (root / "data/captioned").mkdir(parents=True)
    for split, images in (("train", 50), ("val", 20)):
        for number in (0, 1):
            tar(root / f"data/captioned/{split}-{number}.tar", images)
    found = needs(root, "sd35-medium")
    rooms = {room.what: room.size for room in found.rooms}
    assert rooms["models"] == 7 * 4 * 2_469_663_936
    assert rooms["encoded images"] == pytest.approx(140 * 2 * (16 * 128**2 + 333 * 4096 + 2048), rel=0.01)
    assert found.remotes[0].size == 16_300_000_000
    monkeypatch.setattr(preflight, "copies", lambda _: True)
    items = {
        item.what: item for item in preflight.items(root, "sd35-medium", found, cards.named("A6000"), online=False)
    }
    finetune = items["memory: finetune"]
    assert finetune.verdict == "too little" and not finetune.essential  # 44 GiB of it are certain, of 47
    assert finetune.change.startswith("set finetune.batch_size: 1, finetune.accumulate: 16")
    assert "twice" not in items["hours: freeze"].change and "finetune.steps: 1500" in items["hours: finetune"].change
    small = preflight.items(root, "sd35-medium", found, cards.named("RTX 4090"), online=False)
    with pytest.raises(T5Error, match=r"memory: finetune: needs 5\d GiB, there is 23 GiB on RTX 4090"):
        preflight.refuse("sd35-medium", small)


def test_what_stages_have_made_already_is_not_needed_again(root):
    (root / "data/out/sd35-medium").mkdir(parents=True)
    for stage in ("shards", "source", "evaluate", "finetune"):
        (root / f"data/out/sd35-medium/{stage}.json").touch()
    found = needs(root, "sd35-medium")
    rooms = {room.what: room.size for room in found.rooms}
    assert rooms["models"] == 5 * 4 * 2_469_663_936
    assert rooms["encoded images"] == rooms["drawn pictures"] == 0
    assert {work.stage for work in found.works} == {"calibrate", "freeze", "control"}


def test_without_images_the_samples_are_drawn_and_nothing_is_fine_tuned(root):
    (root / "data/prompts").mkdir(parents=True)
    (root / "data/prompts/plain.txt").write_text("a cat\na dog\n")
    found = needs(root, "sd35-medium-samples")
    rooms = {room.what: room.size for room in found.rooms}
    assert rooms["samples"] == pytest.approx(1.7 * 2400 * 1024**2, rel=0.05)
    assert rooms["encoded images"] == pytest.approx(2400 * 2 * (16 * 128**2 + 333 * 4096 + 2048), rel=0.01)
    assert not {"finetune", "control"} & {work.stage for work in found.works}
    drawing, encoding = (work for work in found.works if work.stage == "shards")
    assert drawing.amount == pytest.approx(2400 * 28 * 2 * cards.MEDIUM_FLOPS, rel=0.05) and encoding.rate == "encode"
    assert [memory.stage for memory in found.memories] == ["shards", "calibrate", "align", "freeze", "evaluate"]
    images = needs(root, "sd35-medium", ["shards.limit=100"])
    assert "samples" not in {room.what for room in images.rooms}
    changes = [next(room.change for room in each.rooms if room.what == "checkpoints") for each in (found, images)]
    assert changes == ["align.checkpoints_kept: 1", "finetune.checkpoints_kept: 1"]
    both = needs(root, "sd35-medium", ["shards.limit=100", "shards.samples.prompts=file:data/prompts/plain.txt"])
    assert "2,000 samples; images by shards.limit" in next(room.why for room in both.rooms if "encoded" in room.what)


def test_a_recipe_that_control_cannot_follow_is_told_before_the_fine_tune(root):
    for changes, problems in (([], 0), (["finetune.trainable=lora"], 0), (["finetune.trainable=new"], 1)):
        told = [check for check in needs(root, "sd35-medium", changes).checks if check.problem]
        assert len(told) == problems, changes
    assert "stage control trains the softmax source" in told[0].problem and told[0].essential


def test_fewer_images_than_stages_ask_for_are_told(root):
    (root / "data/captioned").mkdir(parents=True)
    for split in ("train", "val"):
        tar(root / f"data/captioned/{split}-0.tar", 7)
    told = [check.problem for check in needs(root, "sd35-medium").checks if check.problem]
    assert told == [f"set {name}: 7, or give more images" for name in ("diagnose.images", "explain.images")]


def images(train: str = "file:train", val: str = "file:val", limit: int | None = None) -> ImagesConfig:
    return ImagesConfig(train=train, val=val, limit=limit)


def test_images_are_counted_without_being_read(root):
    tar(root / "a-0.tar", 30)
    (root / "a-1.tar").write_bytes((root / "a-0.tar").read_bytes())
    assert counted(images("file:a-*.tar"), "train", root).count == 60
    assert counted(images("file:a-*.tar", limit=50), "train", root).count == 50
    (root / "set.json").write_text('{"count": 12}')
    assert counted(images("file:set.json", limit=50), "train", root).count == 12
    assert counted(images(val="hf:datasets/timm/imagenet-1k-wds@main#*.tar"), "val", root).count == 50_000
    (root / "b-0.tar").write_bytes(b"no tar")
    for source in ("file:b-*.tar", "file:c-*.tar", "hf:datasets/owner/other@main"):
        assert counted(images(source), "train", root).count is None


def test_what_makes_a_training_smaller_is_told_from_the_mildest_on_and_only_where_it_is_allowed():
    recipe = DenoiserTrainConfig(batch_size=2, align=0.5)
    size, numbers = training_needs.Size(4 * 10**9, 10**9), lambda images: images * 10**6
    smaller = training_needs.memory("freeze", size, recipe, 10, numbers).smaller
    assert [words for words, _ in smaller[:4]] == [
        f"freeze.train.gradient_checkpointing: {share}" for share in ("0.25", "0.5", "0.75", "true")
    ]
    assert smaller[-1][0].endswith('freeze.train.ema: null, freeze.train.align: 0.0, freeze.train.trainable: "lora"')
    sizes = [likely for _, likely in smaller]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 8
    frozen = dataclasses.replace(recipe, trainable="new", ema=None, align=0.0)
    assert len(training_needs.memory("freeze", size, frozen, 10, numbers).smaller) == 5


def test_the_command_prints_a_table_and_fails_where_something_essential_is_missing(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setattr(readiness.targets, "resolve", lambda root, target: params.read_target(root, target))
    monkeypatch.setattr(pipeline_checks, "described", lambda *_: None)
    monkeypatch.setattr(readiness.readiness, "check", lambda *_: None)
    monkeypatch.setattr(preflight, "_remote", lambda remote: (preflight.Item(remote.what, "", "", "ok"), 10**9))
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 10**13)
    monkeypatch.setattr("sys.argv", ["readiness", "sd35-medium", "--card", "H200"])
    readiness.main()
    told = capsys.readouterr().out
    assert "memory: finetune" in told and "139 GiB on H200" in told and "estimates" in told

    def missing(*_):
        raise T5Error(
            "'sd35-medium' cannot be built yet. Missing:\n  training images: file:x is not there; put it there"
        )

    monkeypatch.setattr(readiness.readiness, "check", missing)
    with pytest.raises(SystemExit, match="'sd35-medium' cannot be built here yet: training images"):
        readiness.main()
    assert "→ file:x is not there; put it there" in capsys.readouterr().out

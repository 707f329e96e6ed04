"""Models whose patch embedding or blocks lie elsewhere than a ViT's convert, come back and are saved as others are."""

import copy
import pickle

import pytest
import torch
from command_line import refused
from tiny import random_images
from tiny_encoders import ENCODERS, tiny_encoder

import t5lib
from t5lib.planning.cost_model import plan
from t5lib.utils.errors import T5Error

every_kind = pytest.mark.parametrize("kind", ENCODERS)
SIZES = ((32, 48), (64, 32))


@every_kind
@torch.no_grad()
def test_a_converted_model_takes_any_size_and_reverts_bit_for_bit(kind):
    model = tiny_encoder(kind)
    converted = t5lib.convert(model)
    for size in SIZES:
        images = random_images(2, *size)
        assert converted(images).shape == model(images).shape
        assert torch.equal(t5lib.revert(converted)(images), model(images))
    assert len(converted.t5_report.layers) == 2 and not converted.t5_report.dropped


@every_kind
@torch.no_grad()
def test_it_is_saved_copied_and_pickled(kind, tmp_path):
    model, images = tiny_encoder(kind), random_images(2, 32, 48)
    converted = t5lib.convert(model)
    for each in (model, converted):
        t5lib.save(each, tmp_path / "model")
        for again in (t5lib.load(tmp_path / "model"), copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert torch.equal(again(images), each(images))


@pytest.mark.parametrize("kind", ["naflex", "qwen3_merge"])
def test_it_is_calibrated(kind):
    model = tiny_encoder(kind)
    batches = [random_images(4, seed=n) for n in range(20)]
    report = t5lib.calibrate(
        t5lib.convert(model), teacher=model, batches=batches, config=t5lib.CalibrateConfig(steps=20)
    )
    assert sum(report.error_after.values()) < 0.9 * sum(report.error_before.values())


def test_packed_images_are_refused_by_name():
    packed = {
        "patches": torch.randn(1, 6, 192),
        "patch_coord": torch.zeros(1, 6, 2, dtype=torch.long),
        "patch_valid": torch.ones(1, 6, dtype=torch.bool),
    }
    with pytest.raises(T5Error, match=r"patches \(1, 6, 192\): it packs images of several sizes.*images of one size"):
        t5lib.convert(tiny_encoder("naflex"))(packed)


def test_commands_and_plans_say_that_such_models_are_for_python(tmp_path):
    told = refused("convert", "naflexvit_base_patch16_gap", tmp_path / "out", "--no-pretrained")
    assert "NaFlexVit has its patch embedding or its blocks elsewhere" in told and "use t5lib in Python" in told
    with pytest.raises(T5Error, match="Qwen3VitClassifier has its patch embedding or its blocks elsewhere"):
        plan(tiny_encoder("qwen3"), 64)

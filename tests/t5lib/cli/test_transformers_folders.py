"""`t5 diagnose` and `t5 convert` on a folder that transformers wrote."""

import json
import re

import numpy as np
import pytest
import transformers
from command_line import refused, run, words
from PIL import Image
from tiny import random_images
from tiny_transformers import tiny_transformer

import t5lib
from t5lib.conversion import ttt_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "dinov2"
    tiny_transformer("dinov2_classifier").save_pretrained(place)
    transformers.ViTImageProcessor(size={"height": 32, "width": 40}).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(12):
        small = Image.fromarray(rng.integers(0, 256, (5, 6 + index % 2, 3), dtype=np.uint8))
        small.resize((48 + index, 40)).save(place / f"{index:02}.png")
    return place


def test_a_folder_is_converted_calibrated_and_saved(folder, photos, tmp_path):
    out = tmp_path / "out"
    result = run("convert", folder, out, "--layers", 1, "--calibrate", photos, "--steps", 60, "--batch-size", 8)
    assert result.exit_code == 0, result.output
    told = words(result.stdout)
    before, after = map(float, re.search(r"mean ([\d.]+) ([\d.]+)", told).groups())
    assert after < before and "1 of 2 attention layers (1)" in told and "t5 inspect" not in told
    assert "as the ViTImageProcessor of the folder prepares them" in words(result.stderr)
    model = t5lib.load(out)
    assert list(ttt_layers(model)) == ["dinov2.encoder.layer.1.attention"]
    assert model(random_images(2)).logits.isfinite().all()


def test_a_folder_is_diagnosed(folder, photos):
    result = run("diagnose", folder, "--images", photos)
    assert result.exit_code == 0 and "dinov2.encoder.layer.0.attention" in words(result.stdout)


def test_what_the_commands_cannot_do_with_it_is_told_before_weights_are_loaded(folder, photos, tmp_path):
    out = tmp_path / "out"
    assert "leave --img-size out" in refused("convert", folder, out, "--img-size", 32)
    assert "leave --weights and --no-pretrained out" in refused("convert", folder, out, "--no-pretrained")
    assert "in Python: t5lib.benchmark(" in refused("plan", folder, "--resolution", 32)
    message = refused("diagnose", folder, "--images", photos, "--converted", out)
    assert "in Python: t5lib.explain(" in message


def test_converted_and_unknown_models_are_refused(tmp_path):
    t5lib.convert(tiny_transformer("vit")).save_pretrained(tmp_path / "converted")
    assert "t5lib.revert(model)" in refused("convert", tmp_path / "converted", tmp_path / "out")
    other = {"model_type": "vit", "architectures": ["Nobody"]}
    for told, match in ((other, "names the class 'Nobody'"), ({"model_type": "nobody"}, "nobody")):
        (tmp_path / "config.json").write_text(json.dumps(told))
        assert match in refused("convert", tmp_path, tmp_path / "out")


def test_a_folder_must_hold_all_weights_and_say_how_images_are_prepared(folder, photos, tmp_path):
    model = tiny_transformer("vit_classifier")
    del model.classifier.bias
    model.save_pretrained(tmp_path / "broken")
    assert "lacks weights of its ViTForImageClassification, such as classifier.bias" in refused(
        "convert", tmp_path / "broken", tmp_path / "out"
    )
    (tmp_path / "broken/model.safetensors").unlink()
    assert "holds no weights that can be read" in refused("convert", tmp_path / "broken", tmp_path / "out")
    tiny_transformer("vit").save_pretrained(tmp_path / "bare")
    convert = ("convert", tmp_path / "bare", tmp_path / "out", "--calibrate", photos, "--steps", 2)
    result = run(*convert)
    assert result.exit_code == 1 and "save the image processor there, too" in words(result.stderr)
    sizes = {"size": {"shortest_edge": 32}, "do_center_crop": False}
    transformers.BitImageProcessor(**sizes).save_pretrained(tmp_path / "bare")
    result = run(*convert)
    assert result.exit_code == 1 and "makes images of several sizes" in words(result.stderr)

"""`t5 export`: what it writes and tells, and what it refuses before any work."""

import json

import numpy as np
import pytest
import torch
from command_line import refused, run, words
from PIL import Image
from tiny import random_images, tiny_vit

import t5lib
from t5lib.onnx_export import open_onnx, run_onnx


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    t5lib.save(tiny_vit(depth=1), folder / "softmax")
    t5lib.save(t5lib.convert(tiny_vit(depth=1)), folder / "converted")
    return folder


@torch.no_grad()
def test_a_saved_model_becomes_a_file_for_images_of_any_size(models, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo).save(tmp_path / "photos/a.png")
    file = tmp_path / "model.onnx"
    result = run("export", models / "converted", "--onnx", file, "--dynamic-size", "--images", tmp_path / "photos")
    assert result.exit_code == 0, result.output
    told = words(result.stdout)
    assert "x (batch, 3, height, width)" in told and "batches of 1, 3; 32 × 32, 32 × 64, 64 × 64 px" in told
    model = t5lib.convert(tiny_vit(depth=1, dynamic_img_size=True))
    images = random_images(2, 40, 24)
    torch.testing.assert_close(run_onnx(open_onnx(file), {"x": images}), model(images), rtol=1e-4, atol=1e-5)


def test_its_speed_is_told_and_written(models, tmp_path):
    (tmp_path / "model.onnx").write_text("an older one")
    command = ("export", models / "converted", "--onnx", tmp_path / "model.onnx", "--img-size", 64, "--batch", 2)
    result = run(*command, "--speed", tmp_path / "speed.json", "--repeats", 2)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "speed.json").read_text())
    assert (found["tokens"], found["batch"], found["repeats"]) == (65, 2, 2)
    assert f"{found['speedup']:.2f} times as fast as the softmax model's export" in words(result.stdout)


def test_what_cannot_be_exported_is_refused(models, tmp_path):
    file = tmp_path / "x.onnx"
    speed = ("--speed", tmp_path / "speed.json")
    assert "is softmax: there is nothing to compare" in refused("export", models / "softmax", "--onnx", file, *speed)
    assert "is not a saved model" in refused("export", tmp_path / "gone", "--onnx", file)
    assert "ends in .onnx" in refused("export", models / "softmax", "--onnx", tmp_path / "x")
    assert "holds a model and nothing else" in refused(
        "export", models / "softmax", "--onnx", models / "softmax" / "x.onnx"
    )
    assert not list(tmp_path.iterdir())

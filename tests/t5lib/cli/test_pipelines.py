"""The `t5` command on folders of diffusers pipelines."""

import json

import pytest
import torch
from command_line import refused, run, words

pytest.importorskip("diffusers", reason="pipelines are diffusers'")

from PIL import Image
from tiny_pipelines import tiny_dit_pipeline, tiny_flux_pipeline, tiny_sd3_pipeline

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.families import family_of


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    pipe = tiny_dit_pipeline()
    pipe.transformer.bfloat16()
    pipe.save_pretrained(folder)
    (folder / "LICENSE.md").write_text("the terms")
    return folder


def test_a_pipeline_is_converted_whole_and_inspected(softmax, tmp_path):
    done = run("convert", softmax, tmp_path / "out", "--layers", "1")
    assert done.exit_code == 0 and "converted 1 of 2 attentions" in words(done.stdout)
    pipe, original = t5lib.load_pipeline(tmp_path / "out"), t5lib.load_transformer(softmax)
    assert list(ttt_layers(pipe.transformer)) == ["transformer_blocks.1.attn1"]
    assert (tmp_path / "out/LICENSE.md").read_text() == "the terms" and pipe.scheduler is not None
    back = t5lib.revert(t5lib.load_transformer(tmp_path / "out")).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in original.state_dict().items())
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert found["layers"] == {"ttt": [1], "softmax": [0]} and found["dtype"] == "bfloat16"
    assert found["parameters"]["total"] == found["parameters"]["inherited"] + found["parameters"]["new"]
    shown = words(run("inspect", tmp_path / "out").stdout)
    assert "DiTPipeline, transformer T5DiTTransformer2DModel" in shown and "inner model swiglu" in shown
    assert "(0 of 2 converted)" in words(run("inspect", softmax).stdout)


@pytest.mark.parametrize(
    ("pipeline", "size"), [(tiny_dit_pipeline, 8), (tiny_sd3_pipeline, 16)], ids=["dit on pixels", "sd3"]
)
def test_a_pipeline_is_diagnosed_on_image_files(pipeline, size, tmp_path):
    pipeline().save_pretrained(tmp_path / "softmax")
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "cut.png").write_bytes(b"cut")
    done = run("diagnose", tmp_path / "softmax", "--images", tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    assert f": 2 images, {size} × {size} px, noised" in words(done.stdout) and "cut.png" in done.stderr, done.output
    found = json.loads((tmp_path / "out/shift_ratio.json").read_text())
    assert found["layers"] == family_of(pipeline().transformer).attention_names(pipeline().transformer)
    assert all(0 < ratio < 1 for heads in found["shift_ratio"] for ratio in heads)
    wrong = refused("diagnose", tmp_path / "softmax", "--images", tmp_path, "--img-size", size + 1)
    assert f"resolution {size + 1} is not a multiple of what a token covers" in wrong


def test_a_pipeline_of_another_family_is_converted_and_inspected_and_is_diagnosed_in_python(tmp_path):
    tiny_flux_pipeline().save_pretrained(tmp_path / "flux")
    assert "converted 4 of 4 attentions" in words(run("convert", tmp_path / "flux", tmp_path / "out").stdout)
    assert "FluxPipeline, transformer T5Flux" in words(run("inspect", tmp_path / "out").stdout)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    told = refused("diagnose", tmp_path / "flux", "--images", tmp_path)
    assert "a FluxPipeline, and this command encodes images for Stable Diffusion 3 and DiT alone" in told


def test_what_cannot_be_done_with_a_pipeline_is_told_and_nothing_is_replaced(softmax, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").touch()
    assert "no --calibrate; use t5lib in Python" in refused(
        "convert", softmax, tmp_path / "out", "--calibrate", tmp_path / "photos"
    )
    assert "already holds something" in refused("convert", softmax, tmp_path / "photos")
    assert "no --converted; use t5lib" in refused(
        "diagnose", softmax, "--images", tmp_path / "photos", "--converted", tmp_path / "photos"
    )
    run("convert", softmax, tmp_path / "out")
    assert "is converted already" in refused("convert", tmp_path / "out", tmp_path / "twice")
    (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be read" in refused("inspect", tmp_path / "out")
    (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert "cannot be read" in refused("inspect", tmp_path / "out")


def test_exact_text_is_asked_for_and_shown_where_there_is_text(softmax, tmp_path):
    tiny_sd3_pipeline().save_pretrained(tmp_path / "sd3")
    assert run("convert", tmp_path / "sd3", tmp_path / "out", "--text", "exact").exit_code == 0
    kinds = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["kinds"]
    assert {tuple(kind["layers"]): kind["text"] for kind in kinds} == {(0, 1, 2): "exact", (3, 4): "linear"}
    assert "text exact" in words(run("inspect", tmp_path / "out").stdout)
    assert "none of the attentions to convert sees text" in refused(
        "convert", softmax, tmp_path / "none", "--text", "exact"
    )

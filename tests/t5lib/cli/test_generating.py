"""`t5 generate`: what it refuses before any work, and the folders it leaves for the scorers."""

import json
import re

import pytest
from command_line import refused, run, words
from PIL import Image
from tiny_pipelines import SIDE, tiny_dit_pipeline, tiny_sd3_pipeline

from t5lib.evaluation.prompts import seed_of

QUICK = ("--steps", 2, "--device", "cpu", "--max-sequence-length", 16)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd3"
    tiny_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("two red apples\na cat\n")
    return path


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_plain_images_carry_what_made_them_and_are_made_once(pipeline, prompts, tmp_path):
    out = tmp_path / "out"
    first = run("generate", pipeline, "--prompts", prompts, "--out", out, *QUICK)
    assert first.exit_code == 0, first.output
    assert "2 pictures drawn of 2 prompts" in words(first.stdout)
    assert tree(out) == ["00000-0.png", "00001-0.png"]
    with Image.open(out / "00001-0.png") as image:
        made_of = json.loads(image.info["t5"])
        assert image.size == (SIDE, SIDE)
    assert made_of["prompt"] == "a cat"
    assert made_of["model"] == str(pipeline.resolve())
    assert made_of["seeds"] == [seed_of(0, 1, 0)]
    again = run("generate", pipeline, "--prompts", prompts, "--out", out, *QUICK)
    assert "0 pictures drawn of 2 prompts, 2 were there already" in words(again.stdout)
    assert "steps" in refused("generate", pipeline, "--prompts", prompts, "--out", out, "--steps", 3)


def test_genevals_layout(pipeline, tmp_path):
    file, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    file.write_text(json.dumps({"tag": "single_object", "include": [], "prompt": "a photo of a bench"}))
    run("generate", pipeline, "--prompts", file, "--layout", "geneval", "--out", out, *QUICK)
    assert tree(out) == ["00000/metadata.jsonl", *(f"00000/samples/{number:05}.png" for number in range(4))]


def test_dpgs_layout(pipeline, tmp_path):
    folder, out = tmp_path / "prompts", tmp_path / "out"
    folder.mkdir()
    (folder / "partiprompts7.txt").write_text("A cat on a mat.")
    run("generate", pipeline, "--prompts", folder, "--layout", "dpg", "--size", 8, "--out", out, *QUICK)
    assert tree(out) == ["partiprompts7.png"]
    with Image.open(out / "partiprompts7.png") as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize("vae", [True, False], ids=["latents", "pixels"])
def test_class_numbers_for_a_class_conditional_pipeline(tmp_path, vae):
    folder, file, out = tmp_path / "dit", tmp_path / "classes.txt", tmp_path / "out"
    tiny_dit_pipeline(vae=vae).save_pretrained(folder)
    file.write_text("0\n4\n")
    result = run("generate", folder, "--prompts", file, "--out", out, "--steps", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert tree(out) == ["00000-0.png", "00001-0.png"]
    file.write_text("a cat\n")
    again = run("generate", folder, "--prompts", file, "--out", out, "--device", "cpu")
    assert "class-conditional" in words(again.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "dgp"), "did you mean 'dpg'"),
        (("--size", "large"), "--size 'large' is not understood"),
        (("--layout", "geneval"), "evaluation_metadata.jsonl"),
    ],
)
def test_wrong_options_are_refused_before_the_pipeline_is_loaded(pipeline, prompts, tmp_path, options, message):
    assert message in refused("generate", pipeline, "--prompts", prompts, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_dpg_wants_squares(pipeline, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/one.txt").write_text("a cat")
    arguments = ("--prompts", tmp_path / "p", "--layout", "dpg", "--out", tmp_path / "out", "--size", "8x16")
    assert "cuts squares" in refused("generate", pipeline, *arguments)


def test_what_is_no_pipeline(prompts, tmp_path):
    arguments = ("--prompts", prompts, "--out", tmp_path / "out")
    assert "no model_index.json" in refused("generate", tmp_path, *arguments)
    assert "does not exist" in refused("generate", tmp_path / "no" / "such", *arguments)


def test_images_do_not_replace_a_file(pipeline, prompts):
    assert "is a file" in refused("generate", pipeline, "--prompts", prompts, "--out", prompts)


def test_help_shows_examples_of_every_layout():
    text = re.sub(r"\W+", " ", run("generate", "--help").output)
    assert "geneval" in text
    assert "dpg" in text

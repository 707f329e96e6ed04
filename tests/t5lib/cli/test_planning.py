"""`t5 plan`: what it refuses before any work, that its figures agree with each other, and that its choice is usable."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_images, tiny_vit
from typer.testing import CliRunner

import t5lib
from t5lib.benchmarks import timing
from t5lib.cli import app, models
from t5lib.conversion import ttt_layers
from t5lib.layers.layer_map import parse_layers
from t5lib.planning import cost_model
from t5lib.utils.files import read_json

DEPTH = 3


def run(*arguments: object):
    """The result of `t5 plan …`; an exception that the command does not turn into a message fails the test."""
    result = CliRunner().invoke(app, ["plan", *(str(argument) for argument in arguments)], env={"COLUMNS": "120"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert not result.stdout
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def softmax(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "softmax"
    t5lib.save(tiny_vit(depth=DEPTH), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def clock(monkeypatch):
    """A device without noise: every layer, softmax or new, has its price at the resolution asked for."""

    def install(softmax: float, new: float):
        def time_models(models, inputs, config, rules, where):
            def cost(model):
                converted = len(ttt_layers(model))
                return 1 + (len(model.blocks) - converted) * softmax * (side / 32) ** 2 + converted * new

            side = inputs["x"].shape[-1]
            return {
                name: timing.ModelTime([cost(model)], None, 1e-6, torch.float64, None) for name, model in models.items()
            }

        monkeypatch.setattr(cost_model, "time_models", time_models)

    return install


class TestRefusedBeforeAnyWork:
    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch):
        def load(*_, **__):
            raise AssertionError("weights were loaded before everything was checked")

        monkeypatch.setattr(models, "load", load)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--speedup", 1.3], "--speedup is for choosing layers; add --images"),
            (["--out", "x"], "--out is for choosing layers"),
            (["--batch-size", 8], "--batch-size is for choosing layers"),
            (["--images", "."], "by --speedup X or --budget-ms MS; give one"),
            (
                ["--images", ".", "--speedup", 1.3, "--budget-ms", 3],
                "by --speedup X or --budget-ms MS; give one",
            ),
            (["--images", ".", "--speedup", 1], "--speedup 1 needs no conversion"),
            (["--images", ".", "--budget-ms", -1], "--budget-ms -1: expected a positive number"),
            (["--images", "nowhere", "--speedup", 1.3], "nowhere does not exist"),
            (["--kinds", "swiglo"], "did you mean 'swiglu'"),
        ],
    )
    def test_options_that_do_not_belong_together(self, softmax, options, message):
        assert message in refused(softmax, "--resolution", 32, *options)

    def test_resolutions_off_the_patch_grid(self, softmax):
        assert "not a multiple of the patch size 8; the nearest is 32" in refused(softmax, "--resolution", 33)

    def test_out_that_is_the_model_or_something_else(self, softmax, photos):
        asked = (softmax, "--resolution", 32, "--images", photos, "--speedup", 1.1)
        assert "are the same folder" in refused(*asked, "--out", softmax, "--force")
        assert "other things than a model" in refused(*asked, "--out", photos)


def test_without_images_no_pretrained_weights_are_fetched(monkeypatch, clock):
    clock(softmax=2.0, new=1.0)
    asked = []
    monkeypatch.setattr(models, "load", lambda source, place: asked.append(source) or tiny_vit(depth=DEPTH))
    result = run("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "--resolution", 32, "--kinds", "swiglu")
    assert result.exit_code == 0, result.output
    assert not asked[0].pretrained and asked[0].img_size == (32, 32)


def test_the_table_holds_predictions_break_even_and_verdict(softmax, clock):
    clock(softmax=2.0, new=1.0)
    said = run(softmax, "--resolution", 32, "--kinds", "swiglu,two_layer", "--device", "cpu").stdout
    assert re.search(r"none \(softmax\) +7 +1\.00x", said)
    assert re.search(r"all 3 swiglu +4 +1\.75x", said)
    assert re.search(r"any 2 of 3 two_layer +5 +1\.40x", said)
    assert re.search(r"break-even of swiglu +about \d+ px", said)
    assert "A gain at this size" in said


def test_it_says_plainly_that_nothing_is_gained(softmax, clock):
    clock(softmax=1.0, new=9.0)
    said = run(softmax, "--resolution", 32, "--kinds", "swiglu", "--device", "cpu").stdout
    assert "No gain at this size: with swiglu in every layer a pass at 32 px (17 tokens) takes 7.00 times" in said
    assert re.search(r"break-even of swiglu +none up to 64 px", said)


def test_on_a_cpu_one_row_says_how_it_ran(softmax, clock):
    clock(softmax=2.0, new=1.0)
    said = run(softmax, "--resolution", 32, "--kinds", "swiglu", "--device", "cpu").stdout
    assert re.search(r"how you run it +all layers +softmax ms +converted ms +speed-up", said)
    assert re.search(r"uncompiled +swiglu +7 +4 +1\.75x", said)
    assert "compiled with CUDA graphs" not in said and "runs fastest" not in said


def test_on_a_card_a_row_a_mode_and_advice(softmax, clock, monkeypatch):
    clock(softmax=2.0, new=1.0)
    in_graphs = cost_model.time_models

    def launched_too(models, inputs, config, rules, where):
        """Python takes 5 ms to launch a new layer, and 3 ms for one of softmax."""
        found = in_graphs(models, inputs, config, rules, where)
        for name, model in models.items():
            new = len(ttt_layers(model))
            launched = 1.0 + 5 * new + 3 * (len(model.blocks) - new)
            found[name] = dataclasses.replace(found[name], launched_runs=[launched])
        return found

    monkeypatch.setattr(cost_model, "time_models", launched_too)
    card = timing.Rules(torch.device("cpu"), torch.float32, compiled=True, graphs=True)
    monkeypatch.setattr(timing.Rules, "of", lambda *_: card)
    said = run(softmax, "--resolution", 32, "--kinds", "swiglu,two_layer", "--device", "cpu").stdout
    assert "float32, compiled with CUDA graphs." in said
    for kind in ("swiglu", "two_layer"):
        assert re.search(rf"uncompiled +{kind} +10 +16 +0\.62x", said)
        assert re.search(rf"compiled without CUDA graphs +{kind} +10 +16 +0\.62x", said)
        assert re.search(rf"compiled with CUDA graphs +{kind} +7 +4 +1\.75x", said)
    assert (
        "runs fastest compiled with CUDA graphs: 4 ms a pass with swiglu. To turn this on, call model.compile(" in said
    )
    assert "two_layer pays when compiled with CUDA graphs, but not when uncompiled or" in said


def test_out_of_reach_and_nothing_to_do_are_told_before_calibration(softmax, photos, clock, monkeypatch):
    clock(softmax=2.0, new=1.0)
    monkeypatch.setattr(t5lib, "calibrate", None)
    asked = (softmax, "--resolution", 32, "--images", photos, "--kinds", "swiglu", "--device", "cpu")
    assert "the fastest layer map takes 4 ms (1.750 times" in run(*asked, "--speedup", 2).stderr
    assert "there is nothing to convert" in run(*asked, "--budget-ms", 9).stderr


def test_the_chosen_mixture_is_within_the_budget_saved_and_printed_as_convert_takes_it(
    softmax, photos, clock, tmp_path
):
    clock(softmax=2.0, new=1.0)
    out = tmp_path / "mixed"
    options = ("--kinds", "swiglu,two_layer", "--steps", 2, "--batch-size", 4, "--device", "cpu")
    asked = (softmax, "--resolution", 32, "--images", photos, "--budget-ms", 5, *options)
    result = run(*asked, "--out", out)
    assert result.exit_code == 0, result.output
    printed = re.search(r'--layers "(.+?)"', result.stdout)[1]
    model, told = t5lib.load(out), read_json(out / "plan.json")
    assert parse_layers(printed) == model.t5_config.layers == told["chosen"]["layers"]
    assert told["chosen"]["predicted_ms"] == 5 and len(ttt_layers(model)) == 2
    assert told["plan"]["modes"]["eager"]["swiglu"] == {"ms": 4, "speedup": 1.75}
    assert told["scan"]["loss"] == "kl" and told["scan"]["images"] == 2
    with torch.no_grad():
        assert model(random_images()).isfinite().all()
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]

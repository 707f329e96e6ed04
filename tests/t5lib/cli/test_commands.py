"""The `t5` command: what it refuses before any work, what it writes, and that what it prints is true."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import refused, run, words
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from t5kernels import INNER_WEIGHTS, KEY_NORMS
from tiny import tiny_vit

import t5lib
from t5lib.benchmarks.resolution_sweep import count_flops
from t5lib.cli import arguments, converting, images, models
from t5lib.cli.images import ImageReader
from t5lib.conversion import ttt_layers
from t5lib.layers.config import CONVOLUTIONS, PRESETS, TTTConfig
from t5lib.training.calibration import CalibrateConfig


@pytest.fixture(scope="module")
def softmax(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "softmax"
    t5lib.save(tiny_vit(), folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "converted"
    t5lib.save(t5lib.convert(tiny_vit(), TTTConfig(layers=(1,))), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twelve pictures in two subfolders, beside files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(12):
        path = folder / f"class {index % 2}" / f"{index:02}.{'JPG' if index % 3 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / "._00.png").write_text("left by another system")
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Any attempt to load or fetch weights fails the test: refusals come before."""

    def load(*_, **__):
        raise AssertionError("weights were loaded before everything was checked")

    monkeypatch.setattr(models, "load", load)


class TestHelp:
    def test_needs_neither_torch_nor_timm(self):
        code = """if True:
            import sys
            from t5lib.cli import app
            try:
                app(["convert", "--help"])
            finally:
                assert not {"torch", "timm", "matplotlib"} & set(sys.modules)
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "Examples" in done.stdout

    def test_names_every_choice_and_the_librarys_defaults(self):
        told = words(run("convert", "--help").stdout.replace("│", " "))
        defaults = dataclasses.asdict(TTTConfig())
        for name in ("inner", "inner_loss", "key_norm", "locality"):
            assert re.search(rf"{defaults[name]} \(default", told), name
        for choice in (*KEY_NORMS, *CONVOLUTIONS, "+nat3", "+nat5", *INNER_WEIGHTS, *PRESETS, "dot", "residual"):
            assert choice in told
        recipe = CalibrateConfig()
        for name in ("steps", "batch_size", "lr", "lr_inherited"):
            assert f"default {getattr(recipe, name)}" in told, f"{name} is {getattr(recipe, name)} in the library"

    def test_version_is_the_installed_one(self):
        from importlib.metadata import version

        assert run("--version").stdout.strip() == f"t5 {version('t5-ttt')}"


class TestRefusedBeforeAnyWork:
    @pytest.fixture(autouse=True)
    def check_order(self, no_weights):
        pass

    def test_unknown_name_gets_the_nearest_ones(self, photos):
        assert "vit_tiny_patch16_224" in refused("diagnose", "vit_tiny_patch16_225", "--images", photos)
        assert "no model 'vit_tiny_patch16_224.nobodys'" in refused(
            "diagnose", "vit_tiny_patch16_224.nobodys", "--images", photos
        )

    def test_other_families_and_attentions_are_named(self, photos):
        assert "ResNet cannot be converted" in refused("diagnose", "resnet18", "--images", photos)
        message = refused("convert", "vit_base_patch16_xp_224", "out", "--no-pretrained")
        assert "ParallelScalingBlock" in message

    def test_model_without_pretrained_weights(self, photos):
        name = next(n for n in timm.list_models("vit_*") if not timm.is_model_pretrained(n))
        assert "--no-pretrained" in refused("diagnose", name, "--images", photos)

    def test_folders_that_are_no_models(self, photos, tmp_path):
        assert "has no t5.json" in refused("diagnose", photos, "--images", photos)
        assert "does not exist" in refused("diagnose", tmp_path / "gone", "--images", photos)
        assert "has no t5.json" in refused("inspect", photos)

    def test_converted_model_says_how_to_revert(self, converted, photos, tmp_path):
        for command in (("diagnose", converted, "--images", photos), ("convert", converted, tmp_path / "out")):
            message = refused(*command)
            assert "converted already" in message
            assert "t5lib.revert" in message

    def test_missing_images(self, softmax, tmp_path):
        assert "does not exist" in refused("diagnose", softmax, "--images", tmp_path / "gone")
        assert "holds 0 images" in refused("diagnose", softmax, "--images", tmp_path)
        Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
        assert "2 or more" in refused("convert", softmax, tmp_path / "out", "--calibrate", tmp_path)

    def test_out_that_is_not_ours_stays_as_it_is(self, softmax, photos, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert "is a file" in refused("convert", softmax, tmp_path / "file", "--force")
        assert "holds other things" in refused("convert", softmax, tmp_path, "--force")
        assert (tmp_path / "file").read_text() == "mine"
        assert "cannot be written" in refused("convert", softmax, tmp_path / "file" / "out")

    def test_nothing_is_written_into_a_model(self, softmax, photos):
        assert "holds a model and nothing else" in refused("convert", softmax, softmax / "inner", "--calibrate", photos)
        assert "holds a model and nothing else" in refused("diagnose", softmax, "--images", photos, "--out", softmax)

    def test_out_that_holds_a_model_needs_force(self, softmax, converted):
        before = (converted / "t5.json").read_bytes()
        assert "--force" in refused("convert", softmax, converted)
        assert (converted / "t5.json").read_bytes() == before

    def test_model_cannot_be_its_own_out(self, softmax):
        assert "same folder" in refused("convert", softmax, softmax, "--force")

    def test_settings(self, softmax, photos, tmp_path):
        out = tmp_path / "out"
        assert "expected e.g. 0-5,8" in refused("convert", softmax, out, "--layers", "some")
        assert "224x320" in refused("convert", softmax, out, "--img-size", "big")
        assert "did you mean 'swiglu'" in refused("convert", softmax, out, "--inner", "swigul")
        assert "from 0 to 1" in refused("convert", softmax, out, "--layers", "2")
        assert "not a multiple of the patch size 8; the nearest is 32" in refused(
            "convert", softmax, out, "--img-size", "30"
        )
        assert "--lr-inherited is for calibration" in refused("convert", softmax, out, "--lr-inherited", "0")
        assert "--device" in refused("convert", softmax, out, "--device", "abacus")
        assert "one cpu" in refused("convert", softmax, out, "--device", "cpu:7")
        assert "-1.0" in refused("convert", softmax, out, "--calibrate", photos, "--lr=-1")

    def test_weights(self, softmax, photos, tmp_path):
        name = "vit_tiny_patch16_224"
        missing = tmp_path / "gone.safetensors"
        assert "does not exist" in refused("diagnose", name, "--images", photos, "--weights", missing)
        assert "weights of its own" in refused("diagnose", softmax, "--images", photos, "--no-pretrained")


class TestWeights:
    def test_that_do_not_fit_are_refused(self, photos, tmp_path):
        save_file({"blocks.0.odd": torch.zeros(3)}, tmp_path / "odd.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"not really")
        for file, message in (("odd", "do not fit timm's vit_tiny_patch16_224"), ("broken", "cannot be read")):
            path = tmp_path / f"{file}.safetensors"
            shown = refused("diagnose", "vit_tiny_patch16_224", "--images", photos, "--weights", path)
            assert message in shown and str(path) in shown

    def test_that_cannot_be_fetched_give_the_ways_out(self, photos, monkeypatch):
        create = timm.create_model

        def offline(name, pretrained=False, **arguments):
            if pretrained:
                raise LocalEntryNotFoundError("cannot find the requested files in the local cache\nsecond line")
            return create(name, pretrained=False, **arguments)

        monkeypatch.setattr(timm, "create_model", offline)
        message = refused("diagnose", "vit_tiny_patch16_224", "--images", photos)
        assert "could not be fetched (cannot find the requested files in the local cache)" in message
        assert "network" in message
        assert "HF_TOKEN" in message
        assert "--weights" in message


class TestDiagnose:
    def test_prints_and_writes_what_the_library_measures(self, softmax, photos, tmp_path):
        result = run("diagnose", softmax, "--images", photos, "--limit", 5, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        model = t5lib.load(softmax)
        pixels = ImageReader.of(model).read(arguments.spread(arguments.find_images(photos), 5))
        assert pixels.shape == (5, 3, 32, 32)
        expected = t5lib.diagnose(model, pixels)
        assert json.loads((tmp_path / "shift_ratio.json").read_text()) == json.loads(json.dumps(expected.as_dict()))
        assert Image.open(tmp_path / "shift_ratio.png").size[0] > 500
        for layer, heads in zip(expected.layers, expected.shift_ratio, strict=True):
            mean = sum(heads) / len(heads)
            assert f"{layer} {mean:.2f} {min(heads):.2f} {max(heads):.2f}" in words(result.stdout)

    def test_converted_model_is_compared_with_what_it_came_from(self, softmax, converted, photos, tmp_path):
        command = ("diagnose", softmax, "--images", photos, "--limit", 5, "--converted", converted)
        result = run(*command, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        models = [t5lib.load(folder) for folder in (softmax, converted)]
        pixels = ImageReader.of(models[0]).read(arguments.spread(arguments.find_images(photos), 5))
        expected = t5lib.explain(*models, pixels)
        assert json.loads((tmp_path / "explanation.json").read_text()) == json.loads(json.dumps(expected.as_dict()))
        pictures = {"shift_ratio", "maps-0", "maps-1", "distance", "similarity", "shift"}
        assert {path.stem for path in tmp_path.glob("*.png")} == pictures
        told = words(result.stdout)
        _, ttt = expected.by_layer()
        assert f"blocks.1.attn {ttt['distance_softmax']:.1f} {ttt['distance_converted']:.1f} " in told
        assert f" {ttt['cka']:.3f} {ttt['shift_before']:.2f} 0.00 {ttt['shift_fitted']:.2f}" in told
        assert "blocks.0.attn (softmax) " in told and "1.000" in told
        assert "Converted layers look" in told
        assert "too few for CKA" not in words(result.stderr)
        few = run(*command, "--limit", 1)
        assert "1 image of this size are too few for CKA" in words(few.stderr)

    def test_converted_model_of_another_size_or_kind(self, softmax, converted, photos, tmp_path):
        weights = t5lib.load(softmax).state_dict()
        bigger = tiny_vit(img_size=64)
        bigger.load_state_dict({name: value for name, value in weights.items() if name != "pos_embed"}, strict=False)
        t5lib.save(t5lib.convert(bigger), tmp_path / "bigger")
        command = ["diagnose", softmax, "--images", photos, "--limit", 2, "--converted"]
        result = run(*command, tmp_path / "bigger")
        assert "64 × 64 px" in result.stdout and "8 × 8 patches" in result.stdout, result.output
        assert "5 × 5 patches" in run(*command, tmp_path / "bigger", "--img-size", 40).stdout
        assert "holds a softmax model; expected what t5 convert made from" in refused(*command, softmax)
        assert "is not a saved model" in refused(*command, photos)
        t5lib.save(t5lib.convert(tiny_vit("deit")), tmp_path / "deit")
        assert "was made from deit_tiny_patch16_224, not from vit_tiny" in refused(*command, tmp_path / "deit")

    def test_damaged_image_is_left_out_and_named(self, softmax, photos, tmp_path):
        good = arguments.find_images(photos)[0]
        (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
        (tmp_path / "good.png").write_bytes(good.read_bytes())
        result = run("diagnose", softmax, "--images", tmp_path)
        assert result.exit_code == 0, result.output
        assert ": 1 image," in words(result.stdout)
        assert "cut.png" in words(result.stderr)
        (tmp_path / "good.png").unlink()
        message = words(run("diagnose", softmax, "--images", tmp_path).stderr)
        assert "none of the images can be read, such as" in message


class TestConvert:
    def test_saves_what_the_library_converts_and_accounts_for_it(self, softmax, tmp_path):
        out = tmp_path / "out"
        result = run("convert", softmax, out, "--layers", "1", "--inner", "two_layer", "--seed", 3)
        assert result.exit_code == 0, result.output
        config = TTTConfig(layers=(1,), inner="two_layer", seed=3)
        expected, saved = t5lib.convert(t5lib.load(softmax), config), t5lib.load(out)
        assert saved.t5_config == config
        for name, tensor in expected.state_dict().items():
            assert torch.equal(saved.state_dict()[name], tensor), name
        told = words(result.stdout)
        assert "1 of 2 attention layers (1)" in told
        for kind, number in expected.t5_report.numbers.items():
            assert (f"{kind} {number:,} numbers" in told) == (kind != "reset")
        assert "as they were" in told
        assert "Not calibrated" in told
        assert f't5lib.load("{out}")' in told

    def test_a_layer_map_and_a_preset_are_converted_and_told(self, softmax, tmp_path):
        assert run("convert", softmax, tmp_path / "map", "--layers", "0=two_layer,1=lit+nat3").exit_code == 0
        first, second = (layer.mixer.config for layer in ttt_layers(t5lib.load(tmp_path / "map")).values())
        assert (first.inner, second.inner, second.locality) == ("two_layer", "relu_linear", "dwc_v+nat3")
        told = words(run("inspect", tmp_path / "map").stdout)
        assert "layers 0 inner model two_layer" in told and "layers 1 inner model relu_linear" in told
        result = run("convert", softmax, tmp_path / "lit", "--preset", "lit", "--key-norm", "rms")
        assert "started afresh" in words(result.stdout)
        assert t5lib.load(tmp_path / "lit").t5_config == TTTConfig.preset("lit", key_norm="rms")

    def test_force_replaces_a_model(self, softmax, tmp_path):
        assert run("convert", softmax, tmp_path / "out").exit_code == 0
        assert run("convert", softmax, tmp_path / "out", "--locality", "none", "--force").exit_code == 0
        assert t5lib.load(tmp_path / "out").t5_config.locality == "none"

    def test_other_image_size_is_in_the_folder(self, softmax, tmp_path):
        assert run("convert", softmax, tmp_path / "out", "--img-size", "32x48").exit_code == 0
        model = t5lib.load(tmp_path / "out")
        assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 7)
        assert model.patch_embed.img_size == (32, 48)

    def test_random_weights_of_a_timm_name(self, tmp_path):
        out = tmp_path / "out"
        assert run("convert", "vit_tiny_patch16_224", out, "--no-pretrained", "--img-size", 32).exit_code == 0
        assert t5lib.load(out).num_classes == 1000


class TestCalibrate:
    def test_fits_the_layers_and_tells_the_errors(self, softmax, photos, tmp_path):
        out = tmp_path / "out"
        result = run("convert", softmax, out, "--calibrate", photos, "--steps", 60, "--batch-size", 8)
        assert result.exit_code == 0, result.output
        told = words(result.stdout)
        before, after = map(float, re.search(r"mean ([\d.]+) ([\d.]+)", told).groups())
        assert after < before / 2
        assert "blocks.0.attn" in told
        assert "q, k, v fitted too" in told
        assert "11 images to fit on, 1 to measure on" in words(result.stderr)
        new, start = (m.blocks[0].attn.mixer.w1 for m in (t5lib.load(out), t5lib.convert(t5lib.load(softmax))))
        assert not torch.allclose(new, start)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    def test_layers_that_the_model_misses_most_stay_softmax(self, softmax, photos, tmp_path):
        out, auto = tmp_path / "out", ("--layers", "auto", "--softmax-layers", 1)
        assert "add --calibrate" in refused("convert", softmax, out, *auto)
        result = run("convert", softmax, out, *auto, "--calibrate", photos, "--steps", 4)
        [layer] = ttt_layers(t5lib.load(out))
        back = "blocks.1.attn" if layer == "blocks.0.attn" else "blocks.0.attn"
        assert f"Softmax is back in {back}: the error of the model's features" in words(result.stdout)

    def test_projections_stay_when_asked(self, softmax, photos, tmp_path):
        out = tmp_path / "out"
        assert (
            "as they were"
            in run("convert", softmax, out, "--calibrate", photos, "--steps", 4, "--lr-inherited", 0).stdout
        )
        reverted = t5lib.revert(t5lib.load(out)).state_dict()
        for name, tensor in t5lib.load(softmax).state_dict().items():
            assert torch.equal(reverted[name], tensor), name

    def test_interrupted_goes_on_to_the_same_weights(self, softmax, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(converting, "CHECKPOINT_EVERY", 1)
        command = ["convert", softmax, "out", "--calibrate", photos, "--steps", 20, "--batch-size", 4]
        (tmp_path / "whole").mkdir()
        (tmp_path / "broken").mkdir()
        monkeypatch.chdir(tmp_path / "whole")
        assert run(*command).exit_code == 0
        monkeypatch.chdir(tmp_path / "broken")
        read, batches = ImageReader.readable, []

        def interrupted(reader, paths):
            batches.append(paths)
            if len(batches) == 8:  # in the second pool of four batches
                raise KeyboardInterrupt
            return read(reader, paths)

        with monkeypatch.context() as patch:
            patch.setattr(images.ImageReader, "readable", interrupted)
            stopped = run(*command)
        assert stopped.exit_code != 0
        assert "nothing is written to out; the same command resumes" in words(stopped.stderr)
        assert not Path("out").exists()
        resumed = run(*command)
        assert "resuming an earlier run" in words(resumed.stderr)
        ours, expected = (t5lib.load(tmp_path / name / "out").state_dict() for name in ("broken", "whole"))
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name

    def test_other_settings_do_not_go_on_with_old_work(self, softmax, photos, tmp_path):
        model = t5lib.load(softmax)
        changed = tiny_vit(seed=1)
        request = converting.Request(
            source=arguments.Source(name=str(softmax)),
            out=tmp_path / "out",
            images=arguments.find_images(photos),
            t5={},
            calibrate={},
            seed=0,
            device=None,
        )
        other = dataclasses.replace(request, t5={"inner": "two_layer"})
        recipe = CalibrateConfig()
        first = converting._fingerprint(request, recipe, model)
        assert first == converting._fingerprint(request, recipe, model)
        assert first != converting._fingerprint(other, recipe, model)
        assert first != converting._fingerprint(request, CalibrateConfig(steps=7), model)
        assert first != converting._fingerprint(request, recipe, changed)


class TestInspect:
    def test_json_is_what_the_model_is(self, converted):
        found = json.loads(run("inspect", converted, "--json").stdout)
        model = t5lib.load(converted)
        assert found["architecture"] == "vit_tiny_patch16_224"
        assert (found["image_size"], found["grid"], found["tokens"]) == ([32, 32], [4, 4], 17)
        assert found["layers"] == {"ttt": [1], "softmax": [0]}
        assert found["t5"]["inner"] == "swiglu"
        new = model.t5_report.numbers["new"]
        total = sum(parameter.numel() for parameter in model.parameters())
        assert found["parameters"] == {"total": total, "inherited": total - new, "new": new}
        assert found["file_bytes"] == (converted / "model.safetensors").stat().st_size
        assert found["dtype"] == "float32"
        picture = {"x": torch.zeros(1, 3, 32, 32)}
        assert found["flops"]["t5"] == count_flops(model, picture)
        assert found["flops"]["softmax"] == count_flops(t5lib.revert(model), picture)

    def test_equal_cost_is_where_the_counts_cross(self, converted):
        equal = json.loads(run("inspect", converted, "--json").stdout)["flops"]["equal_tokens"]
        model = t5lib.load(converted)
        softmax = t5lib.revert(model)

        def softmax_over_t5(tokens: int) -> float:
            strip = (8, 8 * (tokens - 1))
            counts = []
            for each in (softmax, model):
                each.set_input_size(img_size=strip)
                counts.append(count_flops(each, {"x": torch.zeros(1, 3, *strip)}))
            return counts[0] / counts[1]

        assert softmax_over_t5(equal) >= 1 > softmax_over_t5(equal - 1)

    def test_reads_well_for_converted_and_softmax(self, converted, softmax):
        told = words(run("inspect", converted).stdout)
        assert "TTT in layers 1, softmax in layers 0 (1 of 2 converted)" in told
        assert "32 × 32 px = 4 × 4 patches of 8 px" in told
        assert "than its softmax twin" in told
        plain = words(run("inspect", softmax).stdout)
        assert "softmax in layers 0-1 (0 of 2 converted)" in plain
        assert "new layers" not in plain
        assert re.search(r"GFLOPs an image; converted [\d.]+ \(\d+% (more|less)\)", plain)

    def test_patches_of_a_convolutional_stem_are_counted_with_its_strides(self, tmp_path):
        model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1)
        t5lib.save(model, tmp_path / "out")
        assert "64 × 64 px = 2 × 2 patches of 32 px" in words(run("inspect", tmp_path / "out").stdout)

    def test_damaged_folder_is_refused(self, converted, tmp_path):
        (tmp_path / "t5.json").write_bytes((converted / "t5.json").read_bytes())
        assert "cannot be read" in refused("inspect", tmp_path)

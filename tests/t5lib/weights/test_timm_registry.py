"""Converted models under timm names of their own: registered whatever is imported first, and used like timm's."""

import subprocess
import sys

import pytest
import released
import timm
import torch
from safetensors.torch import save_file
from tiny import random_images

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.layers.attention import TTTAttention
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.weights import timm_registry

NAMES = sorted(
    f"t5_{base}{mark}"
    for base in ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_small_patch14_dinov2")
    for mark in ("", "+")
)
TINY = {"img_size": 48, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 7}
DEIT = "t5_deit_tiny_patch16_224"
FORMS = [DEIT, f"{DEIT}+", "t5_vit_small_patch14_dinov2", "t5_vit_small_patch14_dinov2+"]


def create(name=DEIT, **changes):
    torch.manual_seed(0)
    return timm.create_model(name, **(TINY | changes)).eval()


def images(size=48):
    return random_images(2, size, size)


class TestRegistration:
    def test_timm_knows_every_name(self):
        assert sorted(timm.list_models("t5_*")) == NAMES
        assert all(timm.is_model(name) for name in NAMES)
        assert sorted(timm.list_models(module="timm_registry")) == NAMES

    def test_the_import_of_the_module_registers_them_without_a_warning(self):
        code = "import t5lib, timm\nassert not timm.list_models('t5_*')\nimport t5lib.weights.timm_registry\n"
        self.run(code + f"assert timm.list_models('t5_*') == {NAMES}")

    def test_importing_t5lib_imports_neither_torch_nor_timm(self):
        self.run("import t5lib, sys\nassert not {'torch', 'timm', 'numpy'} & set(sys.modules)")

    def run(self, code):
        done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestModel:
    @pytest.mark.parametrize("name", FORMS)
    def test_is_the_base_model_converted(self, name):
        base, config = timm_registry.NAMES[name]
        model = create(name)
        assert model.t5_config == config_of(config) and len(ttt_layers(model)) == 2
        twin = t5lib.convert(create(base), config_of(config))
        assert model.state_dict().keys() == twin.state_dict().keys()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(model(images()), twin(images()))

    def test_has_the_sizes_and_the_preprocessing_of_the_base(self):
        for name in NAMES:
            base = timm_registry.NAMES[name][0]
            with torch.device("meta"):
                model, twin = timm.create_model(name), timm.create_model(base)
            shapes = {n: tuple(value.shape) for n, value in model.state_dict().items() if ".mixer." not in n}
            assert shapes == {n: tuple(value.shape) for n, value in twin.state_dict().items()}
            ours, theirs = (timm.data.resolve_model_data_config(m) for m in (model, twin))
            assert ours == theirs and model.num_classes == twin.num_classes
            assert model.pretrained_cfg["architecture"] == name

    def test_takes_what_timm_takes(self):
        model = create(dynamic_img_size=True, drop_path_rate=0.3, in_chans=1, global_pool="avg", class_token=False)
        assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
        assert model(random_images(2, 48, 64)[:, :1]).shape == (2, 7)
        model.reset_classifier(3)
        assert model(random_images(2, 40, 48)[:, :1]).shape == (2, 3)
        model.train()
        model(random_images(2, 48, 48)[:, :1]).sum().backward()
        assert model.blocks[0].attn.mixer.w1.grad.abs().sum() > 0

    def test_gives_features(self):
        features = create(features_only=True, out_indices=(0, 1))
        assert [tuple(map_.shape) for map_ in features(images())] == [(2, 24, 6, 6)] * 2
        assert any(isinstance(module, TTTAttention) for module in features.modules())

    def test_converts_back(self):
        softmax = t5lib.revert(create())
        base = create("deit_tiny_patch16_224")
        base.load_state_dict(softmax.state_dict())
        assert torch.equal(softmax(images()), base(images()))


class TestWeights:
    @pytest.mark.parametrize("name", FORMS)
    def test_timm_saves_and_loads_a_folder(self, name, tmp_path):
        model = create(name)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert loaded.t5_config == model.t5_config
        assert_same(loaded, model)

    @pytest.mark.parametrize("name", FORMS)
    def test_t5lib_saves_and_loads(self, name, tmp_path):
        model = create(name, dynamic_img_size=True)
        t5lib.save(model, tmp_path / "t5")
        assert_same(t5lib.load(tmp_path / "t5"), model)
        t5lib.save(t5lib.load(tmp_path / "t5"), tmp_path / "again")
        t5lib.save(t5lib.revert(model), tmp_path / "softmax")
        assert torch.equal(t5lib.load(tmp_path / "softmax")(images()), t5lib.revert(model)(images()))

    def test_loads_a_file_of_our_own(self, tmp_path):
        model = create()
        with torch.no_grad():
            model.head.weight.add_(1)
        save_file(model.state_dict(), tmp_path / "ours.safetensors")
        assert_same(create_from(tmp_path / "ours.safetensors"), model)
        torch.save({"state_dict": {f"module.{n}": v for n, v in model.state_dict().items()}}, tmp_path / "ours.pth")
        assert_same(create_from(tmp_path / "ours.pth"), model)

    def test_loads_a_file_of_the_released_code(self, tmp_path):
        state = {name: value.float() for name, value in released.vit_state(width=24, patch=8, hidden=96).items()}
        save_file(state, tmp_path / "released.safetensors")
        model = create_from(tmp_path / "released.safetensors")
        assert torch.allclose(model(images()), released.vit(state, images()), atol=1e-3, rtol=1e-3)
        assert_same(model, t5lib.load_released(tmp_path / "released.safetensors"))

    def test_another_number_of_classes_and_another_size_keep_the_rest(self, tmp_path):
        state = {name: value.float() for name, value in released.vit_state(width=24, patch=8, hidden=96).items()}
        save_file(state, tmp_path / "released.safetensors")
        model = create_from(tmp_path / "released.safetensors", num_classes=5, img_size=64)
        assert model(images(64)).shape == (2, 5) and model.pos_embed.shape == (1, 65, 24)
        assert torch.equal(model.blocks[1].attn.mixer.w2, state["blocks.1.attn.w2"].squeeze(0))

    @pytest.mark.parametrize("classes", [7, 5])
    def test_weights_that_do_not_fit_are_named(self, classes, tmp_path):
        state = create().state_dict()
        del state["blocks.1.attn.mixer.w3"]
        save_file(state | {"blocks.0.attn.w9": torch.ones(2)}, tmp_path / "wrong.safetensors")
        with pytest.raises(T5Error, match=r"missing \['blocks.1.attn.mixer.w3'\], unknown \['blocks.0.attn.w9'\]"):
            create_from(tmp_path / "wrong.safetensors", num_classes=classes)
        save_file(create("deit_tiny_patch16_224").state_dict(), tmp_path / "softmax.safetensors")
        with pytest.raises(T5Error, match=r"softmax model.*t5lib.convert\(timm.create_model\('deit_tiny_patch16_224'"):
            create_from(tmp_path / "softmax.safetensors", num_classes=classes)

    def test_there_are_no_pretrained_weights_to_download(self):
        with pytest.raises(RuntimeError, match="No pretrained weights exist"):
            create(pretrained=True)


def config_of(preset):
    return TTTConfig.preset(preset)


def create_from(path, **changes):
    return create(pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 7}, **changes)


def assert_same(loaded, model):
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert torch.allclose(loaded(images()), model(images()), atol=1e-5)

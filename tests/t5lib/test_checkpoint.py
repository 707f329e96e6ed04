"""A saved model loads bit for bit, whatever it is; what could not be loaded again is refused before it is written."""

import json
import os

import pytest
import timm
import torch
from timm.layers import Attention
from tiny import KINDS, random_images, tiny_vit
from torch import nn

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return random_images()


def assert_same(loaded: nn.Module, model: nn.Module, images: torch.Tensor) -> None:
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "softmax"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_are_bit_equal(kind, converted, images, tmp_path):
    model = t5lib.convert(tiny_vit(kind)) if converted else tiny_vit(kind)
    t5lib.save(model, tmp_path / "model")
    loaded = t5lib.load(tmp_path / "model")
    assert_same(loaded, model, images)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert str(loaded) == str(model)


def test_config_and_account_come_back(tmp_path):
    config = TTTConfig(inner="two_layer", inner_loss="residual", key_norm="layer", locality="none", layers=(1,), seed=3)
    model = t5lib.convert(tiny_vit(), config)
    t5lib.save(model, tmp_path)
    loaded = t5lib.load(tmp_path)
    assert loaded.t5_config == config and loaded.t5_report == model.t5_report
    described = json.loads((tmp_path / "t5.json").read_text())
    assert described["format"] == 1 and described["architecture"] == "vit_tiny_patch16_224"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "t5.json"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_precision_is_kept(dtype, images, tmp_path):
    model = t5lib.convert(tiny_vit()).to(dtype)
    t5lib.save(model, tmp_path)
    assert_same(t5lib.load(tmp_path), model, images.to(dtype))


def test_mixed_precision_is_kept(tmp_path):
    model = t5lib.convert(tiny_vit()).half()
    model.blocks[1].norm1.float()
    model.head.double()
    t5lib.save(model, tmp_path)
    loaded = t5lib.load(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("augreg", lambda model: model.reset_classifier(3)),
        ("augreg", lambda model: model.reset_classifier(0)),
        ("dinov2_registers", lambda model: model.reset_classifier(3, "avg")),
        ("siglip", lambda model: model.reset_classifier(3, "avg")),
        ("augreg", lambda model: model.set_input_size(img_size=(40, 24))),
        ("augreg", lambda model: model.set_input_size(img_size=(32, 32), patch_size=(16, 8))),
        ("augreg", lambda model: model.prune_intermediate_layers(1, prune_head=False)),
    ],
    ids=["head", "no head", "pooling", "pooling without attention", "image size", "patch size", "depth"],
)
def test_what_timm_changes_after_creation_is_kept(kind, change, tmp_path):
    model = tiny_vit(kind)
    change(model)
    model.eval()
    t5lib.save(t5lib.convert(model), tmp_path)
    images = random_images(2, *model.patch_embed.img_size)
    assert_same(t5lib.load(tmp_path), t5lib.convert(model), images)


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic_img_size": True},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"img_size": (40, 24)},
        {"patch_size": (8, 16)},
        {"in_chans": 1},
        {"mlp_ratio": 2.0, "init_values": 0.1, "no_embed_class": True, "reg_tokens": 3},
        {"act_layer": "relu", "norm_layer": "rmsnorm"},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"drop_path_rate": 0.1, "proj_drop_rate": 0.2},
        {"final_norm": False},
    ],
    ids=str,
)
def test_what_create_model_was_given_is_kept(options, tmp_path):
    model = t5lib.convert(tiny_vit(**options))
    t5lib.save(model, tmp_path)
    loaded = t5lib.load(tmp_path)
    height, width = (30, 41) if "dynamic_img_pad" in options else model.patch_embed.img_size
    images = random_images(2, height, width)[:, : model.patch_embed.proj.in_channels]
    assert_same(loaded, model, images)
    assert str(loaded) == str(model)


def test_a_convolutional_stem_is_kept(tmp_path):
    model = t5lib.convert(timm.create_model("vit_tiny_r_s16_p8_224", img_size=128, depth=1, num_classes=3).eval())
    t5lib.save(model, tmp_path)
    assert_same(t5lib.load(tmp_path), model, random_images(1, 128, 128))


def test_preprocessing_of_the_pretrained_weights_is_kept(tmp_path):
    """timm tells mean and deviation by the weights' tag, not by the architecture."""
    model = timm.create_model("vit_base_patch16_224.dino", depth=1, embed_dim=32, num_heads=2, num_classes=0)
    t5lib.save(model, tmp_path)
    ours, theirs = (timm.data.resolve_model_data_config(m) for m in (t5lib.load(tmp_path), model))
    assert ours == theirs and ours["mean"] != (0.5, 0.5, 0.5)


def test_a_loaded_model_trains_and_converts_back(images, tmp_path):
    model = tiny_vit()
    t5lib.save(t5lib.convert(model), tmp_path)
    loaded = t5lib.load(tmp_path)
    loaded(images).sum().backward()
    assert torch.equal(t5lib.revert(loaded)(images), model(images))


def test_load_leaves_the_global_random_state_alone(tmp_path):
    t5lib.save(t5lib.convert(tiny_vit()), tmp_path)
    before = torch.get_rng_state()
    t5lib.load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_its_description_does_not_rebuild_is_refused_by_name(tmp_path):
    model = tiny_vit()
    model.blocks[1].attn = Attention(32, 2, gated=True)
    for made in (model, t5lib.convert(model)):
        with pytest.raises(
            T5Error, match=r"do not fit the model as rebuilt .*unknown \['blocks\.1\.attn\.gate\.weight"
        ):
            t5lib.save(made, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_settings_that_json_cannot_hold_are_refused_by_name(tmp_path):
    model = tiny_vit(act_layer=nn.ReLU)
    with pytest.raises(T5Error, match="act_layer"):
        t5lib.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_timm_did_not_create_is_refused(tmp_path):
    model = timm.models.vision_transformer.VisionTransformer(depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(T5Error, match=r"was not made by timm.create_model"):
        t5lib.save(model, tmp_path / "model")


def test_saving_again_replaces_the_model(images, tmp_path):
    t5lib.save(t5lib.convert(tiny_vit()), tmp_path / "model")
    t5lib.save(tiny_vit(seed=1), tmp_path / "model")
    assert torch.equal(t5lib.load(tmp_path / "model")(images), tiny_vit(seed=1)(images))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_never_deletes_what_is_no_saved_model(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(T5Error, match=r"not a saved model.*pass a new folder"):
            t5lib.save(tiny_vit(), place)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/model.safetensors").write_text("of somebody else's model")
    with pytest.raises(T5Error, match=r"not a saved model.*pass a new folder"):
        t5lib.save(tiny_vit(), tmp_path / "downloads")
    (tmp_path / "t5.json").write_text("notes of mine")
    with pytest.raises(T5Error, match=r"not a saved model.*pass a new folder"):
        t5lib.save(tiny_vit(), tmp_path)
    t5lib.save(tiny_vit(), tmp_path / "model")
    (tmp_path / "model/README.md").write_text("about it")
    with pytest.raises(T5Error, match=r"holds README\.md besides a saved model; move it away, or pass a new folder"):
        t5lib.save(tiny_vit(), tmp_path / "model")
    kept = [file.read_text() for file in (tmp_path / "thesis.tex", tmp_path / "t5.json", tmp_path / "model/README.md")]
    assert kept == ["years of work", "notes of mine", "about it"]


@pytest.mark.parametrize("place", ["", " ", 3, None, b"out", "a\0b"], ids=repr)
def test_what_names_no_place_is_refused(place):
    for call in (lambda: t5lib.save(tiny_vit(), place), lambda: t5lib.load(place)):
        with pytest.raises(T5Error, match="names no file or folder; expected a path"):
            call()


def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "file/model", tmp_path / "loop", tmp_path / ("x" * 300), "/proc/model"):
        with pytest.raises(T5Error, match=r"cannot be written .*name another place"):
            t5lib.save(tiny_vit(), place)
    monkeypatch.setattr(os, "fsync", lambda _: os.close(-1))
    with pytest.raises(T5Error, match="cannot be written"):
        t5lib.save(tiny_vit(), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_nothing_is_saved_inside_of_another_model(tmp_path):
    t5lib.save(tiny_vit(), tmp_path / "model")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/model_index.json").write_text("{}")
    for place in ("model/inner", "model/deep/inner", "pipe/transformer"):
        with pytest.raises(T5Error, match=r"is inside .*/(model|pipe), which holds a model and nothing else"):
            t5lib.save(tiny_vit(), tmp_path / place)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["model.safetensors", "model_index.json", "t5.json"]


def test_saving_through_a_link_replaces_what_it_leads_to(images, tmp_path):
    t5lib.save(tiny_vit(), tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    t5lib.save(tiny_vit(seed=1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(t5lib.load(tmp_path / "model")(images), tiny_vit(seed=1)(images))


class Doubled(timm.models.vision_transformer.VisionTransformer):
    def forward(self, x):
        return 2 * super().forward(x)


def of_another_class(model):
    model.__class__ = Doubled


def of_another_norm(model):
    class Norm(type(model.norm)):
        pass

    model.norm.__class__ = Norm


def hooked(model):
    model.norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def patched(model):
    model.blocks[1].forward = lambda x: x


def of_another_gelu(model):
    model.blocks[1].mlp.act.approximate = "tanh"


def not_finite(model):
    with torch.no_grad():
        model.blocks[1].norm1.weight[3] = torch.inf


NOT_SAVED = {
    "subclass": (of_another_class, "the model is a Doubled, not a VisionTransformer: .* take the change out first"),
    "other part": (of_another_norm, "norm is a Norm, not a LayerNorm"),
    "eps": (lambda model: setattr(model.blocks[0].norm1, "eps", 0.1), r"blocks\.0\.norm1\.eps is 0\.1, not 1e-06: "),
    "GELU": (of_another_gelu, "approximate is 'tanh', not 'none'"),
    "another part": (lambda model: model.head.add_module("more", nn.Tanh()), r"head\.more was added"),
    "forward": (patched, r"blocks\.1 has a forward of its own in place of its class's"),
    "hook": (hooked, r"norm calls a hook \(hooked.*lambda>\).*its handle's remove\(\)"),
    "pre hook": (lambda model: model.head.register_forward_pre_hook(nn.Tanh()), r"head calls a hook \(Tanh\)"),
    "not finite": (not_finite, r"not finite, in 1 weights: blocks\.1\.norm1\.weight \(1 of 32\); take an earlier"),
    "meta": (lambda model: model.to("meta"), "cls_token, .* are on the meta device and have no values"),
    "tied": (
        lambda model: setattr(model.blocks[1].mlp, "fc1", model.blocks[0].mlp.fc1),
        r"blocks\.0\.mlp\.fc1\.weight and blocks\.1\.mlp\.fc1\.weight are one parameter",
    ),
}


@pytest.mark.parametrize(("change", "message"), NOT_SAVED.values(), ids=NOT_SAVED)
@pytest.mark.parametrize("made", [lambda: tiny_vit(), lambda: t5lib.convert(tiny_vit())], ids=["softmax", "converted"])
def test_what_would_come_back_as_something_else_is_not_saved(made, change, message, tmp_path):
    model = made()
    change(model)
    with pytest.raises(T5Error, match=message):
        t5lib.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [TTTConfig(key_norm="rms"), TTTConfig(seed=1), None, "t5+"], ids=str)
def test_a_config_that_the_layers_were_not_made_of_is_not_saved(config, tmp_path):
    model = t5lib.convert(tiny_vit())
    model.t5_config = config
    with pytest.raises(T5Error, match=r"mixer|expected settings, a TTTConfig"):
        t5lib.save(model, tmp_path / "model")


def test_what_changes_no_output_is_saved(images, tmp_path):
    """Modes, how the same is computed, and what nothing reads."""
    model = t5lib.convert(tiny_vit())
    model.train().set_grad_checkpointing()
    model.notes = ["mine"]
    model.head.weight.requires_grad_(False)
    t5lib.save(model, tmp_path)
    assert torch.equal(t5lib.load(tmp_path)(images), t5lib.convert(tiny_vit())(images))

"""Checkpoints in the released naming come in as our models, and compute what the released model computes."""

import argparse
import pickle

import numpy as np
import pytest
import released
import torch
from parity import CASES, grid_of
from parity import build as build_layer
from safetensors.torch import save_file
from tiny import tiny_vit

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.weights import released as released_checkpoints
from t5lib.weights import released_vit, state_dicts

NAT5 = TTTConfig.preset("t5+")
VARIANTS = {
    "swiglu": ({}, {}, None),
    "two_layer": ({"inner": 2, "conv": False}, {}, None),
    "residual": ({"inner": 2}, {"residual": True}, TTTConfig(inner="two_layer", inner_loss="residual")),
    "nat5": ({}, {"window": 5}, NAT5),
}


def images(height=24, width=24) -> torch.Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a state dict, the way its file name and `wrap` say."""

    def write(state, name="model.safetensors", wrap=lambda weights: weights):
        path = tmp_path / name
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(wrap(state), path)
        return path

    return write


@pytest.mark.parametrize(("shapes", "options", "config"), VARIANTS.values(), ids=VARIANTS)
def test_a_full_model_gives_the_released_outputs_and_gradients(shapes, options, config, checkpoint):
    state = released.vit_state(**shapes)
    model = t5lib.load_released(checkpoint(state), config=config)
    parameters = {name: value.clone().requires_grad_() for name, value in state.items()}
    expected = released.vit(parameters, images(), **options)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (expected * weight).sum().backward()

    out = model(images())
    (out * weight).sum().backward()
    assert not model.training and relative_error(out, expected) < 1e-10
    theirs = released_vit.to_ours({name: value.grad for name, value in parameters.items()})
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():  # 0 for the last layer's queries of patches: the head sees the class token
        assert (ours[name].grad - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_the_configuration_is_told_by_the_weights(checkpoint):
    model = t5lib.load_released(checkpoint(released.vit_state()))
    assert model.t5_config == TTTConfig() and len(model.blocks) == 2 and model.blocks[0].attn.num_heads == 3
    assert (model.num_classes, model.patch_embed.img_size, model.patch_embed.patch_size) == (7, (24, 24), (4, 4))
    plain = t5lib.load_released(checkpoint(released.vit_state(inner=2, conv=False)))
    assert plain.t5_config == TTTConfig(inner="two_layer", locality="none")


def test_other_layouts_are_told_by_the_weights(checkpoint):
    """No head, no class token, no qkv bias, layer scale, non-square images, softmax in some layers."""
    state = released.vit_state(grid=(4, 6))
    flat = state | {"pos_embed": state["pos_embed"][:, 1:]}
    del flat["cls_token"], flat["head.weight"], flat["head.bias"]
    for name in [n for n in flat if n.startswith("blocks.1.attn.") and n.split(".")[3] in state_dicts.RELEASED]:
        del flat[name]
    for index in range(2):
        del flat[f"blocks.{index}.attn.qkv.bias"]
        flat |= {f"blocks.{index}.ls{n}.gamma": torch.ones(24, dtype=torch.float64) for n in (1, 2)}
    with pytest.raises(T5Error, match=r"24 positions with 0 prefix tokens .*pass the img_size"):
        t5lib.load_released(checkpoint(flat))
    model = t5lib.load_released(checkpoint(flat), img_size=(16, 24))
    assert model.t5_config.layers == (0,) and model.num_classes == 0 and model.cls_token is None
    assert model(images(16, 24)).shape == (2, 24)
    rows = t5lib.load_released(checkpoint(state), img_size=(16, 24))
    assert relative_error(rows(images(16, 24)), released.vit(state, images(16, 24))) < 1e-10


def test_loading_saving_and_back(checkpoint, tmp_path):
    state = released.vit_state()
    model = t5lib.load_released(checkpoint(state))
    back = released_vit.state_dict(model)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    t5lib.save(model, tmp_path / "saved")
    loaded = t5lib.load(tmp_path / "saved")
    assert loaded.t5_config == model.t5_config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert relative_error(loaded(images()), model(images())) < 1e-12
    assert t5lib.revert(model)(images()).shape == (2, 7)
    ours = t5lib.convert(tiny_vit())
    again = t5lib.load_released(checkpoint(released_vit.state_dict(ours)))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_what_the_released_code_has_no_name_for_is_refused():
    with pytest.raises(T5Error, match=r"no name for \['blocks\.0\.attn\.mixer\.x_conv"):
        released_vit.state_dict(t5lib.convert(tiny_vit(), TTTConfig(locality="cpe")))


def training_state(weights):
    """As a training script writes it; the moving average differs from the weights."""
    average = {name: value + 1 for name, value in weights.items()}
    options = argparse.Namespace(model="t5_tiny", lr=1e-3)
    return {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "model_ema": average, "args": options}


CONTAINERS = {
    "model.pt": (lambda w: w, "", 0),
    "model.pth": (lambda w: {"model": w, "epoch": 3}, "model of ", 0),
    "model.bin": (
        lambda w: {"state_dict": {f"module.{name}": value for name, value in w.items()}},
        "state_dict of ",
        0,
    ),
    "average.pth": (training_state, "model_ema of ", 1),
    "dit.pt": (lambda w: {"model": w, "ema": {n: v + 1 for n, v in w.items()}, "opt": {}}, "ema of ", 1),
    "nested.pt": (
        lambda w: {"model": {"state_dict": {f"_orig_mod.{n}": v for n, v in w.items()}}},
        "model.state_dict",
        0,
    ),
}


@pytest.mark.parametrize(("name", "kept"), CONTAINERS.items(), ids=CONTAINERS)
def test_every_container_opens_and_says_what_was_taken(name, kept, checkpoint):
    wrap, told, added = kept
    state, path = released.vit_state(depth=1), checkpoint(released.vit_state(depth=1), name, wrap)
    model = t5lib.load_released(path)
    assert torch.equal(model.norm.bias, state["norm.bias"] + added)
    assert model.t5_source.startswith(told) and str(path) in model.t5_source


def test_either_of_two_sets_of_weights_can_be_had(checkpoint):
    state = released.vit_state(depth=1)
    path = checkpoint(state, "two.pth", training_state)
    assert torch.equal(t5lib.load_released(path, which="model").norm.bias, state["norm.bias"])
    assert torch.equal(t5lib.load_released(path, which="ema").norm.bias, state["norm.bias"] + 1)
    assert t5lib.load_released(checkpoint(state), which="model") is not None
    with pytest.raises(T5Error, match=r"has no entry \('model_ema'.*leave which out"):
        t5lib.load_released(checkpoint(state), which="ema")
    with pytest.raises(T5Error, match="which is 'best'; expected 'ema', 'model'"):
        t5lib.load_released(path, which="best")


def without(*names):
    return lambda state: {name: value for name, value in state.items() if name not in names}


REFUSED = {
    "missing": (without("norm.bias"), r"missing \['norm.bias'\], unknown \[\]"),
    "unknown": (lambda s: s | {"blocks.0.attn.rope.freqs": torch.ones(3)}, r"unknown \['blocks.0.attn.rope.freqs'\]"),
    "shape": (lambda s: s | {"norm.bias": torch.ones(5)}, r"other shapes \['norm.bias \(5,\) for \(24,\)'\]"),
    "heads": (
        lambda s: s | {"blocks.0.attn.w1": torch.ones(3, 8, 8)},
        r"blocks.0.attn.w1 \(3, 8, 8\)'\]; expected \(1, H, D, D\)",
    ),
    "softmax": (lambda s: {n: v for n, v in s.items() if "attn.w" not in n}, "softmax model.*t5lib.convert"),
    "one convolution": (lambda s: {n: v for n, v in s.items() if "k_conv2d" not in n}, "q_conv2d and k_conv2d both or"),
    "uneven": (without("blocks.1.attn.w3"), "not the same in blocks 0 and 1"),
    "other model": (lambda s: {"conv1.weight": torch.ones(3)}, r"not a released ViT: .*found \['conv1.weight'\]"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_weights_that_do_not_fit_are_named(change, message, checkpoint):
    with pytest.raises(T5Error, match=message):
        t5lib.load_released(checkpoint(change(released.vit_state())))


def test_a_configuration_that_has_other_weights_is_refused(checkpoint):
    with pytest.raises(T5Error, match=r"unknown \['blocks.0.attn.mixer.w3'"):
        t5lib.load_released(checkpoint(released.vit_state()), config=TTTConfig(inner="two_layer"))


def test_a_dit_without_diffusers_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setattr(released_checkpoints, "find_spec", lambda name: None)
    with pytest.raises(T5Error, match="is a DiT5, which is loaded as a model of diffusers; install"):
        t5lib.load_released(checkpoint({"x_embedder.proj.weight": torch.ones(4, 4, 2, 2)}))


def test_files_that_cannot_be_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))
    torch.save({"model": Trap()}, tmp_path / "trap2.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    for name, message in {
        "trap.pth": "could run code",
        "trap2.pth": "could run code",
        "cut.safetensors": "cannot be read",
        "list.pt": "holds a list",
        "empty.pt": r"holds no weights; found \['epoch'\]",
        "none.pt": "does not exist",
        ".": r"nor an index of shards, only cut\.safetensors",
    }.items():
        with pytest.raises(T5Error, match=message):
            t5lib.load_released(tmp_path / name)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_key_map_fits_the_released_layers(path):
    """The parity cases of single layers, their parameters loaded under the names that a full model would have."""
    case = {name: torch.from_numpy(value) for name, value in np.load(path).items() if name != "num_heads"}
    layer = build_layer(case, int(np.load(path)["num_heads"]), residual="residual" in path.stem)
    theirs = {f"blocks.0.attn.{name[len('param.') :]}": v for name, v in case.items() if name.startswith("param.")}
    layer.load_state_dict({name.removeprefix("blocks.0.attn."): v for name, v in released_vit.to_ours(theirs).items()})
    assert relative_error(layer(case["x"], grid=grid_of(case["x"])), case["out"]) < 1e-10

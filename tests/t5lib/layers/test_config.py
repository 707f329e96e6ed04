"""Presets, layer maps and localities: what a setting stands for, and what is refused with which remedy."""

import dataclasses

import pytest

from t5lib.layers.config import INNERS, LOCALITIES, PRESETS, TTTConfig
from t5lib.layers.layer_map import format_layers, parse_layers
from t5lib.utils.config import from_dict, to_dict
from t5lib.utils.errors import T5Error


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_plain_settings_with_changes(name):
    config = TTTConfig.preset(name, seed=3)
    assert config.seed == 3
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]
    assert from_dict(TTTConfig, {"preset": name, "seed": 3}, "here") == config
    assert from_dict(TTTConfig, to_dict(config), "here") == config


def test_a_setting_beside_a_preset_wins():
    assert from_dict(TTTConfig, {"preset": "t5+", "locality": "none"}, "here").locality == "none"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["swiglu"] * 6),
        ((1, 4), [None, "swiglu", None, None, "swiglu", None]),
        ({"0-2": "softmax", "3-5": "swiglu"}, [None, None, None, "swiglu", "swiglu", "swiglu"]),
        ({"0,2": "two_layer"}, ["two_layer", None, "two_layer", None, None, None]),
        ({"0": "hedgehog", "5": "dit5"}, ["hedgehog", None, None, None, None, "two_layer"]),
    ],
    ids=str,
)
def test_what_every_layer_becomes(layers, expected):
    found = TTTConfig(layers=layers).of_layers(6)
    assert [layer and layer.inner for layer in found] == expected
    assert all(layer is None or layer.layers is None for layer in found)


def test_a_map_takes_other_settings_from_the_config_and_those_of_a_preset_from_the_preset():
    config = TTTConfig(key_norm="rms", locality="none", layers={"0": "two_layer+nat3", "1": "t5+", "2": "lit+nat5"})
    first, second, third = config.of_layers(3)
    assert (first.inner, first.key_norm, first.locality) == ("two_layer", "rms", "none+nat3")
    assert (second.inner, second.key_norm, second.locality) == ("swiglu", "instance", "dwc_qk+nat5")
    assert (third.inner, third.locality, third.inherit) == ("relu_linear", "dwc_v+nat5", "mlp")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0": "swigloo"}, "did you mean 'swiglu'"),
        ({"0": "swiglu+nat7"}, "neighborhood 'nat7'"),
        ({"0": "t5++nat3"}, r"neighborhood '\+nat3' is unknown; expected one of nat3, nat5"),
        ({"0": "softmax+nat3", "1": "swiglu"}, "softmax attention takes no neighborhood; write 'softmax'"),
        ({"0": "swiglu+"}, "neighborhood '' is unknown; expected one of nat3, nat5"),
        ({"0": 3}, "layers.0: expected str, got 3"),
        ({"0": None}, "layers.0: expected str, got None"),
        ("0-5=softmax", r"is text; write indices, \[0, 1\], or a map"),
        (3, "layers: expected a list, got 3"),
        ({"0-1": "softmax"}, "nothing to convert"),
        ({"0-6": "swiglu"}, "expected different indices from 0 to 5"),
        ({"0-2": "swiglu", "2": "softmax"}, "expected different indices"),
        ({"last": "swiglu"}, "not understood at 'last'"),
        ({"3-1": "swiglu"}, "not understood at '3-1'"),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_meant_is_refused(layers, message):
    with pytest.raises(T5Error, match=message):
        TTTConfig(layers=layers).of_layers(6)


def test_a_preset_in_a_map_is_whole_whatever_the_config_is():
    """A map of rivals must not make its neighbours throw weights away."""
    for base in (TTTConfig.preset("lit"), TTTConfig.preset("dit5")):
        assert base.named("t5") == dataclasses.replace(TTTConfig.preset("t5"), layers=None)


def test_lists_and_numbers_do_as_well():
    assert TTTConfig(layers=[0, 2]) == TTTConfig(layers=(0, 2))
    assert TTTConfig(layers={0: "swiglu"}) == TTTConfig(layers={"0": "swiglu"})


def test_yaml_keys_may_be_numbers():
    assert from_dict(TTTConfig, {"layers": {0: "swiglu", "1-2": "softmax"}}, "here").of_layers(3)[0].inner == "swiglu"


@pytest.mark.parametrize("locality", LOCALITIES)
def test_a_locality_is_a_convolution_and_a_window(locality):
    config = TTTConfig(locality=locality)
    base, _, nat = locality.partition("+")
    assert (config.convolution, config.window) == (base, {"": None, "nat3": 3, "nat5": 5}[nat])


@pytest.mark.parametrize("typed", ["0-5,8", "0-5=softmax,6-11=swiglu+nat5", "0,2=two_layer,5=softmax"])
def test_layers_as_typed(typed):
    expected = {
        "0-5,8": (0, 1, 2, 3, 4, 5, 8),
        "0-5=softmax,6-11=swiglu+nat5": {"0-5": "softmax", "6-11": "swiglu+nat5"},
        "0,2=two_layer,5=softmax": {"0,2": "two_layer", "5": "softmax"},
    }
    assert parse_layers(typed) == expected[typed]


def test_equal_neighbours_share_an_entry():
    kinds = ["softmax"] * 6 + ["swiglu"] + ["softmax"] * 2
    assert format_layers(kinds) == {"0-5": "softmax", "6": "swiglu", "7-8": "softmax"}
    expected = [None] * 6 + ["swiglu"] + [None] * 2
    assert [c and c.inner for c in TTTConfig(layers=format_layers(kinds)).of_layers(9)] == expected


@pytest.mark.parametrize("setting", [{"radius": 0.5}, {"inherit": "mpl"}, {"inner": "hedgehogs"}], ids=str)
def test_other_settings_are_checked(setting):
    with pytest.raises(T5Error, match=next(iter(setting))):
        TTTConfig(**setting)


def test_every_inner_model_can_be_set():
    assert {TTTConfig(inner=inner).inner for inner in INNERS} == set(INNERS)

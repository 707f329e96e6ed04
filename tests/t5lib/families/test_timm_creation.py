"""Arguments of timm's models come from files; every odd one is told by name, and none of them loads anything."""

import pytest
import torch
from tiny import KINDS, SMALL

from t5lib.families.timm_creation import create
from t5lib.families.timm_vit import ADAPTER
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.weights import timm_vit

NAME = KINDS["augreg"][0]
ODD = [
    ({"checkpoint_path": "weights.pth"}, "checkpoint_path: no model takes this argument"),
    (
        {"pretrained": True, "pretrained_cfg": {"file": "x"}},
        "pretrained, pretrained_cfg: no model takes this argument",
    ),
    (
        {"pretrained_cfg_overlay": {"file": "x"}, "cache_dir": "x"},
        "cache_dir, pretrained_cfg_overlay: no model takes this argument",
    ),
    ({"features_only": True}, "features_only makes timm wrap the model"),
    ({"img_size": [84]}, r"timm's vit_tiny_patch16_224: model_args\.img_size\.1: expected more values, got \(84,\)"),
    ({"img_size": (0, 0)}, r"img_size\.0 is 0; expected 1 or more"),
    ({"img_size": [32] * 3}, "img_size: expected .* at most 2 items"),
    ({"img_size": "32"}, "img_size: expected int, got '32'"),
    ({"img_size": 4}, r"img_size \(4, 4\) holds no patch of \(8, 8\)"),
    ({"patch_size": 0}, "patch_size is 0; expected 1 or more"),
    ({"patch_size": 8.0}, "patch_size: expected int, got 8.0"),
    ({"num_classes": -1}, "num_classes is -1; expected 0 or more"),
    ({"in_chans": 0}, "in_chans is 0"),
    ({"depth": 0}, "depth is 0"),
    ({"num_heads": -2}, "num_heads is -2"),
    (
        {"num_heads": 3},
        "cannot be made .* dim should be divisible by num_heads; correct these model_args",
    ),
    ({"drop_path_rate": -1}, "drop_path_rate is -1; expected 0 or more"),
    ({"norm_layer": "nope"}, "cannot be made with .*KeyError: 'nope'"),
    ({"imgsize": 32}, "cannot be made with .*unexpected keyword argument 'imgsize'"),
    ({1: 2}, "cannot be made with .*keywords must be strings"),
]


@pytest.mark.parametrize(("arguments", "message"), ODD, ids=str)
def test_odd_arguments_are_told_by_name_wherever_a_model_is_made(arguments, message):
    arguments = SMALL | arguments
    for make in (
        lambda: ADAPTER.build(NAME, arguments, TTTConfig()),
        lambda: ADAPTER.skeleton(NAME, arguments, None),
        lambda: timm_vit.build({}, NAME, arguments),
    ):
        with pytest.raises(T5Error, match=message):
            make()


@pytest.mark.parametrize("name", ["vit_tinny", "hf-hub:timm/vit", "local-dir:weights", ""])
def test_names_that_timm_does_not_know_itself_are_refused(name):
    with pytest.raises(T5Error, match=f"has no architecture '{name}'"):
        create(name, {})


def test_arguments_that_change_nothing_may_stay():
    with torch.device("meta"):
        model = create(
            NAME, SMALL | {"img_size": [32, 48], "patch_size": None, "scriptable": True, "out_indices": (0,)}
        )
    assert model.patch_embed.grid_size == (2, 3)

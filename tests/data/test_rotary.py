"""The study of where the rotation belongs."""

import importlib.util
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import t5lib
from t5lib.layers import attention, factory
from t5lib.utils.files import read_json

FILE = Path(__file__).parents[2] / "data/rotary/study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_rotary", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(study):
    return study.Settings(side=16, width=32, depth=2, heads=2, epochs=1, batch=16, calibrate=2, images=32)


@torch.no_grad()
def test_the_first_order_is_what_t5lib_does(study, settings):
    source, images = study.build(settings).eval(), torch.randn(2, 1, 16, 16)
    for block in source.blocks:
        block.attn.qkv.weight.mul_(30)  # keys far apart: fresh ones are nearly one
    outputs = []
    for kind in study.ORDERS.values():
        kind.rope = source.rope.get_embed(shape=[4, 4])
        with patch.object(factory, "TTTMixer", kind), patch.object(attention, "rotated", lambda x, *_: x):
            outputs.append(t5lib.convert(source).forward_features(images))
    torch.testing.assert_close(outputs[0], t5lib.convert(source).forward_features(images))
    assert all(not torch.allclose(other, outputs[0], atol=1e-4) for other in outputs[1:])


def test_every_order_is_measured_and_the_table_has_a_row_for_each(study, settings, tmp_path):
    held_out = study.read_images("val", settings.side)
    few = {"train": held_out, "val": tuple(each[::50] for each in held_out)}
    with patch.object(study, "read_images", lambda split, side: few[split]):
        found = study.run(settings, [0, 1], tmp_path / "found.json")
    assert read_json(tmp_path / "found.json") == found
    assert found["seeds"]["0"].keys() == {"softmax", "softmax without positions", *study.ORDERS}
    assert all(f"\n| {name} | " in study.table(found) for name in study.ORDERS)

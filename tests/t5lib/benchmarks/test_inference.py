"""The speed table of a large denoiser compares like with like, and goes on where it stopped."""

import pytest
import torch

from t5lib.benchmarks import inference
from t5lib.benchmarks.timing import TimingConfig
from t5lib.conversion import ttt_layers
from t5lib.families.sd3 import MEDIUM
from t5lib.layers.grid import TokenGrid
from t5lib.utils.files import read_json

CPU = torch.device("cpu")
SHAPE = {**MEDIUM, "num_layers": 6, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}
SHAPE |= {"caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8, "sample_size": 8}
SHAPE |= {"dual_attention_layers": (0, 1, 2)}


@pytest.fixture
def told(tmp_path):
    config = TimingConfig(batch=2, dtype="float32", repeats=2)
    return {"out": tmp_path / "inference.json", "device": CPU, "shape": SHAPE, "config": config}


def test_models_share_weights_and_differ_in_their_layers():
    found = inference.models(SHAPE, CPU, torch.float32)
    assert {name: len(ttt_layers(model)) for name, model in found.items()} == {
        "softmax": 0,
        "paper": 8,  # three image-only attentions and the last five joint ones
        "all": 9,
        "rest": 9,
    }
    weights = found["softmax"].state_dict()
    for model in found.values():
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if name in weights)


def test_rest_uses_every_projection_and_mixes_nothing():
    model = inference.models(SHAPE, CPU, torch.float32)["rest"]
    layer = next(iter(ttt_layers(model).values()))
    x = torch.randn(1, 4, 16)
    grid = TokenGrid(2, 2)
    out, text = layer(x, torch.randn(1, 3, 16), grid=grid)
    moved = layer(x.flip(1), torch.randn(1, 3, 16), grid=grid)[0]
    torch.testing.assert_close(moved.flip(1), out)
    assert text.shape == (1, 3, 16)


def test_every_size_is_written_once_and_goes_into_the_table(told):
    result = inference.run(resolutions=[32], **told)
    assert read_json(told["out"]) == result
    again = inference.run(resolutions=[32, 64], **told)
    assert again["rows"][:4] == result["rows"]
    assert [row["resolution"] for row in again["rows"]] == [32] * 4 + [64] * 4
    assert all(row["relative_error"] < 1e-4 for row in again["rows"])
    assert [row["speedup"] for row in again["rows"] if row["model"] == "softmax"] == [1.0, 1.0]
    assert inference.report(again).count("\n") == 9
    other = inference.run(resolutions=[32], **told | {"shape": SHAPE | {"num_layers": 5}})
    assert len(other["rows"]) == 4, "of another shape nothing is kept"


def test_fewer_blocks_are_the_first_ones():
    assert inference.shallower(24) == MEDIUM
    assert inference.shallower(4) == MEDIUM | {"num_layers": 4, "dual_attention_layers": (0, 1, 2, 3)}

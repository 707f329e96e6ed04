"""The speed table of a large denoiser compares like with like, and goes on where it stopped."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t5lib.benchmarks import inference
from t5lib.benchmarks.shapes import SHAPES
from t5lib.benchmarks.timing import TimingConfig
from t5lib.conversion import ttt_layers
from t5lib.families.inputs import ExampleSize, placed
from t5lib.families.sd3 import MEDIUM
from t5lib.layers.grid import TokenGrid
from t5lib.utils.files import read_json

CPU = torch.device("cpu")
TINY = {**MEDIUM, "num_layers": 6, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}
TINY |= {"caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8, "sample_size": 8}
TINY |= {"dual_attention_layers": (0, 1, 2)}
SHAPE = replace(SHAPES["sd35-medium"], arguments=TINY)


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


class CopiesFromTheCPU(TorchDispatchMode):
    """Collects the operators that take values of the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = [
            {t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in ((args, kwargs), out)
        ]
        if "cpu" in devices[0] and "meta" in devices[1]:
            self.found.append(func.name())
        return out


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", [1024, 768])
def test_a_pass_takes_nothing_from_the_cpu_so_that_a_cuda_graph_can_record_it(monkeypatch, name, side):
    for maker in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
        where = torch.Tensor if maker is torch.Tensor.new_tensor else torch
        monkeypatch.setattr(where, maker.__name__, lambda *_, **__: pytest.fail("a list becomes a tensor"))
    shape = SHAPES[name].shallower(1)
    device, dtype = torch.device("meta"), torch.bfloat16
    model = shape.make(device, dtype)
    inputs = shape.family.example_inputs(model, ExampleSize(side, shape.batch, text_tokens=shape.text_tokens))
    inputs = placed(inputs, device, dtype)
    with torch.inference_mode():
        shape.family.call(model, inputs)  # what is kept from the first pass is made in it
        with CopiesFromTheCPU() as copies:
            shape.family.call(model, inputs)
    assert not copies.found


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
    told["shape"] = SHAPE.shallower(2)
    result = inference.run(resolutions=[32], **told)
    assert read_json(told["out"]) == result
    again = inference.run(resolutions=[32, 64], **told)
    assert again["rows"][:4] == result["rows"]
    assert [row["resolution"] for row in again["rows"]] == [32] * 4 + [64] * 4
    assert all(row["relative_error"] < 1e-4 for row in again["rows"])
    assert [row["speedup"] for row in again["rows"] if row["model"] == "softmax"] == [1.0, 1.0]
    assert inference.report(again).count("\n") == 9
    other = inference.run(resolutions=[32], **told | {"shape": SHAPE.shallower(1)})
    assert len(other["rows"]) == 4, "of another shape nothing is kept"


def test_some_models_can_be_timed_beside_softmax_alone(told):
    result = inference.run(resolutions=[32], **told | {"shape": SHAPE.shallower(1)}, names=["all"])
    assert [row["model"] for row in result["rows"]] == ["softmax", "all"]
    assert "| all |" in inference.report(result)


SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
ROTARY = SMALL | {"in_channels": 16, "axes_dims_rope": (2, 2, 4), "joint_attention_dim": 12}
OTHERS = {
    "flux-dev": ROTARY | {"guidance_embeds": True, "num_single_layers": 1, "pooled_projection_dim": 10},
    "pixart-sigma-1024": SMALL | {"cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8},
    "qwen-image": ROTARY | {"out_channels": 4},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_denoisers_are_timed_too_without_the_papers_layers(name, told):
    shape = replace(SHAPES[name], arguments=OTHERS[name], text_tokens=3)
    result = inference.run(resolutions=[32], **told | {"shape": shape})
    assert [row["model"] for row in result["rows"]] == ["softmax", "all", "rest"]
    assert all(row["relative_error"] < 1e-4 and row["target"] is None for row in result["rows"])


def test_fewer_blocks_are_the_first_ones():
    medium = SHAPES["sd35-medium"]
    assert medium.shallower(24) == medium
    assert medium.shallower(4).arguments == MEDIUM | {"num_layers": 4, "dual_attention_layers": (0, 1, 2, 3)}
    assert SHAPES["flux-dev"].shallower(3).arguments == {
        "guidance_embeds": True,
        "num_layers": 3,
        "num_single_layers": 6,
    }


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("sd35-medium", 2_243_171_520),
        ("flux-dev", 11_901_408_320),
        ("pixart-sigma-1024", 610_856_096),
        ("qwen-image", 20_430_401_088),
    ],
)
def test_shapes_are_those_of_the_published_models(name, numbers):
    model = SHAPES[name].make(torch.device("meta"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

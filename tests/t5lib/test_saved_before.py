"""Models and pipelines that version 0.1 saved load, and give the same outputs.

On the machine that made them the outputs are equal to the last bit; another processor rounds in another order.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import t5lib
from t5lib.conversion import ttt_layers

SAVED = Path(__file__).parents[1] / "data/saved"
ROUNDING = 3e-6


def expected(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors = load_file(SAVED / f"{name}-output.safetensors")
    return tensors, tensors.pop("output")


@torch.no_grad()
def test_a_saved_model_gives_what_it_gave():
    inputs, output = expected("vit")
    model = t5lib.load(SAVED / "vit")
    assert [layer.mixer.config.locality for layer in ttt_layers(model).values()] == ["dwc_qk", "dwc_qk+nat3"]
    assert (model(inputs["inputs"]) - output).norm() < ROUNDING * output.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_a_saved_pipeline_gives_what_it_gave(name):
    inputs, output = expected(name)
    pipe = t5lib.load_pipeline(SAVED / f"{name}-pipeline")
    assert ttt_layers(pipe.transformer)
    given = pipe.transformer(**inputs, return_dict=False)[0]
    assert (given - output).norm() < ROUNDING * output.norm()

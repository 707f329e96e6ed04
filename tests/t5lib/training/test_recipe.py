"""What a recipe leaves open follows from the device and from how long the training is."""

import pytest
import torch

from t5lib.training import recipe
from t5lib.training.alignment import AlignConfig
from t5lib.training.denoiser import DenoiserTrainConfig
from t5lib.training.recipe import COMPILING_PAYS, to_compile
from t5lib.utils.errors import T5Error

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("setting", "device", "steps", "alone", "compiled"),
    [
        (None, CUDA, COMPILING_PAYS, True, True),
        (None, CUDA, COMPILING_PAYS - 1, True, False),
        (None, CUDA, COMPILING_PAYS, False, False),
        (None, CPU, COMPILING_PAYS, True, False),
        (True, CPU, 1, False, True),
        (False, CUDA, COMPILING_PAYS, True, False),
    ],
)
def test_a_fit_is_compiled_as_it_says_or_where_that_pays(setting, device, steps, alone, compiled, monkeypatch):
    monkeypatch.setattr(recipe, "can_compile", lambda device: device.type == "cuda")
    monkeypatch.setattr(recipe.processes, "alone", lambda: alone)
    assert to_compile(setting, device, steps) is compiled


@pytest.mark.parametrize(("setting", "share"), [("auto", 1.0), (True, 1.0), (0.5, 0.5), (False, 0.0)])
def test_auto_counts_as_all_blocks_where_memory_is_planned(setting, share):
    assert DenoiserTrainConfig(gradient_checkpointing=setting).recomputed_share == share


def test_a_graph_keeps_its_activations():
    with pytest.raises(T5Error, match="gradient_checkpointing auto; a graph"):
        AlignConfig(graphs=True, gradient_checkpointing="auto")

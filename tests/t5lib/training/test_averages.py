"""Averaged weights are those of timm, from whose class the warm-up of the decay is."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from t5lib.training.averages import AveragedWeights


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_averages_of_weights_and_buffers_equal_those_of_timm_bit_by_bit(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).train()
    ours, theirs = AveragedWeights(model, decay), ModelEmaV3(model, decay=decay, use_warmup=True)
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(6, 5))  # changes what the norm keeps, of which one is a whole number
        ours.update(model, step)
        theirs.update(model, step=step)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), (step, name)
    assert not ours.module.training

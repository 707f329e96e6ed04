"""Inputs on their way to a device."""

import pytest
import torch

from t5lib.families.inputs import placed

INPUTS = {"images": torch.rand(2, 3), "timestep": torch.tensor([3, 700])}


def test_precision_is_that_of_numbers_and_not_of_steps():
    moved = placed(INPUTS, "cpu", torch.bfloat16)
    assert [tensor.dtype for tensor in moved.values()] == [torch.bfloat16, torch.int64]


@pytest.mark.gpu
def test_a_copy_to_a_card_does_not_wait_for_what_the_card_is_doing():
    placed(INPUTS, "cuda")  # begins to use it
    torch.cuda._sleep(10**9)  # cycles: half a second
    moved = placed(INPUTS, "cuda", torch.float32)
    assert not torch.cuda.current_stream().query()
    for name, tensor in INPUTS.items():
        assert torch.equal(moved[name].cpu(), tensor)

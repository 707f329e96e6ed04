"""Blocks computed again in the backward pass: as many as asked for, with the same gradients."""

import pytest
import torch
from tiny import random_images, tiny_vit
from torch import nn

import t5lib
from t5lib.families import family_of
from t5lib.training.recomputed import recomputed_blocks


def gradients(model: nn.Module, share: float) -> tuple[list[int], list[torch.Tensor]]:
    """How often each block ran in a forward and backward pass, and what came of it."""
    blocks = list(family_of(model).blocks(model))
    ran = [0] * len(blocks)

    def count(place: int) -> None:
        ran[place] += 1

    hooks = [block.register_forward_pre_hook(lambda *_, at=at: count(at)) for at, block in enumerate(blocks)]
    model.zero_grad()
    with recomputed_blocks(model, share):
        model(random_images(2)).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return ran, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("converted", [False, True])
def test_a_share_of_the_blocks_runs_twice_for_the_same_gradients(converted):
    model = tiny_vit("average_pool", depth=3)
    model = (t5lib.convert(model) if converted else model).train()
    _, expected = gradients(model, False)
    for share, ran in ((True, [2, 2, 2]), (0.5, [2, 2, 1]), (0.0, [1, 1, 1])):
        times, found = gradients(model, share)
        assert times == ran
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)

"""What a benchmark compiles."""

import pytest
import torch
from tiny_denoisers import sd3_batch, tiny_sd3

from t5lib.benchmarks.timing import compile_model
from t5lib.training.objectives import RectifiedFlow, noised_batch


def test_a_block_that_is_not_one_graph_is_refused_and_not_timed_in_parts(monkeypatch):
    torch._dynamo.reset()
    model, inputs = tiny_sd3(), noised_batch(sd3_batch(0), RectifiedFlow(), 0)
    block = type(model.transformer_blocks[0])
    forward = block.forward

    def broken(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", broken)
    compiled = compile_model(model, inputs)
    with pytest.raises(torch._dynamo.exc.Unsupported), torch.no_grad():
        compiled(**inputs)

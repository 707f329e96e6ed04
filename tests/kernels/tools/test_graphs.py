"""A call recorded as a CUDA graph gives its output at every replay; what cannot be recorded is an error."""

import functools

import pytest
import torch
from t5kernels.tools.graphs import WARM_UP_CALLS, recorded
from triton_device import needs_cuda


@pytest.mark.gpu
@needs_cuda
def test_a_replay_computes_the_recorded_output_anew_from_the_same_memory():
    calls, x = [], torch.ones(4, device="cuda")

    def call():
        calls.append(None)
        return {"double": 2 * x}

    replay = recorded(call)
    assert len(calls) == WARM_UP_CALLS + 1
    x.fill_(5)
    output = replay()["double"]
    assert output.tolist() == [10] * 4
    x.fill_(7)
    assert replay()["double"] is output
    assert output.tolist() == [14] * 4
    assert len(calls) == WARM_UP_CALLS + 1


@pytest.mark.gpu
@needs_cuda
def test_what_the_device_refuses_to_record_is_an_error():
    with pytest.raises(RuntimeError):
        recorded(lambda: torch.ones(4, device="cuda").sum().item())
    torch.cuda.synchronize()
    assert recorded(lambda: torch.ones(4, device="cuda").sum())() == 4


@pytest.mark.gpu
@needs_cuda
def test_recordings_may_share_their_memory():
    x, pool = torch.ones(1 << 20, device="cuda"), torch.cuda.graph_pool_handle()

    def call(times):
        return times * (x + 1).square()  # what lies between is free for the other recording

    replays = {times: recorded(functools.partial(call, times), pool) for times in (2, 3)}
    for value, times in enumerate([2, 3, 3, 2]):
        x.fill_(value)
        assert torch.equal(replays[times](), call(times))


def test_without_a_device_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="cannot be recorded without a CUDA device"):
        recorded(lambda: None)

"""Time on the host: which ways of calling are timed, and that nothing is told without a card."""

import json

import pytest
import torch
from t5kernels.tools import host
from triton_device import needs_cuda


def test_a_round_times_its_calls_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = iter(range(1000))
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    made, used = [], []
    assert host.host_us(lambda: used.append(made.pop()), lambda: made.append(1)) == 1e6 / host.CALLS
    assert len(used) == host.CALLS * host.ROUNDS and not made


def test_layers_follow_one_another():
    class StandIn:
        def layer(self, impl, q, v, text_v):
            return v + q, text_v + 2

    assert host.chained(StandIn(), [{"q": 1, "v": 10, "text_v": 20}, {"q": 2}, {"q": 4}]) == (17, 26)


def test_layers_share_no_leaf_so_that_no_gradients_are_added_up(monkeypatch):
    class StandIn:
        def __init__(self):
            self.leaves = {name: torch.ones(2, requires_grad=True) for name in ("q", "v")}
            self.d_outs = (torch.ones(2),)

        def layer(self, impl, q, v):
            return (q * v,)

    gradients = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: gradients.append(grad(*arguments)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host, "ROUNDS", 1)
    host.call_us([StandIn(), StandIn(), StandIn()], compiled=False)
    assert all(len(each) == 4 and all(g.tolist() == [1, 1] for g in each) for each in gradients)


def test_what_a_layer_more_costs_is_told(monkeypatch):
    monkeypatch.setattr(host.Inputs, "draw", lambda case: None)
    monkeypatch.setattr(host, "call_us", lambda inputs, compiled: {"forward_us": 100.0 + (7 + compiled) * len(inputs)})
    row = host.measure(host.CASES[0])
    assert (row["eager_forward_us"], row["compiled_forward_us"]) == (7, 8)


def test_without_a_card_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        host.main(["--out", str(tmp_path / "host.json")])
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.gpu
@needs_cuda
def test_every_way_of_calling_is_timed(tmp_path):
    host.main(["--out", str(tmp_path / "host.json")])
    for row in json.loads((tmp_path / "host.json").read_text())["rows"]:
        times = [value for name, value in row.items() if name.endswith("_us")]
        assert len(times) == 6 and all(time > 0 for time in times)

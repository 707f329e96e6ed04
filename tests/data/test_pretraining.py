"""Training from nothing for a fixed time."""

import math

import pytest
import torch
from pretraining import PretrainConfig, pretrain
from torch import nn

from t5lib.data.batches import seeded
from t5lib.utils.errors import T5Error


def train(tmp_path, name="state.pt", *, stop=math.inf, scale=1.0, **settings):
    """A line fitted to y = 2x; returns (weights, record)."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)

    def loss(x):
        return scale * (model(x) - 2 * x).square().mean()

    config = PretrainConfig(**{"minutes": 1.0, "steps": 60, "lr": 0.1, "warmup": 5, "ema": 0.9} | settings)
    batch_at = lambda step: torch.randn(8, 1, generator=seeded(0, step))  # noqa: E731
    record = pretrain("line", model, batch_at, loss, config, tmp_path / name, stop)
    return torch.cat([model.weight.flatten(), model.bias]).detach(), record


def test_it_learns_and_returns_averaged_weights(tmp_path):
    weights, record = train(tmp_path)
    assert record.finished and record.steps == 60
    assert weights.tolist() == pytest.approx([2, 0], abs=0.2)
    raw = torch.load(tmp_path / "state.pt", weights_only=True)["weights"]
    assert not torch.equal(raw[0].flatten(), weights[:1])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, threads, monkeypatch):
    whole, _ = train(tmp_path, "whole.pt")
    clock = iter(range(10_000))
    monkeypatch.setattr("pretraining.time.monotonic", lambda: next(clock) * 1e-3)
    _, record = train(tmp_path, stop=0.05, threads=threads)
    assert 0 < record.steps < 60 and not record.finished
    parts, record = train(tmp_path, threads=threads)
    assert record.finished and record.steps == 60
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.gpu
def test_on_a_card_graphs_learn_what_passes_learn(tmp_path):
    def weights(graphs: bool):
        torch.manual_seed(0)
        model = nn.Linear(4, 1, device="cuda")
        batch_at = lambda step: {"x": torch.randn(8 + 8 * (step % 2), 4, generator=seeded(0, step)).cuda()}  # noqa: E731
        config = PretrainConfig(minutes=1.0, steps=60, lr=0.1, warmup=5, threads=2, graphs=graphs)
        loss = lambda batch: (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()  # noqa: E731
        record = pretrain("line", model, batch_at, loss, config, tmp_path / f"{graphs}.pt")
        return model.weight.detach(), record.losses

    (plain, losses), (replayed, same) = weights(False), weights(True)
    torch.testing.assert_close(replayed, plain)
    assert same == [pytest.approx(each) for each in losses]


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, _ = train(tmp_path)
    again, record = train(tmp_path, steps=60)
    assert record.steps == 60 and torch.equal(first, again)


def test_time_ends_a_run_and_time_spent_compiling_does_not_count(tmp_path):
    _, record = train(tmp_path, minutes=0.002, steps=10_000_000, untimed=3)
    assert record.finished and record.seconds >= 0.12 and record.untimed_seconds > 0


def test_the_rate_warms_up_and_falls_to_zero_by_the_clock():
    config = PretrainConfig(minutes=1.0, lr=1.0, warmup=10, decay=0.5)
    assert config.rate(0, 0.0) == pytest.approx(0.1)
    assert config.rate(100, 20.0) == 1.0
    assert config.rate(100, 45.0) == pytest.approx(0.5)
    assert config.rate(100, 61.0) == 0.0


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(T5Error, match="line: the loss is nan"):
        train(tmp_path, scale=math.nan)


def test_a_state_of_another_model_is_refused(tmp_path):
    torch.save({"weights": [torch.zeros(3)]}, tmp_path / "state.pt")
    with pytest.raises(T5Error, match="another model"):
        train(tmp_path)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(T5Error, match="minutes 0"):
        PretrainConfig(minutes=0)

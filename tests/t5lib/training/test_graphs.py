"""Passes as CUDA graphs: recorded once for every shape, and a training learns what it learns without them."""

import dataclasses
from itertools import count

import pytest
import torch
from tiny import random_images, tiny_vit
from tiny_denoisers import dit_batches, sd3_batches, tiny_dit, tiny_sd3
from torch import nn

import t5lib
from t5lib.training import checkpoints, graphs
from t5lib.training.alignment import AlignConfig, Alignment
from t5lib.training.denoiser import DenoiserTrainConfig, Denoising
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow
from t5lib.training.trainer import train
from t5lib.utils.errors import T5Error

SIDES = (32, 32, 48)  # pixels, in turn
QUICK = AlignConfig(steps=6, batch_size=4, lr=1e-3, lr_new=3e-3, warmup=0.0)
DENOISERS = {"sd3": (tiny_sd3, sd3_batches, RectifiedFlow()), "dit": (tiny_dit, dit_batches, NoiseAndVariance())}


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """Graphs as they are on a card, without one: a replay runs the call again and writes to the recording's memory.

    Returns how often each recording was replayed.
    """
    numbers: list[int] = []

    def recorded(call, pool):
        for _ in range(3):
            call()
        loss, gradients = call()
        place = len(numbers)
        numbers.append(0)

        def replay():
            numbers[place] += 1
            new_loss, new_gradients = call()
            loss.copy_(new_loss)
            for old, new in zip(gradients, new_gradients, strict=True):
                if old is not None:
                    old.copy_(new)
            return loss, gradients

        return replay

    monkeypatch.setattr(graphs, "recorded", recorded)
    monkeypatch.setattr(graphs, "check", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return numbers


def batches(start: int):
    """Endless batches of two sizes that follow from their number alone."""
    return (random_images(4, SIDES[number % len(SIDES)], seed=number) for number in count(start))


def aligned(**changes) -> tuple[nn.Module, list[float]]:
    """The trained model, and the loss of every step."""
    teacher, losses = tiny_vit(dynamic_img_size=True), []
    model = t5lib.convert(teacher)
    config = dataclasses.replace(QUICK, **changes)
    t5lib.align(
        model, teacher=teacher, batches=batches, config=config, log=lambda values, _: losses.append(values["loss"])
    )
    return model, losses


def denoised(kind: str, **changes) -> tuple[nn.Module, list[float]]:
    """The trained denoiser, whose teacher are its averaged weights, and the loss of every step."""
    make, given, noising = DENOISERS[kind]
    model, losses = t5lib.convert(make()), []
    config = DenoiserTrainConfig(steps=6, batch_size=4, lr=1e-3, lr_new=3e-3, warmup=0.0, ema=0.9, align=0.5, **changes)
    log = lambda values, _: losses.append(values["loss"])  # noqa: E731
    train(model, given, Denoising(config, noising), config, steps=config.steps, log=log)
    return model, losses


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


def assert_learns_the_same(tolerance: float, **changes) -> None:
    """With graphs and without. Weights may differ by more than losses: Adam makes whole steps of gradients that are
    nothing but round-off."""
    model, losses = aligned(graphs=True, **changes)
    plain, expected = aligned(**changes)
    assert losses == pytest.approx(expected, rel=tolerance)
    start = weights(t5lib.convert(tiny_vit(dynamic_img_size=True)))
    moved = weights(plain) - start
    assert (weights(model) - weights(plain)).norm() < 10 * tolerance * moved.norm()


def test_a_training_learns_the_same_and_records_every_shape_once(replays):
    changes = {"trainable": "all", "ema": 0.9, "clip_norm": 0.01}  # clips in place, in the recording's memory
    assert_learns_the_same(1e-4, **changes)
    assert replays == [4, 2]


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_denoiser_learns_the_same_from_new_noise_in_every_step(replays, kind):
    model, losses = denoised(kind, graphs=True)
    plain, expected = denoised(kind)
    assert losses == pytest.approx(expected, rel=1e-5) and len(set(losses)) == len(losses)
    assert torch.allclose(weights(model), weights(plain), atol=1e-4)
    assert replays == [6]


def test_a_pass_reads_the_example_and_leaves_the_gradients_in_the_recording(replays):
    model = nn.Linear(3, 1, bias=False)
    frozen, weight = nn.Parameter(torch.ones(1), requires_grad=False), model.weight
    model.frozen = frozen
    passes = graphs.RecordedPasses(model, lambda inputs: inputs)

    def learn(inputs):
        loss = model(inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    found = {}
    for number, rows in enumerate([2, 2, 5, 2]):
        weight.grad = torch.full((1, 3), 100.0)  # of before: it is not added to
        x = torch.full((rows, 3), float(number))
        loss = passes(learn, {"x": x})
        assert loss == learned(model, x) and torch.equal(weight.grad, x.sum(0, keepdim=True)) and frozen.grad is None
        assert found.setdefault(rows, weight.grad) is weight.grad
    for dtype in (torch.float32, torch.int64):
        passes(learn, {"x": torch.ones(2, 3), "y": torch.ones(1, dtype=dtype)})
    assert replays == [3, 1, 1, 1]


def learned(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sum().detach()


def test_nothing_that_was_recorded_of_blocks_outlives_the_loss(monkeypatch):
    kept, loss_of = [], Alignment.loss

    def loss(self, example, trainer):
        found = loss_of(self, example, trainer)
        kept.extend((recorder.blocks, recorder.features) for recorder in self.recorders)
        return found

    monkeypatch.setattr(Alignment, "loss", loss)
    aligned(steps=1)
    assert kept == [([], None)] * 2


def test_what_cannot_be_is_refused(replays, monkeypatch):
    with pytest.raises(T5Error, match=r"graphs is on with accumulate 2 .*set accumulate: 1"):
        aligned(graphs=True, accumulate=2)
    with pytest.raises(T5Error, match=r"gradient_checkpointing 0\.5; .*leave graphs out"):
        aligned(graphs=True, gradient_checkpointing=0.5)
    with pytest.raises(T5Error, match="graphs is on with accumulate 2"):
        DenoiserTrainConfig(graphs=True, accumulate=2)

    def recorded(call, pool):
        raise RuntimeError("CUDA error: operation not permitted\nand more")

    monkeypatch.setattr(graphs, "recorded", recorded)
    with pytest.raises(T5Error, match=r"on x \(4, 3, 32, 32\) cannot be .* \(CUDA error: operation not permitted\);"):
        aligned(graphs=True)


def test_without_a_card_or_with_several_processes_it_says_so(monkeypatch):
    with pytest.raises(T5Error, match="graphs is on and 2 processes share the training"):
        graphs.check(torch.device("cuda"), 2)
    check = graphs.check
    monkeypatch.setattr(graphs, "check", lambda _, number: check(torch.device("cpu"), number))
    with pytest.raises(T5Error, match=r"graphs is on and the device is cpu; .* leave graphs out"):
        aligned(graphs=True)


def test_a_training_may_go_on_with_graphs_or_without(replays):
    model = t5lib.convert(tiny_vit())
    made = [checkpoints.maker(model, dataclasses.replace(QUICK, graphs=graphs)) for graphs in (False, True)]
    assert made[0] == made[1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_card_graphs_learn_what_passes_learn(compiled, precision):
    assert_learns_the_same(1e-3 if precision == "fp32" else 2e-2, compile=compiled, precision=precision)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DENOISERS)
def test_on_a_card_graphs_teach_a_denoiser_what_passes_teach_it(kind):
    losses, expected = (denoised(kind, graphs=graphs)[1] for graphs in (True, False))
    assert losses == pytest.approx(expected, rel=1e-3)

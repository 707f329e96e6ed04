"""Blocks computed again in the backward pass: as many as asked for, with the same gradients."""

import pytest
import torch
from tiny import random_images, tiny_vit
from tiny_denoisers import sd3_batches, tiny_sd3
from torch import nn

import t5lib
from t5lib.families import family_of
from t5lib.training import trainer
from t5lib.training.denoiser import DenoiserTrainConfig, Denoising
from t5lib.training.objectives import RectifiedFlow
from t5lib.training.recomputed import AUTO, SPARE, CardMemory, Recomputation, recomputed_blocks


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


class Meter:
    """The memory of a device, in which the activations of every block take 100 bytes.

    Args:
        usable: bytes that a process may take in all.
        outside: bytes that are taken between steps.
        peak: the most bytes in a step that recomputes all blocks.
    """

    def __init__(self, usable: float, outside: int, peak: int):
        self.total, self.now, self.most = int(usable), outside, peak

    def usable(self) -> int:
        return self.total

    def allocated(self) -> int:
        return self.now

    def forget_peak(self) -> None:
        pass

    def peak(self) -> int:
        return self.most


def measuring(model: nn.Module, meter: Meter) -> None:
    """Let every block take its 100 bytes while it runs in a backward pass, as its recomputation does."""
    ran: set[nn.Module] = set()

    def run(block: nn.Module, _) -> None:
        meter.now += 100 * (block in ran)
        ran.symmetric_difference_update({block})

    for block in family_of(model).blocks(model):
        block.register_forward_pre_hook(run)


def step(model: nn.Module, recomputation: Recomputation, meter: Meter) -> None:
    outside = meter.now
    with recomputation.observed():
        model(random_images(2)).square().sum().backward()
    meter.now = outside
    recomputation.choose()


@pytest.mark.parametrize(
    ("room", "again"), [(-50, 4), (0, 4), (99, 4), (100, 3), (250, 2), (399, 1), (400, 0), (10**6, 0)]
)
def test_auto_keeps_as_many_of_the_last_blocks_as_memory_holds(room, again, capsys):
    """Room is what is left of nine tenths of the memory by what is always there, 1000, and by a step's passes, 500."""
    model, meter = tiny_vit(depth=4).train(), Meter((1500 + room) / (1 - SPARE) + 1, 1000, 1500)
    measuring(model, meter)
    with recomputed_blocks(model, AUTO, meter) as recomputation:
        assert [block.again for block in recomputation.blocks] == [True] * 4  # the first step is certain to fit
        step(model, recomputation, meter)
        assert [block.again for block in recomputation.blocks] == [True] * again + [False] * (4 - again)
        assert f"auto: {again} of 4 blocks recompute" in capsys.readouterr().out
        step(model, recomputation, meter)
        assert capsys.readouterr().out == ""  # once and for all
    assert not any(block._compiled_call_impl for block in model.blocks)


def test_auto_recomputes_nothing_where_no_memory_is_known():
    ran, _ = gradients(tiny_vit(depth=3).train(), AUTO)
    assert ran == [1, 1, 1]


def test_a_training_with_auto_learns_the_same(monkeypatch, capsys):
    def losses(**changes) -> list[float]:
        seen: list[float] = []
        recipe = DenoiserTrainConfig(steps=3, batch_size=4, accumulate=2, warmup=0.0, **changes)
        objective = Denoising(recipe, RectifiedFlow())
        log = lambda values, _: seen.append(values["loss"])  # noqa: E731
        trainer.train(t5lib.convert(tiny_sd3()), sd3_batches, objective, recipe, steps=recipe.steps, log=log)
        return seen

    expected = losses()
    meter = Meter(200, 0, 0)
    monkeypatch.setattr(trainer, "memory_of", lambda device: meter)
    assert losses(gradient_checkpointing=AUTO) == expected
    assert "auto: 0 of 3 blocks" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_card_a_block_tells_about_what_its_activations_take():
    """Of four blocks that are alike, and of which a card holds more than all; what is kept is what was told."""
    device = torch.device("cuda")
    model = tiny_vit(depth=4).train().to(device)
    images = random_images(256).to(device)
    with recomputed_blocks(model, AUTO, CardMemory(device)) as recomputation:
        with recomputation.observed():
            model(images).square().sum().backward()
        told = [block.activations for block in recomputation.blocks]
        model.zero_grad(set_to_none=True)
        recomputation.choose()
        assert not any(block.again for block in recomputation.blocks)
        before = torch.cuda.memory_allocated(device)
        loss = model(images).square().sum()
        kept = torch.cuda.memory_allocated(device) - before
        loss.backward()
    assert all(size > 0 for size in told) and max(told) < 1.2 * min(told)
    assert 0.7 * sum(told) < kept < 1.5 * sum(told)

"""The memory of a training that FSDP2 spreads: what is divided, what is not, and the page's table."""

import dataclasses
from pathlib import Path

import pytest

from tasks.runtime.cards import CARDS
from tasks.studies import sharded_memory
from tasks.targets.training_needs import memory


def test_what_is_held_is_divided_and_what_runs_is_not():
    one, four = sharded_memory.parts(1), sharded_memory.parts(4)
    for name in ("weights", "gradients", "optimizer", "averaged weights", "teacher"):
        assert four[name] == pytest.approx(one[name] / 4)
    assert four["activations"] == one["activations"] and "gathered blocks" not in one
    shared = dataclasses.replace(sharded_memory.RECIPE, batch_size=8, accumulate=1)
    assert sharded_memory.parts(4, shared)["activations"] == 2 * four["activations"]  # two of eight images each


def test_a_larger_share_of_recomputed_blocks_takes_less():
    sums = [
        sum(sharded_memory.parts(2, dataclasses.replace(sharded_memory.RECIPE, gradient_checkpointing=share)).values())
        for share in (False, 0.25, 0.5, True)
    ]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) == 4


def test_the_smallest_share_that_fits_is_the_advice():
    recipe = dataclasses.replace(sharded_memory.RECIPE, gradient_checkpointing=False)
    shape, card = sharded_memory.SHAPE, CARDS["A100"]
    spread = {"teacher": True, "pieces": 4}
    found = memory("finetune", sharded_memory.SIZE, recipe, shape.blocks, lambda n: n * 4429 * shape.channels, **spread)
    assert found.certain < card.memory < found.likely
    assert next(words for words, size in found.smaller if size <= card.memory) == "finetune.gradient_checkpointing: 0.5"
    assert sharded_memory.fewest_recomputed(4, card.memory) == 18  # of 38
    assert sharded_memory.fewest_recomputed(1, card.memory) is None


def test_the_page_holds_what_the_command_writes():
    page = (Path(__file__).parents[3] / "docs/several_gpus.md").read_text(encoding="utf-8")
    assert "\n".join(sharded_memory.lines()) in page

"""Memory and checkpoints of a training by a recipe, whatever is trained; what of the recipe makes them smaller."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from t5lib.training.layer_groups import TOGETHER, CalibrateConfig
from t5lib.training.recipe import LoopConfig
from t5lib.utils.errors import T5Error
from tasks.runtime import cards
from tasks.runtime.needs import Check, Memory

NEW_SHARE = 0.01  # of all parameters: what conversion adds, or adapters have, at the most
NUMBER = 4  # bytes in single precision
GATHERED = 3  # blocks that FSDP2 holds whole: weights of one and of the next, gradients of one


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's size: `saved` bytes in single precision, untrained tables included, and its `parameters`."""

    saved: int
    parameters: int


def parts(
    size: Size,
    recipe: LoopConfig,
    blocks: int,
    numbers: Callable[[int], int],
    *,
    teacher: bool = False,
    pieces: int = 1,
) -> dict[str, int]:
    """Bytes on each card at the peak of a training.

    Args:
        numbers: gives images × tokens × channels of a forward pass of so many images.
        teacher: whether there is a softmax model beside the trained one, in addition to averaged weights.
        pieces: number of cards that FSDP2 spreads the training over.
    """
    trained = _trained(size, recipe)
    held = {
        "weights": size.saved,
        "gradients": trained * NUMBER,
        "optimizer": trained * (2 if recipe.optimizer == "adamw8bit" else 8),
        "averaged weights": size.saved * bool(recipe.ema),
        "teacher": size.saved * teacher,
    }
    held = {name: count / pieces for name, count in held.items()}
    if pieces > 1:
        kept = 0 if recipe.precision == "fp32" else blocks - _again(recipe, blocks)  # with their weights, in bf16
        held["gathered blocks"] = (GATHERED + kept / 2) * size.saved / blocks
    images = recipe.batch_size if recipe.accumulate % pieces == 0 else math.ceil(recipe.batch_size / pieces)
    held["activations"] = activation_bytes(numbers(images), blocks, recipe)
    return {name: round(count) for name, count in held.items()}


def checkpoint_bytes(size: Size, recipe: LoopConfig) -> int:
    """Bytes of all checkpoints that are kept, and of the one being written."""
    if not recipe.checkpoints_kept:
        return 0
    moments = 2 if recipe.optimizer == "adamw8bit" else 8
    each = size.saved * (2 if recipe.ema else 1) + _trained(size, recipe) * moments
    return round(each * (recipe.checkpoints_kept + 1))


def activation_bytes(numbers: int, blocks: int, recipe: LoopConfig) -> int:
    """Bytes of one forward and backward pass. `numbers`: images × tokens × channels of it."""
    again = _again(recipe, blocks)
    kept = again * cards.PER_BLOCK_KEPT + (blocks - again) * cards.PER_BLOCK
    return numbers * (kept + cards.IN_BLOCK) * (1 if recipe.precision == "bf16" else 2)


def memory(
    stage: str,
    size: Size,
    recipe: LoopConfig,
    blocks: int,
    numbers: Callable[[int], int],
    *,
    teacher: bool = False,
    pieces: int = 1,
) -> Memory:
    """Memory of a card in a stage that trains by `recipe`; see `parts`."""

    def likely(changed: LoopConfig) -> int:
        return sum(parts(size, changed, blocks, numbers, teacher=teacher, pieces=pieces).values())

    held = parts(size, recipe, blocks, numbers, teacher=teacher, pieces=pieces)
    certain = max(sum(held.values()) - held["activations"], size.saved)  # before and after, the model is whole
    smaller = tuple((words, likely(changed)) for words, changed in _smaller(stage, recipe))
    return Memory(stage, certain, max(sum(held.values()), size.saved), smaller)


def fitting_bytes(config: CalibrateConfig, layers: int, numbers: Callable[[int], int]) -> int:
    """Bytes of a calibration beside weights and optimizer: its pool, and what a step takes or, if that is more, what
    the teacher's attentions give for a pool.

    Args:
        layers: that are fitted.
        numbers: gives images × tokens × channels of a forward pass of so many images.
    """
    pool = numbers(config.batch_size * config.pool) * layers
    one = numbers(config.batch_size)
    step = max(one, min(one * layers, TOGETHER)) * cards.FITTED
    return pool * cards.POOLED + max(step, pool * cards.SEEN)


def check_control(recipe: LoopConfig) -> list[Check]:
    """What the stage control, whose model has no new layers, cannot do; it comes after the fine-tune."""
    if recipe.trainable != "new":
        return []
    why = "set finetune.trainable: all, or lora; stage control trains the softmax source too, which has no new parts"
    return [Check("finetune.trainable", "new", why)]


def _again(recipe: LoopConfig, blocks: int) -> int:
    """The number of blocks that recompute their activations where memory is short (t5lib.training.recomputed)."""
    return math.ceil(recipe.recomputed_share * blocks)


def _trained(size: Size, recipe: LoopConfig) -> float:
    """Numbers that have a gradient."""
    return size.parameters * (NEW_SHARE if recipe.trainable in ("new", "lora") else 1)


def _smaller(stage: str, recipe: LoopConfig) -> Iterator[tuple[str, LoopConfig]]:
    """Changes of the recipe one on top of the other, the mildest first: the words for params.yaml, and the recipe."""
    section, changes = "freeze.train" if stage == "freeze" else stage, dict[str, Any]()
    for more in _milder(recipe):
        changes |= more
        with contextlib.suppress(T5Error):  # such as an odd batch where images are mixed in pairs
            words = ", ".join(f"{section}.{name}: {json.dumps(value)}" for name, value in changes.items())
            yield words, dataclasses.replace(recipe, **changes)


def _milder(recipe: LoopConfig) -> Iterator[dict[str, Any]]:
    for share in (0.25, 0.5, 0.75, True):
        if share > recipe.recomputed_share:
            yield {"gradient_checkpointing": share}
    batch, accumulate = recipe.batch_size, recipe.accumulate
    while batch > 1:
        batch, accumulate = batch // 2, accumulate * 2
        yield {"batch_size": batch, "accumulate": accumulate}
    if recipe.trainable == "all" and recipe.optimizer == "adamw":
        yield {"optimizer": "adamw8bit"}
    if recipe.ema:
        yield {"ema": None} | ({"align": 0.0} if getattr(recipe, "teacher", "") == "ema" else {})
    if recipe.trainable == "all":
        yield {"trainable": "lora"}

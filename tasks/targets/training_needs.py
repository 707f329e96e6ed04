"""Memory and checkpoints of a training by a recipe, whatever is trained; what of the recipe makes them smaller."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from t5lib.training.recipe import LoopConfig
from t5lib.utils.errors import T5Error
from tasks.runtime import cards
from tasks.runtime.needs import Check, Memory

NEW_SHARE = 0.01  # of all parameters: what conversion adds, or adapters have, at the most
NUMBER = 4  # bytes in single precision


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's size: `saved` bytes in single precision, untrained tables included, and its `parameters`."""

    saved: int
    parameters: int


def static_bytes(size: Size, recipe: LoopConfig, teacher: bool = False) -> int:
    """Weights, gradients, the optimizer's state, averaged weights, the softmax teacher."""
    moments = 2 if recipe.optimizer == "adamw8bit" else 8
    return round(size.saved * (1 + bool(recipe.ema) + teacher) + _trained(size, recipe) * (NUMBER + moments))


def checkpoint_bytes(size: Size, recipe: LoopConfig) -> int:
    """Bytes of all checkpoints that are kept, and of the one being written."""
    moments = 2 if recipe.optimizer == "adamw8bit" else 8
    each = size.saved * (2 if recipe.ema else 1) + _trained(size, recipe) * moments
    return round(each * (recipe.checkpoints_kept + 1))


def activation_bytes(numbers: int, blocks: int, recipe: LoopConfig) -> int:
    """Bytes of one forward and backward pass. `numbers`: images × tokens × channels of it."""
    kept = cards.PER_BLOCK_KEPT if recipe.gradient_checkpointing else cards.PER_BLOCK
    return numbers * (kept * blocks + cards.IN_BLOCK) * (1 if recipe.precision == "bf16" else 2)


def memory(
    stage: str, size: Size, recipe: LoopConfig, blocks: int, numbers: Callable[[int], int], teacher: bool = False
) -> Memory:
    """Memory of a stage that trains by `recipe`; `numbers` gives those of so many images in a forward pass."""

    def likely(changed: LoopConfig) -> int:
        return static_bytes(size, changed, teacher) + activation_bytes(numbers(changed.batch_size), blocks, changed)

    smaller = tuple((words, likely(changed)) for words, changed in _smaller(stage, recipe))
    return Memory(stage, static_bytes(size, recipe, teacher), likely(recipe), smaller)


def check_control(recipe: LoopConfig) -> list[Check]:
    """What the stage control, whose model has no new layers, cannot do; it comes after the fine-tune."""
    if recipe.trainable != "new":
        return []
    why = "set finetune.trainable: all, or lora; stage control trains the softmax source too, which has no new parts"
    return [Check("finetune.trainable", "new", why)]


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
    if not recipe.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
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

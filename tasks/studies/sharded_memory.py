"""Calculate the memory that a full fine-tune of SD3.5-Large's shape takes on every card with FSDP2, part by part.

    python -m tasks.studies.sharded_memory
    python -m tasks.studies.sharded_memory --page docs/several_gpus.md

With --page the table in that page is replaced. `python -m tasks.readiness TARGET --card H200 --cards N` does the same
calculation for the settings of any target.
"""

import dataclasses
from pathlib import Path

from t5lib.training.denoiser import DenoiserTrainConfig
from t5lib.utils.markdown import table, write_page
from tasks.runtime.cards import CARDS, GIB
from tasks.studies.common import parser, reported
from tasks.targets import training_needs
from tasks.targets.denoiser_shape import Shape
from tasks.targets.expected_pipelines import PIPELINES

SHAPE = Shape.of(PIPELINES["stabilityai/stable-diffusion-3.5-large"].transformer)
SIZE = training_needs.Size(SHAPE.saved_bytes, SHAPE.parameters)
TOKENS = sum(SHAPE.tokens(1024**2, 8, 256))  # of an image of 1,024 px and its caption
MACHINES = (("H200", 2, "2 × 141 GB"), ("A100", 4, "4 × 80 GB"), ("A100", 8, "8 × 80 GB"))
RECIPE = DenoiserTrainConfig(
    batch_size=1, accumulate=16, align=1.0, teacher="source", precision="bf16", gradient_checkpointing=True
)


def parts(cards: int, recipe: DenoiserTrainConfig = RECIPE) -> dict[str, int]:
    """Bytes on each of so many cards."""
    return training_needs.parts(
        SIZE, recipe, SHAPE.blocks, lambda images: images * TOKENS * SHAPE.channels, teacher=True, pieces=cards
    )


def fewest_recomputed(cards: int, memory: int) -> int | None:
    """The fewest blocks that must recompute their activations so that all fits into `memory` bytes; None if nothing
    helps."""
    for blocks in range(SHAPE.blocks + 1):
        recipe = dataclasses.replace(RECIPE, gradient_checkpointing=blocks / SHAPE.blocks)
        if sum(parts(cards, recipe).values()) <= memory:
            return blocks
    return None


def lines() -> list[str]:
    """The table, in Markdown; GiB."""
    columns = [(CARDS[name].memory or 0, parts(cards), cards) for name, cards, _ in MACHINES]
    rows = [[name, *(f"{held[name] / GIB:.1f}" for _, held, _ in columns)] for name in columns[0][1]]
    rows.append(["**sum**", *(f"**{sum(held.values()) / GIB:.1f}**" for _, held, _ in columns)])
    rows.append(["memory of the card", *(f"{memory / GIB:.0f}" for memory, _, _ in columns)])
    fewest = [fewest_recomputed(cards, memory) for memory, _, cards in columns]
    rows.append(["blocks that must be recomputed", *(f"{blocks} of {SHAPE.blocks}" for blocks in fewest)])
    whole = 2 * SIZE.saved / GIB  # the model's and the teacher's weights, in every process
    rows.append(["main memory of the machine", *(f"{cards * whole:.0f}" for _, _, cards in columns)])
    one = dataclasses.replace(RECIPE, checkpoints_kept=1)
    rows.append(["one checkpoint", *[f"{training_needs.checkpoint_bytes(SIZE, one) / 2 / GIB:.0f}"] * len(columns)])
    return table(["GiB", *(name for *_, name in MACHINES)], rows, numbers=True)


def main() -> None:
    arguments = parser("sharded_memory", str(__doc__))
    arguments.add_argument("--page", type=Path, help="the page whose table is replaced (default: none)")
    given = arguments.parse_args()
    with reported("sharded_memory"):
        text = "\n".join(lines())
        if given.page:
            write_page(given.page, f"\n{text}")
        print(text)


if __name__ == "__main__":
    main()

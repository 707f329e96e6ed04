"""The rates that we measured on two graphics cards: what hours and memory are estimated from.

On another card a rate is scaled by its peak of dense bf16 FLOPs, or by its memory's bandwidth where that is the bound.
All that follows from here is an estimate.
"""

from dataclasses import dataclass

from t5lib.utils.cards import CARDS, GIB, Card, named, present

__all__ = ["CARDS", "GIB", "RATES", "Card", "Rate", "named", "present"]


@dataclass(frozen=True)
class Rate:
    """Seconds that an amount of work took on a card.

    Attributes:
        amount: FLOPs of the softmax model; or, where `by` is "bandwidth", numbers or pixels that were gone through.
        source: where the measurement stands.
    """

    seconds: float
    amount: float
    card: str
    by: str
    source: str

    def on(self, card: Card, amount: float) -> float | None:
        """Seconds of `amount` on `card`; None for a card of unknown speed."""
        ours, theirs = getattr(card, self.by), getattr(CARDS[self.card], self.by)
        return self.seconds * amount / self.amount * theirs / ours if ours else None


MEDIUM_FLOPS = 1.125e13  # of SD3.5-Medium's shape, one image of 1,024 px with 333 tokens of text, forward
VIT_FLOPS = 6.61e9  # of DINOv2-S/14, one image of 168 px, forward

RATES = {
    # 16 images forward, again for gradient checkpointing, backward (twice a forward), and the teacher's forward
    "train": Rate(3.98, 16 * 5 * MEDIUM_FLOPS, "H100", "flops", "docs/results/sd35-step-cost-h100.json, uncompiled"),
    # two epochs of 24,000 images, forward and backward
    "train images": Rate(39.5, 48_000 * 3 * VIT_FLOPS, "H100", "flops", "docs/results/dinov2-fashion-24k.json, seed 0"),
    "draw": Rate(0.0861, 2 * MEDIUM_FLOPS, "H100", "flops", "our run of two images at 1,024 px, uncompiled"),
    # steps × images × tokens × channels × layers
    "fit": Rate(
        6.55, 20 * 2 * 4_429 * 1_536 * 9, "H200", "bandwidth", "docs/results/sd35-random-chain.json, first steps"
    ),
    "fit compiled": Rate(
        90.8, 5_000 * 64 * 145 * 384 * 12, "H100", "bandwidth", "docs/results/dinov2-fashion-24k.json, seed 1"
    ),
    # pixels, the loading of the encoders included: 40 images are few, and T5 was left out
    "encode": Rate(
        6.5, 40 * 1_024**2, "H200", "flops", "docs/results/sd35-random-chain.json; at most: loading included"
    ),
}

# Bytes of memory, told from peaks that were measured. A "number" is a token's channel.
PER_BLOCK_KEPT = 4  # a number and block, with gradient checkpointing
IN_BLOCK = 195  # a number, while a block is computed again and its gradients are: the chain's freeze
PER_BLOCK = 100  # a number and block without checkpointing: counted, not measured
FITTED = 54  # a number and layer of a calibration step: the chain's calibrate
POOLED = 4  # a number and layer of a calibration's pool: what attentions got and gave, in bf16
SEEN = 6  # the same while the pool is filled: what they got is in single precision
ENCODED = 3_140  # a pixel of the VAE's encoder: the chain's shards
DRAWN = 1_160  # a pixel of the VAE's decoder: the chain's evaluate
MEMORY_SOURCE = "docs/results/sd35-random-chain.json and sd35-step-cost-h100.json"

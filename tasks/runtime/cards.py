"""Graphics cards, and the rates that we measured on two of them: what hours and memory are estimated from.

On another card a rate is scaled by its peak of dense bf16 FLOPs, or by its memory's bandwidth where that is the bound.
Peaks and bandwidths are the makers' published ones. All that follows from here is an estimate.
"""

import re
from dataclasses import dataclass, replace

from t5lib.utils.errors import T5Error

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """`memory` in bytes, `flops` and `bandwidth` (bytes) a second; None: not known."""

    name: str
    memory: int | None
    flops: float | None = None
    bandwidth: float | None = None


def _card(name: str, gib: float, teraflops: float, terabytes: float) -> Card:
    return Card(name, round(gib * GIB), teraflops * 1e12, terabytes * 1e12)


CARDS = {
    card.name: card
    for card in (
        _card("B200", 178, 2250, 8.0),
        _card("H200", 139, 989, 4.8),
        _card("H100", 79, 989, 3.35),
        _card("H20", 95, 148, 4.0),
        _card("A100", 79, 312, 2.04),
        _card("L40S", 44, 362, 0.864),
        _card("A6000", 47, 155, 0.768),
        _card("RTX 5090", 31, 209, 1.79),
        _card("RTX 4090", 23, 165, 1.008),
        _card("MI300X", 191, 1307, 5.3),
    )
}


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
ENCODED = 3_140  # a pixel of the VAE's encoder: the chain's shards
DRAWN = 1_160  # a pixel of the VAE's decoder: the chain's evaluate
MEMORY_SOURCE = "docs/results/sd35-random-chain.json and sd35-step-cost-h100.json"


def named(name: str, gib: float | None = None) -> Card:
    """A card by a name such as "H200" or "NVIDIA H100 80GB HBM3"; of one that is not in the table the speed is unknown.

    Args:
        gib: its memory, where that is another than the table's.

    Raises:
        T5Error: neither the table nor the caller knows its memory.
    """
    known = [card for short, card in CARDS.items() if re.search(rf"\b{short}\b", name, re.I)]
    memory = None if gib is None else round(gib * GIB)
    if known:
        return replace(known[0], name=name, memory=memory or known[0].memory)
    if memory is None:
        raise T5Error(f"no figures for a card '{name[:100]}'; known: {', '.join(CARDS)}; or add --memory GIB")
    return Card(name, memory)


def present() -> Card | None:
    """The card that torch sees first; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return named(properties.name, properties.total_memory / GIB)

"""Graphics cards. Their peaks of dense bf16 FLOPs and their bandwidths are the makers' published ones."""

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


def limit_memory(gib: float) -> None:
    """Let this process take at most so many GiB of each CUDA device, as if it were a smaller card.

    Raises:
        T5Error: no CUDA device, or one that has less.
    """
    import torch

    if not torch.cuda.is_available():
        raise T5Error(f"memory is to be at most {gib:g} GiB, and there is no CUDA device whose memory that could be")
    for device in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        if not 0 < gib <= total:
            raise T5Error(f"memory is to be at most {gib:g} GiB; expected more than 0, at most the card's {total:.1f}")
        torch.cuda.set_per_process_memory_fraction(gib / total, device)

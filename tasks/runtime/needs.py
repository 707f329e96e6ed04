"""What a target needs of a machine, as its kind states (Target.needs): room on the disk, memory of the card, work."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """Bytes on the disk.

    Attributes:
        size: None where it cannot be told yet.
        certain: no estimate.
        out: an output of stages, of which DVC may keep a second copy.
        why: what it is made of, or what would tell it.
        change: a setting that makes it smaller, with its value.
    """

    what: str
    size: int | None
    certain: bool = True
    out: bool = False
    why: str = ""
    change: str = ""


@dataclass(frozen=True)
class Remote:
    """What is fetched from a hub: source; `size` is what we expect of it, None where we do not."""

    what: str
    source: str
    size: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of the card that a stage takes at its peak.

    Attributes:
        certain: of it, what no estimate is in: weights, gradients, the optimizer's state.
        smaller: settings that make it smaller, the mildest first, with what it would then take.
    """

    stage: str
    certain: int
    likely: int
    smaller: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Work:
    """An amount of work of a stage, in the unit of one of tasks.runtime.cards.RATES (`rate`); None: not known yet."""

    stage: str
    rate: str
    amount: float | None
    change: str = ""


@dataclass(frozen=True)
class Check:
    """A requirement that is met, or not (`problem`, with the remedy).

    Attributes:
        known: whether it could be looked at.
        essential: nothing works with that problem.
    """

    what: str
    found: str
    problem: str = ""
    known: bool = True
    essential: bool = True


@dataclass(frozen=True)
class Needs:
    """All needs of a target, each in the order in which it is listed."""

    remotes: tuple[Remote, ...] = ()
    rooms: tuple[Room, ...] = ()
    memories: tuple[Memory, ...] = ()
    works: tuple[Work, ...] = ()
    checks: tuple[Check, ...] = ()

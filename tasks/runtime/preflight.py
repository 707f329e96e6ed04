"""Does this machine have what a target needs? One line per item, with a verdict and what to change.

What is certain and does not fit is refused before anything begins; what is estimated and does not fit is told.
"""

import configparser
import fcntl
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from t5lib.download import hub
from t5lib.utils.errors import SourceError, T5Error
from tasks.runtime.cards import GIB, MEMORY_SOURCE, RATES, Card
from tasks.runtime.needs import Check, Memory, Needs, Remote, Room, Work

OK, LITTLE, UNKNOWN, WRONG, MISSING = "ok", "too little", "unknown", "wrong", "missing"
LONG = 6  # hours of a stage from which on it is said how to make it shorter
NAME_IT = "this machine has no card; name one to plan for: --card H200"
FICLONE = 0x40049409  # Linux: make a file share the blocks of another
CACHE_TYPES = "reflink,copy"  # DVC's own
LINKING = "dvc config --local cache.type hardlink"


@dataclass(frozen=True)
class Item:
    """A line of the table; `essential`: nothing may begin while it is so."""

    what: str
    needs: str
    there: str
    verdict: str
    change: str = ""
    essential: bool = False


def items(root: Path, target: str, needs: Needs, card: Card | None, *, online: bool = True) -> list[Item]:
    """All lines.

    Args:
        target: its name; what an interrupted run of it left is room that need not be free.
        card: the one that the work is for; None where there is none.
        online: ask the hub for sizes and access.
    """
    lines: list[Item] = []
    rooms = list(needs.rooms)
    for remote in reversed(needs.remotes):
        item, size = _remote(remote) if online else (None, remote.size)
        lines[:0] = [item] if item else []
        rooms.insert(0, Room(remote.what, size, why="to be fetched" if size else "the hub gives no size"))
    lines += [_checked(check) for check in needs.checks]
    lines += _disk(root, rooms, begun_bytes(root, target, needs))
    lines += [_memory(memory, card) for memory in needs.memories]
    return lines + _hours(needs.works, card)


def refuse(target: str, found: Iterable[Item]) -> None:
    """Raises T5Error that lists the essential items that are not as they must be."""
    bad = [item for item in found if item.essential]
    if bad:
        lines = [f"  {item.what}: needs {item.needs}, there is {item.there}; {item.change}" for item in bad]
        rest = f"`python -m tasks.readiness {target}` shows all that it needs"
        raise T5Error("\n".join([f"'{target}' cannot be built on this machine:", *lines, rest]))


def table(found: list[Item]) -> str:
    """The items as text: columns, and below a line what to change."""
    rows = [("", "needs", "there is", "verdict")]
    rows += [(item.what, item.needs, item.there, item.verdict) for item in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row, item in zip(rows, [None, *found], strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
        if item and item.change:
            lines.append(f"    → {item.change}")
    return "\n".join(lines)


def _remote(remote: Remote) -> tuple[Item, int | None]:
    """Whether it can be fetched, and its size."""
    from huggingface_hub import get_token

    rest = remote.source.removeprefix("hf:")
    what, page = f"source: {remote.what}", f"https://huggingface.co/{rest.partition('@')[0]}"
    try:
        listed = hub.look(rest)
        gated = "gated" if listed.gated else "open to all"
        if listed.gated and not get_token():
            change = f"accept the conditions on {page} and set HF_TOKEN to a read token of that account"
            return Item(what, _gb(listed.size), "gated, no token", MISSING, change, True), listed.size
        hub.check_access(rest)
    except SourceError as error:
        told = str(error).replace(f"#{rest.partition('#')[2]}", "")  # the names of its files say nothing here
        size = _gb(remote.size) if remote.size else "?"
        return Item(what, size, "not reachable", MISSING, told, True), remote.size
    return Item(what, _gb(listed.size), f"{gated}, {listed.files} files available", OK), listed.size


def _checked(check: Check) -> Item:
    bad = bool(check.problem)
    verdict = WRONG if bad else OK if check.known else UNKNOWN
    return Item(check.what, "as expected", check.found, verdict, check.problem, bad and check.essential)


def _disk(root: Path, rooms: list[Room], begun: int) -> list[Item]:
    """The parts, then their sum beside what is free or taken by what was `begun` of it."""
    free, copied = free_bytes(root) + begun, copies(root)
    lines, known, certain = [], 0, 0
    for room in rooms:
        if room.size is None:
            lines.append(Item(f"disk: {room.what}", "?", "", UNKNOWN, room.why))
            continue
        size = room.size * (2 if room.out and copied else 1)
        known, certain = known + size, certain + (size if room.certain else 0)
        lines.append(Item(f"disk: {room.what}", _gb(size), room.why, OK))
    if not lines:
        return []
    verdict = LITTLE if known > free else UNKNOWN if any(room.size is None for room in rooms) else OK
    change = ""
    if verdict == LITTLE:
        changes = [room.change for room in rooms if room.change and room.size]
        changes += [f"{LINKING} (DVC keeps a second copy of all outputs)"] if copied else []
        change = "; or ".join([f"free {_gb(known - free)}", *changes])
    there = f"{_gb(free)} free" + (f", with {_gb(begun)} of partial work" if begun else "")
    return [*lines, Item("disk: in total", _gb(known), there, verdict, change, certain > free)]


def free_bytes(root: Path) -> int:
    """Free bytes of the disk that data/ is on, or will be."""
    place = root / "data"
    return shutil.disk_usage(place if place.exists() else root).free


def begun_bytes(root: Path, target: str, needs: Needs) -> int:
    """Bytes on the disk of stages and downloads that are not finished."""
    places = [root / "data/scratch" / target]
    for remote in needs.remotes:
        name = re.sub(r"[^\w.]+", "-", remote.source.partition("@")[0])  # as t5lib.download.kept calls its folder
        places += [place for kind in ("models", "datasets") for place in root.glob(f"data/{kind}/*{name}*")]
    files = [file for place in dict.fromkeys(places) for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def copies(root: Path) -> bool:
    """Whether DVC's cache holds outputs a second time on this disk, as its settings and the file system have it.

    Of several kinds of links the first counts: where it cannot be, DVC copies as it commits (seen with DVC 3.67).
    """
    settings = configparser.ConfigParser()
    settings.read([root / ".dvc/config", root / ".dvc/config.local"])
    if settings.has_option("cache", "dir"):
        return False  # elsewhere
    kinds = settings.get("cache", "type", fallback=CACHE_TYPES)
    first = kinds.split(",")[0].strip(" \"'")
    return not _reflinks(root) if first == "reflink" else first == "copy"


def _reflinks(root: Path) -> bool:
    place = root / "data" if (root / "data").exists() else root
    try:
        with tempfile.TemporaryFile(dir=place) as one, tempfile.TemporaryFile(dir=place) as other:
            one.write(b"x" * 4096)
            one.flush()
            fcntl.ioctl(other, FICLONE, one.fileno())
        return True
    except OSError:
        return False


def _memory(memory: Memory, card: Card | None) -> Item:
    what, need = f"memory: {memory.stage}", _gib(memory.likely)
    if card is None or card.memory is None:
        return Item(what, need, "no card", UNKNOWN)
    there, short = f"{_gib(card.memory)} on {card.name}", memory.likely > card.memory
    change = ""
    if short:
        fitting = next(((words, size) for words, size in memory.smaller if size <= card.memory), None)
        change = (
            f"set {fitting[0]}: about {_gib(fitting[1])}" if fitting else "no setting makes it fit; take a larger card"
        )
    return Item(what, need, there, LITTLE if short else OK, change, memory.certain > card.memory)


def _hours(works: tuple[Work, ...], card: Card | None) -> list[Item]:
    lines, total, unknown = [], 0.0, False
    if card is None:
        return [Item("hours", "?", "no card", UNKNOWN, NAME_IT)]
    for work in works:
        rate = RATES[work.rate]
        seconds = None if work.amount is None else rate.on(card, work.amount)
        unknown |= seconds is None
        if seconds is None:
            why = "images not counted yet" if work.amount is None else f"speed of {card.name} not known"
            lines.append(Item(_name(work), "?", why, UNKNOWN))
            continue
        total += seconds
        long = work.change if seconds > LONG * 3600 else ""
        lines.append(Item(_name(work), _h(seconds), f"measured on an {rate.card}: {rate.source}", OK, long))
    if total:
        lines.append(Item("hours: in total", _h(total), "", UNKNOWN if unknown else OK))
    return lines


ESTIMATE = (
    "Memory and hours are estimates for one card, measured on an H100 and an H200 and scaled to other cards "
    f"by their peak FLOPs or bandwidth; memory by {MEMORY_SOURCE}. Several cards divide the hours. "
    "Memory is divided only with FSDP2, and only in training (--cards N)."
)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size < 10 * GIB else f"{size / GIB:.0f} GiB"


def _name(work: Work) -> str:
    """Two works of one stage are told apart: the softmax model's samples are drawn, then encoded."""
    return "hours: shards, drawing" if (work.stage, work.rate) == ("shards", "draw") else f"hours: {work.stage}"


def _h(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 360 else f"{max(1, round(seconds / 60))} min"

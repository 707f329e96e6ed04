"""DVC's list of who uses which file: where it refuses, wait for the other process, or mend what a killed one left."""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json

HOLDER = re.compile(r"\s*\(PID (?P<pid>\d+)\): (?P<command>.*)")
TORN = re.compile(r"ERROR: .*Unable to read RWLock-file .* JSON structure is corrupted")
REFUSAL = re.compile(rf".* is busy, it is being blocked by:|{HOLDER.pattern}|If there are no processes with such PIDs")
LIST = Path(".dvc/tmp/rwlock")


def settled(root: Path, lines: Sequence[str], say: Callable[[str], None]) -> bool:
    """Whether DVC can be asked again: a process that its `lines` name has ended, or its list can be read again."""
    return _waited(root, lines, say) or (any(map(TORN.match, lines)) and mend(root))


def mend(root: Path) -> bool:
    """Empty the list where a DVC process was killed while it wrote it. False where it is in use, or nobody's fault."""
    for _ in range(10):  # a living process may be writing it
        try:
            if (root / LIST).exists():
                read_json(root / LIST)
            return True
        except T5Error:
            time.sleep(0.1)
    if any(_is_dvc(process.pid) and _works_in(process, root) for process in psutil.process_iter()):
        return False
    write_json(root / LIST, {})
    return True


def _works_in(process: psutil.Process, root: Path) -> bool:
    try:
        return Path(process.cwd()) == root.resolve()
    except psutil.Error:
        return False


def _waited(root: Path, lines: Iterable[str], say: Callable[[str], None]) -> bool:
    """Where the lines say that another process holds what is needed: wait for its end, and return True."""
    holders = {int(match["pid"]): match["command"] for match in map(HOLDER.match, lines) if match}
    for pid, command in holders.items():
        if _is_dvc(pid):
            say(f"process {pid} ({command}) is working on the same files; waiting until it ends")
        while _is_dvc(pid):
            time.sleep(0.5)
    if holders:
        _forget(root / LIST, set(holders))
    return bool(holders)


def _is_dvc(pid: int) -> bool:
    """False also for a stranger that got the number of a DVC process that was killed."""
    try:
        process = psutil.Process(pid)
        names = [Path(word).name for word in process.cmdline()]
        return process.status() != psutil.STATUS_ZOMBIE and "dvc" in names
    except psutil.Error:
        return False


def _forget(rwlock: Path, pids: set[int]) -> None:
    """Take processes that are gone out of DVC's list of who uses which file."""
    if not rwlock.is_file():
        return
    users = read_json(rwlock)
    users["write"] = {path: user for path, user in users.get("write", {}).items() if user["pid"] not in pids}
    read = {path: [user for user in each if user["pid"] not in pids] for path, each in users.get("read", {}).items()}
    users["read"] = {path: each for path, each in read.items() if each}
    write_json(rwlock, users)

"""Two DVC processes that want the same files: wait for the other one, where DVC would advise to delete its lock."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from t5lib.utils.files import read_json, write_json

HOLDER = re.compile(r"\s*\(PID (?P<pid>\d+)\): (?P<command>.*)")
REFUSAL = re.compile(rf".* is busy, it is being blocked by:|{HOLDER.pattern}|If there are no processes with such PIDs")


def wait(root: Path, lines: Iterable[str], say: Callable[[str], None]) -> bool:
    """Where DVC's `lines` say that another process holds what it needs: wait for its end, and return True."""
    holders = {int(match["pid"]): match["command"] for match in map(HOLDER.match, lines) if match}
    for pid, command in holders.items():
        if _is_dvc(pid):
            say(f"process {pid} ({command}) works on the same files; waiting until it ends")
        while _is_dvc(pid):
            time.sleep(0.5)
    if holders:
        _forget(root / ".dvc/tmp/rwlock", set(holders))
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

"""Small file helpers. Every write is atomic: a temporary sibling, then a rename."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file beside `path`, to be written, that takes its place on success and vanishes on error.

    A reader sees the old file or the new one, never a part; a kill leaves the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write `content`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path | str) -> Any:
    """Raises T5Error when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise T5Error(f"{path} does not exist; expected a JSON file there") from None
    except ValueError as error:  # not JSON, or not text
        raise T5Error(f"{path} is not valid JSON ({error}); delete it and run the step that makes it again") from None


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place on success and vanishes on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary = work / "new"
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if not path.exists():
        os.replace(temporary, path)
    elif not _exchange(temporary, path):
        os.replace(path, work / "old")  # deleting takes time: a kill must leave the old folder whole, or the new one
        os.replace(temporary, path)
    shutil.rmtree(work, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths, with no moment between; False where that cannot be done (not Linux, some file systems)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(\.\w+)?")  # what atomic_file and atomic_dir call their own


def remove_leftovers(folder: Path | str) -> None:
    """Remove what killed writers left in `folder` and below; an old folder that was set aside is put back.

    Only for a folder that no other process writes to now.
    """
    for path in sorted(Path(folder).rglob(".*")):
        if not (match := LEFTOVER.fullmatch(path.name)):
            continue
        place = path.with_name(match["name"])
        if (path / "old").is_dir() and not place.exists():
            os.replace(path / "old", place)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

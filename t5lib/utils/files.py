"""Small file helpers. Every write is atomic and on the disk: a temporary sibling, fsync, then a rename."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error

LARGEST_HOLE = 10**9  # bytes
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_HERE, _EXCHANGE = -100, 2  # of Linux's renameat2: AT_FDCWD, RENAME_EXCHANGE
LARGEST_TEXT = 256 * 10**6  # bytes; manifests of a hundred thousand shards take a tenth of it
# Whatever holds all of one row is a model's folder: t5lib.save's, a pipeline's.
MODEL_FILES = (("t5.json", "model.safetensors"), ("model_index.json",))


def as_path(place: Any) -> Path:
    """Raises T5Error for what names no file or folder."""
    if not isinstance(place, str | Path) or not str(place).strip() or "\0" in str(place):
        raise T5Error(f"{place!r:.60} names no file or folder; expected a path")
    return Path(place)


def refuse_inside_model(path: Path | str) -> None:
    """Raises T5Error when a folder above `path` holds a model, which has to stay what was saved."""
    for folder in Path(path).absolute().parents:
        if any(all((folder / name).is_file() for name in names) for names in MODEL_FILES):
            raise T5Error(f"{path} is inside {folder}, which holds a model and nothing else; name another place")


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
        put(temporary, path)
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
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path | str) -> Any:
    """Raises T5Error when the file is missing or is not JSON."""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise T5Error(f"{path} does not exist; expected a JSON file there") from None
    except OSError as error:  # a folder, another user's
        raise T5Error(f"{path} cannot be read ({error.strerror}); expected a JSON file there") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not text; absurdly deep
        raise T5Error(f"{path} is not valid JSON ({error}); delete it and run the step that makes it again") from None


def read_object(path: Path | str) -> dict[str, Any]:
    """`read_json` of a file that holds an object. Raises T5Error when it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise T5Error(f"{path} holds a {type(content).__name__}, not an object with names; copy it again")
    return content


def read_text(path: Path | str) -> str:
    """The text of a file that people or we wrote.

    Raises:
        T5Error: a device or pipe, which would never end, or far more than such a file holds.
    """
    path = Path(path)
    refuse_endless(path)
    if path.stat().st_size > LARGEST_TEXT:
        size = path.stat().st_size / 1e6
        raise T5Error(f"{path} has {size:.0f} MB; expected a text file of at most {LARGEST_TEXT / 1e6:.0f} MB")
    return path.read_text(encoding="utf-8")


def refuse_endless(path: Path | str) -> None:
    """Raises T5Error for what is not a file to read: a device or pipe, or a hole of gigabytes."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise T5Error(f"{path} is a device, pipe or socket; expected a file")
    if stat.S_ISREG(found.st_mode) and found.st_size > LARGEST_HOLE and _begins_with_hole(path):
        raise T5Error(
            f"{path} has {found.st_size / 1e9:.0f} GB and begins with a hole: it was never written; fetch it again"
        )


def _begins_with_hole(path: Path | str) -> bool:
    with open(path, "rb") as file:
        try:
            return os.lseek(file.fileno(), 0, os.SEEK_DATA) > 0
        except OSError:  # nothing but a hole
            return True


def sha256(path: Path | str) -> str:
    """Raises T5Error for what would never end (`refuse_endless`)."""
    refuse_endless(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: str, to: str) -> None:
    """`to` becomes a second name of the file `source`, or a copy where the file system has no such."""
    try:
        os.link(source, to)
    except OSError:  # on another file system, or one without links
        shutil.copy2(source, to)


@contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place on success and vanishes on error.

    A kill at any moment leaves the old folder or the new one; what else it leaves, the next call beside it removes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.{_HOST}-{os.getpid()}."))
    temporary = work / "new"
    temporary.mkdir()
    try:
        yield temporary
        put(temporary, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes of this machine that were killed while they made folders in `folder` left there."""
    for left in folder.glob(f".*.{_HOST}-*.*"):
        match = LEFTOVER.fullmatch(left.name)
        if match and match["pid"] and left.is_dir() and not _alive(int(match["pid"])):
            with suppress(OSError):  # another user's
                _put_back(left, match["name"])
                shutil.rmtree(left)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def put(temporary: Path, path: Path) -> None:
    """Rename a file or folder to `path`, so that not even a power failure leaves a part of it there.

    What was a folder at `path` before is then at `temporary`, or beside it.
    """
    for inner in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        _sync(inner)
    if temporary.is_dir() and path.exists():
        _exchange(temporary, path)
    else:
        os.replace(temporary, path)
    _sync(path.parent)


def _exchange(new: Path, old: Path) -> None:
    """Each takes the other's name, in one step where the system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or rename(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE):
        os.replace(old, new.with_name("old"))
        os.replace(new, old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# What atomic_file and atomic_dir call their own.
LEFTOVER = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8}-(?P<pid>\d+))?\.[a-z0-9_]{8}(\.\w+)?")


def remove_leftovers(folder: Path | str) -> None:
    """Remove what killed writers left in `folder` and below; an old folder that was set aside is put back.

    Only for a folder that no other process writes to now.
    """
    for path in sorted(Path(folder).rglob(".*")):
        if not (match := LEFTOVER.fullmatch(path.name)):
            continue
        _put_back(path, match["name"])
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _put_back(left: Path, name: str) -> None:
    """Where a kill came between the two steps of an exchange, the old folder is in `left` alone."""
    if (left / "old").is_dir() and not left.with_name(name).exists():
        os.replace(left / "old", left.with_name(name))

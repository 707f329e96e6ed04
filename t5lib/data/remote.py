"""Remote shards: each is fetched whole when it is first read, into a cache of limited size.

    https://host/train-{0000..0099}.tar        braces are written out
    hf://datasets/OWNER/REPO@COMMIT/train-*.tar    patterns work where files can be listed
    s3://bucket/train-*.tar                    and whatever else fsspec reads

The environment variable T5_CACHE names the cache's folder (default ~/.cache/t5/shards), and T5_CACHE_GB sets its limit
in gigabytes (default 100). Every process that reads may hold one shard beyond the limit. fsspec fetches the shards, and
webdataset clears the cache.
"""

import hashlib
import os
import posixpath
import re
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from t5lib.utils.errors import SourceError, T5Error
from t5lib.utils.files import atomic_file, refuse_endless

FOLDER, LIMIT = "T5_CACHE", "T5_CACHE_GB"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://.")
PAUSES = (1.0, 5.0, 20.0)  # seconds before a fetch that broke off is tried again
Result = TypeVar("Result")


def is_remote(path: Path | str) -> bool:
    return bool(ADDRESS.match(str(path)))


def opened(path: str) -> BufferedReader:
    """Open a file, or the cached copy of an address, for reading. It stays readable when the cache is cleared.

    Raises:
        SourceError: it is not there, or cannot be fetched; `retryable` if trying again later may help.
        T5Error: a device or pipe; a shard that is larger than the cache.
    """
    if not is_remote(path):
        refuse_endless(path)
        return open(path, "rb")
    folder = _folder()
    place = folder / "shards" / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{posixpath.basename(path)[-80:]}"
    while True:
        try:
            return place.open("rb")
        except FileNotFoundError:
            with FileLock(_made(folder / "locks") / f"{place.name}.lock"):  # a second process that wants it finds it
                if not place.exists():
                    _fetch(path, place)


def forget(path: str) -> None:
    """Remove the copy of an address from the cache, so that it is fetched again."""
    for file in (_folder() / "shards").glob(f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-*"):
        file.unlink(missing_ok=True)


def text_of(address: str) -> str:
    """The text of a small file, never from the cache. Raises SourceError as `opened` does."""
    return _asked(address, lambda system, path: system.cat_file(path)).decode()


def listed(source: str) -> list[str]:
    """The addresses that a pattern matches: braces in order, the files of each sorted.

    Raises:
        SourceError: nothing matches, or the files cannot be listed.
    """
    from braceexpand import braceexpand

    try:
        addresses = list(braceexpand(source))
    except ValueError as error:
        raise SourceError(
            f"{source} is not a valid pattern ({error}); expected braces such as {{0000..0099}}"
        ) from None
    found = [each for address in addresses for each in _matching(address)]
    if not found:
        raise SourceError(f"{source} matches nothing; correct the address")
    return found


def check(source: str) -> None:
    """Raises SourceError unless the first of the addresses that a source names is there."""
    _asked(listed(source)[0], lambda system, path: system.info(path))


def _matching(address: str) -> list[str]:
    if not re.search(r"[*\[]", address):
        return [address]
    return _asked(address, lambda system, path: [system.unstrip_protocol(each) for each in sorted(system.glob(path))])


def _fetch(address: str, place: Path) -> None:
    limit = _limit()
    size = _asked(address, lambda system, path: system.info(path)).get("size") or 0
    if size > limit:
        raise T5Error(
            f"{address} has {size / 1e9:.1f} GB, but the cache may hold only {limit / 1e9:.1f} GB; raise {LIMIT}, or "
            "make smaller shards"
        )
    _clear(place.parent, limit - size)
    with atomic_file(place) as temporary:
        _asked(address, lambda system, path: system.get_file(path, str(temporary)))
        if size and temporary.stat().st_size != size:
            raise SourceError(
                f"{address}: the transfer stopped after {temporary.stat().st_size} of {size} bytes; run again",
                retryable=True,
            )


def _clear(folder: Path, size: int) -> None:
    """Remove the files that were not read for longest, until the others take at most `size` bytes."""
    from webdataset.cache import LRUCleanup

    LRUCleanup(str(folder), size, interval=None).cleanup()


def _asked(address: str, question: Callable[[Any, str], Result]) -> Result:
    """The answer of an address's file system. Raises SourceError, with the remedy, if there is none."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(address)
    except (ImportError, ValueError) as error:  # a library that it needs, or a protocol that nobody knows
        raise SourceError(f"{address} cannot be read: {error}") from None
    for pause in (*PAUSES, None):
        try:
            return question(system, path)
        except Exception as error:  # each file system has its own
            if _is_refusal(error):
                raise SourceError(
                    f"{address} does not exist or may not be read ({type(error).__name__}); correct the address"
                ) from None
            if pause is None:
                told = f"{type(error).__name__}: {error}"[:300]
                raise SourceError(f"{address} cannot be fetched ({told}); try again later", retryable=True) from error
            time.sleep(pause)
    raise AssertionError


def _is_refusal(error: Exception) -> bool:
    """Whether trying again cannot help. fsspec also raises FileNotFoundError when a web server is down."""
    if not isinstance(error, FileNotFoundError | PermissionError):
        return False
    status = getattr(error.__cause__, "status", None)
    return error.__cause__ is None or (status is not None and 400 <= status < 500 and status not in (408, 429))


def _folder() -> Path:
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache/t5/shards")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _limit() -> int:
    """In bytes."""
    given = os.environ.get(LIMIT, "100")
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise T5Error(f"the environment variable {LIMIT} is {given!r}; expected gigabytes, such as 100")
    return int(limit * 1e9)

"""What the machine refuses (disk, permission, memory) in one line: where, why, what was kept, and what to do."""

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from t5lib.utils import processes
from t5lib.utils.errors import T5Error

FULL = re.compile(r"No space left on device|[Qq]uota exceeded|disk is full|PytorchStreamWriter failed writing")
NO_MEMORY = re.compile(r"out of memory|t allocate memory|annot allocate memory|bad_alloc|DataLoader worker .* killed")
# What a process hears from gloo or NCCL when one that it works with is gone.
GONE = re.compile(r"Connection (closed|reset) by peer|NCCL error|ncclRemoteError|Broken pipe")
LEAST = 1 << 20  # bytes; where less is free an error that gives no reason is put down to the disk


@contextmanager
def in_words(place: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Within, an error that disk, permission or memory is behind becomes a T5Error; all others stay what they are.

    The first cause decides: what failed while it was being handled must not hide it.

    Args:
        place: a folder on the disk that the work is written to.
        kept: tells what there is still, such as "partial work is kept in data/scratch/a".
    """
    try:
        yield
    except T5Error:
        raise
    except Exception as error:
        if message := _explained(error, place, kept()):
            raise message from error
        raise


def _explained(error: Exception, place: Path, kept: str) -> T5Error | None:
    for cause in reversed(list(_chain(error))):
        if reason := _reason(cause, place):
            return T5Error(f"{reason} and run the same again; {kept}")
    with suppress(OSError):
        if shutil.disk_usage(place).free < LEAST:
            return T5Error(f"{_full(place)} and run the same again; {kept} ({type(error).__name__}: {error})")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(cause: BaseException, place: Path) -> str | None:
    number, path = getattr(cause, "errno", None), getattr(cause, "filename", None) or place
    if number in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(cause)):
        return _full(path)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: {cause.strerror}; give this user the right to read and write there"  # type: ignore[attr-defined]
    if isinstance(cause, MemoryError) or number == errno.ENOMEM or NO_MEMORY.search(str(cause)):
        said = str(cause).strip().partition("\n")[0] or type(cause).__name__
        return f"memory is short ({said}); take a smaller batch_size, or end other programs,"
    if isinstance(cause, RuntimeError) and GONE.search(str(cause)) and not processes.alone():
        return "another process of this stage has ended, which stopped all of them; see its own message,"
    return None


def _full(path: Path | str) -> str:
    return f"{path}: no space is left on its disk; free some"

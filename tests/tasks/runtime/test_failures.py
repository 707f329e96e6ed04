"""A full disk, a missing right and too little memory are told in one line, whatever they made fail."""

import errno
import os

import pytest

from t5lib.utils.errors import T5Error
from tasks.runtime import failures


def os_error(number, path=None):
    return OSError(number, os.strerror(number), path)


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


FULL, RIGHT, MEMORY = "no space is left on its disk; free some", "give this user the right", "memory is short"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (os_error(errno.ENOSPC, "out/a.tar"), f"^out/a.tar: {FULL}"),
        (os_error(errno.EDQUOT), FULL),
        (RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file"), FULL),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
        (Exception("(sqlite3.OperationalError) database or disk is full"), FULL),
        (os_error(errno.EACCES, "out/b"), f"^out/b: Permission denied; {RIGHT}"),
        (os_error(errno.EROFS, "out/b"), RIGHT),
        (os_error(errno.EPERM, "out/b"), RIGHT),
        (MemoryError(), MEMORY),
        (os_error(errno.ENOMEM), MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory.*smaller batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MEMORY),
    ],
    ids=repr,
)
def test_the_line_names_path_reason_remedy_and_what_is_kept(tmp_path, error, reason):
    with pytest.raises(T5Error, match=rf"{reason}.* and run the same again; all is kept$") as raised:
        with failures.in_words(tmp_path, lambda: "all is kept"):
            raise error
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)


def test_a_second_error_does_not_hide_the_first(tmp_path):
    with pytest.raises(T5Error, match=FULL):
        with failures.in_words(tmp_path, lambda: "x"):
            try:
                raise os_error(errno.ENOSPC, "weights")
            finally:
                raise KeyError("cleaning up")


@pytest.mark.parametrize("error", [T5Error("too hot"), KeyError("x"), os_error(errno.ENOENT, "x"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        with failures.in_words(tmp_path, lambda: "x"):
            raise error
    assert raised.value is error


def test_an_error_without_a_reason_is_put_down_to_a_disk_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "LEAST", 1 << 60)
    with pytest.raises(T5Error, match=rf"{FULL}.*\(RuntimeError: server gone\)$"):
        with failures.in_words(tmp_path, lambda: "x"):
            raise RuntimeError("server gone")

"""Tar files read strictly: what readers of tar files pass over in silence is an error here.

A reader takes a damaged header for the end of the archive, stops at the first end of two archives put one after the
other, and leaves out files that belong to no sample. All of these lose samples without a word.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext, tarfile_samples

from t5lib.utils.errors import T5Error

Sample = dict[str, Any]  # webdataset's form: "__key__", "__url__", and one entry of bytes for each file of that key
END = 2 * tarfile.BLOCKSIZE  # zero bytes that end an archive, at the least
READ_AT_ONCE = 1 << 20
ABOUT_SHARD = re.compile(r"__[^/]*__($|/)")  # names of files that belong to no sample, by webdataset's convention


def read_samples(path: Path | str) -> Iterator[Sample]:
    """The samples of a tar file in file order, undecoded. Raises T5Error when it cannot be read."""
    with named(path):
        yield from tarfile_samples([{"url": str(path)}])


def check_tar(path: Path | str) -> None:
    """Read a tar file's structure to its very end; its samples' contents are not looked at.

    Raises:
        T5Error: a damaged header, an end that is missing or followed by anything, a file that belongs to no sample, a
            sample whose files do not stand one after the other, or a name that occurs twice.
    """
    with named(path), tarfile.open(path) as tar:
        members = [member for member in tar if not member.isdir()]
        assert tar.fileobj
        tar.fileobj.seek(tar.offset)  # where tarfile saw no further header
        end = tar.offset, *_zeros(tar.fileobj)
    _check_end(path, *end)
    _check_members(path, members)


def _check_end(path: Path | str, offset: int, zeros: int, nothing_else: bool) -> None:
    if nothing_else and zeros >= END:
        return
    if nothing_else:
        fault = f"was cut short: it stops at byte {offset + zeros} without the two empty blocks that end a tar file"
    elif zeros < tarfile.BLOCKSIZE:
        fault = f"is damaged: no header can be read at byte {offset}, and what follows would be lost"
    else:
        fault = f"goes on after its end, at byte {offset + zeros}, where no reader looks: tar files joined into one?"
    raise T5Error(f"{path} {fault}; fetch or make it again")


def _zeros(file: Any) -> tuple[int, bool]:
    """How many zero bytes come next in the file, and whether there is nothing else."""
    count = 0
    while block := file.read(READ_AT_ONCE):
        other = block.lstrip(b"\0")
        count += len(block) - len(other)
        if other:
            return count, False
    return count, True


def _check_members(path: Path | str, members: Sequence[tarfile.TarInfo]) -> None:
    names: set[tuple[str, str]] = set()
    keys: set[str] = set()
    last = None
    for member in members:
        if not member.isreg():
            raise T5Error(f"{path}: '{member.name}' is no regular file; pack links as files: tar --dereference")
        if ABOUT_SHARD.match(member.name):
            continue
        key, ending = base_plus_ext(member.name)
        if key is None or key.endswith("/"):
            raise T5Error(
                f"{path}: '{member.name}' belongs to no sample: its name is not KEY.ENDING; rename it or leave it out"
            )
        if (key, ending.lower()) in names:
            raise T5Error(f"{path} holds '{member.name}' twice; pack it again, each file once")
        if key != last and key in keys:
            raise T5Error(
                f"{path}: the files of sample '{key}' do not stand one after the other, and would be read as several "
                "samples; pack it again with tar --sort=name"
            )
        names.add((key, ending.lower()))
        keys.add(key)
        last = key


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Whatever is raised of a file that cannot be read becomes a T5Error with its path."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else type(error).__name__)
        first = reason.partition(" @ ")[0].partition("\n")[0]
        raise T5Error(f"{path} cannot be read as a tar file ({first}); fetch or make it again") from error

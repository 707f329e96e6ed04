"""Tar files read strictly: what readers of tar files pass over in silence is an error here.

A reader takes a damaged header for the end of the archive, stops at the first end of two archives put one after the
other, and leaves out files that belong to no sample. All of these lose samples without a word. It also believes every
size that a header declares, and fills the memory.
"""

import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys

from t5lib.utils.errors import T5Error

Sample = dict[str, Any]  # webdataset's form: "__key__", "__url__", and one entry of bytes for each file of that key
END = 2 * tarfile.BLOCKSIZE  # zero bytes that end an archive, at the least
READ_AT_ONCE = 1 << 20
NOTES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
LARGEST_NOTE = 1 << 20  # bytes of a header that holds no file but something about the next one, such as a long name
LARGEST_MEMBER = 10**8  # bytes of a file that is larger than the whole, compressed archive
INFLATION = 200  # times its compressed size that an archive may have, beyond the bytes of a largest member
SHOWN = 200  # characters of a name in a message
ABOUT_SHARD = re.compile(r"__[^/]*__($|/)")  # names of files that belong to no sample, by webdataset's convention


class _Member(tarfile.TarInfo):
    """A header, refused where reading what belongs to it would fill the memory or never end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        _require(member.size >= 0, f"a header of {member.size} bytes")
        _require(member.type not in NOTES or member.size <= LARGEST_NOTE, f"a header of {member.size} bytes")
        return member


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(f"{fault}, which no archive of images has")


def read_samples(path: Path | str, file: BufferedReader) -> Iterator[Sample]:
    """The samples of a tar file in file order, undecoded. Raises T5Error, with its `path`, when it cannot be read."""
    with named(path), _opened(file) as tar:
        yield from group_by_keys(_files(path, tar, size_of(file)))


def size_of(file: BufferedReader) -> int:
    """In bytes."""
    return os.fstat(file.fileno()).st_size


def _opened(file: BufferedReader) -> tarfile.TarFile:
    file.seek(0)
    return tarfile.open(fileobj=file, tarinfo=_Member)


def _files(path: Path | str, tar: Any, size: int) -> Iterator[dict[str, Any]]:
    """What webdataset groups into samples."""
    for member in _members(tar, size):
        if member.isreg() and not ABOUT_SHARD.match(member.name):
            yield {"__url__": str(path), "fname": member.name, "data": tar.extractfile(member).read()}
        tar.members.clear()  # which grow with every file that was read


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Those of an archive of so many bytes, none larger than there can be content for."""
    most = _most(size)
    for member in tar:
        name, end = quoted(member.name), member.offset_data + member.size
        _require(not member.issparse(), f"{name} with holes (pack it again, without --sparse)")
        _require(0 <= member.size <= max(size, LARGEST_MEMBER), f"{name} of {member.size} bytes in {size}")
        _require(end <= most, f"{end} bytes or more packed into {size}")
        yield member


def _most(size: int) -> int:
    """Bytes that an archive of so many bytes may have when it is unpacked."""
    return INFLATION * size + LARGEST_MEMBER


def quoted(name: str) -> str:
    """A name from a file, as messages show it: without control characters, which a terminal would obey."""
    return repr(name if len(name) <= SHOWN else f"{name[:SHOWN]}…")


def check_tar(path: Path | str, file: BufferedReader) -> None:
    """Read a tar file's structure to its very end; its samples' contents are not looked at.

    Raises:
        T5Error: a damaged header, an end that is missing or followed by anything, a file that belongs to no sample, a
            sample whose files do not stand one after the other, or a name that occurs twice.
    """
    size = size_of(file)
    with named(path), _opened(file) as tar:
        members = [member for member in _members(tar, size) if not member.isdir()]
        assert tar.fileobj
        tar.fileobj.seek(tar.offset)  # where tarfile saw no further header
        end = tar.offset, *_zeros(tar.fileobj, _most(size) - tar.offset)
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


def _zeros(file: Any, most: int) -> tuple[int, bool]:
    """How many zero bytes come next in the file, and whether there is nothing else; `most` of them are padding."""
    count = 0
    while block := file.read(READ_AT_ONCE):
        other = block.lstrip(b"\0")
        count += len(block) - len(other)
        _require(count <= most, f"an end of {count} zero bytes or more")
        if other:
            return count, False
    return count, True


def _check_members(path: Path | str, members: Sequence[tarfile.TarInfo]) -> None:
    names: set[tuple[str, str]] = set()
    keys: set[str] = set()
    last = None
    for member in members:
        if not member.isreg():
            raise T5Error(
                f"{path}: {quoted(member.name)} is not a regular file; pack links as files (tar --dereference)"
            )
        if ABOUT_SHARD.match(member.name):
            continue
        key, ending = base_plus_ext(member.name)
        if not key or key.endswith("/") or not ending or ending.startswith("__"):  # those names are webdataset's
            raise T5Error(
                f"{path}: {quoted(member.name)} belongs to no sample: its name is not KEY.ENDING; rename it or leave "
                "it out"
            )
        if (key, ending.lower()) in names:
            raise T5Error(f"{path} holds {quoted(member.name)} twice; pack it again, each file once")
        if key != last and key in keys:
            raise T5Error(
                f"{path}: the files of sample {quoted(key)} are not next to each other, and would be read as "
                "several samples; pack it again with tar --sort=name"
            )
        names.add((key, ending.lower()))
        keys.add(key)
        last = key


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Whatever is raised of a file that cannot be read becomes a T5Error with its path."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else type(error).__name__)
        first = reason.partition("\n")[0]
        raise T5Error(f"{path} cannot be read as a tar file ({first}); fetch or make it again") from error

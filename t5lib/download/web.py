"""One file by https, continued after an interruption where the server allows it."""

import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import requests

from t5lib.utils.errors import SourceError, reason
from t5lib.utils.progress import progress

LARGEST = 200 * 10**9  # bytes of a file that is fetched, by whatever scheme
_RESERVE = 10**8  # bytes that stay free on the disk
_TIMEOUT = (20, 60)  # seconds to connect, and of silence while receiving
_CHUNK = 1 << 16  # bytes; of a chunk that breaks off nothing is kept
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


def file_name(url: str) -> str:
    """The name of the file that `url` names. Raises SourceError for what is no address of a file."""
    name = Path(unquote(_parts(url).path)).name
    if name in ("", ".."):
        raise SourceError(f"{url} does not end in a file name; give the address of the file itself")
    if not name.isprintable() or len(name.encode()) > 200:
        raise SourceError(f"{url} ends in {name[:40]!r}, which is not a file name; give another address of it")
    return name


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and (parts.port is None or parts.port > 0) and url.isprintable() and " " not in url
    except ValueError:
        sound = False
    if not sound:
        shown = url.rpartition("@")[2][:200]  # without what may be a password
        raise SourceError(f"{shown!r} is not a valid address; expected https://HOST/PATH/FILE")
    if parts.username is not None or parts.password is not None:
        raise SourceError(
            f"{url} holds a user name or password, which settings and records would show; write the address without, "
            f"and put them into ~/.netrc: machine {parts.hostname} login NAME password PASSWORD"
        )
    return parts


def download(url: str, partial: Path, token: str | None) -> Path:
    """Download `url` into `partial`, going on after the bytes that an earlier, interrupted call left there."""
    path = partial / file_name(url)
    part, version = path.with_name(path.name + ".part"), path.with_name(path.name + ".version")
    start = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    if start:  # If-Range: a file that changed since comes whole
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    try:
        with _Session() as session, session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            continued = response.status_code == 206 and _begins_at(response, start)
            if start and response.status_code in (206, 416) and not continued:
                part.unlink()  # killed between the last byte and the rename, or not the bytes that were asked for
                return download(url, partial, token)
            _check_answer(response, path.name)
            if not continued:
                part.unlink(missing_ok=True)
                _note_version(response, version)
            _receive(response, part, start if continued else 0)
    except requests.RequestException as error:
        raise _explain(url, error, part) from error
    except OSError as error:
        raise SourceError(
            f"{url}: {part} cannot be written ({error.strerror}){_kept(part)}; free some space and run again",
            retryable=True,
        ) from error
    os.replace(part, path)
    return path


class _Session(requests.Session):
    """Follows no redirect from an encrypted address to one that is not."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target and resp.url.startswith("https:") and urlsplit(urljoin(resp.url, target)).scheme != "https":
            raise SourceError(f"{resp.url} redirects to {target}, which is not encrypted; give an https address")
        return target


def _begins_at(response: requests.Response, start: int) -> bool:
    """Whether a part of a file begins where it was asked to."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return found is not None and int(found[1]) == start > 0


def _check_answer(response: requests.Response, name: str) -> None:
    code = response.status_code
    if code in (401, 403):
        remedy = "it needs permission: check the address, or pass a token"
    elif code in _TEMPORARY:
        remedy = "the server is busy or failing; run again later"
    else:
        remedy = "check the address"
    if code not in (200, 206) or (code == 206 and "Range" not in response.request.headers):
        raise SourceError(f"{response.url} answered {code} {response.reason}; {remedy}", retryable=code in _TEMPORARY)
    if "text/html" in response.headers.get("Content-Type", "") and not name.endswith((".html", ".htm")):
        raise SourceError(f"{response.url} answered with a web page, perhaps to log in; {remedy}, or pass a token")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise SourceError(f"{response.url} came compressed ({encoding}), unasked; give an address of the plain file")


def _note_version(response: requests.Response, version: Path) -> None:
    """Remember which version of the file this is; without that, what is received cannot be continued later."""
    tag = response.headers.get("ETag", "")
    mark = response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
    if mark:
        version.write_text(mark)
    else:
        version.unlink(missing_ok=True)


def _receive(response: requests.Response, part: Path, start: int) -> None:
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    room = start + shutil.disk_usage(part.parent).free - _RESERVE
    _refuse_too_large(response, total or 0, room)
    title = f"download {part.stem} (MB)"
    with part.open("ab" if start else "wb") as file:
        with progress(title, total // 10**6, start // 10**6) if total else nullcontext() as report:
            for chunk in response.iter_content(_CHUNK):
                _refuse_too_large(response, file.tell() + len(chunk), room)
                file.write(chunk)
                if report:
                    report.advance(file.tell() // 10**6)


def _refuse_too_large(response: requests.Response, size: int, room: int) -> None:
    if size > min(LARGEST, room):
        why = f"there is room for {max(room, 0) / 1e9:.1f} GB" if room < LARGEST else "no file of weights is so large"
        raise SourceError(
            f"{response.url} has {size / 1e9:.1f} GB or more; {why}: check the address, or free some space"
        )


def _explain(url: str, error: requests.RequestException, part: Path) -> SourceError:
    if isinstance(error, requests.exceptions.SSLError):
        return SourceError(f"{url}: the server's certificate is not trusted ({error}); check REQUESTS_CA_BUNDLE")
    if isinstance(error, ValueError):  # requests' errors for what is no address at all
        return SourceError(f"{url} is not a valid address ({error}); correct it")
    return SourceError(
        f"{url} cannot be reached, or the connection broke ({reason(error)}){_kept(part)}; check the network and run "
        "again: it goes on from there if the server allows it",
        retryable=True,
    )


def _kept(part: Path) -> str:
    return f"; {part.stat().st_size / 10**6:.1f} MB of it are kept here" if part.exists() else ""

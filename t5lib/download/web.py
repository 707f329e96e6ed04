"""One file by https, continued after an interruption where the server allows it."""

import os
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests

from t5lib.utils.errors import SourceError
from t5lib.utils.progress import progress

_TIMEOUT = (20, 60)  # seconds to connect, and of silence while receiving
_CHUNK = 1 << 16  # bytes; of a chunk that breaks off nothing is kept
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


def file_name(url: str) -> str:
    name = Path(unquote(urlsplit(url).path)).name
    if name in ("", ".."):
        raise SourceError(f"{url} does not end in a file name; give the address of the file itself")
    return name


def download(url: str, partial: Path, token: str | None) -> Path:
    """Download `url` into `partial`, going on after the bytes that an earlier, interrupted call left there."""
    path = partial / file_name(url)
    part, version = path.with_name(path.name + ".part"), path.with_name(path.name + ".version")
    start = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    if start:  # If-Range: a file that changed since comes whole
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if start and response.status_code == 416:  # nothing to add: killed between the last byte and the rename
                part.unlink()
                return download(url, partial, token)
            _check_status(response)
            if response.status_code == 200:
                part.unlink(missing_ok=True)
                _note_version(response, version)
            _receive(response, part, start if response.status_code == 206 else 0)
    except requests.RequestException as error:
        raise _explain(url, error, part) from error
    os.replace(part, path)
    return path


def _check_status(response: requests.Response) -> None:
    code = response.status_code
    if code in (200, 206):
        return
    if code in (401, 403):
        remedy = "it needs permission: check the address, or pass a token"
    elif code in _TEMPORARY:
        remedy = "the server is busy or out of order; run again later"
    else:
        remedy = "check the address"
    raise SourceError(f"{response.url} answered {code} {response.reason}; {remedy}", retryable=code in _TEMPORARY)


def _note_version(response: requests.Response, version: Path) -> None:
    """Remember which version of the file this is; without that, what is received cannot be continued later."""
    tag = response.headers.get("ETag", "")
    mark = response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
    if mark:
        version.write_text(mark)
    else:
        version.unlink(missing_ok=True)


def _receive(response: requests.Response, part: Path, start: int) -> None:
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    title = f"download {part.stem} (MB)"
    with part.open("ab" if start else "wb") as file:
        with progress(title, total // 10**6, start // 10**6) if total else nullcontext() as report:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                if report:
                    report.advance(file.tell() // 10**6)


def _explain(url: str, error: requests.RequestException, part: Path) -> SourceError:
    if isinstance(error, requests.exceptions.SSLError):
        return SourceError(f"{url}: the server's certificate is not trusted ({error}); check REQUESTS_CA_BUNDLE")
    if isinstance(error, ValueError):  # requests' errors for what is no address at all
        return SourceError(f"{url} is not a valid address ({error}); correct it")
    kept = f"; {part.stat().st_size / 10**6:.1f} MB of it are here" if part.exists() else ""
    return SourceError(
        f"{url} cannot be reached, or the connection broke ({error}){kept}; check the network and run again: "
        "it goes on from there if the server allows it",
        retryable=True,
    )

"""Repos of the Hugging Face hub (timm models, whole diffusers pipelines, data sets) at a pinned commit."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5lib.utils import files
from t5lib.utils.errors import SourceError, reason

_FORM = re.compile(r"(?P<datasets>datasets/)?(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^#\s]+))?(#(?P<pattern>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Repo:
    datasets: str | None  # "datasets/" for a data set
    name: str  # owner/repo
    revision: str
    pattern: str | None  # which files, several patterns with commas between; None: all

    @property
    def patterns(self) -> list[str] | None:
        return self.pattern.split(",") if self.pattern else None

    @property
    def kind(self) -> str:
        return "dataset" if self.datasets else "model"

    def __str__(self) -> str:
        return f"{self.datasets or ''}{self.name}@{self.revision}" + (f"#{self.pattern}" if self.pattern else "")


def file_name(rest: str) -> str | None:
    """The name of the one file that the source names, None when it names several."""
    pattern = _parse(rest).pattern
    return Path(pattern).name if pattern and not re.search(r"[*?\[,]", pattern) else None


def resolve(rest: str, token: str | None) -> str:
    """`rest` with its revision replaced by the commit it names now; warns when that was needed."""
    repo = _parse(rest)
    if _COMMIT.fullmatch(repo.revision):
        return rest
    commit = _info(repo, token).sha
    pinned = rest.replace(f"@{repo.revision}", f"@{commit}", 1)
    _log.warning("hf:%s is not pinned: '%s' may name other files tomorrow; write hf:%s", rest, repo.revision, pinned)
    return pinned


def check_access(rest: str, token: str | None = None) -> None:
    """Raises SourceError, with the remedy, unless the files of the repo may be downloaded."""
    from huggingface_hub import HfApi

    repo = _parse(rest)
    with _explained(repo, token):
        HfApi().auth_check(repo.name, repo_type=repo.kind, token=token)


@dataclass(frozen=True)
class Listed:
    """The files of a repo that a source names: their number, their bytes together, and whether the repo is gated."""

    files: int
    size: int
    gated: bool


def look(rest: str, token: str | None = None) -> Listed:
    """What the hub lists, without fetching any of it. Raises SourceError as `fetch` does."""
    from huggingface_hub.utils import filter_repo_objects

    repo = _parse(rest)
    info = _info(repo, token)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings}
    wanted = list(filter_repo_objects(sizes, allow_patterns=repo.patterns))
    return Listed(len(wanted), sum(sizes[name] for name in wanted), bool(getattr(info, "gated", False)))


def download(rest: str, partial: Path, token: str | None) -> Path:
    """Download the files of a pinned repo into `partial`; check every size, and every checksum that the hub gives.

    Returns the file if the source names one, otherwise a folder that holds the files under their names in the repo.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    repo = _parse(rest)
    info = _info(repo, token)
    found = {entry.rfilename: entry for entry in info.siblings}
    wanted = list(filter_repo_objects(found, allow_patterns=repo.patterns))
    if outside := [name for name in found if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise SourceError(f"hf:{repo} lists {outside[0]!r}, which lies outside the repo; do not use this repo")
    if not wanted:
        raise SourceError(f"hf:{repo} matches no file; the repo holds {', '.join(sorted(found)[:12])}")
    folder = partial / "repo"
    _require_space(partial, sum(found[name].size or 0 for name in wanted), repo)
    with _explained(repo, token):
        snapshot_download(
            repo.name,
            repo_type=repo.kind,
            revision=info.sha,
            allow_patterns=repo.patterns,
            local_dir=folder,
            token=token,
        )
    for name in wanted:
        _check(folder / name, found[name], repo)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's notes for continuing
    return folder / repo.pattern if repo.pattern and repo.pattern in found else folder


def _require_space(partial: Path, size: int, repo: _Repo) -> None:
    room = shutil.disk_usage(partial).free + sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if size > room:
        raise SourceError(
            f"hf:{repo} has {size / 1e9:.1f} GB, and {partial.parent} room for {room / 1e9:.1f} GB; free some space, "
            "or name fewer files: #FILE"
        )


def _parse(rest: str) -> _Repo:
    match = _FORM.fullmatch(rest)
    if not match:
        raise SourceError(f"source 'hf:{rest}' is not understood; expected hf:[datasets/]OWNER/REPO@REVISION[#FILE]")
    if not match["revision"]:
        raise SourceError(
            f"source 'hf:{rest}' has no revision, and a repo's files can change; write "
            f"hf:{match['datasets'] or ''}{match['name']}@COMMIT with a commit from the repo's history"
        )
    patterns = (match["pattern"] or "").split(",")
    paths = [match["name"], match["revision"], *patterns]
    leading_out = any(part in (".", "..") for path in paths for part in path.split("/"))
    if leading_out or any(pattern.startswith("/") for pattern in patterns) or re.search(r"[\x00-\x1f\\]", rest):
        raise SourceError(
            f"source {f'hf:{rest}'[:200]!r} names nothing in a repo; expected #FILE as the repo lists it, without '..' "
            "and no '/' in front"
        )
    return _Repo(**match.groupdict())


def _info(repo: _Repo, token: str | None) -> Any:
    from huggingface_hub import HfApi

    with _explained(repo, token):
        return HfApi().repo_info(
            repo.name, repo_type=repo.kind, revision=repo.revision, files_metadata=True, token=token
        )


def _check(path: Path, entry: Any, repo: _Repo) -> None:
    """Remove and refuse a file that is not what the hub announced."""
    size = path.stat().st_size if path.exists() else 0
    sound = path.exists() and entry.size in (None, size)
    if sound and entry.lfs:
        sound = files.sha256(path) == entry.lfs.sha256
    elif sound and entry.blob_id:
        sound = _git_checksum(path) == entry.blob_id
    if not sound:
        path.unlink(missing_ok=True)
        raise SourceError(
            f"hf:{repo}: {entry.rfilename} arrived damaged ({size} of {entry.size} bytes, or another checksum); "
            "run again: only this file is fetched again",
            retryable=True,
        )


def _git_checksum(path: Path) -> str:
    """The name that git gives a file, which the hub tells of those that are not large."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _explained(repo: _Repo, token: str | None) -> Iterator[None]:
    """Turn the hub client's errors into a SourceError with the remedy."""
    from huggingface_hub import errors, get_token

    try:
        yield
    except errors.GatedRepoError:
        remedy = (
            "your token's account has no access to it: accept the conditions on its page with that account"
            if token or get_token()
            else "accept the conditions on its page, make a read token in your account's settings, and set HF_TOKEN"
        )
        raise SourceError(f"hf:{repo} is gated; {remedy}") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(f"hf:{repo} does not exist, or is private; check the name, or set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"hf:{repo}: there is no revision '{repo.revision}'; take one of its history") from None
    except errors.OfflineModeIsEnabled:
        raise SourceError(f"hf:{repo} cannot be fetched in offline mode; unset HF_HUB_OFFLINE") from None
    except errors.HFValidationError as error:
        raise SourceError(f"hf:{repo} is not a valid name ({error}); expected OWNER/REPO") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        temporary = code >= 500 or code in (408, 429)
        remedy = "run again later" if temporary else "check the name, and HF_TOKEN if it needs one"
        raise SourceError(f"hf:{repo}: the hub answered {code}; {remedy}", retryable=temporary) from error
    except (errors.HTTPError, OSError) as error:  # the client's network errors are of these two kinds
        if isinstance(error, OSError) and error.errno:
            raise  # this machine's disk, with its own message
        raise SourceError(
            f"hf:{repo}: the hub cannot be reached, or the connection broke ({reason(error)}); check the network and "
            "run again: it resumes with what was received",
            retryable=True,
        ) from error

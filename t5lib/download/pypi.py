"""Wheels of the package index, by the ordinary pip client and the user's own settings for it."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from t5lib.utils.errors import SourceError

# What pip says when it could not reach an index, whatever else it concludes from that.
_NO_NETWORK = re.compile(r"Retrying \(Retry\(|Max retries exceeded|ConnectionError|timed out|Temporary failure", re.I)


def check(requirement: str) -> None:
    """Raises SourceError unless it is `name==version`."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.+!-]+", requirement):
        raise SourceError(f"source 'pypi:{requirement}' names no exact version; write pypi:NAME==VERSION")


def download(requirement: str, partial: Path) -> Path:
    """Download the wheel of `name==version` into `partial`. Wheels only: building from source would run its code."""
    folder = Path(tempfile.mkdtemp(dir=partial))
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,  # pip's own progress bar
        stderr=subprocess.PIPE,
        text=True,
    )
    if result.returncode:
        raise _explain(requirement, result.stderr)
    return next(folder.glob("*.whl"))


def _explain(requirement: str, stderr: str) -> SourceError:
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    said = " ".join(lines) or stderr.strip()[-500:]
    if "No module named pip" in stderr:
        return SourceError(f"source 'pypi:{requirement}' needs pip in {sys.executable}; run: python -m ensurepip")
    if _NO_NETWORK.search(stderr):
        return SourceError(
            f"source 'pypi:{requirement}': pip could not reach its package index ({said}); check the network, "
            "the proxy and `pip config list`, then run again",
            retryable=True,
        )
    return SourceError(
        f"source 'pypi:{requirement}': pip found no such wheel ({said}); check name and version, and that the package "
        "index in `pip config list` has it"
    )

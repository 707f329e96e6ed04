"""Is all that a target needs within reach? Asked before a flow starts, so that everything missing is named at once."""

from pathlib import Path
from typing import Any

from t5lib.data import remote
from t5lib.download import hub
from t5lib.utils.errors import SourceError
from t5lib.utils.files import write_bytes
from tasks.runtime import failures, local_sources

PROBE = 8 << 20  # bytes: what the records of a run may take


def check(root: Path, target: str, settings: dict[str, Any]) -> None:
    """Raises T5Error that lists what cannot be had, of the hub's too, and how to get each."""
    local_sources.check(root, target, settings, elsewhere=_problem)


def check_disk(root: Path) -> None:
    """Raises T5Error where nothing, or next to nothing, can be written to data/."""
    with failures.in_words(root, lambda: "nothing was started"):
        write_bytes(root / "data/.probe", bytes(PROBE))
        (root / "data/.probe").unlink()


def _problem(source: str, own: str) -> str | None:
    scheme, _, rest = source.partition(":")
    try:
        if remote.is_remote(source) and "#sha256=" not in source:
            remote.check(source)
        elif scheme == "hf":
            hub.check_access(rest)
    except SourceError as error:
        from huggingface_hub import get_token

        page = f"https://huggingface.co/{rest.partition('@')[0]}"
        token = f"; no token is set: if its page asks for it, accept the conditions on {page} and set HF_TOKEN"
        told = "" if "HF_TOKEN" in str(error) or get_token() else token
        return f"{error}{told}; or {own} (file:FOLDER for what you have)"
    return None

"""Is all that a target needs within reach? Asked before a flow starts, so that everything missing is named at once."""

import glob
import importlib.util
from pathlib import Path
from typing import Any

from t5lib.download import hub
from t5lib.utils.errors import SourceError, T5Error
from t5lib.utils.files import write_bytes
from tasks.runtime import failures

# Settings that name sources: section, setting, what it is, and what to do when a file: is not there.
SOURCES = (
    ("fetch", "source", "weights", "put the model there"),
    ("fetch", "inception", "Inception's weights", "download torch-fidelity's file, or leave fetch.inception out"),
    ("fetch", "clip", "CLIP", "download it, or leave fetch.clip out"),
    ("shards", "train", "training images", "put them there"),
    ("shards", "val", "validation images", "put them there"),
)
PROBE = 8 << 20  # bytes: what the records of a run may take
CAPTIONED = " as tar files with <key>.jpg and <key>.txt (img2dataset with output_format=webdataset writes such)"


def check(root: Path, target: str, settings: dict[str, Any]) -> None:
    """Raises T5Error that lists what cannot be had, and how to get each; what was fetched before is not asked for."""
    missing = []
    for section, name, what, remedy in SOURCES:
        source = (settings.get(section) or {}).get(name)
        if not source or (root / f"data/out/{target}/{section}.json").exists():
            continue
        if section == "shards" and "encode" in settings["shards"]:
            remedy += CAPTIONED
        own = f"name yours: params.yaml, targets.{target}.{section}.{name}"
        if problem := _problem(root, source, remedy, own):
            missing.append(f"  {what}: {problem}")
    if "adamw8bit" in _optimizers(settings) and not importlib.util.find_spec("bitsandbytes"):
        missing.append("  bitsandbytes: adamw8bit needs it; pip install bitsandbytes, or set optimizer: adamw")
    if missing:
        raise T5Error("\n".join([f"'{target}' cannot be built yet. Missing:", *missing]))


def check_disk(root: Path) -> None:
    """Raises T5Error where nothing, or next to nothing, can be written to data/."""
    with failures.in_words(root, lambda: "nothing was started"):
        write_bytes(root / "data/.probe", bytes(PROBE))
        (root / "data/.probe").unlink()


def _optimizers(settings: Any) -> set[str]:
    """Every `optimizer` in a target's settings, however deep."""
    if not isinstance(settings, dict):
        return set()
    return {settings["optimizer"]} if "optimizer" in settings else set().union(*map(_optimizers, settings.values()))


def _problem(root: Path, source: str, remedy: str, own: str) -> str | None:
    scheme, _, rest = source.partition(":")
    if scheme == "file" and not glob.glob(str(root / Path(rest).expanduser())):
        return f"{source} is not there; {remedy}, or {own}"
    try:
        if scheme == "hf":
            hub.check_access(rest)
    except SourceError as error:
        from huggingface_hub import get_token

        page = f"https://huggingface.co/{rest.partition('@')[0]}"
        token = f"; no token is set: if its page asks for it, accept the conditions on {page} and set HF_TOKEN"
        told = "" if "HF_TOKEN" in str(error) or get_token() else token
        return f"{error}{told}; or {own} (file:FOLDER for what you have)"
    return None

"""The description of a run: what was made, from what, by whom and on what."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from t5lib.utils.errors import without_secrets

NOTE = "mlflow.note.content"  # what MLflow shows as the description of a run
TELLING = ("inner", "key_norm", "locality")  # settings of `convert` that tell runs apart


def tags_of(settings: dict[str, Any], commit: str, code: str) -> dict[str, str]:
    """What tells a run from others at a glance, and where it comes from.

    Args:
        settings: the target's, by section.
        code: the file that makes the run.
    """
    convert, fetch = settings.get("convert") or {}, settings.get("fetch") or {}
    return {
        **{name: str(convert[name]) for name in TELLING if name in convert},
        **({"source": without_secrets(str(fetch["source"]))} if "source" in fetch else {}),
        "git_commit": commit,
        **({} if commit == "unknown" else {"mlflow.source.git.commit": commit.removesuffix("-dirty")}),
        "mlflow.source.name": code,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }


def name_of_flow(target: str, settings: dict[str, Any]) -> str:
    """A name such as "dinov2-fashion · swiglu, instance, dwc_qk · 2026-09-25 14:03"."""
    method = ", ".join(tags_of(settings, "", "")[name] for name in TELLING if name in (settings.get("convert") or {}))
    return " · ".join(filter(None, [target, method, time.strftime("%Y-%m-%d %H:%M")]))


def note_of_flow(target: str, settings: dict[str, Any], commit: str) -> str:
    """What is made of what, and how to make it again, in Markdown."""
    convert, fetch = settings.get("convert") or {}, settings.get("fetch") or {}
    model = fetch.get("architecture") or "a diffusers pipeline"
    method = ", ".join(f"{name} `{convert[name]}`" for name in TELLING if name in convert)
    origin = f" from `{without_secrets(str(fetch['source']))}`" if "source" in fetch else ""
    state = "" if not commit.endswith("-dirty") else ", with uncommitted changes"
    return (
        f"Softmax attention of {model}{origin} is replaced: {method}.\n\n"
        f"- Again: `python -m flows.t5 {target}` at commit `{commit.removesuffix('-dirty')}`{state}\n"
        f'- The best model so far: `mlflow.pyfunc.load_model("models:/{target}@best")`\n'
    )


def protocol(settings: dict[str, Any], names: list[str]) -> str:
    """How long each training stage trains, such as "calibrate 300 steps, freeze 0.5 epochs, finetune 2.0 epochs"."""
    lengths = {
        name: f"{value} {key.rpartition('.')[2]}"
        for name in names
        for key, value in flatten(settings.get(name) or {}).items()
        if key.rpartition(".")[2] in ("steps", "epochs")
    }
    return ", ".join(f"{name} {length}" for name, length in lengths.items())


def flatten(value: dict[str, Any], between: str = ".", prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; `between` stands for the dot."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(item, between, name + between) if isinstance(item, dict) else {name: item}
    return flat


def metric_names(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics under the names that MLflow gets; its pages group them by what comes before the last slash."""
    return flatten(metrics, "/")


def device() -> str:
    """The device that a stage computes on, for the tag; asks torch only where it is loaded already."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()}, {os.cpu_count()} cores"


def git_commit(root: Path) -> str:
    """The commit, with "-dirty" when tracked files differ from it; "unknown" outside git."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's nameless user
        return "unknown"

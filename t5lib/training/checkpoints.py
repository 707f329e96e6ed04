"""Checkpoints of a fit: folders step-N that are whole or not there, and whose files are known by their checksums.

A checkpoint also says what made it: the recipe, the new layers, the teacher, the code, but not how many
processes did. A fit goes on only where all of that is the same; otherwise what came out would be the result of neither.
"""

import functools
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import t5kernels
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import nn

from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import put, read_json, sha256, write_json

Kept = Annotated[int, Field(ge=0, le=100)]  # checkpoints
LARGE = 10**9  # bytes from which a checkpoint's size is printed
FILES, MAKER = "files.json", "made_by.json"
# What decides about a fit, of t5lib; beside it the kernels.
DECISIVE = ("training", "layers", "families", "data", "conversion.py")
# Settings that change nothing but the cost.
FREE = ("checkpoint_every", "checkpoints_kept", "compile", "gradient_checkpointing", "graphs")
_log = logging.getLogger(__name__)


def maker(model: nn.Module, config: Any, **others: Any) -> dict[str, Any]:
    """What must be the same for a fit to go on: what is trained of `model`, its recipe, the code, and `others`."""
    recipe = {name: value for name, value in to_dict(config).items() if name not in FREE}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    device = next(model.parameters()).device.type
    layer = getattr(model, "t5_config", None)
    made_by = {"trained_weights": trained, "device": device, "t5": to_dict(layer) if layer else {}, **others}
    return made_by | {"recipe": recipe, "code": code()}


@functools.cache
def code() -> dict[str, str]:
    """The checksum of every source file that decides about a fit, as this process first saw it."""
    library, kernels = Path(__file__).parents[1], Path(t5kernels.__file__).parent
    found = {}
    for place in [*(library / name for name in DECISIVE), kernels]:
        base = (library if place.is_relative_to(library) else kernels).parent
        for file in [place] if place.is_file() else place.rglob("*.py"):
            found[file.relative_to(base).as_posix()] = sha256(file)
    return found


def opened(resume_dir: Path | str | None) -> Path | None:
    """The folder for checkpoints, made where there is none. Raises T5Error when it cannot be."""
    if resume_dir is None:
        return None
    try:
        folder = Path(resume_dir)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:
        raise T5Error(
            f"resume_dir is {resume_dir!r:.200}, which cannot be a folder ({error}); pass the path of one, or None"
        ) from None
    return folder


def begin(place: Path) -> None:
    """Make `place`, FOLDER/.step-N, an empty folder to write to; `finish` makes it a checkpoint."""
    for old in place.parent.glob(".step-*"):  # of runs that were killed
        shutil.rmtree(old)
    place.mkdir(parents=True)


def finish(place: Path, made_by: dict[str, Any], kept: int) -> None:
    """What was written to `place` becomes the newest checkpoint; only the newest `kept` remain.

    A kill at any moment leaves this one or the one before it whole.
    """
    write_json(place / MAKER, made_by)
    write_json(place / FILES, {name: sha256(place / name) for name in _names(place)})
    final = place.with_name(place.name.removeprefix("."))
    shutil.rmtree(final, ignore_errors=True)
    put(place, final)
    for old in _checkpoints(place.parent)[kept:]:
        shutil.rmtree(old)


def newest(folder: Path, made_by: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and removed. None where there is none.

    Raises:
        T5Error: it was made by something else than `made_by`, or cannot be read.
    """
    damaged = False
    for place in _checkpoints(folder):
        try:
            problem = _damage(place)
        except OSError as error:
            raise T5Error(f"{error.filename} cannot be read ({error.strerror}); fix that, or {_over(folder)}") from None
        if not problem:
            if damaged:
                _log.warning("resuming from the checkpoint before it, %s", place)
            _refuse_other_maker(read_json(place / MAKER), made_by, place)
            return place
        _log.warning("%s is damaged (%s) and is removed", place, problem)
        shutil.rmtree(place)
        damaged = True
    if damaged:
        _log.warning("%s holds no other checkpoint; starting over", folder)
    return None


def require_space(folder: Path, size: int, kept: int, every: int) -> None:
    """Raises T5Error unless there is space for `kept` checkpoints of `size` bytes, and for one more being written.

    Prints how much large checkpoints will take. `every`: steps from one to the next.
    """
    if not kept:
        return
    if size >= LARGE:
        print(
            f"checkpoints: {size / 1e9:.1f} GB each, every {every} steps, in {folder}; {kept} kept and one being "
            f"written take {(kept + 1) * size / 1e9:.1f} GB",
            flush=True,
        )
    folder.mkdir(parents=True, exist_ok=True)
    present = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if (kept + 1) * size > present + free:
        raise T5Error(
            f"{folder} has {free / 1e9:.1f} GB free; checkpoints need {((kept + 1) * size - present) / 1e9:.1f} GB: "
            f"{kept} of {size / 1e9:.1f} GB and one more while it is written. Free some space, or lower "
            "checkpoints_kept (default 2; 1 is enough unless a disk fails; with 0 an interrupted run starts over)"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, what keeps a checkpoint from being written becomes a one-line T5Error."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        before = _checkpoints(folder)
        left = f"{before[0].name} is kept" if before else "there is no earlier one"
        raise T5Error(
            f"a checkpoint could not be written to {folder} ({error}); {left}. Free some space or fix the disk, and "
            "run again"
        ) from error


@contextmanager
def loading(place: Path) -> Iterator[None]:
    """Within, what keeps a whole checkpoint from being loaded becomes a one-line T5Error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise T5Error(f"{place} is another model's ({reason}); pass that model, or {_over(place.parent)}") from error


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    steps = {place: re.fullmatch(r"step-(\d{7,18})", place.name) for place in folder.glob("step-*")}
    return sorted((place for place, match in steps.items() if match), key=lambda place: -int(place.name[5:]))


def _names(place: Path) -> list[str]:
    files = (file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file())
    return sorted(name for name in files if name != FILES)


def _damage(place: Path) -> str:
    """What is wrong with the files of a checkpoint; "" where nothing is."""
    try:
        known = read_json(place / FILES)
    except T5Error:
        return f"{FILES} is missing or broken"
    if not isinstance(known, dict) or sorted(known) != _names(place):
        return f"it holds {', '.join(_names(place)) or 'nothing'}, but {FILES} lists other files"
    return ", ".join(f"{name} changed" for name, checksum in known.items() if sha256(place / name) != checksum)


def _refuse_other_maker(there: dict[str, Any], here: dict[str, Any], place: Path) -> None:
    changes: list[str] = []
    for name in there.keys() | here.keys():
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            changes += inner if name == "code" else [f"{key} was {old.get(key)}, is {new.get(key)}" for key in inner]
        elif old != new:
            changes.append(f"{name} was {old}, is {new}")
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise T5Error(
            f"{place} was made with other settings ({'; '.join(sorted(changes)[:5])}{more}), which cannot be mixed. "
            f"Restore those settings, or {_over(place.parent)}"
        )


def _over(folder: Path) -> str:
    return f"delete {folder} to start over"

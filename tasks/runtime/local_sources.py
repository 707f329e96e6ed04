"""What a target's settings name on this machine: asked for before every stage, so that no work is lost to a slip."""

import glob
import importlib.util
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from t5lib.utils.files import refuse_endless

# Settings that name sources: section, setting, what it is, and what to do when a file: is not there.
SOURCES = (
    ("fetch", "source", "weights", "put the model there"),
    ("fetch", "features.source", "weights of the features", "put the model there"),
    ("fetch", "inception", "Inception's weights", "download torch-fidelity's file, or leave fetch.inception out"),
    ("fetch", "clip", "CLIP", "download it, or leave fetch.clip out"),
    ("shards", "train", "training images", "put them there"),
    ("shards", "val", "validation images", "put them there"),
    ("shards", "samples.prompts", "prompts", "write them, one per line"),
    ("evaluate", "cutouts", "cutouts", "make them, or leave evaluate.cutouts out"),
)
IMAGES = ("train", "val", "cutouts")
MADE = "data/out"  # what stages make: a source there may come to be
CAPTIONED = " as tar files with <key>.jpg and <key>.txt (img2dataset with output_format=webdataset writes these)"


def check(
    root: Path, target: str, settings: dict[str, Any], elsewhere: Callable[[str, str], str | None] | None = None
) -> None:
    """Raises T5Error that lists what cannot be had, and how to get each; what was fetched before is not asked for.

    Args:
        elsewhere: what is wrong with a source that is not of this machine, given the words for how to name another;
            without it such sources are not looked at.
    """
    missing = []
    for section, name, what, remedy in SOURCES:
        source = _setting(settings.get(section), name)
        if not source or (root / f"{MADE}/{target}/{section}.json").exists():
            continue
        if name in ("train", "val") and "encode" in settings["shards"]:
            remedy += CAPTIONED
        own = f"name yours in params.yaml: targets.{target}.{section}.{name}"
        local = source.startswith("file:")
        if local and (problem := _problem(root, source, images=name in IMAGES)):
            missing.append(f"  {what}: {source} {problem}; {remedy}, or {own}")
        elif not local and elsewhere and (problem := elsewhere(source, own)):
            missing.append(f"  {what}: {problem}")
    if "adamw8bit" in _optimizers(settings) and not importlib.util.find_spec("bitsandbytes"):
        missing.append("  bitsandbytes: adamw8bit needs it; pip install bitsandbytes, or set optimizer: adamw")
    if missing:
        raise T5Error("\n".join([f"'{target}' cannot be built yet. Missing:", *missing]))


def _setting(section: Any, path: str) -> Any:
    """The setting at a path such as features.source; None where there is none."""
    for name in path.split("."):
        section = section.get(name) if isinstance(section, dict) else None
    return section


def _optimizers(settings: Any) -> set[str]:
    """Every `optimizer` in a target's settings, however deep."""
    if not isinstance(settings, dict):
        return set()
    return {settings["optimizer"]} if "optimizer" in settings else set().union(*map(_optimizers, settings.values()))


def _problem(root: Path, source: str, *, images: bool) -> str | None:
    """What is wrong with what a file: source names; None where nothing is, or a stage is still to make it."""
    place = Path(os.path.normpath(root / Path(source.removeprefix("file:")).expanduser()))
    if place.is_relative_to(os.path.normpath(root / MADE)):
        return None
    if not (found := glob.glob(str(place))):
        return "is not there"
    try:
        for each in found:
            refuse_endless(each)
        if images:
            _check_images(place, source)
    except T5Error as error:
        return f"cannot be used ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _check_images(place: Path, source: str) -> None:
    from t5lib.data.checking import tar_files  # loads torch, which most stages do without
    from t5lib.data.shards import ShardSet

    if place.suffix == ".json":
        ShardSet.read(place)
    elif not tarfile.is_tarfile(first := tar_files(place, source)[0]):
        raise T5Error(f"{first} is not a tar file")

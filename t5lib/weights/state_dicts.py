"""Weights by name, as files of other people's code hold them: opened without running code, their wrappers taken off.

RELEASED are the names that the method's released code gives to new weights, and ours.
"""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t5lib.utils.errors import T5Error

ENTRIES = {"ema": ("model_ema", "state_dict_ema", "ema"), "model": ("model", "state_dict")}  # that hold weights
ALL_ENTRIES = (*ENTRIES["ema"], *ENTRIES["model"])
WRAPPERS = ("_orig_mod.", "module.")  # left in names by torch.compile and DDP

RELEASED = {"w1": "w1", "w2": "w2", "w3": "w3", "q_conv2d": "q_conv", "k_conv2d": "k_conv"}
RELEASED_REMEDY = "expected the released code's layout, or pass config"
INNER = {("w1", "w2", "w3"): "swiglu", ("w1", "w2"): "two_layer"}


def read(path: Path | str, which: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The weights in `path`, without wrappers' prefixes, and the name of the entry they came from ("" for the file).

    Raises:
        T5Error: the file cannot be read, would run code, or has no such weights.
    """
    if which not in (None, "ema", "model"):
        raise T5Error(f"which is {which!r}; expected 'ema', 'model', or None for the moving average where there is one")
    found, entries = _open(Path(path)), []
    wanted = ENTRIES[which] if which else ALL_ENTRIES
    while entry := next((name for name in wanted if isinstance(found.get(name), dict)), None):
        found, wanted = found[entry], ALL_ENTRIES  # what is inside may be wrapped once more
        entries.append(entry)
    if which == "ema" and not entries:
        raise T5Error(f"{path} has no entry {ENTRIES['ema']}; found {list(found)[:6]}, leave which out")
    weights = {_unwrapped(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        raise T5Error(f"{path} holds no weights; found {list(found)[:6]}, expected one of {ALL_ENTRIES}")
    return weights, ".".join(entries)


def _open(path: Path) -> dict[str, Any]:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise T5Error(f"{path} {found}; expected a checkpoint file, .safetensors or one of torch.save")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # how training scripts keep their settings
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = re.search(r"GLOBAL (\S+)", str(error))
        raise T5Error(
            f"{path} was not opened: {cause[1] if cause else 'it is no file of torch.save, or'} could run code. "
            "Where you trust it, save its weights with safetensors.torch.save_file, and load that"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise T5Error(f"{path} cannot be read ({str(error).splitlines()[0]}); copy or fetch it again") from None
    if not isinstance(found, dict):
        raise T5Error(f"{path} holds a {type(found).__name__}; expected weights by name")
    return found


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name

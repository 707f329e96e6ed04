"""Weights by name, as files of other people's code hold them: opened without running code, their wrappers taken off.

RELEASED are the names that the method's released code gives to new weights, and ours.
"""

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from t5lib.utils.errors import T5Error
from t5lib.utils.files import as_path, refuse_endless
from t5lib.utils.weights import check_numbers, shards_of

ENTRIES = {  # that hold weights
    "ema": ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "ema_model"),
    "model": ("model", "state_dict", "model_state_dict", "module"),
}
ALL_ENTRIES = (*ENTRIES["ema"], *ENTRIES["model"])
COMPILED = "_orig_mod."  # what torch.compile puts into names, before those of the part that was compiled
WRAPPERS = {"ema": ("ema_model.", "model_ema.", "ema."), "model": ("model.", "module.", "net.")}
ALL_WRAPPERS = (*WRAPPERS["ema"], *WRAPPERS["model"])
LIGHTNING = "pytorch-lightning_version"  # an entry of its checkpoints, whose losses and metrics have weights, too
DEEPEST = 8  # entries in entries; a file may hold itself
COUNTERS = ("n_averaged", "position_ids")  # whole numbers beside weights that no model needs
FILES = tuple(
    f"{name}{ending}"
    for ending in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for name in ("model", "pytorch_model", "diffusion_pytorch_model")
)

RELEASED = {"w1": "w1", "w2": "w2", "w3": "w3", "q_conv2d": "q_conv", "k_conv2d": "k_conv"}
RELEASED_REMEDY = "expected the released code's layout, or pass config"
INNER = {("w1", "w2", "w3"): "swiglu", ("w1", "w2"): "two_layer"}


def read(path: Path | str, which: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The weights in `path`, without wrappers' prefixes, and the name of the entry they came from ("" for the file).

    Args:
        path: a .safetensors file, one of torch.save, the index of a sharded checkpoint, or a folder with one of them.
        which: "ema" or "model", for a file that holds both; None takes the moving average where there is one.

    Raises:
        T5Error: the file, or a shard, cannot be read, would run code, or has no such weights; they are whole numbers,
            or not finite.
    """
    if which not in (None, "ema", "model"):
        raise T5Error(f"which is {which!r}; expected 'ema', 'model', or None for the moving average where there is one")
    file = weights_file(as_path(path))
    held, entries = _open(file), list[str]()
    lightning = LIGHTNING in held
    wanted = ENTRIES[which] if which else ALL_ENTRIES
    while len(entries) < DEEPEST and (entry := next((n for n in wanted if isinstance(held.get(n), dict)), None)):
        held, wanted = held[entry], ALL_ENTRIES  # what is inside may be wrapped once more
        entries.append(entry)
    weights = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if not weights:
        raise T5Error(f"{path} holds no weights; found {list(held)[:6]}, expected one of {ALL_ENTRIES}")
    if nameless := [name for name in weights if not isinstance(name, str)]:
        raise T5Error(f"{path} holds weights under {nameless[:6]}, which are not names; expected weights by name")
    weights, wrappers = _unwrapped(weights, which, str(path), alone=lightning)
    if which == "ema" and not entries and not set(wrappers) & set(WRAPPERS["ema"]):
        raise T5Error(f"{path} has no entry {ENTRIES['ema']}; found {list(held)[:6]}, leave which out")
    return _numbers(weights, str(path)), ".".join(entries)


def weights_file(path: Path) -> Path:
    """`path`, or where it is a folder, the file or index of weights in it, safetensors first.

    Raises:
        T5Error: there is none.
    """
    if not os.path.isdir(path):  # Path.is_dir raises on names that are too long
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    raise T5Error(
        f"{path} has neither model.safetensors nor pytorch_model.bin nor an index of shards, only "
        f"{', '.join(found[:8]) or 'nothing'}; name the weights file (from a hub: hf:OWNER/REPO@COMMIT#FILE)"
    )


def _open(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise T5Error(f"{path} does not exist; expected a checkpoint file, .safetensors or one of torch.save")
    _check_size(path)
    if path.name.endswith(".index.json"):
        return {name: value for shard in shards_of(path) for name, value in _open(shard).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # how training scripts keep their settings
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = re.search(r"GLOBAL (\S+)", str(error))
        raise T5Error(
            f"{path} was not opened: {cause[1] if cause else 'it is not a file of torch.save, or'} could run code. "
            "If you trust it, save its weights with safetensors.torch.save_file, and load that"
        ) from None
    except Exception as error:  # the unpickler on bytes that are no pickle raises whatever they lead it to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise T5Error(f"{path} cannot be read ({reason}); copy or fetch it again") from None
    if not isinstance(held, dict):
        raise T5Error(f"{path} holds a {type(held).__name__}; expected weights by name")
    return held


def _check_size(path: Path) -> None:
    refuse_endless(path)
    size, memory = path.stat().st_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise T5Error(
            f"{path} has {size / 1e9:.0f} GB, and this machine {memory / 1e9:.0f} GB of memory; use a larger one"
        )


def _unwrapped(
    weights: dict[str, Tensor], which: str | None, source: str, *, alone: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """`weights` without wrappers' prefixes, and those prefixes; of a moving average and a model the one wanted.

    Args:
        alone: drop what is outside of the wrappers.
    """
    weights = {name.replace(COMPILED, ""): value for name, value in weights.items()}
    taken: list[str] = []
    while prefix := _wrapper(weights, which):
        inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        outside = {name: value for name, value in weights.items() if not name.startswith(ALL_WRAPPERS)}
        if alone and not taken:
            outside = {}
        if twice := sorted(inside.keys() & outside.keys()):
            raise T5Error(f"{source} holds {twice[:4]} with and without '{prefix}' before them; keep one of the two")
        weights = inside | outside
        taken.append(prefix)
    return weights, taken


def _wrapper(weights: dict[str, Tensor], which: str | None) -> str | None:
    order = WRAPPERS["model"] if which == "model" else ALL_WRAPPERS
    return next((prefix for prefix in order if any(name.startswith(prefix) for name in weights)), None)


def _numbers(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """`weights` without counters. Raises T5Error when others are no plain tensors, whole numbers, or not finite."""
    weights = {name: value for name, value in weights.items() if name.rpartition(".")[2] not in COUNTERS}
    if sparse := [f"{name} {value.layout}" for name, value in weights.items() if value.layout != torch.strided]:
        raise T5Error(f"{source} holds sparse tensors, in {', '.join(sparse[:4])}; save value.to_dense() of each")
    if meta := [name for name, value in weights.items() if value.is_meta]:
        raise T5Error(f"{source} holds names without values (on the meta device), {', '.join(meta[:4])}; save it again")
    if whole := [f"{n} {v.dtype}" for n, v in weights.items() if v.ndim and (_packed(v) or not v.is_floating_point())]:
        raise T5Error(
            f"{source} holds integer or quantized numbers, in {', '.join(whole[:4])}; take the "
            "checkpoint in full or half precision"
        )
    check_numbers(weights, source)
    return weights


def _packed(value: Tensor) -> bool:
    """Whether two numbers share a byte."""
    return str(value.dtype).endswith("_x2")

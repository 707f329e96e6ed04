"""Weights by name, checked before a model takes them: that they are numbers, and that they are the model's."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 4


def shards_of(index: Path) -> list[Path]:
    """The files that the index of a sharded checkpoint names, model.safetensors.index.json or the like.

    Raises:
        T5Error: it is no such index, or files are missing (named).
    """
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(_is_shard(name) for name in names.values()):
        raise T5Error(f"{index} is not an index of shards: it has no weight_map of files beside it; fetch it again")
    shards = sorted(set(names.values()))
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise T5Error(
            f"{index.parent} lacks {', '.join(missing[:SHOWN])}, {len(missing)} of the {len(shards)} shards that "
            f"{index.name} names; fetch them again"
        )
    return [index.parent / name for name in shards]


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and not name.endswith(".json")


def check_numbers(weights: "dict[str, Tensor]", source: str) -> None:
    """Raises T5Error naming those of `weights`, which came from `source`, that hold NaN or infinite numbers."""
    broken = []
    for name, value in weights.items():
        if value.is_meta or not value.is_floating_point() or not value.numel():
            continue
        wide = value.detach() if value.element_size() > 1 else value.float()  # eight bits have no test of their own
        least, most = wide.aminmax()  # NaN where there is one; many times as fast as a test of each number
        if not (least.isfinite() and most.isfinite()):
            broken.append(f"{name} ({wide.isfinite().logical_not().sum().item()} of {value.numel()})")
    if broken:
        raise T5Error(
            f"{source} holds numbers that are not finite, in {len(broken)} weights: {', '.join(broken[:SHOWN])}; take "
            "an earlier checkpoint, or copy or fetch it again"
        )


def check_fit(ours: "dict[str, Tensor]", expected: "dict[str, Tensor]", what: str, remedy: str = "") -> None:
    """Raises T5Error naming the weights that are missing, unknown, or of another shape or kind than `expected`.

    Args:
        what: begins the message, such as "weights do not fit the model".
        remedy: ends it.
    """
    missing, unknown = (sorted(set(a) - set(b)) for a, b in ((expected, ours), (ours, expected)))
    both = [(name, ours[name], value) for name, value in expected.items() if name in ours]
    shapes = [f"{n} {tuple(our.shape)} for {tuple(their.shape)}" for n, our, their in both if our.shape != their.shape]
    kinds = [f"{n} {our.dtype}" for n, our, their in both if our.is_floating_point() != their.is_floating_point()]
    parts = {"missing": missing, "unknown": unknown, "other shapes": shapes}
    if kinds:
        parts["integer or quantized"] = kinds
    if any(parts.values()):
        shown = ", ".join(f"{name} {found[:SHOWN]}" for name, found in parts.items())
        raise T5Error(f"{what}: {shown}{remedy and f'; {remedy}'}")


def unlisted_buffers(model: "nn.Module") -> "dict[str, Tensor]":
    """The buffers that state_dict leaves out, since a model makes them again: not in the precision that it had."""
    listed = model.state_dict()
    return {name: value for name, value in model.named_buffers() if name not in listed}


def set_unlisted_buffers(model: "nn.Module", values: "dict[str, Tensor]") -> None:
    for name, value in values.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner).register_buffer(own, value, persistent=False)


def digest(module: "nn.Module") -> str:
    """Tells modules with other weights apart. The sums are of bytes, as integers: exact on every device."""
    import torch

    found = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in module.state_dict().items():
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
    return found.hexdigest()[:16]

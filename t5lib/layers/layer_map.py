"""Layer numbers and layer maps as people write them. Imports nothing slow: the command line checks them first."""

import re
from collections import Counter

from t5lib.utils.errors import T5Error

MOST_LAYERS = 10_000
AUTO = "auto"  # all attentions, until calibration puts some back
LAYER_SETS = ("all", "paper", AUTO)  # which attentions each means, a model's family tells


def parse_indices(text: str) -> list[int]:
    """Layer numbers, "0-5,8" for 0 1 2 3 4 5 8.

    Raises:
        T5Error: it is not of that form.
    """
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,8})(?:-([0-9]{1,8}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise T5Error(
                f"layers '{text[:100]}' is not understood at '{part[:100]}'; expected e.g. 0-5,8 (counted from 0), "
                "or 0-5=softmax,6-11=swiglu"
            )
        if int(match[2] or match[1]) >= MOST_LAYERS:
            raise T5Error(f"layers '{text[:100]}': no model has {MOST_LAYERS} layers; expected e.g. 0-5,8")
        indices += range(int(match[1]), int(match[2] or match[1]) + 1)
    return indices


def parse_layers(text: str | None) -> tuple[int, ...] | dict[str, str] | str | None:
    """What TTTConfig.layers takes: "0-5,8", a map "0-5=softmax,6-11=swiglu+nat5", or a name; None means all."""
    if text is None or text in LAYER_SETS:
        return text
    if "=" not in text:
        return tuple(sorted(set(parse_indices(text))))
    entries: list[tuple[str, str]] = []
    *pairs, last = text.split("=")
    numbers = pairs[0]
    for middle in pairs[1:]:  # "softmax,6-11": what the numbers before become, and the next numbers
        what, _, following = middle.partition(",")
        entries.append((numbers.strip(), what.strip()))
        numbers = following
    entries.append((numbers.strip(), last.strip()))
    times = Counter(index for key, _ in entries for index in parse_indices(key))
    if twice := [index for index, number in times.items() if number > 1]:
        raise T5Error(f"layers '{text[:100]}' names {', '.join(map(str, twice[:5]))} twice; name each layer once")
    return dict(entries)


def format_layers(kinds: list[str]) -> dict[str, str]:
    """The layer map of a list that says for every layer what it is; equal neighbours share an entry."""
    layers: dict[str, str] = {}
    start = 0
    for index in range(1, len(kinds) + 1):
        if index == len(kinds) or kinds[index] != kinds[start]:
            layers[str(start) if index == start + 1 else f"{start}-{index - 1}"] = kinds[start]
            start = index
    return layers

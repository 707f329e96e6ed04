"""What an explanation (t5lib.analysis.explanation) says, in plain words; from its dictionary, so a saved one does."""

from collections.abc import Sequence
from typing import Any

NEARLY = 0.1  # share of the distance between softmax's distance and the uniform one, or of the former
SAME = 0.05  # shift ratios nearer than that are not told apart


def explanation_reading(found: dict[str, Any]) -> list[str]:
    """One sentence each on where the layers look, how far they are off, how alike the models are, and the keys."""
    new = [index for index, kind in enumerate(found["kinds"]) if kind != "softmax"]
    if not new:
        return ["No layer was converted: what differs comes from training alone.", _similarity(found)]
    distance = [_distance(found, new)] if "distance_uniform" in found else []  # not of denoisers
    return [*distance, _error(found, new), _similarity(found), _shift(found, new)]


def _distance(found: dict[str, Any], new: list[int]) -> str:
    softmax, converted = (_mean(found[name], new) for name in ("distance_softmax", "distance_converted"))
    uniform = found["distance_uniform"]
    if abs(converted - softmax) < NEARLY * softmax:
        verdict = "about as far as the softmax layers"
    elif converted < softmax:
        verdict = "nearer than the softmax layers"
    elif converted > uniform - NEARLY * abs(uniform - softmax):
        verdict = "everywhere, with hardly any preference for what is near"
    else:
        verdict = "farther than the softmax layers"
    return (
        f"Converted layers look {verdict}: {converted:.1f} patches on average, softmax {softmax:.1f}; looking "
        f"everywhere equally would give {uniform:.1f}."
    )


def _error(found: dict[str, Any], new: list[int]) -> str:
    errors = found["layer_error"]
    worst = max(new, key=lambda index: errors[index])
    return (
        f"On the softmax model's own inputs the converted layers miss {_share(_mean(errors, new))} of the variance, "
        f"{found['layers'][worst]} most ({_share(errors[worst])}). As the models run, the output of the last block "
        f"is off by {_share(found['block_error'][-1])} of its variance, earlier errors and training included."
    )


def _similarity(found: dict[str, Any]) -> str:
    cka = found["cka"]
    weakest = min(range(len(cka)), key=lambda index: cka[index])
    return (
        f"The two models' block outputs have a CKA of {_mean(cka):.2f} on average, least after "
        f"{found['layers'][weakest].rpartition('.')[0]} ({cka[weakest]:.2f}); 1 is identical up to rotation and scale."
    )


def _shift(found: dict[str, Any], new: list[int]) -> str:
    names = ("shift_before", "shift_after", "shift_fitted")
    before, after, fitted = (_mean(found[name], new) for name in names)
    if abs(before - after) < SAME:
        text = f"The key norm leaves the shift ratio of the keys at {after:.2f}"
    else:
        text = f"The key norm brings the shift ratio of the keys from {before:.2f} to {after:.2f}"
    if fitted > after + SAME:
        text += f"; in the keys that the layers are fitted on it is {fitted:.2f}: the convolution has a bias of its own"
    return text + "."


def _mean(values: Sequence[float], which: Sequence[int] | None = None) -> float:
    chosen = values if which is None else [values[index] for index in which]
    return sum(chosen) / len(chosen)


def _share(value: float) -> str:
    return f"{100 * value:.3g}\u202f%"

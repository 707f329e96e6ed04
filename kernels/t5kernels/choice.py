"""How every op chooses its implementation: `impl` names one of them, or is None for the fastest one that can do it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t5kernels.precision import autocast_dtype

REFERENCE = "reference"


class Candidate(NamedTuple):
    """One implementation of an op, judged for one call.

    Attributes:
        name: what `impl` calls it.
        by_default: whether this device and these settings are what it was made for, so that an op takes it unasked.
        obstacle: says why the implementation cannot do this call, as the end of a sentence that begins with "impl=…
            cannot be used", or returns None where it can. It is called only where the answer matters, because it may
            import Triton.
    """

    name: str
    by_default: bool
    obstacle: Callable[[], str | None]


def choose(op: str, impl: str | None, *candidates: Candidate) -> str:
    """The name of the implementation that runs: `impl`, or by default the first candidate made for the call.

    Args:
        op: name of the op, for messages.
        impl: one of the candidates' names, "reference", or None.
        candidates: every implementation but the reference, fastest first. The reference can do every call.

    Raises:
        ValueError: `impl` is no implementation of this op, or cannot do this call.
    """
    if impl is None:
        for candidate in candidates:
            if candidate.by_default and candidate.obstacle() is None:
                return candidate.name
        return REFERENCE
    if impl == REFERENCE:
        return REFERENCE
    for candidate in candidates:
        if candidate.name == impl:
            obstacle = candidate.obstacle()
            if obstacle is not None:
                raise ValueError(f"{op}: impl={impl!r} cannot be used {obstacle}")
            return impl
    names = (*(candidate.name for candidate in candidates), REFERENCE)
    raise ValueError(f"{op}: impl is {impl!r}; expected one of {names}, or None for the fastest one that can do it")


def triton_candidate(
    tokens: Sequence[Tensor], weights: Sequence[Tensor], obstacle: Callable[[], str | None]
) -> Candidate:
    """An op's own Triton kernels, made for 16-bit tokens (B, H, N, D) on a card that Triton compiles for.

    Args:
        tokens, weights: what the call is about, all tensors.
        obstacle: what this op's kernels cannot do, as `Candidate.obstacle` says it.
    """

    def why_not() -> str | None:
        own = obstacle()
        if own is not None:
            return own
        try:
            from t5kernels import launch
        except ImportError as error:
            return f"without Triton ({error}); install it, or use 'reference'"
        return launch.obstacle(tokens, weights)

    half = autocast_dtype(tokens[0]) in (torch.float16, torch.bfloat16)
    return Candidate("triton", half and _is_supported_card(tokens[0].device), why_not)


def _is_supported_card(device: torch.device) -> bool:
    """Whether Triton compiles for this device. While torch.compile traces, any card is taken to be one of those."""
    if device.type != "cuda":
        return False
    return torch.compiler.is_compiling() or torch.cuda.get_device_properties(device).major >= 8

"""Rotary positions by kernels: a differentiable custom op around those of triton_turn.py.

It stands before the layer's op and also does what comes before turning (RMS norms), and what the layer needs to know of
the turned tokens (the sums of the key norm). So it takes the place of launches that the layer has anyway. The turned
tokens are what the layer keeps for its backward.
"""

import torch
from torch import Tensor

from t5kernels.launch import MOST_CHUNKS, launch, like_tokens, lying_alike
from t5kernels.ops import differentiable, op
from t5kernels.plans import planned
from t5kernels.ttt_layer import triton_turn
from t5kernels.ttt_layer.triton_launch import capacity, empty_sums, shares_of, tile_for

NO_NORM = "none"
TENSORS = 6  # so many of the op's inputs are tensors, and come first


def turned(parts, norm: str, prefix: int, half: bool, rms_eps: float) -> tuple[list[Tensor], Tensor]:
    """Queries or keys after the RMS norm and turned; the sums of them all that a key norm needs (`empty_sums`).

    Args:
        parts: of the image and, if any, of the text: tokens (B, H, N, D), gain (D,) or None, and a table as in Rotary,
            None for a text that is not turned. The text may have the image's gain.
        norm: "none" or a norm_scope.
    """
    (x, gain, table), (text_x, text_gain, text_table) = parts if len(parts) == 2 else (*parts, (None, None, None))
    text_gain = None if text_gain is gain else text_gain  # a plan would not know which of two equal inputs is meant
    given = (x, text_x, gain, text_gain, table.contiguous(), None if text_table is None else text_table.contiguous())
    y, text_y, sums = _differentiable_turn(*given, prefix, half, rms_eps, norm)
    return [y] if text_x is None else [y, text_y], sums


@op("ttt_turn")
def _turn(
    x: Tensor, text_x: Tensor | None, gain: Tensor | None, text_gain: Tensor | None, table: Tensor,
    text_table: Tensor | None, prefix: int, half: bool, rms_eps: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `turned`; the text's result is empty where there is none."""
    given = (x, text_x, gain, text_gain, table, text_table)
    return planned(launch_turn, given, prefix, half, rms_eps, norm)


def launch_turn(x, text_x, gain, text_gain, table, text_table, prefix, half, rms_eps, norm):
    sums = empty_sums(x, text_x, norm)
    parts = _parts(x, text_x, gain, text_gain, table, text_table, prefix)
    outs = [like_tokens(tokens) for tokens, *_ in parts]
    groups = [[part] for part in range(len(parts))] if norm == "modality" else [list(range(len(parts)))]
    shares = 0
    for group in groups:
        shares += _turn_group(
            [parts[i] for i in group], [outs[i] for i in group], sums[:, shares:], norm, half, rms_eps
        )
    return outs[0], outs[1] if text_x is not None else x.new_empty(0), sums


def _turn_group(parts, outs: list[Tensor], sums: Tensor, norm: str, half: bool, rms_eps: float) -> int:
    """One launch; the sums are written from the first place on, for so many programs a head as are returned."""
    tokens = lying_alike([x for x, *_ in parts])
    x, text = tokens[0], tokens[-1]
    (_, gain, table, prefix), (_, text_gain, text_table, text_prefix) = parts[0], parts[-1]
    y, text_y = outs[0], outs[-1]
    B, H, N, D = x.shape
    width, tile = tile_for("turn", x)
    chunk, chunks = shares_of("statistics", *tokens)
    launch(
        *(triton_turn.turn_kernel, (B * H, sum(chunks)), x, tile),
        *(x, _or(gain, x), table, y, text, _or(text_gain, x), text_table, text_y, sums if norm != NO_NORM else x),
        *(*x.stride(), *y.stride(), *_strides(table)),
        *(*text.stride()[:3], *text_y.stride()[:3], *_strides(text_table)),
        *(prefix, text_prefix, H, N, text.shape[2], chunk, chunks[0]),
        *(capacity(sums) if norm != NO_NORM else 0, sums.shape[1], rms_eps),
        *(D, width // 2, tile.block, tile.stages, half, gain is not None, norm != NO_NORM, len(parts) > 1),
    )
    return sum(chunks)


def _parts(x, text_x, gain, text_gain, table, text_table, prefix) -> list[tuple]:
    """Tokens, gain, table, and how many tokens come before those that are turned, of each part."""
    parts = [(x, gain, table, prefix)]
    if text_x is not None:
        own_gain = gain if text_gain is None else text_gain
        # A text without a table is not turned: all of its tokens come before those that are.
        turned_from = (table, text_x.shape[2]) if text_table is None else (text_table, 0)
        parts.append((text_x, own_gain, *turned_from))
    return parts


def _strides(table: Tensor) -> tuple[int, int]:
    """How far the rows of heads and of tokens lie apart; all heads have the same where the table has no heads."""
    return (0 if table.ndim == 2 else table.stride(0)), table.stride(-2)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, or one that stands for it and is not read."""
    return other if tensor is None else tensor


@torch.library.register_fake("t5kernels::ttt_turn")
def _(x, text_x, gain, text_gain, table, text_table, prefix, half, rms_eps, norm):
    text_y = x.new_empty(0) if text_x is None else like_tokens(text_x)
    return like_tokens(x), text_y, empty_sums(x, text_x, norm)


@op("ttt_turn_backward")
def _turn_backward(
    dy: Tensor, text_dy: Tensor | None, x: Tensor, text_x: Tensor | None, gain: Tensor | None,
    text_gain: Tensor | None, table: Tensor, text_table: Tensor | None, prefix: int, half: bool, rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of image and text, and the parts of the gains' (2 MOST_CHUNKS, B·H, D), the image's first."""
    given = (dy, text_dy, x, text_x, gain, text_gain, table, text_table)
    return planned(launch_turn_backward, given, prefix, half, rms_eps)


def launch_turn_backward(dy, text_dy, x, text_x, gain, text_gain, table, text_table, prefix, half, rms_eps):
    parts = _parts(x, text_x, gain, text_gain, table, text_table, prefix)
    tokens = lying_alike([each for each, *_ in parts])
    gradients = lying_alike([dy] if text_dy is None else [dy, text_dy])
    (_, gain, table, prefix), (_, text_gain, text_table, text_prefix) = parts[0], parts[-1]
    outs = [like_tokens(each) for each in tokens]
    (x, text), (dy, text_dy), (dx, text_dx) = ((each[0], each[-1]) for each in (tokens, gradients, outs))
    B, H, N, D = x.shape
    width, tile = tile_for("turn_backward", x)
    chunk, chunks = shares_of("turn_backward", *tokens)
    gain_parts = _gain_parts(x, gain)
    launch(
        *(triton_turn.turn_backward_kernel, (B * H, sum(chunks)), x, tile),
        *(dy, x, _or(gain, x), table, dx, text_dy, text, _or(text_gain, x), text_table, text_dx),
        *(gain_parts if gain is not None else x, *dy.stride(), *x.stride(), *dx.stride(), *_strides(table)),
        *(*text_dy.stride()[:3], *text.stride()[:3], *text_dx.stride()[:3], *_strides(text_table)),
        *(prefix, text_prefix, H, N, text.shape[2], chunk, chunks[0], MOST_CHUNKS, rms_eps),
        *(D, width // 2, tile.block, tile.stages, half, gain is not None, len(parts) > 1),
    )
    return outs[0], outs[1] if text_x is not None else x.new_empty(0), gain_parts


def _gain_parts(x: Tensor, gain: Tensor | None) -> Tensor:
    """Room for the parts of the gains' gradients."""
    B, H, _, D = x.shape
    return x.new_empty(0 if gain is None else 2 * MOST_CHUNKS, B * H, D, dtype=torch.float32)


@torch.library.register_fake("t5kernels::ttt_turn_backward")
def _(dy, text_dy, x, text_x, gain, text_gain, table, text_table, prefix, half, rms_eps):
    text_dx = x.new_empty(0) if text_x is None else like_tokens(text_x)
    return like_tokens(x), text_dx, _gain_parts(x, gain)


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.numbers = inputs[TENSORS:-1]
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, dy, text_dy, _d_sums):
    x, text_x, gain, text_gain, table, text_table = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    if text_x is None:
        text_dy = None  # the forward gave an empty tensor in the place of the text's tokens
    elif text_dy is None:
        text_dy = torch.zeros_like(text_x)
    given = (dy, text_dy, x, text_x, gain, text_gain, table, text_table)
    dx, text_dx, gain_parts = _turn_backward(*given, *ctx.numbers)
    d_gain = d_text_gain = None
    if gain is not None:
        both = text_x is not None and text_gain is None
        d_gain = gain_parts[: None if both else MOST_CHUNKS].sum((0, 1)).to(gain.dtype)
    if text_gain is not None:
        d_text_gain = gain_parts[MOST_CHUNKS:].sum((0, 1)).to(text_gain.dtype)
    return dx, None if text_x is None else text_dx, d_gain, d_text_gain, *(None,) * 6


_differentiable_turn = differentiable(_turn, _keep_for_backward, _differentiate)

"""The layer by kernels: one differentiable custom op around those of triton_norms.py, triton_prepare.py and `ttt`.

Forward: statistics of the keys; keys prepared (normalized and convolved); `accumulate`; queries prepared; `apply`.
Prepared tokens live until they were read; the backward prepares them once more, so that what is kept is the inputs and
O(H·D²), and with RMS norms a number a token and head. Tokens of two modalities are two runs of the same kernels whose
steps add up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from t5kernels.ttt import triton as ttt
from t5kernels.ttt.triton import Tile
from t5kernels.ttt_layer import triton_norms as norms
from t5kernels.ttt_layer import triton_prepare as prepare

# By kernel, then by the head width padded to a power of two. `prepare` and its backward take blocks of columns.
TILES = {
    "statistics": {width: Tile(block=8192 // width, warps=8, stages=3, resident=2) for width in (32, 64, 128)},
    "prepare": {
        32: Tile(block=32, warps=4, stages=3, resident=3),
        64: Tile(block=16, warps=4, stages=3, resident=3),
        128: Tile(block=4, warps=4, resident=3),
    },
    "prepare_backward": {
        32: Tile(block=8, warps=2, stages=3, resident=6),
        64: Tile(block=4, warps=2, stages=3, resident=6),
        128: Tile(block=4, warps=4, resident=3),
    },
    "norm_backward": {width: Tile(block=4096 // width, warps=8, stages=2, resident=4) for width in (32, 64, 128)},
}
EVERY_TILE = ttt.TILES | TILES  # of all kernels that the layer launches


class _Conv(NamedTuple):
    """A convolution's weight and bias, and the grid it runs over: rows, columns, prefix tokens."""

    weight: Tensor
    bias: Tensor
    place: tuple[int, int, int]


class _Rms(NamedTuple):
    """An RMS norm of each token: its gain (D,), and the tokens' factors (B·H, N), rows of a larger tensor."""

    gain: Tensor
    factors: Tensor


class _Norm(NamedTuple):
    """The norm of `count` keys, by the first `shares` of their sums (B·H, held, STATISTICS, D)."""

    sums: Tensor
    shares: int
    count: int
    eps: float


class _Preparation(NamedTuple):
    """What is done to queries or keys."""

    rms: _Rms | None
    norm: _Norm | None
    conv: _Conv | None


class _Part(NamedTuple):
    """The tokens of one modality, and what is done to queries and keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    of_q: _Preparation
    of_k: _Preparation


def layer(image, text, weights, q_conv, k_conv, grid, norm: str, eps: float, scale: float, rms) -> tuple:
    """The outputs of image and text, each (B, H, N, D); that of no text is empty.

    `norm`: "none" or a norm_scope. rms: gains (D,) of the image's q and k and of the text's, or None; and their eps.
    """
    text = text or (None, None, None)
    convs = (*(q_conv or (None, None)), *(k_conv or (None, None)))
    image_gains, text_gains, rms_eps = rms
    gains = (*(image_gains or (None, None)), *(text_gains or (None, None)))
    place = (grid.rows, grid.columns, grid.num_prefix_tokens)
    return _layer(*image, *text, *weights, *convs, *gains, *place, norm, eps, rms_eps, scale)[:2]


TENSORS = 17  # of the op's inputs


@torch.library.custom_op("t5kernels::ttt_layer", mutates_args=())
def _layer(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    w1: Tensor, w2: Tensor, w3: Tensor,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    q_gain: Tensor | None, k_gain: Tensor | None, text_q_gain: Tensor | None, text_k_gain: Tensor | None,
    rows: int, columns: int, prefix: int, norm: str, eps: float, rms_eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The two outputs; and in float32 what the backward needs beside the inputs: the step (B, H, 3, D, D), the sums
    (B·H, held, STATISTICS, D) of the image's keys and then of the text's, and the factors (2, B·H, N + T) of the RMS
    norms of q and k (empty where there is no such norm)."""
    weights = [w1, w2, w3]
    convs = _convs(q_weight, q_bias, k_weight, k_bias, (rows, columns, prefix))
    gains = ((q_gain, k_gain), (text_q_gain, text_k_gain))
    sums, factors = _empty_sums(k, text_k, norm), _empty_factors(q, text_q, q_gain)
    parts = _parts((q, k, v), (text_q, text_k, text_v), convs, gains, sums, factors, norm, eps)
    _take_statistics(parts, sums, norm, rms_eps)
    step = _total(ttt.launch_accumulate(_prepared(part.k, part.of_k), part.v, weights, scale) for part in parts)
    outs = [ttt.launch_apply(_prepared(part.q, part.of_q), weights, step) for part in parts]
    return outs[0], outs[1] if text_q is not None else q.new_empty(0), step, sums, factors


@_layer.register_fake
def _(
    q, k, v, text_q, text_k, text_v, w1, w2, w3, q_weight, q_bias, k_weight, k_bias,
    q_gain, k_gain, text_q_gain, text_k_gain, rows, columns, prefix, norm, eps, rms_eps, scale,
):  # fmt: skip
    B, H, _, D = q.shape
    text_o = q.new_empty(0) if text_q is None else ttt.like_tokens(text_q)
    step = q.new_empty(B, H, 3, D, D, dtype=torch.float32)
    return ttt.like_tokens(q), text_o, step, _empty_sums(k, text_k, norm), _empty_factors(q, text_q, q_gain)


@torch.library.custom_op("t5kernels::ttt_layer_backward", mutates_args=())
def _layer_backward(
    d_out: Tensor, d_text: Tensor, step: Tensor, sums: Tensor, factors: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    w1: Tensor, w2: Tensor, w3: Tensor,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    q_gain: Tensor | None, k_gain: Tensor | None, text_q_gain: Tensor | None, text_k_gain: Tensor | None,
    rows: int, columns: int, prefix: int, norm: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the six tokens (empty for no text); in float32 of the weights (3, H, D, D), of the convolutions
    of q and k, (H, 10, D): nine places and the bias (empty for none), and of the gains, a row each."""
    weights = [w1, w2, w3]
    convs = _convs(q_weight, q_bias, k_weight, k_bias, (rows, columns, prefix))
    gains = ((q_gain, k_gain), (text_q_gain, text_k_gain))
    parts = _parts((q, k, v), (text_q, text_k, text_v), convs, gains, sums, factors, norm, eps)
    dq, d_steps, q_sums = _apply_backward(parts, (d_out, d_text), weights, step)
    d_step = _total(d_steps)
    dk, dv, d_weights, k_sums = _accumulate_backward(parts, d_step, weights, scale)
    d_gains = _norms_backward(dq, dk, parts, k_sums, norm)
    d_weights = d_weights - d_step.sum(0).transpose(0, 1)
    none = [q.new_empty(0) for _ in range(3 * (2 - len(parts)))]
    d_convs = (_of_convolution(convs[0], q_sums, q), _of_convolution(convs[1], k_sums[0], q))
    return dq[0], dk[0], dv[0], *(none or (dq[1], dk[1], dv[1])), d_weights, *d_convs, d_gains


@_layer_backward.register_fake
def _(
    d_out, d_text, step, sums, factors, q, k, v, text_q, text_k, text_v, w1, w2, w3,
    q_weight, q_bias, k_weight, k_bias, q_gain, k_gain, text_q_gain, text_k_gain,
    rows, columns, prefix, norm, eps, scale,
):  # fmt: skip
    _, H, _, D = q.shape
    tokens = [ttt.like_tokens(t) for t in (q, k, v)]
    texts = [q.new_empty(0) if t is None else ttt.like_tokens(t) for t in (text_q, text_k, text_v)]
    convs = [q.new_empty((0,) if q_weight is None else (H, 10, D), dtype=torch.float32) for _ in range(2)]
    gains = sum(gain is not None for gain in (q_gain, k_gain, text_q_gain, text_k_gain))
    return *tokens, *texts, q.new_empty(3, H, D, D, dtype=torch.float32), *convs, _empty_gains(q, gains)


def _keep(ctx, inputs, output) -> None:
    tensors, (*ctx.rest, _, ctx.scale) = inputs[:TENSORS], inputs[TENSORS:]
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, d_out, d_text, *_d_known):
    saved = ctx.saved_tensors  # asked once, as checkpointing wants it
    tensors, known = saved[:TENSORS], saved[TENSORS:]
    found = _layer_backward(d_out, d_text, *known, *tensors, *ctx.rest, ctx.scale)
    weights, convs, gains = tensors[6:9], tensors[9:13], tensors[13:]
    d_tokens = found[:3] if tensors[3] is None else found[:6]
    d_tokens = (*d_tokens, *(None,) * (6 - len(d_tokens)))
    d_weights = (g.to(w.dtype) for g, w in zip(found[6].unbind(0), weights, strict=True))
    d_convs = (*_conv_gradients(found[7], *convs[:2]), *_conv_gradients(found[8], *convs[2:]))
    d_gains = [own.to(gain.dtype) for own, gain in zip(found[9], gains, strict=False)]
    d_gains = (*d_gains, *(None,) * (4 - len(d_gains)))
    return *d_tokens, *d_weights, *d_convs, *d_gains, *(None,) * 7


_layer.register_autograd(_differentiate, setup_context=_keep)


def _conv_gradients(sums: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(H, 10, D) as gradients of weight (H·D, 1, 3, 3) and bias (H·D,)."""
    if weight is None:
        return None, None
    sums = sums.transpose(1, 2).flatten(0, 1)
    return sums[:, :9].reshape(weight.shape).to(weight.dtype), sums[:, 9].to(bias.dtype)


def _convs(q_weight, q_bias, k_weight, k_bias, place) -> tuple[_Conv | None, _Conv | None]:
    if q_weight is None:
        return None, None
    pairs = ((q_weight, q_bias), (k_weight, k_bias))
    return tuple(_Conv(weight.contiguous(), bias.contiguous(), place) for weight, bias in pairs)


def _empty_sums(k: Tensor, text_k: Tensor | None, norm: str) -> Tensor:
    """Room for the sums of the keys of image and text, a place for each program."""
    B, H, _, D = k.shape
    held = 0 if norm == "none" else ttt.MOST_CHUNKS * (1 if text_k is None else 2)
    return k.new_empty(B * H, held, norms.STATISTICS.value, D, dtype=torch.float32)


def _empty_factors(q: Tensor, text_q: Tensor | None, gain: Tensor | None) -> Tensor:
    """Room for the factors of the RMS norms of q and k."""
    B, H, N, _ = q.shape
    tokens = N if text_q is None else N + text_q.shape[2]
    return q.new_empty((0,) if gain is None else (2, B * H, tokens), dtype=torch.float32)


def _rms(gain: Tensor | None, factors: Tensor, side: int, start: int, x: Tensor) -> _Rms | None:
    """The RMS norm of tokens x, which are those from `start` on; side: 0 for queries, 1 for keys."""
    return None if gain is None else _Rms(gain.contiguous(), factors[side][:, start : start + x.shape[2]])


def _parts(image, text, convs, gains, sums: Tensor, factors: Tensor, norm: str, eps: float) -> list[_Part]:
    tokens = [image] if text[0] is None else [image, text]
    shares = [_shares("statistics", k)[1] for _, k, _ in tokens]
    counts = [k.shape[2] for _, k, _ in tokens]
    parts = []
    for place, (q, k, v) in enumerate(tokens):
        start = sum(counts[:place])
        q_rms, k_rms = (_rms(gain, factors, side, start, k) for side, gain in enumerate(gains[place]))
        own = _Norm(sums[:, sum(shares[:place]) :], shares[place], counts[place], eps)
        key_norm = {"none": None, "joint": _Norm(sums, sum(shares), sum(counts), eps), "modality": own}[norm]
        q_conv, k_conv = convs if place == 0 else (None, None)
        parts.append(_Part(q, k, v, _Preparation(q_rms, None, q_conv), _Preparation(k_rms, key_norm, k_conv)))
    return parts


def _apply_backward(parts, d_outs, weights, step) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """By part dq and the gradient of the step; the convolution's sums."""
    dq, d_steps, sums = [], [], []
    for part, d_out in zip(parts, d_outs, strict=False):
        grad, d_step = ttt.launch_apply_backward(d_out, _prepared(part.q, part.of_q), weights, step)
        grad, own = _prepare_backward(grad, part.q, part.of_q)
        dq.append(grad)
        d_steps.append(d_step)
        sums.append(own)
    return dq, d_steps, sums[0]


def _accumulate_backward(parts, d_step, weights, scale) -> tuple[list[Tensor], list[Tensor], Tensor, list]:
    """By part the gradient of normalized keys, and dv; the gradient of the weights; by part the keys' sums."""
    dk, dv, d_weights, sums = [], [], [], []
    for part in parts:
        keys = _prepared(part.k, part.of_k)
        grad, d_values, d_own = ttt.launch_accumulate_backward(d_step, keys, part.v, weights, scale)
        del keys
        grad, own = _prepare_backward(grad, part.k, part.of_k)
        dk.append(grad)
        dv.append(d_values)
        d_weights.append(d_own)
        sums.append(own)
    return dk, dv, _total(d_weights), sums


def _norms_backward(dq: list[Tensor], dk: list[Tensor], parts: list[_Part], k_sums: list, norm: str) -> Tensor:
    """Gradients of queries and keys from those of the normalized ones, in place; those of the gains."""
    totals = [None] * len(parts)
    if norm != "none":
        totals = [own[:, 10:] for own in k_sums]
        totals = [_total(totals)] * len(parts) if norm == "joint" else totals
    d_gains = []
    for grad_q, grad_k, part, total in zip(dq, dk, parts, totals, strict=True):
        d_gains += [_norm_backward(grad_q, part.q, part.of_q, None), _norm_backward(grad_k, part.k, part.of_k, total)]
    return _empty_gains(dq[0], 0) if d_gains[0] is None else torch.stack(d_gains)


def _empty_gains(q: Tensor, count: int) -> Tensor:
    return q.new_empty(count, q.shape[3], dtype=torch.float32)


def _of_convolution(conv: _Conv | None, sums: Tensor | None, q: Tensor) -> Tensor:
    """(H, 10, D): a convolution's gradients, summed over images; empty without one."""
    if conv is None:
        return q.new_empty(0, dtype=torch.float32)
    return sums.unflatten(0, q.shape[:2])[:, :, :10].sum(0)


def _shares(kernel: str, x: Tensor) -> tuple[int, int]:
    """Tokens a program takes, and programs a head."""
    tile = _cut(kernel, x)[1]
    return ttt.chunks_of(x, tile, x.shape[0] * x.shape[1])[:2]


def _take_statistics(parts: list[_Part], sums: Tensor, norm: str, rms_eps: float) -> None:
    """Fill what the norms of the parts are made of."""
    start = 0
    for part in parts:
        leader = parts[0] if norm == "joint" else part  # whose first key is taken off before squares are summed
        if part.of_k.rms or part.of_k.norm:
            start += _launch_statistics(part.k, part.of_k, leader, sums[:, start:], rms_eps)
        if part.of_q.rms:
            _launch_statistics(part.q, part.of_q, leader, sums, rms_eps)


def _launch_statistics(x: Tensor, how: _Preparation, leader: _Part, sums: Tensor, rms_eps: float) -> int:
    """Write factors and sums of tokens x, as far as `how` has a use for them; how many programs a head did."""
    B, H, N, D = x.shape
    width, tile = _cut("statistics", x)
    chunk, chunks = _shares("statistics", x)
    gain, factors = how.rms or (x, x)
    leading_gain = leader.of_k.rms.gain if leader.of_k.rms else x
    b, h, _, d = leader.k.stride()
    with torch.cuda.device_of(x):
        norms.statistics_kernel[B * H, chunks](
            *(x, gain, leader.k, leading_gain, sums, factors),
            *(*x.stride(), b, h, d, factors.stride(0)),
            *(H, N, chunk, _held(sums), sums.shape[1], rms_eps),
            *(D, width, tile.block, tile.stages, how.rms is not None, how.norm is not None),
            **ttt.launch_options(x, tile),
        )
    return chunks


def _held(sums: Tensor) -> int:
    """For how many programs a head there is room in the tensor that `sums` is of."""
    return sums.stride(0) // (norms.STATISTICS.value * sums.shape[3])


def _prepared(x: Tensor, how: _Preparation) -> Tensor:
    """Tokens as the inner model gets them; x itself where nothing is done to it."""
    if not any(how):
        return x
    y = ttt.like_tokens(x)
    with torch.cuda.device_of(x):
        tile, programs, numbers = _programs("prepare", x, how)
        tensors, of_norms = _norm_arguments(x, how)
        weight, bias = how.conv[:2] if how.conv else (x, x)
        prepare.prepare_kernel[programs](
            *(x, *tensors, weight, bias, y),
            *(*x.stride(), *y.stride(), *of_norms, *numbers),
            *(tile.stages, how.rms is not None, how.norm is not None, how.conv is not None),
            **ttt.launch_options(x, tile),
        )
    return y


def _prepare_backward(dy: Tensor, x: Tensor, how: _Preparation) -> tuple[Tensor, Tensor | None]:
    """The gradient of what is convolved (dy itself without a convolution), and sums (B·H, SUMS, D) over the tokens."""
    if how.norm is None and how.conv is None:
        return dy, None
    dx = dy if how.conv is None else ttt.like_tokens(x)
    with torch.cuda.device_of(x):
        tile, programs, numbers = _programs("prepare_backward", x, how)
        parts = x.new_empty(*programs, prepare.SUMS.value, x.shape[3], dtype=torch.float32)
        tensors, of_norms = _norm_arguments(x, how)
        prepare.prepare_backward_kernel[programs](
            *(dy, x, *tensors, how.conv.weight if how.conv else x, dx, parts),
            *(*dy.stride(), *x.stride(), *dx.stride(), *of_norms, *numbers),
            *(tile.stages, how.rms is not None, how.norm is not None, how.conv is not None),
            **ttt.launch_options(x, tile),
        )
    return dx, ttt.added(parts)


def _norm_arguments(x: Tensor, how: _Preparation) -> tuple[tuple[Tensor, Tensor, Tensor], tuple]:
    """Gain, factors and sums (x stands for what is not read); and the kernels' numbers from `factors_h` to `eps`."""
    gain, factors = how.rms or (x, x)
    sums, shares, count, eps = how.norm or (x, 0, 0, 0.0)
    return (gain, factors, sums), (factors.stride(0), _held(sums), shares, count, eps)


def _programs(kernel: str, x: Tensor, how: _Preparation) -> tuple[Tile, tuple[int, int], tuple[int, ...]]:
    """Tile, launch grid, and the kernel's numbers from `rows` to BLOCK, for tokens x (B, H, N, D)."""
    B, H, N, D = x.shape
    width, tile = _cut(kernel, x)
    rows, columns, prefix = how.conv.place if how.conv else (0, 0, 0)
    segments, outside = ttt.ceil_div(columns, tile.block), ttt.ceil_div(N - rows * columns, tile.block)
    chunk = ttt.blocks_of(x, tile, B * H * (segments or 1), rows or outside)
    on_grid = segments * ttt.ceil_div(rows, chunk)
    programs = (B * H, on_grid + ttt.ceil_div(outside, chunk))
    return tile, programs, (rows, columns, prefix, H, N, chunk, segments or 1, on_grid, D, width, tile.block)


def _norm_backward(dn: Tensor, x: Tensor, how: _Preparation, totals: Tensor | None) -> Tensor | None:
    """dn becomes the gradient of x, in place; that of the gain (D,) is returned. totals: (B·H, 2, D)."""
    if how.rms is None and how.norm is None:
        return None
    B, H, N, D = x.shape
    width, tile = _cut("norm_backward", x)
    chunk, chunks = _shares("norm_backward", x)
    parts = x.new_empty(B * H, chunks, D, dtype=torch.float32) if how.rms else x
    tensors, of_norms = _norm_arguments(x, how)
    with torch.cuda.device_of(x):
        norms.norm_backward_kernel[B * H, chunks](
            *(dn, x, *tensors, x if totals is None else totals.contiguous(), dn, parts),
            *(*dn.stride(), *x.stride(), *dn.stride(), *of_norms),
            *(H, N, chunk, D, width, tile.block, tile.stages, how.rms is not None, how.norm is not None),
            **ttt.launch_options(x, tile),
        )
    return parts.sum((0, 1)) if how.rms else None


def _cut(kernel: str, x: Tensor) -> tuple[int, Tile]:
    """Padded head width, and tile."""
    width = ttt.padded_width(x.shape[3])
    return width, TILES[kernel][width]


def _total(tensors) -> Tensor:
    """Their sum, without the copy that adding to 0 would be."""
    first, *others = tensors
    for other in others:
        first = first + other
    return first

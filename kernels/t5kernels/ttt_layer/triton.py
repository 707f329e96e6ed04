"""The layer by kernels: one differentiable custom op around those of triton_kernels.py and of `ttt`.

Forward: sums of the keys; keys prepared (normalized and convolved); `accumulate`; queries prepared; `apply`. Prepared
tokens live until they were read; the backward prepares them once more, so that what is kept is the inputs and O(H·D²).
Tokens of two modalities are two runs of the same kernels whose steps add up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from t5kernels.ttt import triton as ttt
from t5kernels.ttt.triton import Tile
from t5kernels.ttt_layer import triton_kernels as kernels

# By kernel, then by the head width padded to a power of two. `prepare` and its backward take blocks of columns.
TILES = {
    "key_sums": {width: Tile(block=8192 // width, warps=8, stages=3, resident=2) for width in (32, 64, 128)},
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


class _Preparation(NamedTuple):
    """What is done to queries or keys: a norm by its factors and summands (B·H, 2, D), and a convolution."""

    norm: Tensor | None
    conv: _Conv | None

    @property
    def any(self) -> bool:
        return self.norm is not None or self.conv is not None


class _Part(NamedTuple):
    """The tokens of one modality, and what is done to queries and keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    of_q: _Preparation
    of_k: _Preparation


def layer(image, text, weights, q_conv, k_conv, grid, norm: str, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """The outputs of image and text, each (B, H, N, D); that of no text is empty. `norm`: "none" or a norm_scope."""
    text = text or (None, None, None)
    convs = (*(q_conv or (None, None)), *(k_conv or (None, None)))
    place = (grid.rows, grid.columns, grid.num_prefix_tokens)
    return _layer(*image, *text, *weights, *convs, *place, norm, eps, scale)[:2]


@torch.library.custom_op("t5kernels::ttt_layer", mutates_args=())
def _layer(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    w1: Tensor, w2: Tensor, w3: Tensor,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    rows: int, columns: int, prefix: int, norm: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The two outputs; and for the backward the step and the norms, (norms, B·H, 2, D)."""
    weights = [w1, w2, w3]
    convs = _convs(q_weight, q_bias, k_weight, k_bias, (rows, columns, prefix))
    norms = _norms(k, text_k, norm, eps)
    parts = _parts(q, k, v, text_q, text_k, text_v, convs, norms)
    step = _total(ttt.launch_accumulate(_prepared(part.k, part.of_k), part.v, weights, scale) for part in parts)
    outs = [ttt.launch_apply(_prepared(part.q, part.of_q), weights, step) for part in parts]
    return outs[0], outs[1] if text_q is not None else q.new_empty(0), step, norms


@_layer.register_fake
def _(
    q, k, v, text_q, text_k, text_v, w1, w2, w3, q_weight, q_bias, k_weight, k_bias,
    rows, columns, prefix, norm, eps, scale,
):  # fmt: skip
    B, H, _, D = q.shape
    text_o = q.new_empty(0) if text_q is None else ttt.like_tokens(text_q)
    step = q.new_empty(B, H, 3, D, D, dtype=torch.float32)
    return ttt.like_tokens(q), text_o, step, _empty_norms(q, norm, text_q is not None)


@torch.library.custom_op("t5kernels::ttt_layer_backward", mutates_args=())
def _layer_backward(
    d_out: Tensor, d_text: Tensor, step: Tensor, norms: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    w1: Tensor, w2: Tensor, w3: Tensor,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    rows: int, columns: int, prefix: int, norm: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the six tokens (empty for no text); in float32 of the weights (3, H, D, D) and of the convolutions
    of q and k, (H, 10, D): nine places and the bias (empty for none)."""
    weights = [w1, w2, w3]
    convs = _convs(q_weight, q_bias, k_weight, k_bias, (rows, columns, prefix))
    parts = _parts(q, k, v, text_q, text_k, text_v, convs, norms)
    dq, d_steps, q_sums = _apply_backward(parts, (d_out, d_text), weights, step)
    d_step = _total(d_steps)
    dk, dv, d_weights, k_sums = _accumulate_backward(parts, d_step, weights, scale)
    if norm != "none":
        _norms_backward(dk, parts, k_sums, norm)
    d_weights = d_weights - d_step.sum(0).transpose(0, 1)
    none = [q.new_empty(0) for _ in range(3 * (2 - len(parts)))]
    d_convs = (_of_convolution(convs[0], q_sums, q), _of_convolution(convs[1], k_sums[0], q))
    return dq[0], dk[0], dv[0], *(none or (dq[1], dk[1], dv[1])), d_weights, *d_convs


@_layer_backward.register_fake
def _(
    d_out, d_text, step, norms, q, k, v, text_q, text_k, text_v, w1, w2, w3, q_weight, q_bias, k_weight, k_bias,
    rows, columns, prefix, norm, scale,
):  # fmt: skip
    _, H, _, D = q.shape
    tokens = [ttt.like_tokens(t) for t in (q, k, v)]
    texts = [q.new_empty(0) if t is None else ttt.like_tokens(t) for t in (text_q, text_k, text_v)]
    convs = [q.new_empty((0,) if q_weight is None else (H, 10, D), dtype=torch.float32) for _ in range(2)]
    return *tokens, *texts, q.new_empty(3, H, D, D, dtype=torch.float32), *convs


def _keep(ctx, inputs, output) -> None:
    tensors, (*ctx.rest, _, ctx.scale) = inputs[:13], inputs[13:]
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, d_out, d_text, _d_step, _d_norms):
    *tensors, step, norms = ctx.saved_tensors
    found = _layer_backward(d_out, d_text, step, norms, *tensors, *ctx.rest, ctx.scale)
    weights, convs = tensors[6:9], tensors[9:13]
    d_tokens = found[:3] if tensors[3] is None else found[:6]
    d_tokens = (*d_tokens, *(None,) * (6 - len(d_tokens)))
    d_weights = (g.to(w.dtype) for g, w in zip(found[6].unbind(0), weights, strict=True))
    d_convs = (*_conv_gradients(found[7], *convs[:2]), *_conv_gradients(found[8], *convs[2:]))
    return *d_tokens, *d_weights, *d_convs, *(None,) * 6


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


def _empty_norms(q: Tensor, norm: str, text: bool) -> Tensor:
    """Room for factors and summands of the keys' norm, and for those of the text's keys if normalized apart."""
    B, H, _, D = q.shape
    count = {"none": 0, "joint": 1, "modality": 1 + text}[norm]
    return q.new_empty(count, B * H, 2, D, dtype=torch.float32)


def _norms(k: Tensor, text_k: Tensor | None, norm: str, eps: float) -> Tensor:
    """As `_empty_norms` says."""
    norms = _empty_norms(k, norm, text_k is not None)
    keys = [k] if text_k is None else [k, text_k]
    for into, together in zip(norms, [keys] if norm == "joint" else [[each] for each in keys], strict=False):
        _fill(into, together, eps)
    return norms


def _parts(q, k, v, text_q, text_k, text_v, convs, norms: Tensor) -> list[_Part]:
    q_conv, k_conv = convs
    first, last = (norms[0], norms[-1]) if len(norms) else (None, None)
    image = _Part(q, k, v, _Preparation(None, q_conv), _Preparation(first, k_conv))
    if text_q is None:
        return [image]
    return [image, _Part(text_q, text_k, text_v, _Preparation(None, None), _Preparation(last, None))]


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


def _norms_backward(dn: list[Tensor], parts: list[_Part], sums: list[Tensor], norm: str) -> None:
    """Gradients of the keys from those of the normalized ones, in place."""
    totals, counts = [own[:, 10:] for own in sums], [part.k.shape[2] for part in parts]
    if norm == "joint":
        totals, counts = [_total(totals)] * len(parts), [sum(counts)] * len(parts)
    for grad, part, total, count in zip(dn, parts, totals, counts, strict=True):
        _norm_backward(grad, part.k, part.of_k.norm, total.contiguous(), count)


def _of_convolution(conv: _Conv | None, sums: Tensor | None, q: Tensor) -> Tensor:
    """(H, 10, D): a convolution's gradients, summed over images; empty without one."""
    if conv is None:
        return q.new_empty(0, dtype=torch.float32)
    return sums.unflatten(0, q.shape[:2])[:, :, :10].sum(0)


def _key_sums(k: Tensor, first: Tensor) -> Tensor:
    """(B·H, programs, 2, D): sums of what keys exceed the first token of `first` by, and of its square."""
    B, H, N, D = k.shape
    width, tile = _cut("key_sums", k)
    chunk, chunks, _ = ttt.chunks_of(k, tile, B * H)
    sums = k.new_empty(B * H, chunks, 2, D, dtype=torch.float32)
    with torch.cuda.device_of(k):
        kernels.key_sums_kernel[B * H, chunks](
            *(k, first, sums, *k.stride(), *_first_strides(first)),
            *(H, N, chunk, D, width, tile.block, tile.stages),
            **tile.options,
        )
    return sums


def _fill(norm: Tensor, keys: list[Tensor], eps: float) -> None:
    """Write the factors and summands (B·H, 2, D) of the norm over all these keys."""
    first = keys[0]
    B, H, _, D = first.shape
    sums = [_key_sums(k, first) for k in keys]
    sums = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
    with torch.cuda.device_of(first):
        kernels.norm_kernel[B * H,](
            *(sums, first, norm, *_first_strides(first)),
            *(H, sums.shape[1], sum(k.shape[2] for k in keys), eps, D, ttt.padded_width(D), 16),
        )


def _prepared(x: Tensor, how: _Preparation) -> Tensor:
    """Tokens as the inner model gets them; x itself where nothing is done to it."""
    if not how.any:
        return x
    y = ttt.like_tokens(x)
    with torch.cuda.device_of(x):
        tile, programs, numbers = _programs("prepare", x, how)
        kernels.prepare_kernel[programs](
            *(x, *_tensors(x, how), y),
            *(*x.stride(), *y.stride(), *numbers),
            *(tile.stages, how.norm is not None, how.conv is not None),
            **tile.options,
        )
    return y


def _prepare_backward(dy: Tensor, x: Tensor, how: _Preparation) -> tuple[Tensor, Tensor | None]:
    """The gradient of what is convolved (dy itself without a convolution), and sums (B·H, SUMS, D) over the tokens."""
    if not how.any:
        return dy, None
    dx = dy if how.conv is None else ttt.like_tokens(x)
    with torch.cuda.device_of(x):
        tile, programs, numbers = _programs("prepare_backward", x, how)
        parts = x.new_empty(*programs, kernels.SUMS.value, x.shape[3], dtype=torch.float32)
        norm, weight, _ = _tensors(x, how)
        kernels.prepare_backward_kernel[programs](
            *(dy, x, norm, weight, dx, parts),
            *(*dy.stride(), *x.stride(), *dx.stride(), *numbers),
            *(tile.stages, how.norm is not None, how.conv is not None),
            **tile.options,
        )
    return dx, ttt.added(parts)


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


def _tensors(x: Tensor, how: _Preparation) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, weight and bias; x stands for what is not read."""
    return x if how.norm is None else how.norm, *((how.conv.weight, how.conv.bias) if how.conv else (x, x))


def _norm_backward(dn: Tensor, x: Tensor, norm: Tensor, totals: Tensor, count: int) -> None:
    B, H, N, D = x.shape
    width, tile = _cut("norm_backward", x)
    chunk, chunks, _ = ttt.chunks_of(x, tile, B * H)
    with torch.cuda.device_of(x):
        kernels.norm_backward_kernel[B * H, chunks](
            *(dn, x, norm, totals, dn),
            *(*dn.stride(), *x.stride(), *dn.stride()),
            *(H, N, chunk, count, D, width, tile.block, tile.stages),
            **tile.options,
        )


def _first_strides(first: Tensor) -> tuple[int, int, int]:
    b, h, _, d = first.stride()
    return b, h, d


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

"""The layer by kernels: one differentiable custom op around those of triton_kernels.py and of `ttt`.

Forward: sums of the keys; k normalized and convolved; `accumulate`; q convolved; `apply`. What was normalized and
convolved is not kept: the backward makes it again, so that memory beyond inputs and results is one tensor of tokens
and O(H·D²). Tokens of two modalities are two runs of the same kernels whose steps add up.
"""

from typing import NamedTuple

import torch
import triton as triton_package
from torch import Tensor

from t5kernels.ttt import triton as ttt
from t5kernels.ttt_layer import triton_kernels as kernels

# Numbers that a program takes at a time, tokens by padded head width: what fits the registers of its 128 threads.
AT_A_TIME = {"key_sums": 4096, "prepare": 1024, "prepare_backward": 512, "norm_backward": 4096}
WARPS = 4
# Programs that keep a large card busy; each goes through a chunk of tokens with its weights and sums in registers.
PROGRAMS = {"key_sums": 512, "prepare": 768, "prepare_backward": 768}


class _Norm(NamedTuple):
    """Statistics of `count` keys: sums (B·H, 2, D) of what they exceed the `first` of them by, and of its square."""

    sums: Tensor
    first: Tensor
    count: int
    eps: float


class _Conv(NamedTuple):
    """A convolution's weight and bias, and the grid it runs over."""

    weight: Tensor
    bias: Tensor
    rows: int
    columns: int
    prefix: int


class _Part(NamedTuple):
    """The tokens of one modality."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_conv: _Conv | None
    k_conv: _Conv | None


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
    """The two outputs; and for the backward the step and the sums of the keys, (norms, B·H, 2, D)."""
    convs = (q_weight, q_bias, k_weight, k_bias, rows, columns, prefix)
    parts = _parts(q, k, v, text_q, text_k, text_v, *convs)
    norms = _norms([part.k for part in parts], norm, eps)
    step = _total(
        ttt._accumulate(_prepare(part.k, own, part.k_conv), part.v, w1, w2, w3, scale)
        for part, own in zip(parts, norms, strict=True)
    )
    outs = [ttt._apply(_prepare(part.q, None, part.q_conv), w1, w2, w3, step) for part in parts]
    return outs[0], outs[1] if text_q is not None else q.new_empty(0), step, _kept(q, norms, norm)


@_layer.register_fake
def _(
    q, k, v, text_q, text_k, text_v, w1, w2, w3, q_weight, q_bias, k_weight, k_bias,
    rows, columns, prefix, norm, eps, scale,
):  # fmt: skip
    B, H, _, D = q.shape
    text_o = q.new_empty(0) if text_q is None else ttt._like_tokens(text_q)
    step = q.new_empty(B, H, 3, D, D, dtype=torch.float32)
    sums = q.new_empty(_count_of_norms(norm, text_q), B * H, 2, D, dtype=torch.float32)
    return ttt._like_tokens(q), text_o, step, sums


@torch.library.custom_op("t5kernels::ttt_layer_backward", mutates_args=())
def _layer_backward(
    d_out: Tensor, d_text: Tensor, step: Tensor, sums: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    w1: Tensor, w2: Tensor, w3: Tensor,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    rows: int, columns: int, prefix: int, norm: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the six tokens (empty for no text); in float32 of the weights (3, H, D, D) and of the convolutions
    of q and k, (H, 10, D): nine places and the bias (empty for none)."""
    convs = (q_weight, q_bias, k_weight, k_bias, rows, columns, prefix)
    parts = _parts(q, k, v, text_q, text_k, text_v, *convs)
    norms = _norms([part.k for part in parts], norm, eps, sums)
    dq, d_steps, q_rows = _apply_backward(parts, (d_out, d_text), (w1, w2, w3), step)
    d_step = _total(d_steps)
    dk, dv, d_weights, k_rows = _accumulate_backward(parts, norms, d_step, (w1, w2, w3), scale)
    dk = _norms_backward(dk, parts, norms, k_rows, norm)
    d_weights = d_weights - d_step.sum(0).transpose(0, 1)
    none = [q.new_empty(0) for _ in range(3 * (2 - len(parts)))]
    d_convs = (_of_convolution(parts[0].q_conv, q_rows, q), _of_convolution(parts[0].k_conv, k_rows[0], q))
    return dq[0], dk[0], dv[0], *(none or (dq[1], dk[1], dv[1])), d_weights, *d_convs


@_layer_backward.register_fake
def _(
    d_out, d_text, step, sums, q, k, v, text_q, text_k, text_v, w1, w2, w3, q_weight, q_bias, k_weight, k_bias,
    rows, columns, prefix, norm, eps, scale,
):  # fmt: skip
    _, H, _, D = q.shape
    tokens = [ttt._like_tokens(t) for t in (q, k, v)]
    texts = [q.new_empty(0) if t is None else ttt._like_tokens(t) for t in (text_q, text_k, text_v)]
    convs = [q.new_empty((0,) if q_weight is None else (H, 10, D), dtype=torch.float32) for _ in range(2)]
    return *tokens, *texts, q.new_empty(3, H, D, D, dtype=torch.float32), *convs


def _keep(ctx, inputs, output) -> None:
    tensors, ctx.rest = inputs[:13], inputs[13:]
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, d_out, d_text, _d_step, _d_sums):
    *tensors, step, sums = ctx.saved_tensors
    found = _layer_backward(d_out, d_text, step, sums, *tensors, *ctx.rest)
    weights, convs = tensors[6:9], tensors[9:13]
    d_tokens = found[:3] if tensors[3] is None else found[:6]
    d_tokens = (*d_tokens, *(None,) * (6 - len(d_tokens)))
    d_weights = (g.to(w.dtype) for g, w in zip(found[6].unbind(0), weights, strict=True))
    d_convs = (*_conv_gradients(found[7], *convs[:2]), *_conv_gradients(found[8], *convs[2:]))
    return *d_tokens, *d_weights, *d_convs, *(None,) * 6


_layer.register_autograd(_differentiate, setup_context=_keep)


def _conv_gradients(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(H, 10, D) as gradients of weight (H·D, 1, 3, 3) and bias (H·D,)."""
    if weight is None:
        return None, None
    rows = rows.transpose(1, 2).flatten(0, 1)
    return rows[:, :9].reshape(weight.shape).to(weight.dtype), rows[:, 9].to(bias.dtype)


def _apply_backward(parts, d_outs, weights, step) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """By part dq and the gradient of the step; the convolution's sums."""
    dq, d_steps, rows = [], [], []
    for part, d_out in zip(parts, d_outs, strict=False):
        grad, d_step = ttt._apply_backward(d_out, _prepare(part.q, None, part.q_conv), *weights, step)
        grad, sums = _prepare_backward(grad, part.q, None, part.q_conv)
        dq.append(grad)
        d_steps.append(d_step)
        rows.append(sums)
    return dq, d_steps, rows[0]


def _accumulate_backward(parts, norms, d_step, weights, scale) -> tuple[list[Tensor], list[Tensor], Tensor, list]:
    """By part the gradient of normalized keys, and dv; the gradient of the weights; by part the keys' sums."""
    dk, dv, d_weights, rows = [], [], [], []
    for part, own in zip(parts, norms, strict=True):
        keys = _prepare(part.k, own, part.k_conv)
        grad, d_values, d_own = ttt._accumulate_backward(d_step, keys, part.v, *weights, scale)
        grad, sums = _prepare_backward(grad, part.k, own, part.k_conv)
        dk.append(grad)
        dv.append(d_values)
        d_weights.append(d_own)
        rows.append(sums)
    return dk, dv, _total(d_weights), rows


def _parts(q, k, v, text_q, text_k, text_v, q_weight, q_bias, k_weight, k_bias, rows, columns, prefix) -> list[_Part]:
    place = (rows, columns, prefix)
    q_conv = None if q_weight is None else _Conv(q_weight.contiguous(), q_bias.contiguous(), *place)
    k_conv = None if k_weight is None else _Conv(k_weight.contiguous(), k_bias.contiguous(), *place)
    image = _Part(q, k, v, q_conv, k_conv)
    return [image] if text_q is None else [image, _Part(text_q, text_k, text_v, None, None)]


def _norms(keys: list[Tensor], kind: str, eps: float, sums: Tensor | None = None) -> list[_Norm | None]:
    """The norm of each part's keys. sums: as `_kept` gave them; None: they are made."""
    if kind == "none":
        return [None for _ in keys]
    joint = kind == "joint"
    firsts = [keys[0] if joint else k for k in keys]
    if sums is None:
        each = [_key_sums(k, first) for k, first in zip(keys, firsts, strict=True)]
        sums = [_total(each)] if joint else each
    count = sum(k.shape[2] for k in keys)
    return [_Norm(sums[0 if joint else i], firsts[i], count if joint else k.shape[2], eps) for i, k in enumerate(keys)]


def _count_of_norms(kind: str, text: Tensor | None) -> int:
    return {"none": 0, "joint": 1, "modality": 1 if text is None else 2}[kind]


def _kept(q: Tensor, norms: list[_Norm | None], kind: str) -> Tensor:
    """The sums of all norms, (norms, B·H, 2, D)."""
    different = norms[:1] if kind == "joint" else [norm for norm in norms if norm]
    if not different:
        return q.new_empty(0, q.shape[0] * q.shape[1], 2, q.shape[3], dtype=torch.float32)
    return torch.stack([norm.sums for norm in different])


def _norms_backward(dn: list[Tensor], parts: list[_Part], norms: list[_Norm | None], rows: list, kind: str):
    """Gradients of the keys from those of the normalized ones, in place."""
    if kind == "none":
        return dn
    totals = [own[:, 10:] for own in rows]
    totals = [_total(totals)] * len(parts) if kind == "joint" else totals
    for grad, part, norm, total in zip(dn, parts, norms, totals, strict=True):
        _norm_backward(grad, part.k, norm, total.contiguous())
    return dn


def _of_convolution(conv: _Conv | None, rows: Tensor | None, q: Tensor) -> Tensor:
    """(H, 10, D): a convolution's gradients, summed over images; empty without one."""
    if conv is None:
        return q.new_empty(0, dtype=torch.float32)
    return rows.unflatten(0, q.shape[:2])[:, :, :10].sum(0)


def _key_sums(k: Tensor, first: Tensor) -> Tensor:
    B, H, N, D = k.shape
    width, block, chunk, chunks = _cut("key_sums", k)
    sums = k.new_empty(B * H, chunks, 2, D, dtype=torch.float32)
    with torch.cuda.device_of(k):
        kernels.key_sums_kernel[B * H, chunks](
            *(k, first, sums, *k.stride(), *_first_strides(first)),
            *(H, N, chunk, D, width, block),
            num_warps=WARPS,
        )
    return ttt._added(sums)


def _prepare(x: Tensor, norm: _Norm | None, conv: _Conv | None) -> Tensor:
    """x (B, H, N, D) normalized and convolved; x itself where there is nothing to do."""
    if norm is None and conv is None:
        return x
    B, H, N, D = x.shape
    y = ttt._like_tokens(x)
    width, block, chunk, chunks = _cut("prepare", x)
    first, sums, count, eps = _norm_arguments(x, norm)
    weight, bias, place = _conv_arguments(x, conv)
    with torch.cuda.device_of(x):
        kernels.prepare_kernel[B * H, chunks](
            *(x, first, sums, weight, bias, y, *x.stride(), *_first_strides(first), *y.stride()),
            *(H, N, chunk, count, eps, *place, D, width, block, norm is not None, conv is not None),
            num_warps=WARPS,
        )
    return y


def _prepare_backward(dy: Tensor, x: Tensor, norm: _Norm | None, conv: _Conv | None) -> tuple[Tensor, Tensor | None]:
    """The gradient of what is convolved (dy itself without a convolution), and sums (B·H, 12, D) over the tokens."""
    if norm is None and conv is None:
        return dy, None
    B, H, N, D = x.shape
    dx = dy if conv is None else ttt._like_tokens(x)
    width, block, chunk, chunks = _cut("prepare_backward", x)
    parts = x.new_empty(B * H, chunks, kernels.ROWS, D, dtype=torch.float32)
    first, sums, count, eps = _norm_arguments(x, norm)
    weight, _, place = _conv_arguments(x, conv)
    with torch.cuda.device_of(x):
        kernels.prepare_backward_kernel[B * H, chunks](
            *(dy, x, first, sums, weight, dx, parts),
            *(*dy.stride(), *x.stride(), *_first_strides(first), *dx.stride()),
            *(H, N, chunk, count, eps, *place, D, width, block, norm is not None, conv is not None),
            num_warps=WARPS,
        )
    return dx, ttt._added(parts)


def _norm_backward(dn: Tensor, x: Tensor, norm: _Norm, totals: Tensor) -> None:
    B, H, N, D = x.shape
    width = ttt.padded_width(D)
    block = AT_A_TIME["norm_backward"] // width
    with torch.cuda.device_of(x):
        kernels.norm_backward_kernel[B * H, triton_package.cdiv(N, block)](
            *(dn, x, norm.first, norm.sums, totals, dn),
            *(*dn.stride(), *x.stride(), *_first_strides(norm.first), *dn.stride()),
            *(H, N, norm.count, norm.eps, D, width, block),
            num_warps=WARPS,
        )


def _norm_arguments(x: Tensor, norm: _Norm | None) -> tuple[Tensor, Tensor, int, float]:
    """first, sums, count and eps; x stands for what is not read."""
    return (norm.first, norm.sums, norm.count, norm.eps) if norm else (x, x, 1, 0.0)


def _conv_arguments(x: Tensor, conv: _Conv | None) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    return (conv.weight, conv.bias, conv[2:]) if conv else (x, x, (1, 1, 0))


def _first_strides(first: Tensor) -> tuple[int, int, int]:
    b, h, _, d = first.stride()
    return b, h, d


def _cut(kernel: str, x: Tensor) -> tuple[int, int, int, int]:
    """Padded head width, tokens at a time, tokens a chunk (a multiple of those) and chunks."""
    B, H, N, D = x.shape
    width = ttt.padded_width(D)
    block = AT_A_TIME[kernel] // width
    blocks = triton_package.cdiv(N, block)
    each = triton_package.cdiv(blocks, min(blocks, max(1, PROGRAMS[kernel] // (B * H))))
    return width, block, each * block, triton_package.cdiv(blocks, each)


def _total(tensors) -> Tensor:
    """Their sum, without the copy that adding to 0 would be."""
    first, *others = tensors
    for other in others:
        first = first + other
    return first

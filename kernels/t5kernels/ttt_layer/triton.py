"""The layer by kernels: one differentiable custom op around those of triton_norms.py, triton_prepare.py and `ttt`.

The forward takes the statistics of the keys, prepares the keys (normalizes and convolves them), accumulates the step,
prepares the queries and applies the stepped inner model to them. Prepared tokens live until they are read. The backward
prepares them once more, so that it keeps the inputs, O(H·D²) numbers, and with RMS norms a number a token and head.
Every launch takes the tokens of both modalities, whose steps add up.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t5kernels.launch import MOST_CHUNKS, like_tokens
from t5kernels.ops import differentiable, op
from t5kernels.plans import planned
from t5kernels.ttt import triton as ttt
from t5kernels.ttt.triton_tiles import TILES
from t5kernels.ttt_layer import triton_finish, triton_launch, triton_norms
from t5kernels.ttt_layer.key_norm import KeyStatistics
from t5kernels.ttt_layer.reference import inner_rate
from t5kernels.ttt_layer.triton_launch import BackwardSums, Convolution, GainSums, KeyNorm, Preparation, RmsNorm

EVERY_TILE = TILES | triton_launch.TILES  # the tiles of all kernels that the layer launches
INPUT_TENSORS = 17  # so many of the op's inputs are tensors, and come first


class Part(NamedTuple):
    """The tokens of one modality, (B, H, N, D) each, how its queries and keys are prepared, and the place of the sums
    of its keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    for_q: Preparation
    for_k: Preparation
    sums: Tensor


def layer(image, text, weights, inner: str, q_conv, k_conv, grid, norm: str, eps: float, rms) -> tuple:
    """The outputs of image and text, each (B, H, N, D); the text's is empty where there is no text.

    `inner`: the inner model's name. `norm`: "none" or a norm_scope. `rms`: gains (D,) of the image's q and k and of the
    text's, or None; and their eps.
    """
    text = text or (None, None, None)
    convs = (*(q_conv or (None, None)), *(k_conv or (None, None)))
    image_gains, text_gains, rms_eps = rms
    gains = (*(image_gains or (None, None)), *(text_gains or (None, None)))
    place = (grid.rows, grid.columns, grid.num_prefix_tokens)
    given = (*image, *text, *ttt.three(weights), *convs, *gains)
    return _differentiable_layer(*given, *place, norm, eps, rms_eps, inner)[:2]


def prepare(x: Tensor, statistics: KeyStatistics | None, eps: float, conv, grid) -> Tensor:
    """Queries or keys (B, H, N, D) as the inner model gets them: normalized by `statistics`, if any, and convolved."""
    count, *moments = statistics or (0, None, None)
    place = (grid.rows, grid.columns, grid.num_prefix_tokens) if conv else (0, 0, 0)
    return _prepare(x, *moments, *(conv or (None, None)), *place, count, eps)


@op("ttt_prepare")
def _prepare(
    x: Tensor, mean: Tensor | None, squares: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    rows: int, columns: int, prefix: int, count: int, eps: float,
) -> Tensor:  # fmt: skip
    """See `prepare`; `mean` and `squares` become sums as one program would write them that subtracts the mean first."""
    sums = None
    if mean is not None and squares is not None:
        sums = torch.stack([torch.zeros_like(mean), squares, mean], dim=2).float().view(-1, 1, 3, x.shape[3])
    return planned(_launch_prepare, (x, sums, weight, bias), rows, columns, prefix, count, eps)[0]


def _launch_prepare(x, sums, weight, bias, rows, columns, prefix, count, eps) -> tuple[Tensor]:
    norm = None if sums is None else KeyNorm(sums, 1, count, eps)
    conv = None if weight is None else Convolution(weight.contiguous(), bias.contiguous(), (rows, columns, prefix))
    [out] = triton_launch.prepared([(x, Preparation(None, norm, conv))])
    return (out,)


@torch.library.register_fake("t5kernels::ttt_prepare")
def _(x, mean, squares, weight, bias, rows, columns, prefix, count, eps):
    return like_tokens(x)


@op("ttt_layer")
def _layer(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    w1: Tensor, w2: Tensor, w3: Tensor | None,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    q_gain: Tensor | None, k_gain: Tensor | None, text_q_gain: Tensor | None, text_k_gain: Tensor | None,
    rows: int, columns: int, prefix: int, norm: str, eps: float, rms_eps: float, inner: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The two outputs, and in float32 what the backward needs beside the inputs.

    That is the step (B, H, *step_shape); the sums (B·H, capacity, STATISTICS, D) of the image's keys and then of the
    text's; and the factors (2, B·H, N + T) of the RMS norms of q and k, empty where there is no such norm.

    The inner learning rate is no argument: torch.compile would fix its value, and with it the number of tokens.
    """
    tokens = (q, k, v, text_q, text_k, text_v)
    parameters = (w1, w2, w3, q_weight, q_bias, k_weight, k_bias, q_gain, k_gain, text_q_gain, text_k_gain)
    return planned(_launch_layer, (*tokens, *parameters), rows, columns, prefix, norm, eps, rms_eps, inner)


def _launch_layer(
    q, k, v, text_q, text_k, text_v, w1, w2, w3, q_weight, q_bias, k_weight, k_bias,
    q_gain, k_gain, text_q_gain, text_k_gain, rows, columns, prefix, norm, eps, rms_eps, inner,
):  # fmt: skip
    weights, scale, model = ttt.present(w1, w2, w3), inner_rate(q, text_q), ttt.INNERS[inner]
    convs = convolutions(q_weight, q_bias, k_weight, k_bias, (rows, columns, prefix))
    gains = ((q_gain, k_gain), (text_q_gain, text_k_gain))
    sums, factors = empty_sums(k, text_k, norm), _empty_factors(q, text_q, q_gain)
    parts = parts_of((q, k, v), (text_q, text_k, text_v), convs, gains, sums, factors, norm, eps)
    take_statistics(parts, norm, rms_eps)
    keys = triton_launch.prepared([(part.k, part.for_k) for part in parts])
    step = ttt.launch_accumulate(list(zip(keys, (part.v for part in parts), strict=True)), weights, scale, model)
    del keys
    queries = triton_launch.prepared([(part.q, part.for_q) for part in parts])
    outs = ttt.launch_apply(queries, weights, step, scale, model)
    return outs[0], outs[1] if text_q is not None else q.new_empty(0), step, sums, factors


@torch.library.register_fake("t5kernels::ttt_layer")
def _(
    q, k, v, text_q, text_k, text_v, w1, w2, w3, q_weight, q_bias, k_weight, k_bias,
    q_gain, k_gain, text_q_gain, text_k_gain, rows, columns, prefix, norm, eps, rms_eps, inner,
):  # fmt: skip
    B, H, _, D = q.shape
    text_out = q.new_empty(0) if text_q is None else like_tokens(text_q)
    step = q.new_empty(B, H, *ttt.INNERS[inner].step_shape(D), dtype=torch.float32)
    return like_tokens(q), text_out, step, empty_sums(k, text_k, norm), _empty_factors(q, text_q, q_gain)


@op("ttt_layer_backward")
def _layer_backward(
    d_out: Tensor, d_text: Tensor | None, step: Tensor, sums: Tensor, factors: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    w1: Tensor, w2: Tensor, w3: Tensor | None,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    q_gain: Tensor | None, k_gain: Tensor | None, text_q_gain: Tensor | None, text_k_gain: Tensor | None,
    rows: int, columns: int, prefix: int, norm: str, eps: float, inner: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of the three or six tokens, and of all parameters, one after the other in one tensor.

    That has the parameters' dtype, or float32 where they differ.
    """
    tokens = (q, k, v, text_q, text_k, text_v)
    parameters = (w1, w2, w3, q_weight, q_bias, k_weight, k_bias, q_gain, k_gain, text_q_gain, text_k_gain)
    given = (d_out, d_text, step, sums, factors, *tokens, *parameters)
    return list(planned(_launch_layer_backward, given, rows, columns, prefix, norm, eps, inner))


def _launch_layer_backward(
    d_out, d_text, step, sums, factors, q, k, v, text_q, text_k, text_v, w1, w2, w3,
    q_weight, q_bias, k_weight, k_bias, q_gain, k_gain, text_q_gain, text_k_gain,
    rows, columns, prefix, norm, eps, inner,
):  # fmt: skip
    weights, scale, model = ttt.present(w1, w2, w3), inner_rate(q, text_q), ttt.INNERS[inner]
    convs = convolutions(q_weight, q_bias, k_weight, k_bias, (rows, columns, prefix))
    gains = ((q_gain, k_gain), (text_q_gain, text_k_gain))
    parts = parts_of((q, k, v), (text_q, text_k, text_v), convs, gains, sums, factors, norm, eps)
    dq, of_queries, q_sums = _queries_backward(parts, (d_out, d_text), weights, step, scale, model)
    dk, dv, weight_sums, k_sums = _keys_backward(parts, model.step_gradient(of_queries), weights, scale, model)
    gain_sums = _norms_backward(dq, dk, parts, k_sums, norm)
    own = ttt.present(*weights, q_weight, q_bias, k_weight, k_bias, q_gain, k_gain, text_q_gain, text_k_gain)
    d_parameters = triton_finish.parameter_gradients(model, of_queries, weight_sums, q_sums, k_sums, gain_sums, own)
    return *itertools.chain(*zip(dq, dk, dv, strict=True)), d_parameters


@torch.library.register_fake("t5kernels::ttt_layer_backward")
def _(
    d_out, d_text, step, sums, factors, q, k, v, text_q, text_k, text_v, w1, w2, w3,
    q_weight, q_bias, k_weight, k_bias, q_gain, k_gain, text_q_gain, text_k_gain,
    rows, columns, prefix, norm, eps, inner,
):  # fmt: skip
    tokens = [like_tokens(t) for t in ttt.present(q, k, v, text_q, text_k, text_v)]
    own = ttt.present(w1, w2, w3, q_weight, q_bias, k_weight, k_bias, q_gain, k_gain, text_q_gain, text_k_gain)
    return [*tokens, q.new_empty(sum(t.numel() for t in own), dtype=triton_finish.common_dtype(own))]


def _keep_for_backward(ctx, inputs, output) -> None:
    tensors, (*numbers, _, inner) = inputs[:INPUT_TENSORS], inputs[INPUT_TENSORS:]
    ctx.numbers = (*numbers, inner)
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, d_out, d_text, *_d_kept):
    everything = ctx.saved_tensors  # read once, because checkpointing allows no more
    tensors, statistics = everything[:INPUT_TENSORS], everything[INPUT_TENSORS:]
    q, text_q = tensors[0], tensors[3]
    d_out = torch.zeros_like(q) if d_out is None else d_out
    if text_q is None:
        d_text = None  # the forward gave an empty tensor in the place of the text's output
    elif d_text is None:
        d_text = torch.zeros_like(text_q)
    *d_tokens, d_parameters = _layer_backward(d_out, d_text, *statistics, *tensors, *ctx.numbers)
    own = ttt.present(*tensors[6:])
    pieces = d_parameters.split([p.numel() for p in own])
    d_own = [g.view_as(p) if g.dtype == p.dtype else g.view_as(p).to(p.dtype) for g, p in zip(pieces, own, strict=True)]
    found = iter([*d_tokens, *d_own])
    return *(None if t is None else next(found) for t in tensors), *(None,) * 7


_differentiable_layer = differentiable(_layer, _keep_for_backward, _differentiate)


def convolutions(q_weight, q_bias, k_weight, k_bias, grid) -> tuple[Convolution | None, Convolution | None]:
    """The convolutions of queries and keys, over the same grid; both are None without them."""
    if q_weight is None:
        return None, None
    return (
        Convolution(q_weight.contiguous(), q_bias.contiguous(), grid),
        Convolution(k_weight.contiguous(), k_bias.contiguous(), grid),
    )


def empty_sums(k: Tensor, text_k: Tensor | None, norm: str) -> Tensor:
    """Room for the sums of the keys of image and text, a place for each program."""
    B, H, _, D = k.shape
    capacity = 0 if norm == "none" else MOST_CHUNKS * (1 if text_k is None else 2)
    return k.new_empty(B * H, capacity, triton_norms.STATISTICS.value, D, dtype=torch.float32)


def _empty_factors(q: Tensor, text_q: Tensor | None, gain: Tensor | None) -> Tensor:
    """Room for the factors of the RMS norms of q and k."""
    B, H, N, _ = q.shape
    tokens = N if text_q is None else N + text_q.shape[2]
    return q.new_empty((0,) if gain is None else (2, B * H, tokens), dtype=torch.float32)


def _rms(gain: Tensor | None, factors: Tensor, side: int, start: int, x: Tensor) -> RmsNorm | None:
    """The RMS norm of tokens x, which are those from `start` on; side: 0 for queries, 1 for keys."""
    return None if gain is None else RmsNorm(gain.contiguous(), factors[side][:, start : start + x.shape[2]])


def parts_of(image, text, convs, gains, sums: Tensor, factors: Tensor, norm: str, eps: float) -> list[Part]:
    """The image's part and, if there is text, the text's; views of `sums` and `factors` tell each where its own lie."""
    tokens = [image] if text[0] is None else [image, text]
    together = gains[0][0] is None and triton_launch.can_regroup(*(t for q, k, _ in tokens for t in (q, k)))
    keys = [triton_launch.regrouped(k) if together else k for _, k, _ in tokens]
    apart = [keys] if norm == "joint" else [[k] for k in keys]  # those that are normalized together
    shares = [count for group in apart for count in triton_launch.shares_of("statistics", *group)[1]]
    counts = [k.shape[2] for k in keys]
    sums = sums.view(keys[0].shape[0] * keys[0].shape[1], *sums.shape[1:3], keys[0].shape[3])
    parts = []
    for place, (q, k, v) in enumerate(tokens):
        start = sum(counts[:place])
        q_rms, k_rms = (_rms(gain, factors, side, start, k) for side, gain in enumerate(gains[place]))
        own = KeyNorm(sums[:, sum(shares[:place]) :], shares[place], counts[place], eps)
        key_norm = {"none": None, "joint": KeyNorm(sums, sum(shares), sum(counts), eps), "modality": own}[norm]
        q_conv, k_conv = convs if place == 0 else (None, None)
        for_q, for_k = Preparation(q_rms, None, q_conv, together), Preparation(k_rms, key_norm, k_conv, together)
        parts.append(Part(q, k, v, for_q, for_k, own.sums))
    return parts


def take_statistics(parts: list[Part], norm: str, rms_eps: float) -> None:
    """Fill in what the norms of the parts are made of."""
    for group in [parts] if norm == "joint" else [[part] for part in parts]:
        leader = group[0]  # its first key is subtracted before squares are summed
        first = (leader.k, leader.for_k.rms, leader.sums, rms_eps)
        if leader.for_k.rms or leader.for_k.norm:
            triton_launch.take_statistics([(part.k, part.for_k) for part in group], *first)
        if leader.for_q.rms:
            triton_launch.take_statistics([(part.q, part.for_q) for part in group], *first)


def _queries_backward(
    parts: list[Part], d_outs: Sequence[Tensor], weights: Sequence[Tensor], step: Tensor, scale: float, inner: ttt.Inner
) -> tuple[list[Tensor], Tensor, BackwardSums | None]:
    """By part the gradient of the normalized queries; those of weights and step (B, H, *gradients_shape); the sums of
    prepare_backward."""
    queries = triton_launch.prepared([(part.q, part.for_q) for part in parts])
    tokens = list(zip(d_outs, queries, strict=False))
    dq, gradients = ttt.launch_apply_backward(tokens, weights, step, scale, inner)
    del queries, tokens
    given = [(grad, part.q, part.for_q) for grad, part in zip(dq, parts, strict=True)]
    dq, sums = triton_launch.prepare_backward(given)
    return dq, gradients, sums


def _keys_backward(
    parts: list[Part], d_step: Tensor, weights: Sequence[Tensor], scale: float, inner: ttt.Inner
) -> tuple[list[Tensor], list[Tensor], Tensor, BackwardSums | None]:
    """By part the gradients of the normalized keys and of the values; the partial sums of the weights' gradients; the
    sums of prepare_backward."""
    keys = triton_launch.prepared([(part.k, part.for_k) for part in parts])
    tokens = list(zip(keys, (part.v for part in parts), strict=True))
    dk, dv, weight_sums = ttt.launch_accumulate_backward(d_step, tokens, weights, scale, inner)
    del keys, tokens
    given = [(grad, part.k, part.for_k) for grad, part in zip(dk, parts, strict=True)]
    dk, sums = triton_launch.prepare_backward(given)
    return dk, dv, weight_sums, sums


def _norms_backward(
    dq: list[Tensor], dk: list[Tensor], parts: list[Part], k_sums: BackwardSums | None, norm: str
) -> GainSums | None:
    """Turn the gradients of normalized queries and keys into those of q and k, in place; return the partial sums of
    those of the gains."""
    gain_sums = triton_launch.empty_gain_sums(dq) if parts[0].for_q.rms else None
    queries = [(grad, part.q, part.for_q) for grad, part in zip(dq, parts, strict=True)]
    keys = [(grad, part.k, part.for_k) for grad, part in zip(dk, parts, strict=True)]
    for side, (given, sums) in enumerate(((queries, None), (keys, k_sums))):
        triton_launch.norm_backward(given, sums, norm == "modality", gain_sums and gain_sums.rows[side])
    return gain_sums

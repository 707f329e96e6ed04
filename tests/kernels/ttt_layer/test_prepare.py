"""A layer computed in parts of a sequence, by `ttt_prepare` and the halves of `ttt`, is as exact as the whole."""

import pytest
import torch
from exactness import assert_as_exact_as_plain
from fake_card import fake_card
from layer_cases import Case, call, draw
from t5kernels import Grid, KeyStatistics, ttt_accumulate, ttt_apply, ttt_prepare
from torch.testing import assert_close
from triton_device import DEVICE, by_dtype

CASE = Case(rows=5, columns=4, prefix=0, text=3)
UPPER = 3  # rows of the first part; the others are the second's


def in_parts(image, weights, settings, *, grid, text, impl, q_conv, k_conv, norms=None):
    """`ttt_layer` of an image in two parts, each with the row of the other that its convolution sees."""
    columns, scale = grid.columns, image[0].shape[3] ** -0.5 / (image[0].shape[2] + text[0].shape[2])
    rows = [(0, UPPER, 0, UPPER + 1), (UPPER, grid.rows, UPPER - 1, grid.rows)]  # a part's, and those that it sees
    keys = [image[1][:, :, first * columns : end * columns] for first, end, _, _ in rows]
    statistics = KeyStatistics.merged([KeyStatistics.of(k) for k in (*keys, text[1])])
    norm = {"key_norm": settings.key_norm, "eps": settings.eps, "statistics": statistics, "impl": impl}

    def prepared(tokens, conv, **norm):
        for first, end, top, bottom in rows:
            seen = Grid(rows=bottom - top, columns=columns)
            part = tokens[:, :, top * columns : bottom * columns]
            part = ttt_prepare(part, conv=conv, grid=seen, **{"impl": impl} | norm)
            yield part[:, :, (first - top) * columns : (end - top) * columns]

    ks = [*prepared(image[1], k_conv, **norm), ttt_prepare(text[1], **norm)]
    vs = [*image[2].split([UPPER * columns, (grid.rows - UPPER) * columns], dim=2), text[2]]
    fit = {"inner": settings.inner, "scale": scale, "impl": impl}
    step = sum(ttt_accumulate(k, v, weights, **fit) for k, v in zip(ks, vs, strict=True))
    qs = [*prepared(image[0], q_conv), text[0]]
    *outs, text_out = (ttt_apply(q, weights, step, inner=settings.inner, impl=impl) for q in qs)
    return torch.cat(outs, dim=2), text_out


@by_dtype
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_layer_in_parts_is_as_exact_as_the_whole(impl, dtype):
    def outputs(inputs, impl, **op):
        with torch.no_grad():
            outs = call(CASE, inputs.leaves, impl, **op)
        return dict(zip(("image", "text"), outs, strict=True))

    inputs = draw(CASE, dtype)
    exact = outputs(inputs.map(torch.Tensor.double), "reference")
    assert_as_exact_as_plain(outputs(inputs, impl, op=in_parts), outputs(inputs, "reference"), exact)


@pytest.mark.parametrize("settings", [{}, {"conv": None}, {"key_norm": "none"}], ids=str)
def test_the_kernel_gives_the_same_from_run_to_run_and_takes_any_strides(settings):
    k, conv = draw(CASE).leaves["k"], tuple(draw(CASE).leaves[f"k_{name}"] for name in ("weight", "bias"))
    settings = {"key_norm": "instance", "statistics": KeyStatistics.of(k), "conv": conv} | settings
    run = {**settings, "grid": Grid(rows=5, columns=4), "impl": "triton"}
    once = ttt_prepare(k, **run)
    assert not k.is_contiguous()
    assert torch.equal(ttt_prepare(k.contiguous(), **run), once)
    assert_close(once, ttt_prepare(k, **run | {"impl": "reference"}), rtol=1e-4, atol=1e-5)


def test_statistics_of_parts_keep_their_digits_where_keys_lie_far_from_zero():
    k = torch.randn(1, 2, 50, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    merged = KeyStatistics.merged([KeyStatistics.of(part) for part in k.split([7, 30, 13], dim=2)])
    exact = k.double().var(2, correction=0, keepdim=True)
    assert merged.tokens == 50
    assert_close((merged.squares / 50).double(), exact, rtol=1e-3, atol=0)  # sums of squares would give noise
    assert_close(merged.mean.double(), k.double().mean(2, keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        ({}, ["ttt_prepare"]),
        ({"key_norm": "none", "statistics": False}, ["ttt_prepare"]),
        ({"statistics": False}, []),
        ({"key_norm": "instance_no_std"}, []),
        ({"grad": True}, []),
        ({"dtype": torch.float32}, []),
        ({"device": "cpu"}, []),
    ],
    ids=str,
)
def test_by_default_16_bit_tokens_on_a_card_are_prepared_by_the_kernel(change, ops):
    case = {"dtype": torch.bfloat16, "device": "cuda", "grad": False, "key_norm": "instance", "statistics": True}
    case |= change
    with fake_card() as ran:
        x = torch.empty(1, 2, 6, 16, dtype=case["dtype"], device=case["device"], requires_grad=case["grad"])
        conv = (x.new_empty(32, 1, 3, 3), x.new_empty(32))
        statistics = KeyStatistics.of(x) if case["statistics"] else None
        grid = Grid(rows=2, columns=3)
        out = ttt_prepare(x, key_norm=case["key_norm"], statistics=statistics, conv=conv, grid=grid)
        assert out.shape == x.shape
        assert out.dtype == x.dtype
    assert ran == ops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_norm": "rms"}, "cannot be used with key_norm='rms'"),
        ({"statistics": None}, "statistics=False; use 'reference'"),
        ({"x": torch.zeros(1, 2, 6, 16, requires_grad=True, device=DEVICE)}, "where gradients are wanted"),
        ({"key_norm": "sum"}, "expected one of"),
        ({"grid": None}, "expected a grid that they fill"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_prepared_is_refused(change, message):
    x = torch.zeros(1, 2, 6, 16, device=DEVICE)
    conv = (torch.zeros(32, 1, 3, 3, device=DEVICE), torch.zeros(32, device=DEVICE))
    call = {"x": x, "key_norm": "instance", "statistics": KeyStatistics.of(x), "conv": conv, "impl": "triton"}
    with pytest.raises(ValueError, match=message):
        ttt_prepare(**call | {"grid": Grid(rows=2, columns=3)} | change)

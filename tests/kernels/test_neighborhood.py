"""Local attention against a plain loop in float64; the fast ways against the readable one."""

import importlib.util

import pytest
import torch
from t5kernels import circular_attention, neighborhood_attention

GRIDS = [(3, 3, 3), (4, 7, 3), (5, 6, 5), (1, 4, 1), (9, 5, 5)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(rows: int, columns: int, prefix: int = 0, width: int = 8, dtype=torch.float64, device="cpu", batch: int = 2):
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    shape = (3, batch, 2, prefix + rows * columns, width)
    return [t.to(device, dtype) for t in torch.randn(shape, generator=generator, dtype=torch.float64)]


def looped(q, k, v, keys_of):
    """Softmax attention, one query at a time, over the keys that keys_of(query) lists."""
    out = torch.empty_like(q)
    for i in range(q.shape[2]):
        near = keys_of(i)
        scores = (q[:, :, i, None] * k[:, :, near]).sum(-1) * q.shape[-1] ** -0.5
        out[:, :, i] = (scores.softmax(-1)[..., None] * v[:, :, near]).sum(2)
    return out


def in_square(rows, columns, window):
    def keys_of(i):
        top = min(max(i // columns - window // 2, 0), rows - window)
        left = min(max(i % columns - window // 2, 0), columns - window)
        return [(top + a) * columns + left + b for a in range(window) for b in range(window)]

    return keys_of


def in_circle(rows, columns, prefix, radius):
    def keys_of(i):
        if i < prefix:
            return list(range(prefix + rows * columns))
        row, column = divmod(i - prefix, columns)
        grid = [(a, b) for a in range(rows) for b in range(columns)]
        near = [(a, b) for a, b in grid if (a - row) ** 2 + (b - column) ** 2 <= radius**2]
        return [*range(prefix), *(prefix + a * columns + b for a, b in near)]

    return keys_of


@pytest.mark.parametrize("impl", ["reference", "flex"])
@pytest.mark.parametrize(("rows", "columns", "window"), GRIDS)
def test_every_token_sees_its_window_and_nothing_else(rows, columns, window, impl):
    q, k, v = draw(rows, columns, width=16)
    out = neighborhood_attention(q, k, v, rows=rows, columns=columns, window=window, impl=impl)
    torch.testing.assert_close(out, looped(q, k, v, in_square(rows, columns, window)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "flex"])
@pytest.mark.parametrize(("rows", "columns", "prefix", "radius"), [(4, 5, 0, 1.0), (5, 3, 2, 1.5), (6, 6, 1, 2.0)])
def test_a_grid_token_sees_its_circle_and_the_prefix_which_sees_all(rows, columns, prefix, radius, impl):
    q, k, v = draw(rows, columns, prefix, width=16)
    geometry = {"rows": rows, "columns": columns, "num_prefix_tokens": prefix, "radius": radius}
    out = circular_attention(q, k, v, **geometry, impl=impl)
    torch.testing.assert_close(out, looped(q, k, v, in_circle(rows, columns, prefix, radius)), rtol=1e-10, atol=1e-10)


def test_gradients_are_exact():
    leaves = [t[:1, :1].requires_grad_() for t in draw(3, 4, width=4)]
    square = lambda *t: neighborhood_attention(*t, rows=3, columns=4, window=3)  # noqa: E731
    circle = lambda *t: circular_attention(*t, rows=3, columns=4, num_prefix_tokens=0, radius=1)  # noqa: E731
    assert torch.autograd.gradcheck(square, leaves)
    assert torch.autograd.gradcheck(circle, leaves)


@pytest.mark.parametrize("width", [8, 24, 72])
def test_any_width_that_is_a_multiple_of_eight(width):
    q, k, v = draw(5, 4, width=width)
    out = neighborhood_attention(q, k, v, rows=5, columns=4, window=3)
    torch.testing.assert_close(out, looped(q, k, v, in_square(5, 4, 3)), rtol=1e-10, atol=1e-10)


def test_half_precision_stays_half():
    q, k, v = draw(4, 4, dtype=torch.bfloat16)
    assert neighborhood_attention(q, k.float(), v.float(), rows=4, columns=4, window=3).dtype == torch.bfloat16


@pytest.mark.parametrize("warm", [False, True])
def test_within_a_compiled_region_it_stays_one_graph(warm):
    q, k, v = draw(4, 6 + warm, dtype=torch.float32, width=16)
    run = lambda *t: neighborhood_attention(*t, rows=4, columns=6 + warm, window=3, impl="flex") + 1  # noqa: E731
    expected = run(q, k, v) if warm else None
    out = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(out, run(q, k, v) if expected is None else expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 5}, "window 5 on a grid of 3×4; expected an odd number up to 3"),
        ({"window": 2}, "window 2"),
        ({"rows": 4}, r"\(2, 2, 12, 8\).*grid of 4×4; expected \(B, H, 16, D\)"),
        ({"impl": "cuda"}, "impl 'cuda' is unknown"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*draw(3, 4), **({"rows": 3, "columns": 4, "window": 3} | change))


@pytest.mark.skipif(importlib.util.find_spec("natten") is not None, reason="natten is installed")
def test_natten_is_asked_for_by_name_where_it_is_missing():
    with pytest.raises(ValueError, match="needs the package natten"):
        neighborhood_attention(*draw(3, 4), rows=3, columns=4, window=3, impl="natten")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("impl", ["flex", "natten"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("side", [12, 37])
def test_on_the_card_all_ways_agree_forward_and_backward(side, compiled, impl):
    if impl == "natten":
        pytest.importorskip("natten")
    leaves = [t.requires_grad_() for t in draw(side, side, width=64, dtype=torch.bfloat16, device="cuda")]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    run = lambda *t: neighborhood_attention(*t, rows=side, columns=side, window=5, impl=impl)  # noqa: E731
    out = (torch.compile(run, dynamic=False) if compiled else run)(*leaves)
    expected = neighborhood_attention(*exact, rows=side, columns=side, window=5, impl="reference")
    out.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip([out, *(t.grad for t in leaves)], [expected, *(t.grad for t in exact)], strict=True):
        assert (ours.double() - theirs).norm() <= 0.02 * theirs.norm() + 1e-6

"""Windows hold the tokens they should, however they are computed; what cannot be honoured is refused.

The reference is compared with loops over queries and keys in float64, the fast implementations with the reference.
"""

import functools
import math

import pytest
import torch
from fake_card import fake_card
from t5kernels import circular_attention, neighborhood_attention
from t5kernels.neighborhood import flex, natten, reference, triton
from torch import Tensor
from torch.testing import assert_close
from triton_device import needs_cuda

B, H = 2, 3
GRIDS = pytest.mark.parametrize(
    ("rows", "columns", "window"), [(3, 3, 3), (4, 7, 3), (7, 5, 5), (9, 8, 7), (2, 3, 1)], ids=str
)
CIRCLES = pytest.mark.parametrize(
    ("rows", "columns", "num_prefix_tokens", "radius"),
    [(4, 6, 0, 2), (5, 4, 1, math.sqrt(13)), (3, 3, 5, 1.5), (2, 5, 1, 0), (3, 4, 2, math.inf)],
)
needs_natten = pytest.mark.skipif(not natten.is_installed(), reason="natten is not installed with its CUDA kernels")


def tokens(count: int, width: int = 8, dtype=torch.float64, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, count, width, dtype=dtype, generator=generator).to(device) for _ in range(3)]


def by_loops(q: Tensor, k: Tensor, v: Tensor, sees) -> Tensor:
    """Softmax attention, query by query, to the keys j with sees(i, j)."""
    out = torch.empty_like(q)
    for i in range(q.shape[2]):
        keys = [j for j in range(q.shape[2]) if sees(i, j)]
        scores = (q[:, :, i, None] * k[:, :, keys]).sum(-1) / math.sqrt(q.shape[3])
        out[:, :, i] = (scores.softmax(-1)[..., None] * v[:, :, keys]).sum(2)
    return out


def in_window(i: int, j: int, length: int, window: int) -> bool:
    start = min(max(i - window // 2, 0), length - window)
    return start <= j < start + window


def in_circle(i: int, j: int, columns: int, prefix: int, radius: float) -> bool:
    if min(i, j) < prefix:
        return True
    (row_i, column_i), (row_j, column_j) = divmod(i - prefix, columns), divmod(j - prefix, columns)
    return math.hypot(row_i - row_j, column_i - column_j) <= radius


@GRIDS
@pytest.mark.parametrize("width", [5, 8])
def test_every_token_sees_its_square_window(rows, columns, window, width):
    q, k, v = tokens(rows * columns, width)

    def sees(i, j):
        return in_window(i // columns, j // columns, rows, window) and in_window(
            i % columns, j % columns, columns, window
        )

    assert all(sum(sees(i, j) for j in range(rows * columns)) == window**2 for i in range(rows * columns))
    out = neighborhood_attention(q, k, v, rows=rows, columns=columns, window=window)
    assert_close(out, by_loops(q, k, v, sees), rtol=1e-12, atol=1e-12)


@CIRCLES
def test_tokens_see_their_circle_and_prefix_tokens_everything(rows, columns, num_prefix_tokens, radius):
    q, k, v = tokens(num_prefix_tokens + rows * columns)
    sizes = {"rows": rows, "columns": columns, "num_prefix_tokens": num_prefix_tokens}
    out = circular_attention(q, k, v, **sizes, radius=radius)
    expected = by_loops(q, k, v, lambda i, j: in_circle(i, j, columns, num_prefix_tokens, radius))
    assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_q_k_and_v():
    leaves = [t.requires_grad_() for t in tokens(12, width=2)]

    def square(q, k, v):
        return neighborhood_attention(q, k, v, rows=3, columns=4, window=3)

    def circle(q, k, v):
        return circular_attention(q, k, v, rows=2, columns=5, num_prefix_tokens=2, radius=1.5)

    assert torch.autograd.gradcheck(square, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(circle, leaves, fast_mode=True)


SQUARES_144 = {"rows": 9, "columns": 16, "window": 5}
CIRCLES_144 = {"rows": 11, "columns": 13, "num_prefix_tokens": 1, "radius": 3.2}
CASES = pytest.mark.parametrize(
    ("op", "sizes", "width"),
    [
        (neighborhood_attention, SQUARES_144, 64),
        (neighborhood_attention, SQUARES_144, 8),
        (neighborhood_attention, {"rows": 3, "columns": 4, "window": 3}, 24),
        (circular_attention, CIRCLES_144, 64),
    ],
    ids=["square", "narrow heads", "less than a block", "circle"],
)


@CASES
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_reference_on_a_cpu(op, sizes, width):
    q, k, v = tokens(count_of(sizes), width, torch.float32)
    out = op(q, k, v, **sizes, impl="flex")
    assert_close(out, op(q, k, v, **sizes, impl="reference"), rtol=1e-5, atol=1e-6)


def test_masks_are_built_once_though_first_used_while_a_model_is_traced(monkeypatch):
    monkeypatch.setattr(flex, "_masks", flex._Masks())
    geometries, build = [], flex._build
    monkeypatch.setattr(flex, "_build", lambda *geometry: geometries.append(geometry) or build(*geometry))

    def layers(x):
        for window in (3, 5, 3):
            x = neighborhood_attention(x, x, x, rows=12, columns=12, window=window, impl="flex")
        return x + neighborhood_attention(x, x, x, rows=9, columns=16, window=3, impl="flex")

    q = tokens(144, 16, torch.float32)[0]
    with torch.inference_mode():
        compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
        out = compiled(q)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(q), out)
        assert_close(layers(q), out)
    assert [geometry[1] for geometry in geometries] == [(12, 12, 3), (12, 12, 5), (9, 16, 3)]
    assert not any(mask.kv_indices.is_inference() for mask in vars(flex._masks).values())


@pytest.mark.parametrize(
    ("op", "sizes"),
    [(neighborhood_attention, SQUARES_144), (circular_attention, CIRCLES_144)],
    ids=["square", "circle"],
)
def test_flex_is_traced_with_a_dynamic_number_of_tokens(op, sizes):
    q, k, v = tokens(count_of(sizes), 16, torch.float32)
    traced = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = op(q, k, v, **sizes, impl="reference")
    assert_close(traced(q, k, v, **sizes, impl="flex"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@needs_cuda
@CASES
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled model"])
def test_flex_on_cuda_equals_the_reference_with_its_gradients(op, sizes, width, traced):
    assert_equal_to_reference(op, sizes, width, "flex", traced, torch.float32)
    assert_equal_to_reference(op, sizes, width, "flex", traced, torch.bfloat16)


@pytest.mark.gpu
@needs_cuda
def test_flex_on_cuda_takes_a_grid_of_518_pixels():
    assert_equal_to_reference(
        neighborhood_attention, {"rows": 37, "columns": 37, "window": 5}, 64, "flex", False, torch.bfloat16
    )


@pytest.mark.gpu
@needs_cuda
def test_flex_on_cuda_takes_more_geometries_than_torch_compile_keeps_by_default():
    for columns in range(5, 15):
        assert_equal_to_reference(
            neighborhood_attention, {"rows": 5, "columns": columns, "window": 3}, 16, "flex", False, torch.float32
        )


@pytest.mark.gpu
@needs_cuda
@needs_natten
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 64])
def test_natten_equals_the_reference_with_its_gradients(width, dtype):
    assert_equal_to_reference(neighborhood_attention, SQUARES_144, width, "natten", False, dtype)


def assert_equal_to_reference(op, sizes, width, impl, traced, dtype):
    """Output and gradients of q, k, v within twice the error of the reference in that dtype, against float64."""
    inputs = tokens(count_of(sizes), width, device="cuda")
    exact = with_gradients(op, inputs, torch.float64, sizes, "reference")
    reference = with_gradients(op, inputs, dtype, sizes, "reference")
    fast = with_gradients(torch.compile(op, fullgraph=True) if traced else op, inputs, dtype, sizes, impl)
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), fast, reference, exact, strict=True):
        error, allowed = (a.double() - c).norm(), 2 * (b.double() - c).norm() + 1e-3 * c.norm()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def with_gradients(op, inputs, dtype, sizes, impl) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    out = op(*leaves, **sizes, impl=impl)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def count_of(sizes: dict) -> int:
    return sizes["rows"] * sizes["columns"] + sizes.get("num_prefix_tokens", 0)


def test_the_output_has_the_type_of_the_queries_under_autocast_too():
    q, k, v = tokens(12, dtype=torch.float32)
    exact = neighborhood_attention(q, k, v, rows=3, columns=4, window=3)
    mixed = neighborhood_attention(q.bfloat16(), k, v, rows=3, columns=4, window=3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = neighborhood_attention(q, k.bfloat16(), v, rows=3, columns=4, window=3)
    assert (mixed.dtype, cast.dtype) == (torch.bfloat16, torch.float32)
    assert (mixed - exact).norm() < 0.02 * exact.norm()
    assert 1e-4 * exact.norm() < (cast - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("installed", "width"), [(True, 8), (True, 12), (False, 8), (False, 72)])
def test_on_a_card_natten_comes_first_then_the_kernels_then_flex(installed, width, dtype, monkeypatch):
    monkeypatch.setattr(natten, "is_installed", lambda: installed)
    names = []
    for module in (natten, triton, flex, reference):
        for op in ("neighborhood_attention", "circular_attention"):
            call = functools.partial(note, names, module.__name__.rpartition(".")[2])
            monkeypatch.setattr(module, op, call, raising=False)
    with fake_card():
        x = torch.empty(B, H, 12, width, dtype=dtype, device="cuda", requires_grad=True)
        neighborhood_attention(x, x, x, rows=3, columns=4, window=3)
        circular_attention(x, x, x, rows=3, columns=4, num_prefix_tokens=0, radius=2)
    of_circles = "reference" if dtype == torch.float64 else "flex"
    without_natten = "triton" if dtype.itemsize == 2 and width <= 64 else of_circles
    with_natten = installed and width == 8 and dtype != torch.float64
    assert names == ["natten" if with_natten else without_natten, of_circles]


def note(names, name, q, k, v, **sizes):
    names.append(name)
    return q


@pytest.mark.parametrize("op", [neighborhood_attention, circular_attention])
def test_a_batch_may_be_empty(op):
    x = torch.zeros(0, H, 12, 8, requires_grad=True)
    kind = {"window": 3} if op is neighborhood_attention else {"num_prefix_tokens": 0, "radius": 2}
    out = op(x, x, x, rows=3, columns=4, **kind)
    assert out.shape == x.shape
    out.sum().backward()


def test_shapes_are_known_on_the_meta_device():
    q, k, v = tokens(12, device="meta")
    assert neighborhood_attention(q, k, v, rows=3, columns=4, window=3).shape == q.shape
    sizes = {"rows": 2, "columns": 5, "num_prefix_tokens": 2}
    assert circular_attention(q, k, v, **sizes, radius=2).shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 4}, "window is 4; expected an odd number"),
        ({"window": -1}, "window is -1; expected an odd number"),
        ({"window": 5}, "window 5 exceeds the grid of 3×4 tokens; expected at most 3: take a smaller"),
        ({"columns": 5}, r"q \(2, 3, 12, 8\).*expected three of the same shape \(B, H, 15, D\).*grid of 3×5"),
        ({"k": torch.zeros(B, H, 12, 4)}, r"k \(2, 3, 12, 4\)"),
        ({"q": torch.zeros(H, 12, 8)}, r"q \(3, 12, 8\)"),
        ({"impl": "cuda"}, "impl is 'cuda'; expected one of"),
        ({"impl": "natten"}, "impl='natten' cannot be used with torch.float64, head width 8, on cpu.*install natten"),
        ({"impl": "flex", "q": torch.zeros(B, H, 12, 8, requires_grad=True)}, "'flex' cannot be used.*use 'reference'"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_a_neighborhood_that_cannot_be_is_refused_with_what_came(change, message):
    q, k, v = tokens(12)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**{"q": q, "k": k, "v": v, "rows": 3, "columns": 4, "window": 3} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": -1}, "radius is -1; expected 0 or more"),
        ({"radius": math.nan}, "radius is nan"),
        ({"num_prefix_tokens": 2}, r"\(B, H, 14, D\) for 2 prefix tokens and a grid of 3×4"),
        ({"impl": "natten"}, r"impl is 'natten'; expected one of \('flex', 'reference'\)"),
    ],
    ids=str,
)
def test_a_circle_that_cannot_be_is_refused_with_what_came(change, message):
    q, k, v = tokens(12)
    with pytest.raises(ValueError, match=message):
        circular_attention(q, k, v, **{"rows": 3, "columns": 4, "num_prefix_tokens": 0, "radius": 2.0} | change)

"""The kernels of neighborhood attention are as exact as plain PyTorch, the same from run to run, for any grid.

Without a CUDA device Triton's interpreter runs them.
"""

import functools

import pytest
import torch
from exactness import assert_as_exact_as_plain
from t5kernels import neighborhood_attention
from t5kernels.neighborhood import triton as kernels
from t5kernels.tools.graphs import recorded
from torch.testing import assert_close
from triton_device import DEVICE, by_dtype, needs_cuda

NAMES = ("out", "dq", "dk", "dv")
# (images, heads, rows, columns, width, window): grids smaller than a square, with and without a rest.
SMALL = [
    (1, 1, 3, 4, 8, 3),
    (2, 2, 9, 16, 24, 5),
    (1, 1, 8, 11, 32, 3),
    (1, 1, 5, 17, 16, 5),
    (1, 1, 9, 8, 16, 7),
    (1, 2, 3, 3, 8, 3),
]
LARGE = [(2, 6, 37, 37, 64, 5), (1, 6, 74, 74, 64, 5), (1, 4, 50, 74, 72, 3), (1, 4, 33, 31, 128, 7)]
USUAL = SMALL[1]


def sizes(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda c: "B{}-H{}-{}x{}-D{}-W{}".format(*c))


def inputs(case, dtype=torch.float32):
    """q, k, v as views of one projection, and the gradient of the output."""
    B, H, rows, columns, D, _ = case
    generator = torch.Generator(DEVICE).manual_seed(0)
    qkv = torch.randn(B, rows * columns, 3, H, D, generator=generator, device=DEVICE)
    d_out = torch.randn(B, rows * columns, H, D, generator=generator, device=DEVICE)
    return [t.to(dtype) for t in (*qkv.transpose(1, 3).unbind(2), d_out.transpose(1, 2))]


def results(tokens, case, impl, op=neighborhood_attention):
    *tokens, d_out = tokens
    leaves = [t.detach().requires_grad_() for t in tokens]
    _, _, rows, columns, _, window = case
    out = op(*leaves, rows=rows, columns=columns, window=window, impl=impl)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, d_out)), strict=True))


@functools.cache
def kernel_results(case, dtype=torch.float32):
    """The kernels' results, computed once for all tests: the interpreter is slow."""
    return results(inputs(case, dtype), case, "triton")


def check(case, dtype):
    tokens = inputs(case, dtype)
    exact, plain = results([t.double() for t in tokens], case, "reference"), results(tokens, case, "reference")
    assert_as_exact_as_plain(kernel_results(case, dtype), plain, exact)


@by_dtype
@sizes(SMALL)
def test_outputs_and_gradients_are_as_exact_as_plain_pytorch(case, dtype):
    check(case, dtype)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@sizes(LARGE)
def test_sizes_of_real_models_are_as_exact_as_plain_pytorch(case, dtype):
    check(case, dtype)


def test_memory_outside_the_tokens_is_not_read_and_all_results_are_written():
    def between_nans(x):
        field = torch.full((*x.shape[:2], x.shape[2] + 40, x.shape[3] + 12), torch.nan, dtype=x.dtype, device=DEVICE)
        field[:, :, 20:-20, 4:-8] = x
        return field[:, :, 20:-20, 4:-8]

    tokens = [between_nans(t) for t in inputs(USUAL, torch.float16)]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        poisoned = results(tokens, USUAL, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(poisoned, kernel_results(USUAL, torch.float16), rtol=0, atol=0)


def test_runs_are_bit_equal():
    first, second = kernel_results(USUAL, torch.float16), results(inputs(USUAL, torch.float16), USUAL, "triton")
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.slow
def test_it_compiles_as_one_graph_for_all_grids():
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in ((2, 3, 4, 5, 8, 3), (3, 3, 6, 7, 8, 3)):
        with torch._dynamo.config.patch(error_on_recompile=case[0] == 3):
            eager, traced = kernel_results(case), results(inputs(case), case, "triton", op=compiled)
        assert_close(traced, eager, rtol=1e-6, atol=1e-6)
        assert {name: t.stride() for name, t in traced.items()} == {name: t.stride() for name, t in eager.items()}


@pytest.mark.slow
def test_the_custom_ops_keep_what_pytorch_asks_of_them():
    case = SMALL[0]
    *tokens, d_out = inputs(case)
    place = (3, 4, 3)
    torch.library.opcheck(kernels._attention, (*tokens, *place))
    torch.library.opcheck(kernels._backward, (d_out, *tokens, *kernels._attention(*tokens, *place), *place))


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_graph_replays_it():
    case = LARGE[0]
    *tokens, _ = inputs(case, torch.bfloat16)
    run = functools.partial(neighborhood_attention, *tokens, rows=37, columns=37, window=5, impl="triton")
    expected, replay = run(), recorded(run)
    replay().fill_(torch.nan)
    assert torch.equal(replay(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 9}, "with a window of 9; expected at most 7; use 'flex'"),
        ({"width": 72}, "with heads 72 wide in float32; expected at most 64"),
        ({"dtype": torch.float64}, "torch.float64.*expected tokens of one dtype"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_kernels_cannot_do_is_refused(change, message):
    x = torch.zeros(1, 1, 81, change.get("width", 8), dtype=change.get("dtype", torch.float32), device=DEVICE)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(x, x, x, rows=9, columns=9, window=change.get("window", 3), impl="triton")

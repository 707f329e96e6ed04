"""The Triton kernels of `ttt`: as exact as plain PyTorch, the same from run to run, and at home in PyTorch's machinery.

Without a CUDA device they run in Triton's interpreter. The standard is the reference in float64; the error of a result
may be at most twice that of the reference in the kernels' own dtype.
"""

import functools

import pytest
import torch
from exactness import assert_as_exact_as_plain
from t5kernels import ttt, ttt_accumulate, ttt_apply
from t5kernels.ttt import reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
with pytest.MonkeyPatch.context() as patch:
    # Read when the kernels are defined, which is when they are imported.
    patch.setenv("TRITON_INTERPRET", "0" if CUDA else "1")
    from t5kernels.ttt import triton as kernels

NAMES = ("out", "dq", "dk", "dv", "dw1", "dw2", "dw3")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
SMALL = [(1, 63, 3, 72), (2, 65, 2, 64), (1, 130, 1, 128), (7, 1, 3, 32), (5, 7, 3, 8)]
LARGE = [(2, 4096, 24, 64), (2, 16384, 24, 64), (128, 197, 6, 64), (4, 1029, 16, 72), (1, 4097, 10, 128)]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def sizes(shapes):
    return pytest.mark.parametrize("shape", shapes, ids=lambda s: "B{}-N{}-H{}-D{}".format(*s))


def inputs(shape, dtype=torch.float32, queries=None, seed=0):
    """q, k, v as views of one projection, inner weights, and the gradient of the output; keys with outliers."""
    B, N, H, D = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, device=DEVICE)

    qkv = draw(B, max(N, queries or 0), 3, H, D)
    qkv[:, 5::17, 1, :, ::11] *= 8
    q, k, v = qkv.to(dtype).transpose(1, 3).unbind(2)
    weights = [(draw(H, D, D) * D**-0.5).to(dtype) for _ in range(3)]
    d_out = draw(B, queries or N, H, D).transpose(1, 2) / 32  # so that no gradient is too large for float16
    return q[:, :, : queries or N], k[:, :, :N], v[:, :, :N], weights, d_out


def results(q, k, v, weights, d_out, impl, op=ttt):
    """The output and every gradient, by name."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *weights)]
    scale = q.shape[3] ** -0.5 / k.shape[2]
    out = op(*leaves[:3], tuple(leaves[3:]), inner="swiglu", scale=scale, impl=impl)
    gradients = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def check(q, k, v, weights, d_out):
    wide = [[t.double() for t in part] for part in ((q, k, v), weights)]
    exact = results(*wide[0], wide[1], d_out.to(q.dtype).double(), "reference")
    plain, kernel = (results(q, k, v, weights, d_out, impl) for impl in ("reference", "triton"))
    assert_as_exact_as_plain(kernel, plain, exact)


@by_dtype
@sizes(SMALL)
def test_outputs_and_gradients_are_as_exact_as_plain_pytorch(shape, dtype):
    check(*inputs(shape, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@sizes(LARGE)
def test_sizes_of_real_models_are_as_exact_as_plain_pytorch(shape, dtype):
    check(*inputs(shape, dtype))


@pytest.mark.parametrize("queries", [3, 70])
def test_queries_may_be_another_number_of_tokens(queries):
    check(*inputs((2, 33, 2, 32), torch.float16, queries=queries))


def test_memory_outside_the_tokens_is_not_read_and_all_results_are_written():
    q, k, v, weights, d_out = inputs((2, 37, 2, 24), torch.float16)

    def between_nans(x):
        field = torch.full((*x.shape[:2], x.shape[2] + 40, x.shape[3] + 12), torch.nan, dtype=x.dtype, device=DEVICE)
        field[:, :, 20:-20, 4:-8] = x
        return field[:, :, 20:-20, 4:-8]

    expected = results(q, k, v, weights, d_out, "triton")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        assert weights[0].new_empty(8, 8).isnan().all()
        poisoned = results(*(between_nans(t) for t in (q, k, v)), weights, between_nans(d_out), "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name in NAMES:
        torch.testing.assert_close(poisoned[name], expected[name], rtol=0, atol=0)


def test_runs_are_bit_equal():
    given = inputs((2, 300, 1, 32), torch.float16)
    first, second = results(*given, "triton"), results(*given, "triton")
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_strides_do_not_matter_and_heads_merge_without_a_copy():
    q, k, v, weights, d_out = inputs((2, 37, 2, 32), torch.float16)
    expected = results(*(t.contiguous() for t in (q, k, v)), weights, d_out, "triton")
    channels_first = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v, d_out)]
    for result in (
        results(q, k, v, weights, d_out, "triton"),
        results(*channels_first[:3], weights, channels_first[3], "triton"),
    ):
        assert all(torch.equal(result[name], expected[name]) for name in NAMES)
        for name in ("out", "dq", "dk", "dv"):
            merged = result[name].transpose(1, 2).flatten(2)
            assert merged.data_ptr() == result[name].data_ptr()


def test_a_gradient_that_is_one_number_everywhere_is_taken():
    q, k, v, weights, _ = inputs((1, 9, 2, 16))
    everywhere = torch.ones((), device=DEVICE).expand(q.shape)
    result, expected = (results(q, k, v, weights, everywhere, impl) for impl in ("triton", "reference"))
    for name in NAMES:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("inner", "impl"), [*((inner, "reference") for inner in reference.STEPPED), ("swiglu", "triton")]
)
def test_steps_of_chunks_add_up_to_the_whole(inner, impl):
    q, k, v, weights, _ = inputs((2, 50, 2, 32), torch.float32)
    weights = weights[: 2 if inner in ("one_layer_gate", "two_layer") else 3]
    kind = {"inner": inner, "impl": impl}
    whole = ttt(q, k, v, weights, scale=0.02, **kind)
    chunks = zip(k.split(20, dim=2), v.split(20, dim=2), strict=True)
    step = sum(ttt_accumulate(*chunk, weights, scale=0.02, **kind) for chunk in chunks)
    out = torch.cat([ttt_apply(chunk, weights, step, **kind) for chunk in q.split(17, dim=2)], dim=2)
    assert step.dtype == torch.float32
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)


def test_gradients_go_through_the_halves():
    q, k, v, weights, d_out = inputs((2, 50, 2, 32))

    def halves(q, k, v, weights, *, inner, scale, impl):
        chunks = zip(k.split(20, dim=2), v.split(20, dim=2), strict=True)
        step = sum(ttt_accumulate(*chunk, weights, inner=inner, scale=scale, impl=impl) for chunk in chunks)
        return torch.cat([ttt_apply(c, weights, step, inner=inner, impl=impl) for c in q.split(17, dim=2)], dim=2)

    expected = results(q, k, v, weights, d_out, "reference")
    for impl in ("reference", "triton"):
        result = results(q, k, v, weights, d_out, impl, op=halves)
        for name in NAMES:
            torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


def test_half_precision_halves_give_the_step_in_float32():
    q, k, v, weights, _ = inputs((1, 20, 2, 32), torch.float16)
    for impl in ("reference", "triton"):
        step = ttt_accumulate(k, v, weights, inner="swiglu", scale=0.02, impl=impl)
        assert step.dtype == torch.float32
        assert ttt_apply(q, weights, step, inner="swiglu", impl=impl).dtype == torch.float16


def test_autocast_is_followed_and_weights_may_stay_in_float32():
    q, k, v, weights, d_out = inputs((1, 40, 2, 32))
    half = results(*(t.half() for t in (q, k, v)), weights, d_out, "triton")
    with torch.autocast(DEVICE, torch.float16):
        mixed = results(q, k, v, weights, d_out, "triton")
    assert {t.dtype for t in mixed.values()} == {torch.float32}
    assert half["dw1"].dtype == torch.float32
    torch.testing.assert_close(mixed["out"], half["out"].float(), rtol=0, atol=0)
    torch.testing.assert_close(mixed["dw1"], half["dw1"], rtol=1e-3, atol=1e-3)


def test_the_backward_keeps_the_inputs_and_the_step_only():
    q, k, v, weights, _ = inputs((2, 100, 2, 32))
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *weights)]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = ttt(*leaves[:3], leaves[3:], inner="swiglu", scale=0.01, impl="triton")
    extra = [size for pointer, size in kept.items() if pointer not in own]
    assert out.requires_grad
    assert extra == [2 * 2 * 3 * 32 * 32]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_compiles_as_one_graph(dynamic):
    compiled = torch.compile(ttt, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (20, 33):
        given = inputs((2, tokens, 2, 16))
        eager, result = results(*given, "triton"), results(*given, "triton", op=compiled)
        for name in NAMES:
            torch.testing.assert_close(result[name], eager[name], rtol=1e-6, atol=1e-6)
            assert result[name].stride() == eager[name].stride()


def test_it_is_exported():
    q, k, v, weights, _ = inputs((2, 20, 2, 16))

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, *weights):
            return ttt(q, k, v, weights, inner="swiglu", scale=0.02, impl="triton")

    exported = torch.export.export(Layer(), (q, k, v, *weights)).module()
    expected = ttt(q, k, v, weights, inner="swiglu", scale=0.02, impl="triton")
    assert torch.equal(exported(q, k, v, *weights), expected)


def test_checkpointing_gives_the_same_gradients():
    given = inputs((1, 20, 2, 16))
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, ttt, use_reentrant=False)
    plain, again = results(*given, "triton"), results(*given, "triton", op=checkpointed)
    assert all(torch.equal(plain[name], again[name]) for name in NAMES)


def test_the_custom_ops_keep_what_pytorch_asks_of_them():
    q, k, v, weights, d_out = inputs((1, 20, 2, 16))
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *weights)]
    step = torch.randn(1, 2, 3, 16, 16, device=DEVICE)
    torch.library.opcheck(kernels._accumulate, (*leaves[1:], 0.1))
    torch.library.opcheck(kernels._apply, (leaves[0], *leaves[3:], step.clone().requires_grad_()))
    torch.library.opcheck(kernels._accumulate_backward, (step, k, v, *weights, 0.1))
    torch.library.opcheck(kernels._apply_backward, (d_out, q, *weights, step))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_cuda_graph_replays_it():
    q, k, v, weights, _ = inputs((2, 500, 4, 64), torch.bfloat16)
    run = functools.partial(ttt, q, k, v, weights, inner="swiglu", scale=0.01, impl="triton")
    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl is 'cuda'; expected one of"),
        ({"inner": "three_layer"}, "inner='three_layer', loss='dot'; expected 'swiglu'"),
        ({"loss": "residual"}, "inner='swiglu', loss='residual'; expected 'swiglu' and 'dot'"),
        ({"dtype": torch.float64}, "torch.float64.*expected tokens of one dtype"),
        ({"width": 160}, "heads up to 128 wide"),
        ({"tokens": 0}, "at least one token"),
        ({"device": "meta"}, "on meta; expected CUDA tensors"),
        *([] if CUDA else [({"dtype": torch.bfloat16}, "interpreter is wrong in bfloat16")]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_kernels_cannot_do_is_refused(change, message):
    width, kind = change.get("width", 16), {"inner": "swiglu", "impl": "triton"}
    place = {"dtype": change.get("dtype", torch.float32), "device": change.get("device", DEVICE)}
    tokens = torch.zeros(1, 2, change.get("tokens", 5), width, **place)
    weights = (torch.zeros(2, width, width, **place),) * 3
    kind |= {key: change[key] for key in ("inner", "impl", "loss") if key in change}
    with pytest.raises(ValueError, match=message):
        ttt(tokens, tokens, tokens, weights, scale=0.1, **kind)


def test_tokens_of_two_dtypes_are_refused():
    _, k, v, weights, _ = inputs((1, 5, 2, 16))
    with pytest.raises(ValueError, match="expected tokens of one dtype"):
        ttt_accumulate(k.half(), v, weights, inner="swiglu", scale=0.1, impl="triton")


def test_halves_of_models_that_take_no_step_are_refused():
    q, k, v, _, _ = inputs((1, 5, 2, 16))
    with pytest.raises(ValueError, match="inner='linear' takes no gradient step"):
        ttt_accumulate(k, v, (), inner="linear", scale=0.1)
    with pytest.raises(ValueError, match=r"step \(1, 2, 2, 16, 16\)"):
        ttt_apply(q, (), torch.zeros(1, 2, 2, 16, 16), inner="swiglu")


@pytest.mark.skipif(CUDA, reason="about a machine without CUDA")
def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    q, k, v, weights, _ = inputs((1, 5, 2, 16))
    with pytest.raises(ValueError, match="on cpu; expected CUDA tensors"):
        ttt(q, k, v, weights, inner="swiglu", scale=0.1, impl="triton")


@pytest.mark.parametrize("blocks", [1, 4, 64, 300])
@pytest.mark.parametrize(("heads", "images"), [(1, 1), (48, 1), (24, 2), (6, 128), (72, 32)])
def test_programs_share_all_tokens_and_keep_a_large_card_busy(blocks, heads, images):
    programs = 132
    blocks_each, images_each = kernels._shares(blocks, heads, images, programs)
    chunks, groups = -(-blocks // blocks_each), -(-images // images_each)
    assert chunks <= kernels.MOST_CHUNKS
    assert (chunks - 1) * blocks_each < blocks <= chunks * blocks_each
    assert (groups - 1) * images_each < images <= groups * images_each
    # The work of the busiest place, against everything shared out evenly and what a program costs by itself.
    busiest = -(-heads * chunks * groups // programs) * (blocks_each * images_each + kernels.OVERHEAD)
    assert busiest <= 1.5 * (blocks * heads * images / programs) + 3 * kernels.OVERHEAD + blocks / kernels.MOST_CHUNKS

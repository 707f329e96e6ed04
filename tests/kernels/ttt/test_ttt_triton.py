"""The kernels of `ttt` are as exact as plain PyTorch, the same from run to run, and at home in PyTorch's machinery.

Without a CUDA device Triton's interpreter runs them. The standard is the reference in float64; the error of a result
may be at most twice that of the reference in the kernels' own dtype.
"""

import functools

import pytest
import torch
from exactness import assert_as_exact_as_plain
from t5kernels import launch, ttt, ttt_accumulate, ttt_apply
from t5kernels.linear_attention.reference import SMALLEST_NORMALIZER
from t5kernels.tools.graphs import recorded
from t5kernels.ttt import reference, triton_tiles
from t5kernels.ttt import triton as kernels
from t5kernels.ttt.api import FUSED_INNERS, INNER_WEIGHTS, STEPPED_WEIGHTS
from torch.nn import functional as F
from torch.testing import assert_close
from triton_device import CUDA, DEVICE, by_dtype, needs_cuda

NAMES = ("out", "dq", "dk", "dv", "dw1", "dw2", "dw3")
SMALL = [(1, 63, 1, 72), (2, 65, 1, 64), (1, 65, 1, 128), (7, 1, 2, 32), (5, 7, 3, 8)]
SMALL += [(1, 33, 2, 80), (2, 17, 1, 88), (1, 33, 1, 96), (1, 17, 1, 112)]
LARGE = [
    (2, 4096, 24, 64),
    (2, 16384, 24, 64),
    (128, 197, 6, 64),
    (4, 1029, 16, 72),
    (2, 1029, 8, 96),
    (1, 4097, 10, 128),
]
USUAL = (2, 37, 2, 24)  # several tests share the results at this size
TRACED = (2, 20, 2, 16)


def sizes(shapes):
    return pytest.mark.parametrize("shape", shapes, ids=lambda s: "B{}-N{}-H{}-D{}".format(*s))


def inputs(shape, dtype=torch.float32, queries=None, shift=0):
    """q, k, v as views of one projection, inner weights, and the gradient of the output; keys with outliers.

    shift: how large a vector is added to all values.
    """
    B, N, H, D = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, device=DEVICE)

    qkv = draw(B, max(N, queries or 0), 3, H, D)
    qkv[:, 5::17, 1, :, ::11] *= 8
    if shift:
        qkv[:, :, 2] += shift * draw(H, D)
    q, k, v = qkv.to(dtype).transpose(1, 3).unbind(2)
    weights = [(draw(H, D, D) * D**-0.5).to(dtype) for _ in range(3)]
    d_out = draw(B, queries or N, H, D).transpose(1, 2) / 32  # so that no gradient is too large for float16
    return q[:, :, : queries or N], k[:, :, :N], v[:, :, :N], weights, d_out


def results(q, k, v, weights, d_out, impl, op=ttt, inner="swiglu"):
    """The output and every gradient, by name."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *weights[: INNER_WEIGHTS[inner]])]
    scale = q.shape[3] ** -0.5 / k.shape[2]
    out = op(*leaves[:3], tuple(leaves[3:]), inner=inner, scale=scale, impl=impl)
    gradients = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=False))


@functools.cache
def kernel_results(shape, dtype=torch.float32, queries=None, inner="swiglu", shift=0):
    """The kernels' results, computed once for all tests: the interpreter is slow."""
    return results(*inputs(shape, dtype, queries, shift), "triton", inner=inner)


def check(shape, dtype, queries=None, inner="swiglu", shift=0):
    q, k, v, weights, d_out = inputs(shape, dtype, queries, shift)
    wide = [t.double() for t in (q, k, v)], [w.double() for w in weights], d_out.to(dtype).double()
    exact = results(*wide[0], *wide[1:], "reference", inner=inner)
    plain = results(q, k, v, weights, d_out, "reference", inner=inner)
    assert_as_exact_as_plain(kernel_results(shape, dtype, queries, inner, shift), plain, exact)


@by_dtype
@sizes(SMALL)
def test_outputs_and_gradients_are_as_exact_as_plain_pytorch(shape, dtype):
    check(shape, dtype)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@sizes(LARGE)
def test_sizes_of_real_models_are_as_exact_as_plain_pytorch(shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("inner", FUSED_INNERS)
@pytest.mark.parametrize("queries", [3, 70])
def test_queries_may_be_another_number_of_tokens(queries, inner):
    check((2, 33, 1, 32), torch.float16, queries, inner)


@pytest.mark.parametrize("inner", FUSED_INNERS[1:])
def test_other_inner_models_are_as_exact_in_slices_too(inner):
    check((2, 63, 1, 72), torch.float16, inner=inner)
    check((1, 33, 1, 96), torch.float16, inner=inner)
    check((2, 20, 2, 24), torch.float32, inner=inner)
    check((1, 20, 1, 40), torch.float32, inner=inner)


@by_dtype
def test_a_shift_of_all_values_costs_normalized_attention_no_digits(dtype):
    # Its gradients by queries and keys are differences, in which a shift of the values cancels.
    check((2, 63, 2, 32), dtype, inner="linear_proj_qk", shift=5)


@by_dtype
def test_a_normalizer_is_at_least_the_smallest_as_in_the_reference(dtype):
    q, k, v, weights, d_out = inputs((1, 8, 1, 32), dtype)
    sizes = torch.linspace(8, 11, 8, device=DEVICE)[:, None]
    q, k = (sizes + 0.1 * q).to(dtype), (9 + 0.1 * k).to(dtype)
    weights = [(0.01 * w - 1 / 32).to(dtype) for w in weights[:2]]
    wide = [t.double() for t in (q, k, v)], [w.double() for w in weights]
    q_features, k_features = (F.elu(x @ w) + 1 for x, w in zip(wide[0][:2], wide[1], strict=True))
    too_small = q_features @ k_features.sum(-2).unsqueeze(-1) < SMALLEST_NORMALIZER
    assert too_small.any() and not too_small.all()
    exact = results(*wide[0], wide[1], d_out.to(dtype).double(), "reference", inner="linear_proj_qk")
    kernel, plain = (results(q, k, v, weights, d_out, impl, inner="linear_proj_qk") for impl in ("triton", "reference"))
    assert_as_exact_as_plain(kernel, plain, exact)


def test_every_inner_model_with_kernels_is_known_to_the_op_and_steps_as_the_reference_does():
    assert set(kernels.INNERS) == set(FUSED_INNERS)
    for name, inner in kernels.INNERS.items():
        assert inner.steps == (STEPPED_WEIGHTS[name] if name in reference.STEPPED else 0)
        assert {*inner.of_keys, *inner.of_queries} == set(range(INNER_WEIGHTS[name]))


def test_heads_between_64_and_96_channels_are_two_groups_of_them():
    assert {width: triton_tiles.groups_of(width) for width in triton_tiles.TILES["apply"]} == {
        32: (32, 0),
        64: (64, 0),
        80: (64, 16),
        96: (64, 32),
        128: (128, 0),
    }
    padded = {8: 32, 64: 64, 65: 80, 72: 80, 80: 80, 81: 96, 96: 96, 97: 128, 128: 128}
    for tiles in triton_tiles.TILES.values():
        assert {width: launch.padded_to(tiles, width) for width in padded} == padded


def test_memory_outside_the_tokens_is_not_read_and_all_results_are_written():
    def between_nans(x):
        field = torch.full((*x.shape[:2], x.shape[2] + 40, x.shape[3] + 12), torch.nan, dtype=x.dtype, device=DEVICE)
        field[:, :, 20:-20, 4:-8] = x
        return field[:, :, 20:-20, 4:-8]

    q, k, v, weights, d_out = inputs(USUAL, torch.float16)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        assert weights[0].new_empty(8, 8).isnan().all()
        poisoned = results(*(between_nans(t) for t in (q, k, v)), weights, between_nans(d_out), "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(poisoned, kernel_results(USUAL, torch.float16), rtol=0, atol=0)


def test_runs_are_bit_equal():
    shape = (1, 130, 1, 32)  # three chunks
    first, second = kernel_results(shape, torch.float16), results(*inputs(shape, torch.float16), "triton")
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_strides_do_not_matter_and_heads_merge_without_a_copy():
    q, k, v, weights, d_out = inputs(USUAL, torch.float16)
    expected = results(*(t.contiguous() for t in (q, k, v)), weights, d_out, "triton")
    channels_first = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v, d_out)]
    for result in (
        kernel_results(USUAL, torch.float16),
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
    assert_close(result, expected, rtol=1e-4, atol=1e-4)


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
    assert_close(out, whole, rtol=1e-5, atol=1e-5)


def test_gradients_go_through_the_halves():
    q, k, v, weights, d_out = inputs((2, 50, 2, 32))

    def halves(q, k, v, weights, *, inner, scale, impl):
        chunks = zip(k.split(20, dim=2), v.split(20, dim=2), strict=True)
        step = sum(ttt_accumulate(*chunk, weights, inner=inner, scale=scale, impl=impl) for chunk in chunks)
        return torch.cat([ttt_apply(c, weights, step, inner=inner, impl=impl) for c in q.split(17, dim=2)], dim=2)

    expected = results(q, k, v, weights, d_out, "reference")
    for impl in ("reference", "triton"):
        assert_close(results(q, k, v, weights, d_out, impl, op=halves), expected, rtol=1e-4, atol=1e-4)


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
    assert_close(mixed["out"], half["out"].float(), rtol=0, atol=0)
    assert_close(mixed["dw1"], half["dw1"], rtol=1e-3, atol=1e-3)


def test_the_backward_keeps_the_inputs_and_the_step_only():
    q, k, v, weights, _ = inputs((2, 37, 2, 32))
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *weights)]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    sizes = {}

    def note_size(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
        out = ttt(*leaves[:3], leaves[3:], inner="swiglu", scale=0.01, impl="triton")
    extra = [size for pointer, size in sizes.items() if pointer not in own]
    assert out.requires_grad
    assert extra == [2 * 2 * 3 * 32 * 32]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_compiles_as_one_graph(dynamic):
    def with_its_scale(q, k, v, weights, *, inner, scale, impl):
        """The scale is computed from the traced number of tokens, which it must not fix."""
        return ttt(q, k, v, weights, inner=inner, scale=q.shape[3] ** -0.5 / k.shape[2], impl=impl)

    compiled = torch.compile(with_its_scale, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (20, 33):
        shape = (3, tokens, 2, 16)
        with torch._dynamo.config.patch(error_on_recompile=dynamic and tokens != 20):
            eager, traced = kernel_results(shape), results(*inputs(shape), "triton", op=compiled)
        assert_close(traced, eager, rtol=1e-6, atol=1e-6)
        assert {name: t.stride() for name, t in traced.items()} == {name: t.stride() for name, t in eager.items()}


def test_it_is_exported():
    q, k, v, weights, _ = inputs(TRACED)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, *weights):
            return ttt(q, k, v, weights, inner="swiglu", scale=16**-0.5 / 20, impl="triton")

    exported = torch.export.export(Layer(), (q, k, v, *weights)).module()
    assert torch.equal(exported(q, k, v, *weights), kernel_results(TRACED)["out"])


def test_checkpointing_gives_the_same_gradients():
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, ttt, use_reentrant=False)
    plain, again = kernel_results(TRACED), results(*inputs(TRACED), "triton", op=checkpointed)
    assert all(torch.equal(plain[name], again[name]) for name in NAMES)


def test_the_custom_ops_keep_what_pytorch_asks_of_them():
    q, k, v, weights, d_out = inputs((1, 20, 2, 16))
    for inner in FUSED_INNERS:
        own, last = kernels.three(weights[: INNER_WEIGHTS[inner]]), (0.1, inner)
        step = torch.rand(1, 2, *kernels.INNERS[inner].step_shape(16), device=DEVICE)
        torch.library.opcheck(kernels._accumulate, (k, v, *own, *last))
        torch.library.opcheck(kernels._apply, (q, *own, step, *last))
        torch.library.opcheck(kernels._accumulate_backward, (step, k, v, *own, *last))
        torch.library.opcheck(kernels._apply_backward, (d_out, q, *own, step, *last))


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_graph_replays_it():
    q, k, v, weights, _ = inputs((2, 500, 4, 64), torch.bfloat16)
    run = functools.partial(ttt, q, k, v, weights, inner="swiglu", scale=0.01, impl="triton")
    expected, replay = run(), recorded(run)
    replay().fill_(torch.nan)
    assert torch.equal(replay(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl is 'cuda'; expected one of"),
        (
            {"inner": "three_layer"},
            "inner='three_layer', loss='dot'; expected one of .*'linear_proj_qk'.",
        ),
        ({"loss": "residual"}, "inner='swiglu', loss='residual'; expected one of .* and 'dot'"),
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


def test_weights_on_another_device_are_refused():
    q, k, v, weights, _ = inputs((1, 5, 2, 16))
    with pytest.raises(ValueError, match=r"expected everything on one device, got .*meta"):
        ttt(q, k, v, [w.to("meta") for w in weights], inner="swiglu", scale=0.1, impl="triton")


@pytest.mark.skipif(CUDA, reason="about a machine without CUDA")
def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    q, k, v, weights, _ = inputs((1, 5, 2, 16))
    with pytest.raises(ValueError, match="on cpu; expected CUDA tensors"):
        ttt(q, k, v, weights, inner="swiglu", scale=0.1, impl="triton")


@pytest.mark.parametrize(
    ("kilobytes", "tile"),
    [
        (227, triton_tiles.TILES["accumulate"][128]),
        (163, triton_tiles.SMALLER_TILES["accumulate"]),
        (99, triton_tiles.SAFE_TILE),
    ],
)
def test_a_card_with_less_shared_memory_gets_smaller_tiles(monkeypatch, kilobytes, tile):
    monkeypatch.setattr(triton_tiles, "lacks_shared_memory", lambda x, needed: kilobytes * 1024 < needed)
    wide = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    assert triton_tiles.tile_for("accumulate", wide)[1] == tile

"""The layer's kernels are as exact as plain PyTorch, the same from run to run, and at home in PyTorch's machinery.

Without a CUDA device Triton's interpreter runs them.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from exactness import assert_as_exact_as_plain
from layer_cases import BARE, FULL, LEAST, TINY, Case, call, draw, kernel_results, results
from t5kernels import Settings, ttt_layer
from t5kernels.tools.graphs import recorded
from t5kernels.ttt.triton import INNERS
from t5kernels.ttt_layer import triton as kernels
from t5kernels.ttt_layer import triton_launch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from triton_device import CUDA, DEVICE, DTYPES, needs_cuda

MODALITY = Settings(norm_scope="modality")
LAST = Settings(inner="swiglu_last")
LINEAR = Settings(inner="linear_proj_qk")
# The tokens of a wide head make two chunks and its inner model two slices; here a program convolves three rows.
WIDE = Case(heads=1, rows=9, columns=8, prefix=5, width=72, rms=True)
SMALL = [
    Case(heads=1, settings=BARE),
    Case(images=2, conv=False),
    Case(heads=1, text=7, after=2),
    Case(images=2, heads=1, rows=5),  # a program convolves two rows, the last one a single row
    Case(images=2, heads=1, rows=2, text=2, settings=MODALITY),
    Case(heads=1, text=3, conv=False, settings=BARE),
    Case(rows=1, columns=1, prefix=4, width=32, settings=BARE),
    Case(heads=1, rows=2, columns=33, prefix=0, width=8),  # two segments of columns, in the backward five
    FULL,
    Case(images=2, rows=2, text=2, rms=True, rms_eps=0.1, settings=MODALITY),
    Case(rows=2, text=3, conv=False, rms=True, settings=BARE),
    WIDE,
    Case(images=2, heads=8, rows=3, columns=2, width=24, text=3),  # the channels of three groups
    Case(images=2, heads=4, rows=2, columns=2, width=16, text=2, settings=MODALITY),  # of one
    replace(FULL, settings=LAST),
    replace(WIDE, prefix=51, settings=LAST),
    Case(images=3, heads=1, rows=2, settings=replace(LAST, key_norm="none")),
    replace(FULL, settings=LINEAR),
    replace(WIDE, settings=LINEAR),
    Case(images=3, rows=2, text=2, settings=replace(LINEAR, norm_scope="modality")),
    Case(heads=1, text=3, conv=False, settings=replace(LINEAR, key_norm="none")),
]
# The interpreter is slow, and float32 differs from float16 by the tile of four kernels alone.
IN_FLOAT32 = SMALL if CUDA else [Case(heads=1, rows=2), *SMALL[:3], Case(rows=2, text=3, settings=LINEAR)]
LARGE = [
    Case(images=2, heads=24, rows=64, columns=64, prefix=0, width=64),
    Case(images=2, heads=24, rows=32, columns=48, prefix=0, width=64, text=333),
    Case(images=2, heads=24, rows=32, columns=48, prefix=0, width=64, text=333, rms=True),
    Case(images=64, heads=6, rows=14, columns=14, prefix=1, width=64),
    Case(images=2, heads=16, rows=33, columns=31, prefix=0, width=72),
    Case(images=1, heads=10, rows=40, columns=41, prefix=0, width=128),
    Case(images=2, heads=24, rows=32, columns=48, prefix=0, width=64, text=333, rms=True, settings=LAST),
    Case(images=64, heads=6, rows=14, columns=14, prefix=1, width=64, settings=LAST),
    Case(images=2, heads=16, rows=33, columns=31, prefix=0, width=72, text=77),
    Case(images=2, heads=16, rows=33, columns=31, prefix=0, width=72, settings=LAST),
    Case(images=1, heads=10, rows=40, columns=41, prefix=0, width=128, settings=LAST),
    Case(images=2, heads=24, rows=32, columns=48, prefix=0, width=64, text=333, rms=True, settings=LINEAR),
    Case(images=64, heads=6, rows=14, columns=14, prefix=1, width=64, settings=LINEAR),
    Case(images=2, heads=16, rows=33, columns=31, prefix=0, width=72, settings=LINEAR),
    Case(images=1, heads=10, rows=40, columns=41, prefix=0, width=128, settings=LINEAR),
]
# For opcheck, which runs an op a dozen times and asks nothing about its numbers.
SPECK = Case(heads=1, rows=1, columns=2, prefix=0, text=2, width=8, rms=True)
SPECK_BARE = replace(SPECK, text=0, rms=False, conv=False, settings=BARE)
SPECK_LAST, SPECK_LINEAR = replace(SPECK, settings=LAST), replace(SPECK, settings=LINEAR)


def check(case, dtype):
    inputs = draw(case, dtype)
    exact, plain = results(case, inputs.map(torch.Tensor.double), "reference"), results(case, inputs, "reference")
    assert_as_exact_as_plain(kernel_results(case, dtype), plain, exact)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for dtype in DTYPES for case in (IN_FLOAT32 if dtype == torch.float32 else SMALL)],
    ids=str,
)
def test_outputs_and_gradients_are_as_exact_as_plain_pytorch(case, dtype):
    check(case, dtype)


def test_a_single_token_which_the_key_norm_makes_0_is_as_exact_in_half_precision():
    # In float32 the mean, which is subtracted after the convolution, leaves the rounding of a multiplication.
    check(Case(rows=1, columns=1, prefix=0, width=32), torch.float16)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_sizes_of_real_models_are_as_exact_as_plain_pytorch(case):
    check(case, torch.bfloat16)


def test_a_large_shift_of_all_keys_costs_no_digits():
    case = Case(heads=1, rows=2)
    leaves = draw(case).leaves
    leaves["k"] = leaves["k"] + 1000
    shifted, plain = (call(case, leaves, impl)[0] for impl in ("triton", "reference"))
    assert_close(shifted, plain, rtol=1e-3, atol=1e-4)


def test_the_text_is_not_convolved_and_is_fitted_on():
    leaves = draw(LEAST).leaves
    before = kernel_results(LEAST, torch.float32)
    image, text = call(LEAST, leaves | {"q_weight": 2 * leaves["q_weight"]}, "triton")
    assert torch.equal(text, before["out1"])
    assert not torch.equal(image, before["out0"])
    image, _ = call(LEAST, leaves | {"text_v": leaves["text_v"] + 1}, "triton")
    assert not torch.equal(image, before["out0"])


def test_memory_outside_the_tokens_is_not_read_and_all_results_are_written():
    def between_nans(x):
        field = torch.full((*x.shape[:2], x.shape[2] + 40, x.shape[3] + 12), torch.nan, dtype=x.dtype, device=DEVICE)
        field[:, :, 20:-20, 4:-8] = x
        return field[:, :, 20:-20, 4:-8]

    inputs = draw(FULL, torch.float16)
    is_token = {id(t) for name, t in inputs.leaves.items() if t.ndim == 4 and "weight" not in name}
    is_token |= {id(d_out) for d_out in inputs.d_outs}
    poisoned = inputs.map(lambda t: between_nans(t) if id(t) in is_token else t)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        actual = results(FULL, poisoned, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(actual, kernel_results(FULL, torch.float16), rtol=0, atol=0)


def test_runs_are_bit_equal():
    again, first = results(FULL, draw(FULL, torch.float16), "triton"), kernel_results(FULL, torch.float16)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("settings", [Settings(), LAST, LINEAR], ids=lambda settings: settings.inner)
def test_the_backward_keeps_the_inputs_and_little_more(settings):
    case = Case(prefix=0, text=4, rms=True, settings=settings)
    leaves = {name: t.detach().requires_grad_() for name, t in draw(case).leaves.items()}
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    sizes = {}

    def note_size(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
        call(case, leaves, "triton")
    extra = sorted(size for pointer, size in sizes.items() if pointer not in own)
    # A number a token and head of q and of k for the RMS norms; the step; and the sums of at most 2 · 32 programs.
    step = 2 * math.prod(INNERS[settings.inner].step_shape(16))
    assert extra == sorted([2 * 2 * (3 * 5 + 4), step, 2 * 64 * 3 * 16])


@pytest.mark.slow
@pytest.mark.parametrize("least", [LEAST, replace(LEAST, settings=LINEAR)], ids=str)
def test_it_compiles_as_one_graph_for_all_sizes(least):
    compiled = torch.compile(ttt_layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in (least, replace(least, rows=3, text=4)):
        with torch._dynamo.config.patch(error_on_recompile=case.rows == 3):
            eager, traced = kernel_results(case, torch.float32), results(case, draw(case), "triton", op=compiled)
        assert_close(traced, eager, rtol=1e-6, atol=1e-6)
        assert {name: t.stride() for name, t in traced.items()} == {name: t.stride() for name, t in eager.items()}


def test_checkpointing_gives_the_same_gradients():
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, ttt_layer, use_reentrant=False)
    plain, again = kernel_results(LEAST, torch.float32), results(LEAST, draw(LEAST), "triton", op=checkpointed)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("case", [SPECK, SPECK_LAST, SPECK_LINEAR], ids=str)
def test_the_results_lie_in_memory_as_the_compiler_is_told(case):
    forward, backward = op_arguments(replace(case, images=2, heads=2))
    for op, arguments in ((kernels._layer, forward), (kernels._layer_backward, backward)):
        with FakeTensorMode() as mode:
            told = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        results = op(*arguments)
        assert [(t.shape, t.stride()) for t in results] == [(t.shape, t.stride()) for t in told]


@pytest.mark.slow
@pytest.mark.parametrize("case", [SPECK, SPECK_BARE, SPECK_LAST, SPECK_LINEAR], ids=str)
def test_the_custom_ops_keep_what_pytorch_asks_of_them(case):
    forward, backward = op_arguments(case)
    torch.library.opcheck(kernels._layer, forward)
    torch.library.opcheck(kernels._layer_backward, backward)


def op_arguments(case):
    """Those of the ops of forward and backward."""
    inputs = draw(case)
    names = ("q", "k", "v", "text_q", "text_k", "text_v", "w1", "w2", "w3", "q_weight", "q_bias", "k_weight", "k_bias")
    names += ("q_gain", "k_gain", "text_q_gain", "text_k_gain")
    norm = "none" if case.settings.key_norm == "none" else case.settings.norm_scope
    numbers = (case.rows, case.columns, case.prefix, norm, 1.0, 1e-6, case.settings.inner)
    plain = [inputs.leaves.get(name) for name in names]
    *_, step, sums, factors = kernels._layer(*plain, *numbers)
    d_text = inputs.d_outs[1] if case.text else None
    return (*plain, *numbers), (inputs.d_outs[0], d_text, step, sums, factors, *plain, *numbers[:5], numbers[-1])


@pytest.mark.parametrize("regrouped", [False, True])
def test_tokens_to_which_nothing_is_done_are_not_copied(regrouped):
    x = torch.zeros(1, 4, 3, 16, device=DEVICE)
    [same] = triton_launch.prepared([(x, triton_launch.Preparation(None, None, None, regrouped))])
    assert same is x


def test_heads_that_do_not_lie_side_by_side_are_taken_as_they_are():
    case = Case(heads=4, rows=2, columns=2, width=16, text=2)
    inputs = draw(case)
    apart = replace(inputs, leaves=inputs.leaves | {"text_k": inputs.leaves["text_k"].contiguous()})
    assert triton_launch.can_regroup(inputs.leaves["k"]) and not triton_launch.can_regroup(apart.leaves["text_k"])
    expected, actual = (results(case, each, "triton") for each in (inputs, apart))
    for name in expected:
        assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)


def test_parts_whose_channels_lie_differently_are_taken_as_they_are():
    case = Case(heads=4, rows=2, columns=2, width=16, text=2)
    inputs = draw(case)
    k = inputs.leaves["text_k"].transpose(1, 2)
    # Every other number of memory, heads side by side: they can be regrouped, but not with the same strides.
    spread = torch.stack([k, torch.full_like(k, torch.nan)], dim=-1)[..., 0].transpose(1, 2)
    assert triton_launch.can_regroup(spread) and spread.stride(3) == 2
    changed = replace(inputs, leaves=inputs.leaves | {"text_k": spread})
    expected, actual = (results(case, each, "triton") for each in (inputs, changed))
    for name in expected:
        assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)


def test_autocast_is_followed_and_weights_may_stay_in_float32():
    leaves = draw(TINY).leaves
    narrow = {name: t.half() if name.removeprefix("text_") in "qkv" else t for name, t in leaves.items()}
    expected = call(TINY, narrow, "triton")
    with torch.autocast(DEVICE, torch.float16):
        outs = call(TINY, leaves, "triton")
    for out, half in zip(outs, expected, strict=True):
        assert out.dtype == torch.float32
        assert torch.equal(out, half.float())


def test_parameters_of_several_dtypes_get_the_gradients_that_they_get_in_float32():
    inputs, expected = draw(LEAST), kernel_results(LEAST, torch.float32)
    inputs.leaves["w2"] = inputs.leaves["w2"].half()
    inputs.leaves["k_bias"] = inputs.leaves["k_bias"].half()
    actual = results(LEAST, inputs, "triton")
    for name in expected:
        assert_close(actual[name].float(), expected[name], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_graph_replays_it_and_16_bit_tokens_take_the_kernels_by_themselves():
    case = Case(images=2, rows=20, columns=20, width=64)
    leaves = draw(case, torch.bfloat16).leaves
    expected = call(case, leaves, None)[0]
    assert torch.equal(expected, call(case, leaves, "triton")[0])
    replay = recorded(lambda: call(case, leaves, None)[0])
    replay().fill_(torch.nan)
    assert torch.equal(replay(), expected)

"""The layer's kernels: as exact as plain PyTorch, the same from run to run, and at home in PyTorch's machinery.

Without a CUDA device they run in Triton's interpreter.
"""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from exactness import assert_as_exact_as_plain
from t5kernels.ttt_layer import api, reference
from t5kernels.ttt_layer.api import Grid, RmsNorms, Settings, ttt_layer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
with pytest.MonkeyPatch.context() as patch:
    # Read when the kernels are defined, which is when they are imported.
    patch.setenv("TRITON_INTERPRET", "0" if CUDA else "1")
    from t5kernels.ttt import triton as _  # noqa: F401
    from t5kernels.ttt_layer import triton as kernels

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
USUAL, BARE = Settings(), Settings(key_norm="none")


@dataclass(frozen=True)
class Case:
    images: int = 2
    heads: int = 2
    rows: int = 4
    columns: int = 5
    prefix: int = 1
    after: int = 0
    width: int = 16
    text: int = 0
    conv: bool = True
    rms: bool = False
    rms_eps: float = 1e-6
    settings: Settings = USUAL

    @property
    def sides(self):
        """What names of leaves begin with: nothing for the image's."""
        return ["", "text_"] if self.text else [""]

    def __str__(self):
        kind = f"{self.settings.key_norm}-{self.settings.norm_scope}" + ("" if self.conv else "-no conv")
        kind += "-rms" if self.rms else ""
        size = f"B{self.images}-{self.rows}x{self.columns}+{self.prefix}+{self.after}-H{self.heads}-D{self.width}"
        return f"{size}-T{self.text}-{kind}"


SMALL = [
    Case(),
    Case(settings=BARE),
    Case(conv=False),
    Case(text=7, after=2),
    Case(text=7, settings=Settings(norm_scope="modality")),
    Case(text=3, conv=False, settings=BARE),
    Case(rows=1, columns=1, prefix=4, width=32, settings=BARE),
    Case(images=1, heads=1, rows=9, columns=8, prefix=5, width=72),
    Case(images=3, heads=1, rows=2, columns=33, prefix=0, width=8),
    Case(images=1, text=7, after=2, width=24, rms=True),
    Case(text=7, rms=True, rms_eps=0.1, settings=Settings(norm_scope="modality")),
    Case(images=1, rows=2, text=3, conv=False, rms=True, settings=BARE),
    Case(images=1, heads=1, rows=9, columns=8, prefix=5, width=72, rms=True),
]
LARGE = [
    Case(images=2, heads=24, rows=64, columns=64, prefix=0, width=64),
    Case(images=2, heads=24, rows=32, columns=48, prefix=0, width=64, text=333),
    Case(images=2, heads=24, rows=32, columns=48, prefix=0, width=64, text=333, rms=True),
    Case(images=64, heads=6, rows=14, columns=14, prefix=1, width=64),
    Case(images=2, heads=16, rows=33, columns=31, prefix=0, width=72),
    Case(images=1, heads=10, rows=40, columns=41, prefix=0, width=128),
]
TINY = Case(images=1, rows=3, columns=4, text=3)
RMS = replace(TINY, rms=True)
LEAST = Case(images=1, heads=1, rows=2, columns=2, text=2, width=8, rms=True)  # for what takes many runs


@dataclass
class Inputs:
    """Leaves by name, and the gradients of the outputs."""

    leaves: dict
    d_outs: tuple


def draw(case, dtype=torch.float32, seed=0):
    """Tokens as views of one projection, keys with a shift and outliers, as pretrained ones have."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=DEVICE)

    H, D, B = case.heads, case.width, case.images

    def tokens(count):
        qkv = normal(B, count, 3, H, D)
        qkv[:, :, 1] += 2 * normal(H, D)
        qkv[:, 5::17, 1, :, ::11] *= 4
        return qkv.to(dtype).transpose(1, 3).unbind(2)

    count = case.rows * case.columns + case.prefix + case.after
    leaves = dict(zip(("q", "k", "v"), tokens(count), strict=True))
    if case.text:
        leaves |= dict(zip(("text_q", "text_k", "text_v"), tokens(case.text), strict=True))
    leaves |= {f"w{i}": (normal(H, D, D) * D**-0.5).to(dtype) for i in (1, 2, 3)}
    if case.conv:
        for name in ("q", "k"):
            leaves[f"{name}_weight"] = (normal(H * D, 1, 3, 3) * 0.2).to(dtype)
            leaves[f"{name}_bias"] = (normal(H * D) * 0.2).to(dtype)
    if case.rms:
        for side in case.sides:
            leaves |= {f"{side}{name}_gain": (1 + 0.3 * normal(D)).to(dtype) for name in "qk"}
    d_outs = tuple(normal(B, n, H, D).to(dtype).transpose(1, 2) for n in (count, case.text) if n)
    return Inputs(leaves, d_outs)


def call(case, leaves, impl, op=ttt_layer):
    tokens = tuple(leaves[name] for name in "qkv")
    text = tuple(leaves[f"text_{name}"] for name in "qkv") if case.text else None
    convs = {f"{n}_conv": (leaves[f"{n}_weight"], leaves[f"{n}_bias"]) for n in "qk"} if case.conv else {}
    gains = [tuple(leaves[f"{side}{n}_gain"] for n in "qk") for side in case.sides if case.rms]
    norms = RmsNorms(*gains, eps=case.rms_eps) if case.rms else None
    grid = Grid(rows=case.rows, columns=case.columns, num_prefix_tokens=case.prefix)
    weights = tuple(leaves[f"w{i}"] for i in (1, 2, 3))
    outs = op(tokens, weights, case.settings, grid=grid, text=text, impl=impl, norms=norms, **convs)
    return outs if case.text else outs[:1]


def results(case, given, impl, op=ttt_layer):
    """The outputs and every gradient, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.leaves.items()}
    outs = call(case, leaves, impl, op)
    gradients = torch.autograd.grad(outs, list(leaves.values()), given.d_outs)
    found = {f"out{i}": o.detach() for i, o in enumerate(outs)}
    # A convolution's weights are compared as a whole: they have no heads.
    flat = (g.flatten() if name.endswith("weight") else g for name, g in zip(leaves, gradients, strict=True))
    return found | {f"d_{name}": g for name, g in zip(leaves, flat, strict=True)}


def check(case, dtype):
    given = draw(case, dtype)
    double = Inputs({n: t.double() for n, t in given.leaves.items()}, tuple(d.double() for d in given.d_outs))
    exact, plain = results(case, double, "reference"), results(case, given, "reference")
    assert_as_exact_as_plain(results(case, given, "triton"), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_outputs_and_gradients_are_as_exact_as_plain_pytorch(case, dtype):
    if dtype == torch.float32 and case not in SMALL[:4] and not CUDA:
        pytest.skip("the interpreter is slow, and float32 differs from float16 by its tile alone")
    check(case, dtype)


def test_a_single_token_which_the_key_norm_makes_0_is_as_exact_in_half_precision():
    # In float32 the mean, which is taken off after the convolution, leaves the rounding of a multiplication.
    check(Case(images=1, rows=1, columns=1, prefix=0, width=32), torch.float16)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_sizes_of_real_models_are_as_exact_as_plain_pytorch(case):
    check(case, torch.bfloat16)


def test_a_large_shift_of_all_keys_costs_no_digits():
    case = replace(TINY, text=0)
    given = draw(case)
    given.leaves["k"] = given.leaves["k"] + 1000
    shifted, plain = (call(case, given.leaves, impl)[0] for impl in ("triton", "reference"))
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-4)


def test_the_text_is_not_convolved_and_is_fitted_on():
    given = draw(TINY)
    before = call(TINY, given.leaves, "triton")
    doubled = dict(given.leaves) | {"q_weight": 2 * given.leaves["q_weight"]}
    image, text = call(TINY, doubled, "triton")
    assert torch.equal(text, before[1])
    assert not torch.equal(image, before[0])
    other = dict(given.leaves) | {"text_v": given.leaves["text_v"] + 1}
    assert not torch.equal(call(TINY, other, "triton")[0], before[0])


def test_rms_norms_are_those_of_diffusers_and_come_before_the_key_norm():
    from diffusers.models.normalization import RMSNorm

    given = draw(RMS, torch.float16)
    norms = {}
    for name in ("q_gain", "k_gain", "text_q_gain", "text_k_gain"):
        norms[name] = RMSNorm(16, eps=1e-6)
        norms[name].weight.data = given.leaves[name]
    normed = dict(given.leaves)
    for side in ("", "text_"):
        normed |= {f"{side}{n}": norms[f"{side}{n}_gain"](given.leaves[f"{side}{n}"]) for n in "qk"}
    expected, found = call(TINY, normed, "reference"), call(RMS, given.leaves, "reference")
    for name in (0, 1):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_a_convolution_is_that_of_pytorch_on_a_grid_that_is_not_square():
    x = torch.randn(2, 3, 2 + 3 * 5, 4)
    conv = torch.nn.Conv2d(12, 12, 3, padding=1, groups=12)
    image = x[:, :, 2:].transpose(2, 3).reshape(2, 12, 3, 5)
    expected = conv(image).reshape(2, 3, 4, 15).transpose(2, 3)
    found = reference.convolved(x, conv.weight, conv.bias, Grid(rows=3, columns=5, num_prefix_tokens=2))
    torch.testing.assert_close(found[:, :, 2:], expected)
    assert not found[:, :, :2].any()


def test_memory_outside_the_tokens_is_not_read_and_all_results_are_written():
    case = Case(images=1, rows=3, columns=7, text=5, width=24, rms=True)
    given = draw(case, torch.float16)
    expected = results(case, given, "triton")

    def between_nans(x):
        field = torch.full((*x.shape[:2], x.shape[2] + 40, x.shape[3] + 12), torch.nan, dtype=x.dtype, device=DEVICE)
        field[:, :, 20:-20, 4:-8] = x
        return field[:, :, 20:-20, 4:-8]

    tokens = {n: between_nans(t) if t.ndim == 4 and "weight" not in n else t for n, t in given.leaves.items()}
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        poisoned = results(case, Inputs(tokens, tuple(map(between_nans, given.d_outs))), "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, result in poisoned.items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=0)


def test_runs_are_bit_equal():
    case = Case(images=1, heads=1, rows=9, columns=9)
    given = draw(case, torch.float16)
    first, second = results(case, given, "triton"), results(case, given, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_backward_keeps_the_inputs_and_little_more():
    case = Case(rows=10, columns=10, prefix=0, text=9, width=32, rms=True)
    leaves = {n: t.detach().requires_grad_() for n, t in draw(case).leaves.items()}
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(case, leaves, "triton")
    extra = sorted(size for pointer, size in kept.items() if pointer not in own)
    # A number a token and head of q and of k for the RMS norms; the step; and the sums of at most 2 · 32 programs.
    assert extra == [4 * 2 * 109, 4 * 3 * 32 * 32, 4 * 64 * 3 * 32]


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    compiled = torch.compile(ttt_layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in (LEAST, replace(LEAST, rows=5, text=4)):
        given = draw(case)
        eager, found = results(case, given, "triton"), results(case, given, "triton", op=compiled)
        for name, result in eager.items():
            torch.testing.assert_close(found[name], result, rtol=1e-6, atol=1e-6)
            assert found[name].stride() == result.stride(), name


def test_checkpointing_gives_the_same_gradients():
    given = draw(TINY)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, ttt_layer, use_reentrant=False)
    plain, again = results(TINY, given, "triton"), results(TINY, given, "triton", op=checkpointed)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", [LEAST, replace(LEAST, text=0, rms=False, conv=False, settings=BARE)], ids=str)
def test_the_custom_ops_keep_what_pytorch_asks_of_them(case):
    given = draw(case)
    leaves = {n: t.detach().requires_grad_() for n, t in given.leaves.items()}
    names = ("q", "k", "v", "text_q", "text_k", "text_v", "w1", "w2", "w3", "q_weight", "q_bias", "k_weight", "k_bias")
    names += ("q_gain", "k_gain", "text_q_gain", "text_k_gain")
    norm = "none" if case.settings.key_norm == "none" else case.settings.norm_scope
    rest = (case.rows, case.columns, case.prefix, norm, 1.0, 1e-6, 0.1)
    arguments = [leaves.get(name) for name in names]
    torch.library.opcheck(kernels._layer, (*arguments, *rest))
    *_, step, sums, factors = kernels._layer(*(given.leaves.get(name) for name in names), *rest)
    d_text = given.d_outs[1] if case.text else torch.empty(0, device=DEVICE)
    plain = [given.leaves.get(name) for name in names]
    known = (step, sums, factors)
    torch.library.opcheck(kernels._layer_backward, (given.d_outs[0], d_text, *known, *plain, *rest[:5], rest[6]))


def test_autocast_is_followed_and_weights_may_stay_in_float32():
    given = draw(TINY)
    narrow = {n: t.half() if n.removeprefix("text_") in "qkv" else t for n, t in given.leaves.items()}
    expected = call(TINY, narrow, "triton")
    with torch.autocast(DEVICE, torch.float16):
        found = call(TINY, given.leaves, "triton")
    for out, half in zip(found, expected, strict=True):
        assert out.dtype == torch.float32
        assert torch.equal(out, half.float())


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_graph_replays_it_and_16_bit_tokens_take_the_kernels_by_themselves(monkeypatch):
    case = Case(rows=20, columns=20, width=64)
    given = draw(case, torch.bfloat16)
    expected = call(case, given.leaves, None)[0]
    assert torch.equal(expected, call(case, given.leaves, "triton")[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, given.leaves, None)[0]
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


def test_other_inner_models_and_norms_run_by_the_reference_unless_kernels_are_asked_for():
    case = replace(TINY, settings=Settings(inner="two_layer", loss="residual", key_norm="rms"))
    given = draw(case)
    weights = [given.leaves.pop("w3")] and (given.leaves["w1"], given.leaves["w2"])
    tokens = tuple(given.leaves[name] for name in "qkv")
    assert ttt_layer(tokens, weights, case.settings)[0].shape == tokens[0].shape
    with pytest.raises(ValueError, match="inner='two_layer', loss='residual', key_norm='rms'; expected 'swiglu'"):
        ttt_layer(tokens, weights, case.settings, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl is 'cuda'; expected one of"),
        ({"q_conv": None}, "one of q_conv and k_conv is missing"),
        ({"grid": Grid(rows=9, columns=9)}, "for 13 image tokens; expected a grid that they fill"),
        ({"grid": None}, "None for 13 image tokens"),
        (
            {"text": (torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 3, 16))},
            "expected .B, H, N, D",
        ),
        ({"q_conv": (torch.zeros(4, 1, 3, 3), torch.zeros(4))}, "expected twice"),
        ({"norms": RmsNorms((torch.ones(16), torch.ones(8)))}, "expected one for q and one for k, .16,. each"),
        ({"norms": RmsNorms(*[(torch.ones(16), torch.ones(16))] * 2)}, "of the text if there is any"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    leaves = draw(replace(TINY, text=0)).leaves
    convs = {f"{n}_conv": (leaves[f"{n}_weight"], leaves[f"{n}_bias"]) for n in "qk"}
    arguments = {"grid": Grid(rows=3, columns=4, num_prefix_tokens=1), **convs} | change
    tokens, weights = tuple(leaves[n] for n in "qkv"), tuple(leaves[f"w{i}"] for i in (1, 2, 3))
    with pytest.raises(ValueError, match=message):
        ttt_layer(tokens, weights, Settings(), **arguments)


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, "triton"),
        ({"dtype": torch.float16}, "triton"),
        ({"dtype": torch.float32}, "reference"),
        ({"is_cuda": False}, "reference"),
        ({"shape": (1, 2, 5, 160)}, "reference"),
        ({"settings": Settings(key_norm="rms")}, "reference"),
        ({"settings": Settings(inner="two_layer")}, "reference"),
        ({"major": 7}, "reference"),
        ({"impl": "reference"}, "reference"),
    ],
    ids=lambda value: next(iter(value), "usual") if isinstance(value, dict) else value,
)
def test_16_bit_tokens_on_a_card_take_the_kernels_and_what_they_cannot_do_the_reference(change, chosen, monkeypatch):
    given = {"dtype": torch.bfloat16, "is_cuda": True, "shape": (1, 2, 5, 64), "settings": USUAL, "major": 9} | change
    card = SimpleNamespace(major=given["major"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    q = SimpleNamespace(device=torch.device("cuda"), **{name: given[name] for name in ("dtype", "is_cuda", "shape")})
    assert api._choose(q, given["settings"], given.get("impl")) == chosen


def test_under_torch_func_the_kernels_are_refused_and_the_reference_is_right():
    case = replace(TINY, text=0)
    leaves = draw(case).leaves

    def run(v, impl):
        return call(case, leaves | {"v": v}, impl)[0]

    tangent = torch.func.jvp(lambda v: run(v, None), (leaves["v"],), (leaves["v"],))[1]
    assert tangent.norm() > 0
    with pytest.raises(ValueError, match=r"expected no transform of torch\.func"):
        torch.func.jvp(lambda v: run(v, "triton"), (leaves["v"],), (leaves["v"],))


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="key_norm='batch', norm_scope='joint'; expected"):
        Settings(key_norm="batch")

"""The layer: which implementation runs, what the reference does, how it is traced, and what is refused."""

from dataclasses import replace

import pytest
import torch
from fake_card import fake_card
from functorch.compile import make_boxed_func
from layer_cases import LEAST, TINY, Case, call, draw
from t5kernels import INNER_WEIGHTS, Grid, RmsNorms, Settings, choice, convolved, ttt_layer
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim
from torch.testing import assert_close
from triton_device import DEVICE

REFUSED = "impl='triton' cannot be used "


def test_rms_norms_are_those_of_diffusers_and_come_before_the_key_norm():
    from diffusers.models.normalization import RMSNorm

    case = replace(TINY, rms=True)
    inputs = draw(case, torch.float16)
    normalized = dict(inputs.leaves)
    for side in ("", "text_"):
        for name in (f"{side}q", f"{side}k"):
            norm = RMSNorm(16, eps=1e-6)
            norm.weight.data = inputs.leaves[f"{name}_gain"]
            normalized[name] = norm(inputs.leaves[name])
    expected, actual = call(TINY, normalized, "reference"), call(case, inputs.leaves, "reference")
    assert_close(actual, expected, rtol=0, atol=0)


def test_a_convolution_is_that_of_pytorch_on_a_grid_that_is_not_square():
    x = torch.randn(2, 3, 2 + 3 * 5, 4)
    conv = torch.nn.Conv2d(12, 12, 3, padding=1, groups=12)
    image = x[:, :, 2:].transpose(2, 3).reshape(2, 12, 3, 5)
    expected = conv(image).reshape(2, 3, 4, 15).transpose(2, 3)
    actual = convolved(x, conv.weight, conv.bias, Grid(rows=3, columns=5, num_prefix_tokens=2))
    assert_close(actual[:, :, 2:], expected)
    assert not actual[:, :, :2].any()


class TestTheChoice:
    """16-bit tokens on a card take the kernels, and what the kernels are not made for takes the reference."""

    @staticmethod
    def run(dtype=torch.bfloat16, device="cuda", images=1, width=64, settings=None, major=9, impl=None):
        """The names of our ops that ran."""
        with fake_card(major) as ops:
            tokens = torch.empty(images, 2, 5, width, dtype=dtype, device=device)
            settings = settings or Settings()
            weights = (torch.empty(2, width, width, device=device, dtype=dtype),) * INNER_WEIGHTS[settings.inner]
            out, text_out = ttt_layer((tokens,) * 3, weights, settings, text=(tokens,) * 3, impl=impl)
            assert text_out is not None
            assert out.shape == text_out.shape == tokens.shape
            assert out.dtype == dtype
        return ops

    @pytest.mark.parametrize(
        ("change", "ops"),
        [
            ({}, ["ttt_layer"]),
            ({"dtype": torch.float16}, ["ttt_layer"]),
            ({"settings": Settings(key_norm="none")}, ["ttt_layer"]),
            ({"impl": "triton"}, ["ttt_layer"]),
            ({"impl": "triton", "dtype": torch.float32}, ["ttt_layer"]),
            ({"impl": "reference"}, []),
            ({"dtype": torch.float32}, []),
            ({"device": "cpu"}, []),
            ({"images": 0}, []),
            ({"width": 160}, []),
            ({"settings": Settings(key_norm="rms")}, []),
            ({"settings": Settings(inner="swiglu_last")}, ["ttt_layer"]),
            ({"settings": Settings(inner="linear_proj_qk")}, ["ttt_layer"]),
            ({"settings": Settings(inner="three_layer")}, []),
            ({"settings": Settings(loss="residual")}, []),
            ({"major": 7}, []),
        ],
        ids=lambda value: "-".join(value) or "usual",
    )
    def test_by_default_the_fastest_one_that_can(self, change, ops):
        assert self.run(**change) == ops

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"impl": "cuda"}, "impl is 'cuda'; expected one of .*'triton', 'reference'"),
            ({"images": 0}, f"{REFUSED}.*at least one token"),
            ({"width": 160}, f"{REFUSED}.*heads up to 128 wide"),
            (
                {"settings": Settings(key_norm="rms")},
                f"{REFUSED}.*key_norm='rms'; expected one of .*'instance', 'none'",
            ),
            (
                {"settings": Settings(inner="three_layer")},
                f"{REFUSED}.*inner='three_layer', loss='dot'; expected one of",
            ),
            ({"settings": Settings(loss="residual")}, f"{REFUSED}.*loss='residual'; expected one of .* and 'dot'"),
            ({"dtype": torch.float64}, f"{REFUSED}.*torch.float64.*expected tokens of one dtype"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_a_choice_that_cannot_be_honoured_is_an_error(self, change, message):
        with pytest.raises(ValueError, match=f"ttt_layer: {message}"):
            self.run(**{"impl": "triton"} | change)


def test_other_inner_models_and_norms_run_by_the_reference_unless_kernels_are_asked_for():
    settings = Settings(inner="two_layer", loss="residual", key_norm="rms")
    leaves = draw(TINY).leaves
    weights, tokens = (leaves["w1"], leaves["w2"]), tuple(leaves[name] for name in "qkv")
    assert ttt_layer(tokens, weights, settings)[0].shape == tokens[0].shape
    with pytest.raises(ValueError, match="key_norm='rms'; expected one of"):
        ttt_layer(tokens, weights, settings, impl="triton")
    with pytest.raises(ValueError, match=r"inner='two_layer', loss='residual'; expected one of .* and 'dot'"):
        ttt_layer(tokens, weights, replace(settings, key_norm="instance"), impl="triton")


def test_under_torch_func_the_kernels_are_refused_and_the_reference_is_right():
    case = replace(LEAST, text=0)
    leaves = draw(case).leaves

    def run(v, impl):
        return call(case, leaves | {"v": v}, impl)[0]

    tangent = torch.func.jvp(lambda v: run(v, None), (leaves["v"],), (leaves["v"],))[1]
    assert tangent.norm() > 0
    with pytest.raises(ValueError, match=r"expected no transform of torch\.func"):
        torch.func.jvp(lambda v: run(v, "triton"), (leaves["v"],), (leaves["v"],))


@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
def test_a_compiled_layer_takes_the_kernels_by_default_on_a_card(learns, monkeypatch):
    """The choice is made where torch.compile does not look."""
    monkeypatch.setattr(choice, "_is_supported_card", lambda device: True)  # DEVICE may be an emulated one
    ops = []

    def name_ops(graph, example_inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if "t5kernels" in str(node.target))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(ttt_layer, backend=aot_autograd(fw_compiler=name_ops), fullgraph=True)
    leaves = {name: leaf.requires_grad_(learns) for name, leaf in draw(TINY, torch.float16).leaves.items()}
    with torch.set_grad_enabled(learns):
        outs = call(TINY, leaves, None, compiled)
    if learns:
        torch.autograd.grad(sum(out.float().sum() for out in outs), list(leaves.values()))
    assert ops == ["t5kernels.ttt_layer.default", "t5kernels.ttt_layer_backward.default"][: 1 + learns]


def test_what_does_not_fit_is_told_from_a_compiled_layer_too():
    inputs = draw(TINY)
    compiled = torch.compile(ttt_layer, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="swiglu takes 3 weights of shape"):
        call(
            TINY,
            inputs.leaves,
            "reference",
            lambda tokens, weights, *rest, **named: compiled(tokens, weights[:2], *rest, **named),
        )


def test_the_reference_is_compiled_once_for_all_sizes():
    """A size that is hashed or cast to a number would be fixed, and every new size would compile once more."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ttt_layer, backend=count, fullgraph=True, dynamic=True)
    for images, rows, columns, text in ((2, 3, 4, 5), (4, 6, 5, 7), (2, 4, 8, 3), (5, 5, 5, 9), (2, 9, 2, 2)):
        # Three heads: a first call with as many heads as images would be compiled for equal numbers of them.
        case = Case(images=images, heads=3, rows=rows, columns=columns, after=1, width=8, text=text)
        leaves = draw(case).leaves
        assert_close(call(case, leaves, "reference", compiled), call(case, leaves, "reference"))
        assert len(graphs) == 1


def test_the_reference_is_exported_for_all_sizes():
    case = Case(heads=3, width=8)
    leaves = draw(case).leaves

    class Layer(torch.nn.Module):
        def forward(self, image, text):
            """image: (B, rows, columns, 3, H, D); text: (B, T, 3, H, D)."""
            grid = Grid(rows=image.shape[1], columns=image.shape[2])
            image, text = (t.permute(2, 0, 3, 1, 4).unbind(0) for t in (image.flatten(1, 2), text))
            convs = {f"{name}_conv": (leaves[f"{name}_weight"], leaves[f"{name}_bias"]) for name in "qk"}
            weights = (leaves["w1"], leaves["w2"], leaves["w3"])
            return ttt_layer(image, weights, Settings(), grid=grid, text=text, impl="reference", **convs)

    def sizes(images, rows, columns, text):
        return tuple(torch.randn(images, *size, 3, 3, 8, device=DEVICE) for size in ((rows, columns), (text,)))

    dynamic = (dict.fromkeys((0, 1, 2), Dim.DYNAMIC), dict.fromkeys((0, 1), Dim.DYNAMIC))
    exported = torch.export.export(Layer(), sizes(2, 3, 4, 5), dynamic_shapes=dynamic).module()
    for inputs in (sizes(2, 3, 4, 5), sizes(3, 7, 5, 9), sizes(20, 2, 9, 2), sizes(1, 2, 2, 2), sizes(0, 3, 4, 5)):
        assert_close(exported(*inputs), Layer()(*inputs))


def test_a_batch_may_be_empty():
    case = Case(images=0, text=4, rms=True)
    leaves = {name: t.requires_grad_() for name, t in draw(case).leaves.items()}
    outs = call(case, leaves, None)
    assert [out.shape for out in outs] == [(0, 2, 16, 16), (0, 2, 4, 16)]
    gradients = torch.autograd.grad([out.sum() for out in outs], list(leaves.values()))
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl is 'cuda'; expected one of"),
        ({"weights": (torch.zeros(2, 16, 16),) * 2}, "ttt_layer: swiglu takes 3 weights of shape"),
        ({"weights": (torch.zeros(2, 16, 8),) * 3}, "ttt_layer: swiglu takes 3 weights of shape"),
        ({"q_conv": None}, "one of q_conv and k_conv is missing"),
        ({"grid": Grid(rows=9, columns=9)}, "for 13 image tokens; expected a grid that they fill"),
        ({"grid": None}, "None for 13 image tokens"),
        (
            {"text": (torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 3, 16))},
            "expected .B, H, N, D",
        ),
        ({"text": (torch.zeros(1, 2, 3, 8),) * 3}, "expected .B, H, N, D"),
        ({"image": (torch.zeros(1, 2, 13, 16), torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 13, 16))}, "are .*2, 9, 16"),
        ({"image": (torch.zeros(2, 13, 16),) * 3}, "are .*2, 13, 16"),
        ({"q_conv": (torch.zeros(4, 1, 3, 3), torch.zeros(4))}, "expected two of"),
        ({"norms": RmsNorms((torch.ones(16), torch.ones(8)))}, "expected one for q and one for k, .16,. each"),
        ({"norms": RmsNorms(*[(torch.ones(16), torch.ones(16))] * 2)}, "of the text if there is any"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    leaves = draw(Case(rows=3, columns=4)).leaves
    convs = {f"{n}_conv": (leaves[f"{n}_weight"], leaves[f"{n}_bias"]) for n in "qk"}
    arguments = {"grid": Grid(rows=3, columns=4, num_prefix_tokens=1), **convs}
    arguments |= {"image": tuple(leaves[n] for n in "qkv"), "weights": tuple(leaves[f"w{i}"] for i in (1, 2, 3))}
    with pytest.raises(ValueError, match=message):
        ttt_layer(**{"settings": Settings()} | arguments | change)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="key_norm='batch', norm_scope='joint'; expected"):
        Settings(key_norm="batch")
    with pytest.raises(ValueError, match="ttt_layer: inner='swigloo', loss='dot'; expected"):
        Settings(inner="swigloo")

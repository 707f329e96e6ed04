"""SD3 converts, joint and dual attentions alike, stays a diffusers model, and can be taken back."""

import copy
import functools
import warnings

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_denoisers import HEAD_DIM, HEADS, sd3_batch, tiny_sd3
from torch import Tensor, nn
from torch.nn import functional as F

import t5lib
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.families import family_of, sd3
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

KINDS = {"medium": {}, "large": {"dual_attention_layers": ()}, "sd3": {"dual_attention_layers": (), "qk_norm": None}}
every_kind = pytest.mark.parametrize("kind", KINDS)
CONFIG = TTTConfig(locality="dwc_qk+nat3")


def inputs(height: int = 8, width: int = 12, text: int = 3) -> dict[str, Tensor]:
    batch = sd3_batch(0, size=2, height=height, width=width)
    embeds = torch.randn(2, text, batch["prompt_embeds"].shape[2], generator=torch.Generator().manual_seed(1))
    return {
        "hidden_states": batch["latents"],
        "encoder_hidden_states": embeds,
        "pooled_projections": batch["pooled"],
        "timestep": torch.tensor([3.0, 700.0]),
    }


def run(model: nn.Module, **sizes: int) -> Tensor:
    given = {n: t.to(model.dtype) if n != "timestep" else t for n, t in inputs(**sizes).items()}
    return model(**given, return_dict=False)[0]


def bits(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()]


@every_kind
def test_convert_and_revert_give_the_original_back_bit_for_bit(kind):
    model = tiny_sd3(**KINDS[kind])
    before = bits(model), str(model), run(model)
    converted = t5lib.convert(model)
    assert type(converted) is sd3.T5SD3Transformer2DModel and type(model) is SD3Transformer2DModel
    assert not torch.equal(run(converted), run(model))
    back = t5lib.revert(converted)
    assert type(back) is SD3Transformer2DModel and dict(back.config) == dict(model.config)
    assert (bits(back), str(back)) == before[:2] and torch.equal(run(back), before[2])
    assert (bits(model), str(model)) == before[:2] and not model.pos_embed._forward_pre_hooks
    assert not back.pos_embed._forward_pre_hooks and not hasattr(back, "t5_report")


def test_the_mixer_does_the_q_and_k_norms_unless_it_needs_normalized_tokens_itself(monkeypatch):
    import t5kernels

    from t5lib.layers import ttt_mixer

    given = []

    def watched(*args, norms=None, **rest):
        given.append(norms is not None)
        return t5kernels.ttt_layer(*args, norms=norms, **rest)

    monkeypatch.setattr(ttt_mixer, "ttt_layer", watched)
    source = tiny_sd3()
    with torch.no_grad():
        for name, gain in source.named_parameters():
            if "norm_q" in name or "norm_k" in name or "norm_added" in name:
                gain.normal_(1, 0.5)
    model = t5lib.convert(source, TTTConfig())
    out = run(model)
    assert given == [True] * 5
    for layer in ttt_layers(model).values():
        layer._norms = lambda text: {}
    torch.testing.assert_close(run(model), out)
    given.clear()
    run(t5lib.convert(source, TTTConfig(rescale=True)))
    run(t5lib.convert(source, CONFIG))
    run(t5lib.convert(tiny_sd3(qk_norm=None)))
    assert given == [False] * 15


@every_kind
def test_converting_in_place_shares_every_storage_and_accounts_for_all(kind):
    model = tiny_sd3(**KINDS[kind])
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    converted = t5lib.convert(model, inplace=True)
    report, after = converted.t5_report, converted.state_dict()
    assert converted is model
    assert set(report.inherited) == set(pointers) and report.dropped == report.reset == ()
    assert {name: after[name].data_ptr() for name in pointers} == pointers
    assert set(report.new) == set(after) - set(pointers) == set(new_parameters(converted))
    assert all(".mixer." in name for name in report.new)
    width = HEADS * HEAD_DIM
    one = 3 * HEADS * HEAD_DIM**2 + 2 * width * 10
    assert report.numbers["new"] == one * len(report.layers) == one * (5 if kind == "medium" else 3)
    assert report.numbers["inherited"] == sum(tensor.numel() for tensor in after.values()) - report.numbers["new"]


@pytest.mark.parametrize(("layers", "count"), [("paper", 18), ("all", 37)])
def test_stable_diffusion_35_medium_converts_without_memory_for_its_weights(layers, count):
    """On the meta device: nothing is read or copied, only the new layers' shapes are added."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(**sd3.MEDIUM)
    before = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in before.values()) == 2_243_171_520
    t5lib.convert(model, TTTConfig(layers=layers), inplace=True)
    joint = range(19, 24) if layers == "paper" else range(24)
    names = [f"transformer_blocks.{i}.attn" for i in joint] + [f"transformer_blocks.{i}.attn2" for i in range(13)]
    assert list(model.t5_report.layers) == names and len(names) == count
    one = 3 * 24 * 64 * 64 + 2 * (9 + 1) * 1536  # inner weights, and two convolutions with a bias
    assert sum(parameter.numel() for parameter in new_parameters(model).values()) == count * one
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(parameter is before[name] for name, parameter in model.named_parameters() if name in before)


@every_kind
def test_a_converted_model_learns_in_every_parameter_but_those_of_text_that_is_dropped(kind):
    converted = t5lib.convert(tiny_sd3(**KINDS[kind]))
    run(converted).square().sum().backward()
    without = {n for n, p in converted.named_parameters() if p.grad is None or not p.grad.any()}
    softmax = tiny_sd3(**KINDS[kind])
    run(softmax).square().sum().backward()
    assert without == {n for n, p in softmax.named_parameters() if p.grad is None or not p.grad.any()}


def test_layers_are_numbered_joint_first_and_named_sets_are_the_papers():
    model = tiny_sd3(num_layers=7, dual_attention_layers=(0, 1, 3))
    names = [f"transformer_blocks.{i}.attn" for i in range(7)] + [f"transformer_blocks.{i}.attn2" for i in (0, 1, 3)]
    assert sd3.ADAPTER.attention_names(model) == names
    assert sd3.ADAPTER.layer_sets(model) == {"all": tuple(range(10)), "paper": (2, 3, 4, 5, 6, 7, 8, 9)}
    assert list(t5lib.convert(model, TTTConfig(layers="paper")).t5_report.layers) == names[2:]
    assert list(t5lib.convert(model, TTTConfig(layers="all")).t5_report.layers) == names
    mapped = t5lib.convert(model, TTTConfig(layers={"0-6": "softmax", "8": "two_layer+nat3"}))
    (layer,) = ttt_layers(mapped).values()
    assert mapped.transformer_blocks[1].attn2 is layer and layer.mixer.config.inner == "two_layer"


def test_what_is_not_converted_stays_bit_equal():
    model = tiny_sd3()
    seen = []
    for each in (model, t5lib.convert(model, TTTConfig(layers=(2,)))):  # the last block's
        inside = []
        for block in each.transformer_blocks[:2]:
            block.register_forward_hook(lambda _module, _inputs, out, inside=inside: inside.extend(out))
        run(each)
        seen.append(inside)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*seen, strict=True))


def test_any_size_and_text_length_in_any_sequence():
    """Layers follow the grid of each latent, so the sizes seen before leave no trace."""
    converted = t5lib.convert(tiny_sd3(), CONFIG)
    sizes = [(8, 12, 3), (12, 8, 5), (8, 8, 1), (14, 6, 3)]
    sizes = [dict(zip(("height", "width", "text"), size, strict=True)) for size in sizes]
    fresh = [run(copy.deepcopy(converted), **size) for size in sizes]
    for size, expected in zip(sizes + sizes[::-1], fresh + fresh[::-1], strict=True):
        assert expected.shape[-2:] == (size["height"], size["width"])
        assert torch.equal(run(converted, **size), expected)


@pytest.mark.parametrize("scope", ["joint", "modality"])
@pytest.mark.parametrize("last", [False, True], ids=["block 0", "last block"])
def test_a_joint_layer_computes_the_method_on_both_modalities(scope, last):
    """METHOD: key norm, convolution over the image alone, one gradient step on all tokens; here by autograd."""
    rows, columns, text = 3, 5, 4
    model = tiny_sd3().double()
    softmax = model.transformer_blocks[-1 if last else 0].attn
    layer = sd3.ADAPTER.new_layer(model, softmax, TTTConfig(key_norm_scope=scope)).double()
    generator = torch.Generator().manual_seed(0)
    width = HEADS * HEAD_DIM
    image, words = (torch.randn(2, n, width, dtype=torch.float64, generator=generator) for n in (rows * columns, text))
    words = words + 2

    def heads(x: Tensor, to: nn.Module, norm: nn.Module | None = None) -> Tensor:
        x = to(x).reshape(2, -1, HEADS, HEAD_DIM).transpose(1, 2)
        return x if norm is None else x * norm.weight / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def normed(k: Tensor) -> Tensor:
        return (k - k.mean(2, keepdim=True)) / (k.var(2, keepdim=True, correction=0) + 1.0).sqrt()

    def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
        plane = x.transpose(2, 3).reshape(2, width, rows, columns)
        plane = F.conv2d(plane, conv.weight, conv.bias, padding=1, groups=width)
        return x + plane.reshape(2, HEADS, HEAD_DIM, -1).transpose(2, 3)

    q, k = heads(image, softmax.to_q, softmax.norm_q), heads(image, softmax.to_k, softmax.norm_k)
    text_q = heads(words, softmax.add_q_proj, softmax.norm_added_q)
    text_k = heads(words, softmax.add_k_proj, softmax.norm_added_k)
    v = torch.cat([heads(image, softmax.to_v), heads(words, softmax.add_v_proj)], dim=2)
    if scope == "joint":
        k, text_k = normed(torch.cat([k, text_k], dim=2)).split([rows * columns, text], dim=2)
    else:
        k, text_k = normed(k), normed(text_k)
    q = torch.cat([convolved(q, layer.mixer.q_conv), text_q], dim=2)
    k = torch.cat([convolved(k, layer.mixer.k_conv), text_k], dim=2)
    weights = [
        w.detach().expand(2, -1, -1, -1).clone().requires_grad_()
        for w in (layer.mixer.w1, layer.mixer.w2, layer.mixer.w3)
    ]

    def inner(x: Tensor, w: list[Tensor]) -> Tensor:
        return (F.silu(x @ w[0]) * (x @ w[1])) @ w[2]

    loss = -(HEAD_DIM**-0.5) / (rows * columns + text) * (inner(k, weights) * v).sum()
    stepped = [w - g for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
    merged = inner(q, stepped).transpose(1, 2).reshape(2, -1, width)
    image_out, text_out = layer(image, words, grid=TokenGrid(rows, columns))
    close = {"rtol": 1e-5, "atol": 1e-6}  # diffusers' RMS norm takes its mean in single precision
    torch.testing.assert_close(image_out, softmax.to_out[0](merged[:, : rows * columns]), **close)
    if last:
        assert softmax.to_add_out is None
    else:
        torch.testing.assert_close(text_out, softmax.to_add_out(merged[:, rows * columns :]), **close)


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.2.attn"]
)
def test_watching_an_attention_tells_what_its_processor_takes_and_gives(name):
    """Joint, image only, and the last joint one, which drops the text."""
    model = tiny_sd3()
    attention, kept = model.get_submodule(name), {}
    attention.register_forward_hook(lambda _module, _inputs, out: kept.update(out=out))
    inside, outside = {}, {}
    handles = sd3.ADAPTER.watch(attention, inside, outside, name)
    run(model)
    tokens, heads = inside[name].tokens, outside[name]
    text = 0 if name.endswith("2") else tokens[1].shape[1]
    image, N = tokens[0], tokens[0].shape[1]
    assert len(tokens) == (1 if name.endswith("2") else 2) and N == 4 * 6
    q, k, v = sd3.ADAPTER.project(attention, inside[name])
    assert q.shape == (2, HEADS, N + text, HEAD_DIM)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    dropped = attention.to_add_out is None and text
    torch.testing.assert_close(heads, expected[:, :N] if dropped else expected)
    out = kept["out"] if isinstance(kept["out"], tuple) else (kept["out"],)
    torch.testing.assert_close(attention.to_out[0](heads[:, :N]), out[0])
    if text and not dropped:
        torch.testing.assert_close(attention.to_add_out(heads[:, N:]), out[1])
    for handle in handles:
        handle.remove()
    inside.clear()
    run(model)
    assert not inside and image.shape == (2, N, HEADS * HEAD_DIM)


def test_a_layers_mixer_takes_the_tokens_of_a_softmax_model_on_the_grid_of_its_inputs():
    model, converted = tiny_sd3(), t5lib.convert(tiny_sd3())
    for name, layer in ttt_layers(converted).items():
        inside, outside = {}, {}
        handles = sd3.ADAPTER.watch(model.get_submodule(name), inside, outside, name)
        run(model, height=6, width=10, text=5)
        for handle in handles:
            handle.remove()
        tokens, grid = inside[name].tokens, TokenGrid(3, 5)
        whole = grid.with_suffix(tokens[1].shape[1] if len(tokens) > 1 else 0)
        o = layer.mixer(*sd3.ADAPTER.project(layer, inside[name]), whole).transpose(1, 2).flatten(2)
        expected = layer(*tokens, grid=grid)
        expected = expected if isinstance(expected, tuple) else (expected,)
        torch.testing.assert_close(layer.to_out[0](o[:, :15]), expected[0])
        assert all(isinstance(part, nn.Module) for part in sd3.ADAPTER.projections(layer))


@every_kind
def test_save_and_load_are_bit_equal(kind, tmp_path):
    converted = t5lib.convert(tiny_sd3(**KINDS[kind]), TTTConfig(layers="paper", locality="dwc_qk+nat3"))
    t5lib.save(converted, tmp_path / "ours")
    converted.save_pretrained(tmp_path / "diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = sd3.T5SD3Transformer2DModel.from_pretrained(tmp_path / "diffusers")
    for loaded in (t5lib.load(tmp_path / "ours"), theirs):
        assert type(loaded) is sd3.T5SD3Transformer2DModel and not loaded.training
        assert bits(loaded) == bits(converted) and torch.equal(run(loaded), run(converted))
        assert loaded.t5_config == converted.t5_config and loaded.t5_report == converted.t5_report
        assert bits(t5lib.revert(loaded)) == bits(tiny_sd3(**KINDS[kind]))


def test_a_softmax_model_is_saved_and_loaded_too(tmp_path):
    t5lib.save(tiny_sd3(), tmp_path)
    assert type(t5lib.load(tmp_path)) is SD3Transformer2DModel
    assert torch.equal(run(t5lib.load(tmp_path)), run(tiny_sd3()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    converted = t5lib.convert(tiny_sd3().to(dtype))
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    exact = copy.deepcopy(converted).float()
    torch.testing.assert_close(run(converted).float(), run(exact), rtol=0.1, atol=0.1)
    t5lib.save(converted, tmp_path)
    assert torch.equal(run(t5lib.load(tmp_path)), run(converted))


def test_gradient_checkpointing_gives_equal_gradients():
    converted = t5lib.convert(tiny_sd3(), CONFIG).train()
    run(converted).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in converted.named_parameters() if p.grad is not None}
    converted.zero_grad()
    converted.enable_gradient_checkpointing()
    run(converted).square().sum().backward()
    again = {n: p.grad for n, p in converted.named_parameters() if p.grad is not None}
    assert again.keys() == plain.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize(("inherit", "started"), [("attention", ("ff", "ff_context")), ("mlp", ("attn", "attn2"))])
def test_what_is_not_inherited_starts_afresh(inherit, started):
    model = tiny_sd3()
    before = copy.deepcopy(model.state_dict())
    converted = t5lib.convert(model, TTTConfig(inherit=inherit))
    assert run(converted).isfinite().all()
    reset = set(converted.t5_report.reset)
    parts = {name for name in before if name.split(".")[2:3] and name.split(".")[2] in started}
    assert reset == parts and len(reset) == len(converted.t5_report.reset)
    assert all(not torch.equal(converted.state_dict()[name], before[name]) for name in reset)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert bits(t5lib.convert(model, TTTConfig(inherit=inherit))) == bits(converted)


def test_calls_that_a_linear_layer_cannot_answer_are_refused():
    converted = t5lib.convert(tiny_sd3())
    block, x = converted.transformer_blocks[0], torch.randn(1, 24, HEADS * HEAD_DIM)
    run(converted)
    with pytest.raises(T5Error, match="call it without attention_mask, ip_hidden_states"):
        block.attn(x, x, attention_mask=x, ip_hidden_states=x)
    with pytest.raises(T5Error, match=r"grid is \(4, 6\); expected TokenGrid\(rows, columns"):
        block.attn2(x, grid=(4, 6))
    with pytest.raises(T5Error, match="sees its own tokens only; call it without others"):
        block.attn2(x, x)
    with pytest.raises(T5Error, match="grid 4×6 holds 24 tokens"):
        block.attn2(x[:, 1:], grid=TokenGrid(4, 6))
    with pytest.raises(T5Error, match=r"outside a forward of its model.*pass grid=TokenGrid"):
        block.attn2(x)


def test_what_cannot_be_converted_is_refused_by_name():
    class Own(SD3Transformer2DModel):
        pass

    own, other, fused, patched = (tiny_sd3() for _ in range(4))
    own.__class__ = Own
    other.transformer_blocks[1].attn2.set_processor(AttnProcessor2_0())
    fused.fuse_qkv_projections()
    patched.forward = functools.partial(patched.forward)
    for model, message in (
        (own, "Own wraps or subclasses diffusers' SD3Transformer2DModel"),
        (other, r"transformer_blocks\.1\.attn2 has the processor AttnProcessor2_0.*expected JointAttnProcessor2_0"),
        (fused, r"the projections of transformer_blocks\.0\.attn are fused; call unfuse_qkv_projections\(\)"),
        (patched, r"the forward of this SD3\w+ is not that of its class.*pipe\.remove_all_hooks\(\)\), convert, then"),
        (t5lib.convert(tiny_sd3()), r"transformer_blocks\.0\.attn is converted already; call t5lib\.revert first"),
    ):
        with pytest.raises(T5Error, match=message):
            t5lib.convert(model)
    with pytest.raises(T5Error, match=r"Linear cannot be converted.*SD3, DiT, Flux"):
        family_of(nn.Linear(1, 1))

"""The grid of a forward reaches the layers of that forward and no others: under threads, checkpointing and compilers.

Every comparison is with a model that sees images of one size alone.
"""

import copy
import functools
import itertools
import pickle
import threading
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from compiled_checks import looked_into
from tiny import tiny_vit
from tiny_denoisers import dit_batch, sd3_batch, tiny_dit, tiny_sd3
from tiny_transformers import tiny_transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import t5lib
from t5lib.families import family_of
from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid, current_grid, grid_scope
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow, noised_batch
from t5lib.utils.errors import T5Error

SIZES = [(16, 24), (24, 16), (32, 32), (16, 48), (48, 16), (24, 32)]  # 2×3 and 3×2 hold as many tokens


def vit_inputs(size: tuple[int, int]) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))}


def dinov3_inputs(size: tuple[int, int]) -> dict[str, Tensor]:
    return {"pixel_values": vit_inputs(size)["x"]}


def sd3_inputs(size: tuple[int, int]) -> dict[str, Tensor]:
    height, width = (side // 4 for side in size)
    return noised_batch(sd3_batch(0, 2, height, width), RectifiedFlow(), 0)


def softmax(kind: str) -> nn.Module:
    if kind == "sd3":  # a block with two attentions, and the last, which drops its text
        return tiny_sd3(num_layers=2, dual_attention_layers=(0,))
    if kind == "dinov3":  # of transformers, which checkpoint in training alone; then positions are not to vary
        return tiny_transformer("dinov3", pos_embed_rescale=None).train()
    return tiny_vit(dynamic_img_size=True)


def make(kind: str) -> nn.Module:
    """Converted, its convolutions large enough to tell one grid from another."""
    return t5lib.convert(softmax(kind), TTTConfig(locality="dwc_qk"))


INPUTS = {"vit": vit_inputs, "dinov3": dinov3_inputs, "sd3": sd3_inputs}
every = pytest.mark.parametrize("kind", INPUTS)


@functools.cache
def expected(kind: str) -> list[Tensor]:
    """What a model gives that sees each size alone."""
    with torch.no_grad():
        return [call(make(kind), INPUTS[kind](size)) for size in SIZES]


def call(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return family_of(model).call(model, inputs)


def gradients(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Of a loss over all sizes, whose backward pass comes after the last forward."""
    model.zero_grad()
    sum(call(model, INPUTS[kind](size)).square().sum() for size in SIZES).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@every
def test_threads_share_a_model_at_several_sizes(kind):
    model, wrong = make(kind), []

    @torch.no_grad()
    def serve(first: int) -> None:
        for number in range(first, first + 100):
            index = number % len(SIZES)
            if not torch.equal(call(model, INPUTS[kind](SIZES[index])), expected(kind)[index]):
                wrong.append(number)

    expected(kind)
    threads = [threading.Thread(target=serve, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of 300 outputs are of another grid"


@every
def test_replicas_in_threads_as_data_parallel_makes_them(kind):
    model, outputs = make(kind), {}

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicate(child)
        replica._parameters = dict(module._parameters)
        return replica

    @torch.no_grad()
    def work(index: int) -> None:
        outputs[index] = call(replicate(model), INPUTS[kind](SIZES[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(SIZES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(outputs[index], output) for index, output in enumerate(expected(kind)))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@every
def test_recomputation_uses_the_grid_of_its_own_forward(kind, reentrant):
    plain, model = make(kind), make(kind)
    if kind == "sd3":
        model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=reentrant))
        plain.proj_out.register_forward_pre_hook(lambda *_: None)
    elif kind == "dinov3":
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.set_grad_checkpointing(True)
        checkpointed = functools.partial(checkpoint, use_reentrant=reentrant)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.utils.checkpoint, "checkpoint", lambda f, x, use_reentrant: checkpointed(f, x))
            assert_same(gradients(model, kind), gradients(plain, kind))
        return
    assert_same(gradients(model, kind), gradients(plain, kind))


def test_a_checkpoint_around_the_whole_model_follows_its_input():
    plain, model = make("vit"), make("vit")
    whole = copy.copy(model)
    whole.forward = lambda x: checkpoint(type(model).forward, model, x, use_reentrant=False)
    assert_same(gradients(whole, "vit"), gradients(plain, "vit"))


@pytest.mark.parametrize("kind", ["vit", "dinov3"])
@torch.no_grad()
def test_a_converted_model_compiles_whole_and_no_more_often_than_the_softmax_model(kind):
    def graphs(model: nn.Module, outputs: list[Tensor]) -> int:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
        for size in SIZES[:3]:
            result = compiled(**INPUTS[kind](size), **({} if kind == "vit" else {"return_dict": False}))
            outputs.append(result if kind == "vit" else result[0])
        return counter.frame_count

    of_softmax, of_ttt = [], []
    assert graphs(make(kind), of_ttt) == graphs(softmax(kind), of_softmax)
    for ours, theirs in zip(of_ttt, expected(kind)[:3], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@torch.no_grad()
def test_twelve_aspect_ratios_are_compiled_once():
    """No side is as long as another dimension of the model, which torch.compile would take for the same."""
    torch._dynamo.reset()
    config = TTTConfig(layers={"0": "swiglu", "1": "swiglu_last+nat5"})
    softmax = tiny_sd3(pos_embed_max_size=32, num_layers=2, dual_attention_layers=(0,))
    model = t5lib.convert(softmax, config)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for rows, columns in itertools.product((7, 6, 9), (11, 7, 9, 13)):
        inputs = sd3_inputs((8 * rows, 8 * columns))  # patches of 2 latents
        torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], call(model, inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["vit", "dinov3"])
@torch.no_grad()
def test_blocks_compiled_one_by_one_serve_all_sizes(kind):
    torch._dynamo.reset()
    model, counter = make(kind), torch._dynamo.testing.CompileCounterWithBackend("eager")
    for block in family_of(model).blocks(model):
        block.compile(backend=counter, dynamic=True, fullgraph=True)
    for size, output in zip(SIZES[:3], expected(kind)[:3], strict=True):
        torch.testing.assert_close(call(model, INPUTS[kind](size)), output)
    assert counter.frame_count <= 2 * len(family_of(model).blocks(model))


@torch.no_grad()
def test_a_compiled_layer_is_checked_in_a_call_hardly_more_than_softmax():
    """A small model launched from Python waits for these checks."""

    def checks(model: nn.Module) -> int:
        torch._dynamo.reset()
        found: list[Any] = []

        def every(guards: Any) -> list[bool]:
            found.extend(guards)
            return [True] * len(guards)

        family_of(model).blocks(model)[0].compile(backend="eager", fullgraph=True, options={"guard_filter_fn": every})
        call(model, sd3_inputs(SIZES[0]))
        return len(found)

    assert checks(make("sd3")) <= 1.1 * checks(softmax("sd3"))


@pytest.mark.parametrize(
    ("kind", "preset"),
    [*((kind, "t5") for kind in INPUTS), *(("vit", preset) for preset in ("linear+", "hedgehog", "graft-swa"))],
)
@torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True)  # torch 2.11's default
@torch.no_grad()
def test_a_compiled_model_passes_over_its_layers_at_a_glance(kind, preset):
    """A dataclass, a list or a property that a layer reads would be looked into in every call, and all above it."""
    torch._dynamo.reset()
    model = t5lib.convert(softmax(kind), preset)
    block = family_of(model).blocks(model)[0]
    block.compile(backend="eager", fullgraph=True)
    call(model, INPUTS[kind]((80, 80)))
    assert looked_into(block, TTTLayer) == []


@torch.no_grad()
def test_an_exported_model_takes_other_sizes_and_batches():
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        make("vit"), (), vit_inputs((32, 32)), dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}}
    ).module()
    for size, output in zip(SIZES, expected("vit"), strict=True):
        torch.testing.assert_close(exported(**vit_inputs(size)), output)
    assert exported(x=torch.randn(5, 3, 24, 32)).shape == (5, 7)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_is_of_its_own_size():
    traced = torch.jit.trace(make("vit"), vit_inputs((16, 24))["x"], check_trace=False)
    torch.testing.assert_close(traced(vit_inputs((16, 24))["x"]), expected("vit")[0])


@pytest.mark.parametrize("preset", ["t5+", "dit5", "clear", "vit3", "graft-swa", "graft-conv"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_neighborhoods_and_rivals_are_traced_too(preset):
    model, images = t5lib.convert(tiny_vit(img_size=48), preset), vit_inputs((48, 48))["x"]
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.testing.assert_close(traced(images + 1), model(images + 1))


def test_a_batch_of_no_image_gives_no_output():
    no_images = torch.zeros(0, 3, 32, 32)
    assert t5lib.convert(tiny_vit(), TTTConfig(locality="dwc_qk"))(no_images).shape == tiny_vit()(no_images).shape


def test_a_dit_takes_square_latents_of_any_size():
    model = t5lib.convert(tiny_dit())
    for side in (4, 8, 6):
        batch = {"latents": torch.randn(2, 4, side, side), "labels": torch.tensor([0, 1])}
        assert call(model, noised_batch(batch, NoiseAndVariance(), 0)).shape == (2, 8, side, side)
    with pytest.raises(T5Error, match="square latents only, got 4×6"):
        call(model, noised_batch(dit_batch(0) | {"latents": torch.randn(4, 4, 4, 6)}, NoiseAndVariance(), 0))


def first_block(model: nn.Module) -> nn.Module:
    """As a loop over the blocks gives it."""
    return next(iter(family_of(model).blocks(model)))


def call_of_first_block(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[tuple, dict, Any]:
    """What it is called with in a forward, and what it gives."""
    calls = []
    handle = first_block(model).register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    call(model, inputs)
    handle.remove()
    return calls[0]


@every
@torch.no_grad()
def test_blocks_called_by_hand_get_no_grid_of_another_call_or_model(kind):
    """Tokens of 3×2 are as many as those of 2×3."""
    model, other = make(kind), make(kind)
    args, named, output = call_of_first_block(model, INPUTS[kind]((24, 16)))
    images = next(iter(INPUTS[kind]((16, 24)).values()))
    # A part that is called after the embedding and before the blocks.
    between = {"sd3": "context_embedder", "vit": "norm_pre", "dinov3": "rope_embeddings"}[kind]

    def break_off() -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(getattr(model, between), "forward", lambda *_: 1 / 0)
            call(model, INPUTS[kind]((16, 24)))

    def refused(*_: Any) -> None:
        assert first_block(model) is family_of(model).blocks(model)[0]
        with pytest.raises(T5Error, match=r"outside a forward of its model.*within t5lib.layers.grid.grid_scope"):
            first_block(model)(*args, **named)
        family_of(model).embedding(model)(images)

    for leave_a_grid in (
        lambda: None,
        lambda: family_of(model).embedding(model)(images),
        lambda: family_of(other).embedding(other)(images),
        break_off,
    ):
        leave_a_grid()
        refused()
    handle = getattr(other, between).register_forward_pre_hook(refused)
    torch.testing.assert_close(call(other, INPUTS[kind]((24, 16))), expected(kind)[1])
    handle.remove()
    with grid_scope(TokenGrid(3, 2)):
        torch.testing.assert_close(first_block(model)(*args, **named), output)


@torch.no_grad()
def test_every_way_to_the_blocks_of_a_vit_knows_its_grid():
    model, images = make("vit"), vit_inputs((24, 16))["x"]
    model(vit_inputs((16, 24))["x"])
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), expected("vit")[1])
    *_, block_output = call_of_first_block(model, {"x": images})
    torch.testing.assert_close(model.forward_intermediates(images, output_fmt="NLC")[0], features)
    (early,) = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(early, block_output[:, 1:])
    torch.testing.assert_close(model.get_intermediate_layers(images, norm=True)[0], features[:, 1:])


def test_copies_and_pickles_of_a_vit_find_their_grid():
    model = make("vit")
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model, protocol=0))):
        assert type(twin) is type(model) and torch.equal(call(twin, vit_inputs(SIZES[0])), expected("vit")[0])
        assert type(t5lib.revert(twin)) is type(softmax("vit"))


def test_a_layer_called_by_itself_wants_its_grid():
    layer, x = make("vit").blocks[0].attn, torch.randn(1, 17, 32)
    with pytest.raises(T5Error, match=r"outside a forward of its model.*pass grid=TokenGrid"):
        layer(x)
    assert layer(x, grid=TokenGrid(4, 4, num_prefix_tokens=1)).shape == x.shape
    with pytest.raises(T5Error):
        current_grid()

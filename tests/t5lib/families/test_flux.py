"""Flux converts, joint and single blocks alike, and learns where its tokens lie from img_ids."""

import pytest
import torch
from diffusers import FluxPipeline
from tiny_denoisers import HEAD_DIM, HEADS, sd3_batch, tiny_flux
from torch import Tensor, nn

import t5lib
from t5lib.conversion import new_parameters
from t5lib.families import flux
from t5lib.families.inputs import ExampleSize
from t5lib.families.packed_latents import packed, unpacked
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.training.objectives import RectifiedFlow, noised_batch
from t5lib.utils.errors import T5Error

TOKENS = torch.randn(2, 24, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, 5, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))


def inputs(**changes) -> dict[str, Tensor]:
    """Two latents of 8 × 12, 4 × 6 tokens."""
    return noised_batch(sd3_batch(0, 2, 8, 12), RectifiedFlow(guidance=3.5), 0) | changes


def named(ids: Tensor | None = None) -> dict[str, Tensor]:
    """What diffusers' pipeline calls the model with."""
    given = inputs()
    return given | {
        "hidden_states": FluxPipeline._pack_latents(given["hidden_states"], 2, 4, 8, 12),
        "timestep": given["timestep"] / 1000,
        "img_ids": FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32) if ids is None else ids,
        "txt_ids": torch.zeros(3, 3),
    }


@torch.no_grad()
def test_the_library_calls_it_as_the_pipeline_does():
    for model in (tiny_flux(), t5lib.convert(tiny_flux())):
        tokens = model(**named()).sample
        expected = FluxPipeline._unpack_latents(tokens, 16, 24, 2)
        assert torch.equal(flux.ADAPTER.call(model, inputs()), expected)
    latents = inputs()["hidden_states"]
    assert torch.equal(packed(latents), named()["hidden_states"])
    assert torch.equal(unpacked(packed(latents), TokenGrid(4, 6)), latents)


@torch.no_grad()
def test_ids_may_come_by_place_and_with_the_batch_in_front():
    model = t5lib.convert(tiny_flux(guidance=False))
    given = named()
    del given["guidance"]
    expected = model(**given).sample
    order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    assert torch.equal(model(*(given[name] for name in order)).sample, expected)
    given["img_ids"] = given["img_ids"].expand(2, -1, -1)
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 1), (4, 6), (300, 2), (2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grid_is_read_off_the_ids_of_any_image_in_any_precision(rows, columns, dtype):
    """In bfloat16 rows past 256 share their numbers, in pairs."""
    ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", dtype)
    assert flux.grid_of(ids) == (rows, columns)


@pytest.mark.parametrize("inference", [False, True])
def test_ids_are_read_once_and_again_after_they_have_changed(monkeypatch, inference):
    """To read them waits for the card, and cannot be part of a CUDA graph."""
    read, reads = flux._read_grid, []
    monkeypatch.setattr(flux, "_read_grid", lambda ids: reads.append(ids) or read(ids))
    with torch.inference_mode(inference):
        ids = FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
        other = FluxPipeline._prepare_latent_image_ids(1, 3, 8, "cpu", torch.float32)
    assert [flux.grid_of(each) for each in (ids, ids, other, ids)] == [(4, 6), (4, 6), (3, 8), (4, 6)]
    assert len(reads) == 2
    if not inference:
        ids.copy_(other)
        assert flux.grid_of(ids) == (3, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda ids: torch.cat((ids, ids + torch.tensor([1.0, 0, 0]))),
            r"the id of token 24 is \[1.0, 0.0, 0.0\].*Kon",
        ),
        (lambda ids: torch.cat((ids, ids)), "Kontext, several references"),
        (lambda ids: ids.flip(0), r"the id of token 0 is \[0.0, 3.0, 5.0\]"),
        (lambda ids: ids[:-1], r"token 18 is \[0.0, 3.0, 0.0\]"),
        (lambda ids: ids[..., [0, 2, 1]], r"token 6 is \[0.0, 0.0, 1.0\]"),
        (lambda ids: ids + 1, "not those of one image row by row"),
    ],
)
def test_ids_of_other_than_one_image_row_by_row_are_refused(change, message):
    with pytest.raises(T5Error, match=message):
        t5lib.convert(tiny_flux())(**named(change(named()["img_ids"])))


def test_without_ids_it_says_what_they_are_for():
    with pytest.raises(T5Error, match="without img_ids, which give its grid"):
        t5lib.convert(tiny_flux())(**named() | {"img_ids": None})


def angles(rows: int = 4, columns: int = 6) -> tuple[Tensor, Tensor]:
    ids = torch.cat((torch.zeros(TEXT.shape[1], 3), flux.image_ids(rows, columns, TEXT.device)))
    return tiny_flux().pos_embed(ids)


@torch.no_grad()
def test_a_layer_in_a_single_block_takes_and_gives_text_and_image_in_one_sequence():
    model = t5lib.convert(tiny_flux())
    layer, grid = model.single_transformer_blocks[0].attn, TokenGrid(4, 6)
    out = layer(torch.cat((TEXT, TOKENS), dim=1), image_rotary_emb=angles(), grid=grid)
    call = flux.FluxTTTAttention.call_of(TOKENS, TEXT, angles(), grid)
    o = layer.mixer(*flux.ADAPTER.project(layer, call), grid.with_suffix(TEXT.shape[1])).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, torch.cat((o[:, 24:], o[:, :24]), dim=1))


def test_angles_are_a_table_with_the_images_rows_first_and_back():
    table = flux.FluxTTTAttention.table(angles(), 24)
    cosines, sines = angles()
    assert torch.equal(table[:24], torch.cat((sines, cosines), dim=1)[5:])
    assert all(map(torch.equal, flux.FluxTTTAttention.angles(table, 24), angles()))


@torch.no_grad()
def test_the_exact_text_keeps_the_attention_that_it_had_in_joint_and_single_blocks():
    def text_after(model: nn.Module, block: str) -> Tensor:
        texts = []
        model.get_submodule(block).register_forward_hook(lambda _module, _args, out: texts.append(out[0]))
        flux.ADAPTER.call(model, inputs())
        return texts[0]

    for index, block in ((0, "transformer_blocks.0"), (2, "single_transformer_blocks.0")):
        converted = t5lib.convert(tiny_flux(), TTTConfig(text="exact", layers=(index,)))
        torch.testing.assert_close(text_after(converted, block), text_after(tiny_flux(), block))


@pytest.mark.parametrize(
    ("inherit", "started"),
    [
        ("attention", ("transformer_blocks.0.ff.", "transformer_blocks.0.ff_context.", ".proj_mlp.")),
        ("mlp", (".attn.",)),
    ],
)
def test_what_is_not_inherited_starts_afresh_in_both_kinds_of_blocks(inherit, started):
    converted = t5lib.convert(tiny_flux(), TTTConfig(inherit=inherit, layers=(0, 2)))
    before, after = tiny_flux().state_dict(), converted.state_dict()
    blocks = ("transformer_blocks.0.", "single_transformer_blocks.0.")
    expected = {n for n in before if n.startswith(blocks) and any(part in n for part in started)}
    assert set(converted.t5_report.reset) == expected != set()
    assert all(not torch.equal(after[name], before[name]) for name in expected)
    assert flux.ADAPTER.call(converted, inputs()).isfinite().all()


@torch.no_grad()
def test_compiled_as_a_whole_it_breaks_the_graph_once_and_says_what_to_do_where_it_may_not():
    model = t5lib.convert(tiny_flux(num_layers=1, num_single_layers=1))
    expected = model(**named()).sample
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(**named()).sample, expected)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"compile_repeated_blocks\(fullgraph=True\)"):
        whole(**named())


def test_flux_dev_converts_without_memory_for_its_weights():
    model = flux.ADAPTER.skeleton("FluxTransformer2DModel", flux.DEV, None)
    before = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in before.values()) == 11_901_408_320
    t5lib.convert(model, TTTConfig(layers=(0, 56)), inplace=True)
    one = 3 * 24 * 128 * 128 + 2 * (9 + 1) * 3072  # inner weights, and two convolutions with a bias
    assert len(flux.ADAPTER.attention_names(model)) == 19 + 38
    assert sum(parameter.numel() for parameter in new_parameters(model).values()) == 2 * one
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(parameter is before[name] for name, parameter in model.named_parameters() if name in before)


def test_guidance_is_asked_for_where_the_model_is_told_it_and_only_there():
    dev, schnell, given = tiny_flux(), tiny_flux(guidance=False), inputs()
    flux.ADAPTER.check_inputs(dev, given)
    with pytest.raises(T5Error, match=r"takes no guidance \(guidance_embeds\); leave 'guidance' out"):
        flux.ADAPTER.check_inputs(schnell, given)
    del given["guidance"]
    flux.ADAPTER.check_inputs(schnell, given)
    with pytest.raises(T5Error, match=r"lacks 'guidance': noise it by RectifiedFlow\(guidance=3\.5\)"):
        flux.ADAPTER.check_inputs(dev, given)


@torch.no_grad()
def test_guidance_in_a_batch_reaches_the_model():
    one, other = (flux.ADAPTER.call(tiny_flux(), inputs(guidance=torch.full((2,), scale))) for scale in (1.0, 7.0))
    assert not torch.allclose(one, other)


def test_what_cannot_be_converted_is_refused_by_name():
    class Block(nn.Module):
        pass

    fused, foreign = tiny_flux(), tiny_flux()
    fused.fuse_qkv_projections()
    foreign.single_transformer_blocks[1] = Block()
    for model, message in (
        (fused, r"the projections of transformer_blocks\.0\.attn are fused"),
        (foreign, r"single_transformer_blocks\.1 is Block; expected FluxSingleTransformerBlock"),
        (t5lib.convert(tiny_flux()), r"transformer_blocks\.0\.attn is converted already"),
    ):
        with pytest.raises(T5Error, match=message):
            t5lib.convert(model)


def test_latents_that_do_not_fit_are_told_by_name():
    model = tiny_flux()
    for latents, message in (
        (torch.ones(2, 5, 8, 12), "images of 5 channels were given to a model that takes 4"),
        (torch.ones(2, 4, 9, 12), "resolution 9 is not a multiple of the patch size 2"),
    ):
        with pytest.raises(T5Error, match=message):
            flux.ADAPTER.check_inputs(model, inputs(hidden_states=latents))
    with pytest.raises(T5Error, match="not a multiple of what a patch covers"):
        flux.ADAPTER.check_resolution(model, ExampleSize(24))

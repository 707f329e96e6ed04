"""The benchmark gives right FLOPs, honest timings, a break-even that is never extrapolated, and no speed for wrong
results."""

import functools
import math

import pytest
import timm
import torch
from tiny_denoisers import tiny_dit, tiny_sd3
from torch import nn

import t5lib
from t5lib.benchmarks import timing
from t5lib.benchmarks.resolution_sweep import (
    BenchmarkConfig,
    benchmark,
    break_even_sentence,
    break_even_tokens,
    count_flops,
)
from t5lib.benchmarks.timing import Rules, TimingConfig, time_models
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize
from t5lib.utils.errors import T5Error

WIDTH, DEPTH, HEADS, PATCH, CLASSES = 32, 2, 2, 14, 5


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
    ).eval()
    return model, t5lib.convert(model).eval()


def at_side(model: nn.Module, side: int) -> nn.Module:
    return family_of(model).at_resolution(model, ExampleSize(side))


def shared_flops(patches: int, batch: int) -> int:
    """Everything but the token mixing: patch embedding, projections, MLP, head; 2 FLOPs a multiply-add."""
    tokens = patches + 1
    block = 2 * tokens * WIDTH * (3 * WIDTH + WIDTH + 2 * 4 * WIDTH)
    return batch * (2 * patches * 3 * PATCH**2 * WIDTH + DEPTH * block + 2 * WIDTH * CLASSES)


@pytest.mark.parametrize("side", [28, 56])
def test_flops_of_softmax_and_converted_equal_the_hand_formula(pair, side):
    batch, patches = 3, (side // PATCH) ** 2
    tokens, head_dim = patches + 1, WIDTH // HEADS
    softmax, converted = (at_side(model, side) for model in pair)
    images = {"x": torch.zeros(batch, 3, side, side)}
    attention = 4 * tokens**2 * WIDTH
    nine_products = 18 * tokens * head_dim * WIDTH
    convolutions = 2 * 2 * 9 * patches * WIDTH
    shared = shared_flops(patches, batch)
    assert count_flops(softmax, images) == shared + batch * DEPTH * attention
    assert count_flops(converted, images) == shared + batch * DEPTH * (nine_products + convolutions)


def test_fused_and_written_out_attention_count_alike(pair):
    model = at_side(pair[0], 56)
    images = {"x": torch.zeros(1, 3, 56, 56)}
    fused = count_flops(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert count_flops(model, images) == fused


def test_result_has_a_checked_row_for_each_model_and_resolution_and_leaves_models_alone(pair):
    before = {name: tensor.clone() for name, tensor in pair[1].state_dict().items()}
    seen = []
    config = BenchmarkConfig(resolutions=(56, 28), batch=2, repeats=3)
    result = benchmark(*pair, config, on_row=seen.append)
    assert result["rows"] == seen
    assert [(row["resolution"], row["tokens"], row["model"]) for row in seen] == [
        (28, 5, "softmax"),
        (28, 5, "t5"),
        (56, 17, "softmax"),
        (56, 17, "t5"),
    ]
    for row in seen:
        assert len(row["ms_runs"]) == 3 and row["ms"] == sorted(row["ms_runs"])[1] > 0
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
        assert row["relative_error"] <= result["checked"]["tolerance"]
    after = pair[1].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Drifting(nn.Module):
    """Right in float64 only."""

    def __init__(self, factor=1.01):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x if x.dtype == torch.float64 else x * self.factor


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("drift", "allowed"), [(1.008, True), (1.03, False)])
def test_a_model_may_be_twice_as_far_off_as_its_yardstick(pair, drift, allowed, own):
    models = {"softmax": at_side(pair[0], 28), "t5": at_side(pair[1], 28)}
    models["softmax"].norm, models["t5"].norm = Drifting(1.005), Drifting(drift)
    config = TimingConfig(repeats=1, warmup=0)
    rules = Rules.of(config, torch.device("cpu"))
    call = functools.partial(
        time_models, models, family_of(pair[0]).example_inputs(pair[0], ExampleSize(28, 1)), config, rules
    )
    with pytest.raises(T5Error, match=r"softmax.*at most 0\.001"):
        call()
    yardsticks = {"softmax": "softmax", "t5": "t5" if own else "softmax"}
    if allowed or own:
        assert call(yardsticks=yardsticks)["t5"].relative_error == pytest.approx(drift - 1, rel=0.1)
    else:
        with pytest.raises(T5Error, match=r"t5.*0\.03.*at most 0\.01"):
            call(yardsticks=yardsticks)


def test_wrong_results_give_no_speed(pair):
    wrong = at_side(pair[1], 28)
    wrong.norm = Drifting()
    with pytest.raises(T5Error, match=r"t5 at 28 px.*0\.01.*at most 0\.001.*no speed"):
        benchmark(pair[0], wrong, BenchmarkConfig(resolutions=(28,)))


def test_output_that_is_not_finite_gives_no_speed(pair):
    broken = at_side(pair[1], 28)
    nn.init.constant_(broken.head.bias, math.nan)
    with pytest.raises(T5Error, match=r"t5 at 28 px.*finite"):
        benchmark(pair[0], broken, BenchmarkConfig(resolutions=(28,)))


@pytest.mark.parametrize("make", [tiny_sd3, tiny_dit])
def test_denoisers_are_measured_on_latents_of_the_size_asked_for(make):
    softmax = make()
    converted = t5lib.convert(softmax)
    config = BenchmarkConfig(resolutions=(16, 32), batch=3, repeats=1, pixels_per_latent=2, text_tokens=5)
    result = benchmark(softmax, converted, config)
    text = 5 if make is tiny_sd3 else 0
    assert [row["tokens"] for row in result["rows"]] == [16 + text] * 2 + [64 + text] * 2
    assert {row["reference"] for row in result["rows"]} == {"float64"}
    assert result["checked"]["max_relative_error"] < 1e-4
    small, _, large, _ = result["rows"]
    assert break_even_tokens(result["rows"], "gflops") in range(small["tokens"] + 1, large["tokens"])
    with pytest.raises(T5Error, match=r"18 is not a multiple of .* \(2 latents of 2 pixels\), 4; the nearest is 16"):
        benchmark(softmax, converted, BenchmarkConfig(resolutions=(18,), pixels_per_latent=2))


def test_models_of_many_tokens_are_checked_against_float32(monkeypatch):
    denoiser = tiny_sd3()
    inputs = family_of(denoiser).example_inputs(denoiser, ExampleSize(16, pixels_per_latent=2))
    assert timing.reference_dtype(denoiser, inputs) == torch.float64
    monkeypatch.setattr(timing, "MOST_IN_FLOAT64", 3)
    assert timing.reference_dtype(denoiser, inputs) == torch.float32


def test_a_denoiser_whose_positions_end_is_told():
    model = tiny_sd3()
    with pytest.raises(T5Error, match=r"latents of 64, .* end at 32; measure up to 64 pixels"):
        family_of(model).at_resolution(model, ExampleSize(128, pixels_per_latent=2))


def test_resolution_must_be_a_multiple_of_the_patch(pair):
    with pytest.raises(T5Error, match=r"100 .* patch size 14; the nearest is 98"):
        benchmark(*pair, BenchmarkConfig(resolutions=(100,)))


@pytest.mark.parametrize("bad", [{"resolutions": ()}, {"batch": 0}, {"repeats": 0}, {"warmup": -1}, {"dtype": "fp32"}])
def test_config_refuses_what_measures_nothing(bad):
    with pytest.raises(T5Error, match=next(iter(bad))):
        BenchmarkConfig(**bad)


def test_rounds_alternate_and_warm_up_is_not_timed():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    runs = timing.time_interleaved(calls, warmup=1, repeats=2, device=torch.device("cpu"))
    assert "".join(order) == "ab" + "ab" + "ba"
    assert {name: len(times) for name, times in runs.items()} == {"a": 2, "b": 2}


def rows_of(*costs: tuple[int, float, float]) -> list[dict]:
    return [
        {"tokens": tokens, "model": model, "ms": ms}
        for tokens, softmax, t5 in costs
        for model, ms in (("softmax", softmax), ("t5", t5))
    ]


def test_break_even_is_interpolated_on_logarithmic_axes():
    assert break_even_tokens(rows_of((100, 1, 2), (400, 8, 4))) == 200


def test_break_even_is_never_extrapolated():
    rows = rows_of((100, 1, 4), (200, 2, 4), (400, 4, 4.1))
    assert break_even_tokens(rows) is None
    assert "No gain up to 400 tokens" in break_even_sentence({"rows": rows, "break_even_tokens": None})


def test_break_even_at_the_smallest_size_when_ahead_everywhere():
    rows = rows_of((100, 4, 2), (400, 8, 2))
    assert break_even_tokens(rows) == 100
    sentence = break_even_sentence({"rows": rows, "break_even_tokens": 100})
    assert "at every size measured, from 100 tokens on" in sentence and "4.00 times as fast" in sentence


def test_break_even_is_the_last_crossing_so_a_lucky_run_does_not_count():
    rows = rows_of((50, 1.1, 1), (100, 1, 2), (400, 8, 4))
    assert break_even_tokens(rows) == 200

"""The plan predicts whole models from short ones, says plainly when nothing is gained, and gives no speed unchecked."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import timm
import torch
from tiny import tiny_vit
from torch import nn

from t5lib.benchmarks import timing
from t5lib.conversion import ttt_layers
from t5lib.layers.config import TTTConfig
from t5lib.planning import cost_model
from t5lib.planning.cost_model import Plan, PlanConfig, plan, verify
from t5lib.utils.config import from_dict, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json

DEPTH, KINDS = 6, ("swiglu", "two_layer")
REST = 0.7
RESULTS = Path(__file__).parents[3] / "docs" / "results"


@pytest.fixture(scope="module")
def model():
    return tiny_vit("augreg", depth=DEPTH)


def took(ms_runs: list[float]) -> timing.ModelTime:
    return timing.ModelTime(ms_runs, None, 0.0, torch.float64, None)


@pytest.fixture
def clock(monkeypatch):
    """A device on which a pass costs what its parts cost, and a fixed amount to start: no noise in what follows."""

    def install(softmax: float, **kinds: float):
        def cost(whole: nn.Module) -> float:
            tokens = whole.patch_embed.num_patches + 1
            layers = [layer.mixer.config.inner for layer in ttt_layers(whole).values()]
            quadratic = (len(whole.blocks) - len(layers)) * softmax * (tokens / 17) ** 2
            return REST + quadratic + sum(kinds[inner] for inner in layers) * tokens / 17

        def time_models(models, inputs, config, rules, where):
            return {name: took([cost(model)] * config.repeats) for name, model in models.items()}

        monkeypatch.setattr(cost_model, "time_models", time_models)

    return install


@pytest.fixture
def card(monkeypatch):
    """A stand-in for a GPU: a pass takes as long as Python needs to launch it, or as long as the device works on it."""

    def install(device: dict[str, float], python: dict[str, float], uncompiled: float = 2.0):
        def cost(model: nn.Module, prices: dict[str, float]) -> float:
            new = [layer.mixer.config.inner for layer in ttt_layers(model).values()]
            old = (len(model.blocks) - len(new)) * prices["softmax"]
            return prices["rest"] + old + sum(prices[inner] for inner in new)

        def time_models(models, inputs, config, rules, where):
            found, factor = {}, 1.0 if rules.compiled else uncompiled
            for name, model in models.items():
                graph = factor * cost(model, device)
                launched = max(graph, factor * cost(model, python))
                runs = ([graph], [launched]) if rules.graphs else ([launched], None)
                found[name] = timing.ModelTime(*runs, 0.0, torch.float64, None)
            return found

        def rules(config, device):
            return timing.Rules(device, torch.float32, compiled=True, graphs=config.graphs is not False)

        monkeypatch.setattr(cost_model, "time_models", time_models)
        monkeypatch.setattr(timing.Rules, "of", rules)

    return install


PAYS_IN_GRAPHS = (  # on the device swiglu is faster than softmax; Python takes longer to launch it
    {"rest": 0.1, "softmax": 0.2, "swiglu": 0.1, "two_layer": 0.4},
    {"rest": 0.3, "softmax": 0.3, "swiglu": 1.2, "two_layer": 1.5},
)


def test_on_a_card_all_modes_are_predicted_as_whole_models_take_them(model, card):
    card(*PAYS_IN_GRAPHS)
    made = plan(model, 32, kinds=KINDS)
    maps = [made.uniform("softmax"), made.uniform("swiglu")]
    assert list(made.modes) == ["eager", "compiled", "graphs"]
    whole = verify(made, model, maps)
    assert [made.milliseconds(each) for each in maps] == pytest.approx([row["measured_ms"] for row in whole])
    assert [row["launched_ms"] for row in whole] == pytest.approx([2.1, 7.5])
    assert [made.milliseconds(each, made.launched) for each in maps] == pytest.approx([2.1, 7.5])
    assert [made.milliseconds(each, made.eager) for each in maps] == pytest.approx([4.2, 15.0])
    told = json.loads(json.dumps(made.as_dict()))
    assert told["modes"]["compiled"]["swiglu"] == pytest.approx({"ms": 7.5, "speedup": 2.1 / 7.5})
    assert told["modes"]["graphs"]["swiglu"] == pytest.approx({"ms": 0.7, "speedup": 1.3 / 0.7})


def test_advice_names_the_fastest_mode_and_where_a_kind_does_not_pay(model, card):
    card(*PAYS_IN_GRAPHS)
    said = plan(model, 32, kinds=KINDS).advice()
    assert said == (
        "A converted model runs fastest compiled with CUDA graphs: 0.7 ms a pass with swiglu. To turn this on, call "
        'model.compile(mode="reduce-overhead"). swiglu pays when compiled with CUDA graphs, but not when uncompiled or '
        "compiled without CUDA graphs."
    )
    card(*PAYS_IN_GRAPHS[::-1])  # launched from Python, the device is now what takes long
    assert "pays" not in plan(model, 32, kinds=KINDS).advice()
    card({"rest": 0.1, "softmax": 0.1, "swiglu": 0.2}, {"rest": 0.3, "softmax": 1.0, "swiglu": 0.4})
    said = plan(model, 32, kinds=("swiglu",)).advice()
    assert "swiglu pays when uncompiled or compiled without CUDA graphs, but not when compiled with CUDA graphs" in said


def test_advice_is_the_simplest_of_modes_that_are_as_fast(model, card):
    device, python = {"rest": 1.0, "softmax": 2.0, "swiglu": 1.0}, {"rest": 0.5, "softmax": 0.5, "swiglu": 0.5}
    card(device, python)
    said = plan(model, 32, kinds=("swiglu",)).advice()
    assert said == (
        "A converted model runs fastest compiled without CUDA graphs: 7 ms a pass with swiglu. To turn this on, call "
        "model.compile()."
    )
    card(device, python, uncompiled=1.01)
    said = plan(model, 32, kinds=("swiglu",)).advice()
    assert said == "A converted model runs fastest uncompiled: 7.07 ms a pass with swiglu."


def test_no_block_is_faster_when_launched_from_python_than_in_a_graph(model, card):
    """Without blocks the pass waits for Python, with four it waits for the device: the difference is too small."""
    device = {"rest": 0.1, "softmax": 0.5, "swiglu": 0.4}
    card(device, {"rest": 0.5, "softmax": 0.1, "swiglu": 0.1})
    made = plan(model, 32, kinds=("swiglu",))
    blocks = {kind: device[kind] for kind in ("softmax", "swiglu")}
    assert made.launched.block_ms == pytest.approx(blocks)
    assert made.eager.block_ms == pytest.approx({kind: 2 * ms for kind, ms in blocks.items()})


def test_without_graphs_the_plan_is_of_models_launched_from_python(model, card):
    card(*PAYS_IN_GRAPHS)
    made = plan(model, 32, kinds=KINDS, config=PlanConfig(graphs=False))
    assert list(made.modes) == ["eager", "compiled"] and made.launched is None
    assert made.milliseconds(made.uniform("swiglu")) == pytest.approx(7.5)
    assert made.milliseconds(made.uniform("swiglu"), made.eager) == pytest.approx(15)


def test_on_a_cpu_one_mode_is_measured_and_there_is_no_advice(model, clock):
    clock(softmax=3.0, swiglu=1.0, two_layer=2.0)
    made = plan(model, 32, kinds=KINDS)
    assert made.modes == {"eager": made.timing} and made.advice() == ""


def test_saved_plans_are_read_those_from_before_the_modes_too(model, card):
    card(*PAYS_IN_GRAPHS)
    made = plan(model, 32, kinds=KINDS)
    assert from_dict(Plan, json.loads(json.dumps(to_dict(made))), "plan.json") == made
    old = read_json(RESULTS / "plan-h100.json")
    fields = {field.name for field in dataclasses.fields(Plan)}
    read = from_dict(Plan, {name: value for name, value in old.items() if name in fields}, "plan-h100.json")
    assert list(read.modes) == ["graphs"]
    assert read.as_dict()["all_layers"] == old["all_layers"] and read.advice() == ""


def test_predictions_are_the_sum_of_the_parts(model, clock):
    clock(softmax=3.0, swiglu=1.0, two_layer=2.0)
    made = plan(model, 32, kinds=KINDS)
    assert made.timing.rest_ms == pytest.approx(REST)
    assert made.timing.block_ms == pytest.approx({"softmax": 3.0, "swiglu": 1.0, "two_layer": 2.0})
    mixed = ["softmax", "swiglu", "two_layer"] * 2
    assert made.milliseconds(mixed) == pytest.approx(REST + 12)
    assert made.speedup(made.uniform("swiglu")) == pytest.approx((REST + 18) / (REST + 6))
    assert made.best_kind == "swiglu"
    rows = verify(made, model, [mixed, made.uniform("softmax")])
    assert [row["deviation"] for row in rows] == pytest.approx([0, 0], abs=1e-9)
    assert rows[0]["layers"] == {"0": "softmax", "1": "swiglu", "2": "two_layer"} | {
        "3": "softmax",
        "4": "swiglu",
        "5": "two_layer",
    }


def test_deviation_is_of_the_prediction_from_the_measurement(model, clock):
    clock(softmax=3.0, swiglu=1.0, two_layer=2.0)
    made = plan(model, 32, kinds=KINDS)
    clock(softmax=6.0, swiglu=1.0, two_layer=2.0)
    (row,) = verify(made, model, [made.uniform("softmax")])
    assert row["measured_ms"] == pytest.approx(REST + 36)
    assert row["deviation"] == pytest.approx((REST + 18) / (REST + 36) - 1)


def test_break_even_lies_where_both_cost_the_same(model, clock):
    clock(softmax=1.0, swiglu=2.0, two_layer=9.0)  # equal at 34 tokens: (tokens / 17)² = 2 tokens / 17
    made = plan(model, 32, kinds=KINDS)
    assert [timing.resolution for timing in made.timings] == [16, 32, 64]
    assert made.break_even("swiglu") == pytest.approx(34, rel=0.1)
    assert made.break_even("two_layer") is None
    said = made.verdict()
    assert "No gain at this size: with swiglu in every layer a pass at 32 px (17 tokens) takes 1.90 times" in said
    side = made.side(made.break_even("swiglu"))
    assert f"ahead from about {side:,} px" in said and 44 <= side <= 48


def test_verdicts_when_it_never_pays_and_when_it_always_does(model, clock):
    clock(softmax=1.0, swiglu=50.0, two_layer=60.0)
    assert "Up to 64 px, the largest size measured, there is no break-even" in plan(model, 32, kinds=KINDS).verdict()
    clock(softmax=1.0, swiglu=0.1, two_layer=0.2)
    said = plan(model, 32, kinds=KINDS).verdict()
    assert said.startswith("A gain at this size") and "ahead at every size measured, from 16 px on" in said


def test_a_difference_within_the_noise_is_no_gain(model, clock):
    clock(softmax=1.0, swiglu=0.99, two_layer=9.0)
    assert plan(model, 32, kinds=KINDS).verdict().startswith("No gain at this size")


def test_budgets_are_for_the_blocks_and_refused_when_out_of_reach(model, clock):
    clock(softmax=3.0, swiglu=1.0, two_layer=2.0)
    made = plan(model, 32, kinds=KINDS)
    assert made.block_budget(budget_ms=10.0) == pytest.approx(10 - REST)
    assert made.block_budget(speedup=2.0) == pytest.approx((REST + 18) / 2 - REST)
    with pytest.raises(T5Error, match=r"out of reach: the fastest layer map takes 6\.7 ms \(2\.791 times"):
        made.block_budget(speedup=3.0)
    with pytest.raises(T5Error, match="one of speedup and budget_ms"):
        made.block_budget()
    assert made.block_costs() == [made.timing.block_ms] * DEPTH


def test_sizes_too_small_for_a_neighborhood_are_left_out(model):
    settings = {"swiglu+nat3": TTTConfig().named("swiglu+nat3")}
    assert cost_model._sides(model, 32, settings, PlanConfig()) == [32, 64]
    assert cost_model._sides(model, 32, {}, PlanConfig()) == [16, 32, 64]
    with pytest.raises(T5Error, match="grid of 2 patches a side, and a neighborhood window is 3: plan for 24 px"):
        cost_model._sides(model, 16, settings, PlanConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 33}, "resolution 33 is not a multiple of the patch size 8; the nearest is 32"),
        ({"kinds": ("swiglo",)}, "did you mean 'swiglu'"),
        ({"kinds": ("softmax",)}, "measured in any case"),
        ({"kinds": ()}, "kinds is empty"),
        ({"config": PlanConfig(graphs=True)}, "CUDA graphs need a CUDA device"),
    ],
)
def test_refusals_come_before_any_timing(model, monkeypatch, arguments, message):
    monkeypatch.setattr(cost_model, "time_models", None)
    with pytest.raises(T5Error, match=message):
        plan(model, **({"resolution": 32} | arguments))


@pytest.mark.parametrize("bad", [{"batch": 0}, {"chain": 0}, {"repeats": 0}, {"factors": (0.5,)}, {"dtype": "fp32"}])
def test_config_refuses_what_measures_nothing(bad):
    with pytest.raises(T5Error, match=next(iter(bad))):
        PlanConfig(**bad)


def test_noise_that_swallows_a_block_is_an_error(model, clock):
    clock(softmax=0.0, swiglu=0.0, two_layer=1.0)
    with pytest.raises(T5Error, match="too busy, or the blocks are too small"):
        plan(model, 32, kinds=KINDS)


def test_a_busy_machine_is_told_by_how_far_typical_passes_are_from_the_fastest(model, clock, monkeypatch):
    clock(softmax=3.0, swiglu=1.0, two_layer=2.0)
    steady = cost_model.time_models

    def restless(models, *others):
        found = steady(models, *others)
        fastest = found["softmax"].ms_runs[0]
        return found | {"softmax": took([fastest, 1.5 * fastest, 1.5 * fastest])}

    assert plan(model, 32, kinds=KINDS).unrest == 0
    monkeypatch.setattr(cost_model, "time_models", restless)
    assert plan(model, 32, kinds=KINDS).unrest == pytest.approx(0.5)


def test_wrong_results_give_no_speed(model):
    class Drifting(nn.Module):
        """Right in float64 only."""

        def forward(self, x):
            return x if x.dtype == torch.float64 else x * 1.01

    wrong = tiny_vit("augreg", depth=2)
    wrong.norm = Drifting()
    with pytest.raises(T5Error, match=r"no blocks at 32 px.*no speed"):
        plan(wrong, 32, kinds=("swiglu",), config=PlanConfig(factors=(1.0,)))


def test_on_a_real_clock_every_figure_comes_from_checked_passes():
    """How near the prediction is to the measurement is for an idle machine: the test below, on a GPU."""
    real = tiny_vit("augreg", depth=6, embed_dim=64, img_size=96)
    before = {name: tensor.clone() for name, tensor in real.state_dict().items()}
    seen = []
    config = PlanConfig(batch=2, repeats=7, factors=(1.0,))
    made = plan(real, 96, kinds=("swiglu",), config=config, on_timing=seen.append)
    assert tuple(seen) == made.timings and made.timing.tokens == 145
    assert all(len(runs) == 7 for runs in made.timing.ms_runs.values())
    assert max(made.timing.relative_error.values()) < 1e-3
    rows = verify(made, real, [made.uniform("softmax"), ["softmax", "swiglu"] * 3])
    for row in rows:
        assert row["measured_ms"] == statistics.median(row["ms_runs"])
        assert row["deviation"] == row["predicted_ms"] / row["measured_ms"] - 1
        assert row["relative_error"] < 1e-3 and row["launched_ms"] is None
    told = json.loads(json.dumps(made.as_dict()))
    assert told["all_layers"]["swiglu"]["ms"] == pytest.approx(made.milliseconds(made.uniform("swiglu")))
    assert all(torch.equal(before[name], tensor) for name, tensor in real.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_predictions_are_near_whole_models_in_every_mode():
    real = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=10)
    made = plan(real, 518, "cuda", ("swiglu",), PlanConfig(batch=8, repeats=30, factors=(1.0,)))
    maps = [made.uniform("softmax"), made.uniform("swiglu"), ["softmax", "swiglu"] * 6]
    uncompiled = dataclasses.replace(made, config=dataclasses.replace(made.config, compile=False))
    eager = verify(uncompiled, real, maps, "cuda")
    for each, row, plain in zip(maps, verify(made, real, maps, "cuda"), eager, strict=True):
        assert abs(row["deviation"]) < 0.15, row
        assert abs(made.milliseconds(each, made.launched) / row["launched_ms"] - 1) < 0.25, row
        assert abs(made.milliseconds(each, made.eager) / plain["measured_ms"] - 1) < 0.25, plain

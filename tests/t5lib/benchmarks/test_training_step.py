"""The cost of a training step: every case is measured beside softmax, checked, and kept as soon as it is known."""

import json

import pytest
import torch

from t5lib.benchmarks import training_step as module
from t5lib.benchmarks.training_step import SMALL, CostConfig, step_cost
from t5lib.utils.cards import Card
from t5lib.utils.errors import T5Error

SHAPE = SMALL | {"num_layers": 2, "dual_attention_layers": (0,)}
SMALLEST = CostConfig(sizes=(64,), compile=(False,), batch=4, micro_batches=(2,), text_tokens=3, steps=2)


def test_converted_stands_beside_softmax_with_time_and_error(tmp_path):
    out = tmp_path / "cost.json"
    found = step_cost(SMALLEST, out=out, device="cpu", shape=SHAPE)
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    assert [case["layers"] for case in found["cases"]] == ["softmax", "paper", "all"]
    for case in found["cases"]:
        assert len(case["all_seconds"]) == 2 and 0 < case["error"] < module.TOLERANCE
        assert case["hours_of_3000_steps"] == pytest.approx(case["seconds"] * 3000 / 3600)
        assert case["times_softmax"] == pytest.approx(found["cases"][0]["seconds"] / case["seconds"])
        assert case["peak_gib"] is None and case["utilization"] is None and case["micro_batch"] == 2
    assert found["settings"]["teacher"] == "ema" and found["machine"]["device"] == "cpu"


@pytest.mark.parametrize("teacher", ["none", "source"])
def test_the_other_teachers(teacher, tmp_path):
    config = CostConfig(**vars(SMALLEST) | {"teacher": teacher, "layers": ("paper",), "steps": 1})
    (case,) = step_cost(config, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
    assert case["seconds"] > 0 and "times_softmax" not in case


@pytest.mark.slow
def test_compiled_stands_beside_uncompiled(tmp_path, monkeypatch):
    compiled, seen = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *a, **k: (seen.append(1), compiled(*a, backend="eager", **k))[1])
    config = CostConfig(**vars(SMALLEST) | {"compile": (False, True), "layers": ("softmax", "paper"), "steps": 1})
    found = step_cost(config, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
    wanted = [(c, layers) for c in (False, True) for layers in ("softmax", "paper")]
    assert [(case["compile"], case["layers"]) for case in found] == wanted and seen
    for softmax, converted in (found[:2], found[2:]):
        assert softmax["times_softmax"] == 1
        assert converted["times_softmax"] == pytest.approx(softmax["seconds"] / converted["seconds"])


def test_a_case_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    config = CostConfig(**vars(SMALLEST) | {"optimizers": ("adamw8bit", "adamw"), "layers": ("softmax",), "steps": 1})
    eight, plain = step_cost(config, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
    assert "needs bitsandbytes; install it" in eight["failed"] and "seconds" not in eight
    assert plain["seconds"] > 0


def test_figures_need_a_prediction_that_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    found = step_cost(SMALLEST, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
    assert all("relative error" in case["failed"] and "seconds" not in case for case in found)


def test_what_was_measured_stays_when_the_rest_is_cut_off(tmp_path, monkeypatch):
    measured = module._measured

    def second_is_killed(case, *others):
        if case["layers"] == "paper":
            raise KeyboardInterrupt
        return measured(case, *others)

    monkeypatch.setattr(module, "_measured", second_is_killed)
    with pytest.raises(KeyboardInterrupt):
        step_cost(SMALLEST, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)
    assert [case["layers"] for case in json.loads((tmp_path / "cost.json").read_text())["cases"]] == ["softmax"]


def test_a_forward_pass_has_as_many_tokens_at_every_size():
    assert [CostConfig().images(size) for size in (512, 1024, 2048)] == [(16,), (4,), (1,)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sizes": (100,)}, r"sizes \[100\]: expected multiples of 16 pixels"),
        ({"batch": 6, "micro_batches": (2, 4)}, "a batch that is a multiple of micro_batch"),
        ({"layers": ("half",)}, "half"),
        ({"stages": ("freeze",)}, "freeze"),
        ({"gradient_checkpointing": ("most",)}, "gradient_checkpointing"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(T5Error, match=message):
        CostConfig(**setting)


def test_the_command_writes_the_file(tmp_path):
    numbers = ["--sizes", "64", "--batch", "2", "--micro-batches", "2", "--steps", "1", "--text-tokens", "3"]
    out = tmp_path / "cost.json"
    what = ["--small", "--blocks", "2", "--layers", "paper", "--compile", "off", "--gradient-checkpointing", "0.5"]
    how = ["--optimizers", "adamw", "--trainable", "lora", "--not-averaged", "--teacher", "none"]
    module.main(["--out", str(out), *what, *how, *numbers])
    written = json.loads(out.read_text())
    (case,) = written["cases"]
    assert case["seconds"] > 0 and case["gradient_checkpointing"] == 0.5
    assert written["shape"]["num_layers"] == 2 and written["shape"]["dual_attention_layers"] == [0, 1]
    assert written["settings"]["trainable"] == "lora" and not written["settings"]["averaged"]


def test_an_alignment_is_measured_beside_the_teacher(tmp_path):
    config = CostConfig(**vars(SMALLEST) | {"stages": ("align",), "gradient_checkpointing": (0.5, False)})
    cases = step_cost(config, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
    assert [(case["layers"], case["gradient_checkpointing"]) for case in cases] == [
        ("paper", 0.5), ("all", 0.5), ("paper", False), ("all", False)
    ]  # fmt: skip
    assert all(len(case["all_seconds"]) == 2 and case["teraflops"] > 0 for case in cases)


def test_a_calibration_is_timed_by_pools_and_told_for_the_whole_recipe(tmp_path):
    changes = {"stages": ("calibrate",), "layers": ("softmax", "all"), "pool": 2, "reuse": 3, "recipe_steps": 100}
    config = CostConfig(**vars(SMALLEST) | changes)
    (case,) = step_cost(config, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
    assert len(case["all_seconds"]) == config.pools and case["seconds_a_block"] == case["seconds"] / 2
    assert case["extrapolated"] and case["seconds_once"] > 0
    assert case["recipe_seconds"] == pytest.approx(case["seconds_once"] + 100 * case["seconds"])
    whole = CostConfig(**vars(config) | {"recipe_steps": 19})
    (case,) = step_cost(whole, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
    assert not case["extrapolated"]  # three pools of two batches, three times each, and one step


def test_utilization_is_of_the_cards_peak_and_of_the_models_flops(tmp_path, monkeypatch):
    card = Card("made up", None, flops=1e12)
    monkeypatch.setattr(module, "_utilization", lambda flops_a_second, device: flops_a_second / card.flops)
    changes = {"layers": ("softmax",), "steps": 1}
    flops = {}
    for name, more in {"ema": {}, "none": {"teacher": "none"}, "new": {"trainable": "lora"}}.items():
        config = CostConfig(**vars(SMALLEST) | changes | more)
        (case,) = step_cost(config, out=tmp_path / "cost.json", device="cpu", shape=SHAPE)["cases"]
        assert case["utilization"] == pytest.approx(case["teraflops"] / case["seconds"])
        flops[name] = case["teraflops"]
    forward = flops["ema"] / 4  # of a batch: student, teacher, and a backward pass that counts twice
    assert flops == pytest.approx({"ema": 4 * forward, "none": 3 * forward, "new": 3 * forward})


@pytest.mark.gpu
def test_memory_is_measured_on_a_device(tmp_path):
    config = CostConfig(**vars(SMALLEST) | {"compile": (False, True)})
    found = step_cost(config, out=tmp_path / "cost.json", device=torch.device("cuda"), shape=SHAPE)["cases"]
    assert all(0 < case["peak_gib"] <= case["reserved_gib"] for case in found)

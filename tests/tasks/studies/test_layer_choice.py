"""The plan put to the test: budgets a rule can meet, the choice made without the test images, finished work kept."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import t5lib
from t5lib.benchmarks import timing
from t5lib.conversion import ttt_layers
from t5lib.layers.config import TTTConfig
from t5lib.planning import cost_model
from t5lib.planning.cost_model import PlanConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.studies import layer_choice as task
from tasks.studies import layer_choice_report

ROOT = Path(__file__).parents[3]
KINDS = ("swiglu", "two_layer")
PRICES = {"swiglu": 1.0, "two_layer": 1.5}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}


@pytest.fixture(scope="module")
def clock():
    """A device without noise; a call sets the price of a softmax block."""
    patch = pytest.MonkeyPatch()

    def install(softmax: float):
        def time_models(models, inputs, config, rules, where):
            def cost(model):
                new = [PRICES[layer.mixer.config.inner] for layer in ttt_layers(model).values()]
                return 1 + (len(model.blocks) - len(new)) * softmax + sum(new)

            exact = torch.float64
            return {name: timing.ModelTime([cost(model)], None, 1e-6, exact, None) for name, model in models.items()}

        patch.setattr(cost_model, "time_models", time_models)

    yield install
    patch.undo()


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> task.Settings:
    """A tiny model and random images, decoded already."""
    folder = tmp_path_factory.mktemp("inputs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t5lib.save(timm.create_model("vit_tiny_patch16_224", **TINY), folder / "model")
    for split, count, seed in (("train", 24, 0), ("test", 10, 1)):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        save_file({"images": images, "labels": torch.arange(count) % 7}, folder / f"{split}.safetensors")
    return task.Settings(
        model=str(folder / "model"),
        train=str(folder / "train.safetensors"),
        test=str(folder / "test.safetensors"),
        resolution=32,
        scan_images=8,
        kinds=KINDS,
        budgets=2,
        shortlist=3,
        calibrate=CalibrateConfig(steps=2, batch_size=4, pool=2),
        timing=PlanConfig(factors=(1.0,)),
    )


def run(settings: task.Settings, folder: Path, seeds=(0,)) -> dict:
    return task.run(settings, list(seeds), folder / "out", folder / "work", torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(settings, clock, tmp_path_factory) -> tuple[dict, Path]:
    clock(softmax=3.0)
    folder = tmp_path_factory.mktemp("finished")
    return run(settings, folder, seeds=(0, 1)), folder


def test_the_solver_meets_every_budget_and_stands_beside_rules_at_equal_cost(finished):
    result, folder = finished
    assert [budget["blocks"] for budget in result["budgets"]] == [10.0, 6.0]  # 1 and 3 of 4 layers at 1 ms
    for seed in result["seeds"].values():
        assert seed["scan"]["images"] == 8 and seed["scan"]["loss"] == "cross-entropy"
        for budget, rows in zip(result["budgets"], seed["compared"], strict=True):
            names = [row["name"] for row in rows]
            assert names[:3] == ["solver", "solver, by the sum alone", "softmax"]
            assert {"first", "last", "evenly"} <= {name.split()[0] for name in names}
            assert all(row["cost"] <= budget["blocks"] for row in rows if row["name"] != "softmax")
            assert all(row["images"] == 10 for row in rows)
    assert result["summary"]["largest_deviation"] == pytest.approx(0)
    assert len(result["verified"]) >= 3
    text = (folder / "out.md").read_text()
    assert "A gain at this size" in text and "| first 3 swiglu |" in text
    assert (folder / "out.png").stat().st_size > 10_000


def test_the_page_gives_the_advice_where_the_plan_has_one():
    old = read_json(ROOT / "docs/results/plan-dinov2-s.json")  # from before plans knew modes
    text, advice = layer_choice_report.table(old), "A converted model runs fastest compiled."
    assert old["plan"]["verdict"] in text.splitlines()
    said = layer_choice_report.table(old | {"plan": old["plan"] | {"advice": advice}})
    assert f"{old['plan']['verdict']} {advice}" in said.splitlines()


def test_summary_names_the_best_rule_and_who_wins(finished):
    summary = finished[0]["summary"]
    for budget in summary["budgets"]:
        rules = {n: row["loss"]["mean"] for n, row in budget["rows"].items() if "solver" not in n and n != "softmax"}
        assert budget["best_rule"] == min(rules, key=rules.get)
        difference = rules[budget["best_rule"]] - budget["rows"]["solver"]["loss"]["mean"]
        assert budget["best_rule_behind"]["mean"] == pytest.approx(difference)
    wins = all(budget["best_rule_behind"]["mean"] >= 0 for budget in summary["budgets"])
    assert summary["solver_no_worse"] == wins


def test_finished_work_is_kept_and_other_settings_start_afresh(settings, finished, monkeypatch):
    result, folder = finished
    monkeypatch.setattr(t5lib, "calibrate", None)
    monkeypatch.setattr(task, "plan", None)
    assert run(settings, folder, seeds=(0, 1)) == result
    with pytest.raises(TypeError):
        run(dataclasses.replace(settings, shortlist=2), folder)


def test_the_choice_never_sees_the_test_images(settings, tmp_path):
    images = task.open_images(settings, t5lib.load(settings.model), torch.device("cpu"), tmp_path)
    batches = {"scan": images.scan(), "test": images.test(), "fit": [next(images.calibrate(0)(n)) for n in range(4)]}
    sums = {  # of every image: mirroring does not change it
        name: {round(image.double().sum().item(), 2) for pixels, _ in of_name for image in pixels}
        for name, of_name in batches.items()
    }
    assert [len(sums[name]) for name in ("scan", "test", "fit")] == [8, 10, 16]
    assert not sums["scan"] & sums["test"] and not sums["scan"] & sums["fit"] and not sums["test"] & sums["fit"]


def test_without_a_gain_nothing_is_chosen_and_it_is_said(settings, clock, tmp_path):
    clock(softmax=0.5)
    result = run(settings, tmp_path)
    assert result["budgets"] == [] and result["seeds"]["0"]["chosen"] == []
    text = (tmp_path / "out.md").read_text()
    assert "No gain at this size" in text and "no budget to choose layers for" in text


def test_too_few_images_are_refused(settings, tmp_path):
    with pytest.raises(T5Error, match="none would be left"):
        dataclasses.replace(settings, scan_images=5000)
    with pytest.raises(T5Error, match="does not make a calibration batch of 4"):
        scarce = dataclasses.replace(settings, scan_images=22)
        task.open_images(scarce, t5lib.load(settings.model), torch.device("cpu"), tmp_path)


def test_prices_in_flops_are_those_of_whole_models_and_the_same_on_every_clock(settings, clock):
    clock(softmax=0.1)  # by time no kind gains
    softmax = t5lib.load(settings.model)
    planned = cost_model.plan(softmax, 32, "cpu", ("swiglu", "two_layer+nat3"), PlanConfig(factors=(1.0,)))
    prices = task.Prices.of("flops", planned, softmax)
    image = {"x": torch.zeros(1, 3, 32, 32)}
    whole = task.count_flops(softmax, image) / 1e9
    assert prices.whole(4 * prices.layers[0]["softmax"]) == pytest.approx(whole)
    alone = t5lib.convert(softmax, TTTConfig(inner="two_layer"))
    near = 4 * (4 * 16 * 9 * 32) / 1e9  # layers × (scores and values, multiply and add: 4 × tokens × window × width)
    assert prices.whole(4 * prices.layers[0]["two_layer+nat3"]) == pytest.approx(
        task.count_flops(alone, image) / 1e9 + near
    )
    assert prices.unit == "GFLOPs" and not task.wanted_budgets(planned.block_costs(), 2)


def test_times_are_verified_and_written_before_the_long_work(settings, clock, tmp_path, monkeypatch):
    clock(softmax=3.0)

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(task._Seed, "_calibrated", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path)
    partial = read_json(tmp_path / "out.json")
    assert [row["layers"] for row in partial["verified"]] == [
        {"0-3": "softmax"},
        {"0-3": "swiglu"},
        {"0-3": "two_layer"},
        {"0": "softmax", "1": "swiglu", "2": "softmax", "3": "swiglu"},
    ]
    assert partial["seeds"] == {} and "summary" not in partial


def test_a_seed_that_was_cut_off_keeps_its_scan_and_its_choice(settings, clock, tmp_path, monkeypatch):
    clock(softmax=3.0)

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(task, "compare_rules", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path)
    for done in ("scan", "select"):
        monkeypatch.setattr(task, done, None)
    assert run(settings, tmp_path)["summary"]["budgets"]


def test_other_weights_at_the_same_place_start_afresh(settings, tmp_path):
    model = tmp_path / "model"
    before, after = (timm.create_model("vit_tiny_patch16_224", **TINY) for _ in range(2))
    named = dataclasses.replace(settings, model=str(model))
    t5lib.save(before, model)
    first = task._fingerprint(named, torch.device("cpu"))
    t5lib.save(after, model)
    assert task._fingerprint(named, torch.device("cpu")) != first
    t5lib.save(before, model)
    assert task._fingerprint(named, torch.device("cpu")) == first

"""The harness of the tables: variants run once, alike, resumable, and what cannot be trained is a result too."""

import json
from pathlib import Path

import ablation
import pytest
import torch

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.studies.ablation import definition, runner, variant
from tasks.studies.ablation.runner import why_stopped

RESULTS = Path(__file__).parents[4] / "docs/results"


pytestmark = pytest.mark.xdist_group("ablation")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with weights, images, params.yaml and small.yaml."""
    root = tmp_path_factory.mktemp("ablation")
    ablation.write_weights(root)
    ablation.write_images(root)
    ablation.write_params(root)
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch) -> Path:
    """The same, to be changed and run in."""
    for name in ("weights.safetensors", "data", "params.yaml", "small.yaml"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(**options):
    plan = definition.resolve(Path("."), "small.yaml", options.pop("changes", ()))
    settled = {"work": Path("work"), "out": Path("out.json"), "seeds": [0, 1], "commit": "abc"}
    return runner.run(plan, **settled | options)


@pytest.fixture(scope="module")
def result(made, tmp_path_factory):
    """Everything, run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return run(out=tmp_path_factory.mktemp("out") / "out.json", seeds=[0, 1])


def test_every_variant_has_the_figures_of_its_tables_for_every_seed(result):
    models = {
        variant: [set(record["models"]) for record in seeds.values()] for variant, seeds in result["records"].items()
    }
    assert models == {
        "softmax": [{"source", "control"}] * 2,
        "linear": [{"source", "calibrated", "finetuned"}] * 2,
        "swiglu": [{"source", "calibrated", "frozen", "finetuned"}] * 2,
        "plain": [{"source", "converted", "frozen", "finetuned"}] * 2,
        "wide": [{"source"}] * 2,
    }
    record = result["records"]["swiglu"]["1"]
    assert set(record["models"]["calibrated"]) == {"top1", "loss", "agreement", "n"}
    assert record["models"]["calibrated"]["n"] == 20
    assert {"pilot", "calibrate", "freeze", "finetune"} <= set(record["seconds"])
    assert record["calibration"]["error_after"] < record["calibration"]["error_before"]
    assert list(record["calibration"]["error_of_layers"]) == ["blocks.0.attn", "blocks.1.attn"]
    assert (record["git_commit"], record["shared_card"], record["torch"]) == ("abc", False, torch.__version__)
    assert record["settings"]["finetune"]["seed"] == record["settings"]["convert"]["seed"] == 1
    assert record["new_parameters"] > 0
    json.dumps(result, allow_nan=False)


def test_a_layer_that_does_not_fit_the_model_is_told_and_stops_nothing(result):
    record = result["records"]["wide"]["0"]  # a window of 5 on a grid of 4 by 4
    assert set(record["stopped"]) & {"convert", "calibrate"}
    assert "5" in next(iter(record["stopped"].values()))


def test_seeds_differ_and_the_control_is_no_seeds_source(result):
    for name in ("softmax", "swiglu", "plain"):
        losses = [
            record["models"][model]["loss"] for record in result["records"][name].values() for model in record["models"]
        ]
        assert len(set(losses)) == len(losses)


def test_the_pilot_takes_the_rate_with_the_lower_held_out_error(result):
    calibration = result["records"]["swiglu"]["0"]["calibration"]
    errors = {entry["settings"]["lr"]: entry["error"] for entry in calibration["pilot"]}
    assert errors[0.01] < errors[1e-5] and calibration["chosen"] == {"lr": 0.01}
    linear = result["records"]["linear"]["0"]
    assert linear["calibration"]["pilot"] == []  # it sets the rate itself
    assert linear["settings"]["calibrate"]["lr"] == 0.02


def test_a_run_is_repeatable_and_what_is_done_is_not_done_again(result, root, monkeypatch):
    write_json(Path("out.json"), dict(result, records={k: v for k, v in result["records"].items() if k != "swiglu"}))
    again = run(only=["swiglu"], seeds=[1])
    scores = [r["records"]["swiglu"]["1"]["models"] for r in (again, result)]
    assert scores[0] == scores[1]
    assert set(again["records"]) == set(result["records"])
    monkeypatch.setattr(variant, "run", None)
    assert run(seeds=[1]) == again  # seed 1 of everything is there
    Path("out.json").unlink()
    assert set(run(seeds=[1], only=["swiglu"])["records"]) == {"swiglu"}  # from the work folder
    with pytest.raises(T5Error, match="NoneType"):
        run(seeds=[1], only=["swiglu"], changes=["finetune.lr=0.5"])  # other settings: made anew


def test_results_of_other_settings_are_moved_aside_and_said_to_be(result, root, capsys):
    write_json(Path("out.json"), result)
    rest = run(until=-1.0, changes=["variants.linear.finetune={lr: 1.0}"])
    assert set(rest["records"]) == set(result["records"]) - {"linear"}
    printed = capsys.readouterr().out
    (kept,) = Path().glob("out.*.json")  # what took a card's hour is never thrown away
    assert read_json(kept)["records"] == {"linear": result["records"]["linear"]}
    assert f"results with other settings were moved to {kept}: linear" in printed
    assert "not started in time: linear" in printed


def test_divergence_is_a_result_with_its_step(root):
    changes = ["calibrate.lr_inherited=0.0", "pilot.grid=[{lr: 1.0e-3}, {lr: 1000.0}]", "finetune.lr=1000.0"]
    changes += ["finetune.epochs=2.0", "calibrate.steps=40", "pilot.steps=20"]
    record = run(changes=changes, only=["swiglu"], seeds=[0])["records"]["swiglu"]["0"]
    assert record["calibration"]["pilot"][1]["error"] is None and record["calibration"]["chosen"] == {"lr": 1e-3}
    assert set(record["stopped"]) == {"finetune"} and "finetuned" not in record["models"]
    assert why_stopped(record["stopped"]["finetune"]).startswith("diverged at step ")
    assert why_stopped("window 5 does not fit") == "not possible"


def test_a_bug_costs_one_variant_and_is_raised_at_the_end(root, monkeypatch):
    real = variant.run
    monkeypatch.setattr(
        variant, "run", lambda u, seed, *a, **k: 1 / 0 if u.variant == "softmax" else real(u, seed, *a, **k)
    )
    with pytest.raises(T5Error, match=r"(?s)softmax failed: .*ZeroDivisionError"):
        run(only=["softmax", "wide"], seeds=[0])
    assert set(read_json("out.json")["records"]) == {"wide"}


@pytest.mark.slow
def test_processes_that_share_the_work_give_the_same_results(result, root):
    plan = definition.resolve(Path("."), "small.yaml")
    runner.make_sources(plan, work=Path("work"), seeds=[0], jobs=1)  # here: a process takes long to import torch
    together = run(jobs=2, only=["linear", "plain"], seeds=[0])
    for name in ("linear", "plain"):
        record, by_itself = together["records"][name]["0"], result["records"][name]["0"]
        assert record["shared_card"] and record["models"].keys() == by_itself["models"].keys()
        for model, alone in by_itself["models"].items():
            assert record["models"][model] == pytest.approx(alone, rel=1e-4)  # threads round differently


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("control=sofmax", "control 'sofmax' is unknown; .* did you mean 'softmax'"),
        ("variants.linear={convert: {iner: linear}}", "variant linear, convert: unknown setting 'iner'"),
        ("variants.linear={finetun: {}}", "variants.linear: unknown setting 'finetun'; did you mean 'finetune'"),
        ("pilot.grid=[{lrr: 1.0}]", "pilot.grid: unknown setting 'lrr'"),
        ("pilot.stepps=1", "pilot: unknown setting 'stepps'; did you mean 'steps'"),
        ("images.val=0", "images.val is 0; expected 1 or more"),
        ("tables.inner.rows={linear: liner}", "tables.inner.rows: variant 'liner' is unknown"),
        ("tables.inner.paper={linea: {}}", "tables.inner.paper: row 'linea' is unknown"),
        ("tables.inner.protocols=[freez]", "tables.inner.protocols.0 'freez' is unknown; .* did you mean 'freeze'"),
        ("finetune.augment={scale: [0.5, 1.0]}", "supports no augmentation but hflip, got scale"),
        ("finetune.trainable=some", "trainable 'some' is unknown"),
        ("finetune.lr", "expected SECTION.NAME=VALUE"),
    ],
)
def test_slips_are_named_before_any_work(root, change, message):
    with pytest.raises(T5Error, match=message):
        definition.resolve(Path("."), "small.yaml", [change])


def test_a_target_that_is_no_classifier_is_refused(root, monkeypatch):
    monkeypatch.setattr(definition.targets, "kind", lambda settings: object)  # the denoisers' takes long to import
    with pytest.raises(T5Error, match="'tiny' is a denoiser, and an ablation compares classifiers"):
        definition.resolve(Path("."), "small.yaml")


def test_an_unknown_ablation_or_variant_names_the_nearest(root):
    with pytest.raises(T5Error, match="no ablation 'smok'; did you mean 'smoke'"):
        definition.resolve(Path("."), "smok")
    with pytest.raises(T5Error, match=r"smal\.yaml does not exist; expected an ablation in YAML"):
        definition.resolve(Path("."), "smal.yaml")
    with pytest.raises(T5Error, match=r"variant 'swigl' is unknown; .* did you mean 'swiglu'"):
        run(only=["swigl"])


def test_a_resolution_reaches_model_and_images_and_presets_are_not_overridden_by_what_is_shared(root):
    plan = definition.resolve(Path("."), "small.yaml", ["resolution=64"])
    assert plan.settings["fetch"]["model_args"] == ablation.MODEL | {"img_size": 64}
    assert plan.settings["data"]["img_size"] == 64
    changes = ["variants.linear={convert: {preset: performer}}", "convert={key_norm: rms, key_norm_eps: 0.5}"]
    convert = definition.resolve(Path("."), "small.yaml", changes).unit("linear").settings["convert"]
    assert (convert["inner"], convert["key_norm"], convert["key_norm_eps"]) == ("performer", "none", 0.5)


@pytest.mark.parametrize(
    ("name", "file", "done"), [("dinov2-fashion", "ablation", 25), ("dinov2-fashion-518", "ablation-518", 9)]
)
def test_committed_results_are_of_the_settings_as_they_stand(name, file, done):
    """A key that changed without a setting that did would run them all again, or pass them off as others."""
    plan, records = definition.resolve(RESULTS.parents[1], name), read_json(RESULTS / f"{file}.json")["records"]
    same = [unit for unit in plan.units if any(r["key"] == unit.key for r in records.get(unit.variant, {}).values())]
    assert len(same) == len(records) == done

"""From a source to its evaluation, stage by stage, on a tiny model and a handful of images."""

from pathlib import Path

import classifier_target
import pytest
import timm
import torch
from classifier_target import SETTINGS, TRAIN, TRAINED, VAL

import t5lib
from t5lib.conversion import new_parameters
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.runtime.stage import read_history
from tasks.targets.classifier import ClassifierTarget, FreezeConfig
from tasks.targets.linear_head import fit_head
from tasks.targets.run import run_stage

TRAINING_METRICS = {"top1", "loss", "steps", "seconds", "samples_per_second"}


pytestmark = pytest.mark.xdist_group("model-stages")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder where stages `fetch` and `shards` of target `tiny` are done."""
    root = tmp_path_factory.mktemp("root")
    classifier_target.write(root)
    return root


def stage(root: Path, name: str, **changes) -> dict:
    return run_stage(name, "tiny", params=SETTINGS | changes, root=root)


def made(root: Path, name: str) -> torch.nn.Module:
    return t5lib.load(root / "data/out/tiny" / name)


def changed(root: Path, name: str, since: str) -> set[str]:
    """Names of the weights in which the models of two stages differ."""
    old, new = made(root, since).state_dict(), made(root, name).state_dict()
    return {key for key in new if key not in old or not torch.equal(new[key], old[key])}


@pytest.fixture(scope="module")
def built(root) -> dict[str, dict]:
    """The metrics of every stage, run in order."""
    names = ("source", "diagnose", "convert", "calibrate", "align", "freeze", "finetune", "control", "evaluate")
    return {name: stage(root, name) for name in names}


def test_source_fits_the_head_alone(built, root):
    assert set(built["source"]) == {"top1", "loss", "seconds", "steps"}
    assert 60 < built["source"]["top1"] < 100 and built["source"]["steps"] == 0
    assert changed(root, "source", "fetch") == {"head.weight", "head.bias"}


def test_diagnose_writes_ratios_and_their_picture(built, root):
    ratios = read_json(root / "data/out/tiny/diagnose/shift_ratio.json")
    assert [len(ratios[key]) for key in ("layers", "shift_ratio", "random_init")] == [2, 2, 2]
    assert (root / "data/out/tiny/diagnose/shift_ratio.png").read_bytes().startswith(b"\x89PNG")
    assert built["diagnose"]["images"] == 8
    assert 0 < built["diagnose"]["min"] <= built["diagnose"]["mean_shift_ratio"] <= built["diagnose"]["max"] < 1


def test_convert_accounts_for_every_parameter(built, root):
    account = read_json(root / "data/out/tiny/convert/account.json")
    source, converted = made(root, "source"), made(root, "convert")
    assert set(account["inherited"]) == set(source.state_dict()) and account["dropped"] == []
    assert set(account["new"]) == set(new_parameters(converted)) == changed(root, "convert", "source")
    counts = {key: sum(converted.state_dict()[n].numel() for n in account[key]) for key in ("inherited", "new")}
    assert built["convert"] == counts | {"dropped": 0, "reset": 0, "layers": 2}


def test_calibrate_lowers_the_error_of_every_layer(built, root):
    metrics = built["calibrate"]
    for layer in ("", ".blocks.0.attn", ".blocks.1.attn"):
        assert metrics[f"error_after{layer}"] < metrics[f"error_before{layer}"]
    assert metrics["steps"] == 40 and metrics["seconds"] > 0
    history = read_history(root / "data/out/tiny/calibrate/history.jsonl")
    assert [point["step"] for point in history] == [10, 20, 30, 40]
    assert all(set(point) == {"step", "loss", "lr"} for point in history)


def test_align_brings_the_whole_model_nearer_to_the_source(built, root):
    metrics = built["align"]
    assert metrics["steps"] == 12 and metrics["seconds"] > 0
    for part in ("features", "output"):
        assert metrics[f"error_after.{part}"] < metrics[f"error_before.{part}"], part
    assert "blocks.0.mlp.fc1.weight" in changed(root, "align", "calibrate")
    assert [point["step"] for point in read_history(root / "data/out/tiny/align/history.jsonl")] == list(range(1, 13))


def test_without_steps_align_passes_the_calibrated_model_on(root, built):
    off = {"align": {"steps": 0}}
    try:
        assert stage(root, "align", **off) == {"steps": 0, "seconds": 0.0}
        assert changed(root, "align", "calibrate") == set()
        assert "aligned" not in stage(root, "evaluate", **off)["models"]
    finally:
        stage(root, "align")
        stage(root, "evaluate")


def test_freeze_trains_the_new_parameters_alone(built, root):
    assert set(built["freeze"]) == TRAINING_METRICS and built["freeze"]["steps"] == TRAIN // 8
    assert changed(root, "freeze", "align") <= set(new_parameters(made(root, "align")))
    history = read_history(root / "data/out/tiny/freeze/history.jsonl")
    assert [point["step"] for point in history] == list(range(1, 7))
    assert all(set(point) == {"step", "loss", "lr_new", "lr_inherited", "grad_norm"} for point in history)


def test_finetune_and_control_spend_the_same_budget_from_their_own_start(built, root):
    assert set(built["finetune"]) == set(built["control"]) == TRAINING_METRICS
    assert built["finetune"]["steps"] == built["control"]["steps"] == TRAIN // 8
    assert "blocks.0.mlp.fc1.weight" in changed(root, "finetune", "align")
    assert "blocks.0.mlp.fc1.weight" in changed(root, "control", "source")
    assert not new_parameters(made(root, "control")) and new_parameters(made(root, "finetune"))


def test_evaluate_scores_all_models_on_all_images(built):
    models = built["evaluate"]["models"]
    assert list(models) == ["source", "converted", "calibrated", "aligned", "frozen", "finetuned", "control"]
    assert all(set(score) == {"top1", "loss", "agreement", "n"} for score in models.values())  # three classes: no top-5
    assert {score["n"] for score in models.values()} == {VAL}
    assert models["source"]["agreement"] == 100 != models["control"]["agreement"]
    for name, by in (("source", "source"), ("frozen", "freeze"), ("finetuned", "finetune"), ("control", "control")):
        assert models[name]["top1"] == pytest.approx(built[by]["top1"]), name
        assert models[name]["loss"] == pytest.approx(built[by]["loss"], rel=1e-4), name


def test_nothing_is_left_in_scratch(built, root):
    left = [path for path in (root / "data/scratch").rglob("*") if path.is_file()]
    assert [path.name for path in left if path.suffix != ".lock"] == []


def test_a_training_that_broke_goes_on_and_ends_as_if_it_had_not(built, root, monkeypatch):
    from t5lib.training.trainer import Trainer

    whole, step, taken = made(root, "finetune").state_dict(), Trainer.step, []

    def breaking(trainer):
        taken.append(trainer.done.step)
        if len(taken) == 5:
            raise OSError("node lost")
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", breaking)
    with pytest.raises(OSError, match="node lost"):
        stage(root, "finetune")
    assert not (root / "data/out/tiny/finetune").exists()
    metrics = stage(root, "finetune")
    assert taken == [0, 1, 2, 3, 4, 4, 5]
    again = made(root, "finetune").state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert metrics["top1"] == built["finetune"]["top1"]
    assert [p["step"] for p in read_history(root / "data/out/tiny/finetune/history.jsonl")] == list(range(1, 7))


def test_a_calibration_that_broke_goes_on_and_ends_as_if_it_had_not(built, root, monkeypatch):
    from t5lib.training import calibration

    whole, step, taken = made(root, "calibrate").state_dict(), calibration._Fit.step, []

    def breaking(fit):
        taken.append(fit.done.step)
        if len(taken) == 22:
            raise OSError("node lost")
        return step(fit)

    monkeypatch.setattr(calibration._Fit, "step", breaking)
    with pytest.raises(OSError, match="node lost"):
        stage(root, "calibrate")
    metrics = stage(root, "calibrate")
    assert taken[22] == 16  # the last checkpoint
    again = made(root, "calibrate").state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert metrics["error_after"] == built["calibrate"]["error_after"]


def test_the_gate_stops_a_model_below_the_floor_and_leaves_no_result(built, root):
    with pytest.raises(T5Error, match=r"freeze gate: top-1 is .* below the floor of 100 %.*Calibrate longer"):
        stage(root, "freeze", freeze={**SETTINGS["freeze"], "floor": 100})
    assert not (root / "data/out/tiny/freeze").exists() and not (root / "data/out/tiny/freeze.json").exists()
    stage(root, "freeze")


def test_the_gate_stops_a_model_whose_loss_is_not_finite():
    config, target = FreezeConfig(floor=10.0), ClassifierTarget(None)
    with pytest.raises(T5Error, match="the validation loss is nan"):
        target.check_gate({"top1": 90.0, "loss": float("nan")}, config)
    target.check_gate({"top1": 10.0, "loss": 1.0}, config)


@pytest.mark.parametrize("inner", ["clear", "swa"])
def test_layers_that_add_no_weights_are_measured_at_the_gate_without_training(tmp_path, inner):
    classifier_target.write(tmp_path)
    convert = {**SETTINGS["convert"], "inner": inner, "key_norm": "none", "locality": "none"}
    names = ("source", "convert", "calibrate", "align", "freeze")
    done = {name: stage(tmp_path, name, convert=convert) for name in names}
    assert done["freeze"]["skipped"] == "convert added no weights that could be trained alone"
    assert done["freeze"]["steps"] == 0 and done["freeze"]["top1"] > 0
    assert changed(tmp_path, "freeze", "align") == set()
    with pytest.raises(T5Error, match="freeze gate: top-1 is"):
        stage(tmp_path, "freeze", convert=convert, freeze={**SETTINGS["freeze"], "floor": 100})


def test_the_freeze_protocol_cannot_be_loosened_by_a_forgotten_setting(root):
    with pytest.raises(T5Error, match="this protocol needs 'trainable: new'"):
        stage(root, "freeze", freeze={"floor": 1, "train": TRAINED})


def test_source_keeps_the_head_it_is_told_to_keep_and_no_finetune_means_none(built, root):
    other = root.parent / "other"
    for name in ("fetch", "shards"):
        (other / "data/out/tiny").mkdir(parents=True, exist_ok=True)
        (other / "data/out/tiny" / name).symlink_to(root / "data/out/tiny" / name)
    assert stage(other, "source", source={"head": "keep", "finetune": None})["steps"] == 0
    assert changed(other, "source", "fetch") == set()
    assert stage(other, "source", source={"head": "keep", "finetune": TRAINED})["steps"] == TRAIN // 8
    assert "blocks.0.mlp.fc1.weight" in changed(other, "source", "fetch")


def test_a_head_that_is_not_one_linear_layer_is_refused():
    for model, found in (
        (timm.create_model("deit_tiny_distilled_patch16_224", depth=1), "the head is a pair"),
        (timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0), "the head is Identity"),
    ):
        with pytest.raises(T5Error, match=found):
            fit_head(model, None, None, 1e-3)

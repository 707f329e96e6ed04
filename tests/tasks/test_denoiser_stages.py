"""From a pipeline to its evaluation, stage by stage, for both families of denoisers, on tiny models."""

import dataclasses
import json
import shutil
from pathlib import Path

import denoiser_target
import numpy as np
import pytest
import torch
from PIL import Image

import t5lib
from t5lib.conversion import new_parameters
from t5lib.evaluation import scores
from t5lib.report.models import KEYS
from t5lib.report.score_table import score_table
from t5lib.utils.errors import T5Error
from t5lib.utils.files import link_or_copy, read_json
from tasks.runtime.stage import Stage, read_history
from tasks.targets import sample_evaluator
from tasks.targets.denoiser import DenoiserTarget, FreezeConfig
from tasks.targets.diffusers_folder import check
from tasks.targets.run import run_stage

KINDS = [pytest.param(kind, marks=pytest.mark.xdist_group(f"{kind}-stages")) for kind in ("sd3", "dit")]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(kind, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(kind)
    denoiser_target.write(root, kind)
    return root


def stage(root: Path, kind: str, name: str, **changes) -> dict:
    return run_stage(name, "tiny", params=denoiser_target.settings(kind, root) | changes, root=root)


@pytest.fixture(scope="module")
def built(root, kind) -> dict[str, dict]:
    """The metrics of every stage, run in order."""
    return {name: stage(root, kind, name) for name in denoiser_target.STAGES}


def made(root: Path, name: str):
    return t5lib.load(root / "data/out/tiny" / name)


def changed(root: Path, name: str, start: str) -> set[str]:
    new, old = made(root, name).state_dict(), made(root, start).state_dict()
    return {key for key in new if key not in old or not torch.equal(new[key], old[key])}


def test_the_pipeline_is_noted_where_it_lies_and_not_copied(built, root, kind):
    note = read_json(root / "data/out/tiny/fetch/pipeline.json")
    assert note["path"] == kind and "transformer/config.json" in note["files"]
    assert built["fetch"]["files"] == len(note["files"]) and len(built["fetch"]["features"]["sha256"]) == 64
    assert not list((root / "data/out/tiny/fetch").rglob("*transformer*"))


def test_images_are_encoded_once_without_the_unreadable_one(built):
    assert built["shards"] == {"train": 24, "train_left_out": 1, "val": 24, "val_left_out": 1}


def test_the_source_is_the_pipelines_transformer(built, root, kind):
    from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

    cls = SD3Transformer2DModel if kind == "sd3" else DiTTransformer2DModel
    theirs, ours = cls.from_pretrained(root / kind, subfolder="transformer"), made(root, "source")
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert built["source"]["loss"] > 0


def test_protocols_train_what_they_say(built, root):
    new = set(new_parameters(made(root, "calibrate")))
    assert changed(root, "convert", "source") == new
    assert changed(root, "align", "calibrate") - new
    assert changed(root, "freeze", "align") <= new
    assert changed(root, "finetune", "align") - new
    assert changed(root, "control", "source") and not new_parameters(made(root, "control"))
    for name in ("freeze", "finetune", "control"):
        assert [point["step"] for point in read_history(root / f"data/out/tiny/{name}/history.jsonl")] == [1, 2, 3]
        assert built[name]["steps"] == 3 and built[name]["loss"] > 0
    assert built["freeze"]["of_source"] == pytest.approx(built["freeze"]["loss"] / built["source"]["loss"])


def test_calibration_and_diagnosis_see_every_attention(built, root, kind):
    layers = 5 if kind == "sd3" else 2  # three joint attentions, two of the image alone
    assert built["convert"]["layers"] == layers
    assert sum(name.startswith("error_after.") for name in built["calibrate"]) == layers
    assert len(read_json(root / "data/out/tiny/diagnose/shift_ratio.json")["layers"]) == layers


def test_every_model_draws_the_same_prompts_and_is_scored(built, root, kind):
    models = built["evaluate"]["models"]
    assert list(models) == [*KEYS, "real images"]
    expected = {"loss", "fd_dinov2", "kid", "precision", "recall", "retrieval_r1", "retrieval_r5"}
    expected |= {"count", "background"} if kind == "sd3" else set()
    for name in KEYS:
        distances = set() if name == "source" else {"patch_cosine", "patch_l2", "psnr"}
        assert expected | distances <= set(models[name]), name
        assert len(list((root / f"data/out/tiny/evaluate/images/{name}").glob("*.png"))) == 16
    for name, by in (("source", "source"), ("frozen", "freeze"), ("finetuned", "finetune"), ("control", "control")):
        assert models[name]["loss"] == pytest.approx(built[by]["loss"], rel=1e-5), name
    if kind == "sd3":
        assert models["real images"]["background"] == 1.0
    assert (root / "data/out/tiny/evaluate/samples.png").read_bytes().startswith(b"\x89PNG")
    assert score_table(models)["models"][-1] == "real images"
    headline = {name: pytest.approx(models[name]["fd_dinov2"]) for name in KEYS}
    assert built["report"].keys() >= {"fd_dinov2", "speedup_at_largest"} and built["report"]["fd_dinov2"] == headline


def test_nothing_is_left_in_scratch(built, root):
    left = [path for path in (root / "data/scratch").rglob("*") if path.is_file()]
    assert [path.name for path in left if path.suffix != ".lock" and path.name != "checked-shards.jsonl"] == []


@pytest.mark.pipeline
def test_as_mlflow_keeps_it_the_model_draws_what_was_evaluated(built, root, kind, tmp_path):
    """With the pipeline's other parts, since they come from a folder; those of the hub would be fetched again."""
    import mlflow.pyfunc
    from mlflow.models import Model

    from tasks.runtime.tracking.registry.upload import write_model

    settings = denoiser_target.settings(kind, root)
    evaluate = Stage("evaluate", "tiny", settings=settings, sections=DenoiserTarget.SECTIONS, root=root)
    product = DenoiserTarget(evaluate).product(built["evaluate"]["models"]["finetuned"])
    assert (product.measure, product.better) == ("fd_dinov2", "lower")
    write_model(tmp_path / "model", Model(), product, link_or_copy)
    assert not list((tmp_path / "model").rglob("transformer"))
    drawn = root / "data/out/tiny/evaluate/images/finetuned/00001.png"
    recipe = json.loads(Image.open(drawn).text["t5"])
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    wanted = {product.settings["takes"]: [recipe["prompt"]], "seed": recipe["seeds"]}
    [image] = model.predict(wanted)
    difference = np.array(Image.open(drawn)).reshape(image.shape).astype(int) - image
    assert np.abs(difference).max() <= 1  # evaluated in batches
    assert not np.array_equal(model.predict(wanted, params={"steps": 1})[0], image)


def test_an_evaluation_that_broke_keeps_its_images(built, root, kind, monkeypatch):
    before = {path.name: path.read_bytes() for path in (root / "data/out/tiny/evaluate/images/control").iterdir()}
    monkeypatch.setattr(scores, "fidelity", None)
    with pytest.raises(TypeError):
        stage(root, kind, "evaluate")
    monkeypatch.undo()
    monkeypatch.setattr(sample_evaluator, "generate", lambda *_, **__: 0)  # nothing is left to draw
    stage(root, kind, "evaluate")
    after = {path.name: path.read_bytes() for path in (root / "data/out/tiny/evaluate/images/control").iterdir()}
    assert after == before


def test_the_gate_stops_what_does_not_stand_in_for_attention(built, root, kind):
    with pytest.raises(T5Error, match=r"freeze gate: .* times the source's .* Calibrate longer"):
        stage(
            root,
            kind,
            "freeze",
            freeze={"ceiling": 1e-3, "train": {**denoiser_target.TRAINED, "trainable": "new", "ema": None}},
        )
    assert not (root / "data/out/tiny/freeze").exists()
    stage(root, kind, "freeze")


def test_more_images_than_there_are_are_refused_by_the_settings_name(built, root, kind):
    for name, split in (("diagnose", "train"), ("explain", "val")):
        with pytest.raises(T5Error, match=rf"{name}\.images is 99; there are 24 {split} images"):
            stage(root, kind, name, **{name: {"images": 99}})
        stage(root, kind, name)


def test_too_few_validation_images_are_told_before_anything_is_drawn(built, root, kind, monkeypatch):
    monkeypatch.setattr(sample_evaluator.scores, "LEAST", 25)
    monkeypatch.setattr(sample_evaluator, "generate", None)
    few = denoiser_target.settings(kind, root)["evaluate"] | {"samples": 25}
    with pytest.raises(T5Error, match=r"evaluate: shards\.val holds 24 images; expected at least 25"):
        stage(root, kind, "evaluate", evaluate=few)


def test_a_pipeline_that_changed_after_it_was_fetched_is_told(built, root, kind):
    file = root / kind / "scheduler/scheduler_config.json"
    whole = file.read_text()
    file.write_text(whole + " ")
    with pytest.raises(T5Error, match=r"scheduler_config.json has .* bytes, not"):
        stage(root, kind, "shards")
    file.write_text(whole)


def test_folders_that_are_no_pipeline_to_convert_are_refused_before_anything_is_read(root, kind, tmp_path):
    with pytest.raises(T5Error, match=r"has no model_index\.json"):
        check(tmp_path)
    shutil.copytree(root / kind, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/transformer")
    with pytest.raises(T5Error, match="lacks transformer"):
        check(tmp_path / "part")
    (tmp_path / "part/transformer").mkdir()
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (tmp_path / "part/transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "part/transformer/part-1.safetensors").touch()
    with pytest.raises(T5Error, match=r"lacks part-2\.safetensors, 1 of the 2 shards that .*index\.json names"):
        check(tmp_path / "part")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]}')
    with pytest.raises(T5Error, match="is a FluxPipeline, whose transformer is Flux; expected SD3Transformer2DModel"):
        check(tmp_path)


def test_settings_of_denoisers_are_checked():
    with pytest.raises(T5Error, match="samples is 3; expected 16 or more"):
        sample_evaluator.EvaluateConfig(samples=3)
    with pytest.raises(T5Error, match="needs 'trainable: new'"):
        FreezeConfig(ceiling=1.0, train=dataclasses.replace(FreezeConfig(ceiling=1.0).train, trainable="all"))

"""From a pipeline to its evaluation, stage by stage, for both families of denoisers, on tiny models."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from encodable import shard_set
from PIL import Image
from safetensors.torch import save_file
from tiny_denoisers import CLASSES
from tiny_pipelines import SIDE, tiny_dit_pipeline, tiny_sd3_pipeline

import t5lib
from t5lib.conversion import new_parameters
from t5lib.report.score_table import score_table
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.evaluate import MODELS
from tasks.runtime.stage import read_history, run_stage

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
TRAINED = {"steps": 3, "batch_size": 4, "lr": 1e-4, "lr_new": 1e-3, "checkpoint_every": 1}
NAMES = ("fetch", "shards", "source", "diagnose", "convert", "calibrate", "freeze", "finetune", "control", "evaluate")
NAMES += ("explain", "benchmark", "report")
VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 0}


def settings(kind: str) -> dict:
    side = SIDE if kind == "sd3" else 8
    return {
        "fetch": {
            "format": "pipeline",
            "source": f"file:{{root}}/{kind}",
            "features": {
                "source": "file:{root}/vit.safetensors",
                "format": "timm",
                "architecture": "vit_tiny_patch16_224",
                "model_args": VIT,
            },
        },
        "shards": {
            "train": f"file:{{root}}/{kind}-train.json",
            "val": f"file:{{root}}/{kind}-val.json",
            "encode": {"buckets": {"sizes": [[side, side]]}},
            "dtype": "fp32",
            "max_sequence_length": 8,
        },
        "data": {"workers": 0, "eval_batch_size": 8},
        "source": {},
        "diagnose": {"images": 4},
        "convert": {"locality": "dwc_qk"},
        "calibrate": {"steps": 4, "batch_size": 4, "pool": 2, "reuse": 1, "checkpoint_every": 2},
        "freeze": {"ceiling": 5.0, "train": {**TRAINED, "trainable": "new", "ema": None}},
        "finetune": {**TRAINED, "align": 0.5, "ema": 0.9},
        "explain": {"images": 4},
        "benchmark": {"resolutions": [side, 2 * side], "repeats": 1, "pixels_per_latent": 2 if kind == "sd3" else 1},
        "evaluate": {"samples": 16, "shown": 2, "sampling": {"steps": 2, "max_sequence_length": 8}},
    }


def drawn(index: int, side: int, grey: bool) -> bytes:
    """One square on a plain background; colour and place follow from the index."""
    pixels = np.full((side, side, 3), list(COLOURS.values())[index % 2], np.uint8)
    pixels[2 + index % 3 : 6 + index % 3, 2:6] = 255
    image, out = Image.fromarray(pixels), io.BytesIO()
    (image.convert("L") if grey else image).save(out, "png")
    return out.getvalue()


def captioned(index: int) -> dict[str, bytes]:
    colour, name = list(COLOURS)[index % 2], f"square {index % 3}"
    about = {"caption": f"one {name} on {colour}", "name": name, "count": 1, "background": colour}
    return {f"{index:04}.png": drawn(index, SIDE, False), f"{index:04}.json": json.dumps(about).encode()}


def labelled(index: int) -> dict[str, bytes]:
    return {f"{index:04}.png": drawn(index, 8, True), f"{index:04}.cls": b"%d" % (index % CLASSES)}


@pytest.fixture(scope="module", params=["sd3", "dit"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(kind, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(kind)
    pipeline = tiny_sd3_pipeline(t5=False) if kind == "sd3" else tiny_dit_pipeline()
    pipeline.save_pretrained(root / kind)
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", **VIT).state_dict(), root / "vit.safetensors")
    for split, first in (("train", 0), ("val", 24)):
        make = captioned if kind == "sd3" else labelled
        samples = [make(index) for index in range(first, first + 24)]
        shards = shard_set({root / f"{kind}-{split}.tar": samples}, classes=0 if kind == "sd3" else CLASSES)
        shards.write(root / f"{kind}-{split}.json", root=root)
    return root


def stage(root: Path, kind: str, name: str, **changes) -> dict:
    text = json.dumps(settings(kind) | changes).replace("{root}", str(root))
    return run_stage(name, "tiny", params=json.loads(text), root=root)


@pytest.fixture(scope="module")
def built(root, kind) -> dict[str, dict]:
    """The metrics of every stage, run in order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: stage(root, kind, name) for name in NAMES}
    torch.set_num_threads(before)


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


def test_images_are_encoded_once(built):
    assert built["shards"] == {"train": 24, "train_left_out": 0, "val": 24, "val_left_out": 0}


def test_the_source_is_the_pipelines_transformer(built, root, kind):
    from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

    cls = SD3Transformer2DModel if kind == "sd3" else DiTTransformer2DModel
    theirs, ours = cls.from_pretrained(root / kind, subfolder="transformer"), made(root, "source")
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert built["source"]["loss"] > 0


def test_protocols_train_what_they_say(built, root):
    new = set(new_parameters(made(root, "calibrate")))
    assert changed(root, "convert", "source") == new
    assert changed(root, "freeze", "calibrate") <= new
    assert changed(root, "finetune", "calibrate") - new
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
    assert list(models) == [*MODELS, "real images"]
    expected = {"loss", "fd_dinov2", "kid", "precision", "recall", "retrieval_r1", "retrieval_r5"}
    expected |= {"count", "background"} if kind == "sd3" else set()
    for name in MODELS:
        distances = set() if name == "source" else {"patch_cosine", "patch_l2", "psnr"}
        assert expected | distances <= set(models[name]), name
        assert len(list((root / f"data/out/tiny/evaluate/images/{name}").glob("*.png"))) == 16
    for name, by in (("source", "source"), ("frozen", "freeze"), ("finetuned", "finetune"), ("control", "control")):
        assert models[name]["loss"] == pytest.approx(built[by]["loss"], rel=1e-5), name
    if kind == "sd3":
        assert models["real images"]["background"] == 1.0
    assert (root / "data/out/tiny/evaluate/samples.png").read_bytes().startswith(b"\x89PNG")
    assert score_table(models)["models"][-1] == "real images"


def test_nothing_is_left_in_scratch(built, root):
    left = [path for path in (root / "data/scratch").rglob("*") if path.is_file()]
    assert [path.name for path in left if path.name != "counted-shards.jsonl"] == []


def test_an_evaluation_that_broke_keeps_its_images(built, root, kind, monkeypatch):
    from t5lib.evaluation import scores

    before = {path.name: path.read_bytes() for path in (root / "data/out/tiny/evaluate/images/control").iterdir()}
    monkeypatch.setattr(scores, "fidelity", None)
    with pytest.raises(TypeError):
        stage(root, kind, "evaluate")
    monkeypatch.undo()
    from tasks.targets import sample_evaluator

    monkeypatch.setattr(sample_evaluator, "generate", lambda *_, **__: 0)  # nothing is left to draw
    stage(root, kind, "evaluate")
    after = {path.name: path.read_bytes() for path in (root / "data/out/tiny/evaluate/images/control").iterdir()}
    assert after == before


def test_the_gate_stops_what_does_not_stand_in_for_attention(built, root, kind):
    with pytest.raises(T5Error, match=r"freeze gate: .* times the source's .* Calibrate longer"):
        stage(root, kind, "freeze", freeze={"ceiling": 1e-3, "train": {**TRAINED, "trainable": "new", "ema": None}})
    assert not (root / "data/out/tiny/freeze").exists()
    stage(root, kind, "freeze")


def test_more_images_than_there_are_are_refused_by_the_settings_name(built, root, kind):
    for name, split in (("diagnose", "train"), ("explain", "val")):
        with pytest.raises(T5Error, match=rf"{name}\.images is 99; there are 24 {split} images"):
            stage(root, kind, name, **{name: {"images": 99}})
        stage(root, kind, name)


def test_too_few_validation_images_are_told_before_anything_is_drawn(built, root, kind, monkeypatch):
    from tasks.denoisers.data import LatentsConfig
    from tasks.targets import sample_evaluator

    monkeypatch.setattr(sample_evaluator.scores, "LEAST", 25)
    where = {"fetched": "fetch", "shards": "shards", "source": "source"}
    made = {name: root / f"data/out/tiny/{stage}" for name, stage in where.items()}
    with pytest.raises(T5Error, match=r"evaluate: shards\.val holds 24 images; expected at least 25"):
        sample_evaluator.Judge(sample_evaluator.EvaluateConfig(samples=25), LatentsConfig(), **made, root=root)


def test_a_pipeline_that_changed_after_it_was_fetched_is_told(built, root, kind):
    file = root / kind / "scheduler/scheduler_config.json"
    whole = file.read_text()
    file.write_text(whole + " ")
    with pytest.raises(T5Error, match=r"scheduler_config.json has .* bytes, not"):
        stage(root, kind, "shards")
    file.write_text(whole)


def test_folders_that_are_no_pipeline_to_convert_are_refused_before_anything_is_read(root, kind, tmp_path):
    from tasks.targets.diffusers_folder import check

    with pytest.raises(T5Error, match=r"has no model_index\.json"):
        check(tmp_path)
    shutil.copytree(root / kind, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/transformer")
    with pytest.raises(T5Error, match="lacks transformer"):
        check(tmp_path / "part")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]}')
    with pytest.raises(T5Error, match="is a FluxPipeline, whose transformer is Flux; expected SD3Transformer2DModel"):
        check(tmp_path)


def test_settings_of_denoisers_are_checked():
    from tasks.denoisers.freeze import FreezeConfig
    from tasks.targets.sample_evaluator import EvaluateConfig

    with pytest.raises(T5Error, match="expected at least 16 samples"):
        EvaluateConfig(samples=3)
    with pytest.raises(T5Error, match="needs 'trainable: new'"):
        FreezeConfig(ceiling=1.0, train=dataclasses.replace(FreezeConfig(ceiling=1.0).train, trainable="all"))


def test_curves_of_every_arm_and_seed_are_drawn_once(root, kind, tmp_path, monkeypatch):
    from tasks.studies import curves

    text = json.dumps(settings(kind)).replace("{root}", str(root))
    told = {"target": "tiny", "settings": json.loads(text), "layers": ["all"], "steps": [0, 2], "seeds": [0, 1]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    out = tmp_path / "results/tiny"
    result = curves.run(**told, out=out, work=tmp_path / "work", jobs=1)
    assert list(result["arms"]) == ["control", "all", "all, not calibrated"]
    for name, arm in result["arms"].items():
        assert list(arm) == ["0", "1"]
        for run in arm.values():
            assert [point["steps"] for point in run["points"]] == [0, 2]
            assert name != "control" or run["points"][0]["loss"] == pytest.approx(result["source"]["loss"])
    plain, calibrated = (result["arms"][name]["0"]["stages"] for name in ("all, not calibrated", "all"))
    assert plain["calibrate"]["steps"] == 0 < calibrated["calibrate"]["steps"]
    text = out.with_suffix(".md").read_text()
    assert "| control, 2 steps |" in text and "| all, not calibrated, 0 steps |" in text and "± " in text
    assert str(tmp_path) not in out.with_suffix(".json").read_text().replace(str(root), "")
    for picture in (out.with_suffix(".png"), out.with_name("tiny-samples.png")):
        assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(curves, "run_stage", None)  # nothing is left to do
    assert curves.run(**told, out=out, work=tmp_path / "work", jobs=1) == result


def test_curves_take_all_cards_that_are_seen(monkeypatch):
    from tasks.studies import curves

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert curves._cards() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert curves._cards() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert curves._cards() == [""]  # none is hidden


def test_curves_go_on_from_the_points_that_are_done_and_show_what_there_is(root, kind, tmp_path, monkeypatch):
    from tasks.studies import curves

    text = json.dumps(settings(kind)).replace("{root}", str(root))
    told = {"target": "tiny", "settings": json.loads(text), "layers": ["all"], "seeds": [0], "jobs": 1}
    told |= {"out": tmp_path / "tiny", "work": tmp_path / "work"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(T5Error, match="no point was done within 0 s"):
        curves.run(**told, steps=[0, 2], seconds=0)
    first = curves.run(**told, steps=[0])
    run_stage, asked = curves.run_stage, []

    def counted(name, *args, **kwargs):
        asked.append(name)
        if len(asked) == 3:
            raise RuntimeError("out of memory")
        return run_stage(name, *args, **kwargs)

    monkeypatch.setattr(curves, "run_stage", counted)
    with pytest.raises(T5Error, match="1 of 3 arms broke: all, not calibrated, seed 0: out of memory"):
        curves.run(**told, steps=[0, 2])
    assert asked == ["control", "finetune", "finetune"]  # what was converted, calibrated and drawn is kept
    both = read_json(tmp_path / "tiny.json")["arms"]
    assert [len(arm["0"]["points"]) for arm in both.values()] == [2, 2, 1]
    assert all(arm["0"]["points"][0] == first["arms"][name]["0"]["points"][0] for name, arm in both.items())
    for file in (tmp_path / "work").glob("control*/result.json"):
        file.unlink()
    planned = curves.run(**told, steps=[0, 2], seconds=0)
    assert list(planned["arms"]) == ["all", "all, not calibrated"]
    told["settings"]["evaluate"]["sampling"]["steps"] = 3  # nothing of other settings is taken for these
    with pytest.raises(T5Error, match="no point was done"):
        curves.run(**told, steps=[0, 2], seconds=0)


def test_the_result_is_exported_as_a_pipeline_with_its_figures(built, root, kind, tmp_path):
    from t5lib.pipelines import load_pipeline
    from tasks.studies.export import export

    out = tmp_path / "tiny-t5"
    (root / kind / "LICENSE.md").write_text("the terms")
    (root / kind / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\n")
    export("tiny", out, root=root, dtype="fp32")
    pipe = load_pipeline(out)
    ours = made(root, "finetune").state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in pipe.transformer.state_dict().items())
    card = (out / "README.md").read_text()
    loss = built["evaluate"]["models"]["finetuned"]["loss"]
    assert f"{loss:.4f}" in card and "FD-DINOv2" in card and "python -m flows.t5 tiny" in card
    assert "license_name: some-licence" in card and (out / "LICENSE.md").read_text() == "the terms"
    with pytest.raises(T5Error, match="exists already"):
        export("tiny", out, root=root)
    with pytest.raises(T5Error, match="does not exist; run"):
        export("other", tmp_path / "other", root=root)


def test_explanation_has_every_attention(built, root, kind):
    found = read_json(root / "data/out/tiny/explain/explanation.json")
    layers = built["convert"]["layers"]
    assert {len(found[name]) for name in ("layers", "kinds", "layer_error", "block_error", "cka", "shift_fitted")} == {
        layers
    }
    assert found["images"] == 4 and all(kind == "swiglu, dwc_qk" for kind in found["kinds"])
    assert 0 < found["cka"][0] <= 1 and (root / "data/out/tiny/explain/similarity.png").exists()


def test_the_page_shows_samples_scores_speed_and_layers(built, root):
    page = (root / "data/out/tiny/report/report.html").read_text()
    for part in (
        "held-out loss",
        "FD-DINOv2",
        "All scores",
        "Samples of every model",
        "What the new layers do",
        "Speed and cost",
    ):
        assert part in page, part
    assert "python -m tasks.studies.export tiny" in page and "real images" in page
    summary = (root / "data/out/tiny/report/summary.md").read_text()
    assert "| Fine-tuned (T5) |" in summary and "one seed." in summary

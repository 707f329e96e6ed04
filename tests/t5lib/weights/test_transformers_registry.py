"""Converted models are models of transformers: saved, pushed, loaded, trained and served by its own means."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import random_images
from tiny_transformers import KINDS, tiny_transformer
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

import t5lib
import t5lib.weights.transformers_registry
from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor():
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


def auto_of(model: nn.Module) -> type:
    """The Auto class that makes models of this kind from a folder."""
    autos = [each for each in t5lib.weights.transformers_registry.AUTOS if not each.__name__.endswith("Backbone")]
    return next((a for a in autos if a._model_mapping.get(type(model.config), None) is type(model)), type(model))


@torch.no_grad()
def same(ours: nn.Module, theirs: nn.Module) -> bool:
    outputs = [family_of(each).call(each, {"pixel_values": random_images(2)}) for each in (ours, theirs)]
    return torch.equal(*outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_it_loads_with_the_same_outputs(kind, tmp_path):
    config = TTTConfig(inner="two_layer", layers=(1,), seed=3)
    model = t5lib.convert(tiny_transformer(kind), config)
    model.save_pretrained(tmp_path)
    loaded = auto_of(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model) and same(loaded, model)
    assert loaded.t5_config == config and loaded.t5_report == model.t5_report
    assert same(t5lib.revert(loaded), t5lib.revert(model))
    with pytest.raises(T5Error, match=r"has no t5\.json; .*from_pretrained loads what a model's save_pretrained wrote"):
        t5lib.load(tmp_path)


@pytest.mark.parametrize("kind", ["vit_classifier", "dinov2", "dinov3", "clip_dual"])
def test_old_weights_keep_the_names_that_they_have_in_files(kind, tmp_path):
    model = tiny_transformer(kind)
    model.save_pretrained(tmp_path / "softmax")
    t5lib.convert(model).save_pretrained(tmp_path / "converted")
    softmax, converted = (load_file(tmp_path / each / "model.safetensors") for each in ("softmax", "converted"))
    assert all(torch.equal(converted[name], value) for name, value in softmax.items())
    assert all(".mixer." in name for name in converted.keys() - softmax.keys())


def test_heads_may_be_new_and_precision_another(tmp_path):
    model = t5lib.convert(tiny_transformer("vit"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, dtype=torch.bfloat16)
    assert loaded(random_images(2)).logits.shape == (2, 3) and loaded.dtype == torch.bfloat16
    mixer, ours = (each.layers[0].attention.mixer.w1 for each in (loaded.vit, model))
    assert torch.equal(mixer, ours.bfloat16())


def test_transformers_alone_does_not_make_a_softmax_model_of_the_weights(tmp_path, monkeypatch):
    t5lib.convert(tiny_transformer("vit")).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.CONFIG_MAPPING, "_extra_content", {})  # as if nothing had been registered
    with pytest.raises(ValueError, match=r"model type `t5_vit`.* does not recognize this architecture"):
        AutoModel.from_pretrained(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    model = t5lib.convert(tiny_transformer("vit_classifier"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("mixer.w1"))
    for others, match in (
        (
            {n: value for n, value in weights.items() if n != name},
            r"missing or of another shape .*0\.attention\.mixer\.w1",
        ),
        ({**weights, f"{name}0": torch.zeros(1)}, r"unknown .*mixer\.w10"),
    ):
        save_file(others, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(T5Error, match=match):
            AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_softmax_model_is_not_taken_for_a_converted_one(tmp_path):
    tiny_transformer("vit").save_pretrained(tmp_path)
    with pytest.raises(
        T5Error, match="holds a softmax model, not a converted one; load it as transformers' own ViTModel"
    ):
        type(t5lib.convert(tiny_transformer("vit"))).from_pretrained(tmp_path)


def test_a_part_whose_configuration_does_not_tell_its_layers_is_not_saved(tmp_path):
    model = t5lib.convert(tiny_transformer("clip_dual"))
    with pytest.raises(T5Error, match=r"this CLIPVisionModel is a part of a converted model.*save that"):
        model.vision_model.save_pretrained(tmp_path)
    classifier = t5lib.convert(tiny_transformer("vit_classifier"))
    classifier.vit.save_pretrained(tmp_path)  # its configuration is that of the whole
    assert same(AutoModel.from_pretrained(tmp_path, add_pooling_layer=False), classifier.vit)


def test_a_model_that_was_pushed_is_loaded_from_the_hub(tmp_path, monkeypatch):
    """The transport is a folder."""
    hub = tmp_path / "hub"

    def upload(api, repo_id, operations, **_options):
        for operation in operations:
            place = hub / repo_id / operation.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                place.write_bytes(file.read())

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", upload)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda *_, **__: ModelCard("---\n---\n"))
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda api, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    model = t5lib.convert(tiny_transformer("dinov3"))
    model.push_to_hub("me/dinov3-t5")
    assert same(AutoModel.from_pretrained(hub / "me/dinov3-t5"), model)


@pytest.mark.parametrize("where", ["object", "folder"])
def test_pipelines_classify_and_extract_features(where, photo, processor, tmp_path):
    model = t5lib.convert(tiny_transformer("vit_classifier"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    given = {"model": str(tmp_path)} if where == "folder" else {"model": model, "image_processor": processor}
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits, tokens = model(pixels).logits, model.vit(pixels).last_hidden_state
    told = pipeline("image-classification", **given)(photo, top_k=7)
    scores = torch.tensor([each["score"] for each in sorted(told, key=lambda each: each["label"])])
    torch.testing.assert_close(scores, logits.softmax(-1)[0])
    if where == "object":
        given["model"] = model.vit
    features = pipeline("image-feature-extraction", **given)(photo)
    torch.testing.assert_close(torch.tensor(features), tokens)


class Labelled(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": random_images(1, seed=index)[0], "labels": index % 7, "of no use": 3}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_trainer_trains_evaluates_and_saves(checkpointing, tmp_path):
    model = t5lib.convert(tiny_transformer("vit_classifier"))
    before = copy.deepcopy(model.state_dict())
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2, "disable_tqdm": True}
    settings |= {"use_cpu": True, "report_to": [], "gradient_checkpointing": checkpointing, "learning_rate": 1e-3}
    trainer = Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=Labelled(), eval_dataset=Labelled())
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"vit.layers.0.attention.mixer.w1", "vit.layers.1.attention.q_proj.weight", "classifier.weight"} <= moved
    assert trainer.evaluate()["eval_loss"] > 0
    told = json.loads(Path(tmp_path, "checkpoint-2/config.json").read_text())
    assert told["model_type"] == "t5_vit" and told["t5_config"]["inner"] == "swiglu"
    assert same(AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2"), model.eval())

"""Every fenced Python block of every page runs, in order, on small models with random weights in place of a hub's."""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import transformers
from encodable import captioned, write_tar
from imports import ROOT
from pages import READ
from PIL import Image
from released import vit_state
from safetensors.torch import save_file
from tiny import SMALL, tiny_vit
from tiny_pipelines import (
    tiny_dit_pipeline,
    tiny_flux_pipeline,
    tiny_pixart_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
)
from tiny_transformers import tiny_transformer

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.data.batches import open_batches

SIDE = 48  # pixels: six patches, for windows of five
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FIT = "config=t5lib.CalibrateConfig(steps=2, batch_size=4, pool=1)"
ALIGN = "config=t5lib.AlignConfig(steps=2, batch_size=4)"


@dataclass(frozen=True)
class Page:
    """What running a page takes.

    Attributes:
        smaller: what the page says, and what is quick enough for a test.
        before: writes the files that the page reads, and returns the names that it takes for granted.
        after: looks at the names that the page has made.
    """

    smaller: dict[str, str] = field(default_factory=dict)
    before: Callable[[], dict[str, Any]] = dict
    after: Callable[[dict[str, Any]], None] = lambda names: None


def pictures(folder: str, count: int) -> None:
    Path(folder).mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{index}.png")


def labelled_photos() -> dict[str, Any]:
    for name in ("cats", "dogs"):
        pictures(f"photos/{name}", 6)
    return {}


def images_to_score() -> dict[str, Any]:
    t5lib.save(tiny_vit("dinov2_registers"), "data/out/dinov2-fashion/fetch")
    for name in ("real", "source", "converted"):
        pictures(name, 16)
    return {}


def weights_of_others() -> dict[str, Any]:
    save_file(timm.create_model("vit_small_patch14_dinov2").state_dict(), "model.safetensors")
    torch.save({"model": vit_state()}, "checkpoint.pth")
    return {}


def converted_pipeline() -> dict[str, Any]:
    t5lib.convert_pipeline(tiny_sd3_pipeline()).save_pretrained("sd35-medium-t5")
    return {}


def captioned_photos() -> dict[str, Any]:
    Path("photos").mkdir()
    write_tar(Path("photos/0000.tar"), [captioned(index, 64, 64 + 16 * (index % 2)) for index in range(16)])
    return {"captions": ["a fox"] * 4, "latents": torch.randn(4, 4, 8, 8)}


def registered_models() -> dict[str, Any]:
    """What MLflow would load of the registry: our own code, with a model beside it, but no server."""
    from tasks.runtime.tracking.registry.classifier import Classifier
    from tasks.runtime.tracking.registry.denoiser import Denoiser

    t5lib.save(t5lib.convert(tiny_vit()), "classifier/model")
    data = {"img_size": 32, "num_classes": 7, "mean": [0.5] * 3, "std": [0.5] * 3}
    settings = {"precision": "fp32", "classes": [*"abcdefg"], "data": data}
    Path("classifier/settings.json").write_text(json.dumps(settings))
    pipe = t5lib.convert_pipeline(tiny_sd3_pipeline())
    pipe.save_pretrained("denoiser/pipeline")
    t5lib.save(pipe.transformer, "denoiser/model")
    Path("denoiser/settings.json").write_text(json.dumps({"hub": None, "takes": "prompt", "sampling": {}}))

    def load_model(address: str) -> SimpleNamespace:
        kind, folder = (Classifier, "classifier") if "dinov2" in address else (Denoiser, "denoiser")
        context, model = SimpleNamespace(artifacts={"target": folder}), kind()
        model.load_context(context)
        table = pd.DataFrame if kind is Denoiser else np.asarray
        return SimpleNamespace(predict=lambda data, params=None: model.predict(context, table(data), params))

    return {"load_model": load_model, "images": np.zeros((2, 40, 40, 3), np.uint8)}


def after_the_denoisers(names: dict[str, Any]) -> None:
    assert names["image"].size == (96, 64) and next(open_batches(names["batches"], 0))
    assert len(ttt_layers(names["pipe"].transformer)) == 2
    assert Path("sd35-t5/model_index.json").exists() and Path("sd35-converted/model_index.json").exists()


def after_the_tutorial(names: dict[str, Any]) -> None:
    assert names["report"].steps == 2 and {row["model"] for row in names["speed"]["rows"]} == {"softmax", "t5"}
    assert not ttt_layers(names["softmax"]) and len(ttt_layers(names["vit"])) == 2


def after_the_registry(names: dict[str, Any]) -> None:
    assert names["model"].predict(names["images"])["logits"].shape == (2, 7)


PAGES = {
    "README.md": Page(
        {
            "teacher=model, batches=loader)   # each": f"teacher=model, batches=loader, {FIT})   # each",
            "teacher=model, batches=loader)       # the": f"teacher=model, batches=loader, {ALIGN})   # the",
        },
        lambda: {"timm": timm, "t5lib": t5lib, "loader": [torch.randn(4, 3, SIDE, SIDE)]},
        lambda names: t5lib.save(names["student"], "out"),
    ),
    "docs/tutorial_vit.md": Page(
        {
            "data_config(model)": f'data_config(model, {{"input_size": (3, {SIDE}, {SIDE})}})',
            "batch_size=16, shuffle": "batch_size=4, shuffle",
            "config=t5lib.CalibrateConfig(steps=2500, batch_size=16)": FIT,
            "config=t5lib.AlignConfig(steps=2000, batch_size=16)": ALIGN,
            "resolutions=(518, 1036), repeats=5": f"resolutions=({SIDE},), repeats=1",
            "TrainConfig(batch_size=16": "TrainConfig(batch_size=4",
            "steps=1000)": "steps=2)",
        },
        labelled_photos,
        after_the_tutorial,
    ),
    "docs/tutorial_sd35.md": Page(
        {"height=1024, width=1024, num_inference_steps=28": "height=16, width=16, num_inference_steps=1"},
        converted_pipeline,
    ),
    "docs/does_it_pay.md": Page(
        {
            '["softmax"] * 6 + ["swiglu"] * 6': '["softmax", "swiglu"]',
            'plan(model, 518, "cuda"': f'plan(model, {SIDE}, "cpu"',
            "PlanConfig(batch=8)": "PlanConfig(repeats=9, factors=(1.0,))",
            '[half], "cuda")': '[half], "cpu")',
        },
    ),
    "docs/diffusion.md": Page(
        {
            '{"19-23": "swiglu", "24-36": "swiglu+nat5"}': '{"3-5": "swiglu", "6-8": "swiglu+nat3"}',
            "height=768, width=1344, num_inference_steps=28": "height=64, width=96, num_inference_steps=2",
            "BucketConfig(resolution=1024)": "BucketConfig(resolution=64)",
            "CalibrateConfig(steps=1500, batch_size=4)": "CalibrateConfig(steps=4, batch_size=4, pool=1)",
            "DenoiserTrainConfig(steps=3000,": "DenoiserTrainConfig(steps=2,",
            "softmax_layers=19": "softmax_layers=1",
        },
        captioned_photos,
        after_the_denoisers,
    ),
    "docs/generation.md": Page({'device="cuda"': 'device="cpu"'}, images_to_score),
    "docs/models.md": Page({"518, 518": f"{SIDE}, {SIDE}"}, weights_of_others),
    "docs/teams.md": Page({"mlflow.pyfunc.load_model": "load_model"}, registered_models, after_the_registry),
}


def random_sd35() -> diffusers.StableDiffusion3Pipeline:
    """With as many layers as the page names."""
    spec = importlib.util.spec_from_file_location("make_sd35_random", ROOT / "data/sd35-random/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build("all", "tiny")


OF_THE_HUB = {
    "stabilityai/": random_sd35,
    "facebook/": lambda: tiny_dit_pipeline(vae=True),
    "black-forest-labs/": tiny_flux_pipeline,
    "PixArt-alpha/": tiny_pixart_pipeline,
    "Qwen/": tiny_qwen_image_pipeline,
    "google/": tiny_transformer,
}


@pytest.fixture
def no_hub(monkeypatch):
    """What pages load from a hub is small and random; what they saved is loaded as ever."""
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options) -> torch.nn.Module:
        told = "embed_dim" in options  # by a file that is loaded
        return create(name, **options) if told else create(name, **options | SMALL | {"img_size": SIDE})

    def from_pretrained(given: Callable) -> Callable:
        def load(name, *, torch_dtype: torch.dtype = torch.float32, **options):
            made = [make for owner, make in OF_THE_HUB.items() if str(name).startswith(owner)]
            return made[0]().to(torch_dtype) if made else given(name, torch_dtype=torch_dtype, **options)

        return load

    monkeypatch.setattr(timm, "create_model", create_model)
    for kind in (diffusers.DiffusionPipeline, transformers.AutoModelForImageClassification):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained(kind.from_pretrained))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", PAGES)
def test_the_page_does_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGES[name]
    text = "\n".join(BLOCK.findall((ROOT / name).read_text()))
    for theirs, ours in page.smaller.items():
        assert theirs in text, theirs
        text = text.replace(theirs, ours)
    names = page.before()
    exec(compile(text, name, "exec"), names)
    page.after(names)


def test_every_page_with_python_is_run():
    assert sorted(str(page.relative_to(ROOT)) for page in READ if "```python" in page.read_text()) == sorted(PAGES)

"""The pretraining of dit-micro."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from traced import compiled_for_tracing_alone

from t5lib.evaluation.generation import GenerateConfig, sample

DATA = Path(__file__).parents[2] / "data"


pytestmark = pytest.mark.xdist_group("dit-micro")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_dit_micro", DATA / "dit-micro/pretrain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pretrained(script, tmp_path_factory):
    """Two steps of a tiny model, stopped once before the end."""
    out, scratch = (tmp_path_factory.mktemp("micro") / name for name in ("model", "scratch"))
    settings = script.Settings(steps=2, batch=4, layers=1, heads=1, threads=1, scored=10)
    images = DATA / "fashion-mnist/val.json"  # fewer than train.json, and read as fast
    with compiled_for_tracing_alone(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "SAMPLING", replace(script.SAMPLING, steps=2))
        with pytest.raises(SystemExit, match="3"):
            script.run(settings, images, out, scratch, stop=0.0)
        assert not out.exists()
        script.run(settings, images, out, scratch)
    return out


def test_the_real_model_fits(script):
    with torch.device("meta"):
        model = script.build(script.Settings())
    assert 2 * sum(value.numel() for value in model.state_dict().values()) + 2e5 < 5e6
    assert model.config.out_channels == 2 * model.config.in_channels, "it learns the variance"


def test_images_are_as_the_stage_shards_encodes_them(script):
    images, labels = script.read_images(DATA / "fashion-mnist/val.json")
    assert images.shape == (1000, 1, 32, 32) and labels.bincount().tolist() == [100] * 10
    assert images.min() == -1 and images.max() == 1
    sample = next(script.ShardSet.read(DATA / "fashion-mnist/val.json").shards[0].samples())
    pixels = torch.from_numpy(np.array(script.fit(script.image_of(sample, 1), (32, 32))))
    torch.testing.assert_close(images[0, 0], pixels.float().div(127.5).sub(1))


def test_labels_are_dropped_in_batches_and_nowhere_else(script):
    settings = script.Settings(batch=2000)
    data = torch.zeros(10, 1, 4, 4), torch.arange(10)
    objective = script.noising_of(script.scheduler())
    labels = script.noised(data, settings, objective, torch.device("cpu"), 0).inputs["class_labels"]
    assert 0.07 < (labels == 10).float().mean() < 0.13
    model = script.build(script.Settings(layers=1, heads=1)).train()
    embedding = model.transformer_blocks[0].norm1.emb.class_embedder
    torch.testing.assert_close(embedding(labels), embedding.embedding_table(labels), rtol=0, atol=0)


def test_pretraining_writes_a_pipeline_that_loads_and_samples(pretrained):
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(pretrained, vae=None)
    images = sample(pipeline, [3, 7], [0, 1], GenerateConfig(steps=2, guidance=2.0))
    assert images.shape == (2, 1, 32, 32)
    facts = json.loads((pretrained / "pretraining.json").read_text())
    assert facts["dit"]["steps"] == 2 and 0 <= facts["scores"]["class"] <= 1
    card = (pretrained / "README.md").read_text()
    assert "2 steps" in card and "{{" not in card

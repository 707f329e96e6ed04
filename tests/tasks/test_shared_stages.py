"""Two processes share the work of a stage, and what it makes is what one would have made."""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import classifier_target
import denoiser_target
import pytest
import shared_work
import torch
from safetensors.torch import load_file

from t5lib.utils.files import read_json
from tasks.runtime.stage import read_history

pytestmark = pytest.mark.xdist_group("processes")
STAGES = ("source", "convert", "calibrate", "align", "freeze", "finetune", "control", "evaluate")
TIMES = {"seconds", "samples_per_second"}


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """Metrics: numbers nearly, all else wholly; how long it took is another matter."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name in theirs.keys() - TIMES:
            assert_alike(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4), where
    else:
        assert ours == theirs, where


def test_the_stages_of_a_classifier(groups, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    settings = classifier_target.SETTINGS | {"finetune": {**classifier_target.TRAINED, "mixup": 0.8, "distill": 0.5}}
    classifier_target.write(alone)
    metrics = shared_work.stages(STAGES, alone, settings)
    shutil.copytree(alone, together)
    shared = ("source", "calibrate", "finetune", "evaluate")
    for answer in groups[2](shared_work.stages, shared, together, settings):
        assert isinstance(answer, dict), answer
        assert_alike(answer, {name: metrics[name] for name in shared})
    for name in ("calibrate", "finetune"):
        made = [root / f"data/out/tiny/{name}" for root in (alone, together)]
        one, two = (load_file(folder / "model.safetensors") for folder in made)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-4, msg=f"{name} {key}")
        curves = [[point["step"] for point in read_history(folder / "history.jsonl")] for folder in made]
        assert curves[0] == curves[1]


def test_the_stages_of_a_denoiser_and_every_file_of_its_images(groups, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    denoiser_target.write(alone, "dit")
    settings = {root: _drawn(denoiser_target, root) for root in (alone, together)}
    metrics = shared_work.stages(("fetch", "shards", *STAGES), alone, settings[alone])
    shutil.copytree(alone, together)
    shutil.rmtree(together / "data/scratch")
    shared = ("shards", "source", "freeze", "evaluate")
    for answer in groups[2](shared_work.stages, shared, together, settings[together]):
        assert isinstance(answer, dict), answer
        assert_alike(answer, {name: metrics[name] for name in shared})
    for kind, number in (("shards/**/*.tar", 2), ("evaluate/**/source/*.png", 16)):
        files = sorted((alone / "data/out/tiny").glob(kind))
        assert len(files) >= number
        for file in files:
            assert (together / file.relative_to(alone)).read_bytes() == file.read_bytes(), file
    assert read_json(together / "data/out/tiny/shards/origins.json")["train"]["samples"] == 70


def _drawn(target: ModuleType, root: Path) -> dict[str, Any]:
    """Settings of a denoiser that learns from its teacher's samples: more than one tar of them, beside images."""
    settings = target.settings("dit", root)
    samples = {"count": 70, "val": 16, "steps": 1, "guidance": 1.0, "batch_size": 35}
    settings["shards"] |= {"samples": samples}
    return settings

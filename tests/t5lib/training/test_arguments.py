"""What calibrate and align are given by mistake is refused in a sentence; what they do is no business of others."""

import random

import numpy as np
import pytest
import torch
from tiny import random_images, tiny_vit
from torch import nn

import t5lib
from t5lib.training.alignment import AlignConfig
from t5lib.training.checkpoints import FILES
from t5lib.training.layer_groups import CalibrateConfig
from t5lib.utils.errors import T5Error

IMAGES = random_images()
FITS = {
    "calibrate": (t5lib.calibrate, CalibrateConfig(steps=2, batch_size=2, pool=1, reuse=1, warmup=0)),
    "align": (t5lib.align, AlignConfig(steps=2, batch_size=4)),
}
BATCHES = [
    (5, "batches are 5, of int"),
    (None, "batches are None"),
    ("photos", "batches are 'photos', of str"),
    ([], "gave no batch"),
    (lambda: iter([IMAGES]), "called with the number of the first batch"),
    (lambda start: None, "batches are None"),
    ([np.array([object()] * 4)], "an array of object; expected numbers"),
    ([np.zeros((2, 3, 32, 32), "datetime64[s]")], "an array of datetime64"),
    ([{}], "called by name"),
    ([{"labels": torch.zeros(4)}], "called by name"),
    ([{"pixel_values": [1, 2]}], "must hold images"),
    ([IMAGES.to("meta")], "'x' is on the meta device"),
    ([IMAGES.to_sparse()], "laid out as torch.sparse_coo"),
]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_vit()


def halved(model: nn.Module) -> nn.Module:
    model.get_submodule("blocks.1").half()
    return model


@pytest.mark.parametrize("fit", FITS)
def test_what_is_no_source_of_batches_is_refused(fit, teacher):
    function, config = FITS[fit]
    model = t5lib.convert(teacher)
    for batches, message in BATCHES:
        with pytest.raises(T5Error, match=message):
            function(model, teacher=teacher, batches=batches, config=config)


@pytest.mark.parametrize("fit", FITS)
def test_weights_of_two_precisions_and_places_that_are_no_folder_are_refused(fit, teacher, tmp_path):
    function, config = FITS[fit]
    known = {"batches": [IMAGES], "config": config}
    with pytest.raises(T5Error, match="float16"):
        function(halved(t5lib.convert(teacher)), teacher=teacher, **known)
    with pytest.raises(T5Error, match="float16"):
        function(t5lib.convert(teacher), teacher=halved(tiny_vit()), **known)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", str(tmp_path / "file"), tmp_path / "file/in", 5, "a\0b"):
        with pytest.raises(T5Error, match=r"resume_dir is .* pass the path of one, or None"):
            function(t5lib.convert(teacher), teacher=teacher, resume_dir=place, **known)
    with pytest.raises(T5Error, match="log is 5; expected a function"):
        function(t5lib.convert(teacher), teacher=teacher, log=5, **known)


@pytest.mark.parametrize("features", ["head", "patch_embed", "pos_drop", "head_drop", "blocks.0.attn.attn_drop"])
def test_features_that_are_no_tokens_after_a_block_are_refused(features, teacher):
    config = AlignConfig(steps=2, batch_size=4, features=features)
    with pytest.raises(T5Error, match=f"features '{features}' .*a block, or the norm after the last"):
        t5lib.align(t5lib.convert(teacher), teacher=teacher, batches=[IMAGES], config=config)


def test_a_model_whose_weights_are_all_frozen_cannot_be_aligned(teacher):
    model = t5lib.convert(teacher).requires_grad_(False)
    with pytest.raises(T5Error, match="no parameter of the model has requires_grad"):
        t5lib.align(model, teacher=teacher, batches=[IMAGES], config=FITS["align"][1])


@pytest.mark.parametrize("fit", FITS)
def test_random_states_are_left_alone_and_the_last_step_is_kept(fit, teacher, tmp_path):
    """Nothing but a checkpoint is left if a process is killed between the last step and the saving of its model."""
    function, config = FITS[fit]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    models, told = [t5lib.convert(teacher), t5lib.convert(teacher)], [[], []]
    for model, steps in zip(models, told, strict=True):
        known = {"batches": [IMAGES], "config": config, "log": lambda _, step, steps=steps: steps.append(step)}
        function(model, teacher=teacher, resume_dir=str(tmp_path), **known)
        assert [place.name for place in tmp_path.iterdir()] == ["step-0000002"]
        assert (tmp_path / "step-0000002" / FILES).is_file()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert told[0] and not told[1], "the second took everything from the checkpoint"
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())

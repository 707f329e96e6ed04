"""Several processes that share the rows of an image, or a pass's latents, draw what one process draws."""

import re

import numpy as np
import pytest
import shared_passes
import torch
from shared_passes import converted, one_pass
from tiny import tiny_vit
from tiny_denoisers import tiny_sd3
from torch import nn

import t5lib
from t5lib.families.inputs import placed
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error

pytestmark = pytest.mark.xdist_group("processes")
# Joint attentions come first, then those of the image alone. 5×5 neighborhoods and a process of one row meet in three.
CASES = [
    ("sd3", {}),
    ("sd3", {"layers": {"0": "softmax", "1": "t5-last+", "2": "t5+", "3": "softmax"}, "key_norm_scope": "modality"}),
    ("sd3", {"layers": {"1-2": "swiglu", "4": "swiglu"}, "text": "exact", "locality": "cpe"}),
    ("sd3", {"layers": {"0": "three_layer+nat3"}, "locality": "dwc_v", "key_norm": "layer"}),
    ("dit", {"layers": {"0": "dit5", "1": "softmax"}}),
    ("pixart", {"locality": "dconv_v+nat3", "key_norm": "instance_no_mean"}),
    ("flux", {"layers": {"0": "softmax", "1": "t5+", "2": "softmax", "3": "swiglu"}}),
    ("qwen_image", {"layers": {"0": "softmax", "1": "swiglu"}}),
]


def relative_error(result, exact):
    return np.linalg.norm(result - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(("family", "config"), CASES, ids=str)
def test_rows_of_two_and_three_processes_are_as_exact_as_the_whole(family, config, groups):
    model, inputs = converted(family, config)
    plain = one_pass(model, inputs)
    exact = one_pass(nn.Module.double(model), placed(inputs, torch.float64))
    for number, group in ((2, groups[2]), (3, groups[4])):
        answers = group(shared_passes.shared_rows, number, family, config)[:number]
        assert all(isinstance(answer, np.ndarray) for answer in answers), answers
        assert relative_error(answers[0], exact) <= 2 * relative_error(plain, exact)
        assert all(np.array_equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize(("number", "names", "sizes"), [(2, ("batch",), (2,)), (4, ("batch", "rows"), (2, 2))], ids=str)
def test_a_pipeline_draws_the_same_picture_with_guidance_and_rows_split(number, names, sizes, groups):
    alone = shared_passes.picture((), ())
    for answer in groups[number](shared_passes.picture, names, sizes):
        assert isinstance(answer, np.ndarray), answer
        np.testing.assert_allclose(answer, alone, rtol=1e-4, atol=1e-5)


def test_what_processes_cannot_share_is_refused_in_all_of_them(groups):
    expected = {
        "names": "dimensions called .*columns.*expected 'rows', 'batch' or both",
        "twice": "is already parallel",
        "noise": "different inputs; give all of them the same prompt",
        "few rows": "an image of 1×6 tokens cannot be shared by 2 processes",
        "odd batch": "a pass has 1 latents, which 2 processes cannot share evenly",
        "control": "takes no block_controlnet_hidden_states",
        "gradients": "has no gradients; call it under torch.no_grad",
        "revert": "several processes share the passes",
    }
    for found in groups[2](shared_passes.refused):
        assert isinstance(found, dict), found
        assert found.keys() == expected.keys()
        for what, message in expected.items():
            assert re.search(message, found[what]), found[what]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: object(), "object has no transformer"),
        (lambda: t5lib.convert(tiny_vit()), "cannot share the passes of a VisionTransformer"),
        (tiny_sd3, "is not converted; call t5lib.convert"),
        (lambda: t5lib.convert(tiny_sd3(), "hedgehog"), "inner model 'hedgehog', whose work cannot be split"),
        (lambda: t5lib.convert(tiny_sd3(), TTTConfig(inner="linear")), "inner model 'linear', whose work cannot"),
        (lambda: t5lib.convert(tiny_sd3()), "no other process to share with; start several"),
    ],
    ids=["no model", "a ViT", "not converted", "a baseline", "normalized", "alone"],
)
def test_what_cannot_be_parallel_is_refused_before_processes_meet(make, message):
    with pytest.raises(T5Error, match=message):
        t5lib.parallelize(make())

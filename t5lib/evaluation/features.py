"""The networks in whose features images are compared: torch-fidelity's Inception, or a DINOv2 of timm's.

Where Inception's weights are at hand, figures are those of the literature (FID, KID, IS). Where they are not, a DINOv2
that t5lib.load reads takes its place, registered with torch-fidelity; its Fréchet distance is called FD-DINOv2, as in
"Exposing flaws of generative model evaluation metrics" (arXiv 2306.04675), which takes ViT-L/14 at 224 px: figures of
another size of DINOv2, or of another resolution, compare with each other alone. `Extractor.name` says which it is.

Shapes: B images, C channels, D width of the features, P patches.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib import checkpoint
from t5lib.utils.errors import T5Error
from t5lib.utils.extras import extras_named

INCEPTION, DINOV2 = "inception-v3-compat", "t5-dinov2"  # names in torch-fidelity's registry
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature extractor and its weights.

    Attributes:
        kind: "inception" or "dinov2".
        weights: Inception's .pth file, or the folder of t5lib.save that holds the DINOv2.
        name: to be told with every figure, such as "DINOv2 vit_small_patch14_dinov2 at 98 px".
    """

    kind: Literal["inception", "dinov2"]
    weights: Path
    name: str

    @property
    def registered(self) -> str:
        """The name under which torch-fidelity knows it."""
        return INCEPTION if self.kind == "inception" else _register()


def choose(inception: Path | None = None, dinov2: Path | None = None) -> Extractor:
    """Inception where its file is there, otherwise the DINOv2.

    Raises:
        T5Error: neither is there, with how to get each; or what is there is not that.
    """
    if inception is not None and Path(inception).is_file():
        _check_plain(Path(inception))
        return Extractor(kind="inception", weights=Path(inception), name="Inception-v3 (2015-12-05)")
    if dinov2 is not None and Path(dinov2).is_dir():
        return Extractor(kind="dinov2", weights=Path(dinov2), name=f"DINOv2 {_described(Path(dinov2))}")
    raise T5Error(
        f"no network to compare images with: neither Inception ({inception}) nor a DINOv2 ({dinov2}) is there. Get "
        f"{INCEPTION_FILE} from torch-fidelity's release v0.2.0, or a DINOv2 by `dvc repro fetch@dinov2-fashion`, "
        "which makes data/out/dinov2-fashion/fetch"
    )


def _described(folder: Path) -> str:
    description = checkpoint.read_description(folder)
    size = description["model_args"].get("img_size")
    sides = size if isinstance(size, list) else [size, size]
    at = f" at {' × '.join(str(side) for side in dict.fromkeys(sides))} px" if size else ""
    return description["architecture"] + at


class Dinov2(nn.Module):
    """Features of uint8 images by a timm DINOv2 (or another ViT with a class token).

    Args:
        model: a softmax model as t5lib.load gives it; it is used at the image size that it has.

    Raises:
        T5Error: a model without a class token.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not getattr(model, "num_prefix_tokens", 0):
            raise T5Error(f"{type(model).__name__} has no class token; expected a DINOv2, such as dinov2-fashion's")
        self.model = model.eval().requires_grad_(False)
        for name in ("mean", "std"):
            values = torch.tensor(model.pretrained_cfg[name])[:, None, None]
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "Dinov2":
        """From a folder of t5lib.save."""
        return cls(checkpoint.load(folder)).to(device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (B, D) and patch tokens (B, P, D) after the last norm, float32.

        Args:
            images: (B, 3 or 1, H, W) uint8, resized to the model's size (bicubic, the whole image).

        Raises:
            T5Error: images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise T5Error(f"images are {tuple(images.shape)} {images.dtype}; expected (B, 3 or 1, H, W) torch.uint8")
        pixels = images.expand(-1, 3, -1, -1).to(self.mean) / 255
        size = tuple(self.model.patch_embed.img_size)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        tokens = self.model.forward_features((pixels - self.mean) / self.std).float()
        return tokens[:, 0], tokens[:, self.model.num_prefix_tokens :]

    def class_tokens(self, images: Tensor) -> Tensor:
        """(B, D) on the CPU, any number of images on any device."""
        return torch.cat([self(part.to(self.mean.device))[0].cpu() for part in images.split(BATCH)])


def _check_plain(file: Path) -> None:
    """torch-fidelity unpickles the file; so first see that it holds tensors alone."""
    import pickle

    try:
        torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = re.split(r"[.\n]", str(error))[0]
        raise T5Error(
            f"{file} cannot be read as weights ({reason}); expected torch-fidelity's {INCEPTION_FILE}"
        ) from None


@functools.cache
def _register() -> str:
    """Make torch-fidelity know DINOv2 under our name, with a folder of t5lib.save as its weights."""
    with extras_named():
        from torch_fidelity import register_feature_extractor
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Dinov2Extractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any):
            super().__init__(name, features_list)
            self.dinov2 = Dinov2.load(Path(feature_extractor_weights_path))

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("class_token",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "class_token"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return (self.dinov2(images)[0],)

    register_feature_extractor(DINOV2, Dinov2Extractor)
    return DINOV2

"""How good generated images are: distance to real ones, whether they show what was asked for, distance to the source.

Images are (n, 3 or 1, H, W) uint8 on the CPU, as t5lib.evaluation.generation gives them. Shares are 0 to 1.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from t5lib.evaluation.features import BATCH, Dinov2, Extractor
from t5lib.utils.errors import T5Error
from t5lib.utils.extras import extras_named

LEAST = 16  # images of each kind: fewer have no neighbourhoods and no covariance to speak of


def fidelity(
    generated: dict[str, Tensor], real: Tensor, extractor: Extractor, *, device: str | torch.device = "cpu"
) -> dict[str, dict[str, Any]]:
    """How near each set of generated images is to the real ones, by torch-fidelity.

    Args:
        generated: name of the model to its images.
        real: as many as there are, at least 16; the same for all, read once.
        extractor: of t5lib.evaluation.features.choose.

    Returns:
        For each model "fid" with Inception or "fd_dinov2" with DINOv2, "kid" and "kid_std" (subsets of half the images,
        1,000 at most), "precision" and "recall" (3 neighbours, in the same features), with Inception also
        "inception_score" and "inception_score_std"; "extractor", its name, and "generated" and "real", the numbers of
        images: distances of different numbers of images do not compare.

    Raises:
        T5Error: fewer than 16 images.
    """
    for name, images in (*generated.items(), ("real", real)):
        if len(images) < LEAST:
            raise T5Error(f"{len(images)} images of '{name}': expected at least {LEAST}, preferably a few thousand")
    with tempfile.TemporaryDirectory(prefix="t5-fidelity-") as folder:
        return {name: _fidelity(images, real, extractor, device, folder) for name, images in generated.items()}


def _fidelity(
    images: Tensor, real: Tensor, extractor: Extractor, device: str | torch.device, cache: str
) -> dict[str, Any]:
    with extras_named():
        from torch_fidelity import calculate_metrics

    inception = extractor.kind == "inception"
    found = calculate_metrics(
        input1=_Images(images),
        input2=_Images(real),
        input2_cache_name="real",
        cache_root=cache,  # a folder of this call's own: the real images' features serve all models
        cuda=torch.device(device).type == "cuda",
        batch_size=BATCH,
        isc=inception,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor=extractor.registered,
        feature_extractor_weights_path=str(extractor.weights),
        kid_subset_size=min(1000, len(images) // 2, len(real) // 2),
        save_cpu_ram=True,
        verbose=False,
    )
    names = {
        "fid" if inception else "fd_dinov2": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
    }
    scores = {ours: found[theirs] for ours, theirs in names.items() if theirs in found}
    return {**scores, "extractor": extractor.name, "generated": len(images), "real": len(real)}


class _Images(torch.utils.data.Dataset):
    """Images as torch-fidelity reads them: (3, H, W) uint8."""

    def __init__(self, images: Tensor):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def retrieval(
    generated: Tensor, wanted: Sequence[str], references: dict[str, Tensor], dinov2: Dinov2
) -> dict[str, Any]:
    """How often the reference picture nearest to an image shows what that image should show.

    Args:
        generated: n images.
        wanted: n names out of `references`.
        references: name to the class tokens (k, D) of its pictures, of `tokens_of`; an image is as near to a name as
            to its nearest picture.
        dinov2: similarity is the cosine of its class tokens.

    Returns:
        "retrieval_r1" and "retrieval_r5", shares of the images whose name is the nearest, or among the five nearest;
        "retrieval_names", how many names there are to choose from.

    Raises:
        T5Error: not a name for each image, or a name without a reference picture.
    """
    if len(generated) != len(wanted):
        raise T5Error(f"{len(generated)} images and {len(wanted)} names; expected a name for each image")
    unknown = [name for name in wanted if name not in references]
    if unknown:
        raise T5Error(f"'{unknown[0]}' has no reference picture; expected one of {len(references)} names")
    features = F.normalize(dinov2.class_tokens(generated), dim=-1)
    near = [(features @ F.normalize(tokens, dim=-1).T).amax(-1) for tokens in references.values()]
    similarity = torch.stack(near, dim=-1)  # (n, names)
    names = list(references)
    own = similarity.gather(1, torch.tensor([[names.index(name)] for name in wanted]))
    rank = (similarity > own).sum(-1)
    return {
        "retrieval_r1": (rank < 1).float().mean().item(),
        "retrieval_r5": (rank < 5).float().mean().item(),
        "retrieval_names": len(names),
    }


def tokens_of(pictures: dict[str, Tensor], dinov2: Dinov2) -> dict[str, Tensor]:
    """The class tokens (k, D) of each name's pictures (k, C, H, W)."""
    tokens = dinov2.class_tokens(torch.cat(list(pictures.values())))
    return dict(zip(pictures, tokens.split([len(each) for each in pictures.values()]), strict=True))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a composed image should show: `count` copies of `name` on a background of `colour`."""

    name: str
    count: int
    colour: str


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """How things on a plain background are counted.

    Attributes:
        contrast: distance from the background's colour from which on a pixel is of a thing (RGB 0 to 1, Euclidean).
        join: gaps of up to so many pixels, for a side of 64, do not divide a thing.
        relative: parts smaller than this share of the largest belong to another (copies are of one size).
        least: share of the image's area below which a part is a speck.
    """

    contrast: float = 0.2
    join: int = 1
    relative: float = 0.5
    least: float = 0.005


def colours_of(images: Tensor, scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """The backgrounds of real images: name to mean colour (3,), 0 to 1."""
    grounds: dict[str, list[np.ndarray]] = {}
    for image, scene in zip(images, scenes, strict=True):
        grounds.setdefault(scene.colour, []).append(ground_of(image))
    return {name: np.mean(found, axis=0) for name, found in grounds.items()}


def follow_scenes(
    images: Tensor, scenes: Sequence[Scene], colours: dict[str, np.ndarray], counting: CountConfig = CountConfig()
) -> dict[str, float]:
    """Shares of images with the right number of things ("count") and the right background ("background").

    Counting is by connected parts, so things that touch or fall apart are miscounted in real images too: score those
    as well and give the figure beside it, as what can be reached (98 % for emoji at 128 px).

    Args:
        colours: what a background may be, of `colours_of`.

    Raises:
        T5Error: not a scene for each image, or a colour that is not in `colours`.
    """
    if len(images) != len(scenes) or not scenes:
        raise T5Error(f"{len(images)} images and {len(scenes)} scenes; expected a scene for each image, one at least")
    unknown = sorted({scene.colour for scene in scenes} - set(colours))
    if unknown:
        raise T5Error(f"colour '{unknown[0]}' is not among {', '.join(colours)}; measure colours on images with all")
    pairs = list(zip(images, scenes, strict=True))
    return {
        "count": sum(count_things(image, counting) == scene.count for image, scene in pairs) / len(pairs),
        "background": sum(background(image, colours) == scene.colour for image, scene in pairs) / len(pairs),
    }


def background(image: Tensor, colours: dict[str, np.ndarray]) -> str:
    """The name of the colour nearest to the median of the pixels along the border of (C, H, W)."""
    ground = ground_of(image)
    return min(colours, key=lambda name: float(np.linalg.norm(ground - colours[name])))


def count_things(image: Tensor, config: CountConfig = CountConfig()) -> int:
    """Connected parts that stand out from the background of (C, H, W)."""
    return len(parts_of(image, config))


def parts_of(image: Tensor, config: CountConfig = CountConfig()) -> list[tuple[tuple[slice, slice], int]]:
    """The parts that count_things counts: rows and columns of each, and its area in pixels."""
    from scipy import ndimage

    pixels = image.expand(3, -1, -1).numpy() / 255
    distance = np.linalg.norm(pixels - ground_of(image)[:, None, None], axis=0)
    things = distance > config.contrast
    gap = round(config.join * min(things.shape) / 64)
    grown = ndimage.binary_dilation(things, np.ones((1 + gap, 1 + gap))) if gap else things
    parts, number = ndimage.label(grown, np.ones((3, 3)))
    if not number:
        return []
    areas = np.bincount(parts[things], minlength=number + 1)[1:]
    least = max(config.least * things.size, config.relative * areas.max())
    return [(box, int(area)) for box, area in zip(ndimage.find_objects(parts), areas, strict=True) if area >= least]


def ground_of(image: Tensor) -> np.ndarray:
    """Median colour (3,), 0 to 1, of the outermost pixels (a 32nd of the side)."""
    pixels = image.expand(3, -1, -1).float() / 255
    edge = max(1, min(pixels.shape[1:]) // 32)
    sides = (pixels[:, :edge], pixels[:, -edge:], pixels[:, :, :edge], pixels[:, :, -edge:])
    return torch.cat([side.flatten(1) for side in sides], dim=1).median(dim=1).values.numpy()


@torch.no_grad()
def distance_to(images: Tensor, source: Tensor, dinov2: Dinov2) -> dict[str, float]:
    """How far images are from the source model's of the same seeds, pair by pair.

    Returns:
        "patch_cosine", 1 - cosine of DINOv2's patch tokens at the same place, and "patch_l2", their Euclidean distance
        (LPIPS-like: features after the last norm, mean over places and images); "psnr" in dB, mean over images, 100 at
        most, which is what equal images get.

    Raises:
        T5Error: images of other number or size than the source's.
    """
    if images.shape != source.shape:
        raise T5Error(f"images {tuple(images.shape)} and the source's {tuple(source.shape)}; expected one shape")
    cosine = length = noise = 0.0
    for ours, theirs in zip(images.split(BATCH), source.split(BATCH), strict=True):
        a, b = (dinov2(part.to(dinov2.mean.device))[1] for part in (ours, theirs))
        cosine += (1 - F.cosine_similarity(a, b, dim=-1)).mean(-1).sum().item()
        length += (a - b).norm(dim=-1).mean(-1).sum().item()
        error = (ours.double() - theirs.double()).div(255).square().flatten(1).mean(1)
        noise += (-10 * error.clamp_min(1e-10).log10()).sum().item()
    return {"patch_cosine": cosine / len(images), "patch_l2": length / len(images), "psnr": noise / len(images)}


def clip_score(
    images: Tensor, prompts: Sequence[str], weights: Path | str | None, *, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """CLIP score (100 · cosine, 0 at least, mean) by torchmetrics, where CLIP's weights are at hand.

    Args:
        images: n.
        prompts: n, the text of each.
        weights: folder of transformers' CLIP, such as openai/clip-vit-large-patch14 downloaded.

    Returns:
        "clip_score", or "clip_note", which says why there is none.
    """
    folder = Path(weights) if weights else None
    if folder is None or not (folder / "config.json").is_file():
        where = f"{folder} holds no CLIP" if folder else "no folder of CLIP weights was given"
        return {"clip_note": f"no CLIP score: {where}; `hf download openai/clip-vit-large-patch14` gets one"}
    with extras_named():
        from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore(model_name_or_path=lambda: _clip(folder)).to(device)
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH].expand(-1, 3, -1, -1).to(device)
        metric.update(batch, list(prompts[start : start + BATCH]))
    return {"clip_score": metric.compute().item()}


def _clip(folder: Path) -> tuple[torch.nn.Module, Any]:
    """CLIP and its processor for torchmetrics, which wants features as plain tensors (transformers 5 wraps them)."""
    with extras_named():
        from transformers import CLIPModel, CLIPProcessor

    class PlainCLIP(CLIPModel):
        def get_image_features(self, *args: Any) -> Tensor:
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args: Any) -> Tensor:
            return super().get_text_features(*args).pooler_output

    return PlainCLIP.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)

"""A study: where does the rotation of queries and keys belong, before key norm and convolution or between them?

    python data/rotary/study.py --out rotary.json --seeds 0 1 2

A small DINOv3 (positions from its rotary table alone, class token and four registers) is trained from nothing on the
committed Fashion-MNIST. It is converted with each order, calibrated on the same images in the same steps, and held
against the softmax model on the held-out images. Runs on a CPU, in minutes a seed; results are written as they come.

The orders, of queries and keys as they are projected:

    rotate, norm, convolve     what t5lib does
    convolve, rotate, norm     the convolution sees channels that mean the same everywhere, the norm what softmax sees
    rotate, convolve, norm     tells what of the difference between those two is due to the norm coming last
    rotate, paired norm, …     as the first, but both channels that turn together are divided by one deviation
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from PIL import Image
from t5kernels import key_norm, ttt
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

import t5lib
from t5lib.data.decoding import image_of
from t5lib.data.shards import ShardSet
from t5lib.evaluation.classifier import score
from t5lib.layers import attention, factory
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import Mixer, convolved
from t5lib.layers.rotary import rotated
from t5lib.layers.ttt_mixer import TTTMixer
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.recorder import Recorder, token_errors
from t5lib.utils.files import write_json

DATA = Path(__file__).resolve().parents[1] / "fashion-mnist"
MEASURED = ("layer_error", "top1", "agreement", "feature_error")
PREFIX, HALF = 5, True  # of DINOv3: class token and four registers; channel i turns with channel i + D/2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the model and how much is done."""

    side: int = 32
    patch: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 2
    epochs: int = 8
    batch: int = 64
    lr: float = 3e-3
    calibrate: int = 150
    images: int = 4000


class Ordered(TTTMixer):
    """The t5 layer in the general way of all mixers, whose steps can be put in another order.

    Attributes:
        rope: the rotary table of the model, the same for all of its layers.
    """

    rope: Tensor

    attend = Mixer.attend

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        return ttt(q, k, v, self.weights(), inner=self.inner, scale=q.shape[3] ** -0.5 / k.shape[2])

    def rotated(self, *tokens: Tensor) -> Iterator[Tensor]:
        return (rotated(each, self.rope, PREFIX, HALF) for each in tokens)

    def convolved(self, q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        return q + convolved(q, self.q_conv, grid), k + convolved(k, self.k_conv, grid)


class RotateNormConvolve(Ordered):
    def localized(self, q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        q, k = self.rotated(q, k)
        return self.convolved(q, self.normalized(k, grid), grid)


class ConvolveRotateNorm(Ordered):
    def localized(self, q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        q, k = self.rotated(*self.convolved(q, k, grid))
        return q, self.normalized(k, grid)


class RotateConvolveNorm(Ordered):
    def localized(self, q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        q, k = self.convolved(*self.rotated(q, k), grid)
        return q, self.normalized(k, grid)


class RotatePairedNormConvolve(Ordered):
    def localized(self, q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        q, k = self.rotated(q, k)
        centred = key_norm(k, "instance_no_std", self.config.key_norm_eps)
        variance = centred.square().mean(2, keepdim=True)
        shared = variance.unflatten(-1, (2, -1)).mean(-2).repeat(1, 1, 1, 2)
        return self.convolved(q, centred * torch.rsqrt(shared + self.config.key_norm_eps), grid)


ORDERS: dict[str, type[Ordered]] = {
    "rotate, norm, convolve": RotateNormConvolve,
    "convolve, rotate, norm": ConvolveRotateNorm,
    "rotate, convolve, norm": RotateConvolveNorm,
    "rotate, paired norm, convolve": RotatePairedNormConvolve,
}


def read_images(split: str, side: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, side, side) of about zero mean and unit variance, and labels (n,)."""
    images, labels = [], []
    for shard in ShardSet.read(DATA / f"{split}.json").shards:
        for sample in shard.samples():
            image = image_of(sample, 1).resize((side, side), Image.Resampling.BILINEAR)
            images.append(pil_to_tensor(image).float().div(255).sub(0.286).div(0.353))
            labels.append(int(sample["cls"]))
    return torch.stack(images), torch.tensor(labels)


def build(settings: Settings) -> nn.Module:
    sizes = {"img_size": settings.side, "patch_size": settings.patch, "embed_dim": settings.width}
    layers = {"depth": settings.depth, "num_heads": settings.heads, "init_values": 1.0}
    return timm.create_model("vit_small_patch16_dinov3", in_chans=1, num_classes=10, **sizes, **layers)


def train(settings: Settings, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A softmax model trained from nothing."""
    torch.manual_seed(seed)
    model = build(settings)
    steps = settings.epochs * len(images) // settings.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (settings.batch,))
        batch = images[chosen]
        batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)
        loss = F.cross_entropy(model(batch), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Shuffled:
    """Endless batches of images in an order that the seed decides, the same for every order of the layer's steps."""

    def __init__(self, images: Tensor, batch: int, seed: int):
        self.images, self.batch, self.seed = images, batch, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for chosen in torch.randperm(len(self.images), generator=generator).split(self.batch):
                yield self.images[chosen]


@torch.no_grad()
def measure(model: nn.Module, source: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and agreement with the source in percent, and the error of its last features over their variance."""
    found = []
    for each in (source, model):
        recorder = Recorder(t5lib.families.family_of(each), each, "norm")
        with recorder.recording():
            logits = each(images)
        recorder.remove()
        found.append((logits, recorder.features))
    (wanted, theirs), (logits, ours) = found
    side = round((theirs.shape[1] - PREFIX) ** 0.5)
    scores = score(logits, labels, wanted.argmax(-1))
    error = token_errors(ours, theirs, TokenGrid(side, side, PREFIX))["image"].item()
    return {"top1": scores.top1, "agreement": scores.agreement or 0.0, "feature_error": error}


def without_positions(source: nn.Module) -> nn.Module:
    """The softmax model with no angle turned."""
    model = copy.deepcopy(source)
    table = model.rope.get_embed(shape=model.patch_embed.grid_size)
    sines, cosines = table.chunk(2, dim=-1)
    still = torch.cat((torch.zeros_like(sines), torch.ones_like(cosines)), dim=-1)
    model.rope.get_embed = lambda shape: still
    return model


def run_order(kind: type[Ordered], source: nn.Module, settings: Settings, data: tuple[Tensor, ...], seed: int):
    """What a converted model is like after calibration."""
    images, held_out, labels = data
    kind.rope = source.rope.get_embed(shape=[settings.side // settings.patch] * 2)
    unrotated = patch.object(attention, "rotated", lambda x, *_: x)  # the mixers do it
    with patch.object(factory, "TTTMixer", kind), unrotated:
        model = t5lib.convert(source, TTTConfig(seed=seed))
        recipe = CalibrateConfig(steps=settings.calibrate, batch_size=settings.batch, seed=seed)
        report = t5lib.calibrate(model, teacher=source, batches=Shuffled(images, settings.batch, seed), config=recipe)
        errors = list(report.error_after.values())
        return {"layer_error": statistics.mean(errors)} | measure(model, source, held_out, labels)


def run(settings: Settings, seeds: list[int], out: Path) -> dict[str, Any]:
    """Everything; `out` is written after every order of every seed."""
    found: dict[str, Any] = {"settings": asdict(settings), "seeds": {}}
    images, labels = (each[: settings.images] for each in read_images("train", settings.side))
    held_out, held_labels = read_images("val", settings.side)
    for seed in seeds:
        start = time.perf_counter()
        source = train(settings, images, labels, seed)
        rows = {"softmax": measure(source, source, held_out, held_labels)}
        rows["softmax without positions"] = measure(without_positions(source), source, held_out, held_labels)
        print(f"seed {seed}, {time.perf_counter() - start:.0f} s: {rows}", flush=True)
        found["seeds"][str(seed)] = rows
        for name, kind in ORDERS.items():
            start = time.perf_counter()
            rows[name] = run_order(kind, source, settings, (images, held_out, held_labels), seed)
            print(f"seed {seed}, {name}, {time.perf_counter() - start:.0f} s: {rows[name]}", flush=True)
            write_json(out, found)
    return found


def table(found: dict[str, Any]) -> str:
    """The means over the seeds, as Markdown."""
    lines = ["| order | layer error | top-1 | agreement | feature error |", "|---|---|---|---|---|"]
    for name in next(iter(found["seeds"].values())):
        rows = [seed[name] for seed in found["seeds"].values() if name in seed]
        cells = [plus_minus([row.get(key, 0.0) for row in rows]) for key in MEASURED]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plus_minus(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    print(table(run(Settings(), chosen.seeds, chosen.out)))

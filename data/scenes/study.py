"""A study: does a linearized DINOv2 keep its dense features at 1,369 and 5,476 tokens?

    python data/scenes/compose.py --pieces data/scenes/pieces --out SCENES
    python data/scenes/study.py prepare --scenes SCENES --weights dino.safetensors --work WORK --folds 0 1 2 3 4
    python data/scenes/study.py tune    … --folds 0 --trials usual half most        # recipes, from one calibration
    python data/scenes/study.py arms    … --folds 1 2 3 4 --arms t5 t5-last+-auto   # what the tables hold

`weights`: the state dict of timm's vit_small_patch14_dinov2 (t5lib.weights.dinov2_onnx reads it). Several processes may
work in one WORK folder at once, each on arms, trials or folds of its own. Results are written as they come.

A fold's models are fitted on the scenes of the other folds, without labels, at 518 px. They are measured on the fold's
own scenes at 518 px, at 1,036 px and on a part of 700 × 1,036 px. Recipes were chosen on fold 0, which no table holds.
"""

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from compose import Composed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import t5lib
from t5lib.data.sampler import Sampler
from t5lib.evaluation.dense import DenseSums, Probe, ProbeConfig, compare, fit_probe, gather_features
from t5lib.layers.config import TTTConfig
from t5lib.training.alignment import AlignConfig, align
from t5lib.training.calibration import CalibrateConfig, calibrate
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file, read_json, write_json
from t5lib.utils.seeds import numpy_generator

PATCH, FITTED = 14, 518  # pixels; the size of images that models are fitted on
VIEWS = 3  # keeps the random stream of crops and mirroring apart from others
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROBE = ProbeConfig(l2=1e-3)
PROBE_PATCHES = 500_000  # of the fitted folds, that a probe is fitted on
LATE = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10)  # all but layers 7 and 11, a rule made without measuring

AUTO: dict[str, Any] = {"layers": "auto", "softmax_layers": 2}
ARMS: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5-auto": AUTO,
    "t5-late": {"layers": LATE},
    "t5+-auto": {"preset": "t5+", **AUTO},
    "t5+-late": {"preset": "t5+", "layers": LATE},
    "t5-last": {"preset": "t5-last"},
    "t5-last-auto": {"preset": "t5-last", **AUTO},
    "t5-last+": {"preset": "t5-last+"},
    "t5-last+-auto": {"preset": "t5-last+", **AUTO},
    "learned+-auto": {"preset": "t5+", "neighborhood_share": "learned", **AUTO},
    "two_layer-auto": {"inner": "two_layer", **AUTO},
    "linear_proj_qk-auto": {"inner": "linear_proj_qk", **AUTO},
    "hedgehog-auto": {"preset": "hedgehog", **AUTO},
    "clear-auto": {"preset": "clear", **AUTO},
    "vit3-auto": {"preset": "vit3", "key_norm": "instance", **AUTO},
    "lit-auto": {"preset": "lit", "inherit": "all", **AUTO},
}
RECIPE: dict[str, Any] = {
    "features": "norm",
    "precision": "bf16",
    "damping": 0.75,
    "cosine": 2.0,
    "lr": 2e-4,
    "lr_new": 2e-3,
}
# What the trials change of the recipe.
TRIALS: dict[str, dict[str, Any]] = {
    "usual": {},
    "undamped": {"damping": 0.0, "lr": 3e-5, "lr_new": 3e-4},
    "half": {"damping": 0.5, "lr": 1e-4, "lr_new": 1e-3},
    "half-faster": {"damping": 0.5},
    "quarter": {"damping": 0.25, "lr": 1e-4, "lr_new": 1e-3},
    "steep": {"lr": 4e-4, "lr_new": 4e-3},
    "most": {"damping": 0.9, "lr": 3e-4, "lr_new": 3e-3},
    "alone": {"damping": 1.0, "lr": 3e-4, "lr_new": 3e-3},
    "muon": {"optimizer": "muon", "lr_new": 1e-3, "lr": 1e-4},
    "ema": {"ema": 0.999},
}


@dataclass(frozen=True)
class Size:
    """At which size scenes are looked at.

    Attributes:
        rows, columns: of patches.
        cell: pixels of a scene, squared, that a patch shows.
    """

    rows: int
    columns: int
    cell: int

    @property
    def name(self) -> str:
        height, width = self.rows * PATCH, self.columns * PATCH
        return str(height) if height == width else f"{height}x{width}"


class OutOfTime(Exception):
    """A training must end here, so that its model can still be measured."""


class Scenes:
    """The scenes of all folds, as bytes, on a device where there is one."""

    def __init__(self, composed: Composed, device: torch.device):
        self.composed, self.device = composed, device
        self.kinds = torch.from_numpy(composed.class_of_entity)
        self.side = composed.images(0).shape[1]
        self.read: dict[int, Tensor] = {}
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def sizes(self) -> list[Size]:
        """Half size, full size, and a part of it that is no square."""
        whole = self.side // PATCH
        return [
            Size(whole // 2, whole // 2, 2 * PATCH),
            Size(whole, whole, PATCH),
            Size(whole * 25 // 37, whole, PATCH),
        ]

    def images(self, fold: int) -> Tensor:
        """(n, 3, S, S) uint8; read once."""
        if fold not in self.read:
            whole = torch.from_numpy(np.array(self.composed.images(fold))).to(self.device)
            self.read[fold] = whole.permute(0, 3, 1, 2)
        return self.read[fold]

    def normalized(self, images: Tensor, cell: int) -> Tensor:
        """Bytes to what a model gets; scenes are shrunk where a patch shows more than its own pixels."""
        images = images.float()
        images = F.avg_pool2d(images, cell // PATCH) if cell > PATCH else images
        return (images / 255 - self.mean) / self.std

    def measured(self, fold: int, size: Size, batch: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The fold's (first `most`) scenes and what their patches show, once."""
        images, shown = self.images(fold)[:most], self.composed.cells(fold, size.cell)[:most]
        height, width = size.rows * size.cell, size.columns * size.cell
        for first in range(0, len(images), batch):
            part = images[first : first + batch, :, :height, :width]
            entities = shown[first : first + batch, : size.rows, : size.columns].astype(np.int64)
            yield self.normalized(part, size.cell), torch.from_numpy(entities)

    def probed(self, folds: list[int], size: Size, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each of these folds so many scenes that there are PROBE_PATCHES patches in all, or fewer."""
        most = max(1, PROBE_PATCHES // (size.rows * size.columns * len(folds)))
        for fold in folds:
            yield from self.measured(fold, size, batch, most)

    def fitted(
        self, folds: list[int], batch: int, seed: int, large: float = 0.0, varied: bool = False
    ) -> Callable[[int], Iterator[Tensor]]:
        """Endless batches at the size that models are fitted on: whole scenes, or parts of them.

        The share `large` of them is a quarter of the images in four times the size, which is as many patches. `varied`
        draws parts of any size, colours, and pieces of other images: every batch is new then.
        """
        side, places = self.side // 2, [(fold, i) for fold in folds for i in range(self.composed.counts[fold])]
        sampler = Sampler((len(places),), batch, seed)

        def from_batch(start: int) -> Iterator[Tensor]:
            for number in count(start):
                chosen = [places[index] for index in sampler(number)[1]]
                draw = numpy_generator(seed, VIEWS, number)
                whole = draw.random() < large
                part = torch.stack([self.images(f)[i] for f, i in (chosen[: max(1, batch // 4)] if whole else chosen)])
                if varied:
                    part = part if whole else resized_parts(part, side, draw)
                    yield self.normalized(mixed(recoloured(part, draw), draw), PATCH)
                    continue
                cell = PATCH if whole or draw.random() < 0.5 else 2 * PATCH
                if cell == PATCH and not whole:
                    y, x = draw.integers(0, self.side - side + 1, 2)
                    part = part[:, :, y : y + side, x : x + side]
                yield self.normalized(part.flip(-1) if draw.random() < 0.5 else part, cell)

        return from_batch


def resized_parts(images: Tensor, side: int, draw: np.random.Generator) -> Tensor:
    """Of each of the images (n, 3, S, S) a square part from `side` to S pixels, shrunk to `side`, perhaps mirrored."""
    parts = []
    for image in images.float():
        size = int(draw.integers(side, image.shape[-1] + 1))
        y, x = draw.integers(0, image.shape[-1] - size + 1, 2)
        part = F.interpolate(image[None, :, y : y + size, x : x + size], (side, side), mode="bilinear", antialias=True)
        parts.append(part.flip(-1) if draw.random() < 0.5 else part)
    return torch.cat(parts)


def recoloured(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Contrast, and the brightness of every channel, changed by up to a third, an image (n, 3, S, S) at a time."""
    count = len(images)
    contrast, gain = draw.uniform(2 / 3, 4 / 3, (count, 1, 1, 1)), draw.uniform(2 / 3, 4 / 3, (count, 3, 1, 1))
    contrast, gain = (torch.from_numpy(each).float().to(images.device) for each in (contrast, gain))
    images = images.float()
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((mean + (images - mean) * contrast) * gain).clamp(0, 255)


def mixed(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Every other time, a rectangle of each image (n, 3, S, S) is the next one's."""
    if draw.random() < 0.5:
        return images
    side = images.shape[-1]
    (top, bottom), (left, right) = np.sort(draw.integers(0, side + 1, (2, 2)), axis=1)
    images = images.clone()
    images[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    return images


class Study:
    """One process of the study."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.work = options, options.work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scenes = Scenes(Composed.read(options.scenes), self.device)
        self.weights = {name: tensor.float() for name, tensor in load_file(options.weights).items()}
        self.source = self.softmax()

    def softmax(self) -> nn.Module:
        model = timm.create_model("vit_small_patch14_dinov2", img_size=FITTED, num_classes=0, dynamic_img_size=True)
        model.load_state_dict(self.weights)
        return model.to(self.device).eval()

    def others(self, fold: int) -> list[int]:
        return [each for each in range(len(self.scenes.composed.counts)) if each != fold]

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    def at_once(self, size: Size) -> int:
        """Images a forward pass when nothing is trained."""
        return max(1, 32 * 37 * 37 // (size.rows * size.columns))

    def fit_probe_of(self, model: nn.Module, fold: int, size: Size, config: ProbeConfig = PROBE) -> Probe:
        batches = self.scenes.probed(self.others(fold), size, self.at_once(size))
        features, entities = gather_features(model, batches, self.precision)
        classes = len(self.scenes.composed.classes)
        return fit_probe(features, self.scenes.kinds.to(self.device)[entities], classes, config)

    def source_probe(self, fold: int, size: Size) -> Probe:
        """That of the softmax model; kept in the working folder."""
        file = self.work / f"probe-{fold}-{size.name}.safetensors"
        if not file.exists():
            probe = self.fit_probe_of(self.source, fold, size)
            with atomic_file(file) as temporary:
                save_file({name: tensor.cpu() for name, tensor in vars(probe).items()}, temporary)
        return Probe(**{name: tensor.to(self.device) for name, tensor in load_file(file).items()})

    def measure(self, student: nn.Module, fold: int, own_probes: bool = True) -> dict[str, DenseSums]:
        """By size."""
        sums = {}
        for size in self.scenes.sizes():
            sums[size.name] = compare(
                self.source,
                student,
                self.scenes.measured(fold, size, self.at_once(size)),
                probe=self.source_probe(fold, size),
                own_probe=self.fit_probe_of(student, fold, size) if own_probes else None,
                class_of_entity=self.scenes.kinds,
                precision=self.precision,
            )
        return sums

    def write(self, name: str, record: dict[str, Any], sums: dict[str, dict[str, DenseSums]]) -> None:
        """`record` and what was measured, by stage and size, as JSON; the sums themselves beside it."""
        record["measured"] = {
            stage: {
                size: {n: v.item() for n, v in each.measures().items() if n != "own_probe_miou" or stage == "aligned"}
                for size, each in sizes.items()
            }
            for stage, sizes in sums.items()
        }
        write_json(self.work / f"{name}.json", record)
        arrays = {
            f"{stage}/{size}/{part}": getattr(each, part).numpy().astype(np.int32 if part != "cosine" else np.float64)
            for stage, sizes in sums.items()
            for size, each in sizes.items()
            for part in vars(each)
        }
        with open(self.work / f"{name}.npz", "wb") as file:
            np.savez_compressed(file, **arrays)
        stage, sizes = list(record["measured"].items())[-1]
        for size, each in sizes.items():
            print(name, stage, size, ", ".join(f"{n} {value:.3f}" for n, value in each.items()), flush=True)

    def recipe(self) -> dict[str, Any]:
        """What the file says, once it is there; another process may be about to choose it."""
        file = self.options.recipe_file
        while file and not file.exists():
            time.sleep(1)
        return read_json(file) if file else {}

    def late(self, seconds: float) -> bool:
        """Whether that long is more than what is left."""
        return bool(self.options.until) and time.time() + seconds > self.options.until


def prepare(study: Study) -> None:
    """The source's probes, what the source reaches, and how far it is from itself on mirrored scenes."""
    for fold in study.options.folds:
        begun = time.monotonic()
        sums = {
            "source": study.measure(study.source, fold, own_probes=False),
            "mirrored": study.measure(mirrored(study.source), fold, own_probes=False),
        }
        study.write(f"source-{fold}", {"fold": fold, "seconds": time.monotonic() - begun}, sums)


def mirrored(model: nn.Module) -> nn.Module:
    """A copy that sees every image mirrored and gives its features mirrored back: what a change that no one would call
    a change does to predictions."""
    model = copy.deepcopy(model)
    features, first = model.forward_features, model.num_prefix_tokens

    def forward_features(images: Tensor) -> Tensor:
        tokens = features(images.flip(-1))
        patches = tokens[:, first:].unflatten(1, (images.shape[-2] // PATCH, images.shape[-1] // PATCH))
        return torch.cat([tokens[:, :first], patches.flip(2).flatten(1, 2)], dim=1)

    model.forward_features = forward_features
    return model


def calibrated(study: Study, arm: str, fold: int) -> tuple[nn.Module, dict[str, Any]]:
    """The arm's model after calibration; it is kept in the working folder."""
    options, name = study.options, f"{arm}-{fold}-{study.options.seed}"
    config = TTTConfig(**TTTConfig.expand({"seed": options.seed, **ARMS[arm]}))
    file = study.work / f"calibrated-{name}.safetensors"
    if file.exists():
        record = read_json(file.with_suffix(".json"))
        config = dataclasses.replace(config, layers=record["layers"], softmax_layers=0)
        student = t5lib.convert(study.softmax(), config)
        student.load_state_dict(load_file(file))
        return student, record
    student = t5lib.convert(study.softmax(), config)
    # Not compiled: in so few steps that does not pay.
    recipe = CalibrateConfig(steps=options.calibrate, batch_size=options.batch, seed=options.seed)
    batches = study.scenes.fitted(study.others(fold), options.batch, 2 * options.seed, varied=options.varied)
    report = calibrate(student, teacher=study.source, batches=batches, config=recipe)
    record = {
        "seconds": report.seconds,
        "steps": report.steps,
        "error": report.error_after,
        "layers": student.t5_config.layers,
        "softmax": report.softmax and dataclasses.asdict(report.softmax),
    }
    write_json(file.with_suffix(".json"), record)
    with atomic_file(file) as temporary:
        save_file(student.state_dict(), temporary)
    print("calibrated", name, {n: round(v, 4) for n, v in report.error_after.items()}, flush=True)
    return student, record


def aligned(study: Study, student: nn.Module, fold: int, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Align `student`, in place; what is told of it."""
    options, curve = study.options, []
    recipe = RECIPE | {"precision": study.precision, "compile": options.compile, "seed": options.seed} | changes
    config = AlignConfig(steps=steps, batch_size=options.batch, **recipe)
    # Other batches than those of the calibration.
    batches = study.scenes.fitted(
        study.others(fold), options.batch, 2 * options.seed + 1, options.large, options.varied
    )

    def log(values: dict[str, float], step: int) -> None:
        curve.append([step, values["loss"], values["grad_norm"]])
        if study.late(options.spare):
            raise OutOfTime

    told = {"recipe": dataclasses.asdict(config), "broken_off": False}
    try:
        report = align(student, teacher=study.source, batches=batches, config=config, log=log)
        told |= {"seconds": report.seconds, "error_before": report.error_before, "error_after": report.error_after}
    except OutOfTime:
        told["broken_off"] = True
    student.eval()
    return told | {"steps": len(curve), "loss": _means(curve, 1), "grad_norm": _means(curve, 2)}


def _means(curve: list[list[float]], column: int, width: int = 25) -> list[float]:
    """Means of so many steps each."""
    values = [row[column] for row in curve]
    return [round(float(np.mean(values[first : first + width])), 5) for first in range(0, len(values), width)]


def tune(study: Study) -> None:
    """Recipes of alignment on one fold, each from the same calibrated model."""
    options, longest = study.options, 0.0
    [fold] = options.folds
    for trial in options.trials:
        if study.late(1.1 * longest):
            print("no time for", trial, flush=True)
            continue
        begun = time.monotonic()
        student, _ = calibrated(study, options.arm, fold)
        told = aligned(study, student, fold, TRIALS[trial], options.align)
        print(trial, told["steps"], "steps, loss", told["loss"], "norm", told["grad_norm"], flush=True)
        sums = study.measure(student, fold, own_probes=False)
        study.write(f"trial-{trial}", {"trial": trial, "fold": fold, "aligned": told}, {"aligned": sums})
        longest = max(longest, time.monotonic() - begun)


def arms(study: Study) -> None:
    """Every arm on every fold: calibrated, measured, aligned, measured."""
    options, longest = study.options, 0.0
    for fold in options.folds:
        for arm in options.arms:
            if study.late(1.05 * longest):
                print("no time for", arm, fold, flush=True)
                continue
            begun, name = time.monotonic(), f"arm-{arm}-{fold}-{options.seed}"
            student, told = calibrated(study, arm, fold)
            record = {"arm": arm, "fold": fold, "seed": options.seed, "calibrated": told}
            sums = {"calibrated": study.measure(student, fold, own_probes=False)}
            study.write(name, record, sums)
            record["aligned"] = aligned(study, student, fold, study.recipe(), options.align)
            loss = record["aligned"]["loss"]
            print(name, record["aligned"]["steps"], "steps, loss", loss[:4], "…", loss[-4:], flush=True)
            sums["aligned"] = study.measure(student, fold)
            study.write(name, record, sums)
            if options.pictures:
                save_maps(study, student, name, fold)
            longest = max(longest, time.monotonic() - begun)


def save_maps(study: Study, student: nn.Module, name: str, fold: int, scenes: int = 6) -> None:
    """What the source and the student predict on some scenes of the fold in full size, for the picture of the page."""
    from t5lib.evaluation.dense import patch_features

    size = study.scenes.sizes()[1]
    probe, maps = study.source_probe(fold, size), {"source": [], "student": [], "truth": []}
    for images, shown in study.scenes.measured(fold, size, 2, scenes):
        for which, model in (("source", study.source), ("student", student)):
            maps[which].append(probe.predict(patch_features(model, images, study.precision)).cpu())
        maps["truth"].append(study.scenes.kinds[shown])
    arrays = {which: torch.cat(parts).numpy().astype(np.uint8) for which, parts in maps.items()}
    np.savez_compressed(study.work / f"maps-{name}.npz", **arrays)


def choose(options: argparse.Namespace) -> None:
    """Write the recipe of the trial that keeps most: mean mIoU against the source's predictions over all sizes."""
    records = [read_json(file) for file in sorted(options.work.glob("trial-*.json"))]
    if not records:
        raise T5Error(f"{options.work} holds no trial; run 'tune' first")
    best = max(records, key=_kept)
    for record in sorted(records, key=_kept):
        print(record["trial"], round(_kept(record), 2), "loss", record["aligned"]["loss"][-1], flush=True)
    write_json(options.recipe_file, TRIALS[best["trial"]])


def _kept(record: dict[str, Any]) -> float:
    return float(np.mean([each["fidelity_miou"] for each in record["measured"]["aligned"].values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "tune", "choose", "arms"))
    for name in ("scenes", "work", "weights"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--arm", default="t5-last+-auto", choices=list(ARMS), help="that trials are made with")
    parser.add_argument("--calibrate", type=int, default=1500, help="steps")
    parser.add_argument("--align", type=int, default=3500, help="steps")
    parser.add_argument("--recipe-file", type=Path, help="changes of the alignment's settings; waited for")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--large", type=float, default=0.2, help="share of the alignment's steps at full size")
    parser.add_argument(
        "--varied",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="new parts, colours and mixtures of scenes in every step",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="the alignment")
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--spare", type=float, default=30, help="seconds of them that measuring takes")
    parser.add_argument("--until", type=float, help="seconds since 1970 by which to end")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "choose":
        choose(options)
        return
    {"prepare": prepare, "tune": tune, "arms": arms}[options.what](Study(options))


if __name__ == "__main__":
    main()

"""A study: does a linearized DINOv2 keep its dense features at 1,369 and 5,476 tokens?

    python data/scenes/compose.py --pieces data/scenes/pieces --out SCENES
    python data/scenes/study.py prepare --scenes SCENES --weights dino.safetensors --work WORK --folds 0 1 2 3 4
    python data/scenes/study.py tune    … --folds 0 --trials usual half most        # recipes, from one calibration
    python data/scenes/study.py arms    … --folds 1 2 3 4 --arms t5 t5-last+-auto   # what the tables hold
    python data/scenes/tables.py …                                                  # makes them

`weights`: the state dict of timm's vit_small_patch14_dinov2 (t5lib.weights.dinov2_onnx reads it). With `--decoder`, the
state dict of t5lib.weights.focus_decoder, heat maps are compared too. Several processes may work in one WORK folder at
once, each on arms, trials or folds of its own. Results are written as they come.

A fold's models are fitted on the scenes of the other folds, without labels, at 518 px. They are measured on the fold's
own scenes at 518 px, at 1,036 px and on a part of 700 × 1,036 px. Recipes were chosen on fold 0, which no table holds.
"""

import argparse
import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from compose import Composed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from views import PATCH, Scenes, Size

import t5lib
from t5lib.evaluation.dense import DenseSums, Probe, ProbeConfig, compare, fit_probe, gather_features
from t5lib.evaluation.focus import compare_focus
from t5lib.families import family_of
from t5lib.families.inputs import placed
from t5lib.layers.config import TTTConfig
from t5lib.training.alignment import AlignConfig, align
from t5lib.training.calibration import CHOICE_BATCHES, CalibrateConfig, calibrate
from t5lib.training.softmax_layers import put_softmax_back
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file, read_json, write_json
from t5lib.weights.focus_decoder import FocusDecoder

FITTED = 518  # pixels; the size of images that models are fitted on
PROBE = ProbeConfig(l2=1e-3)
OWN = "own_probe_miou"  # of a probe that was fitted on the student's own features
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
    "linear_proj_qk+": {"preset": "linear+"},
    "linear_proj_qk+-auto": {"preset": "linear+", **AUTO},
    "linear_proj_qk+learned-auto": {"preset": "linear+", "neighborhood_share": "learned", **AUTO},
    "hedgehog-auto": {"preset": "hedgehog", **AUTO},
    "clear-auto": {"preset": "clear", **AUTO},
    "vit3-auto": {"preset": "vit3", "key_norm": "instance", **AUTO},
    "lit-auto": {"preset": "lit", "inherit": "all", **AUTO},
}
# What the trials change of the library's own recipe, which won.
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


class OutOfTime(Exception):
    """A training must end here, so that its model can still be measured."""


class Study:
    """One process of the study."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.work = options, options.work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scenes = Scenes(Composed.read(options.scenes), self.device)
        self.weights = {name: tensor.float() for name, tensor in load_file(options.weights).items()}
        self.source = self.softmax()
        self.decoder = FocusDecoder().to(self.device).eval() if options.decoder else None
        if self.decoder:
            decoder = load_file(options.decoder)
            self.decoder.load_state_dict({name: each.float() if each.ndim else each for name, each in decoder.items()})

    def softmax(self) -> nn.Module:
        model = timm.create_model("vit_small_patch14_dinov2", img_size=FITTED, num_classes=0, dynamic_img_size=True)
        model.load_state_dict(self.weights)
        return model.to(self.device).eval()

    def others(self, fold: int) -> list[int]:
        return [each for each in range(len(self.scenes.composed.counts)) if each != fold]

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def at_once(self, size: Size) -> int:
        """Images a forward pass when nothing is trained."""
        return max(1, 32 * 37 * 37 // (size.rows * size.columns))

    def fit_probe_of(self, model: nn.Module, fold: int, size: Size, config: ProbeConfig = PROBE) -> Probe:
        batches = self.scenes.probed(self.others(fold), size, self.at_once(size))
        features, entities = gather_features(model, batches, self.precision)
        classes = len(self.scenes.composed.classes)
        return fit_probe(features, self.scenes.kinds.to(self.device)[entities], classes, config)

    def source_probe(self, fold: int, size: Size) -> Probe:
        """The probe of the softmax model; it is kept in the working folder."""
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

    def focus(self, student: nn.Module, fold: int) -> dict[str, dict[str, float]] | None:
        """By size, how far heat maps are from the source's."""
        if self.decoder is None:
            return None
        return {
            size.name: compare_focus(
                self.source,
                student,
                self.decoder,
                self.scenes.measured(fold, size, self.at_once(size)),
                self.precision,
            )
            for size in self.scenes.sizes()
        }

    def write(
        self, name: str, record: dict[str, Any], sums: dict[str, dict[str, DenseSums]], own_probes: bool = False
    ) -> None:
        """`record` and what was measured, by stage and size, as JSON; the sums themselves beside it.

        `own_probes`: whether probes were fitted on the features of the aligned student.
        """
        record["own_probes"] = own_probes
        record["measured"] = {
            stage: {
                size: {
                    n: v.item() for n, v in each.measures().items() if n != OWN or (own_probes and stage == "aligned")
                }
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
        focus = study.focus(mirrored(study.source), fold)
        study.write(f"source-{fold}", {"fold": fold, "seconds": time.monotonic() - begun, "focus": focus}, sums)


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
    """The arm's model after calibration, and what is reported of it."""
    settings = ARMS[arm] | {"seed": study.options.seed}
    softmax_layers = settings.pop("softmax_layers", 0)
    if softmax_layers:  # arms that differ in what is put back share one calibration of all layers
        del settings["layers"]
    student, record = _fitted(study, arm.removesuffix("-auto"), TTTConfig(**TTTConfig.expand(settings)), fold)
    if softmax_layers:
        begun, family = time.monotonic(), family_of(student)
        batches = study.scenes.fitted(study.others(fold), study.options.batch, 2 * study.options.seed)(0)
        inputs = [placed(family.inputs(next(batches)), study.device, torch.float32) for _ in range(CHOICE_BATCHES)]
        choice = put_softmax_back(student, study.source, inputs, softmax_layers, study.autocast)
        record |= {"choosing_seconds": time.monotonic() - begun, "softmax": dataclasses.asdict(choice)}
    return student, record | {"layers": student.t5_config.layers}


def _fitted(study: Study, name: str, config: TTTConfig, fold: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose layers are calibrated; it is kept in the working folder."""
    options, student = study.options, t5lib.convert(study.softmax(), config)
    file = study.work / f"calibrated-{name}-{fold}-{options.seed}.safetensors"
    if file.exists():
        student.load_state_dict(load_file(file))
        return student, read_json(file.with_suffix(".json"))
    # Not compiled: in so few steps that does not pay.
    recipe = CalibrateConfig(steps=options.calibrate, batch_size=options.batch, seed=options.seed)
    batches = study.scenes.fitted(study.others(fold), options.batch, 2 * options.seed, varied=options.varied)
    report = calibrate(student, teacher=study.source, batches=batches, config=recipe)
    record = {"seconds": report.seconds, "steps": report.steps, "error": report.error_after}
    write_json(file.with_suffix(".json"), record)
    with atomic_file(file) as temporary:
        save_file(student.state_dict(), temporary)
    print("calibrated", file.stem, {n: round(v, 4) for n, v in report.error_after.items()}, flush=True)
    return student, record


def aligned(study: Study, student: nn.Module, fold: int, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Align `student`, in place, and return what is reported of it."""
    options, curve = study.options, []
    cost = {"precision": study.precision, "compile": options.compile, "graphs": options.graphs}
    recipe = cost | {"seed": options.seed} | changes
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
    """Every arm on every fold: calibrated, measured (unless brief), aligned, measured."""
    options, longest = study.options, 0.0
    for fold in options.folds:
        for arm in options.arms:
            if study.late(1.05 * longest):
                print("no time for", arm, fold, flush=True)
                continue
            begun, name = time.monotonic(), f"arm-{arm}-{fold}-{options.seed}"
            student, told = calibrated(study, arm, fold)
            record = {"arm": arm, "fold": fold, "seed": options.seed, "calibrated": told}
            sums = {}
            if not options.brief:
                sums["calibrated"] = study.measure(student, fold, own_probes=False)
                study.write(name, record, sums)
            record["aligned"] = aligned(study, student, fold, study.recipe(), options.align)
            loss = record["aligned"]["loss"]
            print(name, record["aligned"]["steps"], "steps, loss", loss[:4], "…", loss[-4:], flush=True)
            sums["aligned"] = study.measure(student, fold, own_probes=not options.brief)
            record["focus"] = study.focus(student, fold)
            study.write(name, record, sums, own_probes=not options.brief)
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
    for name in ("scenes", "work", "weights", "decoder"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--arm", default="t5-last+-auto", choices=list(ARMS), help="arm that trials are made with")
    parser.add_argument("--calibrate", type=int, default=1500, help="steps")
    parser.add_argument("--align", type=int, default=3500, help="steps")
    parser.add_argument("--recipe-file", type=Path, help="file of changes to the alignment's settings, waited for")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--large", type=float, default=0.2, help="share of the alignment's steps at full size")
    parser.add_argument(
        "--varied",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="new parts, colours and mixtures of scenes in every step",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="the alignment's blocks (default: not)")
    parser.add_argument(
        "--graphs", action="store_true", help="record the alignment's passes as CUDA graphs (default: not)"
    )
    parser.add_argument("--brief", action="store_true", help="measure aligned models alone, by the source's probe")
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--spare", type=float, default=30, help="seconds to keep for measuring")
    parser.add_argument("--until", type=float, help="time by which to end, in seconds since 1970")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "choose":
        choose(options)
        return
    {"prepare": prepare, "tune": tune, "arms": arms}[options.what](Study(options))


if __name__ == "__main__":
    main()

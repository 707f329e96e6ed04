"""`t5 plan`: what converting would gain on this device, and which layers to convert for a wanted speed."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t5lib
from t5lib.cli import models
from t5lib.cli.arguments import Source
from t5lib.cli.converting import CHECKPOINT_EVERY, FEW_IMAGES
from t5lib.cli.images import CalibrationImages, ImageReader
from t5lib.cli.screen import console, counted, facts, note, notes, say, table
from t5lib.conversion import convert
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize
from t5lib.layers.config import SOFTMAX, TTTConfig
from t5lib.layers.layer_map import format_layers
from t5lib.planning.cost_model import MODES, Plan, PlanConfig, Timing, plan, settings_of
from t5lib.planning.layer_search import Outcome, hybrid, layer_text, measure, scan, select
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json
from t5lib.utils.progress import progress

MOST_SCANNED = 256
BUSY = 0.15  # typical passes that take so much longer than the fastest ones: something else is at work
READ_AT_ONCE = 16
LOSSES = {
    "kl": "Kullback-Leibler divergence from the softmax model's predictions",
    "cosine": "1 − cosine of the features with the softmax model's",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is planned, and, given images, what speed layers are chosen for.

    Attributes:
        kinds: new layers to consider, values of a layer map.
        batch: images a pass that is timed.
        speedup, budget_ms: one of them, given images.
        calibrate: settings for CalibrateConfig that were given.
        out: folder for the hybrid.
        seed: of the new weights, the order of the images and their split.
    """

    source: Source
    resolution: int
    kinds: tuple[str, ...]
    batch: int
    images: Sequence[Path]
    speedup: float | None
    budget_ms: float | None
    calibrate: dict[str, Any]
    out: Path | None
    seed: int
    device: str | None


def run(request: Request) -> None:
    """Measure and print; given images, choose the layers, and given `out`, save the hybrid there."""
    place = models.choose_device(request.device)
    for kind in request.kinds:
        TTTConfig().named(kind)
    recipe = CalibrateConfig(seed=request.seed, checkpoint_every=CHECKPOINT_EVERY, **request.calibrate)
    outline = models.outline(request.source)
    family_of(outline).at_resolution(outline, ExampleSize(request.resolution))  # refuses before weights are fetched
    softmax = _load(request, place)
    note("timing; compiling on a GPU takes minutes" if place.type == "cuda" else "timing; leave the machine idle")
    found = plan(softmax, request.resolution, place, request.kinds, PlanConfig(batch=request.batch), on_timing=_tell)
    _print_plan(request.source.name, found)
    if found.unrest > BUSY:
        note(f"the machine is busy: a typical pass took up to {100 * found.unrest:.0f}% longer than the fastest")
    if request.images:
        _choose(request, found, softmax, recipe)


def _load(request: Request, place: torch.device) -> nn.Module:
    size = (request.resolution, request.resolution)
    source = dataclasses.replace(request.source, img_size=size)
    if not request.images and not source.folder:  # time does not depend on weights: fetch none
        source = Source(name=source.name, pretrained=False, img_size=size)
    return models.load(source, place)


def _tell(timing: Timing) -> None:
    blocks = ", ".join(f"{kind} {ms:.3g}" for kind, ms in timing.block_ms.items())
    note(f"{timing.resolution} px, {timing.tokens:,} tokens: ms a block: {blocks}; all else {timing.rest_ms:.3g}")


def _print_plan(name: str, found: Plan) -> None:
    timing = found.timing
    say(
        f"{name} at {found.resolution} px ({timing.tokens:,} tokens), {counted(found.config.batch, 'image')} a pass, "
        f"on {found.device}: {found.dtype}, {MODES[found.mode]}."
    )
    rows = [("none (softmax)", *_speed(found, found.uniform(SOFTMAX)))]
    for kind in found.kinds:
        for count in sorted({found.depth, *(round(found.depth * share) for share in (0.75, 0.5, 0.25))} - {0})[::-1]:
            which = f"all {found.depth}" if count == found.depth else f"any {count} of {found.depth}"
            layers = [kind] * count + [SOFTMAX] * (found.depth - count)
            rows.append((f"{which} {kind}", *_speed(found, layers)))
    table(("layers converted", "predicted ms", "speed-up"), rows)
    even = {kind: found.break_even(kind) for kind in found.kinds}
    largest = found.timings[-1].resolution
    facts(
        (f"break-even of {kind}", _break_even(found, tokens) if tokens else f"none up to {largest:,} px")
        for kind, tokens in even.items()
    )
    console.print()
    say(found.verdict())
    say(
        "All blocks take the same time, so it makes no difference to the time which of them are converted. It does to "
        "the quality, which --images FOLDER --speedup X measures. "
        f"Outputs were checked against float64 (at most {_largest_error(found):.1e} off)."
    )
    _print_modes(found)


def _print_modes(found: Plan) -> None:
    softmax = found.uniform(SOFTMAX)
    rows = [
        (MODES[mode], kind, f"{found.milliseconds(softmax, timing):.4g}", *_speed(found, found.uniform(kind), timing))
        for mode, timing in found.modes.items()
        for kind in found.kinds
    ]
    table(("how you run it", "all layers", "softmax ms", "converted ms", "speed-up"), rows)
    if advice := found.advice():
        say(advice)


def _largest_error(found: Plan) -> float:
    return max(max(timing.relative_error.values()) for timing in found.modes.values())


def _break_even(found: Plan, tokens: int) -> str:
    below = "the smallest size measured" if tokens == found.timings[0].tokens else "about"
    return f"{below} {found.side(tokens):,} px ({tokens:,} tokens)"


def _speed(found: Plan, assignment: Sequence[str], timing: Timing | None = None) -> tuple[str, str]:
    return f"{found.milliseconds(assignment, timing):.4g}", f"{found.speedup(assignment, timing):.2f}x"


def _choose(request: Request, found: Plan, softmax: nn.Module, recipe: CalibrateConfig) -> None:
    """Calibrate every kind, scan, solve, print, and save the hybrid."""
    budget = found.block_budget(speedup=request.speedup, budget_ms=request.budget_ms)
    if budget >= sum(row[SOFTMAX] for row in found.block_costs()):
        raise T5Error(
            f"softmax in every layer takes {found.milliseconds(found.uniform(SOFTMAX)):.4g} ms, which is within the "
            "budget: there is nothing to convert"
        )
    reader = ImageReader.of(softmax)
    fitted, scanned = _split(request.images, request.seed)
    note(f"{counted(len(fitted), 'image')} to calibrate on, {len(scanned)} to scan on: {reader.description}")
    if len(request.images) < FEW_IMAGES:
        note(f"few images: the choice may suit these and no others; use {FEW_IMAGES} or more of your own data")
    partial = request.out.parent / f".{request.out.name}.partial" if request.out else None
    batches = CalibrationImages(fitted, reader, recipe.batch_size, request.seed)
    calibrated = {}
    for kind in found.kinds:
        calibrated[kind] = convert(softmax, dataclasses.replace(settings_of(kind), seed=request.seed))
        folder = partial / _fingerprint(request, recipe, kind, softmax) if partial else None
        note(f"calibrating {kind}")
        t5lib.calibrate(calibrated[kind], teacher=softmax, batches=batches, config=recipe, resume_dir=folder)
    images = [images.cpu() for images in _read(reader, scanned)]
    reader.report()
    precision = "bf16" if next(softmax.parameters()).is_cuda else "fp32"
    with progress("scan", sum(map(len, images))) as bar:
        scanned_table = scan(softmax, calibrated, images, precision=precision, on_batch=bar.advance)
    with notes.status("measuring the best maps as whole models"):
        increase, costs = scanned_table["increase"], found.block_costs()
        (chosen,) = select(softmax, calibrated, increase, costs, [budget], images, precision=precision)
        outcome = measure(softmax, calibrated, [chosen], images, precision=precision)[tuple(chosen)]
    _print_choice(found, scanned_table, chosen, outcome)
    if request.out:
        _save(request.out, hybrid(softmax, calibrated, chosen), found, scanned_table, chosen)
    if partial:
        shutil.rmtree(partial, ignore_errors=True)


def _split(images: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """(to calibrate on, to scan on), at random; at most a fifth is for the scan."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    scanned = max(1, min(MOST_SCANNED, len(images) // 5))
    return [images[index] for index in order[scanned:]], [images[index] for index in order[:scanned]]


def _read(reader: ImageReader, paths: Sequence[Path]) -> list[Tensor]:
    """Raises T5Error when not one of them can be read."""
    parts = [paths[start : start + READ_AT_ONCE] for start in range(0, len(paths), READ_AT_ONCE)]
    found = [torch.stack(images) for part in parts if (images := reader.readable(part))]
    return found or [reader.read(paths)]


def _print_choice(found: Plan, scanned: Mapping[str, Any], chosen: Sequence[str], outcome: Outcome) -> None:
    rows = [
        (str(layer), *(f"{row[kind]:.2g} ± {error[kind]:.1g}" for kind in found.kinds), chosen[layer])
        for layer, (row, error) in enumerate(zip(scanned["increase"], scanned["standard_error"], strict=True))
    ]
    console.print()
    say(f"What each layer costs when it alone is converted: {LOSSES[scanned['loss']]}, {scanned['images']} images.")
    table(("layer", *found.kinds, "chosen"), rows)
    said = outcome.as_dict()
    agreement = f", same top class for {said['agreement']:.1f}% of the images" if "agreement" in said else ""
    facts(
        [
            ("predicted", "{} ms a pass, {} as fast as softmax".format(*_speed(found, chosen))),
            ("as a whole", f"loss {said['loss']:.2g}{agreement} (the images it was chosen on)"),
            ("t5 convert", f'--layers "{layer_text(chosen)}"'),
            ("params.yaml", f"layers: {json.dumps(format_layers(list(chosen)))}"),
        ]
    )


def _save(out: Path, model: nn.Module, found: Plan, scanned: Mapping[str, Any], chosen: Sequence[str]) -> None:
    t5lib.save(model, out)
    choice = {"layers": format_layers(list(chosen)), "predicted_ms": found.milliseconds(chosen)}
    write_json(out / "plan.json", {"plan": found.as_dict(), "scan": scanned, "chosen": choice})
    facts([("saved to", str(out)), ("load it", f'import t5lib; model = t5lib.load("{out}")')])


def _fingerprint(request: Request, recipe: CalibrateConfig, kind: str, softmax: nn.Module) -> str:
    """Stands for all that a calibration follows from; speeds and budgets are none of it."""
    weights = [parameter.double().sum().item() for parameter in softmax.parameters()]
    about = {name: asdict(request)[name] for name in ("source", "resolution", "images", "seed")}
    whole = {"about": about, "recipe": to_dict(recipe), "kind": kind, "weights": weights}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:12]

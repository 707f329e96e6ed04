"""`t5 convert`: linear-cost attention for a softmax model, fitted to it on a user's own images, saved as a folder."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import t5lib
from t5lib.cli import models
from t5lib.cli.arguments import Source
from t5lib.cli.images import CalibrationImages
from t5lib.cli.screen import console, counted, facts, note, ranges, say, table
from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.training.calibration import CalibrateConfig, CalibrationReport
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error

FEW_IMAGES = 500
CHECKPOINT_EVERY = 100  # steps; on a CPU a step takes a second, and an interruption must not cost more than minutes


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, how, and where to.

    Attributes:
        images: to calibrate on; none: no calibration.
        t5, calibrate: settings for TTTConfig and CalibrateConfig that were given.
        seed: of the new weights and the order of the images.
    """

    source: Source
    out: Path
    images: Sequence[Path]
    t5: dict[str, Any]
    calibrate: dict[str, Any]
    seed: int
    device: str | None


def run(request: Request) -> None:
    """Convert, calibrate if there are images, save, and print the account."""
    config = TTTConfig(**TTTConfig.expand({"seed": request.seed, **request.t5}))
    recipe = CalibrateConfig(seed=request.seed, checkpoint_every=CHECKPOINT_EVERY, **request.calibrate)
    place = models.choose_device(request.device)
    t5lib.convert(models.outline(request.source), config, inplace=True)  # refuses before weights are fetched
    if config.softmax_layers and not request.images:
        raise T5Error("layers 'auto' are chosen after calibration; add --calibrate FOLDER")
    teacher = models.load(request.source, place)
    model = t5lib.convert(teacher, config)
    partial = request.out.parent / f".{request.out.name}.partial"
    report = _calibrate(model, teacher, request, recipe, partial) if request.images else None
    t5lib.save(model, request.out)
    shutil.rmtree(partial, ignore_errors=True)
    if report:
        _print_errors(report)
    _print_account(model, request, fitted_along=bool(report and recipe.lr_inherited))


def _calibrate(
    model: nn.Module, teacher: nn.Module, request: Request, recipe: CalibrateConfig, partial: Path
) -> CalibrationReport:
    reader = models.reader(request.source, teacher)
    batches = CalibrationImages(request.images, reader, recipe.batch_size, request.seed)
    fitted, held_out = counted(len(batches.rest), "image"), len(batches.held_out)
    note(f"{fitted} to fit on, {held_out} to measure on: {reader.description}")
    if len(request.images) < FEW_IMAGES:
        note(f"few images: the layers may fit these and no others; use {FEW_IMAGES} or more of your own data")
    folder = partial / _fingerprint(request, recipe, teacher)
    if folder.exists():
        note("resuming an earlier run of the same command")
    try:
        return t5lib.calibrate(model, teacher=teacher, batches=batches, config=recipe, resume_dir=folder)
    except KeyboardInterrupt:
        kept = "the same command resumes from the last checkpoint" if folder.exists() else "there is no checkpoint yet"
        note(f"\nstopped: nothing is written to {request.out}; {kept}")
        raise
    finally:
        reader.report()


def _fingerprint(request: Request, recipe: CalibrateConfig, teacher: nn.Module) -> str:
    """Stands for everything that the result follows from: partial work of another request must not be gone on with."""
    weights = [parameter.double().sum().item() for parameter in teacher.parameters()]
    whole = {"request": asdict(request), "recipe": to_dict(recipe), "weights": weights}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _print_errors(report: CalibrationReport) -> None:
    before, after = report.error_before, report.error_after
    rows = [(layer, f"{before[layer]:.3f}", f"{after[layer]:.3f}") for layer in before]
    means = [sum(errors.values()) / len(errors) for errors in (before, after)]
    table(("layer", "error before", "after"), [*rows, ("mean", *(f"{mean:.3f}" for mean in means))])
    say(
        f"{report.steps} steps, {report.seconds:.0f} s. Error: squared difference to the softmax layer's output over "
        "its variance, on images not fitted on. 0 is the same output, 1 no better than a constant; a well calibrated "
        "model has 0.02 to 0.15. " + _advice(means[1])
    )
    if choice := report.softmax:
        left = choice.error_with[-1][choice.layers[-1]]
        say(
            f"Softmax is back in {', '.join(choice.layers)}: the error of the model's features and output fell from "
            f"{choice.error:.3f} to {left:.3f} of their variance."
        )
    console.print()


def _advice(error: float) -> str:
    if error < 0.15:
        return "This one is: use it as it is, or fine-tune it for the last points (t5lib.train)."
    return "This one is not there yet: take more --steps or more images, then fine-tune (t5lib.train)."


def _print_account(model: nn.Module, request: Request, *, fitted_along: bool) -> None:
    account, family = model.t5_report, family_of(model)
    names = family.attention_names(model)
    layers, total = [names.index(name) for name in account.layers], len(names)
    inherited, new, dropped, reset = (account.numbers[name] for name in ("inherited", "new", "dropped", "reset"))
    facts(
        [
            ("converted", f"{len(layers)} of {total} attention layers ({ranges(layers)}) of {request.source.name}"),
            ("inherited", f"{inherited:,} numbers, " + ("q, k, v fitted too" if fitted_along else "as they were")),
            ("new", f"{new:,} numbers ({100 * new / (inherited + new):.1f}%)"),
            ("dropped", f"{dropped:,} numbers"),
            *([("started afresh", f"{reset:,} numbers, at random")] if reset else []),
            ("saved to", str(request.out)),
            ("load it", f'import t5lib; model = t5lib.load("{request.out}")'),
            *([("look at it", f"t5 inspect {request.out}")] if family.package == "timm" else []),
        ]
    )
    if not request.images:
        console.print()
        say(
            "Not calibrated: the new layers are random, so a classifier is at chance level. Fit them to the softmax "
            "layers with --calibrate FOLDER (images of your own data, no labels), or fine-tune (t5lib.train)."
        )

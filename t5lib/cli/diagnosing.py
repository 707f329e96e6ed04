"""`t5 diagnose`: the shift ratio of every layer on a user's own images, and what it means for conversion."""

from collections.abc import Sequence
from pathlib import Path

import t5lib
from t5lib.analysis.key_shift import Diagnosis
from t5lib.cli import explaining, models
from t5lib.cli.arguments import Source
from t5lib.cli.screen import console, counted, note, notes, say, table
from t5lib.report import plots
from t5lib.utils import files

BAR = 20  # characters for a shift ratio of 1
MARKED = 0.1  # a mean so far above that of random weights is a shift that training put there


def run(
    source: Source, images: Sequence[Path], out: Path | None, device: str | None, converted: Path | None = None
) -> None:
    """Measure, print and, given `out`, write shift_ratio.json and shift_ratio.png; with `converted`, the folder of what
    was made of the model, compare the two as well."""
    place = models.choose_device(device)
    outline = models.outline(source)
    if converted:
        source = explaining.matching(source, outline, converted)
    model = models.load(source, place)
    reader = models.reader(source, model)
    with notes.status(f"measuring {counted(len(images), 'image')}, and the same with random weights"):
        pixels = reader.read(images)
        found = t5lib.diagnose(model, pixels)
    reader.report()
    show(found, f"{source.name}: {counted(len(pixels), 'image')}, {reader.description}", source.pretrained, out)
    if converted:
        explaining.run(source, model, converted, pixels, out)


def show(found: Diagnosis, of_what: str, pretrained: bool, out: Path | None) -> None:
    """Print what was measured and, given `out`, write it."""
    say(f"Shift ratio of the keys of {of_what}")
    _print_layers(found)
    say(reading(found.summary(), pretrained=pretrained))
    if out:
        files.write_json(out / "shift_ratio.json", found.as_dict())
        plots.save(plots.shift_ratio_map(**found.as_dict()), out / "shift_ratio.png")
        note(f"written: {out / 'shift_ratio.json'}, {out / 'shift_ratio.png'}")


def reading(summary: dict[str, float], *, pretrained: bool) -> str:
    """What the mean shift ratio means for a conversion, in plain words."""
    mean, control = summary["mean_shift_ratio"], summary["mean_shift_ratio_random_init"]
    measured = f"Mean {mean:.2f}, with random weights {control:.2f}."
    if not pretrained:
        return f"{measured} Both are random weights (--no-pretrained): a control, not a diagnosis."
    if mean < control + MARKED:
        return (
            f"{measured} What the keys share comes from the images and the architecture, hardly from training: check "
            "that these are the weights you mean. Key norm 'instance' (the default) is the safe choice all the same."
        )
    return (
        f"{measured} Training gave the keys of an image a common part. Softmax ignores it, a TTT layer does not: "
        "convert with key norm 'instance' (the default), which takes it out. In the paper's DeiT-Tiny, 'rms' and "
        "'layer' keep it and end 14 points lower in top-1; without any key norm the training diverges."
    )


def _print_layers(found: Diagnosis) -> None:
    rows = []
    for layer, heads, control in zip(found.layers, found.shift_ratio, found.random_init, strict=True):
        mean = sum(heads) / len(heads)
        numbers = (mean, min(heads), max(heads), sum(control) / len(control))
        rows.append((layer, *(f"{value:.2f}" for value in numbers), bar(mean)))
    table(("layer", "mean", "min", "max", "random init", "0" + "1".rjust(BAR - 1)), rows)
    console.print("[dim]mean, min, max: over the heads; 0: keys point everywhere, 1: all keys of an image are equal[/]")
    console.print()


def bar(value: float) -> str:
    """`value`, from 0 to 1, as a bar."""
    return ("█" * round(BAR * value)).ljust(BAR, "·")

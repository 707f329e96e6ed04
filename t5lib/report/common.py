"""What every report has in common: its models, their rows, and numbers that read alike everywhere."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t5lib.benchmarks.resolution_sweep import cost_ratios
from t5lib.report.models import MODELS, SOFTMAX, T5, T5_LIGHT, final

if TYPE_CHECKING:  # Matplotlib takes a second to import, and stages read this module for the types alone
    from matplotlib.figure import Figure

THIN, MINUS = "\u202f", "\u2212"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


RUNS = {
    "control": ("control", SOFTMAX),
    "freeze": ("freeze", T5_LIGHT),
    "finetune": ("fine-tune", T5),
}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The part of a report that depends on the kind of model.

    Attributes:
        columns: headings of the scores in the main table; lines of one are divided by a line break.
        rows: of `base_rows`, each with "cells": (text, its uncertainty or "") for each column.
        note: under that table; says what was measured on.
        caveat: the same in a line of the summary.
        sentences: for the headline.
        tiles: of `tile`.
        figures: by name, "quality" among them if there is one.
        headline: the score that runs are compared by, {its name: {model: value}}.
        scores: everything that was measured, t5lib.evaluation.scores.score_table, where the main table shows a part.
        use, snippet: how to use the model, in words and in code.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    note: str
    caveat: str
    sentences: list[str]
    tiles: list[dict[str, str]]
    figures: dict[str, "Figure"]
    headline: dict[str, dict[str, float]]
    scores: dict[str, Any] | None = None
    use: str
    snippet: str


def base_rows(metrics: dict[str, dict[str, Any]], evaluated: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the main table, in the order of the pipeline, with all but the scores.

    Args:
        metrics: by stage; evaluated: the models that have scores.
    """
    numbers, result, rows = metrics["convert"], final(evaluated), []
    for model in (model for model in MODELS if model.key in evaluated):
        times: list[float | None] = [metrics[stage].get("seconds") for stage in model.trained_by if stage in metrics]
        known = [seconds for seconds in times if seconds is not None]
        rows.append(
            {
                "key": model.key,
                "label": model.label,
                "what": model.what,
                "colour": model.colour,
                "softmax": model.softmax,
                "final": model.key == result,
                "new": 0 if model.softmax else numbers["new"],
                "inherited": numbers["inherited"] + (numbers["dropped"] if model.softmax else 0),
                "time": duration(sum(known)) if known and len(known) == len(times) else "–",
            }
        )
    return rows


def speed_tile(benchmark: dict[str, Any]) -> dict[str, str]:
    tokens, ratio = cost_ratios(benchmark["rows"])[-1]
    found = benchmark["break_even_tokens"]
    note = f"faster from {count(found)} tokens on" if found else "slower than softmax at this size"
    return tile(f"{1 / ratio:.2f}×", f"softmax speed, {count(tokens)} tokens", note)


def tile(value: str, label: str, note: str) -> dict[str, str]:
    return {"value": value, "label": label, "note": note}


def conditions(bench: dict[str, Any]) -> str:
    """What a benchmark's times hold for."""
    compiled = "with torch.compile" if bench["compile"] else "without torch.compile"
    return f"{bench['device']}, in {bench['dtype']}, batch {bench['batch']}, {compiled}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}{THIN}%"


def signed(value: float) -> str:
    """-1.9 with a true minus sign, +0.4."""
    return f"{value:+.1f}".replace("-", MINUS)


def significant(value: float) -> str:
    """Three significant figures; very small values as 3.8×10⁻⁷."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return f"{value:,.{decimals(value)}f}"


def decimals(value: float) -> int:
    """Digits behind the point that show three significant figures of `value`."""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0


def count(value: int) -> str:
    return f"{value:,}"


def short(value: int) -> str:
    """1,325,000 as 1.33 M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{significant(value / size)}{THIN}{unit}"
    return str(value)


def duration(seconds: float) -> str:
    """43 s, 2 min 46 s, 1 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}{THIN}s"
    if seconds < 3600:
        return f"{seconds // 60}{THIN}min {seconds % 60:02d}{THIN}s"
    return f"{seconds // 3600}{THIN}h {seconds % 3600 // 60:02d}{THIN}min"

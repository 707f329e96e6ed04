"""The report's part on classifiers: top-1 with its standard error, agreement with the source."""

import math

from t5lib.data.images import DataConfig
from t5lib.report import plots
from t5lib.report.common import Quality, base_rows, count, percent, signed, tile
from t5lib.report.data import ReportData
from t5lib.report.models import WITHOUT_LABELS
from t5lib.utils.config import to_dict

SCORES = {"Top-1": "top1", "Top-5": "top5", "Agrees with\nsource": "agreement"}


def quality(data: ReportData, images: DataConfig) -> Quality:
    """What the page and the summary say about `data`'s models, whose images are prepared as `images` says."""
    evaluated, number = data.evaluated, data.evaluated["finetuned"]["n"]
    known = {key for result in evaluated.values() for key, value in result.items() if value is not None}
    columns = [title for title, key in SCORES.items() if key in known]
    rows = [row | {"cells": _cells(evaluated[row["key"]], columns)} for row in base_rows(data.metrics, evaluated)]
    bars = [
        row | {"label": row["label"].lower(), "top1": result["top1"], "error": standard_error(result)}
        for row in rows
        for result in [evaluated[row["key"]]]
    ]
    return Quality(
        columns=tuple(columns),
        rows=rows,
        note=(
            f"All are shares of {count(number)} test images. ± is one binomial standard error, √(p(100−p)/n). The "
            "models saw the same images, so differences between them are known somewhat better than the two errors "
            "suggest. This is one seed."
        ),
        caveat=f"± is one binomial standard error on {count(number)} images; this is one seed.",
        sentences=_sentences(data),
        tiles=_tiles(data),
        figures={"quality": plots.quality_bars(bars)},
        headline={"top1": {row["key"]: row["top1"] for row in bars}},
        use="The loaded model keeps timm's interface.",
        snippet=_snippet(data, images),
    )


def _cells(result: dict[str, float], columns: list[str]) -> list[tuple[str, str]]:
    errors = {"Top-1": f"±{standard_error(result):.1f}"}
    return [(percent(result.get(SCORES[title])), errors.get(title, "")) for title in columns]


def standard_error(result: dict[str, float]) -> float:
    """One binomial standard error of result["top1"], in points: sqrt(p (100 - p) / n)."""
    return math.sqrt(result["top1"] * (100 - result["top1"]) / result["n"])


def difference(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, float]:
    """Difference of top-1 in points, and a standard error as if the models had seen different images.

    They see the same ones, which makes the true error of the difference smaller.
    """
    return ours["top1"] - theirs["top1"], math.hypot(standard_error(ours), standard_error(theirs))


def _sentences(data: ReportData) -> list[str]:
    """Quality kept, and what calibration alone gives, as far as known."""
    models, tuned = data.evaluated, data.evaluated["finetuned"]
    sentence = f"Fine-tuned, the converted model gets {percent(tuned['top1'])} of {count(tuned['n'])} test images right"
    if "control" in models:
        gap, error = difference(tuned, models["control"])
        sentence += (
            f"; the softmax original, fine-tuned with the same budget, gets {percent(models['control']['top1'])} "
            f"({signed(gap)} ± {error:.1f} points)"
        )
    else:
        sentence += f"; the softmax source gets {percent(models['source']['top1'])}"
    sentences = [sentence + "."]
    sentences += [
        f"{words}, it gets {percent(models[key]['top1'])} right, without labels and before any fine-tune "
        f"(source {percent(models['source']['top1'])})."
        for key, words in WITHOUT_LABELS.items()
        if key in models
    ]
    return sentences


def _tiles(data: ReportData) -> list[dict[str, str]]:
    models, tuned = data.evaluated, data.evaluated["finetuned"]
    error = standard_error(tuned)
    tiles = [tile(percent(tuned["top1"]), "top-1, T5 fine-tuned", f"± {error:.1f} on {count(tuned['n'])} images")]
    if "control" in models:
        gap, error = difference(tuned, models["control"])
        tiles.append(
            tile(signed(gap), "points against control", f"± {error:.1f}; control {percent(models['control']['top1'])}")
        )
    if known := [key for key in WITHOUT_LABELS if key in models]:
        source = percent(models["source"]["top1"])
        tiles.append(tile(percent(models[known[-1]]["top1"]), f"{known[-1]}, no labels", f"source {source}"))
    return tiles


def _snippet(data: ReportData, images: DataConfig) -> str:
    """Python that loads the fine-tuned model and classifies a picture."""
    settings = {key: value for key, value in to_dict(images).items() if key not in ("workers", "eval_batch_size")}
    arguments = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    return (
        "from pathlib import Path\n\n"
        "import torch\n\n"
        "import t5lib\n"
        "from t5lib.data.decoding import decode\n"
        "from t5lib.data.images import DataConfig, transform\n\n"
        f'model = t5lib.load("data/out/{data.target}/finetune")  # device="cuda" for a GPU\n'
        f"prepare = transform(DataConfig(\n{arguments}))\n"
        'image = prepare(decode(Path("picture.png")))\n'
        "with torch.inference_mode():\n"
        "    probabilities = model(image[None]).softmax(-1)[0]\n"
        "print(probabilities.argmax().item(), probabilities.max().item())\n"
    )

"""The report's part on denoisers: what their pictures are like, and whether they show what was asked for."""

from typing import Any

from t5lib.report.common import Quality, base_rows, count, percent, tile
from t5lib.report.data import ReportData
from t5lib.report.models import WITHOUT_LABELS, final
from t5lib.report.score_table import score_table

REAL = "real images"  # what pictures are compared with, unless the scores name something else
MAIN = ("loss", "fid", "fd_dinov2", "retrieval_r1")  # of the scores, those in the main table and the headline


def quality(data: ReportData) -> Quality:
    """What the page and the summary say about `data`'s models."""
    scores, result = score_table(data.evaluated), data.evaluated[final(data.evaluated)]
    main = [row for row in scores["rows"] if row["metric"] in MAIN]
    rows = base_rows(data.metrics, data.evaluated)
    measured = (
        f"{count(result['generated'])} images a model, the same prompts and noise for all, beside "
        f"{count(result['real'])} {result.get('reference', 'real ones')}; features: {result['extractor']}"
    )
    return Quality(
        columns=tuple(f"{row['label']}\n({row['better']} is better)" for row in main),
        rows=[row | {"cells": [(_text(score, row["key"]), "") for score in main]} for row in rows],
        note=f"{measured}. Few images make distances too large; compare them only with each other. This is one seed.",
        caveat=f"{measured}; this is one seed.",
        sentences=_sentences(data, main),
        tiles=_tiles(data.evaluated, main),
        figures={},
        headline=_headline(_distance(main), [row["key"] for row in rows]),
        scores=scores,
        use="It is the pipeline's transformer; the pipeline's other parts are those of the source.",
        snippet=_snippet(data.target),
    )


def _text(score: dict[str, Any], model: str) -> str:
    value = score["values"].get(model)
    return "–" if value is None else f"{value:.{score['digits']}f}"


def _distance(main: list[dict[str, Any]]) -> dict[str, Any]:
    """The distance to real images, or what stands for them, which every denoiser's evaluation has."""
    return next(row for row in main if row["metric"] in ("fid", "fd_dinov2"))


def _headline(score: dict[str, Any], models: list[str]) -> dict[str, dict[str, float]]:
    values = {model: score["values"][model] for model in models}
    return {score["metric"]: {model: value for model, value in values.items() if value is not None}}


def _sentences(data: ReportData, main: list[dict[str, Any]]) -> list[str]:
    evaluated, result = data.evaluated, final(data.evaluated)
    against = "control" if "control" in evaluated else "source"
    other = "the softmax original, fine-tuned with the same budget," if against == "control" else "the softmax source"
    distance, reference = _distance(main), evaluated[result].get("reference", REAL)
    sentences = [
        f"{WITHOUT_LABELS.get(result, 'Fine-tuned')}, the converted model has an {distance['label']} of "
        f"{_text(distance, result)} to {reference}; {other} has {_text(distance, against)} (lower is better)."
    ]
    if "retrieval_r1" in evaluated[result]:
        found = [percent(100 * evaluated[name]["retrieval_r1"]) for name in (result, against)]
        nearest = "real picture" if reference == REAL else "sample of the source"
        sentences.append(
            f"In {found[0]} of its images the nearest {nearest} shows what was asked for; {other} has {found[1]}."
        )
    if data.skipped:
        sentences.append(f"Fine-tune and control were skipped: {data.skipped}.")
    return sentences + [
        f"{words}{'' if data.skipped else ', before any fine-tune'}, it has an {distance['label']} of "
        f"{_text(distance, key)} (source {_text(distance, 'source')})."
        for key, words in WITHOUT_LABELS.items()
        if key in evaluated and key != result
    ]


def _tiles(evaluated: dict[str, Any], main: list[dict[str, Any]]) -> list[dict[str, str]]:
    against, result = "control" if "control" in evaluated else "source", final(evaluated)
    made = WITHOUT_LABELS.get(result, "fine-tuned").lower()
    return [
        tile(_text(row, result), f"{row['label']}, T5 {made}", f"{against} {_text(row, against)}")
        for row in main
        if row["metric"] != "loss"
    ]


def _snippet(target: str) -> str:
    return (
        f"python -m tasks.studies.export {target} --out {target}-t5    # a diffusers pipeline with a model card\n\n"
        "import t5lib\n\n"
        f'pipe = t5lib.load_pipeline("{target}-t5")\n'
    )

"""What is shown of the scores of several models (t5lib.evaluation.scores): their order, names and digits."""

import math
from typing import Any

from t5lib.report.models import MODELS

ORDER = [model.key for model in sorted(MODELS, key=lambda model: not model.softmax)]
# What a table of scores shows, in this order: name of the score, heading, whether less is better, digits.
METRICS = {
    "loss": ("held-out loss", "lower", 4),
    "fid": ("FID", "lower", 1),
    "fd_dinov2": ("FD-DINOv2", "lower", 1),
    "kid": ("KID", "lower", 4),
    "inception_score": ("IS", "higher", 2),
    "precision": ("precision", "higher", 3),
    "recall": ("recall", "higher", 3),
    "clip_score": ("CLIP score", "higher", 2),
    "retrieval_r1": ("right subject, R@1", "higher", 3),
    "retrieval_r5": ("R@5", "higher", 3),
    "count": ("right count", "higher", 3),
    "background": ("right background", "higher", 3),
    "patch_cosine": ("distance to source, 1 - cosine", "lower", 3),
    "patch_l2": ("distance to source, L2", "lower", 2),
    "psnr": ("PSNR to source (dB)", "higher", 1),
}


def score_table(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a report shows of the scores of several models, as plain data.

    Args:
        scores: model to its scores, such as the dictionaries above put together; models in any order, those of ORDER
            first; a score may be missing, and a model that has none is left out.

    Returns:
        {"models": [name, …], "rows": [{"metric", "label", "better": "lower" or "higher", "digits",
        "values": {model: number or None}}, …], "extractors": [name, …], "notes": [sentence, …]}; only metrics that
        some model has, in the order of METRICS.
    """
    models = [name for name in ORDER if name in scores] + [name for name in scores if name not in ORDER]
    models = [name for name in models if scores[name].keys() & METRICS.keys()]
    rows = []
    for metric, (label, better, digits) in METRICS.items():
        values = {name: _number(scores[name].get(metric)) for name in models}
        if any(value is not None for value in values.values()):
            rows.append({"metric": metric, "label": label, "better": better, "digits": digits, "values": values})
    return {
        "models": models,
        "rows": rows,
        "extractors": sorted({found["extractor"] for found in scores.values() if "extractor" in found}),
        "notes": sorted({found["clip_note"] for found in scores.values() if "clip_note" in found}),
    }


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None

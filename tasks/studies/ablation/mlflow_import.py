"""An ablation in MLflow: one run for the whole, nested in it one for every variant and seed."""

import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from tasks.runtime import tracking
from tasks.runtime.tracking import about, store
from tasks.studies.ablation.runner import Result

CODE = "tasks/studies/ablation"
SECTIONS = ("calibrate", "freeze", "finetune")


class Recorder:
    """Records results as they come, where MLflow is installed; a problem with the record never stops the work."""

    def __init__(self, root: Path):
        self.root, self.off = root, not store.installed()

    def __call__(self, result: Result, record: dict[str, Any]) -> None:
        if self.off:
            return
        try:
            parent, _ = _parent(self.root, result)
            _child(self.root, result, record, parent)
        except Exception as error:
            self.off = True
            print(f"MLflow: {type(error).__name__}: {error}; no further result is recorded", file=sys.stderr)


def import_result(root: Path, result: Result) -> tuple[int, int]:
    """Record a whole result file; how many of its runs were new, and how many were there.

    Raises:
        T5Error: MLflow is not installed, or the file holds no run yet.
    """
    if not result["records"]:
        raise T5Error(f"the ablation '{result['ablation']}' has no result yet, so there is nothing to record")
    parent, _ = _parent(root, result)
    records = [record for seeds in result["records"].values() for record in seeds.values()]
    new = sum(_child(root, result, record, parent) for record in records)
    return new, len(records) - new


def _parent(root: Path, result: Result) -> tuple[str, bool]:
    """The run of the whole ablation, with the means over seeds as they are now."""
    records = [record for seeds in result["records"].values() for record in seeds.values()]
    latest = max(records, key=lambda record: record["ended"])
    return tracking.record_past_run(
        root,
        name=result["ablation"],
        target=result["target"],
        code=CODE,
        settings={"ablation": {"images": result["images"], "control": result["control"]}},
        metrics={"mean_top1": {variant: _means(list(seeds.values())) for variant, seeds in result["records"].items()}},
        tags={
            "stage": "ablation",
            "ablation": result["ablation"],
            "record": f"ablation {result['ablation']}",
            "device": latest["device"],
            "git_commit": latest["git_commit"],
        },
        started=min(record["started"] for record in records),
        ended=latest["ended"],
    )


def _child(root: Path, result: Result, record: dict[str, Any], parent: str) -> bool:
    """Record one variant and seed under the names that a flow's run has; True when it is new."""
    calibration = {key: record["calibration"].get(key) for key in ("error_before", "error_after")}
    _, new = tracking.record_past_run(
        root,
        name=f"{record['variant']}, seed {record['seed']}",
        target=result["target"],
        code=CODE,
        settings=record["settings"] | {"pilot_chose": record["calibration"].get("chosen", {})},
        metrics={
            "evaluate": {"models": record["models"]},
            "calibrate": calibration,
            "convert": {"new": record["new_parameters"]},
            "seconds": record["seconds"],
        },
        tags={
            "stage": "variant",
            "protocol": about.protocol(record["settings"], list(SECTIONS)),
            "ablation": result["ablation"],
            "variant": record["variant"],
            "seed": str(record["seed"]),
            "record": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest(),
            "device": record["device"],
            "git_commit": record["git_commit"],
            "mlflow.parentRunId": parent,
            **{f"stopped.{part}": message[:4000] for part, message in record["stopped"].items()},
        },
        started=record["started"],
        ended=record["ended"],
        status="FAILED" if record["stopped"] else "FINISHED",
    )
    return new


def _means(records: list[dict[str, Any]]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for record in records:
        for name, score in record["models"].items():
            scores.setdefault(name, []).append(score["top1"])
    return {name: statistics.mean(values) for name, values in scores.items()}
